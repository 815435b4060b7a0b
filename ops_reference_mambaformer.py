"""The convolution and the recurrences in PyTorch: the reference that judges every kernel, and runs where none may.

Letters are defined by the table at the top of `ops_mambaformer`, which also documents arguments and results.
"""

import functools
import math
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_eligibility_mambaformer import is_differentiated

# A step after which nothing is left of a state; a power of two, so scaling by it rounds nothing.
FORGETTING_STEP = 2.0**40
# Up to this number of tokens, a scan with one level is faster than one with two.
LONGEST_SINGLE_CHUNK = 8
# An exported scan of dynamic length has chunks of this length, and at most 2**DOUBLINGS of them: 2**24 tokens.
EXPORTED_CHUNK, DOUBLINGS = 16, 20

# (u, dt, A, B, C, D, gate, initial_state) -> y, final_state; tokens of padding have u = dt = 0.
Recurrence = Callable[
    [Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None], tuple[Tensor, Tensor]
]


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Float64 if any of them is, else float32."""
    has_float64 = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if has_float64 else torch.float32


# ---- padding


def real_tokens(lengths: Tensor | None, length: int) -> Tensor | None:
    """(B, L, 1), true at real tokens; `None` when all are."""
    if lengths is None:
        return None
    return (torch.arange(length, device=lengths.device) < lengths[:, None])[:, :, None]


def zero_padding(tensor: Tensor, real: Tensor | None) -> Tensor:
    # Selected, not multiplied: padding may hold NaN, and NaN times zero is NaN, in the gradient too.
    return tensor if real is None else torch.where(real, tensor, 0)


def without_autocast(device_type: str) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


# ---- convolution


def start_of_convolution(x: Tensor, kernel_size: int, state: Tensor | None, lengths: Tensor | None) -> Tensor:
    """The inputs (B, K - 1 + L, D): the initial state, or zeros, and x with zeros at padding."""
    x = zero_padding(x, real_tokens(lengths, x.shape[1]))
    state = x.new_zeros(x.shape[0], kernel_size - 1, x.shape[2]) if state is None else state.to(x.dtype)
    return torch.cat([state, x], dim=1)


def convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d`."""
    length, dtype, count = x.shape[1], arithmetic_dtype(x, weight, bias), weight.shape[1] - 1
    inputs = start_of_convolution(x, weight.shape[1], initial_state, lengths)
    columns, wide = weight.to(dtype).unbind(1), inputs.to(dtype)

    def inputs_at(tap: int) -> Tensor:
        """The inputs (B, L, D) that column `tap` of the weight meets; zeros before the start of a sequence."""
        met = wide[:, tap : tap + length]
        return met if positions is None else torch.where((positions >= count - tap)[:, :, None], met, 0)

    y = inputs_at(0) * columns[0]
    for tap, column in enumerate(columns[1:], start=1):
        y = y.addcmul_(inputs_at(tap), column)
    y = y if bias is None else y + bias.to(dtype)
    y = y if activation is None else F.silu(y)
    return y.to(x.dtype), last_inputs(inputs, count, lengths)


