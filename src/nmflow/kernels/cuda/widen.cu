// A weight with 8-bit values as one of two bytes, as `nmflow.kernels.layout` tiles it, for products of
// many tokens: values are scale x q, rounded once. Compiled for N, M, HALF.
#include "device.h"
#include "stream.h"

constexpr int WORD = M > 16 ? 4 : 8;             // codes in a word
constexpr int GROUPS_OF = M > 16 ? 1 : 16 / M;   // groups that a code reaches over

// A thread has a word of codes of a row, and its values; rows of a panel of whole tiles share a list.
KERNEL(256)
widen(const u8* stream, u32* values, u8* codes, int out, int entries, int panel) {
  const int words = (entries + WORD - 1) / WORD, pairs = (entries + 1) / 2;
  const i64 i = (i64)blockIdx.x * 256 + threadIdx.x, tile = i / 16 / words;
  const int row = i % 16, word = i / 16 % words;
  if (tile * 16 >= out) return;
  const i64 o = tile * 16 + row;
  const float scale = scale_at(stream, entries, o);
  const u8* own = stream + tile * tile_bytes(entries) + HEAD + row * 4;
  u32 all = 0, two = 0;
#pragma unroll
  for (int j = 0; j < WORD; j++) {
    const int e = word * WORD + j, quad = e % PIECE / 4;
    if (e >= entries) break;
    const u8* piece = own + e / PIECE * PIECE_BYTES;
    const u32 q = raised(*(const u32*)(piece + 64 + quad * 64));
    const u32 value = from_float(scale * number_of(q, e % 4));
    const u32 code = (*(const u32*)piece >> 8 * (e % 4) + BITS * quad & FIELD) + e / N % GROUPS_OF * M;
    two = j % 2 ? two | value << 16 : value;
    if (j % 2 || e + 1 == entries) values[(tile * pairs + e / 2) * 16 + row] = two;
    if (panel && o % panel == 0 && o < out) codes[o / panel * entries + e] = code;
    if (o < out) all |= code << j * (32 / WORD);
  }
  if (!panel) ((u32*)codes)[(tile * words + word) * 16 + row] = all;
}
