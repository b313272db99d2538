/* The in-memory layout: sizes, conversions to and from the canonical form, and validation.
 * nmflow.h describes both forms. */
#include "common.h"

namespace {

typedef nmf_geometry G;

/* Column inside its span of entry s whose column inside its group is `index`. */
int64_t code_of(const G &g, int64_t s, int64_t index) {
  return (s / g.n) * g.m % g.span + index;
}

const uint32_t *words_of(const G &g, const void *codes, int64_t tile) {
  return static_cast<const uint32_t *>(codes) + tile * g.words * 16;
}

int64_t read_code(const G &g, const void *codes, int64_t row, int64_t s) {
  if (g.panels) return static_cast<const uint8_t *>(codes)[row / g.panel * g.entries + s];
  const uint32_t word = words_of(g, codes, row / 16)[s / g.per * 16 + row % 16];
  return word >> (s % g.per * g.bits) & ((1u << g.bits) - 1);
}

/* Where entry s of a row lies among the packed values, in elements. */
int64_t value_at(const G &g, int64_t row, int64_t s) {
  const int64_t tile = row / 16 * g.entries_held * 16, lane = row % 16;
  if (g.dtype == NMFLOW_F32) return tile + s * 16 + lane;
  return tile + s / 2 * 32 + lane * 2 + s % 2;
}

int64_t list_of(const G &g, int64_t row) { return g.panel > 1 ? row / g.panel : row; }

/* Every run of n indices strictly increasing and below m: then a row has exactly n of each group. */
bool index_is_good(const G &g, const uint8_t *index) {
  for (int64_t list = 0; list < g.lists; ++list) {
    const uint8_t *row = index + list * g.entries;
    for (int64_t s = 0; s < g.entries; ++s) {
      if (row[s] >= g.m) return false;
      if (s % g.n && row[s] <= row[s - 1]) return false;
    }
  }
  return true;
}

template <typename T>
bool is_zero(T bits) {
  return (bits & static_cast<T>(static_cast<T>(~T(0)) >> 1)) == 0;
}

template <typename T>
int canonical_from_dense(const G &g, const T *dense, int64_t stride, T *values, uint8_t *index) {
  for (int64_t list = 0; list < g.lists; ++list) {
    const int64_t first = g.panel > 1 ? list * g.panel : list;
    const int64_t last = g.panel > 1 ? nmf_min(first + g.panel, g.out) : first + 1;
    for (int64_t group = 0; group < g.in / g.m; ++group) {
      uint8_t kept[256];
      memset(kept, 0, static_cast<size_t>(g.m));
      int64_t count = 0;
      for (int64_t c = 0; c < g.m; ++c) {
        for (int64_t row = first; row < last && !kept[c]; ++row)
          kept[c] = !is_zero(dense[row * stride + group * g.m + c]);
        count += kept[c];
      }
      if (count > g.n) return NMFLOW_NOT_SPARSE;
      for (int64_t c = 0; c < g.m && count < g.n; ++c)
        if (!kept[c]) {
          kept[c] = 1;
          ++count;
        }
      int64_t s = group * g.n;
      for (int64_t c = 0; c < g.m; ++c)
        if (kept[c]) {
          index[list * g.entries + s] = static_cast<uint8_t>(c);
          for (int64_t row = first; row < last; ++row)
            values[row * g.entries + s] = dense[row * stride + group * g.m + c];
          ++s;
        }
    }
  }
  return NMFLOW_OK;
}

template <typename T>
void dense_from_canonical(const G &g, const T *values, const uint8_t *index, T *dense,
                          int64_t stride) {
  for (int64_t row = 0; row < g.out; ++row) {
    memset(dense + row * stride, 0, static_cast<size_t>(g.in) * sizeof(T));
    const uint8_t *list = index + list_of(g, row) * g.entries;
    for (int64_t s = 0; s < g.entries; ++s)
      dense[row * stride + s / g.n * g.m + list[s]] = values[row * g.entries + s];
  }
}

template <typename T>
void packed_from_canonical(const G &g, const T *values, const uint8_t *index, T *to, void *codes) {
  memset(to, 0, static_cast<size_t>(g.values_bytes));
  memset(codes, 0, static_cast<size_t>(g.codes_bytes));
  if (g.panels)
    for (int64_t i = 0; i < g.panels * g.entries; ++i)
      static_cast<uint8_t *>(codes)[i] =
          static_cast<uint8_t>(code_of(g, i % g.entries, index[i]));
  for (int64_t row = 0; row < g.out; ++row) {
    const uint8_t *list = index + list_of(g, row) * g.entries;
    uint32_t *words = static_cast<uint32_t *>(codes) + row / 16 * g.words * 16 + row % 16;
    for (int64_t s = 0; s < g.entries; ++s) {
      to[value_at(g, row, s)] = values[row * g.entries + s];
      if (!g.panels)
        words[s / g.per * 16] |= static_cast<uint32_t>(code_of(g, s, list[s]))
                                 << (s % g.per * g.bits);
    }
  }
}

template <typename T>
void canonical_from_packed(const G &g, const T *from, const void *codes, T *values,
                           uint8_t *index) {
  for (int64_t row = 0; row < g.out; ++row) {
    const bool lists_here = g.panel <= 1 || row % g.panel == 0;
    for (int64_t s = 0; s < g.entries; ++s) {
      values[row * g.entries + s] = from[value_at(g, row, s)];
      if (lists_here)
        index[list_of(g, row) * g.entries + s] =
            static_cast<uint8_t>(read_code(g, codes, row, s) - code_of(g, s, 0));
    }
  }
}


bool codes_are_good(const G &g, const void *codes) {
  const int64_t rows = g.panels ? g.panels : g.tiles * 16;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = g.panels ? i * g.panel : i;
    const bool padding = row >= g.out;
    int64_t before = 0;
    for (int64_t s = 0; s < g.entries; ++s) {
      const int64_t code = read_code(g, codes, row, s), start = code_of(g, s, 0);
      if (padding ? code != 0 : (code < start || code >= start + g.m)) return false;
      if (!padding && s % g.n && code <= before) return false;
      before = code;
    }
    if (!g.panels)
      for (int64_t s = g.entries; s < g.words * g.per; ++s)
        if (read_code(g, codes, row, s)) return false;
    /* Rows of a panel that codes cannot be shared for have codes of their own: they must agree. */
    if (!g.panels && g.panel > 1 && !padding && row % g.panel)
      for (int64_t s = 0; s < g.entries; ++s)
        if (read_code(g, codes, row, s) != read_code(g, codes, row - 1, s)) return false;
  }
  return true;
}

