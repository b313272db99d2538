/* Training on kept places, fp32, AVX-512. */
#include "steps.h"

#include "avx512.h"
#include "prints.h"
#include "send.h"

namespace {

typedef nmf_geometry G;
const int64_t TOKENS = NMF_TOKEN_BLOCK;

NMF_INLINE __m512 at(const float *p) { return _mm512_loadu_ps(p); }
NMF_INLINE __mmask16 first(int64_t count) { return static_cast<__mmask16>((1u << count) - 1u); }

int64_t padded(int64_t count) { return nmf_ceil_div(count, 16) * 16; }
int64_t panel_rows(const G &g) { return g.panels ? g.panel : 16; }

/* The first input of the span that entry s lies in. */
NMF_INLINE int64_t span_of(const G &g, int64_t s) { return s / g.span_entries * g.span; }

/* The column of an entry of a panel, or of a row. */
NMF_INLINE int64_t panel_column(const G &g, const void *codes, int64_t panel, int64_t s) {
  return span_of(g, s) + static_cast<const uint8_t *>(codes)[panel * g.entries + s];
}
NMF_INLINE const uint32_t *words_of(const G &g, const void *codes, int64_t tile) {
  return static_cast<const uint32_t *>(codes) + tile * g.words * 16;
}

/* 16 x 16 blocks of from [count][width], stride apart, to to[width][TOKENS]; zeros past `count` up to
 * the next 16. */
void transpose_in(const float *from, int64_t stride, int64_t count, int64_t width, float *to) {
  float block[256];
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t j = 0; j < width; j += 16) {
      const int64_t rows = nmf_min(16, count - i), columns = nmf_min(16, width - j);
      if (rows == 16 && columns == 16) {
        transpose16(from + i * stride + j, stride, to + j * TOKENS + i, TOKENS);
        continue;
      }
      for (int64_t r = 0; r < 16; ++r)
        _mm512_storeu_ps(block + 16 * r, r < rows ? _mm512_maskz_loadu_ps(first(columns), from + (i + r) * stride + j)
                                                  : _mm512_setzero_ps());
      transpose16(block, 16, to + j * TOKENS + i, TOKENS);
    }
}

/* Back: to [count][width] from from[width][TOKENS]. */
void transpose_out(const float *from, int64_t count, int64_t width, float *to, int64_t stride) {
  float block[256];
  for (int64_t i = 0; i < count; i += 16)
    for (int64_t j = 0; j < width; j += 16) {
      const int64_t rows = nmf_min(16, count - i), columns = nmf_min(16, width - j);
      if (rows == 16 && columns == 16) {
        transpose16(from + j * TOKENS + i, TOKENS, to + i * stride + j, stride);
        continue;
      }
      transpose16(from + j * TOKENS + i, TOKENS, block, 16);
      for (int64_t r = 0; r < rows; ++r)
        _mm512_mask_storeu_ps(to + (i + r) * stride + j, first(columns), at(block + 16 * r));
    }
}

}  // namespace

/* -- packing ---------------------------------------------------------------------------------- */

int64_t nmf_pack_scratch(const G *g) { return padded(g->entries) * 4 + padded(g->in) / 16 * 2 + 64; }

/* A row's, or a panel's, kept places: the mask's and those that are not zero; a group with fewer than
 * N is filled up with its lowest. Returns whether no group has more. */
