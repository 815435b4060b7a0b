"""The tasks: prompts that hold a problem of their own each, so that they can only be solved from what stands in them.

Recall of tokens is that of Zoology (arXiv 2312.04927); the others are those of MambaFormer (arXiv 2402.04248), all of
them smaller. Examples are fed one by one, x_1, y_1, x_2, y_2, ..., and y_i is asked for where x_i stands. A y that is
a number is fed as the first coordinate of a vector that is zero elsewhere.
"""

from dataclasses import dataclass, fields
from typing import ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ACCURACY, ERROR = "accuracy", "normalized squared error"


def generator_of(*stream: int) -> torch.Generator:
    """Random numbers that these integers alone decide, such as a seed and a step."""
    return torch.Generator().manual_seed(int(np.random.SeedSequence(stream).generate_state(1, np.uint64)[0] >> 1))


@dataclass(frozen=True)
class Prompts:
    """A batch.

    Args:
        inputs: vectors (rows, tokens, width), or ids (rows, tokens).
        targets: what is to be said at each token: vectors (rows, tokens, outputs), or ids (rows, tokens).
        asked: where an answer is trained and scored, bool (rows, tokens).
        counted: those of them that the figure of a table is the mean of, bool (rows, tokens).
    """

    inputs: Tensor
    targets: Tensor
    asked: Tensor
    counted: Tensor


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task and its training schedule, which are the same for every architecture.

    Args:
        rows, steps, learning_rate: of the training; `runs.with_best_rate` chooses the rate.
    """

    name: ClassVar[str]
    title: ClassVar[str]
    metric: ClassVar[str]
    baseline_name: ClassVar[str]
    vocab_size: ClassVar[int | None] = None

    rows: int = 32
    steps: int = 3000
    learning_rate: float = 3e-3

    def sample(self, rows: int, generator: torch.Generator, step: int | None = None) -> Prompts:
        """New prompts, for a step of the training if they get harder meanwhile; None is for the hardest."""
        raise NotImplementedError

    def stage(self, step: int) -> int | None:
        """The difficulty of the prompts at a step; None for tasks of constant difficulty."""
        return None

    def baseline(self, prompts: Prompts) -> Tensor:
        """The metric of the baseline `baseline_name` at each token (rows, tokens)."""
        raise NotImplementedError

    @property
    def width(self) -> int:
        """Numbers that an input has, and an answer, if not said otherwise."""
        return self.dimension

    @property
    def outputs(self) -> int:
        return 1

    @property
    def size(self) -> str:
        """All of it but the training, in words."""
        sizes = [item.name for item in fields(self) if item.name not in ("rows", "steps", "learning_rate")]
        return ", ".join(f"{name.replace('_', ' ')} {getattr(self, name)}" for name in sizes)

    def loss(self, answers: Tensor, prompts: Prompts) -> Tensor:
        """The mean squared error; `answers` are (rows, tokens, outputs)."""
        return F.mse_loss(answers[prompts.asked], prompts.targets[prompts.asked])

    def scores(self, answers: Tensor, prompts: Prompts) -> Tensor:
        """The metric at each token (rows, tokens)."""
        return (answers - prompts.targets).square().mean(dim=-1)


def interleaved(x: Tensor, y: Tensor, inputs_of_y: Tensor, is_asked: Tensor | None = None) -> Prompts:
    """Prompts x_1, y_1, ..., x_n from examples (rows, n, width), answers (rows, n) and how these are fed.

    The last quarter of the examples is counted, where much has been seen.
    """
    rows, num_examples, width = x.shape
    inputs = torch.stack([x, inputs_of_y], dim=2).reshape(rows, 2 * num_examples, width)[:, :-1]
    targets, asked = torch.zeros(rows, inputs.shape[1], 1), torch.zeros(rows, inputs.shape[1], dtype=torch.bool)
    targets[:, ::2, 0] = y
    asked[:, ::2] = True if is_asked is None else is_asked
    counted = asked.clone()
    counted[:, : 2 * (num_examples - num_examples // 4)] = False
    return Prompts(inputs, targets, asked, counted)


def as_vectors(y: Tensor, width: int) -> Tensor:
    """Numbers (rows, n) as vectors (rows, n, width) that are zero after their first coordinate."""
    return F.pad(y[..., None], (0, width - 1))


# ---------------------------------------------------------------------------------------------- functions of examples


@dataclass(frozen=True, kw_only=True)
class SparseParity(Task):
    """y is the product of k coordinates of x in {-1, 1}^d; which ones is the prompt's secret.

    In the first `stage_steps` of training they are among the first k + 1 coordinates, then among one more, and so on.
    x has all coordinates from the start: where the others are zero, as in the curriculum of arXiv 2208.01066 (appendix
    A), the same x come again in a prompt, and learners look up their y instead of finding a product.
    """

    name = "sparse_parity"
    title = "sparse parity"
    metric = ACCURACY
    baseline_name = "chance"

    dimension: int = 10
    num_secret: int = 2
    examples: int = 64
    stage_steps: int = 600
    rows: int = 16
    steps: int = 6000

    def sample(self, rows: int, generator: torch.Generator, step: int | None = None) -> Prompts:
        x = torch.randint(0, 2, (rows, self.examples, self.dimension), generator=generator).float() * 2 - 1
        num_candidates = self.dimension if step is None else self.stage(step)
        secret = torch.rand(rows, num_candidates, generator=generator).argsort(dim=1)[:, : self.num_secret]
        y = x.gather(2, secret[:, None].expand(-1, self.examples, -1)).prod(dim=2)
        return interleaved(x, y, as_vectors(y, self.dimension))

    def loss(self, answers: Tensor, prompts: Prompts) -> Tensor:
        """Cross-entropy; an answer is the logit of y = 1."""
        return F.binary_cross_entropy_with_logits(answers[prompts.asked], prompts.targets[prompts.asked].clamp(min=0))

    def scores(self, answers: Tensor, prompts: Prompts) -> Tensor:
        return ((answers > 0) == (prompts.targets > 0)).float().mean(dim=-1)

    def stage(self, step: int) -> int:
        """How many coordinates may be secret."""
        return min(self.num_secret + 1 + step // self.stage_steps, self.dimension)

    def baseline(self, prompts: Prompts) -> Tensor:
        return torch.full(prompts.asked.shape, 0.5)


@dataclass(frozen=True, kw_only=True)
class LinearRegression(Task):
    """y = w x / sqrt(d), so that its variance is 1; w in R^d is the prompt's secret."""

    name = "linear_regression"
    title = "linear regression"
    metric = ERROR
    baseline_name = "least squares"

    dimension: int = 5
    examples: int = 24

    def sample(self, rows: int, generator: torch.Generator, step: int | None = None) -> Prompts:
        x, y = self._examples(rows, generator)
        return interleaved(x, y, as_vectors(y, self.dimension))

    def _examples(self, rows: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        x = torch.randn(rows, self.examples, self.dimension, generator=generator)
        secret = torch.randn(rows, self.dimension, 1, generator=generator)
        return x, (x @ secret)[..., 0] / self.dimension**0.5

    def baseline(self, prompts: Prompts) -> Tensor:
        """The error of the least w that fits all examples before (those that are asked)."""
        examples = prompts.inputs[:, ::2].double()
        answers, usable = prompts.targets[:, ::2].double(), prompts.asked[:, ::2, None].double()
        scores = torch.zeros(prompts.asked.shape)
        for idx in range(examples.shape[1]):
            fitted = torch.linalg.pinv((examples * usable)[:, :idx]) @ (answers * usable)[:, :idx]
            error = examples[:, idx : idx + 1] @ fitted - answers[:, idx : idx + 1]
            scores[:, 2 * idx] = error[:, 0, 0].square().float()
        return scores


@dataclass(frozen=True, kw_only=True)
class ManyOutlierRegression(LinearRegression):
    """Linear regression, but most pairs are x = (1, ..., 1), y = (1, 0, ..., 0) instead, which tell nothing.

    Only the others are asked for.
    """

    name = "many_outlier_regression"
    title = "many-outlier regression"
    baseline_name = "least squares without outliers"

    examples: int = 64
    steps: int = 2000
    outlier_rate: float = 0.75

    def sample(self, rows: int, generator: torch.Generator, step: int | None = None) -> Prompts:
        x, y = self._examples(rows, generator)
        is_outlier = torch.rand(rows, self.examples, generator=generator) < self.outlier_rate
        x, y = x.masked_fill(is_outlier[..., None], 1.0), y.masked_fill(is_outlier, 1.0)
        return interleaved(x, y, as_vectors(y, self.dimension), ~is_outlier)


# ------------------------------------------------------------------------------------------------------------- recall


@dataclass(frozen=True, kw_only=True)
class Recall(Task):
    """Pairs k_1, v_1, k_2, v_2, ..., then all keys in another order; asked for is the value of each."""

    pairs: int = 16

    def _prompts(self, keys: Tensor, values: Tensor, generator: torch.Generator) -> Prompts:
        """From keys and values (rows, pairs, ...)."""
        rows, num_pairs = keys.shape[:2]
        order = torch.rand(rows, num_pairs, generator=generator).argsort(dim=1)
        order_of_rows = torch.arange(rows)[:, None], order
        pairs = torch.stack([keys, values], dim=2).flatten(1, 2)
        targets = torch.zeros(rows, 3 * num_pairs, *values.shape[2:], dtype=values.dtype)
        targets[:, 2 * num_pairs :] = values[order_of_rows]
        asked = (torch.arange(3 * num_pairs) >= 2 * num_pairs).expand(rows, -1)
        return Prompts(torch.cat([pairs, keys[order_of_rows]], dim=1), targets, asked, asked)


@dataclass(frozen=True, kw_only=True)
class VectorRecall(Recall):
    """Keys and values are points of the sphere of radius sqrt(d)."""

    name = "vector_recall"
    title = "multi-query recall of vectors"
    metric = ERROR
    baseline_name = "always zero"

    dimension: int = 16

    @property
    def outputs(self) -> int:
        return self.dimension

    def sample(self, rows: int, generator: torch.Generator, step: int | None = None) -> Prompts:
        points = torch.randn(2, rows, self.pairs, self.dimension, generator=generator)
        keys, values = F.normalize(points, dim=-1) * self.dimension**0.5
        return self._prompts(keys, values, generator)

    def baseline(self, prompts: Prompts) -> Tensor:
        return self.scores(torch.zeros_like(prompts.targets), prompts)


@dataclass(frozen=True, kw_only=True)
class TokenRecall(Recall):
    """Keys are different tokens of one half of the vocabulary, values any of the other half."""

    name = "token_recall"
    title = "multi-query recall of tokens"
    metric = ACCURACY
    baseline_name = "one of the values at random"
    vocab_size = 128

    @property
    def outputs(self) -> int:
        return self.vocab_size

    def sample(self, rows: int, generator: torch.Generator, step: int | None = None) -> Prompts:
        half = self.vocab_size // 2
        keys = torch.rand(rows, half, generator=generator).argsort(dim=1)[:, : self.pairs]
        values = torch.randint(half, self.vocab_size, (rows, self.pairs), generator=generator)
        return self._prompts(keys, values, generator)

    def loss(self, answers: Tensor, prompts: Prompts) -> Tensor:
        """Cross-entropy; `answers` are logits (rows, tokens, vocab_size)."""
        return F.cross_entropy(answers[prompts.asked], prompts.targets[prompts.asked])

    def scores(self, answers: Tensor, prompts: Prompts) -> Tensor:
        return (answers.argmax(dim=-1) == prompts.targets).float()

    def baseline(self, prompts: Prompts) -> Tensor:
        """How often another value of the prompt, or the right one, would be right by chance."""
        values = prompts.inputs[:, 1 : 2 * self.pairs : 2]
        return (values[:, None] == prompts.targets[..., None]).float().mean(dim=-1)


TASKS = {
    task.name: task
    for task in (SparseParity(), VectorRecall(), TokenRecall(), LinearRegression(), ManyOutlierRegression())
}
