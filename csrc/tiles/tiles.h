/* What kernels on tiles share. They are written once, against six operations on the eight tiles, whose numbers
 * are literals:
 *
 *   tile_configure(config)        sizes of the tiles; the address of a TileConfig
 *   tile_zero(t)                  t = 0
 *   tile_load(t, from, stride)    rows of t, `stride` bytes apart
 *   tile_dot(c, a, b)             c[m][n] += sum_k a[m][2k] b[k][2n] + a[m][2k+1] b[k][2n+1]
 *   tile_store(t, to, stride)
 *   tile_release()
 *
 * a and b hold bfloat16, c float32. Sums are tiles 0 to 3, and operands 4 to 7. `amx.h` has them as instructions,
 * `vectors.h` by the vectors of AVX-512, and `emulated.h` in C++, to the bit, so that tests run on other machines what
 * AMX runs. A file includes one of the three, then a kernel. */
#ifndef NMFLOW_TILES_H
#define NMFLOW_TILES_H

#include "common.h"

namespace {

const int64_t TILE_BYTES = 1024;

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16]; /* of a row */
  uint8_t rows[16];
};

/* Eight tiles of 16 rows of 64 bytes. */
NMF_INLINE TileConfig whole_tiles() {
  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = 16;
  }
  return config;
}

}  // namespace
#endif
