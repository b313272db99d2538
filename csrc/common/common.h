/* What every C++ file shares. Included by files compiled for different instruction sets, so it
 * holds no inline function with external linkage: the linker could keep the AVX-512 copy of one
 * and run it on a machine without. Everything here is static or a plain type. */
#ifndef NMFLOW_COMMON_H
#define NMFLOW_COMMON_H

#include <stddef.h>
#include <stdint.h>
#include <string.h>

#include "nmflow.h"

#if defined(__GNUC__)
#define NMF_INLINE static inline __attribute__((always_inline))
#else
#define NMF_INLINE static inline
#endif

NMF_INLINE int64_t nmf_ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
NMF_INLINE int64_t nmf_min(int64_t a, int64_t b) { return a < b ? a : b; }

/* The bytes of the words that a row of so many bytes is made of. */
NMF_INLINE int64_t nmf_word(int64_t bytes) { return bytes % 8 == 0 ? 8 : bytes % 4 == 0 ? 4 : 2; }

NMF_INLINE int nmf_item_bytes(int dtype) { return dtype == NMFLOW_F32 ? 4 : 2; }

NMF_INLINE float nmf_float_of_bits(uint32_t bits) {
  float value;
  memcpy(&value, &bits, 4);
  return value;
}
NMF_INLINE uint32_t nmf_bits_of_float(float value) {
  uint32_t bits;
  memcpy(&bits, &value, 4);
  return bits;
}

