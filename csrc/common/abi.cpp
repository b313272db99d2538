/* The boundary: what is checked before anything runs, and which instruction set runs it. */
#include <atomic>
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
    if (__builtin_cpu_supports("avx512vnni") && __builtin_cpu_supports("avx512vbmi")) features |= 16;
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
