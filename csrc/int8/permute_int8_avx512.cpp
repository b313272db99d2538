/* Float activations with 8-bit weights, few tokens: lanes are rows, the inputs of a group are picked in
 * a register, and a value becomes fp32 on its way. 1:M and 2:M of M = 4, 8 and 16. */
#include "decode.h"

namespace {

/* x of a group, repeated so that whatever bits lie above a code pick the same. */
template <int M>
NMF_INLINE __m512 group_of(const float *x) {
  if (M == 4) return _mm512_broadcast_f32x4(_mm_loadu_ps(x));
  if (M == 8)
    return _mm512_castpd_ps(
        _mm512_broadcast_f64x4(_mm256_loadu_pd(reinterpret_cast<const double *>(x))));
  return _mm512_loadu_ps(x);
}
template <int M>
NMF_INLINE __m512 picked(__m512i code, __m512 x) {
  return M == 4 ? _mm512_permutevar_ps(x, code) : _mm512_permutexvar_ps(code, x);
}

template <int M, int N, int NT>
NMF_INLINE void block(const nmf_job *job, int64_t token, int64_t tile, const float *x,
                      int64_t stride) {
  const int BITS = M == 4 ? 2 : 4, PER = 8 / BITS, U = NT >= 8 ? 1 : NT >= 4 ? 2 : 4;
  const int BYTES = 64 + PER * 64, AHEAD = 4096;
  const nmf_geometry &g = job->g;
  __m512 acc[U][NT];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) acc[u][t] = _mm512_setzero_ps();
  const char *w = int8_tile(job, tile) + INT8_HEAD;
  int64_t left = g.entries;
  for (int64_t b = 0; b < job->q.blocks; ++b, w += BYTES) {
    const __m512i codes = _mm512_loadu_si512(w);
#pragma GCC unroll 8
    for (int line = 0; line < BYTES; line += 64) _mm_prefetch(w + AHEAD + line, _MM_HINT_T0);
#pragma GCC unroll 4
    for (int j = 0; j < PER; ++j) {
      const __m512i four = _mm512_loadu_si512(w + 64 + j * 64);
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (left <= 4 * j + i) break; /* past the last group of x */
        const __m512i code = _mm512_srli_epi32(codes, 8 * i + BITS * j);
        const __m512 value = _mm512_cvtepi32_ps(
            _mm512_srai_epi32(i < 3 ? _mm512_slli_epi32(four, 24 - 8 * i) : four, 24));
#pragma GCC unroll 8
        for (int t = 0; t < NT; ++t)
          acc[i % U][t] = _mm512_fmadd_ps(
              value, picked<M>(code, group_of<M>(x + t * stride + (4 * j + i) / N * M)),
              acc[i % U][t]);
      }
    }
    left -= 4 * PER;
    x += 4 * PER / N * M;
  }
  float bias[16];
  read_bias(job, tile, bias);
  const int64_t row = tile * 16, count = nmf_min(16, g.out - row);
#pragma GCC unroll 8
  for (int t = 0; t < NT; ++t) {
    __m512 sum = acc[0][t];
#pragma GCC unroll 4
    for (int u = 1; u < U; ++u) sum = _mm512_add_ps(sum, acc[u][t]);
    float sums[16];
    store(sums, (vecf)sum * load(int8_scales(job, tile)) + load(bias));
    write_rows(job, token + t, row, sums, count);
  }
}

template <int M, int N>
void tiles_of(const nmf_job *job, const nmf_part *part, const float *x, int64_t stride) {
  for (int64_t tile = part->tile; tile < part->tile_end; ++tile) {
    const float *from = x;
    int64_t token = part->token;
#define NMF_TOKENS(NT)                                                     \
  for (; token + NT <= part->token_end; token += NT, from += NT * stride) \
  block<M, N, NT>(job, token, tile, from, stride)
    NMF_TOKENS(8);
    NMF_TOKENS(4);
    NMF_TOKENS(1);
#undef NMF_TOKENS
  }
}

void permute_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  const float *x = static_cast<const float *>(job->x) + part->token * job->x_stride;
  int64_t stride = job->x_stride;
  if (g.dtype != NMFLOW_F32) {
    float *copy = reinterpret_cast<float *>(scratch);
    for (int64_t t = part->token; t < part->token_end; ++t)
      read_inputs(job, t, 0, g.in, copy + (t - part->token) * g.in);
    x = copy;
    stride = g.in;
  }
  switch (g.m * 2 + g.n - 1) {
    case 8: return tiles_of<4, 1>(job, part, x, stride);
    case 9: return tiles_of<4, 2>(job, part, x, stride);
    case 16: return tiles_of<8, 1>(job, part, x, stride);
    case 17: return tiles_of<8, 2>(job, part, x, stride);
    case 32: return tiles_of<16, 1>(job, part, x, stride);
    default: return tiles_of<16, 2>(job, part, x, stride);
  }
}

int64_t permute_scratch(const nmf_job *job, int64_t tokens, int64_t) {
  return job->g.dtype == NMFLOW_F32 ? 64 : tokens * job->g.in * 4;
}

int64_t permute_most(const nmf_geometry *, int64_t) { return 16; }

const nmf_kernel permute_kernel = {permute_run, permute_scratch, permute_most, 1};

}  // namespace

const nmf_kernel *nmf_int8_permute_avx512(void) { return &permute_kernel; }
