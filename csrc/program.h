// The decode program: a list of operations over a workspace, run by one team of threads.
//
// Python writes the list and plans the workspace (`decode_builder_mambaformer.py`). All threads run all operations,
// and each operation ends with a barrier. Activations are of type A, rounded to T, the type that they are stored in.
#pragma once

#include "attention.h"
#include "expert_vector.h"
#include "linear.h"
#include "norm_rope_gate.h"
#include "scan.h"

// The decode step that operations are run for. `rows` counts all tokens: an activation is (rows, width).
template <typename A> struct Run {
    const ProgramInputs &inputs;
    A *workspace;
    Long rows;
    int threads;

    A *at(Long buffer) const { return buffer < 0 ? 0 : workspace + buffer * rows; }
    View view(const Columns &columns) const { return {at(columns.buffer) + columns.first, columns.stride, 0}; }
};

template <typename T, typename A> TEAM void run(const NormOp &op, const Run<A> &run) {
    const double eps = run.inputs.settings[op.eps];
    rms_norm<T>(run.at(op.x), run.rows, op.width, (const T *)op.weight, eps, run.at(op.y));
}

// ---- products and expert vectors

template <typename A>
static void resolve(const Projection *projections, Long count, const Run<A> &run, Product<A> *to) {
    for (const Projection *p = projections; p < projections + count; p++)
        *to++ = {p->weight, run.at(p->x), run.at(p->y)};
}

template <typename T, typename A> TEAM void run(const LinearOp &op, const Run<A> &run) {
    Product<A> all[MOST_TOGETHER];
    resolve(op.projections, op.count, run, all);
    products<T>(all, op.count, run.rows, run.at(op.residual));
}

template <typename T, typename A> TEAM void run(const ScaleOp &op, const Run<A> &run) {
    Product<A> all[MOST_TOGETHER];
    resolve(op.projections, op.count, run, all);
    rescale<T>(all, op.count, run.rows, run.at(op.scratch), run.threads, run.at(op.residual));
}

template <typename T, typename A> TEAM void run(const GateOp &op, const Run<A> &run) {
    gate<T>(run.at(op.gates), run.at(op.x), run.rows * op.width, run.at(op.y));
}

// ---- attention

// Writes one key or value to its slot; if it is encoded, it is rotated in place.
template <typename T, typename A>
static void write_slot(A *from, Long width, const Codec &codec, Long slot, void *slots) {
    if (codec.bits) return encode(from, width, codec, (uint8_t *)slots + slot * codec.nbytes);
    T *to = (T *)slots + slot * width;
    for (Long c = 0; c < width; c++) from_float(from[c], to + c);
}

// Scales one query for `attend`.
template <typename A> static void scale_query(const A *from, Long width, A factor, bool is_coded, A *to) {
    for (Long c = 0; c < width; c++) to[c] = from[c] * factor;
    if (is_coded) rotate_vector(to, width);
}

