// Keys and values as codes of a few bits, in the bytes of `VectorCodec` (`cache_codes_mambaformer.py`), bit for bit.
//
// A vector is rotated (signs, then a Hadamard transform) and rounded to a uniform grid in groups: each number is
// scale * level + shift. The rotation is orthogonal, so queries are rotated instead of keys, and sums of values are
// rotated back once. Levels are read as numbers around zero.
#pragma once

#include "storage.h"
#include "threads.h"

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
