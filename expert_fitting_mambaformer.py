"""An expert vector from a few examples: a blend of vectors that exist, then its leading scales.

Transformer-squared (arXiv 2501.06252, section 3.2) searches the weights of a blend by the cross-entropy method; here
they follow the gradient of the likelihood, and the scales follow after them, with a Gaussian prior around the blend.
"""

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .expert_bases_mambaformer import at_least_float32
from .expert_examples_mambaformer import Example, ExampleLike, Tokenizer, log_likelihoods, num_counted, read_examples
from .expert_vectors_mambaformer import ExpertVector, ExpertVectorLike, resolve_expert_vector
from .weights_quantized_modules_mambaformer import shape_of

if TYPE_CHECKING:
    from .modeling_mambaformer import MambaFormerForCausalLM

BLEND, SCALES = "blend", "scales"
FEWEST_TO_HOLD_BACK = 4  # of fewer examples none is held back


@dataclass(frozen=True)
class FitProgress:
    """Where a fit stands, after each step.

    Args:
        stage: "blend" or "scales".
        step, num_steps: of this stage.
        loss: of the examples of this step, before it, in nats per token.
        held_back_loss: the loss of the examples that are held back, at the end of an epoch; else `None`.
    """

    stage: str
    step: int
    num_steps: int
    loss: float
    held_back_loss: float | None = None


@dataclass(frozen=True)
class _Options:
    rank: int | None
    blend_epochs: int
    epochs: int
    blend_learning_rate: float
    learning_rate: float
    prior_scale: float
    held_back: float
    examples_per_step: int
    batch_size: int
    seed: int

    def check(self) -> None:
        for name, least in (("rank", 1), ("blend_epochs", 0), ("epochs", 0), ("examples_per_step", 1),
                            ("batch_size", 1), ("seed", 0)):  # fmt: skip
            value = getattr(self, name)
            if name == "rank" and value is None:
                continue
            if not isinstance(value, int) or isinstance(value, bool) or value < least:
                raise ValueError(f"`{name}` must be a whole number of at least {least}, got {value!r}.")
        for name in ("blend_learning_rate", "learning_rate", "prior_scale"):
            if not 0 < getattr(self, name) < math.inf:
                raise ValueError(f"`{name}` must be a positive number, got {getattr(self, name)!r}.")
        if not 0 <= self.held_back < 1:
            raise ValueError(f"`held_back` must be a share of the examples below 1, got {self.held_back!r}.")


def fit_expert_vector(
    model: "MambaFormerForCausalLM",
    examples: Sequence[ExampleLike],
    candidates: Sequence[ExpertVectorLike] | None = None,
    *,
    tokenizer: Tokenizer | None = None,
    name: str | None = None,
    rank: int | None = 64,
    blend_epochs: int = 1,
    epochs: int = 4,
    blend_learning_rate: float = 0.1,
    learning_rate: float = 0.02,
    prior_scale: float = 0.05,
    held_back: float = 0.0,
    examples_per_step: int = 8,
    batch_size: int = 8,
    seed: int = 0,
    progress: Callable[[FitProgress], object] | None = None,
) -> ExpertVector:
    """Fits an expert vector to a few examples, by their likelihood; the model stays as it is.

    First the weights w_k of a blend z = 1 + sum_k w_k (z_k - 1) of the candidates follow the gradient, from the best
    candidate on. Then the leading scales of each weight follow it, with the prior z ~ N(blend, `prior_scale`^2): a
    maximum a posteriori estimate. The result never has a lower likelihood on the examples than the best candidate or
    the base. Source: few-shot adaptation of Transformer-squared (arXiv 2501.06252, section 3.2), by gradient.

    Args:
        examples: strings (with `tokenizer`), token ids (tokens,), or pairs (prompt, answer) of these, whose answer
            alone counts.
        candidates: expert vectors as `expert_vector=` takes them; default: all of `model.expert_vectors`. The base is
            always among them.
        rank: leading scales of each weight that are fitted, `None` for all.
        blend_epochs, epochs: passes over the examples for the weights and for the scales.
        blend_learning_rate, learning_rate: of Adam, at the start; they fall to 0 linearly.
        prior_scale: standard deviation of a scale around the blend.
        held_back: share of the examples that is never trained on. Then the scales are those of the epoch with the
            highest likelihood of these examples, and fitting ends with the first epoch that lowers it.
        examples_per_step, batch_size: examples of a step, and of a forward within it, which limits memory alone.
        seed: of the order of the examples.
        progress: called after each step.

    Returns:
        The expert vector; its `metadata["fit"]` has the weights of the blend and the losses in nats per token.

    Raises:
        TypeError, ValueError: examples, candidates or options that cannot be used; the message says why.
    """
    options = _Options(rank, blend_epochs, epochs, blend_learning_rate, learning_rate, prior_scale, held_back,
                       examples_per_step, batch_size, seed)  # fmt: skip
    options.check()
    read = read_examples(examples, tokenizer, model.config.vocab_size)
    named = _candidates(model, candidates)
    with _in_eval_mode(model), torch.inference_mode(False):
        return _Fit(model, read, named, options, progress).run(name)


