// Fragments of `mma.m16n8k16` from the kept weights of sixteen rows, and the copies that bring them.
// Compiled for N, M, PANEL, CHUNK; INT8: weights are streams of 8-bit values (`fragment8.h`), else they
// lie as `nmflow.kernels.layout` tiles them.
//
// The order of the sixteen columns of a fragment is free as long as W and x agree, so lane q of a quad
// owns the columns 4q ... 4q + 3 of a block: a weight at column i of it is `v << 16 (i ^ 4q)` in 64
// bits, which is 0 by itself in the three lanes that do not own it.
#pragma once

constexpr int SPAN = M > 16 ? M : 16;        // inputs that one code reaches over
constexpr int PER_SPAN = SPAN / M * N;       // kept in it
constexpr int BLOCKS = M > 16 ? M / 16 : 1;  // blocks of sixteen inputs in a group
constexpr int ENTRIES = CHUNK / M * N;
constexpr int UNIT = M > 16 ? 4 * M : 128;  // inputs after which words of codes start anew
static_assert(16 % M == 0 || M % 16 == 0, "a group is a share of a block, or whole blocks");
static_assert(CHUNK % (PANEL ? SPAN : UNIT) == 0, "whole words of codes");

struct Packed {
  const u8* values;
  const u8* codes;
  int entries, tiles, panel;
};

#if INT8
#include "fragment8.h"
#else
constexpr int PER_WORD = M > 16 ? 4 : 8;  // codes in a word
constexpr int VALUE_BYTES = ENTRIES * 32;
constexpr int CODE_BYTES = PANEL ? ENTRIES : ENTRIES / PER_WORD * 64;
constexpr int TILE_BYTES = VALUE_BYTES + CODE_BYTES;
constexpr int STEP = UNIT;  // inputs that a warp has in registers at a time

// Start the copies of one tile's chunk; beyond the tile's end zeros are written.
DEVICE void fetch(u8* to, const Packed& w, int tile, int chunk, int lane) {
  const int left = w.entries - chunk * ENTRIES;
  const bool live = tile < w.tiles && left > 0;
  const i64 pairs = (w.entries + 1) / 2;
  const u8* values = w.values + ((live ? tile : 0) * pairs + (live ? chunk * (ENTRIES / 2) : 0)) * 64;
#pragma unroll
  for (int i = lane; i < VALUE_BYTES / 16; i += 32)
    copy16(to + i * 16, live && i / 4 * 2 < left ? values + i * 16 : w.values, live && i / 4 * 2 < left);
  if (PANEL) {
    const u8* codes = w.codes + (live ? (i64)(tile * 16 / w.panel) * w.entries + chunk * ENTRIES : 0);
#pragma unroll
    for (int i = lane; i < ENTRIES / 4; i += 32)
      copy4(to + VALUE_BYTES + i * 4, live && i * 4 < left ? codes + i * 4 : w.codes,
            live && i * 4 < left);
  } else {
    const i64 words = (w.entries + PER_WORD - 1) / PER_WORD;
    const u8* codes =
        w.codes + ((live ? tile : 0) * words + (live ? chunk * (ENTRIES / PER_WORD) : 0)) * 64;
#pragma unroll
    for (int i = lane; i < CODE_BYTES / 16; i += 32)
      copy16(to + VALUE_BYTES + i * 16, live && i / 4 * PER_WORD < left ? codes + i * 16 : w.codes,
             live && i / 4 * PER_WORD < left);
  }
}

// The sixteen columns of block b of step u, of one row: lane q's four of them, first in low bits.
DEVICE u64 fragment(const u8* tile, int u, int b, int row, u32 q) {
  const u32* values = (const u32*)tile + u * (STEP / M * N / 2 * 16) + row;
  const u32* codes = (const u32*)(tile + VALUE_BYTES) + u * (STEP / M * N / PER_WORD * 16) + row;
  u64 four = 0;
  if (M >= 16) {  // every lane tries every weight of the group
#pragma unroll
    for (int p = 0; p < N; p++) {
      const int e = b / BLOCKS * N + p;
      const u32 value = bytes_of(values[e / 2 * 16], 0, e % 2 ? 0x4432 : 0x4410);
      const u32 word = codes[e / PER_WORD * 16];
      u32 shift;
      if (M == 16) {  // nibbles as bytes of 16 times their value, eight of them by three operations
        const u32 flip = q * 0x40404040u;
        const u32 wide = ((e % 2 ? word : word << 4) & 0xf0f0f0f0u) ^ flip;
        shift = bytes_of(wide, 0, 0x4440 + e % 8 / 2);
      } else {
        const u32 code = bytes_of(word, 0, 0x4440 + e % 4) * 16;
        shift = code ^ (b % BLOCKS * 256 + q * 64);
      }
      four |= shl64(value, shift);
    }
    return four;
  }
  // Lane q owns whole groups, or its half of the lanes shares one.
  constexpr int EACH = M >= 4 ? N : 4 / M * N, BLOCK = 16 / M * N;
  const u32 first = 4 * q / M * N;
#pragma unroll
  for (int p = 0; p < EACH; p++) {
    const u32 at = first + p;
    const u32 odd = N % 2 ? at % 2 : p % 2;
    const u32 value = bytes_of(values[b * BLOCK / 2 * 16 + at / 2 * 16], 0, odd ? 0x4432 : 0x4410);
    u32 shift;
    if (8 % BLOCK == 0) {  // the block's codes are in one word
      const u32 word = codes[b * BLOCK / 8 * 16] >> 4 * first;
      constexpr int last = BLOCK == 8;
      const int i = b * BLOCK % 8 + p;
      const u32 flip = q * 0x40404040u;
      if (last) {
        shift = ((i ? word >> 4 * i - 4 : word << 4) & 0xf0) ^ flip % 256;
      } else {
        const u32 wide = ((i % 2 ? word : word << 4) & 0xf0f0f0f0u) ^ flip;
        shift = bytes_of(wide, 0, 0x4440 + i / 2);
      }
    } else {
      const u32 e = b * BLOCK + at;
      shift = ((codes[e / 8 * 16] >> e % 8 * 4 & 15) ^ 4 * q) * 16;
    }
    four |= shl64(value, shift);
  }
  return four;
}

// In a panel: the s-th sixteen weights of rows r and r + 8, as they lie, and the columns of lane q's.
DEVICE void panel_block(u32* a, int* column, const u8* tile, int s, int r, int q) {
  const u32* values = (const u32*)tile + (8 * s + q) * 16 + r;
  const u8* codes = tile + VALUE_BYTES + 16 * s + 2 * q;
#pragma unroll
  for (int i = 0; i < 4; i++) {
    const int e = 16 * s + 2 * q + (i / 2 * 8 + i % 2);
    column[i] = e / PER_SPAN * SPAN + codes[i / 2 * 8 + i % 2];
    a[i] = values[i / 2 * 64 + i % 2 * 8];
  }
}

DEVICE float scale_of(const Packed& w, int o) { return 1.0f; }
#endif
