"""Checks of the arguments of a forward and of `generate`, before any state has changed."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache

import torch
from transformers import GenerationConfig

from .cache_mambaformer import MambaFormerCache
from .configuration_mambaformer import MambaFormerConfig
from .inputs_packing_mambaformer import BORDER_KEYWORDS
from .inputs_padding_mambaformer import ForwardInputs
from .library_mambaformer import KEYWORDS_OF_GENERATE, LIBRARY_KEYWORDS, is_every_operation_seen

# Keywords that trainers and older callers pass to every model. The cache counts positions itself, and segments of
# BERT-style tokenizers do not exist here; `shift_labels` goes to the loss.
CALLERS_KEYWORDS = frozenset({"cache_position", "token_type_ids", "return_dict", "shift_labels"})
ACCEPTED_KEYWORDS = LIBRARY_KEYWORDS | BORDER_KEYWORDS | CALLERS_KEYWORDS
EXPERT_FIELDS = ("expert_vector", "expert_schedule")  # of a `GenerationConfig`
FORMER_NAMES = {"cache_params": "cache", "past_key_value": "cache", "expert": "expert_vector", "layer_past": "cache"}


# ---- keyword arguments


def check_keywords(
    function: Callable, kwargs: dict[str, object], accepted: frozenset[str] = ACCEPTED_KEYWORDS
) -> None:
    """Refuses keyword arguments that are not `accepted`, such as misspelt ones.

    Raises:
        TypeError: it names the keyword and the argument that was probably meant.
    """
    if kwargs.keys() <= accepted:
        return
    name = min(kwargs.keys() - accepted)
    arguments = _argument_names(function)
    similar = _similar_name(name, [*arguments, *(BORDER_KEYWORDS & accepted)])
    is_argument = similar in accepted.union(arguments)
    advice = f"did you mean `{similar}`?" if is_argument else f"it takes {', '.join(arguments)}."
    raise TypeError(f"`{function.__name__}` has no argument `{name}`: {advice}")


def check_keywords_of_generate(functions: list[Callable], settings: Iterable[str], kwargs: dict[str, object]) -> None:
    """Refuses keyword arguments of `generate` that resemble an argument of these functions, or a setting.

    Transformers itself refuses all other unknown keywords, without a suggestion.

    Raises:
        TypeError: it names the keyword and the argument that was probably meant.
    """
    arguments = [name for function in functions for name in _argument_names(function)]
    accepted = {*arguments, *settings, *ACCEPTED_KEYWORDS, *KEYWORDS_OF_GENERATE}
    for name in kwargs.keys() - accepted:
        similar = _similar_name(name, [*arguments, *settings])
        if similar is not None:
            raise TypeError(f"`generate` has no argument `{name}`: did you mean `{similar}`?")


def check_config_fields(generation_config: object) -> None:
    """Refuses an unknown field of a `GenerationConfig` that resembles a field that names expert vectors.

    Transformers keeps unknown fields, and other programs store some of their own there.

    Raises:
        ValueError: it names the field and the field that was probably meant.
    """
    for name in getattr(generation_config, "__dict__", {}).keys() - _config_fields():
        similar = _similar_name(name, EXPERT_FIELDS)
        if similar in EXPERT_FIELDS:
            raise ValueError(f"`generation_config` has no field `{name}`: did you mean `{similar}`?")


@cache
def _config_fields() -> frozenset[str]:
    return frozenset({*vars(GenerationConfig()), *EXPERT_FIELDS})


def _argument_names(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [
        each.name
        for each in parameters
        if each.name != "self" and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]


def _similar_name(name: str, arguments: Iterable[str]) -> str | None:
    similar = get_close_matches(name, list(arguments), n=1)
    return FORMER_NAMES.get(name) or (similar[0] if similar else None)


# ---- tokens, masks and positions


def check_token_ids(token_ids: object, vocab_size: int, name: str = "input_ids") -> None:
    """Refuses anything but a tensor (rows, tokens) of token ids.

    Values are checked on the CPU only: on a GPU the check would synchronize host and device at every step.

    Raises:
        TypeError: no tensor of integers.
        ValueError: another shape, no rows or tokens, or an id outside of the vocabulary.
    """
    if not isinstance(token_ids, torch.Tensor):
        raise TypeError(
            f"`{name}` must be a tensor of token ids (rows, tokens), got {type(token_ids).__name__}: pass "
            "`tokenizer(text, return_tensors='pt').input_ids`, or `torch.tensor([ids])`."
        )
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold integers, got {token_ids.dtype}: pass embeddings as `inputs_embeds`.")
    if token_ids.dim() != 2:
        advice = f"pass `{name}[None]` for a single row" if token_ids.dim() == 1 else "pass one row per sequence"
        raise ValueError(f"`{name}` must be (rows, tokens), got shape {tuple(token_ids.shape)}: {advice}.")
    if 0 in token_ids.shape:
        raise ValueError(f"`{name}` must have at least one row and one token, got shape {tuple(token_ids.shape)}.")
    if _are_within(token_ids, 0, vocab_size):
        return
    raise ValueError(
        f"`{name}` has ids from {int(token_ids.min())} to {int(token_ids.max())}, and the vocabulary has 0 to "
        f"{vocab_size - 1}: use the model's own tokenizer, and any id of the vocabulary at pads."
    )


def _are_within(values: torch.Tensor, low: int, high: int) -> bool:
    """Whether `low <= value < high` for all; true without a check where it would synchronize host and device."""
    if torch.compiler.is_compiling() or values.device.type != "cpu" or is_every_operation_seen():
        return True
    if values.numel() < 2:  # a decode step, where `aminmax` would be most of the time
        return not values.numel() or low <= int(values) < high
    lowest, highest = values.aminmax()
    return low <= int(lowest) and int(highest) < high


def check_forward_inputs(
    config: MambaFormerConfig,
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    attention_mask: torch.Tensor | None,
    position_ids: torch.Tensor | None,
    cache: MambaFormerCache | None,
) -> ForwardInputs:
    """The checked inputs of a forward; nothing has changed.

    Raises:
        ValueError, TypeError: an input that does not fit the model, the cache or the other inputs.
    """
    tokens = inputs_embeds if input_ids is None else input_ids
    if tokens is None or (input_ids is not None and inputs_embeds is not None):
        raise ValueError("Pass exactly one of `input_ids` and `inputs_embeds`.")
    if input_ids is not None:
        check_token_ids(input_ids, config.vocab_size)
    else:
        _check_embeds(inputs_embeds, config.hidden_size)
    rows, num_tokens = tokens.shape[:2]
    if rows == 0 or num_tokens == 0:
        raise ValueError("A forward needs at least one row and one token: `inputs_embeds` is empty.")
    if cache is not None:
        _check_cache(config, cache, rows, num_tokens)
    mask = _check_mask(attention_mask, rows, num_tokens, cache)
    if position_ids is not None:
        shapes = (rows, num_tokens), (1, num_tokens)
        if not isinstance(position_ids, torch.Tensor) or position_ids.shape not in shapes:
            raise ValueError(f"`position_ids` must be ({rows}, {num_tokens}), got {_describe(position_ids)}.")
        position_ids = position_ids.expand(rows, -1)
    if input_ids is None:
        input_ids = torch.full((rows, num_tokens), -1, dtype=torch.long, device=tokens.device)
    return ForwardInputs(input_ids.long(), inputs_embeds, mask, position_ids)


def _check_embeds(embeds: object, hidden_size: int) -> None:
    if not isinstance(embeds, torch.Tensor):
        raise TypeError(f"`inputs_embeds` must be a tensor, got {type(embeds).__name__}.")
    if embeds.dim() != 3 or embeds.shape[2] != hidden_size:
        raise ValueError(f"`inputs_embeds` must be (rows, tokens, {hidden_size}), got {_describe(embeds)}.")


def _check_mask(
    attention_mask: torch.Tensor | None, rows: int, num_tokens: int, cache: MambaFormerCache | None
) -> torch.Tensor | None:
    """The part of a mask that belongs to the new tokens, boolean (rows, tokens); `None` if it has no pads."""
    if attention_mask is None:
        return None
    if not isinstance(attention_mask, torch.Tensor) or attention_mask.dim() != 2:
        raise ValueError(
            "`attention_mask` must be a 2-D tensor of 0 (pad) and 1, as the model makes the causal masks. To pack "
            "sequences into a row, number them in it (1, 1, 2, 2, 0), or pass `position_ids` that start again, "
            "`seq_idx` or `cu_seq_lens_q`."
        )
    width = attention_mask.shape[1]
    mask = attention_mask[:, -num_tokens:].bool()
    if torch.compiler.is_compiling():
        return mask
    num_cached = 0 if cache is None else cache.get_seq_length()
    if attention_mask.shape[0] != rows or width not in (num_tokens, num_cached + num_tokens):
        raise ValueError(
            f"`attention_mask` is {tuple(attention_mask.shape)} but must be ({rows}, {num_tokens}) for the new tokens"
            + (f", or ({rows}, {num_cached + num_tokens}) for the cached and the new tokens." if num_cached else ".")
        )
    if cache is not None and num_cached and num_tokens > 1 and width > num_tokens:
        _check_cached_mask(attention_mask[:, :num_cached].bool(), cache)
    return None if bool(mask.all()) else mask


def _check_cached_mask(mask: torch.Tensor, cache: MambaFormerCache) -> None:
    has_pads, columns = cache.history.mask.tensor is not None, mask.shape[1]
    cached = cache.history.view("mask", columns) if has_pads else None
    if not bool(mask.all() if cached is None else (mask[:, columns - cached.shape[1] :] == cached).all()):
        raise ValueError(
            "`attention_mask` marks other cached tokens as pads than the mask that they were fed with: pass that mask "
            "again, or only the mask of the new tokens."
        )


# ---- the cache


def check_cache_type(cache: object) -> None:
    # Not by its class: remote code may have loaded a second copy of it.
    if cache is not None and not hasattr(cache, "provenance") and not getattr(cache, "is_posterior", False):
        raise TypeError(
            f"`cache` is a {type(cache).__name__}, which has no states of Mamba layers: make one with "
            "`model.make_cache()`. Prefix tuning of PEFT makes such caches, of keys and values alone: use prompt "
            "tuning, p-tuning, (IA)^3, LoRA or an expert vector instead."
        )


def _check_cache(config: MambaFormerConfig, cache: MambaFormerCache, rows: int, num_tokens: int) -> None:
    check_cache_type(cache)
    if cache.config is not config and not cache.fits(config):
        raise ValueError("`cache` was made for another configuration: make one with `model.make_cache()`.")
    if cache.batch_size not in (-1, rows):
        raise ValueError(
            f"The batch has {rows} rows but the cache has {cache.batch_size}: match them with "
            "`cache.batch_repeat_interleave` or `cache.batch_select_indices`."
        )
    if cache.max_columns is not None and not torch.compiler.is_compiling():
        needed = cache.get_seq_length() + num_tokens
        if needed > cache.max_columns:
            raise ValueError(
                f"The cache holds {cache.max_columns} columns and would need {needed}: make it with a larger "
                "`max_cache_len`, or with storage='dense'."
            )


# ---- requested outputs


def check_output_request(
    input_ids: torch.Tensor | None,
    inputs_embeds: torch.Tensor | None,
    labels: torch.Tensor | None,
    logits_to_keep: int | torch.Tensor,
    vocab_size: int,
    shift_labels: object = None,
) -> None:
    """Refuses labels and `logits_to_keep` that do not fit the inputs, before the forward starts."""
    tokens = input_ids if inputs_embeds is None else inputs_embeds
    if not isinstance(tokens, torch.Tensor) or tokens.dim() < 2:
        return  # `check_forward_inputs` refuses the tokens
    rows, num_tokens = tokens.shape[:2]
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
    """Whether these select tokens: integers that count from either end, or a boolean mask of all tokens."""
    if values.dtype == torch.bool:
        return values.shape == (num_tokens,)
    return values.dim() == 1 and not values.is_floating_point() and _are_within(values, -num_tokens, num_tokens)


def _check_labels(name: str, labels: object, shape: tuple[int, int], vocab_size: int) -> None:
    if (
        not isinstance(labels, torch.Tensor)
        or labels.is_floating_point()
        or labels.dtype == torch.bool
        or labels.shape != shape
    ):
        raise ValueError(f"`{name}` must be {tuple(shape)} like the tokens, and integers, got {_describe(labels)}.")
    if not _are_within(labels.masked_fill(labels == -100, 0), 0, vocab_size):
        raise ValueError(f"`{name}` must be -100 (ignored) or token ids below {vocab_size}.")


def _describe(value: object) -> str:
    if not isinstance(value, torch.Tensor):
        return f"a {type(value).__name__}"
    return f"{value.dtype} of shape {tuple(value.shape)}"


__all__ = [
    "EXPERT_FIELDS",
    "check_cache_type",
    "check_config_fields",
    "check_forward_inputs",
    "check_keywords",
    "check_keywords_of_generate",
    "check_output_request",
    "check_token_ids",
]
