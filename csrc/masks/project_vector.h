/* What the mask kernel does with vectors of keys: a lane holds a non-negative number below 2^31, so
 * that signed compares order it. All static, see common.h. */
#ifndef NMFLOW_PROJECT_VECTOR_H
#define NMFLOW_PROJECT_VECTOR_H

#include "common.h"
#include "vector.h"

namespace {

NMF_INLINE vecu larger(vecu a, vecu b) {
#if defined(__AVX512BW__)
  return (vecu)_mm512_max_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vecu)_mm256_max_epi32((__m256i)a, (__m256i)b);
#else
  const vecu c = (vecu)((veci)a > (veci)b);
  return (a & c) | (b & ~c);
#endif
}
NMF_INLINE vecu smaller(vecu a, vecu b) {
#if defined(__AVX512BW__)
  return (vecu)_mm512_min_epi32((__m512i)a, (__m512i)b);
#elif defined(__AVX2__)
  return (vecu)_mm256_min_epi32((__m256i)a, (__m256i)b);
#else
  const vecu c = (vecu)((veci)a > (veci)b);
  return (b & c) | (a & ~c);
#endif
}
/* The key that comes first when the largest (TOP) or the smallest are looked for. */
template <bool TOP>
NMF_INLINE vecu better(vecu a, vecu b) {
  return TOP ? larger(a, b) : smaller(a, b);
}
template <bool TOP>
NMF_INLINE vecu worse(vecu a, vecu b) {
  return TOP ? smaller(a, b) : larger(a, b);
}

/* A byte a lane: 1 where the key is kept, which is key >= t (TOP) or key > t. */
template <bool TOP>
NMF_INLINE vecb kept_bytes(vecu key, vecu t) {
#if defined(__AVX512BW__)
  const __mmask16 k = TOP ? _mm512_cmpge_epi32_mask((__m512i)key, (__m512i)t)
                          : _mm512_cmpgt_epi32_mask((__m512i)key, (__m512i)t);
  return (vecb)_mm_maskz_set1_epi8(k, 1);
#else
  const veci c = TOP ? ((veci)t > (veci)key) + 1 : -((veci)key > (veci)t);
#if defined(__SSE2__)
#if defined(__AVX2__)
  const __m128i low = _mm256_castsi256_si128((__m256i)c), high = _mm256_extracti128_si256((__m256i)c, 1);
#else
  const __m128i low = (__m128i)c, high = _mm_setzero_si128();
#endif
  const __m128i bytes = _mm_packs_epi16(_mm_packs_epi32(low, high), _mm_setzero_si128());
  vecb r;
  memcpy(&r, &bytes, sizeof r);
  return r;
#else
  return __builtin_convertvector(c, vecb);
#endif
#endif
}

/* Lane by lane: yes where the byte is 1, no where it is 0. */
NMF_INLINE vecu choose(const uint8_t *bytes, vecu yes, vecu no) {
#if defined(__AVX512BW__)
  const __m128i b = get<__m128i>(bytes);
  return (vecu)_mm512_mask_mov_epi32((__m512i)no, _mm_test_epi8_mask(b, b), (__m512i)yes);
#elif defined(__AVX2__)
  const __m256i b = _mm256_cvtepu8_epi32(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes)));
  const vecu keep = -(vecu)b;
#elif defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  const __m128i b = _mm_unpacklo_epi8(_mm_cvtsi32_si128(get<int32_t>(bytes)), zero);
  const vecu keep = -(vecu)_mm_unpacklo_epi16(b, zero);
#else
  const vecu keep = -__builtin_convertvector(get<vecb>(bytes), vecu);
#endif
#if !defined(__AVX512BW__)
  return (yes & keep) | (no & ~keep);
#endif
}
NMF_INLINE vech choose(const uint8_t *bytes, vech yes, vech no) {
#if defined(__AVX512BW__)
  const __m128i b = get<__m128i>(bytes);
  return (vech)_mm256_mask_mov_epi16((__m256i)no, _mm_test_epi8_mask(b, b), (__m256i)yes);
#elif defined(__AVX2__)
  const __m128i b = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(bytes));
  const vech keep = -(vech)_mm_cvtepu8_epi16(b);
#elif defined(__SSE2__)
  const __m128i b = _mm_cvtsi32_si128(get<int32_t>(bytes));
  const __m128i wide = _mm_unpacklo_epi8(b, _mm_setzero_si128());
  const vech keep = -get<vech>(&wide);
#else
  const vech keep = -__builtin_convertvector(get<vecb>(bytes), vech);
#endif
#if !defined(__AVX512BW__)
  return (yes & keep) | (no & ~keep);
#endif
}

