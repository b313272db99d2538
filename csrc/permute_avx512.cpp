/* permute: lanes are 16 output rows, and the inputs that they want are picked in a register. The
 * inputs of a span (16, or 32 for 16 < M <= 32) are loaded from row-major x as they lie; a row's
 * code says which of them its next weight belongs to; vpermps reads just the low 4 bits of a lane,
 * so a word of eight 4-bit codes needs one shift a step and no mask. No code can lead outside the
 * registers, whatever its bits. */
#define NMF_LANES 16
#include "avx512.h"

namespace {

/* Rows of x with a span's full width readable at every span: x itself where it is so already. */
struct Inputs {
  const float *x;
  int64_t stride;
};

int64_t padded(const nmf_geometry &g) { return (g.spans - 1) * g.span + (g.m <= 16 ? 16 : 32); }

bool needs_copy(const nmf_job *job) {
  return job->g.dtype != NMFLOW_F32 || padded(job->g) > job->g.in;
}

const int MAX_TILES = 3;

int64_t scratch_bytes(const nmf_job *job, int64_t tokens, int64_t) {
  int64_t bytes = 64;
  if (needs_copy(job)) bytes += tokens * (padded(job->g) * 4 + 64);
  if (job->g.dtype != NMFLOW_F32) bytes += MAX_TILES * (job->g.entries * 64 + 64);
  return bytes;
}

/* One entry for NT tokens and TILES tiles. */
template <int NT, int TILES, int BITS>
NMF_INLINE void step(__m512 (&acc)[TILES][NT], const float *const (&values)[TILES], int64_t s,
                     const __m512i (&code)[TILES], const float *x, int64_t stride, int64_t ahead) {
#pragma GCC unroll 8
  for (int i = 0; i < TILES; ++i) {
    const __m512 w = _mm512_loadu_ps(values[i] + s * 16);
    _mm_prefetch(reinterpret_cast<const char *>(values[i] + s * 16 + ahead), _MM_HINT_T0);
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) {
      const float *from = x + t * stride;
      __m512 picked;
      if (BITS == 4)
        picked = _mm512_permutexvar_ps(code[i], _mm512_loadu_ps(from));
      else
        picked =
            _mm512_permutex2var_ps(_mm512_loadu_ps(from), code[i], _mm512_loadu_ps(from + 16));
      acc[i][t] = _mm512_fmadd_ps(w, picked, acc[i][t]);
    }
  }
}

/* P: entries of a span when it is 1, 2, 4 or 8, so that 8 codes make whole spans; else 0. U: sums
 * kept of every output, taken in turns, so that few outputs still hide the FMA's latency. */
template <int NT, int TILES, int U, int BITS, int P>
void block(const nmf_job *job, int64_t token, int64_t tile, const float *const (&values)[TILES],
           const float *x, int64_t stride) {
  const nmf_geometry &g = job->g;
  const int PER = 32 / BITS;
  /* Weights to come are fetched early, as the third-level cache is far away: a little ahead where
   * tiles follow each other, else the same place of the next tiles. */
  const int64_t ahead = TILES == 1 ? 512 : TILES * g.entries_held * 16;
  const uint32_t *words[TILES];
  __m512 acc[U][TILES][NT];
#pragma GCC unroll 8
  for (int i = 0; i < TILES; ++i) {
    float bias[16];
    read_bias(job, tile + i, bias);
    words[i] = static_cast<const uint32_t *>(job->codes) + (tile + i) * g.words * 16;
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) {
      acc[0][i][t] = _mm512_loadu_ps(bias);
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) acc[u][i][t] = _mm512_setzero_ps();
    }
  }
  const int64_t words_ahead = TILES == 1 ? 64 : TILES * g.words * 16;
  __m512i code[TILES];
  int64_t s = 0;
  if (P > 0) {
    for (; s + PER <= g.entries; s += PER) {
#pragma GCC unroll 8
      for (int i = 0; i < TILES; ++i) {
        code[i] = _mm512_loadu_si512(words[i] + s / PER * 16);
        _mm_prefetch(reinterpret_cast<const char *>(words[i] + s / PER * 16 + words_ahead),
                     _MM_HINT_T0);
      }
#pragma GCC unroll 8
      for (int k = 0; k < PER; ++k) {
        step<NT, TILES, BITS>(acc[k % U], values, s + k, code, x + k / (P > 0 ? P : 1) * 16, stride,
                              ahead);
#pragma GCC unroll 8
        for (int i = 0; i < TILES; ++i) code[i] = _mm512_srli_epi32(code[i], BITS);
      }
      x += PER / (P > 0 ? P : 1) * 16;
    }
  }
  int64_t left = g.span_entries;
  for (; s < g.entries;) {
#pragma GCC unroll 8
    for (int i = 0; i < TILES; ++i) {
      code[i] = _mm512_loadu_si512(words[i] + s / PER * 16);
      _mm_prefetch(reinterpret_cast<const char *>(words[i] + s / PER * 16 + words_ahead),
                   _MM_HINT_T0);
    }
#pragma GCC unroll 8
    for (int k = 0; k < PER; ++k) {
      if (s >= g.entries) break;
      step<NT, TILES, BITS>(acc[k % U], values, s, code, x, stride, ahead);
#pragma GCC unroll 8
      for (int i = 0; i < TILES; ++i) code[i] = _mm512_srli_epi32(code[i], BITS);
      ++s;
      if (--left == 0) {
        left = g.span_entries;
        x += g.span;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < TILES; ++i) {
    const int64_t row = (tile + i) * 16, count = nmf_min(16, g.out - row);
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t)
#pragma GCC unroll 8
      for (int u = 1; u < U; ++u) acc[0][i][t] = _mm512_add_ps(acc[0][i][t], acc[u][i][t]);
    if (g.dtype == NMFLOW_F32 && job->epilogue == NMFLOW_NONE && count == 16) {
      float *y = static_cast<float *>(job->y) + token * job->y_stride + row;
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) _mm512_storeu_ps(y + t * job->y_stride, acc[0][i][t]);
      continue;
    }
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) {
      float sums[16];
      _mm512_storeu_ps(sums, acc[0][i][t]);
      write_rows(job, token + t, row, sums, count);
    }
  }
}

