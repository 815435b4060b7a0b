"""How a cache stores: which keys stay and in which slots, and the tensors that hold them.

*Slots are a function of positions.* A token's position is the number of real tokens before it in its row, and the
retention says in which slot the key of position p lives. What a query may see then follows from two positions;
windows, sinks and padding are one rule. *Storage and retention compose.* A `Buffer` grows or is of fixed size; a
`Retention` keeps all or slides.

Stores implement the protocol `CacheStore` of `cache_layers_mambaformer`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

# Room that a growing buffer takes beyond what it needs, so that appending a token rarely copies.
MIN_SPARE_SLOTS, SPARE_FRACTION = 64, 4


# --------------------------------------------------------------------------------------- retention: which keys stay


@dataclass(frozen=True)
class Retention:
    """Which keys stay, and where: all of them, or the first `sinks` and a ring of the last `window + spare`.

    Position p lives in slot p while everything is kept or p is a sink (StreamingLLM, arXiv 2309.17453), else in slot
    `sinks + (p - sinks) % (window + spare)`. No query sees more than `window`; up to `spare` tokens can be taken back,
    for what they have overwritten lies outside of every window then.
    """

    window: int | None = None
    sinks: int = 0
    spare: int = 0

    @classmethod
    def of(cls, config, window: int | None, spare: int = 0) -> "Retention":
        """The retention of a layer with this window; all keys stay where it is `None`."""
        return cls() if window is None else cls(window, config.num_sink_tokens, spare)

    @property
    def ring(self) -> int:
        """Slots of the ring."""
        return self.window + self.spare

    def is_visible(self, query_position: torch.Tensor, key_position: torch.Tensor) -> torch.Tensor:
        """Whether a query sees a key, from their positions alone; -1 is no position."""
        visible = (key_position >= 0) & (key_position <= query_position)
        if self.window is None:
            return visible
        return visible & ((query_position - key_position < self.window) | (key_position < self.sinks))

    def num_slots(self, num_tokens: int) -> int:
        """Slots that rows of up to `num_tokens` tokens need."""
        return num_tokens if self.window is None else min(num_tokens, self.ring + self.sinks)

    def slot(self, position: Any) -> Any:
        """Slot of a position, given as an integer or as a tensor of any shape."""
        if self.window is None:
            return position
        in_ring = self.sinks + (position - self.sinks) % self.ring
        if isinstance(position, int):
            return position if position < self.sinks else in_ring
        return torch.where(position < self.sinks, position, in_ring)

    def positions(self, tokens_seen: torch.Tensor, num_slots: int) -> torch.Tensor:
        """Position of the key in each slot after `tokens_seen` (rows,): (rows, num_slots), -1 in an empty slot."""
        slots, tokens_seen = torch.arange(num_slots, device=tokens_seen.device), tokens_seen[:, None]
        if self.window is None:
            return torch.where(slots < tokens_seen, slots, -1)
        newest = tokens_seen - 1 - self.sinks
        in_ring = newest - (newest - (slots - self.sinks)) % self.ring
        in_ring = torch.where(in_ring >= 0, in_ring + self.sinks, -1)
        return torch.where(slots >= self.sinks, in_ring, torch.where(slots < tokens_seen, slots, -1))


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


def as_index(values: Any) -> torch.Tensor:
    """Values that a user listed, as a tensor on the CPU whatever the default device is; a tensor stays where it is."""
    return values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")


def count_positions(mask: torch.Tensor, start: Any = 0) -> torch.Tensor:
    """Positions (rows, columns) of columns whose `mask` says which are real, after `start` real tokens of each row.

    A pad takes the position of the last real token before it, or 0.
    """
    return (mask.cumsum(1) + start - 1).clamp(min=0)


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

    def to(self, device: torch.device) -> "Layout":
        """The same layout on another device, for layers that are on several."""
        for tensor in (self.key_positions, self.slots, self.sources):
            if isinstance(tensor, torch.Tensor) and tensor.device != device:
                return self._moved(device)
        return self

    def _moved(self, device: torch.device) -> "Layout":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def make_layout(retention: Retention, span: Span, device: torch.device, fixed_size: int | None = None) -> Layout:
    """Plans how `retention` takes in `span`, for growing storage or for one of `fixed_size` slots."""
    num_slots = retention.num_slots(span.columns + span.num_tokens if fixed_size is None else fixed_size)
    if retention.window is None or (span.num_tokens == 1 and span.lengths is None):
        return _plan_in_place(retention, span, device, num_slots, fixed_size is not None)
    return _plan_staged(retention, span, device, num_slots, fixed_size is not None)


def make_uncached_layout(retention: Retention, span: Span, device: torch.device) -> Layout:
    """The layout of a forward without a cache: attention sees the new keys only."""
    is_dynamic = isinstance(span.num_tokens, torch.SymInt)  # a comparison would fix the length in an exported graph
    sees_all = retention.window is None or (not is_dynamic and span.num_tokens <= retention.window)
    return Layout(span.num_tokens, None if sees_all else span.positions(device))


def _plan_in_place(retention, span, device, num_slots, is_fixed) -> Layout:
    is_known = isinstance(span.start, int)
    sees_all = is_known and not is_fixed and (span.num_tokens == 1 or span.start == 0)
    sees_all = sees_all and (retention.spare == 0 or num_slots <= retention.window + retention.sinks)
    if sees_all:
        key_positions = None
    elif retention.window is None:
        # A slot that holds nothing yet has a position that no query of its row has reached.
        key_positions = torch.arange(num_slots, device=device)[None]
    else:
        key_positions = retention.positions(span.ends(device), num_slots)
    return Layout(
        num_slots=num_slots,
        key_positions=key_positions,
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

    Growing buffers are shared by a fork until one side writes. Fixed ones keep their address, unless autograd is
    on: a tensor that a graph may have saved for its backward pass is never overwritten.
    """

    spare_fraction = SPARE_FRACTION

    def __init__(self, dim: int, fixed_size: int | None = None):
        self.dim, self.fixed_size = dim, fixed_size
        self.tensor: torch.Tensor | None = None
        self.is_shared = False  # with a fork, or with a graph

    def reserve(self, like: torch.Tensor, size: int) -> None:
        """Makes room for `size` slots shaped like those of `like`."""
        if self.tensor is not None and self.tensor.shape[0] != like.shape[0]:
            self.tensor = None  # of a sequence that was dropped: the cache checks the rows of one that it holds
        if self.tensor is not None and (self.tensor.dtype != like.dtype or self.tensor.device != like.device):
            self.tensor, self.is_shared = self.tensor.to(like.device, like.dtype), False
        if self.tensor is not None and self.tensor.shape[self.dim] >= size:
            return
        capacity = self.fixed_size or size + max(MIN_SPARE_SLOTS, size // self.spare_fraction)
        shape = list(like.shape)
        shape[self.dim] = capacity
        old, self.tensor, self.is_shared = self.tensor, like.new_zeros(shape), False
        if old is not None:
            self.tensor.narrow(self.dim, 0, old.shape[self.dim]).copy_(old)

    def write(self, slots: Any, new: torch.Tensor, is_saved: bool = False) -> None:
        """Puts `new` into adjoining slots from `slots` on, or into the slots of a tensor (rows or 1, tokens).

        `is_saved`: a graph may save the result for its backward pass.
        """
        new = new.to(self.tensor.dtype)
        self.make_own()
        self.is_shared = is_saved
        if isinstance(slots, int):
            self.tensor.narrow(self.dim, slots, new.shape[self.dim]).copy_(new)
        elif slots.shape[0] == 1:
            self.tensor.index_copy_(self.dim, slots[0], new)
        else:
            self.tensor.scatter_(self.dim, _along(slots, new, self.dim), new)

    def make_own(self) -> None:
        """Makes sure that nobody else has what is written from now on."""
        if self.is_shared or not is_writable(self.tensor):
            self.tensor = (self.tensor if torch.is_grad_enabled() else self.tensor.detach()).clone()
            self.is_shared = False

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
            may_write = self.fixed_size is not None and not self.is_shared
            self.tensor, self.is_shared = select_rows_of(self.tensor, rows, may_write), False

    def reset(self) -> None:
        if self.tensor is not None:
            self.tensor = None if self.fixed_size is None else zeroed(self.tensor, self.is_shared)
        self.is_shared = False

    def fork(self) -> "Buffer":
        other = copy.copy(self)
        if self.tensor is not None:
            other.tensor = self.tensor if self.fixed_size is None else self.tensor.clone()
            self.is_shared = other.is_shared = self.fixed_size is None or self.is_shared
        return other


class IdBuffer(Buffer):
    """Token ids of a model of `config`, (rows, columns): two bytes each if the vocabulary allows it, else four.

    A sequence may be long where all other states are of constant size. -1 stands for what was fed as embeddings.
    """

    spare_fraction = 16

    def __init__(self, config, fixed_size: int | None = None):
        super().__init__(1, fixed_size)
        self.config = config

    def reserve(self, like: torch.Tensor, size: int) -> None:
        dtype = torch.int16 if self.config.vocab_size < 0xFFFF else torch.int32
        if self.tensor is not None and self.tensor.dtype != dtype:  # the vocabulary was resized
            self.tensor, self.is_shared = self.view(self.tensor.shape[1]).to(dtype), False
        super().reserve(torch.empty_like(like, dtype=dtype), size)

    def view(self, size: int) -> torch.Tensor:
        """The ids in the first `size` columns, as a copy of integers of 64 bits."""
        ids = super().view(size).long()
        if self.tensor.dtype == torch.int32:
            return ids
        ids = ids & 0xFFFF  # two bytes without a sign
        return torch.where(ids == 0xFFFF, -1, ids)


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be written in place: not if a graph leads to it, or if it was made in inference mode."""
    if torch.compiler.is_compiling():
        return True
    return not tensor.requires_grad and (torch.is_inference_mode_enabled() or not tensor.is_inference())


def usable(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy of one that was made in inference mode and may not be used outside of it."""
    is_locked = not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled()
    return tensor.clone() if is_locked else tensor


def zeroed(tensor: torch.Tensor, is_shared: bool = False) -> torch.Tensor:
    return torch.zeros_like(tensor) if is_shared or not is_writable(tensor) else tensor.zero_()


def _along(index: torch.Tensor, like: torch.Tensor, dim: int) -> torch.Tensor:
    """Spreads `index` (rows or 1, n) over all dimensions of `like` but `dim`."""
    shape = [index.shape[0]] + [1] * (like.dim() - 1)
    shape[dim] = index.shape[1]
    full = list(like.shape)
    full[dim] = index.shape[1]
    return index.view(shape).expand(full)


def select_rows_of(tensor: torch.Tensor, rows: torch.Tensor, may_write: bool) -> torch.Tensor:
    selected = tensor.index_select(0, rows.to(tensor.device))
    return tensor.copy_(selected) if may_write and selected.shape == tensor.shape and is_writable(tensor) else selected


@dataclass(frozen=True)
class StateSpec:
    """The shape of one tensor of a store's state, and whether its type is float32 at least."""

    shape: tuple[int, ...]
    is_wide: bool = False


@dataclass(frozen=True)
class Removal:
    """The last tokens of each row, to be removed.

    Args:
        columns: sequence length before, padding included.
        by_row: columns that each row loses; a single number if all rows lose as many.
        tokens: real tokens that each row loses: an integer if all lose as many, else a tensor (rows,).
        most: the largest of them.
        overshoot: tokens at most that a row had already lost and that were not fed again since.
    """

    columns: int
    by_row: list[int]
    tokens: Any
    most: int
    overshoot: int = 0

    @property
    def columns_left(self) -> int:
        return self.columns - min(self.by_row)


class KeyValueStore:
    """Keys and values of one layer, each (rows, heads, slots, head_dim).

    Args:
        retention: which keys stay.
        row_shape: (heads, head_dim).
        max_length: sequence length that fixed storage holds; `None` for storage that grows.
        buffer: storage of one tensor, `(dim, fixed_size) -> Buffer`.
    """

    def __init__(
        self,
        retention: Retention,
        row_shape: tuple[int, int],
        max_length: int | None = None,
        buffer: Callable[[int, int | None], Buffer] = Buffer,
    ):
        fixed_size = None if max_length is None else retention.num_slots(max_length)
        self.retention, self.row_shape = retention, row_shape
        self.keys, self.values = buffer(2, fixed_size), buffer(2, fixed_size)
        self.staged: list[torch.Tensor] | None = None
        self.num_slots = self.staged_slots = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layout: Layout, is_saved: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes in the new keys and values, (rows, heads, tokens, head_dim); returns what attention sees."""
        layout = layout.to(keys.device)
        seen, self.staged = [], None if layout.sources is None else []
        self.staged_slots = layout.num_slots
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.reserve(new, layout.num_slots)
            if layout.sources is None:
                buffer.write(layout.slots, new, is_saved)
                seen.append(buffer.view(layout.num_slots))
            else:
                both = torch.cat([buffer.view(layout.num_stored), new], dim=2) if layout.num_stored else new
                self.staged.append(both.gather(2, _along(layout.sources, both, 2)))
                seen.append(both)
        return seen[0], seen[1]

    def place(self, like: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor]:
        """All slots, for a kernel that itself puts keys and values shaped like `like` where `layout` says.

        `layout` is one that writes in place.
        """
        self.staged, self.staged_slots = None, layout.num_slots
        for buffer in (self.keys, self.values):
            buffer.reserve(like, layout.num_slots)
            buffer.make_own()
        return self.keys.tensor, self.values.tensor

    def commit(self) -> None:
        if self.staged is not None:
            self.keys.replace(self.staged[0])
            self.values.replace(self.staged[1])
            self.staged = None
        self.num_slots = self.staged_slots

    def discard(self) -> None:
        self.staged, self.staged_slots = None, self.num_slots

    def reset(self) -> None:
        self.staged, self.num_slots, self.staged_slots = None, 0, 0
        self.keys.reset()
        self.values.reset()

    def select_rows(self, rows: torch.Tensor) -> None:
        self.keys.select_rows(rows)
        self.values.select_rows(rows)

    def fork(self) -> "KeyValueStore":
        other = copy.copy(self)
        other.keys, other.values = self.keys.fork(), self.values.fork()
        other.staged, other.staged_slots = None, self.num_slots
        return other

    def state(self, columns: int | None = None) -> dict[str, torch.Tensor]:
        if self.keys.tensor is None:
            return {}
        size = self.num_slots if columns is None else min(self.num_slots, columns)
        return {"keys": self.keys.view(size), "values": self.values.view(size)}

    def load_state(self, state: dict[str, torch.Tensor], columns: int) -> None:
        num_slots = self.keys.fixed_size or self.retention.num_slots(columns)
        self.update(state["keys"], state["values"], Layout(num_slots, key_positions=None, slots=0))
        self.commit()

    def spec(self, rows: int, columns: int, layer: Any) -> dict[str, StateSpec]:
        heads, head_dim = self.row_shape
        shape = (rows, heads, self.retention.num_slots(columns), head_dim)
        return {"keys": StateSpec(shape), "values": StateSpec(shape)}

    def buffers(self) -> dict[str, torch.Tensor]:
        return {} if self.keys.tensor is None else {"keys": self.keys.tensor, "values": self.values.tensor}

    def set_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        for name, tensor in buffers.items():
            getattr(self, name).tensor = tensor

    def nbytes(self) -> dict[str, int]:
        return {name: tensor.nbytes for name, tensor in self.buffers().items()}

    def extend_reach(self, reach: int, tokens_seen: torch.Tensor, columns: int) -> None:
        """Widens a ring, so that `reach` tokens can be taken back."""
        if self.retention.window is None or self.retention.spare >= reach:
            return
        old, self.retention = self.retention, replace(self.retention, spare=reach)
        num_slots = self.retention.num_slots(columns)
        if self.num_slots in (0, num_slots):
            return
        held = self.retention.positions(tokens_seen, num_slots)
        # What the narrow ring has lost is out of every window, so any key may stand for it.
        sources = old.slot(held.clamp(min=0)).clamp(max=self.num_slots - 1)
        for buffer in (self.keys, self.values):
            stored = buffer.view(self.num_slots)
            buffer.tensor, buffer.is_shared = stored.gather(2, _along(sources, stored, 2)), False
        self.num_slots = self.staged_slots = num_slots

    def plan_crop(self, removal: Removal) -> int | None:
        """Slots in use after a removal; `None` when keys that would be seen then were overwritten."""
        has_wrapped = (
            self.retention.num_slots(removal.columns + removal.overshoot) < removal.columns + removal.overshoot
        )
        if has_wrapped and removal.overshoot + removal.most > self.retention.spare:
            return None
        if self.keys.fixed_size is not None:
            return self.num_slots
        return min(self.num_slots, self.retention.num_slots(removal.columns_left))

    def crop(self, num_slots: int) -> None:
        self.num_slots = self.staged_slots = num_slots
