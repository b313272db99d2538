/* The matrix product's driver: checks, choice of kernel, cutting into tasks. */
#include <atomic>
#include <new>

#include "common.h"
#include "scratch.h"

#ifndef NMF_WEIGHT_SHARE
#define NMF_WEIGHT_SHARE (INT64_C(5) << 18) /* bytes: most of a 2 MB second-level cache */
#endif

namespace {

struct Run {
  nmf_job job;
  const nmf_kernel *kernel;
  int64_t scratch_bytes;
  std::atomic<bool> failed;
};

thread_local Scratch t_scratch;

void run_task(void *context, int64_t task) {
  Run *run = static_cast<Run *>(context);
  const nmf_job &job = run->job;
  nmf_part part;
  /* Tokens are cut evenly in vectors of the kernel's: 197 as 64 + 48 + 48 + 37 and not as 3 x 64
   * and a lonely 5. */
  const int64_t step = run->kernel->step, vectors = nmf_ceil_div(job.tokens, step);
  const int64_t block = task % job.token_blocks;
  const int64_t each = vectors / job.token_blocks, longer = vectors % job.token_blocks;
  part.token = (block * each + nmf_min(block, longer)) * step;
  part.token_end = nmf_min(part.token + (each + (block < longer)) * step, job.tokens);
  part.tile = task / job.token_blocks * job.tile_block;
  part.tile_end = nmf_min(part.tile + job.tile_block, job.g.tiles);
  char *scratch = t_scratch.at_least(run->scratch_bytes);
  if (scratch == nullptr) {
    run->failed.store(true);
    return;
  }
  run->kernel->run(&job, &part, scratch);
}

/* Rows of a tile that share their columns, and whose codes are stored for each. */
bool is_small_panel(const nmf_geometry &g) { return g.panel == 2 || g.panel == 4 || g.panel == 8; }

}  // namespace

const nmf_kernel *nmf_kernel_of(int number, const nmf_geometry *geometry) {
  const nmf_geometry &g = *geometry;
  const int isa = nmf_isa();
  (void)isa; /* where there is only the portable set */
  switch (number) {
#if defined(NMFLOW_X86)
    case NMFLOW_GATHER:
      return isa >= NMFLOW_AVX512 ? nmf_gather_avx512()
             : isa == NMFLOW_AVX2 ? nmf_gather_avx2()
                                  : nmf_gather_portable();
    case NMFLOW_TOKENS:
      return isa >= NMFLOW_AVX512 ? nmf_tokens_avx512()
             : isa == NMFLOW_AVX2 ? nmf_tokens_avx2()
                                  : nmf_tokens_portable();
    case NMFLOW_PANEL:
      if (!g.panels && !is_small_panel(g)) return nullptr;
      return isa >= NMFLOW_AVX512 ? nmf_panel_avx512()
             : isa == NMFLOW_AVX2 ? nmf_panel_avx2()
                                  : nmf_panel_portable();
#if defined(NMFLOW_TILES_BUILT)
    case NMFLOW_TILES: /* columns are counted in bytes of a block of x */
      if (!g.panels || g.dtype != NMFLOW_BF16 || g.in >= 1 << 24) return nullptr;
      if (isa == NMFLOW_AMX) return nmf_emulates() ? nmf_tiles_emulated() : nmf_tiles_amx();
      return isa == NMFLOW_AVX512 && (nmflow_cpu_features() & 4) ? nmf_tiles_vectors() : nullptr;
#endif
    case NMFLOW_PERMUTE:
      if (g.m > 32 || g.panels) return nullptr;
      return isa >= NMFLOW_AVX512 ? nmf_permute_avx512()
             : isa == NMFLOW_AVX2 ? nmf_permute_avx2()
                                  : nullptr;
#else
    case NMFLOW_GATHER:
      return nmf_gather_portable();
    case NMFLOW_TOKENS:
      return nmf_tokens_portable();
    case NMFLOW_PANEL:
      return g.panels || is_small_panel(g) ? nmf_panel_portable() : nullptr;
#endif
    default:
      return nullptr;
  }
}

/* Measured with AVX-512, and on a Zen 3, which gathers slowly. */
int64_t nmf_tokens_from(void) { return nmf_isa() == NMFLOW_AVX2 ? 3 : 6; }

