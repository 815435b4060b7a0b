"""The interface of the CPU kernel library for ctypes: the structures and functions of `csrc/interface.h`.

The library is compiled where it is first used. Its structures and constants are compared with the ones declared here
when it is loaded; a library that disagrees is not used.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch

from .ops_cpu_build_mambaformer import cpu_library
from .ops_cpu_source_mambaformer import SOURCE

# Storage types of activations, by the last part of a function's name; the arithmetic is in float32 or float64.
STORED = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
# Tokens that the scan processes at a time, and the largest kernel size of a convolution.
CHUNK, MOST_TAPS = 32, 16
PLAIN, INT8, INT4 = range(3)
ATTENTION, MLP, MAMBA = range(3)


def _fields(names: str, **types: Any) -> list[tuple[str, Any]]:
    """The fields of a structure: integers of 64 bits, pointers among them, unless `types` says otherwise."""
    return [(name, types.get(name, ctypes.c_int64)) for name in names.split()]


def as_integers(structure: type[ctypes.Structure]) -> type[ctypes.Array]:
    """The same memory as an array of integers, which is faster to fill than a structure of structures."""
    return ctypes.c_int64 * (ctypes.sizeof(structure) // 8)


class View(ctypes.Structure):
    _fields_ = _fields("data row token")


class Shares(ctypes.Structure):
    _fields_ = _fields("lengths rows length channels splits threads positions")


class Convolution(ctypes.Structure):
    _fields_ = _fields(
        "x y weight bias initial_state final_state taps shares", **dict.fromkeys(("x", "y"), View), shares=Shares
    )


class ConvolutionGradient(ctypes.Structure):
    _fields_ = _fields(
        "of dy dx dfinal_state dweight dbias dinitial_state", of=Convolution, **dict.fromkeys(("dy", "dx"), View)
    )


class Scan(ctypes.Structure):
    _fields_ = _fields(
        "B C u dt gate y A D initial_state final_state checkpoints numbers dt_softplus A_is_log shares",
        **dict.fromkeys(("B", "C", "u", "dt", "gate", "y"), View),
        shares=Shares,
    )


class ScanGradient(ctypes.Structure):
    _fields_ = _fields(
        "of dy du ddt dgate dfinal_state dA dB dC dD dinitial_state",
        of=Scan,
        **dict.fromkeys(("dy", "du", "ddt", "dgate"), View),
    )


class Weight(ctypes.Structure):
    _fields_ = _fields(
        "kind data scale bias outputs inputs group has_narrow_scales "
        "basis basis_stride rank delta delta_stride on_outputs"
    )


class Shape(ctypes.Structure):
    _fields_ = _fields(
        "rows key_heads group queries keys width query key value mask_row mask_query",
        **dict.fromkeys(("query", "key", "value"), ctypes.c_int64 * 3),
    )


class Recurrence(ctypes.Structure):
    _fields_ = _fields(
        "conv_weight conv_bias A_log D channels taps numbers rank norms eps window next_window state next_state",
        norms=ctypes.c_int64 * 3,
        eps=ctypes.c_double * 3,
    )


class Block(ctypes.Structure):
    _fields_ = _fields(
        "kind norm eps weights scaling heads key_heads head_dim plan keys values capacity mamba",
        eps=ctypes.c_double,
        weights=Weight * 4,
        scaling=ctypes.c_double,
        mamba=Recurrence,
    )


class Plan(ctypes.Structure):
    _fields_ = _fields("mask mask_row mask_query keys first_slot slots slots_row")


class Tokens(ctypes.Structure):
    _fields_ = _fields("rows count width cosines sines angle_row")


STRUCTURES = (
    View, Shares, Convolution, ConvolutionGradient, Scan, ScanGradient, Weight, Shape, Recurrence, Block, Plan, Tokens,
)  # fmt: skip
# The values of `interface_value`: constants, and the size of each structure.
VALUES = {
    "INTERFACE_VERSION": 1,
    "CHUNK": CHUNK,
    "MOST_TAPS": MOST_TAPS,
    "MOST_ROWS": 16,
    "PLAIN": PLAIN,
    "INT8": INT8,
    "INT4": INT4,
    "ATTENTION": ATTENTION,
    "MLP": MLP,
    "MAMBA": MAMBA,
    **{structure.__name__: ctypes.sizeof(structure) for structure in STRUCTURES},
}

_TYPES = {"p": ctypes.c_void_p, "n": ctypes.c_int64, "d": ctypes.c_double, "i": ctypes.c_int}
# Arguments of the functions that exist for each storage type: pointer, number, double, int (threads).
_ARGUMENTS = {
    "convolve": "p",
    "convolve_back": "p",
    "scan": "p",
    "scan_back": "p",
    "linear": "pnppi",
    "rescale": "pnppi",
    "unpack_int4": "pnnnppi",
    "rms_norm": "pnnpdpi",
    "rotate": "pnnnnnnnppnpi",
    "gate": "ppnpi",
    "attend": "ppppdppi",
    "run_blocks": "pppnppi",
}
FUNCTIONS = (
    "interface_value",
    "rows_of_block",
    "fits",
    *(f"{name}_{stored}" for name in _ARGUMENTS if name != "unpack_int4" for stored in STORED.values()),
    *(f"unpack_int4_{stored}_{scale}" for stored in ("float32", "bfloat16") for scale in ("float32", "bfloat16")),
)


def kernels() -> ctypes.CDLL | None:
    """The library; `None` if kernels are switched off or cannot be had."""
    return cpu_library(SOURCE, FUNCTIONS, VALUES)


@lru_cache
def kernel_of(name: str, *stored: torch.dtype) -> Any:
    """The C function for activations (and scales) of these storage types; `None` if there is none."""
    library = kernels() if all(dtype in STORED for dtype in stored) else None
    function = getattr(library, "_".join((name, *(STORED.get(dtype, "") for dtype in stored))), None)
    if function is not None:
        function.argtypes, function.restype = [_TYPES[kind] for kind in _ARGUMENTS[name]], None
    return function


@lru_cache
def fits_kernel() -> Any:
    """The C function that returns whether blocks read and write keys within their capacity."""
    library = kernels()
    if library is None:
        raise RuntimeError("There are no kernels: ask `kernels()` before.")
    function = library.fits
    function.argtypes, function.restype = [_TYPES[kind] for kind in "ppnp"], ctypes.c_int
    return function


@lru_cache
def rows_of_block() -> int:
    """Rows in a block of four-bit weights as the kernels read it; 0 without kernels."""
    return getattr(kernels(), "rows_of_block", lambda: 0)()


__all__ = ["kernel_of", "kernels"]
