// What follows a sum.
#pragma once

DEVICE float finish(float v, const u16* bias, int o, int epilogue) {
  if (bias) v += to_float(bias[o]);
  if (epilogue == 1) return 0.5f * v * (1.0f + erff(v * 0.70710678118654752f));
  return epilogue == 2 && v < 0.0f ? 0.0f : v;  // a NaN stays one
}
