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
from torch.nn.modules.module import _global_forward_hooks, _global_forward_pre_hooks

from .cpu_decode_mambaformer import (
    LANES,
    MOST_ROWS,
    Weight,
    describe_expert,
    describe_linear,
    is_stored,
    kernel_of,
    strides_of_mask,
    structure,
    takes,
    takes_mask,
)

_Recurrence = structure(
    "Recurrence",
    "conv_weight conv_bias A_log D channels taps numbers rank norms eps window next_window state next_state",
    norms=ctypes.c_int64 * 3,
    eps=ctypes.c_double * 3,
)
_Block = structure(
    "Block",
    "kind norm eps weights scaling heads key_heads head_dim plan keys values capacity mamba",
    eps=ctypes.c_double,
    weights=Weight * 4,
    scaling=ctypes.c_double,
    mamba=_Recurrence,
)
_Plan = structure("Plan", "mask mask_row mask_query keys first_slot slots slots_row")
_Tokens = structure("Tokens", "rows count width cosines sines angle_row")
_ATTENTION, _MLP, _MAMBA = range(3)
_PROJECTIONS = {
    "self_attn": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
    "mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"),
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
        layers: list[nn.Module],
        weights: Any,
        hidden_states: Tensor,
        plans: Mapping[int | None, Any],
        experts: dict[str, dict[str, Any]],
        position_embeddings: tuple[Tensor, Tensor] | None,
        cache: Any,
        lengths: Tensor | None,
    ) -> Tensor | None:
        """What `layers` make of packed (rows, tokens, hidden); `None`, and nothing has changed, if they have to run.

        `weights` is the stamp of the stack's; the others are what every layer is given.
        """
        num_rows = hidden_states.numel() // hidden_states.shape[-1]
        is_few = cache is not None and weights is not None and num_rows <= MOST_ROWS.get(hidden_states.dtype, 0)
        if not is_few or torch.is_grad_enabled() or not takes(hidden_states):
            return None
        written, key = self.written, (weights, hidden_states.dtype, len(layers))
        if written is None or written.key != key or written.experts is not experts:
            written = self.written = _Layers(key, layers, experts)
        if not written.may_run() or hidden_states.shape[-1] not in written.widths:
            return None
        step = _step_of(written, hidden_states, plans, position_embeddings, cache)
        return None if step is None else written.run(hidden_states, step, cache, lengths)


