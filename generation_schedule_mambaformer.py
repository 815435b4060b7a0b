"""Changing experts while `generate` runs: which expert predicts which new token."""

from collections.abc import Callable, Mapping
from typing import Any

import torch
from transformers import LogitsProcessor


class ExpertSchedule:
    """Which expert is in force when new token n (0-based) is predicted: the entry with the largest key up to n.

    Args:
        entries: {n: expert}, in the forms that `expert_vector=` takes.
        prompt_length: columns of `input_ids` before the first new token.

    Raises:
        TypeError: no mapping, or a key that is no integer.
        ValueError: it is empty, or a key is negative.
    """

    def __init__(self, entries: Mapping[int, Any], prompt_length: int = 0):
        self.entries, self.prompt_length = _checked_entries(entries), prompt_length

    def in_force(self, num_new_tokens: int) -> Any:
        """The expert that predicts the token after `num_new_tokens` new ones; `...` before the first entry."""
        started = [n for n in self.entries if n <= num_new_tokens]
        return self.entries[max(started)] if started else ...

    def num_left(self, num_new_tokens: int) -> int | None:
        """New tokens after `num_new_tokens` before another entry is in force; `None` when it is the last one."""
        return min((n - num_new_tokens for n in self.entries if n > num_new_tokens), default=None)

    def repeat_rows(self, repeats: int) -> "ExpertSchedule":
        """The same schedule for a batch whose rows were each repeated, as beams and several answers are."""
        return ExpertSchedule({n: repeat_rows(e, repeats) for n, e in self.entries.items()}, self.prompt_length)


