/* The tile operations in C++ (tiles.h), as Intel documents the instructions: a dot product has two sums of
 * an element, of even and of odd places, each a chain of fused multiply-adds from 0 on, and adds their sum to it; all
 * in float32, rounded to nearest even, and subnormal numbers are 0 before and after. What would fault, traps. */
#ifndef NMFLOW_EMULATED_H
#define NMFLOW_EMULATED_H

#include <immintrin.h>

#include "tiles.h"

namespace {

struct Tile {
  alignas(64) uint32_t at[16][16];
  int rows, words; /* of a row, 4 bytes each */
};
thread_local Tile t_tiles[8];

NMF_INLINE void must(bool holds) {
  if (!holds) __builtin_trap();
}

void tile_configure(const TileConfig *config) {
  must(config->palette == 1 && config->start_row == 0);
  for (int i = 0; i < 8; ++i) {
    must(config->bytes[i] <= 64 && config->bytes[i] % 4 == 0 && config->rows[i] <= 16);
    memset(&t_tiles[i], 0, sizeof t_tiles[i]);
    t_tiles[i].rows = config->rows[i];
    t_tiles[i].words = config->bytes[i] / 4;
  }
}
NMF_INLINE void tile_zero(int t) { memset(t_tiles[t].at, 0, sizeof t_tiles[t].at); }

NMF_INLINE void tile_load(int t, const void *from, int64_t stride) {
  Tile &tile = t_tiles[t];
  must(tile.rows > 0 && tile.words > 0);
  tile_zero(t);
  for (int m = 0; m < tile.rows; ++m)
    memcpy(tile.at[m], static_cast<const char *>(from) + m * stride, static_cast<size_t>(tile.words) * 4);
}

NMF_INLINE void tile_store(int t, void *to, int64_t stride) {
  const Tile &tile = t_tiles[t];
  must(tile.rows > 0 && tile.words > 0);
  for (int m = 0; m < tile.rows; ++m)
    memcpy(static_cast<char *>(to) + m * stride, tile.at[m], static_cast<size_t>(tile.words) * 4);
}

/* Not inlined, so that no arithmetic leaves the mode that is set around it. */
__attribute__((noinline)) void tile_sums(Tile *c, const Tile *a, const Tile *b) {
  for (int m = 0; m < c->rows; ++m) {
    __m512 even = _mm512_setzero_ps(), odd = _mm512_setzero_ps();
    for (int k = 0; k < a->words; ++k) {
      const uint32_t pair = a->at[m][k];
      const __m512i other = _mm512_load_si512(b->at[k]);
      even = _mm512_fmadd_ps(_mm512_set1_ps(nmf_float_of_bits(pair << 16)),
                             _mm512_castsi512_ps(_mm512_slli_epi32(other, 16)), even);
      odd = _mm512_fmadd_ps(_mm512_set1_ps(nmf_float_of_bits(pair & 0xffff0000u)),
                            _mm512_castsi512_ps(_mm512_and_si512(other, _mm512_set1_epi32(-65536))), odd);
    }
    const __mmask16 there = static_cast<__mmask16>((1u << c->words) - 1u);
    const __m512 sum = _mm512_add_ps(_mm512_load_ps(c->at[m]), _mm512_add_ps(even, odd));
    _mm512_store_ps(c->at[m], _mm512_maskz_mov_ps(there, sum));
  }
}

NMF_INLINE void tile_dot(int c, int a, int b) {
  const Tile &sums = t_tiles[c], &left = t_tiles[a], &right = t_tiles[b];
  must(c != a && c != b && a != b);
  must(sums.rows == left.rows && left.words == right.rows && right.words == sums.words && sums.rows > 0);
  const unsigned before = _mm_getcsr();
  _mm_setcsr(0x9fc0); /* subnormal numbers are 0, going in and coming out; nothing is raised */
  tile_sums(&t_tiles[c], &left, &right);
  _mm_setcsr(before);
}

NMF_INLINE void tile_release() {
  for (int i = 0; i < 8; ++i) t_tiles[i].rows = t_tiles[i].words = 0;
}

}  // namespace
#endif
