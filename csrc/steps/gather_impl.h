/* Kept elements together and apart again (gather.h). The same source is compiled once for each
 * instruction set. Everything is static: see common.h. */
#include "gather.h"
#include "prints.h"
#include "send.h"

namespace {

const uint32_t INFINITE = 0x7f800000u;

/* The elements of 64 columns where `some` is set, to `to` on; nothing from `end` on is written. */
NMF_INLINE float *take_word(uint64_t some, const float *from, float *to, const float *end) {
#if defined(__AVX512BW__)
  for (; some != 0; some >>= 16, from += 16) {
    const __mmask16 kept = static_cast<__mmask16>(some);
    const int count = __builtin_popcount(kept);
    const __m512 v = _mm512_maskz_compress_ps(kept, _mm512_maskz_loadu_ps(kept, from));
    if (to + 16 <= end) /* what lies past them is written by the next ones */
      _mm512_storeu_ps(to, v);
    else
      _mm512_mask_storeu_ps(to, static_cast<__mmask16>((1u << count) - 1u), v);
    to += count;
  }
#else
  (void)end;
  for (; some != 0; some &= some - 1) *to++ = from[__builtin_ctzll(some)];
#endif
  return to;
}

/* Back to `width` columns, 64 at most; and the largest of `most` and their bits without the sign. */
NMF_INLINE const float *put_word(uint64_t some, const float *from, const float *end, float *to,
                                 int64_t width, vecu *most) {
#if defined(__AVX512BW__)
  for (int64_t c = 0; c < width; c += 16, some >>= 16) {
    const __mmask16 kept = static_cast<__mmask16>(some);
    const int count = __builtin_popcount(kept);
    const __mmask16 there = static_cast<__mmask16>((1u << count) - 1u);
    const __m512 v = from + 16 <= end ? _mm512_loadu_ps(from) : _mm512_maskz_loadu_ps(there, from);
    const __m512 x = _mm512_maskz_expand_ps(kept, v);
    const __m512i bits = _mm512_and_si512(_mm512_castps_si512(x), _mm512_set1_epi32(0x7fffffff));
    *most = (vecu)_mm512_max_epu32((__m512i)*most, bits);
    if (c + 16 <= width)
      _mm512_storeu_ps(to + c, x);
    else
      _mm512_mask_storeu_ps(to + c, static_cast<__mmask16>((1u << (width - c)) - 1u), x);
    from += count;
  }
#else
  (void)end;
  memset(to, 0, static_cast<size_t>(width) * 4);
  for (; some != 0; some &= some - 1, ++from) {
    to[__builtin_ctzll(some)] = *from;
    const uint32_t bits = nmf_bits_of_float(*from) & 0x7fffffffu;
    if (bits > (*most)[0]) (*most)[0] = bits;
  }
#endif
  return from;
}

int32_t take_rows(const nmf_gathering *job, int64_t row, int64_t row_end) {
  for (int64_t r = row; r < row_end; ++r) {
    const uint64_t *bits = job->bits + r * job->words;
    const float *from = job->apart + r * job->cols, *end = job->together + job->starts[r + 1];
    float *to = job->together + job->starts[r];
    for (int64_t w = 0; w < job->words; ++w, from += 64) {
      if (__builtin_popcountll(bits[w]) > end - to) return NMFLOW_NOT_KEPT;
      to = take_word(bits[w], from, to, end);
    }
    if (to != end) return NMFLOW_NOT_KEPT;
  }
  return NMFLOW_OK;
}

int32_t put_rows(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch) {
  vecu most = {};
  for (int64_t r = row; r < row_end; ++r) {
    const uint64_t *bits = job->bits + r * job->words;
    const float *from = job->together + job->starts[r], *end = job->together + job->starts[r + 1];
    float *own = job->apart + r * job->cols, *to = job->past ? reinterpret_cast<float *>(scratch) : own;
    for (int64_t w = 0; w < job->words; ++w) {
      if (__builtin_popcountll(bits[w]) > end - from) return NMFLOW_NOT_KEPT;
      from = put_word(bits[w], from, end, to + 64 * w, nmf_min(64, job->cols - 64 * w), &most);
    }
    if (from != end) return NMFLOW_NOT_KEPT;
    const int64_t bytes = job->cols * 4;
    if (job->prints != nullptr)
      job->prints[r] = total_of(sum_bytes_of(to, job->odd, bytes, nmf_word(bytes), vecl{}));
    if (job->past) send(own, to, bytes);
  }
  if (job->past) sent();
  for (int lane = 0; lane < LANES; ++lane)
    if (most[lane] >= INFINITE) return NMFLOW_NOT_FINITE;
  return NMFLOW_OK;
}

}  // namespace
