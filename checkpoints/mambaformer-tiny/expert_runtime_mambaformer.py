"""Expert vectors in a model: resolved, checked and prepared for a forward, or merged into the weights.

`ExpertRuntimeMixin` is the part of the models that does so. It reaches modules and weights through `self`.
"""

import copy
import functools
import threading
from collections import OrderedDict
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from .cache_history_mambaformer import Status
from .cache_mambaformer import MambaFormerCache
from .expert_bases_mambaformer import SingularBases, SingularBasis
from .expert_linear_mambaformer import ScaledBasis, merged_weight, scale_basis
from .expert_vectors_mambaformer import (
    ExpertVector,
    ExpertVectorLibrary,
    check_expert_vector,
    check_spectrum,
    expert_key,
    resolve_expert_vector,
    spectrum_of,
)
from .inputs_mambaformer import check_cache_type
from .library_mambaformer import is_every_operation_seen
from .modeling_stack_mambaformer import places_of_model, without_wrappers
from .weights_parallel_mambaformer import agreed, base_linear, mesh_of, placed_like, weight_of, writes_stamp
from .weights_quantized_mambaformer import is_quantized
from .weights_quantized_modules_mambaformer import check_can_be_read, matrix_of, shape_of
from .weights_version_mambaformer import version_of, weights_stamp

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as Model
else:
    Model = object  # a mixin: the class that uses it is a `PreTrainedModel`

ScaledBases = dict[str, dict[str, ScaledBasis]]  # {path of a mixer: {name of a linear module: its scaled basis}}
NO_SCALED_BASES: ScaledBases = {}
# Expert vectors that a model keeps prepared. Those of full rank share their bases, others have copies of their own.
MOST_PREPARED = 4


@dataclass(frozen=True)
class PreparedExpertVectors:
    """The expert vectors of a forward, prepared for one model.

    Args:
        expert_vector: `None` (the base), one for all rows, or a list with one or `None` per row.
        key: identifies the expert vectors by content.
        num_rows: length of the list that the user passed, if it was one.
        scaled: the scaled bases; `None` for the base.
        weights, head: stamps of the weights of the stack and of the head.
    """

    expert_vector: Any = None
    key: Any = None
    num_rows: int | None = None
    scaled: ScaledBases | None = None
    weights: Any = None
    head: Any = None

    @property
    def is_reusable(self) -> bool:
        """Whether other forwards may use it: a vector that is being trained belongs to one graph."""
        return not _is_trained(self.expert_vector)

    @property
    def scaled_bases(self) -> ScaledBases:
        """One object for all forwards of the base: the decode program tells expert vectors apart by it."""
        return self.scaled or NO_SCALED_BASES


def resolve_with_key(library: ExpertVectorLibrary, expert_vector: Any) -> tuple[Any, Any]:
    """Resolves what a user passes as `expert_vector`: `(expert_vector, key)`, which is `(None, None)` for the base."""
    return _with_key(resolve_expert_vector(expert_vector, library))


def _with_key(expert_vector: Any) -> tuple[Any, Any]:
    """A list of equal rows is one expert vector, unless it is being trained: each row then has its own gradient."""
    if isinstance(expert_vector, list) and _is_trained(expert_vector):
        return expert_vector, tuple(expert_key(row) for row in expert_vector)
    key = expert_key(expert_vector)
    if isinstance(expert_vector, list) and not isinstance(key, tuple):
        expert_vector = expert_vector[0]
    return (None, None) if expert_vector is None else (expert_vector, key)


def _rows_of(expert_vector: Any) -> Iterator[ExpertVector]:
    """The expert vectors of all rows but those of the base."""
    rows = expert_vector if isinstance(expert_vector, list) else [expert_vector]
    return (row for row in rows if row is not None)


def _is_trained(expert_vector: Any) -> bool:
    return any(vector.requires_grad for row in _rows_of(expert_vector) for vector in row.vectors.values())


