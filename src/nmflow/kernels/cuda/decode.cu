// y = epilogue(x Wᵀ + bias) for few tokens, W packed as `nmflow.kernels.layout` tiles it.
//
// A block of threads holds x for its share of the inputs in shared memory; of fewer than eight tokens
// only those, since what a lane multiplies beyond them is dropped. A warp takes RT tiles of
// sixteen rows, and every SLICES-th chunk of CHUNK inputs, which it copies to shared memory STAGES
// - 1 chunks ahead.
//
// Per row, the kept weights become fragments of `mma.m16n8k16` in registers (`fragment.h`). In a panel
// of rows nothing is expanded: the kept weights are the fragment, and x is gathered.
//
// Compiled for N, M, PANEL (1 if sixteen rows share their columns), HALF (1: float16, 0: bfloat16),
// INT8 (1: `values` is a stream of 8-bit values, see `stream.h`),
// NT (tiles of eight tokens), RT, WARPS, SLICES, CHUNK, STAGES; `gpu_cuts` chooses them.
#include "device.h"
#include "finish.h"
#include "fragment.h"

constexpr int TOKENS = NT * 8;
constexpr int TILES = WARPS / SLICES * RT;  // of a block
static_assert(!PANEL || ENTRIES % 16 == 0, "whole fragments");

// One chunk of one warp; x points at the chunk's first input of token `r`.
DEVICE void multiply(float (*sums)[NT][4], const u8* stage, const u16* x, int stride, int lane) {
  const int r = lane / 4, q = lane % 4;
  if (PANEL) {
#pragma unroll 2
    for (int s = 0; s < ENTRIES / 16; s++) {
      u32 a[RT][4];
      int column[RT][4];
#pragma unroll
      for (int t = 0; t < RT; t++) panel_block(a[t], column[t], stage + t * TILE_BYTES, s, r, q);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const u16* row = x + n * 8 * stride;
#pragma unroll
        for (int t = 0; t < RT; t++) {
          const int* k = column[t];
          mma(sums[t][n], a[t][0], a[t][1], a[t][2], a[t][3], row[k[0]] | (u32)row[k[1]] << 16,
              row[k[2]] | (u32)row[k[3]] << 16);
        }
      }
    }
    return;
  }
#pragma unroll 1
  for (int u = 0; u < CHUNK / STEP; u++) {
#pragma unroll
    for (int b = 0; b < STEP / 16; b++) {
      u64 a[RT][2];
#pragma unroll
      for (int t = 0; t < RT; t++)
#pragma unroll
        for (int s = 0; s < 2; s++) a[t][s] = fragment(stage + t * TILE_BYTES, u, b, r + 8 * s, q);
#pragma unroll
      for (int n = 0; n < NT; n++) {
        const u64 four = *(const u64*)(x + n * 8 * stride + u * STEP + b * 16 + 4 * q);
#pragma unroll
        for (int t = 0; t < RT; t++)
          mma(sums[t][n], (u32)a[t][0], (u32)a[t][1], a[t][0] >> 32, a[t][1] >> 32, (u32)four,
              four >> 32);
      }
    }
  }
}

