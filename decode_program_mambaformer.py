"""Decode programs: all layers over a few tokens by one call of a CPU kernel.

At one token a layer takes as long in Python as in memory: modules, views, allocations and barriers cost more than
arithmetic. So a model's layers are lowered once into a list of operations (`decode_builder_mambaformer`), which stays
valid while weights and expert vectors stay. A decode step only adds settings, slots of keys, and states. Its results
are those of the layers bit for bit, but for rounding where sinks move: modules rotate the sinks for a single query.

A step of a layer that has no lowering runs as modules, between two parts of the program.
"""

import ctypes
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, get_num_threads, nn

from .cache_mambaformer import MambaFormerCache
from .cache_retention_mambaformer import Layout
from .decode_builder_mambaformer import CannotLower, LinkedProgram, ProgramBuilder, StateOf
from .decode_memory_mambaformer import HeldMemory
from .decode_slots_mambaformer import describe_codecs
from .decode_workspace_mambaformer import Intermediate
from .expert_runtime_mambaformer import ScaledBases
from .mixer_attention_masks_mambaformer import AttentionMasks
from .modeling_stack_mambaformer import Place
from .ops_cpu_decode_mambaformer import MOST_ROWS, strides_of_mask, takes_mask
from .ops_cpu_interface_mambaformer import ProgramInputs, as_integers, kernel_of
from .ops_eligibility_mambaformer import Watch, is_of_own_type, is_own_attention, may_run_forward
from .ops_state_codes_mambaformer import round_states

Angles = tuple[Tensor, Tensor] | None
# Programs that a model keeps, so that sessions with different expert vectors may take turns.
MOST_PROGRAMS = 4


class ProgramKey(NamedTuple):
    """The properties of a model and a forward that a program is made for."""

    weights: object  # the stamp of the stack's weights
    dtype: torch.dtype
    width: int
    threads: int
    modules: list[int]


@dataclass(frozen=True)
class LayerArguments:
    """The arguments of all layers in one forward; `options` are the keywords of the attention function."""

    attention: Mapping[int | None, AttentionMasks]
    position_embeddings: Angles
    cache: MambaFormerCache
    lengths: Tensor | None
    options: Mapping[str, object]


class DecodePrograms:
    """The last few programs of a model, by content. Threads may use them at the same time."""

    def __init__(self):
        self.recent: tuple[DecodeProgram, ...] = ()

    def __getstate__(self) -> dict:
        return {}  # a copied model has its weights elsewhere

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def run(
        self,
        places: list[Place],
        weights: object,
        hidden_states: Tensor,
        attention: Mapping[int | None, AttentionMasks],
        scaled_bases: ScaledBases,
        position_embeddings: Angles,
        cache: MambaFormerCache | None,
        lengths: Tensor | None,
        **options: object,
    ) -> Tensor | None:
        """The hidden states after all layers, left-aligned (rows, tokens, hidden).

        `weights` is the stamp of the stack's weights; the other arguments are those of the layers. Returns `None`, and
        has changed nothing, if the layers have to run.
        """
        num_tokens = hidden_states.numel() // hidden_states.shape[-1]
        is_few = weights is not None and num_tokens <= MOST_ROWS.get(hidden_states.dtype, 0)
        if cache is None or not is_few or torch.is_grad_enabled() or not may_run_forward(hidden_states):
            return None
        modules = [id(place.module) for place in places]
        key = ProgramKey(weights, hidden_states.dtype, hidden_states.shape[-1], get_num_threads(), modules)
        program = self._find(key, scaled_bases) or self._add(DecodeProgram(key, places, scaled_bases))
        storages = program.memory.hold()
        if storages is None or program.watch.has_changed():  # another thread replaces weights, or a user modules
            program = self._add(DecodeProgram(key, places, scaled_bases))
            storages = program.memory.hold()
        if storages is None or not program.may_run():
            return None
        return program.run(hidden_states, LayerArguments(attention, position_embeddings, cache, lengths, options))

    def _find(self, key: ProgramKey, scaled_bases: ScaledBases) -> "DecodeProgram | None":
        recent = self.recent
        for program in recent:
            if program.scaled_bases is scaled_bases and program.key == key:
                if program is not recent[0]:
                    self.recent = (program, *(other for other in recent if other is not program))
                return program
        return None

    def _add(self, program: "DecodeProgram") -> "DecodeProgram":
        """Programs for earlier weights are dropped."""
        same = [each for each in self.recent if each.key.weights == program.key.weights]
        others = [each for each in same if each.scaled_bases is not program.scaled_bases or each.key != program.key]
        self.recent = (program, *others[: MOST_PROGRAMS - 1])
        return program


