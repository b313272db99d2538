/* Training on kept places: what is checked before it runs, and how it is shared out to threads. */
#include "steps.h"

#include <atomic>

#include "scratch.h"
#include "send.h"

namespace {

thread_local Scratch t_scratch, t_sorted;

/* The kernels of the instruction set in use, or null. */
const nmf_stepper *stepper_now() {
#if defined(NMFLOW_X86)
  const int isa = nmf_isa();
  return isa >= NMFLOW_AVX512 ? &nmf_steps_avx512 : isa == NMFLOW_AVX2 ? &nmf_steps_avx2 : nullptr;
#else
  return nullptr;
#endif
}

struct Run {
  nmf_stepping job;
  const nmf_stepper *kernels;
  int64_t chunk, bytes; /* panels, tiles or rows of a task, and its scratch */
  std::atomic<bool> failed, not_kept;
};

char *room(Run *run) {
  char *scratch = t_scratch.at_least(run->bytes + 64);
  if (scratch == nullptr) run->failed.store(true, std::memory_order_relaxed);
  return scratch;
}

int32_t result_of(const Run &run) {
  return run.failed.load() ? NMFLOW_NO_MEMORY : run.not_kept.load() ? NMFLOW_NOT_KEPT : NMFLOW_OK;
}

int32_t check(const nmflow_shape *shape, nmf_geometry *g) {
  const int status = nmf_geometry_of(shape, g);
  if (status != NMFLOW_OK) return status;
  if (stepper_now() == nullptr || g->dtype != NMFLOW_F32) return NMFLOW_NO_KERNEL;
  /* Entries are counted in 32 bits, and so are places in a block of rows. */
  return g->tiles * 16 * g->entries > INT32_MAX / 2 ? NMFLOW_NO_KERNEL : NMFLOW_OK;
}

void start(Run *run) {
  run->kernels = stepper_now();
  run->failed.store(false);
  run->not_kept.store(false);
}

int64_t padded(int64_t count) { return nmf_ceil_div(count, 16) * 16; }

int32_t check(const nmflow_packed *packed, int64_t tokens, Run *run) {
  if (packed == nullptr) return NMFLOW_BAD_POINTER;
  nmf_geometry &g = run->job.g;
  const int status = check(&packed->shape, &g);
  if (status != NMFLOW_OK) return status;
  if (packed->codes_bytes != g.codes_bytes) return NMFLOW_BAD_BYTES;
  if (packed->codes == nullptr) return NMFLOW_BAD_POINTER;
  const int64_t limit = INT64_C(1) << 56;
  if (tokens < 0 || tokens > limit / g.in || tokens > limit / g.out) return NMFLOW_BAD_SHAPE;
  run->job.codes = const_cast<void *>(packed->codes);
  run->job.tokens = tokens;
  start(run);
  return NMFLOW_OK;
}

void pack_task(void *context, int64_t task) {
  Run *run = static_cast<Run *>(context);
  const nmf_geometry &g = run->job.g;
  char *scratch = room(run);
  if (scratch == nullptr) return;
  const int64_t panels = nmf_ceil_div(g.out, g.panel), from = task * run->chunk;
  if (!run->kernels->pack(&run->job, from, nmf_min(from + run->chunk, panels), scratch))
    run->not_kept.store(true, std::memory_order_relaxed);
}

void sort_task(void *context, int64_t task) {
  const Run *run = static_cast<Run *>(context);
  run->kernels->sort(&run->job, task);
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
  const auto kernel = nmf_wide(&run->job.g) ? run->kernels->wide_weight_grad : run->kernels->weight_grad;
  if (scratch != nullptr) kernel(&run->job, tile, end, scratch);
}

}  // namespace

int32_t nmflow_trains(const nmflow_shape *shape) {
  nmf_geometry g;
  return check(shape, &g);
}

int32_t nmflow_pack(const nmflow_shape *shape, const float *w, const uint64_t *kept, float *values,
                    int64_t values_bytes, void *codes, int64_t codes_bytes, int32_t threads) {
  Run run;
  run.job = {};
  nmf_geometry &g = run.job.g;
  const int status = check(shape, &g);
  if (status != NMFLOW_OK) return status;
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
  run.job.values = values;
  run.job.codes = codes;
  start(&run);
  run.bytes = padded(g.entries) * 4 + padded(g.in) / 16 * 2 + 64;
  const int64_t panels = nmf_ceil_div(g.out, g.panel);
  run.chunk = nmf_ceil_div(64, g.panel);
  nmf_parallel(nmf_ceil_div(panels, run.chunk), threads < 1 ? 1 : threads, pack_task, &run);
  return result_of(run);
}

int32_t nmflow_input_grad(const nmflow_packed *packed, const float *dy, float *dx, int64_t tokens,
                          int32_t threads) {
  Run run;
  run.job = {};
  const int status = check(packed, tokens, &run);
  if (status != NMFLOW_OK || tokens == 0) return status;
  const nmf_geometry &g = run.job.g;
  if (packed->values_bytes != g.values_bytes) return NMFLOW_BAD_BYTES;
  if (packed->values == nullptr || dy == nullptr || dx == nullptr) return NMFLOW_BAD_POINTER;
  threads = threads < 1 ? 1 : threads;
  run.job.values = static_cast<float *>(const_cast<void *>(packed->values));
  run.job.dy = dy;
  run.job.dx = dx;
  run.bytes = (padded(g.in) + padded(g.panels ? g.panel : NMF_ROW_BLOCK)) * NMF_TOKEN_BLOCK * 4;
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
  nmf_parallel(nmf_ceil_div(tokens, NMF_TOKEN_BLOCK), threads, input_grad_task, &run);
  return result_of(run);
}

int32_t nmflow_weight_grad(const nmflow_packed *packed, const float *x, const float *dy, float *dw,
                           float *bias, int64_t tokens, int32_t threads) {
  Run run;
  run.job = {};
  const int status = check(packed, tokens, &run);
  if (status != NMFLOW_OK) return status;
  const nmf_geometry &g = run.job.g;
  if (dw == nullptr || (tokens > 0 && (x == nullptr || dy == nullptr))) return NMFLOW_BAD_POINTER;
  run.job.x = x;
  run.job.dy = dy;
  run.job.dw = dw;
  run.job.bias = bias;
  run.job.past = g.out * g.in * 4 >= NMF_PAST;
  /* Each thread packs x for its own tiles: the sums of a place have one order for any number. */
  threads = threads < 1 ? 1 : threads;
  const int64_t step = g.panels ? g.panel / 16 : 1;
  run.chunk = nmf_ceil_div(nmf_ceil_div(g.tiles, threads), step) * step;
  const bool wide = nmf_wide(&g);
  const int64_t inputs =
      g.panels || wide ? padded(g.in) * NMF_TOKEN_BLOCK : g.spans * nmf_tokens_of(&g) * 16;
  const int64_t rows = (g.panels ? g.panel : wide ? 32 : 16) * NMF_TOKEN_BLOCK;
  /* Sums and a bias; columns of one row, or of all where the sums are row by row. */
  const int64_t places = wide ? run.chunk * (2 * padded(g.entries) + 1) * 16
                              : run.chunk * (g.entries + 1) * 16 + padded(g.entries);
  run.bytes = (places + inputs + rows + padded(g.in)) * 4;
  nmf_parallel(nmf_ceil_div(g.tiles, run.chunk), threads, weight_grad_task, &run);
  return result_of(run);
}
