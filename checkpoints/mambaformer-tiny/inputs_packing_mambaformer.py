"""Sequences packed into rows: where each starts, however a trainer marks it, and how attention keeps them apart.

Packed rows stay as they are, so that norms, projections and the head cost no more than their tokens. Convolution and
scan get each token's position in its own sequence. Attention takes sequences of similar length as rows of a batch, or,
in compiled graphs, which cannot look at the borders, all tokens under a mask.
"""

from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import torch

from .inputs_padding_mambaformer import ForwardInputs, LeftAlignment
from .library_mambaformer import is_every_operation_seen

# Keywords of a forward that mark borders: the first token of each sequence in the concatenation of all rows, with the
# number of tokens at the end; and the length of the longest sequence, which follows from them.
CUMULATIVE_LENGTHS = ("cu_seq_lens_q", "cu_seq_lens_k", "cu_seqlens", "cu_seqlens_q", "cu_seqlens_k")
LONGEST_LENGTHS = ("max_length_q", "max_length_k", "max_seqlen", "max_seqlen_q", "max_seqlen_k")
BORDER_KEYWORDS = frozenset({"seq_idx", *CUMULATIVE_LENGTHS, *LONGEST_LENGTHS})
# Least length of a sequence in a group, as a share of the longest sequence there.
SHORTEST_OF_GROUP = 0.8

Keywords: TypeAlias = dict[str, Any]  # of any function, passed on to others
Borders: TypeAlias = dict[str, object]  # keyword arguments that mark borders, not checked yet


def split_borders(kwargs: Keywords) -> tuple[Borders, Keywords]:
    """The keyword arguments that mark borders and are not `None`, and all other keyword arguments."""
    if BORDER_KEYWORDS.isdisjoint(kwargs):
        return {}, kwargs
    borders = {name: value for name, value in kwargs.items() if name in BORDER_KEYWORDS and value is not None}
    return borders, {name: value for name, value in kwargs.items() if name not in BORDER_KEYWORDS}


def sequence_starts(
    borders: Borders,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    shape: tuple[int, int],
    alignment: LeftAlignment,
) -> torch.Tensor | None:
    """Whether a sequence starts at each token of left-aligned rows; `None` when each row is one sequence.

    Args:
        borders: the first result of `split_borders`.
        attention_mask: (rows, tokens) or wider, of the new tokens in its last columns. If it has values other than 0
            and 1, each value other than 0 identifies a sequence.
        position_ids: (rows, tokens); a sequence starts where they do not increase. A jump forward starts none.
        shape: rows and tokens.

    Raises:
        ValueError: borders of another shape, or borders that contradict each other. A compiled graph cannot look at
            values, so it raises a RuntimeError when it runs.
    """
    if shape[1] == 1 and not borders:
        return None
    lengths = alignment.lengths
    starts, source = None, ""
    for name in [name for name in borders if name not in LONGEST_LENGTHS]:
        changes = _changes(alignment.align(_sequence_indices(name, borders[name], shape)), lengths)
        if starts is None:
            starts, source = changes, name
        else:
            require((starts == changes).all(), _conflict(source, name))
    if attention_mask is not None and attention_mask.dtype != torch.bool:
        changes = _changes(alignment.align(attention_mask[:, -shape[1] :]), lengths)
        if starts is None:
            starts, source = changes, "attention_mask"
        else:  # a mask of 0 and 1 marks no borders
            require(~changes.any() | (starts == changes).all(), _conflict(source, "attention_mask"))
    if position_ids is not None:
        starts = _add_restarts(starts, source, _restarts(alignment.align(position_ids), lengths))
    if starts is None or not _may_be_any(starts):
        return None
    return starts | (torch.arange(shape[1], device=starts.device) == 0)


def _add_restarts(starts: torch.Tensor | None, source: str, restarts: torch.Tensor) -> torch.Tensor:
    """The starts that `source` marks, together with tokens whose position restarts."""
    if starts is None:
        return restarts
    # Positions may also count through a row whose borders another argument marks.
    extra = (restarts & ~starts).any()
    require(~extra | ~starts.any() if source == "attention_mask" else ~extra, _conflict(source, "position_ids"))
    return starts | restarts


def require(is_met: torch.Tensor, message: str) -> None:
    """Raises a ValueError unless `is_met`; a compiled graph cannot look, and raises a RuntimeError when it runs."""
    if torch.compiler.is_compiling():
        torch.ops.aten._assert_async.msg(is_met, message)
    elif not bool(is_met):
        raise ValueError(message)


