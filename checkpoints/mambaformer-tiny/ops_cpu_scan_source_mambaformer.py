"""The CPU kernels of `ops_cpu_scan_mambaformer`, as C++; what they rest on is in `ops_cpu_source_mambaformer`.

Letters are those of the table in `ops_mambaformer`.
"""

# Tokens that the scan takes at a time. At 16 numbers a channel, the states that training keeps weigh half of u.
CHUNK = 32
MOST_TAPS = 16

_CONSTANTS = f"static const int CHUNK = {CHUNK}, MOST_TAPS = {MOST_TAPS};\n"

SCAN_SOURCE = (
    _CONSTANTS
    + r"""
// T is what activations are stored in, R what is computed in. Letters: see the table in ops_mambaformer.py.
template <typename T> using Real = typename Arithmetic<T>::type;

// A tensor (rows, tokens, channels or numbers) whose last axis adjoins; `data` is null where it was left out.
struct View { void *data; Long row, token; };

template <typename T> static ALWAYS_INLINE T *at(const View &view, Long row, Long token) {
    return (T *)view.data + row * view.row + token * view.token;
}

// Rows are cut into `splits` shares of whole vectors of channels, more than there are threads: another program that
// takes one of the processors away then holds up one share and not half of the work.
struct Shares {
    const Long *lengths; Long rows, length, channels, splits, threads;
    const Long *positions;  // (B, L), of each token in its own sequence; null where every row is one
};

static Long length_of(const Shares &shares, Long row) {
    if (!shares.lengths) return shares.length;
    Long length = shares.lengths[row];
    return length < 0 ? 0 : length < shares.length ? length : shares.length;
}

static Long position_of(const Shares &shares, Long row, Long token) {
    return shares.positions ? shares.positions[row * shares.length + token] : token;
}

template <typename R, typename Work> static void for_each_share(const Shares &shares, Work work) {
    const Long lanes = Lanes<R>::count, blocks = (shares.channels + lanes - 1) / lanes;
#pragma omp parallel for schedule(dynamic) num_threads((int)shares.threads) if (shares.threads > 1)
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

// The first tap of a token that meets an input of its own sequence.
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
static ALWAYS_INLINE void convolve_chunk(
    const Convolution &conv, Long row, Long channel, int lanes, Long start, int tokens
) {
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
            convolve_chunk_back<T>(
                gradient, row, channel, least(Lanes<R>::count, last - channel), start, least(CHUNK, inputs - start)
            );
    clear<T>(gradient.dx, row, length, conv.shares.length, first, last);
}

// ---- selective scan

struct Scan {
    View B, C, u, dt, gate, y;
    const void *A, *D, *initial_state;  // all of R
    void *final_state, *checkpoints;    // (B, D, N), and in training (B, chunks, D, N): the states before each chunk
    Long numbers, dt_softplus, A_is_log;
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
    bool is_first[CHUNK + 1];  // whether a sequence starts at this token; the last is whether one does in the chunk
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

// The same channels of two tokens lie far apart, where no processor looks ahead by itself.
template <typename T, typename R>
static ALWAYS_INLINE void fetch_next_channels(const View &view, const Chunk<R> &chunk, int token) {
    if (view.data) __builtin_prefetch(at<T>(view, chunk.row, chunk.start + token) + chunk.channel + chunk.lanes, 0, 2);
}

template <typename T, typename R> static ALWAYS_INLINE void load_tokens(const Scan &scan, Chunk<R> &chunk) {
    Vec<R> D = scan.D ? load_some<R>((const R *)scan.D + chunk.channel, chunk.lanes) : Vec<R>{};
    chunk.elapsed = Vec<R>{}, chunk.is_first[chunk.tokens] = false;
    for (int token = 0; token < chunk.tokens; token++) {
        chunk.is_first[token] =
            scan.shares.positions && position_of(scan.shares, chunk.row, chunk.start + token) == 0;
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
        if (chunk.is_first[token]) h = written = Vec<R>{};  // not a decay of 0, which times NaN is NaN
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

__all__ = ["CHUNK", "MOST_TAPS", "SCAN_SOURCE"]
