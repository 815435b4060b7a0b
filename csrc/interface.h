// The interface of the kernel library: every structure and every exported function.
//
// `ops_cpu_interface_mambaformer.py` declares the same structures for ctypes. All their fields are eight bytes wide,
// so they have no padding. Python compares sizes and constants (`interface_value`) when it loads the library, and does
// not use a library that disagrees.
//
// Letters (B, L, D, N, K, dt, A, B, C) are those of the table in `ops_mambaformer.py`. A function whose name ends in a
// storage type reads and writes activations and weights of that type; it computes in float, or in double for float64.
#pragma once

#include <stdint.h>

typedef int64_t Long;

struct bfloat16 {
    uint16_t bits;
};

// Increase it whenever a structure or a function changes.
static const Long INTERFACE_VERSION = 1;

// Tokens that the scan processes at a time. With N = 16, the states that training keeps take half the memory of u.
static const int CHUNK = 32;
// Bounds of the arguments: kernel size of a convolution, rows of activations in a product.
static const int MOST_TAPS = 16, MOST_ROWS = 16;

// ---- convolution and scan

// A tensor (rows, tokens, channels or numbers) whose last axis is contiguous; `data` is null if it was left out.
struct View {
    void *data;
    Long row, token;  // strides
};

// The batch, and how its rows are cut: into `splits` shares of whole vectors of channels. There are more shares than
// threads, so another program that takes a processor away delays one share and not half of the work.
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
    void *final_state;  // (B, D, N)
    void *checkpoints;  // (B, chunks, D, N): the states before each chunk, for training; or null
    Long numbers, dt_softplus, A_is_log;
    Shares shares;
};

struct ScanGradient {
    Scan of;
    View dy, du, ddt, dgate;
    const void *dfinal_state;
    void *dA, *dB, *dC, *dD, *dinitial_state;  // (B, D, N), twice (B, splits, L, N), (B, D), (B, D, N)
};

// ---- products and attention

enum WeightKind { PLAIN, INT8, INT4 };

// The weight of a linear module: data (outputs, inputs), and an expert vector if `rank` is not 0.
struct Weight {
    Long kind, data, scale, bias, outputs, inputs, group, has_narrow_scales;
    Long basis, basis_stride, rank, delta, delta_stride, on_outputs;
};

// Sizes and strides of query (rows, heads, queries, width), key and value (rows, key heads, keys, width), and of the
// mask (rows or 1, queries, keys); `group` heads share a key head. Strides are those of rows, heads and tokens.
struct Shape {
    Long rows, key_heads, group, queries, keys, width;
    Long query[3], key[3], value[3];
    Long mask_row, mask_query;
};

// ---- blocks of layers

// The part of a Mamba block that is no product. Weights are stored as activations are.
struct Recurrence {
    Long conv_weight, conv_bias, A_log, D, channels, taps, numbers, rank;
    Long norms[3];  // weights of the inner norms of dt, B and C; 0 without inner norms
    double eps[3];
    Long window, next_window;  // (rows, taps - 1, channels), stored as activations are; before and after the token
    Long state, next_state;    // (rows, channels, numbers); `window` and `state` are 0 before the first token
};

enum BlockKind { ATTENTION, MLP, MAMBA };

// A block is a norm, products with an operation between them, and the residual: x += block(norm(x)).
struct Block {
    Long kind, norm;
    double eps;
    Weight weights[4];  // attention: q, k, v, output; MLP: gate, up, down; Mamba: in, x, dt, out
    // Attention: the factor of queries, heads, and the memory of keys and values (rows, key heads, capacity,
    // head_dim).
    double scaling;
    Long heads, key_heads, head_dim, plan, keys, values, capacity;
    Recurrence mamba;
};

// Shared by the attention blocks that retain the same keys: the mask with its strides as in `Shape`, the number of
// keys with the new ones, and the slots of the new ones: from `first_slot` on, or `slots` (rows or 1, tokens) if not
// 0.
struct Plan {
    Long mask, mask_row, mask_query, keys, first_slot, slots, slots_row;
};

// The new tokens, and their cosines and sines (rows or 1, tokens, head_dim), or 0.
struct Tokens {
    Long rows, count, width, cosines, sines, angle_row;
};

// ---- functions

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
    void run_blocks_##name(const T *x, const Tokens *tokens, const Block *blocks, Long count, const Plan *plans,      \
                           T *y, int threads);

#define DECLARE_FOR_INT4(name, T, scale_name, S)                                                                      \
    void unpack_int4_##name##_##scale_name(const uint8_t *packed, Long N, Long K, Long group, const S *scales, T *y,  \
                                           int threads);

extern "C" {
DECLARE_FOR_STORAGE(float32, float)
DECLARE_FOR_STORAGE(bfloat16, bfloat16)
DECLARE_FOR_STORAGE(float64, double)

DECLARE_FOR_INT4(float32, float, float32, float)
DECLARE_FOR_INT4(float32, float, bfloat16, bfloat16)
DECLARE_FOR_INT4(bfloat16, bfloat16, float32, float)
DECLARE_FOR_INT4(bfloat16, bfloat16, bfloat16, bfloat16)

// Rows of W in a block of four-bit weights, which depends on the width of a vector.
int rows_of_block(void);

// Whether all keys that are read, and all slots that are written, lie within the capacity of their blocks.
int fits(const Tokens *tokens, const Block *blocks, Long count, const Plan *plans);

// The size of a structure, or the value of a constant above, by its name; -1 for an unknown name.
Long interface_value(const char *name);
}
