// The interface of the kernel library: its structures, and every exported function.
//
// `structures.h` is generated from the table in `ops_cpu_structures_mambaformer.py`, from which ctypes has its classes
// too. Python compares sizes and constants (`interface_value`) when it loads the library, and does not use a library
// that disagrees. `ops_cpu_interface_mambaformer.py` declares the functions for ctypes.
//
// Letters (B, L, D, N, K, dt, A, B, C) are those of the table in `ops_mambaformer.py`. A function whose name ends in a
// storage type reads and writes activations and weights of that type; it computes in float, or in double for float64.
#pragma once

#include "structures.h"

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
