/* Weights with 8-bit values: the sizes of their layout, its check, and which kernel serves them. */
#include "common.h"
#include "vector.h"

namespace {

/* A sum of that many products of two bytes fits 32 bits; and one that fp32 holds exactly. */
const int64_t MOST_ENTRIES = 131072, MOST_EXACT = (1 << 24) / (127 * 127);

int geometry_of(const nmflow_shape *shape, nmf_geometry *g, nmf_int8 *q) {
  const int status = nmf_geometry_of(shape, g);
  if (status != NMFLOW_OK) return status;
  if (g->entries > MOST_ENTRIES) return NMFLOW_BAD_SHAPE;
  q->bits = g->m <= 4 ? 2 : g->m <= 16 ? 4 : 8;
  q->per = 8 / q->bits;
  q->blocks = nmf_ceil_div(g->entries, 4 * q->per);
  q->block_bytes = 64 * (1 + q->per);
  q->tile_bytes = 128 + q->blocks * q->block_bytes;
  return __builtin_mul_overflow(g->tiles, q->tile_bytes, &q->bytes) ? NMFLOW_BAD_SHAPE : NMFLOW_OK;
}

/* The bytes of a word for entries s to s + 3 that lie before `end`. */
uint32_t bytes_before(int64_t s, int64_t end) {
  const int64_t count = end - s;
  return count >= 4 ? ~0u : count <= 0 ? 0u : (1u << 8 * count) - 1u;
}

/* The bytes whose entry is the first of its group. */
uint32_t firsts(int64_t s, int64_t n) {
  uint32_t found = 0;
  for (int e = 0; e < 4; ++e)
    if ((s + e) % n == 0) found |= 255u << 8 * e;
  return found;
}

typedef uint8_t fours __attribute__((vector_size(4 * LANES)));

/* LANES rows of a tile at once: a network's weights are checked where it starts. */
bool rows_are_good(const nmf_geometry &g, const nmf_int8 &q, const char *tile, int64_t number,
                   int first) {
  const uint32_t mask = ((1u << q.bits) - 1u) * 0x01010101u, bits = static_cast<uint32_t>(q.bits);
  const uint8_t most = static_cast<uint8_t>(g.m - 1);
  const char *block = tile + 128;
  vecu bad = {}, any = {}, other = {}, last = {};
  veci sums = {};
  int64_t s = 0;
  for (int64_t b = 0; b < q.blocks; ++b, block += q.block_bytes) {
    const uint32_t *words = reinterpret_cast<const uint32_t *>(block);
    vecu codes = load(words + first);
    any |= codes;
    if (g.panel > 1)
      other |= codes ^ rows_before(words, first, number ? words - q.tile_bytes / 4 : nullptr);
    for (int64_t k = 0; k < q.per; ++k, s += 4, codes >>= bits) {
      const vecu code = codes & mask, values = load(words + 16 + k * 16 + first);
      const uint32_t valid = bytes_before(s, g.entries);
      any |= values;
      bad |= (code | values) & ~valid;
      bad |= (vecu)((fours)code > most) | (vecu)((fours)values == 0x80);
      if (g.n > 1)
        bad |= (vecu)((fours)code <= (fours)(code << 8 | last >> 24)) & (valid & ~firsts(s, g.n));
      last = code;
      for (uint32_t shift = 0; shift < 32; shift += 8) sums += (veci)(values << (24 - shift)) >> 24;
    }
  }
  const float *scales = reinterpret_cast<const float *>(tile) + first;
  const int32_t *said = reinterpret_cast<const int32_t *>(tile + 64) + first;
  for (int i = 0; i < LANES; ++i) {
    const int64_t row = number * 16 + first + i;
    if (row >= g.out) {
      if (any[i] || said[i] || nmf_bits_of_float(scales[i])) return false;
      continue;
    }
    if (bad[i] || sums[i] != said[i]) return false;
    if (!(scales[i] >= 0.0f && scales[i] <= 3.4028235e38f)) return false;
    if (row % g.panel && other[i]) return false;
  }
  return true;
}

bool is_good(const nmf_geometry &g, const nmf_int8 &q, const char *data) {
  for (int64_t t = 0; t < g.tiles; ++t, data += q.tile_bytes)
    for (int first = 0; first < 16; first += LANES)
      if (!rows_are_good(g, q, data, t, first)) return false;
  return true;
}

struct Found {
  int number;
  const nmf_kernel *kernel;
  const char *isa;
};

#if defined(NMFLOW_X86)
/* Whether a quad's columns lie inside 64 inputs (or, of 1:32, inside 128) that a register holds. */
bool vnni_serves(const nmf_geometry &g) {
  const int64_t entries = 64 / g.m * g.n;
  return g.m <= 64 && 64 % g.m == 0 && (entries % 4 == 0 || entries == 2);
}
/* Whether they lie inside one, two or four times 16 inputs (or, of 1:32, four times 32). */
bool avx2_serves(const nmf_geometry &g) {
  if (g.m == 32) return g.n == 1;
  const int64_t entries = 16 / g.m * g.n;
  return g.m <= 16 && 16 % g.m == 0 && (entries % 4 == 0 || 4 % entries == 0);
}
#endif

Found dot_of(const nmf_geometry &g, int64_t tokens) {
  (void)g;
  (void)tokens;
#if defined(NMFLOW_X86)
  const int isa = nmf_isa();
  if (isa >= NMFLOW_AVX512 && (nmflow_cpu_features() & 16) && vnni_serves(g))
    return {NMFLOW_DOT, nmf_int8_dot_vnni(), "vnni"};
  if (isa != NMFLOW_PORTABLE && avx2_serves(g)) return {NMFLOW_DOT, nmf_int8_dot_avx2(), "avx2"};
  if (g.entries <= MOST_EXACT && isa >= NMFLOW_AVX512)
    return {NMFLOW_DOT, nmf_int8_dot_floats_avx512(tokens >= nmf_tokens_from()), "avx512"};
  if (g.entries <= MOST_EXACT && isa == NMFLOW_AVX2)
    return {NMFLOW_DOT, nmf_int8_dot_floats_avx2(tokens >= nmf_tokens_from()), "avx2"};
#endif
  return {NMFLOW_DOT, nmf_int8_dot_portable(), "portable"};
}

Found permute_of(const nmf_geometry &g) {
  (void)g;
#if defined(NMFLOW_X86)
  const bool served = g.n <= 2 && (g.m == 4 || g.m == 8 || g.m == 16);
  if (served && nmf_isa() >= NMFLOW_AVX512)
    return {NMFLOW_PERMUTE, nmf_int8_permute_avx512(), "avx512"};
  if ((served || (g.n <= 2 && g.m == 32)) && nmf_isa() == NMFLOW_AVX2)
    return {NMFLOW_PERMUTE, nmf_int8_permute_avx2(), "avx2"};
#endif
  return {NMFLOW_PERMUTE, nullptr, ""};
}

const char *isa_name() {
  return nmf_isa() >= NMFLOW_AVX512 ? "avx512" : nmf_isa() == NMFLOW_AVX2 ? "avx2" : "portable";
}

/* Tokens from which decoding a tile pays beside picking inputs, measured; of more inputs, AVX2 picks in more
 * steps. */
int64_t decoded_from(const nmf_geometry &g, const nmf_kernel *permute) {
  if (permute == nullptr) return nmf_tokens_from();
  if (nmf_isa() >= NMFLOW_AVX512) return 32;
  return g.m == 4 ? 29 : g.m == 8 ? 14 : g.m == 16 ? 7 : 4;
}

Found kernel_of(const nmf_geometry &g, int activations, int64_t tokens, int number) {
  if (activations == NMFLOW_INT8S)
    return number == NMFLOW_AUTO || number == NMFLOW_DOT ? dot_of(g, tokens) : Found{number, nullptr, ""};
  const Found permute = permute_of(g);
  if (number == NMFLOW_AUTO && tokens >= decoded_from(g, permute.kernel)) number = NMFLOW_TOKENS;
  if (number == NMFLOW_AUTO) number = permute.kernel ? NMFLOW_PERMUTE : NMFLOW_GATHER;
  if (number == NMFLOW_PERMUTE) return permute;
  if (number != NMFLOW_GATHER && number != NMFLOW_TOKENS) return {number, nullptr, ""};
  return {number, nmf_kernel_of(number, &g), isa_name()};
}

int find(const nmflow_shape *shape, int activations, int64_t tokens, int number, nmf_job *job,
         Found *found) {
  const int status = geometry_of(shape, &job->g, &job->q);
  if (status != NMFLOW_OK) return status;
  if (activations != NMFLOW_FLOATS && activations != NMFLOW_INT8S) return NMFLOW_BAD_DTYPE;
  job->q.activations = activations;
  *found = kernel_of(job->g, activations, tokens, number);
  return found->kernel == nullptr ? NMFLOW_NO_KERNEL : NMFLOW_OK;
}

}  // namespace

