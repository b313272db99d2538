#include "decode.h"

/* Inputs that a quad's columns lie in: 64, which one register holds, or 128 (1:32). */
static inline int64_t window_of(const nmf_geometry &g) { return 64 / g.m * g.n == 2 ? 128 : 64; }
static inline int64_t quads_of(const nmf_geometry &g) { return window_of(g) / g.m * g.n / 4; }
static inline int64_t windows_of(const nmf_job *job) {
  return nmf_ceil_div(job->q.blocks * job->q.per, quads_of(job->g));
}

#define DOT_OFFSET 128
#define DOT_LINE 64
#define DOT_INPUTS(job) (windows_of(job) * window_of((job)->g))
#define DOT_EXTRA(job) (quads_of((job)->g) * 64)
#include "dot_impl.h"

namespace {

struct Quads {
  const char *place;   /* [count][64]: where the group of each byte of a quad begins in its window */
  int64_t count;       /* quads of a window */
};

/* QW: quads of a window where a block holds whole windows, else 0. FULL: x fills the first-level cache, so
 * that weights to come go to the second. */
template <int BITS, int QW, bool WIDE, int NT, int TILES, bool FULL>
NMF_INLINE void block(const nmf_job *job, Quads quads, int64_t token, int64_t tile, const int8_t *x,
                      int64_t line, const float *steps) {
  const int PER = 8 / BITS, U = NT * TILES >= 8 ? 1 : NT * TILES >= 4 ? (PER < 2 ? PER : 2) : PER;
  const int BYTES = 64 + PER * 64;
  const int64_t ahead = NT < 4 && !job->fetch ? 0 : 4096;
  __m512i acc[U][TILES][NT];
  const char *w[TILES];
#pragma GCC unroll 4
  for (int i = 0; i < TILES; ++i) {
    w[i] = int8_tile(job, tile + i) + INT8_HEAD;
    /* x lies 128 higher than it is, which is 128 times the sum of a row too much. */
    const __m512i start = _mm512_sub_epi32(
        _mm512_setzero_si512(), _mm512_slli_epi32(_mm512_loadu_si512(int8_sums(job, tile + i)), 7));
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
      acc[0][i][t] = start;
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) acc[u][i][t] = _mm512_setzero_si512();
    }
  }
  const __m512i mask = _mm512_set1_epi8(static_cast<char>(job->g.m - 1));
  int64_t quad = 0;
  for (int64_t b = 0; b < job->q.blocks; ++b) {
    __m512i code[TILES];
#pragma GCC unroll 4
    for (int i = 0; i < TILES; ++i) {
      code[i] = _mm512_loadu_si512(w[i]);
#pragma GCC unroll 8
      for (int at = 0; at < BYTES; at += 64)
        _mm_prefetch(w[i] + ahead + at, FULL ? _MM_HINT_T1 : _MM_HINT_T0);
    }
#pragma GCC unroll 4
    for (int j = 0; j < PER; ++j) {
      const __m512i place =
          _mm512_loadu_si512(quads.place + (QW ? j % (QW ? QW : 1) : quad) * 64);
      __m512i index[TILES], value[TILES];
#pragma GCC unroll 4
      for (int i = 0; i < TILES; ++i) {
        const __m512i shifted = j ? _mm512_srli_epi32(code[i], BITS * j) : code[i];
        index[i] = _mm512_ternarylogic_epi32(shifted, mask, place, 0xea); /* (a & b) | c */
        value[i] = _mm512_loadu_si512(w[i] + 64 + j * 64);
      }
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) {
        const __m512i low = _mm512_loadu_si512(x + t * 64);
        const __m512i high = WIDE ? _mm512_loadu_si512(x + t * 64 + line) : low;
#pragma GCC unroll 4
        for (int i = 0; i < TILES; ++i) {
          const __m512i picked = WIDE ? _mm512_permutex2var_epi8(low, index[i], high)
                                      : _mm512_permutexvar_epi8(index[i], low);
          acc[j % U][i][t] = _mm512_dpbusd_epi32(acc[j % U][i][t], picked, value[i]);
        }
      }
      if (QW ? (j + 1) % (QW ? QW : 1) == 0 : ++quad == quads.count) {
        x += WIDE ? 2 * line : line;
        quad = 0;
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < TILES; ++i) w[i] += BYTES;
  }
  const nmf_geometry &g = job->g;
  const bool plain = g.dtype == NMFLOW_F32 && job->epilogue == NMFLOW_NONE;
  const int64_t y_stride = job->y_stride;