class BoundedDrafts:
    """A candidate generator of Transformers whose drafts end where the expert changes or the cache is full.

    One forward verifies a draft and predicts the token after it, all under one expert and in one cache.

    Args:
        max_columns: columns that a static cache holds; `None` for one that grows.
    """

    def __init__(self, candidate_generator: Any, schedule: ExpertSchedule | None, max_columns: int | None = None):
        self.candidate_generator, self.schedule, self.max_columns = candidate_generator, schedule, max_columns

    def __getattr__(self, name: str) -> Any:
        return getattr(self.candidate_generator, name)

    def get_candidates(self, input_ids: torch.LongTensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sequence with its draft, (rows, columns), and the draft's logits if there are any."""
        drafted, logits = self.candidate_generator.get_candidates(input_ids, *args, **kwargs)
        num_kept = self._most_drafted(input_ids.shape[1])
        if drafted.shape[1] - input_ids.shape[1] <= num_kept:
            return drafted, logits
        return drafted[:, : input_ids.shape[1] + num_kept], None if logits is None else logits[:, :num_kept]

    def _most_drafted(self, length: int) -> float:
        most = float("inf") if self.max_columns is None else max(self.max_columns - length, 0)
        num_left = None if self.schedule is None else self.schedule.num_left(length - self.schedule.prompt_length)
        return most if num_left is None else min(most, num_left - 1)


class ExpertSwitchLogitsProcessor(LogitsProcessor):
    """Switches the expert of a cache while tokens are generated; the scores pass through unchanged.

    A processor sees the scores of token n before token n + 1 is predicted, so what it sets is in force from then on.
    The expert of token 0 is the one the cache has when generation starts. One processor serves one call of `generate`.

    Args:
        cache: the cache that generation runs on (`model.make_cache()`).
        schedule: {n: expert}, the expert in force from new token n (0-based, n >= 1) on.
        choose: called with `(input_ids, scores)`, (rows, columns) and (rows, vocabulary), after each prediction;
            returns the expert for the next one, in any form that `cache.set_expert_vector` takes.

    Raises:
        ValueError: not exactly one of `schedule` and `choose`; or an entry for token 0, which is predicted before any
            processor runs (call `cache.set_expert_vector` first).
    """

    def __init__(self, cache, schedule: Mapping[int, Any] | None = None, choose: Callable | None = None):
        if (schedule is None) == (choose is None):
            raise ValueError("Give exactly one of `schedule` and `choose`.")
        if schedule is not None and min(_checked_entries(schedule)) < 1:
            raise ValueError(
                "New token 0 is predicted before any processor runs: call `cache.set_expert_vector` for it."
            )
        self.cache, self.schedule, self.choose = cache, schedule, choose
        self.prompt_length: int | None = None

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        if self.prompt_length is None:
            self.prompt_length = input_ids.shape[1]
        next_token = input_ids.shape[1] - self.prompt_length + 1
        if self.choose is not None:
            self.cache.set_expert_vector(self.choose(input_ids, scores))
        elif next_token in self.schedule:
            self.cache.set_expert_vector(self.schedule[next_token])
        return scores


def repeat_rows(expert: Any, repeats: int) -> Any:
    """A list of experts, one a row, for a batch whose rows were each repeated; anything else stays as it is."""
    return [row for row in expert for _ in range(repeats)] if isinstance(expert, (list, tuple)) else expert


def names_experts(generation_config: Any) -> tuple[Any, Any]:
    """`(expert_vector, expert_schedule)` of a `GenerationConfig`; `...` and `None` for what it does not name.

    JSON turns the keys of a schedule into strings; such keys count as the integers that they spell.
    """
    named = getattr(generation_config, "__dict__", {})
    schedule = named.get("expert_schedule")
    if isinstance(schedule, Mapping):
        given, schedule = schedule, {_counted(n): expert for n, expert in schedule.items()}
        if len(schedule) < len(given):
            raise ValueError(f"`expert_schedule` names a new token twice: {list(given)}.")
    return named.get("expert_vector", ...), schedule


def _counted(n: Any) -> Any:
    return int(n) if isinstance(n, str) and n.isdecimal() else n


def first_schedule(*levels: tuple[Any, Any]) -> dict[int, Any]:
    """The entries of a schedule from `(expert_vector, expert_schedule)` pairs, the pair that wins first.

    The first pair that names an expert for new token 0 ends the search. A schedule without an entry for it starts
    from the `expert_vector` of a later pair. Empty if no pair names anything.

    Raises:
        TypeError, ValueError: an invalid schedule, or a pair that names the first expert twice.
    """
    entries: dict[int, Any] = {}
    for expert_vector, schedule in levels:
        own = {} if schedule is None else _checked_entries(schedule)
        if expert_vector is not ... and 0 in own:
            raise ValueError("`expert_vector` and `expert_schedule[0]` both name the first expert: give one.")
        entries = entries or own
        if expert_vector is not ...:
            entries.setdefault(0, expert_vector)
        if 0 in entries:
            return entries
    return entries


def prepare_to_save(generation_config: Any) -> None:
    """Makes sure that the experts of a `GenerationConfig` are in its file and are read from it.

    Raises:
        ValueError: experts that are not given by name, which a JSON file cannot hold.
    """
    expert_vector, schedule = names_experts(generation_config)
    given = {"expert_vector": None if expert_vector is ... else expert_vector}
    given |= {f"expert_schedule[{n}]": expert for n, expert in (schedule or {}).items()}
    for where, expert in given.items():
        rows = expert if isinstance(expert, (list, tuple)) else [expert]
        unnamed = [row for row in rows if row is not None and not isinstance(row, str)]
        if unnamed:
            raise ValueError(
                f"`generation_config.{where}` is a {type(unnamed[0]).__name__}, and generation_config.json holds "
                "names only: add the expert to the model's library and set its name there before saving."
            )
    if expert_vector is not ... or schedule is not None:
        # The library's mark of a configuration that nobody has edited: from its file only known fields are read.
        generation_config._from_model_config = False


def _checked_entries(entries: Mapping[int, Any]) -> dict[int, Any]:
    if not isinstance(entries, Mapping):
        raise TypeError(f"A schedule is a dict {{new token: expert}}, got {type(entries).__name__}.")
    for n in entries:
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"A schedule's keys count new tokens and are integers, got {n!r}.")
    if not entries or min(entries) < 0:
        raise ValueError(f"A schedule's keys count new tokens from 0, got {sorted(entries)}.")
    return dict(entries)


__all__ = ["ExpertSchedule", "ExpertSwitchLogitsProcessor"]
