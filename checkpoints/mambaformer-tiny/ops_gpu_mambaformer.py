"""Fused kernels for GPUs: the packages causal-conv1d and mamba-ssm, where they are installed.

Letters are defined by the table at the top of `ops_mambaformer`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache, partial, reduce

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_eligibility_mambaformer import is_differentiated, may_run_on_gpu
from .ops_reference_mambaformer import arithmetic_dtype, last_inputs, scan, skip_and_gate, start_of_convolution


@dataclass(frozen=True)
class Kernels:
    """The fused CUDA functions that can be imported; `None` for those that cannot."""

    convolve: Callable | None = None
    convolve_token: Callable | None = None
    scan: Callable | None = None
    scan_token: Callable | None = None


@lru_cache(maxsize=1)
def _load_kernels() -> Kernels:
    try:
        from causal_conv1d import causal_conv1d_fn, causal_conv1d_update  # pyright: ignore[reportMissingImports]
    except ImportError:
        causal_conv1d_fn = causal_conv1d_update = None
    try:
        from mamba_ssm.ops.selective_scan_interface import selective_scan_fn
        from mamba_ssm.ops.triton.selective_state_update import selective_state_update
    except ImportError:
        selective_scan_fn = selective_state_update = None
    return Kernels(causal_conv1d_fn, causal_conv1d_update, selective_scan_fn, selective_state_update)


def _kernels_for(tensor: Tensor, dtype: torch.dtype) -> Kernels:
    # None of the kernels computes in float64.
    return _load_kernels() if dtype == torch.float32 and may_run_on_gpu(tensor) else Kernels()


def convolve_on_gpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """`causal_conv1d` by causal-conv1d; `None` where it has no kernel for these arguments."""
    kernels = _kernels_for(x, arithmetic_dtype(x, weight, bias))
    # causal-conv1d was compiled for kernel sizes 2 to 4 and channels-last rows aligned to 8 numbers.
    if positions is not None or not 2 <= weight.shape[1] <= 4 or x.shape[2] % 8:
        return None
    bias = None if bias is None else bias.to(weight.dtype)
    is_differentiable = is_differentiated(x, weight, bias, initial_state)
    if kernels.convolve_token and lengths is None and x.shape[1] == 1 and not is_differentiable:
        return _convolve_token(kernels.convolve_token, x, weight, bias, initial_state)
    if kernels.convolve is None:
        return None
    inputs, count = start_of_convolution(x, weight.shape[1], initial_state, lengths), weight.shape[1] - 1
    # The kernel's own initial and final states would need their gather at each row's end anyway.
    y = kernels.convolve(inputs.transpose(1, 2), weight, bias, activation="silu").transpose(1, 2)
    return y[:, count:], last_inputs(inputs, count, lengths)


def _convolve_token(
    kernel: Callable, x: Tensor, weight: Tensor, bias: Tensor | None, initial_state: Tensor | None
) -> tuple[Tensor, Tensor]:
    shape = (x.shape[0], weight.shape[1] - 1, x.shape[2])
    # The kernel writes into the state.
    state = x.new_zeros(shape) if initial_state is None else initial_state.to(x.dtype, copy=True)
    y = kernel(x.squeeze(1), state.transpose(1, 2), weight, bias, activation="silu")
    return y.unsqueeze(1), state


def scan_on_gpu(
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
) -> tuple[Tensor, Tensor] | None:
    """`selective_scan` by mamba-ssm; `None` where it has no kernel for these arguments."""
    tensors = (u, dt, A, B, C, D, gate, initial_state)
    kernels = _kernels_for(u, arithmetic_dtype(*tensors))
    if kernels.scan_token and u.shape[1] == 1 and not is_differentiated(*tensors):
        recurrence = partial(_scan_token, kernels.scan_token)
    elif kernels.scan and u.shape[1] > 0 and A.shape[1] <= 256:  # mamba-ssm was compiled for state sizes up to 256
        recurrence = partial(_scan, kernels.scan)
    else:
        return None
    return scan(*tensors, lengths, dt_softplus, A_is_log, positions, recurrence)


def _scan_token(
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
    # The kernel writes into the state.
    state = A.new_zeros(rows, *A.shape) if initial_state is None else initial_state.clone()
    u, dt, B, C = (tensor.squeeze(1) for tensor in (u, dt, B, C))
    gate = None if gate is None else gate.squeeze(1)
    # mamba-ssm 2.3.2 fails with a TypeError when D or dt_bias is None.
    zeros = A.new_zeros(channels)
    y = kernel(state, u, dt, A, B, C, D=zeros if D is None else D, z=gate, dt_bias=zeros, dt_softplus=False)
    return y.unsqueeze(1), state


def _scan(
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
        # The kernel starts from zeros; the recurrence is linear in its state, so the initial state's part is added.
        elapsed = dt.to(A.dtype).cumsum(1)  # (B, L, D)
        y = y + _read_initial_state(elapsed, A, C.to(A.dtype), initial_state)
        final_state = final_state + torch.exp(elapsed[:, -1, :, None] * A) * initial_state
    return skip_and_gate(y, u, None, gate), final_state


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
    """`_run_kernel` with a gradient of the final state, which is read through the output.

    N tokens with dt = 0 are appended; they do not change the state, and the n-th of them reads its n-th component.
    """
    length, state_size = u.shape[1], A.shape[1]
    u, dt, B = (F.pad(tensor.to(A.dtype), (0, 0, 0, state_size)) for tensor in (u, dt, B))
    readers = torch.eye(state_size, dtype=A.dtype, device=A.device).expand(u.shape[0], -1, -1)
    y, _ = _run_kernel(kernel, u, dt, A, B, torch.cat([C.to(A.dtype), readers], dim=1), D)
    return y[:, :length], y[:, length:].transpose(1, 2)


def _read_initial_state(elapsed: Tensor, A: Tensor, C: Tensor, initial_state: Tensor) -> Tensor:
    """The initial state's part of the output, C_t . exp(A (dt_1 + ... + dt_t)) h_0, one of N components at a time."""
    y = torch.zeros_like(elapsed)
    for n in range(A.shape[1]):
        decay = torch.exp(elapsed * A[:, n])
        y = torch.addcmul(y, decay * initial_state[:, None, :, n], C[:, :, n, None])
    return y


__all__ = ["convolve_on_gpu", "scan_on_gpu"]
