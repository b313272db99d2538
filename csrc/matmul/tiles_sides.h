/* What goes into the tiles of tiles_impl.h and what comes out: x and the values of W become operands, in the
 * order that products take them, and sums become y. */
#ifndef NMFLOW_TILES_SIDES_H
#define NMFLOW_TILES_SIDES_H

#include "turn.h"

#include "panel_impl.h"

namespace {

const int64_t BLOCK = 64, STEP = 32, LINE = 64;
const int64_t INPUT_BYTES = BLOCK * 2, STAGED_BYTES = 32 * BLOCK * 2;
/* What a part keeps in the second-level cache: values that are turned, for as many tokens as pay for that. */
const int64_t MOST_TOKENS = 256, MOST_VALUES = INT64_C(1) << 20;

int64_t steps_of(const nmf_geometry &g) { return nmf_ceil_div(g.entries, STEP); }

/* ------------------------------------------------------------------ operands */

/* `count` tokens of x from `token` on as [in][64], zero past the last one up to the next 32. */
void turn_inputs(const nmf_job *job, int64_t token, int64_t count, uint16_t *to) {
  const int64_t in = job->g.in, stride = job->x_stride;
  const uint16_t *x = static_cast<const uint16_t *>(job->x);
  if (job->turned & NMFLOW_X_TURNED) {
    x += token;
    for (int64_t t = 0; t < count; t += 32) {
      const __mmask32 there = count - t >= 32 ? 0xffffffffu : (1u << (count - t)) - 1u;
      for (int64_t i = 0; i < in; ++i)
        _mm512_store_si512(to + i * BLOCK + t, _mm512_maskz_loadu_epi16(there, x + i * stride + t));
    }
    return;
  }
  turn_tokens(x + token * stride, stride, count, in, to, BLOCK);
}

/* The values of a tile as operands of [16 rows][16 pairs], one for every step. */
void turn_values(const nmf_geometry &g, const char *values, char *to) {
  const int64_t whole = g.entries_held / STEP, steps = steps_of(g);
  for (int64_t s = 0; s < steps; ++s) {
    float cut[256];
    const float *from = reinterpret_cast<const float *>(values + s * TILE_BYTES);
    if (s >= whole) { /* the last step is cut short: zeros after it */
      memset(cut, 0, sizeof cut);
      memcpy(cut, from, static_cast<size_t>((g.entries_held - whole * STEP) * 32));
      from = cut;
    }
    transpose16(from, 16, reinterpret_cast<float *>(to + s * TILE_BYTES), 16);
  }
}

/* Where the inputs of the panels of tiles [tile, end) lie in a block of x, in bytes: [panels][steps][32], a row of
 * zeros past a panel's last one, and a step of such rows at the end. */
void columns_of_panels(const nmf_job *job, int64_t tile, int64_t end, uint32_t *to) {
  const nmf_geometry &g = job->g;
  const int64_t each = g.panel / 16, held = steps_of(g) * STEP;
  const uint32_t zeros = static_cast<uint32_t>(g.in * INPUT_BYTES);
  for (int64_t panel = tile / each; panel * each < end; ++panel, to += held) {
    panel_columns(job, panel, static_cast<uint32_t>(INPUT_BYTES), to);
    for (int64_t s = g.entries; s < held; ++s) to[s] = zeros;
  }
  for (int64_t s = 0; s < STEP; ++s) to[s] = zeros;
}

/* A step's inputs in pairs: for every 32 tokens two operands of [16 pairs][16 tokens][2]. Tokens 8 l + 0..3 of the 32
 * are columns 4 l.. of the first, 8 l + 4..7 of the second: what unpacking gives. */
template <int COLS>
NMF_INLINE void lay_step(const char *x, const uint32_t *columns, char *to) {
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) {
    const char *a = x + columns[2 * p], *b = x + columns[2 * p + 1];
#pragma GCC unroll 2
    for (int c = 0; c < COLS; c += 2) {
      const __m512i v = _mm512_load_si512(a + c * 32), w = _mm512_load_si512(b + c * 32);
      char *at = to + c * TILE_BYTES + p * LINE;
      _mm512_store_si512(at, _mm512_unpacklo_epi16(v, w));
      _mm512_store_si512(at + TILE_BYTES, _mm512_unpackhi_epi16(v, w));
    }
  }
}

