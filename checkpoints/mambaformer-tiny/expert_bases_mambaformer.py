"""Singular bases of weights: the singular vectors on a weight's narrow side, computed once for each content.

They are kept in memory and on disk. `expert_linear_mambaformer` computes linear modules with them.
"""

import logging
import os
import sys
import threading
import weakref
from collections import deque
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TypeAlias

import torch
from huggingface_hub.utils import tqdm
from torch import Tensor

from .expert_bases_files_mambaformer import LIMIT, BasisFolder
from .files_mambaformer import cache_folder, digest_of
from .ops_cpu_threads_mambaformer import SideBySide, completed
from .weights_quantized_mambaformer import dequantized, portable
from .weights_quantized_modules_mambaformer import QuantizedMatrix
from .weights_version_mambaformer import stamp_of

logger = logging.getLogger(__name__)

Weight: TypeAlias = Tensor | QuantizedMatrix

# Bases of weights up to this size are computed in parallel, one thread each; larger ones in turn on all threads.
SIDE_BY_SIDE = 2048
MOST_WORKERS = 8
# Narrow sides cubed, added up: less work takes about a second at most, and gets neither a line in the log nor a bar.
WORTH_TELLING = 2e9
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
        """The first `rank` directions, as views.

        Raises:
            ValueError: the basis has fewer directions.
        """
        if _checked_rank(rank, self.rank) == self.rank:
            return self
        return SingularBasis(self.vectors[:, :rank], self.values[:rank], self.side)

    def to(self, dtype: torch.dtype, device: torch.device | str) -> "SingularBasis":
        """The basis with vectors in `dtype`; contiguous, so that the result does not keep a larger basis in memory."""
        values = self.values.to(device).contiguous()
        return SingularBasis(self.vectors.to(device, dtype).contiguous(), values, self.side)


def side_of(out_features: int, in_features: int) -> str:
    """The narrow side of a weight (out, in), which its basis spans; "input" for square weights."""
    return "input" if out_features >= in_features else "output"


def compute_basis(weight: Tensor, rank: int | None = None) -> SingularBasis:
    """The singular basis of a weight (out, in), in float32 (float64 for float64): all directions or the first `rank`.

    Up to float32 the eigenvectors of W^T W are computed in float64, where squares of float32 singular values keep more
    digits than an SVD in float32 has, in less time. For float64 the long side is first reduced to a triangle with the
    same singular values and narrow-side vectors (QR by blocks of rows: TSQR, Demmel et al., UCB/EECS-2008-74). Both
    need about the memory of an n x n decomposition.

    Raises:
        ValueError: the weight or the rank has no basis.
    """
    _check_weight(weight)
    side = side_of(*weight.shape)
    tall = weight.detach() if side == "input" else weight.detach().mT  # (long, n)
    rank = _checked_rank(rank, tall.shape[1])
    values, vectors = (_of_triangle if tall.dtype == torch.float64 else _of_gram)(tall)
    dtype = at_least_float32(weight.dtype)
    # Columns are selected before the cast, so that a cut basis has the same numbers as the full one.
    return SingularBasis(
        vectors[:, :rank].to(weight.device, dtype).contiguous(), values[:rank].to(weight.device, dtype), side
    )


def _of_gram(tall: Tensor) -> tuple[Tensor, Tensor]:
    """Singular values (n,) and right singular vectors (n, n) of M (long, n), in float64."""
    if tall.device.type not in ("cpu", "cuda"):
        tall = tall.cpu()  # others may lack float64
    gram = tall.new_zeros((tall.shape[1],) * 2, dtype=torch.float64)
    for block in tall.split(REDUCTION_ROWS):
        block = block.to(torch.float64)
        gram.addmm_(block.mT, block)
    _check_finite(gram)
    squares, vectors = torch.linalg.eigh(gram, UPLO="U")
    return squares.flip(0).clamp(min=0).sqrt(), vectors.flip(1)


def _of_triangle(tall: Tensor) -> tuple[Tensor, Tensor]:
    triangle = _triangle(tall)
    _check_finite(triangle)
    _, values, rows = torch.linalg.svd(triangle)
    return values, rows.mT


