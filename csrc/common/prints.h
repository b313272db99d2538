/* Fingerprints: sums of words times factors. All static, see common.h. */
#ifndef NMFLOW_PRINTS_H
#define NMFLOW_PRINTS_H

#include "vector.h"

namespace {

/* Sums of words times factors modulo 2^64, lane by lane. */
typedef uint64_t vecl __attribute__((vector_size(4 * LANES)));
const int64_t WIDE = LANES / 2;

template <class WORD>
NMF_INLINE vecl sum_words(const char *words, const int64_t *odd, int64_t count, vecl sums) {
  typedef WORD vecw __attribute__((vector_size(sizeof(WORD) * (LANES / 2))));
  int64_t i = 0;
  for (; i + WIDE <= count; i += WIDE)
    sums += __builtin_convertvector(get<vecw>(words + i * sizeof(WORD)), vecl) * get<vecl>(odd + i);
  for (; i < count; ++i) {
    const int64_t word = get<WORD>(words + i * sizeof(WORD));
    sums[0] += static_cast<uint64_t>(word) * static_cast<uint64_t>(odd[i]);
  }
  return sums;
}

/* The same of bytes, in words as wide as a row of them allows. */
NMF_INLINE vecl sum_bytes_of(const void *from, const int64_t *odd, int64_t bytes, int64_t width,
                             vecl sums) {
  const char *words = static_cast<const char *>(from);
  if (width == 8) return sum_words<int64_t>(words, odd, bytes / 8, sums);
  if (width == 4) return sum_words<int32_t>(words, odd, bytes / 4, sums);
  return sum_words<int16_t>(words, odd, bytes / 2, sums);
}

NMF_INLINE int64_t total_of(vecl sums) {
  uint64_t sum = 0;
  for (int64_t lane = 0; lane < WIDE; ++lane) sum += sums[lane];
  return static_cast<int64_t>(sum);
}

}  // namespace
#endif
