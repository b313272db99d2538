/* nmflow_take and nmflow_put: what is checked before they run, and how they are shared out to threads. */
#include "gather.h"

#include <atomic>

#include "scratch.h"
#include "send.h"

namespace {

thread_local Scratch t_scratch;

struct Run {
  nmf_gathering job;
  nmf_gatherer gatherer;
  int64_t chunk; /* rows of a task */
  std::atomic<bool> failed, not_kept, not_finite;
};

void run_task(void *context, int64_t task) {
  Run *run = static_cast<Run *>(context);
  char *scratch = t_scratch.at_least(run->job.cols * 4 + 64);
  if (scratch == nullptr) return run->failed.store(true, std::memory_order_relaxed);
  const int64_t row = task * run->chunk;
  const int32_t said = run->gatherer(&run->job, row, nmf_min(row + run->chunk, run->job.rows), scratch);
  if (said == NMFLOW_NOT_KEPT) run->not_kept.store(true, std::memory_order_relaxed);
  if (said == NMFLOW_NOT_FINITE) run->not_finite.store(true, std::memory_order_relaxed);
}

/* The one of three that serves this machine. */
nmf_gatherer of_isa(nmf_gatherer portable, nmf_gatherer avx2, nmf_gatherer avx512) {
  const int isa = nmf_isa();
  return isa >= NMFLOW_AVX512 ? avx512 : isa == NMFLOW_AVX2 ? avx2 : portable;
}

int32_t run_all(Run *run, int threads) {
  nmf_gathering &job = run->job;
  int64_t total;
  if (job.rows < 0 || job.cols < 0 || __builtin_mul_overflow(job.rows, job.cols, &total) ||
      total > (INT64_C(1) << 56))
    return NMFLOW_BAD_SHAPE;
  if (total == 0) return NMFLOW_OK;
  if (job.bits == nullptr || job.starts == nullptr || job.together == nullptr || job.apart == nullptr ||
      (job.odd == nullptr) != (job.prints == nullptr))
    return NMFLOW_BAD_POINTER;
  for (int64_t r = 0; r < job.rows; ++r)
    if (job.starts[r + 1] < job.starts[r] || job.starts[r + 1] - job.starts[r] > job.cols)
      return NMFLOW_BAD_SHAPE;
  job.words = nmf_ceil_div(job.cols, 64);
  if (job.cols % 64) /* a bit past the last column would be read as one */
    for (int64_t r = 0; r < job.rows; ++r)
      if (job.bits[(r + 1) * job.words - 1] >> (job.cols % 64)) return NMFLOW_NOT_KEPT;
  run->failed.store(false);
  run->not_kept.store(false);
  run->not_finite.store(false);
  run->chunk = nmf_ceil_div(32768, job.cols);
  nmf_parallel(nmf_ceil_div(job.rows, run->chunk), threads < 1 ? 1 : threads, run_task, run);
  if (run->failed.load()) return NMFLOW_NO_MEMORY;
  return run->not_kept.load() ? NMFLOW_NOT_KEPT : run->not_finite.load() ? NMFLOW_NOT_FINITE : NMFLOW_OK;
}

}  // namespace

#if !defined(NMFLOW_X86)
#define nmf_take_avx2 nmf_take_portable
#define nmf_take_avx512 nmf_take_portable
#define nmf_put_avx2 nmf_put_portable
#define nmf_put_avx512 nmf_put_portable
#endif

int32_t nmflow_take(const float *apart, const uint64_t *bits, const int64_t *starts, int64_t rows,
                    int64_t cols, float *together, int32_t threads) {
  Run run;
  run.job = {bits, starts, rows, cols, 0, together, const_cast<float *>(apart), nullptr, nullptr, false};
  run.gatherer = of_isa(nmf_take_portable, nmf_take_avx2, nmf_take_avx512);
  return run_all(&run, threads);
}

int32_t nmflow_put(const float *together, const uint64_t *bits, const int64_t *starts, int64_t rows,
                   int64_t cols, float *apart, const int64_t *odd, int64_t *prints, int32_t threads) {
  Run run;
  run.job = {bits, starts, rows, cols, 0, const_cast<float *>(together), apart, odd, prints, false};
  run.job.past = rows * cols * 4 >= NMF_PAST;
  run.gatherer = of_isa(nmf_put_portable, nmf_put_avx2, nmf_put_avx512);
  return run_all(&run, threads);
}
