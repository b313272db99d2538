#include "emulated.h"

#include "tile_steps_impl.h"

const nmf_tile_stepper nmf_tile_steps_emulated = {turned_bytes, turn, input_grad_bytes, input_grad, weight_grad_bytes, weight_grad};
