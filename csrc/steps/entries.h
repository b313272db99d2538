/* What the kernels of training steps share: where entries lie, vectors of 16 floats as registers, and
 * blocks that are transposed. All static, see common.h. */
#ifndef NMFLOW_ENTRIES_H
#define NMFLOW_ENTRIES_H

#include "steps.h"
#if defined(__AVX512BW__)
#include "avx512.h"
#else
#include "vector.h"
#endif

namespace {

typedef nmf_geometry G;
const int64_t TOKENS = NMF_TOKEN_BLOCK;
/* Registers of 16 floats. */
const int V = 16 / LANES;

#if !defined(__AVX512BW__)
NMF_INLINE void transpose16(const float *from, int64_t from_stride, float *to, int64_t to_stride) {
  for (int j = 0; j < 16; ++j)
    for (int i = 0; i < 16; ++i) to[j * to_stride + i] = from[i * from_stride + j];
}
#endif

/* `count` floats, 16 at most, and zeros after them. */
NMF_INLINE void copy16(const float *from, int64_t count, float *to) {
#if defined(__AVX512BW__)
  _mm512_storeu_ps(to, _mm512_maskz_loadu_ps(static_cast<__mmask16>((1u << count) - 1u), from));
#else
  if (count == 16) {
    memcpy(to, from, 64);
    return;
  }
  memset(to, 0, 64);
  for (int64_t i = 0; i < count; ++i) to[i] = from[i];
#endif
}

NMF_INLINE int64_t padded(int64_t count) { return nmf_ceil_div(count, 16) * 16; }
NMF_INLINE int64_t panel_rows(const G &g) { return g.panels ? g.panel : 16; }

/* The first input of the span that entry s lies in. */
NMF_INLINE int64_t span_of(const G &g, int64_t s) { return s / g.span_entries * g.span; }

/* The column of an entry of a panel. */
NMF_INLINE int64_t panel_column(const G &g, const void *codes, int64_t panel, int64_t s) {
  return span_of(g, s) + static_cast<const uint8_t *>(codes)[panel * g.entries + s];
}
/* The codes of a tile of rows, `bits` each, and one of a row's: `words` are those of its lane. */
NMF_INLINE const uint32_t *words_of(const G &g, const void *codes, int64_t tile) {
  return static_cast<const uint32_t *>(codes) + tile * g.words * 16;
}
template <int BITS>
NMF_INLINE uint32_t code_at(const uint32_t *words, int64_t s) {
  const int per = 32 / BITS;
  return words[s / per * 16] >> (s % per * BITS) & ((1u << BITS) - 1u);
}

/* The columns of a row's entries. */
void row_columns(const G &g, const void *codes, int64_t row, int32_t *to) {
  const uint32_t *words = g.panels ? nullptr : words_of(g, codes, row / 16) + row % 16;
  const uint8_t *shared = static_cast<const uint8_t *>(codes) + (g.panels ? row / g.panel * g.entries : 0);
  for (int64_t span = 0, s = 0; s < g.entries; span += g.span)
    for (const int64_t stop = nmf_min(s + g.span_entries, g.entries); s < stop; ++s) {
      const int64_t code = g.panels ? shared[s] : g.bits == 4 ? code_at<4>(words, s) : code_at<8>(words, s);
      to[s] = static_cast<int32_t>(nmf_min(span + code, g.in - 1));
    }
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
        copy16(from + (i + nmf_min(r, rows - 1)) * stride + j, r < rows ? columns : 0, block + 16 * r);
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
        memcpy(to + (i + r) * stride + j, block + 16 * r, static_cast<size_t>(columns) * 4);
    }
}

}  // namespace
#endif
