/* dot: lanes are output rows, and a lane multiplies four entries of its row at once. Each token is
 * rounded to 8 bits first, once for all rows of a part.
 *
 * The includer defines before it:
 *   DOT_OFFSET: what is added to a rounded input, 128 where the products want unsigned bytes.
 *   DOT_INPUTS(job): bytes of a rounded token, padding behind it included.
 *   DOT_LINE: if not 0, the bytes of all tokens lie in lines of that many: the first of each token, the
 *     second of each, and so on. So tokens lie at offsets that a compiler knows, and none of them are a
 *     multiple of 4 KB apart, where few fit the first-level cache. If 0, a token follows the other.
 *   DOT_EXTRA(job): bytes of scratch for dot_tiles.
 * and after it dot_tiles, the products of a part. */
#ifndef NMFLOW_DOT_IMPL_H
#define NMFLOW_DOT_IMPL_H

namespace {

typedef int8_t vecq __attribute__((vector_size(LANES)));

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

/* Byte i of a token that begins at `to`, whose lines are `step` bytes apart. */
NMF_INLINE int8_t *byte_of(int8_t *to, int64_t i, int64_t step) {
#if DOT_LINE
  return to + i / DOT_LINE * step + i % DOT_LINE;
#else
  (void)step;
  return to + i;
#endif
}

/* Bytes [from, end) of a token as if its inputs were zero. */
NMF_INLINE void clear_bytes(int8_t *to, int64_t from, int64_t end, int64_t step) {
  for (int64_t i = from; i < end; ++i) *byte_of(to, i, step) = static_cast<int8_t>(DOT_OFFSET);
}

/* Round one token to `bytes` bytes, padding included; returns what one step of them is worth. */
NMF_INLINE float round_token(const float *x, int64_t count, int8_t *to, int64_t bytes,
                             int64_t step) {
  const float most = largest(x, count);
  if (!(most >= 1e-30f && most <= 3.4028235e38f)) {
    clear_bytes(to, 0, bytes, step);
    return most < 1e-30f ? 0.0f : nmf_float_of_bits(0x7fc00000u);
  }
  const float by = 127.0f / most;
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    const veci n = nearest(load(x + i) * by) + DOT_OFFSET;
    put(byte_of(to, i, step), __builtin_convertvector(n, vecq));
  }
  clear_bytes(to, i, bytes, step);
  if (i < count) {
    float rest[LANES] = {};
    memcpy(rest, x + i, static_cast<size_t>(count - i) * 4);
    const veci n = nearest(load(rest) * by) + DOT_OFFSET;
    for (int k = 0; i + k < count; ++k) *byte_of(to, i + k, step) = static_cast<int8_t>(n[k]);
  }
  return most / 127.0f;
}

/* The sums of a tile's 16 rows for one token, to y. */
NMF_INLINE void dot_write(const nmf_job *job, int64_t token, int64_t tile, const int32_t *sums,
                          const float *bias, float step) {
  const float *scales = int8_scales(job, tile);
  float found[16];
  for (int i = 0; i < 16; i += LANES) {
    const vecf sum = __builtin_convertvector(get<veci>(sums + i), vecf);
    store(found + i, step * load(scales + i) * sum + load(bias + i));
  }
  write_rows(job, token, tile * 16, found, nmf_min(16, job->g.out - tile * 16));
}

/* `stride`: bytes from a token to the next, or with lines from a line of a token to its next. */
void dot_tiles(const nmf_job *job, const nmf_part *part, const int8_t *x, int64_t stride,
               const float *steps, char *scratch);

void dot_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  const int64_t tokens = part->token_end - part->token, bytes = DOT_INPUTS(job);
  const int64_t each = DOT_LINE ? DOT_LINE : bytes, stride = DOT_LINE ? tokens * DOT_LINE : bytes;
  int8_t *x = reinterpret_cast<int8_t *>(scratch);
  float *steps = reinterpret_cast<float *>(scratch + tokens * bytes);
  float *room = steps + (tokens + 15) / 16 * 16;
  const bool floats = g.dtype == NMFLOW_F32;
  for (int64_t t = 0; t < tokens; ++t) {
    const float *from = room;
    if (floats)
      from = static_cast<const float *>(job->x) + (part->token + t) * job->x_stride;
    else
      read_inputs(job, part->token + t, 0, g.in, room);
    steps[t] = round_token(from, g.in, x + t * each, bytes, stride);
  }
  dot_tiles(job, part, x, stride, steps,
            reinterpret_cast<char *>(room + (floats ? 0 : (g.in + 15) / 16 * 16)));
}

int64_t dot_scratch(const nmf_job *job, int64_t tokens, int64_t) {
  const int64_t room = job->g.dtype == NMFLOW_F32 ? 0 : (job->g.in + 15) / 16 * 64;
  return tokens * DOT_INPUTS(job) + (tokens + 15) / 16 * 64 + room + DOT_EXTRA(job);
}

/* Tokens whose bytes stay in the first-level cache beside the weights that stream by. */
int64_t dot_most(const nmf_geometry *g, int64_t) {
  const int64_t fit = 24576 / g->in / 16 * 16;
  return fit < 16 ? 16 : fit > 64 ? 64 : fit;
}

const nmf_kernel dot_kernel = {dot_run, dot_scratch, dot_most, 16};

}  // namespace
#endif
