"""The constants and structures that Python and the C++ kernels share, as one table.

`make sources` writes the table into `csrc/structures.h`, and `ops_cpu_interface_mambaformer` makes classes of ctypes
from it. All fields are eight bytes wide, so structures have no padding. Needs nothing but Python's own library.
"""

import ctypes
import re
from typing import NamedTuple

COLUMNS = 119  # of a line in `csrc/`


class Constant(NamedTuple):
    value: int
    meaning: str


CONSTANTS = {
    "INTERFACE_VERSION": Constant(5, "Increase it whenever a structure or a function changes."),
    "CHUNK": Constant(32, "Tokens that the scan processes at a time."),
    "MOST_TAPS": Constant(16, "The largest kernel size of a convolution."),
    "MOST_ROWS": Constant(16, "The most rows of activations in a product."),
    "MOST_TOGETHER": Constant(4, "The most products of one operation."),
    "MOST_PARTS": Constant(64, "The most parts that keys are divided into, for threads."),
    "CHANNELS_AT_A_TIME": Constant(32, "Channels in a strip of a singular basis."),
}


class Enumeration(NamedTuple):
    values: tuple[str, ...]
    meaning: str


# The operations of a decode program and their structures. `csrc/program.h` has one `run` for each structure.
OPERATIONS = {
    "NORM": "NormOp",
    "LINEAR": "LinearOp",
    "SCALE": "ScaleOp",
    "WRITE_KEYS": "WriteKeysOp",
    "ATTEND": "AttendOp",
    "GATE": "GateOp",
    "CONV_STEP": "ConvStepOp",
    "INNER_NORMS": "InnerNormsOp",
    "RECURRENCE_STEP": "RecurrenceStepOp",
}

ENUMERATIONS = {
    "WeightKind": Enumeration(("PLAIN", "INT8", "INT4"), "How a weight is stored."),
    "OpKind": Enumeration(tuple(OPERATIONS), "The kind of an operation of a decode program."),
}


class Structure(NamedTuple):
    meaning: str
    declaration: str