// Grid: (tiles / TILES, shares of the inputs, tokens / TOKENS). x (tokens, inputs) of row stride
// `ldx`, y (tokens, out) of `ldy`. Where the inputs are shared out, `partial` (shares, tokens, out)
// takes the sums, and `sum` the rest. `whole`: rows of x are aligned to 16 bytes.
KERNEL(WARPS * 32)
decode(const u8* values, const u8* codes, const u16* x, const u16* bias, u16* y, float* partial,
       i64 ldx, i64 ldy, int out, int inputs, int tokens, int entries, int panel, int chunks,
       int epilogue, int whole) {
  SHARED(shared);
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, slice = warp % SLICES;
  const int r = lane / 4, q = lane % 4;
  const int wide = chunks * CHUNK, stride = (wide + 63) / 64 * 64 + 16;
  const int first = blockIdx.y * chunks, all = (inputs + CHUNK - 1) / CHUNK;
  const int mine = all - first < chunks ? all - first : chunks;
  const int token0 = blockIdx.z * TOKENS;
  const int here = tokens - token0 < TOKENS ? tokens - token0 : TOKENS;
  const int rows = NT == 1 ? here : TOKENS;
  const int tile = blockIdx.x * TILES + warp / SLICES * RT;
  const Packed w = {values, codes, entries, (out + 15) / 16, panel};
  u16* xs = (u16*)shared;
  u8* stages = shared + rows * stride * 2 + warp * (STAGES * RT * TILE_BYTES);

  // Chunks of this warp: slice, slice + SLICES, ...; the i-th lies in stage i % STAGES.
  auto fetch_all = [&](int i) {
    const int c = i * SLICES + slice;
    if (c < mine)
#pragma unroll
      for (int t = 0; t < RT; t++)
        fetch(stages + (i % STAGES * RT + t) * TILE_BYTES, w, tile + t, first + c, lane);
    copies_end_group();
  };
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) fetch_all(i);
  for (int i = threadIdx.x; i < rows * (wide / 8); i += WARPS * 32) {
    const int n = i / (wide / 8), c = i % (wide / 8) * 8, k = first * CHUNK + c;
    const u16* from = x + (token0 + n) * ldx + k;
    u16* to = xs + n * stride + c;
    if (whole) {
      const bool keep = n < here && k < inputs;
      copy16(to, keep ? from : x, keep);
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++) to[j] = n < here && k + j < inputs ? from[j] : 0;
    }
  }
  copies_end_group();
  copies_wait<0>();
  __syncthreads();

  float sums[RT][NT][4];
#pragma unroll
  for (int t = 0; t < RT; t++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) sums[t][n][e] = 0.0f;
  const u16* row = xs + (r < rows ? r : rows - 1) * stride;
#pragma unroll 1
  for (int i = 0; i * SLICES + slice < mine; i++) {
    copies_wait<STAGES - 2>();
    __syncwarp();  // what others copied is here, and all are done with the stage that is next filled
    fetch_all(i + STAGES - 1);
    multiply(sums, stages + i % STAGES * RT * TILE_BYTES, row + (i * SLICES + slice) * CHUNK, stride,
             lane);
  }
  copies_wait<0>();

  if (SLICES > 1) {  // the first slice adds the others' sums, in their order
    __syncthreads();
    float* others = (float*)shared;
    const int group = warp / SLICES;
    auto place = [&](int s, int i) {
      return ((i64)(s - 1) * (WARPS / SLICES) + group) * (RT * NT * 4 * 32) + i * 32 + lane;
    };
    if (slice)
#pragma unroll
      for (int i = 0; i < RT * NT * 4; i++) others[place(slice, i)] = sums[i / (NT * 4)][i / 4 % NT][i % 4];
    __syncthreads();
    if (!slice)
#pragma unroll 1
      for (int s = 1; s < SLICES; s++)
#pragma unroll
        for (int i = 0; i < RT * NT * 4; i++)
          sums[i / (NT * 4)][i / 4 % NT][i % 4] += others[place(s, i)];
  }
  if (slice) return;
#pragma unroll
  for (int t = 0; t < RT; t++)
#pragma unroll
    for (int n = 0; n < NT; n++)
#pragma unroll
      for (int e = 0; e < 4; e++) {
        const int token = n * 8 + 2 * q + e % 2, o = (tile + t) * 16 + r + e / 2 * 8;
        if (token >= here || o >= out) continue;
        const float sum = sums[t][n][e] * scale_of(w, o);
        if (gridDim.y > 1)
          partial[((i64)blockIdx.y * tokens + token0 + token) * out + o] = sum;
        else
          y[(token0 + token) * ldy + o] = from_float(finish(sum, bias, o, epilogue));
      }
}
