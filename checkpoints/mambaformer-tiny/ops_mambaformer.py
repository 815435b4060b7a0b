"""The tensor functions of recurrent mixers; each takes and returns its recurrent state.

Letters, after Mamba (arXiv 2312.00752). Activations are channels-last and packed: real tokens first, pads last.

| letter | meaning                                                        | shape     | paper           |
|--------|----------------------------------------------------------------|-----------|-----------------|
| B, L   | rows of the batch, tokens fed in this call                     |           | algorithm 2     |
| D      | channels of the inner width; as a tensor, the skip weight (D,) |           | section 3.4     |
| N      | numbers that a channel remembers                               |           | section 2       |
| K      | taps of the convolution                                        |           | section 3.4     |
| x      | input of the convolution                                       | (B, L, D) | figure 3        |
| u      | input of the scan; the paper calls it x                        | (B, L, D) | equation 2      |
| dt     | step size Delta, after softplus unless said otherwise          | (B, L, D) | section 3.2     |
| A      | decay rates, negative                                          | (D, N)    | section 3.6     |
| B, C   | as tensors: what a token writes to the state, what it reads    | (B, L, N) | section 3.2     |
| gate   | multiplies the output through SiLU                             | (B, L, D) | figure 3        |
| h      | state, h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t                | (B, D, N) | equations 2a, 4 |
| y      | output, y_t = C_t . h_t + D u_t                                | (B, L, D) | equation 2b     |

On the CPU, `ops_cpu_scan_mambaformer` computes both functions wherever `_use_cpu_kernels` finds nothing against it. On
GPUs, fused kernels (packages causal-conv1d and mamba-ssm) are used where they can be: `_load_kernels` finds them and
`_use_kernels` is the switch. Each has a function here that gives it the signature of the PyTorch path beside it.
"""

import math
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import lru_cache, partial, reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_cpu_build_mambaformer import is_differentiated
from .ops_cpu_scan_mambaformer import MOST_TAPS, arithmetic_dtype, convolve_on_cpu, scan_on_cpu, takes_on_cpu

# A step so long that nothing is left of a state; a power of two, so that scaling by it rounds nothing.
FORGETTING_STEP = 2.0**40
# Up to so many tokens one level of the scan is faster than two.
LONGEST_SINGLE_CHUNK = 8
# An exported scan of dynamic length has chunks of this length, and at most 2**DOUBLINGS of them: 2**24 tokens.
EXPORTED_CHUNK, DOUBLINGS = 16, 20


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """SiLU of a depthwise convolution over each token and the K - 1 inputs before it (arXiv 2312.00752, figure 3).

    Args:
        x: (B, L, D). Row b holds `lengths[b]` real tokens and then pads, whose values are never used.
        weight: (D, K); the last tap meets the newest token.
        bias: (D,).
        initial_state: (B, K - 1, D), the inputs before x, oldest first; `None` means zeros.
        lengths: (B,) integers from 0 to L; `None` means that every token is real.
        positions: (B, L) integers, the position of each token in its own sequence, where a row holds several; no
            token meets inputs of the sequence before its own. `None` means that each row is one sequence.

    Returns:
        y: (B, L, D) in the dtype of x; finite but meaningless at pads.
        final_state: (B, K - 1, D) in the dtype of x, the last inputs before each row's own end, of whichever sequence.

    Raises:
        ValueError: shapes that contradict each other.
    """
    (rows, length, channels), taps = x.shape, weight.shape[-1]
    _check_shapes(
        weight=(weight, (channels, taps)),
        bias=(bias, (channels,)),
        initial_state=(initial_state, (rows, taps - 1, channels)),
        lengths=(lengths, (rows,)),
        positions=(positions, (rows, length)),
    )
    if taps <= MOST_TAPS and _use_cpu_kernels(x, weight, bias, initial_state, lengths, positions):
        return convolve_on_cpu(x, weight, bias, initial_state, lengths, positions)
    x = _zero_pads(x, _real_tokens(lengths, length))
    initial_state = x.new_zeros(rows, taps - 1, channels) if initial_state is None else initial_state.to(x.dtype)
    if positions is not None:
        return _convolve(x, weight, bias, initial_state, lengths, positions)
    convolve = _choose_convolution(x, weight, bias, initial_state, lengths)
    return convolve(x, weight, bias, initial_state, lengths)


