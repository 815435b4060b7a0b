"""The cache of MambaFormer: all that one request has, and nothing that another one could see.

Three ideas carry it:

- *Slots are a function of positions.* A token's position is the number of real tokens before it in its row, and the
  retention says in which slot the key of position p lives. What a query may see then follows from two positions;
  windows, sinks and padding are one rule.
- *Storage and retention compose.* A `Buffer` grows or is of fixed size; a `Retention` keeps all or slides.
- *A forward is a transaction.* Layers write where nothing visible lives, or stage what they would overwrite;
  `commit` makes it all true at once, so a forward that fails leaves the cache as it was.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import Cache, CacheLayerMixin, LinearAttentionCacheLayerMixin

EXPERT_CHANGE_POLICIES = ("recompute", "reset", "continue", "error")
# Room that a growing buffer takes beyond what it needs, so that appending a token rarely copies.
MIN_SPARE_SLOTS, SPARE_FRACTION = 64, 4


# --------------------------------------------------------------------------------------- retention: which keys stay


@dataclass(frozen=True)
class Retention:
    """Which keys stay, and where: all of them, or the first `sinks` and a ring of the last `window`.

    Position p lives in slot p while everything is kept or p is a sink (StreamingLLM, arXiv 2309.17453), else in slot
    `sinks + (p - sinks) % window`.
    """

    window: int | None = None
    sinks: int = 0

    @classmethod
    def of(cls, config, layer_idx: int) -> "Retention":
        """That of layer `layer_idx`."""
        window = config.window(layer_idx)
        return cls() if window is None else cls(window, config.num_sink_tokens)

    def is_visible(self, query_position: torch.Tensor, key_position: torch.Tensor) -> torch.Tensor:
        """Whether a query sees a key, from their positions alone; -1 is no position."""
        visible = (key_position >= 0) & (key_position <= query_position)
        if self.window is None:
            return visible
        return visible & ((query_position - key_position < self.window) | (key_position < self.sinks))

    def num_slots(self, num_tokens: int) -> int:
        """Slots that rows of up to `num_tokens` tokens need."""
        return num_tokens if self.window is None else min(num_tokens, self.window + self.sinks)

    def slot(self, position: Any) -> Any:
        """Slot of a position, given as an integer or as a tensor of any shape."""
        if self.window is None:
            return position
        in_ring = self.sinks + (position - self.sinks) % self.window
        if isinstance(position, int):
            return position if position < self.sinks else in_ring
        return torch.where(position < self.sinks, position, in_ring)

    def positions(self, counts: torch.Tensor, num_slots: int) -> torch.Tensor:
        """Position that each slot holds after `counts` (rows,) tokens: (rows, num_slots), -1 where it is empty."""
        slots, counts = torch.arange(num_slots, device=counts.device), counts[:, None]
        if self.window is None:
            return torch.where(slots < counts, slots, -1)
        newest = counts - 1 - self.sinks
        in_ring = newest - (newest - (slots - self.sinks)) % self.window
        in_ring = torch.where(in_ring >= 0, in_ring + self.sinks, -1)
        return torch.where(slots >= self.sinks, in_ring, torch.where(slots < counts, slots, -1))


@dataclass(frozen=True)
class Span:
    """The new tokens of one forward: row b holds the positions from `start[b]`, `lengths[b]` of them.

    Rows are packed: their real tokens come first, and what stands behind them are pads, which never count.

    Args:
        num_tokens: width of the forward, pads included.
        start: real tokens before it: an integer while no row ever had a pad, else a tensor (rows,) or (1,).
        lengths: real tokens of each row, (rows,); `None` when all are real.
        columns: width that was fed before, pads included; `None` when only the device knows it (static storage).
    """

    num_tokens: int
    start: Any = 0
    lengths: torch.Tensor | None = None
    columns: int | None = 0

    def starts(self, device: torch.device) -> torch.Tensor:
        """`start` as a tensor (rows,) or (1,)."""
        if isinstance(self.start, int):
            return torch.full((1,), self.start, dtype=torch.long, device=device)
        return self.start

    def positions(self, device: torch.device) -> torch.Tensor:
        """Position of every token: (rows or 1, num_tokens)."""
        return self.starts(device)[:, None] + torch.arange(self.num_tokens, device=device)

    def ends(self, device: torch.device) -> torch.Tensor:
        """Real tokens of each row with those of the span: (rows or 1,)."""
        return self.starts(device) + (self.num_tokens if self.lengths is None else self.lengths)


@dataclass(frozen=True)
class Layout:
    """How the layers of one retention take in a span; made once per forward.

    Args:
        num_slots: slots in use once the span is in.
        key_positions: (rows or 1, keys), the positions of what attention sees; `None` when no mask is needed.
        slots: where the new keys go, if they may be written in place: the first of adjoining slots, or a tensor
            (rows or 1, num_tokens). Attention then sees the first `num_slots` slots.
        num_stored, sources: if the new keys would overwrite some that their own queries still see: attention sees the
            `num_stored` old slots and the new keys behind them, and `sources` (rows or 1, num_slots) says which of
            these each slot holds from the commit on.
    """

    num_slots: int
    key_positions: torch.Tensor | None
    slots: Any = None
    num_stored: int = 0
    sources: torch.Tensor | None = None


def plan_layout(retention: Retention, span: Span, device: torch.device, fixed_size: int | None = None) -> Layout:
    """Plans how `retention` takes in `span`, for growing storage or for one of `fixed_size` slots."""
    num_slots = retention.num_slots(span.columns + span.num_tokens if fixed_size is None else fixed_size)
    if retention.window is None or (span.num_tokens == 1 and span.lengths is None):
        return _plan_in_place(retention, span, device, num_slots, fixed_size is not None)
    return _plan_staged(retention, span, device, num_slots, fixed_size is not None)


def _plan_in_place(retention, span, device, num_slots, is_fixed) -> Layout:
    is_known = isinstance(span.start, int)
    sees_all = is_known and not is_fixed and (span.num_tokens == 1 or span.start == 0)
    if retention.window is None:
        # A slot that holds nothing yet has a position that no query of its row has reached.
        key_positions = torch.arange(num_slots, device=device)[None]
    else:
        key_positions = retention.positions(span.ends(device), num_slots)
    return Layout(
        num_slots=num_slots,
        key_positions=None if sees_all else key_positions,
        slots=retention.slot(span.start if is_known else span.positions(device)),
    )


def _plan_staged(retention, span, device, num_slots, is_fixed) -> Layout:
    num_stored = num_slots if is_fixed else retention.num_slots(span.columns)
    sees_all = isinstance(span.start, int) and span.start == 0 and not is_fixed and span.num_tokens <= retention.window
    starts = span.starts(device)
    key_positions = span.positions(device)
    if num_stored:
        stored = retention.positions(starts, num_stored)
        key_positions = torch.cat([stored.expand(key_positions.shape[0], -1), key_positions], dim=1)
    held = retention.positions(span.ends(device), num_slots)
    own_slot = torch.arange(num_slots, device=device).clamp(max=max(num_stored - 1, 0))
    return Layout(
        num_slots=num_slots,
        key_positions=None if sees_all else key_positions,
        num_stored=num_stored,
        sources=torch.where(held >= starts[:, None], num_stored + held - starts[:, None], own_slot),
    )


# ------------------------------------------------------------------------------------------- storage: where they are


class Buffer:
    """A tensor whose dimension `dim` has room to grow, or a fixed size; slots that were never written are zero.

    Growing buffers are shared by a fork until one side writes. Fixed ones keep their address.
    """

    def __init__(self, dim: int, fixed_size: int | None = None):
        self.dim, self.fixed_size = dim, fixed_size
        self.tensor: torch.Tensor | None = None
        self.is_shared = False

    def reserve(self, like: torch.Tensor, size: int) -> None:
        """Makes room for `size` slots shaped like those of `like`."""
        if self.tensor is not None and self.tensor.shape[self.dim] >= size:
            return
        capacity = self.fixed_size or size + max(MIN_SPARE_SLOTS, size // SPARE_FRACTION)
        shape = list(like.shape)
        shape[self.dim] = capacity
        old, self.tensor, self.is_shared = self.tensor, like.new_zeros(shape), False
        if old is not None:
            self.tensor.narrow(self.dim, 0, old.shape[self.dim]).copy_(old)

    def write(self, slots: Any, new: torch.Tensor) -> None:
        """Puts `new` into adjoining slots from `slots` on, or into the slots of a tensor (rows or 1, tokens)."""
        new = new.to(self.tensor.dtype)
        # A graph may hold the old values for its backward pass.
        if self.is_shared or (torch.is_grad_enabled() and (new.requires_grad or self.tensor.requires_grad)):
            self.tensor, self.is_shared = self.tensor.clone(), False
        if isinstance(slots, int):
            self.tensor.narrow(self.dim, slots, new.shape[self.dim]).copy_(new)
        elif slots.shape[0] == 1:
            self.tensor.index_copy_(self.dim, slots[0], new)
        else:
            self.tensor.scatter_(self.dim, _along(slots, new, self.dim), new)

    def view(self, size: int) -> torch.Tensor:
        """The first `size` slots."""
        return self.tensor if size == self.tensor.shape[self.dim] else self.tensor.narrow(self.dim, 0, size)

    def replace(self, new: torch.Tensor) -> None:
        """Puts `new` into the first slots, whatever they held."""
        if self.fixed_size is None and new.shape[self.dim] == self.tensor.shape[self.dim]:
            self.tensor, self.is_shared = new, False
        else:
            self.write(0, new)

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.tensor is not None:
            self.tensor, self.is_shared = _select_rows(self.tensor, rows, self.fixed_size is not None), False

    def drop(self) -> None:
        if self.tensor is not None:
            self.tensor = self.tensor.zero_() if self.fixed_size is not None else None
        self.is_shared = False

    def fork(self) -> "Buffer":
        other = Buffer(self.dim, self.fixed_size)
        if self.tensor is not None:
            self.is_shared = other.is_shared = self.fixed_size is None
            other.tensor = self.tensor if self.is_shared else self.tensor.clone()
        return other


def _along(index: torch.Tensor, like: torch.Tensor, dim: int) -> torch.Tensor:
    """Spreads `index` (rows or 1, n) over all dimensions of `like` but `dim`."""
    shape = [index.shape[0]] + [1] * (like.dim() - 1)
    shape[dim] = index.shape[1]
    full = list(like.shape)
    full[dim] = index.shape[1]
    return index.view(shape).expand(full)


def _select_rows(tensor: torch.Tensor, rows: torch.Tensor, in_place: bool) -> torch.Tensor:
    selected = tensor.index_select(0, rows.to(tensor.device))
    return tensor.copy_(selected) if in_place and selected.shape == tensor.shape else selected


class KeyValueStore:
    """Keys and values of one layer, each (rows, heads, slots, head_dim)."""

    def __init__(self, retention: Retention, fixed_size: int | None = None):
        fixed_size = None if fixed_size is None else retention.num_slots(fixed_size)
        self.retention, self.keys, self.values = retention, Buffer(2, fixed_size), Buffer(2, fixed_size)
        self.staged: list[torch.Tensor] | None = None
        self.num_slots = self.staged_slots = 0

    def update(self, keys: torch.Tensor, values: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in the new keys and values, (rows, heads, tokens, head_dim); returns what attention sees."""
        seen, self.staged = [], None if layout.sources is None else []
        self.staged_slots = layout.num_slots
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.reserve(new, layout.num_slots)
            if layout.sources is None:
                buffer.write(layout.slots, new)
                seen.append(buffer.view(layout.num_slots))
            else:
                both = torch.cat([buffer.view(layout.num_stored), new], dim=2) if layout.num_stored else new
                self.staged.append(both.gather(2, _along(layout.sources, both, 2)))
                seen.append(both)
        return seen[0], seen[1]

    def commit(self) -> None:
        if self.staged is not None:
            self.keys.replace(self.staged[0])
            self.values.replace(self.staged[1])
            self.staged = None
        self.num_slots = self.staged_slots

    def discard(self) -> None:
        self.staged, self.staged_slots = None, self.num_slots

    def drop(self) -> None:
        self.staged, self.num_slots, self.staged_slots = None, 0, 0
        self.keys.drop()
        self.values.drop()

    def select_rows(self, rows: torch.Tensor) -> None:
        self.keys.select_rows(rows)
        self.values.select_rows(rows)

    def fork_into(self, other: "KeyValueStore") -> None:
        other.keys, other.values = self.keys.fork(), self.values.fork()
        other.num_slots = other.staged_slots = self.num_slots

    def tensors(self) -> dict[str, torch.Tensor]:
        if self.keys.tensor is None:
            return {}
        return {"keys": self.keys.view(self.num_slots), "values": self.values.view(self.num_slots)}

    def allocated(self) -> dict[str, torch.Tensor]:
        return {} if self.keys.tensor is None else {"keys": self.keys.tensor, "values": self.values.tensor}

    def can_forget(self, columns: int) -> bool:
        """Whether tokens can be taken back by the clock alone: a ring must not have wrapped."""
        return self.retention.num_slots(columns) == columns

    def truncate(self, columns: int) -> None:
        if self.keys.fixed_size is None:
            self.num_slots = min(self.num_slots, self.retention.num_slots(columns))


