/* What every kernel of the matrix product needs: values and codes decoded, inputs as fp32. All static, see common.h. */
#ifndef NMFLOW_DECODE_H
#define NMFLOW_DECODE_H

#include "common.h"
#include "int8.h"
#include "results.h"
#include "vector.h"

namespace {

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
