// The selective scan (Mamba, equations 2a and 2b), forward and backward, in chunks of tokens.
//
// A vector holds the N numbers of one channel, so states, A, B and C are read in the order in which they are stored.
// T is the type that activations are stored in, R the type of the arithmetic.
#pragma once

#include "state_codes.h"
#include "threads.h"

// The tokens of one chunk for one vector of channels. B and C hold vectors of N numbers, the others of channels.
template <typename R> struct Chunk {
    Long row, start, channel;
    int tokens, lanes;
    bool is_first[CHUNK + 1];  // whether a sequence starts at this token; the last one: at any token of the chunk
    Vec<R> B[CHUNK], C[CHUNK], u[CHUNK], dt[CHUNK], dt_u[CHUNK], y[CHUNK], elapsed;
};

// Load the chunk's channels of a token, or zeros if the tensor was left out; store them.
template <typename T, typename R>
static ALWAYS_INLINE Vec<R> channels_of(const View &view, const Chunk<R> &chunk, int token) {
    if (!view.data) return Vec<R>{};
    return load_some<R>(at<const T>(view, chunk.row, chunk.start + token) + chunk.channel, chunk.lanes);
}
template <typename T, typename R>
static ALWAYS_INLINE void store_channels(Vec<R> values, const View &view, const Chunk<R> &chunk, int token) {
    store_some<R>(values, at<T>(view, chunk.row, chunk.start + token) + chunk.channel, chunk.lanes);
}

// The same channels of two tokens are far apart in memory, so the processor does not prefetch them by itself.
template <typename T, typename R>
static ALWAYS_INLINE void fetch_next_channels(const View &view, const Chunk<R> &chunk, int token) {
    if (view.data) __builtin_prefetch(at<T>(view, chunk.row, chunk.start + token) + chunk.channel + chunk.lanes, 0, 2);
}

template <typename T, typename R> static ALWAYS_INLINE void load_tokens(const Scan &scan, Chunk<R> &chunk) {
    Vec<R> D = scan.D ? load_some<R>((const R *)scan.D + chunk.channel, chunk.lanes) : Vec<R>{};
    chunk.elapsed = Vec<R>{}, chunk.is_first[chunk.tokens] = false;
    for (int token = 0; token < chunk.tokens; token++) {
        chunk.is_first[token] = scan.shares.positions && position_of(scan.shares, chunk.row, chunk.start + token) == 0;
        chunk.is_first[chunk.tokens] |= chunk.is_first[token];
        Vec<R> dt = channels_of<T, R>(scan.dt, chunk, token), u = channels_of<T, R>(scan.u, chunk, token);
        for (const View *view = &scan.u; view <= &scan.y; view++) fetch_next_channels<T, R>(*view, chunk, token);
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

template <typename R> static ALWAYS_INLINE Vec<R> load_A(const Scan &scan, Long first, int count) {
    Vec<R> A = load_some<R>((const R *)scan.A + first, count);
    return scan.A_is_log ? -exp_of<R>(A) : A;
}

// Exponentials have a long latency but can overlap, so many are computed before the first is used. The last one is the
// decay of the whole chunk: a product of many rounded decays near 1 would lose a state that lives for thousands of
// tokens.
template <typename R> static ALWAYS_INLINE void decay(Vec<R> A, int lane, const Chunk<R> &chunk, Vec<R> *decays) {
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
        if (chunk.is_first[token]) h = written = Vec<R>{};  // no decay of 0: 0 times NaN is NaN
        h = decays[token] * h + write;
        written = decays[token] * written + write;
        chunk.y[token][lane] += sum<R>(h * chunk.C[token]);
    }
    return chunk.is_first[chunk.tokens] ? written : decays[chunk.tokens] * before + written;
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
                decay<R>(load_A<R>(scan, own, count), each, chunk, decays + (each - lane) * size);
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

// Equations 2a and 2b for one channel at one token; the output is computed from the state before it is rounded.
template <typename T, typename R>
static ALWAYS_INLINE void advance_rounded(const Scan &scan, int token, int lane, Chunk<R> &chunk, R *state) {
    const Long own = (chunk.channel + lane) * scan.numbers;
    const T *B = at<const T>(scan.B, chunk.row, chunk.start + token);
    const T *C = at<const T>(scan.C, chunk.row, chunk.start + token);
    for (Long first = 0; first < scan.numbers; first += Lanes<R>::count) {
        const int count = least(Lanes<R>::count, scan.numbers - first);
        Vec<R> rate = load_A<R>(scan, own + first, count) * (R)LOG2_E;
        Vec<R> write = chunk.dt_u[token][lane] * load_some<R>(B + first, count);
        Vec<R> h = exp2_of(chunk.dt[token][lane] * rate) * load_some<R>(state + own + first, count) + write;
        chunk.y[token][lane] += sum<R>(h * load_some<R>(C + first, count));
        store_some<R>(h, state + own + first, count);
    }
    const Long position = scan.starts[chunk.row] + chunk.start + token;
    round_group<R>(state + own, scan.numbers, hash_of_position(position), own, state + own);
}

template <typename T, typename R>
static ALWAYS_INLINE void scan_chunk_rounded(const Scan &scan, Chunk<R> &chunk, const R *before, R *after) {
    const Long own = chunk.channel * scan.numbers;
    if (before != after) copy_or_clear<R>(before ? before + own : 0, after + own, chunk.lanes * scan.numbers);
    load_tokens<T, R>(scan, chunk);
    for (int lane = 0; lane < chunk.lanes; lane++)
        for (int token = 0; token < chunk.tokens; token++) advance_rounded<T, R>(scan, token, lane, chunk, after);
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
            if (scan.starts) scan_chunk_rounded<T, R>(scan, chunk, before, after);
            else scan_chunk<T, R>(scan, chunk, before, after);
        }
        before = after;
    }
    if (length == 0) copy_or_clear<R>(before ? before + own : 0, after + own, owned);
    clear<T>(scan.y, row, length, scan.shares.length, first, last);
}

