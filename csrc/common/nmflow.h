/* The plain C ABI of nmflow's CPU kernels. No torch, no C++ in it; loaded with ctypes.
 *
 * Everything that the caller hands over is checked here, at the boundary: sizes with overflow
 * checks in 64 bits, pointers, byte counts and, in nmflow_validate, every index. A kernel never
 * reads or writes outside the buffers whose sizes it was told.
 *
 * Pattern: N is the number of weights KEPT of every M consecutive inputs; W is (out, in), in is a
 * multiple of M. With panel = V > 1, V consecutive output rows share their kept columns.
 *
 * ---------------------------------------------------------------------------------------------
 * Kernel layout, version 1 (what a module holds in memory; one layout serves every kernel):
 *   S       = in / M * N, the kept values of a row in column order; entry s is of group s / N
 *   tiles   = ceil(out / 16)            16 output rows are the 16 lanes of a tile
 *   values  fp32:   [tiles][S][16]
 *           16-bit: [tiles][ceil(S / 2)][16][2]: entries 2p and 2p + 1 of a row side by side, as
 *           bf16 dot products want them. Rows past `out` and an odd last entry are zero.
 *   span    = floor(16 / M) * M inputs when M <= 16, else M; a span holds span / M * N entries
 *   code    4 bits when M <= 16, else 8: the column inside its SPAN (so M = 4 has codes 0..15).
 *           per = 8 or 4 codes in a uint32, entry s in bits [(s % per) * bits, ...)
 *   codes   uint32 [lists'][ceil(S / per)][16], lists' = tiles                       (own rows)
 *           uint8  [ceil(out / panel)][S]: the column inside its span, one per byte  (shared)
 *   Shared codes are used when panel is a multiple of 16: then every tile lies in one panel.
 *   Other panels are stored as if each row had a pattern of its own.
 *   All buffers are little-endian.
 * ---------------------------------------------------------------------------------------------
 */
#ifndef NMFLOW_H
#define NMFLOW_H

#include <stdint.h>

