"""What one forward is fed: checked, behind the text that has to be encoded again, and packed.

Padding is dealt with here and nowhere else. Each row's real tokens are put first, every layer runs in that order, and
`Packing.unpack` is the way back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch.nn import functional as F

from .cache_mambaformer import MambaFormerCache
from .storage_mambaformer import counted_positions


@dataclass(frozen=True)
class Feed:
    """The columns that one forward is given: (rows, tokens) each, or (rows, tokens, hidden) for `inputs_embeds`.

    `mask` is boolean and `None` when every token is real; `position_ids` are positions that the user chose.
    """

    token_ids: torch.Tensor
    inputs_embeds: torch.Tensor | None = None
    mask: torch.Tensor | None = None
    position_ids: torch.Tensor | None = None


@dataclass(frozen=True)
class Packing:
    """Rows with their real tokens first, and the way back; `order` and `restore` are (rows, tokens)."""

    lengths: torch.Tensor | None = None
    order: torch.Tensor | None = None
    restore: torch.Tensor | None = None

    @classmethod
    def of(cls, mask: torch.Tensor | None) -> "Packing":
        if mask is None:
            return cls()
        lengths = mask.sum(1)
        if mask.shape[1] == 1:
            return cls(lengths)
        # On the way back a pad takes the place of the last real token before it, so that whoever reads the last
        # column reads what was last said, whichever side is padded.
        order = torch.argsort(mask.to(torch.int8), dim=1, descending=True, stable=True)
        return cls(lengths, order, restore=counted_positions(mask))

    def pack(self, columns: torch.Tensor) -> torch.Tensor:
        return columns if self.order is None else _pick(columns, self.order)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        return rows if self.restore is None else _pick(rows, self.restore)


def _pick(columns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    index = index.view(*index.shape, *[1] * (columns.dim() - 2)).expand(-1, -1, *columns.shape[2:])
    return columns.expand(index.shape[0], *columns.shape[1:]).gather(1, index)


class Recorder:
    """Collects hidden states and attention weights, in the order in which the tokens were given.

    Args:
        output_hidden_states: whether to collect hidden states, or the indices of those to collect (`None` stands for
            the others); negative indices count from the end.
    """

    def __init__(
        self,
        config,
        packing: Packing,
        output_hidden_states: bool | int | list[int] | None,
        output_attentions: bool | None,
    ):
        self.packing = packing
        asked = config.output_hidden_states if output_hidden_states is None else output_hidden_states
        self.wants_hidden = asked is not None and asked is not False
        self.wanted = _indices(asked, config.num_hidden_layers + 1)
        self.wants_attention = config.output_attentions if output_attentions is None else output_attentions
        self.hidden_found: list[torch.Tensor | None] = []
        self.attention_found: list[torch.Tensor] = []

    @property
    def wants_anything(self) -> bool:
        return self.wants_hidden or bool(self.wants_attention)

    def hidden(self, hidden_states: torch.Tensor) -> torch.Tensor:
        """Packed states -> the same, now made from those that are kept: gradients reach what the caller is given."""
        if not self.wants_hidden:
            return hidden_states
        if len(self.hidden_found) not in self.wanted:
            self.hidden_found.append(None)
            return hidden_states
        self.hidden_found.append(self.packing.unpack(hidden_states))
        return self.packing.pack(self.hidden_found[-1])

    def attention(self, weights: torch.Tensor | None) -> None:
        """Takes (rows, heads, tokens, keys), unpacked; keys are in the order of the cache's slots."""
        if self.wants_attention and weights is not None:
            self.attention_found.append(weights)

    def results(self, num_new: int) -> dict[str, tuple[torch.Tensor | None, ...] | None]:
        """Those of the last `num_new` tokens, or `None` for what was not asked for."""
        hidden = tuple(states if states is None else _last(states, 1, num_new) for states in self.hidden_found)
        attentions = tuple(_last(weights, 2, num_new) for weights in self.attention_found)
        return {"hidden_states": hidden or None, "attentions": attentions or None}


