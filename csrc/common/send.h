/* Bytes to memory without a stay in the caches, for results that are larger than those. */
#ifndef NMFLOW_SEND_H
#define NMFLOW_SEND_H

#include "vector.h"

namespace {

/* Bytes of a new result that is not worth a stay in the caches, nor the reading of what it covers. */
const int64_t NMF_PAST = INT64_C(4) << 20;

/* On AVX-512; elsewhere a copy. Who has sent the last of them calls `sent`. */
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

NMF_INLINE void sent() {
#if defined(__AVX512BW__)
  _mm_sfence();
#endif
}

}  // namespace
#endif
