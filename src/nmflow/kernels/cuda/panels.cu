// y = epilogue(x Wᵀ + bias) for many tokens, W packed in panels of 64 rows or more, by products of warp
// groups (sm_90): nothing is expanded, and the inputs that a panel keeps are gathered as whole rows
// of xᵀ.
//
// A block of threads takes ROWS = 64 or 128 rows of a panel and TOKENS tokens; a warp group has 64 of
// the rows and TOKENS / ACROSS of the tokens. It copies BK entries at a time, STAGES - 1 steps ahead: their weights as they lie in memory,
// where they are fragments already, and their rows of xᵀ, in pieces of 64 tokens, swizzled.
//
// Compiled for N, M, HALF, ROWS, TOKENS, ACROSS, BK, STAGES, BLOCKS (on a multiprocessor), EPILOGUE.
#include "device.h"
#include "finish.h"

constexpr int SPAN = M > 16 ? M : 16 / M * M, PER_SPAN = SPAN / M * N;
constexpr int THREADS = ROWS * 2 * ACROSS;
constexpr int X_BYTES = BK * TOKENS * 2, W_BYTES = ROWS * BK * 2;
constexpr int STAGE = X_BYTES + W_BYTES;
constexpr int OWN = TOKENS / ACROSS, NT = OWN / 8;  // tokens of a warp group
constexpr int PIECES = TOKENS / 8;
static_assert(OWN % 64 == 0 && BK * PIECES % THREADS == 0 && BK % 16 == 0 && STAGES > 1 && STAGE % 1024 == 0, "whole cores");

struct alignas(16) Piece {
  u16 v[8];
};

// Grid: (rows / ROWS, tokens / TOKENS). xt (inputs, tokens) has rows `ldx` apart, a multiple of 8, and y
// (tokens, out) rows `ldy` apart; `whole`: those are aligned to 16 bytes.
KERNEL(THREADS, BLOCKS)
panels(const u8* values, const u8* codes, const u16* xt, const u16* bias, u16* y, i64 ldx, i64 ldy,
       int out, int tokens, int entries, int panel, int whole) {
  SHARED(raw);
  u8* shared = raw + (1024 - place_of(raw) % 1024) % 1024;
  u8* own = shared + STAGES * STAGE;  // the panel's codes
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, r = lane / 4, q = lane % 4;
  const int part = warp % (ROWS / 16), across = warp / (ROWS / 16);  // sixteen rows, OWN tokens
  const int row0 = blockIdx.x * ROWS, token0 = blockIdx.y * TOKENS;
  const int tiles = (out + 15) / 16;
  const i64 pairs = (entries + 1) / 2;
  const u8* list = codes + (i64)(row0 / panel) * entries;
  const int steps = (entries + BK - 1) / BK;

  for (int i = threadIdx.x; i < entries; i += THREADS) own[i] = list[i];
  __syncthreads();
  const int first = threadIdx.x / PIECES, piece = threadIdx.x % PIECES;  // what this thread copies
  const bool there = token0 + piece * 8 < tokens;
  const u8* from = (const u8*)(there ? xt + token0 + piece * 8 : xt);
  const u32 pitch = 2 * (u32)ldx;
  auto fetch = [&](int i) {
    if (i < steps) {
      u8* to = shared + i % STAGES * STAGE + piece / 8 * (BK * 128);
#pragma unroll
      for (int j = 0; j < BK * PIECES / THREADS; j++) {
        const int k = first + j * (THREADS / PIECES);
        const int e = i * BK + k < entries ? i * BK + k : entries - 1;
        const u32 column = e / PER_SPAN * SPAN + own[e];
        copy16(to + k * 128 + ((piece ^ k) % 8 * 16), from + (u64)column * pitch,
               there && i * BK + k < entries);
      }
      u8* w_to = shared + i % STAGES * STAGE + X_BYTES;
#pragma unroll
      for (int p = threadIdx.x; p < W_BYTES / 16; p += THREADS) {
        const int tile = row0 / 16 + p / (BK * 2), at = p % (BK * 2);
        const bool keep = tile < tiles && i * (BK / 2) + at / 4 < pairs;
        const u8* w_from = values + (keep ? (tile * pairs + i * (BK / 2)) * 64 + at * 16 : 0);
        copy16(w_to + p * 16, w_from, keep);
      }
    }
    copies_end_group();
  };
#pragma unroll 1
  for (int i = 0; i < STAGES - 1; i++) fetch(i);
  float sums[NT * 4];
#pragma unroll
  for (int i = 0; i < NT * 4; i++) sums[i] = 0.0f;
#pragma unroll 1
  for (int i = 0; i < steps; i++) {
    copies_wait<STAGES - 2>();
    writes_before_products();
    __syncthreads();  // all are done with the products of the step before
    fetch(i + STAGES - 1);
    const u8* stage = shared + i % STAGES * STAGE;
    const u32* w = (const u32*)(stage + X_BYTES + part * (BK * 32)) + q * 16 + r;
    const u64 b = describe(stage + across * (OWN / 64 * BK * 128), BK * 128, 1024, 1);
    u32 a[BK / 16][4];
#pragma unroll
    for (int s = 0; s < BK / 16; s++) {
      a[s][0] = w[s * 128];
      a[s][1] = w[s * 128 + 8];
      a[s][2] = w[s * 128 + 64];
      a[s][3] = w[s * 128 + 72];
    }
    products_begin();
#pragma unroll
    for (int s = 0; s < BK / 16; s++)
      group_mma<NT, 1>(sums, a[s][0], a[s][1], a[s][2], a[s][3], b + s * (2048 / 16));
    products_end_group();
    products_wait<0>();
  }
  copies_wait<0>();
  __syncthreads();

  // A token's rows lie in pieces of eight, swizzled, until whole lines of y are written.
  const int row = row0 + part * 16 + r;
#pragma unroll
  for (int n = 0; n < NT; n += 2) {
    u32 pair[4];
#pragma unroll
    for (int i = 0; i < 4; i++) {  // rows r and r + 8 of eight tokens, then of the next eight
      const int o = row + i % 2 * 8;
      const float *sum = sums + (n + i / 2) * 4 + i % 2 * 2;
      const u16* own_bias = o < out ? bias : nullptr;
      const u32 low = from_float(finish(sum[0], own_bias, o, EPILOGUE));
      pair[i] = low | (u32)from_float(finish(sum[1], own_bias, o, EPILOGUE)) << 16;
    }
    const int token = across * OWN + n * 8 + lane / 16 * 8 + lane % 8;
    const int piece = part % 4 * 2 + lane / 8 % 2;
    u8* to = shared + (part / 4 * TOKENS + token) * 128 + ((piece ^ token) % 8 * 16);
    store_turned(to, pair[0], pair[1], pair[2], pair[3]);
  }
  __syncthreads();
  for (int i = threadIdx.x; i < TOKENS * ROWS / 8; i += THREADS) {
    const int piece = i % 8, token = i / 8 % TOKENS, group = i / 8 / TOKENS;
    const int o = row0 + group * 64 + piece * 8;
    if (token0 + token >= tokens || o >= out) continue;
    const Piece eight = *(const Piece*)(shared + (group * TOKENS + token) * 128 + ((piece ^ token) % 8 * 16));
    u16* to = y + (token0 + token) * ldy + o;
    if (whole) {
      *(Piece*)to = eight;
    } else {
#pragma unroll
      for (int j = 0; j < 8; j++)
        if (o + j < out) to[j] = eight.v[j];
    }
  }
}
