/* Which elements are kept: a byte each, 1 or 0, exactly n of every group, ties to the lowest index.
 *
 * A key is |w|'s bits, ordered as the finite floats are. A 16-bit key has room below it for the
 * place in the group, counted down, so that 16-bit keys never tie. fp32 keys may: then a group gets
 * a count other than n, which is seen by summing the bytes and mended there.
 *
 * With TOP the n-th largest key t is found and key >= t kept; else, when n > m / 2, the (m - n)-th
 * smallest and key > t kept. The rank is so never more than m / 2. */
#ifndef NMFLOW_PROJECT_SELECT_H
#define NMFLOW_PROJECT_SELECT_H

#include "project.h"
#include "project_network.h"

namespace {

enum Way { WAY_ALL, WAY_SMALL, WAY_LONG, WAY_PAIR, WAY_NETWORK, WAY_BISECT };

/* How groups of one pattern are selected. */
struct Plan {
  int64_t n, m, rank;
  bool top;
  Way way;
  int64_t length, blocks; /* the network's blocks and how many of them cover m */
  int64_t block;          /* groups that are selected at a time */
  bool networked;         /* within the network's limits, whatever the way */
};

NMF_INLINE Plan plan_of(int64_t n, int64_t m) {
  Plan plan;
  plan.n = n;
  plan.m = m;
  plan.top = n <= m - n;
  plan.rank = plan.top ? n : m - n;
  plan.length = 1;
  while (plan.length < plan.rank && plan.length < m) plan.length *= 2;
  plan.blocks = nmf_ceil_div(m, plan.length);
  plan.block = LANES;
  plan.networked = n < m && m <= NMF_NETWORK_M && plan.rank <= NMF_NETWORK_RANK;
  const bool power = (m & (m - 1)) == 0;
  if (n == m)
    plan.way = WAY_ALL;
  else if (plan.rank == 1 && m <= LANES && power)
    plan.way = WAY_SMALL;
  else if (plan.rank == 1 && m % LANES == 0 && m <= 32768)
    plan.way = WAY_LONG;
  else if (m == 4)
    plan.way = WAY_PAIR;
  else if (plan.networked)
    plan.way = WAY_NETWORK;
  else
    plan.way = WAY_BISECT;
  if (plan.way == WAY_SMALL || plan.way == WAY_PAIR) plan.block = NMF_BLOCK / m;
  if (plan.way == WAY_LONG || plan.way == WAY_ALL) plan.block = m < NMF_BLOCK ? NMF_BLOCK / m : 1;
  if (plan.way == WAY_BISECT) plan.block = 1;
  return plan;
}

/* The room a selection needs, carved out of a task's scratch. */
struct Room {
  uint32_t *keys;       /* [blocks * length][LANES], or one group's */
  uint8_t *kept;        /* a byte an element of what is selected before it is written */
  char *staged;         /* a block's elements, when the last one is cut short, ... */
  uint8_t *staged_kept; /* ... and their bytes */
  char *turned;         /* units with the groups in rows, when inner is short, ... */
  uint8_t *turned_kept; /* ... and their bytes */
  float *sums;          /* a panel's sums */
  uint8_t *group;       /* lane by lane: which group of a block, when m % LANES */
  uint16_t *below;      /* lane by lane: what goes below a 16-bit key */
  vecu seen;            /* the largest keys so far */
};

/* Units that are selected before they are written. */
NMF_INLINE int64_t units_at_once(const nmf_projection *job, const Plan &plan) {
  if (job->inner == 1) return plan.block;
  return job->inner >= LANES ? 1 : LANES;
}

NMF_INLINE char *take(char **at, int64_t bytes) {
  char *here = *at;
  *at += (bytes + 63) / 64 * 64;
  return here;
}

/* Points a room into scratch; returns the bytes it takes. A null scratch only counts. */
int64_t carve(const nmf_projection *job, const Plan &plan, char *scratch, Room *room) {
  char *const start = scratch != nullptr ? scratch : reinterpret_cast<char *>(64), *at = start;
  const int64_t m = plan.m, row = job->length * job->inner;
  const bool networked = plan.networked;
  const int64_t keys = networked ? plan.blocks * plan.length * LANES : m + LANES;
  const int64_t lanes = networked && m % LANES ? m * LANES : LANES;
  const int64_t block = plan.block > 1 ? plan.block * m : 0;
  const int64_t units = units_at_once(job, plan) * m * job->inner;
  const int64_t turned = job->inner > 1 ? LANES * m * job->inner : 0;
  room->keys = reinterpret_cast<uint32_t *>(take(&at, keys * 4));
  room->kept = reinterpret_cast<uint8_t *>(take(&at, job->panel > 1 ? row : units));
  room->staged = take(&at, block * 4);
  room->staged_kept = reinterpret_cast<uint8_t *>(take(&at, block));
  room->turned = take(&at, turned * 4);
  room->turned_kept = reinterpret_cast<uint8_t *>(take(&at, turned));
  room->sums = reinterpret_cast<float *>(take(&at, job->panel > 1 ? row * 4 : 0));
  room->group = reinterpret_cast<uint8_t *>(take(&at, lanes));
  room->below = reinterpret_cast<uint16_t *>(take(&at, lanes * 2));
  room->seen = vecu{};
  return at - start;
}

NMF_INLINE uint32_t place(int64_t i) { return 0xffffu - static_cast<uint32_t>(i); }

void fill_tables(const Plan &plan, Room *room) {
  if (plan.networked && plan.m % LANES) {
    int64_t at = 0;
    for (int g = 0; g < LANES; ++g)
      for (int64_t i = 0; i < plan.m; ++i, ++at) {
        room->group[at] = static_cast<uint8_t>(g);
        room->below[at] = static_cast<uint16_t>(place(i));
      }
    return;
  }
  for (int lane = 0; lane < LANES; ++lane)
    room->below[lane] = static_cast<uint16_t>(place(lane % plan.m));
}

/* Keys of LANES consecutive elements. */
template <int BYTES>
NMF_INLINE vecu keys_of(const char *from, vecu below) {
  if (BYTES == 4) return get<vecu>(from) & 0x7fffffffu;
  return ((widen(get<vech>(from)) << 16) & 0x7fff0000u) | below;
}
/* m <= LANES, a power of two, rank 1: the best of a group is spread over its lanes by flips. */
template <int BYTES, bool TOP, int M>
void select_small(const char *w, int64_t vectors, uint8_t *kept, Room &room) {
  const vecu below = widen(get<vech>(room.below));
  vecu seen = room.seen;
  for (int64_t i = 0; i < vectors; ++i) {
    const vecu keys = keys_of<BYTES>(w + i * LANES * BYTES, below);
    seen = larger(seen, keys);
    vecu t = better<TOP>(keys, flip<1>(keys));
    if constexpr (M >= 4) t = better<TOP>(t, flip<2>(t));
    if constexpr (M >= 8 && LANES >= 8) t = better<TOP>(t, flip<4>(t));
    if constexpr (M >= 16 && LANES >= 16) t = better<TOP>(t, flip<8>(t));
    put(kept + i * LANES, kept_bytes<TOP>(keys, t));
  }
  room.seen = seen;
}

/* 2:4. The second of four is the larger of the pairs' smaller of larger and larger of smaller. */
template <int BYTES>
void select_pair(const char *w, int64_t vectors, uint8_t *kept, Room &room) {
  const vecu below = widen(get<vech>(room.below));
  vecu seen = room.seen;
  for (int64_t i = 0; i < vectors; ++i) {
    const vecu keys = keys_of<BYTES>(w + i * LANES * BYTES, below);
    seen = larger(seen, keys);
    const vecu other = flip<1>(keys), first = larger(keys, other), second = smaller(keys, other);
    const vecu t = larger(smaller(first, flip<2>(first)), larger(second, flip<2>(second)));
    put(kept + i * LANES, kept_bytes<true>(keys, t));
  }
  room.seen = seen;
}

/* m a multiple of LANES, rank 1. */
template <int BYTES, bool TOP>
void select_long(const char *w, int64_t groups, int64_t m, uint8_t *kept, Room &room) {
  const vecu first = widen(get<vech>(room.below));
  vecu seen = room.seen;
  for (int64_t g = 0; g < groups; ++g, w += m * BYTES, kept += m) {
    vecu below = first, t = keys_of<BYTES>(w, below), most = t;
    for (int64_t i = LANES; i < m; i += LANES) {
      below -= static_cast<uint32_t>(LANES);
      const vecu keys = keys_of<BYTES>(w + i * BYTES, below);
      t = better<TOP>(t, keys);
      if (!TOP) most = larger(most, keys);
    }
    seen = larger(seen, TOP ? t : most);
    t = better<TOP>(t, flip<1>(t));
    t = better<TOP>(t, flip<2>(t));
    if constexpr (LANES >= 8) t = better<TOP>(t, flip<4>(t));
    if constexpr (LANES >= 16) t = better<TOP>(t, flip<8>(t));
    below = first;
    for (int64_t i = 0; i < m; i += LANES, below -= static_cast<uint32_t>(LANES))
      put(kept + i, kept_bytes<TOP>(keys_of<BYTES>(w + i * BYTES, below), t));
  }
  room.seen = seen;
}

/* A block of LANES groups to columns: element i of every group in keys[i]. */
template <int BYTES>
void to_columns(const char *w, int64_t m, Room &room) {
  const int64_t wide = BYTES == 4 ? 4 : 8;
  uint32_t *keys = room.keys;
  vecu seen = room.seen;
  int64_t i = 0;
  for (; i + wide <= m; i += wide, keys += wide * LANES) {
    vecu unit[4];
    transpose4(w + i * BYTES, m * BYTES, unit);
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) {
      if (BYTES == 4) {
        const vecu key = unit[k] & 0x7fffffffu;
        put(keys + k * LANES, key);
        seen = larger(seen, key);
      } else {
        const vecu even = ((unit[k] << 16) & 0x7fff0000u) | splat(place(i + 2 * k));
        const vecu odd = (unit[k] & 0x7fff0000u) | splat(place(i + 2 * k + 1));
        put(keys + 2 * k * LANES, even);
        put(keys + (2 * k + 1) * LANES, odd);
        seen = larger(seen, larger(even, odd));
      }
    }
  }
  for (; i < m; ++i, keys += LANES) {
    for (int lane = 0; lane < LANES; ++lane) {
      const char *from = w + (lane * m + i) * BYTES;
      uint32_t bits32;
      uint16_t bits16;
      if (BYTES == 4) {
        memcpy(&bits32, from, 4);
        keys[lane] = bits32 & 0x7fffffffu;
      } else {
        memcpy(&bits16, from, 2);
        keys[lane] = (static_cast<uint32_t>(bits16 & 0x7fffu) << 16) | place(i);
      }
    }
    seen = larger(seen, get<vecu>(keys));
  }
  room.seen = seen;
}

