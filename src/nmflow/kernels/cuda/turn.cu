// y = xᵀ of numbers of two bytes, in tiles of 64 x 64.
#include "device.h"

struct alignas(16) Piece {
  u16 v[8];
};

// Grid: (rows / 64, columns / 64). x (rows, columns) has rows `ldx` apart, and y (columns, rows) has
// rows `ldy` apart, a multiple of 8 that holds all rows; what is beyond them is 0. `whole`: x is
// aligned to 16 bytes.
KERNEL(256)
turn(const u16* x, u16* y, i64 ldx, i64 ldy, int rows, int columns, int whole) {
  SHARED(shared);
  u32* tile = (u32*)shared;  // a row is 33 words, so that a column meets all banks
  const int row0 = blockIdx.x * 64, column0 = blockIdx.y * 64;
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int i = threadIdx.x + j * 256, row = i / 8, column = i % 8 * 8;
    const u16* from = x + (row0 + row) * ldx + column0 + column;
    Piece eight;
    if (whole && row0 + row < rows && column0 + column < columns) {
      eight = *(const Piece*)from;
    } else {
#pragma unroll
      for (int l = 0; l < 8; l++)
        eight.v[l] = row0 + row < rows && column0 + column + l < columns ? from[l] : 0;
    }
#pragma unroll
    for (int l = 0; l < 4; l++)
      tile[row * 33 + column / 2 + l] = eight.v[2 * l] | (u32)eight.v[2 * l + 1] << 16;
  }
  __syncthreads();
#pragma unroll
  for (int j = 0; j < 2; j++) {
    const int i = threadIdx.x + j * 256, row = i % 8 * 8, column = i / 8;
    if (column0 + column >= columns || row0 + row >= ldy) continue;
    Piece eight;
#pragma unroll
    for (int l = 0; l < 8; l++) eight.v[l] = ((const u16*)tile)[(row + l) * 66 + column];
    *(Piece*)(y + (column0 + column) * ldy + row0 + row) = eight;
  }
}
