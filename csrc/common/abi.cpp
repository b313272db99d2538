/* The boundary: what is checked before anything runs, and which instruction set runs it. */
#include <atomic>
#include <stdlib.h>

#include "common.h"

#if (defined(__x86_64__) || defined(__i386__)) && defined(NMFLOW_X86)
#define NMF_HAS_X86 1
#include <cpuid.h>
#endif
#if defined(__linux__)
#include <sys/syscall.h>
#include <unistd.h>
#endif

namespace {

#if defined(NMF_HAS_X86)
/* The registers that the system saves (XCR0): a feature whose registers it does not is not there.
 * __builtin_cpu_supports would know, but needs a runtime that clang does not link on Windows. */
unsigned saved_registers(unsigned leaf1_ecx) {
  if (!(leaf1_ecx & bit_OSXSAVE)) return 0;
  unsigned low, high;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return low;
}

bool all_of(unsigned word, unsigned bits) { return (word & bits) == bits; }
#endif

int detect_features() {
  int features = 0;
#if defined(NMF_HAS_X86)
  unsigned a, b, c, d, more_b, more_c, more_d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return 0;
  if (!__get_cpuid_count(7, 0, &a, &more_b, &more_c, &more_d)) return 0;
  const unsigned saved = saved_registers(c);
  if (all_of(saved, 0x6) && all_of(c, bit_AVX | bit_FMA | bit_F16C) && (more_b & bit_AVX2))
    features |= 1;
  const unsigned wide = bit_AVX512F | bit_AVX512BW | bit_AVX512DQ | bit_AVX512VL;
  if ((features & 1) && all_of(saved, 0xe6) && all_of(more_b, wide)) {
    features |= 2;
    if (__get_cpuid_count(7, 1, &a, &b, &c, &d) && (a & bit_AVX512BF16)) features |= 4;
    if (all_of(more_c, bit_AVX512VNNI | bit_AVX512VBMI)) features |= 16;
#if defined(__linux__) && defined(SYS_arch_prctl)
    if (all_of(more_d, (1u << 22) | (1u << 24))) {
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

std::atomic<bool> g_emulates{false};

int best_isa() {
#if defined(NMFLOW_TILES_BUILT)
  if ((features() & 8) || g_emulates.load(std::memory_order_relaxed)) return NMFLOW_AMX;
#endif
  return (features() & 2) ? NMFLOW_AVX512 : (features() & 1) ? NMFLOW_AVX2 : NMFLOW_PORTABLE;
}

int first_isa() {
  int isa = best_isa();
  const char *asked = getenv("NMFLOW_ISA");
  if (asked != nullptr) {
    int wanted = isa;
    if (strcmp(asked, "portable") == 0) wanted = NMFLOW_PORTABLE;
    if (strcmp(asked, "avx2") == 0) wanted = NMFLOW_AVX2;
    if (strcmp(asked, "avx512") == 0) wanted = NMFLOW_AVX512;
    if (wanted < isa) isa = wanted;
  }
  return isa;
}

std::atomic<int> g_isa{-1};

}  // namespace

/* AMD's, by what a Zen 4 does: there a product of one token with 8-bit values takes 5 to 33 % longer with
 * prefetches, in float32 up to a third at 1:16. On Intel's cores kernels were tuned with them. */
bool nmf_reads_ahead(void) {
#if defined(NMF_HAS_X86)
  static const bool found = [] {
    unsigned a, vendor, c, d;
    return __get_cpuid(0, &a, &vendor, &c, &d) && vendor == signature_AMD_ebx;
  }();
  return found;
#else
  return false;
#endif
}

int nmf_isa(void) {
  int isa = g_isa.load(std::memory_order_relaxed);
  if (isa < 0) {
    isa = first_isa();
    g_isa.store(isa, std::memory_order_relaxed);
  }
  return isa;
}

bool nmf_emulates(void) { return g_emulates.load(std::memory_order_relaxed); }

int32_t nmflow_abi_version(void) { return NMFLOW_ABI_VERSION; }
int32_t nmflow_isa_now(void) { return nmf_isa(); }
int32_t nmflow_cpu_features(void) { return features(); }

int32_t nmflow_set_isa(int32_t isa) {
  if (isa >= NMFLOW_PORTABLE && isa <= best_isa()) g_isa.store(isa, std::memory_order_relaxed);
  return nmf_isa();
}

int32_t nmflow_emulate_tiles(int32_t on) {
#if defined(NMFLOW_TILES_BUILT)
  const int isa = nmf_isa();
  g_emulates.store(on != 0 && (features() & 6) == 6, std::memory_order_relaxed);
  if (isa > best_isa()) g_isa.store(best_isa(), std::memory_order_relaxed);
#else
  (void)on;
#endif
  return nmf_emulates() ? 1 : 0;
}

#if !defined(NMFLOW_TILES_BUILT)
int32_t nmflow_emulated_dot(int32_t, int32_t, int32_t, const uint16_t *, const uint16_t *, float *) {
  return NMFLOW_NO_KERNEL;
}
#endif

const char *nmflow_compiler(void) {
#if defined(__VERSION__)
  return __VERSION__;
#else
  return "unknown";
#endif
}