class _Layers:
    """The blocks of all layers as C structures, and what runs them: kernels, or a layer where Mamba is left to it."""

    def __init__(self, key: tuple, layers: list[nn.Module], experts: dict[str, dict[str, Any]]):
        self.key, self.experts = key, experts
        dtype = self.dtype = key[1]
        self.attention: list[tuple[int, nn.Module]] = []  # index of the block, layer
        self.mamba: list[tuple[int, nn.Module]] = []
        self.deltas: list[Tensor] = []
        self.norms: list[nn.Module] = []  # of each block
        self.watched = list(layers)
        blocks: list[_Block | None] = []
        for layer in layers:
            if layer.has_attention:
                self.attention.append((len(blocks), layer))
                blocks.append(self._block(_ATTENTION, layer, "self_attn"))
            if layer.has_mamba:
                self.mamba.append((len(blocks), layer))
                blocks.append(self._block(_MAMBA, layer, "mamba"))
            if layer.has_mlp:
                blocks.append(self._block(_MLP, layer, "mlp"))
        self.takes_mamba = all(blocks[index] is not None for index, _ in self.mamba)
        for index, _ in self.mamba:
            blocks[index] = blocks[index] or _Block()  # which is left to the layer
        self.widths = {norm.weight.shape[0] for norm in self.norms}
        is_known = len(self.widths) == 1 and None not in blocks
        self.is_whole = is_known and kernel_of("run_blocks", dtype) is not None
        self.blocks = (_Block * len(blocks))(*blocks) if self.is_whole else None
        self.windows = list(dict.fromkeys(layer.window for _, layer in self.attention))
        for index, layer in self.attention if self.is_whole else ():
            self.blocks[index].plan = self.windows.index(layer.window)
        self.in_one = [range(len(blocks))]
        self.in_parts = list(_around(self.mamba, len(blocks)))
        self._watch()

    def _block(self, kind: int, layer: nn.Module, name: str) -> _Block | None:
        mixer, norm = getattr(layer, name), getattr(layer, f"{name}_layernorm")
        self.watched += [mixer, norm]
        self.norms.append(norm)
        scaled, block = layer.experts_of(name, self.experts), _Block(kind=kind)
        for i, short in enumerate(_PROJECTIONS[name]):
            described = self._described(getattr(mixer, short), scaled.get(short))
            if described is None:
                return None
            block.weights[i] = described
        width = norm.weight.shape[0]
        if not is_stored(norm.weight, self.dtype):
            return None
        block.norm = norm.weight.data_ptr()
        shapes = [(weight.outputs, weight.inputs) for weight in block.weights]
        if kind == _MAMBA:
            return block if self._add_recurrence(block.mamba, mixer, shapes, width) else None
        if kind == _MLP:
            inner = shapes[0][0]
            fits = shapes[:3] == [(inner, width), (inner, width), (width, inner)]
            return block if fits and mixer.is_silu else None
        block.head_dim = mixer.head_dim
        block.heads, block.key_heads = shapes[0][0] // mixer.head_dim, shapes[1][0] // mixer.head_dim
        wide, narrow = block.heads * mixer.head_dim, block.key_heads * mixer.head_dim
        fits = shapes == [(wide, width), (narrow, width), (narrow, width), (width, wide)]
        return block if fits and mixer.head_dim % LANES[self.dtype] == 0 else None

    def _add_recurrence(self, mamba: _Recurrence, mixer: nn.Module, shapes: list[tuple[int, int]], width: int) -> bool:
        conv, rank, numbers = mixer.conv1d, mixer.rank, mixer.state_size
        channels, _, taps = conv.weight.shape
        weights = [conv.weight, mixer.A_log, mixer.D]
        norms = [getattr(mixer, name) for name in _INNER_NORMS] if mixer.has_inner_norms else []
        optional = [conv.bias] if conv.bias is not None else []
        if not all(
            is_stored(weight, self.dtype) for weight in (*weights, *optional, *(norm.weight for norm in norms))
        ):
            return False
        mamba.conv_weight, mamba.A_log, mamba.D = (weight.data_ptr() for weight in weights)
        mamba.conv_bias = 0 if conv.bias is None else conv.bias.data_ptr()
        mamba.channels, mamba.taps, mamba.numbers, mamba.rank = channels, taps, numbers, rank
        for i, norm in enumerate(norms):
            mamba.norms[i] = norm.weight.data_ptr()
        chosen = rank + 2 * numbers
        fits = shapes == [(2 * channels, width), (chosen, channels), (channels, rank), (width, channels)]
        return fits and mixer.A_log.shape == (channels, numbers) and mixer.D.shape == (channels,)

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
        return weight if describe_expert(weight, scaled.vectors, delta, (delta.shape[0], 1, width)) else None

    def _watch(self) -> None:
        """Remembers where it would be seen that somebody wants to see a module run, or runs it in another way."""
        projections = [module for mixer in self.watched for module in mixer._modules.values()]
        modules = [module for module in dict.fromkeys([*self.watched, *projections]) if module is not None]
        self.hooks = [hooks for module in modules for hooks in (module._forward_hooks, module._forward_pre_hooks)]
        self.attributes = [module.__dict__ for module in modules]

    def may_run(self) -> bool:
        is_hooked = _global_forward_hooks or _global_forward_pre_hooks or any(self.hooks)
        if not self.is_whole or is_hooked or any("forward" in attributes for attributes in self.attributes):
            return False
        return not any(layer.self_attn.attention_dropout and layer.self_attn.training for _, layer in self.attention)

    def run(self, hidden_states: Tensor, step: "_Step", cache: Any, lengths: Tensor | None) -> Tensor:
        blocks = type(self.blocks).from_buffer_copy(self.blocks)  # other threads may run the same layers
        for block, norm in zip(blocks, self.norms, strict=True):
            block.eps = norm.variance_epsilon
        for index, layer in self.attention:
            block, layout = blocks[index], step.layouts[layer.window]
            block.scaling = layer.self_attn.scaling
            keys, values = cache.layers[layer.layer_idx].attention.place(step.like(block), layout)
            block.keys, block.values, block.capacity = keys.data_ptr(), values.data_ptr(), keys.shape[2]
        parts, states = self.in_parts, None
        if step.tokens.count == 1 and lengths is None and not cache.recorded_reach and self.takes_mamba:
            states = step.states_of(self.mamba, blocks, cache)
            parts = self.in_parts if states is None else self.in_one
        kernel, start = kernel_of("run_blocks", self.dtype), ctypes.addressof(blocks)
        for part in parts:
            if isinstance(part, range):
                inputs, hidden_states = hidden_states.contiguous(), hidden_states.new_empty(hidden_states.shape)
                first = start + part.start * ctypes.sizeof(_Block)
                kernel(inputs.data_ptr(), ctypes.addressof(step.tokens), first, len(part),
                       ctypes.addressof(step.plans), hidden_states.data_ptr(), get_num_threads())  # fmt: skip
            else:
                hidden_states = part.add_mamba(hidden_states, self.experts, cache, lengths)
        for layer, window, state in states or ():
            cache.layers[layer.layer_idx].update_conv_state(window)
            cache.layers[layer.layer_idx].update_recurrent_state(state)
        return hidden_states


