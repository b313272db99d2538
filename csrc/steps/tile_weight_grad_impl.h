/* The gradient of W of panels in bfloat16 on tiles, dW = dy^T x at kept places, by 128 tokens.
 *
 * A left operand is [16 entries][16 pairs of tokens], rows of a turned x that are brought together, a right one
 * [16 pairs of tokens][16 rows]; sums lie as [tiles][entries][16 rows]. */
#include "send.h"
#include "tile_places.h"

namespace {

const int64_t WIDE = 128, WIDE_STEPS = WIDE / 32;

/* A tile's dy of `count` <= 128 tokens as [pairs of tokens][16 rows], zeros up to the next 32 tokens, added up into the
 * gradient of its bias. */
void lay_tokens(const Job *job, int64_t token, int64_t count, int64_t tile, char *to, float *bias) {
  const int64_t out = job->g.out, rows = nmf_min(16, out - tile * 16);
  const __mmask16 there = static_cast<__mmask16>((1u << rows) - 1u);
  const uint16_t *from = job->dy + token * out + tile * 16;
  __m512 sum = _mm512_load_ps(bias);
  for (int64_t t = 0; t < nmf_ceil_div(count, 32) * 32; t += 2, from += 2 * out, to += LINE) {
    const __mmask16 first = t < count ? there : 0, second = t + 1 < count ? there : 0;
    const __m512i low = _mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(first, from));
    const __m512i high = _mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_maskz_loadu_epi16(second, from + out)), 16);
    _mm512_store_si512(to, _mm512_or_si512(low, high));
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(_mm512_slli_epi32(low, 16)));
    sum = _mm512_add_ps(sum, _mm512_castsi512_ps(high));
  }
  _mm512_store_ps(bias, sum);
}

/* MANY <= 4 tiles of 16 entries of a tile of rows: their sums go on from where they are, [MANY][16 entries][16]. */
template <int MANY>
void add_products(const char *x, const char *dy, int64_t steps, float *sums) {
  tile_load(0, sums, LINE);
  if (MANY > 1) tile_load(1, sums + 256, LINE);
  if (MANY > 2) tile_load(2, sums + 512, LINE);
  if (MANY > 3) tile_load(3, sums + 768, LINE);
  for (int64_t k = 0; k < steps; ++k, x += TILE_BYTES) {
    tile_load(6, dy + k * TILE_BYTES, LINE);
    tile_load(4, x, LINE);
    tile_dot(0, 4, 6);
    if (MANY > 1) {
      tile_load(5, x + WIDE_STEPS * TILE_BYTES, LINE);
      tile_dot(1, 5, 6);
    }
    if (MANY > 2) {
      tile_load(4, x + 2 * WIDE_STEPS * TILE_BYTES, LINE);
      tile_dot(2, 4, 6);
    }
    if (MANY > 3) {
      tile_load(5, x + 3 * WIDE_STEPS * TILE_BYTES, LINE);
      tile_dot(3, 5, 6);
    }
  }
  tile_store(0, sums, LINE);
  if (MANY > 1) tile_store(1, sums + 256, LINE);
  if (MANY > 2) tile_store(2, sums + 512, LINE);
  if (MANY > 3) tile_store(3, sums + 768, LINE);
}

/* A panel's tiles [tile, end) at `many` entries from s on, which are brought together as [tiles of entries][steps]. */
void add_panel(const uint16_t *x, const int32_t *columns, int64_t many, int64_t steps, const char *dy, int64_t tiles,
               int64_t each, char *together, float *sums) {
  for (int64_t i = 0; i < many; ++i) {
    const uint16_t *from = x + columns[i] * WIDE;
    char *to = together + i / 16 * WIDE_STEPS * TILE_BYTES + i % 16 * LINE;
    for (int64_t k = 0; k < steps; ++k)
      _mm512_store_si512(to + k * TILE_BYTES, _mm512_load_si512(from + 32 * k));
  }
  for (int64_t j = 0; j < tiles; ++j, dy += WIDE_STEPS * TILE_BYTES, sums += each) {
    if (many == 64)
      add_products<4>(together, dy, steps, sums);
    else if (many == 48)
      add_products<3>(together, dy, steps, sums);
    else if (many == 32)
      add_products<2>(together, dy, steps, sums);
    else
      add_products<1>(together, dy, steps, sums);
  }
}

