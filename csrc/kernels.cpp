// The exported functions, and the only file that is compiled.
#include "attention.h"
#include "codes.h"
#include "convolution.h"
#include "expert_vector.h"
#include "int4.h"
#include "interface.h"
#include "linear.h"
#include "norm_rope_gate.h"
#include "program.h"
#include "scan.h"
#include "state_codes.h"

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
