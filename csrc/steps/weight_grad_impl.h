/* The gradient of W at kept places, with rows in lanes. The same source is compiled once for each
 * instruction set. Everything is static: see common.h. */
#include "entries.h"
#include "send.h"

namespace {

/* x of some tokens by spans: [spans][stride tokens][16]. */
void pack_inputs(const G &g, const float *x, int64_t count, int64_t stride, float *to) {
  for (int64_t span = 0; span < g.spans; ++span) {
    const int64_t column = span * g.span;
    for (int64_t t = 0; t < count; ++t)
      copy16(x + t * g.in + column, nmf_min(16, g.in - column), to + (span * stride + t) * 16);
  }
}

/* A tile's dy of some tokens, [count][16], added up into the gradient of its bias. */
void pack_rows(const G &g, const float *dy, int64_t tile, int64_t count, float *to, int64_t stride,
               float *bias) {
  vecf sum[V];
  for (int v = 0; v < V; ++v) sum[v] = load(bias + LANES * v);
  for (int64_t t = 0; t < count; ++t) {
    copy16(dy + t * g.out + tile * 16, nmf_min(16, g.out - tile * 16), to + t * stride);
    for (int v = 0; v < V; ++v) sum[v] += load(to + t * stride + LANES * v);
  }
  for (int v = 0; v < V; ++v) store(bias + LANES * v, sum[v]);
}

#if defined(__AVX512BW__) /* elsewhere tokens_weight_grad serves every pattern without panels */
/* Lane by lane one of the 16 floats at x, by the low four bits of its code. */
NMF_INLINE vecf pick16(vecu codes, const float *x) {
  return (vecf)_mm512_permutexvar_ps((__m512i)codes, (__m512)load(x));
}

/* ENTRIES of a register's rows. PER: entries of a span, where the first one begins a span; else 0. */
template <int ENTRIES, int PER>
NMF_INLINE void add_rows(const G &g, const uint32_t *words, int64_t s, const float *dy, const float *x,
                         int64_t count, int64_t stride, float *sums) {
  vecf sum[ENTRIES];
  vecu codes[ENTRIES];
  const float *from[ENTRIES];
#pragma GCC unroll 16
  for (int k = 0; k < ENTRIES; ++k) {
    sum[k] = load(sums + (s + k) * 16);
    codes[k] = load(words + (s + k) / 8 * 16) >> static_cast<int>((s + k) % 8 * 4);
    const int64_t span = PER > 0 ? s / (PER > 0 ? PER : 1) + k / (PER > 0 ? PER : 1) : (s + k) / g.span_entries;
    from[k] = x + span * stride * 16;
  }
  for (int64_t t = 0; t < count; ++t) {
    const vecf d = load(dy + 16 * t);
#pragma GCC unroll 16
    for (int k = 0; k < ENTRIES; ++k) sum[k] += pick16(codes[k], from[k] + 16 * t) * d;
  }
#pragma GCC unroll 16
  for (int k = 0; k < ENTRIES; ++k) store(sums + (s + k) * 16, sum[k]);
}

template <int PER>
void add_tile(const G &g, const uint32_t *words, const float *dy, const float *x, int64_t count,
              int64_t stride, float *sums) {
  const int entries = 12; /* whole spans, and as many as registers hold */
  for (int v = 0; v < 16; v += LANES) {
    int64_t s = 0;
    for (; s + entries <= g.entries; s += entries)
      add_rows<entries, PER>(g, words + v, s, dy + v, x, count, stride, sums + v);
    for (; s < g.entries; ++s) add_rows<1, 0>(g, words + v, s, dy + v, x, count, stride, sums + v);
  }
}

#endif

/* TILES tiles of a panel at ENTRIES of its columns. */
template <int TILES, int ENTRIES>
NMF_INLINE void add_entries(const G &g, const void *codes, int64_t panel, int64_t s, const float *dy,
                            int64_t width, const float *x, int64_t count, float *sums) {
  const int wide = TILES * V; /* registers of a token's rows */
  vecf sum[ENTRIES][wide];
  const float *from[ENTRIES];
  const auto at = [&](int k, int j) { return sums + (j / V * g.entries + s + k) * 16 + j % V * LANES; };
#pragma GCC unroll 24
  for (int k = 0; k < ENTRIES; ++k) {
    from[k] = x + nmf_min(panel_column(g, codes, panel, s + k), g.in - 1) * TOKENS;
#pragma GCC unroll 4
    for (int j = 0; j < wide; ++j) sum[k][j] = load(at(k, j));
  }
  for (int64_t t = 0; t < count; ++t) {
    vecf d[wide];
#pragma GCC unroll 4
    for (int j = 0; j < wide; ++j) d[j] = load(dy + t * width + LANES * j);
#pragma GCC unroll 24
    for (int k = 0; k < ENTRIES; ++k) {
      const vecf v = splat(from[k][t]);
#pragma GCC unroll 4
      for (int j = 0; j < wide; ++j) sum[k][j] += d[j] * v;
    }
  }
#pragma GCC unroll 24
  for (int k = 0; k < ENTRIES; ++k)
#pragma GCC unroll 4
    for (int j = 0; j < wide; ++j) store(at(k, j), sum[k][j]);
}

template <int TILES, int ENTRIES>
void add_panel(const G &g, const void *codes, int64_t panel, const float *dy, int64_t width, const float *x,
               int64_t count, float *sums) {
  int64_t s = 0;
  for (; s + ENTRIES <= g.entries; s += ENTRIES)
    add_entries<TILES, ENTRIES>(g, codes, panel, s, dy, width, x, count, sums);
  for (; s < g.entries; ++s) add_entries<TILES, 1>(g, codes, panel, s, dy, width, x, count, sums);
}

/* A row of the gradient: zero, but for the kept places, whose sums are `step` apart. `line` is zero
 * before and after. */
void write_row(const nmf_stepping *job, int64_t row, const float *sums, int64_t step, const int32_t *columns,
               float *line) {
  const G &g = job->g;
  for (int64_t s = 0; s < g.entries; ++s) line[columns[s]] = sums[s * step];
  if (job->past)
    send(job->dw + row * g.in, line, g.in * 4);
  else
    memcpy(job->dw + row * g.in, line, static_cast<size_t>(g.in) * 4);
  for (int64_t s = 0; s < g.entries; ++s) line[columns[s]] = 0.0f;
}

/* Of panels, and of rows whose spans fit a register. */
void weight_grad(const nmf_stepping *job, int64_t tile, int64_t tile_end, char *scratch) {
  const G &g = job->g;
  const int64_t tiles = tile_end - tile, width = panel_rows(g), step = width / 16;
  const int64_t most = nmf_tokens_of(job);
  float *sums = reinterpret_cast<float *>(scratch), *bias = sums + tiles * g.entries * 16;
  float *x = bias + tiles * 16, *dy = x + (g.panels ? padded(g.in) * TOKENS : g.spans * most * 16);
  float *line = dy + width * TOKENS;
  int32_t *columns = reinterpret_cast<int32_t *>(line + padded(g.in));
  memset(sums, 0, static_cast<size_t>(tiles * (g.entries + 1)) * 64);
  memset(line, 0, static_cast<size_t>(padded(g.in)) * 4);
  for (int64_t token = 0; token < job->tokens; token += most) {
    const int64_t count = nmf_min(most, job->tokens - token);
    if (g.panels)
      transpose_in(job->x + token * g.in, g.in, count, g.in, x);
    else
      pack_inputs(g, job->x + token * g.in, count, most, x);
    for (int64_t t = tile; t < tile_end; t += step) {
      const int64_t here = nmf_min(step, tile_end - t);
      for (int64_t j = 0; j < here; ++j)
        pack_rows(g, job->dy + token * g.out, t + j, count, dy + 16 * j, width, bias + (t - tile + j) * 16);
      float *to = sums + (t - tile) * g.entries * 16;
#if defined(__AVX512BW__)
      if (!g.panels) {
        const uint32_t *words = words_of(g, job->codes, t);
        switch (g.span_entries) {
          case 1:
            add_tile<1>(g, words, dy, x, count, most, to);
            break;
          case 2:
            add_tile<2>(g, words, dy, x, count, most, to);
            break;
          case 4:
            add_tile<4>(g, words, dy, x, count, most, to);
            break;
          default:
            add_tile<0>(g, words, dy, x, count, most, to);
        }
        continue;
      }
#endif
      const int64_t panel = t / step;
      int64_t j = 0;
      for (; LANES == 16 && j + 4 <= here; j += 4)
        add_panel<4, 6>(g, job->codes, panel, dy + 16 * j, width, x, count, to + j * g.entries * 16);
      for (; LANES == 16 && j + 2 <= here; j += 2)
        add_panel<2, 12>(g, job->codes, panel, dy + 16 * j, width, x, count, to + j * g.entries * 16);
      for (; j < here; ++j)
        add_panel<1, LANES == 16 ? 24 : 6>(g, job->codes, panel, dy + 16 * j, width, x, count,
                                           to + j * g.entries * 16);
    }
  }
  for (int64_t row = tile * 16; row < nmf_min(tile_end * 16, g.out); ++row) {
    if (!g.panels || row % g.panel == 0) row_columns(g, job->codes, row, columns);
    write_row(job, row, sums + (row / 16 - tile) * g.entries * 16 + row % 16, 16, columns, line);
    if (job->bias != nullptr) job->bias[row] = bias[row - tile * 16];
  }
  if (job->past) sent();
}

}  // namespace
