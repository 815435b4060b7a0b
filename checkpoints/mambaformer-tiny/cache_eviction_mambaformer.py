"""Evictions: at which tokens of a row keys leave a cache, and in which slots the remaining keys are.

Keys lie in the order of their positions. At every multiple of `interval` tokens a row keeps a number of keys that
depends on its length alone, and the keys that follow take the next slots. So the slot of a new key is a function of
its position, the same for all heads, and a query sees the slots up to its own.

A forward that passes such a multiple is cut there, for each row by itself: its `Chunk`s attend one after the other.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .cache_policies_mambaformer import Budget
from .cache_retention_mambaformer import Layout, Retention, Span


@dataclass(frozen=True)
class PrunedRetention(Retention):
    """Keys of a layer with a pruning policy.

    Args:
        number: keys that stay at an eviction; `None` for a share.
        share: keys that stay, as a part of the tokens so far.
        interval: tokens between two evictions.
        protected: keys that stay whatever their score is.
    """

    number: int | None = None
    share: float = 1.0
    interval: int = 128
    protected: int = 0

    @classmethod
    def with_budget(cls, budget: Budget, interval: int, protected: int) -> "PrunedRetention":
        if isinstance(budget, int):
            return cls(number=budget, interval=interval, protected=protected)
        return cls(share=budget, interval=interval, protected=protected)

    def kept(self, tokens: int) -> int:
        """Keys that stay at the eviction after so many tokens, a multiple of the interval."""
        limit = math.ceil(self.share * tokens) if self.number is None else self.number
        return min(tokens, max(limit, self.protected))

    def stored(self, tokens: int) -> int:
        """Keys of a row of so many tokens; also the slot of the next one."""
        since = tokens % self.interval
        return self.kept(tokens - since) + since

    def num_slots(self, num_tokens: int) -> int:
        """The most slots that rows of up to `num_tokens` tokens occupy after a forward."""
        full = num_tokens - num_tokens % self.interval
        return max(self.stored(num_tokens), self.stored(full - 1) if full else 0)


@dataclass(frozen=True)
class Chunk:
    """Tokens of one forward between two evictions; lists have an entry for each row, or one for all rows.

    Args:
        layout: the slots of its keys.
        width: tokens of the longest row.
        slots: the slot of the first token's key.
        tokens: the tokens in the forward, a slice or an index (rows, width).
        first: position of the first token.
        counts: real tokens.
        stored: keys after these tokens.
        kept: keys after the eviction that follows; equal to `stored` if none does.
    """

    layout: Layout
    width: int
    slots: list[int]
    tokens: slice | Tensor
    first: list[int]
    counts: list[int]
    stored: list[int]
    kept: list[int]

    def query_slots(self, device: torch.device) -> Tensor:
        """The slot of each query's own key, (rows or 1, width)."""
        return _query_slots(self.slots, self.width, device)

    def select(self, states: Tensor) -> Tensor:
        """The tokens of (rows, heads, tokens, head_dim)."""
        if isinstance(self.tokens, slice):
            return states[:, :, self.tokens]
        index = self.tokens.to(states.device)[:, None, :, None]
        return states.gather(2, index.expand(-1, states.shape[1], -1, states.shape[3]))

    def evicting(self) -> dict[tuple[int, int], list[int] | slice]:
        """Rows that evict, by their stored keys and the keys that stay."""
        if len(self.kept) == 1:
            pair = self.stored[0], self.kept[0]
            return {} if pair[0] == pair[1] else {pair: slice(None)}
        groups: dict[tuple[int, int], list[int] | slice] = {}
        for row, pair in enumerate(zip(self.stored, self.kept, strict=True)):
            if pair[0] != pair[1]:
                rows = groups.setdefault(pair, [])
                if isinstance(rows, list):
                    rows.append(row)
        return groups


@dataclass(frozen=True)
class PrunedLayout(Layout):
    """The slots of one forward under a `PrunedRetention`; the fields of a `Layout` are those of a single chunk.

    Args:
        retention: the layout is only for layers with this retention.
        chunks: in order; the keys and values of a chunk are seen by its queries, and after an eviction by the
            next chunk.
        joined: (rows, tokens), for each token its index among the tokens of all chunks; `None` if they are in order.
        current: the index of the chunk that is fed; `None` for a forward of one chunk.
    """

    retention: PrunedRetention = PrunedRetention()
    chunks: tuple[Chunk, ...] = ()
    joined: Tensor | None = None
    current: int | None = None

    def each_chunk(self) -> Iterator[tuple[Chunk, "PrunedLayout"]]:
        """The chunks, and for each the layout of its update."""
        for index, chunk in enumerate(self.chunks):
            yield chunk, replace(self, current=index)

    def join(self, mixed: list[Tensor]) -> Tensor:
        """(rows, width, ...) of each chunk -> (rows, tokens, ...)."""
        together = torch.cat(mixed, dim=1)
        if self.joined is None:
            return together
        index = self.joined.to(together.device).view(*self.joined.shape, *[1] * (together.dim() - 2))
        return together.gather(1, index.expand(-1, -1, *together.shape[2:]))


