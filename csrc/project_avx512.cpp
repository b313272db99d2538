/* Mask and projection with AVX-512: 16 keys to a register.
 *
 * n:4   a key's rank in its group is the number of the three others that beat it; three in-lane
 *       rotations and compares (one added where the other comes first, so that ties go to it).
 * 1:2, 1:8, 1:16 and small n at M = 16, 32, 48, 64: the largest key by max-reduction, its lowest
 *       place, and again without it. No branch depends on the data, so groups overlap.
 * 1:16k two passes.
 * else  bisection for the n-th largest key, as in project_impl.h but by vectors. */
#include <immintrin.h>

#include "project_impl.h"

namespace {

template <int DTYPE>
struct V;

template <>
struct V<NMFLOW_F32> {
  typedef float T;
  typedef __m512i raw;
  NMF_INLINE raw load(const T *p) { return _mm512_loadu_si512(p); }
  NMF_INLINE raw load(const T *p, __mmask16 k) { return _mm512_maskz_loadu_epi32(k, p); }
  NMF_INLINE __m512i key(raw v) { return _mm512_and_si512(v, _mm512_set1_epi32(0x7fffffff)); }
  NMF_INLINE raw fade(raw v, __mmask16 kept, __m512 delta) {
    const __m512 f = _mm512_castsi512_ps(v);
    return _mm512_castps_si512(_mm512_mask_mul_ps(f, _knot_mask16(kept), f, delta));
  }
  NMF_INLINE void store(T *p, raw v) { _mm512_storeu_si512(p, v); }
  NMF_INLINE void store(T *p, raw v, __mmask16 k) { _mm512_mask_storeu_epi32(p, k, v); }
  NMF_INLINE void stream(T *p, raw v) { _mm512_stream_si512(reinterpret_cast<__m512i *>(p), v); }
  static const uint32_t line = 64;
};

struct V16 {
  typedef uint16_t T;
  typedef __m256i raw;
  NMF_INLINE raw load(const T *p) {
    return _mm256_loadu_si256(reinterpret_cast<const __m256i *>(p));
  }
  NMF_INLINE raw load(const T *p, __mmask16 k) { return _mm256_maskz_loadu_epi16(k, p); }
  NMF_INLINE __m512i key(raw v) {
    return _mm512_and_si512(_mm512_cvtepu16_epi32(v), _mm512_set1_epi32(0x7fff));
  }
  NMF_INLINE void store(T *p, raw v) { _mm256_storeu_si256(reinterpret_cast<__m256i *>(p), v); }
  NMF_INLINE void store(T *p, raw v, __mmask16 k) { _mm256_mask_storeu_epi16(p, k, v); }
  NMF_INLINE void stream(T *p, raw v) {
    _mm256_stream_si256(reinterpret_cast<__m256i *>(p), v);
  }
  static const uint32_t line = 32;
};
template <>
struct V<NMFLOW_BF16> : V16 {
  NMF_INLINE raw fade(raw v, __mmask16 kept, __m512 delta) {
    const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(v), 16);
    const __m512i bits =
        _mm512_castps_si512(_mm512_mul_ps(_mm512_castsi512_ps(wide), delta));
    const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
    const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
    /* A NaN (an infinite delta times zero) must not round over to an infinity. */
    const __mmask16 nan = _mm512_cmpgt_epi32_mask(
        _mm512_and_si512(bits, _mm512_set1_epi32(0x7fffffff)), _mm512_set1_epi32(0x7f800000));
    const __m512i rounded = _mm512_mask_or_epi32(up, nan, bits, _mm512_set1_epi32(0x400000));
    return _mm256_mask_mov_epi16(_mm512_cvtepi32_epi16(_mm512_srli_epi32(rounded, 16)), kept, v);
  }
};
template <>
struct V<NMFLOW_F16> : V16 {
  NMF_INLINE raw fade(raw v, __mmask16 kept, __m512 delta) {
    const __m512 product = _mm512_mul_ps(_mm512_cvtph_ps(v), delta);
    const __m256i rounded =
        _mm512_cvtps_ph(product, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
    return _mm256_mask_mov_epi16(rounded, kept, v);
  }
};

/* Where results go: any of dense, mask and out, 16 elements at a time. */
template <int DTYPE>
struct Sink {
  typedef typename V<DTYPE>::T T;
  typedef typename V<DTYPE>::raw raw;
  T *dense, *out;
  uint8_t *mask;
  __m512 delta;
  bool stream; /* dense is long and aligned: do not read its lines before they are overwritten */

