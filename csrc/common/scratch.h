/* Memory that a thread keeps between calls: a fresh allocation costs page faults that, in a small
 * call, are more than the work itself. */
#ifndef NMFLOW_SCRATCH_H
#define NMFLOW_SCRATCH_H

#include <stdlib.h>

#include "common.h"

namespace {

struct Scratch {
  char *memory = nullptr;
  int64_t bytes = 0;
  ~Scratch() { free(memory); }

  /* At least this many bytes, aligned to 64; null if there are none. */
  char *at_least(int64_t wanted) {
#if defined(__SANITIZE_ADDRESS__)
    /* Under AddressSanitizer every task gets its bytes and not one more. */
    free(memory);
    memory = nullptr;
    return posix_memalign(reinterpret_cast<void **>(&memory), 64, static_cast<size_t>(wanted)) == 0
               ? memory
               : nullptr;
#endif
    if (wanted > bytes) {
      free(memory);
      bytes = 0;
      const int64_t rounded = nmf_ceil_div(wanted + 64, 4096) * 4096;
      memory = static_cast<char *>(malloc(static_cast<size_t>(rounded)));
      if (memory == nullptr) return nullptr;
      bytes = rounded - 64;
    }
    return reinterpret_cast<char *>((reinterpret_cast<uintptr_t>(memory) + 63) / 64 * 64);
  }

  /* Let go of what is too large to keep. */
  void give_back(int64_t most) {
    if (bytes <= most) return;
    free(memory);
    memory = nullptr;
    bytes = 0;
  }
};

}  // namespace
#endif
