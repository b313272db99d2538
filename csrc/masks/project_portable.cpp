#include "project_impl.h"

const nmf_projector *nmf_projector_portable(void) { return &projector; }
