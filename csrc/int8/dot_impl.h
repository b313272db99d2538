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
 *   DOT_TOKENS, DOT_STEP: tokens of a part at most, and what they are a multiple of, if not as many as fit
 *     the first-level cache and 16.
 * and after it dot_tiles, the products of a part. */
#ifndef NMFLOW_DOT_IMPL_H
#define NMFLOW_DOT_IMPL_H

#include "round.h"

namespace {

typedef int8_t vecq __attribute__((vector_size(LANES)));

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
  const Rounding rounding = rounding_of(x, count);
  const float by = rounding.by;
  if (by == 0.0f) {
    clear_bytes(to, 0, bytes, step);
    return rounding.step;
  }
  int64_t i = 0;
#if defined(__AVX2__) && !defined(__AVX512F__) /* where no instruction narrows four bytes to one */
  for (; i + 32 <= count; i += 32) {
    const __m256i order = _mm256_setr_epi32(0, 4, 1, 5, 2, 6, 3, 7);
    __m256i n[4];
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) n[k] = (__m256i)nearest(load(x + i + k * 8) * by);
    const __m256i low = _mm256_packs_epi32(n[0], n[1]), high = _mm256_packs_epi32(n[2], n[3]);
    const __m256i packed = _mm256_permutevar8x32_epi32(_mm256_packs_epi16(low, high), order);
    put(byte_of(to, i, step), packed);
  }
#endif
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
  return rounding.step;
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

/* Tokens at a time: DOT_TOKENS where a tile is decoded for all of them (also of 11,008 inputs, which no cache
 * near holds: fewer lost), else those whose bytes stay in the first-level cache beside the weights that
 * stream by. */
int64_t dot_most(const nmf_geometry *g, int64_t) {
#ifdef DOT_TOKENS
  (void)g;
  return DOT_TOKENS;
#else
  const int64_t fit = 24576 / g->in / 16 * 16;
  return fit < 16 ? 16 : fit > 64 ? 64 : fit;
#endif
}

#ifndef DOT_STEP
#define DOT_STEP 16
#endif
const nmf_kernel dot_kernel = {dot_run, dot_scratch, dot_most, DOT_STEP, nullptr};

}  // namespace
#endif
