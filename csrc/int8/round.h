/* Rounding a token to 8 bits. All static, see common.h. */
#ifndef NMFLOW_ROUND_H
#define NMFLOW_ROUND_H

#include "common.h"
#include "vector.h"

namespace {

NMF_INLINE veci nearest(vecf v) {
#if defined(__AVX512F__)
  return (veci)_mm512_cvtps_epi32((__m512)v);
#elif defined(__AVX2__)
  return (veci)_mm256_cvtps_epi32((__m256)v);
#elif defined(__SSE2__)
  return (veci)_mm_cvtps_epi32((__m128)v);
#else
  veci n;
  for (int i = 0; i < LANES; ++i) n[i] = static_cast<int32_t>(__builtin_nearbyintf(v[i]));
  return n;
#endif
}

NMF_INLINE veci larger(veci a, veci b) {
#if defined(__AVX512F__)
  return (veci)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (veci)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  const veci more = a > b;
  return (a & more) | (b & ~more);
#endif
}

/* The largest |x|, by the order of the bits, in which infinities and NaNs come last. */
NMF_INLINE float largest(const float *x, int64_t count) {
  const int TURNS = 4; /* hide the latency of a comparison */
  veci most[TURNS] = {};
  int64_t i = 0;
  for (; i + TURNS * LANES <= count; i += TURNS * LANES)
#pragma GCC unroll 4
    for (int k = 0; k < TURNS; ++k)
      most[k] = larger(most[k], (veci)(as_bits(load(x + i + k * LANES)) & 0x7fffffffu));
  for (; i + LANES <= count; i += LANES)
    most[0] = larger(most[0], (veci)(as_bits(load(x + i)) & 0x7fffffffu));
  for (int k = 1; k < TURNS; ++k) most[0] = larger(most[0], most[k]);
  int32_t best = 0;
  for (int k = 0; k < LANES; ++k)
    if (most[0][k] > best) best = most[0][k];
  for (; i < count; ++i) {
    const int32_t a = static_cast<int32_t>(nmf_bits_of_float(x[i]) & 0x7fffffffu);
    if (a > best) best = a;
  }
  return nmf_float_of_bits(static_cast<uint32_t>(best));
}

/* What the inputs of a token are multiplied by before they are rounded, or 0 where all of them count as
 * zero; and what a step is worth then: NaN where one of them is not finite. */
struct Rounding {
  float by, step;
};
NMF_INLINE Rounding rounding_of(const float *x, int64_t count) {
  const float most = largest(x, count);
  if (most < 1e-30f) return {0.0f, 0.0f};
  if (!(most <= 3.4028235e38f)) return {0.0f, nmf_float_of_bits(0x7fc00000u)};
  return {127.0f / most, most / 127.0f};
}

}  // namespace
#endif