def _around(mamba: list[tuple[int, nn.Module]], num_blocks: int) -> Iterator[Any]:
    """Ranges of blocks, and between them the layers whose Mamba comes next."""
    start = 0
    for index, layer in [*mamba, (num_blocks, None)]:
        if index > start:
            yield range(start, index)
        if layer is not None:
            yield layer
        start = index + 1


class _Step:
    """What one forward adds: tokens and angles, and for each window its layout, mask and slots."""

    def __init__(self, hidden_states: Tensor, angles: tuple[Tensor, Tensor] | None, num_windows: int):
        rows, count, width = hidden_states.shape
        self.hidden_states, self.angles = hidden_states, angles
        self.tokens, self.plans = _Tokens(rows, count, width), (_Plan * max(num_windows, 1))()
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

    def states_of(self, mamba: list[tuple[int, nn.Module]], blocks: Any, cache: Any) -> list[tuple] | None:
        """Layer, window and state of each Mamba block as they are to become; `None` if kernels do not take the old."""
        rows, stored = self.tokens.rows, self.hidden_states.dtype
        wide = torch.float64 if stored == torch.float64 else torch.float32
        found = []
        for index, layer in mamba:
            block = blocks[index].mamba
            window = self.hidden_states.new_empty((rows, block.taps - 1, block.channels))
            state = self.hidden_states.new_empty((rows, block.channels, block.numbers), dtype=wide)
            old = cache.recurrent_states(layer.layer_idx, self.hidden_states)
            for name, new in (("conv", window), ("ssm", state)):
                if name in old and not _is_like(old[name], new):
                    return None
            block.window, block.state = (old[name].data_ptr() if name in old else 0 for name in ("conv", "ssm"))
            block.next_window, block.next_state = window.data_ptr(), state.data_ptr()
            if layer.mamba.has_inner_norms:
                block.eps[:] = [getattr(layer.mamba, name).variance_epsilon for name in _INNER_NORMS]
            found.append((layer, window, state))
            self.kept += old.values()
        return found


def _is_like(old: Tensor, new: Tensor) -> bool:
    return old.shape == new.shape and old.dtype is new.dtype and old.is_contiguous() and takes(old)


def _step_of(written: _Layers, hidden_states: Tensor, plans: Mapping, angles: Any, cache: Any) -> _Step | None:
    """The step, checked; `None` for what kernels do not take."""
    rows, count, _ = hidden_states.shape
    if any(delta.shape[0] != rows or count > 1 for delta in written.deltas):
        return None
    head_dims = {written.blocks[index].head_dim for index, _ in written.attention}
    if angles is not None and any(not _takes_angles(hidden_states, angles, head_dim) for head_dim in head_dims):
        return None
    step = _Step(hidden_states, angles, len(written.windows))
    for index, layer in written.attention:
        if layer.window not in step.layouts:
            plan = step.plans[written.blocks[index].plan]
            if not _write_plan(step, plan, layer.window, plans[layer.window], cache.layout(layer.layer_idx)):
                return None
    return step


def _write_plan(step: _Step, plan: Any, window: int | None, attention: Any, layout: Any) -> bool:
    rows, count, mask, slots = step.tokens.rows, step.tokens.count, attention.mask, layout.slots
    if attention.implementation != "sdpa" or attention.packing is not None or layout.sources is not None:
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
        if slots.shape not in ((1, count), (rows, count)) or slots.dtype is not torch.long:
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
