/* The layout of a packed weight (nmflow.h describes it): what a shape implies, and whether two
 * buffers hold a weight of that shape. */
#include "common.h"

namespace {

typedef nmf_geometry G;

/* The first column inside its span that entry s may have: where its group starts. */
int64_t first_code(const G &g, int64_t s) { return s / g.n * g.m % g.span; }

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

bool codes_are_good(const G &g, const void *codes) {
  const int64_t rows = g.panels ? g.panels : g.tiles * 16;
  for (int64_t i = 0; i < rows; ++i) {
    const int64_t row = g.panels ? i * g.panel : i;
    const bool padding = row >= g.out;
    int64_t before = 0;
    for (int64_t s = 0; s < g.entries; ++s) {
      const int64_t code = read_code(g, codes, row, s), start = first_code(g, s);
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
  g->panels = g->panel % 16 == 0 ? nmf_ceil_div(g->out, g->panel) : 0;
  const int64_t item = nmf_item_bytes(shape->dtype);
  if (__builtin_mul_overflow(g->tiles * 16, g->entries_held * item, &g->values_bytes))
    return NMFLOW_BAD_SHAPE;
  if (__builtin_mul_overflow(g->tiles * 64, g->words, &g->codes_bytes)) return NMFLOW_BAD_SHAPE;
  if (g->panels) g->codes_bytes = g->panels * g->entries;
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
