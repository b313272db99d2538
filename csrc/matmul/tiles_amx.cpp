#include "amx.h"

#include "tiles_impl.h"

const nmf_kernel *nmf_tiles_amx(void) { return &tiles_kernel; }
