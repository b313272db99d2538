/* The layout of a packed weight (nmflow.h describes it): what a shape implies, and whether two
 * buffers hold a weight of that shape. */
#include "common.h"
#include "vector.h"

namespace {

typedef nmf_geometry G;

/* Where entry s of a row lies among the packed values, in elements. */
int64_t value_at(const G &g, int64_t row, int64_t s) {
  const int64_t tile = row / 16 * g.entries_held * 16, lane = row % 16;
  if (g.dtype == NMFLOW_F32) return tile + s * 16 + lane;
  return tile + s / 2 * 32 + lane * 2 + s % 2;
}

/* Where the group of an entry starts in its span, entry after entry. */
struct Group {
  const G &g;
  int64_t start, entry; /* of the group */

  bool first() const { return entry == 0; }
  void next() {
    if (++entry < g.n) return;
    entry = 0;
    start = start + g.m == g.span ? 0 : start + g.m;
  }
};

bool shared_codes_are_good(const G &g, const uint8_t *codes) {
  for (int64_t p = 0; p < g.panels; ++p, codes += g.entries) {
    Group at = {g, 0, 0};
    for (int64_t s = 0; s < g.entries; ++s, at.next())
      if (codes[s] < at.start || codes[s] >= at.start + g.m || (!at.first() && codes[s] <= codes[s - 1]))
        return false;
  }
  return true;
}

/* LANES rows of a tile at once: a network's weights are checked where it starts. */
bool rows_are_good(const G &g, const uint32_t *words, int64_t tile, int first) {
  const uint32_t mask = (1u << g.bits) - 1, bits = static_cast<uint32_t>(g.bits);
  vecu bad = {}, any = {}, other = {}, before = {};
  Group at = {g, 0, 0};
  for (int64_t w = 0, s = 0; w < g.words; ++w, words += 16) {
    vecu word = load(words + first);
    any |= word;
    if (g.panel > 1)
      other |= word ^ rows_before(words, first, tile ? words - g.words * 16 : nullptr);
    for (int64_t k = 0; k < g.per && s < g.entries; ++k, ++s, at.next()) {
      const vecu code = word & mask;
      /* Codes are below 256, so signed comparisons are right, which every machine has. */
      const veci inside = (veci)(code - static_cast<uint32_t>(at.start));
      bad |= (vecu)(inside < 0) | (vecu)(inside >= static_cast<int32_t>(g.m));
      if (!at.first()) bad |= (vecu)((veci)code <= (veci)before);
      before = code;
      word >>= bits;
    }
    bad |= word; /* behind the last entry */
  }
  for (int i = 0; i < LANES; ++i) {
    const int64_t row = tile * 16 + first + i;
    if (row >= g.out ? any[i] : bad[i]) return false;
    /* Rows of a panel that codes cannot be shared for have codes of their own: they must agree. */
    if (row < g.out && row % g.panel && other[i]) return false;
  }
  return true;
}

bool codes_are_good(const G &g, const void *codes) {
  if (g.panels) return shared_codes_are_good(g, static_cast<const uint8_t *>(codes));
  const uint32_t *words = static_cast<const uint32_t *>(codes);
  for (int64_t tile = 0; tile < g.tiles; ++tile, words += g.words * 16)
    for (int first = 0; first < 16; first += LANES)
      if (!rows_are_good(g, words, tile, first)) return false;
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
