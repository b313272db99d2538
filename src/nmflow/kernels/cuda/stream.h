// Weights with 8-bit values, as `nmflow.kernels.int8` streams them. A tile of sixteen rows is a head of
// HEAD bytes, sixteen scales first, and pieces: a row has a word of codes and PER words of values in a
// piece. Byte j of the words is of its entries j, 4 + j, ...; a code is the column inside its group.
// Compiled for N, M.
#pragma once

constexpr int HEAD = 128;
constexpr int BITS = M <= 4 ? 2 : M <= 16 ? 4 : 8, PER = 8 / BITS;
constexpr int PIECE = 4 * PER;  // entries of a row in a piece
constexpr int PIECE_BYTES = (1 + PER) * 64;
constexpr u32 FIELD = (1 << BITS) - 1, FIELDS = FIELD * 0x01010101u;

DEVICE i64 tile_bytes(int entries) { return HEAD + (i64)((entries + PIECE - 1) / PIECE) * PIECE_BYTES; }
DEVICE float scale_at(const u8* stream, int entries, int o) {
  return ((const float*)(stream + o / 16 * tile_bytes(entries)))[o % 16];
}

// Of a word of values, all of them plus 128: byte `i` as a float. 2^23 + v is v's bits and an exponent.
DEVICE u32 raised(u32 word) { return word ^ 0x80808080u; }
DEVICE float number_of(u32 raised, u32 i) {
  return as_float(bytes_of(raised, 0x4b000000, 0x7440 + i)) - 8388736.0f;
}
