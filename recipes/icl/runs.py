"""One run: a task, an architecture, a seed. An interrupted run resumes from its last checkpoint to the same bits.

Nothing is random but the first weights, which the seed decides, and the prompts, which the seed and the step decide.
"""

import io
import json
import math
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mambaformer import MambaFormerConfig
from mambaformer.files_mambaformer import write_atomically
from recipes.icl.learners import InContextLearner, options_of
from recipes.icl.tasks import ACCURACY, Prompts, Task, generator_of
from recipes.sweeps import best_rate, losses_by_rate

# Of every run; the warm-up is a share of all steps.
RECIPE = {"optimizer": "Adam", "warmup": 0.05, "largest_gradient": 1.0, "curve_points": 25}
# Learning rates that may be tried for each task and architecture, with a seed of their own and a part of the steps:
# these two first, and on beyond the better one until it is no longer the best.
RATES, FIRST_RATES, PILOT_SEED, PILOT_PART = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2), (1e-3, 3e-3), 1000, 4
# Prompts that no run is trained on, the same for all runs of a task; the first batch makes the learning curve.
HELD_OUT, HELD_OUT_BATCHES, HELD_OUT_ROWS = 1 << 40, 8, 128


@dataclass(frozen=True)
class Run:
    task: Task
    architecture: str
    seed: int

    def settings(self) -> dict[str, Any]:
        """Everything that a result depends on; files with other settings are ignored."""
        return {
            "task": {"name": self.task.name, **asdict(self.task)},
            "architecture": options_of(self.architecture, self.task),
            "seed": self.seed,
            "recipe": RECIPE,
        }

    def learner(self) -> InContextLearner:
        """The learner before the first step."""
        torch.manual_seed(self.seed)
        return InContextLearner(MambaFormerConfig(**options_of(self.architecture, self.task)), self.task)

    def file(self, folder: Path, ending: str) -> Path:
        training = f"steps{self.task.steps}-rate{self.task.learning_rate:g}-seed{self.seed}"
        return folder / f"{self.task.name}-{self.architecture}-{training}.{ending}"

    def result(self, folder: Path) -> dict[str, Any] | None:
        """The stored result of this run with these settings, if there is one."""
        path = self.file(folder, "json")
        result = json.loads(path.read_text()) if path.exists() else None
        return result if result is not None and result["settings"] == self.settings() else None


def pilots_of(task: Task, architecture: str, folder: Path) -> dict[float, Run]:
    """{learning rate: the short run that tries it}: the whole schedule in a quarter of the steps, the first stages.

    As far as it is known from the results in `folder` which of them are needed; those are all if each has a result.
    """
    return {rate: _pilot(task, architecture, rate) for rate in sorted(_pilot_losses(task, architecture, folder))}


