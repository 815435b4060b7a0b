"""The convolution and the selective scan as operations of `torch.library`, which compiled graphs call as one node.

A compiler would unroll the reference over tokens, which takes it minutes for a long prompt. Each copy of this file in
a process (a model folder's, the package's) registers operations under a name of its own.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor

from .ops_cpu_interface_mambaformer import MOST_TAPS, kernels
from .ops_cpu_scan_mambaformer import (
    convolve_on_cpu,
    new_checkpoints,
    prepare_convolution,
    prepare_scan,
    run_convolution_back,
    run_scan,
    run_scan_back,
    scan_on_cpu,
)
from .ops_eligibility_mambaformer import may_join_graph
from .ops_reference_mambaformer import arithmetic_dtype, convolve, scan

COPY = hashlib.sha256(__name__.encode()).hexdigest()[:8]
_CONVOLUTION = "Tensor x, Tensor weight, Tensor? bias, Tensor? initial_state, Tensor? lengths, Tensor? positions"
_SCAN = (
    "Tensor u, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? gate, Tensor? initial_state, "
    "Tensor? lengths, Tensor? positions, bool dt_softplus"
)


# ---- the front's questions


def convolve_in_graph(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor] | None:
    """`causal_conv1d` as one node of a compiled graph; `None` outside of one, and where PyTorch's code is faster."""
    arguments = (x, weight, bias, initial_state, lengths, positions)
    if not may_join_graph(*arguments) or x.shape[1] == 1 or weight.shape[1] > MOST_TAPS or not _has_kernels():
        return None
    y, final_state = causal_conv1d(*arguments)
    return y, final_state


