#include "emulated.h"

#include "tile_steps_impl.h"

const nmf_tile_stepper nmf_tile_steps_emulated = KERNELS;
