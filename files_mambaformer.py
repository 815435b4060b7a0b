"""Files of tensors: written whole or not at all, tied to their content by a checksum, never unpickled.

Experts, singular bases and sessions are such files: safetensors with a header that names format and version.
"""

import hashlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO

import torch
from huggingface_hub import constants as hub_constants
from safetensors import SafetensorError
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library


def cache_folder(kind: str) -> Path:
    """Where what can be made again is kept: `$MAMBAFORMER_CACHE/{kind}`, by default in Hugging Face's home."""
    root = os.environ.get("MAMBAFORMER_CACHE") or Path(hub_constants.HF_HOME, "mambaformer")
    return Path(root, kind).expanduser()


# ----------------------------------------------------------------------------------------------------------- writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Puts a safetensors file at `path`, as `write_whole` does."""
    write_whole(path, to_safetensors(dict(tensors), dict(header)))


def write_whole(path: Path, data: bytes) -> None:
    """Puts a file at `path`, which holds its old content or all of the new, whatever fails in between.

    A process that is killed leaves a hidden temporary file; the next write to the same path removes it.
    """
    with temporary_beside(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):  # a file that was made private stays so
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    _sync_folder(path.parent)


@contextmanager
def temporary_beside(path: Path) -> Iterator[Path]:
    """A new file in the folder of `path`, locked while its writer lives, and gone afterwards."""
    mark = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # a name may be as long as the file system allows
    for left in path.parent.glob(f".{mark}-*.tmp"):
        _remove_if_abandoned(left)
    temporary, descriptor = _locked_file(path.parent, mark)
    try:
        yield temporary
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def _locked_file(folder: Path, mark: str) -> tuple[Path, int]:
    while True:
        temporary = folder / f".{mark}-{uuid.uuid4().hex}.tmp"
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks; then nothing is ever taken for abandoned
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another write took it for abandoned before it was locked


def _remove_if_abandoned(temporary: Path) -> None:
    if fcntl is None:
        return
    with suppress(OSError):  # it is locked, so its writer lives; or it has just been renamed or removed
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system can
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ----------------------------------------------------------------------------------------------------------- reading


def read_tensors(path: Path, file_format: str, version: int, save_again: str) -> tuple[dict[str, Tensor], dict]:
    """Tensors (copies, on the CPU) and header of a file of `file_format`, up to `version`.

    Args:
        save_again: how a file of this format is written, for the message about a pickle.

    Raises:
        ValueError: anything else than a whole file of this format and version.
        OSError: it is missing or may not be read.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass one file.")
    try:
        with open(path, "rb") as file:  # opened once: it may be replaced while it is read
            header = _read_header(file)
            _check_header(path, header, file_format, version)
            file.seek(0)
            return from_safetensors(file.read()), header
    except (SafetensorError, _NotSafetensors, KeyError) as error:  # KeyError: a dtype that PyTorch does not have
        raise _described(path, error, save_again) from error


class _NotSafetensors(Exception):
    """A file that does not begin as a safetensors file does."""


def _read_header(file: BinaryIO) -> dict[str, str]:
    start = file.read(8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > MAX_HEADER_BYTES:
        raise _NotSafetensors("it has no header")
    try:
        found = json.loads(file.read(size)).get("__metadata__", {})
        if not all(isinstance(value, str) for value in found.values()):
            raise _NotSafetensors("its header is not one of strings")
    except (ValueError, AttributeError, RecursionError) as error:
        raise _NotSafetensors(f"its header is no JSON object: {error}") from error
    return found


def _described(path: Path, error: Exception, save_again: str) -> ValueError:
    with open(path, "rb") as file:
        is_pickle = file.read(4).startswith(PICKLE_STARTS)
    if is_pickle:
        return ValueError(
            f"{path} is a pickle or torch.save file, which can run code when it is opened: load it where you trust "
            f"it, and write it with {save_again}."
        )
    return ValueError(
        f"{path} is not a whole safetensors file ({error}): it is damaged or cut short, fetch or save it again."
    )


def _check_header(path: Path, header: Mapping[str, str], file_format: str, newest: int) -> None:
    if header.get("format") != file_format:
        raise ValueError(
            f"{path} is a safetensors file, but not of format {file_format!r} (its header says "
            f"{header.get('format')!r}): pass a file that {file_format!r} names."
        )
    version = header.get("version", "")
    if version.isdecimal() and int(version) > newest:
        raise ValueError(
            f"{path} has version {version} of format {file_format!r}, newer than {newest}, the newest that is "
            "understood here: upgrade mambaformer."
        )
    if version != str(newest):
        raise ValueError(f"{path} has the unknown version {version!r} of format {file_format!r}: save it again.")


# ----------------------------------------------------------------------------------------------------------- content


def digest_of(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> str:
    """Hex SHA-256 of tensors (names, dtypes, shapes, bytes) and of all of a header but its `"checksum"`."""
    digest = hashlib.sha256()
    for key, value in sorted((header or {}).items()):
        if key != "checksum":
            digest.update(json.dumps([key, value]).encode())
    for name, tensor in sorted(tensors.items()):
        for path, part in _plain_parts(name, tensor.detach()):
            digest.update(json.dumps([path, str(part.dtype), list(part.shape)]).encode())
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def _plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor itself, or the ones that a wrapper (quantized, sharded) is made of."""
    if not hasattr(tensor, "__tensor_flatten__"):
        yield name, tensor
        return
    for attribute in tensor.__tensor_flatten__()[0]:
        yield from _plain_parts(f"{name}.{attribute}", getattr(tensor, attribute))


def sealed(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header with a checksum over itself and the tensors."""
    return {**header, "checksum": digest_of(tensors, header)}


def is_sealed(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether header and tensors are what was sealed."""
    return header.get("checksum") == digest_of(tensors, header)


__all__ = ["digest_of", "is_sealed", "read_tensors", "sealed", "write_tensors"]