def refuse_packed(starts: torch.Tensor | None, reason: str) -> None:
    """Raises like `require` if a row has several sequences; `starts` is a result of `sequence_starts`."""
    if starts is not None:
        message = (
            "Several sequences are packed into a row (marked by position_ids that start again, seq_idx, cu_seq_lens "
            f"or the attention_mask), and {reason}"
        )
        require((starts.sum(1) == 1).all(), message)


def _conflict(one: str, other: str) -> str:
    return f"`{one}` and `{other}` mark different borders of sequences: pass only one of them."


def _sequence_indices(name: str, value: object, shape: tuple[int, int]) -> torch.Tensor:
    """Integers (rows, tokens) that change at every border."""
    rows, num_tokens = shape
    if not isinstance(value, torch.Tensor) or value.is_floating_point():
        raise ValueError(f"`{name}` must be a tensor of integers, got {type(value).__name__}.")
    if name == "seq_idx":
        if value.shape not in (shape, (1, num_tokens)):
            raise ValueError(f"`seq_idx` must be ({rows}, {num_tokens}) like the tokens, got {tuple(value.shape)}.")
        return value.expand(rows, -1)
    if value.dim() != 1 or value.shape[0] < 2:
        raise ValueError(f"`{name}` must be (sequences + 1,) and start with 0, got shape {tuple(value.shape)}.")
    total = rows * num_tokens
    starts = torch.zeros(total + 1, dtype=torch.long, device=value.device)
    starts = starts.index_fill(0, value.long().clamp(0, total), 1)[:-1].view(rows, num_tokens)
    is_increasing = (value[0] == 0) & (value[-1] == total) & (value.diff() >= 0).all()
    require(
        is_increasing & (starts[:, 0] == 1).all(),
        f"`{name}` must increase from 0 to {total}, the tokens of all rows with their pads, and have a border at the "
        "end of each row.",
    )
    return starts.flatten().cumsum(0).view(rows, num_tokens)


# Flags of all tokens, the first included: `torch.export` would write the length of a slice into its conditions.


