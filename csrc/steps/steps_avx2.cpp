#include "input_grad_impl.h"
#include "pack_impl.h"
#include "wide_grad_impl.h"

const nmf_stepper nmf_steps_avx2 = {pack, sort, input_grad, any_weight_grad};
