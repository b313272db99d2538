/* The kernels that any instruction set can run, compiled once for each (see vector.h).
 *
 * gather: 16 rows at a time, one token at a time, x read element by element. Few tokens.
 * tokens: lanes are tokens. x is transposed a block of inputs at a time into L1, a row's kept
 *   weights are broadcast one by one, and the input a weight belongs to is a memory operand: the
 *   load ports do the selecting. Partial sums wait in L2 between blocks of inputs. */
#ifndef NMFLOW_MATMUL_IMPL_H
#define NMFLOW_MATMUL_IMPL_H

#include "decode.h"

namespace {

/* ------------------------------------------------------------------ gather */

#ifndef NMF_GATHER
NMF_INLINE vecf gather(const float *x, const uint32_t *columns) {
  vecf v;
  for (int i = 0; i < LANES; ++i) v[i] = x[columns[i]];
  return v;
}
#endif

void gather_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  const int64_t count = part->token_end - part->token;
  uint32_t *columns = reinterpret_cast<uint32_t *>(scratch);
  float *room = reinterpret_cast<float *>(scratch + g.entries * 64);
  float *x = reinterpret_cast<float *>(scratch + g.entries * 128 + 64);
  for (int64_t t = 0; t < count; ++t)
    read_inputs(job, part->token + t, 0, g.in, x + t * g.in);
  for (int64_t tile = part->tile; tile < part->tile_end; ++tile) {
    const float *values = decode_values(job, tile, 0, g.entries, room);
    decode_columns(job, tile, 0, g.entries, 0, 1, columns);
    float bias[16];
    read_bias(job, tile, bias);
    for (int64_t t = 0; t < count; ++t) {
      const float *from = x + t * g.in;
      /* Two sums of every row, so that one addition need not wait for the one before. */
      vecf even[16 / LANES], odd[16 / LANES];
      for (int i = 0; i < 16 / LANES; ++i) {
        even[i] = load(bias + i * LANES);
        odd[i] = vecf{};
      }
      int64_t s = 0;
      for (; s + 2 <= g.entries; s += 2)
        for (int i = 0; i < 16 / LANES; ++i) {
          const int64_t at = s * 16 + i * LANES;
          even[i] += load(values + at) * gather(from, columns + at);
          odd[i] += load(values + at + 16) * gather(from, columns + at + 16);
        }
      for (; s < g.entries; ++s)
        for (int i = 0; i < 16 / LANES; ++i)
          even[i] += load(values + s * 16 + i * LANES) * gather(from, columns + s * 16 + i * LANES);
      float sums[16];
      for (int i = 0; i < 16 / LANES; ++i) store(sums + i * LANES, even[i] + odd[i]);
      write_rows(job, part->token + t, tile * 16, sums, nmf_min(16, g.out - tile * 16));
    }
  }
}

int64_t gather_scratch(const nmf_job *job, int64_t tokens, int64_t) {
  return job->g.entries * 128 + 64 + tokens * job->g.in * 4;
}

/* ------------------------------------------------------------------ tokens */

/* Registers: C vectors of tokens times R rows of sums. WIDEST_C where that saves a pass over the
 * weight, which is decoded in each. */
#ifndef NMF_MAX_C
#define NMF_MAX_C 4
#endif
#ifndef NMF_WIDEST_C
#define NMF_WIDEST_C NMF_MAX_C
#endif
const int MAX_C = NMF_MAX_C, SPARSE_C = 2, WIDEST_C = NMF_WIDEST_C;
template <int C>
struct Rows {
  static const int count = LANES < 16 ? (C == 1 ? 8 : C == 2 ? 4 : 2) : C <= 2 ? 8 : 4;
};
/* Bytes of the transposed block, which shares L1 with weights, columns and sums that stream by:
 * measured with 48 KB of it (AVX-512) and 32 KB (AVX2, where 48 tokens in 24 KB are up to 18 % faster
 * than 32 in 16 KB, but 16 tokens in 24 KB slower). */
NMF_INLINE int64_t block_bytes(int64_t c) {
  return LANES == 16 ? 32768 : LANES == 8 && c > SPARSE_C ? 24576 : 16384;
}
/* A row's entries in a block of the widest kind, below which half the tokens are better. */
const int64_t FEWEST_ENTRIES = LANES == 16 ? 16 : 8;

NMF_INLINE int64_t block_inputs(const nmf_geometry &g, int64_t c) {
  const int64_t most = block_bytes(c) / (c * LANES * 4) / g.span * g.span;
  const int64_t least = most < g.span ? g.span : most;
  /* Even blocks: 768 inputs as 6 x 128 and not as 5 x 144 and a rest. */
  const int64_t blocks = nmf_ceil_div(g.in, least);
  return nmf_ceil_div(nmf_ceil_div(g.in, blocks), g.span) * g.span;
}

