/* Compiled with -mavx2 -mfma -mf16c: the same source, for 8 lanes. */
#include "project_impl.h"

const nmf_projector *nmf_projector_avx2(void) { return &projector; }