bool nmf_pack_avx512(const nmf_stepping *job, int64_t panel, int64_t panel_end, char *scratch) {
  const G &g = job->g;
  int32_t *columns = reinterpret_cast<int32_t *>(scratch);
  uint16_t *used = reinterpret_cast<uint16_t *>(scratch + padded(g.entries) * 4);
  const int64_t chunks = nmf_ceil_div(g.in, 16);
  for (int64_t p = panel; p < panel_end; ++p) {
    const int64_t begin = p * g.panel, end = nmf_min(begin + g.panel, g.out);
    memset(used, 0, static_cast<size_t>(chunks) * 2);
    for (int64_t row = begin; row < end; ++row)
      for (int64_t c = 0; c < chunks; ++c) {
        const __mmask16 there = first(nmf_min(16, g.in - 16 * c));
        const int64_t from = row * g.in + 16 * c;
        const __m512i bits = _mm512_maskz_loadu_epi32(there, job->w + from);
        uint32_t some = _mm512_test_epi32_mask(bits, _mm512_set1_epi32(0x7fffffff));
        if (job->mask != nullptr) {
          const __m128i kept = _mm_maskz_loadu_epi8(there, job->mask + from);
          some |= _mm_test_epi8_mask(kept, kept);
        }
        used[c] = static_cast<uint16_t>(used[c] | some);
      }
    for (int64_t group = 0, s = 0; group < g.in; group += g.m) {
      int64_t left = g.n;
      for (int64_t c = group; c < group + g.m;) { /* 16 at most of a chunk at a time */
        const int64_t width = nmf_min(16 - c % 16, group + g.m - c);
        uint32_t some = (used[c / 16] >> (c % 16)) & ((1u << width) - 1u);
        for (; some != 0; some &= some - 1) {
          if (left-- == 0) return false;
          columns[s++] = static_cast<int32_t>(c + __builtin_ctz(some));
        }
        c += width;
      }
      if (left == 0) continue;
      /* Fill up, in order: rare, so by the book. */
      int64_t had = g.n - left;
      const int64_t start = s - had;
      for (int64_t c = group; left > 0; ++c) {
        if (used[c / 16] >> (c % 16) & 1) continue;
        int64_t i = s++;
        for (; i > start && columns[i - 1] > c; --i) columns[i] = columns[i - 1];
        columns[i] = static_cast<int32_t>(c);
        --left;
      }
    }
    for (int64_t row = begin; row < end; ++row) {
      float *values = job->values + row / 16 * g.entries * 16 + row % 16;
      const float *w = job->w + row * g.in;
      for (int64_t s = 0; s < g.entries; ++s) values[16 * s] = w[columns[s]];
    }
    for (int64_t s = 0; s < g.entries; ++s) columns[s] -= static_cast<int32_t>(span_of(g, s));
    if (g.panels) {
      uint8_t *codes = static_cast<uint8_t *>(job->codes) + p * g.entries;
      for (int64_t s = 0; s < g.entries; ++s) codes[s] = static_cast<uint8_t>(columns[s]);
      continue;
    }
    for (int64_t word = 0; word < g.words; ++word) {
      uint32_t bits = 0;
      for (int64_t s = word * 8; s < nmf_min(word * 8 + 8, g.entries); ++s)
        bits |= static_cast<uint32_t>(columns[s]) << (s % 8 * 4);
      for (int64_t row = begin; row < end; ++row)
        static_cast<uint32_t *>(job->codes)[(row / 16 * g.words + word) * 16 + row % 16] = bits;
    }
  }
  return true;
}

/* -- the gradient of x: dx = dy W, tokens in lanes --------------------------------------------- */

namespace {

/* A tile's codes, entry by entry: where each of its 16 rows has its column. */
template <class F>
NMF_INLINE void each_entry(const G &g, const void *codes, int64_t tile, F found) {
  const uint32_t *words = words_of(g, codes, tile);
  int64_t span = 0, left = g.span_entries;
  for (int64_t s = 0; s < g.entries; ++s) {
    const uint32_t *word = words + s / 8 * 16;
    for (int64_t lane = 0; lane < 16; ++lane)
      found(lane, s, span + (word[lane] >> (s % 8 * 4) & 15u));
    if (--left == 0) {
      left = g.span_entries;
      span += g.span;
    }
  }
}

}  // namespace

/* The entries of a block of rows by columns, as a counting sort. */
void nmf_sort_avx512(const nmf_stepping *job, int64_t block) {
  const G &g = job->g;
  int32_t *starts = job->starts + block * (g.in + 1);
  const int64_t tile = block * (NMF_ROW_BLOCK / 16), end = nmf_min(tile + NMF_ROW_BLOCK / 16, g.tiles);
  const int64_t most = g.in - 1;
  memset(starts, 0, static_cast<size_t>(g.in + 1) * 4);
  /* Lanes past the last row have codes of 0 and values of 0: they count as any other. */
  for (int64_t t = tile; t < end; ++t)
    each_entry(g, job->codes, t, [&](int64_t, int64_t, int64_t column) {
      ++starts[nmf_min(column, most) + 1];
    });
  int32_t before = static_cast<int32_t>(tile * 16 * g.entries);
  for (int64_t c = 0; c <= g.in; ++c) before = starts[c] += before;
  for (int64_t t = tile; t < end; ++t) {
    const float *values = job->values + t * g.entries * 16;
    each_entry(g, job->codes, t, [&](int64_t lane, int64_t s, int64_t column) {
      nmf_entry *e = job->entries + starts[nmf_min(column, most)]++;
      e->at = static_cast<int32_t>(((t - tile) * 16 + lane) * TOKENS);
      e->value = values[s * 16 + lane];
    });
  }
  /* What was counted up is now where the next column begins. */
  memmove(starts + 1, starts, static_cast<size_t>(g.in) * 4);
  starts[0] = static_cast<int32_t>(tile * 16 * g.entries);
}

