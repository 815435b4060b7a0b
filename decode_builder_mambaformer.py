"""Writes the operations of a decode program, and links them: buffers, settings, keys and states become numbers.

A mixer *lowers itself*: its method `lower` calls the methods of a `ProgramBuilder`, one for each operation, on
symbolic buffers. A builder refuses anything that the kernels do not take (`CannotLower`), and the step then runs as
modules between two parts of the program.
"""

import ctypes
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import TypeVar

import torch
from torch import nn

from .decode_memory_mambaformer import HeldMemory
from .decode_workspace_mambaformer import Intermediate, Workspace
from .expert_linear_mambaformer import ScaledBasis
from .ops_cpu_decode_mambaformer import LANES, describe_expert, describe_linear, is_stored
from .ops_cpu_interface_mambaformer import (
    CHANNELS_AT_A_TIME,
    KINDS,
    MOST_PARTS,
    MOST_TOGETHER,
    AttendOp,
    ConvStepOp,
    GateOp,
    InnerNormsOp,
    LinearOp,
    NormOp,
    RecurrenceStepOp,
    ScaleOp,
    Weight,
    WriteKeysOp,
)
from .ops_eligibility_mambaformer import SILU_TYPES

NONE = -1


class CannotLower(Exception):
    """The kernels do not take this; the step runs as modules."""


# ---- operands: symbols in operations, and numbers once the program is linked


@dataclass(frozen=True)
class Columns:
    """Columns of a buffer, from `first` on."""

    buffer: Intermediate
    first: int
    width: int


@dataclass(frozen=True)
class Setting:
    """A number that is read from a module at each decode step."""

    module: nn.Module
    name: str


@dataclass(frozen=True)
class KeySlotsOf:
    """The slots of an attention layer's keys and values in the cache."""

    position: int
    window: int | None
    heads: int
    key_heads: int
    head_dim: int
    has_moving_sinks: bool = False


@dataclass(frozen=True)
class RotatedQueries:
    """Queries for `attend`: as they meet keys, and as they meet sinks that move."""

    scaled: Intermediate
    for_sinks: Intermediate | None


@dataclass(frozen=True)
class StateOf:
    """A recurrent state in the cache: its name, the shape of one row, and whether it is float32 at least."""

    position: int
    name: str
    shape: tuple[int, ...]
    is_wide: bool


Numbered = TypeVar("Numbered", Setting, KeySlotsOf, StateOf)
Operand = Intermediate | Columns | Setting | KeySlotsOf | StateOf | int | None | Sequence["Operand"]


@dataclass(frozen=True)
class Product:
    """A weight, with or without an expert vector, its input and its output."""

    weight: Weight
    x: Intermediate
    y: Intermediate


@dataclass
class Operation:
    structure: type[ctypes.Structure]
    operands: dict[str, Operand]
    products: list[Product] = field(default_factory=list)


