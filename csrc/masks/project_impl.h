/* Mask and projection of a run of units (project.h). The same source is compiled once for each
 * instruction set. Everything is static: see common.h.
 *
 * Work goes block by block: the block's bytes (project_select.h) are all known before any of its
 * outputs is written, so `out` may be `w`, and the second look at w finds it in a cache. */
#include "project_bisect.h"
#include "project_ties.h"
#include "project_write.h"

namespace {

/* ------------------------------------------------------------------ groups in a row */

template <int BYTES>
void select_all(const char *w, int64_t count, uint8_t *kept, Room &room) {
  memset(kept, 1, static_cast<size_t>(count));
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES)
    room.seen = larger(room.seen, keys_of<BYTES>(w + i * BYTES, vecu{}));
  for (; i < count; ++i) {
    uint32_t bits = 0;
    memcpy(&bits, w + i * BYTES, BYTES);
    room.seen = larger(room.seen, splat((BYTES == 4 ? bits : bits << 16) & 0x7fffffffu));
  }
}

template <int BYTES, bool TOP>
void select_whole(const Plan &plan, const char *w, int64_t groups, uint8_t *kept, Room &room) {
  const int64_t m = plan.m, vectors = groups * m / LANES;
  switch (plan.way) {
    case WAY_SMALL:
      switch (m) {
        case 2:
          return select_small<BYTES, TOP, 2>(w, vectors, kept, room);
        case 4:
          return select_small<BYTES, TOP, 4>(w, vectors, kept, room);
        case 8:
          return select_small<BYTES, TOP, 8>(w, vectors, kept, room);
        default:
          return select_small<BYTES, TOP, LANES>(w, vectors, kept, room);
      }
    case WAY_LONG:
      return select_long<BYTES, TOP>(w, groups, m, kept, room);
    case WAY_PAIR:
      return select_pair<BYTES>(w, vectors, kept, room);
    default:
      return select_network<BYTES, TOP>(plan, w, kept, room);
  }
}

/* `groups` groups, at most a block. */
template <int BYTES>
void select_block(const Plan &plan, const char *w, int64_t groups, uint8_t *kept, Room &room) {
  if (plan.way == WAY_ALL) return select_all<BYTES>(w, groups * plan.m, kept, room);
  if (plan.way == WAY_BISECT) return select_bisect<BYTES>(w, plan.n, plan.m, kept, room);
  const int64_t count = groups * plan.m, whole = plan.block * plan.m;
  const char *from = w;
  uint8_t *to = kept;
  if (groups < plan.block) {
    memcpy(room.staged, w, static_cast<size_t>(count * BYTES));
    memset(room.staged + count * BYTES, 0, static_cast<size_t>((whole - count) * BYTES));
    from = room.staged;
    to = room.staged_kept;
  }
  if (plan.top)
    select_whole<BYTES, true>(plan, from, plan.block, to, room);
  else
    select_whole<BYTES, false>(plan, from, plan.block, to, room);
  if (to != kept) memcpy(kept, to, static_cast<size_t>(count));
  if (BYTES == 4 && sum_bytes(kept, count) != groups * plan.n) mend_ties(plan, w, groups, kept, room);
}

template <int BYTES>
void select_groups(const Plan &plan, const char *w, int64_t groups, uint8_t *kept, Room &room) {
  for (int64_t g = 0; g < groups; g += plan.block)
    select_block<BYTES>(plan, w + g * plan.m * BYTES, nmf_min(plan.block, groups - g),
                        kept + g * plan.m, room);
}

/* ------------------------------------------------------------------ groups across rows */

