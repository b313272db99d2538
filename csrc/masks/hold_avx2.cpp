#include "hold_impl.h"

bool nmf_hold_avx2(const nmf_holding *job, int64_t first, int64_t last) {
  return hold_rows(job, first, last);
}
