"""Pruning policies: which keys of a long sequence stay in a cache (KV eviction).

A policy acts at fixed positions of a row: after every `interval` real tokens it keeps, in each layer and for each key
head, the `budget` keys of the highest score, among them the first `sinks` and the newest `recent`. Between two of
these positions keys accumulate. So the keys that a query sees are a function of its row's tokens alone, and never of
how the sequence was cut into forwards, padded or batched (block-wise eviction as in KeyDiff, arXiv 2504.15364).

A new policy is one frozen dataclass with a method `score` and a row in `POLICIES`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, is_dataclass
from typing import ClassVar, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import functional as F

from .cache_buffers_mambaformer import check_count

# A number of keys (an integer) or a share of the tokens so far (a float in (0, 1]).
Budget: TypeAlias = int | float
Budgets: TypeAlias = Budget | Sequence[Budget | None] | Mapping[int, Budget]


@dataclass(frozen=True)
class PruningPolicy:
    """The schedule that all policies share; a policy adds `score`.

    Args:
        budget: keys that stay after a pruning: a number, or a share in (0, 1] of the tokens so far. A list has one
            entry for each layer of the model, a dict has entries of some layers; without an entry all keys stay.
        interval: real tokens of a row between two prunings.
        sinks: first tokens of a row whose keys always stay.
        recent: newest tokens whose keys stay at a pruning.

    Raises:
        ValueError: a budget of zero or less, a share above 1, a number below `sinks + recent`, or counts that are no
            counts.
    """

    budget: Budgets = 0.5
    interval: int = 128
    sinks: int = 4
    recent: int = 32

    name: ClassVar[str] = ""

    def __post_init__(self) -> None:
        for name, lowest in (("interval", 1), ("sinks", 0), ("recent", 0)):
            check_count(name, getattr(self, name), lowest)
        budget = self.budget
        if isinstance(budget, Mapping):
            budget = {int(layer): each for layer, each in budget.items()}  # JSON has strings as keys
        elif isinstance(budget, (list, tuple)):
            budget = list(budget)
        object.__setattr__(self, "budget", budget)
        each_budget = list(budget.values()) if isinstance(budget, dict) else budget
        for each in each_budget if isinstance(each_budget, list) else [each_budget]:
            self._check_budget(each)

    def _check_budget(self, budget: object) -> None:
        is_number = type(budget) in (int, float) or (budget is None and isinstance(self.budget, list))
        if not is_number or (isinstance(budget, float) and not 0 < budget <= 1):
            raise ValueError(
                "`budget` is a number of keys (an integer) or a share of the tokens in (0, 1] (a float), got "
                f"{budget!r}."
            )
        if isinstance(budget, int) and budget < max(self.sinks + self.recent, 1):
            raise ValueError(
                f"A `budget` of {budget} keys does not hold the {self.sinks} sinks and the {self.recent} newest keys, "
                "which always stay: raise it, or lower `sinks` or `recent`. A share is a float, as 0.5."
            )

    @property
    def query_window(self) -> int:
        """Newest queries before a pruning that `score` reads; 0 if it reads none."""
        return 0

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        """Scores (rows, heads, slots) of the keys of one layer; the keys of the highest scores stay.

        Args:
            keys, values: (rows, heads, slots, head_dim), in the order of their positions; keys have their rotation.
            queries: the last `query_window` queries, (rows, heads, group, query_window, head_dim), rotated and scaled.
        """
        raise NotImplementedError(f"{type(self).__name__} has no method `score`.")

    def budgets(self, num_layers: int) -> list[Budget | None]:
        """The budget of each layer of a model; `None` where all keys stay.

        Raises:
            ValueError: budgets for another number of layers.
        """
        if isinstance(self.budget, list):
            if len(self.budget) != num_layers:
                raise ValueError(
                    f"`budget` has {len(self.budget)} entries and the model has {num_layers} layers: give one for "
                    "each layer, or a dict with some of the layers."
                )
            return self.budget
        if not isinstance(self.budget, dict):
            return [cast(Budget, self.budget)] * num_layers
        unknown = [layer for layer in self.budget if not 0 <= layer < num_layers]
        if unknown:
            raise ValueError(
                f"`budget` names the layers {unknown}, and the model has the layers 0 to {num_layers - 1}."
            )
        return [self.budget.get(layer) for layer in range(num_layers)]


@dataclass(frozen=True)
class KeyNorm(PruningPolicy):
    """Keeps keys of a low L2 norm (arXiv 2406.11430, section 3). A rotation for positions leaves norms as they are."""

    name: ClassVar[str] = "key_norm"

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        return -keys.norm(dim=-1)


@dataclass(frozen=True)
class KeyDiff(PruningPolicy):
    """Keeps the keys that are least similar to the mean direction of all keys (arXiv 2504.15364, section 3.2)."""

    name: ClassVar[str] = "key_diff"

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        directions = F.normalize(keys, dim=-1)
        return -F.cosine_similarity(directions, directions.mean(dim=2, keepdim=True), dim=-1)


@dataclass(frozen=True)
class TOVA(PruningPolicy):
    """Keeps the keys of the highest attention weights of the newest query, over a group's heads (arXiv 2401.06104)."""

    name: ClassVar[str] = "tova"

    @property
    def query_window(self) -> int:
        return 1

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        return attention_of_newest(keys, queries).mean(dim=(2, 3))


