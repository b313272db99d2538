/* dot for patterns that no shuffle serves: the kernels of float activations multiply the rounded inputs
 * by the rounded values, as fp32. Their sums are whole and stay below 2^24, so that fp32 holds each
 * exactly, in any order.
 *
 * The includer defines before it:
 *   FLOATS_KERNEL(MANY): the kernel of its instruction set for few or many tokens. */
#ifndef NMFLOW_DOT_FLOATS_IMPL_H
#define NMFLOW_DOT_FLOATS_IMPL_H

#include "round.h"

namespace {

NMF_INLINE float round_inputs(float *x, int64_t count) {
  const Rounding rounding = rounding_of(x, count);
  int64_t i = 0;
  if (rounding.by == 0.0f) {
    memset(x, 0, static_cast<size_t>(count) * 4);
    return rounding.step;
  }
  for (; i + LANES <= count; i += LANES)
    store(x + i, __builtin_convertvector(nearest(load(x + i) * rounding.by), vecf));
  if (i < count) {
    float rest[LANES] = {};
    memcpy(rest, x + i, static_cast<size_t>(count - i) * 4);
    store(rest, __builtin_convertvector(nearest(load(rest) * rounding.by), vecf));
    memcpy(x + i, rest, static_cast<size_t>(count - i) * 4);
  }
  return rounding.step;
}

NMF_INLINE int64_t in_lines(int64_t floats) { return (floats + 15) / 16 * 16; }

template <bool MANY>
void floats_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  const int64_t tokens = part->token_end - part->token, tiles = part->tile_end - part->tile;
  float *x = reinterpret_cast<float *>(scratch), *steps = x + in_lines(tokens * g.in);
  float *sums = steps + in_lines(tokens), *bias = sums + tokens * tiles * 16;
  for (int64_t tile = 0; tile < tiles; ++tile) read_bias(job, part->tile + tile, bias + tile * 16);
  for (int64_t t = 0; t < tokens; ++t) {
    read_inputs(job, part->token + t, 0, g.in, x + t * g.in);
    steps[t] = round_inputs(x + t * g.in, g.in);
  }
  nmf_job whole = *job; /* the part alone, its numbers unscaled */
  whole.g.dtype = NMFLOW_F32;
  whole.g.tiles = tiles;
  whole.g.out = tiles * 16;
  whole.values = int8_tile(job, part->tile);
  whole.bias = nullptr;
  whole.epilogue = NMFLOW_NONE;
  whole.x = x;
  whole.x_stride = g.in;
  whole.y = sums;
  whole.y_stride = tiles * 16;
  whole.tokens = tokens;
  const nmf_part all = {0, tokens, 0, tiles};
  FLOATS_KERNEL(MANY)->run(&whole, &all, reinterpret_cast<char *>(bias + tiles * 16));
  for (int64_t t = 0; t < tokens; ++t)
    for (int64_t tile = 0; tile < tiles; ++tile) {
      const int64_t row = (part->tile + tile) * 16, count = nmf_min(16, g.out - row);
      const float *scales = int8_scales(job, part->tile + tile);
      float found[16];
      for (int i = 0; i < 16; i += LANES)
        store(found + i, steps[t] * load(scales + i) * load(sums + (t * tiles + tile) * 16 + i) +
                             load(bias + tile * 16 + i));
      if (job->epilogue == NMFLOW_NONE)
        put_rows(job, part->token + t, row, found, count);
      else
        write_rows(job, part->token + t, row, found, count);
    }
}

template <bool MANY>
int64_t floats_scratch(const nmf_job *job, int64_t tokens, int64_t tiles) {
  const int64_t floats = in_lines(tokens * job->g.in) + in_lines(tokens) + (tokens + 1) * tiles * 16;
  return floats * 4 + FLOATS_KERNEL(MANY)->scratch_bytes(job, tokens, tiles);
}

template <bool MANY>
int64_t floats_most(const nmf_geometry *g, int64_t tokens) {
  return FLOATS_KERNEL(MANY)->max_tokens(g, tokens);
}

const nmf_kernel few_floats = {floats_run<false>, floats_scratch<false>,
                              floats_most<false>, 1, nullptr};
const nmf_kernel many_floats = {floats_run<true>, floats_scratch<true>,
                               floats_most<true>, LANES, nullptr};

}  // namespace
#endif