/* Either zero: a weight whose values were negated in place is a weight. */
template <typename T>
bool padding_is_zero(const G &g, const T *values) {
  for (int64_t row = 0; row < g.tiles * 16; ++row)
    for (int64_t s = row < g.out ? g.entries : 0; s < g.entries_held; ++s)
      if (static_cast<T>(values[value_at(g, row, s)] << 1)) return false;
  return true;
}

int check_canonical(const nmflow_shape *shape, G *g, const void *values, int64_t values_bytes,
                    const uint8_t *index, int64_t index_bytes) {
  const int status = nmf_geometry_of(shape, g);
  if (status != NMFLOW_OK) return status;
  if (values == nullptr || index == nullptr) return NMFLOW_BAD_POINTER;
  if (values_bytes != g->canonical_values_bytes || index_bytes != g->canonical_index_bytes)
    return NMFLOW_BAD_BYTES;
  return NMFLOW_OK;
}

int check_packed(const nmflow_packed *packed, G *g) {
  if (packed == nullptr) return NMFLOW_BAD_POINTER;
  const int status = nmf_geometry_of(&packed->shape, g);
  if (status != NMFLOW_OK) return status;
  if (packed->values == nullptr || packed->codes == nullptr) return NMFLOW_BAD_POINTER;
  if (packed->values_bytes != g->values_bytes || packed->codes_bytes != g->codes_bytes)
    return NMFLOW_BAD_BYTES;
  return NMFLOW_OK;
}

}  // namespace