  NMF_INLINE void put(const Sink &s, int64_t at, raw v, __mmask16 kept) {
    if (s.dense) {
      if (s.stream)
        V<DTYPE>::stream(s.dense + at, v);
      else
        V<DTYPE>::store(s.dense + at, v);
    }
    if (s.mask)
      _mm_storeu_si128(reinterpret_cast<__m128i *>(s.mask + at), _mm_maskz_set1_epi8(kept, 1));
    if (s.out) V<DTYPE>::store(s.out + at, V<DTYPE>::fade(v, kept, s.delta));
  }
  NMF_INLINE void put(const Sink &s, int64_t at, raw v, __mmask16 kept, __mmask16 lanes) {
    if (s.dense) V<DTYPE>::store(s.dense + at, v, lanes);
    if (s.mask) _mm_mask_storeu_epi8(s.mask + at, lanes, _mm_maskz_set1_epi8(kept, 1));
    if (s.out) V<DTYPE>::store(s.out + at, V<DTYPE>::fade(v, kept, s.delta), lanes);
  }
};

NMF_INLINE __mmask16 lanes_below(int64_t count) {
  return static_cast<__mmask16>(count >= 16 ? 0xffff : (1u << count) - 1);
}

/* Kept lanes of four groups of 4. */
template <int N>
NMF_INLINE __mmask16 keep_of_4(__m512i key) {
  const __m512i a = _mm512_add_epi32(_mm512_shuffle_epi32(key, (_MM_PERM_ENUM)0x39),
                                     _mm512_set_epi32(1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0, 1, 0, 0, 0));
  const __m512i b = _mm512_add_epi32(_mm512_shuffle_epi32(key, (_MM_PERM_ENUM)0x4e),
                                     _mm512_set_epi32(1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0, 1, 1, 0, 0));
  const __m512i c = _mm512_add_epi32(_mm512_shuffle_epi32(key, (_MM_PERM_ENUM)0x93),
                                     _mm512_set_epi32(1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0, 1, 1, 1, 0));
  const uint32_t x = _mm512_cmpgt_epi32_mask(a, key), y = _mm512_cmpgt_epi32_mask(b, key),
                 z = _mm512_cmpgt_epi32_mask(c, key);
  const uint32_t beaten = N == 1 ? (x | y | z) : N == 2 ? ((x & y) | (z & (x | y))) : (x & y & z);
  return static_cast<__mmask16>(~beaten);
}

/* The largest key of each group of G lanes, in all its lanes. */
template <int G>
NMF_INLINE __m512i group_max(__m512i v) {
  v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0xb1));
  if (G >= 4) v = _mm512_max_epi32(v, _mm512_shuffle_epi32(v, (_MM_PERM_ENUM)0x4e));
  if (G >= 8) v = _mm512_max_epi32(v, _mm512_shuffle_i32x4(v, v, 0xb1));
  if (G >= 16) v = _mm512_max_epi32(v, _mm512_shuffle_i32x4(v, v, 0x4e));
  return v;
}
/* The lowest set bit of each group of G bits. */
template <int G>
NMF_INLINE uint32_t group_lowest(uint32_t bits) {
  if (G == 16) return bits & (0u - bits);
  if (G == 8) {
    const uint32_t low = bits & 0xff, high = bits & 0xff00;
    return (low & (0u - low)) | (high & (0u - high));
  }
  /* G == 2: an odd place counts only where the even one beside it is empty. */
  return bits & ~((bits & 0x5555u) << 1);
}

/* Groups of G = 2, 8 or 16 lanes. */
template <int G>
NMF_INLINE __mmask16 keep_of(__m512i key, int64_t n) {
  uint32_t kept = 0;
  for (int64_t i = 0; i < n; ++i) {
    const uint32_t largest = _mm512_cmpeq_epi32_mask(key, group_max<G>(key));
    const uint32_t first = group_lowest<G>(largest);
    kept |= first;
    key = _mm512_mask_set1_epi32(key, static_cast<__mmask16>(first), -1);
  }
  return static_cast<__mmask16>(kept);
}

template <int DTYPE, int G>
__m512i run_lanes(const nmf_project_args *args, const Sink<DTYPE> &sink, int64_t at, int64_t end) {
  const typename V<DTYPE>::T *w = static_cast<const typename V<DTYPE>::T *>(args->w);
  const int64_t n = args->n;
  __m512i seen = _mm512_setzero_si512();
  for (; at + 16 <= end; at += 16) {
    const auto v = V<DTYPE>::load(w + at);
    const __m512i key = V<DTYPE>::key(v);
    seen = _mm512_max_epi32(seen, key);
    __mmask16 kept;
    if (G == 4)
      kept = n == 1 ? keep_of_4<1>(key) : n == 2 ? keep_of_4<2>(key) : keep_of_4<3>(key);
    else
      kept = keep_of<G == 4 ? 2 : G>(key, n);
    Sink<DTYPE>::put(sink, at, v, kept);
  }
  if (at < end) { /* fewer than 16 elements of whole groups */
    const __mmask16 lanes = lanes_below(end - at);
    const auto v = V<DTYPE>::load(w + at, lanes);
    const __m512i key = V<DTYPE>::key(v);
    seen = _mm512_max_epi32(seen, key);
    __mmask16 kept;
    if (G == 4)
      kept = n == 1 ? keep_of_4<1>(key) : n == 2 ? keep_of_4<2>(key) : keep_of_4<3>(key);
    else
      kept = keep_of<G == 4 ? 2 : G>(key, n);
    Sink<DTYPE>::put(sink, at, v, kept, lanes);
  }
  return seen;
}

