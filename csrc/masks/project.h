/* One mask-and-projection job, its sizes checked, and the parts that project_*.cpp do of it. */
#ifndef NMFLOW_PROJECT_H
#define NMFLOW_PROJECT_H

#include "common.h"

/* w is [outer][length][inner]; groups of m lie along length, panels along outer. */
struct nmf_projection {
  const void *w, *values; /* what chooses, and what is kept or faded: w itself, or another */
  void *dense, *out;
  uint8_t *mask;
  int64_t outer, length, inner, n, m, panel;
  float delta, pull;
  int dtype;
};

/* What a task counts: groups where they lie in a row (inner = 1), else blocks of m x inner, else
 * panels. */
NMF_INLINE int64_t nmf_projection_units(const nmf_projection *job) {
  if (job->panel > 1) return nmf_ceil_div(job->outer, job->panel);
  return job->outer * (job->length / job->m);
}
NMF_INLINE int64_t nmf_projection_unit(const nmf_projection *job) { /* elements of a unit */
  return job->panel > 1 ? job->panel * job->length * job->inner : job->m * job->inner;
}

/* One for each instruction set. `run` does units [first, last) and returns whether they hold no NaN
 * and no infinity; its scratch is 64-byte aligned and of `scratch(job)` bytes. */
struct nmf_projector {
  bool (*run)(const nmf_projection *job, int64_t first, int64_t last, char *scratch);
  int64_t (*scratch)(const nmf_projection *job);
};
const nmf_projector *nmf_projector_portable(void);
const nmf_projector *nmf_projector_avx2(void);
const nmf_projector *nmf_projector_avx512(void);

/* Limits of the sorting networks; a larger group is bisected by itself. */
const int64_t NMF_NETWORK_M = 4096, NMF_NETWORK_RANK = 1024;
/* Elements of a block of vectors that is selected and then written, at least. */
const int64_t NMF_BLOCK = 1024;

#endif