class RecurrentStore:
    """The states of one recurrent mixer, by name; what they are is the mixer's business.

    Mamba keeps `"conv"` (rows, kernel - 1, channels), its last inputs, and `"ssm"` (rows, channels, state), float32.
    """

    def __init__(self, is_fixed: bool = False):
        self.is_fixed = is_fixed
        self.states: dict[str, torch.Tensor] = {}
        self.staged: dict[str, torch.Tensor] = {}

    def update(self, name: str, state: torch.Tensor) -> None:
        self.staged[name] = state

    def commit(self) -> None:
        for name, state in self.staged.items():
            if self.is_fixed and name in self.states:
                self.states[name].copy_(state)
            else:
                self.states[name] = state.clone() if self.is_fixed else state
        self.staged = {}

    def discard(self) -> None:
        self.staged = {}

    def drop(self) -> None:
        # A state of zeros is the state before the first token.
        self.states = {name: state.zero_() for name, state in self.states.items()} if self.is_fixed else {}
        self.staged = {}

    def select_rows(self, rows: torch.Tensor) -> None:
        self.states = {name: _select_rows(state, rows, self.is_fixed) for name, state in self.states.items()}

    def fork_into(self, other: "RecurrentStore") -> None:
        other.states = {name: state.clone() if self.is_fixed else state for name, state in self.states.items()}

    def tensors(self) -> dict[str, torch.Tensor]:
        return dict(self.states)

    allocated = tensors

    def can_forget(self, columns: int) -> bool:
        return False

    def truncate(self, columns: int) -> None:
        """Nothing to cut: a state has no length."""


