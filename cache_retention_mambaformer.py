"""Retention: which keys of a cache stay, and in which slots.

*Slots are a function of positions.* A token's position is the number of real tokens before it in its row, and the
retention gives the slot of the key at position p. Two positions decide whether a query sees a key, so that windows,
sinks and padding are one rule. A `Layout` says for one forward where the new keys go and what attention sees.
"""

from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, overload

import torch

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

    def is_sink(self, key_position: torch.Tensor) -> torch.Tensor:
        """Whether a key is a sink, from its position alone."""
        return key_position < self.sinks

    @property
    def most_slots(self) -> int | None:
        """Slots that rows of any length occupy; `None` if all keys stay."""
        return None if self.window is None else self.ring_size + self.sinks

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


__all__ = ["Layout", "Retention", "Span", "count_positions", "make_layout", "make_uncached_layout"]
