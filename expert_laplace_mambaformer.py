"""The uncertainty of one trained expert vector: a normal posterior over its scales.

`fit_laplace` computes the Laplace approximation (MacKay, Neural Computation 4(3), 1992) with a diagonal covariance.
The prior of each scale is normal around 1, the base, with the precision delta; the likelihood contributes the diagonal
F of its Fisher information, which is the generalized Gauss-Newton matrix of a softmax; so `sigma_i^2 = 1 / (F_i +
delta)`. delta maximizes the marginal likelihood (Immer et al., arXiv 2104.04975). `fit_isotropic` needs no gradients:
one sigma for all scales, the largest that the training loss tolerates (arXiv 2412.05723).
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .expert_bases_mambaformer import at_least_float32
from .expert_vectors_mambaformer import ExpertVector

if TYPE_CHECKING:
    from .modeling_mambaformer import MambaFormerForCausalLM

MOST_ITERATIONS = 200  # of the fixed point, which halves the error in log delta at least
PRECISION_TOLERANCE = 1e-12  # in log delta
LARGEST_SIGMA, BISECTIONS = 1.0, 10  # of the isotropic form: sigma is found to 0.1% of the largest one


def fit_laplace(
    model: "MambaFormerForCausalLM",
    expert_vector: ExpertVector,
    batches: Iterable[Tensor],
    num_tokens: int | None = None,
    generator: torch.Generator | None = None,
) -> ExpertVector:
    """The expert vector with the deviations of its Laplace posterior; `metadata["laplace"]` states delta.

    Args:
        batches: token ids (rows, tokens) of the training data, without padding.
        num_tokens: tokens of all training data, if `batches` are a part of it; F is multiplied accordingly.
        generator: draws the labels of the Fisher information.

    Raises:
        ValueError: no tokens, or a vector that does not fit the model or equals the base everywhere.
    """
    _check_number("num_tokens", num_tokens)
    fisher, tokens = fisher_diagonal(model, expert_vector, batches, generator)
    factor = 1.0 if num_tokens is None else num_tokens / tokens
    fisher = {name: factor * values for name, values in fisher.items()}
    delta = prior_precision(fisher, expert_vector.vectors)
    deviations = {name: (values + delta).rsqrt() for name, values in fisher.items()}
    return _with_deviations(expert_vector, deviations, "laplace", {"prior_precision": delta, "fisher_tokens": tokens})


def fisher_diagonal(
    model: "MambaFormerForCausalLM",
    expert_vector: ExpertVector,
    batches: Iterable[Tensor],
    generator: torch.Generator | None = None,
) -> tuple[dict[str, Tensor], int]:
    """The diagonal of the Fisher information of the scales, summed over all tokens, and the number of tokens.

    F = sum_t E_y [(d log p(y | x_<=t) / dz)^2], with labels y drawn from the model (Kunstner et al., arXiv
    1905.12558). Labels of one sequence are drawn independently, so the expectation of the square of their summed
    gradient is F too. Each row of a batch has its own copy of the scales, so one backward pass gives the gradient of
    every row.

    Returns:
        module name -> (rank,) in float64: an unbiased estimate from one label per token.
    """
    _check_fits(model, expert_vector)
    fisher = {name: torch.zeros(len(z), dtype=torch.float64) for name, z in expert_vector.vectors.items()}
    tokens = 0
    for ids in batches:
        for name, gradients in _row_gradients(model, expert_vector, ids, generator).items():
            fisher[name] += gradients.double().square().sum(0)
        tokens += ids.numel()
    if not tokens:
        raise ValueError("`batches` has no tokens: pass token ids (rows, tokens) of the training data.")
    return fisher, tokens


def _row_gradients(
    model: "MambaFormerForCausalLM", expert_vector: ExpertVector, ids: Tensor, generator: torch.Generator | None
) -> dict[str, Tensor]:
    """For each row, the gradient of the log-likelihood of labels drawn from the model: name -> (rows, rank)."""
    names = list(expert_vector.vectors)
    scales = [expert_vector.vectors[name].detach().expand(len(ids), -1).clone() for name in names]
    with torch.enable_grad():
        leaves = [[row.requires_grad_() for row in z.unbind()] for z in scales]
        rows = [
            ExpertVector(dict(zip(names, row, strict=True)), expert_vector.name, expert_vector.metadata)
            for row in zip(*leaves, strict=True)
        ]
        logits = model(ids, expert_vector=rows, use_cache=False).logits
        log_probs = logits.to(at_least_float32(logits.dtype)).log_softmax(-1).flatten(0, 1)
        # Drawn on the CPU, as a generator belongs to one device.
        labels = log_probs.detach().cpu().exp().multinomial(1, generator=generator)
        log_likelihood = log_probs.gather(-1, labels.to(log_probs.device)).sum()
        gradients = torch.autograd.grad(log_likelihood, [row for each in leaves for row in each])
    by_module = [gradients[start : start + len(ids)] for start in range(0, len(gradients), len(ids))]
    return {name: torch.stack(list(rows)).cpu() for name, rows in zip(names, by_module, strict=True)}


def prior_precision(fisher: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> float:
    """The precision delta of the prior that maximizes the marginal likelihood of the training data.

    log Z(delta) = const - delta / 2 |z - 1|^2 - 1/2 sum_i log(1 + F_i / delta). Its maximum is the fixed point
    delta = gamma / |z - 1|^2 with gamma = sum_i F_i / (F_i + delta), the number of well-determined scales (MacKay
    1992). Each iteration takes the geometric mean of both sides, which at least halves the error in log delta.

    Raises:
        ValueError: all scales are 1, or the Fisher information is 0.
    """
    curvature = torch.cat([fisher[name].double() for name in vectors])
    distance = sum((z.detach().double() - 1).square().sum().item() for z in vectors.values())
    if not distance or not bool((curvature > 0).any()):
        raise ValueError("The posterior needs an expert vector that differs from the base and changes predictions.")
    delta = 1.0
    for _ in range(MOST_ITERATIONS):
        gamma = (curvature / (curvature + delta)).sum().item()
        delta, earlier = math.sqrt(delta * gamma / distance), delta
        if abs(math.log(delta / earlier)) < PRECISION_TOLERANCE:
            break
    return delta


def fit_isotropic(
    model: "MambaFormerForCausalLM",
    expert_vector: ExpertVector,
    batches: Sequence[Tensor],
    tolerance: float = 0.003,
    samples: int = 4,
    seed: int = 0,
) -> ExpertVector:
    """The expert vector with one deviation for all scales: the largest that the training loss tolerates.

    Source: Training-Free Bayesianization (arXiv 2412.05723), whose search for the largest variance is a bisection
    here. The same noise is scaled for each sigma. `metadata["isotropic"]` states sigma.

    Args:
        batches: token ids (rows, tokens) of the training data, without padding.
        tolerance: relative increase of the training loss; 0.003, as in the source, by default.
        samples: expert vectors whose loss is averaged.

    Raises:
        ValueError: no tokens, numbers that are not positive, or a vector that does not fit the model.
    """
    _check_number("samples", samples)
    if not tolerance > 0:
        raise ValueError(f"`tolerance` must be a positive number, got {tolerance!r}.")
    _check_fits(model, expert_vector)
    allowed = (1 + tolerance) * mean_loss(model, [expert_vector], batches)
    lowest, highest = 0.0, LARGEST_SIGMA
    for _ in range(BISECTIONS):
        sigma = (lowest + highest) / 2
        generator = torch.Generator().manual_seed(seed)
        drawn = _isotropic(expert_vector, sigma).sample(samples, generator)
        lowest, highest = (sigma, highest) if mean_loss(model, drawn, batches) <= allowed else (lowest, sigma)
    return _isotropic(expert_vector, lowest)


def _isotropic(expert_vector: ExpertVector, sigma: float) -> ExpertVector:
    deviations = {name: torch.full(z.shape, sigma, dtype=z.dtype) for name, z in expert_vector.vectors.items()}
    return _with_deviations(expert_vector, deviations, "isotropic", {"sigma": sigma})


@torch.no_grad()
def mean_loss(model: "MambaFormerForCausalLM", vectors: Sequence[ExpertVector], batches: Iterable[Tensor]) -> float:
    """The loss in nats a token of each expert vector, averaged over them."""
    total, predicted = 0.0, 0
    for ids in batches:
        for expert_vector in vectors:
            logits = model(ids, expert_vector=expert_vector, use_cache=False).logits[:, :-1].flatten(0, 1)
            logits = logits.to(at_least_float32(logits.dtype))
            total += nn.functional.cross_entropy(logits, ids[:, 1:].flatten(), reduction="sum").item()
        predicted += ids[:, 1:].numel() * len(vectors)
    if not predicted:
        raise ValueError("`batches` has no tokens to predict: pass token ids (rows, tokens) of the training data.")
    return total / predicted


def _with_deviations(
    expert_vector: ExpertVector, deviations: Mapping[str, Tensor], method: str, figures: dict[str, float]
) -> ExpertVector:
    vectors = {name: z.detach() for name, z in expert_vector.vectors.items()}
    dtyped = {name: sigma.to(at_least_float32(vectors[name].dtype)) for name, sigma in deviations.items()}
    return ExpertVector(vectors, expert_vector.name, {**expert_vector.metadata, method: figures}, dtyped)


def _check_fits(model: "MambaFormerForCausalLM", expert_vector: ExpertVector) -> None:
    if not expert_vector.vectors:
        raise ValueError("The expert vector is the base: there are no scales to be uncertain about.")
    model.check_expert_vector(expert_vector)


def _check_number(name: str, value: int | None) -> None:
    if value is not None and (isinstance(value, bool) or not isinstance(value, int) or value < 1):
        raise ValueError(f"`{name}` must be a whole number of at least 1, got {value!r}.")


__all__ = ["fisher_diagonal", "fit_isotropic", "fit_laplace", "mean_loss", "prior_precision"]
