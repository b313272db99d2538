/* W by a mask that is held (hold.h): one pass over memory, with the fingerprint of what it writes.
 * The same source is compiled once for each instruction set. Everything is static: see common.h. */
#include "hold.h"
#include "project_write.h"

namespace {

/* Elements at a time: what is made of them stays in the first cache until it is summed and sent. */
const int64_t PIECE = 1024;

/* The largest |w| by its bits, lane by lane: of `seen` and of some elements. */
template <int DTYPE>
NMF_INLINE vecu largest(const typename nmf_element<DTYPE>::type *w, int64_t count, vecu seen) {
  int64_t i = 0;
  for (; i + LANES <= count; i += LANES) {
    if constexpr (DTYPE == NMFLOW_F32)
      seen = larger(seen, get<vecu>(w + i) & 0x7fffffffu);
    else
      seen = larger(seen, widen(get<vech>(w + i)) & 0x7fffu);
  }
  for (; i < count; ++i) {
    uint32_t bits = 0;
    memcpy(&bits, w + i, sizeof *w);
    seen = larger(seen, splat(bits & (DTYPE == NMFLOW_F32 ? 0x7fffffffu : 0x7fffu)));
  }
  return seen;
}

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

/* Bytes to memory without a stay in the caches. */
NMF_INLINE void send(void *to, const void *from, int64_t bytes) {
#if defined(__AVX512BW__)
  char *at = static_cast<char *>(to);
  const char *end = at + bytes, *source = static_cast<const char *>(from);
  const int64_t odd = -reinterpret_cast<intptr_t>(at) & 63, head = nmf_min(odd, bytes);
  memcpy(at, source, static_cast<size_t>(head));
  at += head, source += head;
  for (; at + 64 <= end; at += 64, source += 64)
    _mm512_stream_si512(reinterpret_cast<__m512i *>(at), get<__m512i>(source));
  memcpy(at, source, static_cast<size_t>(end - at));
#else
  memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

template <int DTYPE>
bool hold_typed(const nmf_holding *job, int64_t first, int64_t last) {
  typedef typename nmf_element<DTYPE>::type T;
  const T *w = static_cast<const T *>(job->w), *values = static_cast<const T *>(job->values);
  T *out = static_cast<T *>(job->out);
  alignas(64) T made[PIECE];
  vecu seen = {};
  const int64_t width = nmf_word(job->cols * static_cast<int64_t>(sizeof(T)));
  for (int64_t row = first; row < last; ++row) {
    const int64_t begin = row * job->cols, end = nmf_min(begin + job->cols, job->total);
    vecl sums = {};
    for (int64_t at = begin; at < end; at += PIECE) {
      const int64_t count = nmf_min(PIECE, end - at), bytes = count * static_cast<int64_t>(sizeof(T));
      seen = largest<DTYPE>(w + at, count, seen);
      T *to = job->past ? made : out + at;
      if (job->pull != 0.0f)
        write_pulled<DTYPE>(values + at, w + at, job->mask + at, count, job->delta, job->pull, to);
      else
        write_out<DTYPE>(values + at, job->mask + at, count, job->delta, to);
      if (job->prints != nullptr)
        sums = sum_bytes_of(to, job->odd + (at - begin) * static_cast<int64_t>(sizeof(T)) / width,
                            bytes, width, sums);
      if (job->past) send(out + at, made, bytes);
    }
    if (job->prints != nullptr) job->prints[row] = total_of(sums);
  }
#if defined(__AVX512BW__)
  if (job->past) _mm_sfence();
#endif
  uint32_t most = 0;
  for (int lane = 0; lane < LANES; ++lane) most = seen[lane] > most ? seen[lane] : most;
  return most < (DTYPE == NMFLOW_F32 ? 0x7f800000u : nmf_element<DTYPE>::infinity);
}

bool hold_rows(const nmf_holding *job, int64_t first, int64_t last) {
  switch (job->dtype) {
    case NMF_BYTES: { /* nothing to write: sums alone */
      const char *from = static_cast<const char *>(job->w);
      for (int64_t row = first; row < last; ++row)
        job->prints[row] = total_of(
            sum_bytes_of(from + row * job->cols, job->odd, job->cols, nmf_word(job->cols), vecl{}));
      return true;
    }
    case NMFLOW_F32:
      return hold_typed<NMFLOW_F32>(job, first, last);
    case NMFLOW_BF16:
      return hold_typed<NMFLOW_BF16>(job, first, last);
    default:
      return hold_typed<NMFLOW_F16>(job, first, last);
  }
}

}  // namespace
