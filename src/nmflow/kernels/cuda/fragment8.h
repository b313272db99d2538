// Fragments of weights with 8-bit values. A weight at column i of a block is `v >> 16 (i ^ (4q + 3))`
// in 64 bits, of v in the upper two bytes: these are where a float has what bfloat16 keeps of it.
#pragma once
#include "stream.h"

constexpr int TILE_BYTES = ENTRIES / PIECE * PIECE_BYTES;
// A piece at a time, where it is of whole groups and blocks: more would not stay in registers.
constexpr bool WHOLE = PIECE % N == 0 && PIECE / N * M % 16 == 0;
constexpr int STEP = WHOLE ? PIECE / N * M : UNIT;
static_assert(ENTRIES % PIECE == 0 && UNIT % STEP == 0, "whole pieces");

// Start the copies of one tile's chunk; beyond the tile's end zeros are written.
DEVICE void fetch(u8* to, const Packed& w, int tile, int chunk, int lane) {
  const int first = chunk * TILE_BYTES;
  const i64 size = tile_bytes(w.entries);
  const int left = tile < w.tiles ? (int)size - HEAD - first : 0;
  const u8* from = w.values + (left > 0 ? tile * size + HEAD + first : 0);
#pragma unroll
  for (int i = lane * 16; i < TILE_BYTES; i += 512) copy16(to + i, i < left ? from + i : w.values, i < left);
}

// A number of two bytes in the upper half of a word whose lower half is 0: byte `i` of `raised`.
DEVICE u32 upper_of(u32 raised, u32 i) {
#if HALF
  return add_halves(bytes_of(raised, 0x64000000, 0x7044 + (i << 8)), 0xe4800000);  // 1024 + v - 1152
#else
  return bits_of(number_of(raised, i));
#endif
}

// The sixteen columns of block b of step u, of one row: lane q's four of them, first in low bits.
DEVICE u64 fragment(const u8* tile, int u, int b, int row, u32 q) {
  const u8* at = tile + u * (STEP / M * N / PIECE * PIECE_BYTES) + row * 4;
  u64 four = 0;
  // Lane q tries every weight of the group, or owns whole groups, or its half of the lanes shares one.
  constexpr int EACH = M >= 4 ? N : 4 / M * N, BLOCK = M < 16 ? 16 / M * N : N;
  const u32 first = M < 16 ? 4 * q / M * N : 0, group = M < 16 ? 4 * q / M * M : 0;
#pragma unroll
  for (int p = 0; p < EACH; p++) {
    const int start = b / BLOCKS * BLOCK;
    const u32 e = start % 4 + first + p;  // from the quad that the block begins in
    const u32 quads = 4 % BLOCK == 0 && M < 16 ? 0 : e / 4, byte = e - 4 * quads;
    const u32 quad = PIECE % BLOCK == 0 ? start % PIECE / 4 + quads : (start / 4 + quads) % PER;
    const u32 piece = PIECE % BLOCK == 0 ? start / PIECE : (start / 4 + quads) / PER;
    const u8* from = at + piece * PIECE_BYTES;
    const u32 word = *(const u32*)from, value = *(const u32*)(from + 64 + quad * 64);
    u32 shift;
    if (M > 16) {
      shift = bytes_of(word, 0, 0x4440 + byte) * 16 ^ (b % BLOCKS * 256 + q * 64 + 48);
    } else {  // fields as bytes of 16 times their value, four of them by three operations
      const u32 flip = (group ^ (4 * q + 3) ^ p / N * M) * 0x10101010u;
      shift = bytes_of(((word >> BITS * quad) << 4 & FIELDS << 4) ^ flip, 0, 0x4440 + byte);
    }
    four |= shr64(upper_of(raised(value), byte), shift);
  }
  return four;
}

// In a panel: the s-th sixteen weights of rows r and r + 8, lane q's four side by side, and their columns.
DEVICE void panel_block(u32* a, int* column, const u8* tile, int s, int r, int q) {
  const u8* from = tile + (4 * s + q) / PER * PIECE_BYTES;
  const int quad = (4 * s + q) % PER;
  const u32 codes = *(const u32*)from >> BITS * quad & FIELDS;  // the first row's, which is always there
  const u32* values = (const u32*)(from + 64 + quad * 64) + r;
  const u32 some[2] = {raised(values[0]), raised(values[8])};
#pragma unroll
  for (int i = 0; i < 4; i++) {
    column[i] = (16 * s + 4 * q + i) / N * M + (codes >> 8 * i & 255);
    a[i] = bytes_of(upper_of(some[i % 2], i / 2 * 2), upper_of(some[i % 2], i / 2 * 2 + 1), 0x7632);
  }
}

DEVICE float scale_of(const Packed& w, int o) { return scale_at(w.values, w.entries, o); }