namespace {

/* Tokens from which transposing x pays, measured on the machines of docs/benchmarks/kernels.md. A
 * permutation costs the shuffle port one turn a weight and token, where a register of 8 inputs does
 * not hold a span two or four and a choice; the transposed way costs a load, and the transposing. */
int64_t transpose_from(const nmf_geometry &g) {
  if (nmf_kernel_of(NMFLOW_PERMUTE, &g) == nullptr) return nmf_tokens_from();
  if (nmf_isa() >= NMFLOW_AVX512) return 32;
  return 8 % g.m == 0 ? 16 : g.m <= 16 ? 9 : 5;
}

/* Tokens from which sharing inputs among 2, 4 or 8 rows pays, measured: with AVX2's 16 registers never. */
int64_t small_panels_from(const nmf_geometry &g) {
  if (nmf_isa() < NMFLOW_AVX512) return INT64_MAX;
  return g.panel == 2 ? 17 : 13;
}

/* Tokens from which tiles pay, which take 32 at least: measured for vectors as tiles. */
int64_t tiles_from() { return nmf_isa() == NMFLOW_AMX ? 4 : 17; }

int choose(const nmf_geometry &g, int64_t tokens) {
  if (g.panels)
    return tokens >= tiles_from() && nmf_kernel_of(NMFLOW_TILES, &g) != nullptr ? NMFLOW_TILES : NMFLOW_PANEL;
  if (is_small_panel(g) && tokens >= small_panels_from(g)) return NMFLOW_PANEL;
  if (tokens >= transpose_from(g)) return NMFLOW_TOKENS;
  return nmf_kernel_of(NMFLOW_PERMUTE, &g) != nullptr ? NMFLOW_PERMUTE : NMFLOW_GATHER;
}

}  // namespace

int32_t nmflow_choose(const nmflow_shape *shape, int64_t tokens) {
  nmf_geometry g;
  const int status = nmf_geometry_of(shape, &g);
  if (status != NMFLOW_OK) return status;
  if (tokens < 1) return NMFLOW_BAD_SHAPE;
  return choose(g, tokens);
}

const char *nmflow_kernel_name(int32_t kernel) {
  static const char *const names[] = {"auto",  "gather", "tokens", "permute",
                                      "tiles", "panel",  "dot"};
  return kernel >= 0 && kernel <= NMFLOW_DOT ? names[kernel] : "unknown";
}

int nmf_check_call(const nmf_geometry *g, const void *x, int64_t x_stride, const void *y,
                   int64_t y_stride, int64_t tokens, int epilogue) {
  if (epilogue < NMFLOW_NONE || epilogue > NMFLOW_GELU_TANH) return NMFLOW_BAD_DTYPE;
  const int64_t limit = INT64_C(1) << 56;
  if (tokens < 0 || x_stride < g->in || y_stride < g->out || tokens > limit || x_stride > limit ||
      y_stride > limit)
    return NMFLOW_BAD_SHAPE;
  if (tokens == 0) return NMFLOW_OK;
  if (tokens > limit / x_stride || tokens > limit / y_stride) return NMFLOW_BAD_SHAPE;
  return x == nullptr || y == nullptr ? NMFLOW_BAD_POINTER : NMFLOW_OK;
}

