// Recurrent states in 8 bits, bit for bit as `ops_state_codes_mambaformer.py` computes them. The numbers of a group
// share a power of two.
#pragma once

#include "threads.h"

static const int LOWEST_EXPONENT = -126, HIGHEST_EXPONENT = 121, NO_NUMBER = -128;

// How a number is stored: bits of its mantissa, and the bias of exponents of fractions from 1/2 to 1. Adding MAGIC and
// subtracting it rounds to an integer.
template <typename R> struct Bits;
template <> struct Bits<float> {
    typedef int32_t Int;
    static const int mantissa = 23, bias = 126;
    static constexpr float MAGIC = 12582912.0f;  // 1.5 * 2^23
};
template <> struct Bits<double> {
    typedef int64_t Int;
    static const int mantissa = 52, bias = 1022;
    static constexpr double MAGIC = 6755399441055744.0;  // 1.5 * 2^52
};

static ALWAYS_INLINE float power_of_two(int exponent) {
    int32_t bits = (exponent + 127) << 23;
    float power;
    memcpy(&power, &bits, 4);
    return power;
}

// The bits of the largest absolute value; those of infinity and NaN are larger than those of numbers.
template <typename R> static ALWAYS_INLINE typename Bits<R>::Int largest_of(const R *group, Long numbers) {
    typedef typename Lanes<R>::Int Int;
    typename Bits<R>::Int lanes[Lanes<R>::count], largest = 0;
    Int most = {};
    for (Long first = 0; first < numbers; first += Lanes<R>::count) {
        Vec<R> values = load_some<R>(group + first, least(Lanes<R>::count, numbers - first));
        Int bits;
        memcpy(&bits, &values, sizeof bits);
        bits &= ~((typename Bits<R>::Int)1 << (8 * sizeof(R) - 1));
        most = bits > most ? bits : most;
    }
    memcpy(lanes, &most, sizeof most);
    for (int lane = 0; lane < Lanes<R>::count; lane++) largest = lanes[lane] > largest ? lanes[lane] : largest;
    return largest;
}
template <typename R> static ALWAYS_INLINE int exponent_of(const R *group, Long numbers) {
    typedef typename Bits<R>::Int Int;
    const Int one = (Int)1 << Bits<R>::mantissa, bits = largest_of<R>(group, numbers);
    if (bits == 0) return -7;
    R largest;
    memcpy(&largest, &bits, sizeof bits);
    if (!(largest <= 127 * (R)power_of_two(HIGHEST_EXPONENT))) return NO_NUMBER;
    int exponent = (int)(bits >> Bits<R>::mantissa) - Bits<R>::bias - 7 + ((bits & (one - 1)) > one / 64 * 63);
    return exponent < LOWEST_EXPONENT ? LOWEST_EXPONENT : exponent;
}

// From 0 to 1 for each number from `index` on; `token` is a multiple of the position.
static ALWAYS_INLINE uint32_t hash_of_position(Long position) { return (uint32_t)position * 0x9E3779B1u; }
template <typename Word> static ALWAYS_INLINE Word mix(Word mixed) {
    mixed = (mixed ^ (mixed >> 16)) * 0x7FEB352Du;
    mixed = (mixed ^ (mixed >> 15)) * 0x846CA68Bu;
    return (mixed ^ (mixed >> 16)) >> 8;
}
template <typename R> static ALWAYS_INLINE Vec<R> thresholds_of(uint32_t token, uint32_t index);
template <> ALWAYS_INLINE Vec<float> thresholds_of<float>(uint32_t token, uint32_t index) {
    Words numbers;
    for (uint32_t lane = 0; lane < VECTOR_BYTES / 4; lane++) numbers[lane] = index + lane;
    Words mixed = mix<Words>((numbers * 0x85EBCA77u + 0x165667B1u) ^ token);
    return __builtin_convertvector((Lanes<float>::Int)mixed, Vec<float>) * 0x1p-24f;
}
template <> ALWAYS_INLINE Vec<double> thresholds_of<double>(uint32_t token, uint32_t index) {
    Vec<double> thresholds;
    for (int lane = 0; lane < Lanes<double>::count; lane++)
        thresholds[lane] = mix<uint32_t>(((index + lane) * 0x85EBCA77u + 0x165667B1u) ^ token) * 0x1p-24;
    return thresholds;
}

// Rounds the numbers of a group, which are those from `index` on in the state of a row.
template <typename R>
static ALWAYS_INLINE void round_group(const R *group, Long numbers, uint32_t token, Long index, R *to) {
    const int exponent = exponent_of<R>(group, numbers);
    const bool is_number = exponent != NO_NUMBER;
    const R step = is_number ? power_of_two(exponent) : NAN, inverse = is_number ? power_of_two(-exponent) : 0;
    for (Long first = 0; first < numbers; first += Lanes<R>::count) {
        const int count = least(Lanes<R>::count, numbers - first);
        Vec<R> levels = load_some<R>(group + first, count) * inverse;
        levels = levels == levels ? levels : Vec<R>{};
        Vec<R> low = __builtin_convertvector(__builtin_convertvector(levels, typename Lanes<R>::Int), Vec<R>);
        low = low > levels ? low - 1 : low;
        Vec<R> is_up = levels - low > thresholds_of<R>(token, (uint32_t)(index + first)) ? broadcast<R>(1) : Vec<R>{};
        store_some<R>((low + is_up) * step, to + first, count);
    }
}

template <typename R>
static void round_states(const R *states, Long rows, Long groups, Long numbers, const Long *positions, R *to,
                         int threads) {
#pragma omp parallel for collapse(2) num_threads(threads) if (rows * groups * numbers > FEW)
    for (Long row = 0; row < rows; row++)
        for (Long group = 0; group < groups; group++) {
            const Long own = (row * groups + group) * numbers;
            round_group<R>(states + own, numbers, hash_of_position(positions[row]), group * numbers, to + own);
        }
}

template <typename R>
static void encode_states(const R *states, Long groups, Long numbers, int8_t *codes, int threads) {
#pragma omp parallel for num_threads(threads) if (groups * numbers > FEW)
    for (Long group = 0; group < groups; group++) {
        const R *from = states + group * numbers;
        int8_t *to = codes + group * (numbers + 1);
        const int exponent = exponent_of<R>(from, numbers);
        const R inverse = exponent == NO_NUMBER ? 0 : power_of_two(-exponent);
        for (Long n = 0; n < numbers; n++)
            to[n] = exponent == NO_NUMBER ? 0 : (int8_t)(int)((from[n] * inverse + Bits<R>::MAGIC) - Bits<R>::MAGIC);
        to[numbers] = (int8_t)exponent;
    }
}

template <typename R>
static void decode_states(const int8_t *codes, Long groups, Long numbers, R *states, int threads) {
#pragma omp parallel for num_threads(threads) if (groups * numbers > FEW)
    for (Long group = 0; group < groups; group++) {
        const int8_t *from = codes + group * (numbers + 1);
        const int exponent = from[numbers] < LOWEST_EXPONENT ? LOWEST_EXPONENT : from[numbers];
        const R step = from[numbers] == NO_NUMBER ? NAN : power_of_two(exponent);
        for (Long n = 0; n < numbers; n++) states[group * numbers + n] = from[n] * step;
    }
}
