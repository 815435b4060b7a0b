"""Causal convolution and selective scan on CPUs: calls of the C++ kernels, forward and backward.

Letters are defined by the table at the top of `ops_mambaformer`. Kernels read activations in place, halves of a
projection too; a share of the work is some channels of one row. The scan runs over chunks of tokens: a vector holds
the N components of one channel's state, so states, A, B and C are read as they are stored. Training keeps the states
before each chunk, and the backward pass computes the states inside a chunk again.
"""

import math
from typing import overload

import torch
from torch import Tensor

from .ops_cpu_build_mambaformer import SWITCH
from .ops_cpu_interface_mambaformer import (
    CHUNK,
    MOST_TAPS,
    Convolution,
    ConvolutionGradient,
    Scan,
    ScanGradient,
    as_integers,
    kernel_of,
    kernels,
)
from .ops_eligibility_mambaformer import are_readable, hold_memory, is_differentiated
from .ops_reference_mambaformer import arithmetic_dtype

_ARGUMENTS = {
    "convolve": as_integers(Convolution),
    "convolve_back": as_integers(ConvolutionGradient),
    "scan": as_integers(Scan),
    "scan_back": as_integers(ScanGradient),
}
# The number of exponentials that is worth a second thread.
PARALLEL_WORK = 100_000
SHARES_PER_THREAD = 4


def convolve_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """`causal_conv1d`; `None` where the kernel cannot run."""
    arguments = (x, weight, bias, initial_state, lengths, positions)
    if weight.shape[-1] > MOST_TAPS or not _may_run(*arguments):
        return None
    prepared = prepare_convolution(*arguments)
    if is_differentiated(*prepared):
        y, final_state = CausalConvolution.apply(*_savable(*prepared))
    else:
        y, final_state = run_convolution(*prepared)
    return _exactly(y, x.dtype), _exactly(final_state, x.dtype)


def scan_on_cpu(
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
    """`selective_scan`; `None` where the kernel cannot run."""
    if not _may_run(u, dt, A, B, C, D, gate, initial_state, lengths, positions):
        return None
    prepared = prepare_scan(u, dt, A, B, C, D, gate, initial_state, lengths, positions)
    is_trained = is_differentiated(*prepared)
    if A_is_log and (is_trained or u.shape[1] > 1):  # for a single token the kernel is faster than PyTorch
        A_is_log = False
        prepared = (*prepared[:2], -torch.exp(prepared[2]), *prepared[3:])
    if is_trained:
        y, final_state = SelectiveScan.apply(*_savable(*prepared), dt_softplus)
    else:
        y, final_state = run_scan(*prepared, dt_softplus, A_is_log)
    return _exactly(y, u.dtype), final_state


def scan_rounded_on_cpu(
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
    positions: Tensor,
) -> tuple[Tensor, Tensor] | None:
    """`rounded_scan`; `None` where the kernel cannot run."""
    if not _may_run(u, dt, A, B, C, D, gate, initial_state, lengths, positions):
        return None
    prepared = prepare_scan(u, dt, A, B, C, D, gate, initial_state, lengths, None)
    if is_differentiated(*prepared):
        return None
    if A_is_log and u.shape[1] > 1:
        A_is_log = False
        prepared = (*prepared[:2], -torch.exp(prepared[2]), *prepared[3:])
    starts = _exactly(positions[:, 0], torch.int64)
    y, final_state = run_scan(*prepared, dt_softplus, A_is_log, starts=starts)
    return _exactly(y, u.dtype), final_state


def _may_run(first: Tensor, *others: Tensor | None) -> bool:
    return are_readable(first, *others) and first.numel() > 0 and kernels() is not None


# The arguments of `run_convolution` and of `run_scan`, as `prepare_...` returns them.
ConvolutionInputs = tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None, Tensor | None]
ScanInputs = tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor | None, Tensor | None, Tensor | None, Tensor | None, Tensor | None,
]  # fmt: skip


def prepare_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
) -> ConvolutionInputs:
    """The arguments in dtypes and layouts that the kernel reads."""
    dtype = arithmetic_dtype(x, weight, bias)
    (inputs,) = _stored(dtype, x)
    weight, bias = _exactly(weight, dtype), _exactly(bias, dtype)
    initial_state = _exactly(initial_state, inputs.dtype)
    return inputs, weight, bias, initial_state, _exactly(lengths, torch.int64), _exactly(positions, torch.int64)


def prepare_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
) -> ScanInputs:
    """The arguments in dtypes and layouts that the kernel reads."""
    dtype = arithmetic_dtype(u, dt, A, B, C, D, gate, initial_state)
    if gate is None:
        u, dt, B, C = _stored(dtype, u, dt, B, C)
    else:
        u, dt, B, C, gate = _stored(dtype, u, dt, B, C, gate)
    A, D, initial_state = _exactly(A, dtype), _exactly(D, dtype), _exactly(initial_state, dtype)
    return u, dt, A, B, C, D, gate, initial_state, _exactly(lengths, torch.int64), _exactly(positions, torch.int64)