int64_t nmf_input_grad_scratch(const G *g) {
  const int64_t rows = g->panels ? g->panel : NMF_ROW_BLOCK;
  return (padded(g->in) + padded(rows)) * TOKENS * 4;
}

namespace {

template <int VECS>
void grad_of_columns(const nmf_stepping *job, int64_t block, const float *dy, float *dx) {
  const int32_t *starts = job->starts + block * (job->g.in + 1);
  for (int64_t c = 0; c < job->g.in; ++c) {
    __m512 sum[VECS];
    float *to = dx + c * TOKENS;
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) sum[j] = block ? at(to + 16 * j) : _mm512_setzero_ps();
    for (int32_t e = starts[c]; e < starts[c + 1]; ++e) {
      const __m512 w = _mm512_set1_ps(job->entries[e].value);
      const float *from = dy + job->entries[e].at;
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) sum[j] = _mm512_fmadd_ps(at(from + 16 * j), w, sum[j]);
    }
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) _mm512_storeu_ps(to + 16 * j, sum[j]);
  }
}

/* ENTRIES of a panel at a time: dy is loaded once for all of them. */
template <int VECS, int ENTRIES>
NMF_INLINE void grad_of_entries(const nmf_stepping *job, int64_t panel, int64_t s, const float *dy,
                                float *dx) {
  const G &g = job->g;
  __m512 sum[ENTRIES][VECS];
  float *to[ENTRIES];
#pragma GCC unroll 8
  for (int k = 0; k < ENTRIES; ++k) {
    to[k] = dx + nmf_min(panel_column(g, job->codes, panel, s + k), g.in - 1) * TOKENS;
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) sum[k][j] = at(to[k] + 16 * j);
  }
  const int64_t tiles = g.panel / 16, tile = panel * tiles, end = nmf_min(tile + tiles, g.tiles);
  for (int64_t t = tile; t < end; ++t) {
    const float *w = job->values + (t * g.entries + s) * 16;
    for (int64_t lane = 0; lane < 16; ++lane, dy += TOKENS) {
      __m512 from[VECS];
#pragma GCC unroll 4
      for (int j = 0; j < VECS; ++j) from[j] = at(dy + 16 * j);
#pragma GCC unroll 8
      for (int k = 0; k < ENTRIES; ++k) {
        const __m512 value = _mm512_set1_ps(w[16 * k + lane]);
#pragma GCC unroll 4
        for (int j = 0; j < VECS; ++j) sum[k][j] = _mm512_fmadd_ps(from[j], value, sum[k][j]);
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < ENTRIES; ++k)
#pragma GCC unroll 4
    for (int j = 0; j < VECS; ++j) _mm512_storeu_ps(to[k] + 16 * j, sum[k][j]);
}

template <int VECS>
void grad_of_panel(const nmf_stepping *job, int64_t panel, const float *dy, float *dx) {
  int64_t s = 0;
  for (; s + 6 <= job->g.entries; s += 6) grad_of_entries<VECS, 6>(job, panel, s, dy, dx);
  for (; s < job->g.entries; ++s) grad_of_entries<VECS, 1>(job, panel, s, dy, dx);
}

template <int VECS>
void input_grad(const nmf_stepping *job, int64_t token, int64_t count, char *scratch) {
  const G &g = job->g;
  float *dx = reinterpret_cast<float *>(scratch), *turned = dx + padded(g.in) * TOKENS;
  const int64_t rows = g.panels ? g.panel : NMF_ROW_BLOCK;
  if (g.panels) memset(dx, 0, static_cast<size_t>(padded(g.in) * TOKENS) * 4);
  for (int64_t block = 0; block * rows < g.out; ++block) {
    const int64_t row = block * rows, width = nmf_min(rows, g.out - row);
    transpose_in(job->dy + token * g.out + row, g.out, count, width, turned);
    if (g.panels)
      grad_of_panel<VECS>(job, block, turned, dx);
    else
      grad_of_columns<VECS>(job, block, turned, dx);
  }
  transpose_out(dx, count, g.in, job->dx + token * g.in, g.in);
}

}  // namespace

void nmf_input_grad_avx512(const nmf_stepping *job, int64_t token_block, char *scratch) {
  const int64_t token = token_block * TOKENS, count = nmf_min(TOKENS, job->tokens - token);
  switch (nmf_ceil_div(count, 16)) {
    case 1:
      return input_grad<1>(job, token, count, scratch);
    case 2:
      return input_grad<2>(job, token, count, scratch);
    case 3:
      return input_grad<3>(job, token, count, scratch);
    default:
      return input_grad<4>(job, token, count, scratch);
  }
}

/* -- the gradient of W at kept places, rows in lanes ------------------------------------------- */

