"""Sequences packed into rows: where each starts, whichever way a trainer tells it, and how attention keeps them apart.

A row keeps its tokens in one piece, so that norms, projections and the head cost what the tokens cost. Convolution and
scan are told each token's position in its own sequence. Attention sees sequences of similar length as rows of a batch,
or, where the borders may not be looked at (compiled graphs), all tokens under a mask.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .library_mambaformer import is_every_operation_seen

# Keywords of a forward that tell borders: the first token of each sequence in the concatenation of all rows, with the
# number of tokens at the end; and what only says how long the longest is, which follows from them.
CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")
LONGEST_LENGTHS = ("max_length_q", "max_length_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k")
BORDER_KEYWORDS = frozenset({"seq_idx", *CUMULATIVE_LENGTHS, *LONGEST_LENGTHS})
# Sequences that attention sees as one batch are at least this part as long as the longest of them.
SHORTEST_OF_GROUP = 0.8


def split_borders(kwargs: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The keyword arguments that tell borders, without those that are `None`, and the others."""
    if BORDER_KEYWORDS.isdisjoint(kwargs):
        return {}, kwargs
    borders = {name: value for name, value in kwargs.items() if name in BORDER_KEYWORDS and value is not None}
    return borders, {name: value for name, value in kwargs.items() if name not in BORDER_KEYWORDS}


def sequence_starts(
    borders: dict[str, Any],
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    shape: tuple[int, int],
    left_aligned: Callable,
    lengths: torch.Tensor | None,
) -> torch.Tensor | None:
    """Whether a sequence starts at each token of left-aligned rows; `None` when each row is one sequence.

    Args:
        borders: of `split_borders`.
        attention_mask: (rows, tokens) or wider, of the new tokens in its last columns; where it has more values than
            0 and 1, each other than 0 stands for a sequence.
        position_ids: (rows, tokens); a sequence starts where they do not grow. A jump ahead starts none.
        shape: rows and tokens.
        left_aligned: `(rows, tokens) -> (rows, tokens)` with the real tokens first.
        lengths: (rows,) real tokens, or `None` when all are.

    Raises:
        ValueError: borders of another shape, or that contradict each other. Where a compiled graph would have to look
            at values, it raises a RuntimeError when it runs.
    """
    if shape[1] == 1 and not borders:
        return None
    found = first = None
    for name in [name for name in borders if name not in LONGEST_LENGTHS]:
        changes = _changes(left_aligned(_indices(name, borders[name], shape)), lengths)
        if found is None:
            found, first = changes, name
        else:
            require((found == changes).all(), _conflict(first, name))
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        changes = _changes(left_aligned(attention_mask[:, -shape[1] :]), lengths)
        if found is None:
            found, first = changes, "attention_mask"
        else:  # a mask of 0 and 1 tells no borders
            require(~changes.any() | (found == changes).all(), _conflict(first, "attention_mask"))
    if position_ids is not None:
        restarts = _restarts(left_aligned(position_ids), lengths)
        if found is None:
            found = restarts
        else:  # positions may count through a row whose borders are told otherwise
            extra = (restarts & ~found).any()
            require(~extra | ~found.any() if first == "attention_mask" else ~extra, _conflict(first, "position_ids"))
            found = found | restarts
    if found is None or not _may_be_any(found):
        return None
    return found | (torch.arange(shape[1], device=found.device) == 0)


def require(is_met: torch.Tensor, message: str) -> None:
    """Raises a ValueError unless `is_met`; a compiled graph cannot look, and raises a RuntimeError when it runs."""
    if torch.compiler.is_compiling():
        torch._assert_async(is_met, message)
    elif not bool(is_met):
        raise ValueError(message)


def refuse_packed(starts: torch.Tensor | None, reason: str) -> None:
    """Raises as `require` does where a row has several sequences; `starts` is a result of `sequence_starts`."""
    if starts is not None:
        message = (
            "Several sequences are packed into a row (told by position_ids that start again, seq_idx, cu_seq_lens or "
            f"the attention_mask), and {reason}"
        )
        require((starts.sum(1) == 1).all(), message)