int nmf_run(nmf_job *job, const nmf_kernel *kernel, int64_t bytes, int threads) {
  const nmf_geometry &g = job->g;
  job->fetch = !nmf_reads_ahead();
  const int64_t tokens = job->tokens, most = kernel->max_tokens(&g, tokens);
  job->token_blocks = nmf_ceil_div(tokens, most);
  job->tile_block = g.tiles;
  if (job->token_blocks > 2) {
    /* A weight that is read for every token block is cut so that its share stays in the second-level
     * cache meanwhile; x is then packed once for each cut, which costs less. */
    const int64_t cuts = nmf_ceil_div(bytes, NMF_WEIGHT_SHARE);
    job->tile_block = nmf_ceil_div(g.tiles, nmf_min(cuts, nmf_ceil_div(g.tiles, 4)));
  }
  /* A thread more for every quarter of a million products: waking one takes microseconds. */
  const double products = static_cast<double>(g.out) * static_cast<double>(g.entries) *
                          static_cast<double>(tokens);
  if (threads > 1 + products / 262144) threads = static_cast<int>(1 + products / 262144);
  if (threads > 1) {
    /* About four tasks a thread, so that a thread that came late does not hold the others up. */
    const int64_t wanted = nmf_ceil_div(4 * static_cast<int64_t>(threads), job->token_blocks);
    const int64_t shared = nmf_ceil_div(g.tiles, nmf_min(wanted, nmf_ceil_div(g.tiles, 4)));
    job->tile_block = nmf_min(job->tile_block, shared);
  }
  if (kernel->max_tiles != nullptr) job->tile_block = nmf_min(job->tile_block, kernel->max_tiles(&g));
  Run run;
  run.job = *job;
  run.kernel = kernel;
  run.scratch_bytes = kernel->scratch_bytes(
      job, nmf_min(most, nmf_ceil_div(tokens, kernel->step) * kernel->step), job->tile_block);
  run.failed.store(false);
  nmf_parallel(job->token_blocks * nmf_ceil_div(g.tiles, job->tile_block), threads < 1 ? 1 : threads,
               run_task, &run);
  return run.failed.load() ? NMFLOW_NO_MEMORY : NMFLOW_OK;
}

namespace {

int32_t multiply(const nmflow_packed *packed, const void *x, int64_t x_stride, const void *bias, void *y,
                 int64_t y_stride, int64_t tokens, int turned, int32_t epilogue, int32_t threads, int kernel) {
  if (packed == nullptr) return NMFLOW_BAD_POINTER;
  nmf_job job = {};
  int status = nmf_geometry_of(&packed->shape, &job.g);
  if (status != NMFLOW_OK) return status;
  const nmf_geometry &g = job.g;
  if (packed->values_bytes != g.values_bytes || packed->codes_bytes != g.codes_bytes)
    return NMFLOW_BAD_BYTES;
  /* What is turned has features for tokens, and a stride of at least those. */
  const bool x_turned = turned & NMFLOW_X_TURNED, y_turned = turned & NMFLOW_Y_TURNED;
  const int64_t limit = INT64_C(1) << 56;
  if ((x_turned && (x_stride < tokens || x_stride > limit / g.in)) ||
      (y_turned && (y_stride < tokens || y_stride > limit / g.out)))
    return NMFLOW_BAD_SHAPE;
  status = nmf_check_call(&g, x, x_turned ? g.in : x_stride, y, y_turned ? g.out : y_stride, tokens, epilogue);
  if (status != NMFLOW_OK || tokens == 0) return status;
  if (packed->values == nullptr || packed->codes == nullptr) return NMFLOW_BAD_POINTER;
  if (kernel == NMFLOW_AUTO) kernel = choose(g, tokens);
  const nmf_kernel *found = nmf_kernel_of(kernel, &g);
  if (found == nullptr) return NMFLOW_NO_KERNEL;
  job.values = packed->values;
  job.codes = packed->codes;
  job.x = x;
  job.bias = bias;
  job.y = y;
  job.x_stride = x_stride;
  job.y_stride = y_stride;
  job.tokens = tokens;
  job.epilogue = epilogue;
  job.turned = turned;
  return nmf_run(&job, found, g.values_bytes + g.codes_bytes, threads);
}

}  // namespace

int32_t nmflow_matmul(const nmflow_packed *packed, const void *x, int64_t x_stride,
                      const void *bias, void *y, int64_t y_stride, int64_t tokens,
                      int32_t epilogue, int32_t threads, int32_t kernel) {
  return multiply(packed, x, x_stride, bias, y, y_stride, tokens, 0, epilogue, threads, kernel);
}

int32_t nmflow_matmul_turned(const nmflow_packed *packed, const void *x, int64_t x_stride, const void *bias,
                             void *y, int64_t y_stride, int64_t tokens, int32_t turned, int32_t epilogue,
                             int32_t threads) {
  if (turned < 0 || turned > (NMFLOW_X_TURNED | NMFLOW_Y_TURNED)) return NMFLOW_BAD_SHAPE;
  return multiply(packed, x, x_stride, bias, y, y_stride, tokens, turned, epilogue, threads, NMFLOW_TILES);
}
