/* What intrinsics do better than the vector extension on AVX-512. */
#ifndef NMFLOW_AVX512_H
#define NMFLOW_AVX512_H

#include <immintrin.h>

#include "decode.h"

namespace {

#define NMF_GATHER 1
NMF_INLINE vecf gather(const float *x, const uint32_t *columns) {
  return (vecf)_mm512_i32gather_ps(_mm512_loadu_si512(columns), x, 4);
}

#define NMF_TRANSPOSE 1
/* 16 x 16 floats: to[j * to_stride + i] = from[i * from_stride + j]. Quarters of rows are loaded
 * straight to their place (the load ports do half of the shuffling), then two rounds in registers
 * transpose the 4 x 4 blocks. */
NMF_INLINE void transpose16(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
#pragma GCC unroll 4
  for (int q = 0; q < 4; ++q) {
    __m512 r[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      const float *p = from + k * from_stride + 4 * q;
      __m512 v = _mm512_castps128_ps512(_mm_loadu_ps(p));
      v = _mm512_mask_broadcast_f32x4(v, 0x00f0, _mm_loadu_ps(p + 4 * from_stride));
      v = _mm512_mask_broadcast_f32x4(v, 0x0f00, _mm_loadu_ps(p + 8 * from_stride));
      r[k] = _mm512_mask_broadcast_f32x4(v, 0xf000, _mm_loadu_ps(p + 12 * from_stride));
    }
    /* Lane group j of r[k] is row 4 j + k, columns 4 q .. 4 q + 3. */
    const __m512 a = _mm512_unpacklo_ps(r[0], r[1]), b = _mm512_unpackhi_ps(r[0], r[1]);
    const __m512 c = _mm512_unpacklo_ps(r[2], r[3]), d = _mm512_unpackhi_ps(r[2], r[3]);
    const __m512 o[4] = {
        _mm512_shuffle_ps(a, c, 0x44),
        _mm512_shuffle_ps(a, c, 0xee),
        _mm512_shuffle_ps(b, d, 0x44),
        _mm512_shuffle_ps(b, d, 0xee),
    };
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) _mm512_storeu_ps(to + (4 * q + k) * to_stride, o[k]);
  }
}

}  // namespace
#endif