int nmf_geometry_of(const nmflow_shape *shape, nmf_geometry *g) {
  if (shape == nullptr) return NMFLOW_BAD_POINTER;
  memset(g, 0, sizeof *g);
  if (shape->dtype < NMFLOW_F32 || shape->dtype > NMFLOW_F16) return NMFLOW_BAD_DTYPE;
  if (shape->n < 1 || shape->m < shape->n || shape->m > 256 || shape->panel < 1)
    return NMFLOW_BAD_PATTERN;
  /* 2^24 inputs: an offset into a transposed x (at most 48 tokens wide) fits 32 bits. 2^40 rows and
   * 2^56 in all: far above any memory, and no product below can overflow. */
  const int64_t rows = INT64_C(1) << 40, inputs = INT64_C(1) << 24;
  int64_t total;
  if (shape->out < 1 || shape->in < 1 || shape->out > rows || shape->in > inputs ||
      __builtin_mul_overflow(shape->out, shape->in, &total) || total > (INT64_C(1) << 56))
    return NMFLOW_BAD_SHAPE;
  if (shape->in % shape->m) return NMFLOW_BAD_PATTERN;
  g->out = shape->out;
  g->in = shape->in;
  g->n = shape->n;
  g->m = shape->m;
  g->panel = shape->panel;
  g->dtype = shape->dtype;
  g->entries = g->in / g->m * g->n;
  g->entries_held = g->dtype == NMFLOW_F32 ? g->entries : nmf_ceil_div(g->entries, 2) * 2;
  g->tiles = nmf_ceil_div(g->out, 16);
  g->span = g->m <= 16 ? 16 / g->m * g->m : g->m;
  g->span_entries = g->span / g->m * g->n;
  g->spans = nmf_ceil_div(g->in, g->span);
  g->bits = g->m <= 16 ? 4 : 8;
  g->per = 32 / g->bits;
  g->words = nmf_ceil_div(g->entries, g->per);
  g->lists = g->panel > 1 ? nmf_ceil_div(g->out, g->panel) : g->out;
  g->panels = g->panel % 16 == 0 ? nmf_ceil_div(g->out, g->panel) : 0;
  const int64_t item = nmf_item_bytes(shape->dtype);
  if (__builtin_mul_overflow(g->tiles * 16, g->entries_held * item, &g->values_bytes))
    return NMFLOW_BAD_SHAPE;
  if (__builtin_mul_overflow(g->tiles * 64, g->words, &g->codes_bytes)) return NMFLOW_BAD_SHAPE;
  if (g->panels) g->codes_bytes = g->panels * g->entries;
  g->canonical_values_bytes = g->out * g->entries * item;
  g->canonical_index_bytes = g->lists * g->entries;
  return NMFLOW_OK;
}

int32_t nmflow_sizes(const nmflow_shape *shape, int64_t *values_bytes, int64_t *codes_bytes,
                     int64_t *canonical_values_bytes, int64_t *canonical_index_bytes) {
  G g;
  const int status = nmf_geometry_of(shape, &g);
  if (status != NMFLOW_OK) return status;
  if (values_bytes) *values_bytes = g.values_bytes;
  if (codes_bytes) *codes_bytes = g.codes_bytes;
  if (canonical_values_bytes) *canonical_values_bytes = g.canonical_values_bytes;
  if (canonical_index_bytes) *canonical_index_bytes = g.canonical_index_bytes;
  return NMFLOW_OK;
}

int32_t nmflow_canonical_from_dense(const nmflow_shape *shape, const void *dense,
                                    int64_t dense_stride, void *values, uint8_t *index) {
  G g;
  const int status = nmf_geometry_of(shape, &g);
  if (status != NMFLOW_OK) return status;
  if (dense_stride < g.in || dense_stride > (INT64_C(1) << 60) / g.out) return NMFLOW_BAD_SHAPE;
  if (dense == nullptr || values == nullptr || index == nullptr) return NMFLOW_BAD_POINTER;
  if (g.dtype == NMFLOW_F32)
    return canonical_from_dense(g, static_cast<const uint32_t *>(dense), dense_stride,
                                static_cast<uint32_t *>(values), index);
  return canonical_from_dense(g, static_cast<const uint16_t *>(dense), dense_stride,
                              static_cast<uint16_t *>(values), index);
}