int32_t nmflow_int8_bytes(const nmflow_shape *shape, int64_t *bytes) {
  nmf_geometry g;
  nmf_int8 q;
  const int status = geometry_of(shape, &g, &q);
  if (status == NMFLOW_OK && bytes) *bytes = q.bytes;
  return status;
}

int32_t nmflow_int8_validate(const nmflow_int8 *weight) {
  if (weight == nullptr) return NMFLOW_BAD_POINTER;
  nmf_geometry g;
  nmf_int8 q;
  const int status = geometry_of(&weight->shape, &g, &q);
  if (status != NMFLOW_OK) return status;
  if (weight->data == nullptr) return NMFLOW_BAD_POINTER;
  if (weight->bytes != q.bytes) return NMFLOW_BAD_BYTES;
  return is_good(g, q, static_cast<const char *>(weight->data)) ? NMFLOW_OK : NMFLOW_BAD_INDEX;
}

int32_t nmflow_int8_choose(const nmflow_shape *shape, int32_t activations, int64_t tokens) {
  nmf_job job;
  Found found;
  if (tokens < 1) return NMFLOW_BAD_SHAPE;
  const int status = find(shape, activations, tokens, NMFLOW_AUTO, &job, &found);
  return status == NMFLOW_OK ? found.number : status;
}

