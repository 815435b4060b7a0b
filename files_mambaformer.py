"""Files of tensors: written atomically, tied to their content by a checksum, never unpickled.

Expert vectors, singular bases and sessions are such files: safetensors with a header that names format and version.
"""

import errno
import hashlib
import json
import os
import shutil
import stat
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

from .files_header_mambaformer import check_table, json_of, strings_of

try:
    import fcntl
except ImportError:  # not a POSIX system
    fcntl = None

PICKLE_STARTS = (b"PK", b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05")
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library
MOST_LINKS = 40  # symbolic links in a path, as on Linux


def cache_folder(kind: str) -> Path:
    """The folder of files that can be computed again: `$MAMBAFORMER_CACHE/{kind}`, by default in Hugging Face's home.

    Raises:
        FileNotFoundError: the path names the home of an unknown user.
    """
    root = os.environ.get("MAMBAFORMER_CACHE") or Path(hub_constants.HF_HOME, "mambaformer")
    try:
        return Path(root, kind).expanduser()
    except RuntimeError as error:
        raise FileNotFoundError(errno.ENOENT, "the system knows no such user", str(root)) from error


# ---- trust


@contextmanager
def private_folder(folder: Path, is_made: bool = True) -> Iterator[Path]:
    """A folder that only this user and root can write, by a path that stays valid if its name is reassigned.

    A missing folder is made for this user alone (0700) if `is_made`; an existing folder is not changed. Systems
    without POSIX owners check nothing.

    Raises:
        PermissionError: other users could write files there; the message says what to change. Nothing was written.
        OSError: the folder is missing or cannot be made.
    """
    if not hasattr(os, "geteuid"):
        if is_made:
            folder.mkdir(parents=True, exist_ok=True)
        yield folder
        return
    if is_made:
        folder.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            folder.mkdir(0o700)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        _check_folder(folder, os.fstat(descriptor))
        # The descriptor leads to the folder that was checked; its name may lead to another folder by now.
        pinned = Path(f"/proc/self/fd/{descriptor}")
        yield pinned if pinned.is_dir() else folder
    finally:
        os.close(descriptor)


def check_private_file(path: Path, about: os.stat_result) -> None:
    """Raises `PermissionError` unless a file belongs to this user or root and no one else can write it.

    `about` is the `os.fstat` of the opened file, because its name may lead to another file later.
    """
    if not hasattr(os, "geteuid"):
        return
    if not stat.S_ISREG(about.st_mode):
        raise PermissionError(f"{path} is not a regular file: remove it.")
    _check_owner(path, about)


def _check_folder(folder: Path, about: os.stat_result) -> None:
    _check_owner(folder, about)
    for passed in _folders_and_links_of(folder):
        mode = passed.lstat().st_mode
        # Others can rename files in such a folder, unless it has the sticky bit, as /tmp has.
        if stat.S_ISDIR(mode) and mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
            raise PermissionError(
                f"every user can replace files in {passed}, so {folder} is not trusted: run `chmod o-w {passed}`, "
                "or set MAMBAFORMER_CACHE to a folder of your own"
            )


def _check_owner(path: Path, about: os.stat_result) -> None:
    if about.st_uid not in (0, os.geteuid()):
        raise PermissionError(
            f"{path} belongs to another user (id {about.st_uid}), so its files are not trusted: remove it, or set "
            "MAMBAFORMER_CACHE to a folder of your own"
        )
    if about.st_mode & (stat.S_IWGRP | stat.S_IWOTH):
        raise PermissionError(
            f"other users can write {path} (mode {stat.S_IMODE(about.st_mode):o}), so its content is not trusted: "
            "remove it, and it is made again, or set MAMBAFORMER_CACHE to a folder of your own"
        )


def _folders_and_links_of(path: Path) -> Iterator[Path]:
    """Every folder and link on the way from the root to `path`, and `path` itself."""
    at = Path(path.absolute().anchor)
    parts, links = list(reversed(path.absolute().parts[1:])), 0
    yield at
    while parts:
        part = parts.pop()
        if part == "..":
            at = at.parent
            continue
        at = at / part
        yield at
        if at.is_symlink():
            links += 1
            if links > MOST_LINKS:
                raise PermissionError(f"{path} passes more than {MOST_LINKS} symbolic links")
            target = Path(os.readlink(at))
            at = Path(target.anchor) if target.is_absolute() else at.parent
            parts += reversed(target.parts[1:] if target.is_absolute() else target.parts)


# ---- writing


def write_tensors(path: Path, tensors: Mapping[str, Tensor], header: Mapping[str, str]) -> None:
    """Writes a safetensors file, atomically."""
    write_atomically(path, to_safetensors(dict(tensors), dict(header)))


def write_atomically(path: Path, data: bytes) -> None:
    """Writes a file, which holds its old content or all of the new content if an error interrupts.

    A process that is killed leaves a hidden temporary file; the next write to the same path removes it.

    Raises:
        OSError: names `path`, or the missing folder.
    """
    if not path.parent.is_dir():
        raise FileNotFoundError(errno.ENOENT, "There is no such folder, make it first", str(path.parent))
    if path.is_dir():
        raise IsADirectoryError(errno.EISDIR, "Is a folder, give the name of a file in it", str(path))
    with _naming_in_errors(path), temporary_for(path) as temporary:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        with suppress(OSError):  # a private file stays private
            shutil.copymode(path, temporary)
        os.replace(temporary, path)
    _sync_folder(path.parent)


@contextmanager
def _naming_in_errors(path: Path) -> Iterator[None]:
    """Errors of the system name `path` instead of a temporary file, or of no file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:
            raise
        raise OSError(error.errno, error.strerror, str(path)) from error


@contextmanager
def temporary_for(path: Path) -> Iterator[Path]:
    """A new file in the folder of `path`, locked while its writer lives, and removed afterwards."""
    mark = hashlib.sha256(path.name.encode()).hexdigest()[:16]  # a name may be as long as the file system allows
    for file in path.parent.glob(f".{mark}-*.tmp"):
        _remove_if_abandoned(file)
    temporary, descriptor = _locked_file(path.parent, mark)
    try:
        yield temporary
    finally:
        os.close(descriptor)
        temporary.unlink(missing_ok=True)


def remove_abandoned(folder: Path) -> None:
    """Removes the temporary files of all writers that were killed."""
    for file in folder.glob(f".{'?' * 16}-*.tmp"):
        _remove_if_abandoned(file)


def _locked_file(folder: Path, mark: str) -> tuple[Path, int]:
    while True:
        temporary = folder / f".{mark}-{uuid.uuid4().hex}.tmp"
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_RDWR, 0o666)
        if fcntl is not None:
            with suppress(OSError):  # a file system without locks, on which no file counts as abandoned
                fcntl.flock(descriptor, fcntl.LOCK_EX)
        if os.fstat(descriptor).st_nlink:
            return temporary, descriptor
        os.close(descriptor)  # another writer removed it before it was locked


def _remove_if_abandoned(temporary: Path) -> None:
    if fcntl is None:
        return
    with suppress(OSError):  # a lock means that its writer lives; the file may also have been renamed or removed
        descriptor = os.open(temporary, os.O_RDWR)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            temporary.unlink(missing_ok=True)
        finally:
            os.close(descriptor)


def _sync_folder(folder: Path) -> None:
    with suppress(OSError):  # not every system supports it
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


# ---- reading


def read_tensors(
    path: Path, file_format: str, version: int, save_again: str, oldest: int | None = None
) -> tuple[dict[str, Tensor], dict]:
    """Tensors (copies, on the CPU) and header of a file of `file_format` and `version`.

    Args:
        save_again: the call that writes a file of this format, for messages about other files.
        oldest: the first version that is read too; by default only `version` is.

    Raises:
        ValueError: the file is damaged, or of another format or version.
        OSError: the file is missing or may not be read.
    """
    if path.is_dir():
        raise ValueError(f"{path} is a folder: pass one file.")
    try:
        with open(path, "rb") as file:  # opened once: it may be replaced while it is read
            table, header, start = _read_header(file)
            _check_header(path, header, file_format, range(oldest or version, version + 1), save_again)
            _check_sizes(table, os.fstat(file.fileno()).st_size - start)
            file.seek(0)
            return from_safetensors(file.read()), header
    except (SafetensorError, _NotSafetensors) as error:
        raise _described(path, error, save_again) from error
    except MemoryError as error:
        raise ValueError(f"{path} does not fit into memory: pass a file that {save_again} wrote.") from error


class _NotSafetensors(Exception):
    """A file whose start is not that of a safetensors file."""


def _read_header(file: BinaryIO) -> tuple[dict, dict[str, str], int]:
    """The table of tensors, the metadata, and the byte where the tensors start."""
    start = file.read(8)
    size = int.from_bytes(start, "little")
    if len(start) < 8 or size > MAX_HEADER_BYTES:
        raise _NotSafetensors("it has no header")
    try:
        table = json_of(file.read(size))
        return table, strings_of(table), 8 + size
    except ValueError as error:
        raise _NotSafetensors(f"its header cannot be read: {error}") from error


def _check_sizes(table: dict, num_bytes: int) -> None:
    try:
        check_table(table, num_bytes)
    except ValueError as error:
        raise _NotSafetensors(str(error)) from error


def _described(path: Path, error: Exception, save_again: str) -> ValueError:
    with open(path, "rb") as file:
        is_pickle = file.read(4).startswith(PICKLE_STARTS)
    if is_pickle:
        return ValueError(
            f"{path} is a pickle or torch.save file, which can run code when it is opened: load it where you trust "
            f"it, and save it with {save_again}."
        )
    return ValueError(
        f"{path} is not a complete safetensors file ({error}): it is damaged or cut short, fetch or save it again."
    )


def _check_header(path: Path, header: Mapping[str, str], file_format: str, versions: range, save_again: str) -> None:
    if header.get("format") != file_format:
        raise ValueError(
            f"{path} is a safetensors file, but not of format {file_format!r} (its header says "
            f"{header.get('format')!r}): pass a file that {save_again} wrote."
        )
    version, newest = header.get("version", ""), versions[-1]
    is_number = version.isdecimal() and len(version) < 10
    if is_number and int(version) > newest:
        raise ValueError(
            f"{path} has version {version} of format {file_format!r}, and this mambaformer reads versions up to "
            f"{newest}: upgrade mambaformer."
        )
    if version not in map(str, versions):
        raise ValueError(f"{path} has the unknown version {version!r} of format {file_format!r}: save it again.")


# ---- content


def digest_of(tensors: Mapping[str, Tensor], header: Mapping[str, str] | None = None) -> str:
    """Hex SHA-256 of tensors (names, dtypes, shapes, bytes) and of a header without its `"checksum"`."""
    digest = hashlib.sha256()
    for key, value in sorted((header or {}).items()):
        if key != "checksum":
            digest.update(json.dumps([key, value]).encode())
    for name, tensor in sorted(tensors.items()):
        for path, part in _plain_parts(name, tensor.detach()):
            digest.update(json.dumps([path, str(part.dtype), list(part.shape)]).encode())
            digest.update(part.cpu().contiguous().reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _plain_parts(name: str, tensor: Tensor) -> Iterator[tuple[str, Tensor]]:
    """A tensor itself, or the tensors that it wraps if it is quantized or sharded."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        yield name, tensor
        return
    for attribute in flatten()[0]:
        yield from _plain_parts(f"{name}.{attribute}", getattr(tensor, attribute))


def with_checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """The header with a checksum over itself and the tensors."""
    return {**header, "checksum": digest_of(tensors, header)}


def has_valid_checksum(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> bool:
    """Whether header and tensors have the checksum that the header names."""
    return header.get("checksum") == digest_of(tensors, header)


__all__ = [
    "check_private_file",
    "digest_of",
    "has_valid_checksum",
    "private_folder",
    "read_tensors",
    "remove_abandoned",
    "with_checksum",
    "write_tensors",
]