/* LANES neighbours of one m x inner unit, each with a group of its own down the rows. */
template <int BYTES, bool TOP>
void select_down(const Plan &plan, const char *w, int64_t inner, uint8_t *kept, Room &room) {
  const int64_t m = plan.m;
  vecu seen = room.seen;
  for (int64_t i = 0; i < m; ++i) {
    const vecu keys = keys_of<BYTES>(w + i * inner * BYTES, splat(place(i)));
    seen = larger(seen, keys);
    put(room.keys + i * LANES, keys);
  }
  room.seen = seen;
  for (int64_t i = m; i < plan.blocks * plan.length; ++i)
    put(room.keys + i * LANES, splat(TOP ? 0u : 0x7fffffffu));
  const vecu t = ranked<TOP>(room.keys, plan.length, plan.blocks, plan.rank);
  vecu above = {};
  bool exact = true;
  if (BYTES == 4) {
    vecu count = {};
    for (int64_t i = 0; i < m; ++i) {
      const veci keys = (veci)keys_of<BYTES>(w + i * inner * BYTES, vecu{});
      above -= (vecu)(keys > (veci)t);
      count -= (vecu)(TOP ? keys >= (veci)t : keys > (veci)t);
    }
    for (int lane = 0; lane < LANES; ++lane) exact &= count[lane] == static_cast<uint32_t>(plan.n);
  }
  if (exact) {
    for (int64_t i = 0; i < m; ++i)
      put(kept + i * inner,
          kept_bytes<TOP>(keys_of<BYTES>(w + i * inner * BYTES, splat(place(i))), t));
    return;
  }
  vecu spare = splat(static_cast<uint32_t>(plan.n)) - above;
  for (int64_t i = 0; i < m; ++i) {
    const vecu keys = keys_of<BYTES>(w + i * inner * BYTES, vecu{});
    const vecu takes = (vecu)(keys == t) & (vecu)((veci)spare > 0);
    spare += takes;
    const vecu keep = (vecu)((veci)keys > (veci)t) | takes;
    put(kept + i * inner, kept_bytes<false>(keep & 1u, vecu{}));
  }
}

/* `units` consecutive units of m x inner. */
template <int BYTES>
void select_units(const Plan &plan, const char *w, int64_t units, int64_t inner, uint8_t *kept,
                  Room &room) {
  const int64_t m = plan.m, size = m * inner;
  if (inner == 1) return select_groups<BYTES>(plan, w, units, kept, room);
  if (inner >= LANES && plan.networked) {
    for (int64_t u = 0; u < units; ++u, w += size * BYTES, kept += size)
      for (int64_t x = 0; x < inner; x += LANES) {
        /* The last vector overlaps the one before: the bytes come out the same. */
        const int64_t at = nmf_min(x, inner - LANES);
        if (plan.top)
          select_down<BYTES, true>(plan, w + at * BYTES, inner, kept + at, room);
        else
          select_down<BYTES, false>(plan, w + at * BYTES, inner, kept + at, room);
      }
    return;
  }
  /* Narrow: turned into rows and back, as many units at a time as fill the lanes. */
  for (int64_t u = 0; u < units; u += LANES, w += LANES * size * BYTES, kept += LANES * size) {
    const int64_t here = nmf_min(LANES, units - u);
    for (int64_t v = 0; v < here; ++v)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t x = 0; x < inner; ++x)
          memcpy(room.turned + ((v * inner + x) * m + i) * BYTES,
                 w + ((v * m + i) * inner + x) * BYTES, BYTES);
    select_groups<BYTES>(plan, room.turned, here * inner, room.turned_kept, room);
    for (int64_t v = 0; v < here; ++v)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t x = 0; x < inner; ++x)
          kept[(v * m + i) * inner + x] = room.turned_kept[(v * inner + x) * m + i];
  }
}

/* ------------------------------------------------------------------ outputs */

template <int DTYPE>
void write_outputs(const nmf_projection *job, int64_t first, int64_t count, const uint8_t *kept) {
  typedef typename nmf_element<DTYPE>::type T;
  const T *w = static_cast<const T *>(job->w) + first;
  if (job->dense) memcpy(static_cast<T *>(job->dense) + first, w, static_cast<size_t>(count) * sizeof(T));
  if (job->mask && job->mask + first != kept) memcpy(job->mask + first, kept, static_cast<size_t>(count));
  if (job->out == nullptr) return;
  const T *values = static_cast<const T *>(job->values) + first;
  T *out = static_cast<T *>(job->out) + first;
  if (job->pull != 0.0f)
    write_pulled<DTYPE>(values, w, kept, count, job->delta, job->pull, out);
  else
    write_out<DTYPE>(values, kept, count, job->delta, out);
}

/* ------------------------------------------------------------------ panels */