def is_compiled_step(cache: MambaFormerCache | None) -> bool:
    """Whether a compiled forward continues a sequence without any change.

    It cannot stamp the weights, and takes the prepared expert vectors that an eager forward left in the cache.
    """
    if cache is None or not torch.compiler.is_compiling():
        return False
    is_prepared = cache.expert_vector is None or cache.prepared_expert_vectors is not None
    return is_prepared and cache.status == Status.CURRENT


@contextmanager
def _outside_inference_mode():
    """For tensors that outlive a forward: those made in inference mode cannot be used where gradients are wanted."""
    is_grad_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(is_grad_enabled):
        yield


class _RecentlyPrepared:
    """The scaled bases of the last few expert vectors, by content, so that sessions that take turns prepare none anew.

    Safe to share between threads.
    """

    def __init__(self):
        self._entries: OrderedDict[Any, tuple[Any, list, ScaledBases]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {}  # a copied model has other weights

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def get(self, expert_vector: Any, key: Any, stamps: Any) -> ScaledBases | None:
        """The scaled bases of this content, for weights with these stamps; `None` if they have to be prepared."""
        with self._lock:
            known_stamps, checked, scaled = self._entries.get(key, (None, None, None))
            if known_stamps != stamps or checked != _checked_parts_of(expert_vector):
                return None
            self._entries.move_to_end(key)
            return scaled

    def add(self, expert_vector: Any, key: Any, stamps: Any, scaled: ScaledBases) -> None:
        entry = stamps, copy.deepcopy(_checked_parts_of(expert_vector)), scaled
        with self._lock:
            for stale in [other for other, (its_stamps, *_) in self._entries.items() if its_stamps != stamps]:
                del self._entries[stale]
            self._entries[key] = entry
            self._entries.move_to_end(key)
            while len(self._entries) > MOST_PREPARED:
                self._entries.popitem(last=False)


def _checked_parts_of(expert_vector: Any) -> list[tuple[dict[str, int], Any]]:
    """Parts that are checked and are not in the content's key: all modules, their ranks and singular values."""
    return [
        ({name: len(z) for name, z in row.vectors.items()}, row.metadata.get("spectrum"))
        for row in _rows_of(expert_vector)
    ]


class ExpertRuntimeMixin(Model):
    """The models' part that knows expert vectors: by name, prepared for a forward, merged into the weights."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._expert_library = ExpertVectorLibrary()
        self._singular_bases = SingularBases()
        self._recently_prepared = _RecentlyPrepared()
        self._unmerged: list[tuple[nn.Module, torch.Tensor, int]] = []
        self.num_merges = 0

    @property
    def expert_vectors(self) -> ExpertVectorLibrary:
        """The expert vectors that may be called by name: add, blend, load and save them here."""
        return self._expert_library

    def load_expert_vectors(self, path: str) -> list[str]:
        """Adds the expert vector of a file, or all of a folder, to `expert_vectors`; returns their names."""
        return self._expert_library.load(path)

    # ---- modules and their singular bases

    def linear_modules(self) -> dict[str, nn.Module]:
        """The linear modules that an expert vector may scale, by the names that expert vectors use."""
        prefix = "" if self.base_model is not self else "model."
        projections = {prefix + name: module for name, module in self.named_modules() if name.endswith("_proj")}
        layers = [place.layer for place in places_of_model(self.base_model) if place.layer is not None]
        mixers = {name for layer in layers for name in layer.expert_names}
        modules, head = without_wrappers(projections, mixers), self.get_output_embeddings()
        modules = modules if head is None else {**modules, "lm_head": head}
        modules = {name: base_linear(module) for name, module in modules.items()}
        # A module that a user put in has no weight that could be scaled, or one of another kind.
        return {name: module for name, module in modules.items() if getattr(module, "weight", None) is not None}

    @property
    def _bases(self) -> SingularBases:
        self._singular_bases.look_again(writes_stamp(self))
        return self._singular_bases

    def prepare_expert_vectors(self, names: list[str] | None = None) -> None:
        """Computes the singular bases of these linear modules (default: all), or reads them from the disk cache.

        An expert vector does it for the modules that it scales when it is first used. This method does it at a time
        of your choice, with a progress bar, and also keeps the bases of weights on disk that changed after loading.
        """
        modules = self.linear_modules()
        self._bases.prepare({name: functools.partial(weight_of, modules[name]) for name in names or modules})

    def _bases_of(self, names: Iterable[str], **options: Any) -> dict[str, SingularBasis]:
        modules = self.linear_modules()
        return self._bases.get_all({name: functools.partial(weight_of, modules[name]) for name in names}, **options)

    def spectrum(self, names: list[str]) -> dict[str, list[float]]:
        """The first singular values of these linear modules: `metadata["spectrum"]` ties an expert vector to them."""
        return spectrum_of(self._bases_of(names))

    def check_expert_vector(self, expert_vector: ExpertVector) -> None:
        """Refuses an expert vector that names other modules than the model has, or has too many scales.

        Raises:
            ValueError: it names the modules.
        """
        modules = self.linear_modules()
        for name in expert_vector.vectors:
            if name in modules:
                check_can_be_read(name, modules[name])
        sizes = {name: shape_of(module) for name, module in modules.items()}
        if "lm_head" not in sizes:
            sizes["lm_head"] = (self.config.vocab_size, self.config.hidden_size)
        check_expert_vector(expert_vector, sizes)

    def _check_base_vectors(self, passed: Any, resolved: Any) -> None:
        """Expert vectors of ones are resolved to the base, and would pass whatever modules they name."""
        pairs = zip(passed, resolved, strict=True) if isinstance(resolved, list) else [(passed, resolved)]
        for row, expert_vector in pairs:
            if row is not None and expert_vector is None:
                row = self._expert_library[row] if isinstance(row, str) else row
                self.check_expert_vector(ExpertVector(getattr(row, "vectors", row)))

    # ---- prepared for a forward

    def _prepare_in_force(self, expert_vector: Any, cache: MambaFormerCache | None) -> PreparedExpertVectors:
        """Resolves, checks and prepares the expert vectors of a forward; no request can see that it did.

        A head prepares them for itself and for its stack, and passes the result as the stack's `expert_vector`.
        """
        if isinstance(expert_vector, PreparedExpertVectors):
            return expert_vector
        check_cache_type(cache)
        if expert_vector is ... and is_compiled_step(cache):
            return cache.prepared_expert_vectors or PreparedExpertVectors()
        weights = None if cache is None else weights_stamp(self.base_model)
        in_force = None if cache is None else cache.expert_vector
        if expert_vector is None or (expert_vector is ... and in_force is None):
            self._check_none_is_merged(is_named=expert_vector is None)
            return PreparedExpertVectors(weights=weights)
        return self._prepare_outside_of_graphs(expert_vector, cache, weights)

    @torch.compiler.disable
    def _prepare_outside_of_graphs(
        self, expert_vector: Any, cache: MambaFormerCache | None, weights: Any
    ) -> PreparedExpertVectors:
        """A compiled forward breaks its graph here: files, hashes and decompositions cannot be traced."""
        if expert_vector is ...:
            resolved, key = cache.expert_vector, cache.provenance.in_force.expert_vector_key
            num_rows = len(resolved) if isinstance(resolved, list) else None
            self._check_none_is_merged(is_named=True)
        else:
            resolved, key, num_rows = self._resolve_named(expert_vector)
        if resolved is None:
            return PreparedExpertVectors(num_rows=num_rows, weights=weights)
        scaled, head = None, self._stamp_of_head()
        last = None if cache is None or _is_trained(resolved) else cache.prepared_expert_vectors
        if last is not None and (last.key, last.weights, last.head) == (key, weights, head):
            return replace(last, num_rows=num_rows)
        stamps = weights_stamp(self.base_model), head
        may_be_kept = self._may_be_kept(resolved)
        if may_be_kept:
            scaled = self._recently_prepared.get(resolved, key, stamps)
        if scaled is None:
            with _outside_inference_mode():
                scaled = self._scale_bases(resolved)
            if may_be_kept:
                self._recently_prepared.add(resolved, key, stamps, scaled)
        return PreparedExpertVectors(resolved, key, num_rows, scaled, weights, head)

    def _stamp_of_head(self) -> Any:
        head = self.get_output_embeddings()
        return None if head is None else (weights_stamp(head), self.num_replacements)

    def _may_be_kept(self, expert_vector: Any) -> bool:
        """Whether key and stamps identify the prepared bases.

        They do not for a vector that is being trained, for a weight that a parametrization computes, nor under a
        tracer or fake tensors.
        """
        if _is_trained(expert_vector) or is_every_operation_seen():
            return False
        modules = self.linear_modules()
        names = {name for row in _rows_of(expert_vector) for name in row.vectors}
        return all("weight" in modules[name]._parameters for name in names & modules.keys())

    def _resolve_named(self, expert_vector: Any) -> tuple[Any, Any, int | None]:
        """`(expert_vector, key, number of rows)` of an expert vector that a user passes to a forward."""
        resolved = resolve_expert_vector(expert_vector, self._expert_library)
        self._check_none_is_merged(is_named=True)
        self._check_base_vectors(expert_vector, resolved)
        num_rows = len(expert_vector) if isinstance(expert_vector, (list, tuple)) else None
        return *_with_key(resolved), num_rows

    def _check_none_is_merged(self, is_named: bool) -> None:
        if is_named and self._merged_modules():
            raise ValueError(
                "An expert vector is merged into the weights: call `unmerge_expert_vector()` before you name another."
            )

    def _scale_bases(self, expert_vector: Any) -> ScaledBases:
        """Checks expert vectors and scales the bases of the modules that they name."""
        for row in _rows_of(expert_vector):
            self.check_expert_vector(row)
        modules, ranks = self.linear_modules(), _ranks_of(expert_vector)
        ranks = {name: rank for name, rank in ranks.items() if name in modules}  # a model may have no head
        scaled: ScaledBases = {}
        for name, basis in self._bases_of(ranks, ranks=ranks, in_weights_dtype=True).items():
            for row in _rows_of(expert_vector):
                check_spectrum(row, name, basis.values)
            mesh = mesh_of(modules[name])
            if mesh is not None:
                basis = replace(basis, vectors=agreed(basis.vectors, mesh))
            owner, _, short = name.removeprefix("model.").rpartition(".")
            scaled.setdefault(owner, {})[short] = scale_basis(basis, _scales_at(expert_vector, name), mesh)
        return scaled

    # ---- merged into the weights

    def merge_expert_vector(self, expert_vector: Any) -> None:
        """Writes an expert vector into the weights, W' = U diag(s * z) V^T, so that it costs nothing per token.

        `unmerge_expert_vector` restores the changed weights from copies. Caches notice the change by themselves.

        Raises:
            ValueError: one is merged already, or the expert vector does not fit the model.
            TypeError: it is no single expert vector.
        """
        if self._merged_modules():
            raise ValueError("An expert vector is merged already: call `unmerge_expert_vector()` first.")
        expert_vector, _ = resolve_with_key(self._expert_library, expert_vector)
        if expert_vector is None or isinstance(expert_vector, list):
            raise TypeError("`merge_expert_vector` takes one expert vector for all rows, and not the base.")
        self.check_expert_vector(expert_vector)
        for module, weight in self._merged_weights(expert_vector):
            old = _swap_weight(module, weight, self._is_tied(module))
            self._merged_modules().append((module, old, version_of(module.weight)))
        self.base_model.num_merges += 1

    def _merged_weights(self, expert_vector: ExpertVector) -> list[tuple[nn.Module, torch.Tensor]]:
        """Each module that the expert vector scales, with its new weight; nothing has been written yet."""
        modules = self.linear_modules()
        modules = {name: modules[name] for name in expert_vector.vectors if name in modules}  # there may be no head
        for name, module in modules.items():
            _check_can_be_merged_into(name, module)
        merged = []

        def merge(name: str, basis: SingularBasis) -> None:
            check_spectrum(expert_vector, name, basis.values)
            weight = merged_weight(weight_of(modules[name]), basis, expert_vector.vectors[name].detach())
            merged.append((modules[name], placed_like(weight, modules[name].weight)))

        self._bases.visit_all({name: functools.partial(weight_of, each) for name, each in modules.items()}, merge)
        return merged

    def unmerge_expert_vector(self) -> None:
        """Puts back the weights of before `merge_expert_vector`, bit for bit.

        Raises:
            ValueError: nothing is merged, or the weights were trained or loaded since.
        """
        if not self._merged_modules():
            raise ValueError("No expert vector is merged: there is nothing to undo.")
        if any(version_of(module.weight) != version for module, _, version in self._merged_modules()):
            raise ValueError(
                "Weights were written since the expert vector was merged, by training or loading: putting the old "
                "ones back would mix two models. Load the model again."
            )
        while self._merged_modules():
            module, weight, _ = self._merged_modules().pop()
            if isinstance(weight, nn.Parameter):
                module.weight = weight
            else:
                _swap_weight(module, weight, is_tied=False)
        self.base_model.num_merges += 1

    def _merged_modules(self) -> list[tuple[nn.Module, torch.Tensor, int]]:
        """Each changed module, its old weight, and its version after merging; kept by the stack, which heads share."""
        return self.base_model._unmerged

    def _is_tied(self, module: nn.Module) -> bool:
        embedding = self.get_input_embeddings()
        return module is not embedding and module.weight is embedding.weight

    def tie_weights(self, *args, **kwargs):
        self._check_tied_head("tying weights")
        return super().tie_weights(*args, **kwargs)

    def _check_tied_head(self, action: str) -> None:
        if any(isinstance(weight, nn.Parameter) for _, weight, _ in self._merged_modules()):
            raise ValueError(
                f"An expert vector is merged into the tied `lm_head`: call `unmerge_expert_vector()` before {action}."
            )


def _ranks_of(expert_vector: Any) -> dict[str, int]:
    """The largest number of scales that a row has for each module."""
    ranks: dict[str, int] = {}
    for row in _rows_of(expert_vector):
        for name, z in row.vectors.items():
            ranks[name] = max(len(z), ranks.get(name, 0))
    return ranks


def _scales_at(expert_vector: Any, name: str) -> torch.Tensor | list[torch.Tensor | None]:
    """The scales of one module, in the form that `scale_basis` takes."""
    if isinstance(expert_vector, list):
        return [None if row is None else row.vectors.get(name) for row in expert_vector]
    return expert_vector.vectors[name]


def _check_can_be_merged_into(name: str, module: nn.Module) -> None:
    if "weight" not in module._parameters:
        raise ValueError(f"`{name}` is parametrized: remove the parametrization before merging.")
    if is_quantized(module.weight) or matrix_of(module) is not None:
        raise ValueError(
            f"`{name}` is quantized, and rounding it again would change the expert vector: pass it as "
            "`expert_vector`, or merge it before the model is quantized."
        )


@torch.no_grad()
def _swap_weight(module: nn.Module, weight: torch.Tensor, is_tied: bool) -> torch.Tensor:
    """Gives `module` the values of `weight`; returns the tensor that restores its old ones."""
    if is_tied:
        old, module.weight = module.weight, nn.Parameter(weight, requires_grad=module.weight.requires_grad)
        return old
    old = module.weight.detach().clone()
    module.weight.copy_(weight)
    return old


__all__ = ["ExpertRuntimeMixin", "PreparedExpertVectors", "is_compiled_step", "resolve_with_key"]
