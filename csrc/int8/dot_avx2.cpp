#include "quads_avx2.h"

/* Inputs that hold whole quads, and their number. */
static inline int64_t window_of(const nmf_geometry &g) { return g.m == 32 ? 128 : 64; }
static inline int64_t quads_of(const nmf_geometry &g) { return window_of(g) / 4 / g.m * g.n; }
static inline int64_t windows_of(const nmf_job *job) {
  return nmf_ceil_div(job->q.blocks * job->q.per, quads_of(job->g));
}

#define DOT_OFFSET 0
#define DOT_LINE 64
#define DOT_INPUTS(job) (windows_of(job) * window_of((job)->g))
#define DOT_TOKENS 64
#define DOT_STEP 2
#define DOT_EXTRA(job) (static_cast<int64_t>(sizeof(Quads)) + DOT_TOKENS * 128)
#include "dot_impl.h"

namespace {

/* What entry i of a row picks of its piece of 16 inputs, or of 32, whose lines are `line` apart. */
template <int EACH>
NMF_INLINE __m256i entry_of(__m256i pick, const int8_t *x, int i, int64_t line) {
  x += EACH == WIDE ? i / 2 * line + i % 2 * 32 : i * 16;
  const __m256i first = _mm256_broadcastsi128_si256(get<__m128i>(x));
  if (EACH != WIDE) return _mm256_shuffle_epi8(first, pick);
  const __m256i second = _mm256_broadcastsi128_si256(get<__m128i>(x + 16));
  return _mm256_or_si256(
      _mm256_shuffle_epi8(first, pick),
      _mm256_shuffle_epi8(second, _mm256_xor_si256(pick, _mm256_set1_epi8(-128))));
}

/* The inputs of a quad, of the rows in registers from k on. */
template <int EACH>
NMF_INLINE void picked(const Quad &quad, int k, const int8_t *x, int64_t line,
                       __m256i (&to)[pieces_of(EACH)]) {
  const int PIECES = pieces_of(EACH), SECOND = 1 % PIECES, THIRD = 2 % PIECES, LAST = PIECES - 1;
#pragma GCC unroll 4
  for (int i = 0; i < PIECES; ++i) to[i] = entry_of<EACH>(quad.pick[k + i], x, i, line);
  if (PIECES == 4) { /* entries become pairs of 8 rows */
    const __m256i first = to[0], third = to[THIRD];
    to[0] = _mm256_unpacklo_epi8(first, to[SECOND]);
    to[THIRD] = _mm256_unpackhi_epi8(first, to[SECOND]);
    to[SECOND] = _mm256_unpacklo_epi8(third, to[LAST]);
    to[LAST] = _mm256_unpackhi_epi8(third, to[LAST]);
  }
#pragma GCC unroll 4
  for (int i = 0; i + 1 < PIECES; i += 2) { /* and pairs quads */
    const __m256i low = to[i];
    to[i] = _mm256_unpacklo_epi16(low, to[i + 1]);
    to[i + 1] = _mm256_unpackhi_epi16(low, to[i + 1]);
  }
}

/* |w| times x, or times ~x = -x - 1 where w is negative: `more` adds the |w| that this lacks. Two
 * products fit the 16 bits that vpmaddubsw saturates to, since |w| <= 127 and -128 <= x <= 127. */
template <int EACH, int NT>
NMF_INLINE void quad_of(const Quad &quad, const int8_t *x, int64_t line, __m256i (&acc)[NT][4]) {
  const __m256i ones = _mm256_set1_epi16(1);
  const int PIECES = pieces_of(EACH);
#pragma GCC unroll 4
  for (int k = 0; k < 4; k += PIECES)
#pragma GCC unroll 4
    for (int t = 0; t < NT; ++t) {
      __m256i in[PIECES];
      picked<EACH>(quad, k, x + t * DOT_LINE, line, in);
#pragma GCC unroll 4
      for (int i = 0; i < PIECES; ++i) {
        const __m256i flipped = _mm256_xor_si256(in[i], quad.flip[k + i]);
        const __m256i two = _mm256_maddubs_epi16(quad.size[k + i], flipped);
        acc[t][k + i] = _mm256_add_epi32(acc[t][k + i], _mm256_madd_epi16(two, ones));
      }
    }
}

/* Where two tiles' sums go: rows of y, or of one tile alone where the other only fills registers. */
struct Results {
  const nmf_job *job;
  int64_t tile;
  int tiles;
  __m256 scales[4], bias[4]; /* of the rows in a register */
};

NMF_INLINE Results results_of(const nmf_job *job, int64_t tile, int tiles) {
  Results to = {job, tile, tiles, {}, {}};
  const float *scales[2];
  float bias[2][16];
  for (int i = 0; i < 2; ++i) {
    const int64_t one = tile + (i < tiles ? i : 0);
    scales[i] = int8_scales(job, one);
    read_bias(job, one, bias[i]);
  }
  for (int k = 0; k < 4; ++k) {
    to.scales[k] = (__m256)both(scales[0] + 4 * k, scales[1] + 4 * k);
    to.bias[k] = (__m256)both(bias[0] + 4 * k, bias[1] + 4 * k);
  }
  return to;
}

NMF_INLINE void write(const Results &to, int64_t token, float step, const __m256i (&sums)[4]) {
  const nmf_job *job = to.job;
  const int64_t row = to.tile * 16, left = job->g.out - row;
  const bool plain = job->g.dtype == NMFLOW_F32 && job->epilogue == NMFLOW_NONE && left >= 32;
  float found[32];
  float *y = plain ? static_cast<float *>(job->y) + token * job->y_stride + row : found;
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m256 sum = _mm256_cvtepi32_ps(sums[k]);
    const __m256 scaled = _mm256_mul_ps(_mm256_set1_ps(step), to.scales[k]);
    const __m256 result = _mm256_fmadd_ps(scaled, sum, to.bias[k]);
    _mm_storeu_ps(y + 4 * k, _mm256_castps256_ps128(result));
    if (!plain || to.tiles == 2) _mm_storeu_ps(y + 16 + 4 * k, _mm256_extractf128_ps(result, 1));
  }
  if (!plain)
    for (int i = 0; i < to.tiles; ++i)
      write_rows(job, token, row + 16 * i, found + 16 * i, nmf_min(16, left - 16 * i));
}

