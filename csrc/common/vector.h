/* Vectors by GCC's vector extension, so that one source serves every instruction set: 16 lanes on
 * AVX-512, 8 on AVX2, 4 elsewhere. Intrinsics stand only where a compiler does not find the
 * instruction by itself. All static, see common.h. */
#ifndef NMFLOW_VECTOR_H
#define NMFLOW_VECTOR_H

#include "common.h"

#if defined(__SSE2__)
#include <immintrin.h>
#endif
#if defined(__GNUC__) && !defined(__clang__)
/* Vectors wider than the target's registers are passed in memory; all of this is inlined. */
#pragma GCC diagnostic ignored "-Wpsabi"
#endif

namespace {

#if defined(__AVX512BW__)
const int LANES = 16;
#elif defined(__AVX2__)
const int LANES = 8;
#else
const int LANES = 4;
#endif
typedef float vecf __attribute__((vector_size(4 * LANES)));
typedef uint32_t vecu __attribute__((vector_size(4 * LANES)));
typedef int32_t veci __attribute__((vector_size(4 * LANES)));
typedef uint16_t vech __attribute__((vector_size(2 * LANES)));
typedef uint8_t vecb __attribute__((vector_size(LANES)));

template <class V>
NMF_INLINE V get(const void *from) {
  V v;
  memcpy(&v, from, sizeof v);
  return v;
}
template <class V>
NMF_INLINE void put(void *to, V v) {
  memcpy(to, &v, sizeof v);
}
NMF_INLINE vecf load(const float *p) { return get<vecf>(p); }
NMF_INLINE vecu load(const uint32_t *p) { return get<vecu>(p); }
NMF_INLINE void store(float *p, vecf v) { put(p, v); }
NMF_INLINE void store(uint32_t *p, vecu v) { put(p, v); }
/* The words of the rows before those at `first` of a tile of 16: the first one's lies in the tile
 * before (null: there is none, and its word is 0). */
NMF_INLINE vecu rows_before(const uint32_t *tile, int first, const uint32_t *tile_before) {
  if (first) return get<vecu>(tile + first - 1);
  uint32_t found[LANES] = {tile_before ? tile_before[15] : 0};
  memcpy(found + 1, tile, sizeof found - 4);
  return get<vecu>(found);
}
NMF_INLINE vecf splat(float value) { return value - vecf{}; }
NMF_INLINE vecu splat(uint32_t value) { return value - vecu{}; }
NMF_INLINE vecf as_float(vecu v) { return (vecf)v; }
NMF_INLINE vecu as_bits(vecf v) { return (vecu)v; }
NMF_INLINE vecf pick(veci condition, vecf yes, vecf no) {
  return as_float(((vecu)condition & as_bits(yes)) | (~(vecu)condition & as_bits(no)));
}

NMF_INLINE vecu widen(vech v) {
#if defined(__AVX512BW__)
  return (vecu)_mm512_cvtepu16_epi32((__m256i)v);
#elif defined(__AVX2__)
  return (vecu)_mm256_cvtepu16_epi32((__m128i)v);
#elif defined(__SSE2__)
  const __m128i zero = _mm_setzero_si128();
  return (vecu)_mm_unpacklo_epi16(_mm_loadl_epi64(reinterpret_cast<const __m128i *>(&v)), zero);
#else
  return __builtin_convertvector(v, vecu);
#endif
}

/* The low halves of the lanes. */
NMF_INLINE vech narrow(vecu v) {
#if defined(__AVX512BW__)
  return (vech)_mm512_cvtepi32_epi16((__m512i)v);
#elif defined(__AVX2__)
  const __m256i low = _mm256_and_si256((__m256i)v, _mm256_set1_epi32(0xffff));
  const __m256i packed = _mm256_packus_epi32(low, low);
  return (vech)_mm256_castsi256_si128(_mm256_permute4x64_epi64(packed, 0x08));
#elif defined(__SSE2__)
  /* Packing saturates signed numbers, so the low half becomes one first. */
  const __m128i low = (__m128i)((veci)(v << 16) >> 16), packed = _mm_packs_epi32(low, low);
  return get<vech>(&packed);
#else
  return __builtin_convertvector(v, vech);
#endif
}

/* IEEE half in the low 16 bits of each lane to fp32, subnormals, infinities and NaNs too. */
NMF_INLINE vecf half_to_float(vecu h) {
  const vecu sign = (h & 0x8000u) << 16, rest = h & 0x7fffu;
  const vecf subnormal = __builtin_convertvector((veci)rest, vecf) * 5.9604644775390625e-8f;
  const vecu normal = (rest << 13) + 0x38000000u, special = (rest << 13) + 0x70000000u;
  const vecu is_special = (vecu)(rest >= 0x7c00u), is_normal = (vecu)(rest >= 0x0400u) & ~is_special;
  return as_float(sign | (is_special & special) | (is_normal & normal) |
                  (~(is_special | is_normal) & as_bits(subnormal)));
}

/* How a dtype's elements become fp32 and back, a vector at a time. */
NMF_INLINE vecf to_float(vech v, int dtype) {
  const vecu h = widen(v);
  if (dtype == NMFLOW_BF16) return (vecf)(h << 16);
#if defined(__AVX512BW__)
  return (vecf)_mm512_cvtph_ps((__m256i)v);
#elif defined(__F16C__)
  return (vecf)_mm256_cvtph_ps((__m128i)v);
#else
  return half_to_float(h);
#endif
}
/* Rounds to nearest even, as nmf_float_to_bf16 and nmf_float_to_f16 do, of finite values. */
NMF_INLINE vech from_float(vecf v, int dtype) {
  const vecu bits = (vecu)v;
  if (dtype == NMFLOW_BF16)
    return narrow((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
#if defined(__AVX512BW__)
  return (vech)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vech)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  const vecu sign = (bits >> 16) & 0x8000u, a = bits & 0x7fffffffu;
  const vecu small = (vecu)((vecf)a + 0.5f) - 0x3f000000u;
  const vecu normal = (a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13;
  const vecu is_small = (vecu)(a < 0x38800000u), is_large = (vecu)(a >= 0x477ff000u);
  const vecu half = (is_small & small) | (is_large & 0x7c00u) | (~(is_small | is_large) & normal);
  return narrow(sign | half);
#endif
}

}  // namespace
#endif
