/* Both gradients of panels in bfloat16 on tiles (tiles.h), written once for all of them.
 *
 * dx = dy W, by 64 tokens: a left operand is [16 entries][pairs of rows of W], turned once a call, a right one
 * [pairs of rows][16 tokens] of dy; sums are added to the rows of a float32 [in][64] that the entries belong to. Panels
 * of 16 rows have 8 pairs, and two of them share the turning of dy.
 * dW = dy^T x at kept places, by 128 tokens: a left operand is [16 entries][16 pairs of tokens], rows of a turned x that
 * are brought together, a right one [16 pairs of tokens][16 rows]; sums lie as [tiles][entries][16 rows]. */
#include "entries.h"
#include "send.h"
#include "tile_steps.h"
#include "turn.h"

namespace {

typedef nmf_tile_stepping Job;
const int64_t LINE = 64, SUMS = 4 * TILE_BYTES, WIDE = 128, WIDE_STEPS = WIDE / 32;

int64_t rounded(int64_t bytes) { return nmf_ceil_div(bytes, LINE) * LINE; }

/* ------------------------------------------------------------------ the gradient of x */

/* Pairs of tiles of rows, and the bytes of an entry in one. */
int64_t pair_tiles(const G &g) { return nmf_ceil_div(g.panel / 16, 2); }
int64_t entry_bytes(const G &g) { return g.panel == 16 ? 32 : 64; }
int64_t panel_bytes(const G &g) { return pair_tiles(g) * padded(g.entries) * entry_bytes(g); }
int64_t turned_bytes(const G *g) { return g->panels * panel_bytes(*g); }

/* A panel's values as [pairs of tiles][entries][32 rows, or 16]; zeros for what is not there. */
void turn(const Job *job, int64_t panel) {
  const G &g = job->g;
  const int64_t each = g.panel / 16, entries = padded(g.entries), bytes = entry_bytes(g);
  char *to = job->turned + panel * panel_bytes(g);
  for (int64_t j = 0; j < pair_tiles(g) * bytes / 32; ++j) {
    const int64_t tile = panel * each + j;
    const bool there = j < each && tile < g.tiles;
    const uint16_t *from = job->values + tile * g.entries_held * 16;
    for (int64_t s = 0; s < entries; ++s) {
      __m256i rows = _mm256_setzero_si256();
      if (there && s < g.entries) {
        const __m512i both = _mm512_loadu_si512(from + s / 2 * 32);
        rows = _mm512_cvtepi32_epi16(s % 2 ? _mm512_srli_epi32(both, 16) : both);
      }
      _mm256_storeu_si256(reinterpret_cast<__m256i *>(to + (j / 2 * entries + s) * bytes + j % 2 * 32), rows);
    }
  }
}

/* 32 rows of dy from `row` on, of `count` <= 64 tokens, as [4][16 pairs of rows][16 tokens]; zeros from row `end` on. */
void lay_rows(const Job *job, int64_t token, int64_t count, int64_t row, int64_t end, char *to) {
  const int64_t out = job->g.out, rows = row < end ? nmf_min(32, end - row) : 0;
  const uint16_t *from = job->dy + token * out + row;
  for (int64_t t = 0; t < NMF_TILE_TOKENS; t += 16, to += TILE_BYTES, from += 16 * out) {
    const int64_t tokens = nmf_min(16, count - t);
    float *lines = reinterpret_cast<float *>(to);
    if (tokens == 16 && rows == 32 && out % 2 == 0) {
      transpose16(reinterpret_cast<const float *>(from), out / 2, lines, 16);
      continue;
    }
    alignas(64) uint16_t block[16 * 32];
    memset(block, 0, sizeof block);
    for (int64_t k = 0; k < tokens; ++k)
      memcpy(block + 32 * k, from + k * out, static_cast<size_t>(rows) * 2);
    transpose16(reinterpret_cast<const float *>(block), 16, lines, 16);
  }
}

/* Sums of 16 entries and 64 tokens, [4][16][16], to the rows of dx that the entries belong to. */
NMF_INLINE void add_entries(const G &g, const void *codes, int64_t panel, int64_t s, const float *sums, float *dx) {
  for (int64_t i = 0; i < nmf_min(16, g.entries - s); ++i) {
    float *to = dx + nmf_min(panel_column(g, codes, panel, s + i), g.in - 1) * NMF_TILE_TOKENS;
#pragma GCC unroll 4
    for (int t = 0; t < 4; ++t)
      _mm512_store_ps(to + 16 * t, _mm512_add_ps(_mm512_load_ps(to + 16 * t), _mm512_load_ps(sums + 256 * t + 16 * i)));
  }
}

/* A panel, whose rows of dy are laid as [pairs of tiles][4][pairs of rows][16 tokens]. */
void grad_of_panel(const Job *job, int64_t panel, const char *laid, float *sums, float *dx) {
  const G &g = job->g;
  const int64_t bytes = entry_bytes(g), pairs = pair_tiles(g), entries = padded(g.entries);
  const char *values = job->turned + panel * panel_bytes(g);
  for (int64_t s = 0; s < g.entries; s += 16) {
    tile_zero(0);
    tile_zero(1);
    tile_zero(2);
    tile_zero(3);
    for (int64_t j = 0; j < pairs; ++j) {
      const char *b = laid + j * SUMS;
      tile_load(4, values + (j * entries + s) * bytes, bytes);
      tile_load(6, b, LINE);
      tile_dot(0, 4, 6);
      tile_load(7, b + TILE_BYTES, LINE);
      tile_dot(1, 4, 7);
      tile_load(6, b + 2 * TILE_BYTES, LINE);
      tile_dot(2, 4, 6);
      tile_load(7, b + 3 * TILE_BYTES, LINE);
      tile_dot(3, 4, 7);
    }
    tile_store(0, sums, LINE);
    tile_store(1, sums + 256, LINE);
    tile_store(2, sums + 512, LINE);
    tile_store(3, sums + 768, LINE);
    add_entries(g, job->codes, panel, s, sums, dx);
  }
}

/* [in][64] in float32 to `count` rows of bfloat16. */
void round_out(const float *dx, int64_t count, int64_t in, uint16_t *to) {
  alignas(64) float low[256], high[256];
  for (int64_t t = 0; t < count; t += 16)
    for (int64_t i = 0; i < in; i += 32) {
      const int64_t tokens = nmf_min(16, count - t), inputs = nmf_min(32, in - i);
      const __mmask32 there = inputs == 32 ? 0xffffffffu : (1u << inputs) - 1u;
      const float *from = dx + i * NMF_TILE_TOKENS + t; /* padded to 32 inputs */
      transpose16(from, NMF_TILE_TOKENS, low, 16);
      transpose16(from + 16 * NMF_TILE_TOKENS, NMF_TILE_TOKENS, high, 16);
      for (int64_t k = 0; k < tokens; ++k) {
        const __m512i line = (__m512i)_mm512_cvtne2ps_pbh(_mm512_load_ps(high + 16 * k), _mm512_load_ps(low + 16 * k));
        _mm512_mask_storeu_epi16(to + (t + k) * in + i, there, line);
      }
    }
}

int64_t floats_of_dx(const G &g) { return nmf_ceil_div(g.in, 32) * 32 * NMF_TILE_TOKENS; }

int64_t input_grad_bytes(const G *g) { return floats_of_dx(*g) * 4 + pair_tiles(*g) * SUMS + SUMS; }

void input_grad(const Job *job, int64_t token_block, char *scratch) {
  const G &g = job->g;
  const int64_t token = token_block * NMF_TILE_TOKENS, count = nmf_min(NMF_TILE_TOKENS, job->tokens - token);
  float *dx = reinterpret_cast<float *>(scratch), *sums = dx + floats_of_dx(g);
  char *laid = reinterpret_cast<char *>(sums + 1024);
  memset(dx, 0, static_cast<size_t>(floats_of_dx(g)) * 4);
  TileConfig config = whole_tiles();
  if (g.panel == 16) { /* 8 pairs of rows */
    config.bytes[4] = config.bytes[5] = 32;
    config.rows[6] = config.rows[7] = 8;
  }
  tile_configure(&config);
  for (int64_t panel = 0; panel < g.panels; ++panel) {
    const int64_t row = panel * g.panel, end = nmf_min(row + g.panel, g.out);
    if (g.panel == 16) {
      if (panel % 2 == 0) lay_rows(job, token, count, row, g.out, laid);
      grad_of_panel(job, panel, laid + panel % 2 * TILE_BYTES / 2, sums, dx);
      continue;
    }
    for (int64_t j = 0; j < pair_tiles(g); ++j)
      lay_rows(job, token, count, row + 32 * j, end, laid + j * SUMS);
    grad_of_panel(job, panel, laid, sums, dx);
  }
  tile_release();
  round_out(dx, count, g.in, job->dx + token * g.in);
}

/* ------------------------------------------------------------------ the gradient of W */

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
