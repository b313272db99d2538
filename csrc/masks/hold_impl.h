/* W by a mask that is held (hold.h): one pass over memory, with the fingerprint of what it writes.
 * The same source is compiled once for each instruction set. Everything is static: see common.h. */
#include "hold.h"
#include "prints.h"
#include "project_write.h"
#include "send.h"

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
  if (job->past) sent();
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
