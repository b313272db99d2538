/* What becomes of a kernel's sums: the bias before, the epilogue, rounding to the dtype. All static, see common.h. */
#ifndef NMFLOW_RESULTS_H
#define NMFLOW_RESULTS_H

#include "common.h"
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

}  // namespace
#endif