def _indices(asked: bool | int | list[int] | None, count: int) -> set[int]:
    if asked is None or isinstance(asked, bool):
        return set(range(count)) if asked else set()
    asked = [asked] if isinstance(asked, int) else asked
    return {index % count for index in asked if -count <= index < count}


def _last(states: torch.Tensor, dim: int, length: int) -> torch.Tensor:
    """The tensor itself where nothing is left out: a slice would not be part of the graph of the outputs."""
    return states if states.shape[dim] == length else states.narrow(dim, states.shape[dim] - length, length)


def check_feed(config, input_ids, inputs_embeds, attention_mask, position_ids, cache) -> Feed:
    """What a forward was given, or a `ValueError` or `TypeError` that says what does not fit; changes nothing."""
    if (input_ids is None) == (inputs_embeds is None):
        raise ValueError("Give exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None and (input_ids.dim() != 2 or input_ids.is_floating_point()):
        raise ValueError(f"`input_ids` must be integers (rows, tokens), got {_described(input_ids)}.")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size):
        raise ValueError(
            f"`inputs_embeds` must be (rows, tokens, {config.hidden_size}), got {_described(inputs_embeds)}."
        )
    rows, num_tokens = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    if num_tokens == 0:
        raise ValueError("A forward needs at least one token: `input_ids` is empty.")
    if cache is not None:
        _check_cache(config, cache, rows, num_tokens)
    mask = _checked_mask(attention_mask, rows, num_tokens, cache)
    if position_ids is not None:
        if position_ids.shape not in ((rows, num_tokens), (1, num_tokens)):
            raise ValueError(f"`position_ids` must be ({rows}, {num_tokens}), got {_described(position_ids)}.")
        position_ids = position_ids.expand(rows, -1)
        if attention_mask is None and not torch.compiler.is_compiling():
            _check_not_packed(position_ids)
    if input_ids is None:
        input_ids = torch.full((rows, num_tokens), -1, dtype=torch.long, device=inputs_embeds.device)
    return Feed(input_ids.long(), inputs_embeds, mask, position_ids)


def check_output_request(input_ids, inputs_embeds, labels, logits_to_keep, vocab_size: int) -> None:
    """Refuses labels and `logits_to_keep` that do not fit what is fed, before it is."""
    fed = input_ids if inputs_embeds is None else inputs_embeds
    if fed is None or fed.dim() < 2:
        return  # what is fed is checked by itself
    rows, num_tokens = fed.shape[:2]
    if isinstance(logits_to_keep, torch.Tensor):
        if logits_to_keep.dim() != 1 or not _are_within(logits_to_keep, -num_tokens, num_tokens):
            raise ValueError(
                f"`logits_to_keep` must be indices (n,) of the {num_tokens} new tokens, got {logits_to_keep}."
            )
    elif not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"`logits_to_keep` must be a number of tokens or indices of them, got {logits_to_keep!r}.")
    if labels is None:
        return
    if labels.shape != (rows, num_tokens):
        raise ValueError(f"`labels` must be ({rows}, {num_tokens}) like the tokens, got {_described(labels)}.")
    if isinstance(logits_to_keep, torch.Tensor) or 0 < logits_to_keep < num_tokens:
        raise ValueError("`labels` need the logits of all tokens: leave `logits_to_keep` out.")
    if not _are_within(labels.masked_fill(labels == -100, 0), 0, vocab_size):
        raise ValueError(f"`labels` must be -100 (ignored) or token ids below {vocab_size}.")


def _are_within(values: torch.Tensor, low: int, high: int) -> bool:
    """Whether all are at least `low` and below `high`; taken on trust where a look would stop the host."""
    if torch.compiler.is_compiling() or values.device.type != "cpu":
        return True
    return bool(((values >= low) & (values < high)).all())


def _check_not_packed(position_ids: torch.Tensor) -> None:
    if bool((position_ids[:, 1:] == 0).any()):
        raise ValueError(
            "`position_ids` start again at 0 within a row, which elsewhere packs several texts into it. Here they "
            "would see each other: give each text a row of its own and an `attention_mask`."
        )


