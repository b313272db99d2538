#include "hold_impl.h"

bool nmf_hold_portable(const nmf_holding *job, int64_t first, int64_t last) {
  return hold_rows(job, first, last);
}
