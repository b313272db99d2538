/* tiles: panels in bfloat16 on AMX, or on what stands for its tiles (tiles.h). Rows of W are the rows of a tile, tokens its columns.
 *
 * 64 tokens of x lie as [in][64], two lines an input, so that a panel's kept inputs are whole rows of it. A STEP of
 * products takes 32 of them, laid in pairs as an operand wants them. They are laid one step ahead of the products,
 * in a ring of two steps that stays in the first cache: the vector unit lays, the tile unit multiplies. A panel of
 * more than 32 rows uses what is laid several times, so it is laid whole.
 *
 * The values of a part are turned once, tile by tile, to the other operand. Subnormal numbers are taken as 0. */
#ifndef NMFLOW_TILES_IMPL_H
#define NMFLOW_TILES_IMPL_H

#include "turn.h"

#include "panel_impl.h"

namespace {

const int64_t BLOCK = 64, STEP = 32, LINE = 64;
const int64_t INPUT_BYTES = BLOCK * 2, STAGED_BYTES = 32 * BLOCK * 2;
/* What a part keeps in the second-level cache: values that are turned, for as many tokens as pay for that. */
const int64_t MOST_TOKENS = 256, MOST_VALUES = INT64_C(1) << 20;

int64_t steps_of(const nmf_geometry &g) { return nmf_ceil_div(g.entries, STEP); }

/* ------------------------------------------------------------------ operands */

/* `count` tokens of x from `token` on as [in][64], zero past the last one up to the next 32. */
void turn_inputs(const nmf_job *job, int64_t token, int64_t count, uint16_t *to) {
  const int64_t in = job->g.in, stride = job->x_stride;
  const uint16_t *x = static_cast<const uint16_t *>(job->x);
  if (job->turned & NMFLOW_X_TURNED) {
    x += token;
    for (int64_t t = 0; t < count; t += 32) {
      const __mmask32 there = count - t >= 32 ? 0xffffffffu : (1u << (count - t)) - 1u;
      for (int64_t i = 0; i < in; ++i)
        _mm512_store_si512(to + i * BLOCK + t, _mm512_maskz_loadu_epi16(there, x + i * stride + t));
    }
    return;
  }
  turn_tokens(x + token * stride, stride, count, in, to, BLOCK);
}

/* The values of a tile as operands of [16 rows][16 pairs], one for every step. */
void turn_values(const nmf_geometry &g, const char *values, char *to) {
  const int64_t whole = g.entries_held / STEP, steps = steps_of(g);
  for (int64_t s = 0; s < steps; ++s) {
    float cut[256];
    const float *from = reinterpret_cast<const float *>(values + s * TILE_BYTES);
    if (s >= whole) { /* the last step is cut short: zeros after it */
      memset(cut, 0, sizeof cut);
      memcpy(cut, from, static_cast<size_t>((g.entries_held - whole * STEP) * 32));
      from = cut;
    }
    transpose16(from, 16, reinterpret_cast<float *>(to + s * TILE_BYTES), 16);
  }
}

/* Where the inputs of the panels of tiles [tile, end) lie in a block of x, in bytes: [panels][steps][32], a row of
 * zeros past a panel's last one, and a step of such rows at the end. */
void columns_of_panels(const nmf_job *job, int64_t tile, int64_t end, uint32_t *to) {
  const nmf_geometry &g = job->g;
  const int64_t each = g.panel / 16, held = steps_of(g) * STEP;
  const uint32_t zeros = static_cast<uint32_t>(g.in * INPUT_BYTES);
  for (int64_t panel = tile / each; panel * each < end; ++panel, to += held) {
    panel_columns(job, panel, static_cast<uint32_t>(INPUT_BYTES), to);
    for (int64_t s = g.entries; s < held; ++s) to[s] = zeros;
  }
  for (int64_t s = 0; s < STEP; ++s) to[s] = zeros;
}

/* A step's inputs in pairs: for every 32 tokens two operands of [16 pairs][16 tokens][2]. Tokens 8 l + 0..3 of the 32
 * are columns 4 l.. of the first, 8 l + 4..7 of the second: what unpacking gives. */
template <int COLS>
NMF_INLINE void lay_step(const char *x, const uint32_t *columns, char *to) {
#pragma GCC unroll 16
  for (int p = 0; p < 16; ++p) {
    const char *a = x + columns[2 * p], *b = x + columns[2 * p + 1];
#pragma GCC unroll 2
    for (int c = 0; c < COLS; c += 2) {
      const __m512i v = _mm512_load_si512(a + c * 32), w = _mm512_load_si512(b + c * 32);
      char *at = to + c * TILE_BYTES + p * LINE;
      _mm512_store_si512(at, _mm512_unpacklo_epi16(v, w));
      _mm512_store_si512(at + TILE_BYTES, _mm512_unpackhi_epi16(v, w));
    }
  }
}

/* ------------------------------------------------------------------ products */

/* Sums of ROWS tiles of W by COLS of tokens are tiles 0 to 3; tiles 4 and 5 are W's, 6 and 7 x's. */
NMF_INLINE void zero_sums() {
  tile_zero(0);
  tile_zero(1);
  tile_zero(2);
  tile_zero(3);
}

/* A step: 5 loads for 4 products of 16 rows by 64 tokens, 4 for 4 of 32 by 32, 3 for 2 of 16 by 32. */
template <int ROWS, int COLS>
NMF_INLINE void multiply(const char *w, int64_t next_tile, const char *x) {
  tile_load(4, w, LINE);
  tile_load(6, x, LINE);
  tile_dot(0, 4, 6);
  tile_load(7, x + TILE_BYTES, LINE);
  tile_dot(1, 4, 7);
  if (ROWS == 2) {
    tile_load(5, w + next_tile, LINE);
    tile_dot(2, 5, 6);
    tile_dot(3, 5, 7);
  } else if (COLS == 4) {
    tile_load(6, x + 2 * TILE_BYTES, LINE);
    tile_dot(2, 4, 6);
    tile_load(7, x + 3 * TILE_BYTES, LINE);
    tile_dot(3, 4, 7);
  }
}

template <int ROWS, int COLS>
NMF_INLINE void store_sums(float *sums) {
  tile_store(0, sums, LINE);
  tile_store(1, sums + 256, LINE);
  if (ROWS * COLS == 4) {
    tile_store(2, sums + 512, LINE);
    tile_store(3, sums + 768, LINE);
  }
}

/* ------------------------------------------------------------------ results */

/* In which order the 8 quarters of 32 results leave the sums: that of tokens, or one from which unpacking two
 * rows makes it. */
const uint64_t BY_TOKENS[8] = {0, 4, 1, 5, 2, 6, 3, 7}, TO_UNPACK[8] = {0, 2, 4, 6, 1, 3, 5, 7};

/* The epilogue of sums, [ROWS tiles][COLS tiles], in place; their bias is in them then. */
template <int ROWS, int COLS>
__attribute__((noinline)) void apply_epilogue(const nmf_job *job, float *sums, const float *bias) {
  for (int64_t i = 0; i < ROWS * COLS * 16; ++i) {
    const vecf b = splat(bias[i / (16 * COLS) * 16 + i % 16]);
    store(sums + 16 * i, finish(load(sums + 16 * i) + b, job->epilogue));
  }
}

/* Sums, and a bias (may be null), to `rows` rows of bfloat16, `stride` bytes apart. */
template <int ROWS, int COLS>
NMF_INLINE void round_sums(const float *sums, const float *bias, int64_t rows, const uint64_t *order, bool past,
                           char *to, int64_t stride) {
  const __m512i quarters = _mm512_loadu_si512(order);
  for (int64_t r = 0; r < rows; ++r, to += stride) {
    const float *from = sums + r / 16 * COLS * 256 + r % 16 * 16;
    const __m512 b = _mm512_set1_ps(bias == nullptr ? 0.0f : bias[r]);
#pragma GCC unroll 2
    for (int c = 0; c < COLS; c += 2) {
      const __m512 low = _mm512_add_ps(_mm512_load_ps(from + c * 256), b);
      const __m512 high = _mm512_add_ps(_mm512_load_ps(from + (c + 1) * 256), b);
      const __m512i both = (__m512i)_mm512_cvtne2ps_pbh(high, low);
      const __m512i line = _mm512_permutexvar_epi64(quarters, both);
      if (past)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(to + c * 32), line);
      else
        _mm512_storeu_si512(to + c * 32, line);
    }
  }
}

