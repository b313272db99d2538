/* One dot product of the emulation, for the test that compares it with another model. */
#include "emulated.h"

int32_t nmflow_emulated_dot(int32_t rows, int32_t pairs, int32_t columns, const uint16_t *a, const uint16_t *b,
                            float *c) {
  if (rows < 1 || rows > 16 || pairs < 1 || pairs > 16 || columns < 1 || columns > 16) return NMFLOW_BAD_SHAPE;
  if (!(nmflow_cpu_features() & 2)) return NMFLOW_NO_KERNEL;
  TileConfig config = whole_tiles();
  config.rows[0] = config.rows[1] = static_cast<uint8_t>(rows);
  config.bytes[0] = config.bytes[2] = static_cast<uint16_t>(4 * columns);
  config.bytes[1] = static_cast<uint16_t>(4 * pairs);
  config.rows[2] = static_cast<uint8_t>(pairs);
  tile_configure(&config);
  tile_load(0, c, 4 * columns);
  tile_load(1, a, 4 * pairs);
  tile_load(2, b, 4 * columns);
  tile_dot(0, 1, 2);
  tile_store(0, c, 4 * columns);
  tile_release();
  return NMFLOW_OK;
}