#pragma GCC unroll 4
  for (int i = 0; i < TILES; ++i) {
    const int64_t row = (tile + i) * 16, count = nmf_min(16, g.out - row);
    float bias[16];
    read_bias(job, tile + i, bias);
    const vecf scales = load(int8_scales(job, tile + i)), biases = load(bias);
    vecf y[NT];
#pragma GCC unroll 16
    for (int t = 0; t < NT; ++t) {
      __m512i sum = acc[0][i][t];
#pragma GCC unroll 4
      for (int u = 1; u < U; ++u) sum = _mm512_add_epi32(sum, acc[u][i][t]);
      y[t] = steps[t] * scales * (vecf)_mm512_cvtepi32_ps(sum) + biases;
    }
    if (plain && count == 16) {
      float *to = static_cast<float *>(job->y) + token * y_stride + row;
#pragma GCC unroll 16
      for (int t = 0; t < NT; ++t) store(to + t * y_stride, y[t]);
      continue;
    }
    for (int t = 0; t < NT; ++t) {
      float sums[16];
      store(sums, y[t]);
      write_rows(job, token + t, row, sums, count);
    }
  }
}

template <int BITS, int QW, bool WIDE>
void tiles_of(const nmf_job *job, const nmf_part *part, Quads quads, const int8_t *x, int64_t line,
              const float *steps) {
#define NMF_BLOCK(NT, TILES, FULL)                                                                \
  block<BITS, QW, WIDE, NT, TILES, FULL>(job, quads, part->token + t, tile, x + t * 64, line, steps + t)
  const int64_t tokens = part->token_end - part->token;
  const bool full = tokens * DOT_INPUTS(job) > 24576; /* bytes of x: they fill the first-level cache */
  int64_t tile = part->tile;
  if (QW == 1 && full && tokens % 8 == 0) /* x is loaded from afar for each quad: for three tiles */
    for (; tile + 3 <= part->tile_end; tile += 3)
      for (int64_t t = 0; t < tokens; t += 8) NMF_BLOCK(8, 3, true);
  if (tokens >= 4)
    for (; tile + 2 <= part->tile_end; tile += 2) {
      const int64_t pair = tile;
      int64_t t = 0;
      for (; t + 16 <= tokens; t += 16) { /* as many sums as registers, and one stream of weights */
        for (int64_t tile = pair; tile < pair + 2; ++tile)
          if (full)
            NMF_BLOCK(16, 1, true);
          else
            NMF_BLOCK(16, 1, false);
      }
      if (t + 8 <= tokens) {
        NMF_BLOCK(8, 2, false);
        t += 8;
      }
      if (t + 4 <= tokens) {
        NMF_BLOCK(4, 2, false);
        t += 4;
      }
      for (; t < tokens; ++t) NMF_BLOCK(1, 2, false);
    }
  for (; tile < part->tile_end; ++tile) {
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4) NMF_BLOCK(4, 1, false);
    for (; t < tokens; ++t) NMF_BLOCK(1, 1, false);
  }
#undef NMF_BLOCK
}

void dot_tiles(const nmf_job *job, const nmf_part *part, const int8_t *x, int64_t line,
               const float *steps, char *scratch) {
  const nmf_geometry &g = job->g;
  const Quads quads = {scratch, quads_of(g)};
  for (int64_t k = 0; k < quads.count; ++k)
    for (int i = 0; i < 64; ++i)
      scratch[k * 64 + i] = static_cast<char>((k * 4 + i % 4) / g.n * g.m);
  if (window_of(g) == 128) return tiles_of<8, 1, true>(job, part, quads, x, line, steps);
  switch (job->q.bits * 8 + quads.count) {
    case 2 * 8 + 4: /* 1:4 */
      return tiles_of<2, 4, false>(job, part, quads, x, line, steps);
    case 4 * 8 + 1: /* 1:16 */
      return tiles_of<4, 1, false>(job, part, quads, x, line, steps);
    case 4 * 8 + 2: /* 1:8 and 2:16 */
      return tiles_of<4, 2, false>(job, part, quads, x, line, steps);
    default:
      if (job->q.bits == 2) return tiles_of<2, 0, false>(job, part, quads, x, line, steps);
      if (job->q.bits == 4) return tiles_of<4, 0, false>(job, part, quads, x, line, steps);
      return tiles_of<8, 0, false>(job, part, quads, x, line, steps);
  }
}

}  // namespace

const nmf_kernel *nmf_int8_dot_vnni(void) { return &dot_kernel; }
