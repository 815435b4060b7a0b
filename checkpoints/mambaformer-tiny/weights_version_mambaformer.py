"""Stamps that tell whether weights changed, cheap enough for every step: no weight is read.

A cache holds states that weights have computed, kernels hold addresses of weights, and singular bases belong to one
content of a weight. All of them compare stamps.
"""

import functools
import itertools
import os
import threading
import weakref
from contextlib import AbstractContextManager, nullcontext
from itertools import chain
from operator import attrgetter

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
    """Increments the versions of weights that a fused optimizer step wrote without counting."""
    for group in optimizer.param_groups:
        if group.get("fused"):
            increment_version([weight for weight in group["params"] if not weight.is_inference()])


register_optimizer_step_post_hook(_count_fused_step)


class _StorageNumbers:
    """A running number for each storage of weights.

    The allocator reuses addresses, and numbers are never reused. A weak reference keeps the storage's record alive,
    so that its key stays unique, and not its memory.
    """

    def __init__(self):
        self.by_storage: dict[int, tuple[StorageWeakRef, int]] = {}
        self.numbers, self.most = itertools.count(), 4096
        self.lock = threading.RLock()

    def __call__(self, tensor: Tensor) -> int:
        storage = tensor.untyped_storage()
        entry = self.by_storage.get(storage._cdata)
        return entry[1] if entry is not None else self._remember(storage)

    def _remember(self, storage: torch.UntypedStorage) -> int:
        with self.lock:
            entry = self.by_storage.get(storage._cdata)
            if entry is not None:  # another thread has numbered this storage meanwhile
                return entry[1]
            if len(self.by_storage) >= self.most:
                self.by_storage = {key: entry for key, entry in self.by_storage.items() if not entry[0].expired()}
                self.most = max(4096, 2 * len(self.by_storage))
            number = next(self.numbers)
            self.by_storage[storage._cdata] = StorageWeakRef(storage), number
            return number


storage_number = _StorageNumbers()


class _WeightNumbers:
    """A running number for each weight of bitsandbytes, which identifies the weight while its memory changes."""

    def __init__(self):
        self.by_weight: dict[int, tuple[weakref.ref, int]] = {}
        self.numbers = itertools.count()
        self.lock = threading.RLock()  # reentrant: the garbage collector may call `_forget` inside of `__call__`

    def __call__(self, weight: Tensor) -> int:
        with self.lock:
            entry = self.by_weight.get(id(weight))
            if entry is None or entry[0]() is not weight:
                reference = weakref.ref(weight, functools.partial(self._forget, id(weight)))
                entry = self.by_weight[id(weight)] = reference, next(self.numbers)
            return entry[1]

    def _forget(self, key: int, reference: weakref.ref) -> None:
        with self.lock:
            entry = self.by_weight.get(key)
            if entry is not None and entry[0] is reference:
                del self.by_weight[key]


_weight_number = _WeightNumbers()


# Parameters that PEFT's `target_parameters` parametrize during each forward, by the stack that has them.
_rewritten: weakref.WeakKeyDictionary[nn.Module, list] = weakref.WeakKeyDictionary()


def without_counted_forwards(model: nn.Module) -> AbstractContextManager:
    """Context of a forward that leaves the versions of weights as they are.

    PEFT's `target_parameters` parametrize weights in every forward, which increments versions and changes no value.
    """
    rewritten = _rewritten.get(model)
    if not rewritten or torch.is_grad_enabled():  # autograd compares the versions of saved tensors
        return nullcontext()
    modules = ((reference(), name) for reference, name in rewritten)
    weights = (module._parameters.get(name) for module, name in modules if module is not None)
    return preserve_versions([each for each in weights if each is not None and not each.is_inference()])


def weights_stamp(model: nn.Module) -> int | None:
    """A number that differs after any change of the weights, and between models; no weight is read.

    These change it: an in-place write, a new tensor (offloaded or split ones too), an adapter that is added, switched,
    disabled, merged or removed, a module of another type, and memory that moved or is read in another shape or order,
    as by `share_memory()` or `weight.data = ...`. Weights made in inference mode do not count their writes, so merging
    and unmerging expert vectors count theirs. A write through `weight.data` by hand or by another process leaves no
    trace; `model.weights_changed()` reports one. `None` in a compiled graph.
    """
    if torch.compiler.is_compiling():
        return None
    seen = model.__dict__.get("_seen_weights")
    with torch._C.DisableTorchFunctionSubclass():  # attributes of a quantized weight would be slow to read
        return _stamp_of_all(model) if seen is None else seen.stamp_of(model)


class SeenWeights:
    """The last stamp of a model: comparing a `_Sight` is faster than making a stamp."""

    def __init__(self):
        self.last: tuple[_Sight, int] | None = None

    def __getstate__(self) -> dict:
        return {}  # the weights of a copied model are in other memory

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def stamp_of(self, model: nn.Module) -> int:
        last = self.last
        if last is not None and last[0].is_unchanged(model):
            return last[1]
        sight = _Sight(model)
        stamp = _stamp_of_all(model)
        # Another thread may have written weights meanwhile.
        self.last = (sight, stamp) if sight.is_unchanged(model) else None
        return stamp