namespace {

/* A longer row's tokens take more room than the second-level cache has. */
int64_t tokens_of(const G &g) { return g.in <= 1536 ? TOKENS : TOKENS / 2; }

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

/* A row of the gradient: zero, but for the kept places. */
void write_row(const nmf_stepping *job, int64_t row, const float *sums, float *line) {
  const G &g = job->g;
  const uint32_t *words = g.panels ? nullptr : words_of(g, job->codes, row / 16) + row % 16;
  for (int pass = 0; pass < 2; ++pass) {
    for (int64_t s = 0; s < g.entries; ++s) {
      const int64_t column = g.panels ? panel_column(g, job->codes, row / g.panel, s)
                                      : span_of(g, s) + (words[s / 8 * 16] >> (s % 8 * 4) & 15u);
      line[nmf_min(column, g.in - 1)] = pass == 0 ? sums[s * 16] : 0.0f;
    }
    if (pass == 1) break;
    if (job->past)
      send(job->dw + row * g.in, line, g.in * 4);
    else
      memcpy(job->dw + row * g.in, line, static_cast<size_t>(g.in) * 4);
  }
}

}  // namespace

int64_t nmf_weight_grad_scratch(const G *g, int64_t tiles) {
  const int64_t inputs = g->panels ? padded(g->in) * TOKENS : g->spans * tokens_of(*g) * 16;
  return (tiles * (g->entries + 1) * 16 + inputs + panel_rows(*g) * TOKENS + padded(g->in)) * 4;
}

void nmf_weight_grad_avx512(const nmf_stepping *job, int64_t tile, int64_t tile_end, char *scratch) {
  const G &g = job->g;
  const int64_t tiles = tile_end - tile, width = panel_rows(g), step = width / 16;
  const int64_t most = g.panels ? TOKENS : tokens_of(g);
  float *sums = reinterpret_cast<float *>(scratch), *bias = sums + tiles * g.entries * 16;
  float *x = bias + tiles * 16, *dy = x + (g.panels ? padded(g.in) * TOKENS : g.spans * most * 16);
  float *line = dy + width * TOKENS;
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
    write_row(job, row, sums + (row / 16 - tile) * g.entries * 16 + row % 16, line);
    if (job->bias != nullptr) job->bias[row] = bias[row - tile * 16];
  }
  if (job->past) sent();
}

/* -- kept elements together ------------------------------------------------------------------- */

bool nmf_take_avx512(const nmf_gathering *job, int64_t row, int64_t row_end) {
  for (int64_t r = row; r < row_end; ++r) {
    int64_t left = job->starts[r + 1] - job->starts[r];
    float *to = job->together + job->starts[r];
    for (int64_t c = 0; c < job->cols; c += 16) {
      const __mmask16 there = first(nmf_min(16, job->cols - c));
      const __m128i kept = _mm_maskz_loadu_epi8(there, job->mask + r * job->cols + c);
      const __mmask16 some = _mm_test_epi8_mask(kept, kept);
      const int count = __builtin_popcount(some);
      if ((left -= count) < 0) return false;
      const __m512 v = _mm512_maskz_loadu_ps(some, job->apart + r * job->cols + c);
      _mm512_mask_storeu_ps(to, first(count), _mm512_maskz_compress_ps(some, v));
      to += count;
    }
    if (left != 0) return false;
  }
  return true;
}

bool nmf_put_avx512(const nmf_gathering *job, int64_t row, int64_t row_end, char *scratch) {
  float *line = reinterpret_cast<float *>(scratch);
  const int64_t bytes = job->cols * 4;
  for (int64_t r = row; r < row_end; ++r) {
    int64_t left = job->starts[r + 1] - job->starts[r];
    const float *from = job->together + job->starts[r];
    float *to = job->past ? line : job->apart + r * job->cols;
    for (int64_t c = 0; c < job->cols; c += 16) {
      const __mmask16 there = first(nmf_min(16, job->cols - c));
      const __m128i kept = _mm_maskz_loadu_epi8(there, job->mask + r * job->cols + c);
      const __mmask16 some = _mm_test_epi8_mask(kept, kept);
      const int count = __builtin_popcount(some);
      if ((left -= count) < 0) return false;
      const __m512 v = _mm512_maskz_loadu_ps(first(count), from);
      _mm512_mask_storeu_ps(to + c, there, _mm512_maskz_expand_ps(some, v));
      from += count;
    }
    if (left != 0) return false;
    if (job->prints != nullptr)
      job->prints[r] = total_of(sum_bytes_of(to, job->odd, bytes, nmf_word(bytes), vecl{}));
    if (job->past) send(job->apart + r * job->cols, line, bytes);
  }
  if (job->past) sent();
  return true;
}
