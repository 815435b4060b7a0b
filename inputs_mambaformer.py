"""Checks of the arguments of a forward and of `generate`, before any state has changed."""

import inspect
from collections.abc import Callable, Iterable
from difflib import get_close_matches
from functools import cache
from typing import Any

import torch
from transformers import GenerationConfig

from .inputs_packing_mambaformer import BORDER_KEYWORDS
from .library_mambaformer import KEYWORDS_OF_GENERATE, LIBRARY_KEYWORDS, is_every_operation_seen

# Keywords that trainers and older callers pass to every model. The cache counts positions itself, and segments of
# BERT-style tokenizers do not exist here; `shift_labels` goes to the loss.
CALLERS_KEYWORDS = frozenset({"cache_position", "token_type_ids", "return_dict", "shift_labels"})
ACCEPTED_KEYWORDS = LIBRARY_KEYWORDS | BORDER_KEYWORDS | CALLERS_KEYWORDS
EXPERT_FIELDS = ("expert_vector", "expert_schedule")  # of a `GenerationConfig`
FORMER_NAMES = {"cache_params": "cache", "past_key_value": "cache", "expert": "expert_vector", "layer_past": "cache"}


def check_keywords(function: Callable, kwargs: dict[str, Any], accepted: frozenset[str] = ACCEPTED_KEYWORDS) -> None:
    """Refuses keyword arguments that are not `accepted` and that no caller has a use for, such as misspelt ones.

    Raises:
        TypeError: it names the keyword and the argument that was probably meant.
    """
    if kwargs.keys() <= accepted:
        return
    name = min(kwargs.keys() - accepted)
    arguments = _names_of_arguments(function)
    meant = _meant_by(name, [*arguments, *(BORDER_KEYWORDS & accepted)])
    advice = f"did you mean `{meant}`?" if meant in accepted.union(arguments) else f"it takes {', '.join(arguments)}."
    raise TypeError(f"`{function.__name__}` has no argument `{name}`: {advice}")


def check_keywords_of_generate(functions: list[Callable], settings: Iterable[str], kwargs: dict[str, Any]) -> None:
    """Refuses keyword arguments of `generate` that resemble one of these functions, or a setting, and are none.

    All others that nobody knows Transformers refuses by itself, without a hint.

    Raises:
        TypeError: as `check_keywords`.
    """
    arguments = [name for function in functions for name in _names_of_arguments(function)]
    known = {*arguments, *settings, *ACCEPTED_KEYWORDS, *KEYWORDS_OF_GENERATE}
    for name in kwargs.keys() - known:
        meant = _meant_by(name, [*arguments, *settings])
        if meant is not None:
            raise TypeError(f"`generate` has no argument `{name}`: did you mean `{meant}`?")


def check_fields_of_config(generation_config: Any) -> None:
    """Refuses a field of a `GenerationConfig` that resembles one that names experts, and that nobody reads.

    Transformers keeps fields that it does not know, and other programs have some of their own there.

    Raises:
        ValueError: it names the field and the one that was probably meant.
    """
    for name in getattr(generation_config, "__dict__", {}).keys() - _known_fields():
        meant = _meant_by(name, EXPERT_FIELDS)
        if meant in EXPERT_FIELDS:
            raise ValueError(f"`generation_config` has no field `{name}`: did you mean `{meant}`?")


@cache
def _known_fields() -> frozenset[str]:
    return frozenset({*vars(GenerationConfig()), *EXPERT_FIELDS})


def _names_of_arguments(function: Callable) -> list[str]:
    parameters = inspect.signature(function).parameters.values()
    return [
        each.name
        for each in parameters
        if each.name != "self" and each.kind not in (each.VAR_KEYWORD, each.VAR_POSITIONAL)
    ]


def _meant_by(name: str, arguments: Iterable[str]) -> str | None:
    similar = get_close_matches(name, arguments, n=1)
    return FORMER_NAMES.get(name) or (similar[0] if similar else None)


def check_token_ids(token_ids: Any, vocab_size: int, name: str = "input_ids") -> None:
    """Refuses what is no tensor (rows, tokens) of token ids.

    Values are looked at on the CPU only: on a GPU that would make the host wait at every step.

    Raises:
        TypeError: no tensor of integers.
        ValueError: another shape, no rows or tokens, or an id that is not in the vocabulary.
    """
    if not isinstance(token_ids, torch.Tensor):
        raise TypeError(
            f"`{name}` must be a tensor of token ids (rows, tokens), got {type(token_ids).__name__}: give "
            "`tokenizer(text, return_tensors='pt').input_ids`, or `torch.tensor([ids])`."
        )
    if token_ids.is_floating_point() or token_ids.is_complex() or token_ids.dtype == torch.bool:
        raise TypeError(f"`{name}` must hold integers, got {token_ids.dtype}: embeddings go into `inputs_embeds`.")
    if token_ids.dim() != 2:
        advice = f"give `{name}[None]` for a single row" if token_ids.dim() == 1 else "give one row per sequence"
        raise ValueError(f"`{name}` must be (rows, tokens), got shape {tuple(token_ids.shape)}: {advice}.")
    if 0 in token_ids.shape:
        raise ValueError(f"`{name}` must have at least one row and one token, got shape {tuple(token_ids.shape)}.")
    if are_within(token_ids, 0, vocab_size):
        return
    raise ValueError(
        f"`{name}` has ids from {int(token_ids.min())} to {int(token_ids.max())}, and the vocabulary has 0 to "
        f"{vocab_size - 1}: use the model's own tokenizer, and any id of the vocabulary at pads."
    )


def are_within(values: torch.Tensor, low: int, high: int) -> bool:
    """Whether all are at least `low` and below `high`; taken on trust where a look would stop the host."""
    if torch.compiler.is_compiling() or values.device.type != "cpu" or is_every_operation_seen():
        return True
    if values.numel() < 2:  # a decode step, where `aminmax` would be most of the time
        return not values.numel() or low <= int(values) < high
    lowest, highest = values.aminmax()
    return low <= int(lowest) and int(highest) < high


__all__ = [
    "EXPERT_FIELDS",
    "are_within",
    "check_fields_of_config",
    "check_keywords",
    "check_keywords_of_generate",
    "check_token_ids",
]