NMF_INLINE int64_t round64(int64_t bytes) { return (bytes + 63) / 64 * 64; }

int64_t tokens_scratch(const nmf_job *job, int64_t tokens, int64_t tiles) {
  const nmf_geometry &g = job->g;
  int64_t bytes = 0;
  /* The last part of a call may be narrower, and narrower blocks hold more inputs and entries. */
  for (int64_t c = nmf_ceil_div(tokens, LANES); c > 0; --c) {
    const int64_t inputs = block_inputs(g, c), entries = inputs / g.span * g.span_entries;
    const int64_t these = round64(inputs * c * LANES * 4) + round64(tiles * 16 * c * LANES * 4) +
                          2 * round64(entries * 64 + 64);
    if (these > bytes) bytes = these;
  }
  return bytes;
}

#ifndef NMF_TRANSPOSE
/* 16 x 16 floats: to[j * to_stride + i] = from[i * from_stride + j]. */
NMF_INLINE void transpose16(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
  for (int i = 0; i < 16; ++i)
    for (int j = 0; j < 16; ++j) to[j * to_stride + i] = from[i * from_stride + j];
}
#endif

/* x of the part's tokens and of inputs [first, first + count), transposed to [count][c * LANES];
 * lanes past the last token are zero. */
NMF_INLINE void pack_inputs(const nmf_job *job, const nmf_part *part, int64_t first, int64_t count,
                            int64_t width, float *to) {
  const int64_t tokens = part->token_end - part->token;
  for (int64_t t = 0; t < width; t += 16) {
    const int64_t here = nmf_min(16, width - t);
    for (int64_t i = 0; i < count; i += 16) {
      const int64_t inputs = nmf_min(16, count - i);
      float block[256];
      const float *from = block;
      int64_t stride = 16;
      if (job->g.dtype == NMFLOW_F32 && inputs == 16 && here == 16 && t + 16 <= tokens) {
        from = static_cast<const float *>(job->x) + (part->token + t) * job->x_stride + first + i;
        stride = job->x_stride;
      } else {
        memset(block, 0, sizeof block);
        for (int64_t k = 0; k < here && t + k < tokens; ++k)
          read_inputs(job, part->token + t + k, first + i, inputs, block + k * 16);
      }
      if (here == 16 && inputs == 16) {
        transpose16(from, stride, to + i * width + t, width);
      } else {
        for (int64_t j = 0; j < inputs; ++j)
          for (int64_t k = 0; k < here; ++k) to[(i + j) * width + t + k] = from[k * stride + j];
      }
    }
  }
}

/* sums[r][..] += sum over entries of values[s][r] * x[offset[s][r] ..], R rows at a time. */
template <int C, int R>
NMF_INLINE void tokens_rows(const char *x, const float *values, const uint32_t *offsets,
                            int64_t entries, float *sums, const float *start) {
  vecf acc[R][C];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c)
      acc[r][c] = start ? splat(start[r]) : load(sums + (r * C + c) * LANES);
  for (int64_t s = 0; s < entries; ++s) {
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const vecf w = splat(values[s * 16 + r]);
      const float *from = reinterpret_cast<const float *>(x + offsets[s * 16 + r]);
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) acc[r][c] += w * load(from + c * LANES);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(sums + (r * C + c) * LANES, acc[r][c]);
}

/* Sums of a tile, [16][width] with tokens in lanes, to y. The epilogue comes first, while lanes are
 * full whatever the number of rows. */
NMF_INLINE void write_tile(const nmf_job *job, const nmf_part *part, int64_t tile, float *sums,
                           int64_t width) {
  const int64_t tokens = part->token_end - part->token;
  const int64_t row = tile * 16, rows = nmf_min(16, job->g.out - row);
  if (job->epilogue != NMFLOW_NONE)
    for (int64_t i = 0; i < 16 * width; i += LANES)
      store(sums + i, finish(load(sums + i), job->epilogue));
  for (int64_t t = 0; t < tokens; t += 16) {
    const int64_t here = nmf_min(16, tokens - t), token = part->token + t;
    const bool whole = here == 16 && rows == 16 && t + 16 <= width;
    if (whole && job->g.dtype == NMFLOW_F32) {
      transpose16(sums + t, width, static_cast<float *>(job->y) + token * job->y_stride + row,
                  job->y_stride);
      continue;
    }
    float block[256];
    if (t + 16 <= width) {
      transpose16(sums + t, width, block, 16);
    } else {
      for (int i = 0; i < 16; ++i)
        for (int64_t k = 0; k < here; ++k) block[k * 16 + i] = sums[i * width + t + k];
    }
    for (int64_t k = 0; k < here; ++k)
      put_rows(job, token + k, row, block + k * 16, rows);
  }
}

