// Products whose inputs were shared out among blocks of threads. Compiled for HALF.
#include "device.h"
#include "finish.h"

// y from the sums of `shares` shares of the inputs, added in their order.
KERNEL(256)
sum(const float* partial, const u16* bias, u16* y, i64 ldy, int out, int tokens, int shares,
       int epilogue) {
  const int o = blockIdx.x * 256 + threadIdx.x, token = blockIdx.y;
  if (o >= out) return;
  float sum = 0.0f;
  for (int s = 0; s < shares; s++) sum += partial[((i64)s * tokens + token) * out + o];
  y[token * ldy + o] = from_float(finish(sum, bias, o, epilogue));
}
