/* What the kernels of training steps share on AVX-512: columns of entries, and blocks that are
 * transposed. All static, see common.h. */
#ifndef NMFLOW_TURN_H
#define NMFLOW_TURN_H

#include "avx512.h"
#include "steps.h"

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
#endif
