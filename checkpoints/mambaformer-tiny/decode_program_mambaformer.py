"""All layers over a few tokens by one call of a CPU kernel, or, for several tokens, one between two Mamba mixers.

At one token a layer takes as long in Python as in memory: modules, views, allocations and the meetings of threads cost
more than arithmetic. So what a kernel has to know of the layers is written down once, for as long as weights and
experts stay what they are, and a step only adds where keys are and what the mask is. What is computed, and how it is
rounded, is what the layers themselves would have computed, bit for bit.
"""

import ctypes
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, get_num_threads, nn

from .modeling_stack_mambaformer import Place
from .ops_cpu_decode_mambaformer import (
    LANES,
    MOST_ROWS,
    describe_expert,
    describe_linear,
    is_stored,
    strides_of_mask,
    takes,
    takes_mask,
)
from .ops_cpu_interface_mambaformer import (
    ATTENTION,
    MAMBA,
    MLP,
    Block,
    Plan,
    Recurrence,
    Tokens,
    Weight,
    fits_kernel,
    kernel_of,
)
from .ops_eligibility_mambaformer import SILU_TYPES, Watch, is_of_own_type, is_own_attention

_LOWERINGS = {"attention": ATTENTION, "mlp": MLP, "mamba": MAMBA}
_PROJECTIONS = {
    ATTENTION: ("q_proj", "k_proj", "v_proj", "o_proj"),
    MLP: ("gate_proj", "up_proj", "down_proj"),
    MAMBA: ("in_proj", "x_proj", "dt_proj", "out_proj"),
}
_INNER_NORMS = ("dt_layernorm", "b_layernorm", "c_layernorm")


class FewTokens:
    """The layers of a model, made ready for kernels; made anew when weights or experts have changed."""

    def __init__(self):
        self.written: _Layers | None = None

    def __getstate__(self) -> dict:
        return {}  # a copied model has its weights elsewhere

    def __setstate__(self, state: dict) -> None:
        self.__init__()

    def run(
        self,
        places: list[Place],
        weights: Any,
        hidden_states: Tensor,
        plans: Mapping[int | None, Any],
        experts: dict[str, dict[str, Any]],
        position_embeddings: tuple[Tensor, Tensor] | None,
        cache: Any,
        lengths: Tensor | None,
    ) -> Tensor | None:
        """What the layers make of packed (rows, tokens, hidden); `None`, and nothing has changed, if they have to run.

        `weights` is the stamp of the stack's; the others are what every layer is given.
        """
        num_rows = hidden_states.numel() // hidden_states.shape[-1]
        is_few = cache is not None and weights is not None and num_rows <= MOST_ROWS.get(hidden_states.dtype, 0)
        if not is_few or torch.is_grad_enabled() or not takes(hidden_states):
            return None
        written, key = self.written, (weights, hidden_states.dtype, [id(place.module) for place in places])
        if written is None or written.key != key or written.experts is not experts:
            written = self.written = _Layers(key, places, experts)
        held = written.memory.hold()
        if held is None or written.watch.has_changed():  # another thread replaces weights, or a user modules
            written = self.written = _Layers(key, places, experts)
            held = written.memory.hold()
        if held is None or not written.may_run() or hidden_states.shape[-1] not in written.widths:
            return None
        step = _step_of(written, hidden_states, plans, position_embeddings, cache)
        return None if step is None else written.run(hidden_states, step, cache, lengths)


_address_of, _storage_of = Tensor.data_ptr, Tensor.untyped_storage  # looked up once


