/* The gradient of W at kept places with tokens in lanes: of rows without panels whose spans a register does
 * not hold. A place is the product of two columns of tokens. The same source is compiled once for each
 * instruction set. Everything is static: see common.h. */
#include "weight_grad_impl.h"

namespace {

/* The sum of the lanes of each of LANES vectors. */
NMF_INLINE vecf sums_of(const vecf *v) {
#if defined(__AVX512BW__)
  __m512 a[8], b[4], c[2];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    const __m512 one = (__m512)v[2 * i], other = (__m512)v[2 * i + 1];
    a[i] = _mm512_add_ps(_mm512_unpacklo_ps(one, other), _mm512_unpackhi_ps(one, other));
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i)
    b[i] = _mm512_add_ps(_mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                         _mm512_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    c[i] = _mm512_add_ps(_mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0x88),
                         _mm512_shuffle_f32x4(b[2 * i], b[2 * i + 1], 0xdd));
  return (vecf)_mm512_add_ps(_mm512_shuffle_f32x4(c[0], c[1], 0x88),
                             _mm512_shuffle_f32x4(c[0], c[1], 0xdd));
#elif defined(__AVX2__)
  __m256 a[4], b[2];
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const __m256 one = (__m256)v[2 * i], other = (__m256)v[2 * i + 1];
    a[i] = _mm256_add_ps(_mm256_unpacklo_ps(one, other), _mm256_unpackhi_ps(one, other));
  }
#pragma GCC unroll 2
  for (int i = 0; i < 2; ++i)
    b[i] = _mm256_add_ps(_mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44),
                         _mm256_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
  return (vecf)_mm256_add_ps(_mm256_permute2f128_ps(b[0], b[1], 0x20),
                             _mm256_permute2f128_ps(b[0], b[1], 0x31));
#else
  vecf sum{};
  for (int i = 0; i < LANES; ++i)
    for (int lane = 0; lane < LANES; ++lane) sum[i] += v[i][lane];
  return sum;
#endif
}

/* One row: x [in][TOKENS] times dy [TOKENS], VECS registers of tokens, LANES entries at a time. */
template <int VECS>
NMF_INLINE void add_row(const float *dy, const float *x, const int32_t *columns, int64_t entries,
                        float *sums) {
  vecf d[VECS];
#pragma GCC unroll 4
  for (int j = 0; j < VECS; ++j) d[j] = load(dy + LANES * j);
  for (int64_t s = 0; s < entries; s += LANES) {
    vecf sum[LANES];
#pragma GCC unroll 16
    for (int k = 0; k < LANES; ++k) {
      const float *from = x + columns[s + k] * TOKENS;
      sum[k] = load(from) * d[0];
#pragma GCC unroll 4
      for (int j = 1; j < VECS; ++j) sum[k] += load(from + LANES * j) * d[j];
    }
    store(sums + s, load(sums + s) + sums_of(sum));
  }
}

/* Sums and columns are row by row here. Entries past the last one repeat column 0, and nobody reads
 * their sums; tokens past the last one are zeros. */
void tokens_weight_grad(const nmf_stepping *job, int64_t tile, int64_t tile_end, char *scratch) {
  const G &g = job->g;
  const int64_t rows = (tile_end - tile) * 16, most = nmf_tokens_of(job), entries = padded(g.entries);
  float *sums = reinterpret_cast<float *>(scratch), *bias = sums + rows * entries;
  float *x = bias + rows, *dy = x + padded(g.in) * TOKENS, *turned = dy + 16 * TOKENS;
  float *line = turned + 16 * TOKENS;
  int32_t *columns = reinterpret_cast<int32_t *>(line + padded(g.in));
  const int64_t first = tile * 16, end = nmf_min(tile_end * 16, g.out);
  memset(sums, 0, static_cast<size_t>(rows * (entries + 1)) * 4);
  memset(line, 0, static_cast<size_t>(padded(g.in)) * 4);
  memset(columns, 0, static_cast<size_t>(rows * entries) * 4);
  for (int64_t row = first; row < end; ++row)
    row_columns(g, job->codes, row, columns + (row - first) * entries);
  for (int64_t token = 0; token < job->tokens; token += most) {
    const int64_t count = nmf_min(most, job->tokens - token);
    transpose_in(job->x + token * g.in, g.in, count, g.in, x);
    for (int64_t t = tile; t < tile_end; ++t) {
      pack_rows(g, job->dy + token * g.out, t, count, dy, 16, bias + (t - tile) * 16);
      transpose_in(dy, 16, count, 16, turned);
      for (int64_t row = t * 16; row < nmf_min(t * 16 + 16, end); ++row) {
        const int64_t at = (row - first) * entries;
        const float *from = turned + (row - t * 16) * TOKENS;
        int64_t j = 0;
        for (; j + 4 * LANES <= count; j += 4 * LANES)
          add_row<4>(from + j, x + j, columns + at, entries, sums + at);
        for (; j < count; j += LANES) add_row<1>(from + j, x + j, columns + at, entries, sums + at);
      }
    }
  }
  for (int64_t row = first; row < end; ++row) {
    const int64_t at = (row - first) * entries;
    write_row(job, row, sums + at, 1, columns + at, line);
    if (job->bias != nullptr) job->bias[row] = bias[row - first];
  }
  if (job->past) sent();
}

/* The gradient of W, whatever the rows are. */
void any_weight_grad(const nmf_stepping *job, int64_t tile, int64_t tile_end, char *scratch) {
  const auto kernel = job->token_lanes ? tokens_weight_grad : weight_grad;
  kernel(job, tile, tile_end, scratch);
}

}  // namespace
