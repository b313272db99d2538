/* What every kernel of the matrix product needs: values and codes decoded, elements as fp32, the
 * epilogue. All static, see common.h. */
#ifndef NMFLOW_DECODE_H
#define NMFLOW_DECODE_H

#include "common.h"
#include "int8.h"
#include "vector.h"

namespace {

/* fp32 to 16 bits, rounded to nearest even; a NaN stays a NaN. */
NMF_INLINE vech to_bf16(vecf v) {
  const vecu bits = as_bits(v);
  const vecu nan = (vecu)((veci)(bits & 0x7fffffffu) > 0x7f800000);
  const vecu rounded = bits + 0x7fffu + ((bits >> 16) & 1u);
  return __builtin_convertvector(((nan & (bits | 0x400000u)) | (~nan & rounded)) >> 16, vech);
}
NMF_INLINE vech to_f16(vecf v) {
#if defined(__AVX512F__)
  return (vech)_mm512_cvtps_ph((__m512)v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#elif defined(__F16C__)
  return (vech)_mm256_cvtps_ph((__m256)v, _MM_FROUND_TO_NEAREST_INT);
#else
  vech h;
  for (int i = 0; i < LANES; ++i) h[i] = nmf_float_to_f16(v[i]);
  return h;
#endif
}

NMF_INLINE float element(const void *p, int64_t i, int dtype) {
  if (dtype == NMFLOW_F32) return static_cast<const float *>(p)[i];
  const uint16_t h = static_cast<const uint16_t *>(p)[i];
  return dtype == NMFLOW_BF16 ? nmf_bf16_to_float(h) : nmf_f16_to_float(h);
}
NMF_INLINE void set_element(void *p, int64_t i, int dtype, float value) {
  if (dtype == NMFLOW_F32)
    static_cast<float *>(p)[i] = value;
  else
    static_cast<uint16_t *>(p)[i] =
        dtype == NMFLOW_BF16 ? nmf_float_to_bf16(value) : nmf_float_to_f16(value);
}

/* erf to about 1 ulp of fp32 near 0 and 3e-7 everywhere: x P(x^2) / Q(x^2) on |x| <= 3.84, where
 * erf rounds to 1 (the minimax fit that Eigen and XLA use). */
NMF_INLINE vecf erf_of(vecf x) {
  const vecf limit = splat(3.832506856900711f);
  x = pick(x > limit, limit, x);
  x = pick(x < -limit, -limit, x);
  const vecf z = x * x;
  vecf p = splat(-2.72614225801306e-10f);
  p = p * z + 2.77068142495902e-08f;
  p = p * z + -2.10102402082508e-06f;
  p = p * z + -5.69250639462346e-05f;
  p = p * z + -7.34990630326855e-04f;
  p = p * z + -2.95459980854025e-03f;
  p = p * z + -1.60960333262415e-02f;
  vecf q = splat(-1.45660718464996e-05f);
  q = q * z + -2.13374055278905e-04f;
  q = q * z + -1.68282697438203e-03f;
  q = q * z + -7.37332916720468e-03f;
  q = q * z + -1.42647390514189e-02f;
  return x * p / q;
}

/* exp to 2 ulp: 2^n e^r with n whole and |r| <= ln 2 / 2, e^r by a polynomial (that of Cephes). Infinity above 88.72, zero
 * below -87.3, where results would be subnormal. */
NMF_INLINE vecf exp_of(vecf x) {
  const vecf high = splat(88.72283f), low = splat(-87.33654f);
  const vecf at = pick(x > high, high, pick(x < low, low, x));
  const vecf whole = at * 1.44269504f;
  const veci n = __builtin_convertvector(whole + pick(whole < 0.0f, splat(-0.5f), splat(0.5f)), veci);
  const vecf steps = __builtin_convertvector(n, vecf);
  const vecf r = (at - steps * 0.693359375f) + steps * 2.12194440e-4f; /* ln 2 in two parts */
  vecf p = splat(1.9875691500e-4f);
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * r * r + r + 1.0f;
  /* 2^n in two factors, as 2^128 is none. */
  const veci half = n >> 1, rest = n - half;
  const vecf y = p * (vecf)((half + 127) << 23) * (vecf)((rest + 127) << 23);
  const vecf infinity = as_float(splat(0x7f800000u));
  return pick(x > high, infinity, pick(x < low, splat(0.0f), pick(x == x, y, x)));
}

NMF_INLINE vecf finish(vecf v, int epilogue) {
  /* A NaN stays a NaN in all: comparisons with it are false and arithmetic keeps it. */
  if (epilogue == NMFLOW_RELU) return pick(v < 0.0f, splat(0.0f), v);
  if (epilogue == NMFLOW_SILU) return v / (1.0f + exp_of(-v));
  if (epilogue == NMFLOW_GELU_TANH) /* (1 + tanh u) / 2 = 1 / (1 + exp(-2 u)) */
    return v / (1.0f + exp_of(v * (-1.5957691216f - 0.0713548162726f * v * v)));
  if (epilogue == NMFLOW_GELU) return 0.5f * v * (1.0f + erf_of(v * 0.70710678118654752f));
  return v;
}

/* `count` <= 16 results of one token, rows row.. of y, rounded to the dtype. */
NMF_INLINE void put_rows(const nmf_job *job, int64_t token, int64_t row, const float *sums,
                         int64_t count) {
  const int64_t at = token * job->y_stride + row;
  if (job->g.dtype == NMFLOW_F32) {
    float *y = static_cast<float *>(job->y) + at;
    if (count == 16)
      memcpy(y, sums, 64);
    else
      memcpy(y, sums, static_cast<size_t>(count) * 4);
    return;
  }
  uint16_t rounded[16];
  for (int i = 0; i < 16; i += LANES) {
    const vech h = job->g.dtype == NMFLOW_BF16 ? to_bf16(load(sums + i)) : to_f16(load(sums + i));
    memcpy(rounded + i, &h, sizeof h);
  }
  uint16_t *y = static_cast<uint16_t *>(job->y) + at;
  if (count == 16)
    memcpy(y, rounded, 32);
  else
    memcpy(y, rounded, static_cast<size_t>(count) * 2);
}

/* The same after the epilogue. */
__attribute__((noinline)) void write_rows(const nmf_job *job, int64_t token, int64_t row, float *sums,
                           int64_t count) {
  if (job->epilogue != NMFLOW_NONE)
    for (int i = 0; i < 16; i += LANES) store(sums + i, finish(load(sums + i), job->epilogue));
  put_rows(job, token, row, sums, count);
}

/* The bias of a tile's 16 rows as fp32; zero where there is none. */
NMF_INLINE void read_bias(const nmf_job *job, int64_t tile, float *bias) {
  const int64_t row = tile * 16;
  if (job->bias != nullptr && job->g.dtype == NMFLOW_F32 && row + 16 <= job->g.out) {
    memcpy(bias, static_cast<const float *>(job->bias) + row, 64);
    return;
  }
  for (int i = 0; i < 16; ++i)
    bias[i] = job->bias && row + i < job->g.out ? element(job->bias, row + i, job->g.dtype) : 0.0f;
}

/* Entries [s0, s0 + count) of a tile's 16 rows as fp32, [count][16]: fp32 weights where they are,
 * 16-bit ones converted into `to`, which holds (count + 1) * 16 floats. */
NMF_INLINE const float *decode_values(const nmf_job *job, int64_t tile, int64_t s0, int64_t count,
                                      float *to) {
  const nmf_geometry &g = job->g;
  if (job->q.bits) return int8_decode_values(job, tile, s0, count, to);
  if (g.dtype == NMFLOW_F32)
    return static_cast<const float *>(job->values) + (tile * g.entries_held + s0) * 16;
  const int64_t odd = s0 & 1, pairs = (count + odd + 1) / 2;
  const char *from = static_cast<const char *>(job->values) +
                     (tile * g.entries_held + s0 - odd) * 32;
  /* The partner of the first or last entry is decoded too where a pair is cut: skip or spare. */
  float *at = to - odd * 16;
  for (int64_t p = 0; p < pairs; ++p, at += 32, from += 64) {
    const bool first = p > 0 || !odd, second = 2 * p + 1 - odd < count;
    for (int i = 0; i < 16; i += LANES) {
      const vecu both = load(reinterpret_cast<const uint32_t *>(from) + i);
      vecf low, high;
      if (g.dtype == NMFLOW_BF16) {
        low = as_float(both << 16);
        high = as_float(both & 0xffff0000u);
      } else {
        low = half_to_float(both & 0xffffu);
        high = half_to_float(both >> 16);
      }
      if (first) store(at + i, low);
      if (second) store(at + 16 + i, high);
    }
  }
  return to;
}

/* The columns of entries [s0, s0 + count) of a tile's rows, relative to input `base` and times
 * `scale`: [count][16]. A code is clamped to the last input of its span, so that no code leads
 * outside the row. */
#if defined(__AVX512F__)
/* With 4-bit codes the clamped column of every code fits a register: decoding is a look-up, which
 * reads only the low 4 bits of a lane and so needs no mask either. */
NMF_INLINE void decode_nibbles(const nmf_job *job, int64_t tile, int64_t s0, int64_t count,
                               int64_t base, uint32_t scale, uint32_t *to) {
  const nmf_geometry &g = job->g;
  int64_t span = s0 / g.span_entries * g.span, left = g.span_entries - s0 % g.span_entries;
  const uint32_t *words = static_cast<const uint32_t *>(job->codes) +
                          (tile * g.words + s0 / 8) * 16;
  __m512i word = _mm512_srl_epi32(_mm512_loadu_si512(words),
                                  _mm_cvtsi32_si128(static_cast<int>(s0 % 8 * 4)));
  int64_t in_word = 8 - s0 % 8;
  const __m512i lane = _mm512_setr_epi32(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
  const __m512i scales = _mm512_set1_epi32(static_cast<int>(scale));
  const __m512i step = _mm512_set1_epi32(static_cast<int>(g.span * scale));
  const __m512i last = _mm512_set1_epi32(static_cast<int>(g.span - 1));
  __m512i table = _mm512_add_epi32(
      _mm512_mullo_epi32(_mm512_min_epi32(lane, last), scales),
      _mm512_set1_epi32(static_cast<int>((span - base) * scale)));
  const int64_t full = (g.in / g.span) * g.span_entries; /* entries of whole spans */
  const int64_t end = s0 + count, whole = end < full ? end : full;
  int64_t s = s0;
  if (s % 8 == 0 && (8 % g.span_entries == 0))
    for (; s + 8 <= whole; s += 8, words += 16) {
      word = _mm512_loadu_si512(words);
#pragma GCC unroll 8
      for (int k = 0; k < 8; ++k) {
        _mm512_storeu_si512(to, _mm512_permutexvar_epi32(word, table));
        to += 16;
        word = _mm512_srli_epi32(word, 4);
        if (--left == 0) {
          left = g.span_entries;
          table = _mm512_add_epi32(table, step);
        }
      }
    }
  if (s < end && s % 8 == 0) {
    word = _mm512_loadu_si512(words);
    in_word = 8;
  }
  for (; s < end; ++s) {
    if (in_word == 0) {
      words += 16;
      word = _mm512_loadu_si512(words);
      in_word = 8;
    }
    if (s == full) { /* the last span is cut short: clamp to the last input of the row */
      const int64_t start = g.in / g.span * g.span;
      table = _mm512_add_epi32(
          _mm512_mullo_epi32(
              _mm512_min_epi32(lane, _mm512_set1_epi32(static_cast<int>(g.in - start - 1))), scales),
          _mm512_set1_epi32(static_cast<int>((start - base) * scale)));
    }
    _mm512_storeu_si512(to, _mm512_permutexvar_epi32(word, table));
    to += 16;
    word = _mm512_srli_epi32(word, 4);
    --in_word;
    if (--left == 0) {
      left = g.span_entries;
      table = _mm512_add_epi32(table, step);
    }
  }
}
#endif

NMF_INLINE void decode_columns(const nmf_job *job, int64_t tile, int64_t s0, int64_t count,
                               int64_t base, uint32_t scale, uint32_t *to) {
  const nmf_geometry &g = job->g;
  if (job->q.bits) return int8_decode_columns(job, tile, s0, count, base, scale, to);
#if defined(__AVX512F__)
  if (g.bits == 4 && !g.panels) return decode_nibbles(job, tile, s0, count, base, scale, to);
#endif
  int64_t span = s0 / g.span_entries * g.span, left = g.span_entries - s0 % g.span_entries;
  uint32_t most = static_cast<uint32_t>(nmf_min(g.span, g.in - span) - 1);
  vecu start = static_cast<uint32_t>(span - base) * scale - vecu{};
  const vecu step = static_cast<uint32_t>(g.span) * scale - vecu{};
  const uint8_t *shared = static_cast<const uint8_t *>(job->codes);
  if (g.panels) shared += tile * 16 / g.panel * g.entries + s0;
  const uint32_t *words = static_cast<const uint32_t *>(job->codes) +
                          (tile * g.words + s0 / g.per) * 16;
  const uint32_t mask = g.panels ? 255u : (1u << g.bits) - 1, bits = static_cast<uint32_t>(g.bits);
  const bool shifts = (scale & (scale - 1)) == 0;
  const int shift = __builtin_ctz(scale);
  int64_t in_word = g.per - s0 % g.per;
  vecu word[16 / LANES];
  for (int i = 0; i < 16 / LANES; ++i)
    word[i] = g.panels ? vecu{} : load(words + i * LANES) >> static_cast<uint32_t>(s0 % g.per) * bits;
  for (int64_t s = 0; s < count; ++s) {
    for (int i = 0; i < 16 / LANES; ++i) {
      vecu code;
      if (g.panels) {
        code = static_cast<uint32_t>(shared[s]) - vecu{};
      } else {
        code = word[i] & mask;
        word[i] >>= bits;
      }
      if (most < mask) { /* else no code leads outside the span */
        const vecu over = (vecu)((veci)code > static_cast<int32_t>(most));
        code = (code & ~over) | (over & most);
      }
      /* A shift where it will do: AVX2 multiplies 32-bit lanes slowly. */
      code = shifts ? code << shift : code * scale;
      store(to + s * 16 + i * LANES, code + start);
    }
    if (--in_word == 0 && !g.panels && s + 1 < count) {
      words += 16;
      in_word = g.per;
      for (int i = 0; i < 16 / LANES; ++i) word[i] = load(words + i * LANES);
    }
    if (--left == 0) {
      left = g.span_entries;
      span += g.span;
      start += step;
      most = static_cast<uint32_t>(nmf_min(g.span, g.in - span) - 1);
    }
  }
}

/* `count` inputs of one token as fp32. */
NMF_INLINE void read_inputs(const nmf_job *job, int64_t token, int64_t first, int64_t count,
                            float *to) {
  const int64_t at = token * job->x_stride + first;
  if (job->g.dtype == NMFLOW_F32) {
    memcpy(to, static_cast<const float *>(job->x) + at, static_cast<size_t>(count) * 4);
    return;
  }
  const uint16_t *from = static_cast<const uint16_t *>(job->x) + at;
  if (job->g.dtype == NMFLOW_BF16)
    for (int64_t i = 0; i < count; ++i) to[i] = nmf_bf16_to_float(from[i]);
  else
    for (int64_t i = 0; i < count; ++i) to[i] = nmf_f16_to_float(from[i]);
}

}  // namespace
#endif