def conv_window(
    x: Tensor, num_taps: int, initial_state: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """The final state of `causal_conv1d` with K = `num_taps`, (B, K - 1, D), without its output."""
    x = _zero_pads(x, _real_tokens(lengths, x.shape[1]))
    if initial_state is None:
        initial_state = x.new_zeros(x.shape[0], num_taps - 1, x.shape[2])
    return _last_inputs(torch.cat([initial_state.to(x.dtype), x], dim=1), num_taps - 1, lengths)


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None = None,
    gate: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    dt_softplus: bool = False,
    A_is_log: bool = False,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Selective state space recurrence over any number of tokens from any state (arXiv 2312.00752, section 3.2).

    Arithmetic is in float32, or in float64 if any input is. Only numbers <= 0 are ever exponentiated, so neither
    length nor strength of decay makes it overflow or cancel.

    Args:
        u, dt: (B, L, D); dt >= 0 unless `dt_softplus`. Row b holds `lengths[b]` real tokens and then pads, whose
            values are never used.
        A: (D, N), negative.
        B, C: (B, L, N).
        D: (D,), or `None` for no skip.
        gate: (B, L, D), or `None` for no gate.
        initial_state: (B, D, N); `None` means zeros.
        lengths: (B,) integers from 0 to L; `None` means that every token is real.
        dt_softplus: dt is given as it was before softplus, which is then part of the arithmetic.
        A_is_log: A is given as log(-A), the way it is trained.
        positions: (B, L) integers, the position of each token in its own sequence, where a row holds several: at
            position 0 the state starts from zeros. `None` means that each row is one sequence.

    Returns:
        y: (B, L, D) in the dtype of u; zero at pads.
        final_state: (B, D, N) in the dtype of the arithmetic, the state after each row's last real token.

    Raises:
        ValueError: shapes that contradict each other.
    """
    (rows, length, channels), numbers = u.shape, A.shape[-1]
    _check_shapes(
        dt=(dt, u.shape),
        A=(A, (channels, numbers)),
        B=(B, (rows, length, numbers)),
        C=(C, (rows, length, numbers)),
        D=(D, (channels,)),
        gate=(gate, u.shape),
        initial_state=(initial_state, (rows, channels, numbers)),
        lengths=(lengths, (rows,)),
        positions=(positions, (rows, length)),
    )
    if _use_cpu_kernels(u, dt, A, B, C, D, gate, initial_state, lengths, positions):
        return scan_on_cpu(u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus, A_is_log, positions)
    real = _real_tokens(lengths, length)
    u, dt, B, C, gate = (_zero_pads(tensor, real) for tensor in (u, dt, B, C, gate))
    dtype = arithmetic_dtype(u, dt, A, B, C, D, gate, initial_state)
    if dt_softplus:
        dt = _zero_pads(F.softplus(dt.to(dtype)), real)  # a pad takes no step, and softplus(0) is one
    A = -torch.exp(A.to(dtype)) if A_is_log else A.to(dtype)
    initial_state = None if initial_state is None else initial_state.to(dtype)
    scan = _choose_scan(u, dt, A, B, C, D, gate, initial_state)
    # Autocast would run the products of the scan in half precision.
    with _without_autocast(u.device.type):
        if positions is None:
            return scan(u, dt, A, B, C, D, gate, initial_state)
        y, state = scan(*_forgetting(u.to(dtype), dt.to(dtype), positions), A, B, C, None, None, initial_state)
        return _skip_and_gate(y, u, D, gate), state


def matrix_recurrence(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Linear attention with decay, and the delta rule: S <- exp(g) S; S <- S + k w^T; y = S^T q.

    w is v, or with `beta` the correction beta (v - S^T k) (Gated DeltaNet, arXiv 2412.06464, equation 10; gated linear
    attention, arXiv 2312.06635, equation 3; Mamba-2, arXiv 2405.21060, section 3). Arithmetic is in float32, or in
    float64 if any input is.

    Args:
        q, k: (B, L, H, K). Row b holds `lengths[b]` real tokens and then pads, whose values are never used.
        v: (B, L, H, V).
        g: log decay, at most 0: (B, L, H), or (B, L, H, K) for a decay per channel.
        beta: (B, L, H), or `None`.
        initial_state: (B, H, K, V); `None` means zeros.
        lengths: (B,) integers from 0 to L; `None` means that every token is real.
        positions: (B, L) integers, the position of each token in its own sequence, where a row holds several: at
            position 0 the state starts from zeros. `None` means that each row is one sequence.

    Returns:
        y: (B, L, H, V) in the dtype of v; zero at pads.
        final_state: (B, H, K, V) in the dtype of the arithmetic, the state after each row's last real token.

    Raises:
        ValueError: shapes that contradict each other.
    """
    (rows, length, heads, keys), values, stored = q.shape, v.shape[-1], v.dtype
    of_token = (rows, length, heads)
    _check_shapes(
        k=(k, (*of_token, keys)),
        v=(v, (*of_token, values)),
        g=(g, of_token if g.ndim == 3 else (*of_token, keys)),
        beta=(beta, of_token),
        initial_state=(initial_state, (rows, heads, keys, values)),
        lengths=(lengths, (rows,)),
        positions=(positions, (rows, length)),
    )
    dtype, real = arithmetic_dtype(q, k, v, g, beta, initial_state), _real_tokens(lengths, length)
    real = None if real is None else real[..., None]
    g = g[..., None] if g.ndim == 3 else g
    # A pad is the neutral input: no decay, nothing written, nothing read.
    q, k, v, g = (_zero_pads(each, real).to(dtype) for each in (q, k, v, g))
    beta = None if beta is None else _zero_pads(beta[..., None], real).to(dtype)
    kept = torch.exp(g)
    if positions is not None:
        kept = torch.where((positions == 0)[:, :, None, None], 0, kept)
    state = q.new_zeros(rows, heads, keys, values) if initial_state is None else initial_state.to(dtype)
    outputs = []
    with _without_autocast(q.device.type):
        for t in range(length):
            state = kept[:, t, :, :, None] * state
            w = v[:, t]
            if beta is not None:
                w = beta[:, t] * (w - torch.einsum("bhkv,bhk->bhv", state, k[:, t]))
            state = state + k[:, t, :, :, None] * w[:, :, None]
            outputs.append(torch.einsum("bhkv,bhk->bhv", state, q[:, t]))
    y = torch.stack(outputs, dim=1) if outputs else v
    return y.to(stored), state


def _forgetting(u: Tensor, dt: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """u and dt of a scan that starts from zeros at each position 0, and writes dt u there as before."""
    is_first = (positions == 0)[:, :, None]
    return torch.where(is_first, u * (dt / FORGETTING_STEP), u), torch.where(is_first, FORGETTING_STEP, dt)


def _check_shapes(**expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but the other arguments ask for {tuple(shape)}: activations "
                "are (batch, length, channels); the table at the top of ops_mambaformer.py gives the other shapes."
            )


def _real_tokens(lengths: Tensor | None, length: int) -> Tensor | None:
    """(B, L, 1), true at real tokens; `None` when all are."""
    if lengths is None:
        return None
    return (torch.arange(length, device=lengths.device) < lengths[:, None])[:, :, None]


def _zero_pads(tensor: Tensor | None, real: Tensor | None) -> Tensor | None:
    # Chosen, not multiplied: a pad may hold NaN, which times zero is NaN, in the gradient too.
    return tensor if tensor is None or real is None else torch.where(real, tensor, 0)


def _without_autocast(device_type: str) -> AbstractContextManager:
    if not torch.amp.is_autocast_available(device_type):
        return nullcontext()
    return torch.autocast(device_type, enabled=False)


def _convolve(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor,
    lengths: Tensor | None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    length, dtype = x.shape[1], arithmetic_dtype(x, weight, bias)
    inputs = torch.cat([initial_state, x], dim=1)  # (B, K - 1 + L, D)
    taps = weight.to(dtype).unbind(1)
    windows = inputs.to(dtype)
    oldest = len(taps) - 1  # how far back the first tap looks

    def met_by(tap: int) -> Tensor:
        met = windows[:, tap : tap + length]
        return met if positions is None else torch.where((positions >= oldest - tap)[:, :, None], met, 0)

    y = met_by(0) * taps[0]
    for tap, weights in enumerate(taps[1:], start=1):
        y = y.addcmul_(met_by(tap), weights)
    y = y if bias is None else y + bias.to(dtype)
    return F.silu(y).to(x.dtype), _last_inputs(inputs, len(taps) - 1, lengths)


def _last_inputs(inputs: Tensor, count: int, lengths: Tensor | None) -> Tensor:
    """The last `count` of each row's inputs, which start with the `count` of its initial state."""
    if lengths is None:
        # A view would keep all the inputs in memory for as long as the state lives.
        return inputs[:, inputs.shape[1] - count :].clone()
    index = lengths[:, None] + torch.arange(count, device=lengths.device)  # (B, K - 1)
    return inputs.gather(1, index[:, :, None].expand(-1, -1, inputs.shape[2]))


def _scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    if initial_state is None:
        initial_state = A.new_zeros(u.shape[0], *A.shape)
    if isinstance(u.shape[1], torch.SymInt):  # asked first: any look at the length would fix it in the graph
        advance = _scan_any_length
    elif u.shape[1] == 0:
        return u, initial_state
    else:
        advance = _scan_token if u.shape[1] == 1 else _scan_chunks
    dt, B, C = (tensor.to(A.dtype) for tensor in (dt, B, C))
    y, final_state = advance(dt * u.to(A.dtype), dt, A, B, C, initial_state)
    return _skip_and_gate(y, u, D, gate), final_state


def _skip_and_gate(y: Tensor, u: Tensor, D: Tensor | None, gate: Tensor | None) -> Tensor:
    """y + D u, times silu(gate), computed in the dtype of y and returned in that of u."""
    if D is not None:
        y = torch.addcmul(y, u.to(y.dtype), D.to(y.dtype))
    if gate is not None:
        y = y * F.silu(gate.to(y.dtype))
    return y.to(u.dtype)


def _scan_token(
    dt_u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    decay = (dt.transpose(1, 2) * A).exp_()  # (B, D, N)
    state = (decay * initial_state).addcmul_(dt_u.transpose(1, 2), B)
    return (state @ C.transpose(1, 2)).transpose(1, 2), state


def _scan_chunks(
    dt_u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, initial_state: Tensor
) -> tuple[Tensor, Tensor]:
    """All chunks advance together, token by token: once to learn what each leaves behind, once from the true states.

    Takes twice the length of a chunk plus the number of chunks in steps, and holds one state a chunk at a time.
    Inside, states are (B, chunks, N, D): the long axis last keeps the arithmetic on contiguous numbers.
    """
    # The loops below are unrolled by torch.compile, which must not try that with a symbol for the length.
    length = operator.index(dt.shape[1])
    chunk, chunks = _divide(length)
    in_place = not (torch.compiler.is_compiling() or is_differentiated(dt_u, dt, A, B, C, initial_state))
    dt_u, dt, B, C = (_split(tensor, chunk, chunks) for tensor in (dt_u, dt, B, C))  # (B, chunks, chunk, D or N)
    A, initial_state = A.t().contiguous(), initial_state.transpose(1, 2)
    # Fresh memory for every token costs more than the arithmetic on it.
    scratch = A.new_empty(dt.shape[0], chunks, *A.shape) if in_place else None

    def advance(state: Tensor, token: int) -> Tensor:
        """Moves the state of the first chunks, as many as it holds, over the token of that number in each."""
        held = state.shape[1]
        step, write, key = dt[:, :held, token, None], dt_u[:, :held, token, None], B[:, :held, token, :, None]
        if scratch is None:
            return torch.addcmul((step * A).exp() * state, write, key)
        return state.mul_(torch.mul(step, A, out=scratch[:, :held]).exp_()).addcmul_(write, key)

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
    # One chunk more than needed: a dimension that is 1 for some lengths only would fix which lengths the graph takes.
    # For the same reason tokens are picked by index: a reshape asks whether one size divides the other.
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
    decay = (sum(step for _, step, _, _ in tokens)[:, :, None] * A).exp()
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
    """Length of a chunk, about the square root, and the number of chunks, with as little padding as possible."""
    chunks = math.ceil(length / max(LONGEST_SINGLE_CHUNK, math.isqrt(length)))
    return math.ceil(length / chunks), chunks


def _split(tensor: Tensor, chunk: int, chunks: int) -> Tensor:
    """(B, L, X) as (B, chunks, chunk, X); tokens of zeros fill the last chunk, and dt = 0 leaves a state alone."""
    missing = chunk * chunks - tensor.shape[1]
    tensor = F.pad(tensor, (0, 0, 0, missing)) if missing else tensor
    return tensor.unflatten(1, (chunks, chunk))


def _enter_chunks(initial_state: Tensor, left: Tensor, decay: Tensor) -> Tensor:
    """States (B, chunks, N, D) in which chunks are entered, from what each but the last leaves and how it decays."""
    entered = [initial_state]
    for chunk in range(left.shape[1]):
        entered.append(torch.addcmul(left[:, chunk], decay[:, chunk], entered[-1]))
    return torch.stack(entered, dim=1)


@dataclass(frozen=True)
class Kernels:
    """The fused CUDA functions that can be imported here; `None` where one cannot."""

    convolve: Callable | None = None
    convolve_token: Callable | None = None
    scan: Callable | None = None
    scan_token: Callable | None = None


@lru_cache(maxsize=1)
def _load_kernels() -> Kernels:
    try:
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update
    except ImportError:
        causal_conv1d_fn = causal_conv1d_update = None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except ImportError:
        selective_scan_fn = selective_state_update = None
    return Kernels(causal_conv1d_fn, causal_conv1d_update, selective_scan_fn, selective_state_update)


def _use_cpu_kernels(*tensors: Tensor | None) -> bool:
    return takes_on_cpu(*tensors)


def _use_kernels(tensor: Tensor) -> bool:
    # Under torch.compile the PyTorch path is fused by the compiler; the kernels would break its graph.
    return tensor.is_cuda and not torch.compiler.is_compiling()


def _kernels_for(tensor: Tensor, dtype: torch.dtype) -> Kernels:
    # None of the kernels computes in float64.
    return _load_kernels() if dtype == torch.float32 and _use_kernels(tensor) else Kernels()


def _choose_convolution(
    x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, lengths: Tensor | None
) -> Callable:
    kernels = _kernels_for(x, arithmetic_dtype(x, weight, bias))
    # What causal_conv1d was compiled for: 2 to 4 taps, channels-last rows aligned to 8 numbers.
    if not 2 <= weight.shape[1] <= 4 or x.shape[2] % 8:
        return _convolve
    single = x.shape[1] == 1 and lengths is None and not is_differentiated(x, weight, bias, initial_state)
    if kernels.convolve_token and single:
        return partial(_convolve_token_with_kernel, kernels.convolve_token)
    return partial(_convolve_with_kernel, kernels.convolve) if kernels.convolve else _convolve


def _convolve_with_kernel(
    kernel: Callable, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, lengths: Tensor | None
) -> tuple[Tensor, Tensor]:
    inputs = torch.cat([initial_state, x], dim=1)  # (B, K - 1 + L, D)
    bias = None if bias is None else bias.to(weight.dtype)
    # The kernel's own initial and final states would need their gather at each row's end anyway.
    y = kernel(inputs.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    count = weight.shape[1] - 1
    return y[:, count:], _last_inputs(inputs, count, lengths)


def _convolve_token_with_kernel(
    kernel: Callable, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor, lengths: None
) -> tuple[Tensor, Tensor]:
    state = initial_state.clone()  # the kernel writes into it
    bias = None if bias is None else bias.to(weight.dtype)
    y = kernel(x.squeeze(1), state.transpose(1, 2), weight, bias, activation="silu")
    return y.unsqueeze(1), state


def _choose_scan(u: Tensor, dt: Tensor, A: Tensor, *others: Tensor | None) -> Callable:
    kernels = _kernels_for(u, arithmetic_dtype(u, dt, A, *others))
    if kernels.scan_token and u.shape[1] == 1 and not is_differentiated(u, dt, A, *others):
        return partial(_scan_token_with_kernel, kernels.scan_token)
    # selective_scan_fn was compiled for at most 256 numbers a channel.
    if kernels.scan and u.shape[1] > 0 and A.shape[1] <= 256:
        return partial(_scan_with_kernel, kernels.scan)
    return _scan


def _scan_token_with_kernel(
    kernel: Callable,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    rows, _, channels = u.shape
    # The kernel writes into the state that it is given.
    state = A.new_zeros(rows, *A.shape) if initial_state is None else initial_state.clone()
    u, dt, B, C = (tensor.squeeze(1) for tensor in (u, dt, B, C))
    gate = None if gate is None else gate.squeeze(1)
    # mamba-ssm 2.3.2 fails with a TypeError when D or dt_bias is None.
    zeros = A.new_zeros(channels)
    y = kernel(state, u, dt, A, B, C, D=zeros if D is None else D, z=gate, dt_bias=zeros, dt_softplus=False)
    return y.unsqueeze(1), state


def _scan_with_kernel(
    kernel: Callable,
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
) -> tuple[Tensor, Tensor]:
    differentiated = is_differentiated(u, dt, A, B, C, D, gate, initial_state)
    run = _run_kernel_with_state_gradient if differentiated else _run_kernel
    y, final_state = run(kernel, u, dt, A, B, C, None if D is None else D.to(A.dtype))
    if initial_state is not None:
        # The recurrence is linear in its state, so what the kernel did not start from can be added afterwards.
        elapsed = dt.to(A.dtype).cumsum(1)  # (B, L, D)
        y = y + _read_initial_state(elapsed, A, C.to(A.dtype), initial_state)
        final_state = final_state + torch.exp(elapsed[:, -1, :, None] * A) * initial_state
    return _skip_and_gate(y, u, None, gate), final_state


def _run_kernel(
    kernel: Callable, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Output and final state in the dtype of A, from a state of zeros; the final state has no gradient."""
    # The kernel wants its activations in one dtype and the tokens on the last axis.
    dtype = reduce(torch.promote_types, (tensor.dtype for tensor in (u, dt, B, C)))
    u, dt, B, C = (tensor.to(dtype).transpose(1, 2) for tensor in (u, dt, B, C))
    y, final_state = kernel(u, dt, A, B, C, D, return_last_state=True)
    return y.transpose(1, 2).to(A.dtype), final_state


def _run_kernel_with_state_gradient(
    kernel: Callable, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor | None
) -> tuple[Tensor, Tensor]:
    """As `_run_kernel`, but the final state is read through the output, whose gradient the kernel does know.

    N tokens with dt = 0 are appended; they leave the state as it is, and the n-th of them reads its n-th number.
    """
    length, numbers = u.shape[1], A.shape[1]
    u, dt, B = (F.pad(tensor.to(A.dtype), (0, 0, 0, numbers)) for tensor in (u, dt, B))
    readers = torch.eye(numbers, dtype=A.dtype, device=A.device).expand(u.shape[0], -1, -1)
    y, _ = _run_kernel(kernel, u, dt, A, B, torch.cat([C.to(A.dtype), readers], dim=1), D)
    return y[:, :length], y[:, length:].transpose(1, 2)


def _read_initial_state(elapsed: Tensor, A: Tensor, C: Tensor, initial_state: Tensor) -> Tensor:
    """What the initial state adds to the output, C_t . exp(A (dt_1 + ... + dt_t)) h_0, one number of N at a time."""
    y = torch.zeros_like(elapsed)
    for number in range(A.shape[1]):
        decay = torch.exp(elapsed * A[:, number])
        y = torch.addcmul(y, decay * initial_state[:, None, :, number], C[:, :, number, None])
    return y
