#include "project_impl.h"

const nmf_projector *nmf_projector_avx512(void) { return &projector; }