def _changes(index: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """(rows, tokens): whether a token belongs to another sequence than the token before it."""
    return _among_real(index != index.roll(1, 1), lengths)


def _restarts(positions: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    """(rows, tokens): whether the position of a token does not exceed the position of the token before it."""
    return _among_real(positions <= positions.roll(1, 1), lengths)


def _among_real(flags: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    columns = torch.arange(flags.shape[1], device=flags.device)
    has_previous = columns > 0
    return flags & (has_previous if lengths is None else has_previous & (columns < lengths[:, None]))


def _may_be_any(flags: torch.Tensor) -> bool:
    """Whether any flag is true; a graph that is being compiled cannot look, and assumes it."""
    return torch.compiler.is_compiling() or bool(flags.any())


@dataclass(frozen=True)
class SequenceGroup:
    """Sequences of similar length as rows of a batch: `size` tokens in rows of `length`, the longest one.

    Shorter sequences repeat their last token, which no earlier token sees.
    """

    size: int
    length: int


@dataclass(frozen=True)
class SequenceGrouping:
    """The order of all packed tokens in which each group is a batch.

    Args:
        groups: the groups, in descending order of length.
        grouped: (grouped tokens,), index of each grouped token among the tokens of all rows.
        is_pad: (grouped tokens,), true at repetitions of the last token of a sequence.
        ungrouped: (rows * tokens,), index of each token of the rows among the grouped tokens.
        is_outside: (rows * tokens,), true at pads of rows, which are in no group; `None` when there are none.
    """

    groups: tuple[SequenceGroup, ...]
    grouped: torch.Tensor
    is_pad: torch.Tensor
    ungrouped: torch.Tensor
    is_outside: torch.Tensor | None

    @classmethod
    def of(cls, starts: torch.Tensor, lengths: torch.Tensor | None) -> "SequenceGrouping":
        """From the starts and real lengths of left-aligned rows; reads both from their device."""
        device, (num_rows, num_tokens) = starts.device, starts.shape
        row_ends = torch.arange(num_rows, device="cpu") * num_tokens + (
            num_tokens if lengths is None else lengths.cpu()
        )
        first = starts.cpu().flatten().nonzero()[:, 0]
        following = torch.cat([first[1:], first.new_tensor([num_rows * num_tokens])])
        size = torch.minimum(following, row_ends[first // num_tokens]) - first
        first, size = first[size > 0], size[size > 0]
        size, order = size.sort(descending=True, stable=True)
        groups, tokens, pads = [], [], []
        for start, stop in _similar_ranges(size.tolist()):
            offsets, longest = torch.arange(int(size[start]), device="cpu"), size[start:stop, None]
            tokens.append((first[order[start:stop], None] + torch.minimum(offsets, longest - 1)).flatten())
            pads.append((offsets >= longest).flatten())
            groups.append(SequenceGroup(len(tokens[-1]), len(offsets)))
        grouped, is_pad = torch.cat(tokens), torch.cat(pads)
        ungrouped = torch.full((num_rows * num_tokens,), -1, device="cpu")
        ungrouped[grouped[~is_pad]] = (~is_pad).nonzero()[:, 0]
        is_outside = (ungrouped < 0).to(device) if bool((ungrouped < 0).any()) else None
        indices = grouped.to(device), is_pad.to(device), ungrouped.clamp(min=0).to(device)
        return cls(tuple(groups), *indices, is_outside)

    def to(self, device: torch.device, non_blocking: bool = False) -> "SequenceGrouping":
        return replace(self, **_moved(self, device, non_blocking))

    def group(self, tokens: torch.Tensor) -> list[torch.Tensor]:
        """(rows * tokens, ...) -> for each group (sequences, length, ...)."""
        grouped = _select_rows(tokens, self.grouped, self.ungrouped, None, self.is_outside)
        # One split: the gradient of each separate slice would be as large as all of them.
        parts = grouped.split([group.size for group in self.groups])
        return [part.unflatten(0, (-1, group.length)) for part, group in zip(parts, self.groups, strict=True)]

    def ungroup(self, groups: list[torch.Tensor]) -> torch.Tensor:
        """The inverse of `group`; pads of rows are zeros."""
        together = torch.cat([group.flatten(0, 1) for group in groups])
        return _select_rows(together, self.ungrouped, self.grouped, self.is_outside, self.is_pad)


@dataclass(frozen=True)
class Sequences:
    """The sequences of left-aligned rows.

    Args:
        positions: (rows, tokens), position of each token in its own sequence; pads continue the count.
        indices: (rows, tokens), which sequence of its row a token belongs to; pads belong to the last one.
        grouping: the sequences by length; `None` in compiled graphs, which cannot look at the borders.
    """

    positions: torch.Tensor
    indices: torch.Tensor
    grouping: SequenceGrouping | None = None

    @classmethod
    def of(cls, starts: torch.Tensor, lengths: torch.Tensor | None, is_grouped: bool) -> "Sequences":
        """From the result of `sequence_starts`; without `is_grouped` nothing is read from the device."""
        columns = torch.arange(starts.shape[1], device=starts.device).expand_as(starts)
        first = torch.where(starts, columns, 0).cummax(1).values
        grouping = SequenceGrouping.of(starts, lengths) if is_grouped else None
        return cls(columns - first, starts.cumsum(1), grouping)

    def to(self, device: torch.device, non_blocking: bool = False) -> "Sequences":
        grouping = None if self.grouping is None else self.grouping.to(device, non_blocking)
        return replace(self, **_moved(self, device, non_blocking), grouping=grouping)


def _moved(of: SequenceGrouping | Sequences, device: torch.device, non_blocking: bool) -> dict[str, torch.Tensor]:
    """The fields that are tensors, on another device."""
    fields = {name: value for name, value in vars(of).items() if isinstance(value, torch.Tensor)}
    return {name: tensor.to(device, non_blocking=non_blocking) for name, tensor in fields.items()}


def _similar_ranges(sizes: list[int]) -> list[tuple[int, int]]:
    """Cuts descending sizes into ranges of similar sizes."""
    cuts = [0]
    for idx, size in enumerate(sizes):
        if size < SHORTEST_OF_GROUP * sizes[cuts[-1]]:
            cuts.append(idx)
    return list(zip(cuts, [*cuts[1:], len(sizes)], strict=True))


def _select_rows(
    rows: torch.Tensor,
    index: torch.Tensor,
    back: torch.Tensor,
    is_zero: torch.Tensor | None,
    is_unused: torch.Tensor | None,
) -> torch.Tensor:
    """Rows `index` of a tensor, zeros where `is_zero`; `back` and `is_unused` do the same in the other direction."""
    if is_every_operation_seen():
        return _select(rows, index, is_zero)
    return _SelectRows.apply(rows, index, back, is_zero, is_unused)


class _SelectRows(torch.autograd.Function):
    """`_select_rows` for autograd: the gradient is selected too, in the other direction.

    Each row is selected once, or by pads whose gradient is zero. PyTorch would add all gradients to a tensor of zeros.
    """

    @staticmethod
    def forward(ctx, rows, index, back, is_zero, is_unused):
        ctx.save_for_backward(index, back, is_zero, is_unused)
        return _select(rows, index, is_zero)

    @staticmethod
    def backward(ctx, gradient):
        index, back, is_zero, is_unused = ctx.saved_tensors
        return _SelectRows.apply(gradient, back, index, is_unused, is_zero), None, None, None, None


def _select(rows: torch.Tensor, index: torch.Tensor, is_zero: torch.Tensor | None) -> torch.Tensor:
    selected = rows.index_select(0, index)
    if is_zero is None:
        return selected
    return selected.masked_fill_(is_zero.view(-1, *[1] * (selected.dim() - 1)), 0)


def packed_sequences(
    inputs: ForwardInputs,
    alignment: LeftAlignment,
    borders: Borders,
    attention_mask: torch.Tensor | None,
    cache: object,
    use_cache: bool | None,
    is_grouped: bool,
) -> Sequences | None:
    """The packed sequences of a forward; `None` when each row is one sequence.

    Raises:
        ValueError: a row has several sequences, and a cache is passed or requested.
    """
    rows, num_tokens = inputs.token_ids.shape
    starts = sequence_starts(borders, attention_mask, inputs.position_ids, (rows, num_tokens), alignment)
    if starts is None:
        return None
    if use_cache or cache is not None:
        refuse_packed(
            starts,
            "a cache continues one sequence a row: leave `cache` out and set `use_cache=False`, or give each "
            "sequence a row of its own with an `attention_mask` of 0 and 1.",
        )
        return None  # a compiled graph
    return Sequences.of(starts, alignment.lengths, is_grouped)


def starts_in_input_order(
    like: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    borders: Borders,
) -> torch.Tensor | None:
    """Whether a sequence starts at each token (rows, tokens) of the input; `None` when each row is one sequence.

    `like` is (rows, tokens, ...). Values at pads have no meaning.
    """
    starts, alignment = _starts_of_call(like, attention_mask, position_ids, borders)
    return None if starts is None else alignment.restore(starts)


def refuse_packed_rows(
    hidden_states: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    borders: Borders,
) -> None:
    """Raises a ValueError if the rows of a classifier are packed; a compiled graph raises a RuntimeError."""
    starts, _ = _starts_of_call(hidden_states, attention_mask, position_ids, borders)
    refuse_packed(
        starts,
        "a classifier reads one a row: give each sequence a row of its own with an `attention_mask` of 0 and 1.",
    )


def drop_borders(prompt: torch.Tensor | None, kwargs: Keywords) -> Keywords:
    """The keyword arguments of `generate` without those that mark borders, which would not fit the next tokens.

    Raises:
        ValueError: a row of the prompt, (rows, tokens) or (rows, tokens, hidden), has several sequences.
    """
    borders, others = split_borders(kwargs)
    prompt = prompt if others.get("inputs_embeds") is None else others["inputs_embeds"]
    if prompt is None or prompt.dim() < 2:
        return others
    # The forward judges arguments of other shapes.
    mask, positions = (
        tensor if _has_columns(tensor, prompt.shape[1]) else None
        for tensor in (others.get("attention_mask"), others.get("position_ids"))
    )
    if borders or mask is not None or positions is not None:
        starts, _ = _starts_of_call(prompt, mask, positions, borders)
        refuse_packed(
            starts,
            "`generate` continues one a row: give each sequence a row of its own with an `attention_mask` of 0 and 1.",
        )
    return others


def _has_columns(tensor: torch.Tensor | None, num_columns: int) -> bool:
    return tensor is not None and tensor.dim() == 2 and tensor.shape[1] >= num_columns


def _starts_of_call(
    like: torch.Tensor,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    borders: Borders,
) -> tuple[torch.Tensor | None, LeftAlignment]:
    """`sequence_starts` of arguments as a user passes them, and the alignment of their rows."""
    rows, num_tokens = like.shape[:2]
    alignment = LeftAlignment.of(None if attention_mask is None else attention_mask[:, -num_tokens:].bool())
    position_ids = None if position_ids is None else position_ids[:, -num_tokens:].expand(rows, -1)
    return sequence_starts(borders, attention_mask, position_ids, (rows, num_tokens), alignment), alignment


__all__ = [
    "BORDER_KEYWORDS",
    "Sequences",
    "drop_borders",
    "packed_sequences",
    "refuse_packed_rows",
    "sequence_starts",
    "split_borders",
    "starts_in_input_order",
]
