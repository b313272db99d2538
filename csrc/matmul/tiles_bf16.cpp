#include "vectors.h"

#include "tiles_impl.h"

const nmf_kernel *nmf_tiles_vectors(void) { return &tiles_kernel; }
