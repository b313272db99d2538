#include "decode.h"

/* Entries of 16 inputs; quads of 16 inputs; and pieces of 16 inputs that a quad reaches over. */
static inline int64_t entries_of(const nmf_geometry &g) { return 16 / g.m * g.n; }
static inline int64_t quads_of(const nmf_geometry &g) {
  return entries_of(g) < 4 ? 1 : entries_of(g) / 4;
}
static inline int64_t pieces_of(const nmf_geometry &g) {
  return entries_of(g) < 4 ? 4 / entries_of(g) : 1;
}
static inline int64_t windows_of(const nmf_job *job) {
  return nmf_ceil_div(job->q.blocks * job->q.per, quads_of(job->g));
}

#define DOT_OFFSET 0
#define DOT_LINE 0
#define DOT_INPUTS(job) ((windows_of(job) * pieces_of((job)->g) * 16 + 63) / 64 * 64)
#define DOT_EXTRA(job) (quads_of((job)->g) * pieces_of((job)->g) * 32)
#include "dot_impl.h"

namespace {

/* PIECES shuffles pick a quad's inputs for 8 rows: a byte whose input lies in another piece has its
 * top bit set, which makes it zero, and the pieces are put together. |w| <= 127 and |x| <= 127, so that
 * two products fit the 16 bits that vpmaddubsw saturates to. */
template <int BITS, int PIECES, int NT>
NMF_INLINE void half(const nmf_job *job, const char *place, int64_t count, int64_t tile, int h,
                     const int8_t *x, int64_t stride, int32_t (*sums)[16]) {
  const int PER = 8 / BITS;
  const char *w = int8_tile(job, tile) + INT8_HEAD + h * 32;
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << BITS) - 1));
  const __m256i ones = _mm256_set1_epi16(1);
  __m256i acc[NT];
#pragma GCC unroll 4
  for (int t = 0; t < NT; ++t) acc[t] = _mm256_setzero_si256();
  int64_t quad = 0;
  for (int64_t b = 0; b < job->q.blocks; ++b, w += 64 + PER * 64) {
    const __m256i codes = get<__m256i>(w);
    __builtin_prefetch(w + 2048);
#pragma GCC unroll 4
    for (int j = 0; j < PER; ++j) {
      const __m256i code = _mm256_and_si256(j ? _mm256_srli_epi32(codes, BITS * j) : codes, mask);
      const __m256i value = get<__m256i>(w + 64 + j * 64), size = _mm256_abs_epi8(value);
      __m256i index[PIECES];
#pragma GCC unroll 4
      for (int k = 0; k < PIECES; ++k)
        index[k] = _mm256_or_si256(code, get<__m256i>(place + (quad * PIECES + k) * 32));
#pragma GCC unroll 4
      for (int t = 0; t < NT; ++t) {
        __m256i picked = _mm256_setzero_si256();
#pragma GCC unroll 4
        for (int k = 0; k < PIECES; ++k) {
          const __m256i piece = _mm256_broadcastsi128_si256(get<__m128i>(x + t * stride + 16 * k));
          picked = _mm256_or_si256(picked, _mm256_shuffle_epi8(piece, index[k]));
        }
        const __m256i two = _mm256_maddubs_epi16(size, _mm256_sign_epi8(picked, value));
        acc[t] = _mm256_add_epi32(acc[t], _mm256_madd_epi16(two, ones));
      }
      if (++quad == count) {
        quad = 0;
        x += 16 * PIECES;
      }
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < NT; ++t) put(sums[t] + h * 8, acc[t]);
}

template <int BITS, int PIECES, int NT>
NMF_INLINE void tokens_of(const nmf_job *job, const char *place, int64_t count, int64_t token,
                          int64_t tile, const int8_t *x, int64_t stride, const float *steps,
                          const float *bias) {
  int32_t sums[NT][16];
  for (int h = 0; h < 2; ++h)
    half<BITS, PIECES, NT>(job, place, count, tile, h, x, stride, sums);
  for (int t = 0; t < NT; ++t) dot_write(job, token + t, tile, sums[t], bias, steps[t]);
}

template <int BITS, int PIECES>
void tiles_of(const nmf_job *job, const nmf_part *part, const char *place, int64_t count,
              const int8_t *x, int64_t stride, const float *steps) {
  const int64_t tokens = part->token_end - part->token;
  for (int64_t tile = part->tile; tile < part->tile_end; ++tile) {
    float bias[16];
    read_bias(job, tile, bias);
    int64_t t = 0;
    for (; t + 4 <= tokens; t += 4)
      tokens_of<BITS, PIECES, 4>(job, place, count, part->token + t, tile, x + t * stride, stride,
                                 steps + t, bias);
    for (; t < tokens; ++t)
      tokens_of<BITS, PIECES, 1>(job, place, count, part->token + t, tile, x + t * stride, stride,
                                 steps + t, bias);
  }
}

void dot_tiles(const nmf_job *job, const nmf_part *part, const int8_t *x, int64_t stride,
               const float *steps, char *scratch) {
  const nmf_geometry &g = job->g;
  const int64_t count = quads_of(g), pieces = pieces_of(g);
  for (int64_t at = 0; at < count * pieces; ++at)
    for (int i = 0; i < 32; ++i) {
      const int64_t input = (at / pieces * 4 + i % 4) / g.n * g.m;
      scratch[at * 32 + i] = static_cast<char>(input / 16 == at % pieces ? input % 16 : 128);
    }
  if (job->q.bits == 2) return tiles_of<2, 1>(job, part, scratch, count, x, stride, steps);
  if (pieces == 1) return tiles_of<4, 1>(job, part, scratch, count, x, stride, steps);
  if (pieces == 2) return tiles_of<4, 2>(job, part, scratch, count, x, stride, steps);
  return tiles_of<4, 4>(job, part, scratch, count, x, stride, steps);
}

}  // namespace

const nmf_kernel *nmf_int8_dot_avx2(void) { return &dot_kernel; }
