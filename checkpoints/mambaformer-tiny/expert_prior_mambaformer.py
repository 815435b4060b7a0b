"""A prior over expert vectors that learns from past sequences."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from .files_header_mambaformer import json_of
from .files_mambaformer import write_atomically

if TYPE_CHECKING:
    from .expert_posterior_mambaformer import ExpertPosterior

PRIOR_FORMAT = "mambaformer.prior"


class DirichletPrior(Mapping[str | None, float]):
    """Counts of how often each expert vector fitted a sequence, of a user or of a domain.

    The weights of the candidates are unknown and have a Dirichlet distribution; as a mapping, it gives their expected
    values: `(alpha_k + n_k) / sum_j (alpha_j + n_j)`. Pass it as the `prior` of an `ExpertPosterior`, and call
    `update` with the posterior after each sequence.

    Args:
        counts: `{name: alpha}`, the count of each candidate before any sequence, `None` for the base. One each is a
            uniform distribution over all weights.

    Raises:
        ValueError: no candidates, or a count that is not a positive number.
    """

    def __init__(self, counts: Mapping[str | None, float]):
        is_valid = bool(counts) and all(_is_name(name) and _is_count(count) for name, count in counts.items())
        if not is_valid:
            raise ValueError(
                "`counts` must map names of expert vectors (None for the base) to positive numbers, as {None: 1.0, "
                f"'king-james': 1.0}}, got {counts!r}."
            )
        self.counts = {name: float(count) for name, count in counts.items()}

    def __getitem__(self, name: str | None) -> float:
        return self.counts[name] / sum(self.counts.values())

    def __iter__(self) -> Iterator[str | None]:
        return iter(self.counts)

    def __len__(self) -> int:
        return len(self.counts)

    def __repr__(self) -> str:
        return f"DirichletPrior({self.counts})"

    def update(self, posterior: "ExpertPosterior", weight: float = 1.0) -> None:
        """Adds the sequences of a posterior: each row adds `weight`, shared by the candidates' probabilities.

        Raises:
            ValueError: the posterior has a candidate without a count, or `weight` is negative; nothing has changed.
        """
        unknown = [name for name in posterior.names if name not in self.counts]
        if unknown or not weight >= 0:
            raise ValueError(
                f"`update` takes a posterior over {list(self.counts)} and a weight of at least 0, got candidates "
                f"{posterior.names} and {weight!r}."
            )
        for name, total in zip(posterior.names, posterior.probabilities.sum(0).tolist(), strict=True):
            self.counts[name] += weight * total

    def save(self, path: str | os.PathLike) -> None:
        """Writes the counts as JSON, atomically."""
        content = {"format": PRIOR_FORMAT, "counts": list(self.counts.items())}
        write_atomically(Path(path), json.dumps(content, indent=1).encode())

    @classmethod
    def load(cls, path: str | os.PathLike) -> "DirichletPrior":
        """The prior that `save` wrote.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file has no counts.
        """
        try:
            content = json_of(Path(path).read_text())
            if content["format"] != PRIOR_FORMAT:
                raise KeyError("format")
            return cls(dict(content["counts"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a prior that `DirichletPrior.save` wrote ({error!r}).") from error


def _is_name(name: object) -> bool:
    return name is None or isinstance(name, str)


def _is_count(count: object) -> bool:
    return isinstance(count, (int, float)) and not isinstance(count, bool) and 0 < count < float("inf")


__all__ = ["DirichletPrior"]
