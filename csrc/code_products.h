// Products of queries with keys that are codes, and sums of values that are codes, without decoding them to memory.
//
// With levels L of a group, q . (scale L + shift) = scale (q . L) + shift sum(q), and for shares p of the values
// sum p (scale L + shift) = sum (p scale) L + sum p shift.
#pragma once

#include "codes.h"

static const int KEYS_AT_A_TIME = 64, TOGETHER = 4;

// Sums of the elements of four vectors each.
template <typename A> static ALWAYS_INLINE void sums_of_four(const Vec<A> vectors[TOGETHER], A *to) {
    for (int i = 0; i < TOGETHER; i++) to[i] = sum<A>(vectors[i]);
}
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
template <> ALWAYS_INLINE void sums_of_four<float>(const Vec<float> v[TOGETHER], float *to) {
    const __m512 a = (__m512)v[0], b = (__m512)v[1], c = (__m512)v[2], d = (__m512)v[3];
    const __m512d one = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(a, b), _mm512_unpackhi_ps(a, b));
    const __m512d two = (__m512d)_mm512_add_ps(_mm512_unpacklo_ps(c, d), _mm512_unpackhi_ps(c, d));
    const __m512 all = _mm512_add_ps((__m512)_mm512_unpacklo_pd(one, two), (__m512)_mm512_unpackhi_pd(one, two));
    const __m256 half = _mm256_add_ps(_mm512_castps512_ps256(all), _mm512_extractf32x8_ps(all, 1));
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(half), _mm256_extractf128_ps(half, 1)));
}
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
template <> ALWAYS_INLINE void sums_of_four<float>(const Vec<float> v[TOGETHER], float *to) {
    const __m256 one = _mm256_hadd_ps((__m256)v[0], (__m256)v[1]), two = _mm256_hadd_ps((__m256)v[2], (__m256)v[3]);
    const __m256 all = _mm256_hadd_ps(one, two);
    _mm_storeu_ps(to, _mm_add_ps(_mm256_castps256_ps128(all), _mm256_extractf128_ps(all, 1)));
}
#endif

// Asks for the codes that are read KEYS_AT_A_TIME vectors after these `count` ones. The address may lie after the last
// vector, which such a request permits.
static ALWAYS_INLINE void prefetch_codes(const uint8_t *vectors, Long nbytes, int count) {
#ifdef __GNUC__
    const uintptr_t ahead = (uintptr_t)vectors + KEYS_AT_A_TIME * nbytes;
    for (Long byte = 0; byte < count * nbytes; byte += 64) __builtin_prefetch((const void *)(ahead + byte));
#endif
}

// q . L of one group, from `first` to `last`, for some lines and `count` vectors: dots (LINES, KEYS_AT_A_TIME).
template <typename A, int BITS, int LINES>
static void dot_levels(const A *queries, const uint8_t *vectors, Long nbytes, Long width, Long first, Long last,
                       int count, A (*dots)[KEYS_AT_A_TIME]) {
    for (int i = 0; i < count; i += TOGETHER) {
        Vec<A> totals[LINES][TOGETHER] = {};
        if (!first) prefetch_codes(vectors + i * nbytes, nbytes, TOGETHER);
        const uint8_t *codes[TOGETHER];  // of fewer vectors, the last one stands for those that are missing
        for (int k = 0; k < TOGETHER; k++) codes[k] = vectors + least(i + k, count - 1) * nbytes;
        for (Long c = first; c < last; c += Lanes<A>::count) {
            Vec<A> query[LINES];
            for (int line = 0; line < LINES; line++) query[line] = load<A>(queries + line * width + c);
            for (int k = 0; k < TOGETHER; k++) {
                const Vec<A> levels = load_levels<BITS>(codes[k], width, c, (A)0);
                for (int line = 0; line < LINES; line++) totals[line][k] += levels * query[line];
            }
        }
        for (int line = 0; line < LINES; line++) sums_of_four<A>(totals[line], dots[line] + i);
    }
}