# ------------------------------------------------------------------------------------------------------------ layers


@dataclass
class Clock:
    """Two lengths, two names: `columns` were fed (pads included), of which row b had `counts[b]` real tokens.

    `columns` is an integer, or a tensor () under static storage. `counts` is `None` while no row ever had a pad.
    """

    columns: Any = 0
    counts: torch.Tensor | None = None
    is_empty: bool = True

    @property
    def start(self) -> Any:
        """Real tokens before the next one, as a `Span` wants them."""
        if self.counts is not None:
            return self.counts
        return self.columns if isinstance(self.columns, int) else self.columns[None]


@dataclass(frozen=True)
class InForce:
    """What a text is encoded under: an expert, by the key of its content, and weights, by their stamp."""

    expert_key: Any = None
    weights: Any = None


class _CacheLayer:
    """What every layer of the cache can do; the stores do the work and each implements all of it."""

    is_croppable = True

    def _set_up(self, clock: Clock, stores: dict[str, Any], max_cache_len: int | None) -> None:
        self.clock, self.stores, self.max_cache_len = clock, stores, max_cache_len
        self.is_compileable = max_cache_len is not None
        self.attention: KeyValueStore | None = stores.get("attention")
        self.recurrent: RecurrentStore | None = stores.get("mamba")
        self.is_sliding = self.attention is not None and self.attention.retention.window is not None

    def each_store(self, method: str, *args) -> None:
        for store in self.stores.values():
            getattr(store, method)(*args)

    def fork_into(self, other: "_CacheLayer") -> None:
        for name, store in self.stores.items():
            store.fork_into(other.stores[name])

    def reset(self) -> None:
        self.each_store("drop")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.each_store("select_rows", beam_idx)

    def get_seq_length(self) -> int:
        return int(self.clock.columns)

    def get_max_length(self) -> int:
        return -1 if self.max_cache_len is None else self.max_cache_len

    get_max_cache_shape = get_max_length  # its name before transformers 5.19

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next forward's mask covers, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to do: stores take shape from what they are first given."""