/* LANES groups by the sorting network. */
template <int BYTES, bool TOP>
void select_network(const Plan &plan, const char *w, uint8_t *kept, Room &room) {
  const int64_t m = plan.m;
  to_columns<BYTES>(w, m, room);
  for (int64_t i = m; i < plan.blocks * plan.length; ++i)
    put(room.keys + i * LANES, splat(TOP ? 0u : 0x7fffffffu));
  const vecu t = ranked<TOP>(room.keys, plan.length, plan.blocks, plan.rank);
  if (m % LANES == 0) {
    uint32_t of_group[LANES];
    put(of_group, t);
    const vecu first = widen(get<vech>(room.below));
    for (int g = 0; g < LANES; ++g) {
      const vecu own = splat(of_group[g]);
      vecu below = first;
      for (int64_t i = 0; i < m; i += LANES, w += LANES * BYTES, kept += LANES) {
        put(kept, kept_bytes<TOP>(keys_of<BYTES>(w, below), own));
        if (BYTES == 2) below -= static_cast<uint32_t>(LANES);
      }
    }
    return;
  }
  for (int64_t i = 0; i < m * LANES; i += LANES) {
    const vecu keys = keys_of<BYTES>(w + i * BYTES, widen(get<vech>(room.below + i)));
    put(kept + i, kept_bytes<TOP>(keys, permute(t, room.group + i)));
  }
}

}  // namespace
#endif
