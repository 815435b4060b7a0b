// Expert vectors: y = x + Q ((z - 1) * Q^T x) with Q (width, rank), on the input or the output of a product.
#pragma once

#include "linear.h"

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
