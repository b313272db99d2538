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

#if !defined(__AVX512F__)
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
    Threshold t = {top, 1};
    if (n > 1) t = find_threshold(keys, n, m, top);
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

/* n:4 by ranks, in vectors of whole groups: a key is beaten by each of the three others that is
 * larger, or equal and before it. */
#if defined(__AVX2__)
typedef int32_t four __attribute__((vector_size(32)));
typedef float fours __attribute__((vector_size(32)));
typedef uint8_t four_bytes __attribute__((vector_size(8)));
#define NMF_FOUR(a, b, c, d) {a, b, c, d, a + 4, b + 4, c + 4, d + 4}
#define NMF_FOUR_BIAS(a, b, c, d) {a, b, c, d, a, b, c, d}
#else
typedef int32_t four __attribute__((vector_size(16)));
typedef float fours __attribute__((vector_size(16)));
typedef uint8_t four_bytes __attribute__((vector_size(4)));
#define NMF_FOUR(a, b, c, d) {a, b, c, d}
#define NMF_FOUR_BIAS(a, b, c, d) {a, b, c, d}
#endif

template <int DTYPE>
uint32_t project_fours(const nmf_project_args *args, int64_t first, int64_t last,
                       uint32_t *keys) {
  typedef nmf_element<DTYPE> E;
  typedef typename E::type T;
  const int64_t lanes = sizeof(four) / 4;
  const int32_t n = static_cast<int32_t>(args->n);
  const T *w = static_cast<const T *>(args->w);
  T *dense = static_cast<T *>(args->dense), *out = static_cast<T *>(args->out);
  const four r1 = NMF_FOUR(1, 2, 3, 0), r2 = NMF_FOUR(2, 3, 0, 1), r3 = NMF_FOUR(3, 0, 1, 2);
  const four b1 = NMF_FOUR_BIAS(0, 0, 0, 1), b2 = NMF_FOUR_BIAS(0, 0, 1, 1),
             b3 = NMF_FOUR_BIAS(0, 1, 1, 1);
  four seen = {};
  int64_t at = first * 4;
  const int64_t end = last * 4;
  for (; at + lanes <= end; at += lanes) {
    four key;
    for (int i = 0; i < lanes; ++i) key[i] = static_cast<int32_t>(E::key(w[at + i]));
    const four larger = key > seen;
    seen = (key & larger) | (seen & ~larger);
    /* Each true comparison is -1. */
    const four rank = (__builtin_shuffle(key, r1) + b1 > key) +
                      (__builtin_shuffle(key, r2) + b2 > key) +
                      (__builtin_shuffle(key, r3) + b3 > key);
    const four kept = rank > -n;
    T value[8];
    memcpy(value, w + at, static_cast<size_t>(lanes) * sizeof(T));
    if (dense) memcpy(dense + at, value, static_cast<size_t>(lanes) * sizeof(T));
    if (args->mask) {
      const four_bytes bytes = __builtin_convertvector(kept & 1, four_bytes);
      memcpy(args->mask + at, &bytes, sizeof bytes);
    }
    if (out) {
      if (DTYPE == NMFLOW_F32) {
        four bits, result;
        fours faded;
        memcpy(&bits, value, sizeof bits);
        memcpy(&faded, value, sizeof faded);
        faded *= args->delta;
        memcpy(&result, &faded, sizeof result);
        result = (kept & bits) | (~kept & result);
        memcpy(out + at, &result, sizeof result);
        continue;
      }
      T result[8];
      int32_t keeps[8];
      memcpy(keeps, &kept, sizeof kept);
      for (int i = 0; i < lanes; ++i) {
        const T faded = E::store(E::load(value[i]) * args->delta);
        result[i] = keeps[i] ? value[i] : faded;
      }
      memcpy(out + at, result, static_cast<size_t>(lanes) * sizeof(T));
    }
  }
  uint32_t most = 0;
  for (int i = 0; i < lanes; ++i)
    most = static_cast<uint32_t>(seen[i]) > most ? static_cast<uint32_t>(seen[i]) : most;
  if (at < end) {
    const uint32_t rest = project_groups<DTYPE>(args, at / 4, last, keys);
    most = rest > most ? rest : most;
  }
  return most;
}

uint32_t project_any(const nmf_project_args *args, int64_t first, int64_t last, uint32_t *keys) {
  if (args->m == 4 && args->n < 4) {
    switch (args->dtype) {
      case NMFLOW_F32:
        return project_fours<NMFLOW_F32>(args, first, last, keys);
      case NMFLOW_BF16:
        return project_fours<NMFLOW_BF16>(args, first, last, keys);
      default:
        return project_fours<NMFLOW_F16>(args, first, last, keys);
    }
  }
  switch (args->dtype) {
    case NMFLOW_F32:
      return project_groups<NMFLOW_F32>(args, first, last, keys);
    case NMFLOW_BF16:
      return project_groups<NMFLOW_BF16>(args, first, last, keys);
    default:
      return project_groups<NMFLOW_F16>(args, first, last, keys);
  }
}
#endif

}  // namespace
