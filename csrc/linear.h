// Products with few rows: y (rows, N) = x (rows, K) W^T + bias, for weights that are plain, int8 by row or int4 by
// group.
//
// A product reads each weight once. The products of a layer that have the same input are computed together.
#pragma once

#include "int4.h"
#include "storage.h"
#include "threads.h"

static const int READ_AHEAD = 4096;  // bytes

static ALWAYS_INLINE Vec<float> load_weights(const int8_t *from) {
    return __builtin_convertvector((Lanes<float>::Int)widen(from), Vec<float>);
}
static ALWAYS_INLINE Vec<float> load_weights(const float *from) { return load<float>(from); }
static ALWAYS_INLINE Vec<float> load_weights(const bfloat16 *from) { return load<float>(from); }
static ALWAYS_INLINE Vec<double> load_weights(const double *from) { return load<double>(from); }

// `M` rows of x times one row of W, which is read sequentially. The order of additions is the same for any M.
template <typename A, typename W, int M>
static ALWAYS_INLINE void multiply(const A *x, const W *weights, Long K, A *y, Long stride) {
    const int lanes = Lanes<A>::count, parts = 4;
    Vec<A> totals[M][parts] = {};
    Long k = 0;
    for (; k + parts * lanes <= K; k += parts * lanes)
        for (int part = 0; part < parts; part++) {
            __builtin_prefetch((const char *)(weights + k + part * lanes) + READ_AHEAD);
            Vec<A> column = load_weights(weights + k + part * lanes);
            for (int m = 0; m < M; m++) totals[m][part] += load<A>(x + m * K + k + part * lanes) * column;
        }
    for (; k < K; k += lanes) {
        W some[lanes];
        const int count = least(lanes, K - k);
        memset(some, 0, sizeof some);
        memcpy(some, weights + k, count * sizeof(W));
        Vec<A> column = load_weights(some);
        for (int m = 0; m < M; m++) totals[m][0] += load_some<A>(x + m * K + k, count) * column;
    }
    for (int m = 0; m < M; m++) y[m * stride] = sum<A>((totals[m][0] + totals[m][1]) + (totals[m][2] + totals[m][3]));
}

template <typename A, typename W, int M>
static void multiply_rows(const A *x, const W *weights, Long first, Long last, Long K, A *y, Long N) {
    for (Long n = first; n < last; n++) multiply<A, W, M>(x, weights + n * K, K, y + n, N);
}

template <typename A, typename W>
static void multiply_any(const A *x, Long rows, const W *weights, Long first, Long last, Long K, A *y, Long N) {
    for (; rows >= 4; rows -= 4, x += 4 * K, y += 4 * N) multiply_rows<A, W, 4>(x, weights, first, last, K, y, N);
    if (rows == 3) multiply_rows<A, W, 3>(x, weights, first, last, K, y, N);
    if (rows == 2) multiply_rows<A, W, 2>(x, weights, first, last, K, y, N);
    if (rows == 1) multiply_rows<A, W, 1>(x, weights, first, last, K, y, N);
}

// ---- the products of a layer

// One product of several that are computed together.
template <typename A> struct Product {
    const Weight *weight;
    const A *x;
    A *y;
};

static const int ROWS_AT_A_TIME = 32;  // rows of W, if they are contiguous
static const int MOST_AT_A_TIME = ROWS_OF_BLOCK > ROWS_AT_A_TIME ? ROWS_OF_BLOCK : ROWS_AT_A_TIME;

static Long rows_at_a_time(const Weight *w) { return w->kind == INT4 ? ROWS_OF_BLOCK : ROWS_AT_A_TIME; }

static void multiply_coded(const Weight *, const double *, Long, Long, Long, double *) {}
static void multiply_coded(const Weight *w, const float *x, Long rows, Long first, Long count, float *found) {
    const Long K = w->inputs, N = w->outputs;
    if (w->kind == INT8) {
        multiply_any<float, int8_t>(x, rows, (const int8_t *)w->data + first * K, 0, count, K, found, ROWS_AT_A_TIME);
        const float *scale = (const float *)w->scale + first;
        for (Long m = 0; m < rows; m++)
            for (Long n = 0; n < count; n++) found[m * ROWS_AT_A_TIME + n] *= scale[n];
        return;
    }
    const uint8_t *block = (const uint8_t *)w->data + first * K / 2;
    if (w->has_narrow_scales)
        multiply_codes(x, rows, block, K, w->group, (const bfloat16 *)w->scale + 2 * first, 2 * N, found);
    else multiply_codes(x, rows, block, K, w->group, (const float *)w->scale + 2 * first, 2 * N, found);
}

// y = x W^T + bias for all products; with a residual, y = residual + x W^T + bias.
template <typename T, typename A>
TEAM void products(const Product<A> *all, int count, Long rows, const A *residual = 0) {
    Long ends[MOST_TOGETHER], blocks = 0;
    for (int i = 0; i < count; i++) {
        const Long size = rows_at_a_time(all[i].weight);
        ends[i] = blocks += (all[i].weight->outputs + size - 1) / size;
    }
#pragma omp for schedule(static)
    for (Long number = 0; number < blocks; number++) {
        Long block = number;
        const int i = owner_of(&block, ends);
        const Weight *w = all[i].weight;
        const T *bias = (const T *)w->bias;
        const Long N = w->outputs, K = w->inputs, size = rows_at_a_time(w);
        const Long first = block * size, width = least((int)size, N - first);
        A found[MOST_ROWS * MOST_AT_A_TIME];
        if (w->kind == PLAIN)
            multiply_any<A, T>(all[i].x, rows, (const T *)w->data + first * K, 0, width, K, found, size);
        else multiply_coded(w, all[i].x, rows, first, width, found);
        for (Long m = 0; m < rows; m++) {
            A *to = all[i].y + m * N + first;
            for (Long n = 0; n < width; n++) {
                A value = as_stored<T>(found[m * size + n] + (bias ? to_float(bias[first + n]) : (A)0));
                to[n] = residual ? as_stored<T>(residual[m * N + first + n] + value) : value;
            }
        }
    }
}

template <typename T> static void linear(const T *x, Long rows, const Weight *weight, T *y, int threads) {
    typedef Real<T> A;
    A *wide = widened<A>(x, rows * weight->inputs), *found = room_for<A>(y, rows * weight->outputs);
    const Product<A> product = {weight, wide, found};
#pragma omp parallel num_threads(threads) if (weight -> outputs * weight->inputs > SMALL)
    products<T>(&product, 1, rows);
    narrowed(found, rows * weight->outputs, y);
    dropped(wide, x);
}
