"""Measures of a language model: loss by length of context, calibration, recall of facts, bytes and time of its cache.

All of it is functions of a model and of tokens; nothing is kept, and nothing is random but for a seed.
"""

import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional
from transformers import PreTrainedModel, PreTrainedTokenizerBase

TOKENS_AT_ONCE = 2048  # of short windows, so many tokens go through the model together
PART = 512  # tokens of a long text that are fed at a time
Advance = Callable[[int], object]  # told of tokens when they are done, as a progress bar is


# ---- loss


def losses_by_length(
    model: PreTrainedModel, text: Tensor, lengths: tuple[int, ...], advance: Advance
) -> dict[int, dict[str, float]]:
    """Mean nats a token of one text, cut into windows of each length; and those of the windows' second halves.

    A window is computed once, as the longest one that starts where it starts: the model is causal, so the losses of
    the shorter ones are those of its first tokens. A window's first token is given.

    Args:
        text: (tokens,), so many that the longest windows cut it into equal parts.
        lengths: each a divisor of the next.

    Returns:
        {length: {"nats": ..., "second_half": ...}}
    """
    lengths = tuple(sorted(lengths))
    if any(longer % shorter for shorter, longer in zip(lengths, (*lengths[1:], len(text)), strict=True)):
        raise ValueError(f"each of {lengths} must divide the next, and the last one the {len(text)} tokens of text")
    nats = {}
    for length, starts in _longest_windows(len(text), lengths).items():
        rows = max(1, TOKENS_AT_ONCE // length)
        for group in (starts[i : i + rows] for i in range(0, len(starts), rows)):
            found = nats_of(model, torch.stack([text[start : start + length] for start in group]))
            nats |= dict(zip(group, found, strict=True))
            advance(length * len(group))
    results = {}
    for length in lengths:
        windows = torch.stack([nats[start][: length - 1] for start in range(0, len(text), length)]).double()
        second_half = windows[:, length // 2 - 1 :]
        results[length] = {"nats": windows.mean().item(), "second_half": second_half.mean().item()}
    return results


def tokens_computed(num_tokens: int, lengths: tuple[int, ...]) -> int:
    """The number of tokens that `losses_by_length` feeds the model for a text of `num_tokens`."""
    return sum(length * len(starts) for length, starts in _longest_windows(num_tokens, lengths).items())


def _longest_windows(num_tokens: int, lengths: tuple[int, ...]) -> dict[int, list[int]]:
    """{length: starts}: every place where a window starts, once, by the longest window that starts there."""
    found = {length: [] for length in lengths}
    for start in range(0, num_tokens, min(lengths)):
        found[max(length for length in lengths if start % length == 0)].append(start)
    return found


@torch.no_grad()
def nats_of(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """-log p of each token but the first, in float32: (rows, tokens) -> (rows, tokens - 1).

    The tokens are fed as a user's are, part by part through a cache: no layer then looks at more than its window and
    one part, and no more logits are held than those of one part.
    """
    cache, nats = model.make_cache(), []
    for part, wanted in zip(input_ids[:, :-1].split(PART, 1), input_ids[:, 1:].split(PART, 1), strict=True):
        logits = model(part, past_key_values=cache).logits.float()
        nats.append(functional.cross_entropy(logits.transpose(1, 2), wanted, reduction="none"))
    return torch.cat(nats, dim=1)


@torch.no_grad()
def cache_behind(model: PreTrainedModel, text: Tensor):
    """The model's cache after a text (tokens,)."""
    cache = model.make_cache()
    for part in text[None].split(PART, 1):
        model(part, past_key_values=cache, logits_to_keep=1)
    return cache


# ---- calibration


def calibration_error(confidence: Tensor, is_right: Tensor, bins: int = 15) -> float:
    """Expected calibration error: the distance of confidence from accuracy, averaged over bins by their sizes.

    Args:
        confidence: probability of the top token of each prediction, (predictions,).
        is_right: whether the top token is the next token, (predictions,).
    """
    index = (confidence * bins).long().clamp(max=bins - 1)
    difference = torch.zeros(bins, dtype=torch.float64)
    difference.index_add_(0, index, confidence.double() - is_right.double())
    return difference.abs().sum().item() / len(confidence)


# ---- recall

OPENINGS = (
    "The locker of {} opens with the code ",
    "The ship on which {} sails carries the number ",
    "The library card of {} has the number ",
    "The telephone in the office of {} has the number ",
    "The parcel for {} has the tracking number ",
    "The race horse that belongs to {} wears the number ",
)
NAMES = (
    "Hannah Moreau|Oliver Grant|Priya Nair|Samuel Ortega|Ingrid Holm|Tomas Novak|Amara Diallo|Felix Braun|Mei Tanaka"
)
NAMES = tuple(f"{NAMES}|Lucas Ferreira|Yusuf Demir|Clara Jensen".split("|"))
DIGITS = 5
BEFORE = 256  # tokens of text before the fact that lies furthest back


@dataclass(frozen=True)
class Fact:
    """A sentence as tokens: the opening that asks for it, the answer, and the ending."""

    opening: list[int]
    answer: list[int]
    end: list[int]

    @property
    def tokens(self) -> list[int]:
        return self.opening + self.answer + self.end


def make_facts(tokenizer: PreTrainedTokenizerBase, count: int, number: int) -> list[Fact]:
    """`count` facts for the text of that number, each about something else and somebody else.

    Which fact comes first changes from text to text, so that no distance has always the same sentence.
    """
    draw = random.Random(number)
    names = draw.sample(NAMES, count)
    facts = []
    for place, name in enumerate(names):
        opening = "\n\n" + OPENINGS[(number + place) % len(OPENINGS)].format(name)
        digits = "".join(draw.choices("0123456789", k=DIGITS))
        facts.append(
            Fact(*(tokenizer(part, add_special_tokens=False)["input_ids"] for part in (opening, digits, ".\n\n")))
        )
    return facts


def with_facts(text: Tensor, facts: list[Fact], distances: tuple[int, ...]) -> Tensor:
    """The text (tokens,) with each fact in the place of the tokens that begin at its distance from the end.

    The question follows the text and is the fact's own opening, so each of its tokens, and each token of the answer,
    comes just so many tokens behind where it stood.
    """
    ids = text.clone()
    end = 0
    for fact, distance in sorted(zip(facts, distances, strict=True), key=lambda pair: -pair[1]):
        start, size = len(ids) - distance, len(fact.tokens)
        if start < end or size > distance:
            raise ValueError(
                f"there is no room for a fact of {size} tokens, {distance} tokens before the end of {len(ids)}: its "
                "distance is too close to the next one's or to the end of the text"
            )
        end = start + size
        ids[start:end] = torch.tensor(fact.tokens)
    return ids


@torch.no_grad()
def recall(model: PreTrainedModel, text: Tensor, facts: list[Fact], distances: tuple[int, ...]) -> dict[int, dict]:
    """Whether each fact is found again at the end of the text (tokens,), asked for by its beginning.

    Each question continues a fork of the same cache, so that no question sees another.

    Returns:
        {distance: {"exact": greedy decoding says just the answer, "answer_nats": mean -log p of the answer's tokens}}
    """
    cache = cache_behind(model, with_facts(text, facts, distances))
    results = {}
    for fact, distance in zip(facts, distances, strict=True):
        asked = torch.tensor([fact.opening + fact.answer[:-1]])
        logits = model(asked, past_key_values=cache.fork(), logits_to_keep=len(fact.answer)).logits[0].float()
        answer = torch.tensor(fact.answer)
        nats = functional.cross_entropy(logits, answer).item()
        results[distance] = {"exact": bool((logits.argmax(-1) == answer).all()), "answer_nats": nats}
    return results


# ---- time


@torch.no_grad()
def seconds_of_steps(
    models: dict[str, PreTrainedModel], caches: dict, rounds: int, calls: int = 5
) -> dict[str, float]:
    """Median seconds of a decode step of each model with a filled cache.

    The models take turns, so that what else the machine does hits all alike; a round counts the median of `calls`
    steps, and there is one round more, for warming up.
    """
    token = torch.ones(1, 1, dtype=torch.long)
    seconds = {name: [] for name in models}
    for _ in range(rounds + 1):
        for name, model in models.items():
            steps = []
            for _ in range(calls):
                started = time.perf_counter()
                model(token, past_key_values=caches[name])
                steps.append(time.perf_counter() - started)
            seconds[name].append(statistics.median(steps))
    return {name: statistics.median(found[1:]) for name, found in seconds.items()}


# ---- samples


def answer(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, question: str, num_tokens: int) -> str:
    """The model's answer in a chat, by greedy decoding with a small repetition penalty."""
    chat = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    options = {"max_new_tokens": num_tokens, "do_sample": False, "repetition_penalty": 1.1}
    return tokenizer.decode(model.generate(ids, **options)[0, ids.shape[1] :], skip_special_tokens=True).strip()
