/* Gradients of panels in bfloat16 on tiles: what tile_steps.cpp hands to the kernels, and what those are. */
#ifndef NMFLOW_TILE_STEPS_H
#define NMFLOW_TILE_STEPS_H

#include "common.h"

struct nmf_tile_stepping {
  nmf_geometry g;
  const void *codes;
  const uint16_t *values, *x, *dy;
  uint16_t *dx;
  float *dw, *bias;
  int64_t tokens;
  char *turned; /* input_grad: values as left operands */
  bool past;    /* whether dw goes past the caches */
};

/* Tokens that the gradient of x takes at a time. */
const int64_t NMF_TILE_TOKENS = 64;

struct nmf_tile_stepper {
  int64_t (*turned_bytes)(const nmf_geometry *g);
  void (*turn)(const nmf_tile_stepping *job, int64_t panel);
  int64_t (*input_grad_bytes)(const nmf_geometry *g);
  void (*input_grad)(const nmf_tile_stepping *job, int64_t token_block, char *scratch);
  int64_t (*weight_grad_bytes)(const nmf_geometry *g, int64_t tiles);
  /* Tiles [tile, tile_end), of whole panels. */
  void (*weight_grad)(const nmf_tile_stepping *job, int64_t tile, int64_t tile_end, char *scratch);
};
extern const nmf_tile_stepper nmf_tile_steps_amx, nmf_tile_steps_vectors, nmf_tile_steps_emulated;

#endif