def _candidates(
    model: "MambaFormerForCausalLM", candidates: Sequence[ExpertVectorLike] | None
) -> list[tuple[str, ExpertVector]]:
    """The candidates with a label each, without the base."""
    library = model.expert_vectors
    values = list(library) if candidates is None else list(candidates)
    resolved = [resolve_expert_vector(each, library) for each in values]
    named = []
    for number, each in enumerate(resolved):
        if isinstance(each, list):
            raise TypeError(f"Candidate {number} is a list: give one expert vector each.")
        if each is not None:
            model.check_expert_vector(each)
            if each.requires_grad:
                raise ValueError(f"Candidate {number} requires gradients: pass a copy with detached scales.")
            named.append((each.name or str(number), each))
    return named


@contextmanager
def _in_eval_mode(model: nn.Module) -> Iterator[None]:
    """Context without dropout, after which each module is in the mode that it had."""
    training = [module for module in model.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


class _Scales:
    """The scales z = 1 + sum_k w_k (z_k - 1) + change, by module.

    Attributes:
        weights: w, (candidates,).
        changes: module -> (rank,), what the second stage adds.
    """

    def __init__(self, model: "MambaFormerForCausalLM", candidates: Sequence[ExpertVector], ranks: Mapping[str, int]):
        dtype, device = at_least_float32(model.dtype), model.device
        self.weights = torch.zeros(len(candidates), dtype=dtype, device=device)
        self.changes = {name: torch.zeros(rank, dtype=dtype, device=device) for name, rank in ranks.items()}
        names = dict.fromkeys([*ranks, *(name for each in candidates for name in each.vectors)])
        self._differences: dict[str, Tensor] = {}
        for name in names:
            rows = [each.vectors[name].to(device, dtype) - 1 if name in each else None for each in candidates]
            rank = max([ranks.get(name, 0), *(len(row) for row in rows if row is not None)])
            table = torch.zeros(len(candidates), rank, dtype=dtype, device=device)
            for index, row in enumerate(rows):
                if row is not None:
                    table[index, : len(row)] = row
            self._differences[name] = table

    def vectors(self) -> dict[str, Tensor]:
        vectors = {}
        for name, differences in self._differences.items():
            z = 1 + self.weights @ differences
            change = self.changes.get(name)
            if change is not None:
                z = z + nn.functional.pad(change, (0, len(z) - len(change)))
            vectors[name] = z
        return vectors

    def expert_vector(self) -> ExpertVector:
        return ExpertVector({name: z.detach() for name, z in self.vectors().items()})


class _Fit:
    """One run of `fit_expert_vector`."""

    def __init__(
        self,
        model: "MambaFormerForCausalLM",
        examples: list[Example],
        candidates: list[tuple[str, ExpertVector]],
        options: _Options,
        progress: Callable[[FitProgress], object] | None,
    ):
        self.model, self.examples, self.options, self.progress = model, examples, options, progress
        self.labels, self.candidates = [name for name, _ in candidates], [each for _, each in candidates]
        self._order = torch.Generator("cpu").manual_seed(options.seed)
        self._training, self._held_back = self._split()
        self._scales = _Scales(model, self.candidates, _ranks(model, options))

    def _split(self) -> tuple[list[Example], list[Example]]:
        count = len(self.examples)
        num_back = round(self.options.held_back * count) if count >= FEWEST_TO_HOLD_BACK else 0
        order = torch.randperm(count, generator=self._order, device="cpu").tolist()
        chosen = [self.examples[index] for index in order]
        return chosen[num_back:], chosen[:num_back]

    def run(self, name: str | None) -> ExpertVector:
        """Starts from the best candidate, fits both stages, and returns the best vector on the examples."""
        losses = [self._loss(self.examples, each) for each in (None, *self.candidates)]
        if not all(map(math.isfinite, losses)):
            raise ValueError(
                f"The likelihood of the examples is not finite under the base or a candidate: losses are {losses}. "
                "Load the model in float32, or leave that candidate out."
            )
        best = min(range(len(losses)), key=losses.__getitem__)
        if best:
            self._scales.weights[best - 1] = 1.0
        if self.candidates:
            self._climb(BLEND, [self._scales.weights], self.options.blend_epochs, self.options.blend_learning_rate)
        changes = list(self._scales.changes.values())
        self._climb(SCALES, changes, self.options.epochs, self.options.learning_rate)
        fitted = self._scales.expert_vector()
        loss = self._loss(self.examples, fitted)
        weights = dict(zip(self.labels, self._scales.weights.tolist(), strict=True))
        if not loss <= losses[best]:
            fitted, loss = ExpertVector({}) if best == 0 else self.candidates[best - 1], losses[best]
            weights = {label: float(index == best - 1) for index, label in enumerate(self.labels)}
        fit = {
            "examples": len(self.examples),
            "tokens": num_counted(self.examples),
            "loss_of_base": losses[0],
            "losses_of_candidates": dict(zip(self.labels, losses[1:], strict=True)),
            "loss": loss,
            "weights": weights,
            "seed": self.options.seed,
        }
        spectrum = self.model.spectrum(list(fitted.vectors))
        return ExpertVector(fitted.vectors, name, {"fit": fit, "spectrum": spectrum})

    def _loss(self, examples: Sequence[Example], expert_vector: ExpertVector | None) -> float:
        """In nats per token."""
        with torch.no_grad():
            totals = [log_likelihoods(self.model, part, expert_vector).sum() for part in self._batches(examples)]
        return -float(sum(totals)) / num_counted(examples)

    def _batches(self, examples: Sequence[Example]) -> Iterator[Sequence[Example]]:
        size = self.options.batch_size
        return (examples[start : start + size] for start in range(0, len(examples), size))

    def _climb(self, stage: str, parameters: list[Tensor], epochs: int, learning_rate: float) -> None:
        """Adam on `parameters`, which keep the values of the best epoch on the examples that are held back."""
        if not epochs:
            return
        per_step, best = self.options.examples_per_step, self._held_back_loss()
        num_steps = epochs * math.ceil(len(self._training) / per_step)
        optimizer = torch.optim.Adam(parameters, lr=learning_rate, betas=(0.9, 0.99))
        step = 0
        for _ in range(epochs):
            order = torch.randperm(len(self._training), generator=self._order, device="cpu").tolist()
            before = [parameter.clone() for parameter in parameters]
            for start in range(0, len(order), per_step):
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate * (1 - step / num_steps)
                loss = self._step(parameters, optimizer, [self._training[i] for i in order[start : start + per_step]])
                step += 1
                is_last = start + per_step >= len(order)
                held_back_loss = self._held_back_loss() if is_last else None
                if self.progress is not None:
                    self.progress(FitProgress(stage, step, num_steps, loss, held_back_loss))
                if held_back_loss is not None and best is not None:
                    if held_back_loss >= best:
                        _write(parameters, before)
                        return
                    best = held_back_loss

    def _held_back_loss(self) -> float | None:
        return self._loss(self._held_back, self._scales.expert_vector()) if self._held_back else None

    def _step(self, parameters: list[Tensor], optimizer: torch.optim.Optimizer, examples: list[Example]) -> float:
        """One step on -log p(examples) per token, plus the prior's share of it; returns the first."""
        tokens, total = num_counted(examples), 0.0
        gradients = [torch.zeros_like(parameter) for parameter in parameters]
        for part in self._batches(examples):
            with _trained(parameters), torch.enable_grad():
                loss = -log_likelihoods(self.model, part, self._scales.vectors()).sum() / tokens
                # Only the gradients of these parameters are computed, and none is written to the model's weights. A
                # module that no token reaches, such as an idle one of a mixture of experts, has gradients of 0.
                found = torch.autograd.grad(loss, parameters, materialize_grads=True)
            gradients = [old + new for old, new in zip(gradients, found, strict=True)]
            total += loss.item()
        if not math.isfinite(total):
            raise ValueError(
                "The likelihood of the examples is not finite under the scales so far: lower `learning_rate` and "
                "`blend_learning_rate`, or load the model in float32."
            )
        if parameters[0] is not self._scales.weights:
            precision = 1 / (self.options.prior_scale**2 * num_counted(self._training))
            gradients = [g + precision * p for g, p in zip(gradients, parameters, strict=True)]
        for parameter, gradient in zip(parameters, gradients, strict=True):
            parameter.grad = gradient
        optimizer.step()
        return total


@contextmanager
def _trained(parameters: list[Tensor]) -> Iterator[None]:
    """Context in which these leaves require gradients."""
    for parameter in parameters:
        parameter.requires_grad_(True)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(False)


def _write(parameters: list[Tensor], values: list[Tensor]) -> None:
    for parameter, value in zip(parameters, values, strict=True):
        parameter.copy_(value)


def _ranks(model: "MambaFormerForCausalLM", options: _Options) -> dict[str, int]:
    """The number of scales to fit for each linear module; none for the head, which is large and often tied."""
    if options.epochs == 0:
        return {}
    sizes = {name: min(shape_of(each)) for name, each in model.linear_modules().items() if name != "lm_head"}
    return {name: size if options.rank is None else min(options.rank, size) for name, size in sizes.items()}


__all__ = ["FitProgress", "fit_expert_vector"]
