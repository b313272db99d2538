#include "emulated.h"

#include "tiles_impl.h"

const nmf_kernel *nmf_tiles_emulated(void) { return &tiles_kernel; }
