/* Vectors by GCC's vector extension, so that one source serves every instruction set: the includer
 * sets NMF_LANES (floats in a register) before it. Plus what every kernel needs: decoding, elements
 * as fp32, the epilogue. All static, see common.h. */
#ifndef NMFLOW_SIMD_H
#define NMFLOW_SIMD_H

#include "common.h"

#ifndef NMF_LANES
#error "set NMF_LANES"
#endif

namespace {

const int LANES = NMF_LANES;
typedef float vecf __attribute__((vector_size(4 * NMF_LANES)));
typedef uint32_t vecu __attribute__((vector_size(4 * NMF_LANES)));
typedef int32_t veci __attribute__((vector_size(4 * NMF_LANES)));
typedef uint16_t vech __attribute__((vector_size(2 * NMF_LANES)));

NMF_INLINE vecf load(const float *p) {
  vecf v;
  memcpy(&v, p, sizeof v);
  return v;
}
NMF_INLINE vecu load(const uint32_t *p) {
  vecu v;
  memcpy(&v, p, sizeof v);
  return v;
}
NMF_INLINE void store(float *p, vecf v) { memcpy(p, &v, sizeof v); }
NMF_INLINE void store(uint32_t *p, vecu v) { memcpy(p, &v, sizeof v); }
NMF_INLINE vecf splat(float value) { return value - vecf{}; }
NMF_INLINE vecf as_float(vecu v) {
  vecf r;
  memcpy(&r, &v, sizeof r);
  return r;
}
NMF_INLINE vecu as_bits(vecf v) {
  vecu r;
  memcpy(&r, &v, sizeof r);
  return r;
}
NMF_INLINE vecf pick(veci condition, vecf yes, vecf no) {
  return as_float(((vecu)condition & as_bits(yes)) | (~(vecu)condition & as_bits(no)));
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

NMF_INLINE vecf finish(vecf v, int epilogue) {
  /* A NaN stays a NaN in both: comparisons with it are false and arithmetic keeps it. */
  if (epilogue == NMFLOW_RELU) return pick(v < 0.0f, splat(0.0f), v);
  if (epilogue == NMFLOW_GELU) return 0.5f * v * (1.0f + erf_of(v * 0.70710678118654752f));
  return v;
}

/* `count` <= 16 results of one token, rows row.. of y, with epilogue, rounded to the dtype. */
NMF_INLINE void write_rows(const nmf_job *job, int64_t token, int64_t row, float *sums,
                           int64_t count) {
  if (job->epilogue != NMFLOW_NONE)
    for (int i = 0; i < 16; i += LANES) store(sums + i, finish(load(sums + i), job->epilogue));
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
  if (job->g.dtype == NMFLOW_BF16)
    for (int i = 0; i < 16; ++i) rounded[i] = nmf_float_to_bf16(sums[i]);
  else
    for (int i = 0; i < 16; ++i) rounded[i] = nmf_float_to_f16(sums[i]);
  memcpy(static_cast<uint16_t *>(job->y) + at, rounded, static_cast<size_t>(count) * 2);
}

/* The bias of a tile's 16 rows as fp32; zero where there is none. */
NMF_INLINE void read_bias(const nmf_job *job, int64_t tile, float *bias) {
  const int64_t row = tile * 16;
  for (int i = 0; i < 16; ++i)
    bias[i] = job->bias && row + i < job->g.out ? element(job->bias, row + i, job->g.dtype) : 0.0f;
}

/* The 16 values of entry s of a tile, as fp32. */
NMF_INLINE void read_values(const nmf_job *job, int64_t tile, int64_t s, float *to) {
  const nmf_geometry &g = job->g;
  if (g.dtype == NMFLOW_F32) {
    memcpy(to, static_cast<const float *>(job->values) + (tile * g.entries_held + s) * 16, 64);
    return;
  }
  const uint16_t *from = static_cast<const uint16_t *>(job->values) +
                         tile * g.entries_held * 16 + s / 2 * 32 + s % 2;
  if (g.dtype == NMFLOW_BF16)
    for (int i = 0; i < 16; ++i) to[i] = nmf_bf16_to_float(from[2 * i]);
  else
    for (int i = 0; i < 16; ++i) to[i] = nmf_f16_to_float(from[2 * i]);
}

/* The columns of entry s of a tile's rows relative to input `base`, times `scale`. A code is
 * clamped to the last input of its span, so no code can lead outside the row. */
NMF_INLINE void read_columns(const nmf_job *job, int64_t tile, int64_t s, int64_t base,
                             uint32_t scale, uint32_t *to) {
  const nmf_geometry &g = job->g;
  const int64_t span = s / g.span_entries * g.span;
  const uint32_t most = static_cast<uint32_t>(nmf_min(g.span, g.in - span) - 1);
  const uint32_t start = static_cast<uint32_t>(span - base);
  if (g.panels) {
    const uint8_t code = static_cast<const uint8_t *>(
        job->codes)[tile * 16 / g.panel * g.entries + s];
    const uint32_t column = (code < most ? code : most) + start;
    for (int i = 0; i < 16; ++i) to[i] = column * scale;
    return;
  }
  const uint32_t *words =
      static_cast<const uint32_t *>(job->codes) + (tile * g.words + s / g.per) * 16;
  const uint32_t shift = static_cast<uint32_t>(s % g.per * g.bits), mask = (1u << g.bits) - 1;
  for (int i = 0; i < 16; ++i) {
    const uint32_t code = words[i] >> shift & mask;
    to[i] = ((code < most ? code : most) + start) * scale;
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
