/* 8-bit weights as the shuffles of AVX2 want them: two tiles at a time, read and put in order. */
#ifndef NMFLOW_QUADS_AVX2_H
#define NMFLOW_QUADS_AVX2_H

#include "decode.h"

namespace {

/* Quads of the 32 rows of two tiles: 16 bytes of the one and 16 of the other in each register. */
struct Quad {
  __m256i pick[4]; /* what is picked of 16 inputs, see arrange */
  __m256i flip[4]; /* -1 where a weight is negative; of rows 0 to 3, 4 to 7, 8 to 11, 12 to 15 */
  __m256i size[4]; /* |w| */
};
struct Quads {
  Quad quad[16]; /* they stay in the first-level cache */
  __m256i more[4];  /* the sizes of the negative ones of each row, see quad_of */
};

NMF_INLINE __m256i both(const void *a, const void *b) {
  return _mm256_inserti128_si256(_mm256_castsi128_si256(get<__m128i>(a)), get<__m128i>(b), 1);
}

/* EACH: entries of a row in 16 inputs, from which a shuffle picks; four stand for more, too, and WIDE for
 * one in 32 inputs. PIECES: registers that become a quad of 4 rows each. */
enum { WIDE = 0 };
constexpr int pieces_of(int each) { return each == WIDE ? 4 : 4 / each; }

/* Codes as they lie, [row][entry], in the order in which they pick. Four entries of a row in 16 inputs
 * stay: one shuffle picks a quad. Of two, a shuffle picks pairs of 8 rows; of one, an entry of 16. */
template <int EACH>
NMF_INLINE void arrange(__m256i (&code)[4]) {
  if (EACH == 4) return;
  const __m256i order = _mm256_broadcastsi128_si256(
      EACH == 2 ? _mm_setr_epi8(0, 1, 4, 5, 8, 9, 12, 13, 2, 3, 6, 7, 10, 11, 14, 15)
                : _mm_setr_epi8(0, 4, 8, 12, 1, 5, 9, 13, 2, 6, 10, 14, 3, 7, 11, 15));
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) code[k] = _mm256_shuffle_epi8(code[k], order);
  if (EACH == 2) {
#pragma GCC unroll 2
    for (int k = 0; k < 4; k += 2) {
      const __m256i first = _mm256_unpacklo_epi64(code[k], code[k + 1]);
      code[k + 1] = _mm256_unpackhi_epi64(code[k], code[k + 1]);
      code[k] = first;
    }
    return;
  }
  const __m256i a = _mm256_unpacklo_epi32(code[0], code[1]), b = _mm256_unpackhi_epi32(code[0], code[1]);
  const __m256i c = _mm256_unpacklo_epi32(code[2], code[3]), d = _mm256_unpackhi_epi32(code[2], code[3]);
  code[0] = _mm256_unpacklo_epi64(a, c);
  code[1] = _mm256_unpackhi_epi64(a, c);
  code[2] = _mm256_unpacklo_epi64(b, d);
  code[3] = _mm256_unpackhi_epi64(b, d);
}

/* Where quads are read. `places`: for a quad of a window (the inputs that hold whole quads), where the group
 * of each of its entries begins among the 16 inputs that it lies in. */
struct Reader {
  const char *a, *b; /* blocks of two tiles */
  const int32_t *places;
  int64_t count, place; /* quads of a window, and the next one's number */
  __m256i more[4];
};

/* A block's codes; what lies `ahead` of it is fetched. */
template <int BITS>
NMF_INLINE void read_codes(const Reader &from, int64_t ahead, __m256i (&to)[4]) {
#pragma GCC unroll 8
  for (int at = 0; at < 64 + 8 / BITS * 64; at += 64) {
    __builtin_prefetch(from.a + ahead + at);
    __builtin_prefetch(from.b + ahead + at);
  }
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) to[k] = both(from.a + 16 * k, from.b + 16 * k);
}

template <int BITS, int EACH>
NMF_INLINE void read_quad(Reader &from, const __m256i (&codes)[4], int j, Quad *to) {
  const __m256i mask = _mm256_set1_epi8(static_cast<char>((1 << BITS) - 1)), zero = _mm256_setzero_si256();
  const __m256i start = _mm256_set1_epi32(from.places[from.place]), ones = _mm256_set1_epi16(1);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const __m256i shifted = j ? _mm256_srli_epi32(codes[k], BITS * j) : codes[k];
    /* Of 32 inputs, a code of the second half gets the top bit, which picks nothing of the first. */
    to->pick[k] = EACH == WIDE ? _mm256_add_epi8(shifted, _mm256_set1_epi8(112))
                               : _mm256_or_si256(_mm256_and_si256(shifted, mask), start);
  }
  arrange<EACH>(to->pick);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) {
    const int at = 64 + j * 64 + 16 * k;
    const __m256i value = both(from.a + at, from.b + at);
    to->size[k] = _mm256_abs_epi8(value);
    to->flip[k] = _mm256_cmpgt_epi8(zero, value);
    const __m256i two = _mm256_maddubs_epi16(to->size[k], _mm256_abs_epi8(to->flip[k]));
    from.more[k] = _mm256_add_epi32(from.more[k], _mm256_madd_epi16(two, ones));
  }
  if (++from.place == from.count) from.place = 0;
}

template <int BITS>
NMF_INLINE void next_block(Reader &from) {
  from.a += 64 + 8 / BITS * 64;
  from.b += 64 + 8 / BITS * 64;
}

}  // namespace
#endif