/* A block's entries of a tile to come, which lie apart from those of the tile before it. */
NMF_INLINE void fetch_weights(const nmf_job *job, int64_t tile, int64_t s0, int64_t entries) {
  const nmf_geometry &g = job->g;
  if (tile >= g.tiles) return;
  if (job->q.bits) return int8_fetch(job, tile, s0, entries);
  const int64_t item = nmf_item_bytes(static_cast<int>(g.dtype));
  const char *values = static_cast<const char *>(job->values) + (tile * g.entries_held + s0) * 16 * item;
  for (int64_t at = 0; at < entries * 16 * item; at += 64) __builtin_prefetch(values + at);
  if (g.panels) return;
  const char *codes = static_cast<const char *>(job->codes) + (tile * g.words + s0 / g.per) * 64;
  for (int64_t at = 0; at < entries; at += g.per) __builtin_prefetch(codes + at / g.per * 64);
}

template <int C>
void tokens_part(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  const int64_t width = C * LANES, inputs = block_inputs(g, C);
  const int64_t most = inputs / g.span * g.span_entries;
  float *x = reinterpret_cast<float *>(scratch);
  scratch += round64(inputs * width * 4);
  float *room = reinterpret_cast<float *>(scratch);
  scratch += round64(most * 64 + 64);
  uint32_t *offsets = reinterpret_cast<uint32_t *>(scratch);
  scratch += round64(most * 64 + 64);
  float *sums = reinterpret_cast<float *>(scratch);
  for (int64_t first = 0; first < g.in; first += inputs) {
    const int64_t count = nmf_min(inputs, g.in - first);
    pack_inputs(job, part, first, count, width, x);
    const int64_t s0 = first / g.span * g.span_entries;
    const int64_t entries = nmf_min(s0 + most, g.entries) - s0;
    const bool last = first + inputs >= g.in;
    for (int64_t tile = part->tile; tile < part->tile_end; ++tile) {
      const float *values = decode_values(job, tile, s0, entries, room);
      decode_columns(job, tile, s0, entries, first, static_cast<uint32_t>(width * 4), offsets);
      fetch_weights(job, tile + 2, s0, entries);
      float *tile_sums = sums + (tile - part->tile) * 16 * width;
      float bias[16];
      if (first == 0) read_bias(job, tile, bias);
      const int R = Rows<C>::count;
      for (int r = 0; r < 16; r += R)
        tokens_rows<C, R>(reinterpret_cast<const char *>(x), values + r, offsets + r, entries,
                             tile_sums + r * width, first == 0 ? bias + r : nullptr);
      if (!last) continue;
      write_tile(job, part, tile, tile_sums, width);
    }
  }
}

template <int C>
NMF_INLINE void tokens_dispatch(int64_t c, const nmf_job *job, const nmf_part *part,
                                char *scratch) {
  if (C == 1 || c >= C) return tokens_part<C>(job, part, scratch);
  tokens_dispatch<(C > 1 ? C - 1 : 1)>(c, job, part, scratch);
}

void tokens_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  tokens_dispatch<WIDEST_C>(nmf_ceil_div(part->token_end - part->token, LANES), job, part, scratch);
}

int64_t gather_most(const nmf_geometry *, int64_t) { return 4; }
/* A sum waits outside the registers between blocks of inputs. Where a block of the widest kind
 * holds few entries of a row, half the tokens and blocks twice as long fetch it half as often. */
int64_t tokens_most(const nmf_geometry *g, int64_t tokens) {
  const int64_t inputs = block_bytes(MAX_C) / (MAX_C * LANES * 4);
  if (inputs * g->n < FEWEST_ENTRIES * g->m) return SPARSE_C * LANES;
  const int64_t vectors = nmf_ceil_div(tokens, LANES);
  const bool saves = nmf_ceil_div(vectors, WIDEST_C) < nmf_ceil_div(vectors, MAX_C);
  return (saves ? WIDEST_C : MAX_C) * LANES;
}

const nmf_kernel gather_kernel = {gather_run, gather_scratch, gather_most, 1};
const nmf_kernel tokens_kernel = {tokens_run, tokens_scratch, tokens_most, LANES};

}  // namespace
#endif
