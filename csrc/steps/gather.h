/* Kept elements together and apart again: one job, and what gather_*.cpp do of it. */
#ifndef NMFLOW_GATHER_H
#define NMFLOW_GATHER_H

#include "common.h"

struct nmf_gathering {
  const uint64_t *bits;  /* [rows][words]: bit c % 64 of word c / 64 says whether column c is kept */
  const int64_t *starts; /* where each row's are among all */
  int64_t rows, cols, words;
  float *together, *apart;
  const int64_t *odd; /* as in nmflow_hold */
  int64_t *prints;
  bool past; /* whether `apart` goes past the caches */
};

/* Rows [row, row_end) of a job, one function for each instruction set. NMFLOW_NOT_KEPT where a row
 * keeps another number than `starts` says; `put` says NMFLOW_NOT_FINITE too. `scratch` has a row. */
typedef int32_t (*nmf_gatherer)(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch);
int32_t nmf_take_portable(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch);
int32_t nmf_take_avx2(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch);
int32_t nmf_take_avx512(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch);
int32_t nmf_put_portable(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch);
int32_t nmf_put_avx2(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch);
int32_t nmf_put_avx512(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch);

#endif
