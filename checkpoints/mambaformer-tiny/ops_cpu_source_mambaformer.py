# Generated from csrc/ by scripts/sources.py: edit the files in csrc/ and run `make sources`.
"""The C++ of all CPU kernels. A model's folder on the Hub holds Python files only, so the source is a string."""

SOURCE = r"""
#line 1 "csrc/kernels.cpp"
// The exported functions, and the only file that is compiled.
#line 1 "csrc/attention.h"
// Attention of few queries: each key is read once for all heads that share it.
//
// A line is one query of one head. Scores are in powers of two: queries are multiplied by log2(e).


#line 1 "csrc/code_products.h"
// Products of queries with keys that are codes, and sums of values that are codes, without decoding them to memory.
//
// With levels L of a group, q . (scale L + shift) = scale (q . L) + shift sum(q), and for shares p of the values
// sum p (scale L + shift) = sum (p scale) L + sum p shift.


#line 1 "csrc/codes.h"
// Keys and values as codes of a few bits, in the bytes of `VectorCodec` (`cache_codes_mambaformer.py`), bit for bit.
//
// A vector is rotated (signs, then a Hadamard transform) and rounded to a uniform grid in groups: each number is
// scale * level + shift. The rotation is orthogonal, so queries are rotated instead of keys, and sums of values are
// rotated back once. Levels are read as numbers around zero.


#line 1 "csrc/storage.h"
// Activations between kernels: numbers of type A, rounded to the type T that they are stored in.


#include <stdlib.h>

#line 1 "csrc/vector.h"
// Vectors of the processor's width, bfloat16, exponentials, activation functions.
//
// T is the type that numbers are stored in (float, double or bfloat16), A the type of the arithmetic: float, or double
// for double. The code uses vector extensions that GCC and Clang have for every processor. The build defines
// VECTOR_BYTES, the width of a vector.


#include <math.h>
#include <string.h>
#ifdef __AVX2__
#include <immintrin.h>
#endif

#line 1 "csrc/interface.h"
// The interface of the kernel library: its structures, and every exported function.
//
// `structures.h` is generated from the table in `ops_cpu_structures_mambaformer.py`, from which ctypes has its classes
// too. Python compares sizes and constants (`interface_value`) when it loads the library, and does not use a library
// that disagrees. `ops_cpu_interface_mambaformer.py` declares the functions for ctypes.
//
// Letters (B, L, D, N, K, dt, A, B, C) are those of the table in `ops_mambaformer.py`. A function whose name ends in a
// storage type reads and writes activations and weights of that type; it computes in float, or in double for float64.


#line 1 "csrc/structures.h"
// Generated from ops_cpu_structures_mambaformer.py by scripts/sources.py: edit that file and run `make sources`.


#include <stdint.h>

typedef int64_t Long;

// Increase it whenever a structure or a function changes.
static const int INTERFACE_VERSION = 5;

// Tokens that the scan processes at a time.
static const int CHUNK = 32;

// The largest kernel size of a convolution.
static const int MOST_TAPS = 16;

// The most rows of activations in a product.
static const int MOST_ROWS = 16;

// The most products of one operation.
static const int MOST_TOGETHER = 4;

// The most parts that keys are divided into, for threads.
static const int MOST_PARTS = 64;

// Channels in a strip of a singular basis.
static const int CHANNELS_AT_A_TIME = 32;

// How a weight is stored.
enum WeightKind { PLAIN, INT8, INT4 };

// The kind of an operation of a decode program.
enum OpKind { NORM, LINEAR, SCALE, WRITE_KEYS, ATTEND, GATE, CONV_STEP, INNER_NORMS, RECURRENCE_STEP };

// A tensor (rows, tokens, channels or numbers) whose last axis is contiguous; null if it was left out.
struct View {
    void *data;
    Long row, token;  // strides
};

// The batch, and how its rows are divided: into `splits` shares of complete vectors of channels. There are
// more shares than threads, so another program that takes a processor away delays one share and not half of
// the work.
struct Shares {
    const Long *lengths;  // (B,); null if every row has `length` tokens
    Long rows, length, channels, splits, threads;
    const Long *positions;  // (B, L), of each token in its own sequence; null if every row is one sequence
};

// Weights and bias are stored in the type of the arithmetic, states in the type of the activations.
struct Convolution {
    View x, y;
    const void *weight, *bias;  // (D, K), (D,)
    const void *initial_state;  // (B, K - 1, D)
    void *final_state;          // (B, K - 1, D)
    Long taps;
    Shares shares;
};

// The backward pass of a convolution.
struct ConvolutionGradient {
    Convolution of;
    View dy, dx;
    const void *dfinal_state;
    void *dweight, *dbias, *dinitial_state;  // (B, D, K), (B, D), (B, K - 1, D)
};

// A, D and the states are stored in the type of the arithmetic.
struct Scan {
    View B, C, u, dt, gate, y;
    const void *A, *D, *initial_state;
    void *final_state;   // (B, D, N)
    void *checkpoints;   // (B, chunks, D, N): the states before each chunk, for training; or null
    const Long *starts;  // (B,): positions of the first tokens, where states are rounded after each token; or null
    Long numbers, dt_softplus, A_is_log;
    Shares shares;
};

// The backward pass of a scan.
struct ScanGradient {
    Scan of;
    View dy, du, ddt, dgate;
    const void *dfinal_state;
    void *dA, *dB, *dC, *dD, *dinitial_state;  // (B, D, N), twice (B, splits, L, N), (B, D), (B, D, N)
};

// The weight of a linear module: data (outputs, inputs), and an expert vector if `rank` is not 0.
struct Weight {
    Long kind, data, scale, bias, outputs, inputs, group, has_narrow_scales;
    Long basis, basis_stride, rank, delta, delta_stride, on_outputs;
};

// Sizes and strides of query (rows, heads, queries, width), key and value (rows, key heads, keys, width), and
// of the mask (rows or 1, queries, keys); `group` heads share a key head. Strides are of rows, heads, tokens.
struct Shape {
    Long rows, key_heads, group, queries, keys, width;
    Long query[3], key[3], value[3];
    Long mask_row, mask_query;
};

// Shared by the attention layers that retain the same keys: the mask with its strides as in `Shape`, the
// number of keys with the new ones, and the slots of the new ones: from `first_slot` on, or `slots`
// (rows or 1, tokens). Queries meet the first `sinks` keys by cosines and sines of their own, (rows or 1,
// tokens, head_dim).
struct KeyLayout {
    const uint8_t *mask;
    Long mask_row, mask_query, keys, first_slot;
    const Long *slots;
    Long slots_row, sinks;
    const void *sink_cosines, *sink_sines;
    Long sink_angle_row;
};

// The codes of a vector: bits of each number, groups with a scale each, bytes of the vector, and whether
// groups have a shift too. `bits` is 0 for numbers in the type of the activations.
struct Codec {
    Long bits, groups, nbytes, has_shift;
};

// The memory of an attention layer's keys and values, (rows, key heads, capacity, head_dim or bytes) each.
// Both are codes, or neither.
struct KeySlots {
    Long layout;  // index of its `KeyLayout`
    void *keys, *values;
    Long capacity;
    Codec key_codec, value_codec;
};

// A recurrent state before and after the token; `before` is null before the first token.
struct State {
    const void *before;
    void *after;
};

// The new tokens of one decode step, its settings and tensors, and cosines and sines (rows or 1, tokens,
// head_dim), which are null without rotation. `workspace` is the number of elements per token.
struct ProgramInputs {
    Long rows, tokens, width, workspace;
    const double *settings;
    const KeyLayout *layouts;
    const KeySlots *key_slots;
    const State *states;
    const void *cosines, *sines;
    Long angle_row;
};

// The start of each operation, and its size in bytes. In all operations a buffer is the number of elements
// per token before it in the workspace, a setting or a state is an index, and -1 means none.
struct Op {
    Long kind, size;
};

// The columns from `first` on of a buffer with `stride` columns.
struct Columns {
    Long buffer, first, stride;
};

// A weight, its input and its output.
struct Projection {
    const Weight *weight;
    Long x, y;
};

// y = RMS norm of x.
struct NormOp {
    Op op;
    Long x, y, width;
    const void *weight;
    Long eps;
};

// Products with a common barrier: y = W x + bias, or residual + W x + bias.
struct LinearOp {
    Op op;
    Long count;
    Projection projections[4];
    Long residual;
};

// Expert vectors with a common barrier: y = x + Q ((z - 1) * Q^T x), or residual + that.
struct ScaleOp {
    Op op;
    Long count;
    Projection projections[4];
    Long residual, scratch;
};

// Rotates queries and keys, scales queries for `AttendOp`, and writes keys and values to their slots.
// `for_sinks` is like `scaled`, with the rotation that sinks are met with.
struct WriteKeysOp {
    Op op;
    Long query, key, value, scaled, for_sinks;
    Long heads, key_heads, head_dim, scaling, key_slots;
};

// Attention of scaled queries; `scratch` holds the results of each part of the keys.
struct AttendOp {
    Op op;
    Long scaled, for_sinks, mixed, scratch;
    Long heads, key_heads, head_dim, key_slots;
};

// y = silu(gates) * x.
struct GateOp {
    Op op;
    Long gates, x, y, width;
};

// One token of a causal convolution with silu; `state` is the last inputs (rows, taps - 1, channels).
struct ConvStepOp {
    Op op;
    Columns x;
    Long y;
    const void *weight, *bias;
    Long channels, taps, state;
};

// Divides x into three parts, applies the RMS norm to each with a weight in place, and copies the first to y.
struct InnerNormsOp {
    Op op;
    Long x, y;
    Long widths[3], weights[3], eps[3];
};

// One token of the selective scan; `state` is (rows, channels, numbers). `scratch` holds A and D in the type
// of the arithmetic, if they are stored in another.
struct RecurrenceStepOp {
    Op op;
    Long u, dt, y, scratch;
    Columns B, C, gate;
    const void *A_log, *D;
    Long channels, numbers, state;
};

#define FOR_EACH_OPERATION(DO)                                                                                        \
    DO(NORM, NormOp)                                                                                                  \
    DO(LINEAR, LinearOp)                                                                                              \
    DO(SCALE, ScaleOp)                                                                                                \
    DO(WRITE_KEYS, WriteKeysOp)                                                                                       \
    DO(ATTEND, AttendOp)                                                                                              \
    DO(GATE, GateOp)                                                                                                  \
    DO(CONV_STEP, ConvStepOp)                                                                                         \
    DO(INNER_NORMS, InnerNormsOp)                                                                                     \
    DO(RECURRENCE_STEP, RecurrenceStepOp)

#define FOR_EACH_CONSTANT(DO)                                                                                         \
    DO(INTERFACE_VERSION)                                                                                             \
    DO(CHUNK)                                                                                                         \
    DO(MOST_TAPS)                                                                                                     \
    DO(MOST_ROWS)                                                                                                     \
    DO(MOST_TOGETHER)                                                                                                 \
    DO(MOST_PARTS)                                                                                                    \
    DO(CHANNELS_AT_A_TIME)                                                                                            \
    DO(PLAIN)                                                                                                         \
    DO(INT8)                                                                                                          \
    DO(INT4)                                                                                                          \
    DO(NORM)                                                                                                          \
    DO(LINEAR)                                                                                                        \
    DO(SCALE)                                                                                                         \
    DO(WRITE_KEYS)                                                                                                    \
    DO(ATTEND)                                                                                                        \
    DO(GATE)                                                                                                          \
    DO(CONV_STEP)                                                                                                     \
    DO(INNER_NORMS)                                                                                                   \
    DO(RECURRENCE_STEP)

#define FOR_EACH_STRUCTURE(DO)                                                                                        \
    DO(View)                                                                                                          \
    DO(Shares)                                                                                                        \
    DO(Convolution)                                                                                                   \
    DO(ConvolutionGradient)                                                                                           \
    DO(Scan)                                                                                                          \
    DO(ScanGradient)                                                                                                  \
    DO(Weight)                                                                                                        \
    DO(Shape)                                                                                                         \
    DO(KeyLayout)                                                                                                     \
    DO(Codec)                                                                                                         \
    DO(KeySlots)                                                                                                      \
    DO(State)                                                                                                         \
    DO(ProgramInputs)                                                                                                 \
    DO(Op)                                                                                                            \
    DO(Columns)                                                                                                       \
    DO(Projection)                                                                                                    \
    DO(NormOp)                                                                                                        \
    DO(LinearOp)                                                                                                      \
    DO(ScaleOp)                                                                                                       \
    DO(WriteKeysOp)                                                                                                   \
    DO(AttendOp)                                                                                                      \
    DO(GateOp)                                                                                                        \
    DO(ConvStepOp)                                                                                                    \
    DO(InnerNormsOp)                                                                                                  \
    DO(RecurrenceStepOp)
#line 12 "csrc/interface.h"

struct bfloat16 {
    uint16_t bits;
};

#define DECLARE_FOR_STORAGE(name, T)                                                                                  \
    void convolve_##name(const Convolution *conv);                                                                    \
    void convolve_back_##name(const ConvolutionGradient *gradient);                                                   \
    void scan_##name(const Scan *scan);                                                                               \
    void scan_back_##name(const ScanGradient *gradient);                                                              \
    void linear_##name(const T *x, Long rows, const Weight *weight, T *y, int threads);                               \
    void rescale_##name(const T *x, Long rows, const Weight *weight, T *y, int threads);                              \
    void rms_norm_##name(const T *x, Long rows, Long width, const T *weight, double eps, T *y, int threads);          \
    void rotate_##name(const T *x, Long rows, Long heads, Long tokens, Long half, Long row_stride, Long head_stride,  \
                       Long token_stride, const T *cosines, const T *sines, Long angle_row, T *y, int threads);       \
    void gate_##name(const T *gates, const T *x, Long count, T *y, int threads);                                      \
    void attend_##name(const T *query, const T *key, const T *value, const uint8_t *mask, double scaling, T *y,       \
                       const Shape *shape, int threads);                                                              \
    void encode_##name(const T *x, Long count, Long width, const Codec *codec, uint8_t *y, int threads);              \
    void run_program_##name(const T *x, const ProgramInputs *inputs, const Op *first, const Op *last, T *y,           \
                            int threads);

#define DECLARE_FOR_STATES(name, R)                                                                                   \
    void round_states_##name(const R *states, Long rows, Long groups, Long numbers, const Long *positions, R *to,     \
                             int threads);                                                                            \
    void encode_states_##name(const R *states, Long groups, Long numbers, int8_t *codes, int threads);                \
    void decode_states_##name(const int8_t *codes, Long groups, Long numbers, R *states, int threads);

#define DECLARE_FOR_INT4(name, T, scale_name, S)                                                                      \
    void unpack_int4_##name##_##scale_name(const uint8_t *packed, Long N, Long K, Long group, const S *scales, T *y,  \
                                           int threads);

extern "C" {
DECLARE_FOR_STORAGE(float32, float)
DECLARE_FOR_STORAGE(bfloat16, bfloat16)
DECLARE_FOR_STORAGE(float64, double)

DECLARE_FOR_STATES(float32, float)
DECLARE_FOR_STATES(float64, double)

DECLARE_FOR_INT4(float32, float, float32, float)
DECLARE_FOR_INT4(float32, float, bfloat16, bfloat16)
DECLARE_FOR_INT4(bfloat16, bfloat16, float32, float)
DECLARE_FOR_INT4(bfloat16, bfloat16, bfloat16, bfloat16)

// Rows of W in a block of four-bit weights, which depends on the width of a vector.
int rows_of_block(void);

// The size of a structure, or the value of a constant above, by its name; -1 for an unknown name.
Long interface_value(const char *name);
}
#line 15 "csrc/vector.h"

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
#line 7 "csrc/storage.h"

// `widened` and `room_for` give numbers in the type of the arithmetic: in place, or in new memory that is filled or
// not. `narrowed` rounds them back to their place and frees the memory; `dropped` only frees it.
template <typename A> static A *widened(const A *stored, Long) { return (A *)stored; }
template <typename A> static A *widened(const bfloat16 *stored, Long count) {
    A *wide = (A *)malloc(count * sizeof(A));
    for (Long i = 0; i < count; i++) wide[i] = to_float(stored[i]);
    return wide;
}
template <typename A> static A *room_for(A *stored, Long) { return stored; }
template <typename A> static A *room_for(bfloat16 *, Long count) { return (A *)malloc(count * sizeof(A)); }
template <typename A> static void narrowed(A *, Long, A *) {}
template <typename A> static void narrowed(A *wide, Long count, bfloat16 *stored) {
    for (Long i = 0; i < count; i++) from_float(wide[i], stored + i);
    free(wide);
}
template <typename A> static void dropped(const A *, const A *) {}
template <typename A> static void dropped(const A *wide, const bfloat16 *) { free((void *)wide); }

template <typename T, typename A> static ALWAYS_INLINE A as_stored(A value) {
    T stored;
    from_float(value, &stored);
    return to_float(stored);
}
// Stores the first `count` elements of a vector, rounded to T, as activations (X = A) or in their storage (X = T).
template <typename T, typename A, typename X>
static ALWAYS_INLINE void store_rounded(Vec<A> values, X *to, int count) {
    T stored[Lanes<A>::count];
    store<A>(values, stored);
    store_some<A>(load<A>(stored), to, count);
}
#line 9 "csrc/codes.h"
#line 1 "csrc/threads.h"
// Work shared by threads, and views of tensors.


#ifdef _OPENMP
#include <omp.h>
#endif



// All threads of a team call a function that is marked TEAM. They share the iterations of its `omp for` loops, each of
// which ends with a barrier.
#define TEAM static

// Numbers that a kernel reads (SMALL) or changes (FEW): up to as many, one thread is faster than two.
static const Long SMALL = 32768, FEW = 65536;

static int own_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// The owner of item `number`, where owner i has the items before ends[i]; `number` becomes its index at the owner.
static int owner_of(Long *number, const Long *ends) {
    int owner = 0;
    while (*number >= ends[owner]) owner++;
    if (owner) *number -= ends[owner - 1];
    return owner;
}

// ---- shares of the batch

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

// ---- views

template <typename T> static ALWAYS_INLINE T *at(const View &view, Long row, Long token) {
    return (T *)view.data + row * view.row + token * view.token;
}

template <typename T> static void clear(const View &view, Long row, Long start, Long stop, Long first, Long last) {
    if (!view.data || first >= last) return;
    for (Long token = start; token < stop; token++)
        memset(at<T>(view, row, token) + first, 0, (last - first) * sizeof(T));
}

template <typename R> static void copy_or_clear(const R *from, R *to, Long count) {
    if (from) memcpy(to, from, count * sizeof(R));
    else memset(to, 0, count * sizeof(R));
}
#line 10 "csrc/codes.h"

static const int CODES_OF_BLOCK = 16;

// ---- rotation

// Whether the sign of this number is turned. The signs never change: stored codes depend on them.
static ALWAYS_INLINE bool is_turned(Long index) { return !((uint32_t)(index + 1) * 0x9E3779B1u >> 15 & 1); }

// The orthonormal transform of each block, whose size is the largest power of two that divides the width. Not inlined,
// since a product that is contracted with a later sum would not be rounded as in PyTorch.
template <typename A> static __attribute__((noinline)) void hadamard(A *x, Long width) {
    const Long block = width & -width;
    for (Long step = 1; step < block; step *= 2)
        for (Long start = 0; start < width; start += 2 * step)
            for (Long i = start; i < start + step; i++) {
                const A one = x[i], other = x[i + step];
                x[i] = one + other, x[i + step] = one - other;
            }
    const A factor = (A)sqrt(1.0 / block);
    for (Long i = 0; i < width; i++) x[i] *= factor;
}
template <typename A> static void flip_signs(A *x, Long width) {
    for (Long i = 0; i < width; i++) x[i] = is_turned(i) ? -x[i] : x[i];
}
template <typename A> static void rotate_vector(A *x, Long width) {
    flip_signs(x, width);
    hadamard(x, width);
}
template <typename A> static void rotate_vector_back(A *x, Long width) {
    hadamard(x, width);
    flip_signs(x, width);
}

// ---- sizes

// Bits of a code are stored in planes of 8, 4, 2 or 1 bits, low bits first.
static ALWAYS_INLINE Long plane_of(Long bits) { return bits >= 8 ? 8 : bits >= 4 ? 4 : bits >= 2 ? 2 : 1; }
static ALWAYS_INLINE Long plane_bytes(Long width, Long bits) {
    return (width + CODES_OF_BLOCK - 1) / CODES_OF_BLOCK * (CODES_OF_BLOCK / 8) * bits;
}
// The first bit of a code in its block: of four bits, even codes come before odd ones.
static ALWAYS_INLINE Long place_in_block(Long plane, Long code) {
    return plane == 4 ? code % 2 * 32 + code / 2 * 4 : code * plane;
}
static ALWAYS_INLINE Long numbers_of_group(const Codec &codec) { return codec.has_shift ? 2 : 1; }
static ALWAYS_INLINE double half_of(Long bits) { return (double)(1 << (bits - 1)) - 0.5; }

// The scale (number 0) or the shift (number 1) of a group, as it is stored.
static ALWAYS_INLINE bfloat16 *grid_of(const uint8_t *vector, const Codec &codec, Long width, Long group,
                                       Long number) {
    return (bfloat16 *)(vector + plane_bytes(width, codec.bits)) + group * numbers_of_group(codec) + number;
}
static ALWAYS_INLINE float load_bfloat16(const bfloat16 *from) {
    bfloat16 stored;
    memcpy(&stored, from, sizeof stored);
    return to_float(stored);
}

// ---- encoding

// Rounded to bfloat16; infinity becomes NaN.
template <typename A> static A store_grid(A value, bfloat16 *to) {
    bfloat16 stored;
    from_float((float)value, &stored);
    if ((stored.bits & 0x7f80) == 0x7f80) stored.bits = 0x7fc0;
    memcpy(to, &stored, sizeof stored);
    return (A)to_float(stored);
}

// Stores the grid of a group; `found` is its scale and its shift. Not inlined, for the reason of `hadamard`.
template <typename A>
static __attribute__((noinline)) void make_grid(const A *x, Long count, const Codec &codec, bfloat16 *grid, A *found) {
    A low = x[0], high = x[0], largest = 0;
    bool is_nan = false;
    for (Long i = 0; i < count; i++) {
        const A size = x[i] < 0 ? -x[i] : x[i];
        low = x[i] < low ? x[i] : low, high = x[i] > high ? x[i] : high, largest = size > largest ? size : largest;
        is_nan |= x[i] != x[i];
    }
    if (is_nan) low = high = largest = (A)NAN;
    if (!codec.has_shift) {
        found[0] = store_grid(largest / (A)half_of(codec.bits), grid);
        found[1] = -(A)half_of(codec.bits) * found[0];
        return;
    }
    found[1] = store_grid(low + (A)0, grid + 1);
    const A range = high - found[1];
    found[0] = store_grid((range < 0 ? (A)0 : range) / (A)((1 << codec.bits) - 1) + (A)0, grid);
}

static ALWAYS_INLINE void put_code(uint8_t *codes, Long width, Long bits, Long index, unsigned code) {
    for (Long low = 0; low < bits;) {
        const Long plane = plane_of(bits - low), place = place_in_block(plane, index % CODES_OF_BLOCK);
        uint8_t *block = codes + plane_bytes(width, low) + index / CODES_OF_BLOCK * (CODES_OF_BLOCK / 8) * plane;
        block[place / 8] |= (code >> low & ((1 << plane) - 1)) << place % 8;
        low += plane;
    }
}

// Encodes a vector, which is rotated in place.
template <typename A> static void encode(A *x, Long width, const Codec &codec, uint8_t *to) {
    const Long size = width / codec.groups;
    const A most = (A)((1 << codec.bits) - 1);
    rotate_vector(x, width);
    memset(to, 0, plane_bytes(width, codec.bits));
    for (Long group = 0; group < codec.groups; group++) {
        A grid[2];
        make_grid(x + group * size, size, codec, grid_of(to, codec, width, group, 0), grid);
        const A step = grid[0] == 0 ? (A)1 : grid[0];
        for (Long i = group * size; i < (group + 1) * size; i++) {
            A level = (A)nearbyint((x[i] - grid[1]) / step);  // half to even
            level = level < 0 ? (A)0 : level > most ? most : level == level ? level : (A)0;
            const unsigned code = (unsigned)level;
            put_code(to, width, codec.bits, i, codec.bits == 8 ? code ^ 0x80 : code);
        }
    }
}

// x (count, width) -> y (count, bytes).
template <typename T>
static void encode_all(const T *x, Long count, Long width, const Codec &codec, uint8_t *y, int threads) {
    typedef Real<T> A;
#pragma omp parallel num_threads(threads) if (count * width > FEW)
    {
        A *vector = (A *)malloc(width * sizeof(A));
#pragma omp for schedule(static)
        for (Long i = 0; i < count; i++) {
            for (Long c = 0; c < width; c++) vector[c] = to_float(x[i * width + c]);
            encode(vector, width, codec, y + i * codec.nbytes);
        }
        free(vector);
    }
}

// ---- levels

// The first bit of each code of a block in the words of its plane.
static const uint32_t PLACES_OF_4[] = {0, 0, 4, 4, 8, 8, 12, 12, 16, 16, 20, 20, 24, 24, 28, 28};
static const uint32_t PLACES_OF_2[] = {0, 2, 4, 6, 8, 10, 12, 14, 16, 18, 20, 22, 24, 26, 28, 30};
static const uint32_t PLACES_OF_1[] = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};

// A vector of words whose low bits are the codes from `index` on, in one plane; other bits are of other codes. Of one
// bit, the word has two bytes of what follows, which is in the same vector of codes.
template <int PLANE> static ALWAYS_INLINE Words load_plane(const uint8_t *plane, Long index) {
    typedef uint64_t Pairs __attribute__((vector_size(VECTOR_BYTES)));
    const uint8_t *block = plane + index / CODES_OF_BLOCK * (CODES_OF_BLOCK / 8) * PLANE;
    Words words, places;
    if (PLANE == 4) {
        uint64_t both;
        memcpy(&both, block, sizeof both);
        const Pairs pairs = both - Pairs{};
        memcpy(&words, &pairs, sizeof words);
    } else {
        uint32_t word;
        memcpy(&word, block, sizeof word);
        words = word - Words{};
    }
    const uint32_t *from = PLANE == 4 ? PLACES_OF_4 : PLANE == 2 ? PLACES_OF_2 : PLACES_OF_1;
    memcpy(&places, from + index % CODES_OF_BLOCK, sizeof places);
    return words >> places;
}

// The low bits of each word as numbers: first + step * bits.
template <int PLANE> static ALWAYS_INLINE Vec<float> numbers_of_plane(Words words, float first, float step) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    Vec<float> table;  // the instruction reads four bits
    for (int code = 0; code < 16; code++) table[code] = first + step * (code & ((1 << PLANE) - 1));
    return (Vec<float>)_mm512_permutexvar_ps((__m512i)words, (__m512)table);
#else
    typedef Lanes<float>::Int Int;
    return __builtin_convertvector((Int)(words & ((1 << PLANE) - 1)), Vec<float>) * step + first;
#endif
}

// A vector of levels from `index` on, less the middle of the grid; of 8 bits, less the middle and a half.
template <int BITS> static ALWAYS_INLINE Vec<float> load_levels(const uint8_t *codes, Long width, Long index, float) {
    if (BITS == 8) return __builtin_convertvector((Lanes<float>::Int)widen((const int8_t *)codes + index), Vec<float>);
    const int low = BITS >= 4 ? 4 : 2, high = BITS > low ? BITS - low : 1;
    Vec<float> levels = numbers_of_plane<low>(load_plane<low>(codes, index), (float)-half_of(BITS), 1);
    if (BITS > low)
        levels += numbers_of_plane<high>(load_plane<high>(codes + plane_bytes(width, low), index), 0, 1 << low);
    return levels;
}
template <int BITS>
static ALWAYS_INLINE Vec<double> load_levels(const uint8_t *codes, Long width, Long index, double) {
    Vec<double> levels;
    for (int lane = 0; lane < Lanes<double>::count; lane++) {
        const Long own = index + lane;
        unsigned code = 0;
        for (Long low = 0; low < BITS;) {
            const Long plane = plane_of(BITS - low), place = place_in_block(plane, own % CODES_OF_BLOCK);
            const uint8_t *block =
                codes + plane_bytes(width, low) + own / CODES_OF_BLOCK * (CODES_OF_BLOCK / 8) * plane;
            code |= (block[place / 8] >> place % 8 & ((1u << plane) - 1)) << low;
            low += plane;
        }
        levels[lane] = BITS == 8 ? (double)(int8_t)code : code - half_of(BITS);
    }
    return levels;
}

// The scales of a group of some vectors, and the shifts that belong to the levels of `load_levels`.
template <typename A>
static void load_grids(const uint8_t *vectors, const Codec &codec, Long width, Long group, int count, A *scales,
                       A *shifts) {
    for (int i = 0; i < count; i++) {
        const uint8_t *vector = vectors + i * codec.nbytes;
        const A scale = load_bfloat16(grid_of(vector, codec, width, group, 0));
        scales[i] = scale;
        if (codec.has_shift)
            shifts[i] = load_bfloat16(grid_of(vector, codec, width, group, 1)) + (A)half_of(codec.bits) * scale;
        else shifts[i] = codec.bits == 8 ? (A)0.5 * scale : (A)0;
    }
}
#line 8 "csrc/code_products.h"

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
#line 7 "csrc/attention.h"



// ---- keys and values of one head, as they are stored

// Vectors of numbers of type T.
template <typename A, typename T> struct PlainVectors {
    const T *data;
    Long stride, width;

    // Products of some lines with `count` vectors from `start` on.
    template <int LINES> void score(const A *queries, Long start, int count, A (*scores)[KEYS_AT_A_TIME]) const {
        for (int i = 0; i < count; i++) {
            const T *key = data + (start + i) * stride;
            Vec<A> totals[LINES] = {};
            for (Long c = 0; c < width; c += Lanes<A>::count) {
                Vec<A> part = load<A>(key + c);
                for (int line = 0; line < LINES; line++) totals[line] += part * load<A>(queries + line * width + c);
            }
            for (int line = 0; line < LINES; line++) scores[line][i] = sum<A>(totals[line]);
        }
    }

    // Adds `count` vectors from `start` on, times their shares of each line, to `mixed`.
    template <int LINES> void mix(const A (*shares)[KEYS_AT_A_TIME], Long start, int count, A *mixed) const {
        const int lanes = Lanes<A>::count;
        for (Long c = 0; c < width; c += 2 * lanes) {
            const int wide = c + lanes < width;
            Vec<A> sums[LINES][2];
            for (int line = 0; line < LINES; line++) {
                sums[line][0] = load<A>(mixed + line * width + c);
                sums[line][1] = wide ? load<A>(mixed + line * width + c + lanes) : Vec<A>{};
            }
            for (int i = 0; i < count; i++) {
                const T *value = data + (start + i) * stride + c;
                Vec<A> one = load<A>(value), other = wide ? load<A>(value + lanes) : Vec<A>{};
                for (int line = 0; line < LINES; line++) {
                    sums[line][0] += shares[line][i] * one;
                    sums[line][1] += shares[line][i] * other;
                }
            }
            for (int line = 0; line < LINES; line++) {
                store<A>(sums[line][0], mixed + line * width + c);
                if (wide) store<A>(sums[line][1], mixed + line * width + c + lanes);
            }
        }
    }
};

// Vectors of codes; queries and mixed values are rotated. Lines of float64 are computed one by one, since compilers
// with sanitizers would need minutes for all combinations.
template <typename A> struct CodedVectors {
    const uint8_t *data;
    Codec codec;
    Long width;

    template <int LINES> void score(const A *queries, Long start, int count, A (*scores)[KEYS_AT_A_TIME]) const {
        const int together = sizeof(A) == 4 ? LINES : 1;
        for (int line = 0; line < LINES; line += together)
            score_codes<A, together>(queries + line * width, data + start * codec.nbytes, codec, width, count,
                                     scores + line);
    }
    template <int LINES> void mix(const A (*shares)[KEYS_AT_A_TIME], Long start, int count, A *mixed) const {
        const int together = sizeof(A) == 4 ? LINES : 1;
        for (int line = 0; line < LINES; line += together)
            mix_codes<A, together>(shares + line, data + start * codec.nbytes, codec, width, count,
                                   mixed + line * width);
    }
};

// ---- attention of one head

// Replaces scores by shares, whose sum is added to `weight`, and rescales the earlier results of the line.
template <typename A>
static void share_out(A *scores, const uint8_t *mask, int count, Long width, A *most, A *weight, A *mixed) {
    const int lanes = Lanes<A>::count;
    A highest = *most;  // NaN from the first score that is NaN
    for (int i = 0; i < count; i++) {
        if (mask && !mask[i]) scores[i] = -INFINITY;
        A score = scores[i];
        highest = score > highest || score != score ? score : highest;
    }
    for (int i = count; i < KEYS_AT_A_TIME; i++) scores[i] = -INFINITY;
    if (highest == (A)-INFINITY) {
        memset(scores, 0, KEYS_AT_A_TIME * sizeof(A));
        return;
    }
    Vec<A> total = {};
    for (int i = 0; i < KEYS_AT_A_TIME; i += lanes) {
        Vec<A> exponent = load<A>(scores + i) - highest;
        Vec<A> share = exp2_of(exponent);
        typename Lanes<A>::Int is_unseen = exponent == (A)-INFINITY;
        share = is_unseen ? Vec<A>{} : share;
        total += share;
        store<A>(share, scores + i);
    }
    A kept = *most == (A)-INFINITY ? 0 : exp2_of(broadcast<A>(*most - highest))[0];
    *weight = *weight * kept + sum<A>(total);
    for (Long c = 0; c < width; c += lanes) store<A>(load<A>(mixed + c) * kept, mixed + c);
    *most = highest;
}

// The queries of all lines. The first `sinks` keys have queries of their own, whose rotation differs.
template <typename A> struct Queries {
    const A *scaled, *for_sinks;
    Long sinks;
};

// Some lines, from `offset` on, against keys [first, last): the highest score, the sum of the weights, and the
// weighted sum of the values.
template <typename A, int LINES, typename Vectors>
static void attend_part(const Queries<A> &queries, Long offset, const Vectors &keys, const Vectors &values,
                        const uint8_t *const *masks, Long first, Long last, A *most, A *weight, A *mixed) {
    const Long width = keys.width;
    A scores[LINES][KEYS_AT_A_TIME];
    for (int line = 0; line < LINES; line++) most[line] = -INFINITY, weight[line] = 0;
    memset(mixed, 0, LINES * width * sizeof(A));
    for (Long start = first, count; start < last; start += count) {
        const bool are_sinks = start < queries.sinks;
        count = least(KEYS_AT_A_TIME, (are_sinks && queries.sinks < last ? queries.sinks : last) - start);
        const A *lines = (are_sinks ? queries.for_sinks : queries.scaled) + offset;
        keys.template score<LINES>(lines, start, count, scores);
        for (int line = 0; line < LINES; line++)
            share_out(scores[line], masks[line] ? masks[line] + start : 0, count, width, most + line, weight + line,
                      mixed + line * width);
        values.template mix<LINES>(scores, start, count, mixed);
    }
}

// ---- storage of the keys and values of all heads

template <typename T> struct PlainStorage {
    typedef PlainVectors<Real<T>, T> Vectors;
    const T *key, *value;

    Vectors keys(const Shape &s, Long row, Long head) const {
        return {key + row * s.key[0] + head * s.key[1], s.key[2], s.width};
    }
    Vectors values(const Shape &s, Long row, Long head) const {
        return {value + row * s.value[0] + head * s.value[1], s.value[2], s.width};
    }
    void restore(Real<T> *, Long) const {}
};

// The strides of the shape count vectors here.
template <typename T> struct CodedStorage {
    typedef CodedVectors<Real<T>> Vectors;
    const uint8_t *key, *value;
    const Codec &key_codec, &value_codec;

    Vectors keys(const Shape &s, Long row, Long head) const {
        return {key + (row * s.key[0] + head * s.key[1]) * key_codec.nbytes, key_codec, s.width};
    }
    Vectors values(const Shape &s, Long row, Long head) const {
        return {value + (row * s.value[0] + head * s.value[1]) * value_codec.nbytes, value_codec, s.width};
    }
    void restore(Real<T> *mixed, Long width) const { rotate_vector_back(mixed, width); }
};

static Long parts_of(Long keys, int threads) { return keys < 2 * KEYS_AT_A_TIME ? 1 : least(MOST_PARTS, threads); }

// The place of a query for `attend`, which reads the queries of the heads that share keys together.
template <typename A> static A *place_of(A *scaled, const Shape &s, Long row, Long head, Long query) {
    return scaled + (((row * s.key_heads + head / s.group) * s.group + head % s.group) * s.queries + query) * s.width;
}

// Attention of scaled queries: mixed (rows, queries, heads, width). `found` has room for the results of each part of
// the keys: rows * heads * queries * parts * (2 + width) numbers.
template <typename T, typename A, typename Storage>
TEAM void attend(const Queries<A> &queries, const Storage &storage, const uint8_t *mask, const Shape &s, int threads,
                 A *found, A *mixed) {
    const Long lines = s.group * s.queries, heads = s.rows * s.key_heads, width = s.width, size = 2 + width;
    const Long parts = parts_of(s.keys, threads), step = (s.keys + parts - 1) / parts;
#pragma omp for schedule(static) collapse(2)
    for (Long head = 0; head < heads; head++)
        for (Long part = 0; part < parts; part++) {
            Long row = head / s.key_heads, own = head % s.key_heads;
            const typename Storage::Vectors keys = storage.keys(s, row, own), values = storage.values(s, row, own);
            Long first = part * step, last = first + step < s.keys ? first + step : s.keys;
            A *here = found + (head * parts + part) * lines * size;
            for (Long line = 0; line < lines;) {
                const uint8_t *masks[4];
                for (int i = 0; i < 4; i++)
                    masks[i] = mask ? mask + row * s.mask_row + (line + i) % s.queries * s.mask_query : 0;
                const Long offset = (head * lines + line) * width;
                A *most = here + line, *weight = here + lines + line, *sums = here + 2 * lines + line * width;
#define ATTEND(N) attend_part<A, N>(queries, offset, keys, values, masks, first, last, most, weight, sums)
                const int count = least(4, lines - line);
                if (count == 1) ATTEND(1);
                if (count == 2) ATTEND(2);
                if (count == 3) ATTEND(3);
                if (count == 4) ATTEND(4);
#undef ATTEND
                line += count;
            }
        }
#pragma omp for schedule(static) collapse(2)
    for (Long head = 0; head < heads; head++)
        for (Long line = 0; line < lines; line++) {
            Long row = head / s.key_heads, own = head % s.key_heads * s.group + line / s.queries;
            A *to = mixed + ((row * s.queries + line % s.queries) * s.key_heads * s.group + own) * width;
            A most = -INFINITY, weight = 0;
            for (Long part = 0; part < parts; part++) {
                A other = found[(head * parts + part) * lines * size + line];
                most = other > most ? other : most;
            }
            A shares[MOST_PARTS];
            for (Long part = 0; part < parts; part++) {
                const A *here = found + (head * parts + part) * lines * size;
                shares[part] = here[line] == (A)-INFINITY ? 0 : (A)exp2(here[line] - most);
                weight += shares[part] * here[lines + line];
            }
            for (Long c = 0; c < width; c++) {
                A total = 0;
                for (Long part = 0; part < parts; part++) {
                    const A *here = found + (head * parts + part) * lines * size;
                    total += shares[part] * here[2 * lines + line * width + c];
                }
                to[c] = weight == 0 ? (A)0 : total / weight;
            }
            storage.restore(to, width);
            for (Long c = 0; c < width; c++) to[c] = as_stored<T>(to[c]);
        }
}

template <typename T>
static void attend_all(const T *query, const T *key, const T *value, const uint8_t *mask, double scaling, T *y,
                       const Shape *shape, int threads) {
    typedef Real<T> A;
    const Shape s = *shape;
    const Long heads = s.key_heads * s.group, lines = s.rows * heads * s.queries, count = lines * s.width;
    A *scaled = (A *)malloc(count * sizeof(A)), *mixed = room_for<A>(y, count);
    A *found = (A *)malloc(lines * parts_of(s.keys, threads) * (2 + s.width) * sizeof(A));
    for (Long row = 0; row < s.rows; row++)
        for (Long head = 0; head < heads; head++)
            for (Long token = 0; token < s.queries; token++) {
                const T *from = query + row * s.query[0] + head * s.query[1] + token * s.query[2];
                A *to = place_of(scaled, s, row, head, token);
                for (Long c = 0; c < s.width; c++) to[c] = to_float(from[c]) * (A)(scaling * LOG2_E);
            }
#pragma omp parallel num_threads(threads) if (lines / s.group * s.keys * s.width > SMALL)
    attend<T>(Queries<A>{scaled, 0, 0}, PlainStorage<T>{key, value}, mask, s, threads, found, mixed);
    free(found);
    free(scaled);
    narrowed(mixed, count, y);
}
#line 3 "csrc/kernels.cpp"

#line 1 "csrc/convolution.h"
// Causal depthwise convolution with silu, forward and backward.
//
// Inputs are numbered from the first one of the initial state, so token t reads inputs t to t + K - 1. T is the type
// that activations are stored in, R the type of the arithmetic.




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
#line 5 "csrc/kernels.cpp"
#line 1 "csrc/expert_vector.h"
// Expert vectors: y = x + Q ((z - 1) * Q^T x) with Q (width, rank), on the input or the output of a product.


#line 1 "csrc/linear.h"
// Products with few rows: y (rows, N) = x (rows, K) W^T + bias, for weights that are plain, int8 by row or int4 by
// group.
//
// A product reads each weight once. The products of a layer that have the same input are computed together.


#line 1 "csrc/int4.h"
// Weights of four bits, as torchao packs them: w = (q - 8) * scale + zero, with a scale and a zero for each group of
// inputs. A block holds ROWS_OF_BLOCK rows of W column by column; a byte holds two of them.




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
#line 8 "csrc/linear.h"



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
#line 5 "csrc/expert_vector.h"

static Long width_of_expert(const Weight *w) { return w->on_outputs ? w->outputs : w->inputs; }
static Long strips_of(Long width) { return (width + CHANNELS_AT_A_TIME - 1) / CHANNELS_AT_A_TIME; }
// The number of elements that `rescale` needs in `room`: coordinates (rows, rank) for each strip, and a sum for each
// thread.
static Long room_to_rescale(const Weight *w, Long rows, int threads) {
    return (strips_of(width_of_expert(w)) + threads) * rows * w->rank;
}
// The contribution of some channels to Q^T x, for all rows: found (rows, rank).
template <typename A, typename T>
static void coordinates_of(const A *x, Long rows, Long width, const T *basis, Long stride, Long rank, Long first,
                           Long last, A *found) {
    const int lanes = Lanes<A>::count, parts = 4;
    for (Long r = 0; r < rank; r += parts * lanes)
        for (Long m = 0; m < rows; m++) {
            Vec<A> totals[parts] = {};
            for (Long i = first; i < last; i++)
                for (int v = 0; v < parts; v++) {
                    const Long column = r + v * lanes;
                    if (column >= rank) break;
                    totals[v] +=
                        x[m * width + i] * load_some<A>(basis + i * stride + column, least(lanes, rank - column));
                }
            for (int v = 0; v < parts; v++) {
                const Long column = r + v * lanes;
                if (column >= rank) break;
                store_some<A>(totals[v], found + m * rank + column, least(lanes, rank - column));
            }
        }
}

// (z - 1) * Q^T x (rows, rank) from the coordinates of all strips; every thread computes it for itself.
template <typename A> static void add_up(const Weight *w, Long rows, const A *found, A *to) {
    const int lanes = Lanes<A>::count;
    const Long rank = w->rank, size = rows * rank, strips = strips_of(width_of_expert(w));
    for (Long m = 0; m < rows; m++)
        for (Long r = 0; r < rank; r += lanes) {
            const int count = least(lanes, rank - r);
            Vec<A> total = {};
            for (Long strip = 0; strip < strips; strip++)
                total += load_some<A>(found + strip * size + m * rank + r, count);
            total *= load_some<A>((const A *)w->delta + m * w->delta_stride + r, count);
            store_some<A>(total, to + m * rank + r, count);
        }
}

// The expert vectors of several products; y may be x. A thread changes the channels that it has read, so it reads its
// part of Q from memory once.
template <typename T, typename A>
TEAM void rescale(const Product<A> *all, int count, Long rows, A *room, int threads, const A *residual = 0) {
    Long ends[MOST_TOGETHER], strips = 0;
    A *found[MOST_TOGETHER], *total[MOST_TOGETHER];
    for (int i = 0; i < count; i++) {
        const Weight *w = all[i].weight;
        const Long own = strips_of(width_of_expert(w));
        ends[i] = strips += own;
        found[i] = room;
        total[i] = room + (own + own_number()) * rows * w->rank;
        room += room_to_rescale(w, rows, threads);
    }
#pragma omp for schedule(static)
    for (Long number = 0; number < strips; number++) {
        Long strip = number;
        const int i = owner_of(&strip, ends);
        const Weight *w = all[i].weight;
        const Long width = width_of_expert(w), first = strip * CHANNELS_AT_A_TIME;
        coordinates_of<A, T>(all[i].x, rows, width, (const T *)w->basis, w->basis_stride, w->rank, first,
                             first + least(CHANNELS_AT_A_TIME, width - first), found[i] + strip * rows * w->rank);
    }
    for (int i = 0; i < count; i++) add_up(all[i].weight, rows, found[i], total[i]);
#pragma omp for schedule(static)
    for (Long number = 0; number < strips; number++) {
        Long strip = number;
        const int i = owner_of(&strip, ends);
        const Weight *w = all[i].weight;
        const int lanes = Lanes<A>::count;
        const Long width = width_of_expert(w), first = strip * CHANNELS_AT_A_TIME;
        for (Long c = first; c < first + least(CHANNELS_AT_A_TIME, width - first); c++)
            for (Long m = 0; m < rows; m++) {
                const T *direction = (const T *)w->basis + c * w->basis_stride;
                Vec<A> change = {};
                for (Long r = 0; r < w->rank; r += lanes)
                    change += load_some<A>(total[i] + m * w->rank + r, least(lanes, w->rank - r)) *
                              load_some<A>(direction + r, least(lanes, w->rank - r));
                const A value = as_stored<T>(all[i].x[m * width + c] + sum<A>(change));
                all[i].y[m * width + c] = residual ? as_stored<T>(residual[m * width + c] + value) : value;
            }
    }
}

template <typename T> static void rescale_all(const T *x, Long rows, const Weight *weight, T *y, int threads) {
    typedef Real<T> A;
    const Long count = rows * weight->inputs;
    A *wide = widened<A>(x, count), *found = room_for<A>(y, count);
    A *room = (A *)malloc(room_to_rescale(weight, rows, threads) * sizeof(A));
    const Product<A> product = {weight, wide, found};
#pragma omp parallel num_threads(threads) if (count * weight -> rank > SMALL)
    rescale<T>(&product, 1, rows, room, threads);
    free(room);
    narrowed(found, count, y);
    dropped(wide, x);
}
#line 6 "csrc/kernels.cpp"



#line 1 "csrc/norm_rope_gate.h"
// RMS norm, rotary position embedding, gated activation.
//
// X is A for activations between kernels, or T for tensors in their storage; y may be x.





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
#line 10 "csrc/kernels.cpp"
#line 1 "csrc/program.h"
// The decode program: a list of operations over a workspace, run by one team of threads.
//
// Python writes the list and plans the workspace (`decode_builder_mambaformer.py`). All threads run all operations,
// and each operation ends with a barrier. Activations are of type A, rounded to T, the type that they are stored in.






#line 1 "csrc/scan.h"
// The selective scan (Mamba, equations 2a and 2b), forward and backward, in chunks of tokens.
//
// A vector holds the N numbers of one channel, so states, A, B and C are read in the order in which they are stored.
// T is the type that activations are stored in, R the type of the arithmetic.


#line 1 "csrc/state_codes.h"
// Recurrent states in 8 bits, bit for bit as `ops_state_codes_mambaformer.py` computes them. The numbers of a group
// share a power of two.




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
#line 8 "csrc/scan.h"


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
#line 12 "csrc/program.h"

// The decode step that operations are run for. `rows` counts all tokens: an activation is (rows, width).
template <typename A> struct Run {
    const ProgramInputs &inputs;
    A *workspace;
    Long rows;
    int threads;

    A *at(Long buffer) const { return buffer < 0 ? 0 : workspace + buffer * rows; }
    View view(const Columns &columns) const { return {at(columns.buffer) + columns.first, columns.stride, 0}; }
};

template <typename T, typename A> TEAM void run(const NormOp &op, const Run<A> &run) {
    const double eps = run.inputs.settings[op.eps];
    rms_norm<T>(run.at(op.x), run.rows, op.width, (const T *)op.weight, eps, run.at(op.y));
}

// ---- products and expert vectors

template <typename A>
static void resolve(const Projection *projections, Long count, const Run<A> &run, Product<A> *to) {
    for (const Projection *p = projections; p < projections + count; p++)
        *to++ = {p->weight, run.at(p->x), run.at(p->y)};
}

template <typename T, typename A> TEAM void run(const LinearOp &op, const Run<A> &run) {
    Product<A> all[MOST_TOGETHER];
    resolve(op.projections, op.count, run, all);
    products<T>(all, op.count, run.rows, run.at(op.residual));
}

template <typename T, typename A> TEAM void run(const ScaleOp &op, const Run<A> &run) {
    Product<A> all[MOST_TOGETHER];
    resolve(op.projections, op.count, run, all);
    rescale<T>(all, op.count, run.rows, run.at(op.scratch), run.threads, run.at(op.residual));
}

template <typename T, typename A> TEAM void run(const GateOp &op, const Run<A> &run) {
    gate<T>(run.at(op.gates), run.at(op.x), run.rows * op.width, run.at(op.y));
}

// ---- attention

// Writes one key or value to its slot; if it is encoded, it is rotated in place.
template <typename T, typename A>
static void write_slot(A *from, Long width, const Codec &codec, Long slot, void *slots) {
    if (codec.bits) return encode(from, width, codec, (uint8_t *)slots + slot * codec.nbytes);
    T *to = (T *)slots + slot * width;
    for (Long c = 0; c < width; c++) from_float(from[c], to + c);
}

// Scales one query for `attend`.
template <typename A> static void scale_query(const A *from, Long width, A factor, bool is_coded, A *to) {
    for (Long c = 0; c < width; c++) to[c] = from[c] * factor;
    if (is_coded) rotate_vector(to, width);
}

template <typename T, typename A> TEAM void run(const WriteKeysOp &op, const Run<A> &run) {
    const ProgramInputs &inputs = run.inputs;
    const KeySlots &stored = inputs.key_slots[op.key_slots];
    const KeyLayout &layout = inputs.layouts[stored.layout];
    const Long width = op.head_dim, key_heads = op.key_heads;
    const A factor = (A)(inputs.settings[op.scaling] * LOG2_E);
    A *query = run.at(op.query), *key = run.at(op.key), *value = run.at(op.value);
    A *scaled = run.at(op.scaled), *for_sinks = run.at(op.for_sinks);
    const bool is_coded = stored.key_codec.bits;
    Shape shape = {};
    shape.key_heads = key_heads, shape.group = op.heads / key_heads, shape.queries = inputs.tokens,
    shape.width = width;
#pragma omp for schedule(static) collapse(3)
    for (Long row = 0; row < inputs.rows; row++)
        for (Long head = 0; head < op.heads + 2 * key_heads; head++)
            for (Long token = 0; token < inputs.tokens; token++) {
                const Long index = row * inputs.tokens + token, own = (head - op.heads) % key_heads;
                const bool is_query = head < op.heads, is_value = head >= op.heads + key_heads;
                A *from = is_query   ? query + (index * op.heads + head) * width
                          : is_value ? value + (index * key_heads + own) * width
                                     : key + (index * key_heads + own) * width;
                if (is_query && layout.sinks) {
                    const Long angle = row * layout.sink_angle_row + token * width;
                    A *to = place_of(for_sinks, shape, row, head, token);
                    turn<T>(from, width / 2, (const T *)layout.sink_cosines + angle,
                            (const T *)layout.sink_sines + angle, to);
                    scale_query(to, width, factor, is_coded, to);
                }
                if (inputs.cosines && !is_value) {
                    const Long angle = row * inputs.angle_row + token * width;
                    turn<T>(from, width / 2, (const T *)inputs.cosines + angle, (const T *)inputs.sines + angle, from);
                }
                if (is_query) {
                    scale_query(from, width, factor, is_coded, place_of(scaled, shape, row, head, token));
                } else {
                    const Long place =
                        layout.slots ? layout.slots[row * layout.slots_row + token] : layout.first_slot + token;
                    const Long slot = (row * key_heads + own) * stored.capacity + place;
                    if (is_value) write_slot<T>(from, width, stored.value_codec, slot, stored.values);
                    else write_slot<T>(from, width, stored.key_codec, slot, stored.keys);
                }
            }
}

template <typename T, typename A> TEAM void run(const AttendOp &op, const Run<A> &run) {
    const KeySlots &stored = run.inputs.key_slots[op.key_slots];
    const KeyLayout &layout = run.inputs.layouts[stored.layout];
    // Strides are in numbers, or in vectors if these are codes.
    const bool is_coded = stored.key_codec.bits;
    const Long token = is_coded ? 1 : op.head_dim, head = stored.capacity * token, row = op.key_heads * head;
    const Shape shape = {run.inputs.rows,  op.key_heads, op.heads / op.key_heads, run.inputs.tokens,  layout.keys,
                         op.head_dim,      {},           {row, head, token},      {row, head, token}, layout.mask_row,
                         layout.mask_query};
    const Queries<A> queries = {run.at(op.scaled), run.at(op.for_sinks), layout.sinks};
    A *scratch = run.at(op.scratch), *mixed = run.at(op.mixed);
    if (is_coded) {
        const uint8_t *keys = (const uint8_t *)stored.keys, *values = (const uint8_t *)stored.values;
        const CodedStorage<T> storage = {keys, values, stored.key_codec, stored.value_codec};
        attend<T>(queries, storage, layout.mask, shape, run.threads, scratch, mixed);
    } else {
        const PlainStorage<T> storage = {(const T *)stored.keys, (const T *)stored.values};
        attend<T>(queries, storage, layout.mask, shape, run.threads, scratch, mixed);
    }
}

// ---- recurrences

template <typename T, typename A> TEAM void run(const ConvStepOp &op, const Run<A> &run) {
    const int lanes = Lanes<A>::count;
    const Long kept = op.taps - 1, D = op.channels;
    const T *window = (const T *)run.inputs.states[op.state].before;
    const T *weight = (const T *)op.weight, *bias = (const T *)op.bias;
    T *next = (T *)run.inputs.states[op.state].after;
    const View x = run.view(op.x);
    A *y = run.at(op.y);
#pragma omp for schedule(static) collapse(2)
    for (Long row = 0; row < run.rows; row++)
        for (Long c = 0; c < D; c += lanes) {
            const int count = least(lanes, D - c);
            Vec<A> total = bias ? load_some<A>(bias + c, count) : Vec<A>{};
            for (Long tap = 0; tap < op.taps; tap++) {
                Vec<A> input = {}, taps = {};
                if (tap == kept) input = load_some<A>(at<A>(x, row, 0) + c, count);
                else if (window) input = load_some<A>(window + (row * kept + tap) * D + c, count);
                for (int lane = 0; lane < count; lane++) taps[lane] = to_float(weight[(c + lane) * op.taps + tap]);
                total += taps * input;
                if (tap) store_some<A>(input, next + (row * kept + tap - 1) * D + c, count);
            }
            store_rounded<T, A>(total * sigmoid<A>(total), y + row * D + c, count);
        }
}

template <typename T, typename A> TEAM void run(const InnerNormsOp &op, const Run<A> &run) {
    const Long first = op.widths[0], stride = first + op.widths[1] + op.widths[2];
    A *x = run.at(op.x), *y = run.at(op.y);
#pragma omp for schedule(static)
    for (Long row = 0; row < run.rows; row++) {
        A *part = x + row * stride;
        for (int i = 0; i < 3; part += op.widths[i], i++)
            if (op.weights[i]) {
                const double eps = run.inputs.settings[op.eps[i]];
                rms_norm_of_row<T>(part, op.widths[i], (const T *)op.weights[i], eps, part);
            }
        memcpy(y + row * first, x + row * stride, first * sizeof(A));
    }
}

// A weight in the type of the arithmetic: in place, or converted into `room`.
template <typename A> TEAM const A *wide_weight(const void *weight, Long, A *, const A *) { return (const A *)weight; }
template <typename A> TEAM const A *wide_weight(const void *weight, Long count, A *room, const bfloat16 *) {
#pragma omp for schedule(static)
    for (Long i = 0; i < count; i++) room[i] = to_float(((const bfloat16 *)weight)[i]);
    return room;
}

// One token of the selective scan, in shares of channels.
template <typename T, typename A> TEAM void scan_token(const Scan &scan) {
    const Long lanes = Lanes<A>::count, blocks = (scan.shares.channels + lanes - 1) / lanes;
#pragma omp for schedule(static) collapse(2)
    for (Long row = 0; row < scan.shares.rows; row++)
        for (Long share = 0; share < scan.shares.splits; share++) {
            const Long first = blocks * share / scan.shares.splits * lanes;
            const Long end = blocks * (share + 1) / scan.shares.splits * lanes;
            const Long last = end < scan.shares.channels ? end : scan.shares.channels;
            scan_share<A>(scan, row, first, last);
            A *y = at<A>(scan.y, row, 0);
            for (Long c = first; c < last; c++) y[c] = as_stored<T>(y[c]);
        }
}

template <typename T, typename A> TEAM void run(const RecurrenceStepOp &op, const Run<A> &run) {
    const Long D = op.channels, N = op.numbers;
    A *scratch = run.at(op.scratch);
    const State &state = run.inputs.states[op.state];
    Scan scan = {};
    scan.A = wide_weight<A>(op.A_log, D * N, scratch, (const T *)0);
    scan.D = wide_weight<A>(op.D, D, scratch + D * N, (const T *)0);
    scan.B = run.view(op.B), scan.C = run.view(op.C), scan.gate = run.view(op.gate);
    scan.u = {run.at(op.u), D, 0}, scan.dt = {run.at(op.dt), D, 0}, scan.y = {run.at(op.y), D, 0};
    scan.initial_state = state.before, scan.final_state = state.after;
    scan.numbers = N, scan.dt_softplus = scan.A_is_log = 1;
    scan.shares = {0, run.rows, 1, D, 2 * run.threads, run.threads, 0};
    scan_token<T, A>(scan);
}

// ---- the loop

template <typename T, typename A> TEAM void run_operations(const Op *first, const Op *last, const Run<A> &program) {
#define CASE(kind, type)                                                                                              \
    case kind: run<T>(*(const type *)op, program); break;
    for (const Op *op = first; op < last; op = (const Op *)((const char *)op + op->size)) {
        switch (op->kind) { FOR_EACH_OPERATION(CASE) }
    }
#undef CASE
}

// Runs the operations from `first` up to `last` on x (rows, tokens, width), the first buffer of the workspace; y is
// that buffer afterwards.
template <typename T>
static void run_program(const T *x, const ProgramInputs &inputs, const Op *first, const Op *last, T *y, int threads) {
    typedef Real<T> A;
    const Long rows = inputs.rows * inputs.tokens, count = rows * inputs.width;
    A *workspace = (A *)malloc(rows * inputs.workspace * sizeof(A));
    const Run<A> run = {inputs, workspace, rows, threads};
    for (Long i = 0; i < count; i++) workspace[i] = to_float(x[i]);
#pragma omp parallel num_threads(threads) if (inputs.width * inputs.width > SMALL)
    run_operations<T>(first, last, run);
    for (Long i = 0; i < count; i++) from_float(workspace[i], y + i);
    free(workspace);
}
#line 11 "csrc/kernels.cpp"



#define DEFINE_FOR_STORAGE(name, T)                                                                                   \
    void convolve_##name(const Convolution *conv) {                                                                   \
        for_each_share<Real<T>>(conv->shares, [&](Long row, Long, Long first, Long last) {                            \
            convolve_share<T>(*conv, row, first, last);                                                               \
        });                                                                                                           \
    }                                                                                                                 \
    void convolve_back_##name(const ConvolutionGradient *gradient) {                                                  \
        for_each_share<Real<T>>(gradient->of.shares, [&](Long row, Long, Long first, Long last) {                     \
            convolve_share_back<T>(*gradient, row, first, last);                                                      \
        });                                                                                                           \
    }                                                                                                                 \
    void scan_##name(const Scan *scan) {                                                                              \
        for_each_share<Real<T>>(                                                                                      \
            scan->shares, [&](Long row, Long, Long first, Long last) { scan_share<T>(*scan, row, first, last); });    \
    }                                                                                                                 \
    void scan_back_##name(const ScanGradient *gradient) {                                                             \
        for_each_share<Real<T>>(gradient->of.shares, [&](Long row, Long split, Long first, Long last) {               \
            scan_share_back<T>(*gradient, row, split, first, last);                                                   \
        });                                                                                                           \
    }                                                                                                                 \
    void linear_##name(const T *x, Long rows, const Weight *weight, T *y, int threads) {                              \
        linear<T>(x, rows, weight, y, threads);                                                                       \
    }                                                                                                                 \
    void rescale_##name(const T *x, Long rows, const Weight *weight, T *y, int threads) {                             \
        rescale_all<T>(x, rows, weight, y, threads);                                                                  \
    }                                                                                                                 \
    void rms_norm_##name(const T *x, Long rows, Long width, const T *weight, double eps, T *y, int threads) {         \
        _Pragma("omp parallel num_threads(threads) if (rows * width > FEW)")                                          \
            rms_norm<T>(x, rows, width, weight, eps, y);                                                              \
    }                                                                                                                 \
    void rotate_##name(const T *x, Long rows, Long heads, Long tokens, Long half, Long row_stride, Long head_stride,  \
                       Long token_stride, const T *cosines, const T *sines, Long angle_row, T *y, int threads) {      \
        const Long strides[] = {row_stride, head_stride, token_stride};                                               \
        rotate_all<T>(x, rows, heads, tokens, half, strides, cosines, sines, angle_row, y, threads);                  \
    }                                                                                                                 \
    void gate_##name(const T *gates, const T *x, Long count, T *y, int threads) {                                     \
        _Pragma("omp parallel num_threads(threads) if (count > FEW)") gate<T>(gates, x, count, y);                    \
    }                                                                                                                 \
    void attend_##name(const T *query, const T *key, const T *value, const uint8_t *mask, double scaling, T *y,       \
                       const Shape *shape, int threads) {                                                             \
        attend_all<T>(query, key, value, mask, scaling, y, shape, threads);                                           \
    }                                                                                                                 \
    void encode_##name(const T *x, Long count, Long width, const Codec *codec, uint8_t *y, int threads) {             \
        encode_all<T>(x, count, width, *codec, y, threads);                                                           \
    }                                                                                                                 \
    void run_program_##name(const T *x, const ProgramInputs *inputs, const Op *first, const Op *last, T *y,           \
                            int threads) {                                                                            \
        run_program<T>(x, *inputs, first, last, y, threads);                                                          \
    }
DEFINE_FOR_STORAGE(float32, float)
DEFINE_FOR_STORAGE(bfloat16, bfloat16)
DEFINE_FOR_STORAGE(float64, double)

#define DEFINE_FOR_STATES(name, R)                                                                                    \
    void round_states_##name(const R *states, Long rows, Long groups, Long numbers, const Long *positions, R *to,     \
                             int threads) {                                                                           \
        round_states<R>(states, rows, groups, numbers, positions, to, threads);                                       \
    }                                                                                                                 \
    void encode_states_##name(const R *states, Long groups, Long numbers, int8_t *codes, int threads) {               \
        encode_states<R>(states, groups, numbers, codes, threads);                                                    \
    }                                                                                                                 \
    void decode_states_##name(const int8_t *codes, Long groups, Long numbers, R *states, int threads) {               \
        decode_states<R>(codes, groups, numbers, states, threads);                                                    \
    }
DEFINE_FOR_STATES(float32, float)
DEFINE_FOR_STATES(float64, double)

#define DEFINE_FOR_INT4(name, T, scale_name, S)                                                                       \
    void unpack_int4_##name##_##scale_name(const uint8_t *packed, Long N, Long K, Long group, const S *scales, T *y,  \
                                           int threads) {                                                             \
        unpack_int4<T, S>(packed, N, K, group, scales, y, threads);                                                   \
    }
DEFINE_FOR_INT4(float32, float, float32, float)
DEFINE_FOR_INT4(float32, float, bfloat16, bfloat16)
DEFINE_FOR_INT4(bfloat16, bfloat16, float32, float)
DEFINE_FOR_INT4(bfloat16, bfloat16, bfloat16, bfloat16)

int rows_of_block(void) { return ROWS_OF_BLOCK; }

#define CONSTANT(name) {#name, name},
#define SIZE(type) {#type, sizeof(type)},
static const struct {
    const char *name;
    Long value;
} INTERFACE[] = {FOR_EACH_CONSTANT(CONSTANT) FOR_EACH_STRUCTURE(SIZE)};

Long interface_value(const char *name) {
    for (const auto &entry : INTERFACE)
        if (!strcmp(name, entry.name)) return entry.value;
    return -1;
}
"""

__all__ = ["SOURCE"]
