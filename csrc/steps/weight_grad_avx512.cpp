/* The gradient of W at kept places, with rows in lanes, on AVX-512. */
#include "send.h"
#include "turn.h"

namespace {

/* A longer row's tokens take more room than the second-level cache has. */
int64_t tokens_of(const G &g) { return g.in <= 1536 && g.span_entries > 1 ? TOKENS : TOKENS / 2; }

/* x of some tokens by spans: [spans][stride tokens][16]. */
void pack_inputs(const G &g, const float *x, int64_t count, int64_t stride, float *to) {
  for (int64_t span = 0; span < g.spans; ++span) {
    const int64_t column = span * g.span;
    const __mmask16 there = first(nmf_min(16, g.in - column));
    for (int64_t t = 0; t < count; ++t)
      _mm512_storeu_ps(to + (span * stride + t) * 16, _mm512_maskz_loadu_ps(there, x + t * g.in + column));
  }
}

/* A tile's dy of some tokens, [count][16], added up into the gradient of its bias. */
void pack_rows(const G &g, const float *dy, int64_t tile, int64_t count, float *to, int64_t stride,
               float *bias) {
  const __mmask16 there = first(nmf_min(16, g.out - tile * 16));
  __m512 sum = at(bias);
  for (int64_t t = 0; t < count; ++t) {
    const __m512 v = _mm512_maskz_loadu_ps(there, dy + t * g.out + tile * 16);
    sum = _mm512_add_ps(sum, v);
    _mm512_storeu_ps(to + t * stride, v);
  }
  _mm512_storeu_ps(bias, sum);
}

/* ENTRIES of a tile's rows. PER: entries of a span, where the first one begins a span; else 0. */
template <int ENTRIES, int PER>
NMF_INLINE void add_rows(const G &g, const uint32_t *words, int64_t s, const float *dy, const float *x,
                         int64_t count, int64_t stride, float *sums) {
  __m512 sum[ENTRIES];
  __m512i code[ENTRIES];
  const float *from[ENTRIES];
#pragma GCC unroll 16
  for (int k = 0; k < ENTRIES; ++k) {
    sum[k] = at(sums + (s + k) * 16);
    /* A permutation reads the low four bits of a lane. */
    code[k] = _mm512_srl_epi32(_mm512_loadu_si512(words + (s + k) / 8 * 16),
                               _mm_cvtsi32_si128(static_cast<int>((s + k) % 8 * 4)));
    const int64_t span = PER > 0 ? s / (PER > 0 ? PER : 1) + k / (PER > 0 ? PER : 1) : (s + k) / g.span_entries;
    from[k] = x + span * stride * 16;
  }
  for (int64_t t = 0; t < count; ++t) {
    const __m512 d = at(dy + 16 * t);
    __m512 v = _mm512_setzero_ps();
#pragma GCC unroll 16
    for (int k = 0; k < ENTRIES; ++k) {
      if (PER == 0 || k % (PER > 0 ? PER : 1) == 0) v = at(from[k] + 16 * t);
      sum[k] = _mm512_fmadd_ps(_mm512_permutexvar_ps(code[k], v), d, sum[k]);
    }
  }
#pragma GCC unroll 16
  for (int k = 0; k < ENTRIES; ++k) _mm512_storeu_ps(sums + (s + k) * 16, sum[k]);
}

template <int PER>
void add_tile(const G &g, const uint32_t *words, const float *dy, const float *x, int64_t count,
              int64_t stride, float *sums) {
  int64_t s = 0;
  for (; s + 12 <= g.entries; s += 12) add_rows<12, PER>(g, words, s, dy, x, count, stride, sums);
  for (; s < g.entries; ++s) add_rows<1, 0>(g, words, s, dy, x, count, stride, sums);
}

/* TILES tiles of a panel at ENTRIES of its columns. */
template <int TILES, int ENTRIES>
NMF_INLINE void add_entries(const G &g, const void *codes, int64_t panel, int64_t s, const float *dy,
                            int64_t width, const float *x, int64_t count, float *sums) {
  __m512 sum[ENTRIES][TILES];
  const float *from[ENTRIES];
#pragma GCC unroll 24
  for (int k = 0; k < ENTRIES; ++k) {
    from[k] = x + nmf_min(panel_column(g, codes, panel, s + k), g.in - 1) * TOKENS;
#pragma GCC unroll 4
    for (int j = 0; j < TILES; ++j) sum[k][j] = at(sums + (j * g.entries + s + k) * 16);
  }
  for (int64_t t = 0; t < count; ++t) {
    __m512 d[TILES];
#pragma GCC unroll 4
    for (int j = 0; j < TILES; ++j) d[j] = at(dy + t * width + 16 * j);
#pragma GCC unroll 24
    for (int k = 0; k < ENTRIES; ++k) {
      const __m512 v = _mm512_set1_ps(from[k][t]);
#pragma GCC unroll 4
      for (int j = 0; j < TILES; ++j) sum[k][j] = _mm512_fmadd_ps(d[j], v, sum[k][j]);
    }
  }
#pragma GCC unroll 24
  for (int k = 0; k < ENTRIES; ++k)
#pragma GCC unroll 4
    for (int j = 0; j < TILES; ++j) _mm512_storeu_ps(sums + (j * g.entries + s + k) * 16, sum[k][j]);
}

template <int TILES, int ENTRIES>
void add_panel(const G &g, const void *codes, int64_t panel, const float *dy, int64_t width, const float *x,
               int64_t count, float *sums) {
  int64_t s = 0;
  for (; s + ENTRIES <= g.entries; s += ENTRIES)
    add_entries<TILES, ENTRIES>(g, codes, panel, s, dy, width, x, count, sums);
  for (; s < g.entries; ++s) add_entries<TILES, 1>(g, codes, panel, s, dy, width, x, count, sums);
}

/* The columns of a row's entries. */
void columns_of(const G &g, const void *codes, int64_t row, int32_t *to) {
  const uint32_t *words = g.panels ? nullptr : words_of(g, codes, row / 16) + row % 16;
  const uint8_t *shared = static_cast<const uint8_t *>(codes) + (g.panels ? row / g.panel * g.entries : 0);
  for (int64_t span = 0, s = 0; s < g.entries; span += g.span)
    for (const int64_t stop = nmf_min(s + g.span_entries, g.entries); s < stop; ++s) {
      const int64_t code = g.panels ? shared[s] : words[s / 8 * 16] >> (s % 8 * 4) & 15u;
      to[s] = static_cast<int32_t>(nmf_min(span + code, g.in - 1));
    }
}

/* A row of the gradient: zero, but for the kept places. `line` is zero before and after. */
void write_row(const nmf_stepping *job, int64_t row, const float *sums, float *line, int32_t *columns) {
  const G &g = job->g;
  if (!g.panels || row % g.panel == 0) columns_of(g, job->codes, row, columns);
  for (int64_t s = 0; s < g.entries; ++s) line[columns[s]] = sums[s * 16];
  if (job->past)
    send(job->dw + row * g.in, line, g.in * 4);
  else
    memcpy(job->dw + row * g.in, line, static_cast<size_t>(g.in) * 4);
  for (int64_t s = 0; s < g.entries; ++s) line[columns[s]] = 0.0f;
}

}  // namespace

