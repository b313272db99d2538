/* Packing a weight by what it keeps. The same source is compiled once for each instruction set.
 * Everything is static: see common.h. */
#include "entries.h"

namespace {

/* The columns of a group, `some` of its M places, in order; the lowest others where it has fewer than
 * N. Returns where the next group's go, or null where it has more. */
NMF_INLINE int32_t *columns_of_group(const G &g, const uint16_t *used, int64_t group, int32_t *to) {
  int32_t *end = to + g.n, *at = to;
  for (int64_t c = group; c < group + g.m;) { /* 16 at most of a chunk at a time */
    const int64_t width = nmf_min(16 - c % 16, group + g.m - c);
    uint32_t some = (used[c / 16] >> (c % 16)) & ((1u << width) - 1u);
    for (; some != 0; some &= some - 1) {
      if (at == end) return nullptr;
      *at++ = static_cast<int32_t>(c + __builtin_ctz(some));
    }
    c += width;
  }
  for (int64_t c = group; at != end; ++c) { /* rare, so by the book */
    if (used[c / 16] >> (c % 16) & 1) continue;
    int32_t *place = at++;
    for (; place > to && place[-1] > c; --place) *place = place[-1];
    *place = static_cast<int32_t>(c);
  }
  return end;
}

/* Which of the 16 columns from 16 c on a row keeps. */
NMF_INLINE uint32_t kept_of(const G &g, const float *w, const uint64_t *kept, int64_t c) {
  const int64_t count = nmf_min(16, g.in - 16 * c);
  uint32_t some = 0;
#if defined(__AVX512BW__)
  const __m512i bits = _mm512_maskz_loadu_epi32(static_cast<__mmask16>((1u << count) - 1u), w + 16 * c);
  some = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7fffffff));
#else
#if defined(__AVX2__)
  if (count == 16) {
    const __m256 zero = _mm256_setzero_ps();
    const int low = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(w + 16 * c), zero, _CMP_NEQ_UQ));
    const int high = _mm256_movemask_ps(_mm256_cmp_ps(_mm256_loadu_ps(w + 16 * c + 8), zero, _CMP_NEQ_UQ));
    some = static_cast<uint32_t>(low | high << 8);
  } else
#endif
    for (int64_t i = 0; i < count; ++i) some |= static_cast<uint32_t>(!(w[16 * c + i] == 0.0f)) << i;
#endif
  return kept == nullptr ? some : some | (static_cast<uint32_t>(kept[c / 4] >> (c % 4 * 16)) & 0xffffu);
}

/* Whether each group of 16 columns, where M divides 16, keeps N. */
NMF_INLINE bool each_keeps(const G &g, uint32_t some) {
  bool each = true;
  for (int64_t i = 0; i < 16; i += g.m)
    each &= __builtin_popcount(some >> i & ((1u << g.m) - 1u)) == g.n;
  return each;
}

/* A row whose groups keep N each, in one go: the common case. False where one does not. Codes of 4 bits
 * are of chunks of 16 columns, with several groups; those of 8 bits of groups of several chunks. */
template <int BITS>
bool pack_row(const nmf_stepping *job, int64_t row) {
  const G &g = job->g;
  const float *w = job->w + row * g.in;
  const uint64_t *kept = job->kept == nullptr ? nullptr : job->kept + row * nmf_ceil_div(g.in, 64);
  float *values = job->to_values + row / 16 * g.entries * 16 + row % 16;
  uint32_t *codes = static_cast<uint32_t *>(job->to_codes) + row / 16 * g.words * 16 + row % 16, word = 0;
  int shift = 0;
  int64_t first = 0, left = g.n, room = g.entries; /* of a group of several chunks; of the row */
  for (int64_t c = 0; c < g.in / 16; ++c) {
    uint32_t some = kept_of(g, w, kept, c);
    if (BITS == 4) {
      if (!each_keeps(g, some)) return false;
    } else {
      const int64_t count = __builtin_popcount(some);
      left -= count;
      if ((room -= count) < 0) return false;
    }
    for (; some != 0; some &= some - 1, values += 16) {
      const uint32_t column = static_cast<uint32_t>(__builtin_ctz(some));
      *values = w[16 * c + column];
      word |= (static_cast<uint32_t>(first) + column) << shift;
      if ((shift += BITS) < 32) continue;
      *codes = word;
      codes += 16;
      word = 0;
      shift = 0;
    }
    if (BITS == 4 || (first += 16) < g.m) continue;
    if (left != 0) return false;
    first = 0;
    left = g.n;
  }
  if (shift != 0) *codes = word;
  return true;
}

