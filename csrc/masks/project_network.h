/* The rank-th best of a column of keys, for LANES columns at once: no branch depends on a key.
 *
 * Blocks of P >= rank keys are sorted and merged into the best P so far. Of two sorted runs a and
 * b, the best P of both are better(a[i], b[P - 1 - i]), a bitonic run that log2(P) rounds sort
 * again; after the last block the worst of them is the answer when rank = P. */
#ifndef NMFLOW_PROJECT_NETWORK_H
#define NMFLOW_PROJECT_NETWORK_H

#include <utility>

#include "project_vector.h"

namespace {

/* Pairs (a, b) of a network on P wires, in order: after each, wire a is no worse than wire b. */
struct Pairs {
  int count;
  uint8_t a[64], b[64];
};
/* Batcher's odd-even merge sort: 1, 5, 19 and 63 pairs for 2, 4, 8 and 16 wires. */
template <int P>
constexpr Pairs sorting() {
  Pairs pairs = {0, {}, {}};
  for (int p = 1; p < P; p *= 2)
    for (int k = p; k >= 1; k /= 2)
      for (int j = k % p; j + k < P; j += 2 * k)
        for (int i = 0; i < k && i + j + k < P; ++i)
          if ((i + j) / (2 * p) == (i + j + k) / (2 * p)) {
            pairs.a[pairs.count] = static_cast<uint8_t>(i + j);
            pairs.b[pairs.count++] = static_cast<uint8_t>(i + j + k);
          }
  return pairs;
}
/* Sorts a bitonic run. */
template <int P>
constexpr Pairs merging() {
  Pairs pairs = {0, {}, {}};
  for (int k = P / 2; k >= 1; k /= 2)
    for (int i = 0; i < P; ++i)
      if ((i & k) == 0) {
        pairs.a[pairs.count] = static_cast<uint8_t>(i);
        pairs.b[pairs.count++] = static_cast<uint8_t>(i + k);
      }
  return pairs;
}
template <int P>
struct Network {
  static constexpr Pairs sort = sorting<P>(), merge = merging<P>();
};

template <bool TOP>
NMF_INLINE void exchange(vecu &a, vecu &b) {
  const vecu first = better<TOP>(a, b);
  b = worse<TOP>(a, b);
  a = first;
}
template <bool TOP, int P, size_t... I>
NMF_INLINE void sort_run([[maybe_unused]] vecu *v, std::index_sequence<I...>) {
  (exchange<TOP>(v[Network<P>::sort.a[I]], v[Network<P>::sort.b[I]]), ...);
}
template <bool TOP, int P, size_t... I>
NMF_INLINE void merge_run([[maybe_unused]] vecu *v, std::index_sequence<I...>) {
  (exchange<TOP>(v[Network<P>::merge.a[I]], v[Network<P>::merge.b[I]]), ...);
}
template <bool TOP, int P>
NMF_INLINE void sort_run(vecu *v) {
  sort_run<TOP, P>(v, std::make_index_sequence<Network<P>::sort.count>());
}
template <bool TOP, int P>
NMF_INLINE void merge_run(vecu *v) {
  merge_run<TOP, P>(v, std::make_index_sequence<Network<P>::merge.count>());
}

/* P <= 16: in registers. `keys` holds `blocks` >= 1 blocks of P vectors. */
template <bool TOP, int P>
vecu rank_of(const uint32_t *keys, int64_t blocks, int64_t rank) {
  vecu best[P];
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) best[i] = get<vecu>(keys + i * LANES);
  sort_run<TOP, P>(best);
  for (int64_t block = 1; block < blocks; ++block) {
    keys += P * LANES;
    vecu next[P];
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) next[i] = get<vecu>(keys + i * LANES);
    sort_run<TOP, P>(next);
#pragma GCC unroll 16
    for (int i = 0; i < P; ++i) best[i] = better<TOP>(best[i], next[P - 1 - i]);
    if (rank == P && block == blocks - 1) {
      vecu last = best[0];
#pragma GCC unroll 16
      for (int i = 1; i < P; ++i) last = worse<TOP>(last, best[i]);
      return last;
    }
    merge_run<TOP, P>(best);
  }
  vecu ranked[P];
