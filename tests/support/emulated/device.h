// The words of nmflow/kernels/cuda/device.h in plain C++: a thread is a fiber, a warp's product takes
// the fragments of its 32 fibers, and a copy arrives no sooner than it is waited for.
#pragma once
#include <ucontext.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <deque>
#include <memory>
#include <utility>
#include <vector>

typedef unsigned char u8;
typedef unsigned short u16;
typedef unsigned int u32;
typedef unsigned long long u64;
typedef long long i64;

#define KERNEL(...) extern "C" void
#define DEVICE static inline
#define SHARED(name) u8* name = emulated::shared.data()

namespace emulated {

struct Dim {
  u32 x, y, z;
};
struct Copy {
  void* to;
  const void* from;
  int size;
  bool keep;
};
struct Barrier {
  int arrived = 0, round = 0;
};
struct Warp {
  Barrier barrier;
  u32 a[32][4], b[32][2];
};
struct Fiber {
  ucontext_t context;
  std::unique_ptr<char[]> stack;
  Dim thread;
  bool done = false;
  std::deque<std::vector<Copy>> groups;  // the last one is still open
};

inline std::vector<u8> shared;
inline std::vector<Fiber> fibers;
inline std::vector<Warp> warps;
inline Barrier block;
inline ucontext_t scheduler;
inline int now = 0;
inline Dim block_index, grid;
inline void (*body)();

inline void pass() { swapcontext(&fibers[now].context, &scheduler); }
inline void meet(Barrier& b, int size) {
  const int round = b.round;
  if (++b.arrived == size) {
    b.arrived = 0;
    b.round++;
  }
  while (b.round == round) pass();
}
inline Warp& warp() { return warps[now / 32]; }
inline void start() {
  body();
  fibers[now].done = true;
  for (;;) pass();
}
inline float half_to_float(u16 v) {
  _Float16 h;
  std::memcpy(&h, &v, 2);
  return (float)h;
}
inline float bfloat_to_float(u16 v) {
  const u32 wide = (u32)v << 16;
  float f;
  std::memcpy(&f, &wide, 4);
  return f;
}

// Run every block of a grid. Memory that no one has written holds NaNs, and threads run in an order
// that differs from block to block.
inline void run(Dim blocks, int threads, int shared_bytes, void (*kernel)()) {
  body = kernel;
  grid = blocks;
  for (u32 z = 0; z < blocks.z; z++)
    for (u32 y = 0; y < blocks.y; y++)
      for (u32 x = 0; x < blocks.x; x++) {
        block_index = {x, y, z};
        shared.assign(shared_bytes, 0xff);
        fibers = std::vector<Fiber>(threads);
        warps.assign((threads + 31) / 32, Warp());
        block = Barrier();
        for (int i = 0; i < threads; i++) {
          Fiber& f = fibers[i];
          f.thread = {(u32)i, 0, 0};
          f.groups.emplace_back();
          f.stack.reset(new char[1 << 16]);
          getcontext(&f.context);
          f.context.uc_stack.ss_sp = f.stack.get();
          f.context.uc_stack.ss_size = 1 << 16;
          f.context.uc_link = nullptr;
          makecontext(&f.context, start, 0);
        }
        for (int left = threads; left;) {
          left = 0;
          for (int i = 0; i < threads; i++) {
            now = (x + y) % 2 ? threads - 1 - i : i;
            if (fibers[now].done) continue;
            swapcontext(&scheduler, &fibers[now].context);
            left += !fibers[now].done;
          }
        }
      }
}

}  // namespace emulated

#define threadIdx emulated::fibers[emulated::now].thread
#define blockIdx emulated::block_index
#define gridDim emulated::grid
inline void __syncthreads() { emulated::meet(emulated::block, (int)emulated::fibers.size()); }
inline void __syncwarp() { emulated::meet(emulated::warp().barrier, 32); }

