// Activations between kernels: numbers of type A, rounded to the type T that they are stored in.
#pragma once

#include <stdlib.h>

#include "vector.h"

// `widened` and `room_for` give numbers in the type of the arithmetic: in place, or in new memory that is filled or
// not. `narrowed` rounds them back to their place and frees the memory; `dropped` only frees it.
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
// Stores the first `count` elements of a vector, rounded to T, as activations (X = A) or in their storage (X = T).
template <typename T, typename A, typename X>
static ALWAYS_INLINE void store_rounded(Vec<A> values, X *to, int count) {
    T stored[Lanes<A>::count];
    store<A>(values, stored);
    store_some<A>(load<A>(stored), to, count);
}
