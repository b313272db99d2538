// Sixteen inputs of a token, in the order in which `fragment` has them: pairs 0, 2, 4, 6 of the first
// core of a product of warp groups, and 1, 3, 5, 7 of the second.
#pragma once

struct alignas(16) Quad {
  u32 v[4];
};

// From x; zeros for what is not `there`, and beyond `left` inputs. `whole`: x is aligned to 16 bytes.
DEVICE void load_sixteen(Quad* held, const u16* from, int left, bool there, bool whole) {
  if (whole && there && left >= 16) {
    held[0] = *(const Quad*)from;
    held[1] = *(const Quad*)(from + 8);
    return;
  }
#pragma unroll
  for (int e = 0; e < 8; e++) {
    const u32 low = there && 2 * e < left ? from[2 * e] : 0;
    const u32 high = there && 2 * e + 1 < left ? from[2 * e + 1] : 0;
    held[e / 4].v[e % 4] = low | high << 16;
  }
}

// Where the first core has the token; `step` tokens further is the second.
DEVICE void store_sixteen(Quad* at, int step, const Quad* held) {
  const Quad &a = held[0], &b = held[1];
  at[0] = {a.v[0], a.v[2], b.v[0], b.v[2]};
  at[step] = {a.v[1], a.v[3], b.v[1], b.v[3]};
}
