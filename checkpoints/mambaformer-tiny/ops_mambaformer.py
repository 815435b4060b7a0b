"""The front of all tensor operations: PyTorch's semantics, reference code, and one question for a faster backend.

Mixers import operations from this file only. `run_kernel` asks the backends of `ops_backends_mambaformer`; each
decides by `ops_eligibility_mambaformer` whether it may run, and no backend changes a result beyond rounding.

Letters of the recurrences, after Mamba (arXiv 2312.00752). Activations are channels-last and left-aligned: the real
tokens of a row come first, padding follows.

| letter | meaning                                                        | shape     | paper           |
|--------|----------------------------------------------------------------|-----------|-----------------|
| B, L   | rows of the batch, tokens of this call                         |           | algorithm 2     |
| D      | channels of the inner width; as a tensor, the skip weight (D,) |           | section 3.4     |
| N      | state size of a channel                                        |           | section 2       |
| K      | kernel size of the convolution                                 |           | section 3.4     |
| x      | input of the convolution                                       | (B, L, D) | figure 3        |
| u      | input of the scan; the paper calls it x                        | (B, L, D) | equation 2      |
| dt     | step size Delta, after softplus unless said otherwise          | (B, L, D) | section 3.2     |
| A      | decay rates, negative                                          | (D, N)    | section 3.6     |
| B, C   | as tensors: the write to the state and the read of a token     | (B, L, N) | section 3.2     |
| gate   | multiplies the output through SiLU                             | (B, L, D) | figure 3        |
| h      | state, h_t = exp(dt_t A) h_(t-1) + dt_t B_t u_t                | (B, D, N) | equations 2a, 4 |
| y      | output, y_t = C_t . h_t + D u_t                                | (B, L, D) | equation 2b     |
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_backends_mambaformer import run_kernel
from .ops_recurrence_mambaformer import recur
from .ops_reference_mambaformer import arithmetic_dtype, convolve, last_inputs, scan, start_of_convolution
from .ops_state_codes_mambaformer import scan_rounded


def linear(hidden_states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """`F.linear`: (..., in) -> (..., out) for a weight (out, in), plain or quantized by torchao, and a bias (out,).

    Raises:
        RuntimeError: shapes that contradict each other, as in PyTorch.
    """
    outputs = run_kernel("linear", hidden_states, weight, bias)
    return F.linear(hidden_states, weight, bias) if outputs is None else outputs


def scale_singular_values(hidden_states: Tensor, basis: Tensor, delta: Tensor) -> Tensor:
    """x + Q (delta * Q^T x), the one-sided form of SVF (arXiv 2501.06252, section 3.1).

    Args:
        hidden_states: x (..., n).
        basis: Q (n, r), singular vectors on the weight's narrow side; used in the dtype of x.
        delta: z - 1, (r,), or (B, 1, r) for x (B, L, n). The scaling runs in the wider of its dtype and that of x.
    """
    scaled = run_kernel("scale_singular_values", hidden_states, basis, delta)
    if scaled is not None:
        return scaled
    basis = basis.to(hidden_states.dtype)
    return hidden_states + ((hidden_states @ basis) * delta).to(hidden_states.dtype) @ basis.mT


def rms_norm(hidden_states: Tensor, weight: Tensor, eps: float) -> Tensor:
    """weight * x / sqrt(mean(x^2) + eps) over the last dimension (arXiv 1910.07467, equation 4).

    The arithmetic is in float32, or in float64 if x is.
    """
    normed = run_kernel("rms_norm", hidden_states, weight, eps)
    if normed is not None:
        return normed
    wide = hidden_states.to(arithmetic_dtype(hidden_states))
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(hidden_states.dtype)


def apply_rope(hidden_states: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotates (rows, heads, tokens, head_dim) by the angles of (rows or 1, tokens, head_dim).

    Channel i turns with channel i + head_dim / 2 (RoPE, arXiv 2104.09864, equation 34).
    """
    rotated = run_kernel("apply_rope", hidden_states, cos, sin)
    if rotated is not None:
        return rotated
    first, second = hidden_states.chunk(2, dim=-1)
    return hidden_states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def silu_gate(gates: Tensor, hidden_states: Tensor) -> Tensor:
    """silu(gates) * hidden_states, the gate of SwiGLU (arXiv 2002.05202, equation 6), for equal shapes."""
    gated = run_kernel("silu_gate", gates, hidden_states)
    return F.silu(gates) * hidden_states if gated is None else gated


