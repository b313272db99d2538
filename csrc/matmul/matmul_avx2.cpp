#include <immintrin.h>

#include "decode.h"

namespace {

#define NMF_GATHER 1
NMF_INLINE vecf gather(const float *x, const uint32_t *columns) {
  __m256i index;
  memcpy(&index, columns, sizeof index);
  return (vecf)_mm256_i32gather_ps(x, index, 4);
}

#define NMF_TRANSPOSE 1
/* 8 x 8 floats: halves of rows are loaded to their place, then two rounds within 128-bit lanes. */
NMF_INLINE void transpose8(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
#pragma GCC unroll 2
  for (int h = 0; h < 2; ++h) {
    __m256 r[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const float *p = from + k * from_stride + 4 * h;
      r[k] = _mm256_insertf128_ps(_mm256_castps128_ps256(_mm_loadu_ps(p)),
                                  _mm_loadu_ps(p + 4 * from_stride), 1);
    }
    const __m256 a = _mm256_unpacklo_ps(r[0], r[1]), b = _mm256_unpackhi_ps(r[0], r[1]);
    const __m256 c = _mm256_unpacklo_ps(r[2], r[3]), d = _mm256_unpackhi_ps(r[2], r[3]);
    float *q = to + 4 * h * to_stride;
    _mm256_storeu_ps(q, _mm256_shuffle_ps(a, c, 0x44));
    _mm256_storeu_ps(q + to_stride, _mm256_shuffle_ps(a, c, 0xee));
    _mm256_storeu_ps(q + 2 * to_stride, _mm256_shuffle_ps(b, d, 0x44));
    _mm256_storeu_ps(q + 3 * to_stride, _mm256_shuffle_ps(b, d, 0xee));
  }
}
NMF_INLINE void transpose16(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
  for (int i = 0; i < 16; i += 8)
    for (int j = 0; j < 16; j += 8)
      transpose8(from + i * from_stride + j, from_stride, to + j * to_stride + i, to_stride);
}

}  // namespace

/* 6 or 7 vectors of tokens by 2 rows: 12 or 14 sums, of 16 registers. */
#define NMF_MAX_C 6
#define NMF_WIDEST_C 7
#include "matmul_impl.h"
#include "panel_impl.h"

const nmf_kernel *nmf_gather_avx2(void) { return &gather_kernel; }
const nmf_kernel *nmf_tokens_avx2(void) { return &tokens_kernel; }
const nmf_kernel *nmf_panel_avx2(void) { return &panel_kernel; }
