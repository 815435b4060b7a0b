"""Changes of expert vector while `generate` runs: which expert vector predicts which new token."""

from collections.abc import Callable, Mapping
from types import EllipsisType
from typing import TYPE_CHECKING, Protocol, TypeAlias

import torch
from transformers import GenerationConfig, LogitsProcessor

from .expert_vectors_mambaformer import ExpertVectorsLike

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache

# The expert vector that predicts each new token from a number on.
Entries: TypeAlias = dict[int, ExpertVectorsLike]


class ExpertSchedule:
    """The expert vectors of a generation: the entry with the largest key up to n predicts new token n (0-based).

    Args:
        entries: {n: expert vector}, in the forms that `expert_vector=` takes.
        prompt_length: columns of `input_ids` before the first new token.

    Raises:
        TypeError: no mapping, or a key that is not an integer.
        ValueError: the mapping is empty, or a key is negative.
    """

    def __init__(self, entries: Mapping[int, ExpertVectorsLike], prompt_length: int = 0):
        self.entries, self.prompt_length = _check_entries(entries), prompt_length

    def in_force(self, num_new_tokens: int) -> ExpertVectorsLike | EllipsisType:
        """The expert vector that predicts the token after `num_new_tokens` ones; `...` before the first entry."""
        started = [n for n in self.entries if n <= num_new_tokens]
        return self.entries[max(started)] if started else ...

    def num_left(self, num_new_tokens: int) -> int | None:
        """New tokens from `num_new_tokens` to the next entry; `None` after the last one."""
        return min((n - num_new_tokens for n in self.entries if n > num_new_tokens), default=None)

    def repeat_rows(self, repeats: int) -> "ExpertSchedule":
        """The same schedule for a batch with each row repeated, for beams or several answers."""
        return ExpertSchedule({n: repeat_rows(e, repeats) for n, e in self.entries.items()}, self.prompt_length)


class CandidateGenerator(Protocol):
    """A source of drafts in Transformers."""

    def get_candidates(
        self, input_ids: torch.LongTensor, *args, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]: ...


class BoundedDrafts:
    """A candidate generator of Transformers whose drafts end at a change of expert vector and where the cache is full.

    One forward verifies a draft and predicts the token after it, with one expert vector and in one cache.

    Args:
        max_columns: columns that a static cache holds; `None` for a cache that grows.
    """

    def __init__(
        self,
        candidate_generator: CandidateGenerator,
        schedule: ExpertSchedule | None,
        max_columns: int | None = None,
    ):
        self.candidate_generator, self.schedule, self.max_columns = candidate_generator, schedule, max_columns

    def __getattr__(self, name: str):
        return getattr(self.candidate_generator, name)

    def get_candidates(self, input_ids: torch.LongTensor, *args, **kwargs) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The sequence with its draft, (rows, columns), and the draft's logits if there are any."""
        drafted, logits = self.candidate_generator.get_candidates(input_ids, *args, **kwargs)
        num_kept = self._max_drafted(input_ids.shape[1])
        if num_kept is None or drafted.shape[1] - input_ids.shape[1] <= num_kept:
            return drafted, logits
        return drafted[:, : input_ids.shape[1] + num_kept], None if logits is None else logits[:, :num_kept]

    def _max_drafted(self, length: int) -> int | None:
        """Drafted tokens that may follow `length` columns; `None` without a bound."""
        bounds = []
        if self.max_columns is not None:
            bounds.append(max(self.max_columns - length, 0))
        if self.schedule is not None:
            num_left = self.schedule.num_left(length - self.schedule.prompt_length)
            bounds += [] if num_left is None else [num_left - 1]
        return min(bounds, default=None)


class ExpertSwitchLogitsProcessor(LogitsProcessor):
    """Switches the expert vector of a cache while tokens are generated; the scores stay unchanged.

    A processor sees the scores of token n before token n + 1 is predicted, so the expert vector that it sets is in
    force from token n + 1 on. Token 0 gets the expert vector that the cache has when generation starts. One processor
    serves one call of `generate`.

    Args:
        cache: the cache of the generation (`model.make_cache()`).
        schedule: {n: expert vector}, the expert vector in force from new token n (0-based, n >= 1) on.
        choose: called with `(input_ids, scores)`, (rows, columns) and (rows, vocabulary), after each prediction;
            returns the expert vector of the next one, in any form that `cache.set_expert_vector` takes.

    Raises:
        ValueError: not exactly one of `schedule` and `choose`; or an entry for token 0, which is predicted before any
            processor runs (call `cache.set_expert_vector` first).
    """

    def __init__(
        self,
        cache: "MambaFormerCache",
        schedule: Mapping[int, ExpertVectorsLike] | None = None,
        choose: Callable[[torch.LongTensor, torch.FloatTensor], ExpertVectorsLike] | None = None,
    ):
        if (schedule is None) == (choose is None):
            raise ValueError("Pass exactly one of `schedule` and `choose`.")
        entries = {} if schedule is None else _check_entries(schedule)
        if 0 in entries:
            raise ValueError(
                "New token 0 is predicted before any processor runs: call `cache.set_expert_vector` for it."
            )
        self.cache, self.schedule, self.choose = cache, entries, choose
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