DEVICE float to_float(u16 v) {
#if HALF
  return emulated::half_to_float(v);
#else
  return emulated::bfloat_to_float(v);
#endif
}
DEVICE u16 from_float(float f) {
  u32 bits;
  std::memcpy(&bits, &f, 4);
#if HALF
  const _Float16 h = (_Float16)f;
  u16 v;
  std::memcpy(&v, &h, 2);
  return v;
#else
  if (f != f) return 0x7fff;
  return (bits + 0x7fff + (bits >> 16 & 1)) >> 16;
#endif
}

// By the tables of the PTX manual, "matrix fragments for mma.m16n8k16".
DEVICE void mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u32 b0, u32 b1) {
  emulated::Warp& w = emulated::warp();
  const int lane = emulated::now % 32, group = lane / 4, in_group = lane % 4;
  const u32 a[4] = {a0, a1, a2, a3}, b[2] = {b0, b1};
  std::memcpy(w.a[lane], a, sizeof a);
  std::memcpy(w.b[lane], b, sizeof b);
  __syncwarp();
  for (int i = 0; i < 4; i++) {
    const int row = group + (i < 2 ? 0 : 8), column = in_group * 2 + (i & 1);
    for (int k = 0; k < 16; k++) {
      const int part = k % 8 / 2, ra = (row >= 8) + (k >= 8) * 2, rb = k >= 8;
      const u32 from_a = w.a[row % 8 * 4 + part][ra], from_b = w.b[column * 4 + part][rb];
      c[i] += to_float(from_a >> k % 2 * 16) * to_float(from_b >> k % 2 * 16);
    }
  }
  __syncwarp();
}

DEVICE float as_float(u32 bits) {
  float f;
  std::memcpy(&f, &bits, 4);
  return f;
}
DEVICE u32 place_of(const void* at) { return (u32)((const u8*)at - emulated::shared.data()); }
DEVICE void read_place(void* to, u32 place, int size) {
  if (place % size || place + size > emulated::shared.size()) __builtin_trap();
  std::memcpy(to, emulated::shared.data() + place, size);
}
DEVICE u32 read_shared(u32 place) {
  u32 v;
  read_place(&v, place, 4);
  return v;
}
DEVICE u64 read_shared_two(u32 place) {
  u64 v;
  read_place(&v, place, 8);
  return v;
}
DEVICE u32 read_once(const u32* from) { return *from; }

// By the PTX manual's canonical layouts of a matrix in shared memory, without a swizzle or with that of
// 128 bytes, and the same fragments as above; products of a warp are done at once.
DEVICE u64 describe(const void* at, u32 lead, u32 step, int turned) {
  const u32 place = place_of(at);
  if (place % (turned ? 1024 : 16) || lead % 16 || step % 16) __builtin_trap();
  return (u64)(place >> 4) | (u64)(lead >> 4) << 16 | (u64)(step >> 4) << 32 | (u64)turned << 62;
}
DEVICE void writes_before_products() {}
DEVICE void products_begin() {}
DEVICE void products_end_group() {}
template <int LEFT>
DEVICE void products_wait() {}
template <int EIGHTS, int FLIP>
DEVICE void group_mma(float* c, u32 a0, u32 a1, u32 a2, u32 a3, u64 b) {
  const u32 at = (u32)(b & 0x3fff) << 4, lead = (b >> 16 & 0x3fff) << 4, step = (b >> 32 & 0x3fff) << 4;
  if ((b >> 62) != FLIP) __builtin_trap();
  auto element = [&](int n, int k) {
    u32 place = FLIP ? at + n / 64 * lead + k / 8 * step + k % 8 * 128 + n % 64 * 2
                     : at + k / 8 * lead + n / 8 * step + n % 8 * 16 + k % 8 * 2;
    if (FLIP) place ^= place / 128 % 8 * 16;
    u16 v;
    read_place(&v, place, 2);
    return (u32)v;
  };
  const int lane = emulated::now % 32, group = lane / 4, in_group = lane % 4;
  for (int t = 0; t < EIGHTS; t++) {
    const int n = t * 8 + group, k = in_group * 2;
    mma(c + 4 * t, a0, a1, a2, a3, element(n, k) | element(n, k + 1) << 16,
        element(n, k + 8) | element(n, k + 9) << 16);
  }
}
DEVICE void store_turned(void* to, u32 v0, u32 v1, u32 v2, u32 v3) {
  emulated::Warp& w = emulated::warp();
  const int lane = emulated::now % 32;
  const u32 v[4] = {v0, v1, v2, v3};
  std::memcpy(w.a[lane], v, sizeof v);
  __syncwarp();
  for (int i = 0; i < 8; i++) {  // row `lane % 8` of the transpose of matrix `lane / 8`
    const u16 one = w.a[i * 4 + lane % 8 / 2][lane / 8] >> lane % 2 * 16;
    std::memcpy((u8*)to + 2 * i, &one, 2);
  }
  __syncwarp();
}

