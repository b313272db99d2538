/* Training on kept places: what steps.cpp hands to the kernels, and what those are. */
#ifndef NMFLOW_STEPS_H
#define NMFLOW_STEPS_H

#include "common.h"

/* One job on a weight of g. A packed weight is values and codes in kernel layout (nmflow.h); x and dy
 * are row-major and contiguous. */
struct nmf_stepping {
  nmf_geometry g;
  const float *w; /* [out][in] */
  const uint64_t *kept; /* a mask of bits, or null */
  float *values;
  void *codes;
  const float *x, *dy;
  float *dx, *dw, *bias;
  int64_t tokens;
  bool past; /* whether dw goes past the caches */
  /* input_grad of rows: the entries of a block of rows, sorted by columns. */
  int32_t *starts; /* [blocks][in + 1], where a column's entries begin */
  struct nmf_entry *entries;
};

struct nmf_entry {
  int32_t at; /* of its row in a transposed block of dy, in floats */
  float value;
};

/* Rows that are transposed together, and tokens. */
const int64_t NMF_ROW_BLOCK = 192, NMF_TOKEN_BLOCK = 64;

/* Whether kernels serve a geometry: panels of whole tiles, or rows whose spans fit a register. */
NMF_INLINE bool nmf_trains(const nmf_geometry *g) {
  return g->dtype == NMFLOW_F32 && (g->panels > 0 || g->m <= 16);
}

/* The kernels, each for a part of a job; `scratch` is aligned to 64 bytes. */
bool nmf_pack_avx512(const nmf_stepping *job, int64_t panel, int64_t panel_end, char *scratch);
int64_t nmf_pack_scratch(const nmf_geometry *g);
void nmf_sort_avx512(const nmf_stepping *job, int64_t block);
void nmf_input_grad_avx512(const nmf_stepping *job, int64_t token_block, char *scratch);
int64_t nmf_input_grad_scratch(const nmf_geometry *g);
/* Tiles [tile, tile_end), of whole panels. */
void nmf_weight_grad_avx512(const nmf_stepping *job, int64_t tile, int64_t tile_end, char *scratch);
int64_t nmf_weight_grad_scratch(const nmf_geometry *g, int64_t tiles);

#endif