int64_t nmf_weight_grad_scratch(const G *g, int64_t tiles) {
  const int64_t inputs = g->panels ? padded(g->in) * TOKENS : g->spans * tokens_of(*g) * 16;
  return (tiles * (g->entries + 1) * 16 + inputs + panel_rows(*g) * TOKENS + padded(g->in) +
          padded(g->entries)) * 4;
}

void nmf_weight_grad_avx512(const nmf_stepping *job, int64_t tile, int64_t tile_end, char *scratch) {
  const G &g = job->g;
  const int64_t tiles = tile_end - tile, width = panel_rows(g), step = width / 16;
  const int64_t most = g.panels ? TOKENS : tokens_of(g);
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
      const int64_t panel = t / step;
      int64_t j = 0;
      for (; j + 4 <= here; j += 4)
        add_panel<4, 6>(g, job->codes, panel, dy + 16 * j, width, x, count, to + j * g.entries * 16);
      for (; j + 2 <= here; j += 2)
        add_panel<2, 12>(g, job->codes, panel, dy + 16 * j, width, x, count, to + j * g.entries * 16);
      for (; j < here; ++j)
        add_panel<1, 24>(g, job->codes, panel, dy + 16 * j, width, x, count, to + j * g.entries * 16);
    }
  }
  for (int64_t row = tile * 16; row < nmf_min(tile_end * 16, g.out); ++row) {
    write_row(job, row, sums + (row / 16 - tile) * g.entries * 16 + row % 16, line, columns);
    if (job->bias != nullptr) job->bias[row] = bias[row - tile * 16];
  }
  if (job->past) sent();
}
