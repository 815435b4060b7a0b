"""Expert vectors in a model: resolved, checked and prepared for a forward, or merged into the weights.

`ExpertRuntimeMixin` is that part of the models. It reaches modules and weights through `self`.
"""

import copy
import functools
import threading
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from types import EllipsisType
from typing import TYPE_CHECKING, TypeAlias, TypeGuard, TypeVar, cast

import torch
from torch import nn

from .cache_history_mambaformer import Status
from .cache_mambaformer import MambaFormerCache
from .configuration_mambaformer import MambaFormerConfig
from .expert_bases_mambaformer import SingularBases, SingularBasis
from .expert_linear_mambaformer import ScaledBasis, merged_weight, scale_basis
from .expert_spectra_mambaformer import check_spectrum, spectrum_of
from .expert_vectors_mambaformer import (
    ExpertKey,
    ExpertVector,
    ExpertVectorLibrary,
    ExpertVectorLike,
    ExpertVectorsLike,
    ResolvedExpertVector,
    check_expert_vector,
    expert_key,
    resolve_expert_vector,
)
from .inputs_mambaformer import check_cache_type
from .library_mambaformer import is_every_operation_seen
from .modeling_stack_mambaformer import ModelStack, places_of_model, without_wrappers
from .weights_parallel_mambaformer import (
    base_linear,
    broadcast_from_first,
    mesh_of,
    placed_like,
    weight_of,
    writes_stamp,
)
from .weights_quantized_mambaformer import is_quantized
from .weights_quantized_modules_mambaformer import check_can_be_read, matrix_of, shape_of
from .weights_version_mambaformer import version_of, weights_stamp

if TYPE_CHECKING:
    from transformers.modeling_utils import PreTrainedModel as Model
else:
    Model = object  # a mixin: the class that uses it is a `PreTrainedModel`

# {path of a mixer: {name of a linear module: its scaled basis, or `None` if no row scales it}}
ScaledBases: TypeAlias = dict[str, dict[str, ScaledBasis | None]]
NO_SCALED_BASES: ScaledBases = {}
# Expert vectors that a model keeps prepared. Vectors of full rank share their bases, shorter ones have copies.
MOST_PREPARED = 4


@dataclass(frozen=True)
class PreparedExpertVectors:
    """The expert vectors of a forward, prepared for one model.

    Args:
        expert_vector: `None` (the base), one for all rows, or a list with one or `None` per row.
        key: identifies the expert vectors by content.
        num_rows: length of the list if the user passed a list.
        scaled: the scaled bases; `None` for the base.
        weights, head: stamps of the weights of the stack and of the head.
    """

    expert_vector: ResolvedExpertVector = None
    key: ExpertKey = None
    num_rows: int | None = None
    scaled: ScaledBases | None = None
    weights: int | None = None
    head: tuple[int | None, int] | None = None

    @property
    def is_reusable(self) -> bool:
        """Whether other forwards may use the bases; with a vector that is being trained they belong to one graph."""
        return not _is_trained(self.expert_vector)

    @property
    def scaled_bases(self) -> ScaledBases:
        """The scaled bases; for the base, the same empty dict in all forwards, as the decode program compares it."""
        return self.scaled or NO_SCALED_BASES


# The argument of a forward: `...` stands for the expert vector in force in the cache.
ExpertVectorArgument: TypeAlias = ExpertVectorsLike | PreparedExpertVectors | EllipsisType


def resolve_with_key(
    library: ExpertVectorLibrary, expert_vector: ExpertVectorsLike
) -> tuple[ResolvedExpertVector, ExpertKey]:
    """Resolves a user's `expert_vector` into `(expert_vector, key)`, which is `(None, None)` for the base."""
    return _with_key(resolve_expert_vector(expert_vector, library))


