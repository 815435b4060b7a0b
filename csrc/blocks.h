// Blocks of layers over a few tokens: attention, gated MLP and Mamba, built from the kernels of single operations.
#pragma once

#include "attention.h"
#include "expert_vector.h"
#include "linear.h"
#include "norm_rope_gate.h"
#include "scan.h"

template <typename A> struct Room {
    A *x, *normed, *wide, *changed, *scaled, *found, *mixed, *experts;
    int threads;
};

static Long most(Long one, Long other) { return one > other ? one : other; }

// One piece of memory for the activations and for all intermediate results of a block; the caller frees `x`.
template <typename A>
static Room<A> make_room(const Tokens &t, const Block *blocks, Long count, const Plan *plans, int threads) {
    Long wide = 0, changed = 0, heads = 0, found = 0, experts = 0;
    const Long all = t.rows * t.count;
    for (const Block *b = blocks; b < blocks + count; b++) {
        // The first weights have the same input and are used together; the others are used one after the other.
        const int together = b->kind == ATTENTION ? 3 : b->kind == MLP ? 2 : 1, weights = b->kind == MLP ? 3 : 4;
        Long outputs = 0, needed = 0;
        for (int i = 0; i < weights; i++) {
            const Weight *w = b->weights + i;
            if (i < together || b->kind == MAMBA) outputs += w->outputs;
            needed = i < together ? needed + room_to_rescale(w, all, threads)
                                  : most(needed, room_to_rescale(w, all, threads));
            changed = most(changed, i < together ? together * w->inputs : w->inputs);
        }
        const Recurrence &m = b->mamba;
        if (b->kind == MAMBA) outputs += 2 * m.channels + m.rank + m.channels * m.numbers + m.channels;
        wide = most(wide, outputs);
        experts = most(experts, needed);
        if (b->kind != ATTENTION) continue;
        heads = most(heads, b->heads * b->head_dim);
        found = most(found, b->heads * parts_of(plans[b->plan].keys, threads) * (2 + b->head_dim));
    }
    const Long sizes[] = {all * t.width, all * t.width, all * wide,  all * changed,
                          all * heads,   all * found,   all * heads, experts};
    Long sum = 0;
    for (Long size : sizes) sum += size;
    A *pieces[8], *next = (A *)malloc(sum * sizeof(A));
    for (int i = 0; i < 8; i++) pieces[i] = next, next += sizes[i];
    return {pieces[0], pieces[1], pieces[2], pieces[3], pieces[4], pieces[5], pieces[6], pieces[7], threads};
}

// Products of the same x with several weights, each with its expert vector: y[i] = W'[i] x, or residual + W'[i] x.
template <typename T, int COUNT, typename A>
TEAM void project(const Weight *weights, const A *x, Long rows, A *const (&y)[COUNT], const Room<A> &room,
                  const A *residual = 0) {
    static const Weight none = {};
    Product<A> before[COUNT], between[COUNT], after[COUNT];
    for (int i = 0; i < COUNT; i++) {
        const Weight *w = weights + i;
        const bool on_inputs = w->rank && !w->on_outputs, on_outputs = w->rank && w->on_outputs;
        before[i] = {on_inputs ? w : &none, x, room.changed + i * rows * w->inputs};
        between[i] = {w, on_inputs ? before[i].y : x, on_outputs && residual ? room.normed : y[i]};
        after[i] = {on_outputs ? w : &none, between[i].y, y[i]};
    }
    rescale<T>(before, rows, room.experts, room.threads);
    products<T>(between, rows, after[0].weight->rank ? 0 : residual);
    rescale<T>(after, rows, room.experts, room.threads, residual);
}

// Rotates queries and keys, scales queries for `attend`, and writes keys and values to their slots.
template <typename T, typename A>
TEAM void place(const Block &b, const Plan &p, const Tokens &t, const Shape &s, A *query, A *key, const A *value,
                A *scaled) {
    const Long width = b.head_dim;
#pragma omp for schedule(static) collapse(3)
    for (Long row = 0; row < t.rows; row++)
        for (Long head = 0; head < b.heads + 2 * b.key_heads; head++)
            for (Long token = 0; token < t.count; token++) {
                const Long index = row * t.count + token, own = (head - b.heads) % b.key_heads;
                const bool is_query = head < b.heads, is_value = head >= b.heads + b.key_heads;
                A *from = is_query   ? query + (index * b.heads + head) * width
                          : is_value ? (A *)value + (index * b.key_heads + own) * width
                                     : key + (index * b.key_heads + own) * width;
                if (t.cosines && !is_value) {
                    const Long angle = row * t.angle_row + token * width;
                    turn<T>(from, width / 2, (const T *)t.cosines + angle, (const T *)t.sines + angle, from);
                }
                if (is_query) {
                    A *to = place_of(scaled, s, row, head, token);
                    for (Long c = 0; c < width; c++) to[c] = from[c] * (A)(b.scaling * LOG2_E);
                } else {
                    const Long *slots = (const Long *)p.slots;
                    const Long slot = slots ? slots[row * p.slots_row + token] : p.first_slot + token;
                    T *to = (T *)(is_value ? b.values : b.keys);
                    to += ((row * b.key_heads + own) * b.capacity + slot) * width;
                    for (Long c = 0; c < width; c++) from_float(from[c], to + c);
                }
            }
}