class _Memory:
    """Where the tensors are found that the structures point into, and the addresses that are written there.

    A weight can be replaced while another thread computes, and its memory can move while the weight stays. So every
    step takes hold of the memory for as long as it runs, and compares the addresses first.
    """

    def __init__(self):
        self.found_at: list[tuple[Mapping[str, Any], str]] = []
        self.addresses: list[int] = []
        # Inner tensors of quantized weights, by the parameters that the weights are among.
        self.packed: list[tuple[Mapping[str, Any], str]] = []
        self.packed_addresses: list[int] = []

    def add(self, holder: Mapping[str, Any], name: str, address: int) -> None:
        self.found_at.append((holder, name))
        self.addresses.append(address)

    def address_of(self, holder: Mapping[str, Any], name: str) -> int:
        address = holder[name].data_ptr()
        self.add(holder, name, address)
        return address

    def add_linear(self, module: nn.Module, described: Weight) -> None:
        """Adds the weight and the bias of a linear module, as they are described to a kernel."""
        parameters = module._parameters
        if described.bias:
            self.add(parameters, "bias", described.bias)
        if not described.scale:
            self.add(parameters, "weight", described.data)
            return
        for name in ("qdata", "scale" if "scale" in vars(parameters["weight"]) else "scale_and_zero"):
            self.packed.append((parameters, name))
        self.packed_addresses += described.data, described.scale

    def hold(self) -> list[Any] | None:
        """The memory, which lives as long as this list does; `None` if any of it is elsewhere now, or gone.

        A tensor alone is not enough: another thread that writes `weight.data` gives it other memory.
        """
        try:
            tensors = [holder[name] for holder, name in self.found_at]
            tensors += [vars(parameters["weight"])[name] for parameters, name in self.packed]
            held = list(map(_storage_of, tensors))
            return held if list(map(_address_of, tensors)) == self.addresses + self.packed_addresses else None
        except (KeyError, TypeError):  # a parameter that became an attribute, as by pruning, or was set to `None`
            return None