/* Staged results, `rows` of [32][64], to y of `count` tokens: two rows at a time are pairs of 16 tokens. */
void write_tokens(const nmf_job *job, const char *staged, int64_t row, int64_t rows, int64_t token,
                  int64_t count, bool past) {
  alignas(64) float pairs[512], lines[256];
  for (int64_t t = 0; t < count; t += 16) {
    if (t % 32 == 0)
      for (int p = 0; p < 16; ++p) {
        const char *from = staged + 2 * p * INPUT_BYTES + t * 2;
        const __m512i a = _mm512_load_si512(from), b = _mm512_load_si512(from + INPUT_BYTES);
        _mm512_store_si512(pairs + 16 * p, _mm512_unpacklo_epi16(a, b));
        _mm512_store_si512(pairs + 256 + 16 * p, _mm512_unpackhi_epi16(a, b));
      }
    const int64_t here = nmf_min(16, count - t), stride = job->y_stride;
    uint16_t *y = static_cast<uint16_t *>(job->y) + (token + t) * stride + row;
    const float *from = pairs + t % 32 * 16;
    if (rows == 32 && here == 16 && !past && stride % 2 == 0) {
      transpose16(from, 16, reinterpret_cast<float *>(y), stride / 2);
      continue;
    }
    transpose16(from, 16, lines, 16);
    for (int64_t k = 0; k < here; ++k, y += stride) {
      if (past)
        _mm512_stream_si512(reinterpret_cast<__m512i *>(y), _mm512_load_si512(lines + 16 * k));
      else
        memcpy(y, lines + 16 * k, static_cast<size_t>(rows) * 2);
    }
  }
}

