/* One group too large for the sorting networks: its n-th largest key by bisection. */
#ifndef NMFLOW_PROJECT_BISECT_H
#define NMFLOW_PROJECT_BISECT_H

#include "project_select.h"

namespace {

/* The n-th largest of m keys by bisection of its bits. keys[m, ...) are zeros up to a vector. */
struct Threshold {
  uint32_t at;   /* keys >= at are kept ... */
  int64_t spare; /* ... but, when >= 0, of those equal to it only the first `spare` */
};

NMF_INLINE int64_t count_at_least(const uint32_t *keys, int64_t m, uint32_t at) {
  vecu counts = {};
  for (int64_t i = 0; i < m; i += LANES) counts -= (vecu)((veci)get<vecu>(keys + i) >= (veci)splat(at));
  int64_t count = 0;
  for (int i = 0; i < LANES; ++i) count += counts[i];
  return count;
}

Threshold find_threshold(const uint32_t *keys, int64_t n, int64_t m, uint32_t top) {
  /* Invariant: count(>= low) >= n, count(>= high) < n. Keys are below 2^31. */
  uint32_t low = 0, high = top + 1, step = 1u << 23;
  /* Magnitudes within a group are of one scale, so the first guess is half the largest, in value
   * (one exponent less), and not half its bits. */
  uint32_t at = top > step ? top - step : top / 2;
  while (high - low > 1) {
    if (at <= low || at >= high) at = low + (high - low) / 2;
    const int64_t count = count_at_least(keys, m, at);
    if (count == n) return {at, -1};
    if (count > n) {
      low = at;
      at = low + (high - low) / 2;
    } else {
      high = at;
      if (low == 0 && step < (1u << 27)) {
        step *= 2;
        at = high > step ? high - step : high / 2;
      } else {
        at = low + (high - low) / 2;
      }
    }
  }
  return {low, n - count_at_least(keys, m, low + 1)};
}

template <int BYTES>
void select_bisect(const char *w, int64_t n, int64_t m, uint8_t *kept, Room &room) {
  uint32_t *keys = room.keys, top = 0;
  for (int64_t i = 0; i < m; ++i) {
    uint32_t bits = 0;
    memcpy(&bits, w + i * BYTES, BYTES);
    keys[i] = (BYTES == 4 ? bits : bits << 16) & 0x7fffffffu;
    top = keys[i] > top ? keys[i] : top;
  }
  for (int64_t i = m; i % LANES; ++i) keys[i] = 0;
  room.seen = larger(room.seen, splat(top));
  const Threshold t = find_threshold(keys, n, m, top);
  int64_t spare = t.spare;
  for (int64_t i = 0; i < m; ++i) {
    const bool takes = spare > 0 && keys[i] == t.at;
    kept[i] = spare < 0 ? keys[i] >= t.at : (keys[i] > t.at) | takes;
    spare -= takes;
  }
}

}  // namespace
#endif
