// x as `groups.cu` with READY copies it: for each tile of TOKENS tokens the cores of sixteen inputs
// after one another, as they lie in its shared memory. Compiled for NT.
#include "device.h"
#include "sixteen.h"

constexpr int TOKENS = NT * 8;

// Grid: (blocks * TOKENS / 256, tokens / TOKENS). A warp has four blocks of sixteen inputs of eight
// tokens, so that it reads whole lines and writes whole cores. What is beyond x is 0.
KERNEL(256)
ready(const u16* x, u8* to, i64 ldx, int inputs, int tokens, int blocks, int whole) {
  const int i = blockIdx.x * 256 + threadIdx.x;
  const int n = i % 8 + i / 32 % NT * 8, block = i / 8 % 4 + i / (32 * NT) * 4;
  if (block >= blocks) return;
  const int token = blockIdx.y * TOKENS + n;
  Quad held[2];
  load_sixteen(held, x + token * ldx + block * 16, inputs - block * 16, token < tokens, whole);
  Quad* at = (Quad*)(to + ((i64)blockIdx.y * blocks + block) * (32 * TOKENS)) + n;
  store_sixteen(at, TOKENS, held);
}
