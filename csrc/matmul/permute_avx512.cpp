#include "avx512.h"

namespace {

enum { WHOLE, WIDE, LOW, HIGH };
/* A register holds a span: there is nothing to gain from halves of one. */
const bool PERMUTE_HALVES = false;
const int PERMUTE_TILES = 3;
#define PERMUTE_TOKENS 8

template <int PICK>
NMF_INLINE vecf picked(vecu code, const float *x) {
  if (PICK == WIDE)
    return (vecf)_mm512_permutex2var_ps(_mm512_loadu_ps(x), (__m512i)code, _mm512_loadu_ps(x + 16));
  return (vecf)_mm512_permutexvar_ps((__m512i)code, _mm512_loadu_ps(x));
}

}  // namespace

#include "permute_impl.h"

const nmf_kernel *nmf_permute_avx512(void) { return &permute_kernel; }