class _Layers:
    """The blocks of all layers as C structures, and what runs them: kernels, or a layer's own recurrent mixer."""

    def __init__(self, key: tuple, places: list[Place], experts: dict[str, dict[str, Any]]):
        self.key, self.experts, self.is_whole = key, experts, False
        self.attention: list[tuple[int, Place, nn.Module]] = []  # index of the block, where its layer is, mixer
        self.recurrent: list[tuple[int, Place, str]] = []  # index of the block, where its layer is, name of the mixer
        self.deltas: list[Tensor] = []
        self.norms: dict[int, nn.Module] = {}  # by index of the block
        self.memory = _Memory()
        self.watch = Watch(_modules_that_run(places))
        if self.watch.are_own:
            self._write(places)

    def _write(self, places: list[Place]) -> None:
        dtype = self.dtype = self.key[1]
        blocks: list[Block | None] = []
        for place in places:
            for name in place.layer.steps:
                mixer = getattr(place.layer, name)
                kind = _LOWERINGS[mixer.lowering] if _has_lowering(mixer) else None
                if name in place.layer.recurrent:
                    self.recurrent.append((len(blocks), place, name))
                if kind == ATTENTION:
                    self.attention.append((len(blocks), place, mixer))
                if kind is not None:
                    self.norms[len(blocks)] = getattr(place.layer, f"{name}_layernorm")
                blocks.append(None if kind is None else self._block(kind, place, name))
        self.has_recurrences = all(blocks[index] is not None for index, _, _ in self.recurrent)
        for index, _, _ in self.recurrent:
            blocks[index] = blocks[index] or Block(kind=MAMBA)  # never run: the layer runs its mixer
        self.widths = {norm.weight.shape[0] for norm in self.norms.values()}
        is_known = len(self.widths) == 1 and None not in blocks
        self.is_whole = is_known and kernel_of("run_blocks", dtype) is not None
        self.blocks = (Block * len(blocks))(*blocks) if self.is_whole else None
        self.windows = list(dict.fromkeys(place.window for _, place, _ in self.attention))
        for index, place, _ in self.attention if self.is_whole else ():
            self.blocks[index].plan = self.windows.index(place.window)
        self.in_one = [range(len(blocks))]
        self.in_parts = list(_around(self.recurrent, len(blocks)))

    def _block(self, kind: int, place: Place, name: str) -> Block | None:
        layer = place.layer
        mixer, norm = getattr(layer, name), getattr(layer, f"{name}_layernorm")
        scaled, block = layer.vectors_of(name, place.vectors_of(self.experts)), Block(kind=kind)
        for i, short in enumerate(_PROJECTIONS[kind]):
            described = self._described(getattr(mixer, short), scaled.get(short))
            if described is None:
                return None
            self.memory.add_linear(getattr(mixer, short), described)
            block.weights[i] = described
        width = norm.weight.shape[0]
        if not is_stored(norm.weight, self.dtype, (width,)):
            return None
        block.norm = self.memory.address_of(norm._parameters, "weight")
        shapes = [(weight.outputs, weight.inputs) for weight in block.weights]
        if kind == MAMBA:
            return block if self._add_recurrence(block.mamba, mixer, shapes, width) else None
        if kind == MLP:
            inner = shapes[0][0]
            fits = shapes[:3] == [(inner, width), (inner, width), (width, inner)]
            return block if fits and type(mixer.act_fn) in SILU_TYPES else None
        block.head_dim = mixer.head_dim
        block.heads, block.key_heads = shapes[0][0] // mixer.head_dim, shapes[1][0] // mixer.head_dim
        wide, narrow = block.heads * mixer.head_dim, block.key_heads * mixer.head_dim
        fits = shapes == [(wide, width), (narrow, width), (narrow, width), (width, wide)]
        fits = fits and block.key_heads > 0 and block.heads % block.key_heads == 0
        return block if fits and mixer.head_dim % LANES[self.dtype] == 0 else None

    def _add_recurrence(self, mamba: Recurrence, mixer: nn.Module, shapes: list[tuple[int, int]], width: int) -> bool:
        conv, rank, numbers = mixer.conv1d, mixer.rank, mixer.state_size
        channels, _, taps = conv.weight.shape
        norms = [getattr(mixer, name) for name in _INNER_NORMS] if mixer.has_inner_norms else []
        expected = [(conv.weight, (channels, 1, taps)), (mixer.A_log, (channels, numbers)), (mixer.D, (channels,))]
        expected += [] if conv.bias is None else [(conv.bias, (channels,))]
        expected += [(norm.weight, (size,)) for norm, size in zip(norms, (rank, numbers, numbers), strict=False)]
        if not all(is_stored(weight, self.dtype, shape) for weight, shape in expected):
            return False
        address_of = self.memory.address_of
        mamba.conv_weight = address_of(conv._parameters, "weight")
        mamba.A_log, mamba.D = (address_of(mixer._parameters, name) for name in ("A_log", "D"))
        mamba.conv_bias = 0 if conv.bias is None else address_of(conv._parameters, "bias")
        mamba.channels, mamba.taps, mamba.numbers, mamba.rank = channels, taps, numbers, rank
        for i, norm in enumerate(norms):
            mamba.norms[i] = address_of(norm._parameters, "weight")
        chosen = rank + 2 * numbers
        fits = shapes == [(2 * channels, width), (chosen, channels), (channels, rank), (width, channels)]
        return fits

    def _described(self, module: nn.Module, scaled: Any) -> Weight | None:
        weight = describe_linear(module, self.dtype)
        if weight is None or scaled is None:
            return weight
        on_outputs = scaled.side == "output"
        width = weight.outputs if on_outputs else weight.inputs
        delta = scaled.delta
        fits = scaled.mesh is None and scaled.vectors.dtype is self.dtype and scaled.vectors.shape[0] == width
        if not fits or (on_outputs and weight.bias):
            return None
        weight.on_outputs = on_outputs
        if delta.ndim == 3:
            self.deltas.append(delta)
        if not describe_expert(weight, scaled.vectors, delta, (delta.shape[0], 1, width)):
            return None
        self.memory.add(vars(scaled), "vectors", weight.basis)
        self.memory.add(vars(scaled), "delta", weight.delta)
        return weight

    def may_run(self) -> bool:
        if not self.is_whole or not self.watch.may_replace():
            return False
        return not any(mixer.attention_dropout and mixer.training for _, _, mixer in self.attention)

    def run(self, hidden_states: Tensor, step: "_Step", cache: Any, lengths: Tensor | None) -> Tensor | None:
        blocks = type(self.blocks).from_buffer_copy(self.blocks)  # other threads may run the same layers
        for index, norm in self.norms.items():
            blocks[index].eps = norm.variance_epsilon
        for index, place, mixer in self.attention:
            block, layout = blocks[index], step.layouts[place.window]
            block.scaling = mixer.scaling
            like = step.like(block)
            keys, values = cache.key_store(place.position).place(like, layout)
            if not _are_slots(keys, values, like):
                return None
            block.keys, block.values, block.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[2]
            step.kept += keys, values
        parts, states = self.in_parts, None
        if step.tokens.count == 1 and lengths is None and not cache.replay_reach and self.has_recurrences:
            states = step.states_of(self.recurrent, blocks, cache)
            parts = self.in_parts if states is None else self.in_one
        kernel, start = kernel_of("run_blocks", self.dtype), ctypes.addressof(blocks)
        if not fits_kernel()(ctypes.addressof(step.tokens), start, len(blocks), ctypes.addressof(step.plans)):
            return None
        for part in parts:
            if isinstance(part, range):
                inputs, hidden_states = hidden_states.contiguous(), hidden_states.new_empty(hidden_states.shape)
                first = start + part.start * ctypes.sizeof(Block)
                kernel(inputs.data_ptr(), ctypes.addressof(step.tokens), first, len(part),
                       ctypes.addressof(step.plans), hidden_states.data_ptr(), get_num_threads())  # fmt: skip
            else:
                place, name = part
                context = {"cache": place.cache_of(cache), "lengths": lengths, "positions": None}
                hidden_states, _ = place.layer.step(name, hidden_states, place.vectors_of(self.experts), context)
        for position, window, state in states or ():
            cache.layers[position].update_conv_state(window)
            cache.layers[position].update_recurrent_state(state)
        return hidden_states


