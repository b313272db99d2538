/* The tile operations as instructions (tiles.h). Compilers do not see which memory a load reads, so each is
 * told that it may be any: what was stored before it is in memory then. */
#ifndef NMFLOW_AMX_H
#define NMFLOW_AMX_H

#include <immintrin.h>

#include "tiles.h"

#define NMF_TILES_READ(instruction)       \
  do {                                    \
    __asm__ volatile("" ::: "memory");    \
    instruction;                          \
  } while (0)

#define tile_configure(config) NMF_TILES_READ(_tile_loadconfig(config))
#define tile_zero(t) _tile_zero(t)
#define tile_load(t, from, stride) NMF_TILES_READ(_tile_loadd(t, from, stride))
#define tile_dot(c, a, b) _tile_dpbf16ps(c, a, b)
#define tile_store(t, to, stride) NMF_TILES_READ(_tile_stored(t, to, stride))
#define tile_release() _tile_release()

#endif