class ProgramBuilder:
    """The operations of one step of a layer: norm, mixer, residual.

    Args:
        position: of the layer in the stack and in the cache.
        window: of its attention.
        residual: the hidden states, which each step adds to.
        dtype: of activations and weights.
        threads: of the team that runs the program.
    """

    def __init__(self, position: int, window: int | None, residual: Intermediate, dtype: torch.dtype, threads: int):
        self.position, self.window, self.residual = position, window, residual
        self.dtype, self.threads = dtype, threads
        self.operations: list[Operation] = []
        self.memory = HeldMemory()
        self.conditions: list[Callable[[], bool]] = []
        self.expert_rows: set[int] = set()  # rows of the expert vectors that differ by row

    # ---- operations of all mixers

    def norm(self, x: Intermediate, norm: nn.Module) -> Intermediate:
        """RMS norm of `x`, with the weight and the epsilon of a `MambaFormerRMSNorm`."""
        weight, y = self._parameter(norm, "weight", (x.width,)), Intermediate(x.width)
        self._append(NormOp, x=x, y=y, width=x.width, weight=weight, eps=Setting(norm, "variance_epsilon"))
        return y

    def linear(self, x: Intermediate, module: nn.Module, scaled: ScaledBasis | None = None) -> Intermediate:
        """`apply_expert_linear` of `module`."""
        return self.linears(x, (module, scaled))[0]

    def linears(self, x: Intermediate, *projections: tuple[nn.Module, ScaledBasis | None]) -> list[Intermediate]:
        """Products of the same `x`, computed together."""
        self._require(len(projections) <= MOST_TOGETHER)
        weights = [self._weight(module, scaled) for module, scaled in projections]
        self._require(all(weight.inputs == x.width for weight in weights))
        inputs = [Intermediate(x.width) if weight.rank and not weight.on_outputs else x for weight in weights]
        products = [
            Product(weight, its_x, Intermediate(weight.outputs)) for weight, its_x in zip(weights, inputs, strict=True)
        ]
        self._scale([Product(each.weight, x, each.x) for each in products if each.x is not x])
        self.operations.append(Operation(LinearOp, {"residual": None}, products))
        self._scale([replace(each, x=each.y) for each in products if each.weight.rank and each.weight.on_outputs])
        return [product.y for product in products]

    def add_to_residual(self, x: Intermediate) -> None:
        """Adds `x` to the hidden states, in the operation that computes it: a single product or expert vector."""
        last = self.operations[-1]
        self._require(x.width == self.residual.width and [product.y for product in last.products] == [x])
        last.products = [replace(last.products[0], y=self.residual)]
        last.operands["residual"] = self.residual

    def gate(self, gates: Intermediate, x: Intermediate, activation: nn.Module) -> Intermediate:
        """silu(gates) * x, written over `gates`; other activations are refused."""
        self._require(type(activation) in SILU_TYPES and gates.width == x.width)
        self._append(GateOp, gates=gates, x=x, y=gates, width=x.width)
        return gates

    def only_if(self, condition: Callable[[], bool]) -> None:
        """Asks at each decode step whether the program may run."""
        self.conditions.append(condition)

    # ---- attention

    def rotate_and_store(
        self,
        query: Intermediate,
        key: Intermediate,
        value: Intermediate,
        head_dim: int,
        scaling: Setting,
        moves_sinks: bool = False,
    ) -> tuple[RotatedQueries, KeySlotsOf]:
        """Rotates queries and keys, and writes keys and values to the cache: queries for `attend`, and the slots.

        With `moves_sinks`, each query is rotated once more for the attention sinks.
        """
        self._require(head_dim > 0 and head_dim % LANES[self.dtype] == 0)
        heads, key_heads = query.width // head_dim, key.width // head_dim
        self._require(query.width == heads * head_dim and key.width == value.width == key_heads * head_dim)
        self._require(key_heads > 0 and heads % key_heads == 0)
        scaled, for_sinks = Intermediate(query.width), Intermediate(query.width) if moves_sinks else None
        slots = KeySlotsOf(self.position, self.window, heads, key_heads, head_dim, moves_sinks)
        self._append(WriteKeysOp, query=query, key=key, value=value, scaled=scaled, for_sinks=for_sinks, heads=heads,
                     key_heads=key_heads, head_dim=head_dim, scaling=scaling, key_slots=slots)  # fmt: skip
        return RotatedQueries(scaled, for_sinks), slots

    def attend(self, queries: RotatedQueries, slots: KeySlotsOf) -> Intermediate:
        """Attention of the queries of `rotate_and_store` on all keys that they see."""
        scaled, for_sinks = queries.scaled, queries.for_sinks
        mixed, num_parts = Intermediate(scaled.width), min(MOST_PARTS, self.threads)
        scratch = Intermediate(slots.heads * num_parts * (2 + slots.head_dim))
        self._append(AttendOp, scaled=scaled, for_sinks=for_sinks, mixed=mixed, scratch=scratch, heads=slots.heads,
                     key_heads=slots.key_heads, head_dim=slots.head_dim, key_slots=slots)  # fmt: skip
        return mixed

    # ---- Mamba, one token

    def conv_step(self, x: Columns, conv: nn.Conv1d, state: str) -> Intermediate:
        """Causal depthwise convolution and SiLU; `state` is the window of the last inputs."""
        weight, channels = conv.weight, x.width
        self._require(weight.ndim == 3)
        taps = weight.shape[2]
        address = self._parameter(conv, "weight", (channels, 1, taps))
        bias = 0 if conv.bias is None else self._parameter(conv, "bias", (channels,))
        y, window = Intermediate(channels), StateOf(self.position, state, (taps - 1, channels), is_wide=False)
        self._append(ConvStepOp, x=x, y=y, weight=address, bias=bias, channels=channels, taps=taps, state=window)
        return y

    def inner_norms(
        self, x: Intermediate, widths: Sequence[int], norms: Sequence[nn.Module]
    ) -> tuple[Intermediate, Columns, Columns]:
        """Divides `x` into three parts and applies the norms, if there are any; the first part is copied."""
        first, second, third = widths
        self._require(x.width == first + second + third)
        pairs = list(zip(norms, widths, strict=True)) if norms else []
        weights = [self._parameter(norm, "weight", (width,)) for norm, width in pairs] or [0, 0, 0]
        eps = [Setting(norm, "variance_epsilon") for norm in norms] or [NONE, NONE, NONE]
        y = Intermediate(first)
        self._append(InnerNormsOp, x=x, y=y, widths=list(widths), weights=weights, eps=eps)
        return y, Columns(x, first, second), Columns(x, first + second, third)

    def selective_scan_step(
        self, u: Intermediate, dt: Intermediate, B: Columns, C: Columns, gate: Columns, mixer: nn.Module, state: str
    ) -> Intermediate:
        """The selective scan with `A_log` and `D` of `mixer`, gated."""
        channels, numbers = u.width, B.width
        self._require(dt.width == gate.width == channels and C.width == numbers)
        A_log = self._parameter(mixer, "A_log", (channels, numbers))
        D, y = self._parameter(mixer, "D", (channels,)), Intermediate(channels)
        scratch = Intermediate(channels * (numbers + 1)) if self.dtype is torch.bfloat16 else None
        matrix = StateOf(self.position, state, (channels, numbers), is_wide=True)
        self._append(RecurrenceStepOp, u=u, dt=dt, y=y, scratch=scratch, B=B, C=C, gate=gate, A_log=A_log, D=D,
                     channels=channels, numbers=numbers, state=matrix)  # fmt: skip
        return y

    # ---- parts of operations

    def _require(self, fits: bool) -> None:
        if not fits:
            raise CannotLower

    def _append(self, structure: type[ctypes.Structure], **operands: Operand) -> None:
        self.operations.append(Operation(structure, operands))

    def _scale(self, products: list[Product]) -> None:
        """Appends the expert vectors of these products, from x to y."""
        if products:
            # A thread keeps a sum; a strip of channels keeps its part of the coordinates.
            sizes = [(-(-each.x.width // CHANNELS_AT_A_TIME) + self.threads) * each.weight.rank for each in products]
            scratch = Intermediate(sum(sizes))
            self.operations.append(Operation(ScaleOp, {"residual": None, "scratch": scratch}, products))

    def _parameter(self, module: nn.Module, name: str, shape: tuple[int, ...]) -> int:
        """The address of a parameter."""
        parameter = getattr(module, name)
        self._require(is_stored(parameter, self.dtype, shape))
        self.memory.add(module._parameters, name, parameter.data_ptr())
        return parameter.data_ptr()

    def _weight(self, module: nn.Module, scaled: ScaledBasis | None) -> Weight:
        weight = describe_linear(module, self.dtype)
        if weight is None:
            raise CannotLower
        self.memory.add_linear(module, weight)
        if scaled is not None:
            self._scale_weight(weight, scaled)
        return weight

    def _scale_weight(self, weight: Weight, scaled: ScaledBasis) -> None:
        on_outputs, vectors, delta = scaled.side == "output", scaled.vectors, scaled.delta
        width = weight.outputs if on_outputs else weight.inputs
        self._require(scaled.mesh is None and vectors.dtype is self.dtype and vectors.shape[0] == width)
        self._require(not (on_outputs and weight.bias))
        weight.on_outputs = on_outputs
        self._require(describe_expert(weight, vectors, delta, (delta.shape[0], 1, width)))
        if delta.ndim == 3:
            self.expert_rows.add(delta.shape[0])
        self.memory.add(vars(scaled), "vectors", weight.basis)
        self.memory.add(vars(scaled), "delta", weight.delta)


class LinkedProgram:
    """The operations of several builders as one piece of memory.

    `settings`, `key_slots` and `states` are what a decode step fills in, in the order of their numbers; `ranges` are
    the addresses of the first operation of each builder, and of the end of the last.
    """

    def __init__(self, builders: Sequence[ProgramBuilder], residual: Intermediate):
        operations = [operation for builder in builders for operation in builder.operations]
        self._workspace = Workspace(residual, list(map(_buffers_of, operations)))
        self._numbers: dict[object, int] = {}  # of settings, slots and states, each kind counted from 0
        self._weights: list[Weight] = []  # addresses point to them
        self.settings: list[Setting] = []
        self.key_slots: list[KeySlotsOf] = []
        self.states: list[StateOf] = []
        encoded = [b"".join(map(self._encode, builder.operations)) for builder in builders]
        self._code = ctypes.create_string_buffer(b"".join(encoded))
        self.ranges: list[tuple[int, int]] = []
        start = ctypes.addressof(self._code)
        for part in encoded:
            self.ranges.append((start, start + len(part)))
            start += len(part)

    @property
    def workspace_size(self) -> int:
        """Elements per token."""
        return self._workspace.size

    def _encode(self, operation: Operation) -> bytes:
        structure = operation.structure
        values = {name: self._resolve(operand) for name, operand in operation.operands.items()}
        if operation.products:
            self._weights += [product.weight for product in operation.products]
            values["count"] = len(operation.products)
            values["projections"] = tuple(map(self._projection, operation.products))
        return bytes(structure(op=(KINDS[structure], ctypes.sizeof(structure)), **values))

    def _projection(self, product: Product) -> tuple[int, int, int]:
        offset = self._workspace.offset
        return ctypes.addressof(product.weight), offset(product.x), offset(product.y)

    def _resolve(self, operand: Operand) -> int | tuple:
        if isinstance(operand, int):
            return operand
        if isinstance(operand, Intermediate):
            return self._workspace.offset(operand)
        if operand is None:
            return NONE
        if isinstance(operand, Columns):
            return self._workspace.offset(operand.buffer), operand.first, operand.buffer.width
        if isinstance(operand, Setting):
            return self._number(operand, self.settings)
        if isinstance(operand, KeySlotsOf):
            return self._number(operand, self.key_slots)
        if isinstance(operand, StateOf):
            return self._number(operand, self.states)
        return tuple(map(self._resolve, operand))

    def _number(self, operand: Numbered, numbered: list[Numbered]) -> int:
        if operand not in self._numbers:
            self._numbers[operand] = len(numbered)
            numbered.append(operand)
        return self._numbers[operand]


def _buffers_of(operation: Operation) -> list[Intermediate]:
    """The buffers that an operation reads or writes."""
    buffers = [buffer for product in operation.products for buffer in (product.x, product.y)]
    operands = list(operation.operands.values())
    while operands:
        operand = operands.pop()
        if isinstance(operand, Intermediate):
            buffers.append(operand)
        elif isinstance(operand, Columns):
            buffers.append(operand.buffer)
        elif isinstance(operand, (list, tuple)):
            operands += operand
    return buffers


__all__ = ["CannotLower", "Columns", "LinkedProgram", "ProgramBuilder", "Setting", "StateOf"]