/* ------------------------------------------------------------------ a part */

/* What a part has in scratch memory. */
struct Room {
  float *sums;       /* four tiles */
  char *staged;      /* results of 32 rows */
  char *laid;        /* inputs in pairs: a ring of two steps, or all steps of 32 tokens */
  char *values;      /* turned */
  uint32_t *columns; /* of the part's panels */
  float *bias;       /* of its rows */
  uint16_t *x;       /* a block, and a row of zeros */
};

int64_t laid_bytes(const nmf_geometry &g) {
  return g.panel <= 32 ? 8 * TILE_BYTES : steps_of(g) * 2 * TILE_BYTES;
}
int64_t columns_count(const nmf_geometry &g, int64_t tiles) {
  return (nmf_ceil_div(tiles, g.panel / 16) + 1) * steps_of(g) * STEP + STEP;
}

Room room_of(const nmf_geometry &g, int64_t tiles, char *scratch, int64_t *bytes) {
  char *at = scratch;
  const auto take = [&at](int64_t size) {
    char *taken = at;
    at += (size + 63) / 64 * 64;
    return taken;
  };
  Room room;
  room.sums = reinterpret_cast<float *>(take(4 * TILE_BYTES));
  room.staged = take(STAGED_BYTES);
  room.laid = take(laid_bytes(g));
  room.values = take(tiles * steps_of(g) * TILE_BYTES);
  room.columns = reinterpret_cast<uint32_t *>(take(columns_count(g, tiles) * 4));
  room.bias = reinterpret_cast<float *>(take(tiles * 64));
  room.x = reinterpret_cast<uint16_t *>(take((g.in + 1) * INPUT_BYTES));
  *bytes = at - scratch;
  return room;
}

/* Tokens [token, token + count) of a block: a unit of products. */
struct Unit {
  const nmf_job *job;
  const Room *room;
  int64_t token, count;
  bool past;
};

/* The sums of ROWS tiles from `tile` on, `first` in the part, to y. Where results of tokens go to rows of y, those
 * of the even tile of two wait for the odd one (`half`), so that y gets whole lines. */
