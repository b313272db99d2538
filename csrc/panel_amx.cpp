/* tiles: panels in bfloat16 on AMX. The kept inputs of a panel are gathered into rows of bf16, one a
 * token; the packed values are a tile operand as they lie in memory, 16 pairs of entries by 16 rows
 * of W, so nothing of the weight is rearranged. AMX takes subnormal bf16 numbers as zero. */
#define NMF_LANES 16
#include "avx512.h"

#include "panel_impl.h"

namespace {

struct alignas(64) TileConfig {
  uint8_t palette, start_row, reserved[14];
  uint16_t bytes[16];
  uint8_t rows[16];
};

const int64_t MOST_TOKENS = 128;

int64_t padded_entries(const nmf_geometry &g) { return nmf_ceil_div(g.entries, 32) * 32; }

/* The kept inputs of a panel, [tokens, rounded up to 32][padded entries], zero in the padding. */
void gather_inputs(const nmf_job *job, const nmf_part *part, const int32_t *columns,
                   const int32_t *shifts, uint16_t *to) {
  const nmf_geometry &g = job->g;
  const int64_t tokens = part->token_end - part->token, padded = padded_entries(g);
  const __m512i even = _mm512_set_epi16(62, 60, 58, 56, 54, 52, 50, 48, 46, 44, 42, 40, 38, 36, 34,
                                        32, 30, 28, 26, 24, 22, 20, 18, 16, 14, 12, 10, 8, 6, 4, 2,
                                        0);
  for (int64_t t = 0; t < tokens; ++t, to += padded) {
    const uint16_t *x =
        static_cast<const uint16_t *>(job->x) + (part->token + t) * job->x_stride;
    for (int64_t s = 0; s < padded; s += 32) {
      /* An element is read as the low half of 4 bytes, the row's last one as the high half of the
       * 4 before its end, so that nothing past the row is touched. */
      __m512i half[2];
      for (int h = 0; h < 2; ++h) {
        const int64_t left = g.entries - s - 16 * h;
        const __mmask16 lanes = static_cast<__mmask16>(
            left >= 16 ? 0xffff : left <= 0 ? 0 : (1u << left) - 1);
        const __m512i index = _mm512_loadu_si512(columns + s + 16 * h);
        const __m512i both = _mm512_mask_i32gather_epi32(_mm512_setzero_si512(), lanes, index, x, 2);
        half[h] = _mm512_srlv_epi32(both, _mm512_loadu_si512(shifts + s + 16 * h));
      }
      _mm512_storeu_si512(to + s, _mm512_permutex2var_epi16(half[0], even, half[1]));
    }
  }
  const int64_t rest = nmf_ceil_div(tokens, 32) * 32 - tokens;
  memset(to, 0, static_cast<size_t>(rest * padded) * 2);
}

/* A tile of 16 tokens by 16 rows of W to y, bias and epilogue added. */
NMF_INLINE void write_tile_rows(const nmf_job *job, int64_t token, int64_t tokens, int64_t tile,
                                const float *sums, const float *bias) {
  const int64_t row = tile * 16, count = nmf_min(16, job->g.out - row);
  const __m512 b = _mm512_loadu_ps(bias);
  for (int64_t t = 0; t < tokens; ++t) {
    const vecf v = finish((vecf)_mm512_add_ps(_mm512_load_ps(sums + t * 16), b), job->epilogue);
    const vech h = to_bf16(v);
    uint16_t *y = static_cast<uint16_t *>(job->y) + (token + t) * job->y_stride + row;
    if (count == 16)
      memcpy(y, &h, 32);
    else
      memcpy(y, &h, static_cast<size_t>(count) * 2);
  }
}

void tiles_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  const int64_t tokens = part->token_end - part->token, padded = padded_entries(g);
  const int64_t rows = nmf_ceil_div(tokens, 32) * 32, blocks = padded / 32;
  const int64_t whole = g.entries_held / 32; /* blocks of 16 pairs that lie in the weight whole */
  float *sums = reinterpret_cast<float *>(scratch); /* four C tiles */
  char *tails = scratch + 4096;                     /* the cut last block of two B tiles */
  int32_t *columns = reinterpret_cast<int32_t *>(scratch + 4096 + 2048);
  int32_t *shifts = columns + padded;
  uint16_t *x = reinterpret_cast<uint16_t *>(shifts + padded);

  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
  memset(tails, 0, 2048);

  const int64_t tiles_each = g.panel / 16;
  const char *values = static_cast<const char *>(job->values);
  const int64_t tile_bytes = g.entries_held * 32, tail_bytes = (g.entries_held - whole * 32) * 32;
  int64_t panel = -1;
  for (int64_t tile = part->tile; tile < part->tile_end;) {
    if (tile / tiles_each != panel) {
      panel = tile / tiles_each;
      panel_columns(job, panel, 1, reinterpret_cast<uint32_t *>(columns));
      for (int64_t s = 0; s < padded; ++s) {
        if (s >= g.entries) columns[s] = 0;
        shifts[s] = columns[s] == g.in - 1 ? 16 : 0;
        if (shifts[s]) --columns[s];
      }
      gather_inputs(job, part, columns, shifts, x);
    }
    /* Two tiles at a time; the second may be the first again where there is no second. */
    const int64_t end = nmf_min((panel + 1) * tiles_each, part->tile_end);
    const int64_t other = tile + 1 < end ? tile + 1 : tile;
    const char *b0 = values + tile * tile_bytes, *b1 = values + other * tile_bytes;
    memcpy(tails, b0 + whole * 1024, static_cast<size_t>(tail_bytes));
    memcpy(tails + 1024, b1 + whole * 1024, static_cast<size_t>(tail_bytes));
    float bias[32];
    read_bias(job, tile, bias);
    read_bias(job, other, bias + 16);
    for (int64_t t = 0; t < rows; t += 32) {
      const uint16_t *a0 = x + t * padded, *a1 = a0 + 16 * padded;
      const size_t stride = static_cast<size_t>(padded) * 2;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < blocks; ++k) {
        _tile_loadd(4, a0 + k * 32, stride);
        _tile_loadd(6, k < whole ? b0 + k * 1024 : tails, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, k < whole ? b1 + k * 1024 : tails + 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a1 + k * 32, stride);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
      for (int half = 0; half < 2; ++half) {
        const int64_t here = nmf_min(16, tokens - t - 16 * half);
        if (here <= 0) break;
        const float *c = sums + 512 * half;
        write_tile_rows(job, part->token + t + 16 * half, here, tile, c, bias);
        if (other != tile)
          write_tile_rows(job, part->token + t + 16 * half, here, other, c + 256, bias + 16);
      }
    }
    tile = other + 1;
  }
  _tile_release();
}

int64_t tiles_scratch(const nmf_job *job, int64_t tokens, int64_t) {
  const int64_t padded = padded_entries(job->g);
  return 4096 + 2048 + padded * 8 + nmf_ceil_div(tokens, 32) * 32 * padded * 2;
}

int64_t tiles_most(const nmf_geometry *) { return MOST_TOKENS; }

const nmf_kernel tiles_kernel = {tiles_run, tiles_scratch, tiles_most, 32};

}  // namespace

const nmf_kernel *nmf_tiles_amx(void) { return &tiles_kernel; }