@dataclass(frozen=True)
class LayerStep:
    """One mixer of one layer, with its norm; `operations` are the addresses of its operations, if it has them."""

    place: Place
    name: str
    operations: tuple[int, int] | None

    @property
    def is_recurrent(self) -> bool:
        return self.name in self.place.layer.recurrent

    def run(self, hidden_states: Tensor, scaled_bases: ScaledBases, arguments: LayerArguments) -> Tensor:
        """Runs the modules."""
        place = self.place
        context = {
            "attention": arguments.attention.get(place.window),
            "position_embeddings": arguments.position_embeddings,
            "cache": place.cache_of(arguments.cache),
            "lengths": arguments.lengths,
            "positions": None,
        }
        scaled_bases = place.vectors_of(scaled_bases)
        return place.layer.step(self.name, hidden_states, scaled_bases, context, **arguments.options)[0]


Part = tuple[int, int] | LayerStep


class DecodeProgram:
    """The layers of a model, lowered for one dtype and one expert vector; it never changes."""

    def __init__(self, key: ProgramKey, places: list[Place], scaled_bases: ScaledBases):
        self.key, self.scaled_bases, self.memory = key, scaled_bases, HeldMemory()
        residual = Intermediate(key.width)
        own = all(is_of_own_type(place.module) for place in places)
        kernel = kernel_of("run_program", key.dtype)
        names = [(place, name) for place in places for name in place.layer.steps] if own and kernel else []
        lowered = [_lowered(place, name, scaled_bases, key, residual) for place, name in names]
        builders = [builder for builder in lowered if builder is not None]
        self.linked = LinkedProgram(builders, residual)
        ranges = iter(self.linked.ranges)
        self.steps = [
            LayerStep(place, name, None if builder is None else next(ranges))
            for (place, name), builder in zip(names, lowered, strict=True)
        ]
        self.watch = Watch(_modules_left_out(places, self.steps))
        self.is_usable = bool(builders) and self.watch.are_own
        self.conditions = [condition for builder in builders for condition in builder.conditions]
        self.expert_rows = {rows for builder in builders for rows in builder.expert_rows}
        for builder in builders:
            self.memory.add_all(builder.memory)
        self.parts = list(_parts(self.steps, is_single=False))
        self.parts_of_single = list(_parts(self.steps, is_single=True))
        self.windows = {slots.window: slots.position for slots in self.linked.key_slots}
        self.head_dims = {slots.head_dim for slots in self.linked.key_slots}

    def may_run(self) -> bool:
        return self.is_usable and self.watch.may_replace() and all(condition() for condition in self.conditions)

    def run(self, hidden_states: Tensor, arguments: LayerArguments) -> Tensor | None:
        if not self._takes(hidden_states, arguments.position_embeddings):
            return None
        step = ProgramStep(self.linked, hidden_states, arguments.position_embeddings)
        if not (step.add_layouts(self.windows, arguments) and step.add_key_slots(arguments.cache)):
            return None
        parts = self.parts
        if hidden_states.shape[1] == 1 and arguments.lengths is None and not arguments.cache.replay_reach:
            parts = self.parts_of_single if step.add_states(arguments.cache) else self.parts
        kernel, address = kernel_of("run_program", self.key.dtype), step.finish()
        for part in parts:
            if isinstance(part, LayerStep):
                hidden_states = part.run(hidden_states, self.scaled_bases, arguments)
                continue
            before, hidden_states = hidden_states.contiguous(), hidden_states.new_empty(hidden_states.shape)
            kernel(before.data_ptr(), address, *part, hidden_states.data_ptr(), self.key.threads)
        if parts is self.parts_of_single:
            step.stage_states(arguments.cache)
        return hidden_states

    def _takes(self, hidden_states: Tensor, angles: Angles) -> bool:
        rows, count, _ = hidden_states.shape
        if self.expert_rows and (count > 1 or self.expert_rows != {rows}):
            return False
        return angles is None or all(_takes_angles(hidden_states, angles, head_dim) for head_dim in self.head_dims)


def _lowered(
    place: Place, name: str, scaled_bases: ScaledBases, key: ProgramKey, residual: Intermediate
) -> ProgramBuilder | None:
    """The operations of one step of a layer; `None` if it has to run as modules."""
    layer = place.layer
    norm, mixer = getattr(layer, f"{name}_layernorm"), getattr(layer, name)
    if not all(map(is_of_own_type, (norm, mixer, *mixer.children()))):
        return None
    builder = ProgramBuilder(place.position, place.window, residual, key.dtype, key.threads)
    try:
        layer.lower_step(name, builder, place.vectors_of(scaled_bases))
    except CannotLower:
        return None
    return builder


