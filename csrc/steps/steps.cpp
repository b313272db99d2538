/* Training on kept places: what is checked before it runs, and how it is shared out to threads. */
#include "steps.h"

#include "run.h"

namespace {

typedef Run<nmf_stepping, nmf_stepper> Step;

thread_local Scratch t_sorted;

/* Bytes by which a kernel's scratch is longer than its parts, which begin on lines. */
const int64_t LINE = 64;

/* The kernels of the instruction set in use, or null. */
const nmf_stepper *stepper_now() {
#if defined(NMFLOW_X86)
  const int isa = nmf_isa();
  return isa >= NMFLOW_AVX512 ? &nmf_steps_avx512 : isa == NMFLOW_AVX2 ? &nmf_steps_avx2 : nullptr;
#else
  return nullptr;
#endif
}

int32_t check(const nmflow_shape *shape, nmf_geometry *g) {
  const int status = nmf_geometry_of(shape, g);
  if (status != NMFLOW_OK) return status;
  if (stepper_now() == nullptr || g->dtype != NMFLOW_F32) return NMFLOW_NO_KERNEL;
  /* Entries are counted in 32 bits, and so are places in a block of rows. */
  return g->tiles * 16 * g->entries > INT32_MAX / 2 ? NMFLOW_NO_KERNEL : NMFLOW_OK;
}

int32_t start(const nmflow_shape *shape, Step *run) {
  run->kernels = stepper_now();
  return check(shape, &run->job.g);
}

int64_t padded(int64_t count) { return nmf_ceil_div(count, 16) * 16; }

void pack_task(void *context, int64_t task) {
  Step *run = static_cast<Step *>(context);
  const nmf_geometry &g = run->job.g;
  char *scratch = run->room();
  if (scratch == nullptr) return;
  const int64_t panels = nmf_ceil_div(g.out, g.panel), from = task * run->chunk;
  if (!run->kernels->pack(&run->job, from, nmf_min(from + run->chunk, panels), scratch))
    run->not_kept.store(true, std::memory_order_relaxed);
}

void sort_task(void *context, int64_t task) {
  const Step *run = static_cast<Step *>(context);
  run->kernels->sort(&run->job, task);
}

}  // namespace

int32_t nmflow_trains(const nmflow_shape *shape) {
  nmf_geometry g;
  return check(shape, &g);
}

int32_t nmflow_pack(const nmflow_shape *shape, const float *w, const uint64_t *kept, float *values,
                    int64_t values_bytes, void *codes, int64_t codes_bytes, int32_t threads) {
  Step run;
  const int status = start(shape, &run);
  if (status != NMFLOW_OK) return status;
  const nmf_geometry &g = run.job.g;
  if (values_bytes != g.values_bytes || codes_bytes != g.codes_bytes) return NMFLOW_BAD_BYTES;
  if (w == nullptr || values == nullptr || codes == nullptr) return NMFLOW_BAD_POINTER;
  if (g.out % 16) { /* lanes of the last tile that no row fills */
    const int64_t last = g.tiles - 1;
    memset(values + last * g.entries * 16, 0, static_cast<size_t>(g.entries) * 64);
    if (!g.panels)
      memset(static_cast<uint32_t *>(codes) + last * g.words * 16, 0, static_cast<size_t>(g.words) * 64);
  }
  run.job.w = w;
  run.job.kept = kept;
  run.job.to_values = values;
  run.job.to_codes = codes;
  run.bytes = padded(g.entries) * 4 + padded(g.in) / 16 * 2 + 64 + LINE;
  const int64_t panels = nmf_ceil_div(g.out, g.panel);
  run.chunk = nmf_ceil_div(64, g.panel);
  nmf_parallel(nmf_ceil_div(panels, run.chunk), threads < 1 ? 1 : threads, pack_task, &run);
  return run.result();
}

int32_t nmflow_input_grad(const nmflow_packed *packed, const float *dy, float *dx, int64_t tokens,
                          int32_t threads) {
  if (packed == nullptr) return NMFLOW_BAD_POINTER;
  Step run;
  int status = start(&packed->shape, &run);
  if (status == NMFLOW_OK) status = check_packed(*packed, tokens, &run);
  if (status != NMFLOW_OK || tokens == 0) return status;
  status = check_input_grad<float>(*packed, dy, dx, &run);
  if (status != NMFLOW_OK) return status;
  const nmf_geometry &g = run.job.g;
  threads = threads < 1 ? 1 : threads;
  run.bytes = (padded(g.in) + padded(g.panels ? g.panel : NMF_ROW_BLOCK)) * NMF_TOKEN_BLOCK * 4 + LINE;
  if (!g.panels) {
    const int64_t blocks = nmf_ceil_div(g.out, NMF_ROW_BLOCK);
    const int64_t starts = nmf_ceil_div(blocks * (g.in + 1) * 4, 64) * 64;
    const int64_t entries = g.tiles * 16 * g.entries * static_cast<int64_t>(sizeof(nmf_entry));
    char *sorted = t_sorted.at_least(starts + entries);
    if (sorted == nullptr) return NMFLOW_NO_MEMORY;
    run.job.starts = reinterpret_cast<int32_t *>(sorted);
    run.job.entries = reinterpret_cast<nmf_entry *>(sorted + starts);
    nmf_parallel(blocks, threads, sort_task, &run);
  }
  nmf_parallel(nmf_ceil_div(tokens, NMF_TOKEN_BLOCK), threads, input_grad_task<Step>, &run);
  return run.result();
}

int32_t nmflow_weight_grad(const nmflow_packed *packed, const float *x, const float *dy, float *dw,
                           float *bias, int64_t tokens, int32_t threads) {
  if (packed == nullptr) return NMFLOW_BAD_POINTER;
  Step run;
  threads = threads < 1 ? 1 : threads;
  int status = start(&packed->shape, &run);
  if (status == NMFLOW_OK) status = check_packed(*packed, tokens, &run);
  if (status == NMFLOW_OK) status = check_weight_grad<float>(x, dy, dw, bias, threads, &run);
  if (status != NMFLOW_OK) return status;
  const nmf_geometry &g = run.job.g;
  /* Rows with codes of their own that reach over more than a register: spans of M > 16 inputs, or all. */
  const bool lanes = run.job.token_lanes = !g.panels && (g.bits == 8 || !run.kernels->picks);
  const int64_t inputs =
      g.panels || lanes ? padded(g.in) * NMF_TOKEN_BLOCK : g.spans * nmf_tokens_of(&run.job) * 16;
  const int64_t rows = (g.panels ? g.panel : lanes ? 32 : 16) * NMF_TOKEN_BLOCK;
  /* Sums and a bias; columns of one row, or of all where the sums are row by row. */
  const int64_t places = lanes ? run.chunk * (2 * padded(g.entries) + 1) * 16
                              : run.chunk * (g.entries + 1) * 16 + padded(g.entries);
  run.bytes = (places + inputs + rows + padded(g.in)) * 4 + LINE;
  nmf_parallel(nmf_ceil_div(g.tiles, run.chunk), threads, weight_grad_task<Step>, &run);
  return run.result();
}
