/* A call of training on kept places: its job and kernels, what is checked of both gradients, and the tasks that threads
 * share. All static, see common.h. */
#ifndef NMFLOW_STEPS_RUN_H
#define NMFLOW_STEPS_RUN_H

#include <atomic>

#include "common.h"
#include "scratch.h"
#include "send.h"

namespace {

thread_local Scratch t_scratch;

template <class JOB, class KERNELS>
struct Run {
  JOB job = {};
  const KERNELS *kernels = nullptr;
  int64_t chunk = 0, bytes = 0; /* panels, tiles or rows of a task, and its scratch */
  std::atomic<bool> failed{false}, not_kept{false};

  char *room() {
    char *scratch = t_scratch.at_least(bytes);
    if (scratch == nullptr) failed.store(true, std::memory_order_relaxed);
    return scratch;
  }
  int32_t result() const { return failed.load() ? NMFLOW_NO_MEMORY : not_kept.load() ? NMFLOW_NOT_KEPT : NMFLOW_OK; }
};

/* A packed weight whose shape was checked, and tokens. */
template <class RUN>
int32_t check_packed(const nmflow_packed &packed, int64_t tokens, RUN *run) {
  const nmf_geometry &g = run->job.g;
  if (packed.codes_bytes != g.codes_bytes) return NMFLOW_BAD_BYTES;
  if (packed.codes == nullptr) return NMFLOW_BAD_POINTER;
  const int64_t limit = INT64_C(1) << 56;
  if (tokens < 0 || tokens > limit / g.in || tokens > limit / g.out) return NMFLOW_BAD_SHAPE;
  run->job.codes = packed.codes;
  run->job.tokens = tokens;
  return NMFLOW_OK;
}

/* What the gradient of x reads and writes. */
template <class T, class RUN>
int32_t check_input_grad(const nmflow_packed &packed, const void *dy, void *dx, RUN *run) {
  if (packed.values_bytes != run->job.g.values_bytes) return NMFLOW_BAD_BYTES;
  if (packed.values == nullptr || dy == nullptr || dx == nullptr) return NMFLOW_BAD_POINTER;
  run->job.values = static_cast<const T *>(packed.values);
  run->job.dy = static_cast<const T *>(dy);
  run->job.dx = static_cast<T *>(dx);
  return NMFLOW_OK;
}

/* What the gradient of W reads and writes, and the tiles of a task, whole panels. Each thread lays out x for its own
 * tiles: the sums of a place have one order for any number of threads. */
template <class T, class RUN>
int32_t check_weight_grad(const void *x, const void *dy, float *dw, float *bias, int32_t threads, RUN *run) {
  if (dw == nullptr || (run->job.tokens > 0 && (x == nullptr || dy == nullptr))) return NMFLOW_BAD_POINTER;
  const nmf_geometry &g = run->job.g;
  run->job.x = static_cast<const T *>(x);
  run->job.dy = static_cast<const T *>(dy);
  run->job.dw = dw;
  run->job.bias = bias;
  run->job.past = g.out * g.in * 4 >= NMF_PAST;
  const int64_t step = g.panels ? g.panel / 16 : 1;
  run->chunk = nmf_ceil_div(nmf_ceil_div(g.tiles, threads), step) * step;
  return NMFLOW_OK;
}

template <class RUN>
void input_grad_task(void *context, int64_t task) {
  RUN *run = static_cast<RUN *>(context);
  char *scratch = run->room();
  if (scratch != nullptr) run->kernels->input_grad(&run->job, task, scratch);
}

template <class RUN>
void weight_grad_task(void *context, int64_t task) {
  RUN *run = static_cast<RUN *>(context);
  char *scratch = run->room();
  const int64_t tile = task * run->chunk, end = nmf_min(tile + run->chunk, run->job.g.tiles);
  if (scratch != nullptr) run->kernels->weight_grad(&run->job, tile, end, scratch);
}

}  // namespace
#endif