def _conflict(one: str, other: str) -> str:
    return f"`{one}` and `{other}` tell different borders of sequences: give one of them."


def _indices(name: str, value: Any, shape: tuple[int, int]) -> torch.Tensor:
    """(rows, tokens) that change at every border."""
    rows, num_tokens = shape
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        raise ValueError(f"`{name}` must be a tensor of integers, got {type(value).__name__}.")
    if name == "seq_idx":
        if value.shape not in (shape, (1, num_tokens)):
            raise ValueError(f"`seq_idx` must be ({rows}, {num_tokens}) like the tokens, got {tuple(value.shape)}.")
        return value.expand(rows, -1)
    if value.dim() != 1 or value.shape[0] < 2:
        raise ValueError(f"`{name}` must be (sequences + 1,), 0 first, got {tuple(value.shape)}.")
    total = rows * num_tokens
    starts = torch.zeros(total + 1, dtype=torch.long, device=value.device)
    starts = starts.index_fill(0, value.long().clamp(0, total), 1)[:-1].view(rows, num_tokens)
    does_grow = (value[0] == 0) & (value[-1] == total) & (value.diff() >= 0).all()
    require(
        does_grow & (starts[:, 0] == 1).all(),
        f"`{name}` must grow from 0 to {total}, the tokens of all rows with their pads, and have a border where a row "
        "ends.",
    )
    return starts.flatten().cumsum(0).view(rows, num_tokens)


# Flags of all tokens, the first included: `torch.export` would write the length of a slice into its conditions.


