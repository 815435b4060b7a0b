// Attention of few queries: each key is read once for all heads that share it.
//
// A line is one query of one head. Scores are in powers of two: queries are multiplied by log2(e).
#pragma once

#include "code_products.h"
#include "storage.h"
#include "threads.h"

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
