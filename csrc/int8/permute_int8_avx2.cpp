#include "decode.h"

namespace {

#define INT8_TOKENS 4
#define INT8_WIDE 1
NMF_INLINE __m256 of8(vecu code, const float *x) {
  return _mm256_permutevar8x32_ps(_mm256_loadu_ps(x), (__m256i)code);
}
NMF_INLINE __m256 of16(vecu code, const float *x) {
  return _mm256_blendv_ps(of8(code, x), of8(code, x + 8), (__m256)(code << 28u));
}
template <int M>
NMF_INLINE vecf picked(vecu code, const float *x) {
  if (M == 4)
    return (vecf)_mm256_permutevar_ps(_mm256_broadcast_ps(reinterpret_cast<const __m128 *>(x)),
                                      (__m256i)code);
  if (M == 8) return (vecf)of8(code, x);
  if (M == 16) return (vecf)of16(code, x);
  return (vecf)_mm256_blendv_ps(of16(code, x), of16(code, x + 16), (__m256)(code << 27u));
}

}  // namespace

#include "permute_int8_impl.h"

const nmf_kernel *nmf_int8_permute_avx2(void) { return &permute_kernel; }