class AttentionCacheLayer(_CacheLayer, CacheLayerMixin):
    """Keys and values of an attention layer."""

    supports_early_init = False

    def __init__(self, clock: Clock, stores: dict[str, Any], max_cache_len: int | None = None):
        self._set_up(clock, stores, max_cache_len)

    def update(self, key_states, value_states, layout, *args, **kwargs):
        return self.attention.update(key_states, value_states, layout)

    @property
    def keys(self) -> torch.Tensor | None:
        return self.attention.tensors().get("keys")

    @property
    def values(self) -> torch.Tensor | None:
        return self.attention.tensors().get("values")

    @property
    def is_initialized(self) -> bool:
        return self.attention.keys.tensor is not None


class RecurrentCacheLayer(_CacheLayer, LinearAttentionCacheLayerMixin):
    """Convolution window and state of a Mamba layer."""

    supports_early_init = False
    is_croppable = True
    record_past = False
    number_of_states = 1

    def __init__(self, clock: Clock, stores: dict[str, Any], max_cache_len: int | None = None):
        self._set_up(clock, stores, max_cache_len)

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.recurrent.update("conv", conv_states)
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.recurrent.update("ssm", recurrent_states)
        return recurrent_states

    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:
        return {0: self.recurrent.states.get("conv")}

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        return {0: self.recurrent.states.get("ssm")}

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return {0: "ssm" in self.recurrent.states and not self.clock.is_empty}


