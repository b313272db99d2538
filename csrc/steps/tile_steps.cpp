/* Training on kept places in bfloat16: what is checked before it runs, and how it is shared out to threads. */
#include "tile_steps.h"

#include <atomic>

#include "scratch.h"
#include "send.h"

namespace {

thread_local Scratch t_scratch, t_turned;

/* The kernels of the tiles in use, or null. */
const nmf_tile_stepper *stepper_now() {
#if defined(NMFLOW_TILES_BUILT)
  const int isa = nmf_isa();
  if (isa == NMFLOW_AMX) return nmf_emulates() ? &nmf_tile_steps_emulated : &nmf_tile_steps_amx;
  if (isa == NMFLOW_AVX512 && (nmflow_cpu_features() & 4)) return &nmf_tile_steps_vectors;
#endif
  return nullptr;
}

struct Run {
  nmf_tile_stepping job;
  const nmf_tile_stepper *kernels;
  int64_t chunk, bytes; /* tiles of a task, and its scratch */
  std::atomic<bool> failed;
};

int32_t check(const nmflow_shape *shape, nmf_geometry *g) {
  const int status = nmf_geometry_of(shape, g);
  if (status != NMFLOW_OK) return status;
  return g->dtype == NMFLOW_BF16 && g->panels && stepper_now() != nullptr ? NMFLOW_OK : NMFLOW_NO_KERNEL;
}

int32_t check(const nmflow_packed *packed, int64_t tokens, Run *run) {
  if (packed == nullptr) return NMFLOW_BAD_POINTER;
  nmf_geometry &g = run->job.g;
  const int status = check(&packed->shape, &g);
  if (status != NMFLOW_OK) return status;
  if (packed->codes_bytes != g.codes_bytes) return NMFLOW_BAD_BYTES;
  if (packed->codes == nullptr) return NMFLOW_BAD_POINTER;
  const int64_t limit = INT64_C(1) << 56;
  if (tokens < 0 || tokens > limit / g.in || tokens > limit / g.out) return NMFLOW_BAD_SHAPE;
  run->job.codes = packed->codes;
  run->job.tokens = tokens;
  run->kernels = stepper_now();
  run->failed.store(false);
  return NMFLOW_OK;
}

char *room(Run *run) {
  char *scratch = t_scratch.at_least(run->bytes);
  if (scratch == nullptr) run->failed.store(true, std::memory_order_relaxed);
  return scratch;
}

void turn_task(void *context, int64_t task) {
  const Run *run = static_cast<Run *>(context);
  run->kernels->turn(&run->job, task);
}

void input_grad_task(void *context, int64_t task) {
  Run *run = static_cast<Run *>(context);
  char *scratch = room(run);
  if (scratch != nullptr) run->kernels->input_grad(&run->job, task, scratch);
}

void weight_grad_task(void *context, int64_t task) {
  Run *run = static_cast<Run *>(context);
  char *scratch = room(run);
  const int64_t tile = task * run->chunk, end = nmf_min(tile + run->chunk, run->job.g.tiles);
  if (scratch != nullptr) run->kernels->weight_grad(&run->job, tile, end, scratch);
}

}  // namespace

int32_t nmflow_bf16_trains(const nmflow_shape *shape) {
  nmf_geometry g;
  return check(shape, &g);
}

int32_t nmflow_bf16_input_grad(const nmflow_packed *packed, const void *dy, void *dx, int64_t tokens,
                               int32_t threads) {
  Run run;
  run.job = {};
  const int status = check(packed, tokens, &run);
  if (status != NMFLOW_OK || tokens == 0) return status;
  const nmf_geometry &g = run.job.g;
  if (packed->values_bytes != g.values_bytes) return NMFLOW_BAD_BYTES;
  if (packed->values == nullptr || dy == nullptr || dx == nullptr) return NMFLOW_BAD_POINTER;
  threads = threads < 1 ? 1 : threads;
  run.job.values = static_cast<const uint16_t *>(packed->values);
  run.job.dy = static_cast<const uint16_t *>(dy);
  run.job.dx = static_cast<uint16_t *>(dx);
  run.job.turned = t_turned.at_least(run.kernels->turned_bytes(&g));
  if (run.job.turned == nullptr) return NMFLOW_NO_MEMORY;
  run.bytes = run.kernels->input_grad_bytes(&g);
  nmf_parallel(g.panels, threads, turn_task, &run);
  nmf_parallel(nmf_ceil_div(tokens, NMF_TILE_TOKENS), threads, input_grad_task, &run);
  return run.failed.load() ? NMFLOW_NO_MEMORY : NMFLOW_OK;
}

int32_t nmflow_bf16_weight_grad(const nmflow_packed *packed, const void *x, const void *dy, float *dw,
                                float *bias, int64_t tokens, int32_t threads) {
  Run run;
  run.job = {};
  const int status = check(packed, tokens, &run);
  if (status != NMFLOW_OK) return status;
  const nmf_geometry &g = run.job.g;
  if (dw == nullptr || (tokens > 0 && (x == nullptr || dy == nullptr))) return NMFLOW_BAD_POINTER;
  run.job.x = static_cast<const uint16_t *>(x);
  run.job.dy = static_cast<const uint16_t *>(dy);
  run.job.dw = dw;
  run.job.bias = bias;
  run.job.past = g.out * g.in * 4 >= NMF_PAST;
  /* Each thread turns x for its own tiles: the sums of a place have one order for any number. */
  threads = threads < 1 ? 1 : threads;
  const int64_t step = g.panel / 16;
  run.chunk = nmf_ceil_div(nmf_ceil_div(g.tiles, threads), step) * step;
  run.bytes = run.kernels->weight_grad_bytes(&g, run.chunk);
  nmf_parallel(nmf_ceil_div(g.tiles, run.chunk), threads, weight_grad_task, &run);
  return run.failed.load() ? NMFLOW_NO_MEMORY : NMFLOW_OK;
}
