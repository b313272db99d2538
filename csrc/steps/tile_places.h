/* What both gradients on tiles (tiles.h) share. All static, see common.h. */
#ifndef NMFLOW_TILE_PLACES_H
#define NMFLOW_TILE_PLACES_H

#include "entries.h"
#include "tile_steps.h"
#include "turn.h"

namespace {

typedef nmf_tile_stepping Job;
const int64_t LINE = 64;

int64_t rounded(int64_t bytes) { return nmf_ceil_div(bytes, LINE) * LINE; }

}  // namespace
#endif