template <int ROWS, int COLS>
NMF_INLINE void finish_unit(const Unit &u, int64_t tile, int64_t first, bool half, bool waits) {
  const nmf_job *job = u.job;
  const Room &room = *u.room;
  const int64_t row = tile * 16, rows = nmf_min(16 * ROWS, job->g.out - row);
  const float *bias = room.bias + first * 16;
  store_sums<ROWS, COLS>(room.sums);
  if (job->epilogue != NMFLOW_NONE) {
    apply_epilogue<ROWS, COLS>(job, room.sums, bias);
    bias = nullptr;
  }
  if (!(job->turned & NMFLOW_Y_TURNED)) {
    const int64_t before = half ? 16 : 0;
    round_sums<ROWS, COLS>(room.sums, bias, 16 * ROWS, TO_UNPACK, false,
                           room.staged + before * INPUT_BYTES, INPUT_BYTES);
    if (!waits) write_tokens(job, room.staged, row - before, rows + before, u.token, u.count, u.past);
    return;
  }
  char *y = static_cast<char *>(job->y) + (row * job->y_stride + u.token) * 2;
  const int64_t stride = job->y_stride * 2;
  if (u.count == 16 * COLS)
    return round_sums<ROWS, COLS>(room.sums, bias, rows, BY_TOKENS, u.past, y, stride);
  round_sums<ROWS, COLS>(room.sums, bias, rows, BY_TOKENS, false, room.staged, INPUT_BYTES);
  for (int64_t r = 0; r < rows; ++r)
    memcpy(y + r * stride, room.staged + r * INPUT_BYTES, static_cast<size_t>(u.count) * 2);
}

/* The inputs of a panel in a unit: where they are in the block, and which. */
struct Inputs {
  const char *x;
  const uint32_t *columns;
};

/* Sums of a panel that is laid step by step; `next` is laid with the last one. */
template <int ROWS, int COLS>
NMF_INLINE void sums_ahead(const char *values, int64_t steps, Inputs here, Inputs next, char *ring,
                           int64_t *turn) {
  zero_sums();
  for (int64_t s = 0; s < steps; ++s, ++*turn) {
    multiply<ROWS, COLS>(values + s * TILE_BYTES, steps * TILE_BYTES, ring + (*turn & 1) * COLS * TILE_BYTES);
    const Inputs ahead = s + 1 < steps ? Inputs{here.x, here.columns + (s + 1) * STEP} : next;
    lay_step<COLS>(ahead.x, ahead.columns, ring + (~*turn & 1) * COLS * TILE_BYTES);
  }
}

/* Panels of 16 or 32 rows. */
template <int COLS>
void run_ahead(const nmf_part *part, const Unit &block) {
  const Room &room = *block.room;
  const nmf_geometry &g = block.job->g;
  const int64_t steps = steps_of(g), each = g.panel / 16, units = nmf_ceil_div(block.count, 16 * COLS);
  const char *x = reinterpret_cast<const char *>(room.x);
  const uint32_t *columns = room.columns;
  int64_t turn = 0;
  lay_step<COLS>(x, columns, room.laid);
  for (int64_t tile = part->tile; tile < part->tile_end; columns += steps * STEP) {
    const int64_t first = tile - part->tile, end = nmf_min((tile / each + 1) * each, part->tile_end);
    const char *values = room.values + first * steps * TILE_BYTES;
    const bool odd = tile % 2 == 1, alone = each == 1;
    for (int64_t u = 0; u < units; ++u) {
      const Inputs here = {x + u * COLS * 32, columns};
      const Inputs next = u + 1 < units ? Inputs{here.x + COLS * 32, columns} : Inputs{x, columns + steps * STEP};
      const int64_t at = u * COLS * 16;
      const Unit unit = {block.job, &room, block.token + at, nmf_min(16 * COLS, block.count - at), block.past};
      if (COLS == 2 && end - tile == 2) {
        sums_ahead<2, 2>(values, steps, here, next, room.laid, &turn);
        finish_unit<2, 2>(unit, tile, first, false, false);
      } else {
        sums_ahead<1, COLS>(values, steps, here, next, room.laid, &turn);
        finish_unit<1, COLS>(unit, tile, first, alone && odd && first > 0,
                             alone && !odd && end < part->tile_end);
      }
    }
    tile = end;
  }
}

/* Sums of a panel that is laid whole. */
template <int ROWS>
NMF_INLINE void sums_of(const char *values, int64_t steps, const char *laid) {
  zero_sums();
  for (int64_t s = 0; s < steps; ++s)
    multiply<ROWS, 2>(values + s * TILE_BYTES, steps * TILE_BYTES, laid + s * 2 * TILE_BYTES);
}