def _changes(index: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """(rows, tokens): whether a token's sequence is another one than that of the token before it."""
    return _among_real(index != index.roll(1, 1), lengths)


def _restarts(positions: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """(rows, tokens): whether a token's position is not larger than that of the token before it."""
    return _among_real(positions <= positions.roll(1, 1), lengths)


def _among_real(flags: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    columns = torch.arange(flags.shape[1], device=flags.device)
    has_one_before = columns > 0
    return flags & (has_one_before if lengths is None else has_one_before & (columns < lengths[:, None]))


def _may_be_any(flags: torch.Tensor) -> bool:
    """Whether any is true; a graph that is being compiled cannot know, and has to expect it."""
    return torch.compiler.is_compiling() or bool(flags.any())


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences of similar length: `size` tokens in rows of `length`, which is that of the longest.

    Shorter ones repeat their last token, which no token before it sees.
    """

    size: int
    length: int


@dataclass(frozen=True)
class Sequences:
    """The sequences of left-aligned rows.

    Args:
        positions: (rows, tokens) of each token in its own sequence; pads go on counting.
        numbers: (rows, tokens), which sequence of its row a token is of; pads are of the last.
        groups: the sequences by length; empty where the borders may not be looked at.
        grouped: (grouped tokens,) which of all rows' tokens each is.
        is_pad: (grouped tokens,) true at what repeats the last token of a sequence.
        ungrouped: (rows * tokens,) the way back.
        is_outside: (rows * tokens,) true at pads of rows, which are in no group; `None` when there are none.
    """

    positions: torch.Tensor
    numbers: torch.Tensor
    groups: tuple[SequenceGroup, ...] = ()
    grouped: torch.Tensor | None = None
    is_pad: torch.Tensor | None = None
    ungrouped: torch.Tensor | None = None
    is_outside: torch.Tensor | None = None

    @classmethod
    def of(cls, starts: torch.Tensor, lengths: torch.Tensor | None, is_grouped: bool) -> "Sequences":
        """`starts` is of `sequence_starts`; without `is_grouped` nothing is read from the device."""
        columns = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
        first = torch.where(starts, columns, 0).cummax(1).values
        sequences = cls(columns - first, starts.cumsum(1))
        return sequences._grouped(starts, lengths) if is_grouped else sequences

    def _grouped(self, starts: torch.Tensor, lengths: torch.Tensor | None) -> "Sequences":
        device, (num_rows, num_tokens) = starts.device, starts.shape
        ends_of_rows = torch.arange(num_rows, device="cpu") * num_tokens + (
            num_tokens if lengths is None else lengths.cpu()
        )
        first = starts.cpu().flatten().nonzero()[:, 0]
        following = torch.cat([first[1:], first.new_tensor([num_rows * num_tokens])])
        size = torch.minimum(following, ends_of_rows[first // num_tokens]) - first
        first, size = first[size > 0], size[size > 0]
        size, order = size.sort(descending=True, stable=True)
        groups, tokens, pads = [], [], []
        for start, stop in _similar(size.tolist()):
            offsets, longest = torch.arange(int(size[start]), device="cpu"), size[start:stop, None]
            tokens.append((first[order[start:stop], None] + torch.minimum(offsets, longest - 1)).flatten())
            pads.append((offsets >= longest).flatten())
            groups.append(SequenceGroup(len(tokens[-1]), len(offsets)))
        grouped, is_pad = torch.cat(tokens), torch.cat(pads)
        ungrouped = torch.full((num_rows * num_tokens,), -1, device="cpu")
        ungrouped[grouped[~is_pad]] = (~is_pad).nonzero()[:, 0]
        is_outside = (ungrouped < 0).to(device) if bool((ungrouped < 0).any()) else None
        places = (grouped.to(device), is_pad.to(device), ungrouped.clamp(min=0).to(device), is_outside)
        return Sequences(self.positions, self.numbers, tuple(groups), *places)

    def to(self, device, non_blocking: bool = False) -> "Sequences":
        moved = {
            name: value.to(device, non_blocking=non_blocking)
            for name, value in vars(self).items()
            if isinstance(value, torch.Tensor)
        }
        return Sequences(**{**vars(self), **moved})

    def group(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """(rows * tokens, ...) -> for each group (sequences, length, ...)."""
        grouped = _pick(tokens, self.grouped, self.ungrouped, None, self.is_outside)
        # Split at once: each slice by itself would bring a gradient as large as all of them.
        parts = grouped.split([group.size for group in self.groups])
        return [part.unflatten(0, (-1, group.length)) for part, group in zip(parts, self.groups, strict=True)]

    def ungroup(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """The way back; pads of rows are zeros."""
        together = torch.cat([group.flatten(0, 1) for group in groups])
        return _pick(together, self.ungrouped, self.grouped, self.is_outside, self.is_pad)


def _similar(sizes: list[int]) -> list[tuple[int, int]]:
    """Cuts descending sizes into ranges of similar ones."""
    cuts = [0]
    for idx, size in enumerate(sizes):
        if size < SHORTEST_OF_GROUP * sizes[cuts[-1]]:
            cuts.append(idx)
    return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True))


def _pick(rows: torch.Tensor, index, back, is_zero, is_unused) -> torch.Tensor:
    """Rows `index` of a tensor, zeros where `is_zero`; `back` and `is_unused` are the same of the other direction."""
    if is_every_operation_seen():
        return _picked(rows, index, is_zero)
    return _Picked.apply(rows, index, back, is_zero, is_unused)


class _Picked(torch.autograd.Function):
    """`_pick` for autograd. Each row is picked once, or by pads whose gradient is zero: its gradient is picked too.

    PyTorch would add all gradients to a tensor of zeros.
    """

    @staticmethod
    def forward(ctx, rows, index, back, is_zero, is_unused):
        ctx.save_for_backward(index, back, is_zero, is_unused)
        return _picked(rows, index, is_zero)

    @staticmethod
    def backward(ctx, gradient):
        index, back, is_zero, is_unused = ctx.saved_tensors
        return _Picked.apply(gradient, back, index, is_unused, is_zero), None, None, None, None


def _picked(rows: torch.Tensor, index: torch.Tensor, is_zero: torch.Tensor | None) -> torch.Tensor:
    picked = rows.index_select(0, index)
    if is_zero is None:
        return picked
    return picked.masked_fill_(is_zero.view(-1, *[1] * (picked.dim() - 1)), 0)


__all__ = ["BORDER_KEYWORDS", "Sequences", "refuse_packed", "require", "sequence_starts", "split_borders"]
