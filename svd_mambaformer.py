"""Singular bases of weights, and linear modules computed with scaled singular values.

For a weight `W = U diag(s) V^T` and scales `z`, `W' = U diag(s * z) V^T`. With `Q` the singular vectors on W's narrow
side, the same is

    out >= in (side "input",  Q = V):  W' x = W (x + Q ((z - 1) * Q^T x))
    out <  in (side "output", Q = U):  W' x = y + Q ((z - 1) * Q^T y),  y = W x

so W itself is never touched, may be quantized or sharded, and every row of a batch may have its own `z`.
"""

import logging
import os
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor, nn

from .cpu_decode_mambaformer import few_rows_linear, is_only_a_product, packed_linear, rescaled
from .files_mambaformer import cache_folder, digest_of, is_sealed, read_tensors, sealed, write_tensors
from .placement_mambaformer import (
    base_linear,
    bias_beside,
    part_of,
    stamp_of,
    sum_over_shards,
    used_by_shards,
)
from .quantized_mambaformer import dequantized, packed_weight, portable

logger = logging.getLogger(__name__)

BASIS_FORMAT = "mambaformer.singular_basis"
FORMAT_VERSION = 1
# Rows of a tall matrix that are reduced at a time: bounds the memory that the basis of a vocabulary matrix needs.
REDUCTION_ROWS = 8192


def at_least_float32(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass(frozen=True, eq=False)
class SingularBasis:
    """The singular vectors on a weight's narrow side, strongest first.

    `vectors` Q (n, r) with n = min(in, out); `values` (r,) descending; `side` is "input" (out >= in, Q = V) or
    "output" (Q = U).
    """

    vectors: Tensor
    values: Tensor
    side: str

    @property
    def rank(self) -> int:
        return self.values.numel()

    def cut(self, rank: int) -> "SingularBasis":
        """The first `rank` directions, as views."""
        if rank == self.rank:
            return self
        return SingularBasis(self.vectors[:, :rank], self.values[:rank], self.side)

    def to(self, dtype: torch.dtype, device: torch.device | str) -> "SingularBasis":
        """The vectors in `dtype`; compact, so that what comes back does not keep a larger basis alive."""
        values = self.values.to(device).contiguous()
        return SingularBasis(self.vectors.to(device, dtype).contiguous(), values, self.side)


def side_of(out_features: int, in_features: int) -> str:
    """The narrow side of a weight (out, in), on which its basis lives; square weights count as "input"."""
    return "input" if out_features >= in_features else "output"


def compute_basis(weight: Tensor, rank: int | None = None) -> SingularBasis:
    """The singular basis of a weight (out, in), in float32 (float64 for float64), all of it or the first `rank`.

    The long side is first reduced to a triangle with the same singular values and narrow-side vectors (QR, block by
    block: TSQR, Demmel et al., UCB/EECS-2008-74), so that memory and time stay near those of an n x n SVD.
    Errors: ValueError for a weight or rank that has no basis.
    """
    _check_weight(weight)
    side = side_of(*weight.shape)
    tall = weight.detach() if side == "input" else weight.detach().mT  # (long, n)
    rank = _checked_rank(rank, tall.shape[1])
    triangle = _triangle(tall)
    if not torch.isfinite(triangle).all():
        raise ValueError("The weight has NaN or infinite entries, so it has no singular basis: check the checkpoint.")
    _, values, rows = torch.linalg.svd(triangle)
    return SingularBasis(rows[:rank].mT.contiguous(), values[:rank].contiguous(), side)


def _triangle(tall: Tensor) -> Tensor:
    """R (n, n) with R^T R = M^T M for M (long, n)."""
    columns = tall.shape[1]
    triangle = tall.new_empty((0, columns), dtype=at_least_float32(tall.dtype))
    for block in tall.split(max(REDUCTION_ROWS, 2 * columns)):
        stacked = torch.cat([triangle, block.to(triangle.dtype)])
        triangle = torch.linalg.qr(stacked, mode="r").R
    return triangle


def _check_weight(weight: Tensor):
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"A singular basis needs a floating-point weight (out, in), got {weight.dtype} of shape "
            f"{tuple(weight.shape)} on {weight.device}: load and dequantize the weight first."
        )


