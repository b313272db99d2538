#include "matmul_impl.h"
#include "panel_impl.h"

const nmf_kernel *nmf_gather_portable(void) { return &gather_kernel; }
const nmf_kernel *nmf_tokens_portable(void) { return &tokens_kernel; }
const nmf_kernel *nmf_panel_portable(void) { return &panel_kernel; }