#ifdef __cplusplus
extern "C" {
#endif

#if defined(_WIN32)
#define NMFLOW_API __declspec(dllexport)
#else
#define NMFLOW_API __attribute__((visibility("default")))
#endif

#define NMFLOW_ABI_VERSION 9
#define NMFLOW_LAYOUT_VERSION 1

enum nmflow_dtype { NMFLOW_F32 = 0, NMFLOW_BF16 = 1, NMFLOW_F16 = 2 };
enum nmflow_epilogue {
  NMFLOW_NONE = 0,
  NMFLOW_GELU = 1,      /* v (1 + erf(v / sqrt 2)) / 2 */
  NMFLOW_RELU = 2,
  NMFLOW_SILU = 3,      /* v / (1 + exp(-v)) */
  NMFLOW_GELU_TANH = 4  /* v (1 + tanh(sqrt(2 / pi) (v + 0.044715 v^3))) / 2 */
};
/* NMFLOW_AMX is NMFLOW_AVX512 with tiles. */
enum nmflow_isa { NMFLOW_PORTABLE = 0, NMFLOW_AVX2 = 1, NMFLOW_AVX512 = 2, NMFLOW_AMX = 3 };

/* Results. Zero is success; a positive number says something about the data; negative is refused. */
enum nmflow_status {
  NMFLOW_OK = 0,
  NMFLOW_NOT_FINITE = 1,    /* what is read holds a NaN or an infinity */
  NMFLOW_NOT_KEPT = 2,      /* a group keeps more than N, or a row than was said */
  NMFLOW_BAD_PATTERN = -1,  /* not 1 <= N <= M, M out of range, in not a multiple of M, panel < 1 */
  NMFLOW_BAD_SHAPE = -2,    /* a size is negative, zero where it may not be, or overflows */
  NMFLOW_BAD_DTYPE = -3,    /* unknown dtype or epilogue */
  NMFLOW_BAD_POINTER = -4,  /* a required pointer is null */
  NMFLOW_BAD_BYTES = -5,    /* a buffer has another size than the shape demands */
  NMFLOW_BAD_INDEX = -6,    /* an index is out of range, repeated or out of order */
  NMFLOW_NO_MEMORY = -7,    /* scratch memory could not be had */
  NMFLOW_NO_KERNEL = -8     /* the kernel asked for does not serve this case on this machine */
};

/* What a packed weight is. Plain numbers: every function checks it. */
typedef struct nmflow_shape {
  int64_t out, in;
  int32_t n, m, panel, dtype;
} nmflow_shape;

/* A packed weight in kernel layout: pointers with the sizes of what they point at. */
typedef struct nmflow_packed {
  nmflow_shape shape;
  const void *values;
  int64_t values_bytes;
  const void *codes;
  int64_t codes_bytes;
} nmflow_packed;

NMFLOW_API int32_t nmflow_abi_version(void);

/* The instruction set in use: the best that CPU and operating system offer, or NMFLOW_ISA
 * ("portable", "avx2", "avx512", "amx") from the environment at the first call, never above what is
 * there. nmflow_set_isa changes it for tests and returns the one now in use. */
NMFLOW_API int32_t nmflow_isa_now(void);
NMFLOW_API int32_t nmflow_set_isa(int32_t isa);
/* For tests: tiles in C++, so that NMFLOW_AMX can be set on a machine without them (1), or not (0); it needs
 * avx512_bf16. Slow, and exact. Returns whether they are emulated now. Tiles that are there are preferred to none. */
NMFLOW_API int32_t nmflow_emulate_tiles(int32_t on);
/* c[rows][columns] += a[rows][pairs][2] b[pairs][columns][2], each at most 16, as the emulation does it. */
NMFLOW_API int32_t nmflow_emulated_dot(int32_t rows, int32_t pairs, int32_t columns, const uint16_t *a,
                                       const uint16_t *b, float *c);
/* Bit 0 avx2+fma+f16c, 1 avx512 f/bw/dq/vl, 2 avx512_bf16, 3 amx_bf16 (usable, not just named),
 * 4 avx512 vnni and vbmi. */
NMFLOW_API int32_t nmflow_cpu_features(void);
NMFLOW_API const char *nmflow_compiler(void);

/* The OpenMP runtime that torch already uses: the address of its GOMP_parallel, so that one pool
 * of threads serves both and none oversubscribes the cores. Null: the library's own pool. */
NMFLOW_API void nmflow_set_runner(void (*gomp_parallel)(void (*)(void *), void *, unsigned,
                                                        unsigned));

/* Magnitude mask and projection in ONE pass over memory of w, [outer][length][inner], contiguous,
 * with groups of m along length. Keeps exactly n of each group: the largest |w|, ties to the lowest
 * index. With panel > 1, panel consecutive outer rows (the last ones may be fewer) share what they
 * keep: the largest sums of their |w|, added in fp32 in the order of the rows. Outputs may be null:
 *   dense[i] = w[i]; mask[i] = kept ? 1 : 0;
 *   out[i] = kept ? v[i] : delta == 0 ? +0.0 : v[i] * delta
 * (the product in fp32, rounded once to the dtype), where v is values, of w's dtype and sizes, or w
 * itself if that is null; where pull is not 0, a pruned out[i] is v[i] * delta + w[i] * pull, in
 * fp32, rounded once. out may be v; no other overlap.
 * Any 1 <= n <= m. NMFLOW_NOT_FINITE: w holds a NaN or an infinity, outputs are unspecified. */
NMFLOW_API int32_t nmflow_project(const void *w, int32_t dtype, int64_t outer, int64_t length,
                                  int64_t inner, int64_t n, int64_t m, int64_t panel,
                                  double delta, const void *values, double pull, void *dense,
                                  uint8_t *mask, void *out, int32_t threads);

/* The same outputs by a mask that is there already, in one pass over w, [rows][cols], contiguous:
 *   out[i] = mask[i] ? v[i] : delta == 0 ? +0.0 : v[i] * delta
 * with values and pull as above. out may be w or v. prints (may be null, then odd is too) gets for
 * each row of out the sum of odd[j] * word[j] modulo 2^64, over the row's words of 8 bytes, of 4
 * where 8 do not divide it, or of 2: signed, as they lie in memory. NMFLOW_NOT_FINITE: w holds a
 * NaN or an infinity; the outputs are as said all the same. */
NMFLOW_API int32_t nmflow_hold(const void *w, int32_t dtype, int64_t rows, int64_t cols,
                               const uint8_t *mask, double delta, const void *values, double pull,
                               void *out, const int64_t *odd, int64_t *prints, int32_t threads);
/* The same sums of rows of bytes that are there already; row_bytes is even. */
NMFLOW_API int32_t nmflow_prints(const void *data, int64_t rows, int64_t row_bytes,
                                 const int64_t *odd, int64_t *prints, int32_t threads);

/* Checks a kernel-layout weight whole: sizes, every code in its group, strictly increasing, no bits
 * in padding. The kernels stay inside their buffers even for codes that would not pass (decoding
 * clamps each to the last input of its span), but the result is then without meaning. */
NMFLOW_API int32_t nmflow_validate(const nmflow_packed *packed);

/* y[t][o] = epilogue(sum_i x[t][i] W[o][i] + bias[o]), accumulated in fp32, rounded once.
 * x and y are row-major with row strides in ELEMENTS (x_stride >= in, y_stride >= out), of the
 * weight's dtype; bias (may be null) too, with `out` elements. x and y do not overlap.
 * threads: at most this many, 1 runs in the calling thread. kernel: 0 lets the library choose, else
 * a number below. Checks sizes, not codes: call nmflow_validate once when a weight is loaded. */
NMFLOW_API int32_t nmflow_matmul(const nmflow_packed *packed, const void *x, int64_t x_stride,
                                 const void *bias, void *y, int64_t y_stride, int64_t tokens,
                                 int32_t epilogue, int32_t threads, int32_t kernel);

/* The same with x or y, or both, turned: x is [in][tokens], y [out][tokens], and a stride is that between features,
 * at least `tokens`. Only NMFLOW_TILES serves it; NMFLOW_NO_KERNEL elsewhere. */
enum nmflow_turned { NMFLOW_X_TURNED = 1, NMFLOW_Y_TURNED = 2 };
NMFLOW_API int32_t nmflow_matmul_turned(const nmflow_packed *packed, const void *x, int64_t x_stride,
                                        const void *bias, void *y, int64_t y_stride, int64_t tokens,
                                        int32_t turned, int32_t epilogue, int32_t threads);

enum nmflow_kernel {
  NMFLOW_AUTO = 0,
  NMFLOW_GATHER = 1,  /* rows in lanes, x gathered from memory: few tokens, any pattern */
  NMFLOW_TOKENS = 2,  /* tokens in lanes, x transposed block by block: many tokens, any pattern */
  NMFLOW_PERMUTE = 3, /* rows in lanes, x permuted in registers: M <= 32 */
  NMFLOW_TILES = 4,   /* panels of bf16, on the tiles of AMX or by AVX-512's products of bf16 */
  NMFLOW_PANEL = 5,   /* panels of 2, 4, 8 or multiples of 16 rows: x loaded once for several rows */
  NMFLOW_DOT = 6      /* rows in lanes, four products at once: 8-bit weights and activations */
};
/* The kernel that nmflow_matmul takes for this call (or a refusal, negative), and its name. */
NMFLOW_API int32_t nmflow_choose(const nmflow_shape *shape, int64_t tokens);
NMFLOW_API const char *nmflow_kernel_name(int32_t kernel);

/* ---------------------------------------------------------------------------------------------
 * Training on kept places: fp32, on AVX2 or AVX-512. Everything is contiguous and row-major. With
 * nmflow_matmul for y these are the products of a step.
 * --------------------------------------------------------------------------------------------- */
/* NMFLOW_OK where the three below serve a shape on this machine. */
NMFLOW_API int32_t nmflow_trains(const nmflow_shape *shape);

/* Packs w, [out][in], into kernel layout: places that `kept` (may be null) keeps or that are not 0; a
 * group, or a panel's, with fewer than N of them is filled up with its lowest others. The buffers
 * have the sizes that the layout demands. NMFLOW_NOT_KEPT: a group has more; they are unspecified.
 * A mask of bits, as `kept`: [rows][ceil(cols / 64)] words, bit c % 64 of word c / 64 for column c, 0
 * past the last one. */
NMFLOW_API int32_t nmflow_pack(const nmflow_shape *shape, const float *w, const uint64_t *kept,
                               float *values, int64_t values_bytes, void *codes, int64_t codes_bytes,
                               int32_t threads);
/* dx = dy W: dy is [tokens][out], dx [tokens][in]. */
NMFLOW_API int32_t nmflow_input_grad(const nmflow_packed *packed, const float *dy, float *dx,
                                     int64_t tokens, int32_t threads);
/* dw = (dy^T x) at the kept places and +0.0 elsewhere, [out][in]; bias (may be null) = sum of dy, [out].
 * Of packed only the shape and the codes are read. */
NMFLOW_API int32_t nmflow_weight_grad(const nmflow_packed *packed, const float *x, const float *dy,
                                      float *dw, float *bias, int64_t tokens, int32_t threads);

/* The same gradients in bfloat16, for panels of multiples of 16 rows where tiles are there (NMFLOW_TILES): values, x,
 * dy and dx are bfloat16, dw and bias float32. */
NMFLOW_API int32_t nmflow_bf16_trains(const nmflow_shape *shape);
NMFLOW_API int32_t nmflow_bf16_input_grad(const nmflow_packed *packed, const void *dy, void *dx, int64_t tokens,
                                          int32_t threads);
NMFLOW_API int32_t nmflow_bf16_weight_grad(const nmflow_packed *packed, const void *x, const void *dy, float *dw,
                                           float *bias, int64_t tokens, int32_t threads);

/* Kept elements of [rows][cols] together: the elements of row r where `kept`, a mask of bits, is set go,
 * in their order, to together[starts[r]] and on; starts has rows + 1 entries, and starts[r + 1] -
 * starts[r] is what row r keeps. NMFLOW_NOT_KEPT where it is not. On any instruction set. */
NMFLOW_API int32_t nmflow_take(const float *apart, const uint64_t *kept, const int64_t *starts,
                               int64_t rows, int64_t cols, float *together, int32_t threads);
/* And back, with +0.0 elsewhere; odd and prints (may be null) as in nmflow_hold. NMFLOW_NOT_FINITE: a
 * kept element is a NaN or an infinity; all are written all the same. */
NMFLOW_API int32_t nmflow_put(const float *together, const uint64_t *kept, const int64_t *starts,
                              int64_t rows, int64_t cols, float *apart, const int64_t *odd,
                              int64_t *prints, int32_t threads);

/* ---------------------------------------------------------------------------------------------
 * Weights with 8-bit values, and one fp32 scale a row: W[o][i] = scale[o] * q[o][i], -127 <= q <= 127.
 *
 * One buffer, version 1, a stream that every kernel reads from front to back; S as above:
 *   bits    = 2 when M <= 4, 4 when M <= 16, else 8: of a code, the column inside its GROUP
 *   per     = 8 / bits, codes in a byte
 *   quad    = four entries of a row, one after the other: entries 4 k .. 4 k + 3
 *   block   = per quads of 16 rows: blocks = ceil(S / (4 * per)) in a tile
 *   buffer  [tiles] of a tile: float scale[16]; int32 sum[16], the sum of the row's q; then
 *           [blocks] of { uint8 codes[16][4]; int8 q[per][16][4] }
 *   entry   s of a row lies in block s / (4 per) as quad j = s / 4 % per, place i = s % 4: its value
 *           is q[j][row % 16][i], its code bits [j * bits, (j + 1) * bits) of codes[row % 16][i]
 *   Rows past `out` and entries past S are zero: codes, values, scales and sums.
 *   Rows of panels (V > 1) hold their codes each, and those of a panel agree.
 * A tile has 128 + blocks * (1 + per) * 64 bytes: 1.25, 1.5 or 2 bytes a kept weight, 8 a row.
 * --------------------------------------------------------------------------------------------- */
enum nmflow_activations {
  NMFLOW_FLOATS = 0, /* products of floats, accumulated in fp32, as nmflow_matmul of scale * q */
  NMFLOW_INT8S = 1   /* each token is rounded to 8 bits first; products and sums are exact integers */
};

/* shape.dtype is that of x, bias and y. Refuses more than 131072 entries a row, whose sums of
 * integers could overflow. */
typedef struct nmflow_int8 {
  nmflow_shape shape;
  const void *data;
  int64_t bytes;
} nmflow_int8;

/* The size in bytes of the buffer. */
NMFLOW_API int32_t nmflow_int8_bytes(const nmflow_shape *shape, int64_t *bytes);

/* Checks a weight whole: its size, every code inside its group and increasing, codes of a panel that
 * agree, values above -128, scales that are finite and not negative, sums, nothing in the padding.
 * The kernels stay inside their buffers even for a weight that would not pass. */
NMFLOW_API int32_t nmflow_int8_validate(const nmflow_int8 *weight);

/* y[t][o] = epilogue(sum_i x[t][i] W[o][i] + bias[o]); arguments as for nmflow_matmul.
 * With NMFLOW_INT8S: a_t = max_i |x[t][i]|, r[t][i] = x[t][i] * (127 / a_t) in fp32, rounded half to
 * even, and y[t][o] = epilogue(((a_t / 127) * scale[o]) * (sum_i r[t][i] q[o][i]) + bias[o]). A token with
 * a_t < 1e-30 counts as zero; one that holds a NaN or an infinity gives NaN.
 * kernel: NMFLOW_AUTO; NMFLOW_DOT for 8-bit activations; NMFLOW_GATHER, NMFLOW_TOKENS or
 * NMFLOW_PERMUTE for floats. */
NMFLOW_API int32_t nmflow_int8_matmul(const nmflow_int8 *weight, int32_t activations, const void *x,
                                      int64_t x_stride, const void *bias, void *y,
                                      int64_t y_stride, int64_t tokens, int32_t epilogue,
                                      int32_t threads, int32_t kernel);

/* The kernel that nmflow_int8_matmul takes for this call (or a refusal, negative). */
NMFLOW_API int32_t nmflow_int8_choose(const nmflow_shape *shape, int32_t activations,
                                      int64_t tokens);
/* What computes it: "vnni", "avx512", "avx2" or "portable". Not every instruction set has a kernel of
 * its own for every pattern. */
NMFLOW_API const char *nmflow_int8_isa(const nmflow_shape *shape, int32_t activations,
                                       int64_t tokens);

#ifdef __cplusplus
}
#endif
#endif /* NMFLOW_H */
