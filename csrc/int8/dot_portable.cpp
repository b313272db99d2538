#include "decode.h"

#define DOT_OFFSET 0
#define DOT_LINE 0
#define DOT_INPUTS(job) (((job)->g.in + 63) / 64 * 64)
#define DOT_EXTRA(job) ((job)->g.entries * 128)
#include "dot_impl.h"

namespace {

/* Any pattern: a tile's values and columns are written out, and x is read byte by byte. */
void dot_tiles(const nmf_job *job, const nmf_part *part, const int8_t *x, int64_t stride,
               const float *steps, char *scratch) {
  const nmf_geometry &g = job->g;
  int32_t *values = reinterpret_cast<int32_t *>(scratch);
  uint32_t *columns = reinterpret_cast<uint32_t *>(scratch + g.entries * 64);
  for (int64_t tile = part->tile; tile < part->tile_end; ++tile) {
    Int8Place at = int8_place(job, tile, 0);
    for (int64_t s = 0; s < g.entries; ++s, int8_next(job, at))
      for (int i = 0; i < 16 / LANES; ++i) put(values + s * 16 + i * LANES, int8_value(at, i));
    int8_decode_columns(job, tile, 0, g.entries, 0, 1, columns);
    float bias[16];
    read_bias(job, tile, bias);
    for (int64_t token = part->token; token < part->token_end; ++token) {
      const int8_t *from = x + (token - part->token) * stride;
      int32_t sums[16] = {};
      for (int64_t s = 0; s < g.entries; ++s)
        for (int i = 0; i < 16; ++i) sums[i] += values[s * 16 + i] * from[columns[s * 16 + i]];
      const float step = steps[token - part->token];
      float found[16];
      for (int i = 0; i < 16; ++i)
        found[i] = step * int8_scales(job, tile)[i] * static_cast<float>(sums[i]) + bias[i];
      write_rows(job, token, tile * 16, found, nmf_min(16, g.out - tile * 16));
    }
  }
}

}  // namespace

const nmf_kernel *nmf_int8_dot_portable(void) { return &dot_kernel; }