def _with_key(expert_vector: ResolvedExpertVector) -> tuple[ResolvedExpertVector, ExpertKey]:
    """Adds the key, and reduces a list of equal rows to one expert vector unless each row needs its own gradient."""
    if isinstance(expert_vector, list) and _is_trained(expert_vector):
        return expert_vector, tuple(expert_key(row) for row in expert_vector)
    key = expert_key(expert_vector)
    if isinstance(expert_vector, list) and not isinstance(key, tuple):
        expert_vector = expert_vector[0]
    return (None, None) if expert_vector is None else (expert_vector, key)


def _rows_of(expert_vector: ResolvedExpertVector) -> Iterator[ExpertVector]:
    """The expert vectors of all rows that are not the base."""
    rows = expert_vector if isinstance(expert_vector, list) else [expert_vector]
    return (row for row in rows if row is not None)


def _is_trained(expert_vector: ResolvedExpertVector) -> bool:
    return any(vector.requires_grad for row in _rows_of(expert_vector) for vector in row.vectors.values())


def is_compiled_step(cache: MambaFormerCache | None) -> TypeGuard[MambaFormerCache]:
    """Whether this is a compiled forward that continues a sequence under the same expert vector.

    It cannot stamp the weights, and uses the prepared expert vectors that an eager forward stored in the cache.
    """
    if cache is None or not torch.compiler.is_compiling():
        return False
    is_prepared = cache.expert_vector is None or cache.prepared_expert_vectors is not None
    return is_prepared and cache.status == Status.CURRENT


@contextmanager
def _outside_inference_mode():
    """Context that makes tensors which outlive a forward; autograd cannot use tensors made in inference mode."""
    is_grad_enabled = torch.is_grad_enabled()
    with torch.inference_mode(False), torch.set_grad_enabled(is_grad_enabled):
        yield


Stamps: TypeAlias = tuple[int | None, tuple[int | None, int] | None]  # of the stack's weights and of the head's
CheckedParts: TypeAlias = tuple[dict[str, int], object]  # the rank of each module, and the spectrum


class _RecentlyPrepared:
    """The scaled bases of the last few expert vectors, by content, so that sessions can take turns at no cost.

    Threads may share it.
    """

    def __init__(self):
        self._entries: OrderedDict[ExpertKey, tuple[Stamps, list[CheckedParts], ScaledBases]] = OrderedDict()
        self._lock = threading.Lock()

    def __getstate__(self) -> dict:
        return {}  # a copied model has other weights

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def get(self, expert_vector: ResolvedExpertVector, key: ExpertKey, stamps: Stamps) -> ScaledBases | None:
        """The scaled bases of this content for weights with these stamps; `None` if there are none."""
        with self._lock:
            its_stamps, checked, scaled = self._entries.get(key, (None, None, None))
            if its_stamps != stamps or checked != _checked_parts_of(expert_vector):
                return None
            self._entries.move_to_end(key)
            return scaled

    def add(self, expert_vector: ResolvedExpertVector, key: ExpertKey, stamps: Stamps, scaled: ScaledBases) -> None:
        entry = stamps, copy.deepcopy(_checked_parts_of(expert_vector)), scaled
        with self._lock:
            for stale in [other for other, (its_stamps, *_) in self._entries.items() if its_stamps != stamps]:
                del self._entries[stale]
            self._entries[key] = entry
            self._entries.move_to_end(key)
            while len(self._entries) > MOST_PREPARED:
                self._entries.popitem(last=False)


def _checked_parts_of(expert_vector: ResolvedExpertVector) -> list[CheckedParts]:
    """The parts of expert vectors that are checked against the weights and are not in their key."""
    return [
        ({name: len(z) for name, z in row.vectors.items()}, row.metadata.get("spectrum"))
        for row in _rows_of(expert_vector)
    ]


_Method = TypeVar("_Method", bound=Callable)


def _outside_of_graphs(method: _Method) -> _Method:
    """A method at which a compiled forward breaks its graph; with `fullgraph=True`, the error shows the reason."""
    reason = (
        "preparing an expert vector reads files and computes hashes and bases, which cannot be traced: run the first "
        "forward with this expert vector and a cache without `torch.compile`, and compile the forwards after it"
    )
    return cast(_Method, torch.compiler.disable(method, reason=reason))


