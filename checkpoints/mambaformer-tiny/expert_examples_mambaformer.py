"""Examples that an expert vector is fitted to: token sequences, of which some tokens count."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, TypeAlias, cast

import torch
from torch import Tensor, nn

from .expert_bases_mambaformer import at_least_float32
from .expert_vectors_mambaformer import ExpertVectorLike
from .inputs_mambaformer import check_token_ids

if TYPE_CHECKING:
    from .modeling_mambaformer import MambaFormerForCausalLM

# As users pass them: a sequence, or a prompt with its answer.
Text: TypeAlias = str | Tensor | Sequence[int]
ExampleLike: TypeAlias = Text | tuple[Text, Text]
Tokenizer: TypeAlias = Callable[..., dict[str, list[int]]]


@dataclass(frozen=True)
class Example:
    """One sequence on the CPU.

    Args:
        token_ids: (tokens,).
        is_counted: (tokens,), whether the likelihood of a token counts; never that of the first, which nothing
            predicts.
    """

    token_ids: Tensor
    is_counted: Tensor

    @property
    def num_counted(self) -> int:
        return int(self.is_counted.sum())


def read_examples(examples: Sequence[ExampleLike], tokenizer: Tokenizer | None, vocab_size: int) -> list[Example]:
    """The examples as token ids.

    Raises:
        TypeError: an example is neither a string, token ids, nor a pair of these.
        ValueError: there are none, one has no token to predict, an id is outside of the vocabulary, or a string comes
            without a tokenizer.
    """
    if isinstance(examples, (str, Tensor)):
        raise TypeError("`examples` is a single sequence: pass a list of sequences, [examples] for one.")
    read = [_example(number, each, tokenizer, vocab_size) for number, each in enumerate(examples)]
    if not read:
        raise ValueError("`examples` is empty: give at least one sequence to fit an expert vector to.")
    return read


def _example(number: int, value: ExampleLike, tokenizer: Tokenizer | None, vocab_size: int) -> Example:
    is_pair = isinstance(value, tuple) and len(value) == 2 and not isinstance(value[0], int)
    prompt, answer = cast(tuple[Text, Text], value) if is_pair else (None, cast(Text, value))
    pieces = [] if prompt is None else [_token_ids(number, prompt, tokenizer, True)]
    # The tokens that a tokenizer adds at the start of a sequence stand before the prompt alone.
    pieces.append(_token_ids(number, answer, tokenizer, prompt is None))
    ids = torch.cat(pieces)
    is_counted = torch.arange(len(ids), device="cpu") >= max(1, len(ids) - len(pieces[-1]))
    if not is_counted.any():
        raise ValueError(
            f"Example {number} has no token to predict: a sequence needs two tokens or more, and an answer one after "
            "a prompt that is not empty."
        )
    check_token_ids(ids[None], vocab_size, f"examples[{number}]")
    return Example(ids, is_counted)


def _token_ids(number: int, value: Text, tokenizer: Tokenizer | None, is_start: bool) -> Tensor:
    if isinstance(value, str):
        if tokenizer is None:
            raise ValueError(f"Example {number} is a string: pass `tokenizer=` too, or token ids.")
        return torch.tensor(tokenizer(value, add_special_tokens=is_start)["input_ids"], dtype=torch.long, device="cpu")
    if isinstance(value, (list, tuple)):
        is_of_ids = all(isinstance(each, int) and not isinstance(each, bool) for each in value)
        value = torch.tensor(value, dtype=torch.long, device="cpu") if is_of_ids else value
    if not isinstance(value, Tensor) or value.is_floating_point() or value.dtype == torch.bool:
        raise TypeError(
            f"Example {number} is neither a string, token ids (tokens,), nor a pair (prompt, answer) of these: got "
            f"{type(value).__name__}."
        )
    value = value[0] if value.ndim == 2 and value.shape[0] == 1 else value
    if value.ndim != 1:
        raise ValueError(f"Example {number} has the shape {tuple(value.shape)}: pass one sequence (tokens,) each.")
    return value.detach().to("cpu", torch.long)


def log_likelihoods(
    model: "MambaFormerForCausalLM", examples: Sequence[Example], expert_vector: ExpertVectorLike
) -> Tensor:
    """log p of the counted tokens of each example, in nats, (examples,) in float64; differentiable in the scales."""
    ids, counted = (
        nn.utils.rnn.pad_sequence(rows, batch_first=True).to(model.device)
        for rows in ([each.token_ids for each in examples], [each.is_counted for each in examples])
    )
    lengths = torch.tensor([len(each.token_ids) for each in examples], device=model.device)
    mask = torch.arange(ids.shape[1], device=model.device) < lengths[:, None]
    attention_mask = None if bool(mask.all()) else mask.long()
    logits = model(ids, attention_mask=attention_mask, expert_vector=expert_vector, use_cache=False).logits[:, :-1]
    logits = logits.to(at_least_float32(logits.dtype))
    losses = nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="none")
    return -losses.view_as(ids[:, 1:]).masked_fill(~counted[:, 1:], 0.0).double().sum(1)


def num_counted(examples: Sequence[Example]) -> int:
    return sum(each.num_counted for each in examples)


__all__ = ["Example", "ExampleLike", "Tokenizer", "log_likelihoods", "num_counted", "read_examples"]
