// Attention of few queries: each key is read once for all heads that share it.
//
// A line is one query of one head. Scores are in powers of two: queries are multiplied by log2(e).
#pragma once

#include "storage.h"
#include "threads.h"

static const int KEYS_AT_A_TIME = 64;

// Some lines against keys [first, last): the highest score, the sum of the weights, and the weighted sum of the
// values.
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
            A highest = most[line];  // NaN from the first score that is NaN
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

static Long parts_of(Long keys, int threads) { return keys < 2 * KEYS_AT_A_TIME ? 1 : least(MOST_PARTS, threads); }

// The place of a query for `attend`, which reads the queries of the heads that share keys together.
template <typename A> static A *place_of(A *scaled, const Shape &s, Long row, Long head, Long query) {
    return scaled + (((row * s.key_heads + head / s.group) * s.group + head % s.group) * s.queries + query) * s.width;
}

// Attention of scaled queries: mixed (rows, queries, heads, width). `found` has room for the results of each part of
// the keys: rows * heads * queries * parts * (2 + width) numbers.
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
            for (Long line = 0; line < lines;) {
                const uint8_t *masks[4];
                for (int i = 0; i < 4; i++)
                    masks[i] = mask ? mask + row * s.mask_row + (line + i) % s.queries * s.mask_query : 0;
                const A *queries = scaled + (head * lines + line) * width;
                A *most = here + line, *weight = here + lines + line, *sums = here + 2 * lines + line * width;
#define ATTEND(N)                                                                                                     \
    attend_part<A, T, N>(queries, keys, values, s.key[2], s.value[2], width, masks, first, last, most, weight, sums)
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
                to[c] = as_stored<T>(weight == 0 ? (A)0 : total / weight);
            }
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
    attend<T>(scaled, key, value, mask, s, threads, found, mixed);
    free(found);
    free(scaled);
    narrowed(mixed, count, y);
}
