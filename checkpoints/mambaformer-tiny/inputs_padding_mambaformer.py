"""The inputs of one forward: checked, behind the sequence that has to be encoded again, and packed.

Padding is dealt with here and nowhere else. Each row's real tokens are put first, every layer runs in that order, and
`Packing.unpack` is the way back.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from .cache_keys_mambaformer import counted_positions
from .cache_mambaformer import MambaFormerCache
from .inputs_mambaformer import are_within, check_token_ids
from .inputs_packing_mambaformer import Sequences, refuse_packed, sequence_starts, split_borders


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
    """Rows with their real tokens first, and the way back; `order` and `restore` are (rows, tokens).

    `leading` (rows, tokens) is True at pads before a row's first real token: no token has been read there, so their
    states are zeros, and whoever scores the next token by them learns nothing.
    """

    lengths: torch.Tensor | None = None
    order: torch.Tensor | None = None
    restore: torch.Tensor | None = None
    leading: torch.Tensor | None = None

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
        return cls(lengths, order, restore=counted_positions(mask), leading=mask.cumsum(1) == 0)

    def pack(self, columns: torch.Tensor) -> torch.Tensor:
        return columns if self.order is None else _pick(columns, self.order)

    def unpack(self, rows: torch.Tensor) -> torch.Tensor:
        if self.restore is None:
            return rows
        leading = self.leading.view(*self.leading.shape, *[1] * (rows.dim() - 2))
        return _pick(rows, self.restore).masked_fill(leading, 0)


def _pick(columns: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    index = index.view(*index.shape, *[1] * (columns.dim() - 2)).expand(-1, -1, *columns.shape[2:])
    return columns.expand(index.shape[0], *columns.shape[1:]).gather(1, index)


class OutputCollector:
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
    if input_ids is not None:
        check_token_ids(input_ids, config.vocab_size)
    if inputs_embeds is not None and not isinstance(inputs_embeds, torch.Tensor):
        raise TypeError(f"`inputs_embeds` must be a tensor, got {type(inputs_embeds).__name__}.")
    if inputs_embeds is not None and (inputs_embeds.dim() != 3 or inputs_embeds.shape[2] != config.hidden_size):
        raise ValueError(
            f"`inputs_embeds` must be (rows, tokens, {config.hidden_size}), got {_described(inputs_embeds)}."
        )
    rows, num_tokens = (inputs_embeds if input_ids is None else input_ids).shape[:2]
    if rows == 0 or num_tokens == 0:
        raise ValueError("A forward needs at least one row and one token: `inputs_embeds` is empty.")
    if cache is not None:
        _check_cache(config, cache, rows, num_tokens)
    mask = _checked_mask(attention_mask, rows, num_tokens, cache)
    if position_ids is not None:
        if not isinstance(position_ids, torch.Tensor) or position_ids.shape not in (
            (rows, num_tokens),
            (1, num_tokens),
        ):
            raise ValueError(f"`position_ids` must be ({rows}, {num_tokens}), got {_described(position_ids)}.")
        position_ids = position_ids.expand(rows, -1)
    if input_ids is None:
        input_ids = torch.full((rows, num_tokens), -1, dtype=torch.long, device=inputs_embeds.device)
    return Feed(input_ids.long(), inputs_embeds, mask, position_ids)


def packed_sequences(
    feed: Feed, packing: Packing, borders: dict[str, Any], attention_mask, cache, use_cache, is_grouped: bool
) -> Sequences | None:
    """The sequences of what is fed, `None` when each row is one.

    Raises:
        ValueError: a row has several and a cache is given or asked for.
    """
    shape = tuple(feed.token_ids.shape)
    starts = sequence_starts(borders, attention_mask, feed.position_ids, shape, packing.pack, packing.lengths)
    if starts is None:
        return None
    if use_cache or cache is not None:
        refuse_packed(
            starts,
            "a cache continues one sequence a row: leave `past_key_values` out and set `use_cache=False`, or give "
            "each sequence a row of its own with an `attention_mask` of 0 and 1.",
        )
        return None  # a compiled graph
    return Sequences.of(starts, packing.lengths, is_grouped)


def starts_as_given(like, attention_mask, position_ids, borders: dict[str, Any]) -> torch.Tensor | None:
    """Whether a sequence starts at each token (rows, tokens), in the order of the call; `None` when each row is one.

    `like` is (rows, tokens, ...). The value at pads means nothing.
    """
    starts, packing = _starts_of_call(like, attention_mask, position_ids, borders)
    return None if starts is None else packing.unpack(starts)


def refuse_classified(hidden_states, attention_mask, position_ids, borders: dict[str, Any]) -> None:
    """Raises a ValueError where the rows of a classifier are packed, a compiled graph a RuntimeError."""
    starts, _ = _starts_of_call(hidden_states, attention_mask, position_ids, borders)
    refuse_packed(
        starts,
        "a classifier reads one a row: give each sequence a row of its own with an `attention_mask` of 0 and 1.",
    )


def without_borders(prompt: torch.Tensor | None, kwargs: dict[str, Any]) -> dict[str, Any]:
    """The keyword arguments of `generate` without `seq_idx` and its like, which would not fit the next tokens.

    Raises:
        ValueError: a row of the prompt, (rows, tokens) or (rows, tokens, hidden), has several sequences.
    """
    borders, others = split_borders(kwargs)
    prompt = prompt if others.get("inputs_embeds") is None else others["inputs_embeds"]
    if prompt is None or prompt.dim() < 2:
        return others
    told = others.get("attention_mask"), others.get("position_ids")
    # Arguments of other shapes are for the forward to judge.
    told = [tensor if _has_columns(tensor, prompt.shape[1]) else None for tensor in told]
    if borders or any(tensor is not None for tensor in told):
        starts, _ = _starts_of_call(prompt, *told, borders)
        refuse_packed(
            starts,
            "`generate` continues one a row: give each sequence a row of its own with an `attention_mask` of 0 and 1.",
        )
    return others


def _has_columns(tensor: torch.Tensor | None, num_columns: int) -> bool:
    return tensor is not None and tensor.dim() == 2 and tensor.shape[1] >= num_columns


def _starts_of_call(like, attention_mask, position_ids, borders) -> tuple[torch.Tensor | None, Packing]:
    """`sequence_starts` of arguments as a user gives them, and the order that they are in."""
    shape = rows, num_tokens = tuple(like.shape[:2])
    packing = Packing.of(None if attention_mask is None else attention_mask[:, -num_tokens:].bool())
    position_ids = None if position_ids is None else position_ids[:, -num_tokens:].expand(rows, -1)
    return sequence_starts(borders, attention_mask, position_ids, shape, packing.pack, packing.lengths), packing


def check_output_request(
    input_ids, inputs_embeds, labels, logits_to_keep, vocab_size: int, shift_labels: Any = None
) -> None:
    """Refuses labels and `logits_to_keep` that do not fit what is fed, before it is."""
    fed = input_ids if inputs_embeds is None else inputs_embeds
    if not isinstance(fed, torch.Tensor) or fed.dim() < 2:
        return  # what is fed is checked by itself
    rows, num_tokens = fed.shape[:2]
    if isinstance(logits_to_keep, torch.Tensor):
        if not _are_indices(logits_to_keep, num_tokens):
            raise ValueError(
                f"`logits_to_keep` must be indices (n,) of the {num_tokens} new tokens, got {logits_to_keep}."
            )
    elif not isinstance(logits_to_keep, int) or logits_to_keep < 0:
        raise ValueError(f"`logits_to_keep` must be a number of tokens or indices of them, got {logits_to_keep!r}.")
    if labels is None:
        return
    _check_labels("labels", labels, (rows, num_tokens), vocab_size)
    if shift_labels is not None:
        _check_labels("shift_labels", shift_labels, (rows, num_tokens), vocab_size)
    if isinstance(logits_to_keep, torch.Tensor) or 0 < logits_to_keep < num_tokens:
        raise ValueError("`labels` need the logits of all tokens: leave `logits_to_keep` out.")


def _are_indices(values: torch.Tensor, num_tokens: int) -> bool:
    """Whether these pick some of the tokens: whole numbers, from either end, or a mask of all of them."""
    if values.dtype == torch.bool:
        return values.shape == (num_tokens,)
    return values.dim() == 1 and not values.is_floating_point() and are_within(values, -num_tokens, num_tokens)


def _check_labels(name: str, labels: Any, shape: tuple[int, int], vocab_size: int) -> None:
    is_known = isinstance(labels, torch.Tensor) and not labels.is_floating_point() and labels.dtype != torch.bool
    if not is_known or labels.shape != shape:
        raise ValueError(f"`{name}` must be {tuple(shape)} like the tokens, and integers, got {_described(labels)}.")
    if not are_within(labels.masked_fill(labels == -100, 0), 0, vocab_size):
        raise ValueError(f"`{name}` must be -100 (ignored) or token ids below {vocab_size}.")


def _check_cache(config, cache: MambaFormerCache, rows: int, num_tokens: int) -> None:
    check_is_ours(cache)
    if cache.config is not config and not cache.fits(config):
        raise ValueError("`cache` is of another configuration: make one with `model.make_cache()`.")
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
    if cache is not None and not hasattr(cache, "provenance"):
        raise TypeError(
            f"`cache` is a {type(cache).__name__}, which has no states of Mamba layers: make one with "
            "`model.make_cache()`. Prefix tuning of PEFT makes such caches, of keys and values alone: use prompt "
            "tuning, p-tuning, (IA)^3, LoRA or an expert vector instead."
        )


def _described(value: Any) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)}"


def _checked_mask(attention_mask, rows: int, num_tokens: int, cache: MambaFormerCache | None) -> torch.Tensor | None:
    """The new tokens' part of a mask, boolean (rows, tokens); `None` when it has no pads."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise ValueError(
            "`attention_mask` must be a 2-D tensor of 0 (pad) and 1: causal masks are made by the model. To keep "
            "sequences in a row apart, number them in it (1, 1, 2, 2, 0), or give `position_ids` that start again, "
            "`seq_idx` or `cu_seq_lens_q`."
        )
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
    fed = cache.history.mask.tensor
    if not bool(mask.all() if fed is None else (mask == fed[:, : mask.shape[1]]).all()):
        raise ValueError(
            "`attention_mask` calls other cached tokens pads than when they were fed: pass the mask that was used "
            "then, or only that of the new tokens."
        )


def prepend_history(feed: Feed, cache: MambaFormerCache, embed_tokens: Callable) -> Feed:
    """The columns of the cache's history, and those of `feed` after them."""
    history = cache.history.read(cache.lengths)
    token_ids, mask, position_ids = history.token_ids, history.mask, history.position_ids
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