constexpr int64_t lines_of(int each) { return each == WIDE ? 2 : 1; }

/* Bytes from the inputs of a window to those of one of its quads. */
template <int EACH>
NMF_INLINE int64_t input_of(int64_t quad, int64_t count) {
  return EACH == 4 ? quad / (count / 4) * 16 : quad * 32;
}

/* For a few tokens quads are used as they are read. */
template <int BITS, int EACH, int NT>
void few_tokens(Reader from, int64_t blocks, const int8_t *x, int64_t line,
                const Results &to, int64_t token, const float *steps) {
  const int PER = 8 / BITS;
  __m256i acc[NT][4];
#pragma GCC unroll 4
  for (int t = 0; t < NT; ++t)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) acc[t][k] = _mm256_setzero_si256();
  for (; blocks > 0; --blocks, next_block<BITS>(from)) {
    __m256i codes[4];
    read_codes<BITS>(from, 4096, codes);
#pragma GCC unroll 4
    for (int j = 0; j < PER; ++j) {
      Quad quad;
      const int8_t *at = x + input_of<EACH>(from.place, from.count);
      read_quad<BITS, EACH>(from, codes, j, &quad);
      quad_of<EACH, NT>(quad, at, line, acc);
      if (from.place == 0) x += lines_of(EACH) * line;
    }
  }
#pragma GCC unroll 4
  for (int t = 0; t < NT; ++t) {
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k) acc[t][k] = _mm256_add_epi32(acc[t][k], from.more[k]);
    write(to, token + t, steps[t], acc[t]);
  }
}

/* For more, those of some windows are read once. Sums begin anew or go on from `sums`, and end there or in y. */
template <int EACH, int NT>
NMF_INLINE void sum_windows(const Quads *quads, int64_t windows, int64_t count, const int8_t *x,
                            int64_t line, int32_t (*sums)[32], bool begin, const Results *to,
                            int64_t token, const float *steps) {
  __m256i acc[NT][4];
#pragma GCC unroll 4
  for (int t = 0; t < NT; ++t)
#pragma GCC unroll 4
    for (int k = 0; k < 4; ++k)
      acc[t][k] = begin ? quads->more[k]
                        : _mm256_add_epi32(quads->more[k], get<__m256i>(sums[t] + 8 * k));
  const Quad *quad = quads->quad;
  const int64_t each = EACH == 4 ? count / 4 : 1, places = EACH == 4 ? 4 : EACH == 2 ? 2 : 1;
  for (; windows > 0; --windows, x += lines_of(EACH) * line)
    for (int64_t place = 0; place < places; ++place)
      for (int64_t i = 0; i < each; ++i)
        quad_of<EACH, NT>(*quad++, x + place * (EACH == 4 ? 16 : 32), line, acc);
#pragma GCC unroll 4
  for (int t = 0; t < NT; ++t) {
    if (to != nullptr)
      write(*to, token + t, steps[t], acc[t]);
    else
#pragma GCC unroll 4
      for (int k = 0; k < 4; ++k) put(sums[t] + 8 * k, acc[t][k]);
  }
}

