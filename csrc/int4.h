// Weights of four bits, as torchao packs them: w = (q - 8) * scale + zero, with a scale and a zero for each group of
// inputs. A block holds ROWS_OF_BLOCK rows of W column by column; a byte holds two of them.
#pragma once

#include "storage.h"

static ALWAYS_INLINE Vec<float> from_words(Words words) {
    Vec<float> values;
    memcpy(&values, &words, sizeof values);
    return values;
}
// Scales and zeros of a vector of rows, which are stored in pairs.
static ALWAYS_INLINE void load_pairs(const float *from, Vec<float> *scale, Vec<float> *zero) {
    typedef uint64_t Pairs __attribute__((vector_size(2 * VECTOR_BYTES)));
    Pairs pairs;
    memcpy(&pairs, from, sizeof pairs);
    *scale = from_words(__builtin_convertvector(pairs, Words));
    *zero = from_words(__builtin_convertvector(pairs >> 32, Words));
}
static ALWAYS_INLINE void load_pairs(const bfloat16 *from, Vec<float> *scale, Vec<float> *zero) {
    Words pairs;
    memcpy(&pairs, from, sizeof pairs);
    *scale = from_words(pairs << 16);
    *zero = from_words(pairs & 0xffff0000u);
}

static const int PER_HALF = 2;  // vectors for the low halves of the bytes of a column
static const int ROWS_OF_BLOCK = 2 * PER_HALF * Lanes<float>::count;

// The four bits of each word as numbers.
static ALWAYS_INLINE Vec<float> numbers_of(Words words) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Vec<float>)_mm512_permutexvar_ps((__m512i)words, table);  // reads four bits only
#else
    return __builtin_convertvector((Lanes<float>::Int)(words & 15), Vec<float>);
#endif
}

static ALWAYS_INLINE void load_column(const uint8_t *from, Vec<float> column[2 * PER_HALF]) {
    for (int part = 0; part < PER_HALF; part++) {
        Words both = widen(from + part * Lanes<float>::count);
        column[part] = numbers_of(both);
        column[PER_HALF + part] = numbers_of(both >> 4);
    }
}

template <typename S, int M>
static ALWAYS_INLINE void multiply_block(const float *x, const uint8_t *block, Long K, Long group, const S *scales,
                                         Long stride, float *y, Long N) {
    const int vectors = 2 * PER_HALF, lanes = Lanes<float>::count;
    Vec<float> totals[M][vectors] = {};
    for (Long start = 0; start < K; start += group, scales += stride) {
        Vec<float> products[M][vectors] = {};
        float sums[M] = {};
        for (Long k = start; k < start + group; k++) {
            Vec<float> column[vectors];
            load_column(block + k * (ROWS_OF_BLOCK / 2), column);
            for (int m = 0; m < M; m++) {
                float state = x[m * K + k];
                sums[m] += state;
                for (int v = 0; v < vectors; v++) products[m][v] += state * column[v];
            }
        }
        for (int v = 0; v < vectors; v++) {
            Vec<float> scale, zero;
            load_pairs(scales + 2 * v * lanes, &scale, &zero);
            for (int m = 0; m < M; m++) totals[m][v] += scale * (products[m][v] - 8 * sums[m]) + zero * sums[m];
        }
    }
    for (int m = 0; m < M; m++)
        for (int v = 0; v < vectors; v++) store<float>(totals[m][v], y + m * N + v * lanes);
}

// Products of some rows of x with all rows of one block: found (rows, ROWS_OF_BLOCK).
template <typename S>
static void multiply_codes(const float *x, Long rows, const uint8_t *block, Long K, Long group, const S *scales,
                           Long stride, float *found) {
    for (; rows >= 2; rows -= 2, x += 2 * K, found += 2 * ROWS_OF_BLOCK)
        multiply_block<S, 2>(x, block, K, group, scales, stride, found, ROWS_OF_BLOCK);
    if (rows) multiply_block<S, 1>(x, block, K, group, scales, stride, found, ROWS_OF_BLOCK);
}

// Writes the whole W^T (K, N).
template <typename T, typename S>
static void unpack_int4(const uint8_t *packed, Long N, Long K, Long group, const S *scales, T *y, int threads) {
    const int vectors = 2 * PER_HALF, lanes = Lanes<float>::count;
#pragma omp parallel for num_threads(threads) schedule(static)
    for (Long k = 0; k < K; k++)
        for (Long first = 0; first < N; first += ROWS_OF_BLOCK) {
            Vec<float> column[vectors];
            load_column(packed + first * K / 2 + k * (ROWS_OF_BLOCK / 2), column);
            for (int v = 0; v < vectors; v++) {
                Vec<float> scale, zero;
                load_pairs(scales + 2 * (k / group * N + first + v * lanes), &scale, &zero);
                store<float>(scale * (column[v] - 8) + zero, y + k * N + first + v * lanes);
            }
        }
}
