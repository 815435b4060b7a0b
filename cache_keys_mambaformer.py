"""Keys and values of a cache: which keys stay, in which slots, and the store of one layer.

*Slots are a function of positions.* A token's position is the number of real tokens before it in its row, and the
retention gives the slot of the key at position p. Two positions decide whether a query sees a key, so that windows,
sinks and padding are one rule. *Storage and retention compose.* A `Buffer` grows or has a fixed size; a `Retention`
keeps all keys or slides.

Stores implement the protocol `CacheStore` of `cache_layers_mambaformer`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import torch
from torch import nn

from .cache_buffers_mambaformer import Buffer, expand_index

if TYPE_CHECKING:
    from .configuration_mambaformer import MambaFormerConfig


@dataclass(frozen=True)
class Retention:
    """Which keys stay, and where: all keys, or the first `sinks` and a ring of the last `window + spare`.

    The key at position p is in slot p if all keys stay or p is a sink (StreamingLLM, arXiv 2309.17453), else in slot
    `sinks + (p - sinks) % (window + spare)`. No query sees more than `window`. Up to `spare` tokens can be taken back,
    since the keys that they have overwritten are outside of every window then.
    """

    window: int | None = None
    sinks: int = 0
    spare: int = 0

    @classmethod
    def of(cls, config: "MambaFormerConfig", window: int | None, spare: int = 0) -> "Retention":
        """The retention of a layer with this window; all keys stay if it is `None`."""
        return cls() if window is None else cls(window, config.num_sink_tokens, spare)

    @property
    def ring_size(self) -> int:
        """Slots of the ring; 0 if all keys stay."""
        return 0 if self.window is None else self.window + self.spare

    def is_visible(self, query_position: torch.Tensor, key_position: torch.Tensor) -> torch.Tensor:
        """Whether a query sees a key, from their positions alone; -1 is no position."""
        visible = (key_position >= 0) & (key_position <= query_position)
        if self.window is None:
            return visible
        return visible & ((query_position - key_position < self.window) | (key_position < self.sinks))

    def num_slots(self, num_tokens: int) -> int:
        """Slots that rows of up to `num_tokens` tokens occupy."""
        return num_tokens if self.window is None else min(num_tokens, self.ring_size + self.sinks)

    @overload
    def slot(self, position: int) -> int: ...

    @overload
    def slot(self, position: torch.Tensor) -> torch.Tensor: ...

    def slot(self, position: int | torch.Tensor) -> int | torch.Tensor:
        """Slot of a position, or of each position of a tensor."""
        if self.window is None:
            return position
        in_ring = self.sinks + (position - self.sinks) % self.ring_size
        if isinstance(position, int):
            return position if position < self.sinks else in_ring
        return torch.where(position < self.sinks, position, in_ring)

    def positions(self, tokens_seen: torch.Tensor, num_slots: int) -> torch.Tensor:
        """Position of the key in each slot after `tokens_seen` (rows,): (rows, num_slots), -1 in an empty slot."""
        slots, tokens_seen = torch.arange(num_slots, device=tokens_seen.device), tokens_seen[:, None]
        if self.window is None:
            return torch.where(slots < tokens_seen, slots, -1)
        newest = tokens_seen - 1 - self.sinks
        in_ring = newest - (newest - (slots - self.sinks)) % self.ring_size
        in_ring = torch.where(in_ring >= 0, in_ring + self.sinks, -1)
        return torch.where(slots >= self.sinks, in_ring, torch.where(slots < tokens_seen, slots, -1))


@dataclass(frozen=True)
class Span:
    """The positions of the tokens of one forward: row b has `lengths[b]` positions from `start[b]` on.

    Rows are left-aligned: real tokens come first. Pads follow, and have no influence on any result.

    Args:
        num_tokens: width of the forward, pads included.
        start: tokens seen before the forward: an integer while no row ever had a pad, else a tensor (rows,) or (1,).
        lengths: real tokens of each row, (rows,); `None` when all are real.
        columns: width of all earlier forwards, pads included; `None` under static storage, where only the device
            knows it.
    """

    num_tokens: int
    start: int | torch.Tensor = 0
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
        """Tokens seen by each row after the forward: (rows or 1,)."""
        return self.starts(device) + (self.num_tokens if self.lengths is None else self.lengths)


def count_positions(mask: torch.Tensor, start: int | torch.Tensor = 0) -> torch.Tensor:
    """Positions of columns (rows, columns), from their mask and the tokens that each row has seen before.

    A pad has the position of the last real token before it, or 0.
    """
    return (mask.cumsum(1) + start - 1).clamp(min=0)


@dataclass(frozen=True)
class Layout:
    """The slots of the tokens of one forward, for all layers of one retention.

    New keys are written in place, or staged if they would overwrite keys that their own queries still see.

    Args:
        num_slots: slots in use after the forward.
        key_positions: (rows or 1, keys), positions of the keys that attention sees; `None` if no mask is needed.
        slots: of keys that are written in place: the first of adjoining slots, or a tensor (rows or 1, num_tokens).
            Attention sees the first `num_slots` slots.
        num_stored: slots in use before the forward. With staged keys attention sees these and then the new keys.
        sources: of staged keys, (rows or 1, num_slots): the index, among the keys that attention sees, of the key
            that each slot has from the commit on. `None` if keys are written in place.
    """

    num_slots: int
    key_positions: torch.Tensor | None
    slots: int | torch.Tensor = 0
    num_stored: int = 0
    sources: torch.Tensor | None = None

    def to(self, device: torch.device) -> "Layout":
        """The same layout on another device, if layers are on several devices."""
        for tensor in (self.key_positions, self.slots, self.sources):
            if isinstance(tensor, torch.Tensor) and tensor.device != device:
                return self._moved(device)
        return self

    def _moved(self, device: torch.device) -> "Layout":
        tensors = {name: value for name, value in vars(self).items() if isinstance(value, torch.Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


def make_layout(retention: Retention, span: Span, device: torch.device, fixed_size: int | None = None) -> Layout:
    """The layout of `span`; storage grows, or holds sequences of up to `fixed_size` tokens."""
    num_slots = retention.num_slots((span.columns or 0) + span.num_tokens if fixed_size is None else fixed_size)
    if retention.window is None or (span.num_tokens == 1 and span.lengths is None):
        return _layout_in_place(retention, span, device, num_slots, fixed_size is not None)
    return _layout_staged(retention, span, device, num_slots, fixed_size is not None)


def make_uncached_layout(retention: Retention, span: Span, device: torch.device) -> Layout:
    """The layout of a forward without a cache: attention sees only the new keys."""
    is_dynamic = isinstance(span.num_tokens, torch.SymInt)  # comparing it would fix the length in an exported graph
    sees_all = retention.window is None or (not is_dynamic and span.num_tokens <= retention.window)
    return Layout(span.num_tokens, None if sees_all else span.positions(device))


def _layout_in_place(retention: Retention, span: Span, device: torch.device, num_slots: int, is_fixed: bool) -> Layout:
    start, window = span.start, retention.window
    sees_all = isinstance(start, int) and not is_fixed and (span.num_tokens == 1 or start == 0)
    sees_all = sees_all and (retention.spare == 0 or window is None or num_slots <= window + retention.sinks)
    if sees_all:
        key_positions = None
    elif window is None:
        # An empty slot has a position that no query of its row has reached.
        key_positions = torch.arange(num_slots, device=device)[None]
    else:
        key_positions = retention.positions(span.ends(device), num_slots)
    return Layout(
        num_slots=num_slots,
        key_positions=key_positions,
        slots=retention.slot(start) if isinstance(start, int) else retention.slot(span.positions(device)),
    )


def _layout_staged(retention: Retention, span: Span, device: torch.device, num_slots: int, is_fixed: bool) -> Layout:
    num_stored = num_slots if is_fixed else retention.num_slots(span.columns or 0)
    is_first = isinstance(span.start, int) and span.start == 0 and not is_fixed
    sees_all = is_first and (retention.window is None or span.num_tokens <= retention.window)
    starts = span.starts(device)
    key_positions = span.positions(device)
    if num_stored:
        stored = retention.positions(starts, num_stored)
        key_positions = torch.cat([stored.expand(key_positions.shape[0], -1), key_positions], dim=1)
    positions = retention.positions(span.ends(device), num_slots)  # of the slots after the commit
    own_slot = torch.arange(num_slots, device=device).clamp(max=max(num_stored - 1, 0))
    return Layout(
        num_slots=num_slots,
        key_positions=None if sees_all else key_positions,
        num_stored=num_stored,
        sources=torch.where(positions >= starts[:, None], num_stored + positions - starts[:, None], own_slot),
    )


@dataclass(frozen=True)
class StateSpec:
    """The shape of one tensor of a store's state, and its dtype.

    Args:
        is_wide: whether the dtype is at least float32, or else a dtype of the model's weights.
        dtype: the dtype, where it does not depend on the model.
    """

    shape: tuple[int, ...]
    is_wide: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Removal:
    """The last tokens of each row, to be removed.

    Args:
        columns: sequence length before, padding included.
        by_row: columns that each row loses; a single number if all rows lose equally many.
        tokens: real tokens that each row loses: an integer if all rows lose equally many, else a tensor (rows,).
        most: the maximum of `tokens`.
        overshoot: `CacheLengths.overshoot` before the removal.
    """

    columns: int
    by_row: list[int]
    tokens: int | torch.Tensor
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
        max_length: longest sequence that fixed storage holds; `None` for storage that grows.
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
        self.staged: list[torch.Tensor] = []  # the keys and values of all slots after the commit
        self.num_slots = self.staged_slots = 0

    def update(
        self, keys: torch.Tensor, values: torch.Tensor, layout: Layout, is_saved: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values (rows, heads, tokens, head_dim); returns all that attention sees."""
        stored = self._put(self.encode("keys", keys), self.encode("values", values), layout, is_saved)
        return self.decode("keys", stored[0]), self.decode("values", stored[1])

    def _put(
        self, keys: torch.Tensor, values: torch.Tensor, layout: Layout, is_saved: bool = False
    ) -> list[torch.Tensor]:
        """Stores new keys and values in their stored form; returns the slots that attention sees."""
        layout = layout.to(keys.device)
        seen, self.staged = [], []
        self.staged_slots = layout.num_slots
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.reserve(new, layout.num_slots)
            if layout.sources is None:
                buffer.write(layout.slots, new, is_saved)
                seen.append(buffer.view(layout.num_slots))
            else:
                stored_and_new = torch.cat([buffer.view(layout.num_stored), new], dim=2) if layout.num_stored else new
                self.staged.append(stored_and_new.gather(2, expand_index(layout.sources, stored_and_new, 2)))
                seen.append(stored_and_new)
        return seen

    def encode(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """The stored form of new `"keys"` or `"values"`: unchanged."""
        return new

    def decode(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Stored `"keys"` or `"values"` as attention sees them: unchanged."""
        return stored

    def visible(self) -> dict[str, torch.Tensor]:
        """The keys and values that attention sees, by name."""
        return {name: self.decode(name, stored) for name, stored in self.state().items()}

    def place(self, like: torch.Tensor, layout: Layout) -> tuple[torch.Tensor, torch.Tensor] | None:
        """All slots of keys and of values, for a kernel that writes keys and values shaped like `like` into them.

        `layout` is one that writes in place. `None`, and nothing has changed, where no kernel writes the stored form.
        """
        self.staged, self.staged_slots = [], layout.num_slots
        self.keys.reserve(like, layout.num_slots)
        self.values.reserve(like, layout.num_slots)
        return self.keys.make_own(), self.values.make_own()

    def commit(self) -> None:
        if self.staged:
            keys, values = self.staged
            self.keys.replace(keys)
            self.values.replace(values)
            self.staged = []
        self.num_slots = self.staged_slots

    def discard(self) -> None:
        self.staged, self.staged_slots = [], self.num_slots

    def reset(self) -> None:
        self.staged, self.num_slots, self.staged_slots = [], 0, 0
        self.keys.reset()
        self.values.reset()

    def select_rows(self, rows: torch.Tensor) -> None:
        self.keys.select_rows(rows)
        self.values.select_rows(rows)

    def fork(self) -> "KeyValueStore":
        other = copy.copy(self)
        other.keys, other.values = self.keys.fork(), self.values.fork()
        other.staged, other.staged_slots = [], self.num_slots
        return other

    def state(self, columns: int | None = None) -> dict[str, torch.Tensor]:
        if self.keys.tensor is None:
            return {}
        size = self.num_slots if columns is None else min(self.num_slots, columns)
        return {"keys": self.keys.view(size), "values": self.values.view(size)}

    def load_state(self, state: dict[str, torch.Tensor], columns: int) -> None:
        num_slots = self.keys.fixed_size or self.retention.num_slots(columns)
        self._put(state["keys"], state["values"], Layout(num_slots, key_positions=None, slots=0))
        self.commit()

    def spec(self, rows: int, columns: int, layer: nn.Module) -> dict[str, StateSpec]:
        heads, head_dim = self.row_shape
        shape = (rows, heads, self.retention.num_slots(columns), head_dim)
        return {"keys": StateSpec(shape), "values": StateSpec(shape)}

    def buffers(self) -> dict[str, torch.Tensor]:
        tensors = {"keys": self.keys.tensor, "values": self.values.tensor}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def set_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        for name, tensor in buffers.items():
            getattr(self, name).tensor = tensor

    def nbytes(self) -> dict[str, int]:
        return {name: tensor.nbytes for name, tensor in self.buffers().items()}

    def extend_reach(self, reach: int, tokens_seen: torch.Tensor, columns: int) -> None:
        """Widens a ring, so that `reach` tokens can be taken back."""
        if self.retention.window is None or self.retention.spare >= reach:
            return
        narrow, self.retention = self.retention, replace(self.retention, spare=reach)
        num_slots = self.retention.num_slots(columns)
        if self.num_slots in (0, num_slots):
            return
        positions = self.retention.positions(tokens_seen, num_slots)
        # Keys that the narrow ring has overwritten are outside of every window: any key may take their slots.
        sources = narrow.slot(positions.clamp(min=0)).clamp(max=self.num_slots - 1)
        for buffer in (self.keys, self.values):
            stored = buffer.view(self.num_slots)
            buffer.tensor, buffer.is_shared = stored.gather(2, expand_index(sources, stored, 2)), False
        self.num_slots = self.staged_slots = num_slots

    def plan_crop(self, removal: Removal) -> int | None:
        """Slots in use after a removal; `None` if keys that queries would see then were overwritten."""
        longest = removal.columns + removal.overshoot
        has_wrapped = self.retention.num_slots(longest) < longest
        if has_wrapped and removal.overshoot + removal.most > self.retention.spare:
            return None
        if self.keys.fixed_size is not None:
            return self.num_slots
        return min(self.num_slots, self.retention.num_slots(removal.columns_left))

    def crop(self, plan: int) -> None:
        self.num_slots = self.staged_slots = plan


__all__ = [
    "KeyValueStore",
    "Layout",
    "Removal",
    "Retention",
    "Span",
    "StateSpec",
    "make_layout",
    "make_uncached_layout",
]
