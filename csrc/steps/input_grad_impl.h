/* The gradient of x, dx = dy W, with tokens in lanes. The same source is compiled once for each
 * instruction set. Everything is static: see common.h. */
#include "entries.h"

namespace {

/* The entries of a block of rows by columns: a counting sort span by span, whose columns are few enough
 * for what is counted and written to stay in the first cache. */
template <int BITS>
void sort_of(const nmf_stepping *job, int64_t block) {
  const G &g = job->g;
  const int64_t tile = block * (NMF_ROW_BLOCK / 16), end = nmf_min(tile + NMF_ROW_BLOCK / 16, g.tiles);
  int32_t *starts = job->starts + block * (g.in + 1), before = static_cast<int32_t>(tile * 16 * g.entries);
  alignas(64) uint32_t codes[16];
  alignas(64) float values[16];
  for (int64_t column = 0, s = 0; column < g.in; column += g.span, s += g.span_entries) {
    /* Lanes past the last row have codes of 0 and values of 0: they count as any other. */
    const int64_t width = nmf_min(g.span, g.in - column), stop = nmf_min(s + g.span_entries, g.entries);
    int32_t from[(1 << BITS) + 1] = {};
    const auto codes_of = [&](int64_t t, int64_t e) {
      const uint32_t *words = words_of(g, job->codes, t), most = static_cast<uint32_t>(width - 1);
      for (int lane = 0; lane < 16; ++lane) {
        const uint32_t code = code_at<BITS>(words + lane, e);
        codes[lane] = code < most ? code : most;
      }
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
        memcpy(values, job->values + (t * g.entries + e) * 16, sizeof values);
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

void sort(const nmf_stepping *job, int64_t block) {
  job->g.bits == 4 ? sort_of<4>(job, block) : sort_of<8>(job, block);
}

template <int VECS>
void grad_of_columns(const nmf_stepping *job, int64_t block, const float *dy, float *dx) {
  const int32_t *starts = job->starts + block * (job->g.in + 1);
  for (int64_t c = 0; c < job->g.in; ++c) {
    vecf sum[VECS];
    float *to = dx + c * TOKENS;
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) sum[j] = block ? load(to + LANES * j) : vecf{};
    for (int32_t e = starts[c]; e < starts[c + 1]; ++e) {
      const vecf w = splat(job->entries[e].value);
      const float *from = dy + job->entries[e].at;
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) sum[j] += load(from + LANES * j) * w;
    }
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) store(to + LANES * j, sum[j]);
  }
}

/* ENTRIES of a panel at a time: dy is loaded once for all of them. */
template <int VECS, int ENTRIES>
NMF_INLINE void grad_of_entries(const nmf_stepping *job, int64_t panel, int64_t s, const float *dy,
                                float *dx) {
  const G &g = job->g;
  vecf sum[ENTRIES][VECS];
  float *to[ENTRIES];
#pragma GCC unroll 8
  for (int k = 0; k < ENTRIES; ++k) {
    to[k] = dx + nmf_min(panel_column(g, job->codes, panel, s + k), g.in - 1) * TOKENS;
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) sum[k][j] = load(to[k] + LANES * j);
  }
  const int64_t tiles = g.panel / 16, tile = panel * tiles, end = nmf_min(tile + tiles, g.tiles);
  for (int64_t t = tile; t < end; ++t) {
    const float *w = job->values + (t * g.entries + s) * 16;
    for (int64_t lane = 0; lane < 16; ++lane, dy += TOKENS) {
      vecf from[VECS];
#pragma GCC unroll 8
      for (int j = 0; j < VECS; ++j) from[j] = load(dy + LANES * j);
#pragma GCC unroll 8
      for (int k = 0; k < ENTRIES; ++k) {
        const vecf value = splat(w[16 * k + lane]);
#pragma GCC unroll 8
        for (int j = 0; j < VECS; ++j) sum[k][j] += from[j] * value;
      }
    }
  }
#pragma GCC unroll 8
  for (int k = 0; k < ENTRIES; ++k)
#pragma GCC unroll 8
    for (int j = 0; j < VECS; ++j) store(to[k] + LANES * j, sum[k][j]);
}

/* As many sums as registers hold. */
template <int VECS>
void grad_of_panel(const nmf_stepping *job, int64_t panel, const float *dy, float *dx) {
  const int width = VECS < 4 ? VECS : 4, entries = LANES == 16 ? 6 : 2;
  for (int j = 0; j < VECS; j += width) {
    int64_t s = 0;
    for (; s + entries <= job->g.entries; s += entries)
      grad_of_entries<width, entries>(job, panel, s, dy + LANES * j, dx + LANES * j);
    for (; s < job->g.entries; ++s)
      grad_of_entries<width, 1>(job, panel, s, dy + LANES * j, dx + LANES * j);
  }
}

template <int VECS>
void input_grad_of(const nmf_stepping *job, int64_t token, int64_t count, char *scratch) {
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

void input_grad(const nmf_stepping *job, int64_t token_block, char *scratch) {
  const int64_t token = token_block * TOKENS, count = nmf_min(TOKENS, job->tokens - token);
  switch (nmf_ceil_div(count, 16)) {
    case 1:
      return input_grad_of<V>(job, token, count, scratch);
    case 2:
      return input_grad_of<2 * V>(job, token, count, scratch);
    case 3: /* registers of four, where there are more than that */
      return input_grad_of<V == 1 ? 3 : 4 * V>(job, token, count, scratch);
    default:
      return input_grad_of<4 * V>(job, token, count, scratch);
  }
}

}  // namespace
