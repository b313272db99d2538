// What the kernels ask of a GPU, in PTX. tests/support/emulated/device.h has the same words in plain
// C++, so that the kernels themselves, unchanged, run on a CPU in the tests.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

// Threads of a block; blocks that a multiprocessor should hold.
#define KERNEL(...) extern "C" __global__ void __launch_bounds__(__VA_ARGS__)
#define DEVICE static __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(1024) u8 name[]

// c += a b of fragments m16n8k16: bfloat16, or float16 where HALF is 1; sums are float32.
DEVICE void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
#if HALF
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#else
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3},{%4,%5,%6,%7},{%8,%9},"
      "{%0,%1,%2,%3};"
      : "+f"(c[0]), "+f"(c[1]), "+f"(c[2]), "+f"(c[3])
      : "r"(a0), "r"(a1), "r"(a2), "r"(a3), "r"(b0), "r"(b1));
#endif
}

DEVICE float as_float(u32 bits) { return __uint_as_float(bits); }
DEVICE u32 bits_of(float f) { return __float_as_uint(f); }
// Two float16 and two others.
DEVICE u32 add_halves(u32 a, u32 b) {
  u32 r;
  asm("add.f16x2 %0, %1, %2;" : "=r"(r) : "r"(a), "r"(b));
  return r;
}

// v << s in 64 bits; 0 for s above 63, which C++ leaves undefined and PTX does not.
DEVICE u64 shl64(u32 v, u32 s) {
  u64 r;
  asm("{ .reg .b64 t; cvt.u64.u32 t, %1; shl.b64 %0, t, %2; }" : "=l"(r) : "r"(v), "r"(s));
  return r;
}

// v << 32 >> s in 64 bits, likewise.
DEVICE u64 shr64(u32 v, u32 s) {
  u64 r;
  asm("{ .reg .b64 t; mov.b64 t, {%3, %1}; shr.b64 %0, t, %2; }" : "=l"(r) : "r"(v), "r"(s), "r"(0));
  return r;
}

// Four bytes, each chosen by a nibble of `select`: 0 to 3 of `a`, 4 to 7 of `b`.
DEVICE u32 bytes_of(u32 a, u32 b, u32 select) { return __byte_perm(a, b, select); }

// Copies into shared memory that run on their own; zeros are written where `keep` is false.
DEVICE void copy16(void* to, const void* from, bool keep) {
  asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from), "r"(keep ? 16 : 0));
}
DEVICE void copy4(void* to, const void* from, bool keep) {
  asm volatile("cp.async.ca.shared.global [%0], [%1], 4, %2;" ::"r"((u32)__cvta_generic_to_shared(to)),
               "l"(from), "r"(keep ? 4 : 0));
}
DEVICE void copies_end_group() { asm volatile("cp.async.commit_group;"); }
// Waits until all but the `LEFT` newest groups of this thread have arrived.
template <int LEFT>
DEVICE void copies_wait() {
  asm volatile("cp.async.wait_group %0;" ::"n"(LEFT) : "memory");
}

DEVICE float to_float(u16 v) {
#if HALF
  float f;
  asm("cvt.f32.f16 %0, %1;" : "=f"(f) : "h"(v));
  return f;
#else
  return __uint_as_float((u32)v << 16);
#endif
}
// To the nearest, ties to even.
DEVICE u16 from_float(float f) {
  u16 v;
#if HALF
  asm("cvt.rn.f16.f32 %0, %1;" : "=h"(v) : "f"(f));
#else
  asm("cvt.rn.bf16.f32 %0, %1;" : "=h"(v) : "f"(f));
#endif
  return v;
}

// Where a pointer into shared memory points, as a number, and what lies at such a place.
DEVICE u32 place_of(const void* at) { return (u32)__cvta_generic_to_shared(at); }
DEVICE u32 read_shared(u32 place) {
  u32 v;
  asm volatile("ld.shared.b32 %0, [%1];" : "=r"(v) : "r"(place));
  return v;
}
DEVICE u64 read_shared_two(u32 place) {
  u64 v;
  asm volatile("ld.shared.b64 %0, [%1];" : "=l"(v) : "r"(place));
  return v;
}

// Four bytes that are read once.
DEVICE u32 read_once(const u32* from) {
  u32 v;
  asm volatile("ld.global.nc.L1::no_allocate.b32 %0, [%1];" : "=r"(v) : "l"(from));
  return v;
}

