"""Causal convolution and selective scan on CPUs, as C++ that is compiled where it is first used; forward and backward.

Letters are those of the table in `ops_mambaformer`. Activations are read where they lie, halves of a projection too,
and a share of the work is some channels of one row. The scan goes over them in chunks of tokens: a vector holds the N
numbers of one channel, so states, A, B and C are read as they are stored, and one token costs no more than its
arithmetic. Training keeps the states before each chunk and computes those inside once more on the way back.
"""

import ctypes
import math
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from .compiler_mambaformer import cpu_library

# What activations may be stored in, by the ending of the functions below; the arithmetic is in float or double.
STORED = {torch.float32: "float", torch.bfloat16: "bfloat16", torch.float64: "double"}
MOST_TAPS = 16
CHUNK = 32  # tokens; at 16 numbers a channel, the states that training keeps weigh half of u
# So many exponentials are worth a second thread.
PARALLEL_WORK = 100_000

_CONSTANTS = f"static const int CHUNK = {CHUNK}, MOST_TAPS = {MOST_TAPS};\n"

SOURCE = (
    _CONSTANTS
    + r"""
// T is what activations are stored in, R what is computed in. Letters: see the table in ops_mambaformer.py.
template <typename T> using Real = typename Arithmetic<T>::type;

// A tensor (rows, tokens, channels or numbers) whose last axis adjoins; `data` is null where it was left out.
struct View { void *data; Long row, token; };

template <typename T> static ALWAYS_INLINE T *at(const View &view, Long row, Long token) {
    return (T *)view.data + row * view.row + token * view.token;
}

// Rows are cut into `splits` shares of whole vectors of channels, so that every thread has something to do.
struct Shares { const Long *lengths; Long rows, length, channels, splits, threads; };

static Long length_of(const Shares &shares, Long row) {
    if (!shares.lengths) return shares.length;
    Long length = shares.lengths[row];
    return length < 0 ? 0 : length < shares.length ? length : shares.length;
}

template <typename R, typename Work> static void for_each_share(const Shares &shares, Work work) {
    const Long lanes = Lanes<R>::count, blocks = (shares.channels + lanes - 1) / lanes;
#pragma omp parallel for schedule(static) num_threads((int)shares.threads) if (shares.threads > 1)
    for (Long share = 0; share < shares.rows * shares.splits; share++) {
        Long row = share / shares.splits, split = share % shares.splits;
        Long first = blocks * split / shares.splits * lanes, last = blocks * (split + 1) / shares.splits * lanes;
        work(row, split, first, last < shares.channels ? last : shares.channels);
    }
}

template <typename T>
static void clear(const View &view, Long row, Long start, Long stop, Long first, Long last) {
    if (!view.data || first >= last) return;
    for (Long token = start; token < stop; token++)
        memset(at<T>(view, row, token) + first, 0, (last - first) * sizeof(T));
}

template <typename R> static void copy_or_clear(const R *from, R *to, Long count) {
    if (from) memcpy(to, from, count * sizeof(R));
    else memset(to, 0, count * sizeof(R));
}

// What silu(x) = x sigmoid(x) grows by.
template <typename R> static ALWAYS_INLINE Vec<R> silu_slope(Vec<R> x) {
    Vec<R> open = sigmoid<R>(x);
    return open * ((R)1 + x * ((R)1 - open));
}

// ---- causal convolution: inputs are numbered with those of the state first, so token t meets inputs t to t + K - 1

struct Convolution {
    View x, y;
    const void *weight, *bias;               // (D, K) and (D,) of R
    const void *initial_state; void *final_state;  // (B, K - 1, D) of T
    Long taps;
    Shares shares;
};

struct ConvolutionGradient {
    Convolution of;
    View dy, dx;
    const void *dfinal_state;
    void *dweight, *dbias, *dinitial_state;  // (B, D, K), (B, D) of R; (B, K - 1, D) of T
};

template <typename T> static const T *input_at(const Convolution &conv, Long row, Long input) {
    Long kept = conv.taps - 1;
    if (input >= kept) return at<T>(conv.x, row, input - kept);
    return conv.initial_state ? (const T *)conv.initial_state + (row * kept + input) * conv.shares.channels : 0;
}

template <typename R> struct Taps { Vec<R> weight[MOST_TAPS], bias; };

template <typename R>
static ALWAYS_INLINE void load_taps(const Convolution &conv, Long channel, int lanes, Taps<R> &taps) {
    for (int tap = 0; tap < conv.taps; tap++) taps.weight[tap] = Vec<R>{};
    const R *weight = (const R *)conv.weight + channel * conv.taps;
    for (int lane = 0; lane < lanes; lane++)
        for (int tap = 0; tap < conv.taps; tap++) taps.weight[tap][lane] = weight[lane * conv.taps + tap];
    taps.bias = conv.bias ? load_some<R>((const R *)conv.bias + channel, lanes) : Vec<R>{};
}

template <typename T, typename R>
static ALWAYS_INLINE void load_inputs(
    const Convolution &conv, Long row, Long channel, int lanes, Long first, int count, Vec<R> *inputs
) {
    Long stop = length_of(conv.shares, row) + conv.taps - 1;
    for (int each = 0; each < count; each++) {
        Long input = first + each;
        const T *from = input < 0 || input >= stop ? 0 : input_at<T>(conv, row, input);
        inputs[each] = from ? load_some<R>(from + channel, lanes) : Vec<R>{};
    }
}

template <typename R> static ALWAYS_INLINE Vec<R> convolve(const Taps<R> &taps, int count, const Vec<R> *inputs) {
    Vec<R> total = taps.bias;
    for (int tap = 0; tap < count; tap++) total += taps.weight[tap] * inputs[tap];
    return total;
}

template <typename T>
static ALWAYS_INLINE void convolve_chunk(
    const Convolution &conv, Long row, Long channel, int lanes, Long start, int tokens
) {
    typedef Real<T> R;
    Taps<R> taps;
    Vec<R> inputs[CHUNK + MOST_TAPS];
    load_taps<R>(conv, channel, lanes, taps);
    load_inputs<T, R>(conv, row, channel, lanes, start, tokens + conv.taps - 1, inputs);
    for (int token = 0; token < tokens; token++) {
        Vec<R> total = convolve<R>(taps, conv.taps, inputs + token);
        store_some<R>(total * sigmoid<R>(total), at<T>(conv.y, row, start + token) + channel, lanes);
    }
}

template <typename T> static void convolve_share(const Convolution &conv, Long row, Long first, Long last) {
    Long length = length_of(conv.shares, row), kept = conv.taps - 1;
    for (Long start = 0; start < length; start += CHUNK)
        for (Long channel = first; channel < last; channel += Lanes<Real<T>>::count)
            convolve_chunk<T>(
                conv, row, channel, least(Lanes<Real<T>>::count, last - channel), start, least(CHUNK, length - start)
            );
    clear<T>(conv.y, row, length, conv.shares.length, first, last);
    for (Long input = 0; input < kept && first < last; input++) {
        const T *from = input_at<T>(conv, row, length + input);
        T *to = (T *)conv.final_state + (row * kept + input) * conv.shares.channels;
        copy_or_clear<T>(from ? from + first : 0, to + first, last - first);
    }
}

// Some inputs' gradients, from the tokens that meet them; and their own tokens' part of the gradients of the taps.
template <typename T>
static ALWAYS_INLINE void convolve_chunk_back(
    const ConvolutionGradient &gradient, Long row, Long channel, int lanes, Long start, int count
) {
    typedef Real<T> R;
    const Convolution &conv = gradient.of;
    const Long kept = conv.taps - 1, length = length_of(conv.shares, row), channels = conv.shares.channels;
    const T *dfinal_state = gradient.dfinal_state ? (const T *)gradient.dfinal_state + row * kept * channels : 0;
    Taps<R> taps, dtaps = {};
    Vec<R> inputs[CHUNK + 2 * MOST_TAPS], dtotal[CHUNK + MOST_TAPS];
    load_taps<R>(conv, channel, lanes, taps);
    load_inputs<T, R>(conv, row, channel, lanes, start - kept, count + 2 * kept, inputs);
    for (int each = 0; each < count + kept; each++) {
        Long token = start - kept + each;
        dtotal[each] = Vec<R>{};
        if (token < 0 || token >= length || !gradient.dy.data) continue;
        Vec<R> total = convolve<R>(taps, conv.taps, inputs + each);
        Vec<R> dy = load_some<R>(at<const T>(gradient.dy, row, token) + channel, lanes);
        dtotal[each] = dy * silu_slope<R>(total);
        if (each < kept) continue;
        dtaps.bias += dtotal[each];
        for (int tap = 0; tap < conv.taps; tap++) dtaps.weight[tap] += dtotal[each] * inputs[each + tap];
    }
    for (int each = 0; each < count; each++) {
        Long input = start + each;
        Vec<R> dinput = {};
        for (int tap = 0; tap < conv.taps; tap++) dinput += taps.weight[tap] * dtotal[each + kept - tap];
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
            convolve_chunk_back<T>(
                gradient, row, channel, least(Lanes<R>::count, last - channel), start, least(CHUNK, inputs - start)
            );
    clear<T>(gradient.dx, row, length, conv.shares.length, first, last);
}

// ---- selective scan

struct Scan {
    View u, dt, B, C, gate, y;
    const void *A, *D, *initial_state;  // all of R
    void *final_state, *checkpoints;    // (B, D, N), and in training (B, chunks, D, N): the states before each chunk
    Long numbers, dt_softplus;
    Shares shares;
};

struct ScanGradient {
    Scan of;
    View dy, du, ddt, dgate;
    const void *dfinal_state;
    void *dA, *dB, *dC, *dD, *dinitial_state;  // (B, D, N), twice (B, splits, L, N), (B, D), (B, D, N), all of R
};

// Tokens of one chunk as some channels see them: a vector of N numbers each (B, C), or of channels (the others).
template <typename R> struct Chunk {
    Long row, start, channel;
    int tokens, lanes;
    Vec<R> B[CHUNK], C[CHUNK], u[CHUNK], dt[CHUNK], dt_u[CHUNK], y[CHUNK], elapsed;
};

// The chunk's channels of a token, zeros where the tensor was left out; and back.
template <typename T, typename R>
static ALWAYS_INLINE Vec<R> channels_of(const View &view, const Chunk<R> &chunk, int token) {
    if (!view.data) return Vec<R>{};
    return load_some<R>(at<const T>(view, chunk.row, chunk.start + token) + chunk.channel, chunk.lanes);
}
template <typename T, typename R>
static ALWAYS_INLINE void store_channels(Vec<R> values, const View &view, const Chunk<R> &chunk, int token) {
    store_some<R>(values, at<T>(view, chunk.row, chunk.start + token) + chunk.channel, chunk.lanes);
}

// Like torch: log(1 + e^x), and x itself above 20.
template <typename R> static ALWAYS_INLINE Vec<R> softplus(Vec<R> x) {
    Vec<R> size = x < (R)0 ? -x : x, above = x > (R)0 ? x : Vec<R>{};
    return x > (R)20 ? x : above + log1p_of(exp_of<R>(-size));
}

template <typename T, typename R> static ALWAYS_INLINE void load_tokens(const Scan &scan, Chunk<R> &chunk) {
    Vec<R> D = scan.D ? load_some<R>((const R *)scan.D + chunk.channel, chunk.lanes) : Vec<R>{};
    chunk.elapsed = Vec<R>{};
    for (int token = 0; token < chunk.tokens; token++) {
        Vec<R> dt = channels_of<T, R>(scan.dt, chunk, token), u = channels_of<T, R>(scan.u, chunk, token);
        if (scan.dt_softplus) dt = softplus<R>(dt);
        chunk.elapsed += dt;
        chunk.u[token] = u, chunk.dt[token] = dt, chunk.dt_u[token] = dt * u, chunk.y[token] = D * u;
    }
}

template <typename T, typename R>
static ALWAYS_INLINE void load_numbers(const Scan &scan, Long first, int count, Chunk<R> &chunk) {
    for (int token = 0; token < chunk.tokens; token++) {
        chunk.B[token] = load_some<R>(at<const T>(scan.B, chunk.row, chunk.start + token) + first, count);
        chunk.C[token] = load_some<R>(at<const T>(scan.C, chunk.row, chunk.start + token) + first, count);
    }
}

// Exponentials take long but can overlap, so many are computed before the first is used. The last is that of the
// whole chunk: a decay near 1 is rounded, and a state that lives for thousands of tokens must not be so each time.
template <typename R>
static ALWAYS_INLINE void decay(Vec<R> A, int lane, const Chunk<R> &chunk, Vec<R> *decays) {
    Vec<R> rate = A * (R)LOG2_E;
    for (int token = 0; token < chunk.tokens; token++) decays[token] = exp2_of(chunk.dt[token][lane] * rate);
    decays[chunk.tokens] = chunk.tokens == 1 ? decays[0] : exp2_of(chunk.elapsed[lane] * rate);
}

// Equations 2a and 2b for one channel.
template <typename R>
static ALWAYS_INLINE Vec<R> advance(Vec<R> before, const Vec<R> *decays, int lane, Chunk<R> &chunk) {
    Vec<R> h = before, written = {};
    for (int token = 0; token < chunk.tokens; token++) {
        Vec<R> write = chunk.dt_u[token][lane] * chunk.B[token];
        h = decays[token] * h + write;
        written = decays[token] * written + write;
        chunk.y[token][lane] += sum<R>(h * chunk.C[token]);
    }
    return decays[chunk.tokens] * before + written;
}

template <typename T, typename R> static ALWAYS_INLINE void store_outputs(const Scan &scan, const Chunk<R> &chunk) {
    for (int token = 0; token < chunk.tokens; token++) {
        Vec<R> y = chunk.y[token], gate = channels_of<T, R>(scan.gate, chunk, token);
        if (scan.gate.data) y *= gate * sigmoid<R>(gate);
        store_channels<T, R>(y, scan.y, chunk, token);
    }
}

template <typename T, typename R>
static ALWAYS_INLINE void scan_chunk(const Scan &scan, Chunk<R> &chunk, const R *before, R *after) {
    Vec<R> decays[CHUNK + 1];
    const int size = chunk.tokens + 1, together = (CHUNK + 1) / size;
    load_tokens<T, R>(scan, chunk);
    for (Long first = 0; first < scan.numbers; first += Lanes<R>::count) {
        int count = least(Lanes<R>::count, scan.numbers - first);
        load_numbers<T, R>(scan, first, count, chunk);
        for (int lane = 0; lane < chunk.lanes; lane += together) {
            int stop = least(lane + together, chunk.lanes);
            Long own = (chunk.channel + lane) * scan.numbers + first;
            for (int each = lane; each < stop; each++, own += scan.numbers)
                decay<R>(load_some<R>((const R *)scan.A + own, count), each, chunk, decays + (each - lane) * size);
            own = (chunk.channel + lane) * scan.numbers + first;
            for (int each = lane; each < stop; each++, own += scan.numbers) {
                Vec<R> h = before ? load_some<R>(before + own, count) : Vec<R>{};
                h = advance<R>(h, decays + (each - lane) * size, each, chunk);
                store_some<R>(h, after + own, count);
            }
        }
    }
    store_outputs<T, R>(scan, chunk);
}

template <typename R> static ALWAYS_INLINE R *checkpoint(const Scan &scan, Long row, Long start) {
    Long chunks = (scan.shares.length + CHUNK - 1) / CHUNK;
    return (R *)scan.checkpoints + (row * chunks + start / CHUNK) * scan.shares.channels * scan.numbers;
}

template <typename T> static void scan_share(const Scan &scan, Long row, Long first, Long last) {
    typedef Real<T> R;
    const Long length = length_of(scan.shares, row), size = scan.shares.channels * scan.numbers;
    const Long own = first * scan.numbers, owned = (last - first) * scan.numbers;
    const R *before = scan.initial_state ? (const R *)scan.initial_state + row * size : 0;
    R *after = (R *)scan.final_state + row * size;
    if (first >= last) return;
    for (Long start = 0; start < length; start += CHUNK) {
        if (scan.checkpoints)
            copy_or_clear<R>(before ? before + own : 0, checkpoint<R>(scan, row, start) + own, owned);
        for (Long channel = first; channel < last; channel += Lanes<R>::count) {
            Chunk<R> chunk;
            chunk.row = row, chunk.start = start, chunk.channel = channel;
            chunk.tokens = least(CHUNK, length - start), chunk.lanes = least(Lanes<R>::count, last - channel);
            scan_chunk<T, R>(scan, chunk, before, after);
        }
        before = after;
    }
    if (length == 0) copy_or_clear<R>(before ? before + own : 0, after + own, owned);
    clear<T>(scan.y, row, length, scan.shares.length, first, last);
}

// Of each token, channels: the gradient of y before the gate, and what reaches dt u and dt through the state, by what
// it wrote and by what decayed; and numbers: dB and dC.
template <typename R> struct ChunkGradient { Vec<R> dy[CHUNK], written[CHUNK], decayed[CHUNK], dB[CHUNK], dC[CHUNK]; };

template <typename T, typename R>
static ALWAYS_INLINE void load_dy(const ScanGradient &gradient, const Chunk<R> &chunk, ChunkGradient<R> &back) {
    for (int token = 0; token < chunk.tokens; token++) {
        Vec<R> dy = channels_of<T, R>(gradient.dy, chunk, token);
        Vec<R> gate = channels_of<T, R>(gradient.of.gate, chunk, token);
        if (gradient.of.gate.data) dy *= gate * sigmoid<R>(gate);
        back.dy[token] = dy, back.written[token] = Vec<R>{}, back.decayed[token] = Vec<R>{};
    }
}

// One channel there and back: `dh` is the gradient of the state behind the chunk, and becomes that before it.
template <typename R>
static ALWAYS_INLINE void advance_back(
    Vec<R> h, Vec<R> A, int lane, Chunk<R> &chunk, ChunkGradient<R> &back, Vec<R> &dh, Vec<R> &dA
) {
    Vec<R> states[CHUNK + 1], decays[CHUNK], rate = A * (R)LOG2_E;
    states[0] = h;
    for (int token = 0; token < chunk.tokens; token++) {
        decays[token] = exp2_of(chunk.dt[token][lane] * rate);
        h = decays[token] * h + chunk.dt_u[token][lane] * chunk.B[token];
        states[token + 1] = h;
        chunk.y[token][lane] += sum<R>(h * chunk.C[token]);
    }
    for (int token = chunk.tokens - 1; token >= 0; token--) {
        back.dC[token] += back.dy[token][lane] * states[token + 1];
        dh += back.dy[token][lane] * chunk.C[token];
        back.dB[token] += chunk.dt_u[token][lane] * dh;
        back.written[token][lane] += sum<R>(dh * chunk.B[token]);
        dh *= decays[token];
        Vec<R> kept = dh * states[token];
        back.decayed[token][lane] += sum<R>(kept * A);
        dA += chunk.dt[token][lane] * kept;
    }
}

template <typename T, typename R>
static ALWAYS_INLINE void store_gradients(
    const ScanGradient &gradient, const Chunk<R> &chunk, const ChunkGradient<R> &back
) {
    const Scan &scan = gradient.of;
    Vec<R> D = scan.D ? load_some<R>((const R *)scan.D + chunk.channel, chunk.lanes) : Vec<R>{}, dD = {};
    for (int token = 0; token < chunk.tokens; token++) {
        Vec<R> du = chunk.dt[token] * back.written[token] + D * back.dy[token];
        Vec<R> ddt = back.decayed[token] + chunk.u[token] * back.written[token];
        Vec<R> dy = channels_of<T, R>(gradient.dy, chunk, token), gate = channels_of<T, R>(scan.gate, chunk, token);
        Vec<R> dgate = dy * chunk.y[token] * silu_slope<R>(gate);
        if (scan.dt_softplus) ddt *= sigmoid<R>(channels_of<T, R>(scan.dt, chunk, token));
        store_channels<T, R>(du, gradient.du, chunk, token);
        store_channels<T, R>(ddt, gradient.ddt, chunk, token);
        if (scan.gate.data) store_channels<T, R>(dgate, gradient.dgate, chunk, token);
        dD += back.dy[token] * chunk.u[token];
    }
    R *to = (R *)gradient.dD + chunk.row * scan.shares.channels + chunk.channel;
    store_some<R>(load_some<R>(to, chunk.lanes) + dD, to, chunk.lanes);
}

template <typename T, typename R>
static ALWAYS_INLINE void scan_chunk_back(const ScanGradient &gradient, Long split, Chunk<R> &chunk) {
    const Scan &scan = gradient.of;
    const Long size = scan.shares.channels * scan.numbers;
    const R *before = checkpoint<R>(scan, chunk.row, chunk.start);
    R *dA = (R *)gradient.dA + chunk.row * size, *dh = (R *)gradient.dinitial_state + chunk.row * size;
    Long summed = ((chunk.row * scan.shares.splits + split) * scan.shares.length + chunk.start) * scan.numbers;
    ChunkGradient<R> back;
    load_tokens<T, R>(scan, chunk);
    load_dy<T, R>(gradient, chunk, back);
    for (Long first = 0; first < scan.numbers; first += Lanes<R>::count) {
        int count = least(Lanes<R>::count, scan.numbers - first);
        R *dB = (R *)gradient.dB + summed + first, *dC = (R *)gradient.dC + summed + first;
        load_numbers<T, R>(scan, first, count, chunk);
        for (int token = 0; token < chunk.tokens; token++) {
            back.dB[token] = load_some<R>(dB + token * scan.numbers, count);
            back.dC[token] = load_some<R>(dC + token * scan.numbers, count);
        }
        for (int lane = 0; lane < chunk.lanes; lane++) {
            Long own = (chunk.channel + lane) * scan.numbers + first;
            Vec<R> A = load_some<R>((const R *)scan.A + own, count), h = load_some<R>(before + own, count);
            Vec<R> own_dA = load_some<R>(dA + own, count), own_dh = load_some<R>(dh + own, count);
            advance_back<R>(h, A, lane, chunk, back, own_dh, own_dA);
            store_some<R>(own_dA, dA + own, count), store_some<R>(own_dh, dh + own, count);
        }
        for (int token = 0; token < chunk.tokens; token++) {
            store_some<R>(back.dB[token], dB + token * scan.numbers, count);
            store_some<R>(back.dC[token], dC + token * scan.numbers, count);
        }
    }
    store_gradients<T, R>(gradient, chunk, back);
}

template <typename T>
static void scan_share_back(const ScanGradient &gradient, Long row, Long split, Long first, Long last) {
    typedef Real<T> R;
    const Scan &scan = gradient.of;
    const Long length = length_of(scan.shares, row), own = (row * scan.shares.channels + first) * scan.numbers;
    const R *dfinal = gradient.dfinal_state ? (const R *)gradient.dfinal_state + own : 0;
    if (first >= last) return;
    copy_or_clear<R>(dfinal, (R *)gradient.dinitial_state + own, (last - first) * scan.numbers);
    for (Long chunks = (length + CHUNK - 1) / CHUNK; chunks > 0; chunks--)
        for (Long channel = first; channel < last; channel += Lanes<R>::count) {
            Chunk<R> chunk;
            chunk.row = row, chunk.start = (chunks - 1) * CHUNK, chunk.channel = channel;
            chunk.tokens = least(CHUNK, length - chunk.start), chunk.lanes = least(Lanes<R>::count, last - channel);
            scan_chunk_back<T, R>(gradient, split, chunk);
        }
    clear<T>(gradient.du, row, length, scan.shares.length, first, last);
    clear<T>(gradient.ddt, row, length, scan.shares.length, first, last);
    clear<T>(gradient.dgate, row, length, scan.shares.length, first, last);
}

#define FUNCTIONS_OF(T, NAME)                                                                                         \
    extern "C" void convolve_##NAME(const Convolution *conv) {                                                        \
        for_each_share<Real<T>>(conv->shares, [&](Long row, Long split, Long first, Long last) {                      \
            convolve_share<T>(*conv, row, first, last);                                                               \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" void convolve_back_##NAME(const ConvolutionGradient *gradient) {                                       \
        for_each_share<Real<T>>(gradient->of.shares, [&](Long row, Long split, Long first, Long last) {               \
            convolve_share_back<T>(*gradient, row, first, last);                                                      \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" void scan_##NAME(const Scan *scan) {                                                                   \
        for_each_share<Real<T>>(scan->shares, [&](Long row, Long split, Long first, Long last) {                      \
            scan_share<T>(*scan, row, first, last);                                                                   \
        });                                                                                                           \
    }                                                                                                                 \
    extern "C" void scan_back_##NAME(const ScanGradient *gradient) {                                                  \
        for_each_share<Real<T>>(gradient->of.shares, [&](Long row, Long split, Long first, Long last) {               \
            scan_share_back<T>(*gradient, row, split, first, last);                                                   \
        });                                                                                                           \
    }

FUNCTIONS_OF(float, float)
FUNCTIONS_OF(bfloat16, bfloat16)
FUNCTIONS_OF(double, double)
"""
)


