"""Singular bases of weights: the singular vectors on a weight's narrow side, computed once for each content.

`expert_linear_mambaformer` computes linear modules with them; here they are computed, kept in memory and on disk.
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
from typing import Any

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

# Matrices up to this size are computed side by side, one thread each; larger ones one by one on all threads.
SIDE_BY_SIDE = 2048
MOST_WORKERS = 8
# Narrow sides cubed, added up: less takes about a second at most, and is done without a line in the log or a bar.
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
        """The first `rank` directions, as views. Errors: ValueError for a rank that the basis does not have."""
        if _checked_rank(rank, self.rank) == self.rank:
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

    Up to float32 it is the eigenvectors of W^T W in float64, where squares of float32 singular values keep more digits
    than an SVD in float32 has, in less time. For float64 the long side is first reduced to a triangle with the same
    singular values and narrow-side vectors (QR, block by block: TSQR, Demmel et al., UCB/EECS-2008-74). Either way
    memory stays near that of an n x n decomposition. Errors: ValueError for a weight or rank that has no basis.
    """
    _check_weight(weight)
    side = side_of(*weight.shape)
    tall = weight.detach() if side == "input" else weight.detach().mT  # (long, n)
    rank = _checked_rank(rank, tall.shape[1])
    values, vectors = (_of_triangle if tall.dtype == torch.float64 else _of_gram)(tall)
    dtype = at_least_float32(weight.dtype)
    # By columns first: a cut and a whole basis then hold the same numbers.
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


def _check_weight(weight: Tensor):
    if weight.ndim != 2 or not weight.numel() or not weight.is_floating_point() or weight.is_meta:
        raise ValueError(
            f"A singular basis needs a floating-point weight (out, in), got {weight.dtype} of shape "
            f"{tuple(weight.shape)} on {weight.device}: load the model without quantization, or "
            "quantized by torchao, bitsandbytes or quanto."
        )


def _checked_rank(rank: int | None, most: int) -> int:
    rank = most if rank is None else rank
    if not 1 <= rank <= most:
        raise ValueError(f"`rank` must be between 1 and min(in, out) = {most}, got {rank}.")
    return rank


class _NoBasis(ValueError):
    """Names the module, and why its weight has no singular basis."""


@contextmanager
def _undisturbed(name: str):
    """Errors name the module, and bases made while only inferring can still be trained through later."""
    with torch.inference_mode(False), torch.no_grad():
        try:
            yield
        except _NoBasis:
            raise
        except ValueError as error:
            raise _NoBasis(f"There is no singular basis for `{name}`. {error}") from error


@dataclass
class _Entry:
    """What is known of one weight: its content's digest and the bases in memory."""

    digest: str
    form: tuple  # shape and dtype
    stamp: tuple = ()
    weight: Callable[[], Tensor | None] = field(default=lambda: None)
    casts: dict[tuple, SingularBasis] = field(default_factory=dict)
    unsaved: SingularBasis | None = None  # the whole basis, only where it is not on disk
    is_changed: bool = False  # it had other numbers before: it is being trained


@dataclass
class _Request:
    """A basis that was asked for: of which content, how much of it, and in which form."""

    name: str
    entry: _Entry
    rank: int
    cast_to: tuple[torch.dtype, torch.device]
    whole: Future | None = None  # of the whole basis and whether it was computed

    @property
    def is_in_memory(self) -> bool:
        basis = self.entry.casts.get(self.cast_to)
        return self.entry.unsaved is not None or (basis is not None and basis.rank >= self.rank)

    def from_memory(self) -> SingularBasis | None:
        basis = self.entry.casts.get(self.cast_to)
        if basis is not None and basis.rank >= self.rank:
            return basis.cut(self.rank)
        return None if self.entry.unsaved is None else self.keep(self.entry.unsaved)

    def keep(self, whole: SingularBasis) -> SingularBasis:
        basis = self.entry.casts[self.cast_to] = whole.cut(self.rank).to(*self.cast_to)
        return basis


