/* fp32 keys that tie: how they are noticed, by counting the bytes, and how they are settled. */
#ifndef NMFLOW_PROJECT_TIES_H
#define NMFLOW_PROJECT_TIES_H

#include "project_select.h"

namespace {

/* How many of `count` bytes of 0 and 1 are 1. */
NMF_INLINE int64_t sum_bytes(const uint8_t *bytes, int64_t count) {
  typedef uint8_t vec16 __attribute__((vector_size(16)));
  const uint64_t even = 0x00ff00ff00ff00ffull;
  int64_t total = 0, i = 0;
  while (i + 16 <= count) {
    /* 255 additions fill a byte. */
    const int64_t end = nmf_min(count - 15, i + 255 * 16);
    vec16 sums = {};
    for (; i < end; i += 16) sums += get<vec16>(bytes + i);
    uint64_t words[2];
    put(words, sums);
    for (uint64_t word : words) {
      const uint64_t pairs = (word & even) + ((word >> 8) & even);
      total += static_cast<int64_t>((pairs * 0x0001000100010001ull) >> 48);
    }
  }
  for (; i < count; ++i) total += bytes[i];
  return total;
}

/* The low `count` <= 32 bits to a byte each. */
NMF_INLINE void spread_bits(uint32_t bits, int64_t count, uint8_t *to) {
  for (int64_t i = 0; i < count; i += 8, bits >>= 8) {
    const uint64_t picked = ((bits & 0xffu) * 0x0101010101010101ull) & 0x8040201008040201ull;
    const uint64_t ones = ((picked + 0x7f7f7f7f7f7f7f7full) >> 7) & 0x0101010101010101ull;
    /* Sizes known at compile time where they are common: these copies are then one store. */
    if (i + 8 <= count)
      memcpy(to + i, &ones, 8);
    else if (i + 4 == count)
      memcpy(to + i, &ones, 4);
    else
      memcpy(to + i, &ones, static_cast<size_t>(count - i));
  }
}

/* LANES groups of fp32 keys that tie, one in each lane: all above t are kept, and of those equal
 * to it the first. */
template <bool TOP>
void select_tied(const Plan &plan, const char *w, uint8_t *kept, Room &room) {
  const int64_t m = plan.m;
  to_columns<4>(w, m, room);
  for (int64_t i = m; i < plan.blocks * plan.length; ++i)
    put(room.keys + i * LANES, splat(TOP ? 0u : 0x7fffffffu));
  const veci t = (veci)ranked<TOP>(room.keys, plan.length, plan.blocks, plan.rank);
  to_columns<4>(w, m, room); /* ranking may have moved them */
  veci spare = (veci)splat(static_cast<uint32_t>(plan.n));
  for (int64_t i = 0; i < m; ++i) spare += (veci)get<vecu>(room.keys + i * LANES) > t;
  for (int64_t first = 0; first < m; first += 32) {
    const int64_t count = nmf_min(32, m - first);
    vecu bits = {};
    for (int64_t i = 0; i < count; ++i) {
      const veci keys = (veci)get<vecu>(room.keys + (first + i) * LANES);
      const veci takes = (keys == t) & (spare > 0);
      spare += takes;
      bits |= (vecu)((keys > t) | takes) & (1u << i);
    }
    uint32_t of_group[LANES];
    put(of_group, bits);
    for (int g = 0; g < LANES; ++g) spread_bits(of_group[g], count, kept + g * m + first);
  }
}

/* Groups of fp32 keys with ties at t, one by one: of the elements equal to it, only the first stay
 * (TOP: too many are kept) or come back (else: too few are). */
NMF_INLINE void mend_few(const Plan &plan, const char *w, int64_t groups, uint8_t *kept) {
  const int64_t n = plan.n, m = plan.m;
  for (int64_t g = 0; g < groups; ++g, w += m * 4, kept += m) {
    int64_t count = 0;
    for (int64_t i = 0; i < m; ++i) count += kept[i];
    if (count == n) continue;
    uint32_t bits, t = plan.top ? 0xffffffffu : 0;
    for (int64_t i = 0; i < m; ++i) {
      memcpy(&bits, w + i * 4, 4);
      bits &= 0x7fffffffu;
      if (plan.top && kept[i] && bits < t) t = bits;
      if (!plan.top && !kept[i] && bits > t) t = bits;
    }
    if (plan.top) {
      for (int64_t i = m - 1; count > n; --i) {
        memcpy(&bits, w + i * 4, 4);
        if (!kept[i] || (bits & 0x7fffffffu) != t) continue;
        kept[i] = 0;
        --count;
      }
    } else {
      for (int64_t i = 0; count < n; ++i) {
        memcpy(&bits, w + i * 4, 4);
        if (kept[i] || (bits & 0x7fffffffu) != t) continue;
        kept[i] = 1;
        ++count;
      }
    }
  }
}

/* Groups of fp32 keys of which some tie. */
NMF_INLINE void mend_ties(const Plan &plan, const char *w, int64_t groups, uint8_t *kept,
                          Room &room) {
  const int64_t m = plan.m;
  for (int64_t g = 0; g < groups; g += LANES, w += LANES * m * 4, kept += LANES * m) {
    const int64_t here = nmf_min(LANES, groups - g);
    if (sum_bytes(kept, here * m) == here * plan.n) continue;
    if (here < LANES || !plan.networked)
      mend_few(plan, w, here, kept);
    else if (plan.top)
      select_tied<true>(plan, w, kept, room);
    else
      select_tied<false>(plan, w, kept, room);
  }
}

}  // namespace
#endif