def can_run_on_cpu() -> bool:
    """Whether the library is there, or can be made now."""
    return cpu_library(SOURCE) is not None


def convolve_on_cpu(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` of plain CPU tensors."""
    dtype = _arithmetic_dtype(x, weight, bias)
    (inputs,) = _stored(dtype, x)
    weight, bias = _exactly(weight, dtype), _exactly(bias, dtype)
    initial_state, lengths = _exactly(initial_state, inputs.dtype), _exactly(lengths, torch.int64)
    run = CausalConvolution.apply if _is_differentiated(inputs, weight, bias, initial_state) else _convolve
    y, final_state = run(inputs, weight, bias, initial_state, lengths)
    return _exactly(y, x.dtype), _exactly(final_state, x.dtype)


def scan_on_cpu(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    dt_softplus: bool,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of plain CPU tensors."""
    dtype, output_dtype = _arithmetic_dtype(u, dt, A, B, C, D, gate, initial_state), u.dtype
    u, dt, B, C, gate = _stored(dtype, u, dt, B, C, gate)
    A, D, initial_state = (_exactly(tensor, dtype) for tensor in (A, D, initial_state))
    lengths = _exactly(lengths, torch.int64)
    run = SelectiveScan.apply if _is_differentiated(u, dt, A, B, C, D, gate, initial_state) else _scan
    y, final_state = run(u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus)
    return _exactly(y, output_dtype), final_state


def _arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    doubled = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubled else torch.float32


def _is_differentiated(*tensors: Tensor | None) -> bool:
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _stored(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Activations as the library reads them: as they are if all are bfloat16, else in `dtype`."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    if found != {dtype} and (found != {torch.bfloat16} or dtype == torch.float64):
        tensors = tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
    return [tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]


def _exactly(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Asked first: a method that does nothing is slower than both questions, and a token takes a dozen of them.
    if tensor is None or (tensor.dtype == dtype and tensor.is_contiguous()):
        return tensor
    return tensor.to(dtype).contiguous()


class CausalConvolution(torch.autograd.Function):
    """`_convolve` with its gradients; keeps nothing but its arguments."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        return _convolve(*arguments)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal_state):
        x, weight, bias, initial_state, lengths = ctx.saved_tensors
        (dy,), dfinal_state = _stored(weight.dtype, dy), _exactly(dfinal_state, x.dtype)
        dx, dinitial_state = _new_like(x), _new_window(x, weight)
        dweight, dbias = weight.new_zeros(len(x), *weight.shape), weight.new_zeros(len(x), len(weight))
        _run(
            "convolve_back",
            x.dtype,
            *_convolution_fields(x, weight, bias, initial_state, lengths),
            *_views(dy, dx),
            *_addresses(dfinal_state, dweight, dbias, dinitial_state),
        )
        dbias, dinitial_state = _where_given(bias, dbias.sum(0)), _where_given(initial_state, dinitial_state)
        return dx, dweight.sum(0), dbias, dinitial_state, None


class SelectiveScan(torch.autograd.Function):
    """`_scan` with its gradients; keeps its arguments, and the states at every `CHUNK`-th token."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus):
        checkpoints = A.new_empty(len(u), math.ceil(u.shape[1] / CHUNK), *A.shape)
        ctx.save_for_backward(u, dt, A, B, C, D, gate, initial_state, lengths, checkpoints)
        ctx.set_materialize_grads(False)
        ctx.dt_softplus = dt_softplus
        return _scan(u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus, checkpoints)

    @staticmethod
    @once_differentiable
    def backward(ctx, dy, dfinal_state):
        u, dt, A, B, C, D, gate, initial_state, lengths, checkpoints = ctx.saved_tensors
        (dy,), dfinal_state = _stored(A.dtype, dy), _exactly(dfinal_state, A.dtype)
        du, ddt, dgate = _new_like(u), _new_like(u), _where_given(gate, _new_like(u))
        dA, dinitial_state = A.new_zeros(len(u), *A.shape), A.new_empty(len(u), *A.shape)
        dD = A.new_zeros(len(u), len(A))
        # A share has some of the channels, and B and C speak to all of them.
        dB, dC = A.new_zeros(2, len(u), _splits(u, A.shape[1]), u.shape[1], A.shape[1])
        _run(
            "scan_back",
            u.dtype,
            *_scan_fields(u, dt, A, B, C, D, gate, initial_state, lengths, ctx.dt_softplus, checkpoints),
            *_views(dy, du, ddt, dgate),
            *_addresses(dfinal_state, dA, dB, dC, dD, dinitial_state),
        )
        dB, dC = dB.sum(1).to(B.dtype), dC.sum(1).to(C.dtype)
        dD, dinitial_state = _where_given(D, dD.sum(0)), _where_given(initial_state, dinitial_state)
        return du, ddt, dA.sum(0), dB, dC, dD, dgate, dinitial_state, None, None


def _convolve(x, weight, bias, initial_state, lengths) -> tuple[Tensor, Tensor]:
    y, final_state = _new_like(x), _new_window(x, weight)
    _run("convolve", x.dtype, *_convolution_fields(x, weight, bias, initial_state, lengths, y, final_state))
    return y, final_state


def _scan(
    u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus, checkpoints: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    y, final_state = _new_like(u), A.new_empty(len(u), *A.shape)
    outputs = (checkpoints, y, final_state)
    _run("scan", u.dtype, *_scan_fields(u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus, *outputs))
    return y, final_state


def _convolution_fields(x, weight, bias, initial_state, lengths, y=None, final_state=None) -> tuple[int, ...]:
    """The struct `Convolution` of the source."""
    states = _addresses(weight, bias, initial_state, final_state)
    return *_views(x, y), *states, weight.shape[1], *_shares(x, 1, lengths)


def _scan_fields(
    u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus, checkpoints, y=None, final_state=None
) -> tuple[int, ...]:
    """The struct `Scan` of the source."""
    states = _addresses(A, D, initial_state, final_state, checkpoints)
    return *_views(u, dt, B, C, gate, y), *states, A.shape[1], dt_softplus, *_shares(u, A.shape[1], lengths)


def _shares(tensor: Tensor, numbers: int, lengths: Tensor | None) -> tuple[int, ...]:
    """The struct `Shares` of the source."""
    return *_addresses(lengths), *tensor.shape, _splits(tensor, numbers), _threads(tensor, numbers)


def _threads(tensor: Tensor, numbers: int) -> int:
    return torch.get_num_threads() if tensor.numel() * numbers >= PARALLEL_WORK else 1


def _splits(tensor: Tensor, numbers: int) -> int:
    """Into how many shares each row is cut, so that all threads have as many."""
    threads = _threads(tensor, numbers)
    return threads // math.gcd(threads, len(tensor))


def _views(*tensors: Tensor | None) -> list[int]:
    """The structs `View` of the source."""
    fields: list[int] = []
    for tensor in tensors:
        fields += (0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:2])
    return fields


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _run(name: str, dtype: torch.dtype, *fields: int) -> None:
    """Calls a function of the library with a struct, of which all fields are eight bytes wide."""
    _function(name, dtype)((ctypes.c_int64 * len(fields))(*fields))


@lru_cache
def _function(name: str, dtype: torch.dtype) -> Callable:
    function = getattr(cpu_library(SOURCE), f"{name}_{STORED[dtype]}")
    function.argtypes, function.restype = [ctypes.c_void_p], None
    return function


def _new_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False)


def _new_window(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1] - 1, x.shape[2])


def _where_given(argument: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if argument is None else gradient


__all__ = ["MOST_TAPS", "can_run_on_cpu", "convolve_on_cpu", "scan_on_cpu"]
