"""The inputs of one forward: left-aligned, restored, and put after the history that is encoded again.

Padding is handled here and nowhere else. The real tokens of each row come first, every layer runs in that order, and
`LeftAlignment.restore` returns to the order of the input.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch

from .cache_history_mambaformer import CacheLengths
from .cache_mambaformer import MambaFormerCache
from .cache_parked_mambaformer import ParkedState
from .cache_retention_mambaformer import count_positions
from .configuration_mambaformer import MambaFormerConfig


@dataclass(frozen=True)
class ForwardInputs:
    """The columns that one forward takes: (rows, tokens) each, or (rows, tokens, hidden) for `inputs_embeds`.

    Args:
        token_ids: ids; -1 where embeddings were passed.
        mask: boolean, True at real tokens; `None` when all are real.
        position_ids: positions that the user chose.
    """

    token_ids: torch.Tensor
    inputs_embeds: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class LeftAlignment:
    """Moves the real tokens of each row to the front, and back.

    Args:
        lengths: real tokens of each row, (rows,); `None` when all are real.
        order: (rows, tokens), for each left-aligned column its column in the input; `None` if both orders are equal.
        inverse: (rows, tokens), for each column of the input its left-aligned column.
        is_leading: (rows, tokens), True at pads before the first real token of a row. No token has been read there, so
            their states are zeros, and scores computed from them carry no information.
    """

    lengths: torch.Tensor | None = None
    order: torch.Tensor | None = None
    inverse: torch.Tensor | None = None
    is_leading: torch.Tensor | None = None

    @classmethod
    def of(cls, mask: torch.Tensor | None) -> "LeftAlignment":
        """The alignment of rows with a boolean mask (rows, tokens)."""
        if mask is None:
            return cls()
        lengths = mask.sum(1)
        if mask.shape[1] == 1:
            return cls(lengths)
        # A pad is restored as the last real token before it: the last column then holds the newest real token,
        # whichever side is padded.
        order = torch.argsort(mask.to(torch.int8), dim=1, descending=True, stable=True)
        return cls(lengths, order, inverse=count_positions(mask), is_leading=mask.cumsum(1) == 0)

    def align(self, columns: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, ...) in the order of the input -> left-aligned."""
        return columns if self.order is None else _gather_columns(columns, self.order)

    def restore(self, aligned: torch.Tensor) -> torch.Tensor:
        """(rows, tokens, ...), left-aligned -> in the order of the input."""
        if self.inverse is None or self.is_leading is None:
            return aligned
        is_leading = self.is_leading.view(*self.is_leading.shape, *[1] * (aligned.dim() - 2))
        return _gather_columns(aligned, self.inverse).masked_fill(is_leading, 0)


def _gather_columns(columns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    index = index.view(*index.shape, *[1] * (columns.dim() - 2)).expand(-1, -1, *columns.shape[2:])
    return columns.expand(index.shape[0], *columns.shape[1:]).gather(1, index)


class OutputCollector:
    """Collects hidden states and attention weights, in the order of the input.

    Args:
        output_hidden_states: whether to collect hidden states, or the indices of the layers to collect (the others
            stay `None`); negative indices count from the end.
    """

    def __init__(
        self,
        config: MambaFormerConfig,
        alignment: LeftAlignment,
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool | None,
    ):
        self.alignment = alignment
        requested = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        self.wants_hidden = requested is not None and requested is not False
        self.layers = _layer_indices(requested, config.num_hidden_layers + 1)
        self.wants_attention = config.output_attentions if output_attentions is None else output_attentions
        self.hidden_states: list[torch.Tensor | None] = []
        self.attentions: list[torch.Tensor] = []

    @property
    def wants_anything(self) -> bool:
        return self.wants_hidden or bool(self.wants_attention)

    def hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Collects left-aligned states; returns them as computed from the collected ones, which thus get gradients."""
        if not self.wants_hidden:
            return hidden_states
        if len(self.hidden_states) not in self.layers:
            self.hidden_states.append(None)
            return hidden_states
        restored = self.alignment.restore(hidden_states)
        self.hidden_states.append(restored)
        return self.alignment.align(restored)

    def attention(self, weights: torch.Tensor | None) -> None:
        """Collects restored weights (rows, heads, tokens, keys); keys are in the order of the cache's slots."""
        if self.wants_attention and weights is not None:
            self.attentions.append(weights)

    def results(self, num_new: int) -> dict[str, tuple[torch.Tensor | None, ...] | None]:
        """The outputs of the last `num_new` tokens, or `None` for outputs that were not requested."""
        hidden = tuple(states if states is None else _last(states, 1, num_new) for states in self.hidden_states)
        attentions = tuple(_last(weights, 2, num_new) for weights in self.attentions)
        return {"hidden_states": hidden or None, "attentions": attentions or None}


def _layer_indices(requested: bool | int | list[int] | None, count: int) -> set[int]:
    if requested is None or isinstance(requested, bool):
        return set(range(count)) if requested else set()
    indices = [requested] if isinstance(requested, int) else requested
    return {index % count for index in indices if -count <= index < count}


def _last(states: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """The last entries along `dim`; all of them: the tensor itself, as a slice would not be in the outputs' graph."""
    return states if states.shape[dim] == length else states.narrow(dim, states.shape[dim] - length, length)


def prepend_history(
    new: ForwardInputs, cache: MambaFormerCache, embed_tokens: Callable, resumed: ParkedState | None = None
) -> ForwardInputs:
    """The columns of the cache's history, and the new columns after them; without the columns of parked states."""
    start = CacheLengths() if resumed is None else resumed.lengths
    history = cache.history.read(cache.lengths, start.num_columns())
    token_ids, mask, position_ids = history.token_ids, history.mask, history.position_ids
    all_real, new_real = torch.ones_like(token_ids, dtype=torch.bool), torch.ones_like(new.token_ids, dtype=torch.bool)
    if mask is not None or new.mask is not None:
        mask = torch.cat([all_real if mask is None else mask, new_real if new.mask is None else new.mask], dim=1)
    if position_ids is not None or new.position_ids is not None:
        seen = start.start if isinstance(start.start, int) else start.start[:, None]
        counted = count_positions(torch.cat([all_real, new_real], dim=1) if mask is None else mask, seen)
        chosen = (position_ids, new.position_ids)
        parts = zip(chosen, counted.split([token_ids.shape[1], new_real.shape[1]], dim=1), strict=True)
        position_ids = torch.cat([default if own is None else own for own, default in parts], dim=1)
    embeds = new.inputs_embeds
    if embeds is not None:
        embeds = torch.cat([embed_tokens(token_ids).to(embeds.dtype), embeds], dim=1)
    return ForwardInputs(torch.cat([token_ids, new.token_ids], dim=1), embeds, mask, position_ids)


__all__ = ["ForwardInputs", "LeftAlignment", "OutputCollector", "prepend_history"]