# The fields in C++, in the order of the header. On the side of Python, pointers are integers.
STRUCTURES = {
    "View": Structure(
        "A tensor (rows, tokens, channels or numbers) whose last axis is contiguous; null if it was left out.",
        """
        void *data;
        Long row, token;  // strides
        """,
    ),
    "Shares": Structure(
        "The batch, and how its rows are divided: into `splits` shares of complete vectors of channels. There are\n"
        "more shares than threads, so another program that takes a processor away delays one share and not half of\n"
        "the work.",
        """
        const Long *lengths;  // (B,); null if every row has `length` tokens
        Long rows, length, channels, splits, threads;
        const Long *positions;  // (B, L), of each token in its own sequence; null if every row is one sequence
        """,
    ),
    "Convolution": Structure(
        "Weights and bias are stored in the type of the arithmetic, states in the type of the activations.",
        """
        View x, y;
        const void *weight, *bias;  // (D, K), (D,)
        const void *initial_state;  // (B, K - 1, D)
        void *final_state;          // (B, K - 1, D)
        Long taps;
        Shares shares;
        """,
    ),
    "ConvolutionGradient": Structure(
        "The backward pass of a convolution.",
        """
        Convolution of;
        View dy, dx;
        const void *dfinal_state;
        void *dweight, *dbias, *dinitial_state;  // (B, D, K), (B, D), (B, K - 1, D)
        """,
    ),
    "Scan": Structure(
        "A, D and the states are stored in the type of the arithmetic.",
        """
        View B, C, u, dt, gate, y;
        const void *A, *D, *initial_state;
        void *final_state;   // (B, D, N)
        void *checkpoints;   // (B, chunks, D, N): the states before each chunk, for training; or null
        const Long *starts;  // (B,): positions of the first tokens, where states are rounded after each token; or null
        Long numbers, dt_softplus, A_is_log;
        Shares shares;
        """,
    ),
    "ScanGradient": Structure(
        "The backward pass of a scan.",
        """
        Scan of;
        View dy, du, ddt, dgate;
        const void *dfinal_state;
        void *dA, *dB, *dC, *dD, *dinitial_state;  // (B, D, N), twice (B, splits, L, N), (B, D), (B, D, N)
        """,
    ),
    "Weight": Structure(
        "The weight of a linear module: data (outputs, inputs), and an expert vector if `rank` is not 0.",
        """
        Long kind, data, scale, bias, outputs, inputs, group, has_narrow_scales;
        Long basis, basis_stride, rank, delta, delta_stride, on_outputs;
        """,
    ),
    "Shape": Structure(
        "Sizes and strides of query (rows, heads, queries, width), key and value (rows, key heads, keys, width), and\n"
        "of the mask (rows or 1, queries, keys); `group` heads share a key head. Strides are of rows, heads, tokens.",
        """
        Long rows, key_heads, group, queries, keys, width;
        Long query[3], key[3], value[3];
        Long mask_row, mask_query;
        """,
    ),
    "KeyLayout": Structure(
        "Shared by the attention layers that retain the same keys: the mask with its strides as in `Shape`, the\n"
        "number of keys with the new ones, and the slots of the new ones: from `first_slot` on, or `slots`\n"
        "(rows or 1, tokens). Queries meet the first `sinks` keys by cosines and sines of their own, (rows or 1,\n"
        "tokens, head_dim).",
        """
        const uint8_t *mask;
        Long mask_row, mask_query, keys, first_slot;
        const Long *slots;
        Long slots_row, sinks;
        const void *sink_cosines, *sink_sines;
        Long sink_angle_row;
        """,
    ),
    "Codec": Structure(
        "The codes of a vector: bits of each number, groups with a scale each, bytes of the vector, and whether\n"
        "groups have a shift too. `bits` is 0 for numbers in the type of the activations.",
        """
        Long bits, groups, nbytes, has_shift;
        """,
    ),
    "KeySlots": Structure(
        "The memory of an attention layer's keys and values, (rows, key heads, capacity, head_dim or bytes) each.\n"
        "Both are codes, or neither.",
        """
        Long layout;  // index of its `KeyLayout`
        void *keys, *values;
        Long capacity;
        Codec key_codec, value_codec;
        """,
    ),
    "State": Structure(
        "A recurrent state before and after the token; `before` is null before the first token.",
        """
        const void *before;
        void *after;
        """,
    ),
    "ProgramInputs": Structure(
        "The new tokens of one decode step, its settings and tensors, and cosines and sines (rows or 1, tokens,\n"
        "head_dim), which are null without rotation. `workspace` is the number of elements per token.",
        """
        Long rows, tokens, width, workspace;
        const double *settings;
        const KeyLayout *layouts;
        const KeySlots *key_slots;
        const State *states;
        const void *cosines, *sines;
        Long angle_row;
        """,
    ),
    "Op": Structure(
        "The start of each operation, and its size in bytes. In all operations a buffer is the number of elements\n"
        "per token before it in the workspace, a setting or a state is an index, and -1 means none.",
        """
        Long kind, size;
        """,
    ),
    "Columns": Structure(
        "The columns from `first` on of a buffer with `stride` columns.",
        """
        Long buffer, first, stride;
        """,
    ),
    "Projection": Structure(
        "A weight, its input and its output.",
        """
        const Weight *weight;
        Long x, y;
        """,
    ),
    "NormOp": Structure(
        "y = RMS norm of x.",
        """
        Op op;
        Long x, y, width;
        const void *weight;
        Long eps;
        """,
    ),
    "LinearOp": Structure(
        "Products with a common barrier: y = W x + bias, or residual + W x + bias.",
        """
        Op op;
        Long count;
        Projection projections[4];
        Long residual;
        """,
    ),
    "ScaleOp": Structure(
        "Expert vectors with a common barrier: y = x + Q ((z - 1) * Q^T x), or residual + that.",
        """
        Op op;
        Long count;
        Projection projections[4];
        Long residual, scratch;
        """,
    ),
    "WriteKeysOp": Structure(
        "Rotates queries and keys, scales queries for `AttendOp`, and writes keys and values to their slots.\n"
        "`for_sinks` is like `scaled`, with the rotation that sinks are met with.",
        """
        Op op;
        Long query, key, value, scaled, for_sinks;
        Long heads, key_heads, head_dim, scaling, key_slots;
        """,
    ),
    "AttendOp": Structure(
        "Attention of scaled queries; `scratch` holds the results of each part of the keys.",
        """
        Op op;
        Long scaled, for_sinks, mixed, scratch;
        Long heads, key_heads, head_dim, key_slots;
        """,
    ),
    "GateOp": Structure(
        "y = silu(gates) * x.",
        """
        Op op;
        Long gates, x, y, width;
        """,
    ),
    "ConvStepOp": Structure(
        "One token of a causal convolution with silu; `state` is the last inputs (rows, taps - 1, channels).",
        """
        Op op;
        Columns x;
        Long y;
        const void *weight, *bias;
        Long channels, taps, state;
        """,
    ),
    "InnerNormsOp": Structure(
        "Divides x into three parts, applies the RMS norm to each with a weight in place, and copies the first to y.",
        """
        Op op;
        Long x, y;
        Long widths[3], weights[3], eps[3];
        """,
    ),
    "RecurrenceStepOp": Structure(
        "One token of the selective scan; `state` is (rows, channels, numbers). `scratch` holds A and D in the type\n"
        "of the arithmetic, if they are stored in another.",
        """
        Op op;
        Long u, dt, y, scratch;
        Columns B, C, gate;
        const void *A_log, *D;
        Long channels, numbers, state;
        """,
    ),
}

