"""Beliefs about which of several expert vectors fits a sequence: Bayes' rule, token by token.

`p` has a probability for each candidate. A token x changes it to p'_k ~ p_k P_k(x), and adds log sum_k p_k P_k(x) to
the evidence. With a switching rate s, p'' = (1 - s) p' + s prior follows: the forward algorithm of a hidden Markov
model whose next token comes from a new draw of the prior with probability s (fixed share, Herbster and Warmuth 1998).
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

SUM_TOLERANCE = 1e-4  # of the sum of a prior, as users round probabilities


@dataclass(frozen=True)
class Beliefs:
    """Log-probabilities of the candidates (rows, candidates), and the log-evidence of each row (rows,); in float64."""

    log_probabilities: Tensor
    log_evidence: Tensor

    @classmethod
    def of_prior(cls, log_prior: Tensor, rows: int) -> "Beliefs":
        log_prior = log_prior.expand(rows, -1)
        return cls(log_prior, log_prior.new_zeros(rows))

    def after(self, log_likelihoods: Tensor, is_observed: Tensor, log_prior: Tensor, switching: float) -> "Beliefs":
        """The beliefs after one more token.

        Args:
            log_likelihoods: of the token under each candidate, (rows, candidates).
            is_observed: (rows,), False where a row has no token, or its first one, which nothing predicts.
            log_prior: (rows or 1, candidates).
            switching: the rate s.

        Raises:
            ValueError: the evidence of a row is not a positive number.
        """
        joint = self.log_probabilities + log_likelihoods
        gained = joint.logsumexp(-1)
        if not bool(gained.isfinite()[is_observed].all()):
            raise ValueError(
                "The token has no likelihood under any candidate: the logits of the model hold NaN, or all candidates "
                "give the token a probability of zero. Check the weights and the expert vectors."
            )
        log_probabilities = joint - gained[:, None]
        if switching:
            log_kept = math.log1p(-switching) if switching < 1 else -math.inf
            kept, drawn = log_probabilities + log_kept, log_prior + math.log(switching)
            log_probabilities = torch.logaddexp(kept, drawn.expand_as(kept))
        return Beliefs(
            torch.where(is_observed[:, None], log_probabilities, self.log_probabilities),
            torch.where(is_observed, self.log_evidence + gained, self.log_evidence),
        )

    def select_rows(self, rows: Tensor) -> "Beliefs":
        return Beliefs(self.log_probabilities[rows], self.log_evidence[rows])

    def select_candidates(self, candidates: Sequence[int]) -> "Beliefs":
        """The beliefs given that one of these candidates is right."""
        kept = self.log_probabilities[:, list(candidates)]
        return replace(self, log_probabilities=kept.log_softmax(-1))


def resolve_log_prior(prior: object, names: Sequence[str | None]) -> Tensor:
    """The logarithms of a prior over candidates of these names: (1 or rows, candidates), in float64.

    Args:
        prior: `None` (uniform), `{name: probability}` with `None` for the base, or a tensor (candidates,) or (rows,
            candidates). A candidate that a mapping leaves out has probability 0.

    Raises:
        TypeError: a value of another kind.
        ValueError: an unknown name, another shape, or numbers that are no probabilities.
    """
    if prior is None:
        return torch.full((1, len(names)), -math.log(len(names)), dtype=torch.float64)
    if isinstance(prior, Mapping):
        unknown = [name for name in prior if name not in names]
        if unknown:
            raise ValueError(f"`prior` names {unknown}, and the candidates are {list(names)}.")
        prior = torch.tensor([prior.get(name, 0.0) for name in names], dtype=torch.float64)
    if not isinstance(prior, Tensor):
        raise TypeError(
            "`prior` must be None, a mapping from names to probabilities, a tensor, or another posterior, got "
            f"{type(prior).__name__}."
        )
    values = prior.detach().to("cpu", torch.float64)
    values = values[None] if values.dim() == 1 else values
    if values.dim() != 2 or values.shape[1] != len(names) or not values.shape[0]:
        raise ValueError(
            f"`prior` must be ({len(names)},) or (rows, {len(names)}), one probability for each candidate, got shape "
            f"{tuple(prior.shape)}."
        )
    sums = values.sum(-1)
    if not bool((values >= 0).all()) or not bool(((sums - 1).abs() <= SUM_TOLERANCE).all()):
        raise ValueError(
            f"The probabilities of `prior` must be at least 0 and add up to 1, got {values.tolist()}: divide them by "
            "their sum."
        )
    return (values / sums[:, None]).log()


__all__ = ["Beliefs", "resolve_log_prior"]
