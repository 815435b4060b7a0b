"""Which modules a kernel may stand in for: modules of our own types that would run the code they were written with.

A kernel computes the result of a module without calling it. That is right only while a call would run our own code
and nothing else. A subclass, a wrapper, a parametrization (which changes the class), a patched class, a patched
instance and a hook are all reasons to call the module, and this is the only place that knows them.
"""

import sys
from collections.abc import Callable, Iterable
from operator import itemgetter, methodcaller
from types import FunctionType
from typing import Any

import torch
from torch import nn
from transformers.activations import ACT2FN
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .library_mambaformer import has_global_hooks

# The methods that a kernel leaves out, by type, as they were when this package was imported.
_METHODS: dict[type, dict[str, Callable]] = {}
_RECORDED: list[tuple[type, str, Callable]] = []


def replaceable_by_kernels(kind: type) -> type:
    """Class decorator: kernels may stand in for modules of exactly this type, as long as its methods stay.

    Methods that it inherits from our own classes count too. `read_by_kernels` of the class names the attributes that
    are written down for kernels.
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


def is_of_own_type(module: Any) -> bool:
    """Whether `module` is of one of our types, and no subclass of it."""
    return type(module) in _METHODS


def has_own_methods(module: nn.Module) -> bool:
    """Whether neither the class of `module`, one of our types, nor the instance was patched."""
    kind, attributes = type(module), module.__dict__
    for name, function in _METHODS[kind].items():  # runs for every linear module: a generator would cost as much again
        if name in attributes or getattr(kind, name) is not function:
            return False
    return True


def is_replaceable(module: Any) -> bool:
    """Whether a kernel may compute the result of `module` without calling it."""
    if torch.compiler.is_compiling() or type(module) not in _METHODS:
        return False
    if module._forward_hooks or module._forward_pre_hooks:
        return False
    return not has_global_hooks() and has_own_methods(module)


def is_silu(module: Any) -> bool:
    """Whether an activation is SiLU and nothing else."""
    return type(module) in SILU_TYPES and is_replaceable(module)


def is_own_attention(implementation: str) -> bool:
    """Whether a kernel may stand in for the attention of this name: users can register another function for it."""
    return implementation == "sdpa" and ALL_ATTENTION_FUNCTIONS["sdpa"] is _SDPA


class Watch:
    """Asks about many modules of our types at once, in a few microseconds: it runs at every decode step."""

    def __init__(self, modules: Iterable[nn.Module]):
        modules = list(dict.fromkeys(modules))
        self.are_own = all(map(is_of_own_type, modules))
        self._children = [module._modules for module in modules]
        self._expected = [tuple(children.values()) for children in self._children]
        self._attributes = [module.__dict__ for module in modules]
        # Most modules have no method but `forward` that a kernel leaves out.
        names = [_METHODS.get(type(module), {}).keys() - {"forward", "__call__"} for module in modules]
        self._with_methods = [(each.keys(), own) for own, each in zip(names, self._attributes, strict=True) if own]
        with_settings = [module for module in modules if hasattr(type(module), "read_by_kernels")]
        self._readers = [(itemgetter(*module.read_by_kernels), module.__dict__) for module in with_settings]
        self._settings = self._read_settings()

    def has_changed(self) -> bool:
        """Whether one of them has other settings, or another module in its place, which need not show in a weight."""
        return (
            list(map(tuple, map(dict.values, self._children))) != self._expected
            or self._read_settings() != self._settings
        )

    def _read_settings(self) -> list[Any]:
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


__all__ = [
    "SILU_TYPES",
    "Watch",
    "has_own_methods",
    "is_of_own_type",
    "is_own_attention",
    "is_replaceable",
    "is_silu",
    "replaceable_by_kernels",
]