# A changed module, its old weight, and the version of its weight after merging.
MergedModule: TypeAlias = tuple[nn.Module, torch.Tensor, int | torch.SymInt]


class ExpertRuntimeMixin(Model):
    """The models' expert vectors: by name, prepared for a forward, merged into the weights."""

    config: MambaFormerConfig
    base_model: "ExpertRuntimeMixin"  # the stack; heads share its state
    num_replacements: int

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._expert_library = ExpertVectorLibrary()
        self._singular_bases = SingularBases()
        self._recently_prepared = _RecentlyPrepared()
        self._unmerged: list[MergedModule] = []
        self.num_merges = 0

    @property
    def expert_vectors(self) -> ExpertVectorLibrary:
        """The library of expert vectors that can be passed by name: add, blend, load and save them here."""
        return self._expert_library

    def load_expert_vectors(self, path: str) -> list[str]:
        """Adds the expert vector of a file, or all expert vectors of a folder, to the library; returns their names."""
        return self._expert_library.load(path)

    # ---- modules and their singular bases

    def linear_modules(self) -> dict[str, nn.Module]:
        """The linear modules that an expert vector may scale, by their names in expert vectors."""
        prefix = "" if self.base_model is not self else "model."
        named = self.named_modules()
        projections: dict[str, nn.Module] = {prefix + name: each for name, each in named if name.endswith("_proj")}
        layers = [
            place.layer for place in places_of_model(cast(ModelStack, self.base_model)) if place.layer is not None
        ]
        mixers = {name for layer in layers for name in layer.expert_names}
        modules, head = without_wrappers(projections, mixers), self.get_output_embeddings()
        modules = modules if head is None else {**modules, "lm_head": head}
        modules = {name: base_linear(module) for name, module in modules.items()}
        # A module of a user's own may have no weight.
        return {name: module for name, module in modules.items() if getattr(module, "weight", None) is not None}

    @property
    def _bases(self) -> SingularBases:
        self._singular_bases.look_again(writes_stamp(self))
        return self._singular_bases

    def prepare_expert_vectors(self, names: list[str] | None = None) -> None:
        """Computes the singular bases of these linear modules (default: all), or reads them from the disk cache.

        The first use of an expert vector does this for the modules that it scales. Call this method to do it earlier,
        with a progress bar, and before `torch.compile(fullgraph=True)`. It also writes the bases of weights that
        changed after loading to disk.
        """
        modules = self.linear_modules()
        self._bases.prepare({name: functools.partial(weight_of, modules[name]) for name in names or modules})

    def _bases_of(
        self, names: Iterable[str], ranks: Mapping[str, int] | None = None, in_weights_dtype: bool = False
    ) -> dict[str, SingularBasis]:
        modules = self.linear_modules()
        weights = {name: functools.partial(weight_of, modules[name]) for name in names}
        return self._bases.get_all(weights, ranks, in_weights_dtype)

    def spectrum(self, names: list[str]) -> dict[str, list[float]]:
        """The first singular values of these linear modules, for the `metadata["spectrum"]` of an expert vector."""
        return spectrum_of(self._bases_of(names))

    def check_expert_vector(self, expert_vector: ExpertVector) -> None:
        """Refuses an expert vector that does not fit the model.

        Raises:
            ValueError: it names modules that the model does not have, or has too many scales for a module.
        """
        modules = self.linear_modules()
        for name in expert_vector.vectors:
            if name in modules:
                check_can_be_read(name, modules[name])
        sizes = {name: shape_of(module) for name, module in modules.items()}
        if "lm_head" not in sizes:
            sizes["lm_head"] = (self.config.vocab_size, self.config.hidden_size)
        check_expert_vector(expert_vector, sizes)

    def _check_base_vectors(self, passed: ExpertVectorsLike, resolved: ResolvedExpertVector) -> None:
        """Checks the modules of expert vectors of ones, which are resolved to the base."""
        rows = passed if isinstance(passed, (list, tuple)) else [passed]
        for row, expert_vector in zip(rows, resolved if isinstance(resolved, list) else [resolved], strict=True):
            if row is not None and expert_vector is None:
                row = self._expert_library[row] if isinstance(row, str) else row
                self.check_expert_vector(ExpertVector(row if isinstance(row, Mapping) else row.vectors))

    # ---- prepared for a forward

    def _prepare_in_force(
        self,
        expert_vector: "ExpertVectorArgument",
        cache: MambaFormerCache | None,
    ) -> PreparedExpertVectors:
        """Resolves, checks and prepares the expert vectors of a forward, without any effect on other requests.

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

    @_outside_of_graphs
    def _prepare_outside_of_graphs(
        self, expert_vector: ExpertVectorsLike | EllipsisType, cache: MambaFormerCache | None, weights: int | None
    ) -> PreparedExpertVectors:
        """`_prepare_in_force` for expert vectors other than the base."""
        if isinstance(expert_vector, EllipsisType):
            cache = cast(MambaFormerCache, cache)  # without one, the caller has prepared the base
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

    def _stamp_of_head(self) -> tuple[int | None, int] | None:
        head = self.get_output_embeddings()
        return None if head is None else (weights_stamp(head), self.num_replacements)

    def _may_be_kept(self, expert_vector: ResolvedExpertVector) -> bool:
        """Whether key and stamps identify the prepared bases.

        They do not for a vector that is being trained, for a parametrized weight, under a tracer or fake tensors.
        """
        if _is_trained(expert_vector) or is_every_operation_seen():
            return False
        modules = self.linear_modules()
        names = {name for row in _rows_of(expert_vector) for name in row.vectors}
        return all("weight" in modules[name]._parameters for name in names & modules.keys())

    def _resolve_named(self, expert_vector: ExpertVectorsLike) -> tuple[ResolvedExpertVector, ExpertKey, int | None]:
        """`(expert_vector, key, number of rows)` of the `expert_vector` that a user passes to a forward."""
        resolved = resolve_expert_vector(expert_vector, self._expert_library)
        self._check_none_is_merged(is_named=True)
        self._check_base_vectors(expert_vector, resolved)
        num_rows = len(expert_vector) if isinstance(expert_vector, (list, tuple)) else None
        return *_with_key(resolved), num_rows

    def _check_none_is_merged(self, is_named: bool) -> None:
        if is_named and self._merged_modules():
            raise ValueError(
                "An expert vector is merged into the weights: call `unmerge_expert_vector()` before you pass another."
            )

    def _scale_bases(self, expert_vector: ResolvedExpertVector) -> ScaledBases:
        """Checks expert vectors and scales the bases of their modules."""
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
                basis = replace(basis, vectors=broadcast_from_first(basis.vectors, mesh))
            owner, _, short = name.removeprefix("model.").rpartition(".")
            scaled.setdefault(owner, {})[short] = scale_basis(basis, _scales_at(expert_vector, name), mesh)
        return scaled

    # ---- merged into the weights

    def merge_expert_vector(self, expert_vector: ExpertVectorLike) -> None:
        """Writes an expert vector into the weights, W' = U diag(s * z) V^T, so that it costs nothing per token.

        `unmerge_expert_vector` restores the changed weights from copies. Caches become stale without a further call.

        Raises:
            ValueError: an expert vector is merged already, or this one does not fit the model.
            TypeError: a list, or the base.
        """
        if self._merged_modules():
            raise ValueError("An expert vector is merged already: call `unmerge_expert_vector()` first.")
        resolved, _ = resolve_with_key(self._expert_library, expert_vector)
        if resolved is None or isinstance(resolved, list):
            raise TypeError("`merge_expert_vector` takes one expert vector for all rows, and not the base.")
        self.check_expert_vector(resolved)
        for module, weight in self._merged_weights(resolved):
            old = _swap_weight(module, weight, self._is_tied(module))
            self._merged_modules().append((module, old, version_of(_weight(module))))
        self.base_model.num_merges += 1

    def _merged_weights(self, expert_vector: ExpertVector) -> list[tuple[nn.Module, torch.Tensor]]:
        """Each module that the expert vector scales, with its new weight; nothing is written."""
        modules = self.linear_modules()
        modules = {name: modules[name] for name in expert_vector.vectors if name in modules}  # there may be no head
        for name, module in modules.items():
            _check_can_be_merged_into(name, module)
        merged = []

        def merge(name: str, basis: SingularBasis) -> None:
            check_spectrum(expert_vector, name, basis.values)
            old = cast(torch.Tensor, weight_of(modules[name]))  # quantized weights have been refused
            weight = merged_weight(old, basis, expert_vector.vectors[name].detach())
            merged.append((modules[name], placed_like(weight, _weight(modules[name]))))

        self._bases.visit_all({name: functools.partial(weight_of, each) for name, each in modules.items()}, merge)
        return merged

    def unmerge_expert_vector(self) -> None:
        """Restores the weights as they were before `merge_expert_vector`, bit for bit.

        Raises:
            ValueError: nothing is merged, or the weights were trained or loaded since.
        """
        if not self._merged_modules():
            raise ValueError("No expert vector is merged: there is nothing to undo.")
        if any(version_of(_weight(module)) != version for module, _, version in self._merged_modules()):
            raise ValueError(
                "Weights were written since the expert vector was merged, by training or loading, and restoring the "
                "old weights would mix two models: load the model again."
            )
        while self._merged_modules():
            module, weight, _ = self._merged_modules().pop()
            if isinstance(weight, nn.Parameter):
                module.weight = weight
            else:
                _swap_weight(module, weight, is_tied=False)
        self.base_model.num_merges += 1

    def _merged_modules(self) -> list[MergedModule]:
        """The modules whose weights are merged; the stack keeps the list, and heads share it."""
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


def _weight(module: nn.Module) -> torch.Tensor:
    return cast(torch.Tensor, module.weight)


def _ranks_of(expert_vector: ResolvedExpertVector) -> dict[str, int]:
    """The largest number of scales of a row, for each module."""
    ranks: dict[str, int] = {}
    for row in _rows_of(expert_vector):
        for name, z in row.vectors.items():
            ranks[name] = max(len(z), ranks.get(name, 0))
    return ranks


def _scales_at(expert_vector: ResolvedExpertVector, name: str) -> torch.Tensor | list[torch.Tensor | None] | None:
    """The scales of one module, as `scale_basis` takes them."""
    if isinstance(expert_vector, list):
        return [None if row is None else row.vectors.get(name) for row in expert_vector]
    return None if expert_vector is None else expert_vector.vectors[name]


def _check_can_be_merged_into(name: str, module: nn.Module) -> None:
    if "weight" not in module._parameters:
        raise ValueError(f"`{name}` is parametrized: remove the parametrization before merging.")
    if is_quantized(_weight(module)) or matrix_of(module) is not None:
        raise ValueError(
            f"`{name}` is quantized, and rounding it again would change the expert vector's effect: pass the vector "
            "as `expert_vector`, or merge it before the model is quantized."
        )


@torch.no_grad()
def _swap_weight(module: nn.Module, weight: torch.Tensor, is_tied: bool) -> torch.Tensor:
    """Gives `module` the values of `weight`; returns a tensor with its old values."""
    old = _weight(module)
    if is_tied:
        module.weight = nn.Parameter(weight, requires_grad=old.requires_grad)
        return old
    copy_of_old = old.detach().clone()
    old.copy_(weight)
    return copy_of_old


__all__ = [
    "ExpertRuntimeMixin",
    "ExpertVectorArgument",
    "PreparedExpertVectors",
    "is_compiled_step",
    "resolve_with_key",
]