def _modules_that_run(places: list[Place]) -> Iterator[nn.Module]:
    """All modules whose results the blocks compute; what is not ours, and what it holds, included."""
    for place in places:
        yield place.module
        left_out = _run_as_modules(place.layer)
        for name, module in place.module._modules.items():  # mixers and norms
            if module is not None and name not in left_out:
                yield module
                yield from (child for child in module._modules.values() if child is not None)


def _run_as_modules(layer: Any) -> set[str]:
    """Recurrent mixers that no kernel stands in for, and their norms, by their names in the layer."""
    names = () if layer is None else layer.recurrent.intersection(layer.steps)
    names = [name for name in names if not _has_lowering(getattr(layer, name))]
    return {*names, *(f"{name}_layernorm" for name in names)}


def _has_lowering(mixer: nn.Module) -> bool:
    return is_of_own_type(mixer) and mixer.lowering is not None


def _around(recurrent: list[tuple[int, Place, str]], num_blocks: int) -> Iterator[Any]:
    """Ranges of blocks, and between them the place and the name of each recurrent mixer."""
    start = 0
    for index, place, name in [*recurrent, (num_blocks, None, "")]:
        if index > start:
            yield range(start, index)
        if place is not None:
            yield place, name
        start = index + 1


class _Step:
    """What one forward adds: tokens and angles, and for each window its layout, mask and slots."""

    def __init__(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor] | None, num_windows: int):
        rows, count, width = hidden_states.shape
        self.hidden_states, self.angles = hidden_states, angles
        self.tokens, self.plans = Tokens(rows, count, width), (Plan * max(num_windows, 1))()
        self.layouts: dict[int | None, Any] = {}
        self.kept: list[Tensor] = []  # what the structures point to
        self._like: Tensor | None = None
        if angles is not None:
            cos, sin = angles
            self.tokens.cosines, self.tokens.sines = cos.data_ptr(), sin.data_ptr()
            self.tokens.angle_row = count * cos.shape[2] if cos.shape[0] > 1 else 0

    def like(self, block: Any) -> Tensor:
        """New keys of a block, without their values."""
        shape = (self.tokens.rows, block.key_heads, self.tokens.count, block.head_dim)
        if self._like is None or self._like.shape != shape:
            self._like = self.hidden_states.new_empty(shape)
        return self._like

    def states_of(self, recurrent: list[tuple[int, Place, str]], blocks: Any, cache: Any) -> list[tuple] | None:
        """Position, window and state of each Mamba block as they are to be; `None` if kernels do not take the old."""
        rows, stored = self.tokens.rows, self.hidden_states.dtype
        wide = torch.float64 if stored == torch.float64 else torch.float32
        found = []
        for index, place, name in recurrent:
            block, mixer = blocks[index].mamba, getattr(place.layer, name)
            window = self.hidden_states.new_empty((rows, block.taps - 1, block.channels))
            state = self.hidden_states.new_empty((rows, block.channels, block.numbers), dtype=wide)
            old = cache.recurrent_states(place.position, self.hidden_states)
            for state_name, new in (("conv", window), ("ssm", state)):
                if state_name in old and not _is_like(old[state_name], new):
                    return None
            block.window, block.state = (old[each].data_ptr() if each in old else 0 for each in ("conv", "ssm"))
            block.next_window, block.next_state = window.data_ptr(), state.data_ptr()
            if mixer.has_inner_norms:
                block.eps[:] = [getattr(mixer, name).variance_epsilon for name in _INNER_NORMS]
            found.append((place.position, window, state))
            self.kept += old.values()
        return found