// For each token, vectors of channels: the gradient of y before the gate, and the gradients through the state, of dt u
// (written) and of dt by the decay (decayed). Vectors of N numbers: dB and dC.
template <typename R> struct ChunkGradient {
    Vec<R> dy[CHUNK], written[CHUNK], decayed[CHUNK], dB[CHUNK], dC[CHUNK];
};

template <typename T, typename R>
static ALWAYS_INLINE void load_dy(const ScanGradient &gradient, const Chunk<R> &chunk, ChunkGradient<R> &back) {
    for (int token = 0; token < chunk.tokens; token++) {
        Vec<R> dy = channels_of<T, R>(gradient.dy, chunk, token);
        Vec<R> gate = channels_of<T, R>(gradient.of.gate, chunk, token);
        if (gradient.of.gate.data) dy *= gate * sigmoid<R>(gate);
        back.dy[token] = dy, back.written[token] = Vec<R>{}, back.decayed[token] = Vec<R>{};
    }
}

// One channel forward and backward: `dh` is the gradient of the state after the chunk and becomes that before it.
template <typename R>
static ALWAYS_INLINE void advance_back(Vec<R> h, Vec<R> A, int lane, Chunk<R> &chunk, ChunkGradient<R> &back,
                                       Vec<R> &dh, Vec<R> &dA) {
    Vec<R> states[CHUNK + 1], decays[CHUNK + 1];
    decay<R>(A, lane, chunk, decays);
    states[0] = h;
    for (int token = 0; token < chunk.tokens; token++) {
        if (chunk.is_first[token]) h = Vec<R>{};
        h = decays[token] * h + chunk.dt_u[token][lane] * chunk.B[token];
        states[token + 1] = h;
        chunk.y[token][lane] += sum<R>(h * chunk.C[token]);
    }
    for (int token = chunk.tokens - 1; token >= 0; token--) {
        back.dC[token] += back.dy[token][lane] * states[token + 1];
        dh += back.dy[token][lane] * chunk.C[token];
        back.dB[token] += chunk.dt_u[token][lane] * dh;
        back.written[token][lane] += sum<R>(dh * chunk.B[token]);
        if (chunk.is_first[token]) {
            dh = Vec<R>{};
            continue;
        }
        dh *= decays[token];
        Vec<R> kept = dh * states[token];
        back.decayed[token][lane] += sum<R>(kept * A);
        dA += chunk.dt[token][lane] * kept;
    }
}

template <typename T, typename R>
static ALWAYS_INLINE void store_gradients(const ScanGradient &gradient, const Chunk<R> &chunk,
                                          const ChunkGradient<R> &back) {
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
            Vec<R> A = load_A<R>(scan, own, count), h = load_some<R>(before + own, count);
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
