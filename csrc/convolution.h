// Causal depthwise convolution with silu, forward and backward.
//
// Inputs are numbered from the first one of the initial state, so token t reads inputs t to t + K - 1. T is the type
// that activations are stored in, R the type of the arithmetic.
#pragma once

#include "threads.h"

template <typename T> static const T *input_at(const Convolution &conv, Long row, Long input) {
    Long kept = conv.taps - 1;
    if (input >= kept) return at<T>(conv.x, row, input - kept);
    return conv.initial_state ? (const T *)conv.initial_state + (row * kept + input) * conv.shares.channels : 0;
}

template <typename R> struct Taps {
    Vec<R> weight[MOST_TAPS], bias;
};

template <typename R>
static ALWAYS_INLINE void load_taps(const Convolution &conv, Long channel, int lanes, Taps<R> &taps) {
    for (int tap = 0; tap < conv.taps; tap++) taps.weight[tap] = Vec<R>{};
    const R *weight = (const R *)conv.weight + channel * conv.taps;
    for (int lane = 0; lane < lanes; lane++)
        for (int tap = 0; tap < conv.taps; tap++) taps.weight[tap][lane] = weight[lane * conv.taps + tap];
    taps.bias = conv.bias ? load_some<R>((const R *)conv.bias + channel, lanes) : Vec<R>{};
}

template <typename T, typename R>
static ALWAYS_INLINE void load_inputs(const Convolution &conv, Long row, Long channel, int lanes, Long first,
                                      int count, Vec<R> *inputs) {
    Long stop = length_of(conv.shares, row) + conv.taps - 1;
    for (int each = 0; each < count; each++) {
        Long input = first + each;
        const T *from = input < 0 || input >= stop ? 0 : input_at<T>(conv, row, input);
        inputs[each] = from ? load_some<R>(from + channel, lanes) : Vec<R>{};
    }
}

// The first tap of a token that reads an input of the token's own sequence.
static ALWAYS_INLINE int first_tap(const Convolution &conv, Long row, Long token) {
    if (!conv.shares.positions) return 0;
    Long missing = conv.taps - 1 - position_of(conv.shares, row, token);
    return missing > 0 ? (int)missing : 0;
}

template <typename R>
static ALWAYS_INLINE Vec<R> convolve(const Taps<R> &taps, int first, int count, const Vec<R> *inputs) {
    Vec<R> total = taps.bias;
    for (int tap = first; tap < count; tap++) total += taps.weight[tap] * inputs[tap];
    return total;
}

template <typename T>
static ALWAYS_INLINE void convolve_chunk(const Convolution &conv, Long row, Long channel, int lanes, Long start,
                                         int tokens) {
    typedef Real<T> R;
    Taps<R> taps;
    Vec<R> inputs[CHUNK + MOST_TAPS];
    load_taps<R>(conv, channel, lanes, taps);
    load_inputs<T, R>(conv, row, channel, lanes, start, tokens + conv.taps - 1, inputs);
    for (int token = 0; token < tokens; token++) {
        Vec<R> total = convolve<R>(taps, first_tap(conv, row, start + token), conv.taps, inputs + token);
        store_some<R>(total * sigmoid<R>(total), at<T>(conv.y, row, start + token) + channel, lanes);
    }
}

template <typename T> static void convolve_share(const Convolution &conv, Long row, Long first, Long last) {
    Long length = length_of(conv.shares, row), kept = conv.taps - 1;
    for (Long start = 0; start < length; start += CHUNK)
        for (Long channel = first; channel < last; channel += Lanes<Real<T>>::count)
            convolve_chunk<T>(conv, row, channel, least(Lanes<Real<T>>::count, last - channel), start,
                              least(CHUNK, length - start));
    clear<T>(conv.y, row, length, conv.shares.length, first, last);
    for (Long input = 0; input < kept && first < last; input++) {
        const T *from = input_at<T>(conv, row, length + input);
        T *to = (T *)conv.final_state + (row * kept + input) * conv.shares.channels;
        copy_or_clear<T>(from ? from + first : 0, to + first, last - first);
    }
}

// Gradients of some inputs, from the tokens that read them, and the share of these tokens in the gradients of the
// taps.
template <typename T>
static ALWAYS_INLINE void convolve_chunk_back(const ConvolutionGradient &gradient, Long row, Long channel, int lanes,
                                              Long start, int count) {
    typedef Real<T> R;
    const Convolution &conv = gradient.of;
    const Long kept = conv.taps - 1, length = length_of(conv.shares, row), channels = conv.shares.channels;
    const T *dfinal_state = gradient.dfinal_state ? (const T *)gradient.dfinal_state + row * kept * channels : 0;
    Taps<R> taps, dtaps = {};
    Vec<R> inputs[CHUNK + 2 * MOST_TAPS], dtotal[CHUNK + MOST_TAPS];
    int first[CHUNK + MOST_TAPS];
    load_taps<R>(conv, channel, lanes, taps);
    load_inputs<T, R>(conv, row, channel, lanes, start - kept, count + 2 * kept, inputs);
    for (int each = 0; each < count + kept; each++) {
        Long token = start - kept + each;
        dtotal[each] = Vec<R>{}, first[each] = 0;
        if (token < 0 || token >= length || !gradient.dy.data) continue;
        first[each] = first_tap(conv, row, token);
        Vec<R> total = convolve<R>(taps, first[each], conv.taps, inputs + each);
        Vec<R> dy = load_some<R>(at<const T>(gradient.dy, row, token) + channel, lanes);
        dtotal[each] = dy * silu_slope<R>(total);
        if (each < kept) continue;
        dtaps.bias += dtotal[each];
        for (int tap = first[each]; tap < conv.taps; tap++) dtaps.weight[tap] += dtotal[each] * inputs[each + tap];
    }
    for (int each = 0; each < count; each++) {
        Long input = start + each;
        Vec<R> dinput = {};
        for (int tap = 0; tap < conv.taps; tap++)
            if (tap >= first[each + kept - tap]) dinput += taps.weight[tap] * dtotal[each + kept - tap];
        if (dfinal_state && input >= length)
            dinput += load_some<R>(dfinal_state + (input - length) * channels + channel, lanes);
        T *to = input >= kept ? at<T>(gradient.dx, row, input - kept)
                              : (T *)gradient.dinitial_state + (row * kept + input) * channels;
        store_some<R>(dinput, to + channel, lanes);
    }
    for (int lane = 0; lane < lanes; lane++) {
        Long own = row * channels + channel + lane;
        ((R *)gradient.dbias)[own] += dtaps.bias[lane];
        for (int tap = 0; tap < conv.taps; tap++)
            ((R *)gradient.dweight)[own * conv.taps + tap] += dtaps.weight[tap][lane];
    }
}

template <typename T>
static void convolve_share_back(const ConvolutionGradient &gradient, Long row, Long first, Long last) {
    typedef Real<T> R;
    const Convolution &conv = gradient.of;
    Long length = length_of(conv.shares, row), inputs = length + conv.taps - 1;
    for (Long start = 0; start < inputs; start += CHUNK)
        for (Long channel = first; channel < last; channel += Lanes<R>::count)
            convolve_chunk_back<T>(gradient, row, channel, least(Lanes<R>::count, last - channel), start,
                                   least(CHUNK, inputs - start));
    clear<T>(gradient.dx, row, length, conv.shares.length, first, last);
}