#pragma GCC unroll 16
  for (int i = 0; i < P; ++i) ranked[i] = best[i];
  return ranked[rank - 1];
}

/* P > 16, a power of two: the same in memory, on the keys themselves. */
template <bool TOP>
NMF_INLINE void exchange_at(uint32_t *a, uint32_t *b) {
  vecu x = get<vecu>(a), y = get<vecu>(b);
  exchange<TOP>(x, y);
  put(a, x);
  put(b, y);
}
/* Sorts a bitonic run of `length` >= 16 vectors: halves in memory, the last four rounds in
 * registers. */
template <bool TOP>
void merge_long(uint32_t *keys, int64_t length) {
  for (int64_t k = length / 2; k >= 16; k /= 2)
    for (int64_t j = 0; j < length; j += 2 * k)
      for (int64_t i = j; i < j + k; ++i) exchange_at<TOP>(keys + i * LANES, keys + (i + k) * LANES);
  for (int64_t j = 0; j < length; j += 16) {
    vecu v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = get<vecu>(keys + (j + i) * LANES);
    merge_run<TOP, 16>(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) put(keys + (j + i) * LANES, v[i]);
  }
}
template <bool TOP>
void sort_long(uint32_t *keys, int64_t length) {
  for (int64_t j = 0; j < length; j += 16) {
    vecu v[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) v[i] = get<vecu>(keys + (j + i) * LANES);
    sort_run<TOP, 16>(v);
#pragma GCC unroll 16
    for (int i = 0; i < 16; ++i) put(keys + (j + i) * LANES, v[i]);
  }
  /* Two sorted runs, the second backwards, are one bitonic run: the first round meets in mirror
   * image and so leaves two bitonic halves. */
  for (int64_t run = 16; run < length; run *= 2)
    for (int64_t j = 0; j < length; j += 2 * run) {
      for (int64_t i = 0; i < run; ++i)
        exchange_at<TOP>(keys + (j + i) * LANES, keys + (j + 2 * run - 1 - i) * LANES);
      merge_long<TOP>(keys + j * LANES, run);
      merge_long<TOP>(keys + (j + run) * LANES, run);
    }
}
template <bool TOP>
vecu rank_of_long(uint32_t *keys, int64_t length, int64_t blocks, int64_t rank) {
  sort_long<TOP>(keys, length);
  uint32_t *next = keys;
  for (int64_t block = 1; block < blocks; ++block) {
    next += length * LANES;
    sort_long<TOP>(next, length);
    vecu last = splat(0u);
    for (int64_t i = 0; i < length; ++i) {
      const vecu both = better<TOP>(get<vecu>(keys + i * LANES),
                                    get<vecu>(next + (length - 1 - i) * LANES));
      put(keys + i * LANES, both);
      last = i == 0 ? both : worse<TOP>(last, both);
    }
    if (rank == length && block == blocks - 1) return last;
    merge_long<TOP>(keys, length);
  }
  return get<vecu>(keys + (rank - 1) * LANES);
}

/* The rank-th best of each lane of `keys`, [blocks * length][LANES]. The keys may be reordered. */
template <bool TOP>
vecu ranked(uint32_t *keys, int64_t length, int64_t blocks, int64_t rank) {
  switch (length) {
    case 1:
      return rank_of<TOP, 1>(keys, blocks, rank);
    case 2:
      return rank_of<TOP, 2>(keys, blocks, rank);
    case 4:
      return rank_of<TOP, 4>(keys, blocks, rank);
    case 8:
      return rank_of<TOP, 8>(keys, blocks, rank);
    case 16:
      return rank_of<TOP, 16>(keys, blocks, rank);
    default:
      return rank_of_long<TOP>(keys, length, blocks, rank);
  }
}

}  // namespace
#endif