NMF_INLINE float nmf_bf16_to_float(uint16_t h) { return nmf_float_of_bits((uint32_t)h << 16); }
/* Round to nearest even. A NaN stays a NaN (its low payload bits could round to infinity). */
NMF_INLINE uint16_t nmf_float_to_bf16(float value) {
  uint32_t bits = nmf_bits_of_float(value);
  if ((bits & 0x7fffffffu) > 0x7f800000u) return (uint16_t)((bits >> 16) | 0x40);
  return (uint16_t)((bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16);
}

NMF_INLINE float nmf_f16_to_float(uint16_t h) {
  const uint32_t sign = (uint32_t)(h & 0x8000u) << 16, rest = h & 0x7fffu;
  if (rest >= 0x7c00u) return nmf_float_of_bits(sign | 0x7f800000u | ((rest & 0x3ffu) << 13));
  if (rest >= 0x0400u) return nmf_float_of_bits(sign | ((rest << 13) + 0x38000000u));
  /* Subnormal or zero: rest * 2^-24, exact in fp32. */
  return nmf_float_of_bits(sign | nmf_bits_of_float((float)rest * 5.9604644775390625e-8f));
}
NMF_INLINE uint16_t nmf_float_to_f16(float value) {
  const uint32_t bits = nmf_bits_of_float(value);
  const uint16_t sign = (uint16_t)((bits >> 16) & 0x8000u);
  const uint32_t a = bits & 0x7fffffffu;
  if (a > 0x7f800000u) return (uint16_t)(sign | 0x7e00u);
  if (a >= 0x477ff000u) return (uint16_t)(sign | 0x7c00u); /* rounds to 65536 or above */
  if (a < 0x38800000u) {
    /* Below the smallest normal: adding 0.5 leaves the value in units of 2^-24, rounded to even
     * by the addition itself. */
    const float scaled = nmf_float_of_bits(a) + 0.5f;
    return (uint16_t)(sign | (nmf_bits_of_float(scaled) - 0x3f000000u));
  }
  return (uint16_t)(sign | ((a + 0xfffu + ((a >> 13) & 1u) - 0x38000000u) >> 13));
}

/* Loads and stores of one element as fp32, by a dtype known at compile time. */
template <int DTYPE>
struct nmf_element;
template <>
struct nmf_element<NMFLOW_F32> {
  typedef float type;
  static const uint32_t infinity = 0x7f800000u;
  NMF_INLINE uint32_t key(float v) { return nmf_bits_of_float(v) & 0x7fffffffu; }
  NMF_INLINE float load(float v) { return v; }
  NMF_INLINE float store(float v) { return v; }
};
template <>
struct nmf_element<NMFLOW_BF16> {
  typedef uint16_t type;
  static const uint32_t infinity = 0x7f80u;
  NMF_INLINE uint32_t key(uint16_t v) { return v & 0x7fffu; }
  NMF_INLINE float load(uint16_t v) { return nmf_bf16_to_float(v); }
  NMF_INLINE uint16_t store(float v) { return nmf_float_to_bf16(v); }
};
template <>
struct nmf_element<NMFLOW_F16> {
  typedef uint16_t type;
  static const uint32_t infinity = 0x7c00u;
  NMF_INLINE uint32_t key(uint16_t v) { return v & 0x7fffu; }
  NMF_INLINE float load(uint16_t v) { return nmf_f16_to_float(v); }
  NMF_INLINE uint16_t store(float v) { return nmf_float_to_f16(v); }
};

/* The numbers that a shape implies; nmf_geometry_of checks the shape before it computes any. */
struct nmf_geometry {
  int64_t out, in, n, m, panel, dtype;
  int64_t entries;       /* S = in / m * n, kept values of a row */
  int64_t entries_held;  /* the same, rounded up to a pair for 16-bit dtypes */
  int64_t tiles;         /* ceil(out / 16) */
  int64_t span, span_entries, spans;
  int64_t bits, per, words; /* codes: bits each, per in a uint32, words per lane */
  int64_t panels;           /* shared codes: number of panels, else 0 */
  int64_t values_bytes, codes_bytes;
};
int nmf_geometry_of(const nmflow_shape *shape, nmf_geometry *geometry);

/* Hidden from the ABI. parallel.cpp: run(context, task) for every task in [0, tasks), in any
 * order, on at most `threads` threads. */
typedef void (*nmf_task)(void *context, int64_t task);
void nmf_parallel(int64_t tasks, int threads, nmf_task run, void *context);
/* abi.cpp: the instruction set in use, and whether its tiles are emulated. */
int nmf_isa(void);
/* Whether the CPU reads one stream of memory faster if it is not told what comes next. */
bool nmf_reads_ahead(void);
bool nmf_emulates(void);

/* Threads of whoever calls: while one is borrowed, the calling thread's regions run on it. `run`
 * calls task(data, i) for every i below total, in any order; false if it could not start. */
struct nmf_pool {
  bool (*run)(void *pool, void (*task)(void *, size_t), size_t total, void *data);
  void *pool;
};
void nmf_borrow(const nmf_pool *pool);

/* What the layout of 8-bit weights adds to a geometry; all zero where the values are floats. */
struct nmf_int8 {
  int64_t bits, per;               /* of a code; codes in a byte, which are quads in a block */
  int64_t blocks;                  /* of a tile */
  int64_t block_bytes, tile_bytes, bytes;
  int activations;                 /* NMFLOW_FLOATS or NMFLOW_INT8S */
};

/* One matrix product, its sizes checked, and the part of it that a task does. */
struct nmf_job {
  nmf_geometry g;
  nmf_int8 q;
  const void *values, *codes, *x, *bias;
  void *y;
  int64_t x_stride, y_stride, tokens;
  int epilogue, turned; /* nmflow_turned */
  /* Whether a kernel fetches the weights of a token alone, which are read once and in order. */
  bool fetch;
  /* The grid of tasks: token blocks (fastest) x tile blocks. Filled in by the driver. */
  int64_t token_blocks, tile_block;
};
struct nmf_part {
  int64_t token, token_end, tile, tile_end;
};

/* A kernel computes y for the tokens and tiles of a part. `scratch` is 64-byte aligned and of
 * scratch_bytes(job, tokens of a part, tiles of a part). */
struct nmf_kernel {
  void (*run)(const nmf_job *job, const nmf_part *part, char *scratch);
  int64_t (*scratch_bytes)(const nmf_job *job, int64_t tokens, int64_t tiles);
  /* Most tokens of a part; a call's are cut evenly into multiples of `step`. */
  int64_t (*max_tokens)(const nmf_geometry *geometry, int64_t tokens);
  int64_t step;
  /* Most tiles of a part; null where a part may have all. */
  int64_t (*max_tiles)(const nmf_geometry *geometry);
};
/* matmul.cpp: checks what every product's call says, and runs a checked one with a kernel; the weight
 * has `bytes`. */
int nmf_check_call(const nmf_geometry *g, const void *x, int64_t x_stride, const void *y,
                   int64_t y_stride, int64_t tokens, int epilogue);
int nmf_run(nmf_job *job, const nmf_kernel *kernel, int64_t bytes, int threads);
/* The kernel of that number for a pattern on this machine, or null; and from how many tokens on the kernel
 * `tokens`, which transposes x, is faster than `gather`. */
const nmf_kernel *nmf_kernel_of(int number, const nmf_geometry *g);
int64_t nmf_tokens_from(void);

const nmf_kernel *nmf_gather_portable(void), *nmf_tokens_portable(void), *nmf_panel_portable(void);
const nmf_kernel *nmf_gather_avx2(void), *nmf_tokens_avx2(void), *nmf_panel_avx2(void);
const nmf_kernel *nmf_gather_avx512(void), *nmf_tokens_avx512(void), *nmf_panel_avx512(void);
const nmf_kernel *nmf_permute_avx2(void), *nmf_permute_avx512(void);
const nmf_kernel *nmf_tiles_amx(void), *nmf_tiles_emulated(void), *nmf_tiles_vectors(void);
/* The same for 8-bit weights: dot with 8-bit activations, permute with floats. */
const nmf_kernel *nmf_int8_dot_portable(void), *nmf_int8_dot_avx2(void), *nmf_int8_dot_vnni(void);
const nmf_kernel *nmf_int8_dot_floats_avx2(bool many), *nmf_int8_dot_floats_avx512(bool many);
const nmf_kernel *nmf_int8_permute_avx2(void), *nmf_int8_permute_avx512(void);

#endif