def make_pruned_layout(retention: PrunedRetention, span: Span, device: torch.device) -> PrunedLayout:
    """The layout of `span`; on an accelerator, lengths that differ by row are read by the host."""
    starts, ends = _as_lists(span, device)
    cuts = [_cut(start, end, retention.interval) for start, end in zip(starts, ends, strict=True)]
    num_chunks = max(map(len, cuts))
    if num_chunks == 1:
        counts = [end - start for start, end in zip(starts, ends, strict=True)]
        return _layout_of(retention, [_chunk(retention, starts, counts, span.num_tokens, slice(None), device)])
    chunks, offset = [], 0
    joined = torch.zeros(len(starts), span.num_tokens, dtype=torch.long, device="cpu")
    for n in range(num_chunks):
        first = [cut[n] if n < len(cut) else end for cut, end in zip(cuts, ends, strict=True)]
        last = [cut[n + 1] if n + 1 < len(cut) else end for cut, end in zip(cuts, ends, strict=True)]
        counts = [after - before for before, after in zip(first, last, strict=True)]
        places, width = [before - start for before, start in zip(first, starts, strict=True)], max(counts)
        for row, (place, count) in enumerate(zip(places, counts, strict=True)):
            joined[row, place : place + count] = torch.arange(offset, offset + count, device="cpu")
        tokens = _tokens(places, width, span.num_tokens)
        chunks.append(_chunk(retention, first, counts, width, tokens, device))
        offset += width
    layout = _layout_of(retention, chunks)
    is_in_order = len(starts) == 1 and offset == span.num_tokens
    return layout if is_in_order else replace(layout, joined=joined)


def _as_lists(span: Span, device: torch.device) -> tuple[list[int], list[int]]:
    """Tokens seen before and after the forward: one entry if it is the same for all rows, else one for each row."""
    if isinstance(span.start, int) and span.lengths is None:
        return [span.start], [span.start + span.num_tokens]
    starts, ends = span.starts(device).tolist(), span.ends(device).tolist()
    starts = starts * len(ends) if len(starts) == 1 else starts
    is_equal = len(set(starts)) == 1 and set(ends) == {starts[0] + span.num_tokens}
    return (starts[:1], ends[:1]) if is_equal else (starts, ends)


def _cut(start: int, end: int, interval: int) -> list[int]:
    """The positions where the chunks of a row start."""
    return [start, *range(start - start % interval + interval, end, interval)]


def _tokens(places: list[int], width: int, num_tokens: int) -> slice | Tensor:
    if len(places) == 1:
        return slice(places[0], places[0] + width)
    first = torch.tensor(places, device="cpu")[:, None]
    return (first + torch.arange(width, device="cpu")).clamp(max=num_tokens - 1)


def _chunk(
    retention: PrunedRetention,
    first: list[int],
    counts: list[int],
    width: int,
    tokens: slice | Tensor,
    device: torch.device,
) -> Chunk:
    """The chunk of `width` tokens, of which `counts` are real, after `first` tokens of each row."""
    before = [retention.stored(position) for position in first]
    stored = [slots + count for slots, count in zip(before, counts, strict=True)]
    ends = [position + count for position, count in zip(first, counts, strict=True)]
    kept = [retention.stored(end) for end in ends]
    num_slots, is_uniform = max(before) + width, len(first) == 1
    sees_all = is_uniform and (width == 1 or before[0] == 0)
    layout = Layout(
        num_slots=num_slots,
        key_positions=None if sees_all else torch.arange(num_slots, device=device)[None],
        slots=before[0] if is_uniform else _query_slots(before, width, device),
    )
    return Chunk(layout, width, before, tokens, first, counts, stored, kept)


def _query_slots(first: list[int], width: int, device: torch.device) -> Tensor:
    return torch.tensor(first, device=device)[:, None] + torch.arange(width, device=device)


def _layout_of(retention: PrunedRetention, chunks: list[Chunk]) -> PrunedLayout:
    fields = vars(chunks[-1].layout)
    return PrunedLayout(**fields, retention=retention, chunks=tuple(chunks))


__all__ = ["Chunk", "PrunedLayout", "PrunedRetention", "make_pruned_layout"]
