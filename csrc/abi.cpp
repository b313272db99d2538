/* The boundary: what is checked before anything runs, and which instruction set runs it. */
#include <atomic>
#include <new>
#include <stdlib.h>

#include "common.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(NMFLOW_X86)
#define NMF_HAS_X86 1
#include <cpuid.h>
#include <immintrin.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

int detect_features() {
  int features = 0;
#if defined(NMF_HAS_X86)
  /* __builtin_cpu_supports checks XGETBV too: a feature the system does not save is not there. */
  __builtin_cpu_init();
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) {
    unsigned a, b, c, d;
    if (__get_cpuid(1, &a, &b, &c, &d) && (c & bit_F16C)) features |= 1;
  }
  if ((features & 1) && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
      __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vl")) {
    features |= 2;
    unsigned a, b, c, d;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16)) features |= 4;
#if defined(__linux__) && defined(SYS_arch_prctl)
    if (__get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & (1u << 22)) && (d & (1u << 24))) {
      /* Linux hands out the tile registers on request only (ARCH_REQ_XCOMP_PERM, XTILEDATA). */
      if (syscall(SYS_arch_prctl, 0x1023, 18) == 0) features |= 8;
    }
#endif
  }
#endif
  return features;
}

int features() {
  static const int found = detect_features();
  return found;
}

int best_isa() {
  return (features() & 2) ? NMFLOW_AVX512 : (features() & 1) ? NMFLOW_AVX2 : NMFLOW_PORTABLE;
}

int first_isa() {
  int isa = best_isa();
  const char *asked = getenv("NMFLOW_ISA");
  if (asked != nullptr) {
    int wanted = isa;
    if (strcmp(asked, "portable") == 0) wanted = NMFLOW_PORTABLE;
    if (strcmp(asked, "avx2") == 0) wanted = NMFLOW_AVX2;
    if (wanted < isa) isa = wanted;
  }
  return isa;
}

std::atomic<int> g_isa{-1};

struct ProjectJob {
  nmf_project_args args;
  int64_t groups, chunk;
  uint32_t infinity;
  std::atomic<uint32_t> seen;
  std::atomic<bool> failed;
};

void project_task(void *context, int64_t task) {
  ProjectJob *job = static_cast<ProjectJob *>(context);
  if (job->seen.load(std::memory_order_relaxed) >= job->infinity) return;
  uint32_t small[4096 + 32];
  uint32_t *keys = small;
  if (job->args.m > 4096) {
    keys = new (std::nothrow) uint32_t[static_cast<size_t>(job->args.m) + 32];
    if (keys == nullptr) {
      job->failed.store(true);
      return;
    }
  }
  const int64_t first = task * job->chunk, last = nmf_min(first + job->chunk, job->groups);
  uint32_t seen;
  switch (nmf_isa()) {
#if defined(NMF_HAS_X86)
    case NMFLOW_AVX512:
      seen = nmf_project_avx512(&job->args, first, last, keys);
      break;
    case NMFLOW_AVX2:
      seen = nmf_project_avx2(&job->args, first, last, keys);
      break;
#endif
    default:
      seen = nmf_project_portable(&job->args, first, last, keys);
  }
  if (keys != small) delete[] keys;
  if (seen >= job->infinity) job->seen.store(seen, std::memory_order_relaxed);
}

}  // namespace

int nmf_isa(void) {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = first_isa();
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return isa;
}

int32_t nmflow_abi_version(void) { return NMFLOW_ABI_VERSION; }
int32_t nmflow_isa_now(void) { return nmf_isa(); }
int32_t nmflow_cpu_features(void) { return features(); }

int32_t nmflow_set_isa(int32_t isa) {
  if (isa >= NMFLOW_PORTABLE && isa <= best_isa()) g_isa.store(isa, std::memory_order_relaxed);
  return nmf_isa();
}

const char *nmflow_compiler(void) {
#if defined(__VERSION__)
  return __VERSION__;
#else
  return "unknown";
#endif
}

int32_t nmflow_project(const void *w, int32_t dtype, int64_t groups, int64_t n, int64_t m,
                       double delta, void *dense, uint8_t *mask, void *out, int32_t threads) {
  if (dtype < NMFLOW_F32 || dtype > NMFLOW_F16) return NMFLOW_BAD_DTYPE;
  if (n < 1 || m < n) return NMFLOW_BAD_PATTERN;
  int64_t total;
  if (groups < 0 || m > (INT64_C(1) << 31) || groups > INT64_C(1) << 60 ||
      __builtin_mul_overflow(groups, m, &total) || total > (INT64_C(1) << 60))
    return NMFLOW_BAD_SHAPE;
  if (total == 0) return NMFLOW_OK;
  if (w == nullptr) return NMFLOW_BAD_POINTER;
  ProjectJob job;
  job.args.w = w;
  job.args.dense = dense;
  job.args.out = out;
  job.args.mask = mask;
  job.args.n = n;
  job.args.m = m;
  job.args.delta = static_cast<float>(delta);
  job.args.dtype = dtype;
  job.args.stream = total > (INT64_C(1) << 18);
  job.groups = groups;
  job.infinity = dtype == NMFLOW_F32 ? 0x7f800000u : dtype == NMFLOW_BF16 ? 0x7f80u : 0x7c00u;
  job.seen.store(0);
  job.failed.store(false);
  /* Tasks of about 32k elements: small enough to share out, large enough not to be felt. A
   * multiple of 64 groups keeps vector kernels off the borders. */
  job.chunk = (nmf_ceil_div(32768, m) + 63) / 64 * 64;
  const int64_t tasks = nmf_ceil_div(groups, job.chunk);
  if (threads < 1) threads = 1;
  nmf_parallel(tasks, threads, project_task, &job);
  if (job.failed.load()) return NMFLOW_NO_MEMORY;
  return job.seen.load() >= job.infinity ? NMFLOW_NOT_FINITE : NMFLOW_OK;
}