/* The columns of a row, or a panel; false where a group has too many. */
bool columns_of(const G &g, const uint16_t *used, int32_t *to) {
  const bool whole = 16 % g.m == 0;
  for (int64_t c = 0; c < g.in;) {
    if (whole && c + 16 <= g.in) { /* the groups of a chunk, which keep N each as a rule */
      uint32_t some = used[c / 16];
      if (each_keeps(g, some)) {
        for (; some != 0; some &= some - 1) *to++ = static_cast<int32_t>(c + __builtin_ctz(some));
        c += 16;
        continue;
      }
    }
    const int64_t end = whole ? nmf_min(c + 16, g.in) : c + g.m;
    for (; c < end; c += g.m)
      if ((to = columns_of_group(g, used, c, to)) == nullptr) return false;
  }
  return true;
}

/* A row's, or a panel's, kept places: the mask's and those that are not zero. Returns whether no group
 * has more than N. */
bool pack(const nmf_stepping *job, int64_t panel, int64_t panel_end, char *scratch) {
  const G &g = job->g;
  int32_t *columns = reinterpret_cast<int32_t *>(scratch);
  uint16_t *used = reinterpret_cast<uint16_t *>(scratch + padded(g.entries) * 4);
  const int64_t chunks = nmf_ceil_div(g.in, 16), words = nmf_ceil_div(g.in, 64);
  const auto row_of = g.bits == 4 ? pack_row<4> : pack_row<8>;
  const bool alone = g.panel == 1 && (16 % g.m == 0 || g.m % 16 == 0) && g.in % 16 == 0;
  for (int64_t p = panel; p < panel_end; ++p) {
    if (alone && row_of(job, p)) continue;
    const int64_t begin = p * g.panel, end = nmf_min(begin + g.panel, g.out);
    memset(used, 0, static_cast<size_t>(chunks) * 2);
    for (int64_t row = begin; row < end; ++row) {
      const float *w = job->w + row * g.in;
      const uint64_t *kept = job->kept == nullptr ? nullptr : job->kept + row * words;
      for (int64_t c = 0; c < chunks; ++c) used[c] = static_cast<uint16_t>(used[c] | kept_of(g, w, kept, c));
    }
    if (!columns_of(g, used, columns)) return false;
    for (int64_t row = begin; row < end; ++row) {
      float *values = job->to_values + row / 16 * g.entries * 16 + row % 16;
      const float *w = job->w + row * g.in;
      for (int64_t s = 0; s < g.entries; ++s) values[16 * s] = w[columns[s]];
    }
    for (int64_t span = 0, s = 0; s < g.entries; span += g.span)
      for (const int64_t stop = nmf_min(s + g.span_entries, g.entries); s < stop; ++s)
        columns[s] -= static_cast<int32_t>(span);
    if (g.panels) {
      uint8_t *codes = static_cast<uint8_t *>(job->to_codes) + p * g.entries;
      for (int64_t s = 0; s < g.entries; ++s) codes[s] = static_cast<uint8_t>(columns[s]);
      continue;
    }
    for (int64_t word = 0; word < g.words; ++word) {
      uint32_t bits = 0;
      for (int64_t s = word * g.per; s < nmf_min(word * g.per + g.per, g.entries); ++s)
        bits |= static_cast<uint32_t>(columns[s]) << (s % g.per * g.bits);
      for (int64_t row = begin; row < end; ++row)
        static_cast<uint32_t *>(job->to_codes)[(row / 16 * g.words + word) * 16 + row % 16] = bits;
    }
  }
  return true;
}

}  // namespace