def _pilot(task: Task, architecture: str, rate: float) -> Run:
    steps = max(1, task.steps // PILOT_PART)
    return Run(replace(task, steps=steps, learning_rate=rate), architecture, PILOT_SEED)


def _pilot_losses(task: Task, architecture: str, folder: Path) -> dict[float, float | None]:
    def loss(rate: float) -> float | None:
        result = _pilot(task, architecture, rate).result(folder)
        if result is None:
            return None
        return -pilot_score(result) if task.metric == ACCURACY else pilot_score(result)

    return losses_by_rate(RATES, FIRST_RATES, loss)


def pilot_score(result: dict[str, Any]) -> float:
    """The metric at the last stage that a run reached."""
    return result["stages"][-1][1]


def with_best_rate(task: Task, architecture: str, folder: Path) -> Task | None:
    """The task with the learning rate of the best pilot; None until all that are needed have ended."""
    losses = _pilot_losses(task, architecture, folder)
    return None if None in losses.values() else replace(task, learning_rate=best_rate(losses))


class Training:
    """A learner, its optimizer and its learning curve, at some step."""

    def __init__(self, run: Run):
        self.run, self.task = run, run.task
        self.learner = run.learner()
        self.optimizer = torch.optim.Adam(self.learner.parameters())
        self.step, self.seconds = 0, 0.0
        self.curve: list[tuple[int, float]] = []
        self.stages: list[tuple[int | None, float]] = []

    def advance(self) -> None:
        """One step. The curve gets its point before it if one is due, `stages` theirs behind the last step of each."""
        started = time.perf_counter()
        if self.step % math.ceil(self.task.steps / RECIPE["curve_points"]) == 0:
            self.curve.append((self.step, self.score(num_batches=1, step=self.step)[0]))
        prompts = self.task.sample(self.task.rows, generator_of(self.run.seed, self.step), self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.task.learning_rate * schedule(self.step, self.task.steps)
        loss = self.task.loss(self.learner(prompts.inputs), prompts)
        self.optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.learner.parameters(), RECIPE["largest_gradient"])
        self.optimizer.step()
        stage = self.task.stage(self.step)
        if self.step + 1 == self.task.steps or self.task.stage(self.step + 1) != stage:
            self.stages.append((stage, self.score(step=self.step)[0]))
        self.step += 1
        self.seconds += time.perf_counter() - started

    def score(self, num_batches: int = HELD_OUT_BATCHES, step: int | None = None) -> tuple[float, list[float]]:
        """The metric on held-out prompts (as hard as at `step`): the mean over counted tokens, and by position."""
        return score_of(self._scores, self.task, num_batches, step)

    @torch.no_grad()
    def _scores(self, prompts: Prompts) -> Tensor:
        return self.task.scores(self.learner(prompts.inputs), prompts)

    def save(self, path: Path) -> None:
        state = {
            "settings": self.run.settings(),
            "learner": self.learner.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "step": self.step,
            "seconds": self.seconds,
            "curve": self.curve,
            "stages": self.stages,
        }
        content = io.BytesIO()
        torch.save(state, content)
        write_atomically(path, content.getvalue())

    def resume(self, path: Path) -> None:
        """Loads a file that `save` wrote; does nothing if there is none, or if it has other settings."""
        state = torch.load(path, weights_only=True) if path.exists() else None
        if state is None or state["settings"] != self.run.settings():
            return
        self.learner.load_state_dict(state["learner"])
        self.optimizer.load_state_dict(state["optimizer"])
        for name in ("step", "seconds", "curve", "stages"):
            setattr(self, name, state[name])


def schedule(step: int, num_steps: int) -> float:
    """The share of the learning rate at a step: a linear warm-up, then half a cosine down to zero."""
    warmup = max(1, round(RECIPE["warmup"] * num_steps))
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, num_steps - warmup)))


def score_of(
    scores: Callable[[Prompts], Tensor], task: Task, num_batches: int = HELD_OUT_BATCHES, step: int | None = None
) -> tuple[float, list[float]]:
    """The mean of per-token scores over held-out prompts: over what is counted, and at each place that is asked."""
    batches = [task.sample(HELD_OUT_ROWS, generator_of(HELD_OUT, idx), step) for idx in range(num_batches)]
    found = torch.cat([scores(prompts) for prompts in batches]).double()
    asked, counted = (torch.cat([getattr(prompts, name) for prompts in batches]) for name in ("asked", "counted"))
    by_place = torch.where(asked, found, 0.0).sum(dim=0) / asked.sum(dim=0)
    return found[counted].mean().item(), by_place[asked.any(dim=0)].tolist()


def complete(
    run: Run,
    folder: Path,
    checkpoint_seconds: float = 30.0,
    report: Callable[[Training], None] = lambda training: None,
) -> dict[str, Any]:
    """Trains the remaining steps of a run, writes its result to `folder`, returns it; calls `report` at each step."""
    found = run.result(folder)
    if found is not None:
        return found
    folder.mkdir(parents=True, exist_ok=True)
    checkpoint = run.file(folder, "pt")
    training = Training(run)
    training.resume(checkpoint)
    saved = time.monotonic()
    while training.step < run.task.steps:
        training.advance()
        report(training)
        if time.monotonic() - saved > checkpoint_seconds:
            training.save(checkpoint)
            saved = time.monotonic()
    score, by_place = training.score()
    result = {
        "settings": run.settings(),
        "parameters": training.learner.num_parameters(),
        "score": score,
        "by_place": by_place,
        "stages": training.stages,
        "curve": [*training.curve, (training.step, training.score(num_batches=1, step=training.step - 1)[0])],
        "seconds": round(training.seconds, 1),
    }
    write_atomically(run.file(folder, "json"), (json.dumps(result, indent=1) + "\n").encode())
    checkpoint.unlink(missing_ok=True)
    return result
