#include "gather_impl.h"

int32_t nmf_take_portable(const nmf_gathering *job, int64_t row, int64_t row_end, char *) {
  return take_rows(job, row, row_end);
}

int32_t nmf_put_portable(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch) {
  return put_rows(job, row, row_end, scratch);
}