/* Lane i gets lane i ^ K. */
template <int K>
NMF_INLINE vecu flip(vecu v) {
#if defined(__AVX512BW__)
  const __m512i x = (__m512i)v;
  return (vecu)(K == 1   ? _mm512_shuffle_epi32(x, _MM_PERM_CDAB)
                : K == 2 ? _mm512_shuffle_epi32(x, _MM_PERM_BADC)
                : K == 4 ? _mm512_shuffle_i32x4(x, x, 0xb1)
                         : _mm512_shuffle_i32x4(x, x, 0x4e));
#elif defined(__AVX2__)
  const __m256i x = (__m256i)v;
  return (vecu)(K == 1   ? _mm256_shuffle_epi32(x, 0xb1)
                : K == 2 ? _mm256_shuffle_epi32(x, 0x4e)
                         : _mm256_permute4x64_epi64(x, 0x4e));
#elif defined(__SSE2__)
  return (vecu)(K == 1 ? _mm_shuffle_epi32((__m128i)v, 0xb1) : _mm_shuffle_epi32((__m128i)v, 0x4e));
#else
  vecu r;
  for (int i = 0; i < LANES; ++i) r[i] = v[i ^ K];
  return r;
#endif
}

/* Lane i gets lane index[i] of v. */
NMF_INLINE vecu permute(vecu v, const uint8_t *index) {
#if defined(__AVX512BW__)
  return (vecu)_mm512_permutexvar_epi32(_mm512_cvtepu8_epi32(get<__m128i>(index)), (__m512i)v);
#elif defined(__AVX2__)
  const __m128i bytes = _mm_loadl_epi64(reinterpret_cast<const __m128i *>(index));
  return (vecu)_mm256_permutevar8x32_epi32((__m256i)v, _mm256_cvtepu8_epi32(bytes));
#else
  vecu r;
  for (int i = 0; i < LANES; ++i) r[i] = v[index[i]];
  return r;
#endif
}

/* Four 32-bit units from each of LANES rows, `stride` bytes apart: unit i of every row to to[i]. */
NMF_INLINE void transpose4(const char *from, int64_t stride, vecu *to) {
#if defined(__AVX512BW__)
  /* Quarters of rows are loaded straight to their place, so that the load ports do half of it. */
  __m512i r[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const char *p = from + k * stride;
    __m512i v = _mm512_castsi128_si512(get<__m128i>(p));
    v = _mm512_mask_broadcast_i32x4(v, 0x00f0, get<__m128i>(p + 4 * stride));
    v = _mm512_mask_broadcast_i32x4(v, 0x0f00, get<__m128i>(p + 8 * stride));
    r[k] = _mm512_mask_broadcast_i32x4(v, 0xf000, get<__m128i>(p + 12 * stride));
  }
  const __m512i a = _mm512_unpacklo_epi32(r[0], r[1]), b = _mm512_unpackhi_epi32(r[0], r[1]);
  const __m512i c = _mm512_unpacklo_epi32(r[2], r[3]), d = _mm512_unpackhi_epi32(r[2], r[3]);
  /* The rows come out in the order 0 4 8 12 of quarters: lane 4 q + k is row 4 q + k. */
  to[0] = (vecu)_mm512_unpacklo_epi64(a, c);
  to[1] = (vecu)_mm512_unpackhi_epi64(a, c);
  to[2] = (vecu)_mm512_unpacklo_epi64(b, d);
  to[3] = (vecu)_mm512_unpackhi_epi64(b, d);
#elif defined(__AVX2__)
  __m256i r[4];
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k)
    r[k] = _mm256_inserti128_si256(_mm256_castsi128_si256(get<__m128i>(from + k * stride)),
                                   get<__m128i>(from + (k + 4) * stride), 1);
  const __m256i a = _mm256_unpacklo_epi32(r[0], r[1]), b = _mm256_unpackhi_epi32(r[0], r[1]);
  const __m256i c = _mm256_unpacklo_epi32(r[2], r[3]), d = _mm256_unpackhi_epi32(r[2], r[3]);
  to[0] = (vecu)_mm256_unpacklo_epi64(a, c);
  to[1] = (vecu)_mm256_unpackhi_epi64(a, c);
  to[2] = (vecu)_mm256_unpacklo_epi64(b, d);
  to[3] = (vecu)_mm256_unpackhi_epi64(b, d);
#elif defined(__SSE2__)
  const __m128i r0 = get<__m128i>(from), r1 = get<__m128i>(from + stride);
  const __m128i r2 = get<__m128i>(from + 2 * stride), r3 = get<__m128i>(from + 3 * stride);
  const __m128i a = _mm_unpacklo_epi32(r0, r1), b = _mm_unpackhi_epi32(r0, r1);
  const __m128i c = _mm_unpacklo_epi32(r2, r3), d = _mm_unpackhi_epi32(r2, r3);
  to[0] = (vecu)_mm_unpacklo_epi64(a, c);
  to[1] = (vecu)_mm_unpackhi_epi64(a, c);
  to[2] = (vecu)_mm_unpacklo_epi64(b, d);
  to[3] = (vecu)_mm_unpackhi_epi64(b, d);
#else
  for (int i = 0; i < LANES; ++i) {
    uint32_t unit[4];
    memcpy(unit, from + i * stride, 16);
    for (int k = 0; k < 4; ++k) to[k][i] = unit[k];
  }
#endif
}

}  // namespace
#endif
