/* Mask and projection of a run of groups; the same source is compiled once for each instruction
 * set (the includer sets NMF_PROJECT and the vector width), so loops here are written for the
 * vectoriser. Everything is static: see common.h.
 *
 * A group's mask is decided by its keys, the bits of |w| as an integer (order of finite floats).
 * The n-th largest key is found by bisection between two bounds with an early stop as soon as
 * exactly n keys reach the middle; only when keys tie at the threshold is index order looked at. */
#include "common.h"

namespace {

/* keys[0, padded) holds m keys and then zeros. Returns a threshold t with exactly n keys >= t,
 * or, when a tie forbids that, the n-th largest key itself; *above is the count of keys > t that
 * are kept for sure, *tied says which of the two it was. */
struct Threshold {
  uint32_t at;   /* keys >= at are kept ... */
  int64_t spare; /* ... but of those equal to at only the first `spare` (when spare >= 0) */
};

NMF_INLINE int64_t count_at_least(const uint32_t *keys, int64_t m, uint32_t at) {
  int32_t count = 0;
  for (int64_t i = 0; i < m; ++i) count += static_cast<int32_t>(keys[i]) >= static_cast<int32_t>(at);
  return count;
}

NMF_INLINE Threshold find_threshold(const uint32_t *keys, int64_t n, int64_t m, uint32_t top) {
  /* Invariant: count(>= low) >= n, count(>= high) < n. Keys are below 2^31. */
  uint32_t low = 0, high = top + 1;
  Threshold found = {0, -1};
  if (n == m) return found;
  /* Magnitudes within a group are of one scale, so the first guess is half the largest, in value
   * (one exponent less), and not half its bits. */
  uint32_t step = 1u << 23;
  uint32_t at = top > step ? top - step : top / 2;
  while (high - low > 1) {
    if (at <= low || at >= high) at = low + (high - low) / 2;
    const int64_t count = count_at_least(keys, m, at);
    if (count == n) {
      found.at = at;
      return found;
    }
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
  found.at = low;
  found.spare = n - count_at_least(keys, m, low + 1);
  return found;
}

template <int DTYPE>
uint32_t project_groups(const nmf_project_args *args, int64_t first, int64_t last,
                        uint32_t *keys) {
  typedef nmf_element<DTYPE> E;
  typedef typename E::type T;
  const int64_t n = args->n, m = args->m;
  const T *w = static_cast<const T *>(args->w);
  T *dense = static_cast<T *>(args->dense), *out = static_cast<T *>(args->out);
  uint8_t *mask = args->mask;
  const float delta = args->delta;
  uint32_t seen = 0;
  for (int64_t g = first; g < last; ++g) {
    const T *from = w + g * m;
    uint32_t top = 0;
    for (int64_t i = 0; i < m; ++i) {
      keys[i] = E::key(from[i]);
      top = keys[i] > top ? keys[i] : top;
    }
    if (top > seen) seen = top;
    if (top >= E::infinity) return seen;
    const Threshold t = find_threshold(keys, n, m, top);
    if (dense) memcpy(dense + g * m, from, static_cast<size_t>(m) * sizeof(T));
    /* From here keys[i] becomes 1 for kept and 0 for pruned. */
    if (t.spare < 0) {
      for (int64_t i = 0; i < m; ++i) keys[i] = keys[i] >= t.at;
    } else {
      int64_t spare = t.spare;
      for (int64_t i = 0; i < m; ++i) {
        const uint32_t tied = keys[i] == t.at, takes = tied & (spare > 0);
        keys[i] = (keys[i] > t.at) | takes;
        spare -= takes;
      }
    }
    if (mask)
      for (int64_t i = 0; i < m; ++i) mask[g * m + i] = static_cast<uint8_t>(keys[i]);
    if (out)
      for (int64_t i = 0; i < m; ++i) {
        const T value = from[i];
        const T faded = E::store(E::load(value) * delta);
        out[g * m + i] = keys[i] ? value : faded;
      }
  }
  return seen;
}

uint32_t project_any(const nmf_project_args *args, int64_t first, int64_t last, uint32_t *keys) {
  switch (args->dtype) {
    case NMFLOW_F32:
      return project_groups<NMFLOW_F32>(args, first, last, keys);
    case NMFLOW_BF16:
      return project_groups<NMFLOW_BF16>(args, first, last, keys);
    default:
      return project_groups<NMFLOW_F16>(args, first, last, keys);
  }
}

}  // namespace