def _modules_left_out(places: list[Place], steps: Sequence[LayerStep]) -> Iterator[nn.Module]:
    """All modules that the program does not call; modules that are not ours, and their children, included."""
    as_modules = {(step.place.position, step.name) for step in steps if step.operations is None}
    for place in places:
        yield place.module
        names = {name for position, name in as_modules if position == place.position}
        called = names | {f"{name}_layernorm" for name in names}
        for name, module in place.module._modules.items():  # mixers and norms
            if module is not None and name not in called:
                yield module
                yield from (child for child in module._modules.values() if child is not None)


def _parts(steps: Sequence[LayerStep], is_single: bool) -> Iterator[Part]:
    """Ranges of operations, and the steps between them that run as modules.

    The operations of recurrent mixers take one token (`is_single`).
    """
    start = end = 0
    for step in steps:
        if step.operations is not None and (is_single or not step.is_recurrent):
            start, end = start or step.operations[0], step.operations[1]
            continue
        if start:
            yield start, end
        yield step
        start = 0
    if start:
        yield start, end


_StepIntegers = as_integers(ProgramInputs)


class ProgramStep:
    """The numbers and tensors that one decode step adds to a program, and the tensors that it points to.

    The methods `add_...` return false for anything that the kernels do not take.
    """

    def __init__(self, linked: LinkedProgram, hidden_states: Tensor, angles: Angles):
        self.linked, self.hidden_states = linked, hidden_states
        self.rows, self.count, self.width = hidden_states.shape
        self.pointed_to: list[object] = []
        self.layouts: dict[int | None, Layout] = {}
        self.slots_needed: dict[int | None, int] = {}
        self.key_layouts = self.key_slots = self.states = 0  # addresses
        self.new_states: list[tuple[StateOf, Tensor]] = []
        self.angles = (0, 0, 0)
        if angles is not None:
            cos, sin = angles
            self.angles = cos.data_ptr(), sin.data_ptr(), self.count * cos.shape[2] if cos.shape[0] > 1 else 0
            self.pointed_to += cos, sin
        settings = [getattr(setting.module, setting.name) for setting in linked.settings]
        self.settings = self._address((ctypes.c_double * len(settings))(*settings))

    def _address(self, array: ctypes.Array) -> int:
        self.pointed_to.append(array)
        return ctypes.addressof(array)

    def finish(self) -> int:
        """The address of the `ProgramInputs`."""
        sizes = self.rows, self.count, self.width, self.linked.workspace_size
        tables = self.settings, self.key_layouts, self.key_slots, self.states
        return self._address(_StepIntegers(*sizes, *tables, *self.angles))

    # ---- attention

    def add_layouts(self, windows: Mapping[int | None, int], arguments: LayerArguments) -> bool:
        """How the layers with each window see keys, and where new keys go; `windows` has the position of one layer."""
        numbers: list[int] = []
        for window, position in windows.items():
            layout = self.layouts[window] = arguments.cache.layout(position)
            described = self._describe_layout(window, arguments.attention[window], layout)
            if described is None:
                return False
            numbers += described
        self.key_layouts = self._address((ctypes.c_int64 * len(numbers))(*numbers))
        return True

    def _describe_layout(self, window: int | None, attention: AttentionMasks, layout: Layout) -> list[int] | None:
        """The fields of `KeyLayout`."""
        mask, slots = attention.mask, layout.slots
        if not is_own_attention(attention.implementation) or attention.alignment is not None:
            return None
        if layout.sources is not None or attention.chunks or (mask is None and self.count > 1):
            return None  # keys that are staged or evicted on the way; a causal mask that attention makes by itself
        address, mask_strides = 0, (0, 0)
        if mask is not None:
            if not isinstance(mask, Tensor) or not takes_mask(mask, self.rows, self.count, layout.num_slots):
                return None
            address, mask_strides = mask.data_ptr(), strides_of_mask(mask)
            self.pointed_to.append(mask)
        slot_fields = self._describe_slots(window, slots, layout.num_slots)
        sink_fields = self._describe_sinks(window, attention)
        if slot_fields is None or sink_fields is None:
            return None
        return [address, *mask_strides, layout.num_slots, *slot_fields, *sink_fields]

    def _describe_sinks(self, window: int | None, attention: AttentionMasks) -> tuple[int, int, int, int] | None:
        """The number of sinks that move, the addresses of their cosines and sines, and the stride of these by row."""
        angles = attention.sink_angles
        if angles is None:
            return 0, 0, 0, 0
        slots = [each for each in self.linked.key_slots if each.window == window]
        if not all(each.has_moving_sinks for each in slots):
            return None  # the configuration was changed after the attention was lowered
        if not all(_takes_angles(self.hidden_states, angles, each.head_dim) for each in slots):
            return None
        cos, sin = angles
        self.pointed_to += cos, sin
        return attention.num_sinks, cos.data_ptr(), sin.data_ptr(), self.count * cos.shape[2] * (cos.shape[0] > 1)

    def _describe_slots(self, window: int | None, slots: int | Tensor, num_slots: int) -> tuple[int, int, int] | None:
        """The first slot, the address of the slots, and the stride of its rows; notes how many slots there must be."""
        if isinstance(slots, int):
            self.slots_needed[window] = max(num_slots, slots + self.count)
            return None if slots < 0 or num_slots < 0 else (slots, 0, 0)
        if slots.shape not in ((1, self.count), (self.rows, self.count)):
            return None
        if slots.dtype is not torch.long or not slots.is_cpu:
            return None
        slots = slots.contiguous()
        numbers = slots.flatten().tolist()
        self.slots_needed[window] = max(num_slots, 1 + max(numbers))
        self.pointed_to.append(slots)
        is_positive = num_slots >= 0 and min(numbers) >= 0
        return (0, slots.data_ptr(), self.count if slots.shape[0] > 1 else 0) if is_positive else None

    def add_key_slots(self, cache: MambaFormerCache) -> bool:
        """The memory of keys and values of each attention layer, which has all slots that are read or written."""
        numbers: list[int] = []
        windows = {window: index for index, window in enumerate(self.layouts)}
        new_keys: dict[tuple[int, int], Tensor] = {}
        for slots in self.linked.key_slots:
            window, shape = slots.window, (slots.key_heads, slots.head_dim)
            like = new_keys.get(shape)
            if like is None:
                like = new_keys[shape] = self.hidden_states.new_empty((self.rows, shape[0], self.count, shape[1]))
            placed = cache.key_store(slots.position).place(like, self.layouts[window])
            if placed is None:
                return False
            keys, values = placed.keys, placed.values
            codecs = describe_codecs(placed, like)
            capacity = keys.shape[2]
            if codecs is None or capacity < self.slots_needed[window]:
                return False
            numbers += windows[window], keys.data_ptr(), values.data_ptr(), capacity, *codecs
            self.pointed_to += keys, values
        self.key_slots = self._address((ctypes.c_int64 * len(numbers))(*numbers))
        return True

    # ---- recurrent mixers

    def add_states(self, cache: MambaFormerCache) -> bool:
        """The states of recurrent mixers before and after the token."""
        stored = self.hidden_states.dtype
        wide = torch.float64 if stored is torch.float64 else torch.float32
        positions = dict.fromkeys(state.position for state in self.linked.states)
        states = {position: cache.recurrent_states(position, self.hidden_states) for position in positions}
        numbers: list[int] = []
        for state in self.linked.states:
            new = self.hidden_states.new_empty((self.rows, *state.shape), dtype=wide if state.is_wide else stored)
            old = states[state.position].get(state.name)
            if old is not None and not _is_like(old, new):
                return False
            numbers += 0 if old is None else old.data_ptr(), new.data_ptr()
            self.new_states.append((state, new))
            self.pointed_to.append(old)
        self.states = self._address((ctypes.c_int64 * len(numbers))(*numbers))
        return True

    def stage_states(self, cache: MambaFormerCache) -> None:
        for state, new in self.new_states:
            store = cache.recurrent_store(state.position)
            if store.rounds_states and state.is_wide:
                new = round_states(new, cache.token_positions(self.hidden_states)[:, 0])
            store.update(state.name, new, state.is_wide)


def _is_like(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.dtype is new.dtype and old.is_contiguous() and may_run_forward(old)


def _takes_angles(hidden_states: Tensor, angles: tuple[Tensor, Tensor], head_dim: int) -> bool:
    rows, count, _ = hidden_states.shape
    shapes = {tuple(angle.shape) for angle in angles}
    fits = len(shapes) == 1 and shapes <= {(rows, count, head_dim), (1, count, head_dim)} and head_dim % 2 == 0
    return fits and all(angle.is_contiguous() for angle in angles) and may_run_forward(hidden_states, *angles)


__all__ = ["DecodePrograms"]
