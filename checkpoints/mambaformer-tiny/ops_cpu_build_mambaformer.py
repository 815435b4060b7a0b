"""CPU kernels as shared libraries: compiled at their first use, and kept in a folder.

A model's folder has source, not binaries, so every machine compiles once, in less than a minute, for the instructions
of its processor (as PyTorch reports them). A library is code, so it is only loaded from a folder that no other user
can write. Without a compiler or such a folder PyTorch computes everything, only slower.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import signal
import struct
import subprocess
import tempfile
import threading
from collections.abc import Mapping, Sequence
from functools import lru_cache
from pathlib import Path

import torch

from .files_mambaformer import cache_folder, check_private_file, private_folder, temporary_for

logger = logging.getLogger(__name__)

# With "0", PyTorch computes everything.
SWITCH = "MAMBAFORMER_CPU_KERNELS"
# For tests: checks that the compiler builds into the kernels, such as "address,undefined".
SANITIZERS = "MAMBAFORMER_CPU_SANITIZERS"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w")
# Bytes of a vector and flags, by PyTorch's name of the processor's capability; others get vectors of 16 bytes.
CAPABILITIES = {
    "AVX512": (64, ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")),
    "AVX2": (32, ("-mavx2", "-mfma")),
}
# Apple's compiler has no OpenMP; the kernels then run on one thread.
THREADING = (("-fopenmp",), ())
SECONDS_TO_COMPILE, SECONDS_TO_ANSWER = 300, 30
USUAL_SECONDS = "10 to 30"  # for all kernels, on machines of 2 to 8 cores

_lock = threading.Lock()
_libraries: dict[str, ctypes.CDLL | None] = {}


class _NoKernels(RuntimeError):
    """There are no kernels; the message has the reason and the remedy."""


class _CompilerFailed(_NoKernels):
    """The compiler refused the source; other flags may help."""


def cpu_library(
    source: str, functions: Sequence[str] = (), values: Mapping[str, int] | None = None
) -> ctypes.CDLL | None:
    """The library of C++ `source`, which has these `functions` and whose `interface_value` returns these `values`.

    Returns `None` where kernels are switched off or cannot be had, and logs one warning with the reason.
    """
    if source not in _libraries:
        with _lock:
            if source not in _libraries:
                _libraries[source] = _load_or_compile(source, functions, values or {})
    return _libraries[source]


def _load_or_compile(source: str, functions: Sequence[str], values: Mapping[str, int]) -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        return None
    folder: Path | str = "the folder of kernels"
    try:
        folder = cache_folder("kernels")
        with private_folder(folder) as private:
            return _library_in(private, source, functions, values)
    except _NoKernels as error:
        _warn_once(str(error))
    except OSError as error:  # those of the compiler are `_NoKernels`
        is_of_system = error.errno is not None
        advice = f"{folder} cannot be used ({error}): set MAMBAFORMER_CACHE to a folder that you can write"
        _warn_once(advice if is_of_system else str(error))
    return None


@lru_cache(maxsize=1)
def _warn_once(reason: str) -> None:
    logger.warning(
        "There are no CPU kernels, so PyTorch computes what they would, only slower: %s. %s=0 leaves them out without "
        "this message.",
        reason.rstrip(". "),
        SWITCH,
    )


@lru_cache(maxsize=1)
def _announce() -> None:
    logger.warning(
        "Compiling CPU kernels, which takes %s seconds, once for this machine: they are kept in %s.",
        USUAL_SECONDS,
        cache_folder("kernels"),
    )


def _library_in(folder: Path, source: str, functions: Sequence[str], values: Mapping[str, int]) -> ctypes.CDLL:
    """The library of this source, compiler and processor: the one in `folder`, or a new one that is kept there."""
    compiler, flags = _compiler(), _flags()
    source = f"#define VECTOR_BYTES {_capability()[0]}\n{source}"
    identity = "\n".join((source, _version_of(compiler), platform.machine(), *flags))
    name = _digest(identity.encode())
    for path in folder.glob(f"{name}-*.so"):
        library = _load_library(path, functions, values)
        if isinstance(library, ctypes.CDLL):
            return library
    if hasattr(os, "ST_NOEXEC") and os.statvfs(folder).f_flag & os.ST_NOEXEC:
        raise PermissionError(
            f"{cache_folder('kernels')} is on a file system from which nothing may be executed: set MAMBAFORMER_CACHE "
            "to another folder"
        )
    with temporary_for(folder / name) as temporary:
        content = _compile_library(compiler, source, flags)
        temporary.write_bytes(content)
        temporary.chmod(0o700)
        path = folder / f"{name}-{_digest(content)}.so"
        os.replace(temporary, path)
    library = _load_library(path, functions, values)
    if isinstance(library, str):
        raise _NoKernels(f"`{compiler}` made a library that {library}")
    return library


def _load_library(path: Path, functions: Sequence[str], values: Mapping[str, int]) -> ctypes.CDLL | str:
    """The library, or its fault; a faulty file is removed. Raises `PermissionError` as in `files_`.

    Its name ends in its content, for a process dies of a library that was cut short.
    """
    fault = "cannot be loaded: use another compiler"
    with open(path, "rb") as file:
        check_private_file(cache_folder("kernels") / path.name, os.fstat(file.fileno()))
        content = file.read()
    if path.stem.endswith(f"-{_digest(content)}") and _is_complete(content):
        try:
            # Reports of sanitizers name lines only of a file that is still there under the name it was loaded by.
            library = ctypes.CDLL(str(path.resolve() if os.environ.get(SANITIZERS) else path))
            fault = _disagreement(library, functions, values)
            if not fault:
                return library
        except OSError as error:
            logger.info("%s cannot be loaded: %s", path.name, error)
    path.unlink(missing_ok=True)
    return fault


def _disagreement(library: ctypes.CDLL, functions: Sequence[str], values: Mapping[str, int]) -> str:
    """The first difference between a library and the interface that Python declares; empty if there is none."""
    for function in functions:
        if not hasattr(library, function):
            return f"lacks functions, {function} for one: use another compiler"
    for name, expected in values.items():
        library.interface_value.argtypes, library.interface_value.restype = [ctypes.c_char_p], ctypes.c_int64
        found = library.interface_value(name.encode())
        if found != expected:
            return (
                f"disagrees with Python about {name} ({found}, not {expected}): its code is of two versions, so load "
                "or install it again"
            )
    return ""


def _is_complete(library: bytes) -> bool:
    """Whether an ELF file has all that its program headers map: reading beyond its end kills a process (SIGBUS)."""
    if not library.startswith(b"\x7fELF\x02\x01"):  # 64 bits, little-endian; others are left to the loader
        return True
    try:
        (start,), (size, count) = struct.unpack_from("<Q", library, 32), struct.unpack_from("<HH", library, 54)
        headers = [struct.unpack_from("<IIQQQQ", library, start + size * i) for i in range(count)]
    except struct.error:
        return False
    return all(offset + in_file <= len(library) for _, _, offset, _, _, in_file in headers)


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


# -------------------------------------------------------------------------------------------------------- the compiler


def _capability() -> tuple[int, tuple[str, ...]]:
    return CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), (16, ()))


def _flags() -> tuple[str, ...]:
    checks = os.environ.get(SANITIZERS)
    if not checks:
        return (*FLAGS, *_capability()[1])
    reports = ("-O1", "-g", "-fno-omit-frame-pointer", f"-fsanitize={checks}", "-fno-sanitize-recover=all")
    return (*FLAGS, *_capability()[1], *reports)


def _compiler() -> str:
    for name in (os.environ.get("CXX"), *COMPILERS):
        found = name and shutil.which(name)
        if found:
            return found
    raise _NoKernels("there is no C++ compiler: install one")


@lru_cache
def _version_of(compiler: str) -> str:
    with _work_folder() as folder:
        return _run([compiler, "--version"], Path(folder), SECONDS_TO_ANSWER)


def _compile_library(compiler: str, source: str, flags: Sequence[str]) -> bytes:
    _announce()
    with _work_folder() as folder:
        output = Path(folder, "kernels.so")
        _compile(compiler, source, flags, output)
        try:
            content = output.read_bytes()
        except OSError as error:
            raise _NoKernels(f"`{compiler}` made no library ({error}): use another compiler") from error
    if not _is_complete(content):
        raise _NoKernels(f"`{compiler}` made a library that is cut short: see whether the disk is full")
    return content


def _compile(compiler: str, source: str, flags: Sequence[str], output: Path) -> None:
    code = output.with_suffix(".cpp")
    _write(code, source)
    for threading_flags in THREADING:
        try:
            _run([compiler, *flags, *threading_flags, str(code), "-o", str(output)], code.parent, SECONDS_TO_COMPILE)
            return
        except _CompilerFailed:
            if threading_flags is THREADING[-1]:
                raise


def _work_folder() -> tempfile.TemporaryDirectory:
    try:
        return tempfile.TemporaryDirectory(prefix="mambaformer-", ignore_cleanup_errors=True)
    except OSError as error:
        raise _NoKernels(f"a compiler needs a temporary folder ({error}): set TMPDIR to one") from error


def _write(path: Path, text: str) -> None:
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise _NoKernels(f"a compiler needs a temporary folder ({error}): set TMPDIR to one with room") from error


def _run(command: list[str], folder: Path, seconds: float) -> str:
    """Runs a compiler in a session of its own, so that what it has started ends with it; returns what it says."""
    try:
        with open(folder / "said", "w+b") as said:
            process = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT, start_new_session=True
            )
            try:
                process.wait(seconds)
            finally:
                _end(process)
            said.seek(0)
            text = said.read(100_000).decode(errors="replace")
    except subprocess.TimeoutExpired as error:
        raise _NoKernels(f"`{command[0]}` was not done after {seconds} seconds: use another compiler") from error
    except OSError as error:
        raise _NoKernels(f"`{command[0]}` cannot be run ({error}): use another compiler") from error
    if process.returncode < 0:
        raise _NoKernels(f"`{command[0]}` was killed by signal {-process.returncode}: see whether memory is short")
    if process.returncode:
        raise _CompilerFailed(f"`{command[0]}` failed: {text.strip()[-400:]}")
    return text


def _end(process: subprocess.Popen) -> None:
    """Ends a compiler and all it has started, if it still runs."""
    if process.poll() is not None:
        return
    if hasattr(os, "killpg"):
        os.killpg(process.pid, signal.SIGKILL)
    else:
        process.kill()
    process.wait()


__all__ = ["SWITCH", "cpu_library"]