# query, key, value, mask -> mixed, and the attention weights or None.
AttentionFunction = Callable[[Tensor, Tensor, Tensor, object], tuple[Tensor, Tensor | None]]


def attention(
    query: Tensor, key: Tensor, value: Tensor, mask: object, scaling: float, reference: AttentionFunction
) -> tuple[Tensor, Tensor | None]:
    """Softmax attention with grouped keys and values (arXiv 2305.13245): `reference(query, key, value, mask)`.

    Args:
        query: (rows, heads, queries, head_dim).
        key, value: (rows, key heads, keys, head_dim).
        mask: as `reference` takes it; kernels take a boolean one (rows or 1, 1, queries, keys), true where a query
            sees a key, or `None` for a single query that sees all keys.
        reference: an attention function of Transformers, without dropout.

    Returns:
        (rows, queries, heads, head_dim), and the weights if `reference` returns them.
    """
    mixed = run_kernel("attention", query, key, value, mask, scaling)
    return reference(query, key, value, mask) if mixed is None else (mixed, None)


def causal_conv1d(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    initial_state: Tensor | None = None,
    lengths: Tensor | None = None,
    positions: Tensor | None = None,
    activation: str | None = "silu",
) -> tuple[Tensor, Tensor]:
    """A depthwise convolution over each token and the K - 1 inputs before it (arXiv 2312.00752, figure 3), and SiLU.

    Args:
        x: (B, L, D). Row b holds `lengths[b]` real tokens and then padding, whose values are never used.
        weight: (D, K); the last column meets the newest token.
        bias: (D,).
        initial_state: (B, K - 1, D), the inputs before x, oldest first; `None` means zeros.
        lengths: (B,) integers from 0 to L; `None` means that every token is real.
        positions: (B, L) integers, the position of each token in its own sequence, where a row holds several; a
            token does not see inputs of the sequence before its own. `None` means that each row is one sequence.
        activation: `"silu"`, or `None` for the sums themselves.

    Returns:
        y: (B, L, D) in the dtype of x; finite but meaningless at padding.
        final_state: (B, K - 1, D) in the dtype of x, the last inputs before each row's own end, across its sequences.

    Raises:
        ValueError: shapes that contradict each other.
    """
    (rows, length, channels), kernel_size = x.shape, weight.shape[-1]
    _check_shapes(
        weight=(weight, (channels, kernel_size)),
        bias=(bias, (channels,)),
        initial_state=(initial_state, (rows, kernel_size - 1, channels)),
        lengths=(lengths, (rows,)),
        positions=(positions, (rows, length)),
    )
    arguments = (x, weight, bias, initial_state, lengths, positions)
    results = None if activation is None else run_kernel("causal_conv1d", *arguments)
    return convolve(*arguments, activation) if results is None else results