def _is_like(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.dtype is new.dtype and old.is_contiguous() and takes(old)


def _are_slots(keys: Tensor, values: Tensor, like: Tensor) -> bool:
    """Whether these are slots for keys and values like `like`, (rows, key heads, tokens, head_dim)."""
    (rows, heads, _, width), shape = like.shape, keys.shape
    if (rows, heads, width) != (shape[0], shape[1], shape[3]) or not keys.dtype is values.dtype is like.dtype:
        return False
    is_whole = values.shape == shape and keys.is_contiguous() and values.is_contiguous()
    return is_whole and not (keys.is_neg() or values.is_neg())


def _step_of(written: _Layers, hidden_states: Tensor, plans: Mapping, angles: Any, cache: Any) -> _Step | None:
    """The step, checked; `None` for what kernels do not take."""
    rows, count, _ = hidden_states.shape
    if any(delta.shape[0] != rows or count > 1 for delta in written.deltas):
        return None
    head_dims = {written.blocks[index].head_dim for index, _, _ in written.attention}
    if angles is not None and any(not _takes_angles(hidden_states, angles, head_dim) for head_dim in head_dims):
        return None
    step = _Step(hidden_states, angles, len(written.windows))
    for index, place, _ in written.attention:
        window = place.window
        if window not in step.layouts:
            plan = step.plans[written.blocks[index].plan]
            if not _write_plan(step, plan, window, plans[window], cache.layout(place.position)):
                return None
    return step


def _write_plan(step: _Step, plan: Any, window: int | None, attention: Any, layout: Any) -> bool:
    rows, count, mask, slots = step.tokens.rows, step.tokens.count, attention.mask, layout.slots
    if not is_own_attention(attention.implementation) or attention.alignment is not None or layout.sources is not None:
        return False
    if mask is None and count > 1:
        return False  # a causal mask that attention makes by itself
    if mask is not None:
        if not takes_mask(mask, rows, count, layout.num_slots):
            return False
        plan.mask, (plan.mask_row, plan.mask_query) = mask.data_ptr(), strides_of_mask(mask)
        step.kept.append(mask)
    if isinstance(slots, int):
        plan.first_slot = slots
    else:
        if slots.shape not in ((1, count), (rows, count)) or slots.dtype is not torch.long or not slots.is_cpu:
            return False
        slots = slots.contiguous()
        plan.slots, plan.slots_row = slots.data_ptr(), count if slots.shape[0] > 1 else 0
        step.kept.append(slots)
    plan.keys, step.layouts[window] = layout.num_slots, layout
    return True


def _takes_angles(hidden_states: Tensor, angles: Iterable[Tensor], head_dim: int) -> bool:
    rows, count, _ = hidden_states.shape
    shapes = {tuple(angle.shape) for angle in angles}
    fits = len(shapes) == 1 and shapes <= {(rows, count, head_dim), (1, count, head_dim)} and head_dim % 2 == 0
    return fits and all(angle.is_contiguous() for angle in angles) and takes(hidden_states, *angles)


__all__ = ["FewTokens"]
