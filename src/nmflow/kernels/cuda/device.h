// What the kernels ask of a GPU, in PTX. tests/support/emulated/device.h has the same words in plain
// C++, so that the kernels themselves, unchanged, run on a CPU in the tests.
#pragma once

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define KERNEL(threads) extern "C" __global__ void __launch_bounds__(threads)
#define DEVICE static __device__ __forceinline__
#define SHARED(name) extern __shared__ __align__(16) u8 name[]

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

// v << s in 64 bits; 0 for s above 63, which C++ leaves undefined and PTX does not.
DEVICE u64 shl64(u32 v, u32 s) {
  u64 r;
  asm("{ .reg .b64 t; cvt.u64.u32 t, %1; shl.b64 %0, t, %2; }" : "=l"(r) : "r"(v), "r"(s));
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
