// Vectors of the processor's width, bfloat16, exponentials, activation functions.
//
// T is the type that numbers are stored in (float, double or bfloat16), A the type of the arithmetic: float, or double
// for double. The code uses vector extensions that GCC and Clang have for every processor. The build defines
// VECTOR_BYTES, the width of a vector.
#pragma once

#include <math.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#include "interface.h"

#ifndef VECTOR_BYTES
#define VECTOR_BYTES 16
#endif

#define ALWAYS_INLINE inline __attribute__((always_inline))

// A vector of A, a vector of integers of the same width, and their number of elements.
template <typename A> struct Lanes;
template <> struct Lanes<float> {
    typedef float Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int32_t Int __attribute__((vector_size(VECTOR_BYTES)));
    static const int count = VECTOR_BYTES / 4;
};
template <> struct Lanes<double> {
    typedef double Vec __attribute__((vector_size(VECTOR_BYTES)));
    typedef int64_t Int __attribute__((vector_size(VECTOR_BYTES)));
    static const int count = VECTOR_BYTES / 8;
};
typedef uint16_t Halves __attribute__((vector_size(VECTOR_BYTES / 2)));
typedef uint32_t Words __attribute__((vector_size(VECTOR_BYTES)));

// Contiguous small integers as 32-bit words. GCC 12 converts them one by one unless the instruction is named.
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
static ALWAYS_INLINE Words widen(const uint16_t *from) { return (Words)_mm512_cvtepu16_epi32(*(__m256i_u *)from); }
static ALWAYS_INLINE Words widen(const uint8_t *from) { return (Words)_mm512_cvtepu8_epi32(*(__m128i_u *)from); }
static ALWAYS_INLINE Words widen(const int8_t *from) { return (Words)_mm512_cvtepi8_epi32(*(__m128i_u *)from); }
#elif VECTOR_BYTES == 32 && defined(__AVX2__)
static ALWAYS_INLINE Words widen(const uint16_t *from) { return (Words)_mm256_cvtepu16_epi32(*(__m128i_u *)from); }
static ALWAYS_INLINE Words widen(const uint8_t *from) {
    return (Words)_mm256_cvtepu8_epi32(_mm_loadl_epi64((__m128i_u *)from));
}
static ALWAYS_INLINE Words widen(const int8_t *from) {
    return (Words)_mm256_cvtepi8_epi32(_mm_loadl_epi64((__m128i_u *)from));
}
#else
template <typename I> static ALWAYS_INLINE Words widen(const I *from) {
    Words words;
    for (int lane = 0; lane < VECTOR_BYTES / 4; lane++) words[lane] = (uint32_t)(int32_t)from[lane];
    return words;
}
#endif

// The type of the arithmetic for numbers that are stored as T.
template <typename T> struct Arithmetic {
    typedef float type;
};
template <> struct Arithmetic<double> {
    typedef double type;
};

template <typename T> using Real = typename Arithmetic<T>::type;

template <typename A> using Vec = typename Lanes<A>::Vec;

template <typename A> static ALWAYS_INLINE Vec<A> broadcast(A value) { return value - Vec<A>{}; }

static ALWAYS_INLINE float to_float(float value) { return value; }
static ALWAYS_INLINE double to_float(double value) { return value; }
static ALWAYS_INLINE float to_float(bfloat16 value) {
    uint32_t bits = (uint32_t)value.bits << 16;
    float wide;
    memcpy(&wide, &bits, 4);
    return wide;
}
static ALWAYS_INLINE void from_float(float value, float *to) { *to = value; }
static ALWAYS_INLINE void from_float(double value, double *to) { *to = value; }
static ALWAYS_INLINE void from_float(float value, bfloat16 *to) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    bool is_nan = value != value;
    to->bits = is_nan ? 0x7fc0 : (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest even
}

// Load a vector from contiguous numbers; store it.
template <typename A> static ALWAYS_INLINE Vec<A> load(const A *from) {
    Vec<A> values;
    memcpy(&values, from, sizeof values);
    return values;
}
template <typename A> static ALWAYS_INLINE Vec<A> load(const bfloat16 *from) {
    Words words = widen(&from->bits) << 16;
    Vec<A> values;
    memcpy(&values, &words, sizeof values);
    return values;
}
template <typename A> static ALWAYS_INLINE void store(Vec<A> values, A *to) { memcpy(to, &values, sizeof values); }
template <typename A> static ALWAYS_INLINE void store(Vec<A> values, bfloat16 *to) {
    Words words;
    memcpy(&words, &values, sizeof words);
    Words rounded = (words + 0x7fff + ((words >> 16) & 1)) >> 16;
    Words is_nan = (Words)(values != values);
    rounded = (is_nan & 0x7fc0) | (~is_nan & rounded);
    Halves halves = __builtin_convertvector(rounded, Halves);
    memcpy(to, &halves, sizeof halves);
}