struct Space {
  float *sums, *bias, *line;
  char *dy, *together;
  uint16_t *x;
  int32_t *columns;
};

Space space_of(const G &g, int64_t tiles, char *scratch, int64_t *bytes) {
  char *at = scratch;
  const auto take = [&at](int64_t size) {
    char *taken = at;
    at += rounded(size);
    return taken;
  };
  Space space;
  space.sums = reinterpret_cast<float *>(take(tiles * padded(g.entries) * 64));
  space.bias = reinterpret_cast<float *>(take(tiles * 64));
  space.line = reinterpret_cast<float *>(take(g.in * 4));
  space.dy = take(g.panel / 16 * WIDE_STEPS * TILE_BYTES);
  space.together = take(4 * WIDE_STEPS * TILE_BYTES);
  space.x = reinterpret_cast<uint16_t *>(take(g.in * WIDE * 2));
  space.columns = reinterpret_cast<int32_t *>(take(padded(g.entries) * 4));
  *bytes = at - scratch;
  return space;
}

int64_t weight_grad_bytes(const G *g, int64_t tiles) {
  int64_t bytes;
  space_of(*g, tiles, nullptr, &bytes);
  return bytes;
}

/* The columns of a panel, and column 0 past its last entry, whose sums nobody reads. */
void columns_of(const Job *job, int64_t panel, int32_t *to) {
  row_columns(job->g, job->codes, panel * job->g.panel, to);
  for (int64_t s = job->g.entries; s < padded(job->g.entries); ++s) to[s] = 0;
}

/* A row of the gradient: zero, but for the kept places. `line` is zero before and after. */
void write_row(const Job *job, int64_t row, const float *sums, const int32_t *columns, float *line) {
  const G &g = job->g;
  for (int64_t s = 0; s < g.entries; ++s) line[columns[s]] = sums[s * 16];
  if (job->past)
    send(job->dw + row * g.in, line, g.in * 4);
  else
    memcpy(job->dw + row * g.in, line, static_cast<size_t>(g.in) * 4);
  for (int64_t s = 0; s < g.entries; ++s) line[columns[s]] = 0.0f;
}

void weight_grad(const Job *job, int64_t tile, int64_t tile_end, char *scratch) {
  const G &g = job->g;
  const int64_t step = g.panel / 16, entries = padded(g.entries), each = entries * 16;
  int64_t bytes;
  const Space space = space_of(g, tile_end - tile, scratch, &bytes);
  memset(space.sums, 0, static_cast<size_t>((tile_end - tile) * each) * 4);
  memset(space.bias, 0, static_cast<size_t>(tile_end - tile) * 64);
  memset(space.line, 0, static_cast<size_t>(g.in) * 4);
  const TileConfig config = whole_tiles();
  tile_configure(&config);
  for (int64_t token = 0; token < job->tokens; token += WIDE) {
    const int64_t count = nmf_min(WIDE, job->tokens - token), steps = nmf_ceil_div(count, 32);
    turn_tokens(job->x + token * g.in, g.in, count, g.in, space.x, WIDE);
    for (int64_t t = tile; t < tile_end; t += step) {
      const int64_t here = nmf_min(step, tile_end - t);
      for (int64_t j = 0; j < here; ++j)
        lay_tokens(job, token, count, t + j, space.dy + j * WIDE_STEPS * TILE_BYTES, space.bias + (t + j - tile) * 16);
      columns_of(job, t / step, space.columns);
      for (int64_t s = 0; s < entries; s += 64)
        add_panel(space.x, space.columns + s, nmf_min(64, entries - s), steps, space.dy, here, each, space.together,
                  space.sums + (t - tile) * each + s * 16);
    }
  }
  tile_release();
  for (int64_t row = tile * 16; row < nmf_min(tile_end * 16, g.out); ++row) {
    if (row == tile * 16 || row % g.panel == 0) columns_of(job, row / g.panel, space.columns);
    write_row(job, row, space.sums + (row / 16 - tile) * each + row % 16, space.columns, space.line);
    if (job->bias != nullptr) job->bias[row] = space.bias[row - tile * 16];
  }
  if (job->past) sent();
}

}  // namespace
