/* tiles: panels in bfloat16 on AMX. x is transposed once for a part; the kept inputs of a panel are
 * then whole rows of it, laid in pairs as a tile operand wants them, 32 tokens at a time. The packed
 * values are transposed tile by tile to the other operand. AMX takes subnormal bf16 as zero. */
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
int64_t padded_tokens(int64_t tokens) { return nmf_ceil_div(tokens, 32) * 32; }

/* x of the part's tokens, transposed to [in][width], zero past the last token. */
void transpose_inputs(const nmf_job *job, const nmf_part *part, int64_t width, uint16_t *to) {
  const nmf_geometry &g = job->g;
  const int64_t tokens = part->token_end - part->token;
  for (int64_t t = 0; t < width; t += 16)
    for (int64_t i = 0; i < g.in; i += 16) {
      const int64_t inputs = nmf_min(16, g.in - i), here = nmf_min(16, tokens - t);
      float rows[256], columns[256];
      if (here < 16 || inputs < 16) memset(rows, 0, sizeof rows);
      for (int64_t k = 0; k < here; ++k)
        read_inputs(job, part->token + t + k, i, inputs, rows + k * 16);
      transpose16(rows, 16, columns, 16);
      for (int64_t k = 0; k < inputs; ++k) {
        const vech h = __builtin_convertvector(as_bits(load(columns + k * 16)) >> 16, vech);
        memcpy(to + (i + k) * width + t, &h, sizeof h);
      }
    }
}

/* A panel's kept inputs in pairs: for every 32 tokens two operands of [pairs][16 tokens][2]. Tokens
 * 8 l + 0..3 of the 32 are lanes 4 l.. of the first, 8 l + 4..7 of the second: what unpacking gives. */
void pair_inputs(const nmf_geometry &g, int64_t width, const uint32_t *columns, const uint16_t *x,
                 const uint16_t *zeros, char *to) {
  const int64_t pairs = padded_entries(g) / 2;
  for (int64_t p = 0; p < pairs; ++p) {
    const uint16_t *a = 2 * p < g.entries ? x + columns[2 * p] : zeros;
    const uint16_t *b = 2 * p + 1 < g.entries ? x + columns[2 * p + 1] : zeros;
    for (int64_t t = 0; t < width; t += 32) {
      const __m512i v = _mm512_loadu_si512(a + t), w = _mm512_loadu_si512(b + t);
      char *at = to + (t / 16 * pairs + p) * 64;
      _mm512_storeu_si512(at, _mm512_unpacklo_epi16(v, w));
      _mm512_storeu_si512(at + pairs * 64, _mm512_unpackhi_epi16(v, w));
    }
  }
}

/* The values of a tile as operands of [16 rows][16 pairs], one for every 32 entries. */
void turn_values(const nmf_geometry &g, const char *values, char *to) {
  const int64_t whole = g.entries_held / 32, blocks = padded_entries(g) / 32;
  for (int64_t k = 0; k < blocks; ++k) {
    float cut[256];
    const float *from = reinterpret_cast<const float *>(values + k * 1024);
    if (k >= whole) { /* the last block is cut short: zeros after it */
      memset(cut, 0, sizeof cut);
      memcpy(cut, from, static_cast<size_t>((g.entries_held - whole * 32) * 32));
      from = cut;
    }
    transpose16(from, 16, reinterpret_cast<float *>(to + k * 1024), 16);
  }
}

/* Sums of 16 tokens and of one or two tiles, [16 rows][16 lanes] each, to y. */
NMF_INLINE void write_sums(const nmf_job *job, const nmf_part *part, int64_t first, int64_t half,
                           int64_t tile, bool two, bool stream, const float *sums, const float *bias) {
  const int64_t tokens = part->token_end - part->token;
  const int64_t row = tile * 16, left = job->g.out - row;
  float a[256], b[256];
  transpose16(sums, 16, a, 16);
  if (two) transpose16(sums + 512, 16, b, 16);
  for (int64_t lane = 0; lane < 16; ++lane) {
    const int64_t t = first + lane / 4 * 8 + half * 4 + lane % 4;
    if (t >= tokens) continue;
    uint16_t *y = static_cast<uint16_t *>(job->y) + (part->token + t) * job->y_stride + row;
    vech both[2];
    both[0] = to_bf16(finish(load(a + lane * 16) + load(bias), job->epilogue));
    int64_t count = nmf_min(16, left);
    if (two) {
      both[1] = to_bf16(finish(load(b + lane * 16) + load(bias + 16), job->epilogue));
      count = nmf_min(32, left);
    }
    if (count == 32 && stream) {
      __m512i line;
      memcpy(&line, both, sizeof line);
      _mm512_stream_si512(reinterpret_cast<__m512i *>(y), line);
    } else if (count == 32)
      memcpy(y, both, 64);
    else
      memcpy(y, both, static_cast<size_t>(count) * 2);
  }
}