class _Sight:
    """Everything that the stamp of a model depends on, in lists: one call fills or compares one for all weights."""

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
        # Adapters and weights that are offloaded or split need the slower path of `_stamp_of_all`.
        self.is_usual = (
            len(self.plain) + len(self.quantized) == len(parameters)
            and {Tensor, nn.Parameter}.issuperset(map(type, tensors))
            and all(map(Tensor.data_ptr, tensors))
            and not any(map(is_adapter, every))
        )
        if self.is_usual:
            # While there are references, no other storage can have the key of one of these.
            self.storages = [StorageWeakRef(each.untyped_storage()) for each in tensors]
            uncounted = [each.is_inference() for each in parameters + tensors]
            self.version_of = None if all(uncounted) else version_of if any(uncounted) else _version
            self.memory = self._memory()

    def is_unchanged(self, model: nn.Module) -> bool:
        try:
            return self.is_usual and self._structure(model) == self.structure and self._memory() == self.memory
        except RuntimeError:  # weights that count versions were replaced by inference tensors
            return False

    def _structure(self, model: nn.Module) -> tuple:
        replaced = [attributes.get("num_replacements") for attributes in self.replacing]
        children = list(map(tuple, map(dict.values, self.children)))
        return getattr(model, "num_merges", 0), replaced, children, list(map(type, self.modules))

    def _parameters(self) -> list[Tensor]:
        return [weight for holder in self.holders for weight in holder.values() if weight is not None]

    def _tensors(self, parameters: list[Tensor]) -> list[Tensor]:
        """The tensors that hold memory: plain parameters, and the inner tensors of quantized ones."""
        if not self.quantized:
            return parameters
        tensors = [parameters[index] for index in self.plain]
        for index in self.quantized:
            tensors += inner_tensors(parameters[index])
        return tensors

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


_storage_key, _version = attrgetter("_cdata"), vars(torch._C.TensorBase)["_version"].__get__


def _stamp_of_all(model: nn.Module) -> int:
    parts, modules = [getattr(model, "num_merges", 0)], [model]
    numbers, plain, rewritten = storage_number.by_storage, nn.Parameter, []
    while modules:  # `model.parameters()` builds every name, which takes several times as long
        module = modules.pop()
        parts.append(type(module))
        attributes = module.__dict__
        for child in attributes["_modules"].values():
            if child is not None:
                modules.append(child)
        if "num_replacements" in attributes:
            parts.append(attributes["num_replacements"])
        elif is_adapter(module):
            parts.append(adapter_stamp(module))
            if "parameter_name" in attributes:
                rewritten.append((weakref.ref(base_linear(module)), attributes["parameter_name"]))
        for name, weight in attributes["_parameters"].items():
            if weight is None:
                continue
            address = weight.data_ptr() if type(weight) is plain else 0  # 0 on "meta", where offloaded weights are
            if address:
                storage = weight.untyped_storage()
                entry = numbers.get(storage._cdata)  # `storage_number`, without a call for each weight
                number = storage_number(weight) if entry is None else entry[1]
                try:
                    version = weight._version
                except RuntimeError:  # inference tensors have no versions
                    version = -1
                parts += number, address, weight.shape, weight.stride(), version
            else:
                parts.append(_placed_stamp(module, name, weight))
    if rewritten or model in _rewritten:
        _rewritten[model] = rewritten
    return hash(tuple(parts))


def _placed_stamp(module: nn.Module, name: str, weight: Tensor) -> tuple:
    """The stamp of a weight that is offloaded, split or quantized."""
    if weight.is_meta:
        return _offloaded_stamp(module, name)
    if is_shard(weight):  # a write increments the version of the tensor that was written to: the DTensor or its part
        return *_stamp_of(weight._local_tensor), version_of(weight)
    if is_of_bitsandbytes(weight):  # a forward may reorder the codes, which changes the memory and no value
        return _weight_number(weight), version_of(weight), str(weight.device)
    return stamp_of(weight)


def _offloaded_stamp(module: nn.Module, name: str) -> tuple:
    """The stamp of the memory or the file that an offloaded parameter is loaded from; its content is not read."""
    source = offloaded(module)
    if source is None:
        return ()
    key, loader = getattr(source, "prefix", "") + name, getattr(source, "dataset", source)
    in_memory = getattr(loader, "state_dict", loader)
    if key in in_memory:
        return stamp_of(in_memory[key])
    index, folder = (getattr(loader, attribute) for attribute in ("index", "save_folder"))
    file = index[key].get("safetensors_file") or os.path.join(folder, f"{key}.dat")
    status = os.stat(file)
    return file, status.st_mtime_ns, status.st_size, status.st_ino


def stamp_of(weight: Tensor | QuantizedMatrix) -> tuple:
    """The stamp of a weight's memory and of the writes to it; the weight may be quantized."""
    if isinstance(weight, QuantizedMatrix):
        return weight.stamp()
    if not is_quantized(weight):
        return _stamp_of(weight)
    # A write increments the version of the tensor that was written to only: the weight or one of its inner tensors.
    return version_of(weight), *map(_stamp_of, inner_tensors(weight))


def _stamp_of(tensor: Tensor) -> tuple:
    return storage_number(tensor), _address_of(tensor), tensor.shape, tensor.stride(), version_of(tensor)


def _address_of(tensor: Tensor) -> int | torch.SymInt:
    """The address of a tensor's first element: memory can move inside of a storage, which only the address shows."""
    return tensor.data_ptr() if type(tensor) in (Tensor, nn.Parameter) else tensor.storage_offset()


def version_of(tensor: Tensor) -> int | torch.SymInt:
    return -1 if tensor.is_inference() else tensor._version  # inference tensors have no versions


__all__ = [
    "SeenWeights",
    "stamp_of",
    "storage_number",
    "version_of",
    "weights_stamp",
    "without_counted_forwards",
]