#if GROUPS  // what only sm_90 has
// Products of a warp group, four warps, on sm_90: c += a b of a fragment of each warp and of a matrix
// (16, 8 EIGHTS) in shared memory that `b` describes, which is transposed where FLIP is 1. They run on
// their own: c and a are the hardware's from `products_begin` until they are waited for.
//
// A matrix is made of cores of eight rows of sixteen bytes. Not turned, a row of a core is eight k of
// one n, `lead` bytes are from a core to the next along k, and `step` bytes along n. Turned, a row is
// eight n of one k; eight cores lie side by side, in rows of 128 bytes whose pieces are swizzled;
// `lead` bytes are to the next 64 n, and `step` to the next eight k.
DEVICE u64 describe(const void* at, u32 lead, u32 step, int turned) {
  return (u64)(((u32)__cvta_generic_to_shared(at) & 0x3ffff) >> 4) | (u64)(lead >> 4) << 16 |
         (u64)(step >> 4) << 32 | (u64)turned << 62;
}
// Bytes that threads wrote to shared memory are there for products that begin later.
DEVICE void writes_before_products() { asm volatile("fence.proxy.async.shared::cta;" ::: "memory"); }
DEVICE void products_begin() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
DEVICE void products_end_group() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
template <int LEFT>
DEVICE void products_wait() {
  asm volatile("wgmma.wait_group.sync.aligned %0;" ::"n"(LEFT) : "memory");
}

#if HALF
#define KIND ".f32.f16.f16"
#else
#define KIND ".f32.bf16.bf16"
#endif
#define C4(i) "+f"(c[i]), "+f"(c[i + 1]), "+f"(c[i + 2]), "+f"(c[i + 3])
#define C16(i) C4(i), C4(i + 4), C4(i + 8), C4(i + 12)
#define C64(i) C16(i), C16(i + 16), C16(i + 32), C16(i + 48)
#define AB "r"(a0), "r"(a1), "r"(a2), "r"(a3), "l"(b), "n"(FLIP)
template <int EIGHTS, int FLIP>
DEVICE void group_mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  if constexpr (EIGHTS == 1)
    asm volatile("wgmma.mma_async.sync.aligned.m64n8k16" KIND " {"
          "%0,%1,%2,%3"
          "},{%4,%5,%6,%7},%8,1,1,1,%9;"
                 : C4(0)
                 : AB);
  if constexpr (EIGHTS == 2)
    asm volatile("wgmma.mma_async.sync.aligned.m64n16k16" KIND " {"
          "%0,%1,%2,%3,%4,%5,%6,%7"
          "},{%8,%9,%10,%11},%12,1,1,1,%13;"
                 : C4(0), C4(4)
                 : AB);
  if constexpr (EIGHTS == 4)
    asm volatile("wgmma.mma_async.sync.aligned.m64n32k16" KIND " {"
          "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15"
          "},{%16,%17,%18,%19},%20,1,1,1,%21;"
                 : C16(0)
                 : AB);
  if constexpr (EIGHTS == 8)
    asm volatile("wgmma.mma_async.sync.aligned.m64n64k16" KIND " {"
          "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
          "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31"
          "},{%32,%33,%34,%35},%36,1,1,1,%37;"
                 : C16(0), C16(16)
                 : AB);
  if constexpr (EIGHTS == 16)
    asm volatile("wgmma.mma_async.sync.aligned.m64n128k16" KIND " {"
          "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
          "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%4"
          "1,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"
          "%61,%62,%63"
          "},{%64,%65,%66,%67},%68,1,1,1,%69;"
                 : C64(0)
                 : AB);
  if constexpr (EIGHTS == 32)
    asm volatile("wgmma.mma_async.sync.aligned.m64n256k16" KIND " {"
          "%0,%1,%2,%3,%4,%5,%6,%7,%8,%9,%10,%11,%12,%13,%14,%15,%16,%17,%18,%19,%20,%21,"
          "%22,%23,%24,%25,%26,%27,%28,%29,%30,%31,%32,%33,%34,%35,%36,%37,%38,%39,%40,%4"
          "1,%42,%43,%44,%45,%46,%47,%48,%49,%50,%51,%52,%53,%54,%55,%56,%57,%58,%59,%60,"
          "%61,%62,%63,%64,%65,%66,%67,%68,%69,%70,%71,%72,%73,%74,%75,%76,%77,%78,%79,%8"
          "0,%81,%82,%83,%84,%85,%86,%87,%88,%89,%90,%91,%92,%93,%94,%95,%96,%97,%98,%99,"
          "%100,%101,%102,%103,%104,%105,%106,%107,%108,%109,%110,%111,%112,%113,%114,%11"
          "5,%116,%117,%118,%119,%120,%121,%122,%123,%124,%125,%126,%127"
          "},{%128,%129,%130,%131},%132,1,1,1,%133;"
                 : C64(0), C64(64)
                 : AB);
}

// Four 8 x 8 matrices of two-byte numbers, as fragments of `mma` hold them, to shared memory: lane i
// gives the place of row i % 8 of the transpose of matrix i / 8.
DEVICE void store_turned(void* to, u32 v0, u32 v1, u32 v2, u32 v3) {
  asm volatile("stmatrix.sync.aligned.m8n8.x4.trans.shared.b16 [%0], {%1,%2,%3,%4};" ::"r"(
                   (u32)__cvta_generic_to_shared(to)),
               "r"(v0), "r"(v1), "r"(v2), "r"(v3)
               : "memory");
}
#endif