/* Panels of more rows. */
void run_whole(const nmf_part *part, const Unit &block) {
  const Room &room = *block.room;
  const nmf_geometry &g = block.job->g;
  const int64_t steps = steps_of(g), each = g.panel / 16;
  const uint32_t *columns = room.columns;
  for (int64_t from = part->tile; from < part->tile_end; columns += steps * STEP) {
    const int64_t end = nmf_min((from / each + 1) * each, part->tile_end);
    for (int64_t at = 0; at < block.count; at += 32) {
      const Unit unit = {block.job, &room, block.token + at, nmf_min(32, block.count - at), block.past};
      for (int64_t s = 0; s < steps; ++s)
        lay_step<2>(reinterpret_cast<const char *>(room.x) + at * 2, columns + s * STEP,
                    room.laid + s * 2 * TILE_BYTES);
      for (int64_t tile = from; tile < end; tile += 2) {
        const int64_t first = tile - part->tile;
        const char *values = room.values + first * steps * TILE_BYTES;
        if (end - tile > 1) {
          sums_of<2>(values, steps, room.laid);
          finish_unit<2, 2>(unit, tile, first, false, false);
        } else {
          sums_of<1>(values, steps, room.laid);
          finish_unit<1, 2>(unit, tile, first, false, false);
        }
      }
    }
    from = end;
  }
}

/* Whether results go past the caches, where y is too long to wait there: lines of it have to be whole. */
bool past_caches(const nmf_job *job, const nmf_part *part) {
  const nmf_geometry &g = job->g;
  const bool whole = job->tokens * g.out > (1 << 20) && job->y_stride % 32 == 0 &&
                     reinterpret_cast<uintptr_t>(job->y) % 64 == 0;
  if (job->turned & NMFLOW_Y_TURNED) return whole && part->token % 32 == 0;
  return whole && part->tile % 2 == 0 && part->tile_end % 2 == 0 && g.out % 32 == 0 &&
         (g.panel == 16 || g.panel % 32 == 0);
}

void tiles_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  const int64_t steps = steps_of(g), tiles = part->tile_end - part->tile;
  int64_t bytes;
  const Room room = room_of(g, tiles, scratch, &bytes);
  const TileConfig config = whole_tiles();
  tile_configure(&config);
  for (int64_t i = 0; i < tiles; ++i) {
    turn_values(g, static_cast<const char *>(job->values) + (part->tile + i) * g.entries_held * 32,
                room.values + i * steps * TILE_BYTES);
    read_bias(job, part->tile + i, room.bias + i * 16);
  }
  columns_of_panels(job, part->tile, part->tile_end, room.columns);
  memset(room.x + g.in * BLOCK, 0, static_cast<size_t>(INPUT_BYTES));
  const bool past = past_caches(job, part);
  for (int64_t token = part->token; token < part->token_end; token += BLOCK) {
    const Unit block = {job, &room, token, nmf_min(BLOCK, part->token_end - token), past};
    turn_inputs(job, token, block.count, room.x);
    if (g.panel > 32)
      run_whole(part, block);
    else if (g.panel == 16 && block.count > 32)
      run_ahead<4>(part, block);
    else
      run_ahead<2>(part, block);
  }
  if (past) _mm_sfence();
  tile_release();
}

int64_t tiles_scratch(const nmf_job *job, int64_t, int64_t tiles) {
  int64_t bytes;
  room_of(job->g, tiles, nullptr, &bytes);
  return bytes;
}

int64_t tiles_most(const nmf_geometry *, int64_t) { return MOST_TOKENS; }

/* Whole pairs of panels, of whose values so many fit the second-level cache. */
int64_t tiles_most_tiles(const nmf_geometry *g) {
  const int64_t pair = nmf_min(g->panel / 16 * 2, g->tiles);
  const int64_t fit = MOST_VALUES / (steps_of(*g) * TILE_BYTES) / pair * pair;
  return fit < pair ? pair : fit;
}

const nmf_kernel tiles_kernel = {tiles_run, tiles_scratch, tiles_most, 32, tiles_most_tiles};

}  // namespace
#endif