FieldType = type[ctypes.c_int64 | ctypes.c_double | ctypes.Structure | ctypes.Array]
_FIELD = re.compile(r"(?:const )?(\w+) ([^;]*);")
_NAME = re.compile(r"\s*(\*?)(\w+)(?:\[(\d+)\])?")


def ctypes_fields(name: str, *structures: type[ctypes.Structure]) -> list[tuple[str, FieldType]]:
    """The `_fields_` of a structure of the table, which contains these `structures`."""
    types: dict[str, FieldType] = {"Long": ctypes.c_int64, "double": ctypes.c_double} | {
        each.__name__: each for each in structures
    }
    fields: list[tuple[str, FieldType]] = []
    for kind, names in _FIELD.findall(re.sub("//.*", "", STRUCTURES[name].declaration)):
        for star, field, count in _NAME.findall(names):
            of = ctypes.c_int64 if star else types[kind]
            fields.append((field, of * int(count) if count else of))
    return fields


def header() -> str:
    """The part of `csrc/structures.h` that the table decides."""
    parts = [f"{_comment(meaning)}static const int {name} = {value};" for name, (value, meaning) in CONSTANTS.items()]
    for name, (values, meaning) in ENUMERATIONS.items():
        parts.append(f"{_comment(meaning)}enum {name} {{ {', '.join(values)} }};")
    for name, (meaning, declaration) in STRUCTURES.items():
        lines = "".join(f"    {line.strip()}\n" for line in declaration.strip().splitlines())
        parts.append(f"{_comment(meaning)}struct {name} {{\n{lines}}};")
    parts.append(_macro("FOR_EACH_OPERATION", [f"{kind}, {structure}" for kind, structure in OPERATIONS.items()]))
    parts.append(_macro("FOR_EACH_CONSTANT", constant_names()))
    parts.append(_macro("FOR_EACH_STRUCTURE", list(STRUCTURES)))
    return "\n\n".join(parts) + "\n"


def constant_names() -> list[str]:
    """All constants, in the order of the header."""
    return [*CONSTANTS, *(value for enumeration in ENUMERATIONS.values() for value in enumeration.values)]


def _comment(text: str) -> str:
    return "".join(f"// {line}\n" for line in text.split("\n"))


def _macro(name: str, rows: list[str]) -> str:
    *lines, last = [f"#define {name}(DO)", *(f"    DO({row})" for row in rows)]
    return "".join(f"{line:{COLUMNS - 1}}\\\n" for line in lines) + last


__all__ = [
    "CONSTANTS",
    "ENUMERATIONS",
    "OPERATIONS",
    "STRUCTURES",
    "constant_names",
    "ctypes_fields",
    "header",
]