def conv_window(
    x: Tensor, kernel_size: int, initial_state: Tensor | None = None, lengths: Tensor | None = None
) -> Tensor:
    """The final state of `causal_conv1d`, (B, kernel_size - 1, D), without its output."""
    return last_inputs(start_of_convolution(x, kernel_size, initial_state, lengths), kernel_size - 1, lengths)


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

    Arithmetic is in float32, or in float64 if any input is. Only numbers <= 0 are exponentiated, so no length
    and no decay rate makes it overflow or cancel.

    Args:
        u, dt: (B, L, D); dt >= 0 unless `dt_softplus`. Row b holds `lengths[b]` real tokens and then padding,
            whose values are never used.
        A: (D, N), negative.
        B, C: (B, L, N).
        D: (D,), or `None` for no skip.
        gate: (B, L, D), or `None` for no gate.
        initial_state: (B, D, N); `None` means zeros.
        lengths: (B,) integers from 0 to L; `None` means that every token is real.
        dt_softplus: dt is the step size before softplus, and softplus is part of the operation.
        A_is_log: A is log(-A), the trained form.
        positions: (B, L) integers, the position of each token in its own sequence, where a row holds several: at
            position 0 the state starts from zeros. `None` means that each row is one sequence.

    Returns:
        y: (B, L, D) in the dtype of u; zero at padding.
        final_state: (B, D, N) in the dtype of the arithmetic, the state after each row's last real token.

    Raises:
        ValueError: shapes that contradict each other.
    """
    (rows, length, channels), state_size = u.shape, A.shape[-1]
    _check_shapes(
        dt=(dt, u.shape),
        A=(A, (channels, state_size)),
        B=(B, (rows, length, state_size)),
        C=(C, (rows, length, state_size)),
        D=(D, (channels,)),
        gate=(gate, u.shape),
        initial_state=(initial_state, (rows, channels, state_size)),
        lengths=(lengths, (rows,)),
        positions=(positions, (rows, length)),
    )
    arguments = (u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus, A_is_log, positions)
    results = run_kernel("selective_scan", *arguments)
    return scan(*arguments) if results is None else results


def rounded_scan(
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
    """`selective_scan` with a state that is rounded after each token, by `round_states`.

    A token's output is computed from its state before rounding.

    Args:
        positions: (B, L) integers that increase by 1 along a row: the position of each token in its row, which may
            have started in earlier calls. `None` means that it starts here, at 0. The other arguments are those of
            `selective_scan`.

    Returns:
        y: (B, L, D) in the dtype of u; zero at padding.
        final_state: (B, D, N) in the dtype of the arithmetic, rounded.

    Raises:
        ValueError: shapes that contradict each other, or a state that gradients are asked of.
    """
    if positions is None:
        positions = torch.arange(u.shape[1], device=u.device).expand(u.shape[:2])
    _check_shapes(dt=(dt, u.shape), gate=(gate, u.shape), positions=(positions, u.shape[:2]))
    arguments = (u, dt, A, B, C, D, gate, initial_state, lengths, dt_softplus, A_is_log, positions)
    results = run_kernel("rounded_scan", *arguments)
    return scan_rounded(*arguments) if results is None else results


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
        q, k: (B, L, G, K), for G groups of H / G heads each: head h has group h div (H / G). Row b holds `lengths[b]`
            real tokens and then padding, whose values are never used.
        v: (B, L, H, V).
        g: log decay, at most 0: (B, L, H), or (B, L, H, K) for a decay per channel.
        beta: (B, L, H), or `None`.
        initial_state: (B, H, K, V); `None` means zeros.
        lengths: (B,) integers from 0 to L; `None` means that every token is real.
        positions: (B, L) integers, the position of each token in its own sequence, where a row holds several: at
            position 0 the state starts from zeros. `None` means that each row is one sequence.

    Returns:
        y: (B, L, H, V) in the dtype of v; zero at padding.
        final_state: (B, H, K, V) in the dtype of the arithmetic, the state after each row's last real token.

    Raises:
        ValueError: shapes that contradict each other.
    """
    (rows, length, groups, key_size), (heads, value_size) = q.shape, v.shape[-2:]
    of_token = (rows, length, heads)
    if heads % groups:
        raise ValueError(f"v has {heads} heads, which must be a multiple of the {groups} groups of q and k.")
    _check_shapes(
        k=(k, q.shape),
        v=(v, (*of_token, value_size)),
        g=(g, of_token if g.ndim == 3 else (*of_token, key_size)),
        beta=(beta, of_token),
        initial_state=(initial_state, (rows, heads, key_size, value_size)),
        lengths=(lengths, (rows,)),
        positions=(positions, (rows, length)),
    )
    arguments = (q, k, v, g, beta, initial_state, lengths, positions)
    results = run_kernel("matrix_recurrence", *arguments)
    return recur(*arguments) if results is None else results


def _check_shapes(**expected: tuple[Tensor | None, tuple[int, ...]]) -> None:
    for name, (tensor, shape) in expected.items():
        if tensor is not None and tensor.shape != shape:
            raise ValueError(
                f"{name} has shape {tuple(tensor.shape)}, but the other arguments ask for {tuple(shape)}: the "
                "docstring of the operation, in ops_mambaformer.py, gives the shapes of all arguments."
            )


__all__ = [
    "apply_rope",
    "attention",
    "causal_conv1d",
    "conv_window",
    "linear",
    "matrix_recurrence",
    "rms_norm",
    "rounded_scan",
    "scale_singular_values",
    "selective_scan",
    "silu_gate",
]
