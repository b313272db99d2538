/* panel: all rows of a panel share their columns, so a layer is a dense product over the kept
 * inputs. Few tokens: lanes are rows, and the x of a kept column is broadcast from where it lies
 * (panels of 16 rows and more). Many: lanes are tokens of a transposed x, whose kept rows are loaded once
 * for 2, 4, 8 or 16 rows. */
#ifndef NMFLOW_PANEL_IMPL_H
#define NMFLOW_PANEL_IMPL_H

#include "matmul_impl.h"

namespace {

const int TILE_VECS = 16 / LANES;
/* Tiles of 16 rows in a register tile, and the tokens beside them: 24 sums of 32 registers with
 * AVX-512, 12 of 16 otherwise. */
const int PANEL_TILES = LANES == 16 ? 4 : LANES == 8 ? 2 : 1;
const int PANEL_TOKENS = LANES == 16 ? 6 : 3;

template <int TILES, int NT>
NMF_INLINE void panel_block(const nmf_job *job, int64_t token, int64_t tile,
                            const float *const *values, const uint32_t *columns, const float *x,
                            int64_t stride) {
  const nmf_geometry &g = job->g;
  vecf acc[NT][TILES * TILE_VECS];
#pragma GCC unroll 8
  for (int i = 0; i < TILES; ++i) {
    float bias[16];
    read_bias(job, tile + i, bias);
#pragma GCC unroll 8
    for (int v = 0; v < TILE_VECS; ++v)
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) acc[t][i * TILE_VECS + v] = load(bias + v * LANES);
  }
  for (int64_t s = 0; s < g.entries; ++s) {
    const float *from = x + columns[s];
    vecf w[TILES * TILE_VECS];
#pragma GCC unroll 8
    for (int i = 0; i < TILES; ++i)
#pragma GCC unroll 8
      for (int v = 0; v < TILE_VECS; ++v)
        w[i * TILE_VECS + v] = load(values[i] + s * 16 + v * LANES);
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) {
      const vecf input = splat(from[t * stride]);
#pragma GCC unroll 8
      for (int i = 0; i < TILES * TILE_VECS; ++i) acc[t][i] += w[i] * input;
    }
  }
  for (int i = 0; i < TILES; ++i) {
    const int64_t row = (tile + i) * 16, count = nmf_min(16, g.out - row);
    for (int t = 0; t < NT; ++t) {
      float sums[16];
      for (int v = 0; v < TILE_VECS; ++v) store(sums + v * LANES, acc[t][i * TILE_VECS + v]);
      write_rows(job, token + t, row, sums, count);
    }
  }
}

template <int TILES>
void panel_tiles(const nmf_job *job, const nmf_part *part, int64_t tile, const uint32_t *columns,
                 const float *x, int64_t stride, float *room) {
  const int64_t entries = job->g.entries;
  const float *values[TILES];
  for (int i = 0; i < TILES; ++i)
    values[i] = decode_values(job, tile + i, 0, entries, room + i * (entries + 1) * 16);
  /* A narrower tile of rows leaves registers for more tokens. */
  const int NT = PANEL_TOKENS * (PANEL_TILES / TILES >= 2 ? 2 : 1);
  int64_t token = part->token;
  for (; token + NT <= part->token_end; token += NT, x += NT * stride)
    panel_block<TILES, NT>(job, token, tile, values, columns, x, stride);
  if (NT > 3)
    for (; token + 3 <= part->token_end; token += 3, x += 3 * stride)
      panel_block<TILES, 3>(job, token, tile, values, columns, x, stride);
  for (; token < part->token_end; ++token, x += stride)
    panel_block<TILES, 1>(job, token, tile, values, columns, x, stride);
}

/* Columns of a panel's entries, times `scale`. */
NMF_INLINE void panel_columns(const nmf_job *job, int64_t panel, uint32_t scale, uint32_t *to) {
  const nmf_geometry &g = job->g;
  const uint8_t *codes = static_cast<const uint8_t *>(job->codes) + panel * g.entries;
  int64_t span = 0, left = g.span_entries;
  for (int64_t s = 0; s < g.entries; ++s) {
    const int64_t most = nmf_min(g.span, g.in - span) - 1;
    to[s] = static_cast<uint32_t>(span + nmf_min(codes[s], most)) * scale;
    if (--left == 0) {
      left = g.span_entries;
      span += g.span;
    }
  }
}