template <typename T, typename A> TEAM void run(const WriteKeysOp &op, const Run<A> &run) {
    const ProgramInputs &inputs = run.inputs;
    const KeySlots &stored = inputs.key_slots[op.key_slots];
    const KeyLayout &layout = inputs.layouts[stored.layout];
    const Long width = op.head_dim, key_heads = op.key_heads;
    const A factor = (A)(inputs.settings[op.scaling] * LOG2_E);
    A *query = run.at(op.query), *key = run.at(op.key), *value = run.at(op.value);
    A *scaled = run.at(op.scaled), *for_sinks = run.at(op.for_sinks);
    const bool is_coded = stored.key_codec.bits;
    Shape shape = {};
    shape.key_heads = key_heads, shape.group = op.heads / key_heads, shape.queries = inputs.tokens,
    shape.width = width;
#pragma omp for schedule(static) collapse(3)
    for (Long row = 0; row < inputs.rows; row++)
        for (Long head = 0; head < op.heads + 2 * key_heads; head++)
            for (Long token = 0; token < inputs.tokens; token++) {
                const Long index = row * inputs.tokens + token, own = (head - op.heads) % key_heads;
                const bool is_query = head < op.heads, is_value = head >= op.heads + key_heads;
                A *from = is_query   ? query + (index * op.heads + head) * width
                          : is_value ? value + (index * key_heads + own) * width
                                     : key + (index * key_heads + own) * width;
                if (is_query && layout.sinks) {
                    const Long angle = row * layout.sink_angle_row + token * width;
                    A *to = place_of(for_sinks, shape, row, head, token);
                    turn<T>(from, width / 2, (const T *)layout.sink_cosines + angle,
                            (const T *)layout.sink_sines + angle, to);
                    scale_query(to, width, factor, is_coded, to);
                }
                if (inputs.cosines && !is_value) {
                    const Long angle = row * inputs.angle_row + token * width;
                    turn<T>(from, width / 2, (const T *)inputs.cosines + angle, (const T *)inputs.sines + angle, from);
                }
                if (is_query) {
                    scale_query(from, width, factor, is_coded, place_of(scaled, shape, row, head, token));
                } else {
                    const Long place =
                        layout.slots ? layout.slots[row * layout.slots_row + token] : layout.first_slot + token;
                    const Long slot = (row * key_heads + own) * stored.capacity + place;
                    if (is_value) write_slot<T>(from, width, stored.value_codec, slot, stored.values);
                    else write_slot<T>(from, width, stored.key_codec, slot, stored.keys);
                }
            }
}

template <typename T, typename A> TEAM void run(const AttendOp &op, const Run<A> &run) {
    const KeySlots &stored = run.inputs.key_slots[op.key_slots];
    const KeyLayout &layout = run.inputs.layouts[stored.layout];
    // Strides are in numbers, or in vectors if these are codes.
    const bool is_coded = stored.key_codec.bits;
    const Long token = is_coded ? 1 : op.head_dim, head = stored.capacity * token, row = op.key_heads * head;
    const Shape shape = {run.inputs.rows,  op.key_heads, op.heads / op.key_heads, run.inputs.tokens,  layout.keys,
                         op.head_dim,      {},           {row, head, token},      {row, head, token}, layout.mask_row,
                         layout.mask_query};
    const Queries<A> queries = {run.at(op.scaled), run.at(op.for_sinks), layout.sinks};
    A *scratch = run.at(op.scratch), *mixed = run.at(op.mixed);
    if (is_coded) {
        const uint8_t *keys = (const uint8_t *)stored.keys, *values = (const uint8_t *)stored.values;
        const CodedStorage<T> storage = {keys, values, stored.key_codec, stored.value_codec};
        attend<T>(queries, storage, layout.mask, shape, run.threads, scratch, mixed);
    } else {
        const PlainStorage<T> storage = {(const T *)stored.keys, (const T *)stored.values};
        attend<T>(queries, storage, layout.mask, shape, run.threads, scratch, mixed);
    }
}

// ---- recurrences

template <typename T, typename A> TEAM void run(const ConvStepOp &op, const Run<A> &run) {
    const int lanes = Lanes<A>::count;
    const Long kept = op.taps - 1, D = op.channels;
    const T *window = (const T *)run.inputs.states[op.state].before;
    const T *weight = (const T *)op.weight, *bias = (const T *)op.bias;
    T *next = (T *)run.inputs.states[op.state].after;
    const View x = run.view(op.x);
    A *y = run.at(op.y);
#pragma omp for schedule(static) collapse(2)
    for (Long row = 0; row < run.rows; row++)
        for (Long c = 0; c < D; c += lanes) {
            const int count = least(lanes, D - c);
            Vec<A> total = bias ? load_some<A>(bias + c, count) : Vec<A>{};
            for (Long tap = 0; tap < op.taps; tap++) {
                Vec<A> input = {}, taps = {};
                if (tap == kept) input = load_some<A>(at<A>(x, row, 0) + c, count);
                else if (window) input = load_some<A>(window + (row * kept + tap) * D + c, count);
                for (int lane = 0; lane < count; lane++) taps[lane] = to_float(weight[(c + lane) * op.taps + tap]);
                total += taps * input;
                if (tap) store_some<A>(input, next + (row * kept + tap - 1) * D + c, count);
            }
            store_rounded<T, A>(total * sigmoid<A>(total), y + row * D + c, count);
        }
}

