/* Training on kept places in bfloat16: what is checked before it runs, and how it is shared out to threads. */
#include "tile_steps.h"

#include "run.h"

namespace {

typedef Run<nmf_tile_stepping, nmf_tile_stepper> Step;

thread_local Scratch t_turned;

/* The kernels of the tiles in use, or null. */
const nmf_tile_stepper *stepper_now() {
#if defined(NMFLOW_TILES_BUILT)
  const int isa = nmf_isa();
  if (isa == NMFLOW_AMX) return nmf_emulates() ? &nmf_tile_steps_emulated : &nmf_tile_steps_amx;
  if (isa == NMFLOW_AVX512 && (nmflow_cpu_features() & 4)) return &nmf_tile_steps_vectors;
#endif
  return nullptr;
}

int32_t check(const nmflow_shape *shape, nmf_geometry *g) {
  const int status = nmf_geometry_of(shape, g);
  if (status != NMFLOW_OK) return status;
  return g->dtype == NMFLOW_BF16 && g->panels && stepper_now() != nullptr ? NMFLOW_OK : NMFLOW_NO_KERNEL;
}

int32_t start(const nmflow_packed *packed, int64_t tokens, Step *run) {
  if (packed == nullptr) return NMFLOW_BAD_POINTER;
  run->kernels = stepper_now();
  const int status = check(&packed->shape, &run->job.g);
  return status == NMFLOW_OK ? check_packed(*packed, tokens, run) : status;
}

void turn_task(void *context, int64_t task) {
  const Step *run = static_cast<Step *>(context);
  run->kernels->turn(&run->job, task);
}

}  // namespace

int32_t nmflow_bf16_trains(const nmflow_shape *shape) {
  nmf_geometry g;
  return check(shape, &g);
}

int32_t nmflow_bf16_input_grad(const nmflow_packed *packed, const void *dy, void *dx, int64_t tokens,
                               int32_t threads) {
  Step run;
  int status = start(packed, tokens, &run);
  if (status != NMFLOW_OK || tokens == 0) return status;
  status = check_input_grad<uint16_t>(*packed, dy, dx, &run);
  if (status != NMFLOW_OK) return status;
  const nmf_geometry &g = run.job.g;
  threads = threads < 1 ? 1 : threads;
  run.job.turned = t_turned.at_least(run.kernels->turned_bytes(&g));
  if (run.job.turned == nullptr) return NMFLOW_NO_MEMORY;
  run.bytes = run.kernels->input_grad_bytes(&g);
  nmf_parallel(g.panels, threads, turn_task, &run);
  nmf_parallel(nmf_ceil_div(tokens, NMF_TILE_TOKENS), threads, input_grad_task<Step>, &run);
  return run.result();
}

int32_t nmflow_bf16_weight_grad(const nmflow_packed *packed, const void *x, const void *dy, float *dw,
                                float *bias, int64_t tokens, int32_t threads) {
  Step run;
  threads = threads < 1 ? 1 : threads;
  int status = start(packed, tokens, &run);
  if (status == NMFLOW_OK) status = check_weight_grad<uint16_t>(x, dy, dw, bias, threads, &run);
  if (status != NMFLOW_OK) return status;
  run.bytes = run.kernels->weight_grad_bytes(&run.job.g, run.chunk);
  nmf_parallel(nmf_ceil_div(run.job.g.tiles, run.chunk), threads, weight_grad_task<Step>, &run);
  return run.result();
}
