"""CPU kernels as shared libraries: compiled where they are first used, and found again afterwards.

A model's folder brings source, not binaries, so every machine compiles for itself: once, in a few seconds, for what
its processor can do (as PyTorch sees it). Without a compiler everything is computed by PyTorch, only slower.
"""

import ctypes
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import threading
from functools import lru_cache
from pathlib import Path

import torch
from torch import _C, nn
from torch.autograd import forward_ad

from .cpu_source_mambaformer import COMMON_SOURCE
from .files_mambaformer import cache_folder, temporary_beside

logger = logging.getLogger(__name__)

# Set to "0", all is computed by PyTorch.
SWITCH = "MAMBAFORMER_CPU_KERNELS"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-std=c++17", "-O3", "-shared", "-fPIC", "-fno-math-errno", "-fno-trapping-math", "-ffp-contract=fast", "-w")
# Bytes of a vector and flags, by what PyTorch calls the processor's capability; others get vectors of 16 bytes.
CAPABILITIES = {
    "AVX512": (64, ("-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512")),
    "AVX2": (32, ("-mavx2", "-mfma")),
}
# Apple's compiler has no OpenMP; the kernels then run on one thread.
THREADING = (("-fopenmp",), ())
SECONDS_TO_COMPILE = 300

PLAIN_TENSORS = (torch.Tensor, nn.Parameter)

_lock = threading.Lock()
_libraries: dict[str, ctypes.CDLL | None] = {}


def cpu_library(source: str) -> ctypes.CDLL | None:
    """C++ `source`, behind what all kernels share, as a library.

    `None` where kernels are switched off or cannot be compiled, which is said once.
    """
    if source not in _libraries:
        with _lock:
            if source not in _libraries:
                _libraries[source] = _load_or_compile(source)
    return _libraries[source]


def are_readable(*tensors: torch.Tensor | None) -> bool:
    """Whether a kernel may read these: plain tensors on the CPU, and nobody who has to see every operation."""
    if torch.compiler.is_compiling():
        return False
    for tensor in tensors:
        if tensor is not None and not (type(tensor) in PLAIN_TENSORS and tensor.is_cpu):
            return False
    return not (
        _C._len_torch_dispatch_stack()  # fake tensors, tracers, counters
        or _C._functorch.peek_interpreter_stack() is not None
        or forward_ad._current_level >= 0
        or _C._is_tracing()
    )


def is_differentiated(*tensors: torch.Tensor | None) -> bool:
    """Whether a graph is recorded through any of these."""
    return torch.is_grad_enabled() and any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _load_or_compile(source: str) -> ctypes.CDLL | None:
    if os.environ.get(SWITCH) == "0":
        return None
    try:
        return ctypes.CDLL(str(_compiled(source)))
    except (OSError, RuntimeError, subprocess.SubprocessError) as error:
        _warn_once(str(error))
        return None


@lru_cache(maxsize=1)
def _warn_once(reason: str) -> None:
    logger.warning(
        "The CPU kernels could not be compiled, so PyTorch computes what they would, only slower (%s). Install a C++ "
        "compiler, or set %s=0 to leave them out.",
        reason,
        SWITCH,
    )


def _compiled(source: str) -> Path:
    """The library of this source, compiler and processor, from the folder of those compiled before."""
    compiler = _compiler()
    width, flags = CAPABILITIES.get(torch.backends.cpu.get_cpu_capability(), (16, ()))
    source = f"#define VECTOR_BYTES {width}\n{COMMON_SOURCE}{source}"
    identity = "\n".join((source, _version_of(compiler), platform.machine(), *FLAGS, *flags))
    name, folder = _digest(identity.encode()), cache_folder("kernels")
    for path in folder.glob(f"{name}-*.so"):
        if path == _path_of(folder, name, path):
            return path
    logger.info("Compiling CPU kernels, once for this machine.")
    folder.mkdir(parents=True, exist_ok=True)
    with temporary_beside(folder / name) as temporary:
        _compile(compiler, source, flags, temporary)
        path = _path_of(folder, name, temporary)
        os.replace(temporary, path)
    return path


def _path_of(folder: Path, name: str, library: Path) -> Path:
    """Where a library is kept: its name ends in its content, for a process dies of one that was cut short."""
    return folder / f"{name}-{_digest(library.read_bytes())}.so"


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:32]


def _compiler() -> str:
    for name in (os.environ.get("CXX"), *COMPILERS):
        found = name and shutil.which(name)
        if found:
            return found
    raise RuntimeError("there is no C++ compiler")


@lru_cache
def _version_of(compiler: str) -> str:
    return _run([compiler, "--version"])


def _compile(compiler: str, source: str, flags: tuple[str, ...], output: Path) -> None:
    for threading_flags in THREADING:
        command = [compiler, *FLAGS, *flags, *threading_flags, "-x", "c++", "-", "-o", str(output)]
        try:
            _run(command, source)
        except RuntimeError:
            if threading_flags is THREADING[-1]:
                raise
        else:
            return


def _run(command: list[str], text: str | None = None) -> str:
    done = subprocess.run(command, input=text, capture_output=True, text=True, timeout=SECONDS_TO_COMPILE)
    if done.returncode:
        raise RuntimeError(f"`{command[0]}` failed: {done.stderr.strip()[-400:]}")
    return done.stdout


__all__ = ["SWITCH", "are_readable", "cpu_library", "is_differentiated"]
