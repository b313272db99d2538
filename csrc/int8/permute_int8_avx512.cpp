#include "decode.h"

namespace {

#define INT8_TOKENS 8
#define INT8_WIDE 0
template <int M>
NMF_INLINE vecf picked(vecu code, const float *x) {
  if (M == 4)
    return (vecf)_mm512_permutevar_ps(_mm512_broadcast_f32x4(_mm_loadu_ps(x)), (__m512i)code);
  if (M == 8) /* twice, so that the bit above a code does not matter */
    return (vecf)_mm512_permutexvar_ps(
        (__m512i)code, _mm512_castpd_ps(_mm512_broadcast_f64x4(
                           _mm256_loadu_pd(reinterpret_cast<const double *>(x)))));
  return (vecf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(x));
}

}  // namespace

#include "permute_int8_impl.h"

const nmf_kernel *nmf_int8_permute_avx512(void) { return &permute_kernel; }
