/* nmflow_project: what is checked before it runs, and how it is shared out to threads. */
#include <atomic>
#include <new>

#include "project.h"
#include "scratch.h"

namespace {

thread_local Scratch t_scratch;

struct Run {
  nmf_projection job;
  const nmf_projector *projector;
  int64_t units, chunk, scratch;
  std::atomic<bool> not_finite, failed;
};

void run_task(void *context, int64_t task) {
  Run *run = static_cast<Run *>(context);
  if (run->not_finite.load(std::memory_order_relaxed)) return;
  char *scratch = t_scratch.at_least(run->scratch);
  if (scratch == nullptr) {
    run->failed.store(true);
    return;
  }
  const int64_t first = task * run->chunk, last = nmf_min(first + run->chunk, run->units);
  if (!run->projector->run(&run->job, first, last, scratch))
    run->not_finite.store(true, std::memory_order_relaxed);
  t_scratch.give_back(INT64_C(4) << 20);
}

const nmf_projector *projector_now() {
  switch (nmf_isa()) {
#if defined(NMFLOW_X86)
    case NMFLOW_AMX:
    case NMFLOW_AVX512:
      return nmf_projector_avx512();
    case NMFLOW_AVX2:
      return nmf_projector_avx2();
#endif
    default:
      return nmf_projector_portable();
  }
}

}  // namespace

int32_t nmflow_project(const void *w, int32_t dtype, int64_t outer, int64_t length, int64_t inner,
                       int64_t n, int64_t m, int64_t panel, double delta, const void *values,
                       double pull, void *dense, uint8_t *mask, void *out, int32_t threads) {
  if (dtype < NMFLOW_F32 || dtype > NMFLOW_F16) return NMFLOW_BAD_DTYPE;
  if (n < 1 || m < n || m > (INT64_C(1) << 31) || panel < 1) return NMFLOW_BAD_PATTERN;
  int64_t row, total;
  if (outer < 0 || length < 0 || inner < 0 || length % m ||
      __builtin_mul_overflow(length, inner, &row) || __builtin_mul_overflow(outer, row, &total) ||
      total > (INT64_C(1) << 60))
    return NMFLOW_BAD_SHAPE;
  if (total == 0) return NMFLOW_OK;
  if (w == nullptr) return NMFLOW_BAD_POINTER;
  Run run;
  run.job = {w, values == nullptr ? w : values, dense, out, mask, outer, length, inner, n, m, panel,
             static_cast<float>(delta), static_cast<float>(pull), dtype};
  if (panel > outer) run.job.panel = outer;
  if (n == m) { /* everything is kept: how the groups lie does not matter */
    run.job.length = row;
    run.job.inner = run.job.panel = 1;
  }
  run.projector = projector_now();
  run.units = nmf_projection_units(&run.job);
  run.scratch = run.projector->scratch(&run.job);
  run.not_finite.store(false);
  run.failed.store(false);
  if (threads < 1) threads = 1;
  /* Tasks of about 32k elements: small enough to share out, large enough not to be felt. A
   * multiple of 64 groups keeps vectors off the borders, unless the threads would starve. */
  run.chunk = nmf_ceil_div(32768, nmf_projection_unit(&run.job));
  if (run.job.inner == 1 && run.job.panel == 1) run.chunk = (run.chunk + 63) / 64 * 64;
  const int64_t fair = nmf_ceil_div(run.units, 2 * static_cast<int64_t>(threads));
  if (threads > 1 && run.chunk > fair) run.chunk = (fair + 15) / 16 * 16;
  nmf_parallel(nmf_ceil_div(run.units, run.chunk), threads, run_task, &run);
  if (run.failed.load()) return NMFLOW_NO_MEMORY;
  return run.not_finite.load() ? NMFLOW_NOT_FINITE : NMFLOW_OK;
}