template <int NT, int TILES, int U>
NMF_INLINE void block_of(const nmf_job *job, int64_t token, int64_t tile,
                         const float *const (&values)[TILES], const float *x, int64_t stride) {
  if (job->g.m > 16) return block<NT, TILES, U, 8, 0>(job, token, tile, values, x, stride);
  if (job->g.span == 16) {
    switch (job->g.span_entries) {
      case 1:
        return block<NT, TILES, U, 4, 1>(job, token, tile, values, x, stride);
      case 2:
        return block<NT, TILES, U, 4, 2>(job, token, tile, values, x, stride);
      case 4:
        return block<NT, TILES, U, 4, 4>(job, token, tile, values, x, stride);
      case 8:
        return block<NT, TILES, U, 4, 8>(job, token, tile, values, x, stride);
    }
  }
  return block<NT, TILES, U, 4, 0>(job, token, tile, values, x, stride);
}

template <int TILES>
NMF_INLINE void tiles_of(const nmf_job *job, const nmf_part *part, int64_t tile, Inputs in,
                         float *room) {
  const nmf_geometry &g = job->g;
  const float *values[TILES];
  for (int i = 0; i < TILES; ++i)
    values[i] =
        decode_values(job, tile + i, 0, g.entries, room + i * (g.entries * 16 + 16));
  int64_t token = part->token;
  const float *x = in.x;
  for (; token + 8 <= part->token_end; token += 8, x += 8 * in.stride)
    block_of<8, TILES, 1>(job, token, tile, values, x, in.stride);
  for (; token + 4 <= part->token_end; token += 4, x += 4 * in.stride)
    block_of<4, TILES, TILES == 1 ? 2 : 1>(job, token, tile, values, x, in.stride);
  for (; token + 2 <= part->token_end; token += 2, x += 2 * in.stride)
    block_of<2, TILES, TILES == 1 ? 4 : 1>(job, token, tile, values, x, in.stride);
  for (; token < part->token_end; ++token, x += in.stride)
    block_of<1, TILES, TILES == 1 ? 8 : 2>(job, token, tile, values, x, in.stride);
}

void run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  Inputs in;
  const int64_t tokens = part->token_end - part->token;
  float *room = reinterpret_cast<float *>(scratch);
  if (needs_copy(job)) {
    in.stride = nmf_ceil_div(padded(g), 16) * 16;
    float *copy = reinterpret_cast<float *>(scratch);
    for (int64_t t = 0; t < tokens; ++t) {
      read_inputs(job, part->token + t, 0, g.in, copy + t * in.stride);
      memset(copy + t * in.stride + g.in, 0, static_cast<size_t>(in.stride - g.in) * 4);
    }
    in.x = copy;
    room = copy + tokens * in.stride;
  } else {
    in.x = static_cast<const float *>(job->x) + part->token * job->x_stride;
    in.stride = job->x_stride;
  }
  int64_t tile = part->tile;
  /* With 8 tokens as many sums as the 32 registers hold, so that x is loaded once for three tiles.
   * With fewer the weights are what takes time: one tile after the other, as they lie. */
  if (tokens >= 8)
    for (; tile + 3 <= part->tile_end; tile += 3) tiles_of<3>(job, part, tile, in, room);
  for (; tile < part->tile_end; ++tile) tiles_of<1>(job, part, tile, in, room);
}

/* A weight that stays in the second-level cache is read again for every 8 tokens, whose x then stays
 * in the first; a longer one is read once for 48. */
int64_t most_tokens(const nmf_geometry *g) {
  return g->values_bytes + g->codes_bytes <= (1 << 20) ? 8 : 48;
}

const nmf_kernel kernel = {run, scratch_bytes, most_tokens, 1};

}  // namespace

const nmf_kernel *nmf_permute_avx512(void) { return &kernel; }
