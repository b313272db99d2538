/* The gradient of x of panels in bfloat16 on tiles, dx = dy W, by 64 tokens.
 *
 * A left operand is [16 entries][pairs of rows of W], turned once a call, a right one [pairs of rows][16 tokens] of dy; sums
 * are added to the rows of a float32 [in][64] that the entries belong to. Panels of 16 rows have 8 pairs, and two of them
 * share the turning of dy. */
#include "tile_places.h"

namespace {

const int64_t SUMS = 4 * TILE_BYTES;

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

}  // namespace
