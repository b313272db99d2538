#include "decode.h"
#include "dot_floats_impl.h"

const nmf_kernel *nmf_int8_dot_floats_avx2(bool many) { return many ? &many_floats : &few_floats; }