template <int BITS, int EACH>
NMF_INLINE void many_tokens(Reader from, const nmf_job *job, const nmf_part *part,
                            const int8_t *x, int64_t line, const Results &results,
                            const float *steps, Quads *quads) {
  const nmf_int8 &q = job->q;
  const int64_t tokens = part->token_end - part->token, count = from.count;
  const int64_t most = 16 / count * count / q.per; /* blocks of whole windows */
  int32_t(*sums)[32] = reinterpret_cast<int32_t(*)[32]>(quads + 1);
  for (int64_t done = 0; done < q.blocks; done += most) {
    const int64_t blocks = nmf_min(most, q.blocks - done);
    const bool last = done + blocks == q.blocks; /* what follows is the beginning of two more tiles */
    const int64_t ahead = last ? 2 * q.tile_bytes - done * q.block_bytes : most * q.block_bytes;
    Quad *quad = quads->quad;
    for (int k = 0; k < 4; ++k) from.more[k] = _mm256_setzero_si256();
    for (int64_t i = 0; i < blocks; ++i, next_block<BITS>(from)) {
      __m256i codes[4];
      read_codes<BITS>(from, ahead, codes);
#pragma GCC unroll 4
      for (int j = 0; j < 8 / BITS; ++j) read_quad<BITS, EACH>(from, codes, j, quad++);
    }
    for (; from.place != 0; from.place = (from.place + 1) % count) *quad++ = Quad();
    for (int k = 0; k < 4; ++k) quads->more[k] = from.more[k];
    const int64_t windows = (quad - quads->quad) / count;
    int64_t t = 0;
#define NMF_TOKENS(NT)                                                                      \
  for (; t + NT <= tokens; t += NT)                                                         \
  sum_windows<EACH, NT>(quads, windows, count, x + t * DOT_LINE, line, sums + t, done == 0, \
                        last ? &results : nullptr, part->token + t, steps + t)
    NMF_TOKENS(2);
    NMF_TOKENS(1);
#undef NMF_TOKENS
    x += windows * lines_of(EACH) * line;
  }
}

/* Tiles in pairs; a last one without a partner is multiplied twice and written once. */
template <int BITS, int EACH>
void tiles_of(const nmf_job *job, const nmf_part *part, const int32_t *places, const int8_t *x,
              int64_t line, const float *steps, char *scratch) {
  const int64_t tokens = part->token_end - part->token, blocks = job->q.blocks;
  for (int64_t tile = part->tile; tile < part->tile_end; tile += 2) {
    const int tiles = tile + 1 < part->tile_end ? 2 : 1;
    const Results to = results_of(job, tile, tiles);
    const Reader from = {int8_tile(job, tile) + INT8_HEAD, int8_tile(job, tile + tiles - 1) + INT8_HEAD,
                         places, quads_of(job->g), 0, {}};
    if (tokens >= 4) {
      many_tokens<BITS, EACH>(from, job, part, x, line, to, steps, reinterpret_cast<Quads *>(scratch));
      continue;
    }
    int64_t t = 0;
    for (; t + 2 <= tokens; t += 2)
      few_tokens<BITS, EACH, 2>(from, blocks, x + t * DOT_LINE, line, to, part->token + t, steps + t);
    for (; t < tokens; ++t)
      few_tokens<BITS, EACH, 1>(from, blocks, x + t * DOT_LINE, line, to, part->token + t, steps + t);
  }
}

void dot_tiles(const nmf_job *job, const nmf_part *part, const int8_t *x, int64_t line,
               const float *steps, char *scratch) {
  const nmf_geometry &g = job->g;
  int32_t places[16];
  for (int quad = 0; quad < 16; ++quad) {
    uint32_t place = 0;
    for (int e = 0; e < 4; ++e) place |= static_cast<uint32_t>((quad * 4 + e) / g.n * g.m % 16) << 8 * e;
    places[quad] = static_cast<int32_t>(place);
  }
  if (g.m == 32) return tiles_of<8, WIDE>(job, part, places, x, line, steps, scratch);
  if (job->q.bits == 2) return tiles_of<2, 4>(job, part, places, x, line, steps, scratch);
  if (quads_of(g) == 1) return tiles_of<4, 1>(job, part, places, x, line, steps, scratch);
  if (quads_of(g) == 2) return tiles_of<4, 2>(job, part, places, x, line, steps, scratch);
  return tiles_of<4, 4>(job, part, places, x, line, steps, scratch);
}

}  // namespace

const nmf_kernel *nmf_int8_dot_avx2(void) { return &dot_kernel; }