@dataclass(frozen=True)
class SnapKV(PruningPolicy):
    """Keeps the keys that the newest `window` queries attend to, and keys near them (arXiv 2404.14469, section 4).

    Args:
        window: queries before a pruning that vote, at most `interval`.
        kernel_size: keys over which the votes are max-pooled, an odd number.
    """

    window: int = 32
    kernel_size: int = 5

    name: ClassVar[str] = "snap_kv"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        check_count("kernel_size", self.kernel_size, 1)
        if self.window > self.interval or self.kernel_size % 2 == 0:
            raise ValueError(
                f"SnapKV votes with at most `interval` ({self.interval}) queries and pools over an odd number of keys,"
                f" got a `window` of {self.window} and a `kernel_size` of {self.kernel_size}."
            )

    @property
    def query_window(self) -> int:
        return self.window

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        votes = attention_of_newest(keys, queries).mean(dim=(2, 3))
        return F.max_pool1d(votes, self.kernel_size, stride=1, padding=self.kernel_size // 2)


@dataclass(frozen=True)
class ExpectedAttention(PruningPolicy):
    """Keeps the keys to which coming queries are expected to attend, by the values they carry (arXiv 2510.00636).

    Queries are taken for Gaussian, with the moments of the newest `window` queries. An attention logit is Gaussian
    then, and the mean of its exponential is `exp(mean + variance / 2)` (section 3). Normalized over the keys and
    averaged over a group's heads, plus `epsilon`, it multiplies the L2 norm of the value. The paper rotates the
    moments to coming positions; here the queries keep the rotations of their own positions.

    Args:
        window: newest queries whose moments are taken, at most `interval`.
        epsilon: weight of the value of a key that gets no attention.
    """

    window: int = 64
    epsilon: float = 0.02

    name: ClassVar[str] = "expected_attention"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_count("window", self.window, 1)
        if self.window > self.interval:
            raise ValueError(
                f"ExpectedAttention reads at most `interval` ({self.interval}) queries, got a `window` of "
                f"{self.window}."
            )
        if type(self.epsilon) not in (int, float) or not 0 <= self.epsilon < float("inf"):
            raise ValueError(f"`epsilon` must be a finite number of at least 0, got {self.epsilon!r}.")

    @property
    def query_window(self) -> int:
        return self.window

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        logits = queries @ keys[:, :, None].transpose(-1, -2)  # (rows, heads, group, window, slots)
        expected = logits.mean(dim=-2) + logits.var(dim=-2, correction=0) / 2
        return (expected.softmax(dim=-1).mean(dim=2) + self.epsilon) * values.norm(dim=-1)


@dataclass(frozen=True)
class SinksAndWindow(PruningPolicy):
    """Keeps the sinks and the newest keys (StreamingLLM, arXiv 2309.17453)."""

    name: ClassVar[str] = "sinks_and_window"

    def score(self, keys: Tensor, values: Tensor, queries: Tensor) -> Tensor:
        return torch.arange(keys.shape[2], dtype=keys.dtype, device=keys.device).expand(keys.shape[:3])


def attention_of_newest(keys: Tensor, queries: Tensor) -> Tensor:
    """Attention weights (rows, heads, group, window, slots) of the newest queries, which belong to the newest keys."""
    logits = queries @ keys[:, :, None].transpose(-1, -2)
    window, slots = queries.shape[-2], keys.shape[-2]
    slot, newest = torch.arange(slots, device=keys.device), torch.arange(slots - window, slots, device=keys.device)
    return logits.masked_fill(slot > newest[:, None], -torch.inf).softmax(dim=-1)


def round_scores(scores: Tensor) -> Tensor:
    """Scores with half of their digits.

    Equal tokens have keys of equal norm at the first layer, up to errors of rounding that depend on how a sequence is
    cut into forwards. Of scores that are equal here, the oldest wins.
    """
    bits = 2.0 ** (24 if scores.dtype == torch.float64 else 12)
    mantissa, exponent = torch.frexp(scores if scores.dtype == torch.float64 else scores.float())
    return torch.ldexp((mantissa * bits).round() / bits, exponent)


# Policies by their names in `make_cache(policy=...)`.
POLICIES: dict[str, type[PruningPolicy]] = {
    policy.name: policy for policy in (KeyNorm, KeyDiff, TOVA, SnapKV, ExpectedAttention, SinksAndWindow)
}


def resolve_policy(
    policy: PruningPolicy | str | Mapping[str, object] | None, budget: Budgets | None = None
) -> PruningPolicy | None:
    """The policy that a user means; `None` for a cache that keeps all keys.

    Args:
        policy: a policy, its name, or `policy_fields` of one.
        budget: replaces the budget of the policy.

    Raises:
        ValueError: an unknown policy, bad fields, or a budget without a policy.
    """
    if policy is None:
        if budget is not None:
            raise ValueError(f"`budget` belongs to a policy: pass `policy=` as well, one of {', '.join(POLICIES)}.")
        return None
    given = {"name": policy} if isinstance(policy, str) else policy
    # The class of a policy may come from another copy of this module: a package, or the folder of a model.
    chosen = dict(given) if isinstance(given, Mapping) else policy_fields(given)
    if budget is not None:
        chosen["budget"] = budget
    kind = POLICIES.get(cast(str, chosen.pop("name", None)))
    if kind is None:
        raise ValueError(f"`policy` must be one of {', '.join(POLICIES)}, or an object of these, got {policy!r}.")
    unknown = chosen.keys() - {field.name for field in fields(kind)}
    if unknown:
        raise ValueError(f"The policy {kind.name!r} has no {', '.join(sorted(unknown))}.")
    return kind(**chosen)  # type: ignore[arg-type]  (checked by the class)


def split_budget(budget: int, losses: Sequence[float], context: int, least: int) -> list[Budget | None]:
    """Budgets of layers, `budget` keys on average: the layers that lose most by pruning keep all keys of `context`.

    The other layers keep `least` keys, but for one, which takes the rest.

    Args:
        budget: mean number of keys per layer.
        losses: for each layer, the loss that pruning its keys alone to `least` causes, in any unit.
        context: tokens of the longest sequence.
        least: keys that every layer keeps.

    Raises:
        ValueError: `least <= budget <= context` does not hold, or there are no losses.
    """
    if not losses or not 0 < least <= budget <= context:
        raise ValueError(
            f"A split needs losses of all layers and 0 < `least` <= `budget` <= `context`, got {len(losses)} losses, "
            f"{least}, {budget} and {context}."
        )
    spare, budgets = (budget - least) * len(losses), cast(list[Budget | None], [least] * len(losses))
    for layer in sorted(range(len(losses)), key=lambda layer: -losses[layer]):
        added = min(context - least, spare)
        budgets[layer] = None if least + added == context else least + added
        spare -= added
    return budgets


def policy_fields(policy: PruningPolicy) -> dict[str, object]:
    """The name and the fields of a policy, as JSON has them."""
    name = getattr(policy, "name", None)
    if not isinstance(name, str) or not is_dataclass(policy) or isinstance(policy, type):
        raise ValueError(f"`policy` must be one of {', '.join(POLICIES)}, or an object of these, got {policy!r}.")
    return {"name": name, **asdict(policy)}


__all__ = [
    "POLICIES",
    "TOVA",
    "Budget",
    "Budgets",
    "ExpectedAttention",
    "KeyDiff",
    "KeyNorm",
    "PruningPolicy",
    "SinksAndWindow",
    "SnapKV",
    "policy_fields",
    "resolve_policy",
    "round_scores",
    "split_budget",
]
