#define NMF_LANES 8
#include <immintrin.h>

#include "simd.h"

namespace {
#define NMF_GATHER 1
NMF_INLINE vecf gather(const float *x, const uint32_t *columns) {
  __m256i index;
  memcpy(&index, columns, sizeof index);
  return (vecf)_mm256_i32gather_ps(x, index, 4);
}
}  // namespace

#include "matmul_impl.h"
#include "panel_impl.h"

const nmf_kernel *nmf_gather_avx2(void) { return &gather_kernel; }
const nmf_kernel *nmf_tokens_avx2(void) { return &tokens_kernel; }
const nmf_kernel *nmf_panel_avx2(void) { return &panel_kernel; }
