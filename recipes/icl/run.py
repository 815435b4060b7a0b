"""In-context learning of Transformer, Mamba and MambaFormer, as in arXiv 2402.04248, on two cores.

    python -m recipes.icl.run                                        # all: about two hours
    python -m recipes.icl.run --tasks sparse_parity --seeds 1        # some of it
    python -m recipes.icl.run --steps 20 --run-dir /tmp/try          # whether it runs

Short runs choose a learning rate for each architecture on each task. Then every architecture is trained on every task
with every seed, several runs at a time with one thread each, and RESULTS.md and curves.png are written out of all
runs found. A command that was interrupted resumes when it is started again: finished runs are kept, the others have a
checkpoint every half minute. Needs the extra `train`.
"""

import argparse
import os
import sys
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path

from recipes.icl.learners import ARCHITECTURES
from recipes.icl.runs import Run, complete, pilots_of, with_best_rate
from recipes.icl.table import write_report
from recipes.icl.tasks import TASKS, Task
from recipes.sweeps import Progress, run_all

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent


def missing_pilots(tasks: list[Task], architectures: list[str], folder: Path) -> list[Run]:
    """Pilots that are needed and have no result yet; empty when every learning rate is chosen."""
    pilots = [pilot for task in tasks for name in architectures for pilot in pilots_of(task, name, folder).values()]
    return [pilot for pilot in pilots if pilot.result(folder) is None]


def runs_of(tasks: list[Task], architectures: list[str], num_seeds: int, folder: Path) -> list[Run]:
    """Runs with the rates that the pilots in `folder` chose, ordered by seed."""
    pairs = [(task, architecture) for task in tasks for architecture in architectures]
    best = [(with_best_rate(task, architecture, folder), architecture) for task, architecture in pairs]
    return [Run(task, architecture, seed) for seed in range(num_seeds) for task, architecture in best if task]


def worker(folder: Path, checkpoint_seconds: float) -> Callable[[Run, Progress], None]:
    """The function of a worker process: completes a run, and shows its progress and the last point of its curve."""

    def do(run: Run, progress: Progress) -> None:
        metric = run.task.metric
        progress.begin(f"{run.task.name} {run.architecture} {run.seed}", run.task.steps)
        complete(
            run,
            folder,
            checkpoint_seconds,
            lambda training: progress.at(training.step, f"{metric}={training.curve[-1][1]:.3f}"),
        )

    return do


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--tasks", nargs="+", choices=TASKS, default=list(TASKS), metavar="TASK", help=", ".join(TASKS)
    )
    parser.add_argument("--architectures", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--seeds", type=int, default=3, help="how many, from 0 on")
    parser.add_argument("--steps", type=int, help="so many for every task, instead of its own")
    parser.add_argument("--workers", type=int, default=os.cpu_count(), help="runs at a time, with one thread each")
    parser.add_argument("--checkpoint-seconds", type=float, default=30.0, help="what a cut may cost")
    parser.add_argument("--run-dir", type=Path, default=ROOT / "runs/icl", help="where results and checkpoints go")
    parser.add_argument(
        "--output", type=Path, help="where RESULTS.md and curves.png go; default: here, with --steps the run-dir"
    )
    args = parser.parse_args(argv)
    for name in ("seeds", "steps", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    args.output = args.output or (FOLDER if args.steps is None else args.run_dir)
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    tasks = {name: replace(task, steps=args.steps or task.steps) for name, task in TASKS.items()}
    chosen = [tasks[name] for name in args.tasks]
    start = partial(worker, args.run_dir, args.checkpoint_seconds)
    succeeded = True
    while succeeded and (pilots := missing_pilots(chosen, args.architectures, args.run_dir)):
        print(f"learning rates: {len(pilots)} short runs to be done", flush=True)
        succeeded = run_all(pilots, start, args.workers)
    runs = runs_of(chosen, args.architectures, args.seeds, args.run_dir)
    missing = [run for run in runs if run.result(args.run_dir) is None]
    print(f"{len(runs)} runs, {len(missing)} of them to be done", flush=True)
    succeeded &= run_all(missing, start, args.workers)
    print(write_report(list(tasks.values()), args.run_dir, args.output))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