class HybridCacheLayer(RecurrentCacheLayer, AttentionCacheLayer):
    """Both, for a layer of attention and Mamba."""


LAYER_CLASSES = {
    ("attention",): AttentionCacheLayer,
    ("mamba",): RecurrentCacheLayer,
    ("attention", "mamba"): HybridCacheLayer,
}


class TokenLog:
    """What was fed, column by column with its pads: enough to feed it again."""

    def __init__(self, fixed_size: int | None = None):
        self.token_ids, self.mask, self.position_ids = (Buffer(1, fixed_size) for _ in range(3))
        self.has_embeddings = False

    def append(self, columns, token_ids, mask=None, position_ids=None) -> None:
        """Remembers (rows, tokens) behind `columns`; a mask or own positions are kept from their first use on."""
        size = columns + token_ids.shape[1] if isinstance(columns, int) else self.token_ids.fixed_size
        if isinstance(columns, int):
            slots = columns
        else:
            slots = (columns + torch.arange(token_ids.shape[1], device=token_ids.device))[None]
        self.token_ids.reserve(token_ids, size)
        self.token_ids.write(slots, token_ids)
        if mask is not None or self.mask.tensor is not None:
            mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
            self._start(self.mask, mask, size, lambda like: torch.ones_like(like))
            self.mask.write(slots, mask)
        if position_ids is not None:
            self._start(self.position_ids, position_ids, size, self._counted_positions)
            self.position_ids.write(slots, position_ids)

    def _start(self, buffer: Buffer, like: torch.Tensor, size: int, earlier: Callable) -> None:
        is_new = buffer.tensor is None
        buffer.reserve(like, size)
        if is_new:
            buffer.tensor = earlier(buffer.tensor)

    def _counted_positions(self, like: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(like) if self.mask.tensor is None else self.mask.tensor.to(like.dtype)
        return (mask.cumsum(1) - 1).clamp(min=0)[:, : like.shape[1]]

    def buffers(self) -> dict[str, Buffer]:
        return {"token_ids": self.token_ids, "mask": self.mask, "position_ids": self.position_ids}

    def fork(self) -> "TokenLog":
        other = TokenLog()
        for name, buffer in self.buffers().items():
            setattr(other, name, buffer.fork())
        other.has_embeddings = self.has_embeddings
        return other


# ------------------------------------------------------------------------------------------------------------- cache


class MambaFormerCache(Cache):
    """Holds a request: states, keys and values, positions, tokens, the expert in force and the weights it saw.

    Make one with `model.make_cache(...)`. Rows never see each other, and no other cache or model is ever written.

    Args:
        config: configuration of the model it serves.
        storage: `"dense"` grows with the text at amortised cost, `"static"` has a fixed size and fixed addresses.
        max_cache_len: columns (tokens with their pads) that static storage holds.
        on_expert_change: what happens to a text that was encoded under another expert or other weights.
            `"recompute"` encodes it again at the next forward; `"reset"` drops it, and the caller feeds it again;
            `"continue"` keeps it as it was encoded; `"error"` refuses the change.
        resolve: turns what a user may call an expert into `(expert, key)`; a model's caches bring the model's.

    Raises:
        ValueError: an unknown option, or static storage without `max_cache_len`.
    """

    def __init__(
        self,
        config,
        storage: str = "dense",
        max_cache_len: int | None = None,
        on_expert_change: str = "recompute",
        resolve: Callable | None = None,
    ):
        _check_options(storage, max_cache_len, on_expert_change)
        self.config, self.storage, self.max_cache_len = config, storage, max_cache_len
        self.on_expert_change, self.resolve = on_expert_change, resolve
        self.clock = Clock()
        self.log = TokenLog(max_cache_len)
        # What is in force, and what the states were encoded under (`None`: they have to be computed again).
        self.expert_vector, self.in_force = None, InForce()
        self.encoded_under: InForce | None = self.in_force
        self.is_mixed, self.expert_plan = False, None
        self._rows: int | None = None
        self._layouts: dict[Retention, Layout] = {}
        super().__init__(layers=[self._make_layer(idx) for idx in range(config.num_hidden_layers)])

    def _make_layer(self, layer_idx: int) -> _CacheLayer:
        mixers = self.config.mixers(layer_idx)
        retention = Retention.of(self.config, layer_idx)
        stores = {
            "attention": lambda: KeyValueStore(retention, self.max_cache_len),
            "mamba": lambda: RecurrentStore(is_fixed=self.max_cache_len is not None),
        }
        return LAYER_CLASSES[mixers](self.clock, {name: stores[name]() for name in mixers}, self.max_cache_len)

    # ---- a forward, as the model drives it

    def begin(self, num_tokens: int, lengths: torch.Tensor | None, device: torch.device, anew: bool = False) -> Span:
        """Opens a forward of `num_tokens` columns with `lengths` (rows,) real tokens each; `anew`: from the beginning.

        Nothing that `commit` has not made true is ever seen, so a forward that fails needs no clean-up.
        """
        self._each_layer("discard")
        if anew:
            self.encoded_under = None
            self._each_layer("drop")
        clock = self._clock_on(device)
        if anew:
            clock = Clock(columns=clock.columns * 0)
        columns = clock.columns if isinstance(clock.columns, int) else None
        span = Span(num_tokens, start=clock.start, lengths=lengths, columns=columns)
        retentions = {layer.attention.retention for layer in self.layers if layer.attention is not None}
        self._layouts = {kind: plan_layout(kind, span, device, self.max_cache_len) for kind in retentions}
        return span

    def commit(self, span: Span, token_ids, mask=None, position_ids=None, is_embedded: bool = False) -> None:
        """Makes the forward of `span` true.

        Args:
            token_ids: the columns that were not fed before, (rows, tokens); so are `mask` and `position_ids`.
            is_embedded: they were given as embeddings, so `token_ids` says nothing.
        """
        self._each_layer("commit")
        self.log.append(self.clock.columns, token_ids, mask, position_ids)
        self.log.has_embeddings |= is_embedded
        # The counts first: under static storage the span's start is a view of the columns.
        if span.lengths is not None or self.clock.counts is not None:
            self.clock.counts = span.ends(token_ids.device)
        if self.max_cache_len is None:
            self.clock.columns += token_ids.shape[1]
        else:
            self.clock.columns.add_(token_ids.shape[1])
        self.clock.is_empty, self._rows = False, token_ids.shape[0]
        self.encoded_under = self.in_force

    def layout(self, layer_idx: int) -> Layout:
        """How layer `layer_idx` takes in the open forward."""
        return self._layouts[self.layers[layer_idx].attention.retention]

    def update(self, key_states, value_states, layer_idx: int, *args, **kwargs):
        """Takes in (rows, heads, tokens, head_dim) of the open forward; returns the keys and values attention sees."""
        return self.layers[layer_idx].update(key_states, value_states, self.layout(layer_idx))

    def recurrent_states(self, layer_idx: int) -> dict[str, torch.Tensor]:
        """States that layer `layer_idx` starts the open forward from; empty before the first token."""
        return self.layers[layer_idx].recurrent.tensors()

    def _clock_on(self, device: torch.device) -> Clock:
        """The clock; static storage keeps it on the device, so that a compiled step never depends on its value."""
        if self.max_cache_len is not None and isinstance(self.clock.columns, int):
            self.clock.columns = torch.tensor(self.clock.columns, device=device)
        return self.clock

    def _each_layer(self, method: str, *args) -> None:
        for layer in self.layers:
            layer.each_store(method, *args)

    # ---- experts and weights

    def set_expert(self, expert) -> None:
        """Puts `expert` in force; the next forward acts on it as `on_expert_change` says.

        Args:
            expert: whatever `expert_vector=` takes: `None` (the base), a name, an `ExpertVector`, a dict of tensors,
                or a list with one of these per row.

        Raises:
            ValueError: the policy is `"error"` and a text is cached, or the expert is not known.
        """
        if expert is not None and self.resolve is None:
            raise ValueError("This cache belongs to no model yet: make it with `model.make_cache()`.")
        self.adopt(*((None, None) if expert is None else self.resolve(expert)))

    def adopt(self, expert, key) -> None:
        """`set_expert` for an expert that is resolved already; `key` tells experts apart by content."""
        if isinstance(expert, list) and self._rows not in (None, len(expert)):
            raise ValueError(
                f"`expert_vector` has {len(expert)} entries but the cache has {self._rows} rows: give one each."
            )
        if key != self.in_force.expert_key:
            self._change("expert vector", InForce(key, self.in_force.weights))
            self.expert_vector, self.expert_plan = expert, None

    def observe_weights(self, stamp) -> None:
        """Compares the model's weights with those that the text was encoded under; a change is one of experts too."""
        if stamp != self.in_force.weights:
            self._change("weights", InForce(self.in_force.expert_key, stamp))
            self.expert_plan = None

    def _change(self, what: str, in_force: "InForce") -> None:
        if not self.clock.is_empty and self.on_expert_change == "recompute":
            self._check_history()
        if not self.clock.is_empty and self.on_expert_change == "error":
            raise ValueError(
                f"The {what} changed while {self.get_seq_length()} columns are cached and `on_expert_change` is "
                "'error': call `cache.reset()` and feed the text again, or make the cache with another policy."
            )
        if self.on_expert_change == "reset":
            self.reset()
        elif self.on_expert_change == "continue" and not self.clock.is_empty:
            self.is_mixed = True
            if not self.is_stale:
                self.encoded_under = in_force
        self.in_force = in_force

    @property
    def is_stale(self) -> bool:
        """Whether the next forward has to encode the remembered tokens again first."""
        return not self.clock.is_empty and self.encoded_under != self.in_force

    def history(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Token ids, mask and own positions of all columns, (rows, columns) each; `None` for what was never given."""
        self._check_history()
        columns = self.get_seq_length()
        found = [b.view(columns) if b.tensor is not None else None for b in self.log.buffers().values()]
        return found[0], found[1], found[2]

    def _check_history(self) -> None:
        if self.log.has_embeddings:
            raise ValueError(
                "The cached text would have to be encoded again, but part of it was fed as `inputs_embeds`, which are "
                "not remembered: call `cache.reset()` and feed it again, or use on_expert_change='continue'."
            )

    def fits(self, config) -> bool:
        """Whether a model of `config` can use this cache."""
        names = ("layer_types", "sliding_window", "num_sink_tokens", "num_key_value_heads", "head_dim", "vocab_size")
        names += ("hidden_size", "mamba_d_state", "mamba_d_conv", "mamba_expand")
        return all(getattr(self.config, name) == getattr(config, name) for name in names)

    # ---- what users and `generate` do to it

    @property
    def token_ids(self) -> torch.Tensor | None:
        """Ids of all columns fed, (rows, columns), pads included; -1 where embeddings were fed."""
        return None if self.log.token_ids.tensor is None else self.log.token_ids.view(self.get_seq_length())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, pads included."""
        return int(self.clock.columns)

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return not self.clock.is_empty

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return -1 if self._rows is None else self._rows

    @property
    def is_initialized(self) -> bool:
        return not self.clock.is_empty

    @property
    def is_croppable(self) -> bool:
        """`crop` always restores the state before the removed tokens; it may cost an encoding of the others."""
        return True

    def crop(self, tokens_to_remove: int) -> None:
        """Takes back the last `-tokens_to_remove` columns, as if they had never been fed.

        Keys that are still stored are taken back at once. Where a state has moved on, the text that is left is encoded
        again by the next forward.

        Raises:
            ValueError: more columns than were fed, a positive number (the meaning in older versions of Transformers),
                or a text of mixed experts, which cannot be encoded again.
        """
        columns, num_removed = self.get_seq_length(), -tokens_to_remove
        if not 0 <= num_removed <= columns:
            raise ValueError(
                f"`crop` takes -k for the last k columns, with k at most {columns}, got {tokens_to_remove}."
            )
        if num_removed == 0:
            return
        if num_removed == columns:
            self.reset()
            return
        stores = [store for layer in self.layers for store in layer.stores.values()]
        if not all(store.can_forget(columns) for store in stores):
            if self.is_mixed:
                raise ValueError(
                    "The cached text was encoded under several experts or weights (on_expert_change='continue') and "
                    "cannot be rolled back: fork the cache before feeding what may have to be taken back."
                )
            self.history()
            self.encoded_under = None
        self._set_back(columns - num_removed)

    def _set_back(self, columns: int) -> None:
        if self.clock.counts is not None:
            removed = self.log.mask.tensor[:, columns : self.get_seq_length()]
            self.clock.counts = self.clock.counts - removed.sum(1)
        if isinstance(self.clock.columns, int):
            self.clock.columns = columns
        else:
            self.clock.columns.fill_(columns)
        self._each_layer("truncate", columns)

    def reset(self) -> None:
        """Forgets the text; the expert in force stays."""
        self._each_layer("drop")
        self.log = TokenLog(self.max_cache_len)
        if not isinstance(self.clock.columns, int):
            self.clock.columns.zero_()
        else:
            self.clock.columns = 0
        self.clock.counts, self.clock.is_empty = None, True
        self._rows, self.is_mixed, self._layouts = None, False, {}

    def select_rows(self, rows: torch.Tensor) -> None:
        """Makes row i of the cache what row `rows[i]` was."""
        if self.clock.is_empty:
            return
        self._each_layer("select_rows", rows)
        for buffer in self.log.buffers().values():
            buffer.select_rows(rows)
        if self.clock.counts is not None:
            counts = self.clock.counts
            self.clock.counts = counts.expand(self._rows).index_select(0, rows.to(counts.device))
        if isinstance(self.expert_vector, list):
            picked, is_stale = rows.tolist(), self.is_stale
            self.expert_vector, self.expert_plan = [self.expert_vector[row] for row in picked], None
            keys = tuple(self.in_force.expert_key[row] for row in picked)
            self.in_force = InForce(keys, self.in_force.weights)
            self.encoded_under = None if is_stale else self.in_force
        self._rows = rows.shape[0]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        if not self.clock.is_empty:
            self.select_rows(torch.arange(self._rows).repeat_interleave(repeats))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        if not self.clock.is_empty:
            self.select_rows(torch.arange(self._rows)[torch.as_tensor(indices).cpu()])

    def fork(self) -> "MambaFormerCache":
        """An independent cache that goes on from here; what neither side has written since is shared."""
        other = MambaFormerCache(self.config, self.storage, self.max_cache_len, self.on_expert_change, self.resolve)
        for layer, copy in zip(self.layers, other.layers, strict=True):
            layer.fork_into(copy)
        columns, counts = self.clock.columns, self.clock.counts
        other.clock.columns = columns if isinstance(columns, int) else columns.clone()
        other.clock.counts = None if counts is None else counts.clone()
        other.clock.is_empty = self.clock.is_empty
        other.log = self.log.fork()
        for name in ("expert_vector", "in_force", "encoded_under", "is_mixed", "expert_plan", "_rows"):
            setattr(other, name, getattr(self, name))
        return other

    def __deepcopy__(self, memo) -> "MambaFormerCache":
        return self.fork()

    # ---- what it holds

    def to_dict(self) -> dict:
        """The nested view of the cache hand-out: `{"layers": {"initial_mamba": {...}, "layer_0": {...}, ...}}`.

        A layer has `mamba_cache` (`{"conv", "ssm"}`), `attn_kv_cache` (`{"keys", "values"}`), either of them `None`
        where there is none, and `cache_length`, the columns fed.
        """
        starts_with_mamba = self.config.layer_types[0] == "linear_attention"
        names = ["initial_mamba"] if starts_with_mamba else []
        names += [f"layer_{idx}" for idx in range(len(self.layers) - len(names))]
        return {"layers": {name: self._layer_dict(layer) for name, layer in zip(names, self.layers, strict=True)}}

    def _layer_dict(self, layer: _CacheLayer) -> dict:
        return {
            "mamba_cache": layer.recurrent.tensors() or None if layer.recurrent is not None else None,
            "attn_kv_cache": layer.attention.tensors() or None if layer.attention is not None else None,
            "cache_length": self.get_seq_length(),
        }

    def report(self) -> dict[str, dict[str, int]]:
        """Bytes allocated, by layer type and kind (`keys`, `values`, `conv`, `ssm`), and those of the token log."""
        found: dict[str, dict[str, int]] = {}
        for layer_type, layer in zip(self.config.layer_types, self.layers, strict=True):
            kinds = found.setdefault(layer_type, {})
            for store in layer.stores.values():
                for kind, tensor in store.allocated().items():
                    kinds[kind] = kinds.get(kind, 0) + tensor.nbytes
        found["tokens"] = {k: b.tensor.nbytes for k, b in self.log.buffers().items() if b.tensor is not None}
        return found

    @property
    def nbytes(self) -> int:
        """Bytes allocated in all."""
        return sum(sum(kinds.values()) for kinds in self.report().values())


def _check_options(storage: str, max_cache_len: int | None, on_expert_change: str) -> None:
    if storage not in ("dense", "static"):
        raise ValueError(f"`storage` must be 'dense' or 'static', got {storage!r}.")
    if on_expert_change not in EXPERT_CHANGE_POLICIES:
        raise ValueError(f"`on_expert_change` must be one of {EXPERT_CHANGE_POLICIES}, got {on_expert_change!r}.")
    if (storage == "static") != (max_cache_len is not None):
        raise ValueError("`max_cache_len` (columns to hold) goes with storage='static', and only with it.")
    if max_cache_len is not None and (not isinstance(max_cache_len, int) or max_cache_len < 1):
        raise ValueError(f"`max_cache_len` must be a positive integer, got {max_cache_len!r}.")


__all__ = ["MambaFormerCache"]
