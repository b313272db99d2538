/* nmflow_hold: what is checked before it runs, and how it is shared out to threads. */
#include "hold.h"
#include "send.h"

#include <atomic>

namespace {

struct Run {
  nmf_holding job;
  nmf_holder holder;
  int64_t chunk;
  std::atomic<bool> not_finite;
};

void run_task(void *context, int64_t task) {
  Run *run = static_cast<Run *>(context);
  const int64_t first = task * run->chunk, last = nmf_min(first + run->chunk, run->job.rows);
  if (!run->holder(&run->job, first, last))
    run->not_finite.store(true, std::memory_order_relaxed);
}

nmf_holder holder_now() {
  switch (nmf_isa()) {
#if defined(NMFLOW_X86)
    case NMFLOW_AMX:
    case NMFLOW_AVX512:
      return nmf_hold_avx512;
    case NMFLOW_AVX2:
      return nmf_hold_avx2;
#endif
    default:
      return nmf_hold_portable;
  }
}

int32_t run_all(Run *run, int32_t threads) {
  run->holder = holder_now();
  run->not_finite.store(false);
  nmf_parallel(nmf_ceil_div(run->job.rows, run->chunk), threads < 1 ? 1 : threads, run_task, run);
  return run->not_finite.load() ? NMFLOW_NOT_FINITE : NMFLOW_OK;
}

}  // namespace

int32_t nmflow_hold(const void *w, int32_t dtype, int64_t rows, int64_t cols, const uint8_t *mask,
                    double delta, const void *values, double pull, void *out, const int64_t *odd,
                    int64_t *prints, int32_t threads) {
  if (dtype < NMFLOW_F32 || dtype > NMFLOW_F16) return NMFLOW_BAD_DTYPE;
  int64_t total;
  if (rows < 0 || cols < 0 || __builtin_mul_overflow(rows, cols, &total) ||
      total > (INT64_C(1) << 60))
    return NMFLOW_BAD_SHAPE;
  if (total == 0) return NMFLOW_OK;
  if (w == nullptr || mask == nullptr || out == nullptr || (odd == nullptr) != (prints == nullptr))
    return NMFLOW_BAD_POINTER;
  Run run;
  const int64_t size = dtype == NMFLOW_F32 ? 4 : 2;
  run.job = {w, values == nullptr ? w : values, mask, out, odd, prints, rows, cols, total,
             static_cast<float>(delta), static_cast<float>(pull), dtype, false};
  run.job.past = total * size >= NMF_PAST && out != w && out != values;
  if (prints == nullptr) { /* nobody asks where a row ends */
    run.job.cols = nmf_min(total, INT64_C(32768));
    run.job.rows = nmf_ceil_div(total, run.job.cols);
  }
  run.chunk = nmf_ceil_div(32768, run.job.cols);
  return run_all(&run, threads);
}

int32_t nmflow_prints(const void *data, int64_t rows, int64_t row_bytes, const int64_t *odd,
                      int64_t *prints, int32_t threads) {
  int64_t total;
  if (rows < 0 || row_bytes < 0 || row_bytes % 2 || __builtin_mul_overflow(rows, row_bytes, &total))
    return NMFLOW_BAD_SHAPE;
  if (total == 0) return NMFLOW_OK;
  if (data == nullptr || odd == nullptr || prints == nullptr) return NMFLOW_BAD_POINTER;
  Run run;
  run.job = {data, nullptr, nullptr, nullptr, odd, prints, rows, row_bytes, total, 0, 0, NMF_BYTES, false};
  run.chunk = nmf_ceil_div(131072, row_bytes);
  return run_all(&run, threads);
}