const char *nmflow_int8_isa(const nmflow_shape *shape, int32_t activations, int64_t tokens) {
  nmf_job job;
  Found found;
  return find(shape, activations, tokens, NMFLOW_AUTO, &job, &found) == NMFLOW_OK ? found.isa : "";
}

int32_t nmflow_int8_matmul(const nmflow_int8 *weight, int32_t activations, const void *x,
                           int64_t x_stride, const void *bias, void *y, int64_t y_stride,
                           int64_t tokens, int32_t epilogue, int32_t threads, int32_t kernel) {
  if (weight == nullptr) return NMFLOW_BAD_POINTER;
  nmf_job job = {};
  Found found;
  int status = find(&weight->shape, activations, tokens, kernel, &job, &found);
  if (status != NMFLOW_OK) return status;
  if (weight->bytes != job.q.bytes) return NMFLOW_BAD_BYTES;
  status = nmf_check_call(&job.g, x, x_stride, y, y_stride, tokens, epilogue);
  if (status != NMFLOW_OK || tokens == 0) return status;
  if (weight->data == nullptr) return NMFLOW_BAD_POINTER;
  job.values = weight->data;
  job.x = x;
  job.bias = bias;
  job.y = y;
  job.x_stride = x_stride;
  job.y_stride = y_stride;
  job.tokens = tokens;
  job.epilogue = epilogue;
  return nmf_run(&job, found.kernel, job.q.bytes, threads);
}
