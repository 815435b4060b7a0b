"""The one place that decides whether a kernel may run: for a module that it would replace, and for its tensors.

A kernel computes the result of a module without calling it. That is right only if a call would run our own code and
nothing else: subclasses, wrappers, parametrizations (which change the class), patched classes, patched instances and
hooks are reasons to call the module. A kernel reads memory by address. That is right only for plain tensors on its
device, and only if no tracer, dispatch mode or functorch transform has to see the operations.
"""

import sys
from collections.abc import Callable, Iterable
from operator import itemgetter, methodcaller
from types import FunctionType
from typing import overload

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .library_mambaformer import has_global_hooks, is_every_operation_seen, is_transformed

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)

# The methods that a kernel bypasses, by type, as they were when this package was imported.
_METHODS: dict[type, dict[str, Callable]] = {}
_RECORDED: list[tuple[type, str, Callable]] = []


def replaceable_by_kernels(kind: type) -> type:
    """Class decorator: kernels may replace modules of exactly this type, as long as nobody patches its methods.

    Methods inherited from our own classes count too. `read_by_kernels` of the class names the attributes that a decode
    program copies.
    """
    own = [each for each in kind.__mro__ if each.__module__.endswith("_mambaformer")]
    names = {
        name: None
        for each in own
        for name, value in vars(each).items()
        if isinstance(value, FunctionType) and name[:2] != "__"
    }
    return _record(kind, ["forward", "__call__", *(name for name in names if name != "forward")])


def _record(kind: type, names: Iterable[str]) -> type:
    _METHODS[kind] = {name: getattr(kind, name) for name in names}
    _RECORDED.extend((kind, name, function) for name, function in _METHODS[kind].items())
    return kind


def _record_of_others(kind: type) -> None:
    """Only if nobody has patched it before this package was imported."""
    if kind.forward.__code__.co_filename == sys.modules[kind.__module__].__file__:
        _record(kind, ["forward", "__call__"])


# SiLU is a class of Transformers or of PyTorch, as `hidden_act` says.
SILU_TYPES = (nn.SiLU, type(ACT2FN["silu"]))
for _kind in dict.fromkeys((nn.Linear, *SILU_TYPES)):
    _record_of_others(_kind)
_HOOKS, _PRE_HOOKS = itemgetter("_forward_hooks"), itemgetter("_forward_pre_hooks")
_HAS_FORWARD = methodcaller("__contains__", "forward")
_SDPA = ALL_ATTENTION_FUNCTIONS["sdpa"]


# ---- modules


def is_of_own_type(module: object) -> bool:
    """Whether `module` is of one of the registered types, and no subclass of it."""
    return type(module) in _METHODS


def has_own_methods(module: nn.Module) -> bool:
    """Whether neither the class of `module`, a registered type, nor the instance was patched."""
    kind, attributes = type(module), module.__dict__
    for name, function in _METHODS[kind].items():  # runs for every linear module: a generator would cost as much again
        if name in attributes or getattr(kind, name) is not function:
            return False
    return True


def is_replaceable(module: nn.Module) -> bool:
    """Whether a kernel may compute the result of `module` without calling it."""
    if torch.compiler.is_compiling() or type(module) not in _METHODS:
        return False
    if module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks:
        return False
    return not has_global_hooks() and has_own_methods(module)


def is_plain_linear(module: nn.Module) -> bool:
    """Whether a product is all that a call of `module` would compute."""
    if torch.compiler.is_compiling() or type(module) is not nn.Linear:
        return False
    return has_parameters(module) and is_replaceable(module)


def has_parameters(module: nn.Linear) -> bool:
    """Whether weight and bias are parameters: pruning, for one, makes masked attributes of them."""
    return "weight" in module._parameters and "bias" in module._parameters


def is_silu(module: nn.Module) -> bool:
    """Whether an activation is SiLU and nothing else."""
    return type(module) in SILU_TYPES and is_replaceable(module)


def is_own_attention(implementation: str) -> bool:
    """Whether kernels may replace the attention of this name: users can register another function under it."""
    return implementation == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is _SDPA


