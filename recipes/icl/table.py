"""Writes the results of all runs: RESULTS.md and the learning curves."""

import statistics
from pathlib import Path
from typing import Any

from recipes.icl.learners import ARCHITECTURES, DEPTH, HIDDEN_SIZE, TITLES
from recipes.icl.runs import (
    HELD_OUT_BATCHES,
    HELD_OUT_ROWS,
    PILOT_PART,
    PILOT_SEED,
    RATES,
    Run,
    pilot_score,
    pilots_of,
    score_of,
    with_best_rate,
)
from recipes.icl.tasks import ACCURACY, Task

INTRODUCTION = f"""# In-context learning: Transformer, Mamba and MambaFormer

Made by `make icl`; the tasks of [MambaFormer](https://arxiv.org/abs/2402.04248) at a size for two cores, and recall of
tokens as in [Zoology](https://arxiv.org/abs/2312.04927). All three are built from `MambaFormerConfig`, with {DEPTH}
layers of two blocks (MambaFormer has a Mamba block before them instead of a position encoding), hidden size
{HIDDEN_SIZE} and the same training: see [tasks.py](tasks.py), [learners.py](learners.py), [runs.py](runs.py). Prompts
are new at every step.

Figures are means over {HELD_OUT_BATCHES * HELD_OUT_ROWS:,} held-out prompts, the same for all runs; where prompts are
of examples, their last quarter counts. First the mean over the seeds, then each seed. Accuracy: higher is better.
Squared error: lower is better, and 1 is what answering 0 would give. Minutes are of one core."""
RATES_TEXT = f"""## How the learning rates were chosen

For each architecture on each task in the same way: runs of 1/{PILOT_PART} of the steps with seed {PILOT_SEED}, two at
first, and on until the best rate has a worse one on either side. In the table: where they came to on the same held-out
prompts, for parity at the last of their stages. Bold: what was taken. Where all are alike, nothing was learned in so
few steps, and the choice is one of noise."""
CAPTION = (
    "above: the metric while training, on held-out prompts of the stage; below: at the end, by what stands before"
)


def results_of(task: Task, architecture: str, folder: Path) -> dict[int, dict[str, Any]]:
    """{seed: result} of the runs with just these settings, and the best learning rate."""
    best = with_best_rate(task, architecture, folder)
    if best is None:
        return {}
    paths = folder.glob(f"{task.name}-{architecture}-*.json")
    seeds = sorted({int(path.stem.rsplit("-seed", 1)[1]) for path in paths})
    runs = [Run(best, architecture, seed) for seed in seeds]
    found = {run.seed: run.result(folder) for run in runs}
    return {seed: result for seed, result in found.items() if result is not None}


def write_report(tasks: list[Task], folder: Path, output: Path) -> str:
    """Writes RESULTS.md and, if there is anything to draw, curves.png to `output`; returns the table."""
    found = {task: {name: results_of(task, name, folder) for name in ARCHITECTURES} for task in tasks}
    table = "\n".join(_table(found))
    output.mkdir(parents=True, exist_ok=True)
    stages = ["\n".join(_stages(task, of_task)) for task, of_task in found.items() if task.stage(0) is not None]
    parts = [INTRODUCTION, table, *stages, "\n".join(_settings(found))]
    if any(result for of_task in found.values() for result in of_task.values()):
        plot(found, output / "curves.png")
        parts.append(f"![{CAPTION}](curves.png)")
    parts += [RATES_TEXT, "\n".join(_rates(tasks, folder))]
    (output / "RESULTS.md").write_text("\n\n".join(parts) + "\n")
    return table


def _table(found: dict[Task, dict[str, dict[int, dict]]]) -> list[str]:
    heads = ["task", "metric", *(TITLES[name] for name in ARCHITECTURES), "baseline"]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for task, of_task in found.items():
        baseline, _ = score_of(task.baseline, task)
        cells = [_figures([result["score"] for result in of_task[name].values()]) for name in ARCHITECTURES]
        lines.append(_row([task.title, task.metric, *cells, f"{baseline:.4f} ({task.baseline_name})"]))
    return lines