template <typename T, typename A>
TEAM void attention(const Block &b, const Plan &p, const Tokens &t, const Room<A> &room) {
    const Long all = t.rows * t.count, row = b.key_heads * b.capacity * b.head_dim, head = b.capacity * b.head_dim;
    Shape s = {};
    s.rows = t.rows, s.key_heads = b.key_heads, s.group = b.heads / b.key_heads;
    s.queries = t.count, s.keys = p.keys, s.width = b.head_dim;
    s.key[0] = s.value[0] = row, s.key[1] = s.value[1] = head, s.key[2] = s.value[2] = b.head_dim;
    s.mask_row = p.mask_row, s.mask_query = p.mask_query;
    A *query = room.wide, *key = query + all * b.weights[0].outputs, *value = key + all * b.weights[1].outputs;
    A *const inputs[] = {query, key, value}, *const outputs[] = {room.x};
    rms_norm<T>(room.x, all, t.width, (const T *)b.norm, b.eps, room.normed);
    project<T>(b.weights, room.normed, all, inputs, room);
    place<T>(b, p, t, s, query, key, value, room.scaled);
    attend<T>(room.scaled, (const T *)b.keys, (const T *)b.values, (const uint8_t *)p.mask, s, room.threads,
              room.found, room.mixed);
    project<T>(b.weights + 3, room.mixed, all, outputs, room, room.x);
}

template <typename T, typename A> TEAM void gated_mlp(const Block &b, const Tokens &t, const Room<A> &room) {
    const Long all = t.rows * t.count, inner = b.weights[0].outputs;
    A *gates = room.wide, *up = gates + all * inner;
    A *const inputs[] = {gates, up}, *const outputs[] = {room.x};
    rms_norm<T>(room.x, all, t.width, (const T *)b.norm, b.eps, room.normed);
    project<T>(b.weights, room.normed, all, inputs, room);
    gate<T>(gates, up, all * inner, gates);
    project<T>(b.weights + 2, gates, all, outputs, room, room.x);
}

// One token: silu of the convolution of x (rows, channels) with the stride of its rows, and the next window.
template <typename T, typename A>
TEAM void convolve_token(const Recurrence &m, Long rows, const A *x, Long stride, A *u) {
    const int lanes = Lanes<A>::count;
    const Long kept = m.taps - 1, D = m.channels;
    const T *window = (const T *)m.window, *weight = (const T *)m.conv_weight, *bias = (const T *)m.conv_bias;
    T *next = (T *)m.next_window;
#pragma omp for schedule(static) collapse(2)
    for (Long row = 0; row < rows; row++)
        for (Long c = 0; c < D; c += lanes) {
            const int count = least(lanes, D - c);
            Vec<A> total = bias ? load_some<A>(bias + c, count) : Vec<A>{};
            for (Long tap = 0; tap < m.taps; tap++) {
                Vec<A> input = {}, taps = {};
                if (tap == kept) input = load_some<A>(x + row * stride + c, count);
                else if (window) input = load_some<A>(window + (row * kept + tap) * D + c, count);
                for (int lane = 0; lane < count; lane++) taps[lane] = to_float(weight[(c + lane) * m.taps + tap]);
                total += taps * input;
                if (tap) store_some<A>(input, next + (row * kept + tap - 1) * D + c, count);
            }
            store_rounded<T, A>(total * sigmoid<A>(total), u + row * D + c, count);
        }
}

// A weight in the type of the arithmetic: in place, or converted into `room`.
template <typename A> TEAM const A *wide_weight(Long weight, Long, A *, const A *) { return (const A *)weight; }
template <typename A> TEAM const A *wide_weight(Long weight, Long count, A *room, const bfloat16 *) {
#pragma omp for schedule(static)
    for (Long i = 0; i < count; i++) room[i] = to_float(((const bfloat16 *)weight)[i]);
    return room;
}

// Applies the inner norms, if there are any, to dt, B and C in `chosen` (rows, rank + 2 numbers), and copies dt to
// `dt`.
template <typename T, typename A> TEAM void part(const Recurrence &m, Long rows, A *chosen, A *dt) {
    const Long widths[] = {m.rank, m.numbers, m.numbers}, stride = m.rank + 2 * m.numbers;
#pragma omp for schedule(static)
    for (Long row = 0; row < rows; row++) {
        A *from = chosen + row * stride;
        for (int i = 0; i < 3; from += widths[i], i++)
            if (m.norms[i]) rms_norm_of_row<T>(from, widths[i], (const T *)m.norms[i], m.eps[i], from);
        memcpy(dt + row * m.rank, chosen + row * stride, m.rank * sizeof(A));
    }
}

