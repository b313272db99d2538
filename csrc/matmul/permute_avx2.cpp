#include <immintrin.h>

#include "decode.h"

namespace {

enum { WHOLE, WIDE, LOW, HIGH };
/* A register holds half a span; where the pattern tells which half a weight lies in, one is read. */
const bool PERMUTE_HALVES = true;
const int PERMUTE_TILES = 1;
#define PERMUTE_TOKENS 4

/* x[code] of 8 inputs by the low 3 bits, of 16 or 32 by one choice more for each bit more. */
NMF_INLINE __m256 of8(__m256i code, const float *x) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), code);
}
NMF_INLINE __m256 of16(__m256i code, const float *x) {
  const __m256 bit = _mm256_castsi256_ps(_mm256_slli_epi32(code, 28));
  return _mm256_blendv_ps(of8(code, x), of8(code, x + 8), bit);
}
NMF_INLINE __m256 of32(__m256i code, const float *x) {
  const __m256 bit = _mm256_castsi256_ps(_mm256_slli_epi32(code, 27));
  return _mm256_blendv_ps(of16(code, x), of16(code, x + 16), bit);
}

template <int PICK>
NMF_INLINE vecf picked(vecu code, const float *x) {
  if (PICK == WIDE) return (vecf)of32((__m256i)code, x);
  if (PICK == WHOLE) return (vecf)of16((__m256i)code, x);
  return (vecf)of8((__m256i)code, PICK == LOW ? x : x + 8);
}

}  // namespace

#include "permute_impl.h"

const nmf_kernel *nmf_permute_avx2(void) { return &permute_kernel; }