/* sums[j] = sum over the panel's rows, in order and in fp32, of |w[row][j]|. */
template <int DTYPE>
void sum_rows(const nmf_projection *job, int64_t first, int64_t rows, int64_t size, Room &room) {
  typedef typename nmf_element<DTYPE>::type T;
  typedef nmf_element<DTYPE> E;
  const T *w = static_cast<const T *>(job->w) + first * size;
  const vecu bits = splat(0x7fffffffu);
  int64_t j = 0;
  for (; j + LANES <= size; j += LANES) {
    vecf sum = {};
    for (int64_t row = 0; row < rows; ++row) {
      vecf value;
      if constexpr (DTYPE == NMFLOW_F32)
        value = get<vecf>(w + row * size + j);
      else
        value = to_float(get<vech>(w + row * size + j), DTYPE);
      const vecu size_of = (vecu)value & bits;
      room.seen = larger(room.seen, size_of);
      sum = row == 0 ? (vecf)size_of : sum + (vecf)size_of;
    }
    put(room.sums + j, sum);
  }
  for (; j < size; ++j) {
    float sum = 0.0f;
    for (int64_t row = 0; row < rows; ++row) {
      const uint32_t size_of = nmf_bits_of_float(E::load(w[row * size + j])) & 0x7fffffffu;
      room.seen = larger(room.seen, splat(size_of));
      sum = row == 0 ? nmf_float_of_bits(size_of) : sum + nmf_float_of_bits(size_of);
    }
    room.sums[j] = sum;
  }
}

template <int DTYPE>
bool run_panels(const nmf_projection *job, const Plan &plan, int64_t first, int64_t last, Room &room) {
  const int64_t size = job->length * job->inner;
  vecu seen = {};
  for (int64_t p = first; p < last; ++p) {
    const int64_t row = p * job->panel, rows = nmf_min(job->panel, job->outer - row);
    room.seen = seen;
    sum_rows<DTYPE>(job, row, rows, size, room);
    seen = room.seen;
    /* A sum may overflow where no weight is infinite, and still orders the columns. */
    select_units<4>(plan, reinterpret_cast<const char *>(room.sums), job->length / job->m,
                    job->inner, room.kept, room);
    for (int64_t i = 0; i < rows; ++i) write_outputs<DTYPE>(job, (row + i) * size, size, room.kept);
  }
  room.seen = seen;
  return true;
}

/* ------------------------------------------------------------------ a task */

template <int DTYPE>
void run_units(const nmf_projection *job, const Plan &plan, int64_t first, int64_t last, Room &room) {
  const int BYTES = sizeof(typename nmf_element<DTYPE>::type);
  const int64_t size = job->m * job->inner, step = units_at_once(job, plan);
  for (int64_t u = first; u < last; u += step) {
    const int64_t here = nmf_min(step, last - u), at = u * size;
    uint8_t *kept = job->mask ? job->mask + at : room.kept;
    select_units<BYTES>(plan, static_cast<const char *>(job->w) + at * BYTES, here, job->inner,
                        kept, room);
    write_outputs<DTYPE>(job, at, here * size, kept);
  }
}

template <int DTYPE>
bool run_typed(const nmf_projection *job, const Plan &plan, int64_t first, int64_t last, Room &room) {
  if (job->panel > 1) {
    run_panels<DTYPE>(job, plan, first, last, room);
  } else {
    run_units<DTYPE>(job, plan, first, last, room);
  }
  /* Keys of 16 bits lie in the upper half; a panel's are already fp32. */
  const uint32_t infinity = DTYPE == NMFLOW_F32 || job->panel > 1
                                ? 0x7f800000u
                                : nmf_element<DTYPE>::infinity << 16;
  uint32_t seen = 0;
  for (int lane = 0; lane < LANES; ++lane) seen = room.seen[lane] > seen ? room.seen[lane] : seen;
  return seen < infinity;
}

bool run_any(const nmf_projection *job, int64_t first, int64_t last, char *scratch) {
  const Plan plan = plan_of(job->n, job->m);
  Room room;
  carve(job, plan, scratch, &room);
  fill_tables(plan, &room);
  switch (job->dtype) {
    case NMFLOW_F32:
      return run_typed<NMFLOW_F32>(job, plan, first, last, room);
    case NMFLOW_BF16:
      return run_typed<NMFLOW_BF16>(job, plan, first, last, room);
    default:
      return run_typed<NMFLOW_F16>(job, plan, first, last, room);
  }
}

int64_t scratch_any(const nmf_projection *job) {
  Room room;
  return carve(job, plan_of(job->n, job->m), nullptr, &room);
}

const nmf_projector projector = {run_any, scratch_any};

}  // namespace
