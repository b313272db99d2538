/* permute: lanes are output rows, 16 of them a tile, and the inputs that they want are picked in a
 * register. The inputs of a span (16, or 32 for 16 < M <= 32) are loaded from row-major x as they
 * lie; a row's code says which of them its next weight belongs to, and a permutation reads just the
 * low bits of a lane, so a word of eight 4-bit codes needs one shift a step and no mask. No code can
 * lead outside the registers, whatever its bits.
 *
 * The includer says how a register picks:
 *   Pick: WHOLE a span of 16 by 4 bits, WIDE a span of 32 by 8, LOW and HIGH the one half of a
 *     span of 16 in which the weight is known to lie.
 *   picked<Pick>(codes, x): x[code] of every lane.
 *   PERMUTE_TOKENS, PERMUTE_TILES: tokens and tiles of a register tile at most. */
#ifndef NMFLOW_PERMUTE_IMPL_H
#define NMFLOW_PERMUTE_IMPL_H

namespace {

const int VECS = 16 / LANES;

/* Rows of x with a span's full width readable at every span: x itself where it is so already. */
struct Inputs {
  const float *x;
  int64_t stride;
};

int64_t padded(const nmf_geometry &g) { return (g.spans - 1) * g.span + (g.m <= 16 ? 16 : 32); }

bool needs_copy(const nmf_job *job) {
  return job->g.dtype != NMFLOW_F32 || padded(job->g) > job->g.in;
}

int64_t permute_scratch(const nmf_job *job, int64_t tokens, int64_t) {
  int64_t bytes = 64;
  if (needs_copy(job)) bytes += tokens * (padded(job->g) * 4 + 64);
  if (job->g.dtype != NMFLOW_F32) bytes += PERMUTE_TILES * (job->g.entries * 64 + 64);
  return bytes;
}

/* One entry for NT tokens and the rows of TILES tiles, whose codes move on to the next. */
template <int NT, int TILES, int PICK>
NMF_INLINE void step(vecf (&acc)[TILES * VECS][NT], const float *const (&values)[TILES], int64_t s,
                     vecu (&code)[TILES * VECS], const float *x, int64_t stride, int64_t ahead) {
#pragma GCC unroll 8
  for (int i = 0; i < TILES * VECS; ++i) {
    const float *from = values[i / VECS] + s * 16 + i % VECS * LANES;
    const vecf w = load(from);
    if (i % VECS == 0) __builtin_prefetch(from + ahead);
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) acc[i][t] += w * picked<PICK>(code[i], x + t * stride);
    code[i] >>= PICK == WIDE ? 8u : 4u;
  }
}

template <int TILES>
NMF_INLINE void load_codes(vecu (&code)[TILES * VECS], const uint32_t *const (&words)[TILES],
                           int64_t word, int64_t ahead) {
#pragma GCC unroll 8
  for (int i = 0; i < TILES * VECS; ++i) {
    const uint32_t *from = words[i / VECS] + word * 16 + i % VECS * LANES;
    code[i] = load(from);
    if (i % VECS == 0) __builtin_prefetch(from + ahead);
  }
}

/* Sums kept of every output, taken in turns, so that few outputs still hide the latency of
 * multiplying and adding. */
NMF_INLINE constexpr int turns(int outputs) { return outputs >= 8 ? 1 : 8 / outputs; }

/* P: entries of a span when it is 1, 2, 4 or 8, so that 8 codes make whole spans; else 0. HALVES:
 * the first P / 2 of them lie in the first half of the span and the others in the second. */
