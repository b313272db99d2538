#define NMF_LANES 8
#include "matmul_impl.h"

const nmf_kernel *nmf_gather_avx2(void) { return &gather_kernel; }
const nmf_kernel *nmf_tokens_avx2(void) { return &tokens_kernel; }