// Load the first `count` elements of a vector and fill the rest with zeros; store the first `count`.
template <typename A, typename T> static ALWAYS_INLINE Vec<A> load_some(const T *from, int count) {
    if (count >= Lanes<A>::count) return load<A>(from);
    T some[Lanes<A>::count];
    memset(some, 0, sizeof some);
    memcpy(some, from, count * sizeof(T));
    return load<A>(some);
}
template <typename A, typename T> static ALWAYS_INLINE void store_some(Vec<A> values, T *to, int count) {
    if (count >= Lanes<A>::count) return store<A>(values, to);
    T some[Lanes<A>::count];
    store<A>(values, some);
    memcpy(to, some, count * sizeof(T));
}

template <typename A> static ALWAYS_INLINE A sum(Vec<A> values) {
    A totals[Lanes<A>::count];
    memcpy(totals, &values, sizeof values);
    for (int half = Lanes<A>::count / 2; half > 0; half /= 2)
        for (int lane = 0; lane < half; lane++) totals[lane] += totals[lane + half];
    return totals[0];
}
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
template <> ALWAYS_INLINE float sum<float>(Vec<float> values) { return _mm512_reduce_add_ps((__m512)values); }
template <> ALWAYS_INLINE double sum<double>(Vec<double> values) { return _mm512_reduce_add_pd((__m512d)values); }
#endif

// 2^x for x up to 127, exact to a rounding of float; about 0 for x below -126. NaN stays NaN.
static ALWAYS_INLINE Vec<float> power_series(Vec<float> part) {
    Vec<float> y = broadcast<float>(1.535336188319500e-4f);
    y = y * part + 1.339887440266574e-3f;
    y = y * part + 9.618437357674640e-3f;
    y = y * part + 5.550332471162809e-2f;
    y = y * part + 2.402264791363012e-1f;
    y = y * part + 6.931472028550421e-1f;
    return y * part + 1.0f;
}
static ALWAYS_INLINE Vec<float> exp2_of(Vec<float> x) {
    const Vec<float> low = broadcast<float>(-126.0f);
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    x = (Vec<float>)_mm512_max_ps((__m512)low, (__m512)x);  // of a NaN and a number it returns the second operand
    Vec<float> whole = (Vec<float>)_mm512_roundscale_ps((__m512)x, 8);  // 8: round to nearest, without exceptions
    return (Vec<float>)_mm512_scalef_ps((__m512)power_series(x - whole), (__m512)whole);
#else
    const Vec<float> high = broadcast<float>(127.0f);
    x = x < low ? low : x;
    x = x > high ? high : x;
    const Vec<float> shift = broadcast<float>(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
    Vec<float> shifted = x + shift, whole = shifted - shift;
    Lanes<float>::Int power;
    memcpy(&power, &shifted, sizeof power);
    power = (power - 0x4b400000 + 127) << 23;
    Vec<float> scale;
    memcpy(&scale, &power, sizeof scale);
    return power_series(x - whole) * scale;
#endif
}
static ALWAYS_INLINE Vec<double> exp2_of(Vec<double> x) {
    for (int lane = 0; lane < Lanes<double>::count; lane++) x[lane] = exp2(x[lane]);
    return x;
}

// log(1 + x) for x from 0 to 1, exact to a rounding of x itself, by the series of 2 atanh(x / (2 + x)).
static ALWAYS_INLINE Vec<float> log1p_of(Vec<float> x) {
    Vec<float> ratio = x / (x + 2.0f), square = ratio * ratio, total = broadcast<float>(1.0f / 15);
    for (int odd = 13; odd > 0; odd -= 2) total = total * square + 1.0f / odd;
    return 2.0f * ratio * total;
}
static ALWAYS_INLINE Vec<double> log1p_of(Vec<double> x) {
    for (int lane = 0; lane < Lanes<double>::count; lane++) x[lane] = log1p(x[lane]);
    return x;
}

static const double LOG2_E = 1.4426950408889634074;

template <typename A> static ALWAYS_INLINE Vec<A> exp_of(Vec<A> x) { return exp2_of(x * (A)LOG2_E); }
template <typename A> static ALWAYS_INLINE Vec<A> sigmoid(Vec<A> x) { return (A)1 / ((A)1 + exp_of<A>(-x)); }

// The derivative of silu(x) = x sigmoid(x).
template <typename R> static ALWAYS_INLINE Vec<R> silu_slope(Vec<R> x) {
    Vec<R> open = sigmoid<R>(x);
    return open * ((R)1 + x * ((R)1 - open));
}

// log(1 + e^x), and x itself above 20, as in PyTorch.
template <typename R> static ALWAYS_INLINE Vec<R> softplus(Vec<R> x) {
    Vec<R> size = x<(R)0 ? -x : x, above = x>(R) 0 ? x : Vec<R>{};
    return x > (R)20 ? x : above + log1p_of(exp_of<R>(-size));
}

static ALWAYS_INLINE int least(int one, Long other) { return other < one ? (int)other : one; }