def last_inputs(inputs: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last `count` of each row's inputs, which start with the `count` of its initial state."""
    if lengths is None:
        # A view would keep all inputs in memory for as long as the state lives.
        return inputs[:, inputs.shape[1] - count :].clone()
    index = lengths[:, None] + torch.arange(count, device=lengths.device)  # (B, K - 1)
    return inputs.gather(1, index[:, :, None].expand(-1, -1, inputs.shape[2]))


# ---- selective scan


def scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    dt_softplus: bool,
    A_is_log: bool,
    positions: Tensor | None,
    recurrence: Recurrence | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan`; `recurrence` computes it from prepared arguments."""
    real = real_tokens(lengths, u.shape[1])
    u, dt, B, C = (zero_padding(tensor, real) for tensor in (u, dt, B, C))
    gate = None if gate is None else zero_padding(gate, real)
    dtype = arithmetic_dtype(u, dt, A, B, C, D, gate, initial_state)
    if dt_softplus:
        dt = zero_padding(F.softplus(dt.to(dtype)), real)  # softplus(0) is not 0, and padding takes no step
    A = -torch.exp(A.to(dtype)) if A_is_log else A.to(dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    recurrence = scan_tokens if recurrence is None else recurrence
    # Autocast would run the products of the scan in half precision.
    with without_autocast(u.device.type):
        if positions is None:
            return recurrence(u, dt, A, B, C, D, gate, initial_state)
        restarted = _forget_before_starts(u.to(dtype), dt.to(dtype), positions)
        y, state = recurrence(*restarted, A, B, C, None, None, initial_state)
        return skip_and_gate(y, u, D, gate), state


def _forget_before_starts(u: Tensor, dt: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """u and dt of a scan that starts from zeros at each position 0, and writes dt u there as before."""
    is_first = (positions == 0)[:, :, None]
    return torch.where(is_first, u * (dt / FORGETTING_STEP), u), torch.where(is_first, FORGETTING_STEP, dt)


def skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, gate: Tensor | None) -> Tensor:
    """y + D u, times silu(gate), computed in the dtype of y and returned in that of u."""
    if D is not None:
        y = torch.addcmul(y, u.to(y.dtype), D.to(y.dtype))
    if gate is not None:
        y = y * F.silu(gate.to(y.dtype))
    return y.to(u.dtype)


def scan_tokens(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The scan of prepared arguments, by the form that suits its length."""
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0], *A.shape)
    if isinstance(u.shape[1], torch.SymInt):  # asked first: a comparison of the length would fix it in the graph
        advance = _scan_any_length
    elif u.shape[1] == 0:
        return u, initial_state
    else:
        advance = _scan_token if u.shape[1] == 1 else _scan_chunks
    dt, B, C = (tensor.to(A.dtype) for tensor in (dt, B, C))
    y, final_state = advance(dt * u.to(A.dtype), dt, A, B, C, initial_state)
    return skip_and_gate(y, u, D, gate), final_state


def _scan_token(
    dt_u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    decay = (dt.transpose(1, 2) * A).exp_()  # (B, D, N)
    state = (decay * initial_state).addcmul_(dt_u.transpose(1, 2), B)
    return (state @ C.transpose(1, 2)).transpose(1, 2), state


def _scan_chunks(
    dt_u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """All chunks advance together, token by token: first from zeros, then from the states in which they start.

    The number of steps is twice the length of a chunk plus the number of chunks; memory holds one state per chunk.
    Inside, states are (B, chunks, N, D): with the longest axis last, arithmetic runs over contiguous memory.
    """
    # torch.compile unrolls the loops below, which it must not attempt with a symbolic length.
    length = operator.index(dt.shape[1])
    chunk, chunks = _divide(length)
    in_place = not (torch.compiler.is_compiling() or is_differentiated(dt_u, dt, A, B, C, initial_state))
    dt_u, dt, B, C = (_split(tensor, chunk, chunks) for tensor in (dt_u, dt, B, C))  # (B, chunks, chunk, D or N)
    A, initial_state = A.t().contiguous(), initial_state.transpose(1, 2)
    # Allocating memory for every token costs more than its arithmetic.
    scratch = A.new_empty(dt.shape[0], chunks, *A.shape) if in_place else None

    def advance(state: Tensor, token: int) -> Tensor:
        """Advances the states of the first chunks over the token of this index in each."""
        count = state.shape[1]
        step, write, key = dt[:, :count, token, None], dt_u[:, :count, token, None], B[:, :count, token, :, None]
        if scratch is None:
            return torch.addcmul((step * A).exp() * state, write, key)
        return state.mul_(torch.mul(step, A, out=scratch[:, :count]).exp_()).addcmul_(write, key)

    state = A.new_zeros(dt.shape[0], chunks - 1, *A.shape)
    if chunks > 1:
        for token in range(chunk):
            state = advance(state, token)
    state = _enter_chunks(initial_state, state, (dt[:, :-1].sum(2)[:, :, None] * A).exp_())
    y = []
    for token in range(chunk):
        state = advance(state, token)
        y.append((C[:, :, token, None] @ state).squeeze(2))  # (B, chunks, D)
    return torch.stack(y, dim=2).flatten(1, 2)[:, :length], state[:, -1].transpose(1, 2).contiguous()


def _scan_any_length(
    dt_u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """`_scan_chunks` for `torch.export` with a dynamic length: the graph has the same operations for all lengths."""
    length = dt.shape[1]
    # One chunk more than needed: a dimension that is 1 for some lengths would restrict the lengths of the graph.
    # For the same reason tokens are selected by index: a reshape asks whether one size divides the other.
    chunks = (length + EXPORTED_CHUNK - 1) // EXPORTED_CHUNK + 1
    padded = [F.pad(tensor, (0, 0, 0, chunks * EXPORTED_CHUNK - length)) for tensor in (dt_u, dt, B, C)]
    starts = EXPORTED_CHUNK * torch.arange(chunks, device=dt.device)
    tokens = [[tensor.index_select(1, starts + n) for tensor in padded] for n in range(EXPORTED_CHUNK)]
    A, initial_state = A.t().contiguous(), initial_state.transpose(1, 2)[:, None]  # (N, D), (B, 1, N, D)

    def advance(state: Tensor, write: Tensor, step: Tensor, key: Tensor) -> Tensor:
        return torch.addcmul((step[:, :, None] * A).exp() * state, write[:, :, None], key[..., None])

    left = torch.zeros_like(tokens[0][1][:, :, None] * A)  # (B, chunks, N, D)
    for write, step, key, _ in tokens:
        left = advance(left, write, step, key)
    decay = (functools.reduce(operator.add, (step for _, step, _, _ in tokens))[:, :, None] * A).exp()
    entered = _scan_by_doubling(torch.cat([initial_state, left], 1), F.pad(decay, (0, 0, 0, 0, 1, 0), value=1.0))
    state, final_state, y = entered[:, :-1], entered[:, -1], []
    for write, step, key, query in tokens:
        state = advance(state, write, step, key)
        y.append((query[:, :, None] @ state).squeeze(2))  # (B, chunks, D)
    order = torch.arange(length, device=dt.device)
    order = order % EXPORTED_CHUNK * chunks + order // EXPORTED_CHUNK
    return torch.cat(y, dim=1).index_select(1, order), final_state.transpose(1, 2).contiguous()


def _scan_by_doubling(state: Tensor, decay: Tensor) -> Tensor:
    """h_c = decay_c h_(c-1) + state_c over dimension 1 (Hillis and Steele, CACM 29:12, 1986)."""
    index = torch.arange(state.shape[1], device=state.device)
    for distance in (2**n for n in range(DOUBLINGS)):
        has_earlier, earlier = (index >= distance)[:, None, None], (index - distance).clamp(min=0)
        state = torch.where(has_earlier, torch.addcmul(state, decay, state.index_select(1, earlier)), state)
        decay = torch.where(has_earlier, decay * decay.index_select(1, earlier), decay)
    return state


def _divide(length: int) -> tuple[int, int]:
    """The length of a chunk, about the square root, and the number of chunks, with as little padding as possible."""
    chunks = math.ceil(length / max(LONGEST_SINGLE_CHUNK, math.isqrt(length)))
    return math.ceil(length / chunks), chunks


def _split(tensor: Tensor, chunk: int, chunks: int) -> Tensor:
    """(B, L, X) as (B, chunks, chunk, X); zeros fill the last chunk, and dt = 0 does not change a state."""
    missing = chunk * chunks - tensor.shape[1]
    tensor = F.pad(tensor, (0, 0, 0, missing)) if missing else tensor
    return tensor.unflatten(1, (chunks, chunk))


def _enter_chunks(initial_state: Tensor, left: Tensor, decay: Tensor) -> Tensor:
    """The states (B, chunks, N, D) in which chunks start.

    `left` are the states after each chunk but the last, started from zeros, and `decay` their decay over a chunk.
    """
    entered = [initial_state]
    for chunk in range(left.shape[1]):
        entered.append(torch.addcmul(left[:, chunk], decay[:, chunk], entered[-1]))
    return torch.stack(entered, dim=1)