// Adds sum (weights L) of `COLUMNS` vectors of one group, from `first` on, to `mixed`.
template <typename A, int BITS, int LINES, int COLUMNS>
static ALWAYS_INLINE void mix_columns(const A (*weights)[KEYS_AT_A_TIME], const A *constant, const uint8_t *vectors,
                                      Long nbytes, Long width, Long first, int count, A *mixed) {
    const int lanes = Lanes<A>::count;
    Vec<A> sums[LINES][COLUMNS];
    for (int line = 0; line < LINES; line++)
        for (int v = 0; v < COLUMNS; v++)
            sums[line][v] = load<A>(mixed + line * width + first + v * lanes) + constant[line];
    for (int i = 0; i < count; i++) {
        if (!first) prefetch_codes(vectors + i * nbytes, nbytes, 1);
        for (int v = 0; v < COLUMNS; v++) {
            const Vec<A> levels = load_levels<BITS>(vectors + i * nbytes, width, first + v * lanes, (A)0);
            for (int line = 0; line < LINES; line++) sums[line][v] += weights[line][i] * levels;
        }
    }
    for (int line = 0; line < LINES; line++)
        for (int v = 0; v < COLUMNS; v++) store<A>(sums[line][v], mixed + line * width + first + v * lanes);
}

template <typename A, int BITS, int LINES>
static void mix_levels(const A (*weights)[KEYS_AT_A_TIME], const A *constant, const uint8_t *vectors, Long nbytes,
                       Long width, Long first, Long last, int count, A *mixed) {
    const int lanes = Lanes<A>::count, columns = VECTOR_BYTES == 64 ? 4 : 2;
    Long c = first;
    for (; c + columns * lanes <= last; c += columns * lanes)
        mix_columns<A, BITS, LINES, columns>(weights, constant, vectors, nbytes, width, c, count, mixed);
    for (; c < last; c += lanes)
        mix_columns<A, BITS, LINES, 1>(weights, constant, vectors, nbytes, width, c, count, mixed);
}

#define FOR_BITS(call)                                                                                                \
    switch (codec.bits) {                                                                                             \
    case 8: call(8); break;                                                                                           \
    case 6: call(6); break;                                                                                           \
    case 5: call(5); break;                                                                                           \
    case 4: call(4); break;                                                                                           \
    case 3: call(3); break;                                                                                           \
    }

// Products of some lines with up to KEYS_AT_A_TIME vectors: scores (LINES, KEYS_AT_A_TIME).
template <typename A, int LINES>
static void score_codes(const A *queries, const uint8_t *vectors, const Codec &codec, Long width, int count,
                        A (*scores)[KEYS_AT_A_TIME]) {
    const Long size = width / codec.groups, lanes = Lanes<A>::count;
    A dots[LINES][KEYS_AT_A_TIME] = {}, scales[KEYS_AT_A_TIME] = {}, shifts[KEYS_AT_A_TIME] = {};
    for (Long first = 0; first < width; first += size) {
        load_grids(vectors, codec, width, first / size, count, scales, shifts);
#define DOT(BITS) dot_levels<A, BITS, LINES>(queries, vectors, codec.nbytes, width, first, first + size, count, dots)
        FOR_BITS(DOT)
#undef DOT
        for (int line = 0; line < LINES; line++) {
            Vec<A> total = {};
            for (Long c = first; c < first + size; c += lanes) total += load<A>(queries + line * width + c);
            const A whole = sum<A>(total);
            for (int i = 0; i < KEYS_AT_A_TIME; i += lanes) {
                Vec<A> part = load<A>(scales + i) * load<A>(dots[line] + i) + whole * load<A>(shifts + i);
                if (first) part += load<A>(scores[line] + i);
                store<A>(part, scores[line] + i);
            }
        }
    }
}

// Adds up to KEYS_AT_A_TIME vectors, times their shares of each line, to `mixed`.
template <typename A, int LINES>
static void mix_codes(const A (*shares)[KEYS_AT_A_TIME], const uint8_t *vectors, const Codec &codec, Long width,
                      int count, A *mixed) {
    const Long size = width / codec.groups, lanes = Lanes<A>::count;
    A weights[LINES][KEYS_AT_A_TIME], constant[LINES], scales[KEYS_AT_A_TIME] = {}, shifts[KEYS_AT_A_TIME] = {};
    for (Long first = 0; first < width; first += size) {
        load_grids(vectors, codec, width, first / size, count, scales, shifts);
        for (int line = 0; line < LINES; line++) {
            Vec<A> total = {};
            for (int i = 0; i < KEYS_AT_A_TIME; i += lanes) {
                const Vec<A> share = load<A>(shares[line] + i);
                store<A>(share * load<A>(scales + i), weights[line] + i);
                total += share * load<A>(shifts + i);
            }
            constant[line] = sum<A>(total);
        }
#define MIX(BITS)                                                                                                     \
    mix_levels<A, BITS, LINES>(weights, constant, vectors, codec.nbytes, width, first, first + size, count, mixed)
        FOR_BITS(MIX)
#undef MIX
    }
}
