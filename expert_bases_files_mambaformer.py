"""The folder of singular bases on disk: a cache of bounded size, whose files are checked when they are read.

Unlike the folder of compiled kernels it may be shared between users: a file holds numbers, not code, and is used only
if it passes a test of being the basis of the weight.
"""

import logging
import math
import os
import re
import stat
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor

from .files_mambaformer import has_valid_checksum, read_tensors, remove_abandoned, with_checksum, write_tensors

logger = logging.getLogger(__name__)

BASIS_FORMAT = "mambaformer.singular_basis"
FORMAT_VERSION = 2  # 1: vectors computed in float32
LIMIT = "MAMBAFORMER_BASES_GB"
USUAL_LIMIT = "4"
MOST_HEADER_BYTES = 1024
# After this part of the limit has been written the folder is measured again, for other processes write there too.
PART_BETWEEN_MEASUREMENTS = 1 / 16
NAME = re.compile(r"[0-9a-f]{64}\.safetensors")  # other files in the folder stay

PROBES = 4
TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-10}  # float32 vectors are rounded by up to 6e-8
ROWS_AT_A_TIME = 8192


def limit_in_bytes() -> int:
    """The size that `$MAMBAFORMER_BASES_GB` (default 4) allows for singular bases on disk; 0 writes none.

    Raises:
        ValueError: the variable is not a number of at least 0.
    """
    text = os.environ.get(LIMIT) or USUAL_LIMIT
    try:
        gigabytes = float(text)
    except ValueError:
        gigabytes = math.nan
    if not 0 <= gigabytes < math.inf:
        raise ValueError(
            f"{LIMIT}={text!r} is not a size in gigabytes: set it to a number such as {USUAL_LIMIT}, or 0."
        )
    return int(gigabytes * 1e9)


class BasisFolder:
    """Singular bases by the digest of their weight; at the limit, the least recently used files are removed.

    Args:
        path: the folder. If it cannot be written, bases are computed again in each process.
        limit: total size of all files in bytes, by default `limit_in_bytes()`. Each process that writes may exceed it
            by a sixteenth.
    """

    def __init__(self, path: Path, limit: int | None = None):
        self.path = path
        self.limit = limit_in_bytes() if limit is None else limit
        self._is_writable = self.limit > 0
        self._room = 0

    def path_of(self, digest: str) -> Path:
        return self.path / f"{digest}.safetensors"

    def read(self, digest: str, weight: Tensor) -> dict[str, Tensor] | None:
        """`vectors` (n, n) and `values` (n,) of a `weight` (out, in); `None` if there is no valid file."""
        path = self.path_of(digest)
        try:
            if not _may_be_read(path, weight):
                return None
            tensors, header = read_tensors(path, BASIS_FORMAT, FORMAT_VERSION, "`prepare_expert_vectors`")
        except (OSError, ValueError):
            return None
        # The header names the weight too, so that a renamed file is not used.
        if header.get("weight") != digest or not has_valid_checksum(header, tensors):
            return None
        if not is_basis_of(tensors, weight):
            return None
        with suppress(OSError):  # the file may belong to another user
            os.utime(path)  # not every file system keeps times of access
        return tensors

    def write(self, digest: str, tensors: Mapping[str, Tensor]) -> bool:
        """Writes a basis; returns whether it is on disk."""
        size = sum(tensor.nbytes for tensor in tensors.values()) + MOST_HEADER_BYTES
        if not self._is_writable or size > self.limit:
            return False
        header = {"format": BASIS_FORMAT, "version": str(FORMAT_VERSION), "weight": digest}
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            if self._room < size:
                self._make_room(size)
            write_tensors(self.path_of(digest), tensors, with_checksum(header, tensors))
            self._room -= size
        except OSError as error:
            self._is_writable = False
            logger.warning(
                "Singular bases cannot be kept in %s (%s) and will be computed again in the next process: set "
                "MAMBAFORMER_CACHE to a folder that can be written.",
                self.path,
                error,
            )
        return self._is_writable

    def _make_room(self, size: int) -> None:
        remove_abandoned(self.path)
        files = sorted((about.st_mtime_ns, about.st_size, path) for path, about in self._files())
        total = sum(each_size for _, each_size, _ in files)
        for _, each_size, path in files:
            if total + size <= self.limit:
                break
            path.unlink(missing_ok=True)  # another process may remove files too
            total -= each_size
        self._room = max(size, min(self.limit - total, int(self.limit * PART_BETWEEN_MEASUREMENTS)))

    def _files(self) -> list[tuple[Path, os.stat_result]]:
        files = []
        for entry in os.scandir(self.path):
            if NAME.fullmatch(entry.name):
                with suppress(FileNotFoundError):
                    files.append((Path(entry.path), entry.stat(follow_symlinks=False)))
        return files


def _may_be_read(path: Path, weight: Tensor) -> bool:
    """Whether this is a regular file of the size of the basis of `weight`: others could fill the memory, or block."""
    about, narrow = path.stat(), min(weight.shape)
    data = narrow * (narrow + 1) * _dtype_of_basis(weight).itemsize
    return stat.S_ISREG(about.st_mode) and data < about.st_size <= data + MOST_HEADER_BYTES


def _dtype_of_basis(weight: Tensor) -> torch.dtype:
    return torch.float64 if weight.dtype == torch.float64 else torch.float32


def is_basis_of(tensors: Mapping[str, Tensor], weight: Tensor) -> bool:
    """Whether these are `vectors` (n, n) and `values` (n,), descending, on the narrow side of `weight`.

    Orthonormality and the equation of singular vectors, W^T W Q = Q S^2, are tested on random vectors (Freivalds,
    1977): the test reads the weight and the basis once, and no wrong file can be prepared for it. It does not notice
    rotations among directions whose singular values are below a thousandth of the largest.
    """
    narrow, dtype = min(weight.shape), _dtype_of_basis(weight)
    shapes = {name: (tuple(tensor.shape), tensor.dtype) for name, tensor in tensors.items()}
    if shapes != {"vectors": ((narrow, narrow), dtype), "values": ((narrow,), dtype)}:
        return False
    # In float64, because `torch.set_float32_matmul_precision` may reduce the precision of products in float32.
    vectors, values = tensors["vectors"].double(), tensors["values"].double()
    if not (vectors.isfinite().all() and values.isfinite().all() and values[-1] >= 0 and (values.diff() <= 0).all()):
        return False
    seed = int.from_bytes(os.urandom(7), "little")
    probes = torch.randn(
        narrow, PROBES, dtype=torch.float64, device="cpu", generator=torch.Generator().manual_seed(seed)
    )
    probes /= probes.norm(dim=0)
    turned = vectors @ probes
    largest = values[0] if values[0] > 0 else 1.0
    product = _gram_times(weight, turned, largest)
    expected = vectors @ ((values / largest).square()[:, None] * probes)
    errors = torch.cat([vectors.mT @ turned - probes, product - expected], dim=1).norm(dim=0)
    return bool((errors <= TOLERANCE[dtype]).all())


def _gram_times(weight: Tensor, states: Tensor, scale: Tensor | float) -> Tensor:
    """`W^T W x / scale^2` on the narrow side, for `states` x (n, k) in float64 on the CPU."""
    tall = weight.detach() if weight.shape[0] >= weight.shape[1] else weight.detach().mT
    total = torch.zeros_like(states)
    for block in tall.split(ROWS_AT_A_TIME):
        block = block.to("cpu", torch.float64)
        total += block.mT @ ((block @ states) / scale) / scale
    return total


__all__ = ["LIMIT", "BasisFolder", "is_basis_of", "limit_in_bytes"]