/* ------------------------------------------------------------------ results */

/* In which order the 8 quarters of 32 results leave the sums: that of tokens, or one from which unpacking two
 * rows makes it. */
const uint64_t BY_TOKENS[8] = {0, 4, 1, 5, 2, 6, 3, 7}, TO_UNPACK[8] = {0, 2, 4, 6, 1, 3, 5, 7};

/* The epilogue of sums, [ROWS tiles][COLS tiles], in place; their bias is in them then. */
template <int ROWS, int COLS>
__attribute__((noinline)) void apply_epilogue(const nmf_job *job, float *sums, const float *bias) {
  for (int64_t i = 0; i < ROWS * COLS * 16; ++i) {
    const vecf b = splat(bias[i / (16 * COLS) * 16 + i % 16]);
    store(sums + 16 * i, finish(load(sums + 16 * i) + b, job->epilogue));
  }
}

/* Sums, and a bias (may be null), to `rows` rows of bfloat16, `stride` bytes apart. */
template <int ROWS, int COLS>
NMF_INLINE void round_sums(const float *sums, const float *bias, int64_t rows, const uint64_t *order, bool past,
                           char *to, int64_t stride) {
  const __m512i quarters = _mm512_loadu_si512(order);
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const float *from = sums + r / 16 * COLS * 256 + r % 16 * 16;
    const __m512 b = _mm512_set1_ps(bias == nullptr ? 0.0f : bias[r]);
#pragma GCC unroll 2
    for (int c = 0; c < COLS; c += 2) {
      const __m512 low = _mm512_add_ps(_mm512_load_ps(from + c * 256), b);
      const __m512 high = _mm512_add_ps(_mm512_load_ps(from + (c + 1) * 256), b);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      const __m512i line = _mm512_permutexvar_epi64(quarters, both);
      if (past)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to + c * 32), line);
      else
        _mm512_storeu_si512(to + c * 32, line);
    }
  }
}

/* Staged results, `rows` of [32][64], to y of `count` tokens: two rows at a time are pairs of 16 tokens. */
void write_tokens(const nmf_job *job, const char *staged, int64_t row, int64_t rows, int64_t token,
                  int64_t count, bool past) {
  alignas(64) float pairs[512], lines[256];
  for (int64_t t = 0; t < count; t += 16) {
    if (t % 32 == 0)
      for (int p = 0; p < 16; ++p) {
        const char *from = staged + 2 * p * INPUT_BYTES + t * 2;
        const __m512i a = _mm512_load_si512(from), b = _mm512_load_si512(from + INPUT_BYTES);
        _mm512_store_si512(pairs + 16 * p, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(pairs + 256 + 16 * p, _mm512_unpackhi_epi16(a, b));
      }
    const int64_t here = nmf_min(16, count - t), stride = job->y_stride;
    uint16_t *y = static_cast<uint16_t *>(job->y) + (token + t) * stride + row;
    const float *from = pairs + t % 32 * 16;
    if (rows == 32 && here == 16 && !past && stride % 2 == 0) {
      transpose16(from, 16, reinterpret_cast<float *>(y), stride / 2);
      continue;
    }
    transpose16(from, 16, lines, 16);
    for (int64_t k = 0; k < here; ++k, y += stride) {
      if (past)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(y), _mm512_load_si512(lines + 16 * k));
      else
        memcpy(y, lines + 16 * k, static_cast<size_t>(rows) * 2);
    }
  }
}

}  // namespace
#endif
