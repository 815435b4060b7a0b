"""The CPU kernels of `ops_cpu_decode_mambaformer`, as C++; what they rest on is in `ops_cpu_source_mambaformer`."""

DECODE_SOURCE = r"""
// Activations are numbers of type A that have been rounded to what they are stored in, T. Functions marked TEAM are
// called by all threads of a team: loops marked `omp for` are shared out, and when one is done, all of it is.

#define TEAM static

// Numbers as they are computed with, which is where they are, or a copy that `narrowed` takes back.
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
// The first `count` numbers of a vector, rounded to what is stored; they go to activations or to what is stored.
template <typename T, typename A, typename X>
static ALWAYS_INLINE void store_rounded(Vec<A> values, X *to, int count) {
    T stored[Lanes<A>::count];
    store<A>(values, stored);
    store_some<A>(load<A>(stored), to, count);
}

// ---- products with few rows: y (rows, N) = x (rows, K) W^T + bias

static const int READ_AHEAD = 4096;  // bytes

static ALWAYS_INLINE Vec<float> load_weights(const int8_t *from) {
    return __builtin_convertvector((Lanes<float>::Int)widen(from), Vec<float>);
}
static ALWAYS_INLINE Vec<float> load_weights(const float *from) { return load<float>(from); }
static ALWAYS_INLINE Vec<float> load_weights(const bfloat16 *from) { return load<float>(from); }
static ALWAYS_INLINE Vec<double> load_weights(const double *from) { return load<double>(from); }

// `M` rows of x times one row of W, read from end to end as memory likes it. What is added up, and in which order,
// is the same for any M.
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
    for (int m = 0; m < M; m++)
        y[m * stride] = sum<A>((totals[m][0] + totals[m][1]) + (totals[m][2] + totals[m][3]));
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

// ---- weights of four bits: blocks of rows of W, K bytes-of-halves in each; w = (q - 8) * scale + zero by group

static ALWAYS_INLINE Vec<float> from_words(Words words) {
    Vec<float> values;
    memcpy(&values, &words, sizeof values);
    return values;
}
// Scales and zeros of a vector of rows, which lie in pairs.
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

static const int PER_HALF = 2;  // vectors in which the low halves of the bytes of one column are held
static const int ROWS_OF_BLOCK = 2 * PER_HALF * Lanes<float>::count;

// The four bits of each word as numbers.
static ALWAYS_INLINE Vec<float> numbers_of(Words words) {
#if VECTOR_BYTES == 64 && defined(__AVX512F__)
    const __m512 table = _mm512_setr_ps(0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15);
    return (Vec<float>)_mm512_permutexvar_ps((__m512i)words, table);  // looks at four bits only
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

// All products of some rows with the rows of one block: found (rows, ROWS_OF_BLOCK).
template <typename S>
static void multiply_codes(const float *x, Long rows, const uint8_t *block, Long K, Long group, const S *scales,
                           Long stride, float *found) {
    for (; rows >= 2; rows -= 2, x += 2 * K, found += 2 * ROWS_OF_BLOCK)
        multiply_block<S, 2>(x, block, K, group, scales, stride, found, ROWS_OF_BLOCK);
    if (rows) multiply_block<S, 1>(x, block, K, group, scales, stride, found, ROWS_OF_BLOCK);
}

// W^T (K, N) in full.
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

// ---- products of a layer: several weights that can be read at the same time, each with an expert or without

struct Weight {
    Long kind, data, scale, bias, outputs, inputs, group, has_narrow_scales;
    Long basis, basis_stride, rank, delta, delta_stride, on_outputs;  // an expert's; without one the rank is 0
};
enum { PLAIN, INT8, INT4 };

template <typename A> struct Product { const Weight *weight; const A *x; A *y; };

// Which of several has item `number`, when each has those up to its end; `number` is counted from its first one then.
static int owner_of(Long *number, const Long *ends) {
    int owner = 0;
    while (*number >= ends[owner]) owner++;
    if (owner) *number -= ends[owner - 1];
    return owner;
}

static const int MOST_ROWS = 16, ROWS_AT_A_TIME = 32;  // of x, and of W if its rows lie one behind the other
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
    else
        multiply_codes(x, rows, block, K, w->group, (const float *)w->scale + 2 * first, 2 * N, found);
}

// y = x W^T + bias for all of these; where there is a residual, y = residual + that.
template <typename T, typename A, int COUNT>
TEAM void products(const Product<A> (&all)[COUNT], Long rows, const A *residual = 0) {
    Long ends[COUNT], blocks = 0;
    for (int i = 0; i < COUNT; i++) {
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
        const Long first = block * size, count = least((int)size, N - first);
        A found[MOST_ROWS * MOST_AT_A_TIME];
        if (w->kind == PLAIN)
            multiply_any<A, T>(all[i].x, rows, (const T *)w->data + first * K, 0, count, K, found, size);
        else
            multiply_coded(w, all[i].x, rows, first, count, found);
        for (Long m = 0; m < rows; m++) {
            A *to = all[i].y + m * N + first;
            for (Long n = 0; n < count; n++) {
                A value = as_stored<T>(found[m * size + n] + (bias ? to_float(bias[first + n]) : (A)0));
                to[n] = residual ? as_stored<T>(residual[m * N + first + n] + value) : value;
            }
        }
    }
}

// ---- an expert's change of what goes into a product or comes out of it: y = x + Q ((z - 1) * Q^T x), Q (width, rank)

static const int CHANNELS_AT_A_TIME = 32;

static Long width_of_expert(const Weight *w) { return w->on_outputs ? w->outputs : w->inputs; }
static Long strips_of(Long width) { return (width + CHANNELS_AT_A_TIME - 1) / CHANNELS_AT_A_TIME; }
// Numbers that `rescale` needs room for: coordinates (rows, rank) of each strip, and each thread's sum of them.
static Long room_to_rescale(const Weight *w, Long rows, int threads) {
    return w->rank ? (strips_of(width_of_expert(w)) + threads) * rows * w->rank : 0;
}
static int own_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// Q^T x of some channels, for all rows: found (rows, rank).
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
                    totals[v] += x[m * width + i] *
                                 load_some<A>(basis + i * stride + column, least(lanes, rank - column));
                }
            for (int v = 0; v < parts; v++) {
                const Long column = r + v * lanes;
                if (column >= rank) break;
                store_some<A>(totals[v], found + m * rank + column, least(lanes, rank - column));
            }
        }
}

// (z - 1) * Q^T x (rows, rank), from what `coordinates_of` has found for each strip; every thread does it for itself.
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

// The experts of all of these; y may be x. Which channels a thread reads, it changes, so Q comes from memory once.
template <typename T, typename A, int COUNT>
TEAM void rescale(const Product<A> (&all)[COUNT], Long rows, A *room, int threads, const A *residual = 0) {
    Long ends[COUNT], strips = 0;
    A *found[COUNT], *total[COUNT];
    for (int i = 0; i < COUNT; i++) {
        const Weight *w = all[i].weight;
        const Long own = w->rank ? strips_of(width_of_expert(w)) : 0;
        ends[i] = strips += own;
        found[i] = room;
        total[i] = room + (own + own_number()) * rows * w->rank;
        room += room_to_rescale(w, rows, threads);
    }
    if (!strips) return;
#pragma omp for schedule(static)
    for (Long number = 0; number < strips; number++) {
        Long strip = number;
        const int i = owner_of(&strip, ends);
        const Weight *w = all[i].weight;
        const Long width = width_of_expert(w), first = strip * CHANNELS_AT_A_TIME;
        coordinates_of<A, T>(all[i].x, rows, width, (const T *)w->basis, w->basis_stride, w->rank, first,
                             first + least(CHANNELS_AT_A_TIME, width - first), found[i] + strip * rows * w->rank);
    }
    for (int i = 0; i < COUNT; i++)
        if (all[i].weight->rank) add_up(all[i].weight, rows, found[i], total[i]);
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

// ---- norm, rotation, gate

// Norm and gate take activations or what is stored, X; y may be x.
template <typename T, typename X>
static void rms_norm_of_row(const X *x, Long width, const T *weight, double eps, X *y) {
    typedef typename Arithmetic<T>::type A;
    const int lanes = Lanes<A>::count;
    Vec<A> squares = {};
    for (Long i = 0; i < width; i += lanes) {
        Vec<A> values = load_some<A>(x + i, least(lanes, width - i));
        squares += values * values;
    }
    A factor = (A)1 / (A)sqrt(sum<A>(squares) / (A)width + (A)eps);
    for (Long i = 0; i < width; i += lanes) {
        const int count = least(lanes, width - i);
        T rounded[lanes];  // as the norm is defined: rounded to what is stored before the weights
        store<A>(load_some<A>(x + i, count) * factor, rounded);
        store_rounded<T, A>(load<A>(rounded) * load_some<A>(weight + i, count), y + i, count);
    }
}

template <typename T, typename X>
TEAM void rms_norm(const X *x, Long rows, Long width, const T *weight, double eps, X *y) {
#pragma omp for schedule(static)
    for (Long m = 0; m < rows; m++) rms_norm_of_row<T>(x + m * width, width, weight, eps, y + m * width);
}

// One head of one token, 2 half numbers, turned by as many cosines and sines.
template <typename T, typename X>
static ALWAYS_INLINE void turn(const X *from, Long half, const T *cosine, const T *sine, X *to) {
    typedef typename Arithmetic<T>::type A;
    for (Long i = 0; i < half; i++) {
        A first = to_float(from[i]), second = to_float(from[half + i]);
        A one = first * to_float(cosine[i]) - second * to_float(sine[i]);
        A other = second * to_float(cosine[half + i]) + first * to_float(sine[half + i]);
        from_float(as_stored<T>(one), to + i);
        from_float(as_stored<T>(other), to + half + i);
    }
}

template <typename T, typename X> TEAM void gate(const X *gates, const X *x, Long count, X *y) {
    typedef typename Arithmetic<T>::type A;
    const int lanes = Lanes<A>::count;
#pragma omp for schedule(static)
    for (Long i = 0; i < count; i += lanes) {
        const int some = least(lanes, count - i);
        Vec<A> opened = load_some<A>(gates + i, some);
        store_rounded<T, A>(opened * sigmoid<A>(opened) * load_some<A>(x + i, some), y + i, some);
    }
}

// ---- attention of few queries: each key is read once for all heads that share it

static const int KEYS_AT_A_TIME = 64, MOST_PARTS = 64;

struct Shape {
    Long rows, key_heads, group, queries, keys, width;
    Long query[3], key[3], value[3];  // strides of rows, heads and tokens
    Long mask_row, mask_query;
};

// Some lines (queries of the heads that share keys) against keys [first, last): what softmax needs to go on from it.
template <typename A, typename T, int LINES>
static void attend_part(const A *queries, const T *keys, const T *values, Long key_stride, Long value_stride,
                        Long width, const uint8_t *const *masks, Long first, Long last, A *most, A *weight, A *mixed) {
    const int lanes = Lanes<A>::count;
    A scores[LINES][KEYS_AT_A_TIME];
    for (int line = 0; line < LINES; line++) most[line] = -INFINITY, weight[line] = 0;
    memset(mixed, 0, LINES * width * sizeof(A));
    for (Long start = first; start < last; start += KEYS_AT_A_TIME) {
        const int count = least(KEYS_AT_A_TIME, last - start);
        for (int i = 0; i < count; i++) {
            const T *key = keys + (start + i) * key_stride;
            Vec<A> totals[LINES] = {};
            for (Long c = 0; c < width; c += lanes) {
                Vec<A> part = load<A>(key + c);
                for (int line = 0; line < LINES; line++) totals[line] += part * load<A>(queries + line * width + c);
            }
            for (int line = 0; line < LINES; line++)
                scores[line][i] = !masks[line] || masks[line][start + i] ? sum<A>(totals[line]) : (A)-INFINITY;
        }
        for (int line = 0; line < LINES; line++) {
            A highest = most[line];  // NaN from the first score on that is NaN
            for (int i = 0; i < count; i++) {
                A score = scores[line][i];
                highest = score > highest || score != score ? score : highest;
            }
            for (int i = count; i < KEYS_AT_A_TIME; i++) scores[line][i] = -INFINITY;
            if (highest == (A)-INFINITY) {
                memset(scores[line], 0, sizeof scores[line]);
                continue;
            }
            Vec<A> total = {};
            for (int i = 0; i < KEYS_AT_A_TIME; i += lanes) {
                Vec<A> exponent = load<A>(scores[line] + i) - highest;
                Vec<A> share = exp2_of(exponent);
                typename Lanes<A>::Int is_unseen = exponent == (A)-INFINITY;
                share = is_unseen ? Vec<A>{} : share;
                total += share;
                store<A>(share, scores[line] + i);
            }
            A kept = most[line] == (A)-INFINITY ? 0 : exp2_of(broadcast<A>(most[line] - highest))[0];
            weight[line] = weight[line] * kept + sum<A>(total);
            for (Long c = 0; c < width; c += lanes)
                store<A>(load<A>(mixed + line * width + c) * kept, mixed + line * width + c);
            most[line] = highest;
        }
        for (Long c = 0; c < width; c += 2 * lanes) {
            const int wide = c + lanes < width;
            Vec<A> sums[LINES][2];
            for (int line = 0; line < LINES; line++) {
                sums[line][0] = load<A>(mixed + line * width + c);
                sums[line][1] = wide ? load<A>(mixed + line * width + c + lanes) : Vec<A>{};
            }
            for (int i = 0; i < count; i++) {
                const T *value = values + (start + i) * value_stride + c;
                Vec<A> one = load<A>(value), other = wide ? load<A>(value + lanes) : Vec<A>{};
                for (int line = 0; line < LINES; line++) {
                    sums[line][0] += scores[line][i] * one;
                    sums[line][1] += scores[line][i] * other;
                }
            }
            for (int line = 0; line < LINES; line++) {
                store<A>(sums[line][0], mixed + line * width + c);
                if (wide) store<A>(sums[line][1], mixed + line * width + c + lanes);
            }
        }
    }
}

static Long parts_of(Long keys, int threads) {
    return keys < 2 * KEYS_AT_A_TIME ? 1 : least(MOST_PARTS, threads);
}

// Queries as `attend` wants them: those of the heads that share keys together, scaled for powers of two.
template <typename A> static A *place_of(A *scaled, const Shape &s, Long row, Long head, Long query) {
    return scaled + (((row * s.key_heads + head / s.group) * s.group + head % s.group) * s.queries + query) * s.width;
}

// Attention of scaled queries: mixed (rows, queries, heads, width). `found` has room for what the threads find:
// rows * heads * queries * parts * (2 + width) numbers.
template <typename T, typename A>
TEAM void attend(const A *scaled, const T *key, const T *value, const uint8_t *mask, const Shape &s, int threads,
                 A *found, A *mixed) {
    const Long lines = s.group * s.queries, heads = s.rows * s.key_heads, width = s.width, size = 2 + width;
    const Long parts = parts_of(s.keys, threads), step = (s.keys + parts - 1) / parts;
#pragma omp for schedule(static) collapse(2)
    for (Long head = 0; head < heads; head++)
        for (Long part = 0; part < parts; part++) {
            Long row = head / s.key_heads, own = head % s.key_heads;
            const T *keys = key + row * s.key[0] + own * s.key[1];
            const T *values = value + row * s.value[0] + own * s.value[1];
            Long first = part * step, last = first + step < s.keys ? first + step : s.keys;
            A *here = found + (head * parts + part) * lines * size;
            for (Long line = 0; line < lines; ) {
                const uint8_t *masks[4];
                for (int i = 0; i < 4; i++)
                    masks[i] = mask ? mask + row * s.mask_row + (line + i) % s.queries * s.mask_query : 0;
                const A *queries = scaled + (head * lines + line) * width;
                A *most = here + line, *weight = here + lines + line, *sums = here + 2 * lines + line * width;
#define ATTEND(N) attend_part<A, T, N>(queries, keys, values, s.key[2], s.value[2], width, masks, first, last, most, \
                                       weight, sums)
                switch (lines - line) {
                    case 1: ATTEND(1); line += 1; break;
                    case 2: ATTEND(2); line += 2; break;
                    case 3: ATTEND(3); line += 3; break;
                    default: ATTEND(4); line += 4;
                }
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
                to[c] = as_stored<T>(weight == 0 ? (A)0 : total / weight);
            }
        }
}

// ---- what may be called one by one

static const Long SMALL = 32768, FEW = 65536;  // numbers that one thread reads, or changes, sooner than two agree to

template <typename T> static void linear(const T *x, Long rows, const Weight *weight, T *y, int threads) {
    typedef typename Arithmetic<T>::type A;
    A *wide = widened<A>(x, rows * weight->inputs), *found = room_for<A>(y, rows * weight->outputs);
    const Product<A> product[] = {{weight, wide, found}};
#pragma omp parallel num_threads(threads) if (weight->outputs * weight->inputs > SMALL)
    products<T>(product, rows);
    narrowed(found, rows * weight->outputs, y);
    dropped(wide, x);
}

template <typename T> static void rescale_all(const T *x, Long rows, const Weight *weight, T *y, int threads) {
    typedef typename Arithmetic<T>::type A;
    const Long count = rows * weight->inputs;
    A *wide = widened<A>(x, count), *found = room_for<A>(y, count);
    A *room = (A *)malloc(room_to_rescale(weight, rows, threads) * sizeof(A));
    const Product<A> product[] = {{weight, wide, found}};
#pragma omp parallel num_threads(threads) if (count * weight->rank > SMALL)
    rescale<T>(product, rows, room, threads);
    free(room);
    narrowed(found, count, y);
    dropped(wide, x);
}

// x (rows, heads, tokens, 2 half) with strides, cosines and sines (rows or 1, tokens, 2 half); y is whole.
template <typename T>
static void rotate_all(const T *x, Long rows, Long heads, Long tokens, Long half, const Long *stride,
                       const T *cosines, const T *sines, Long row_stride, T *y, int threads) {
#pragma omp parallel for num_threads(threads) schedule(static) collapse(3) if (rows * heads * tokens * half > FEW)
    for (Long row = 0; row < rows; row++)
        for (Long head = 0; head < heads; head++)
            for (Long token = 0; token < tokens; token++) {
                const Long angle = row * row_stride + token * 2 * half;
                turn<T>(x + row * stride[0] + head * stride[1] + token * stride[2], half, cosines + angle,
                        sines + angle, y + ((row * heads + head) * tokens + token) * 2 * half);
            }
}

template <typename T>
static void attend_all(const T *query, const T *key, const T *value, const uint8_t *mask, double scaling, T *y,
                       const Shape *shape, int threads) {
    typedef typename Arithmetic<T>::type A;
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
    attend<T>(scaled, key, value, mask, s, threads, found, mixed);
    free(found);
    free(scaled);
    narrowed(mixed, count, y);
}

#define FOR_STORAGE(name, T)                                                                                          \
    extern "C" void linear_##name(const T *x, Long rows, const Weight *weight, T *y, int n) {                         \
        linear<T>(x, rows, weight, y, n);                                                                             \
    }                                                                                                                 \
    extern "C" void rescale_##name(const T *x, Long rows, const Weight *weight, T *y, int n) {                        \
        rescale_all<T>(x, rows, weight, y, n);                                                                        \
    }                                                                                                                 \
    extern "C" void rms_norm_##name(const T *x, Long rows, Long width, const T *weight, double eps, T *y, int n) {    \
        _Pragma("omp parallel num_threads(n) if (rows * width > FEW)")                                                \
        rms_norm<T>(x, rows, width, weight, eps, y);                                                                  \
    }                                                                                                                 \
    extern "C" void rotate_##name(const T *x, Long rows, Long heads, Long tokens, Long half, Long row_stride,         \
                                  Long head_stride, Long token_stride, const T *cosines, const T *sines, Long stride, \
                                  T *y, int n) {                                                                      \
        const Long strides[] = {row_stride, head_stride, token_stride};                                               \
        rotate_all<T>(x, rows, heads, tokens, half, strides, cosines, sines, stride, y, n);                           \
    }                                                                                                                 \
    extern "C" void gate_##name(const T *gates, const T *x, Long count, T *y, int n) {                                \
        _Pragma("omp parallel num_threads(n) if (count > FEW)")                                                       \
        gate<T>(gates, x, count, y);                                                                                  \
    }                                                                                                                 \
    extern "C" void attend_##name(const T *query, const T *key, const T *value, const uint8_t *mask, double scaling,  \
                                  T *y, const Shape *shape, int n) {                                                  \
        attend_all<T>(query, key, value, mask, scaling, y, shape, n);                                                 \
    }
FOR_STORAGE(float32, float)
FOR_STORAGE(bfloat16, bfloat16)
FOR_STORAGE(float64, double)

extern "C" int rows_of_block(void) { return ROWS_OF_BLOCK; }

#define FOR_PACKED(name, T, scale_name, S)                                                                            \
    extern "C" void unpack_int4_##name##_##scale_name(const uint8_t *packed, Long N, Long K, Long group,              \
                                                      const S *scales, T *y, int n) {                                 \
        unpack_int4<T, S>(packed, N, K, group, scales, y, n);                                                         \
    }
FOR_PACKED(float32, float, float32, float)
FOR_PACKED(float32, float, bfloat16, bfloat16)
FOR_PACKED(bfloat16, bfloat16, float32, float)
FOR_PACKED(bfloat16, bfloat16, bfloat16, bfloat16)
"""

__all__ = ["DECODE_SOURCE"]
