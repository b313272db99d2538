/* Weights with 8-bit values (nmflow.h has their layout), read entry by entry: what the kernels of
 * any pattern need. All static, see common.h. */
#ifndef NMFLOW_INT8_H
#define NMFLOW_INT8_H

#include "common.h"
#include "vector.h"

namespace {

const int64_t INT8_HEAD = 128; /* bytes of a tile before its blocks: 16 scales and 16 sums */

NMF_INLINE const char *int8_tile(const nmf_job *job, int64_t tile) {
  return static_cast<const char *>(job->values) + tile * job->q.tile_bytes;
}
NMF_INLINE const float *int8_scales(const nmf_job *job, int64_t tile) {
  return reinterpret_cast<const float *>(int8_tile(job, tile));
}
NMF_INLINE const int32_t *int8_sums(const nmf_job *job, int64_t tile) {
  return reinterpret_cast<const int32_t *>(int8_tile(job, tile) + 64);
}

/* A place in a tile's blocks: the quad of four entries, the entry in it, and where it lies. */
struct Int8Place {
  const char *block;
  int64_t quad; /* of the block */
  uint32_t entry;
};
NMF_INLINE Int8Place int8_place(const nmf_job *job, int64_t tile, int64_t s) {
  const nmf_int8 &q = job->q;
  return {int8_tile(job, tile) + INT8_HEAD + s / (4 * q.per) * q.block_bytes, s / 4 % q.per,
          static_cast<uint32_t>(s % 4)};
}
NMF_INLINE void int8_next(const nmf_job *job, Int8Place &at) {
  if (++at.entry < 4) return;
  at.entry = 0;
  if (++at.quad < job->q.per) return;
  at.quad = 0;
  at.block += job->q.block_bytes;
}
NMF_INLINE veci int8_value(const Int8Place &at, int i) {
  const vecu four = get<vecu>(at.block + 64 + at.quad * 64 + i * LANES * 4);
  return (veci)(four << (24u - 8u * at.entry)) >> 24;
}
NMF_INLINE vecu int8_code(const nmf_job *job, const Int8Place &at, int i) {
  const uint32_t bits = static_cast<uint32_t>(job->q.bits);
  const vecu four = get<vecu>(at.block + i * LANES * 4);
  return four >> (8u * at.entry + bits * static_cast<uint32_t>(at.quad)) & ((1u << bits) - 1u);
}

/* As decode_values: entries [s0, s0 + count) of a tile's 16 rows as fp32, times the rows' scales where
 * inputs are not rounded, too. */
NMF_INLINE const float *int8_decode_values(const nmf_job *job, int64_t tile, int64_t s0,
                                           int64_t count, float *to) {
  Int8Place at = int8_place(job, tile, s0);
  vecf scales[16 / LANES];
  for (int i = 0; i < 16 / LANES; ++i)
    scales[i] = job->q.activations == NMFLOW_INT8S ? splat(1.0f)
                                                   : load(int8_scales(job, tile) + i * LANES);
  for (int64_t s = 0; s < count; ++s, int8_next(job, at))
    for (int i = 0; i < 16 / LANES; ++i)
      store(to + s * 16 + i * LANES, __builtin_convertvector(int8_value(at, i), vecf) * scales[i]);
  return to;
}

/* As decode_columns. A code is clamped to the last input of its group. */
NMF_INLINE void int8_decode_columns(const nmf_job *job, int64_t tile, int64_t s0, int64_t count,
                                    int64_t base, uint32_t scale, uint32_t *to) {
  const nmf_geometry &g = job->g;
  Int8Place at = int8_place(job, tile, s0);
  int64_t start = s0 / g.n * g.m - base, left = g.n - s0 % g.n;
  const uint32_t most = static_cast<uint32_t>(g.m - 1);
  for (int64_t s = 0; s < count; ++s, int8_next(job, at)) {
    for (int i = 0; i < 16 / LANES; ++i) {
      vecu code = int8_code(job, at, i);
      const vecu over = (vecu)((veci)code > static_cast<int32_t>(most));
      code = (code & ~over) | (over & most);
      store(to + s * 16 + i * LANES, (code + static_cast<uint32_t>(start)) * scale);
    }
    if (--left == 0) {
      left = g.n;
      start += g.m;
    }
  }
}

NMF_INLINE void int8_fetch(const nmf_job *job, int64_t tile, int64_t s0, int64_t entries) {
  const char *from = int8_place(job, tile, s0).block;
  const int64_t bytes = nmf_ceil_div(entries, 4 * job->q.per) * job->q.block_bytes;
  for (int64_t at = 0; at < bytes; at += 64) __builtin_prefetch(from + at);
}

}  // namespace
#endif