def _check_cache(config, cache: MambaFormerCache, rows: int, num_tokens: int) -> None:
    check_is_ours(cache)
    if cache.config is not config and not cache.fits(config):
        raise ValueError("`past_key_values` is of another configuration: make one with `model.make_cache()`.")
    if cache.batch_size not in (-1, rows):
        raise ValueError(
            f"The batch has {rows} rows but the cache has {cache.batch_size}: make them agree with "
            "`cache.batch_repeat_interleave` or `cache.batch_select_indices`."
        )
    if cache.max_columns is not None and not torch.compiler.is_compiling():
        needed = cache.get_seq_length() + num_tokens
        if needed > cache.max_columns:
            raise ValueError(
                f"The cache holds {cache.max_columns} columns and would need {needed}: make it with a larger "
                "`max_cache_len`, or with storage='dense'."
            )


def check_is_ours(cache: Any) -> None:
    # Not by its class: remote code may have loaded a second copy of it.
    if cache is not None and not hasattr(cache, "in_force"):
        raise TypeError(f"`past_key_values` is a {type(cache).__name__}: make one with `model.make_cache()`.")


def _described(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} of shape {tuple(tensor.shape)}"


def _checked_mask(attention_mask, rows: int, num_tokens: int, cache: MambaFormerCache | None) -> torch.Tensor | None:
    """The new tokens' part of a mask, boolean (rows, tokens); `None` when it has no pads."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise ValueError("`attention_mask` must be a 2-D tensor of 0 (pad) and 1: causal masks are made by the model.")
    width = attention_mask.shape[1]
    mask = attention_mask[:, -num_tokens:].bool()
    if torch.compiler.is_compiling():
        return mask
    seen = 0 if cache is None else cache.get_seq_length()
    if attention_mask.shape[0] != rows or width not in (num_tokens, seen + num_tokens):
        raise ValueError(
            f"`attention_mask` is {tuple(attention_mask.shape)} but must be ({rows}, {num_tokens}) for the new tokens"
            + (f", or ({rows}, {seen + num_tokens}) with those of the cache." if seen else ".")
        )
    if seen and num_tokens > 1 and width > num_tokens:
        _check_past_mask(attention_mask[:, :seen].bool(), cache)
    return None if bool(mask.all()) else mask


def _check_past_mask(mask: torch.Tensor, cache: MambaFormerCache) -> None:
    fed = cache.log.mask.tensor
    if not bool(mask.all() if fed is None else (mask == fed[:, : mask.shape[1]]).all()):
        raise ValueError(
            "`attention_mask` calls other cached tokens pads than when they were fed: pass the mask that was used "
            "then, or only that of the new tokens."
        )


def behind_history(feed: Feed, cache: MambaFormerCache, embed_tokens: Callable) -> Feed:
    """The columns of `feed` behind those that the cache remembers."""
    token_ids, mask, position_ids = cache.history()
    earlier, new = torch.ones_like(token_ids, dtype=torch.bool), torch.ones_like(feed.token_ids, dtype=torch.bool)
    if mask is not None or feed.mask is not None:
        mask = torch.cat([earlier if mask is None else mask, new if feed.mask is None else feed.mask], dim=1)
    if position_ids is not None or feed.position_ids is not None:
        counted = counted_positions(torch.cat([earlier, new], dim=1) if mask is None else mask)
        both = (position_ids, feed.position_ids)
        parts = zip(both, counted.split([token_ids.shape[1], new.shape[1]], dim=1), strict=True)
        position_ids = torch.cat([usual if own is None else own for own, usual in parts], dim=1)
    embeds = feed.inputs_embeds
    if embeds is not None:
        embeds = torch.cat([embed_tokens(token_ids).to(embeds.dtype), embeds], dim=1)
    return Feed(torch.cat([token_ids, feed.token_ids], dim=1), embeds, mask, position_ids)


def labels_of_real_tokens(labels: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Leaves out pads, and the first real token of a row: no token of this forward comes before it and predicts it."""
    has_context = F.pad(mask.cumsum(1)[:, :-1] > 0, (1, 0))
    return labels.masked_fill(~(mask & has_context), -100)
