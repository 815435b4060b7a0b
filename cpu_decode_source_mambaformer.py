"""The CPU kernels of `cpu_decode_mambaformer`, as C++; what they rest on is in `cpu_source_mambaformer`."""

DECODE_SOURCE = r"""
// ---- products with few rows: y (rows, N) = x (rows, K) W^T + bias

static const int READ_AHEAD = 1024;  // bytes

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

// x as it is computed with; `own` is freed by the caller.
template <typename A> static const A *widened(const A *x, Long, A **own) { *own = 0; return x; }
template <typename A> static const A *widened(const bfloat16 *x, Long count, A **own) {
    *own = (A *)malloc(count * sizeof(A));
    for (Long i = 0; i < count; i++) (*own)[i] = to_float(x[i]);
    return *own;
}

static const Long ROWS_AT_A_TIME = 64;  // of W: their products with all rows of x stay in the cache
static const Long SMALL = 32768;        // numbers that one thread reads sooner than two agree to

template <typename T, typename W>
static void linear(const T *x, Long rows, Long K, const W *weights, Long N, const T *bias, const float *scale, T *y,
                   int threads) {
    typedef typename Arithmetic<T>::type A;
    A *own;
    const A *wide = widened<A>(x, rows * K, &own);
    Long blocks = (N + ROWS_AT_A_TIME - 1) / ROWS_AT_A_TIME;
    A *products = (A *)malloc(threads * rows * ROWS_AT_A_TIME * sizeof(A));
#pragma omp parallel for num_threads(threads) schedule(static) if (N * K > SMALL)
    for (Long block = 0; block < blocks; block++) {
        Long first = block * ROWS_AT_A_TIME, count = least((int)ROWS_AT_A_TIME, N - first);
        A *found = products;
#ifdef _OPENMP
        found += omp_get_thread_num() * rows * ROWS_AT_A_TIME;
#endif
        multiply_any<A, W>(wide, rows, weights + first * K, 0, count, K, found, ROWS_AT_A_TIME);
        for (Long m = 0; m < rows; m++)
            for (Long n = 0; n < count; n++) {
                A value = found[m * ROWS_AT_A_TIME + n];
                if (scale) value *= scale[first + n];
                if (bias) value += to_float(bias[first + n]);
                from_float(value, y + m * N + first + n);
            }
    }
    free(products);
    free(own);
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

template <typename T, typename S>
static void linear_int4(const T *x, Long rows, Long K, const uint8_t *packed, Long N, Long group, const S *scales,
                        const T *bias, T *y, int threads) {
    float *own;
    const float *wide = widened<float>(x, rows * K, &own);
#pragma omp parallel for num_threads(threads) schedule(static) if (N * K > 2 * SMALL)
    for (Long first = 0; first < N; first += ROWS_OF_BLOCK) {
        const uint8_t *block = packed + first * K / 2;
        const S *pairs = scales + 2 * first;
        float found[2 * ROWS_OF_BLOCK];
        for (Long m = 0; m < rows; m += 2) {
            const int count = rows - m >= 2 ? 2 : 1;
            if (count == 2) multiply_block<S, 2>(wide + m * K, block, K, group, pairs, 2 * N, found, ROWS_OF_BLOCK);
            else multiply_block<S, 1>(wide + m * K, block, K, group, pairs, 2 * N, found, ROWS_OF_BLOCK);
            for (int i = 0; i < count; i++)
                for (int n = 0; n < ROWS_OF_BLOCK; n++) {
                    float value = found[i * ROWS_OF_BLOCK + n];
                    if (bias) value += to_float(bias[first + n]);
                    from_float(value, y + (m + i) * N + first + n);
                }
        }
    }
    free(own);
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

// ---- an expert's change of what goes into a product or comes out of it: y = x + Q ((z - 1) * Q^T x), Q (width, rank)

template <typename A, typename T>
static void rescale(const T *x, Long rows, Long width, const T *basis, Long basis_stride, Long rank, const A *delta,
                    Long delta_stride, T *y, int threads) {
    const int lanes = Lanes<A>::count;
    A *coordinates = (A *)malloc(rows * rank * sizeof(A)), *own;
    const A *wide = widened<A>(x, rows * width, &own);
    const int strip = 4 * lanes;
    Long strips = (rank + strip - 1) / strip;
#pragma omp parallel num_threads(threads) if (rows * width * rank > 2 * SMALL)
    {
#pragma omp for schedule(static) collapse(2)
        for (Long m = 0; m < rows; m++)
            for (Long s = 0; s < strips; s++) {
                Vec<A> totals[4] = {};
                for (Long i = 0; i < width; i++)
                    for (int v = 0; v < 4; v++) {
                        Long column = s * strip + v * lanes;
                        if (column < rank)
                            totals[v] += wide[m * width + i] * load_some<A>(basis + i * basis_stride + column,
                                                                            least(lanes, rank - column));
                    }
                for (int v = 0; v < 4; v++) {
                    Long column = s * strip + v * lanes;
                    if (column >= rank) break;
                    int count = least(lanes, rank - column);
                    Vec<A> scaled = totals[v] * load_some<A>(delta + m * delta_stride + column, count);
                    store_some<A>(scaled, coordinates + m * rank + column, count);
                }
            }
#pragma omp for schedule(static) collapse(2)
        for (Long m = 0; m < rows; m++)
            for (Long i = 0; i < width; i++) {
                Vec<A> total = {};
                for (Long r = 0; r < rank; r += lanes)
                    total += load_some<A>(coordinates + m * rank + r, least(lanes, rank - r)) *
                             load_some<A>(basis + i * basis_stride + r, least(lanes, rank - r));
                from_float(wide[m * width + i] + sum<A>(total), y + m * width + i);
            }
    }
    free(coordinates);
    free(own);
}

// ---- norm, rotation, gate

static const Long FEW_NUMBERS = 65536;

template <typename T>
static void rms_norm(const T *x, Long rows, Long width, const T *weight, double eps, T *y, int threads) {
    typedef typename Arithmetic<T>::type A;
    const int lanes = Lanes<A>::count;
#pragma omp parallel for num_threads(threads) schedule(static) if (rows * width > FEW_NUMBERS)
    for (Long m = 0; m < rows; m++) {
        const T *from = x + m * width;
        T *to = y + m * width;
        Vec<A> squares = {};
        for (Long i = 0; i < width; i += lanes) {
            Vec<A> values = load_some<A>(from + i, least(lanes, width - i));
            squares += values * values;
        }
        A factor = (A)1 / (A)sqrt(sum<A>(squares) / (A)width + (A)eps);
        for (Long i = 0; i < width; i += lanes) {
            int count = least(lanes, width - i);
            T rounded[lanes];  // as the norm is defined: rounded to what is stored before the weights
            store<A>(load_some<A>(from + i, count) * factor, rounded);
            store_some<A>(load<A>(rounded) * load_some<A>(weight + i, count), to + i, count);
        }
    }
}

// x (rows, heads, tokens, 2 half) with strides, cosines and sines (rows or 1, tokens, 2 half); y is whole.
template <typename T>
static void rotate(const T *x, Long rows, Long heads, Long tokens, Long half, const Long *stride, const T *cosines,
                   const T *sines, Long row_stride, T *y, int threads) {
    typedef typename Arithmetic<T>::type A;
#pragma omp parallel for num_threads(threads) schedule(static) collapse(3) \
    if (rows * heads * tokens * half > FEW_NUMBERS)
    for (Long row = 0; row < rows; row++)
        for (Long head = 0; head < heads; head++)
            for (Long token = 0; token < tokens; token++) {
                const T *from = x + row * stride[0] + head * stride[1] + token * stride[2];
                const T *cosine = cosines + row * row_stride + token * 2 * half;
                const T *sine = sines + row * row_stride + token * 2 * half;
                T *to = y + ((row * heads + head) * tokens + token) * 2 * half;
                for (Long i = 0; i < half; i++) {
                    A first = to_float(from[i]), second = to_float(from[half + i]);
                    from_float(first * to_float(cosine[i]) - second * to_float(sine[i]), to + i);
                    from_float(second * to_float(cosine[half + i]) + first * to_float(sine[half + i]), to + half + i);
                }
            }
}

template <typename T>
static void gate(const T *gates, const T *x, Long count, T *y, int threads) {
    typedef typename Arithmetic<T>::type A;
    const int lanes = Lanes<A>::count;
#pragma omp parallel for num_threads(threads) schedule(static) if (count > FEW_NUMBERS)
    for (Long i = 0; i < count; i += lanes) {
        int some = least(lanes, count - i);
        Vec<A> opened = load_some<A>(gates + i, some);
        store_some<A>(opened * sigmoid<A>(opened) * load_some<A>(x + i, some), y + i, some);
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
            A highest = most[line];
            for (int i = 0; i < count; i++) highest = scores[line][i] > highest ? scores[line][i] : highest;
            for (int i = count; i < KEYS_AT_A_TIME; i++) scores[line][i] = -INFINITY;
            if (highest == (A)-INFINITY) {
                memset(scores[line], 0, sizeof scores[line]);
                continue;
            }
            Vec<A> total = {};
            for (int i = 0; i < KEYS_AT_A_TIME; i += lanes) {
                Vec<A> exponent = load<A>(scores[line] + i) - highest;
                Vec<A> share = exp2_of(exponent);
                typename Lanes<A>::Int is_seen = exponent > (A)-INFINITY;
                share = is_seen ? share : Vec<A>{};
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

template <typename T>
static void attend(const T *query, const T *key, const T *value, const uint8_t *mask, double scaling, T *y,
                   const Shape *shape, int threads) {
    typedef typename Arithmetic<T>::type A;
    const Shape s = *shape;
    const Long lines = s.group * s.queries, heads = s.rows * s.key_heads, width = s.width;
    const Long parts = s.keys < 2 * KEYS_AT_A_TIME ? 1 : least(MOST_PARTS, threads), size = 2 + width;
    const Long step = (s.keys + parts - 1) / parts;
    A *scaled = (A *)malloc(heads * lines * width * sizeof(A));
    A *found = (A *)malloc(heads * parts * lines * size * sizeof(A));
#pragma omp parallel num_threads(threads) if (heads * lines * s.keys * width > SMALL)
    {
#pragma omp for schedule(static) collapse(2)
        for (Long head = 0; head < heads; head++)
            for (Long line = 0; line < lines; line++) {
                Long row = head / s.key_heads, own = head % s.key_heads * s.group + line / s.queries;
                const T *from = query + row * s.query[0] + own * s.query[1] + line % s.queries * s.query[2];
                for (Long c = 0; c < width; c++)
                    scaled[(head * lines + line) * width + c] = to_float(from[c]) * (A)(scaling * LOG2_E);
            }
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
                    A *most = here + line, *weight = here + lines + line, *mixed = here + 2 * lines + line * width;
#define ATTEND(N) attend_part<A, T, N>(queries, keys, values, s.key[2], s.value[2], width, masks, first, last, most, \
                                       weight, mixed)
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
                T *to = y + ((row * s.queries + line % s.queries) * s.key_heads * s.group + own) * width;
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
                    from_float(weight > 0 ? total / weight : (A)0, to + c);
                }
            }
    }
    free(scaled);
    free(found);
}

// ---- blocks of a layer: a norm before, the residual after, and the products between

struct Weight { Long kind, data, scale, bias, outputs, inputs, group, has_narrow_scales; };
enum { PLAIN, INT8, INT4 };

static void product_of_codes(const Weight *, const double *, Long, double *, int) {}
template <typename T> static void product_of_codes(const Weight *w, const T *x, Long rows, T *y, int threads) {
    const T *bias = (const T *)w->bias;
    if (w->kind == INT8)
        linear<T, int8_t>(x, rows, w->inputs, (const int8_t *)w->data, w->outputs, bias, (const float *)w->scale, y,
                          threads);
    else if (w->has_narrow_scales)
        linear_int4<T, bfloat16>(x, rows, w->inputs, (const uint8_t *)w->data, w->outputs, w->group,
                                 (const bfloat16 *)w->scale, bias, y, threads);
    else
        linear_int4<T, float>(x, rows, w->inputs, (const uint8_t *)w->data, w->outputs, w->group,
                              (const float *)w->scale, bias, y, threads);
}
template <typename T> static void product(const Weight *w, const T *x, Long rows, T *y, int threads) {
    if (w->kind == PLAIN)
        linear<T, T>(x, rows, w->inputs, (const T *)w->data, w->outputs, (const T *)w->bias, 0, y, threads);
    else
        product_of_codes(w, x, rows, y, threads);
}
template <typename T> static void add(const T *residual, Long count, T *y) {
    for (Long i = 0; i < count; i++) from_float(to_float(y[i]) + to_float(residual[i]), y + i);
}

// x (rows, tokens, width) -> queries, keys and values; turned, and then heads come before tokens, if there are angles.
template <typename T>
static void attention_inputs(const T *x, Long rows, Long tokens, Long width, const T *norm, double eps,
                             const Weight *weights, Long half, const T *cosines, const T *sines, Long row_stride,
                             T *query, T *key, T *value, int threads) {
    const Long all = rows * tokens;
    T *normed = (T *)malloc(all * width * sizeof(T));
    rms_norm<T>(x, all, width, norm, eps, normed, threads);
    T *turned[] = {query, key};
    for (int i = 0; i < 2; i++) {
        const Long N = weights[i].outputs, strides[] = {tokens * N, 2 * half, N};
        T *found = cosines ? (T *)malloc(all * N * sizeof(T)) : turned[i];
        product<T>(weights + i, normed, all, found, threads);
        if (!cosines) continue;
        rotate<T>(found, rows, N / (2 * half), tokens, half, strides, cosines, sines, row_stride, turned[i], threads);
        free(found);
    }
    product<T>(weights + 2, normed, all, value, threads);
    free(normed);
}

template <typename T>
static void attention_outputs(const T *query, const T *key, const T *value, const uint8_t *mask, double scaling,
                              const Shape *shape, const Weight *weight, const T *residual, T *y, int threads) {
    const Long all = shape->rows * shape->queries;
    T *mixed = (T *)malloc(all * weight->inputs * sizeof(T));
    attend<T>(query, key, value, mask, scaling, mixed, shape, threads);
    product<T>(weight, mixed, all, y, threads);
    add<T>(residual, all * weight->outputs, y);
    free(mixed);
}

template <typename T>
static void gated_mlp(const T *x, Long rows, Long width, const T *norm, double eps, const Weight *weights, T *y,
                      int threads) {
    const Long inner = weights[0].outputs;
    T *normed = (T *)malloc(rows * width * sizeof(T)), *gates = (T *)malloc(2 * rows * inner * sizeof(T));
    rms_norm<T>(x, rows, width, norm, eps, normed, threads);
    product<T>(weights, normed, rows, gates, threads);
    product<T>(weights + 1, normed, rows, gates + rows * inner, threads);
    gate<T>(gates, gates + rows * inner, rows * inner, gates, threads);
    product<T>(weights + 2, gates, rows, y, threads);
    add<T>(x, rows * width, y);
    free(gates);
    free(normed);
}

#define FOR_STORAGE(name, T, A)                                                                                       \
    extern "C" void linear_##name(const T *x, Long rows, Long K, const T *w, Long N, const T *bias, T *y, int n) {    \
        linear<T, T>(x, rows, K, w, N, bias, 0, y, n);                                                                \
    }                                                                                                                 \
    extern "C" void rescale_##name(const T *x, Long rows, Long width, const T *basis, Long basis_stride, Long rank,   \
                                   const A *delta, Long stride, T *y, int n) {                                        \
        rescale<A, T>(x, rows, width, basis, basis_stride, rank, delta, stride, y, n);                                \
    }                                                                                                                 \
    extern "C" void rms_norm_##name(const T *x, Long rows, Long width, const T *weight, double eps, T *y, int n) {    \
        rms_norm<T>(x, rows, width, weight, eps, y, n);                                                               \
    }                                                                                                                 \
    extern "C" void rotate_##name(const T *x, Long rows, Long heads, Long tokens, Long half, Long row_stride,         \
                                  Long head_stride, Long token_stride, const T *cosines, const T *sines, Long stride, \
                                  T *y, int n) {                                                                      \
        const Long strides[] = {row_stride, head_stride, token_stride};                                               \
        rotate<T>(x, rows, heads, tokens, half, strides, cosines, sines, stride, y, n);                               \
    }                                                                                                                 \
    extern "C" void gate_##name(const T *gates, const T *x, Long count, T *y, int n) {                                \
        gate<T>(gates, x, count, y, n);                                                                               \
    }                                                                                                                 \
    extern "C" void attend_##name(const T *query, const T *key, const T *value, const uint8_t *mask, double scaling,  \
                                  T *y, const Shape *shape, int n) {                                                  \
        attend<T>(query, key, value, mask, scaling, y, shape, n);                                                     \
    }                                                                                                                 \
    extern "C" void attention_inputs_##name(const T *x, Long rows, Long tokens, Long width, const T *norm,            \
                                            double eps, const Weight *weights, Long half, const T *cosines,           \
                                            const T *sines, Long row_stride, T *query, T *key, T *value, int n) {     \
        attention_inputs<T>(x, rows, tokens, width, norm, eps, weights, half, cosines, sines, row_stride, query, key, \
                            value, n);                                                                                \
    }                                                                                                                 \
    extern "C" void attention_outputs_##name(const T *query, const T *key, const T *value, const uint8_t *mask,       \
                                             double scaling, const Shape *shape, const Weight *weight,                \
                                             const T *residual, T *y, int n) {                                        \
        attention_outputs<T>(query, key, value, mask, scaling, shape, weight, residual, y, n);                        \
    }                                                                                                                 \
    extern "C" void gated_mlp_##name(const T *x, Long rows, Long width, const T *norm, double eps,                    \
                                     const Weight *weights, T *y, int n) {                                            \
        gated_mlp<T>(x, rows, width, norm, eps, weights, y, n);                                                       \
    }
FOR_STORAGE(float32, float, float)
FOR_STORAGE(bfloat16, bfloat16, float)
FOR_STORAGE(float64, double, double)

extern "C" int rows_of_block(void) { return ROWS_OF_BLOCK; }

#define FOR_PACKED(name, T, scale_name, S)                                                                            \
    extern "C" void linear_int4_##name##_##scale_name(const T *x, Long rows, Long K, const uint8_t *packed, Long N,   \
                                                      Long group, const S *scales, const T *bias, T *y, int n) {      \
        linear_int4<T, S>(x, rows, K, packed, N, group, scales, bias, y, n);                                          \
    }                                                                                                                 \
    extern "C" void unpack_int4_##name##_##scale_name(const uint8_t *packed, Long N, Long K, Long group,              \
                                                      const S *scales, T *y, int n) {                                 \
        unpack_int4<T, S>(packed, N, K, group, scales, y, n);                                                         \
    }
FOR_PACKED(float32, float, float32, float)
FOR_PACKED(float32, float, bfloat16, bfloat16)
FOR_PACKED(bfloat16, bfloat16, float32, float)
FOR_PACKED(bfloat16, bfloat16, bfloat16, bfloat16)
#define FOR_BYTES(name, T)                                                                                            \
    extern "C" void linear_int8_##name(const T *x, Long rows, Long K, const int8_t *w, Long N, const float *scale,    \
                                       const T *bias, T *y, int n) {                                                  \
        linear<T, int8_t>(x, rows, K, w, N, bias, scale, y, n);                                                       \
    }
FOR_BYTES(float32, float)
FOR_BYTES(bfloat16, bfloat16)
"""

__all__ = ["DECODE_SOURCE"]
