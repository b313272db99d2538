#include "input_grad_impl.h"
#include "pack_impl.h"
#include "tokens_grad_impl.h"

const nmf_stepper nmf_steps_avx2 = {pack, sort, input_grad, any_weight_grad, false};
