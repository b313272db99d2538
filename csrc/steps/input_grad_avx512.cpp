/* The gradient of x, dx = dy W, with tokens in lanes, on AVX-512. */
#include "turn.h"

/* The entries of a block of rows by columns: a counting sort span by span, whose columns are few enough
 * for what is counted and written to stay in the first cache. */
void nmf_sort_avx512(const nmf_stepping *job, int64_t block) {
  const G &g = job->g;
  const int64_t tile = block * (NMF_ROW_BLOCK / 16), end = nmf_min(tile + NMF_ROW_BLOCK / 16, g.tiles);
  int32_t *starts = job->starts + block * (g.in + 1), before = static_cast<int32_t>(tile * 16 * g.entries);
  alignas(64) uint32_t codes[16];
  alignas(64) float values[16];
  for (int64_t column = 0, s = 0; column < g.in; column += g.span, s += g.span_entries) {
    /* Lanes past the last row have codes of 0 and values of 0: they count as any other. */
    const int64_t width = nmf_min(g.span, g.in - column), stop = nmf_min(s + g.span_entries, g.entries);
    int32_t from[17] = {};
    const auto codes_of = [&](int64_t t, int64_t e) {
      const __m512i word = _mm512_loadu_si512(words_of(g, job->codes, t) + e / 8 * 16);
      const __m512i shifted = _mm512_srl_epi32(word, _mm_cvtsi32_si128(static_cast<int>(e % 8 * 4)));
      const __m512i code = _mm512_and_si512(shifted, _mm512_set1_epi32(15));
      _mm512_store_si512(codes, _mm512_min_epu32(code, _mm512_set1_epi32(static_cast<int>(width - 1))));
    };
    for (int64_t e = s; e < stop; ++e)
      for (int64_t t = tile; t < end; ++t) {
        codes_of(t, e);
        for (int lane = 0; lane < 16; ++lane) ++from[codes[lane] + 1];
      }
    for (int64_t c = 0; c < width; ++c) {
      from[c + 1] += from[c];
      starts[column + c] = before + from[c];
    }
    for (int64_t e = s; e < stop; ++e)
      for (int64_t t = tile; t < end; ++t) {
        codes_of(t, e);
        _mm512_store_ps(values, at(job->values + (t * g.entries + e) * 16));
        const int32_t row = static_cast<int32_t>((t - tile) * 16 * TOKENS);
        for (int lane = 0; lane < 16; ++lane) {
          nmf_entry *entry = job->entries + before + from[codes[lane]]++;
          entry->at = row + lane * static_cast<int32_t>(TOKENS);
          entry->value = values[lane];
        }
      }
    before += static_cast<int32_t>((stop - s) * (end - tile) * 16);
  }
  starts[g.in] = before;
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
