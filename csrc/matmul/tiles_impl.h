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

#include "tiles_sides.h"

namespace {

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
