#include "avx512.h"

#include "matmul_impl.h"
#include "panel_impl.h"

const nmf_kernel *nmf_gather_avx512(void) { return &gather_kernel; }
const nmf_kernel *nmf_tokens_avx512(void) { return &tokens_kernel; }
const nmf_kernel *nmf_panel_avx512(void) { return &panel_kernel; }