def _stored(dtype: torch.dtype, *tensors: Tensor) -> list[Tensor]:
    """Activations as the library reads them: unchanged if all are bfloat16, else in `dtype`."""
    dtypes = {tensor.dtype for tensor in tensors}
    if dtypes != {dtype} and (dtypes != {torch.bfloat16} or dtype == torch.float64):
        tensors = tuple(tensor.to(dtype) for tensor in tensors)
    adjoining = [tensor if tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
    # Gradients that autograd passes have not been checked by `are_readable`.
    return [tensor.resolve_neg() if tensor.is_neg() else tensor for tensor in adjoining]


@overload
def _exactly(tensor: Tensor, dtype: torch.dtype) -> Tensor: ...
@overload
def _exactly(tensor: None, dtype: torch.dtype) -> None: ...
@overload
def _exactly(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None: ...
def _exactly(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # The questions come first: a method that does nothing is slower, and a token needs a dozen of them.
    if tensor is None:
        return None
    if tensor.dtype == dtype and tensor.is_contiguous():
        return tensor if not tensor.is_neg() else tensor.resolve_neg()
    return tensor.to(dtype).contiguous().resolve_neg()


def _refuse_second_derivative() -> None:
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"The CPU kernels have no second derivative, and create_graph=True asks for one: set {SWITCH}=0 before "
            "the first forward, and PyTorch computes all of them, only slower."
        )


def _savable(*tensors: Tensor | None) -> list[Tensor | None]:
    """The same tensors, with copies of inference tensors, which no graph may keep."""
    return [tensor if tensor is None or not tensor.is_inference() else tensor.clone() for tensor in tensors]


class CausalConvolution(torch.autograd.Function):
    """`run_convolution` with its gradients; saves nothing but its arguments."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        return run_convolution(*arguments)

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        _refuse_second_derivative()
        return *run_convolution_back(dy, dfinal_state, ctx.saved_tensors), None, None


class SelectiveScan(torch.autograd.Function):
    """`run_scan` with its gradients; saves its arguments, and the states at every `CHUNK`-th token."""

    @staticmethod
    def forward(ctx, *arguments):
        *inputs, dt_softplus = arguments
        checkpoints = new_checkpoints(inputs[0], inputs[2])
        ctx.save_for_backward(*inputs, checkpoints)
        ctx.set_materialize_grads(False)
        ctx.dt_softplus = dt_softplus
        return run_scan(*inputs, dt_softplus=dt_softplus, checkpoints=checkpoints)

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        _refuse_second_derivative()
        *inputs, checkpoints = ctx.saved_tensors
        return *run_scan_back(dy, dfinal_state, tuple(inputs), ctx.dt_softplus, checkpoints), None, None, None


def run_convolution(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of prepared arguments."""
    weight, bias = hold_memory(weight), hold_memory(bias)
    y, final_state = _new_like(x), _new_window(x, weight)
    arguments = (x, weight, bias, initial_state, lengths, positions, y, final_state)
    _run("convolve", x.dtype, *_convolution_fields(*arguments))
    return y, final_state


def run_convolution_back(
    dy: Tensor | None, dfinal_state: Tensor | None, inputs: ConvolutionInputs
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    """The gradients of x, weight, bias and initial state."""
    x, weight, bias, initial_state, lengths, positions = inputs
    dy, dfinal_state = _gradient(dy, weight.dtype), _exactly(dfinal_state, x.dtype)
    dx, dinitial_state = _new_like(x), _new_window(x, weight)
    dweight, dbias = weight.new_zeros(len(x), *weight.shape), weight.new_zeros(len(x), len(weight))
    _run(
        "convolve_back",
        x.dtype,
        *_convolution_fields(x, weight, bias, initial_state, lengths, positions),
        *_views(dy, dx),
        *_addresses(dfinal_state, dweight, dbias, dinitial_state),
    )
    return dx, dweight.sum(0), _if_present(bias, dbias.sum(0)), _if_present(initial_state, dinitial_state)


def run_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
    dt_softplus: bool,
    A_is_log: bool = False,
    checkpoints: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Output and final state of prepared arguments; fills `checkpoints` with the states before each chunk.

    With `starts`, the positions (B,) of the first tokens, the state is rounded after each token.
    """
    A, D = hold_memory(A), hold_memory(D)
    y, final_state = _new_like(u), A.new_empty(len(u), *A.shape)
    options, outputs = (dt_softplus, A_is_log), (checkpoints, y, final_state, starts)
    inputs = (u, dt, A, B, C, D, gate, initial_state, lengths, positions)
    _run("scan", u.dtype, *_scan_fields(*inputs, *options, *outputs))
    return y, final_state


def run_scan_back(
    dy: Tensor | None, dfinal_state: Tensor | None, inputs: ScanInputs, dt_softplus: bool, checkpoints: Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """The gradients of u, dt, A, B, C, D, gate and initial state."""
    u, dt, A, B, C, D, gate, initial_state, lengths, positions = inputs
    dy, dfinal_state = _gradient(dy, A.dtype), _exactly(dfinal_state, A.dtype)
    du, ddt, dgate = _new_like(u), _new_like(u), _if_present(gate, _new_like(u))
    dA, dinitial_state = A.new_zeros(len(u), *A.shape), A.new_empty(len(u), *A.shape)
    dD = A.new_zeros(len(u), len(A))
    # A share has some of the channels, and all channels contribute to the gradients of B and C.
    dB, dC = A.new_zeros(2, len(u), _splits(u, A.shape[1]), u.shape[1], A.shape[1])
    _run(
        "scan_back",
        u.dtype,
        *_scan_fields(u, dt, A, B, C, D, gate, initial_state, lengths, positions, dt_softplus, False, checkpoints),
        *_views(dy, du, ddt, dgate),
        *_addresses(dfinal_state, dA, dB, dC, dD, dinitial_state),
    )
    dB, dC = dB.sum(1).to(B.dtype), dC.sum(1).to(C.dtype)
    dD, dinitial_state = _if_present(D, dD.sum(0)), _if_present(initial_state, dinitial_state)
    return du, ddt, dA.sum(0), dB, dC, dD, dgate, dinitial_state


def new_checkpoints(u: Tensor, A: Tensor) -> Tensor:
    """Memory for the states before each chunk, (B, chunks, D, N)."""
    return A.new_empty(u.shape[0], (u.shape[1] + CHUNK - 1) // CHUNK, *A.shape)


def _convolution_fields(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
    y: Tensor | None = None,
    final_state: Tensor | None = None,
) -> tuple[int, ...]:
    """The fields of the structure `Convolution`."""
    states = _addresses(weight, bias, initial_state, final_state)
    return *_views(x, y), *states, weight.shape[1], *_shares(x, 1, lengths, positions)


def _scan_fields(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
    dt_softplus: bool,
    A_is_log: bool,
    checkpoints: Tensor | None,
    y: Tensor | None = None,
    final_state: Tensor | None = None,
    starts: Tensor | None = None,
) -> tuple[int, ...]:
    """The fields of the structure `Scan`."""
    states = _addresses(A, D, initial_state, final_state, checkpoints, starts)
    views, sizes = _views(B, C, u, dt, gate, y), _shares(u, A.shape[1], lengths, positions)
    return *views, *states, A.shape[1], dt_softplus, A_is_log, *sizes


def _shares(tensor: Tensor, state_size: int, lengths: Tensor | None, positions: Tensor | None) -> tuple[int, ...]:
    """The fields of the structure `Shares`."""
    counts = (*tensor.shape, _splits(tensor, state_size), _threads(tensor, state_size))
    return *_addresses(lengths), *counts, *_addresses(positions)


def _threads(tensor: Tensor, state_size: int) -> int:
    return torch.get_num_threads() if tensor.numel() * state_size >= PARALLEL_WORK else 1


def _splits(tensor: Tensor, state_size: int) -> int:
    """The number of shares of each row."""
    threads = _threads(tensor, state_size)
    return 1 if threads == 1 else math.ceil(SHARES_PER_THREAD * threads / len(tensor))


def _views(*tensors: Tensor | None) -> list[int]:
    """The fields of a structure `View` for each tensor."""
    fields: list[int] = []
    for tensor in tensors:
        fields += (0, 0, 0) if tensor is None else (tensor.data_ptr(), *tensor.stride()[:2])
    return fields


def _addresses(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def _run(name: str, dtype: torch.dtype, *fields: int) -> None:
    """Calls a function of the library with the fields of its structure."""
    kernel_of(name, dtype)(_ARGUMENTS[name](*fields))


def _new_like(tensor: Tensor) -> Tensor:
    return torch.empty_like(tensor, memory_format=torch.contiguous_format, requires_grad=False)


def _new_window(x: Tensor, weight: Tensor) -> Tensor:
    return x.new_empty(len(x), weight.shape[1] - 1, x.shape[2])


def _gradient(dy: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if dy is None else _stored(dtype, dy)[0]


def _if_present(argument: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if argument is None else gradient


__all__ = [
    "convolve_on_cpu",
    "new_checkpoints",
    "prepare_convolution",
    "prepare_scan",
    "run_convolution",
    "run_convolution_back",
    "run_scan",
    "run_scan_back",
    "scan_on_cpu",
    "scan_rounded_on_cpu",
]