template <int NT, int TILES, int WIDTH, int P, bool HALVES>
void block(const nmf_job *job, int64_t token, int64_t tile, const float *const (&values)[TILES],
           const float *x, int64_t stride) {
  const nmf_geometry &g = job->g;
  const int PER = WIDTH == WIDE ? 4 : 8, U = turns(NT * TILES * VECS);
  /* Weights to come are fetched early, as the third-level cache is far away: a little ahead where
   * tiles follow each other, else the same place of the next tiles. With one token memory is all that
   * takes time, and some CPUs read it faster alone. */
  const bool alone = NT == 1 && TILES == 1 && !job->fetch;
  const int64_t ahead = alone ? 0 : TILES == 1 ? 512 : TILES * g.entries_held * 16;
  const uint32_t *words[TILES];
  vecf acc[U][TILES * VECS][NT];
#pragma GCC unroll 8
  for (int i = 0; i < TILES; ++i) {
    float bias[16];
    read_bias(job, tile + i, bias);
    words[i] = static_cast<const uint32_t *>(job->codes) + (tile + i) * g.words * 16;
#pragma GCC unroll 8
    for (int v = 0; v < VECS; ++v)
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t) {
        acc[0][i * VECS + v][t] = load(bias + v * LANES);
#pragma GCC unroll 8
        for (int u = 1; u < U; ++u) acc[u][i * VECS + v][t] = vecf{};
      }
  }
  const int64_t words_ahead = alone ? 0 : TILES == 1 ? 64 : TILES * g.words * 16;
  vecu code[TILES * VECS];
  int64_t s = 0;
  if (P > 0) {
    for (; s + PER <= g.entries; s += PER) {
      load_codes<TILES>(code, words, s / PER, words_ahead);
#pragma GCC unroll 8
      for (int k = 0; k < PER; ++k) {
        const float *from = x + k / (P > 0 ? P : 1) * 16;
        if (!HALVES)
          step<NT, TILES, WIDTH>(acc[k % U], values, s + k, code, from, stride, ahead);
        else if (k % (P > 0 ? P : 1) < P / 2)
          step<NT, TILES, LOW>(acc[k % U], values, s + k, code, from, stride, ahead);
        else
          step<NT, TILES, HIGH>(acc[k % U], values, s + k, code, from, stride, ahead);
      }
      x += PER / (P > 0 ? P : 1) * 16;
    }
  }
  int64_t left = g.span_entries;
  for (; s < g.entries;) {
    load_codes<TILES>(code, words, s / PER, words_ahead);
#pragma GCC unroll 8
    for (int k = 0; k < PER; ++k) {
      if (s >= g.entries) break;
      step<NT, TILES, WIDTH>(acc[k % U], values, s, code, x, stride, ahead);
      ++s;
      if (--left == 0) {
        left = g.span_entries;
        x += g.span;
      }
    }
  }
#pragma GCC unroll 8
  for (int i = 0; i < TILES; ++i) {
    const int64_t row = (tile + i) * 16, count = nmf_min(16, g.out - row);
#pragma GCC unroll 8
    for (int v = i * VECS; v < (i + 1) * VECS; ++v)
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t)
#pragma GCC unroll 8
        for (int u = 1; u < U; ++u) acc[0][v][t] += acc[u][v][t];
    if (g.dtype == NMFLOW_F32 && job->epilogue == NMFLOW_NONE && count == 16) {
      float *y = static_cast<float *>(job->y) + token * job->y_stride + row;
#pragma GCC unroll 8
      for (int t = 0; t < NT; ++t)
#pragma GCC unroll 8
        for (int v = 0; v < VECS; ++v)
          store(y + t * job->y_stride + v * LANES, acc[0][i * VECS + v][t]);
      continue;
    }
#pragma GCC unroll 8
    for (int t = 0; t < NT; ++t) {
      float sums[16];
#pragma GCC unroll 8
      for (int v = 0; v < VECS; ++v) store(sums + v * LANES, acc[0][i * VECS + v][t]);
      write_rows(job, token + t, row, sums, count);
    }
  }
}