def repeat_rows(expert_vector: ExpertVectorsLike, repeats: int) -> ExpertVectorsLike:
    """A list with one expert vector per row, for a batch with each row repeated; other forms stay as they are."""
    if not isinstance(expert_vector, (list, tuple)):
        return expert_vector
    return [row for row in expert_vector for _ in range(repeats)]


# The fields `expert_vector` and `expert_schedule` of a `GenerationConfig`, or the arguments of these names; `...` and
# `None` if they are missing. A user may have written anything there.
ExpertFields: TypeAlias = tuple[object, object]


def read_expert_fields(generation_config: object) -> ExpertFields:
    """The fields of a `GenerationConfig` that name expert vectors.

    JSON turns the keys of a schedule into strings; such keys are read as integers.
    """
    values = getattr(generation_config, "__dict__", {})
    schedule = values.get("expert_schedule")
    if isinstance(schedule, Mapping):
        keys, schedule = list(schedule), {_as_key(n): each for n, each in schedule.items()}
        if len(schedule) < len(keys):
            raise ValueError(f"`expert_schedule` has two entries for one new token: {keys}. Leave one out.")
    return values.get("expert_vector", ...), schedule


def _as_key(n: object) -> object:
    return int(n) if isinstance(n, str) and n.isdecimal() else n


def first_schedule(*levels: ExpertFields) -> Entries:
    """The entries of a schedule, from `(expert_vector, expert_schedule)` pairs in order of precedence.

    The first pair with an expert vector for new token 0 ends the search. A schedule without an entry for token 0
    starts from the `expert_vector` of a later pair. The result is empty if all pairs are.

    Raises:
        TypeError, ValueError: an invalid schedule, or a pair with two expert vectors for token 0.
    """
    entries: dict = {}
    for expert_vector, schedule in levels:
        own = {} if schedule is None else _check_entries(schedule)
        if expert_vector is not ... and 0 in own:
            raise ValueError(
                "`expert_vector` and `expert_schedule[0]` are both for new token 0: pass only one of them."
            )
        entries = entries or own
        if expert_vector is not ...:
            entries.setdefault(0, expert_vector)
        if 0 in entries:
            return entries
    return entries


def prepare_to_save(generation_config: GenerationConfig) -> None:
    """Makes sure that the expert vectors of a `GenerationConfig` are in its file and are read from it.

    Raises:
        ValueError: an expert vector that is not a name, since a JSON file can hold only names.
    """
    expert_vector, schedule = read_expert_fields(generation_config)
    fields = {"expert_vector": None if expert_vector is ... else expert_vector}
    if isinstance(schedule, Mapping):
        fields |= {f"expert_schedule[{n}]": each for n, each in schedule.items()}
    for name, value in fields.items():
        rows = value if isinstance(value, (list, tuple)) else [value]
        unnamed = [row for row in rows if row is not None and not isinstance(row, str)]
        if unnamed:
            raise ValueError(
                f"`generation_config.{name}` is a {type(unnamed[0]).__name__}, and generation_config.json can hold "
                "only names: add the expert vector to `model.expert_vectors` and set its name before saving."
            )
    if expert_vector is not ... or schedule is not None:
        # The library's mark of a configuration without changes: it then reads only its own fields from the file.
        generation_config._from_model_config = False


def _check_entries(entries: object) -> Entries:
    if not isinstance(entries, Mapping):
        raise TypeError(f"A schedule must be a dict {{new token: expert vector}}, got {type(entries).__name__}.")
    for n in entries:
        if not isinstance(n, int) or isinstance(n, bool):
            raise TypeError(f"The keys of a schedule number new tokens and must be integers, got {n!r}.")
    if not entries or min(entries) < 0:
        raise ValueError(f"The keys of a schedule number new tokens from 0 on, got {sorted(entries)}.")
    return dict(entries)


__all__ = ["ExpertSchedule", "ExpertSwitchLogitsProcessor"]