/* Groups of VECS vectors, few kept: n times the largest. */
template <int DTYPE, int VECS>
__m512i run_vectors(const nmf_project_args *args, const Sink<DTYPE> &sink, int64_t at,
                    int64_t end) {
  const typename V<DTYPE>::T *w = static_cast<const typename V<DTYPE>::T *>(args->w);
  const int64_t n = args->n;
  __m512i seen = _mm512_setzero_si512();
  for (; at < end; at += 16 * VECS) {
    typename V<DTYPE>::raw v[VECS];
    __m512i key[VECS];
#pragma GCC unroll 4
    for (int i = 0; i < VECS; ++i) {
      v[i] = V<DTYPE>::load(w + at + 16 * i);
      key[i] = V<DTYPE>::key(v[i]);
      seen = _mm512_max_epi32(seen, key[i]);
    }
    uint64_t kept = 0;
    for (int64_t k = 0; k < n; ++k) {
      __m512i top = key[0];
#pragma GCC unroll 4
      for (int i = 1; i < VECS; ++i) top = _mm512_max_epi32(top, key[i]);
      top = group_max<16>(top);
      uint64_t equal = 0;
#pragma GCC unroll 4
      for (int i = 0; i < VECS; ++i)
        equal |= static_cast<uint64_t>(_mm512_cmpeq_epi32_mask(key[i], top)) << (16 * i);
      const uint64_t first = equal & (0 - equal);
      kept |= first;
#pragma GCC unroll 4
      for (int i = 0; i < VECS; ++i)
        key[i] = _mm512_mask_set1_epi32(key[i], static_cast<__mmask16>(first >> (16 * i)), -1);
    }
#pragma GCC unroll 4
    for (int i = 0; i < VECS; ++i)
      Sink<DTYPE>::put(sink, at + 16 * i, v[i], static_cast<__mmask16>(kept >> (16 * i)));
  }
  return seen;
}

/* One of a long group, m a multiple of 16: two passes, the second from the first-level cache. */
template <int DTYPE>
__m512i run_one(const nmf_project_args *args, const Sink<DTYPE> &sink, int64_t at, int64_t end) {
  const typename V<DTYPE>::T *w = static_cast<const typename V<DTYPE>::T *>(args->w);
  const int64_t m = args->m;
  __m512i seen = _mm512_setzero_si512();
  for (; at < end; at += m) {
    __m512i top = V<DTYPE>::key(V<DTYPE>::load(w + at));
    for (int64_t i = 16; i < m; i += 16)
      top = _mm512_max_epi32(top, V<DTYPE>::key(V<DTYPE>::load(w + at + i)));
    seen = _mm512_max_epi32(seen, top);
    top = group_max<16>(top);
    uint32_t open = 0xffff; /* zero once the group's one is found */
    for (int64_t i = 0; i < m; i += 16) {
      const auto v = V<DTYPE>::load(w + at + i);
      const uint32_t equal = _mm512_cmpeq_epi32_mask(V<DTYPE>::key(v), top) & open;
      const uint32_t first = equal & (0u - equal);
      open = first ? 0 : open;
      Sink<DTYPE>::put(sink, at + i, v, static_cast<__mmask16>(first));
    }
  }
  return seen;
}

NMF_INLINE int64_t count_reaching(const int32_t *keys, int64_t padded, int32_t at) {
  const __m512i t = _mm512_set1_epi32(at);
  int64_t count = 0;
  for (int64_t i = 0; i < padded; i += 16)
    count += __builtin_popcount(_mm512_cmpge_epi32_mask(_mm512_load_si512(keys + i), t));
  return count;
}