def _checked_rank(rank: int | None, most: int) -> int:
    rank = most if rank is None else rank
    if not 1 <= rank <= most:
        raise ValueError(f"`rank` must be between 1 and min(in, out) = {most}, got {rank}.")
    return rank


@contextmanager
def _undisturbed(name: str):
    """Errors name the module, and bases made while only inferring can still be trained through later."""
    with torch.inference_mode(False), torch.no_grad():
        try:
            yield
        except ValueError as error:
            raise ValueError(f"There is no singular basis for `{name}`. {error}") from error


@dataclass
class _Entry:
    """What is known of one weight: its content's digest and the bases in memory."""

    digest: str
    stamp: tuple = ()
    weight: Callable[[], Tensor | None] = field(default=lambda: None)
    casts: dict[tuple, SingularBasis] = field(default_factory=dict)
    unsaved: SingularBasis | None = None  # the whole basis, only where the disk could not take it


class SingularBases:
    """The bases of a model's weights, computed once per content: kept in memory by name and on disk by digest.

    A weight that is changed in place or replaced gets a new basis at the next `get`; a change through `weight.data`
    leaves no trace, and is seen after `look_again`. Safe to share between threads.

    Args:
        cache_dir: folder of the disk cache, by default `cache_folder("singular_bases")`. A folder that cannot be
            written only costs time.
    """

    def __init__(self, cache_dir: str | os.PathLike | None = None):
        self.cache_dir = cache_folder("singular_bases") if cache_dir is None else Path(cache_dir).expanduser()
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()
        self._is_writable = True
        self._writes: Any = None

    def look_again(self, writes: Any):
        """Has every weight's content looked at again if `writes`, a stamp of writes that leave no trace, changed."""
        with self._lock:
            if writes != self._writes:
                self._writes = writes
                for entry in self._entries.values():
                    entry.stamp, entry.weight = (), lambda: None

    def __getstate__(self) -> dict:
        return {"cache_dir": self.cache_dir}  # a copied model has other weights, and locks cannot be copied

    def __setstate__(self, state: dict):
        self.__init__(state["cache_dir"])

    def get(
        self,
        name: str,
        weight: Tensor,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> SingularBasis:
        """The basis of `weight` (the module's own parameter), cut to `rank`, in `dtype` on `device`.

        Default: all of it, in float32 (float64 for float64), on the weight's device. Errors: ValueError.
        """
        with self._lock, _undisturbed(name):
            _check_weight(weight)
            rank = _checked_rank(rank, min(weight.shape))
            cast_to = (dtype or at_least_float32(weight.dtype), torch.device(device or weight.device))
            entry = self._entry(name, weight)
            known = entry.casts.get(cast_to)
            if known is None or known.rank < rank:
                known = entry.casts[cast_to] = self._whole(weight, entry).cut(rank).to(*cast_to)
            return known.cut(rank)

    def prepare(self, named_weights: Mapping[str, Tensor], progress: bool | None = None):
        """Compute the bases that are neither on disk nor in memory, so that `get` is quick.

        `progress`: a bar; default: only if something is to be computed.
        """
        with self._lock:
            missing = [name for name, weight in named_weights.items() if not self._is_known(name, weight)]
            for name in tqdm(missing, desc="Singular bases", disable=not (missing if progress is None else progress)):
                with _undisturbed(name):
                    self._whole(named_weights[name], self._entries[name])

    def _is_known(self, name: str, weight: Tensor) -> bool:
        with _undisturbed(name):
            _check_weight(weight)
            entry = self._entry(name, weight)
        return bool(entry.unsaved or entry.casts) or self._path(entry.digest).is_file()

    def _entry(self, name: str, weight: Tensor) -> _Entry:
        entry = self._entries.get(name)
        stamp = (stamp_of(weight), weight.shape, weight.dtype, weight.device)
        # The stamp alone could come back: a new tensor may be put where a freed one was.
        if entry is not None and entry.stamp == stamp and entry.weight() is weight:
            return entry
        digest = digest_of({"weight": portable(weight)})
        if entry is None or entry.digest != digest:
            entry = self._entries[name] = _Entry(digest)
        elif entry.stamp and entry.stamp[-1] != weight.device:
            entry.casts.clear()  # the model has moved, and takes its bases along
        entry.stamp, entry.weight = stamp, weakref.ref(weight)
        return entry

    def _whole(self, weight: Tensor, entry: _Entry) -> SingularBasis:
        basis = entry.unsaved or self._load(entry.digest, weight)
        if basis is None:
            basis = compute_basis(dequantized(weight)).to(at_least_float32(weight.dtype), "cpu")
            if not self._save(entry.digest, basis):
                entry.unsaved = basis
        return basis

    def _path(self, digest: str) -> Path:
        return self.cache_dir / f"{digest}.safetensors"

    def _load(self, digest: str, weight: Tensor) -> SingularBasis | None:
        try:
            tensors, header = read_tensors(self._path(digest), BASIS_FORMAT, FORMAT_VERSION, "`prepare_experts`")
        except (OSError, ValueError):
            return None  # absent or damaged: computed again and put in its place
        # The weight is named inside too, so that a renamed file is not believed.
        is_ours = header.get("weight") == digest and tensors.keys() == {"vectors", "values"}
        if not is_ours or not is_sealed(header, tensors):
            return None
        return SingularBasis(tensors["vectors"], tensors["values"], side_of(*weight.shape))

    def _save(self, digest: str, basis: SingularBasis) -> bool:
        if not self._is_writable:
            return False
        tensors = {"vectors": basis.vectors, "values": basis.values}
        header = {"format": BASIS_FORMAT, "version": str(FORMAT_VERSION), "weight": digest}
        try:
            self.cache_dir.mkdir(parents=True, exist_ok=True)
            write_tensors(self._path(digest), tensors, sealed(header, tensors))
        except OSError as error:
            self._is_writable = False
            logger.warning(
                "Singular bases cannot be kept in %s (%s) and will be computed again in the next process: set "
                "MAMBAFORMER_CACHE to a folder that can be written.",
                self.cache_dir,
                error,
            )
        return self._is_writable


@dataclass(frozen=True, eq=False)
class ScaledBasis:
    """An expert at one module: `vectors` Q (n, r), `delta` = z - 1 of shape (r,), or (B, 1, r) per row, and `side`.

    `mesh` names the processes that the module is split over by tensor parallelism; Q is whole in each of them.
    """

    vectors: Tensor
    delta: Tensor
    side: str
    mesh: Any = None


def scale_basis(
    basis: SingularBasis, z: Tensor | Sequence[Tensor | None] | None, mesh: Any = None
) -> ScaledBasis | None:
    """`z` (r,), or a list with one (None = base) per row, made ready for `project`; None if nothing is scaled.

    `delta` is float32, or float64 if the basis is; shorter vectors are filled up with the base.
    """
    if isinstance(z, Tensor):
        return ScaledBasis(_compact(basis, z.numel()), _delta(basis, z), basis.side, mesh)
    rank = max((vector.numel() for vector in z or () if vector is not None), default=0)
    if not rank:
        return None
    rows = [_delta(basis, vector) if vector is not None else basis.values.new_zeros(0) for vector in z]
    delta = torch.stack([nn.functional.pad(row, (0, rank - row.numel())) for row in rows])
    return ScaledBasis(_compact(basis, rank), delta[:, None], basis.side, mesh)  # delta: (B, r) -> (B, 1, r)


def _first(basis: SingularBasis, rank: int) -> Tensor:
    return basis.vectors[:, : _checked_rank(rank, basis.rank)]


def _compact(basis: SingularBasis, rank: int) -> Tensor:
    """The same in adjoining memory, which every token reads."""
    return _first(basis, rank).contiguous()


def _delta(basis: SingularBasis, z: Tensor) -> Tensor:
    return z.to(basis.vectors.device, at_least_float32(basis.vectors.dtype)) - 1


def project(module: nn.Module, hidden_states: Tensor, scaled: ScaledBasis | None = None) -> Tensor:
    """`module` (linear, seen only from outside) with its singular values scaled: (..., in) -> (..., out).

    Rows whose `delta` is 0 get the base's own bits. Q is used in the dtype of the activations; the scaling runs in
    the wider of that and `delta`'s. An adapter around the linear module (W x + D x) adds what it adds to the base,
    W'x + D x, as it does when the expert is merged into W.
    """
    if scaled is None:
        return apply_linear(module, hidden_states)
    base = base_linear(module)
    if scaled.side == "input":
        if base is module:
            return apply_linear(module, _changed(hidden_states, scaled))
        return module(hidden_states) + _without_bias(base(_change(hidden_states, scaled)), base)
    if base is module and getattr(module, "bias", None) is None:
        return _changed(apply_linear(module, hidden_states), scaled)
    outputs = module(hidden_states)
    return outputs + _change(_without_bias(outputs if base is module else base(hidden_states), base), scaled)


def apply_linear(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """`module(hidden_states)`; by a faster product, where a product is all that would happen."""
    if torch.compiler.is_compiling() or not is_only_a_product(module):
        return module(hidden_states)
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if type(weight) is nn.Parameter:
        outputs = few_rows_linear(hidden_states, weight, bias)
    else:
        packed = packed_weight(weight)
        outputs = None if packed is None else packed_linear(hidden_states, packed, bias)
    return module(hidden_states) if outputs is None else outputs


def _changed(states: Tensor, scaled: ScaledBasis) -> Tensor:
    changed = None if scaled.mesh is not None else rescaled(states, scaled.vectors, scaled.delta)
    return states + _change(states, scaled) if changed is None else changed


def _without_bias(outputs: Tensor, module: nn.Module) -> Tensor:
    """The bias is no part of W: what an expert scales does not have it."""
    bias = bias_beside(outputs, module)
    return outputs if bias is None else outputs - bias


def _change(states: Tensor, scaled: ScaledBasis) -> Tensor:
    delta = scaled.delta
    if delta.ndim == 3 and (states.ndim != 3 or delta.shape[0] != states.shape[0]):
        raise ValueError(
            f"There are experts for {delta.shape[0]} rows, but the activations are {tuple(states.shape)}: make them "
            "(batch, length, channels) with as many rows."
        )
    basis = scaled.vectors.to(states.dtype)
    if states.shape[-1] == basis.shape[0]:
        return ((states @ basis) * delta).to(states.dtype) @ basis.mT
    # This process has some of the channels: the coordinates (..., r) are sums over all processes.
    basis = part_of(basis, states.shape[-1], scaled.mesh)
    coordinates = sum_over_shards(states @ basis, scaled.mesh) * delta
    return used_by_shards(coordinates.to(states.dtype), scaled.mesh) @ basis.mT


def merged_weight(weight: Tensor, basis: SingularBasis, z: Tensor) -> Tensor:
    """`U diag(s * z) V^T` of a weight (out, in), computed in float32 at least, returned in the weight's dtype."""
    dtype = at_least_float32(weight.dtype)
    wide = weight.detach().to(dtype)
    directions = _first(basis, z.numel()).to(weight.device, dtype)
    delta = z.to(weight.device, dtype) - 1
    if basis.side == "input":
        return (wide + ((wide @ directions) * delta) @ directions.mT).to(weight.dtype)
    return (wide + directions @ (delta[:, None] * (directions.mT @ wide))).to(weight.dtype)


__all__ = [
    "ScaledBasis",
    "SingularBases",
    "SingularBasis",
    "at_least_float32",
    "compute_basis",
    "merged_weight",
    "project",
    "scale_basis",
    "side_of",
]