void tiles_run(const nmf_job *job, const nmf_part *part, char *scratch) {
  const nmf_geometry &g = job->g;
  const int64_t width = padded_tokens(part->token_end - part->token);
  const int64_t padded = padded_entries(g), blocks = padded / 32;
  float *sums = reinterpret_cast<float *>(scratch); /* four C tiles */
  scratch += 4096;
  uint16_t *zeros = reinterpret_cast<uint16_t *>(scratch);
  scratch += MOST_TOKENS * 2;
  char *weights = scratch; /* two tiles, turned */
  scratch += 2 * blocks * 1024;
  char *pairs = scratch;
  scratch += padded * width * 2;
  uint32_t *columns = reinterpret_cast<uint32_t *>(scratch);
  scratch += padded * 4;
  uint16_t *x = reinterpret_cast<uint16_t *>(scratch);

  TileConfig config;
  memset(&config, 0, sizeof config);
  config.palette = 1;
  for (int i = 0; i < 8; ++i) {
    config.bytes[i] = 64;
    config.rows[i] = 16;
  }
  _tile_loadconfig(&config);
  memset(zeros, 0, MOST_TOKENS * 2);
  transpose_inputs(job, part, width, x);

  /* Many rows of y are touched 64 bytes at a time: where y is too long to wait in the cache, its
   * lines are written past it, without being read first. */
  const bool stream = job->tokens * g.out > (1 << 20) && job->y_stride % 32 == 0 &&
                      reinterpret_cast<uintptr_t>(job->y) % 64 == 0 && part->tile % 2 == 0 &&
                      g.panel % 32 == 0;
  const int64_t tiles_each = g.panel / 16;
  const char *values = static_cast<const char *>(job->values);
  int64_t panel = -1;
  for (int64_t tile = part->tile; tile < part->tile_end;) {
    if (tile / tiles_each != panel) {
      panel = tile / tiles_each;
      panel_columns(job, panel, static_cast<uint32_t>(width), columns);
      pair_inputs(g, width, columns, x, zeros, pairs);
    }
    const bool two = tile + 1 < nmf_min((panel + 1) * tiles_each, part->tile_end);
    float bias[32];
    turn_values(g, values + tile * g.entries_held * 32, weights);
    read_bias(job, tile, bias);
    if (two) {
      turn_values(g, values + (tile + 1) * g.entries_held * 32, weights + blocks * 1024);
      read_bias(job, tile + 1, bias + 16);
    }
    const char *a0 = weights, *a1 = two ? weights + blocks * 1024 : weights;
    for (int64_t t = 0; t < width; t += 32) {
      const char *b0 = pairs + t / 16 * (padded / 2) * 64, *b1 = b0 + padded / 2 * 64;
      _tile_zero(0);
      _tile_zero(1);
      _tile_zero(2);
      _tile_zero(3);
      for (int64_t k = 0; k < blocks; ++k) {
        _tile_loadd(4, a0 + k * 1024, 64);
        _tile_loadd(6, b0 + k * 1024, 64);
        _tile_dpbf16ps(0, 4, 6);
        _tile_loadd(7, b1 + k * 1024, 64);
        _tile_dpbf16ps(1, 4, 7);
        _tile_loadd(5, a1 + k * 1024, 64);
        _tile_dpbf16ps(2, 5, 6);
        _tile_dpbf16ps(3, 5, 7);
      }
      _tile_stored(0, sums, 64);
      _tile_stored(1, sums + 256, 64);
      _tile_stored(2, sums + 512, 64);
      _tile_stored(3, sums + 768, 64);
      write_sums(job, part, t, 0, tile, two, stream, sums, bias);
      write_sums(job, part, t, 1, tile, two, stream, sums + 256, bias);
    }
    tile += two ? 2 : 1;
  }
  if (stream) _mm_sfence();
  _tile_release();
}

int64_t tiles_scratch(const nmf_job *job, int64_t tokens, int64_t) {
  const int64_t padded = padded_entries(job->g), width = padded_tokens(tokens);
  return 4096 + MOST_TOKENS * 2 + padded / 32 * 2048 + padded * width * 2 + padded * 4 +
         job->g.in * width * 2;
}

int64_t tiles_most(const nmf_geometry *, int64_t) { return MOST_TOKENS; }

const nmf_kernel tiles_kernel = {tiles_run, tiles_scratch, tiles_most, 32};

}  // namespace

const nmf_kernel *nmf_tiles_amx(void) { return &tiles_kernel; }
