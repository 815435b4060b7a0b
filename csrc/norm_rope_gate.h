// RMS norm, rotary position embedding, gated activation.
//
// X is A for activations between kernels, or T for tensors in their storage; y may be x.
#pragma once

#include "storage.h"
#include "threads.h"

template <typename T, typename X>
static void rms_norm_of_row(const X *x, Long width, const T *weight, double eps, X *y) {
    typedef Real<T> A;
    const int lanes = Lanes<A>::count;
    Vec<A> squares = {};
    for (Long i = 0; i < width; i += lanes) {
        Vec<A> values = load_some<A>(x + i, least(lanes, width - i));
        squares += values * values;
    }
    A factor = (A)1 / (A)sqrt(sum<A>(squares) / (A)width + (A)eps);
    for (Long i = 0; i < width; i += lanes) {
        const int count = least(lanes, width - i);
        T rounded[lanes];  // the norm rounds to T before it multiplies by the weight
        store<A>(load_some<A>(x + i, count) * factor, rounded);
        store_rounded<T, A>(load<A>(rounded) * load_some<A>(weight + i, count), y + i, count);
    }
}

template <typename T, typename X>
TEAM void rms_norm(const X *x, Long rows, Long width, const T *weight, double eps, X *y) {
#pragma omp for schedule(static)
    for (Long m = 0; m < rows; m++) rms_norm_of_row<T>(x + m * width, width, weight, eps, y + m * width);
}

// Rotates one head of one token, which has 2 half numbers.
template <typename T, typename X>
static ALWAYS_INLINE void turn(const X *from, Long half, const T *cosine, const T *sine, X *to) {
    typedef Real<T> A;
    for (Long i = 0; i < half; i++) {
        A first = to_float(from[i]), second = to_float(from[half + i]);
        A one = first * to_float(cosine[i]) - second * to_float(sine[i]);
        A other = second * to_float(cosine[half + i]) + first * to_float(sine[half + i]);
        from_float(as_stored<T>(one), to + i);
        from_float(as_stored<T>(other), to + half + i);
    }
}

template <typename T, typename X> TEAM void gate(const X *gates, const X *x, Long count, X *y) {
    typedef Real<T> A;
    const int lanes = Lanes<A>::count;
#pragma omp for schedule(static)
    for (Long i = 0; i < count; i += lanes) {
        const int some = least(lanes, count - i);
        Vec<A> opened = load_some<A>(gates + i, some);
        store_rounded<T, A>(opened * sigmoid<A>(opened) * load_some<A>(x + i, some), y + i, some);
    }
}

// x (rows, heads, tokens, 2 half) with strides; cosines and sines (rows or 1, tokens, 2 half); y is contiguous.
template <typename T>
static void rotate_all(const T *x, Long rows, Long heads, Long tokens, Long half, const Long *stride, const T *cosines,
                       const T *sines, Long row_stride, T *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(3) if (rows * heads * tokens * half > FEW)
    for (Long row = 0; row < rows; row++)
        for (Long head = 0; head < heads; head++)
            for (Long token = 0; token < tokens; token++) {
                const Long angle = row * row_stride + token * 2 * half;
                turn<T>(x + row * stride[0] + head * stride[1] + token * stride[2], half, cosines + angle,
                        sines + angle, y + ((row * heads + head) * tokens + token) * 2 * half);
            }
}