/* A block whose entries a span are known to the compiler, where they are few. */
template <int NT, int TILES, bool HALVES>
NMF_INLINE void counted_block(const nmf_job *job, int64_t token, int64_t tile,
                              const float *const (&values)[TILES], const float *x, int64_t stride) {
  switch (job->g.span_entries) {
    case 1: /* never of halves, which hold one each */
      return block<NT, TILES, WHOLE, 1, false>(job, token, tile, values, x, stride);
    case 2:
      return block<NT, TILES, WHOLE, 2, HALVES>(job, token, tile, values, x, stride);
    case 4:
      return block<NT, TILES, WHOLE, 4, HALVES>(job, token, tile, values, x, stride);
    case 8:
      return block<NT, TILES, WHOLE, 8, HALVES>(job, token, tile, values, x, stride);
    default:
      return block<NT, TILES, WHOLE, 0, false>(job, token, tile, values, x, stride);
  }
}

template <int NT, int TILES>
NMF_INLINE void block_of(const nmf_job *job, int64_t token, int64_t tile,
                         const float *const (&values)[TILES], const float *x, int64_t stride) {
  const nmf_geometry &g = job->g;
  if (g.m > 16) return block<NT, TILES, WIDE, 0, false>(job, token, tile, values, x, stride);
  if (g.span != 16) return block<NT, TILES, WHOLE, 0, false>(job, token, tile, values, x, stride);
  if (PERMUTE_HALVES && 8 % g.m == 0)
    return counted_block<NT, TILES, PERMUTE_HALVES>(job, token, tile, values, x, stride);
  return counted_block<NT, TILES, false>(job, token, tile, values, x, stride);
}

template <int TILES>
NMF_INLINE void tiles_of(const nmf_job *job, const nmf_part *part, int64_t tile, Inputs in,
                         float *room) {
  const nmf_geometry &g = job->g;
  const float *values[TILES];
  for (int i = 0; i < TILES; ++i)
    values[i] =
        decode_values(job, tile + i, 0, g.entries, room + i * (g.entries * 16 + 16));
  int64_t token = part->token;
  const float *x = in.x;
#define NMF_TOKENS(NT)                                                          \
  for (; token + NT <= part->token_end; token += NT, x += NT * in.stride)      \
  block_of<NT, TILES>(job, token, tile, values, x, in.stride)
#if PERMUTE_TOKENS >= 8
  NMF_TOKENS(8);
#endif
  NMF_TOKENS(4);
  NMF_TOKENS(2);
  NMF_TOKENS(1);
#undef NMF_TOKENS
}

void permute_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  Inputs in;
  const int64_t tokens = part->token_end - part->token;
  float *room = reinterpret_cast<float *>(scratch);
  if (needs_copy(job)) {
    in.stride = nmf_ceil_div(padded(g), 16) * 16;
    float *copy = reinterpret_cast<float *>(scratch);
    for (int64_t t = 0; t < tokens; ++t) {
      read_inputs(job, part->token + t, 0, g.in, copy + t * in.stride);
      memset(copy + t * in.stride + g.in, 0, static_cast<size_t>(in.stride - g.in) * 4);
    }
    in.x = copy;
    room = copy + tokens * in.stride;
  } else {
    in.x = static_cast<const float *>(job->x) + part->token * job->x_stride;
    in.stride = job->x_stride;
  }
  int64_t tile = part->tile;
  /* With 8 tokens as many sums as the 32 registers hold, so that x is loaded once for three tiles.
   * With fewer the weights are what takes time: one tile after the other, as they lie. */
  if (PERMUTE_TILES > 1 && tokens >= 8)
    for (; tile + PERMUTE_TILES <= part->tile_end; tile += PERMUTE_TILES)
      tiles_of<PERMUTE_TILES>(job, part, tile, in, room);
  for (; tile < part->tile_end; ++tile) tiles_of<1>(job, part, tile, in, room);
}

/* A weight that stays in the second-level cache is read again for every 8 tokens, whose x then stays
 * in the first; a longer one is read once for 48. */
int64_t permute_most(const nmf_geometry *g, int64_t) {
  return g->values_bytes + g->codes_bytes <= (1 << 20) ? 8 : 48;
}

const nmf_kernel permute_kernel = {permute_run, permute_scratch, permute_most, 1};

}  // namespace
#endif
