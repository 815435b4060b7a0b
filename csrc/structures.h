// Generated from ops_cpu_structures_mambaformer.py by scripts/sources.py: edit that file and run `make sources`.
#pragma once

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