def _check_finite(reduced: Tensor) -> None:
    if not torch.isfinite(reduced).all():
        raise ValueError("The weight has NaN or infinite entries, so it has no singular basis: check the checkpoint.")


def _triangle(tall: Tensor) -> Tensor:
    """R (n, n) with R^T R = M^T M for M (long, n)."""
    columns = tall.shape[1]
    triangle = tall.new_empty((0, columns))
    for block in tall.split(max(REDUCTION_ROWS, 2 * columns)):
        triangle = torch.linalg.qr(torch.cat([triangle, block]), mode="r").R
    return triangle


def _check_weight(weight: Weight):
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"A singular basis needs a floating-point weight (out, in), got {weight.dtype} of shape "
            f"{tuple(weight.shape)} on {weight.device}: load the model without quantization, or quantize it by "
            "torchao, bitsandbytes or quanto."
        )


def _checked_rank(rank: int | None, most: int) -> int:
    rank = most if rank is None else rank
    if not 1 <= rank <= most:
        raise ValueError(f"`rank` must be between 1 and min(in, out) = {most}, got {rank}.")
    return rank


class _NoBasis(ValueError):
    """A weight has no singular basis; the message names its module."""


@contextmanager
def _computing_basis_of(name: str):
    """Context whose errors name the module, and outside of inference mode, so that autograd can use the bases."""
    with torch.inference_mode(False), torch.no_grad():
        try:
            yield
        except _NoBasis:
            raise
        except ValueError as error:
            raise _NoBasis(f"There is no singular basis for `{name}`. {error}") from error


@dataclass
class _Entry:
    """One weight: the digest of its content, and its bases in memory."""

    digest: str
    form: tuple  # shape and dtype
    stamp: tuple = ()
    weight: Callable[[], Weight | None] = field(default=lambda: None)
    casts: dict[tuple, SingularBasis] = field(default_factory=dict)
    unsaved: SingularBasis | None = None  # the full basis, if it is not on disk
    is_changed: bool = False  # the weight had other values before: it is being trained


@dataclass
class _Request:
    """A request for the first `rank` directions of a weight's basis, in a dtype on a device."""

    name: str
    entry: _Entry
    rank: int
    cast_to: tuple[torch.dtype, torch.device]

    @property
    def is_in_memory(self) -> bool:
        basis = self.entry.casts.get(self.cast_to)
        return self.entry.unsaved is not None or (basis is not None and basis.rank >= self.rank)

    def from_memory(self) -> SingularBasis | None:
        basis = self.entry.casts.get(self.cast_to)
        if basis is not None and basis.rank >= self.rank:
            return basis.cut(self.rank)
        return None if self.entry.unsaved is None else self.keep(self.entry.unsaved)

    def keep(self, full: SingularBasis) -> SingularBasis:
        basis = self.entry.casts[self.cast_to] = full.cut(self.rank).to(*self.cast_to)
        return basis


class _Progress:
    """One line in the log and a progress bar, which start at the first basis that has to be computed.

    `is_shown` switches the bar; `None` shows it together with the line, if the work may take more than a second.
    """

    def __init__(self, total: int, kept: str, is_shown: bool | None):
        self.total, self.done, self.kept, self.is_shown = total, 0, kept, is_shown
        self.is_logged = False
        self.bar: tqdm | None = None
        self.lock = threading.Lock()

    def begin(self, size: int, is_changed: bool) -> None:
        """Called before a basis (`size`, `size`) is computed; `is_changed`: of a weight that had another basis."""
        with self.lock:
            most = self.total - self.done
            # Tested for each basis, because the first weights may be small.
            is_long = most * size**3 > WORTH_TELLING and not is_changed
            if is_long and not self.is_logged:
                self.is_logged = True
                logger.warning(
                    "Computing the singular bases of up to %d weights for expert vectors, once for these weights: "
                    "they are %s.",
                    most,
                    self.kept,
                )
            if self.bar is None and (is_long if self.is_shown is None else self.is_shown):
                is_terminal = sys.stderr is not None and sys.stderr.isatty()
                interval = 0.1 if is_terminal else 5.0  # seconds; in a file each update is a line
                self.bar = tqdm(total=most, desc="Singular bases", mininterval=interval)

    def step(self) -> None:
        with self.lock:
            self.done += 1
            if self.bar is not None:
                self.bar.update()

    def __enter__(self) -> "_Progress":
        return self

    def __exit__(self, *_: object) -> None:
        if self.bar is not None:
            self.bar.close()


