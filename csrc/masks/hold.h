/* One job by a mask that is there already, and what hold_*.cpp do of it. */
#ifndef NMFLOW_HOLD_H
#define NMFLOW_HOLD_H

#include "common.h"

/* w is [rows][cols], and so are the others. Without prints, rows are as it suits: the last one may
 * end at `total`. */
struct nmf_holding {
  const void *w, *values; /* what is checked and pulled, and what is kept or faded */
  const uint8_t *mask;
  void *out;
  const int64_t *odd; /* a factor for each word of a row of out, */
  int64_t *prints;    /* and the sums of the products, a row each; or null */
  int64_t rows, cols, total;
  float delta, pull;
  int dtype;
  bool past; /* whether out goes past the caches */
};

/* A dtype for sums alone, of rows of bytes. */
const int NMF_BYTES = -1;

/* One for each instruction set. Does rows [first, last) and returns whether w holds no NaN and no
 * infinity there. */
typedef bool (*nmf_holder)(const nmf_holding *job, int64_t first, int64_t last);
bool nmf_hold_portable(const nmf_holding *job, int64_t first, int64_t last);
bool nmf_hold_avx2(const nmf_holding *job, int64_t first, int64_t last);
bool nmf_hold_avx512(const nmf_holding *job, int64_t first, int64_t last);

#endif
