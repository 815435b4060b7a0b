"""The prompt of `generate` after a filled cache: the complete sequence again, or only its new part.

Transformers distinguishes the two by the width of the mask, and takes embeddings for the complete sequence. Here the
columns of the cache decide: it has token ids, and a hash of each embedding that it was fed.
"""

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache

HASH_FACTOR = -7046029254386353131  # 2**64 / golden ratio, odd, as a signed integer


def embedding_marks(embeds: torch.Tensor) -> torch.Tensor:
    """Hashes (rows, columns) of embeddings (rows, columns, hidden), as integers other than 0."""
    values = embeds.detach().to(torch.promote_types(embeds.dtype, torch.float32)) + 0.0  # + 0.0 turns -0.0 into 0.0
    bits = values.view(torch.int64 if values.dtype == torch.float64 else torch.int32).long()
    factors = (2 * torch.arange(embeds.shape[-1], device=embeds.device) + 1) * HASH_FACTOR
    marks = ((bits ^ (bits >> 29)) * factors).sum(-1)
    return marks.masked_fill(marks == 0, 1)


def num_repeated_columns(
    cache: "MambaFormerCache | None",
    embed_tokens: Callable,
    prompt: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None = None,
    attention_mask: torch.Tensor | None = None,
    generation_config: object = None,
    **kwargs,
) -> int:
    """Columns of `inputs_embeds` that repeat the cached columns; 0 for a `prompt` of ids, which the library cuts.

    Raises:
        ValueError: the prompt is neither the complete sequence nor, according to the mask, its new part.
    """
    num_cached = 0 if cache is None else cache.get_seq_length()
    # An assistant may have another prompt: its drafts are then wrong, which costs only time.
    if cache is None or num_cached == 0 or getattr(generation_config, "is_assistant", False):
        return 0
    if inputs_embeds is not None:
        is_part = _is_new_part(inputs_embeds, num_cached, attention_mask)
        return 0 if is_part or not _repeats(inputs_embeds, cache, embed_tokens) else num_cached
    if prompt is None:
        raise ValueError(
            f"The cache holds {num_cached} columns and `generate` got no prompt: pass the new tokens as `input_ids` "
            "with an `attention_mask` of all columns, cached and new."
        )
    if not _is_new_part(prompt, num_cached, attention_mask) and not _starts_with(prompt, cache):
        raise ValueError(
            f"`input_ids` of {prompt.shape[1]} columns do not start with the {num_cached} columns of the cache: pass "
            "the complete sequence, or only its new part with an `attention_mask` of the complete sequence."
        )
    return 0


def _is_new_part(prompt: torch.Tensor, num_cached: int, attention_mask: torch.Tensor | None) -> bool:
    """Whether the width of the mask says that the prompt is only the new part."""
    rows, width = prompt.shape[:2]
    if attention_mask is None or attention_mask.dim() != 2 or attention_mask.shape[1] == width:
        return False
    if attention_mask.shape[1] != num_cached + width:
        raise ValueError(
            f"`attention_mask` is {tuple(attention_mask.shape)} but must be ({rows}, {width}) for the prompt, or "
            f"({rows}, {num_cached + width}) for the cached columns and a prompt that is only the new part."
        )
    return True


def _starts_with(prompt: torch.Tensor, cache: "MambaFormerCache") -> bool:
    """Whether token ids (rows, columns) start with the cached ids and have more columns; pads may be any token."""
    num_cached = cache.get_seq_length()
    cached = cache.history.view("token_ids", num_cached).to(prompt.device)
    if prompt.shape[1] <= num_cached:
        return False
    if prompt.shape[0] != cached.shape[0]:
        return True  # the forward refuses the rows
    is_same = (prompt[:, num_cached - cached.shape[1] : num_cached] == cached) | (cached < 0)
    if cache.history.mask.tensor is not None:
        is_same |= ~cache.history.view("mask", num_cached).to(prompt.device)
    return bool(is_same.all())


def _repeats(embeds: torch.Tensor, cache: "MambaFormerCache", embed_tokens: Callable) -> bool:
    """Whether embeddings (rows, columns, hidden) start with the cached columns; False if they are the new part.

    Raises:
        ValueError: only some of the cached columns are the same.
    """
    num_cached = cache.get_seq_length()
    if embeds.dim() != 3 or embeds.shape[1] <= num_cached or cache.batch_size % embeds.shape[0]:
        return False  # the forward refuses the rows
    repeats = cache.batch_size // embeds.shape[0]  # only the cache has a row for each beam
    marks = embedding_marks(embeds[:, :num_cached]).repeat_interleave(repeats, 0)
    cached_marks = _marks_of(cache, embed_tokens, embeds.dtype).to(marks.device)
    marks = marks[:, num_cached - cached_marks.shape[1] :]
    is_same = (marks == cached_marks)[cached_marks != 0]
    if is_same.numel() and bool(is_same.all()):
        return True
    if is_same.numel() and not bool(is_same.any()):
        return False
    rows, width = embeds.shape[:2]
    raise ValueError(
        f"`inputs_embeds` of {width} columns repeat only some of the {num_cached} columns of the cache, so they may be"
        " the complete sequence or its new part: pass only the new part, with an `attention_mask` of all columns, "
        f"({rows}, {num_cached + width}) if these are all new."
    )


def _marks_of(cache: "MambaFormerCache", embed_tokens: Callable, dtype: torch.dtype) -> torch.Tensor:
    """Marks (rows, columns) of the remembered columns, embedded in a dtype; 0 at pads and where there is no mark."""
    columns = cache.get_seq_length()
    history = cache.history
    token_ids = history.view("token_ids", columns)
    with torch.no_grad():
        marks = embedding_marks(embed_tokens(token_ids.clamp(min=0)).to(dtype))
    has_marks, has_pads = history.embedding_marks.tensor is not None, history.mask.tensor is not None
    marks = torch.where(token_ids < 0, history.view("embedding_marks", columns) if has_marks else 0, marks)
    return marks.masked_fill(~history.view("mask", columns), 0) if has_pads else marks


__all__ = ["embedding_marks", "num_repeated_columns"]