// One token of the selective scan, in shares of channels.
template <typename T, typename A> TEAM void scan_token(const Scan &scan) {
    const Long lanes = Lanes<A>::count, blocks = (scan.shares.channels + lanes - 1) / lanes;
#pragma omp for schedule(static) collapse(2)
    for (Long row = 0; row < scan.shares.rows; row++)
        for (Long share = 0; share < scan.shares.splits; share++) {
            const Long first = blocks * share / scan.shares.splits * lanes;
            const Long end = blocks * (share + 1) / scan.shares.splits * lanes;
            const Long last = end < scan.shares.channels ? end : scan.shares.channels;
            scan_share<A>(scan, row, first, last);
            A *y = at<A>(scan.y, row, 0);
            for (Long c = first; c < last; c++) y[c] = as_stored<T>(y[c]);
        }
}

template <typename T, typename A> TEAM void mamba(const Block &b, const Tokens &t, const Room<A> &room) {
    const Recurrence &m = b.mamba;
    const Long rows = t.rows, D = m.channels, N = m.numbers, chosen_width = m.rank + 2 * N;
    A *both = room.wide, *u = both + rows * 2 * D, *chosen = u + rows * D, *dt_inputs = chosen + rows * chosen_width;
    A *dt = dt_inputs + rows * m.rank, *y = dt + rows * D, *widened = y + rows * D;
    A *const after_in[] = {both}, *const after_x[] = {chosen}, *const after_dt[] = {dt}, *const outputs[] = {room.x};
    rms_norm<T>(room.x, rows, t.width, (const T *)b.norm, b.eps, room.normed);
    project<T>(b.weights, room.normed, rows, after_in, room);
    convolve_token<T>(m, rows, both, 2 * D, u);
    project<T>(b.weights + 1, u, rows, after_x, room);
    part<T>(m, rows, chosen, dt_inputs);
    project<T>(b.weights + 2, dt_inputs, rows, after_dt, room);
    const A *A_log = wide_weight<A>(m.A_log, D * N, widened, (const T *)0);
    const A *skip = wide_weight<A>(m.D, D, widened + D * N, (const T *)0);
    Scan scan = {};
    scan.B = {chosen + m.rank, chosen_width, 0}, scan.C = {chosen + m.rank + N, chosen_width, 0};
    scan.u = {u, D, 0}, scan.dt = {dt, D, 0}, scan.gate = {both + D, 2 * D, 0}, scan.y = {y, D, 0};
    scan.A = A_log, scan.D = skip, scan.initial_state = (const void *)m.state, scan.final_state = (void *)m.next_state;
    scan.numbers = N, scan.dt_softplus = scan.A_is_log = 1;
    scan.shares = {0, rows, 1, D, 2 * room.threads, room.threads, 0};
    scan_token<T, A>(scan);
    project<T>(b.weights + 3, y, rows, outputs, room, room.x);
}

// Whether all keys that are read, and all slots that are written, lie within the capacity of their blocks.
static bool fits(const Tokens &t, const Block *blocks, Long count, const Plan *plans) {
    for (const Block *b = blocks; b < blocks + count; b++) {
        if (b->kind != ATTENTION) continue;
        const Plan &p = plans[b->plan];
        const Long *slots = (const Long *)p.slots;
        if (p.keys < 0 || p.keys > b->capacity) return false;
        if (!slots && (p.first_slot < 0 || p.first_slot + t.count > b->capacity)) return false;
        for (Long row = 0; slots && row < (p.slots_row ? t.rows : 1); row++)
            for (Long token = 0; token < t.count; token++) {
                const Long slot = slots[row * p.slots_row + token];
                if (slot < 0 || slot >= b->capacity) return false;
            }
    }
    return true;
}

// Runs all blocks on x (rows, tokens, width); y is the output of the last one.
template <typename T>
static void run_blocks(const T *x, const Tokens *tokens, const Block *blocks, Long count, const Plan *plans, T *y,
                       int threads) {
    typedef Real<T> A;
    const Tokens t = *tokens;
    const Room<A> room = make_room<A>(t, blocks, count, plans, threads);
    const Long numbers = t.rows * t.count * t.width;
    for (Long i = 0; i < numbers; i++) room.x[i] = to_float(x[i]);
#pragma omp parallel num_threads(threads) if (t.width * t.width > SMALL)
    for (const Block *b = blocks; b < blocks + count; b++) {
        if (b->kind == ATTENTION) attention<T>(*b, plans[b->plan], t, room);
        else if (b->kind == MLP) gated_mlp<T>(*b, t, room);
        else mamba<T>(*b, t, room);
    }
    for (Long i = 0; i < numbers; i++) from_float(room.x[i], y + i);
    free(room.x);
}