template <typename T, typename A> TEAM void run(const InnerNormsOp &op, const Run<A> &run) {
    const Long first = op.widths[0], stride = first + op.widths[1] + op.widths[2];
    A *x = run.at(op.x), *y = run.at(op.y);
#pragma omp for schedule(static)
    for (Long row = 0; row < run.rows; row++) {
        A *part = x + row * stride;
        for (int i = 0; i < 3; part += op.widths[i], i++)
            if (op.weights[i]) {
                const double eps = run.inputs.settings[op.eps[i]];
                rms_norm_of_row<T>(part, op.widths[i], (const T *)op.weights[i], eps, part);
            }
        memcpy(y + row * first, x + row * stride, first * sizeof(A));
    }
}

// A weight in the type of the arithmetic: in place, or converted into `room`.
template <typename A> TEAM const A *wide_weight(const void *weight, Long, A *, const A *) { return (const A *)weight; }
template <typename A> TEAM const A *wide_weight(const void *weight, Long count, A *room, const bfloat16 *) {
#pragma omp for schedule(static)
    for (Long i = 0; i < count; i++) room[i] = to_float(((const bfloat16 *)weight)[i]);
    return room;
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

template <typename T, typename A> TEAM void run(const RecurrenceStepOp &op, const Run<A> &run) {
    const Long D = op.channels, N = op.numbers;
    A *scratch = run.at(op.scratch);
    const State &state = run.inputs.states[op.state];
    Scan scan = {};
    scan.A = wide_weight<A>(op.A_log, D * N, scratch, (const T *)0);
    scan.D = wide_weight<A>(op.D, D, scratch + D * N, (const T *)0);
    scan.B = run.view(op.B), scan.C = run.view(op.C), scan.gate = run.view(op.gate);
    scan.u = {run.at(op.u), D, 0}, scan.dt = {run.at(op.dt), D, 0}, scan.y = {run.at(op.y), D, 0};
    scan.initial_state = state.before, scan.final_state = state.after;
    scan.numbers = N, scan.dt_softplus = scan.A_is_log = 1;
    scan.shares = {0, run.rows, 1, D, 2 * run.threads, run.threads, 0};
    scan_token<T, A>(scan);
}

// ---- the loop

template <typename T, typename A> TEAM void run_operations(const Op *first, const Op *last, const Run<A> &program) {
#define CASE(kind, type)                                                                                              \
    case kind: run<T>(*(const type *)op, program); break;
    for (const Op *op = first; op < last; op = (const Op *)((const char *)op + op->size)) {
        switch (op->kind) { FOR_EACH_OPERATION(CASE) }
    }
#undef CASE
}

// Runs the operations from `first` up to `last` on x (rows, tokens, width), the first buffer of the workspace; y is
// that buffer afterwards.
template <typename T>
static void run_program(const T *x, const ProgramInputs &inputs, const Op *first, const Op *last, T *y, int threads) {
    typedef Real<T> A;
    const Long rows = inputs.rows * inputs.tokens, count = rows * inputs.width;
    A *workspace = (A *)malloc(rows * inputs.workspace * sizeof(A));
    const Run<A> run = {inputs, workspace, rows, threads};
    for (Long i = 0; i < count; i++) workspace[i] = to_float(x[i]);
#pragma omp parallel num_threads(threads) if (inputs.width * inputs.width > SMALL)
    run_operations<T>(first, last, run);
    for (Long i = 0; i < count; i++) from_float(workspace[i], y + i);
    free(workspace);
}
