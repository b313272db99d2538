/* Both gradients of panels in bfloat16 on tiles, written once for all that tiles can be. */
#include "tile_input_grad_impl.h"
#include "tile_weight_grad_impl.h"

namespace {

const nmf_tile_stepper KERNELS = {turned_bytes, turn, input_grad_bytes, input_grad, weight_grad_bytes, weight_grad};

}  // namespace
