"""Whether weights changed, found out at every step and without reading them.

A cache holds states that weights have computed, kernels hold addresses of weights, and singular bases belong to one
state of a weight. All of them compare stamps.
"""

import functools
import itertools
import os
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version
from torch.multiprocessing.reductions import StorageWeakRef
from torch.optim.optimizer import register_optimizer_step_post_hook

from .library_mambaformer import preserve_versions
from .weights_parallel_mambaformer import (
    CountsReplacements,
    adapter_stamp,
    base_linear,
    is_adapter,
    is_shard,
    offloaded,
)
from .weights_quantized_mambaformer import inner_tensors, is_quantized
from .weights_quantized_modules_mambaformer import QuantizedMatrix, is_of_bitsandbytes


def _count_fused_step(optimizer: torch.optim.Optimizer, *_) -> None:
    """A fused step writes weights and does not count it as a version of theirs; now it does."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([weight for weight in group["params"] if not weight.is_inference()])


register_optimizer_step_post_hook(_count_fused_step)


class _StorageNumbers:
    """A running number for each piece of memory that weights are in.

    An address is given out again when what was there is gone; a number never is. The weak references keep the records
    of memory, not the memory.
    """

    def __init__(self):
        self.known: dict[int, tuple[StorageWeakRef, int]] = {}
        self.numbers, self.most = itertools.count(), 4096
        self.lock = threading.RLock()

    def __call__(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        known = self.known.get(storage._cdata)
        return known[1] if known is not None else self._remember(storage)

    def _remember(self, storage: torch.UntypedStorage) -> int:
        with self.lock:
            known = self.known.get(storage._cdata)
            if known is not None:  # two threads met this memory at once, and its number is one
                return known[1]
            if len(self.known) >= self.most:
                self.known = {key: entry for key, entry in self.known.items() if not entry[0].expired()}
                self.most = max(4096, 2 * len(self.known))
            number = next(self.numbers)
            self.known[storage._cdata] = StorageWeakRef(storage), number
            return number


storage_number = _StorageNumbers()


class _WeightNumbers:
    """A running number for each weight of bitsandbytes: what tells one from another while its memory changes."""

    def __init__(self):
        self.known: dict[int, tuple[weakref.ref, int]] = {}
        self.numbers = itertools.count()
        self.lock = threading.RLock()  # collecting garbage forgets weights in the midst of remembering one

    def __call__(self, weight: Tensor) -> int:
        with self.lock:
            known = self.known.get(id(weight))
            if known is None or known[0]() is not weight:
                reference = weakref.ref(weight, functools.partial(self._forget, id(weight)))
                known = self.known[id(weight)] = reference, next(self.numbers)
            return known[1]

    def _forget(self, key: int, reference: weakref.ref) -> None:
        with self.lock:
            if self.known.get(key, (None,))[0] is reference:
                del self.known[key]


_weight_number = _WeightNumbers()


# Parameters that PEFT's `target_parameters` parametrize for the length of each forward, by the stack that has them.
_rewritten: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


def without_counted_forwards(model: nn.Module) -> AbstractContextManager:
    """Context of a forward of which no weight counts as written.

    PEFT's `target_parameters` parametrize weights in every forward, which counts as a write though it changes nothing.
    """
    found = _rewritten.get(model)
    if not found or torch.is_grad_enabled():  # graphs ask for the versions of what they have saved
        return nullcontext()
    modules = ((reference(), name) for reference, name in found)
    weights = (module._parameters.get(name) for module, name in modules if module is not None)
    return preserve_versions([each for each in weights if each is not None and not each.is_inference()])


def weights_stamp(model: nn.Module) -> Any:
    """Tells whether weights changed, or are those of another model, without reading them.

    Every in-place write and every new tensor changes it, also where weights are offloaded or split, and so does every
    adapter that is added, switched, disabled, merged or removed, every module of another type, and memory that has
    moved or is read in another shape or order, as by `share_memory()` or `weight.data = ...`. Weights made in
    inference mode do not count their writes, so merging and unmerging experts count theirs. A write through
    `weight.data` by hand or by another process leaves no trace (`model.weights_changed()` makes one).
    """
    if torch.compiler.is_compiling():
        return None
    seen = model.__dict__.get("_seen_weights")
    with torch._C.DisableTorchFunctionSubclass():  # a quantized weight would take its time for every attribute
        return _stamp_of_all(model) if seen is None else seen.stamp_of(model)


class SeenWeights:
    """The last stamp of a model: that nothing has changed is found out faster than a stamp is made."""

    def __init__(self):
        self.last: tuple[_Sight, int] | None = None

    def __getstate__(self) -> dict:
        return {}  # a copied model has its weights elsewhere

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def stamp_of(self, model: nn.Module) -> int:
        last = self.last
        if last is not None and last[0].is_unchanged(model):
            return last[1]
        sight = _Sight(model)
        stamp = _stamp_of_all(model)
        # Another thread may have written weights while the stamp was made.
        self.last = (sight, stamp) if sight.is_unchanged(model) else None
        return stamp


class _Sight:
    """What the stamp of a model depends on, in lists that one call each fills for all weights and compares."""

    def __init__(self, model: nn.Module):
        self.modules = [module for module in model.modules() if module is not model]
        every = [model, *self.modules]
        self.children, self.holders = ([getattr(each, name) for each in every] for name in ("_modules", "_parameters"))
        self.replacing = [each.__dict__ for each in every if each is model or isinstance(each, CountsReplacements)]
        self.structure = self._structure(model)
        parameters = self._parameters()
        self.kinds = list(map(type, parameters))
        self.quantized = [index for index, weight in enumerate(parameters) if is_quantized(weight)]
        self.plain = [index for index, kind in enumerate(self.kinds) if kind is nn.Parameter]
        tensors = self._tensors(parameters)
        # Adapters have settings of their own, and weights that are elsewhere or split are asked in other ways.
        self.is_usual = (
            len(self.plain) + len(self.quantized) == len(parameters)
            and {Tensor, nn.Parameter}.issuperset(map(type, tensors))
            and all(map(Tensor.data_ptr, tensors))
            and not any(map(is_adapter, every))
        )
        if self.is_usual:
            # As long as there are references, the records of other memory are elsewhere.
            self.storages = [StorageWeakRef(each.untyped_storage()) for each in tensors]
            uncounted = [each.is_inference() for each in parameters + tensors]
            self.version_of = None if all(uncounted) else version_of if any(uncounted) else _version
            self.memory = self._memory()

    def is_unchanged(self, model: nn.Module) -> bool:
        try:
            return self.is_usual and self._structure(model) == self.structure and self._memory() == self.memory
        except RuntimeError:  # weights that count their changes gave way to some that do not
            return False

    def _structure(self, model: nn.Module) -> tuple:
        replaced = [attributes.get("num_replacements") for attributes in self.replacing]
        children = list(map(tuple, map(dict.values, self.children)))
        return getattr(model, "num_merges", 0), replaced, children, list(map(type, self.modules))

    def _parameters(self) -> list[Tensor]:
        return [weight for holder in self.holders for weight in holder.values() if weight is not None]

    def _tensors(self, parameters: list[Tensor]) -> list[Tensor]:
        """Those that have memory."""
        if not self.quantized:
            return parameters
        found = [parameters[index] for index in self.plain]
        for index in self.quantized:
            found += inner_tensors(parameters[index])
        return found

    def _memory(self) -> tuple | None:
        parameters = self._parameters()
        if list(map(type, parameters)) != self.kinds:
            return None
        tensors = self._tensors(parameters)
        counted = chain(parameters, tensors) if self.quantized else parameters
        return (
            list(map(_storage_key, map(Tensor.untyped_storage, tensors))),
            list(map(Tensor.data_ptr, tensors)),
            list(map(Tensor.size, tensors)),
            list(map(Tensor.stride, tensors)),
            self.version_of and list(map(self.version_of, counted)),
        )


_storage_key, _version = attrgetter("_cdata"), Tensor._version.__get__


def _stamp_of_all(model: nn.Module) -> int:
    found, modules = [getattr(model, "num_merges", 0)], [model]
    numbers, plain, rewritten = storage_number.known, nn.Parameter, []
    while modules:  # `model.parameters()` builds every name, which takes several times as long
        module = modules.pop()
        found.append(type(module))
        attributes = module.__dict__
        for child in attributes["_modules"].values():
            if child is not None:
                modules.append(child)
        if "num_replacements" in attributes:
            found.append(attributes["num_replacements"])
        elif is_adapter(module):
            found.append(adapter_stamp(module))
            if "parameter_name" in attributes:
                rewritten.append((weakref.ref(base_linear(module)), attributes["parameter_name"]))
        for name, weight in attributes["_parameters"].items():
            if weight is None:
                continue
            address = weight.data_ptr() if type(weight) is plain else 0  # 0 is where offloaded weights are, on "meta"
            if address:
                storage = weight.untyped_storage()
                known = numbers.get(storage._cdata)  # `storage_number`, without a call for each weight
                number = storage_number(weight) if known is None else known[1]
                try:
                    version = weight._version
                except RuntimeError:  # inference tensors do not count their changes
                    version = -1
                found += number, address, weight.shape, weight.stride(), version
            else:
                found.append(_placed_stamp(module, name, weight))
    if rewritten or model in _rewritten:
        _rewritten[model] = rewritten
    return hash(tuple(found))


def _placed_stamp(module: nn.Module, name: str, weight: Tensor) -> tuple:
    """Of a weight that is not simply here: offloaded, a part of one, or quantized."""
    if weight.is_meta:
        return _offloaded_stamp(module, name)
    if is_shard(weight):  # a write counts for the whole or for the part, as it was written to
        return *_stamp_of(weight._local_tensor), version_of(weight)
    if is_of_bitsandbytes(weight):  # whose forwards may put other codes for the same numbers into it
        return _weight_number(weight), version_of(weight), str(weight.device)
    return stamp_of(weight)


def _offloaded_stamp(module: nn.Module, name: str) -> tuple:
    """Of the memory or the file that an offloaded parameter comes from, without reading it."""
    source = offloaded(module)
    if source is None:
        return ()
    key, loader = getattr(source, "prefix", "") + name, getattr(source, "dataset", source)
    in_memory = getattr(loader, "state_dict", loader)
    if key in in_memory:
        return stamp_of(in_memory[key])
    file = loader.index[key].get("safetensors_file") or os.path.join(loader.save_folder, f"{key}.dat")
    status = os.stat(file)
    return file, status.st_mtime_ns, status.st_size, status.st_ino


def stamp_of(weight: Tensor | QuantizedMatrix) -> tuple:
    """Of the memory that a weight is in and the writes to it, whether it is quantized or not."""
    if isinstance(weight, QuantizedMatrix):
        return weight.stamp()
    if not is_quantized(weight):
        return _stamp_of(weight)
    # A write to the whole counts there only, and one to a tensor that it is made of only there.
    return version_of(weight), *map(_stamp_of, inner_tensors(weight))


def _stamp_of(tensor: Tensor) -> tuple:
    return storage_number(tensor), _address_of(tensor), tensor.shape, tensor.stride(), version_of(tensor)


def _address_of(tensor: Tensor) -> int:
    """Where a tensor begins: memory can move inside of the same storage, which only the address shows."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else tensor.storage_offset()


def version_of(tensor: Tensor) -> int:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors do not count their changes


__all__ = [
    "SeenWeights",
    "stamp_of",
    "storage_number",
    "version_of",
    "weights_stamp",
    "without_counted_forwards",
]
