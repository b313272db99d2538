/* The tile operations by the bfloat16 products of AVX-512 (tiles.h), for processors without tiles. Operands are not
 * copied: they have to lie where they were loaded from until they are multiplied. Sums are tiles 0 to 3. */
#ifndef NMFLOW_VECTORS_H
#define NMFLOW_VECTORS_H

#include <immintrin.h>

#include "tiles.h"

namespace {

struct Operand {
  const char *at;
  int64_t stride;
};
struct VectorTiles {
  alignas(64) float sums[4][256];
  Operand operands[8];
  int pairs; /* of a left operand: 16, or 8 */
};
thread_local VectorTiles t_tiles;

NMF_INLINE void tile_configure(const TileConfig *config) { t_tiles.pairs = config->bytes[4] / 4; }
NMF_INLINE void tile_zero(int t) { memset(t_tiles.sums[t], 0, TILE_BYTES); }
NMF_INLINE void tile_load(int t, const void *from, int64_t stride) {
  if (t >= 4) {
    t_tiles.operands[t] = {static_cast<const char *>(from), stride};
    return;
  }
  for (int m = 0; m < 16; ++m)
    memcpy(t_tiles.sums[t] + 16 * m, static_cast<const char *>(from) + m * stride, 64);
}
NMF_INLINE void tile_store(int t, void *to, int64_t stride) {
  for (int m = 0; m < 16; ++m)
    memcpy(static_cast<char *>(to) + m * stride, t_tiles.sums[t] + 16 * m, 64);
}

/* 8 rows at a time, beside PAIRS rows of b in registers. */
template <int PAIRS>
NMF_INLINE void dot_rows(float *c, Operand a, Operand b) {
  __m512bh right[PAIRS];
#pragma GCC unroll 16
  for (int k = 0; k < PAIRS; ++k) right[k] = (__m512bh)_mm512_loadu_si512(b.at + k * b.stride);
  for (int m = 0; m < 16; m += 8, c += 128) {
    __m512 sum[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) sum[i] = _mm512_load_ps(c + 16 * i);
    const char *row[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) row[i] = a.at + (m + i) * a.stride;
#pragma GCC unroll 16
    for (int k = 0; k < PAIRS; ++k)
#pragma GCC unroll 8
      for (int i = 0; i < 8; ++i) {
        int pair;
        memcpy(&pair, row[i] + 4 * k, 4);
        sum[i] = _mm512_dpbf16_ps(sum[i], right[k], (__m512bh)_mm512_set1_epi32(pair));
      }
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) _mm512_store_ps(c + 16 * i, sum[i]);
  }
}

__attribute__((noinline)) void tile_dot(int c, int a, int b) {
  VectorTiles &t = t_tiles;
  if (t.pairs == 16)
    dot_rows<16>(t.sums[c], t.operands[a], t.operands[b]);
  else
    dot_rows<8>(t.sums[c], t.operands[a], t.operands[b]);
}

NMF_INLINE void tile_release() {}

}  // namespace
#endif
