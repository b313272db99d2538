// The dense matrix of a packed one, for products with many tokens and for gradients: two-byte
// weights, any pattern. A block of threads writes sixteen rows of `columns` inputs.
#include "device.h"

KERNEL(256)
expand(const u8* values, const u8* codes, u16* dense, int out, int inputs, int n, int m, int entries,
       int panel, int columns) {
  SHARED(shared);
  u16* rows = (u16*)shared;
  const int tile = blockIdx.x, k0 = blockIdx.y * columns;
  const int span = m > 16 ? m : 16 / m * m, per_span = span / m * n, per_word = m > 16 ? 4 : 8;
  for (int i = threadIdx.x; i < 8 * columns; i += 256) ((u32*)rows)[i] = 0;
  __syncthreads();
  const int first = k0 / span * per_span, here = columns / span * per_span;
  const i64 pairs = (entries + 1) / 2, words = (entries + per_word - 1) / per_word;
  for (int i = threadIdx.x; i < here * 16; i += 256) {
    const int row = i / 2 % 16, e = first + i / 32 * 2 + i % 2;
    if (e >= entries || tile * 16 + row >= out) continue;
    const u16 value = ((const u16*)values)[((tile * pairs + e / 2) * 16 + row) * 2 + e % 2];
    const u32 code =
        panel ? codes[(i64)((tile * 16 + row) / panel) * entries + e]
              : ((const u32*)codes)[(tile * words + e / per_word) * 16 + row] >>
                        e % per_word * (32 / per_word) &
                    (m > 16 ? 255 : 15);
    const int column = e / per_span * span - k0 + (int)code;
    if (column < columns) rows[row * columns + column] = value;  // damaged codes stay inside
  }
  __syncthreads();
  for (int i = threadIdx.x; i < 16 * columns; i += 256) {
    const int row = i / columns, column = i % columns;
    if (tile * 16 + row < out && k0 + column < inputs)
      dense[(i64)(tile * 16 + row) * inputs + k0 + column] = rows[i];
  }
}
