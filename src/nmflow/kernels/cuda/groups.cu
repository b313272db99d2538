// y = epilogue(x Wᵀ + bias) for few tokens, W packed by row, by products of warp groups (sm_90): the
// fragments of four warps meet all tokens in one instruction, which reads x from shared memory itself.
//
// All warps of a block go through the inputs together, SLICES chunks of CHUNK inputs at a time, of
// which each warp group takes one. Sixteen inputs of x lie as two cores of eight, as `sixteen.h` has
// them. The next chunks of x wait in registers; with READY x is what `ready.cu` makes of it, and comes by
// copies like the weights, which a warp copies to shared memory STAGES - 1 chunks ahead.
//
// Compiled for N, M, HALF, NT (tiles of eight tokens), WARPS, SLICES, CHUNK, STAGES, READY.
#include "device.h"
#include "finish.h"
#include "fragment.h"
#include "sixteen.h"

constexpr int TOKENS = NT * 8;
constexpr int TILES = WARPS / SLICES;  // of a block
constexpr int PART = CHUNK * TOKENS * 2;  // bytes of x of a chunk
constexpr int ITEMS = TOKENS * SLICES * CHUNK / 16;  // sixteen inputs of a token
constexpr int EACH = (ITEMS + WARPS * 32 - 1) / (WARPS * 32);
constexpr int PLACES = READY ? STAGES : 2;  // for chunks of x
constexpr int BATCH = 4;  // blocks whose products are waited for together
static_assert(WARPS / 4 % SLICES == 0, "whole warp groups in a slice");
static_assert(!PANEL, "rows have columns of their own");

// Grid: (tiles / TILES, shares of the inputs, tokens / TOKENS); arguments are those of decode.cu.
KERNEL(WARPS * 32, 16 / WARPS)
groups(const u8* values, const u8* codes, const u16* x, const u16* bias, u16* y, float* partial,
       i64 ldx, i64 ldy, int out, int inputs, int tokens, int entries, int panel, int chunks,
       int epilogue, int whole) {
  SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = warp / 4 % SLICES;
  const int r = lane / 4, q = lane % 4;
  const int first = blockIdx.y * chunks, all = (inputs + CHUNK - 1) / CHUNK;
  const int mine = all - first < chunks ? all - first : chunks;
  const int rounds = (mine + SLICES - 1) / SLICES;
  const int token0 = blockIdx.z * TOKENS;
  const int here = tokens - token0 < TOKENS ? tokens - token0 : TOKENS;
  const int tile = blockIdx.x * TILES + warp / 4 / SLICES * 4 + warp % 4;
  const Packed w = {values, codes, entries, (out + 15) / 16, panel};
  u8* stages = shared + PLACES * SLICES * PART + warp * (STAGES * TILE_BYTES);

  auto fetch_own = [&](int i) {
    const int c = i * SLICES + slice;
    if (c < mine) fetch(stages + i % STAGES * TILE_BYTES, w, tile, first + c, lane);
    if (READY && i < rounds) {
      const int chunk = first + i * SLICES;
      u8* to = shared + i % PLACES * (SLICES * PART);
      const u8* from = (const u8*)x + ((i64)blockIdx.z * all + chunk) * PART;
#pragma unroll 4
      for (int p = threadIdx.x * 16; p < SLICES * PART; p += WARPS * 512) {
        const bool keep = chunk + p / PART < all;
        copy16(to + p, keep ? from + p : (const u8*)x, keep);
      }
    }
    copies_end_group();
  };
  Quad held[EACH][2];
  auto load_x = [&](int i) {
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int item = threadIdx.x + j * (WARPS * 32), n = item % TOKENS;
      const int k = (first + i * SLICES) * CHUNK + item / TOKENS * 16;
      const bool there = n < here && item < ITEMS;
      load_sixteen(held[j], x + (token0 + n) * ldx + k, inputs - k, there, whole);
    }
  };
  auto store_x = [&](int i) {
    u8* to = shared + i % 2 * (SLICES * PART);
#pragma unroll
    for (int j = 0; j < EACH; j++) {
      const int item = threadIdx.x + j * (WARPS * 32), n = item % TOKENS, block = item / TOKENS;
      if (item >= ITEMS) continue;
      store_sixteen((Quad*)(to + block * (32 * TOKENS) + n * 16), TOKENS, held[j]);
    }
    writes_before_products();
  };

#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) fetch_own(i);
  if (!READY) {
    load_x(0);
    store_x(0);
  }
  float sums[NT * 4];
#pragma unroll
  for (int i = 0; i < NT * 4; i++) sums[i] = 0.0f;
#pragma unroll 1
  for (int i = 0; i < rounds; i++) {
    copies_wait<STAGES - 2>();
    if (READY) writes_before_products();
    __syncthreads();  // x of this round is there, and all are done with the places that are filled next
    fetch_own(i + STAGES - 1);
    if (!READY && i + 1 < rounds) load_x(i + 1);
    if (i * SLICES + slice < mine) {
      const u8* stage = stages + i % STAGES * TILE_BYTES;
      u64 b = describe(shared + (i % PLACES * SLICES + slice) * PART, TOKENS * 16, 128, 0);
#pragma unroll 1
      for (int u = 0; u < CHUNK / UNIT; u++) {
        u64 a[2][BATCH][2];
#pragma unroll
        for (int j = 0; j < UNIT / 16; j += BATCH) {
          u64(*some)[2] = a[j / BATCH % 2];
#pragma unroll
          for (int l = 0; l < BATCH; l++)
#pragma unroll
            for (int s = 0; s < 2; s++) some[l][s] = fragment(stage, u, j + l, r + 8 * s, q);
          products_begin();
#pragma unroll
          for (int l = 0; l < BATCH; l++)
            group_mma<NT, 0>(sums, (u32)some[l][0], (u32)some[l][1], some[l][0] >> 32,
                             some[l][1] >> 32, b + (j + l) * (32 * TOKENS / 16));
          products_end_group();
          products_wait<1>();
        }
        b += UNIT / 16 * (32 * TOKENS / 16);
      }
      products_wait<0>();
    }
    if (!READY && i + 1 < rounds) store_x(i + 1);
  }
  copies_wait<0>();

  if (SLICES > 1) {  // the first slice adds the others' sums, in their order
    __syncthreads();
    float* others = (float*)shared;
    const int group = warp / 4 / SLICES * 4 + warp % 4;
    auto place = [&](int s, int i) {
      return ((s - 1) * TILES + group) * (NT * 4 * 32) + i * 32 + lane;
    };
    if (slice)
#pragma unroll
      for (int i = 0; i < NT * 4; i++) others[place(slice, i)] = sums[i];
    __syncthreads();
    if (!slice)
#pragma unroll 1
      for (int s = 1; s < SLICES; s++)
#pragma unroll
        for (int i = 0; i < NT * 4; i++) sums[i] += others[place(s, i)];
  }
  if (slice) return;
#pragma unroll
  for (int i = 0; i < NT * 4; i++) {
    const int token = i / 4 * 8 + 2 * q + i % 2, o = tile * 16 + r + i / 2 % 2 * 8;
    if (token >= here || o >= out) continue;
    if (gridDim.y > 1)
      partial[((i64)blockIdx.y * tokens + token0 + token) * out + o] = sums[i];
    else
      y[(token0 + token) * ldy + o] = from_float(finish(sums[i], bias, o, epilogue));
  }
}