/* Lines of memory that are wanted soon, fetched a few a step: y rows of the tile in work, which are
 * written a line each, and, one after the other, x of the tokens to come or weights. */
struct Fetch {
  const char *y;
  int64_t y_stride, y_count;
  const char *next;
  int64_t count;
};
NMF_INLINE void fetch_some(Fetch &f) {
  if (f.y_count > 0) {
    __builtin_prefetch(f.y, 1);
    f.y += f.y_stride;
    --f.y_count;
  }
  if (f.count > 0) {
    __builtin_prefetch(f.next, 0, 2);
    f.next += 64;
    --f.count;
  }
}

/* Where the columns of rows lie: entry s of row r has columns[s * stride + r * each]. */
struct Columns {
  const uint32_t *at;
  int64_t stride, each;
};

/* P panels of R rows of a tile, for C vectors of tokens, over all entries: an input is loaded once for
 * R rows, so that arithmetic and not loads is what takes time. */
template <int C, int R, int P>
NMF_INLINE void wide_rows(const float *x, const float *values, Columns columns, int64_t entries,
                          const float *bias, float *sums, Fetch &fetch) {
  vecf acc[P * R][C];
#pragma GCC unroll 16
  for (int r = 0; r < P * R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) acc[r][c] = splat(bias[r]);
  for (int64_t s = 0; s < entries; ++s) {
    fetch_some(fetch);
#pragma GCC unroll 8
    for (int p = 0; p < P; ++p) {
      const float *from = x + columns.at[s * columns.stride + p * R * columns.each];
      vecf input[C];
#pragma GCC unroll 8
      for (int c = 0; c < C; ++c) input[c] = load(from + c * LANES);
#pragma GCC unroll 16
      for (int r = p * R; r < (p + 1) * R; ++r) {
        const vecf w = splat(values[s * 16 + r]);
#pragma GCC unroll 8
        for (int c = 0; c < C; ++c) acc[r][c] += w * input[c];
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < P * R; ++r)
#pragma GCC unroll 8
    for (int c = 0; c < C; ++c) store(sums + (r * C + c) * LANES, acc[r][c]);
}

/* V: rows that share their columns at least, up to 16. */
template <int C, int V>
void wide_part(const nmf_job *job, const nmf_part *part, uint32_t *columns, float *room, float *x) {
  const nmf_geometry &g = job->g;
  const int SUMS = LANES == 16 ? 24 : 12, MOST = LANES == 16 ? (C == 1 ? 16 : 8) : 4;
  const int R = V < MOST ? V : MOST, FIT = SUMS / (R * C);
  const int P = FIT >= 8 && R <= 2 ? 8 : FIT >= 4 && R <= 4 ? 4 : FIT >= 2 && R <= 8 ? 2 : 1;
  const int64_t AHEAD = 96; /* lines */
  const int64_t width = C * LANES, tiles_each = g.panels ? g.panel / 16 : 1;
  pack_inputs(job, part, 0, g.in, width, x);
  const int64_t tokens = part->token_end - part->token, item = nmf_item_bytes((int)g.dtype);
  const int64_t to_come = nmf_min(job->tokens - part->token_end, width) * job->x_stride * item / 64;
  const int64_t share = to_come / (part->tile_end - part->tile) + 1;
  const char *next = static_cast<const char *>(job->x) + part->token_end * job->x_stride * item;
  int64_t panel = -1, left = to_come;
  for (int64_t tile = part->tile; tile < part->tile_end; ++tile) {
    if (!g.panels) {
      decode_columns(job, tile, 0, g.entries, 0, static_cast<uint32_t>(width), columns);
    } else if (tile / tiles_each != panel) {
      panel = tile / tiles_each;
      panel_columns(job, panel, static_cast<uint32_t>(width), columns);
    }
    const float *values = decode_values(job, tile, 0, g.entries, room);
    float bias[16], sums[16 * C * LANES];
    read_bias(job, tile, bias);
    Fetch fetch = {static_cast<const char *>(job->y) +
                       (part->token * job->y_stride + tile * 16) * item,
                   job->y_stride * item, tokens, next, nmf_min(share, left)};
    next += fetch.count * 64;
    left -= fetch.count;
    if (to_come == 0) { /* few tokens: the weights to come, whose lines follow each other */
      fetch.next = static_cast<const char *>(job->values) +
                   (tile * g.entries_held * item + AHEAD * 4) * 16;
      fetch.count = g.entries_held * item / 4;
      if (!g.panels)
        for (int64_t k = 0; k < g.words; ++k)
          __builtin_prefetch(static_cast<const uint32_t *>(job->codes) + ((tile + 2) * g.words + k) * 16);
    }
    for (int r = 0; r < 16; r += P * R) {
      const Columns here = {g.panels ? columns : columns + r, g.panels ? 1 : 16, g.panels ? 0 : 1};
      wide_rows<C, R, P>(x, values + r, here, g.entries, bias + r, sums + r * width, fetch);
    }
    write_tile(job, part, tile, sums, width);
  }
}

template <int V>
NMF_INLINE void wide_run(const nmf_job *job, const nmf_part *part, uint32_t *columns, float *room,
                         float *x) {
  switch (nmf_ceil_div(part->token_end - part->token, LANES)) {
    case 1:
      return wide_part<1, V>(job, part, columns, room, x);
    case 2:
      return wide_part<2, V>(job, part, columns, room, x);
    default:
      return wide_part<3, V>(job, part, columns, room, x);
  }
}

int64_t columns_bytes(const nmf_geometry &g) {
  return g.panels ? (g.entries + 15) / 16 * 64 : g.entries * 64;
}

void panel_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  uint32_t *columns = reinterpret_cast<uint32_t *>(scratch);
  scratch += columns_bytes(g);
  float *room = reinterpret_cast<float *>(scratch);
  const int64_t tokens = part->token_end - part->token;
  float *packed = room + (g.entries + 1) * 16;
  if (g.panel == 2) return wide_run<2>(job, part, columns, room, packed);
  if (g.panel == 4) return wide_run<4>(job, part, columns, room, packed);
  if (g.panel == 8) return wide_run<8>(job, part, columns, room, packed);
  if (tokens > LANES / 2) return wide_run<16>(job, part, columns, room, packed);
  const float *x = static_cast<const float *>(job->x) + part->token * job->x_stride;
  int64_t stride = job->x_stride;
  if (g.dtype != NMFLOW_F32) {
    scratch += PANEL_TILES * (g.entries + 1) * 64;
    float *copy = reinterpret_cast<float *>(scratch);
    for (int64_t t = part->token; t < part->token_end; ++t)
      read_inputs(job, t, 0, g.in, copy + (t - part->token) * g.in);
    x = copy;
    stride = g.in;
  }
  const int64_t panel_tiles_each = g.panel / 16;
  int64_t panel = -1;
  for (int64_t tile = part->tile; tile < part->tile_end;) {
    if (tile / panel_tiles_each != panel) {
      panel = tile / panel_tiles_each;
      panel_columns(job, panel, 1, columns);
    }
    const int64_t end = nmf_min((panel + 1) * panel_tiles_each, part->tile_end);
    if (PANEL_TILES >= 4 && end - tile >= 4) {
      panel_tiles<PANEL_TILES >= 4 ? 4 : 1>(job, part, tile, columns, x, stride, room);
      tile += 4;
    } else if (PANEL_TILES >= 2 && end - tile >= 2) {
      panel_tiles<PANEL_TILES >= 2 ? 2 : 1>(job, part, tile, columns, x, stride, room);
      tile += 2;
    } else {
      panel_tiles<1>(job, part, tile, columns, x, stride, room);
      tile += 1;
    }
  }
}

int64_t panel_scratch(const nmf_job *job, int64_t tokens, int64_t) {
  const nmf_geometry &g = job->g;
  const int64_t width = nmf_ceil_div(tokens, LANES) * LANES;
  return columns_bytes(g) + PANEL_TILES * (g.entries + 1) * 64 + width * g.in * 4 + 64;
}

int64_t panel_most(const nmf_geometry *, int64_t) { return 3 * LANES; }

const nmf_kernel panel_kernel = {panel_run, panel_scratch, panel_most, LANES};

}  // namespace
#endif
