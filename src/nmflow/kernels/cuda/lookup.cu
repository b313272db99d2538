// y = epilogue(x Wᵀ + bias) for up to eight tokens, W packed by row, without fragments: a lane looks
// the inputs of its own row up. Fewer instructions than fragments take where few tokens share them.
//
// A block of threads holds x for its share of the inputs in shared memory, in float32. A warp takes
// sixteen rows, and of the words of codes every SLICES-th pair: its lower half has the even words, the
// upper half the odd ones. The odd words' inputs begin half of the banks later, so the 32 lanes read
// different banks or the same place. Weights go from memory to registers, STAGES words ahead.
//
// Compiled for N, M, HALF, INT8 (1: `values` is a stream of 8-bit values), TOKENS (1, 2, 4 or 8), WARPS,
// SLICES, STAGES; `gpu_cuts` chooses them. A word of codes lies beside VALUES words of values.
#include "device.h"
#include "finish.h"

#if INT8
#include "stream.h"
constexpr int SPAN = M, PER_SPAN = N, PER_WORD = PIECE, VALUES = PER, FIELD_BITS = BITS;
constexpr int CODES_STEP = PIECE_BYTES / 4, VALUES_STEP = CODES_STEP;  // to the next word's
#else
constexpr int SPAN = M > 16 ? M : 16, PER_SPAN = SPAN / M * N, PER_WORD = M > 16 ? 4 : 8;
constexpr int VALUES = PER_WORD / 2, FIELD_BITS = M > 16 ? 8 : 4;
constexpr int CODES_STEP = 16, VALUES_STEP = VALUES * 16;
#endif
constexpr int WIDE = PER_WORD / PER_SPAN * SPAN;  // inputs of a word
constexpr int WIDTH = TOKENS > 1 ? 2 : 1;         // tokens side by side
constexpr int PLACE = 4 * WIDTH;                  // bytes of an input
constexpr int SIDE = WIDE * PLACE;                // bytes of a word's inputs, of WIDTH tokens
constexpr int STRIDE = SIDE * (TOKENS / WIDTH);   // bytes from a word's inputs to those of the next but one
constexpr int HALVES = WIDTH == 1 ? 64 : 128;     // bytes of half of the banks; of all
constexpr int TILES = WARPS / SLICES;             // of a block
static_assert(16 % M == 0 || M % 16 == 0, "a group is a share of a block, or whole blocks");
static_assert(PER_WORD % PER_SPAN == 0 && WIDE % 16 == 0, "whole spans in a word");
static_assert(STAGES * SLICES * STRIDE % 256 == 0, "the low byte of a place stays what it is");

struct alignas(16) Four {
  float v[4];
};
struct alignas(16) Eight {
  u16 v[8];
};