/* Any group: keys to an array padded with -1, which no threshold reaches. */
template <int DTYPE>
__m512i run_any(const nmf_project_args *args, const Sink<DTYPE> &sink, int64_t at, int64_t end,
                uint32_t *room) {
  const typename V<DTYPE>::T *w = static_cast<const typename V<DTYPE>::T *>(args->w);
  const int64_t n = args->n, m = args->m, padded = (m + 15) / 16 * 16;
  int32_t *keys = reinterpret_cast<int32_t *>((reinterpret_cast<uintptr_t>(room) + 63) / 64 * 64);
  __m512i seen = _mm512_setzero_si512();
  const __m512i none = _mm512_set1_epi32(-1);
  for (; at < end; at += m) {
    __m512i top = none;
    for (int64_t i = 0; i < m; i += 16) {
      const __mmask16 lanes = lanes_below(m - i);
      const __m512i key =
          _mm512_mask_mov_epi32(none, lanes, V<DTYPE>::key(V<DTYPE>::load(w + at + i, lanes)));
      _mm512_store_si512(keys + i, key);
      top = _mm512_max_epi32(top, key);
    }
    seen = _mm512_max_epi32(seen, top);
    const int32_t largest = _mm512_reduce_max_epi32(top);
    /* Invariant: count(>= low) >= n > count(>= high). Each lane of `top` is a key of its own, so
     * when n <= 16 and all lanes are used at least n keys reach the smallest of them. */
    int32_t low = 0, high = largest + 1;
    if (n <= 16 && m >= 16) low = _mm512_reduce_min_epi32(top);
    int32_t threshold = low;
    int64_t spare = -1, count = n == m ? n : count_reaching(keys, padded, low);
    while (count != n) {
      if (high - low <= 1) {
        threshold = low;
        spare = n - count_reaching(keys, padded, low + 1);
        break;
      }
      const int32_t middle = low + (high - low) / 2;
      const int64_t reach = count_reaching(keys, padded, middle);
      if (reach >= n) {
        low = middle;
        count = reach;
        threshold = low;
      } else {
        high = middle;
      }
    }
    const __m512i t = _mm512_set1_epi32(threshold);
    for (int64_t i = 0; i < m; i += 16) {
      const __mmask16 lanes = lanes_below(m - i);
      const __m512i key = _mm512_load_si512(keys + i);
      uint32_t kept = _mm512_cmpge_epi32_mask(key, t);
      if (spare >= 0) {
        uint32_t tied = _mm512_cmpeq_epi32_mask(key, t), taken = 0;
        kept &= ~tied;
        for (; tied && spare > 0; --spare, tied &= tied - 1) taken |= tied & (0u - tied);
        kept |= taken;
      }
      const auto v = V<DTYPE>::load(w + at + i, lanes);
      if (lanes == 0xffff)
        Sink<DTYPE>::put(sink, at + i, v, static_cast<__mmask16>(kept));
      else
        Sink<DTYPE>::put(sink, at + i, v, static_cast<__mmask16>(kept), lanes);
    }
  }
  return seen;
}

template <int DTYPE>
uint32_t run(const nmf_project_args *args, int64_t first, int64_t last, uint32_t *room) {
  typedef typename V<DTYPE>::T T;
  const int64_t n = args->n, m = args->m, at = first * m, end = last * m;
  Sink<DTYPE> sink;
  sink.dense = static_cast<T *>(args->dense);
  sink.out = static_cast<T *>(args->out);
  sink.mask = args->mask;
  sink.delta = _mm512_set1_ps(args->delta);
  sink.stream = args->stream && m % 16 == 0 ? true : args->stream && 16 % m == 0;
  if (reinterpret_cast<uintptr_t>(sink.dense + at) % V<DTYPE>::line) sink.stream = false;
  __m512i seen;
  if (m == 4 && n < 4)
    seen = run_lanes<DTYPE, 4>(args, sink, at, end);
  else if (m == 2 && n == 1)
    seen = run_lanes<DTYPE, 2>(args, sink, at, end);
  else if (m == 8 && n <= 6)
    seen = run_lanes<DTYPE, 8>(args, sink, at, end);
  else if (m == 16 && n <= 6)
    seen = run_lanes<DTYPE, 16>(args, sink, at, end);
  else if (m == 32 && n <= 6)
    seen = run_vectors<DTYPE, 2>(args, sink, at, end);
  else if (m == 48 && n <= 6)
    seen = run_vectors<DTYPE, 3>(args, sink, at, end);
  else if (m == 64 && n <= 6)
    seen = run_vectors<DTYPE, 4>(args, sink, at, end);
  else if (n == 1 && m % 16 == 0)
    seen = run_one<DTYPE>(args, sink, at, end);
  else
    seen = run_any<DTYPE>(args, sink, at, end, room);
  if (sink.stream) _mm_sfence(); /* streamed lines must be there before another thread reads */
  return static_cast<uint32_t>(_mm512_reduce_max_epi32(seen));
}

}  // namespace

uint32_t nmf_project_avx512(const nmf_project_args *args, int64_t first, int64_t last,
                            uint32_t *keys) {
  switch (args->dtype) {
    case NMFLOW_F32:
      return run<NMFLOW_F32>(args, first, last, keys);
    case NMFLOW_BF16:
      return run<NMFLOW_BF16>(args, first, last, keys);
    default:
      return run<NMFLOW_F16>(args, first, last, keys);
  }
}