def scan_in_graph(
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
    """`selective_scan` as one node of a compiled graph; `None` outside of one, and where PyTorch's code is faster."""
    tensors = (u, dt, A, B, C, D, gate, initial_state, lengths, positions)
    # A compiler fuses the few operations of a single token with the ones around them.
    if not may_join_graph(*tensors) or u.shape[1] == 1 or not _has_kernels():
        return None
    A = -torch.exp(A.to(arithmetic_dtype(*tensors[:8]))) if A_is_log else A
    y, final_state = selective_scan(u, dt, A, *tensors[3:], dt_softplus)
    return y, final_state


@torch.compiler.assume_constant_result
def _has_kernels() -> bool:
    return kernels() is not None


# ---- the operations


class Operation(Protocol):
    """The result of `torch.library.custom_op`."""

    def __call__(self, *arguments: object) -> tuple[Tensor, ...]: ...
    def register_fake(self, fn: Callable, /) -> Callable: ...
    def register_autograd(self, backward: Callable, /, *, setup_context: Callable | None = None) -> None: ...
    def register_vmap(self, func: Callable) -> object: ...


def _register(name: str, schema: str, compute: Callable, empty_results: Callable) -> Operation:
    """An operation on the CPU; `empty_results` has the results' shapes and dtypes, for fake tensors."""
    operation = torch.library.custom_op(
        f"mambaformer::{name}_{COPY}", compute, mutates_args=(), device_types="cpu", schema=schema
    )
    operation.register_fake(empty_results)
    return operation


@torch.no_grad()
def _convolve(*arguments) -> tuple[Tensor, Tensor]:
    results = convolve_on_cpu(*arguments)
    return convolve(*arguments) if results is None else results


def _convolution_results(x: Tensor, weight: Tensor, *_: object) -> tuple[Tensor, Tensor]:
    return x.new_empty(x.shape), x.new_empty(x.shape[0], weight.shape[1] - 1, x.shape[2])


def _convolve_back(dy: Tensor, dfinal_state: Tensor, *arguments) -> tuple[Tensor, ...]:
    prepared = prepare_convolution(*arguments)
    gradients = run_convolution_back(dy.to(prepared[0].dtype), dfinal_state, prepared)
    return _as_results(arguments[:4], gradients)


@torch.no_grad()
def _scan(*arguments) -> tuple[Tensor, Tensor]:
    *tensors, positions, dt_softplus = arguments
    options = {"dt_softplus": dt_softplus, "A_is_log": False, "positions": positions}
    results = scan_on_cpu(*tensors, **options)
    return scan(*tensors, **options) if results is None else results


def _scan_results(u: Tensor, dt: Tensor, A: Tensor, *others) -> tuple[Tensor, Tensor]:
    dtype = arithmetic_dtype(u, dt, A, *others[:5])
    return u.new_empty(u.shape), u.new_empty(u.shape[0], *A.shape, dtype=dtype)


def _scan_back(dy: Tensor, dfinal_state: Tensor, *arguments) -> tuple[Tensor, ...]:
    *tensors, dt_softplus = arguments
    prepared = prepare_scan(*tensors)
    u, _, A, *_ = prepared
    checkpoints = new_checkpoints(u, A)
    run_scan(*prepared, dt_softplus=dt_softplus, checkpoints=checkpoints)
    gradients = run_scan_back(dy.to(u.dtype), dfinal_state, prepared, dt_softplus, checkpoints)
    return _as_results(tensors[:8], gradients)


def _as_results(tensors: Sequence[Tensor | None], gradients: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
    """Gradients in the dtypes of their tensors; an operation returns an empty tensor for a missing one."""
    return tuple(
        torch.empty(0) if tensor is None or gradient is None else gradient.to(tensor.dtype)
        for tensor, gradient in zip(tensors, gradients, strict=True)
    )


def _gradients_like(count: int) -> Callable:
    """For a backward operation: empty gradients of its first `count` arguments after `dy` and `dfinal_state`."""

    def empty_results(dy: Tensor, dfinal_state: Tensor, *arguments: Tensor | None) -> tuple[Tensor, ...]:
        tensors = arguments[:count]
        return tuple(torch.empty(0) if tensor is None else tensor.new_empty(tensor.shape) for tensor in tensors)

    return empty_results


causal_conv1d = _register("causal_conv1d", f"({_CONVOLUTION}) -> (Tensor, Tensor)", _convolve, _convolution_results)
selective_scan = _register("selective_scan", f"({_SCAN}) -> (Tensor, Tensor)", _scan, _scan_results)
_convolution_back = _register(
    "causal_conv1d_back",
    f"(Tensor dy, Tensor dfinal_state, {_CONVOLUTION}) -> (Tensor, Tensor, Tensor, Tensor)",
    _convolve_back,
    _gradients_like(4),
)
_selective_scan_back = _register(
    "selective_scan_back",
    f"(Tensor dy, Tensor dfinal_state, {_SCAN}) -> ({', '.join(['Tensor'] * 8)})",
    _scan_back,
    _gradients_like(8),
)


# ---- gradients and functorch


def _differentiate(operation: Operation, back: Operation, count: int) -> None:
    """The gradients of the first `count` arguments are the results of `back`."""

    # `Any`: PyTorch's contexts and batch infos have no public types.
    def save(ctx: Any, inputs: tuple, output: tuple[Tensor, Tensor]) -> None:
        tensors = [each for each in inputs if not isinstance(each, bool)]
        ctx.save_for_backward(*tensors)
        ctx.options = inputs[len(tensors) :]

    def backward(ctx: Any, dy: Tensor, dfinal_state: Tensor) -> tuple[Tensor | None, ...]:
        tensors = ctx.saved_tensors
        gradients = back(dy, dfinal_state, *tensors, *ctx.options)
        rest = len(tensors) - count + len(ctx.options)
        present = (None if tensor is None else each for tensor, each in zip(tensors, gradients, strict=False))
        return *present, *(None,) * rest

    operation.register_autograd(backward, setup_context=save)


def _batch(operation: Operation) -> None:
    """Under `torch.vmap`, each entry of the batch is a call."""

    def batched(info: Any, in_dims: tuple, *arguments: object) -> tuple[tuple[Tensor, ...], tuple[int, ...]]:
        results = []
        for index in range(info.batch_size):
            entry = (
                each.select(dim, index) if isinstance(each, Tensor) and dim is not None else each
                for each, dim in zip(arguments, in_dims, strict=True)
            )
            results.append(operation(*entry))
        stacked = tuple(torch.stack(each) for each in zip(*results, strict=True))
        return stacked, (0,) * len(stacked)

    operation.register_vmap(batched)


_differentiate(causal_conv1d, _convolution_back, 4)
_differentiate(selective_scan, _selective_scan_back, 8)
for _operation in (causal_conv1d, selective_scan, _convolution_back, _selective_scan_back):
    _batch(_operation)


__all__ = ["causal_conv1d", "convolve_in_graph", "scan_in_graph", "selective_scan"]