// Grid: (tiles / TILES, shares of the inputs). `chunks` is the words of a share, an even number; the
// rest is as in decode.cu.
KERNEL(WARPS * 32)
lookup(const u8* values, const u8* codes, const u16* x, const u16* bias, u16* y, float* partial,
       i64 ldx, i64 ldy, int out, int inputs, int tokens, int entries, int panel, int chunks,
       int epilogue, int whole) {
  SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = warp % SLICES;
  const int row = lane % 16, odd = lane / 16;
  const int all = entries / PER_WORD, first = blockIdx.y * chunks;
  const int mine = all - first < chunks ? all - first : chunks;
  const int tile = blockIdx.x * TILES + warp / SLICES, tiles = (out + 15) / 16;
  const int offset = chunks / 2 * STRIDE + HALVES;  // of the odd words' inputs

  // Words of this lane: odd + 2 (slice + SLICES k), for k below `count`.
  const int left = mine - odd - 2 * slice;
  const int count = tile < tiles && left > 0 ? (left + 2 * SLICES - 1) / (2 * SLICES) : 0;
  const i64 begin = (i64)(tile < tiles ? tile : 0) * all + first + odd + 2 * slice;
  const u32* next_codes = (const u32*)codes + begin * CODES_STEP + row;
  const u32* next_values = (const u32*)values + begin * VALUES_STEP + row;
#if INT8
  next_codes = next_values + (i64)((tile < tiles ? tile : 0) + 1) * (HEAD / 4);
  next_values = next_codes + 16;
#endif
  u32 code[STAGES], value[STAGES][VALUES];
  auto load = [&](int s, int ahead) {
    const int words = (s + ahead) * 2 * SLICES;
    code[s] = read_once(next_codes + words * CODES_STEP);
#pragma unroll
    for (int j = 0; j < VALUES; j++) value[s][j] = read_once(next_values + words * VALUES_STEP + j * 16);
  };
#pragma unroll
  for (int s = 0; s < STAGES; s++)
    if (s < count) load(s, 0);

  for (int i = threadIdx.x; i < mine * (WIDE / 8) * (TOKENS / WIDTH); i += WARPS * 32) {
    const int c = i % (mine * (WIDE / 8)) * 8, side = i / (mine * (WIDE / 8)), word = c / WIDE;
    const int k = first * WIDE + c;
    Eight some[WIDTH];
#pragma unroll
    for (int t = 0; t < WIDTH; t++) {
      const int token = side * WIDTH + t;
      const u16* from = x + token * ldx + k;
      if (token >= tokens) {
#pragma unroll
        for (int j = 0; j < 8; j++) some[t].v[j] = 0;
      } else if (whole) {
        some[t] = *(const Eight*)from;
      } else {
#pragma unroll
        for (int j = 0; j < 8; j++) some[t].v[j] = from[j];
      }
    }
    u8* to = shared + word % 2 * offset + word / 2 * STRIDE + side * SIDE + c % WIDE * PLACE;
#pragma unroll
    for (int j = 0; j < 8 * WIDTH; j += 4) {
      Four four;
#pragma unroll
      for (int l = 0; l < 4; l++) four.v[l] = to_float(some[(j + l) % WIDTH].v[(j + l) / WIDTH]);
      *(Four*)(to + j * 4) = four;
    }
  }
  __syncthreads();

  float sums[2][TOKENS];  // of even and odd entries, so that one sum need not wait for another
#pragma unroll
  for (int i = 0; i < 2 * TOKENS; i++) sums[i / TOKENS][i % TOKENS] = 0.0f;
  u32 base = place_of(shared) + odd * offset + slice * STRIDE;
  const u32 low = (base & 255) * 0x01010101u;
  auto use = [&](int s) {
    // Fields of codes as bytes of places, with the low byte of the word's place.
    u32 places[8 / FIELD_BITS];
#pragma unroll
    for (int f = 0; f < 8 / FIELD_BITS; f++) {
      const int up = (WIDTH == 1 ? 2 : 3) - FIELD_BITS * f;
      const u32 moved = up > 0 ? code[s] << up : code[s] >> -up;
      places[f] = (moved & ((1 << FIELD_BITS) - 1) * 0x01010101u * PLACE) | low;
    }
#pragma unroll
    for (int e = 0; e < PER_WORD; e++) {
      const int field = (INT8 ? e / 4 : e) % (8 / FIELD_BITS), byte = e / (INT8 ? 1 : 8 / FIELD_BITS) % 4;
      const u32 at = M > 16 ? base + bytes_of(code[s], 0, 0x4440 + byte) * PLACE
                            : bytes_of(places[field], base, 0x7650 + byte);
#if INT8
      const float w = number_of(raised(value[s][e / 4]), e % 4);
#else
      const u32 v = value[s][e / 2];
#if HALF
      const float w = to_float(e % 2 ? v >> 16 : v);
#else
      const float w = as_float(e % 2 ? v & 0xffff0000u : v << 16);
#endif
#endif
      const u32 from = at + (s * SLICES * STRIDE + e / PER_SPAN * SPAN * PLACE);
#pragma unroll
      for (int t = 0; t < TOKENS; t += WIDTH) {
        if (WIDTH == 1) {
          sums[e % 2][t] += w * as_float(read_shared(from));
        } else {
          const u64 two = read_shared_two(from + t / 2 * SIDE);
          sums[e % 2][t] += w * as_float((u32)two);
          sums[e % 2][t + WIDTH - 1] += w * as_float(two >> 32);
        }
      }
    }
  };
  int k = 0;
#pragma unroll 1
  for (; k + STAGES <= count; k += STAGES) {
#pragma unroll
    for (int s = 0; s < STAGES; s++) {
      use(s);
      if (k + s + STAGES < count) load(s, STAGES);
    }
    base += STAGES * SLICES * STRIDE;
    next_codes += STAGES * 2 * SLICES * CODES_STEP;
    next_values += STAGES * 2 * SLICES * VALUES_STEP;
  }
#pragma unroll
  for (int s = 0; s < STAGES; s++)
    if (k + s < count) use(s);

  __syncthreads();
  float* others = (float*)shared;
#pragma unroll
  for (int t = 0; t < TOKENS; t++) others[t * (WARPS * 32) + threadIdx.x] = sums[0][t] + sums[1][t];
  __syncthreads();
  for (int i = threadIdx.x; i < TILES * 16 * TOKENS; i += WARPS * 32) {
    const int r = i % 16, group = i / 16 % TILES, token = i / (16 * TILES);
    const int o = (blockIdx.x * TILES + group) * 16 + r;
    if (token >= tokens || o >= out) continue;
    float sum = 0.0f;
#pragma unroll
    for (int s = 0; s < 2 * SLICES; s++)
      sum += others[token * (WARPS * 32) + group * SLICES * 32 + s * 16 + r];
#if INT8
    sum *= scale_at(values, entries, o);
#endif
    if (gridDim.y > 1)
      partial[((i64)blockIdx.y * tokens + token) * out + o] = sum;
    else
      y[token * ldy + o] = from_float(finish(sum, bias, o, epilogue));
  }
}
