// Work shared by threads, and views of tensors.
#pragma once

#ifdef _OPENMP
#include <omp.h>
#endif

#include "vector.h"

// All threads of a team call a function that is marked TEAM. They share the iterations of its `omp for` loops, each of
// which ends with a barrier.
#define TEAM static

// Numbers that a kernel reads (SMALL) or changes (FEW): up to as many, one thread is faster than two.
static const Long SMALL = 32768, FEW = 65536;

static int own_number() {
#ifdef _OPENMP
    return omp_get_thread_num();
#else
    return 0;
#endif
}

// The owner of item `number`, where owner i has the items before ends[i]; `number` becomes its index at the owner.
static int owner_of(Long *number, const Long *ends) {
    int owner = 0;
    while (*number >= ends[owner]) owner++;
    if (owner) *number -= ends[owner - 1];
    return owner;
}

// ---- shares of the batch

static Long length_of(const Shares &shares, Long row) {
    if (!shares.lengths) return shares.length;
    Long length = shares.lengths[row];
    return length < 0 ? 0 : length < shares.length ? length : shares.length;
}

static Long position_of(const Shares &shares, Long row, Long token) {
    return shares.positions ? shares.positions[row * shares.length + token] : token;
}

template <typename R, typename Work> static void for_each_share(const Shares &shares, Work work) {
    const Long lanes = Lanes<R>::count, blocks = (shares.channels + lanes - 1) / lanes;
#pragma omp parallel for schedule(dynamic) num_threads((int)shares.threads) if (shares.threads > 1)
    for (Long share = 0; share < shares.rows * shares.splits; share++) {
        Long row = share / shares.splits, split = share % shares.splits;
        Long first = blocks * split / shares.splits * lanes, last = blocks * (split + 1) / shares.splits * lanes;
        work(row, split, first, last < shares.channels ? last : shares.channels);
    }
}

// ---- views

template <typename T> static ALWAYS_INLINE T *at(const View &view, Long row, Long token) {
    return (T *)view.data + row * view.row + token * view.token;
}

template <typename T> static void clear(const View &view, Long row, Long start, Long stop, Long first, Long last) {
    if (!view.data || first >= last) return;
    for (Long token = start; token < stop; token++)
        memset(at<T>(view, row, token) + first, 0, (last - first) * sizeof(T));
}

template <typename R> static void copy_or_clear(const R *from, R *to, Long count) {
    if (from) memcpy(to, from, count * sizeof(R));
    else memset(to, 0, count * sizeof(R));
}
