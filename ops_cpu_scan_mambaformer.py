"""Causal convolution and selective scan on CPUs, as C++ that is compiled where it is first used; forward and backward.

Letters are those of the table in `ops_mambaformer`. Activations are read where they lie, halves of a projection too,
and a share of the work is some channels of one row. The scan goes over them in chunks of tokens: a vector holds the N
numbers of one channel, so states, A, B and C are read as they are stored, and one token costs no more than its
arithmetic. Training keeps the states before each chunk and computes those inside once more on the way back.
"""

import math

import torch
from torch import Tensor

from .ops_cpu_build_mambaformer import SWITCH, are_readable, held, is_differentiated
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

_ARGUMENTS = {
    "convolve": as_integers(Convolution),
    "convolve_back": as_integers(ConvolutionGradient),
    "scan": as_integers(Scan),
    "scan_back": as_integers(ScanGradient),
}
# So many exponentials are worth a second thread.
PARALLEL_WORK = 100_000
SHARES_PER_THREAD = 4


def takes_on_cpu(*tensors: Tensor | None) -> bool:
    """Whether the functions below may be given these: plain CPU tensors, the first not empty."""
    return are_readable(*tensors) and tensors[0].numel() > 0 and kernels() is not None


def convolve_on_cpu(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`causal_conv1d` of plain CPU tensors."""
    dtype = arithmetic_dtype(x, weight, bias)
    (inputs,) = _stored(dtype, x)
    weight, bias = _exactly(weight, dtype), _exactly(bias, dtype)
    initial_state = _exactly(initial_state, inputs.dtype)
    lengths, positions = _exactly(lengths, torch.int64), _exactly(positions, torch.int64)
    arguments = (inputs, weight, bias, initial_state, lengths, positions)
    if is_differentiated(*arguments):
        y, final_state = CausalConvolution.apply(*_savable(*arguments))
    else:
        y, final_state = _convolve(*arguments)
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
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """`selective_scan` of plain CPU tensors."""
    dtype, output_dtype = arithmetic_dtype(u, dt, A, B, C, D, gate, initial_state), u.dtype
    u, dt, B, C, gate = _stored(dtype, u, dt, B, C, gate)
    A, D, initial_state = (_exactly(tensor, dtype) for tensor in (A, D, initial_state))
    lengths, positions = _exactly(lengths, torch.int64), _exactly(positions, torch.int64)
    arguments = (u, dt, A, B, C, D, gate, initial_state, lengths, positions)
    is_trained = is_differentiated(*arguments)
    if A_is_log and (is_trained or u.shape[1] > 1):  # a single token leaves it to the kernel, which is faster
        A, A_is_log = -torch.exp(A), False
        arguments = (u, dt, A, B, C, D, gate, initial_state, lengths, positions)
    if is_trained:
        y, final_state = SelectiveScan.apply(*_savable(*arguments), dt_softplus, A_is_log)
    else:
        y, final_state = _scan(*arguments, dt_softplus, A_is_log)
    return _exactly(y, output_dtype), final_state


def arithmetic_dtype(*tensors: Tensor | None) -> torch.dtype:
    """Float64 if any of them is, else float32."""
    doubled = any(tensor is not None and tensor.dtype == torch.float64 for tensor in tensors)
    return torch.float64 if doubled else torch.float32


def _stored(dtype: torch.dtype, *tensors: Tensor | None) -> list[Tensor | None]:
    """Activations as the library reads them: as they are if all are bfloat16, else in `dtype`."""
    found = {tensor.dtype for tensor in tensors if tensor is not None}
    if found != {dtype} and (found != {torch.bfloat16} or dtype == torch.float64):
        tensors = tuple(None if tensor is None else tensor.to(dtype) for tensor in tensors)
    tensors = [tensor if tensor is None or tensor.stride(-1) == 1 else tensor.contiguous() for tensor in tensors]
    # Autograd gives gradients that nobody has asked `are_readable` about.
    return [tensor.resolve_neg() if tensor is not None and tensor.is_neg() else tensor for tensor in tensors]


def _exactly(tensor: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    # Asked first: a method that does nothing is slower than both questions, and a token takes a dozen of them.
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
    """Copies of those that were made in inference mode, which no graph may keep."""
    return [tensor if tensor is None or not tensor.is_inference() else tensor.clone() for tensor in tensors]


class CausalConvolution(torch.autograd.Function):
    """`_convolve` with its gradients; keeps nothing but its arguments."""

    @staticmethod
    def forward(ctx, *arguments):
        ctx.save_for_backward(*arguments)
        ctx.set_materialize_grads(False)
        return _convolve(*arguments)

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        _refuse_second_derivative()
        x, weight, bias, initial_state, lengths, positions = ctx.saved_tensors
        (dy,), dfinal_state = _stored(weight.dtype, dy), _exactly(dfinal_state, x.dtype)
        dx, dinitial_state = _new_like(x), _new_window(x, weight)
        dweight, dbias = weight.new_zeros(len(x), *weight.shape), weight.new_zeros(len(x), len(weight))
        _run(
            "convolve_back",
            x.dtype,
            *_convolution_fields(x, weight, bias, initial_state, lengths, positions),
            *_views(dy, dx),
            *_addresses(dfinal_state, dweight, dbias, dinitial_state),
        )
        dbias, dinitial_state = _where_given(bias, dbias.sum(0)), _where_given(initial_state, dinitial_state)
        return dx, dweight.sum(0), dbias, dinitial_state, None, None


class SelectiveScan(torch.autograd.Function):
    """`_scan` with its gradients; keeps its arguments, and the states at every `CHUNK`-th token."""

    @staticmethod
    def forward(ctx, u, dt, A, B, C, D, gate, initial_state, lengths, positions, dt_softplus, A_is_log):
        checkpoints = A.new_empty(len(u), math.ceil(u.shape[1] / CHUNK), *A.shape)
        ctx.save_for_backward(u, dt, A, B, C, D, gate, initial_state, lengths, positions, checkpoints)
        ctx.set_materialize_grads(False)
        ctx.dt_softplus = dt_softplus
        return _scan(u, dt, A, B, C, D, gate, initial_state, lengths, positions, dt_softplus, A_is_log, checkpoints)

    @staticmethod
    def backward(ctx, dy, dfinal_state):
        _refuse_second_derivative()
        u, dt, A, B, C, D, gate, initial_state, lengths, positions, checkpoints = ctx.saved_tensors
        (dy,), dfinal_state = _stored(A.dtype, dy), _exactly(dfinal_state, A.dtype)
        du, ddt, dgate = _new_like(u), _new_like(u), _where_given(gate, _new_like(u))
        dA, dinitial_state = A.new_zeros(len(u), *A.shape), A.new_empty(len(u), *A.shape)
        dD = A.new_zeros(len(u), len(A))
        # A share has some of the channels, and B and C speak to all of them.
        dB, dC = A.new_zeros(2, len(u), _splits(u, A.shape[1]), u.shape[1], A.shape[1])
        _run(
            "scan_back",
            u.dtype,
            *_scan_fields(
                u, dt, A, B, C, D, gate, initial_state, lengths, positions, ctx.dt_softplus, False, checkpoints
            ),
            *_views(dy, du, ddt, dgate),
            *_addresses(dfinal_state, dA, dB, dC, dD, dinitial_state),
        )
        dB, dC = dB.sum(1).to(B.dtype), dC.sum(1).to(C.dtype)
        dD, dinitial_state = _where_given(D, dD.sum(0)), _where_given(initial_state, dinitial_state)
        return du, ddt, dA.sum(0), dB, dC, dD, dgate, dinitial_state, None, None, None, None


def _convolve(x, weight, bias, initial_state, lengths, positions) -> tuple[Tensor, Tensor]:
    weight, bias = held(weight), held(bias)
    y, final_state = _new_like(x), _new_window(x, weight)
    arguments = (x, weight, bias, initial_state, lengths, positions, y, final_state)
    _run("convolve", x.dtype, *_convolution_fields(*arguments))
    return y, final_state


def _scan(
    u, dt, A, B, C, D, gate, initial_state, lengths, positions, dt_softplus, A_is_log, checkpoints=None
) -> tuple[Tensor, Tensor]:
    A, D = held(A), held(D)
    y, final_state = _new_like(u), A.new_empty(len(u), *A.shape)
    options, outputs = (dt_softplus, A_is_log), (checkpoints, y, final_state)
    inputs = (u, dt, A, B, C, D, gate, initial_state, lengths, positions)
    _run("scan", u.dtype, *_scan_fields(*inputs, *options, *outputs))
    return y, final_state


def _convolution_fields(
    x, weight, bias, initial_state, lengths, positions, y=None, final_state=None
) -> tuple[int, ...]:
    """The fields of the structure `Convolution`."""
    states = _addresses(weight, bias, initial_state, final_state)
    return *_views(x, y), *states, weight.shape[1], *_shares(x, 1, lengths, positions)


def _scan_fields(
    u,
    dt,
    A,
    B,
    C,
    D,
    gate,
    initial_state,
    lengths,
    positions,
    dt_softplus,
    A_is_log,
    checkpoints,
    y=None,
    final_state=None,
) -> tuple[int, ...]:
    """The fields of the structure `Scan`."""
    states = _addresses(A, D, initial_state, final_state, checkpoints)
    views, sizes = _views(B, C, u, dt, gate, y), _shares(u, A.shape[1], lengths, positions)
    return *views, *states, A.shape[1], dt_softplus, A_is_log, *sizes


def _shares(tensor: Tensor, numbers: int, lengths: Tensor | None, positions: Tensor | None) -> tuple[int, ...]:
    """The fields of the structure `Shares`."""
    counts = (*tensor.shape, _splits(tensor, numbers), _threads(tensor, numbers))
    return *_addresses(lengths), *counts, *_addresses(positions)


def _threads(tensor: Tensor, numbers: int) -> int:
    return torch.get_num_threads() if tensor.numel() * numbers >= PARALLEL_WORK else 1


def _splits(tensor: Tensor, numbers: int) -> int:
    """Into how many shares each row is cut."""
    threads = _threads(tensor, numbers)
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


def _where_given(argument: Tensor | None, gradient: Tensor) -> Tensor | None:
    return None if argument is None else gradient


__all__ = ["MOST_TAPS", "arithmetic_dtype", "convolve_on_cpu", "scan_on_cpu", "takes_on_cpu"]
