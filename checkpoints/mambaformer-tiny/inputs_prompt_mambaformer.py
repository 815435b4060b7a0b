"""The prompt of `generate` behind a filled cache: the whole sequence again, or only its new part.

Transformers tells the two apart by the width of the mask, and takes all embeddings for the whole sequence. Here the
columns of the cache decide: it remembers token ids, and a mark for each embedding that it was fed.
"""

from collections.abc import Callable
from typing import Any

import torch

MIX = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed integer


def embedding_marks(embeds: torch.Tensor) -> torch.Tensor:
    """Integers (rows, columns) that tell embeddings (rows, columns, hidden) apart; 0 is never among them."""
    values = embeds.detach().to(torch.promote_types(embeds.dtype, torch.float32)) + 0.0  # + 0.0 turns -0.0 into 0.0
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).long()
    factors = (2 * torch.arange(embeds.shape[-1], device=embeds.device) + 1) * MIX
    marks = ((bits ^ (bits >> 29)) * factors).sum(-1)
    return marks.masked_fill(marks == 0, 1)


def num_columns_again(
    cache,
    embed_tokens: Callable,
    prompt: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    generation_config: Any = None,
    **kwargs,
) -> int:
    """How many columns of `inputs_embeds` repeat those of the cache; 0 for a `prompt` of ids, which the library cuts.

    Raises:
        ValueError: neither the whole sequence nor, told by the mask, its new part.
    """
    num_cached = 0 if cache is None else cache.get_seq_length()
    if num_cached == 0 or getattr(generation_config, "is_assistant", False):  # wrong drafts are only slow
        return 0
    given = prompt if inputs_embeds is None else inputs_embeds
    if given is None:
        raise ValueError(
            f"The cache holds {num_cached} columns and `generate` was given no prompt: give the new tokens as "
            "`input_ids` with an `attention_mask` of all columns, cached and new."
        )
    is_part = _is_told_to_be_part(given, num_cached, attention_mask)
    if inputs_embeds is not None:
        is_part = is_part or not _repeats(inputs_embeds, cache, embed_tokens)
        return 0 if is_part else num_cached
    if not is_part and not _starts_with(prompt, cache):
        raise ValueError(
            f"`input_ids` of {prompt.shape[1]} columns must be the {num_cached} columns of the cache and new ones"
            " after them: give the whole sequence, or only its new part with an `attention_mask` of all of it."
        )
    return 0


def _is_told_to_be_part(given: torch.Tensor, num_cached: int, attention_mask: torch.Tensor | None) -> bool:
    rows, width = given.shape[:2]
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] == width:
        return False
    if attention_mask.shape[1] != num_cached + width:
        raise ValueError(
            f"`attention_mask` is {tuple(attention_mask.shape)} but must be ({rows}, {width}) for the prompt, or "
            f"({rows}, {num_cached + width}) for the columns of the cache and a prompt that is only the new part."
        )
    return True


def _starts_with(prompt: torch.Tensor, cache) -> bool:
    """Whether token ids (rows, columns) are the cached ones and new ones after them; pads may be any token."""
    cached = cache.token_ids.to(prompt.device)
    num_cached = cached.shape[1]
    if prompt.shape[1] <= num_cached:
        return False
    if prompt.shape[0] != cached.shape[0]:
        return True  # the forward says what is wrong with the rows
    is_same = (prompt[:, :num_cached] == cached) | (cached < 0)
    mask = cache.history.mask.tensor
    return bool((is_same if mask is None else is_same | ~mask[:, :num_cached].to(prompt.device)).all())


def _repeats(embeds: torch.Tensor, cache, embed_tokens: Callable) -> bool:
    """Whether embeddings (rows, columns, hidden) are those of the whole sequence; False if they are its new part.

    Raises:
        ValueError: they could be either.
    """
    num_cached = cache.get_seq_length()
    if embeds.dim() != 3 or embeds.shape[1] <= num_cached or cache.batch_size % embeds.shape[0]:
        return False  # the forward says what is wrong with the rows
    repeats = cache.batch_size // embeds.shape[0]  # beams have rows of their own in the cache only
    found = embedding_marks(embeds[:, :num_cached]).repeat_interleave(repeats, 0)
    wanted = _marks_of(cache, embed_tokens, embeds.dtype).to(found.device)
    is_known = wanted != 0
    is_same = (found == wanted)[is_known]
    if is_same.numel() and bool(is_same.all()):
        return True
    if is_same.numel() and not bool(is_same.any()):
        return False
    rows, width = embeds.shape[:2]
    raise ValueError(
        f"`inputs_embeds` of {width} columns could be the whole sequence, with changes in the {num_cached} columns of "
        "the cache, or its new part: give only the new part, with an `attention_mask` of all columns, "
        f"({rows}, {num_cached + width}) if these are all new."
    )


def _marks_of(cache, embed_tokens: Callable, dtype: torch.dtype) -> torch.Tensor:
    """Marks (rows, columns) of what is cached, as embeddings of this type; 0 at pads and where nothing tells."""
    token_ids, columns = cache.token_ids, cache.get_seq_length()
    with torch.no_grad():
        marks = embedding_marks(embed_tokens(token_ids.clamp(min=0)).to(dtype))
    fed, mask = cache.history.embedding_marks, cache.history.mask
    marks = torch.where(token_ids < 0, 0 if fed.tensor is None else fed.view(columns), marks)
    return marks if mask.tensor is None else marks.masked_fill(~mask.view(columns), 0)


__all__ = ["embedding_marks", "num_columns_again"]
