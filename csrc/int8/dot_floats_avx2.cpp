#include "decode.h"

#define FLOATS_KERNEL(MANY) ((MANY) ? nmf_tokens_avx2() : nmf_gather_avx2())
#include "dot_floats_impl.h"

const nmf_kernel *nmf_int8_dot_floats_avx2(bool many) { return many ? &many_floats : &few_floats; }
