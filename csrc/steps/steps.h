/* Training on kept places: what steps.cpp hands to the kernels, and what those are. */
#ifndef NMFLOW_STEPS_H
#define NMFLOW_STEPS_H

#include "common.h"

/* One job on a weight of g. A packed weight is values and codes in kernel layout (nmflow.h), written by `pack` and read
 * by the rest; x and dy are row-major and contiguous. */
struct nmf_stepping {
  nmf_geometry g;
  const float *w; /* [out][in] */
  const uint64_t *kept; /* a mask of bits, or null */
  float *to_values;
  void *to_codes;
  const float *values;
  const void *codes;
  const float *x, *dy;
  float *dx, *dw, *bias;
  int64_t tokens;
  bool past; /* whether dw goes past the caches */
  bool token_lanes; /* whether the gradient of W has tokens in lanes, and not rows */
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

/* Tokens that the gradient of W takes at a time: a longer row's take more room than the second-level
 * cache has, and where each entry has a span of its own, than the first-level one. */
NMF_INLINE int64_t nmf_tokens_of(const nmf_stepping *job) {
  const nmf_geometry &g = job->g;
  const bool fits = g.in <= 1536 && (g.span_entries > 1 || job->token_lanes);
  return g.panels || fits ? NMF_TOKEN_BLOCK : NMF_TOKEN_BLOCK / 2;
}

/* The kernels of an instruction set, each for a part of a job; `scratch` is aligned to 64 bytes. */
struct nmf_stepper {
  /* Packs panels (or rows) [panel, panel_end); false where a group keeps more than N. */
  bool (*pack)(const nmf_stepping *job, int64_t panel, int64_t panel_end, char *scratch);
  void (*sort)(const nmf_stepping *job, int64_t block);
  void (*input_grad)(const nmf_stepping *job, int64_t token_block, char *scratch);
  /* Tiles [tile, tile_end), of whole panels. */
  void (*weight_grad)(const nmf_stepping *job, int64_t tile, int64_t tile_end, char *scratch);
  /* Whether a register holds the 16 inputs of a span, so that rows in lanes pick theirs in one step. */
  bool picks;
};
extern const nmf_stepper nmf_steps_avx2, nmf_steps_avx512;

#endif