class _Progress:
    """One line in the log and a bar, from the first basis on that has to be computed.

    `is_shown`: of the bar; `None` shows it where the line is written, if the work may take more than about a second.
    """

    def __init__(self, total: int, kept: str, is_shown: bool | None):
        self.total, self.done, self.kept, self.is_shown = total, 0, kept, is_shown
        self.is_told = False
        self.bar: Any = None
        self.lock = threading.Lock()

    def begin(self, size: int, is_changed: bool) -> None:
        """Called before a basis (`size`, `size`) is computed; `is_changed`: not for the first time in this process."""
        with self.lock:
            most = self.total - self.done
            # Asked each time: the first weights may be small ones.
            is_long = most * size**3 > WORTH_TELLING and not is_changed
            if is_long and not self.is_told:
                self.is_told = True
                logger.warning(
                    "Computing the singular bases of up to %d weights for expert vectors, once for these weights: "
                    "they are %s.",
                    most,
                    self.kept,
                )
            if self.bar is None and (is_long if self.is_shown is None else self.is_shown):
                is_terminal = sys.stderr is not None and sys.stderr.isatty()
                interval = 0.1 if is_terminal else 5.0  # seconds; in a file every step would be a line
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

    A weight that is changed in place or replaced gets a new basis at the next `get`; a change through `weight.data`
    leaves no trace, and is seen after `look_again`. Bases of changed weights stay off the disk unless `prepare` asks
    for them: training changes all of them at each step. Safe to share between threads.

    Args:
        cache_dir: folder of the disk cache, by default `cache_folder("singular_bases")`. A folder that cannot be
            written only costs time. `$MAMBAFORMER_BASES_GB` limits its size.
    """

    def __init__(self, cache_dir: str | os.PathLike | None = None):
        self.cache_dir = cache_folder("singular_bases") if cache_dir is None else Path(cache_dir).expanduser()
        self._entries: dict[str, _Entry] = {}
        self._lock = threading.RLock()
        self._disk = BasisFolder(self.cache_dir)
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
            request = self._request(name, weight, rank, dtype, device)
            basis = request.from_memory()
            if basis is None:
                with self._progress(1, False) as progress:
                    basis = request.keep(self._finish(request, *self._find(request, weight, progress)))
            return basis

    def get_all(
        self,
        weights: Mapping[str, Callable[[], Tensor]],
        ranks: Mapping[str, int] | None = None,
        in_weights_dtype: bool = False,
    ) -> dict[str, SingularBasis]:
        """All of `get`; what is missing is computed side by side, and long work is told in the log and by a bar.

        Args:
            weights: gives a weight when it is called: once, in order, so that not all have to be in memory.
            ranks: how many directions of each; default: all.
            in_weights_dtype: bases in the dtype of their weights instead of float32.
        """
        bases: dict[str, SingularBasis] = {}
        self.visit_all(weights, bases.__setitem__, ranks, in_weights_dtype)
        return bases

    def visit_all(
        self,
        weights: Mapping[str, Callable[[], Tensor]],
        visit: Callable[[str, SingularBasis], None],
        ranks: Mapping[str, int] | None = None,
        in_weights_dtype: bool = False,
    ) -> None:
        """`get_all` for a function of name and basis, called while the processor's caches still hold the weight."""

        def use(request: _Request, whole: SingularBasis | None) -> None:
            with _undisturbed(request.name):
                basis = request.from_memory() if whole is None else request.keep(whole)
            visit(request.name, basis)

        self._each(weights, use, ranks or {}, in_weights_dtype)

    def prepare(self, named_weights: Mapping[str, Tensor | Callable[[], Tensor]], progress: bool | None = None):
        """Compute the bases that are neither on disk nor in memory, and keep them on disk, so that `get` is quick.

        `progress`: a bar; default: only if something is to be computed.
        """
        weights = {name: given if callable(given) else partial(_same, given) for name, given in named_weights.items()}

        def use(request: _Request, whole: SingularBasis | None) -> None:
            entry = request.entry
            with _undisturbed(request.name):
                if entry.unsaved is not None and self._save(entry.digest, entry.unsaved):
                    entry.unsaved = None

        self._each(weights, use, {}, is_shown=True if progress is None else progress)

    def _each(
        self,
        weights: Mapping[str, Callable[[], Tensor]],
        use: Callable[[_Request, SingularBasis | None], None],
        ranks: Mapping[str, int],
        in_weights_dtype: bool = False,
        is_shown: bool | None = None,
    ) -> None:
        """Calls `use` with each request, and with the basis if it was not in memory."""
        waiting: deque[_Request] = deque()

        def finish() -> None:
            request = waiting.popleft()
            with _undisturbed(request.name):
                whole = self._finish(request, *request.whole.result())
            use(request, whole)

        workers = min(torch.get_num_threads(), MOST_WORKERS, len(weights))
        progress = self._progress(len(weights), is_shown)
        with self._lock, progress, SideBySide(workers) as threads:
            for name, weight_of in weights.items():
                with _undisturbed(name):
                    weight = weight_of()
                    dtype = weight.dtype if in_weights_dtype else None
                    request = self._request(name, weight, ranks.get(name), dtype)
                if request.is_in_memory:
                    use(request, None)
                    progress.step()
                    continue
                is_small = weight.device.type == "cpu" and min(weight.shape) <= SIDE_BY_SIDE
                request.whole = (threads.submit if is_small else completed)(self._find, request, weight, progress)
                waiting.append(request)
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
        weight: Tensor,
        rank: int | None = None,
        dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
    ) -> _Request:
        _check_weight(weight)
        rank = _checked_rank(rank, min(weight.shape))
        cast_to = (dtype or at_least_float32(weight.dtype), torch.device(device or weight.device))
        return _Request(name, self._entry(name, weight), rank, cast_to)

    def _find(self, request: _Request, weight: Tensor, progress: _Progress) -> tuple[SingularBasis, bool]:
        """The whole basis, on the CPU, and whether it was computed; runs in any thread."""
        with _undisturbed(request.name):
            is_of_module = isinstance(weight, QuantizedMatrix)
            matrix, entry = weight.values() if is_of_module else dequantized(weight), request.entry
            tensors = self._disk.read(entry.digest, matrix)
            if tensors is not None:
                basis = SingularBasis(tensors["vectors"], tensors["values"], side_of(*matrix.shape))
            else:
                progress.begin(min(matrix.shape), entry.is_changed)
                basis = compute_basis(matrix).to(at_least_float32(weight.dtype), "cpu")
            progress.step()
            return basis, tensors is None

    def _finish(self, request: _Request, whole: SingularBasis, is_computed: bool) -> SingularBasis:
        entry = request.entry
        if is_computed and (entry.is_changed or not self._save(entry.digest, whole)):
            entry.unsaved = whole
        return whole

    def _save(self, digest: str, basis: SingularBasis) -> bool:
        return self._disk.write(digest, {"vectors": basis.vectors, "values": basis.values})

    def _entry(self, name: str, weight: Tensor) -> _Entry:
        entry = self._entries.get(name)
        stamp = (stamp_of(weight), weight.shape, weight.dtype, weight.device)
        # The stamp alone could come back: a new tensor may be put where a freed one was.
        if entry is not None and entry.stamp == stamp and entry.weight() is weight:
            return entry
        content = weight.values() if isinstance(weight, QuantizedMatrix) else portable(weight)
        digest = digest_of({"weight": content})
        if entry is None or entry.digest != digest:
            form = (weight.shape, weight.dtype)
            is_changed = entry is not None and entry.form == form
            entry = self._entries[name] = _Entry(digest, form, is_changed=is_changed)
        elif entry.stamp and entry.stamp[-1] != weight.device:
            entry.casts.clear()  # the model has moved, and takes its bases along
        entry.stamp, entry.weight = stamp, weakref.ref(weight)
        return entry


def _same(weight: Tensor) -> Tensor:
    return weight


__all__ = [
    "SingularBases",
    "SingularBasis",
    "at_least_float32",
    "compute_basis",
    "side_of",
]