int32_t nmflow_dense_from_canonical(const nmflow_shape *shape, const void *values,
                                    int64_t values_bytes, const uint8_t *index,
                                    int64_t index_bytes, void *dense, int64_t dense_stride) {
  G g;
  const int status = check_canonical(shape, &g, values, values_bytes, index, index_bytes);
  if (status != NMFLOW_OK) return status;
  if (dense_stride < g.in || dense_stride > (INT64_C(1) << 60) / g.out) return NMFLOW_BAD_SHAPE;
  if (dense == nullptr) return NMFLOW_BAD_POINTER;
  if (!index_is_good(g, index)) return NMFLOW_BAD_INDEX;
  if (g.dtype == NMFLOW_F32)
    dense_from_canonical(g, static_cast<const uint32_t *>(values), index,
                         static_cast<uint32_t *>(dense), dense_stride);
  else
    dense_from_canonical(g, static_cast<const uint16_t *>(values), index,
                         static_cast<uint16_t *>(dense), dense_stride);
  return NMFLOW_OK;
}

int32_t nmflow_packed_from_canonical(const nmflow_shape *shape, const void *values,
                                     int64_t values_bytes, const uint8_t *index,
                                     int64_t index_bytes, void *packed_values,
                                     int64_t packed_values_bytes, void *codes,
                                     int64_t codes_bytes) {
  G g;
  const int status = check_canonical(shape, &g, values, values_bytes, index, index_bytes);
  if (status != NMFLOW_OK) return status;
  if (packed_values == nullptr || codes == nullptr) return NMFLOW_BAD_POINTER;
  if (packed_values_bytes != g.values_bytes || codes_bytes != g.codes_bytes)
    return NMFLOW_BAD_BYTES;
  if (!index_is_good(g, index)) return NMFLOW_BAD_INDEX;
  if (g.dtype == NMFLOW_F32)
    packed_from_canonical(g, static_cast<const uint32_t *>(values), index,
                          static_cast<uint32_t *>(packed_values), codes);
  else
    packed_from_canonical(g, static_cast<const uint16_t *>(values), index,
                          static_cast<uint16_t *>(packed_values), codes);
  return NMFLOW_OK;
}

int32_t nmflow_validate(const nmflow_packed *packed) {
  G g;
  const int status = check_packed(packed, &g);
  if (status != NMFLOW_OK) return status;
  if (!codes_are_good(g, packed->codes)) return NMFLOW_BAD_INDEX;
  const bool clean = g.dtype == NMFLOW_F32
                         ? padding_is_zero(g, static_cast<const uint32_t *>(packed->values))
                         : padding_is_zero(g, static_cast<const uint16_t *>(packed->values));
  return clean ? NMFLOW_OK : NMFLOW_BAD_INDEX;
}

int32_t nmflow_canonical_from_packed(const nmflow_packed *packed, void *values,
                                     int64_t values_bytes, uint8_t *index, int64_t index_bytes) {
  const int bad = nmflow_validate(packed);
  if (bad != NMFLOW_OK) return bad;
  G g;
  const int status =
      check_canonical(&packed->shape, &g, values, values_bytes, index, index_bytes);
  if (status != NMFLOW_OK) return status;
  if (g.dtype == NMFLOW_F32)
    canonical_from_packed(g, static_cast<const uint32_t *>(packed->values), packed->codes,
                          static_cast<uint32_t *>(values), index);
  else
    canonical_from_packed(g, static_cast<const uint16_t *>(packed->values), packed->codes,
                          static_cast<uint16_t *>(values), index);
  return NMFLOW_OK;
}
