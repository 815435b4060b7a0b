"""The interface of the CPU kernel library for ctypes: its structures and the functions of `csrc/interface.h`.

The library is compiled where it is first used. Its structures and constants are compared with the ones here when it is
loaded; a library that disagrees is not used.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch

from .ops_cpu_build_mambaformer import cpu_library
from .ops_cpu_source_mambaformer import SOURCE
from .ops_cpu_structures_mambaformer import CONSTANTS, ENUMERATIONS, OPERATIONS, constant_names, ctypes_fields

# Storage types of activations, by the last part of a function's name; the arithmetic is in float32 or float64.
STORED = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
_NUMBERS = {
    value: number for enumeration in ENUMERATIONS.values() for number, value in enumerate(enumeration.values)
} | {name: constant.value for name, constant in CONSTANTS.items()}
CHUNK, MOST_TAPS, MOST_PARTS = (_NUMBERS[name] for name in ("CHUNK", "MOST_TAPS", "MOST_PARTS"))
MOST_TOGETHER, CHANNELS_AT_A_TIME = (_NUMBERS[name] for name in ("MOST_TOGETHER", "CHANNELS_AT_A_TIME"))
PLAIN, INT8, INT4 = (_NUMBERS[name] for name in ("PLAIN", "INT8", "INT4"))


def as_integers(structure: type[ctypes.Structure]) -> type[ctypes.Array[ctypes.c_int64]]:
    """The same memory as an array of integers, which is faster to fill than a structure of structures."""
    return ctypes.c_int64 * (ctypes.sizeof(structure) // 8)


class View(ctypes.Structure):
    _fields_ = ctypes_fields("View")


class Shares(ctypes.Structure):
    _fields_ = ctypes_fields("Shares")


class Convolution(ctypes.Structure):
    _fields_ = ctypes_fields("Convolution", View, Shares)


class ConvolutionGradient(ctypes.Structure):
    _fields_ = ctypes_fields("ConvolutionGradient", View, Convolution)


class Scan(ctypes.Structure):
    _fields_ = ctypes_fields("Scan", View, Shares)


class ScanGradient(ctypes.Structure):
    _fields_ = ctypes_fields("ScanGradient", View, Scan)


class Weight(ctypes.Structure):
    _fields_ = ctypes_fields("Weight")


class Shape(ctypes.Structure):
    _fields_ = ctypes_fields("Shape")


class KeyLayout(ctypes.Structure):
    _fields_ = ctypes_fields("KeyLayout")


class Codec(ctypes.Structure):
    _fields_ = ctypes_fields("Codec")


class KeySlots(ctypes.Structure):
    _fields_ = ctypes_fields("KeySlots", Codec)


class State(ctypes.Structure):
    _fields_ = ctypes_fields("State")


class ProgramInputs(ctypes.Structure):
    _fields_ = ctypes_fields("ProgramInputs")


class Op(ctypes.Structure):
    _fields_ = ctypes_fields("Op")


class Columns(ctypes.Structure):
    _fields_ = ctypes_fields("Columns")


class Projection(ctypes.Structure):
    _fields_ = ctypes_fields("Projection")


class NormOp(ctypes.Structure):
    _fields_ = ctypes_fields("NormOp", Op)


class LinearOp(ctypes.Structure):
    _fields_ = ctypes_fields("LinearOp", Op, Projection)


class ScaleOp(ctypes.Structure):
    _fields_ = ctypes_fields("ScaleOp", Op, Projection)


class WriteKeysOp(ctypes.Structure):
    _fields_ = ctypes_fields("WriteKeysOp", Op)


class AttendOp(ctypes.Structure):
    _fields_ = ctypes_fields("AttendOp", Op)


class GateOp(ctypes.Structure):
    _fields_ = ctypes_fields("GateOp", Op)


class ConvStepOp(ctypes.Structure):
    _fields_ = ctypes_fields("ConvStepOp", Op, Columns)


class InnerNormsOp(ctypes.Structure):
    _fields_ = ctypes_fields("InnerNormsOp", Op)


class RecurrenceStepOp(ctypes.Structure):
    _fields_ = ctypes_fields("RecurrenceStepOp", Op, Columns)


STRUCTURES: tuple[type[ctypes.Structure], ...] = (
    View, Shares, Convolution, ConvolutionGradient, Scan, ScanGradient, Weight, Shape, KeyLayout, Codec, KeySlots,
    State, ProgramInputs, Op, Columns, Projection, NormOp, LinearOp, ScaleOp, WriteKeysOp, AttendOp, GateOp,
    ConvStepOp, InnerNormsOp, RecurrenceStepOp,
)  # fmt: skip
# The operations of a decode program: the number of each kind, by its structure.
KINDS: dict[type[ctypes.Structure], int] = {
    structure: _NUMBERS[kind]
    for kind, name in OPERATIONS.items()
    for structure in STRUCTURES
    if structure.__name__ == name
}
# The values of `interface_value`: constants, and the size of each structure.
VALUES = {name: _NUMBERS[name] for name in constant_names()}
VALUES |= {structure.__name__: ctypes.sizeof(structure) for structure in STRUCTURES}

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
    "encode": "pnnppi",
    "run_program": "pppppi",
    "round_states": "pnnnppi",
    "encode_states": "pnnpi",
    "decode_states": "pnnpi",
}
_OF_STATES = ("round_states", "encode_states", "decode_states")  # stored in the types of the arithmetic
_OF_OTHER_TYPES = ("unpack_int4", *_OF_STATES)
FUNCTIONS = (
    "interface_value",
    "rows_of_block",
    *(f"{name}_{stored}" for name in _ARGUMENTS if name not in _OF_OTHER_TYPES for stored in STORED.values()),
    *(f"{name}_{stored}" for name in _OF_STATES for stored in ("float32", "float64")),
    *(f"unpack_int4_{stored}_{scale}" for stored in ("float32", "bfloat16") for scale in ("float32", "bfloat16")),
)


def kernels() -> ctypes.CDLL | None:
    """The library; `None` if kernels are switched off or cannot be had."""
    return cpu_library(SOURCE, FUNCTIONS, VALUES)


@lru_cache
def kernel_of(name: str, *stored: torch.dtype) -> Any:  # Any: some callers know that there are kernels, others ask
    """The C function for activations (and scales) of these storage types; `None` if there is none."""
    library = kernels() if all(dtype in STORED for dtype in stored) else None
    function = getattr(library, "_".join((name, *(STORED.get(dtype, "") for dtype in stored))), None)
    if function is not None:
        function.argtypes, function.restype = [_TYPES[kind] for kind in _ARGUMENTS[name]], None
    return function


@lru_cache
def rows_of_block() -> int:
    """Rows in a block of four-bit weights as the kernels read it; 0 without kernels."""
    return getattr(kernels(), "rows_of_block", lambda: 0)()


__all__ = ["kernel_of", "kernels"]