DEVICE u64 shl64(u32 v, u32 s) { return s > 63 ? 0 : (u64)v << s; }
DEVICE u64 shr64(u32 v, u32 s) { return s > 63 ? 0 : (u64)v << 32 >> s; }
DEVICE u32 bits_of(float f) {
  u32 bits;
  std::memcpy(&bits, &f, 4);
  return bits;
}
DEVICE u32 add_halves(u32 a, u32 b) {
  u32 r = 0;
  for (int i = 0; i < 32; i += 16) {
    const _Float16 sum = (_Float16)(emulated::half_to_float(a >> i) + emulated::half_to_float(b >> i));
    u16 v;
    std::memcpy(&v, &sum, 2);
    r |= (u32)v << i;
  }
  return r;
}
DEVICE u32 bytes_of(u32 a, u32 b, u32 select) {
  const u64 both = (u64)b << 32 | a;
  u32 r = 0;
  for (int i = 0; i < 4; i++) r |= (u32)(both >> (select >> 4 * i & 7) * 8 & 255) << 8 * i;
  return r;
}

DEVICE void copy(void* to, const void* from, int size, bool keep) {
  if ((uintptr_t)to % size || (uintptr_t)from % size) __builtin_trap();
  emulated::fibers[emulated::now].groups.back().push_back({to, from, size, keep});
}
DEVICE void copy16(void* to, const void* from, bool keep) { copy(to, from, 16, keep); }
DEVICE void copy4(void* to, const void* from, bool keep) { copy(to, from, 4, keep); }
DEVICE void copies_end_group() { emulated::fibers[emulated::now].groups.emplace_back(); }
template <int LEFT>
DEVICE void copies_wait() {
  auto& groups = emulated::fibers[emulated::now].groups;
  while ((int)groups.size() - 1 > LEFT) {
    for (const emulated::Copy& c : groups.front())
      if (c.keep)
        std::memcpy(c.to, c.from, c.size);
      else
        std::memset(c.to, 0, c.size);
    groups.pop_front();
  }
}

// Call a kernel with arguments given by address, as cuLaunchKernel takes them.
template <typename... A, size_t... I>
void call(void (*kernel)(A...), void** args, std::index_sequence<I...>) {
  kernel(*(std::remove_reference_t<A>*)args[I]...);
}
template <typename... A>
void call(void (*kernel)(A...), void** args) {
  call(kernel, args, std::index_sequence_for<A...>());
}
#define EMULATES(kernel)                                                                           \
  static void** args_of_##kernel;                                                                  \
  static void body_of_##kernel() { call(kernel, args_of_##kernel); }                               \
  extern "C" void run_##kernel(u32 x, u32 y, u32 z, int threads, int shared_bytes, void** args) {  \
    args_of_##kernel = args;                                                                       \
    emulated::run({x, y, z}, threads, shared_bytes, body_of_##kernel);                             \
  }