class Watch:
    """Decides for many modules at once, in a few microseconds, because every decode step asks."""

    def __init__(self, modules: Iterable[nn.Module]):
        modules = list(dict.fromkeys(modules))
        self.are_own = all(map(is_of_own_type, modules))
        self._children = [module._modules for module in modules]
        self._expected = [tuple(children.values()) for children in self._children]
        self._attributes = [module.__dict__ for module in modules]
        # Most modules have no other method than `forward` that a kernel bypasses.
        names = [_METHODS.get(type(module), {}).keys() - {"forward", "__call__"} for module in modules]
        self._with_methods = [(each.keys(), own) for own, each in zip(names, self._attributes, strict=True) if own]
        settings = [(getattr(type(module), "read_by_kernels", None), module.__dict__) for module in modules]
        self._readers = [(itemgetter(*names), attributes) for names, attributes in settings if names]
        self._settings = self._read_settings()

    def has_changed(self) -> bool:
        """Whether a setting or a child of one of them changed, which need not show in a weight."""
        return (
            list(map(tuple, map(dict.values, self._children))) != self._expected
            or self._read_settings() != self._settings
        )

    def _read_settings(self) -> list[object]:
        return [read(attributes) for read, attributes in self._readers]

    def may_replace(self) -> bool:
        """Whether kernels may compute the results of all of them."""
        attributes = self._attributes
        if not self.are_own or has_global_hooks() or any(map(_HOOKS, attributes)) or any(map(_PRE_HOOKS, attributes)):
            return False
        if any(map(_HAS_FORWARD, attributes)):
            return False
        if not all(names.isdisjoint(methods) for names, methods in self._with_methods):
            return False
        return all(getattr(kind, name) is function for kind, name, function in _RECORDED)


# ---- tensors


def are_readable(*tensors: Tensor | None) -> bool:
    """Whether a CPU kernel may read these: plain tensors on the CPU, and no one has to see every operation."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is None:
            continue
        # A tensor with the negative bit has the memory of another one with the opposite sign.
        if not (type(tensor) in PLAIN_TENSORS and tensor.is_cpu) or tensor.is_neg():
            return False
    return not is_every_operation_seen()


def may_run_forward(first: Tensor, *others: Tensor | None) -> bool:
    """Whether CPU kernels without a backward may read these: of one dtype, without a graph to record or autocast."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    dtype, is_recording = first.dtype, torch.is_grad_enabled()
    for tensor in (first, *others):
        if tensor is not None and (tensor.dtype is not dtype or (is_recording and tensor.requires_grad)):
            return False
    return are_readable(first, *others)


def may_run_on_gpu(tensor: Tensor) -> bool:
    """Whether fused GPU kernels may run; a compiler fuses the reference, and kernels would break its graph."""
    return tensor.is_cuda and not torch.compiler.is_compiling() and not is_every_operation_seen()


def may_join_graph(*tensors: Tensor | None) -> bool:
    """Whether a compiled graph may call a registered CPU operation with these.

    An exported program keeps to PyTorch's own operations, so that it runs where this package is not installed.
    """
    if not torch.compiler.is_compiling() or torch.compiler.is_exporting() or is_transformed():
        return False
    return all(tensor is None or tensor.device.type == "cpu" for tensor in tensors)


def is_differentiated(*tensors: Tensor | None) -> bool:
    """Whether a graph is recorded through any of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


@overload
def hold_memory(tensor: Tensor) -> Tensor: ...
@overload
def hold_memory(tensor: None) -> None: ...
def hold_memory(tensor: Tensor | None) -> Tensor | None:
    """The same tensor, whose memory lives as long as the result: another thread may give a weight other memory."""
    return None if tensor is None else tensor.detach()


__all__ = [
    "SILU_TYPES",
    "Watch",
    "are_readable",
    "has_own_methods",
    "has_parameters",
    "hold_memory",
    "is_differentiated",
    "is_of_own_type",
    "is_own_attention",
    "is_plain_linear",
    "is_replaceable",
    "is_silu",
    "may_join_graph",
    "may_run_forward",
    "may_run_on_gpu",
    "replaceable_by_kernels",
]
