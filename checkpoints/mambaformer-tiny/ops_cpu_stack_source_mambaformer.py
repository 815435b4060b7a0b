"""The CPU kernel of `decode_program_mambaformer` in C++: blocks of layers, built from the decode and scan kernels."""

STACK_SOURCE = r"""
// What a Mamba block has besides its products: letters as in the table of ops_mambaformer.py.
struct Recurrence {
    Long conv_weight, conv_bias, A_log, D, channels, taps, numbers, rank;  // weights are stored as activations are
    Long norms[3];  // inner norms of dt, B and C, or none
    double eps[3];
    Long window, next_window;  // (rows, taps - 1, channels), stored as activations are; before and after the token
    Long state, next_state;    // (rows, channels, numbers) of A; `window` and `state` are null before the first token
};

// A block is a norm, products with something between them, and the residual: x += block(norm(x)).
struct Block {
    Long kind, norm;
    double eps;
    Weight weights[4];  // attention: q, k, v and output; MLP: gate, up and down; Mamba: in, x, dt and out
    // Attention: how queries are scaled, heads, and where keys and values are, (rows, key heads, capacity, head_dim)
    double scaling;
    Long heads, key_heads, head_dim, plan, keys, values, capacity;
    Recurrence mamba;
};
enum { ATTENTION, MLP, MAMBA };

// What attention blocks that retain alike share: the mask, as `Shape` has it, how many keys there are with the new
// ones, and where these go: from `first_slot` on, or to the slots (rows or 1, tokens).
struct Plan { Long mask, mask_row, mask_query, keys, first_slot, slots, slots_row; };

// The tokens, and their cosines and sines (rows or 1, tokens, head_dim), if there are any.
struct Tokens { Long rows, count, width, cosines, sines, angle_row; };

template <typename A> struct Room { A *x, *normed, *wide, *changed, *scaled, *found, *mixed, *experts; int threads; };

static Long most(Long one, Long other) { return one > other ? one : other; }

// One piece of memory for what a block needs between its steps, and the activations; `x` is to be freed.
template <typename A>
static Room<A> make_room(const Tokens &t, const Block *blocks, Long count, const Plan *plans, int threads) {
    Long wide = 0, changed = 0, heads = 0, found = 0, experts = 0;
    const Long all = t.rows * t.count;
    for (const Block *b = blocks; b < blocks + count; b++) {
        // Weights that multiply the same; those behind them have the room for themselves, one after the other.
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
    const Long sizes[] = {all * t.width, all * t.width, all * wide, all * changed, all * heads, all * found,
                          all * heads, experts};
    Long sum = 0;
    for (Long size : sizes) sum += size;
    A *pieces[8], *next = (A *)malloc(sum * sizeof(A));
    for (int i = 0; i < 8; i++) pieces[i] = next, next += sizes[i];
    return {pieces[0], pieces[1], pieces[2], pieces[3], pieces[4], pieces[5], pieces[6], pieces[7], threads};
}

// Products of the same x with several weights, each with its expert: y[i] = W'[i] x, or residual + that.
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

// Turns queries and keys, scales queries as `attend` wants them, and puts keys and values into their slots.
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
    const Shape s = {t.rows, b.key_heads, b.heads / b.key_heads, t.count, p.keys, b.head_dim, {},
                     {row, head, b.head_dim}, {row, head, b.head_dim}, p.mask_row, p.mask_query};
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

// One token: silu of the convolution of x (rows, channels; `stride` from row to row), and the window moves on.
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

// A weight as it is computed with: where it is, or in the room given.
template <typename A> TEAM const A *wide_weight(Long weight, Long, A *, const A *) { return (const A *)weight; }
template <typename A> TEAM const A *wide_weight(Long weight, Long count, A *room, const bfloat16 *) {
#pragma omp for schedule(static)
    for (Long i = 0; i < count; i++) room[i] = to_float(((const bfloat16 *)weight)[i]);
    return room;
}

// dt, B and C side by side in `chosen` (rows, rank + 2 numbers): normed, if there are norms; and dt by itself as well.
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
    const View B = {chosen + m.rank, chosen_width, 0}, C = {chosen + m.rank + N, chosen_width, 0};
    const Scan scan = {B, C, {u, D, 0}, {dt, D, 0}, {both + D, 2 * D, 0}, {y, D, 0}, A_log, skip,
                       (const void *)m.state, (void *)m.next_state, 0, N, 1, 1,
                       {0, rows, 1, D, 2 * room.threads, room.threads}};
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

// Blocks, one after the other, for x (rows, tokens, width); y has what comes out of the last one.
template <typename T>
static void run_blocks(const T *x, const Tokens *tokens, const Block *blocks, Long count, const Plan *plans, T *y,
                       int threads) {
    typedef typename Arithmetic<T>::type A;
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

#define FOR_BLOCKS(name, T)                                                                                           \
    extern "C" void run_blocks_##name(const T *x, const Tokens *tokens, const Block *blocks, Long count,              \
                                      const Plan *plans, T *y, int n) {                                               \
        run_blocks<T>(x, tokens, blocks, count, plans, y, n);                                                         \
    }
FOR_BLOCKS(float32, float)
FOR_BLOCKS(bfloat16, bfloat16)
FOR_BLOCKS(float64, double)

extern "C" int fits(const Tokens *tokens, const Block *blocks, Long count, const Plan *plans) {
    return fits(*tokens, blocks, count, plans);
}
"""

__all__ = ["STACK_SOURCE"]
