/* bfloat16 of tokens, row by row, as rows of inputs: blocks of 32 x 32, as pairs of inputs in floats. */
#ifndef NMFLOW_TURN_H
#define NMFLOW_TURN_H

#include "avx512.h"

namespace {

/* 32 tokens, `stride` apart, of 32 inputs: to[input * to_stride + token], aligned to 64 bytes. */
NMF_INLINE void turn_block(const uint16_t *x, int64_t stride, uint16_t *to, int64_t to_stride) {
  alignas(64) float even[256], odd[256]; /* [16 pairs][16 tokens], of even tokens and of odd ones */
  transpose16(reinterpret_cast<const float *>(x), stride, even, 16);
  transpose16(reinterpret_cast<const float *>(x + stride), stride, odd, 16);
  const __m512i high = _mm512_set1_epi32(-65536);
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p, to += 2 * to_stride) {
    const __m512i a = _mm512_load_si512(even + 16 * p), b = _mm512_load_si512(odd + 16 * p);
    _mm512_store_si512(to, _mm512_or_si512(_mm512_andnot_si512(high, a), _mm512_slli_epi32(b, 16)));
    _mm512_store_si512(to + to_stride, _mm512_or_si512(_mm512_srli_epi32(a, 16), _mm512_and_si512(high, b)));
  }
}

/* `count` tokens of `in` inputs; zeros past the last token up to the next 32. */
void turn_tokens(const uint16_t *x, int64_t stride, int64_t count, int64_t in, uint16_t *to, int64_t to_stride) {
  for (int64_t t = 0; t < count; t += 32, x += 32 * stride)
    for (int64_t i = 0; i < in; i += 32) {
      const int64_t tokens = nmf_min(32, count - t), inputs = nmf_min(32, in - i);
      if (tokens == 32 && inputs == 32) {
        turn_block(x + i, stride, to + i * to_stride + t, to_stride);
        continue;
      }
      alignas(64) uint16_t block[32 * 32], turned[32 * 32];
      memset(block, 0, sizeof block);
      for (int64_t k = 0; k < tokens; ++k)
        memcpy(block + 32 * k, x + k * stride + i, static_cast<size_t>(inputs) * 2);
      turn_block(block, 32, turned, 32);
      for (int64_t k = 0; k < inputs; ++k) memcpy(to + (i + k) * to_stride + t, turned + k * 32, 64);
    }
}

}  // namespace
#endif