class SingularBases:
    """The bases of a model's weights, computed once per content: kept in memory by name and on disk by digest.

    A weight that is changed in place or replaced gets a new basis at the next `get`. A write through `weight.data`
    leaves no trace, and takes effect after `look_again`. Bases of changed weights are not written to disk, because
    training changes all weights in each step; `prepare` writes them. Threads may share it.

    Args:
        cache_dir: folder of the disk cache, by default `cache_folder("singular_bases")`. If it cannot be written,
            each process computes the bases itself. `$MAMBAFORMER_BASES_GB` limits its size.
    """

    def __init__(self, cache_dir: str | os.PathLike | None = None):
        self.cache_dir = cache_folder("singular_bases") if cache_dir is None else Path(cache_dir).expanduser()
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()
        self._disk = BasisFolder(self.cache_dir)
        self._writes: int | None = None

    def look_again(self, writes: int):
        """Compares the content of every weight again if `writes`, a stamp of writes that leave no trace, changed."""
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

        Default: all directions, in float32 (float64 for float64), on the weight's device.

        Raises:
            ValueError: the weight or the rank has no basis.
        """
        with self._lock, _computing_basis_of(name):
            request = self._request(name, weight, rank, dtype, device)
            basis = request.from_memory()
            if basis is None:
                with self._progress(1, False) as progress:
                    basis = request.keep(self._finish(request, *self._read_or_compute(request, weight, progress)))
            return basis

    def get_all(
        self,
        weights: Mapping[str, Callable[[], Weight]],
        ranks: Mapping[str, int] | None = None,
        in_weights_dtype: bool = False,
    ) -> dict[str, SingularBasis]:
        """`get` for many weights; missing bases are computed in parallel, and long work shows a progress bar.

        Args:
            weights: functions that return a weight. Each is called once, in order, so that not all weights have to be
                in memory.
            ranks: the number of directions of each basis; default: all.
            in_weights_dtype: bases in the dtype of their weights instead of float32.
        """
        bases: dict[str, SingularBasis] = {}
        self.visit_all(weights, bases.__setitem__, ranks, in_weights_dtype)
        return bases

    def visit_all(
        self,
        weights: Mapping[str, Callable[[], Weight]],
        visit: Callable[[str, SingularBasis], None],
        ranks: Mapping[str, int] | None = None,
        in_weights_dtype: bool = False,
    ) -> None:
        """Calls `visit` with the name and the basis of each weight, while the processor's caches hold the weight."""

        def use(request: _Request, full: SingularBasis | None) -> None:
            with _computing_basis_of(request.name):
                basis = request.from_memory() if full is None else request.keep(full)
            if basis is not None:
                visit(request.name, basis)

        self._each(weights, use, ranks or {}, in_weights_dtype)

    def prepare(self, named_weights: Mapping[str, Weight | Callable[[], Weight]], progress: bool | None = None):
        """Computes the bases that are neither on disk nor in memory, and writes them to disk, so that `get` is quick.

        `progress` shows a bar; default: if a basis has to be computed.
        """
        weights = {name: each if callable(each) else partial(_same, each) for name, each in named_weights.items()}

        def use(request: _Request, full: SingularBasis | None) -> None:
            entry = request.entry
            with _computing_basis_of(request.name):
                if entry.unsaved is not None and self._save(entry.digest, entry.unsaved):
                    entry.unsaved = None

        self._each(weights, use, {}, is_shown=True if progress is None else progress)

    def _each(
        self,
        weights: Mapping[str, Callable[[], Weight]],
        use: Callable[[_Request, SingularBasis | None], None],
        ranks: Mapping[str, int],
        in_weights_dtype: bool = False,
        is_shown: bool | None = None,
    ) -> None:
        """Calls `use` with each request, and with the full basis if none was in memory."""
        waiting: deque[tuple[_Request, Future]] = deque()

        def finish() -> None:
            request, result = waiting.popleft()
            with _computing_basis_of(request.name):
                full = self._finish(request, *result.result())
            use(request, full)

        workers = min(torch.get_num_threads(), MOST_WORKERS, len(weights))
        progress = self._progress(len(weights), is_shown)
        with self._lock, progress, SideBySide(workers) as threads:
            for name, weight_of in weights.items():
                with _computing_basis_of(name):
                    weight = weight_of()
                    dtype = weight.dtype if in_weights_dtype else None
                    request = self._request(name, weight, ranks.get(name), dtype)
                if request.is_in_memory:
                    use(request, None)
                    progress.step()
                    continue
                is_small = weight.device.type == "cpu" and min(weight.shape) <= SIDE_BY_SIDE
                submit = threads.submit if is_small else completed
                waiting.append((request, submit(self._read_or_compute, request, weight, progress)))
                if len(waiting) > 2 * workers:
                    finish()
            while waiting:
                finish()

    def _progress(self, total: int, is_shown: bool | None) -> _Progress:
        kept = f"kept in {self.cache_dir}" if self._disk.limit else f"not kept on disk, because {LIMIT} is 0"
        return _Progress(total, kept, is_shown)

    def _request(
        self,
        name: str,
        weight: Weight,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> _Request:
        _check_weight(weight)
        rank = _checked_rank(rank, min(weight.shape))
        cast_to = (dtype or at_least_float32(weight.dtype), torch.device(device or weight.device))
        return _Request(name, self._entry(name, weight), rank, cast_to)

    def _read_or_compute(self, request: _Request, weight: Weight, progress: _Progress) -> tuple[SingularBasis, bool]:
        """The full basis, on the CPU, and whether it was computed; runs in any thread."""
        with _computing_basis_of(request.name):
            matrix = weight.values() if isinstance(weight, QuantizedMatrix) else dequantized(weight)
            entry = request.entry
            tensors = self._disk.read(entry.digest, matrix)
            if tensors is not None:
                basis = SingularBasis(tensors["vectors"], tensors["values"], side_of(*matrix.shape))
            else:
                progress.begin(min(matrix.shape), entry.is_changed)
                basis = compute_basis(matrix).to(at_least_float32(weight.dtype), "cpu")
            progress.step()
            return basis, tensors is None

    def _finish(self, request: _Request, full: SingularBasis, is_computed: bool) -> SingularBasis:
        entry = request.entry
        if is_computed and (entry.is_changed or not self._save(entry.digest, full)):
            entry.unsaved = full
        return full

    def _save(self, digest: str, basis: SingularBasis) -> bool:
        return self._disk.write(digest, {"vectors": basis.vectors, "values": basis.values})

    def _entry(self, name: str, weight: Weight) -> _Entry:
        entry = self._entries.get(name)
        stamp = (stamp_of(weight), weight.shape, weight.dtype, weight.device)
        # A new tensor in the memory of a freed one may have the same stamp.
        if entry is not None and entry.stamp == stamp and entry.weight() is weight:
            return entry
        content = weight.values() if isinstance(weight, QuantizedMatrix) else portable(weight)
        digest = digest_of({"weight": content})
        if entry is None or entry.digest != digest:
            form = (weight.shape, weight.dtype)
            is_changed = entry is not None and entry.form == form
            entry = self._entries[name] = _Entry(digest, form, is_changed=is_changed)
        elif entry.stamp and entry.stamp[-1] != weight.device:
            entry.casts.clear()  # the model has moved to another device
        entry.stamp, entry.weight = stamp, weakref.ref(weight)
        return entry


def _same(weight: Weight) -> Weight:
    return weight


__all__ = [
    "SingularBases",
    "SingularBasis",
    "at_least_float32",
    "compute_basis",
    "side_of",
]