def _stages(task: Task, of_task: dict[str, dict[int, dict]]) -> list[str]:
    """A line for each architecture: the mean over the seeds at the end of each stage that the training has."""
    names = list(dict.fromkeys(task.stage(step) for step in range(task.steps)))
    lines = [_row([f"{task.title}: {task.metric} by stage", *map(str, names)]), "|" + "---|" * (len(names) + 1)]
    for name, results in of_task.items():
        scores = zip(*(dict(result["stages"]).values() for result in results.values()), strict=True)
        cells = [f"{statistics.mean(at_stage):.4f}" for at_stage in scores] or ["not run"]
        lines.append(_row([TITLES[name], *cells]))
    return lines


def _figures(scores: list[float]) -> str:
    if not scores:
        return "not run"
    return f"{statistics.mean(scores):.4f} ({', '.join(f'{score:.4f}' for score in scores)})"


def _settings(found: dict[Task, dict[str, dict[int, dict]]]) -> list[str]:
    heads = ["task", "prompts a step", "steps", "of"]
    heads += [f"{TITLES[name]}: parameters, learning rate, minutes a run" for name in ARCHITECTURES]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for task, of_task in found.items():
        about = [task.title, str(task.rows), f"{task.steps:,}", task.size]
        lines.append(_row([*about, *(_cost(list(of_task[name].values())) for name in ARCHITECTURES)]))
    return lines


def _cost(results: list[dict]) -> str:
    if not results:
        return ""
    minutes = statistics.mean(result["seconds"] for result in results) / 60
    return f"{results[0]['parameters']:,}, {results[0]['settings']['task']['learning_rate']:g}, {minutes:.1f}"


def _rates(tasks: list[Task], folder: Path) -> list[str]:
    """A line for each finished search: the score of each rate."""
    lines = [_row(["task", "architecture", *(f"{rate:g}" for rate in RATES)]), "|" + "---|" * (len(RATES) + 2)]
    for task in tasks:
        for name in ARCHITECTURES:
            best = with_best_rate(task, name, folder)
            if best is None:
                continue
            pilots = pilots_of(task, name, folder)
            scores = {rate: f"{pilot_score(pilot.result(folder)):.4f}" for rate, pilot in pilots.items()}
            scores[best.learning_rate] = f"**{scores[best.learning_rate]}**"
            lines.append(_row([task.title, TITLES[name], *(scores.get(rate, "") for rate in RATES)]))
    return lines


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def plot(found: dict[Task, dict[str, dict[int, dict]]], path: Path) -> None:
    """A column for each task with runs: the metric while training, then at the end by place; a line for each seed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    found = {task: of_task for task, of_task in found.items() if any(of_task.values())}
    figure, axes = pyplot.subplots(2, len(found), figsize=(3.6 * len(found), 6), squeeze=False)
    for (task, of_task), (curve, place) in zip(found.items(), axes.T, strict=True):
        for idx, (name, results) in enumerate(of_task.items()):
            for number, result in enumerate(results.values()):
                style = {"color": f"C{idx}", "alpha": 0.8, "label": TITLES[name] if number == 0 else None}
                curve.plot(*zip(*result["curve"], strict=True), **style)
                place.plot(result["by_place"], **style)
        _, baseline = score_of(task.baseline, task)
        place.plot(baseline, color="black", linestyle=":", label=task.baseline_name)
        curve.set(title=task.title, xlabel="steps", ylabel=task.metric)
        place.set(xlabel="examples or questions before", ylabel=task.metric)
        for axis in (curve, place):
            axis.set_ylim(*((0, 1.02) if task.metric == ACCURACY else (0, 1.3)))
        place.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


__all__ = ["results_of", "write_report"]
