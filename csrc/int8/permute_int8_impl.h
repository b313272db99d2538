/* Float activations with 8-bit weights, few tokens: lanes are rows, the inputs of a group are picked in
 * a register, and a value becomes fp32 on its way. 1:M and 2:M of M = 4, 8, 16 and (INT8_WIDE) 32.
 *
 * The includer defines before it:
 *   picked<M>(codes, x): x[code] of every lane for a group of M inputs, whatever bits lie above a code.
 *   INT8_TOKENS: tokens at a time at most.
 *   INT8_WIDE: whether M = 32 is served. */
#ifndef NMFLOW_PERMUTE_INT8_IMPL_H
#define NMFLOW_PERMUTE_INT8_IMPL_H

namespace {

template <int M, int N, int NT>
NMF_INLINE void block(const nmf_job *job, int64_t token, int64_t tile, const float *x,
                      int64_t stride) {
  const int VECS = 16 / LANES, BITS = M == 4 ? 2 : M <= 16 ? 4 : 8, PER = 8 / BITS;
  const int U = NT * VECS >= 8 ? 1 : NT * VECS >= 4 ? 2 : 4; /* sums of a row, taken in turns */
  const int BYTES = 64 + PER * 64, AHEAD = 4096;
  const nmf_geometry &g = job->g;
  vecf acc[U][VECS][NT];
#pragma GCC unroll 4
  for (int u = 0; u < U; ++u)
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v)
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) acc[u][v][t] = vecf{};
  const char *w = int8_tile(job, tile) + INT8_HEAD;
  int64_t left = g.entries;
  for (int64_t b = 0; b < job->q.blocks; ++b, w += BYTES) {
#pragma GCC unroll 8
    for (int line = 0; line < BYTES; line += 64) __builtin_prefetch(w + AHEAD + line);
#pragma GCC unroll 4
    for (int j = 0; j < PER; ++j) {
#pragma GCC unroll 4
      for (int i = 0; i < 4; ++i) {
        if (left <= 4 * j + i) break; /* past the last group of x */
#pragma GCC unroll 2
        for (int v = 0; v < VECS; ++v) {
          const vecu code = get<vecu>(w + v * LANES * 4) >> static_cast<uint32_t>(8 * i + BITS * j);
          const vecu four = get<vecu>(w + 64 + j * 64 + v * LANES * 4);
          const veci value = (veci)(four << static_cast<uint32_t>(24 - 8 * i)) >> 24;
          const vecf weight = __builtin_convertvector(value, vecf);
#pragma GCC unroll 8
          for (int t = 0; t < NT; ++t)
            acc[i % U][v][t] += weight * picked<M>(code, x + t * stride + (4 * j + i) / N * M);
        }
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
    float sums[16];
#pragma GCC unroll 2
    for (int v = 0; v < VECS; ++v) {
      vecf sum = acc[0][v][t];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum += acc[u][v][t];
      store(sums + v * LANES,
            sum * load(int8_scales(job, tile) + v * LANES) + load(bias + v * LANES));
    }
    write_rows(job, token + t, row, sums, count);
  }
}

template <int M, int N>
void tiles_of(const nmf_job *job, const nmf_part *part, const float *x, int64_t stride) {
  for (int64_t tile = part->tile; tile < part->tile_end; ++tile) {
    const float *from = x;
    int64_t token = part->token;
#define NMF_TOKENS(NT)                                                    \
  for (; token + NT <= part->token_end; token += NT, from += NT * stride) \
  block<M, N, NT>(job, token, tile, from, stride)
#if INT8_TOKENS >= 8
    NMF_TOKENS(8);
#endif
    NMF_TOKENS(4);
#if INT8_TOKENS < 8 /* with more registers it has not been timed */
    NMF_TOKENS(2);
#endif
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
#if INT8_WIDE
    case 64: return tiles_of<32, 1>(job, part, x, stride);
    case 65: return tiles_of<32, 2>(job, part, x, stride);
#endif
    default: return tiles_of<16, 2>(job, part, x, stride);
  }
}

int64_t permute_scratch(const nmf_job *job, int64_t tokens, int64_t) {
  return job->g.dtype == NMFLOW_F32 ? 64 : tokens * job->g.in * 4;
}

int64_t permute_most(const nmf_geometry *, int64_t) { return 16; }

const nmf_kernel permute_kernel = {permute_run, permute_scratch, permute_most, 1, nullptr};

}  // namespace
#endif
