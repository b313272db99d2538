#include "project_impl.h"

uint32_t nmf_project_avx512(const nmf_project_args *args, int64_t first, int64_t last,
                            uint32_t *keys) {
  return project_any(args, first, last, keys);
}
