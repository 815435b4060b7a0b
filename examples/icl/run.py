"""In-context learning of Transformer, Mamba and MambaFormer, as in arXiv 2402.04248, on two cores.

    python examples/icl/run.py                                        # all: about two hours
    python examples/icl/run.py --tasks sparse_parity --seeds 1        # some of it
    python examples/icl/run.py --steps 20 --output /tmp/try --run-dir /tmp/try    # whether it runs

Short runs choose a learning rate for each architecture on each task. Then every architecture is trained on every task
with every seed, several runs at a time with one thread each, and RESULTS.md and curves.png are written out of all
runs found. What was cut off goes on when it is started again: finished runs are kept, the others have a checkpoint
every half minute. Needs the extra `train`.
"""

import argparse
import multiprocessing
import os
import sys
from dataclasses import replace
from pathlib import Path

import torch
from tqdm.auto import tqdm

from learners import ARCHITECTURES
from runs import Run, Training, complete, pilots_of, with_best_rate
from table import write_report
from tasks import TASKS, Task

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parent.parent


def missing_pilots(tasks: list[Task], architectures: list[str], folder: Path) -> list[Run]:
    """Those that are known to be needed and not done; none are left when every learning rate is chosen."""
    pilots = [pilot for task in tasks for name in architectures for pilot in pilots_of(task, name, folder)]
    return [pilot for pilot in pilots if pilot.result(folder) is None]


def runs_of(tasks: list[Task], architectures: list[str], num_seeds: int, folder: Path) -> list[Run]:
    """With the rates that the pilots in `folder` chose; the runs of one seed stand before those of the next."""
    pairs = [(task, architecture) for task in tasks for architecture in architectures]
    best = [(with_best_rate(task, architecture, folder), architecture) for task, architecture in pairs]
    return [Run(task, architecture, seed) for seed in range(num_seeds) for task, architecture in best if task]


def work(place: int, runs: list[Run], next_run, folder: Path, checkpoint_seconds: float, lock) -> None:
    """A process: takes one run after the other until none is left."""
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    while True:
        with next_run.get_lock():
            idx, next_run.value = next_run.value, next_run.value + 1
        if idx >= len(runs):
            return
        complete_with_bar(runs[idx], folder, checkpoint_seconds, place)


def complete_with_bar(run: Run, folder: Path, checkpoint_seconds: float, place: int) -> None:
    """Shows how far it is and the last point of the curve; ends the process if the one that started it is gone."""
    starter = multiprocessing.parent_process()
    name = f"{run.task.name} {run.architecture} {run.seed}"
    with tqdm(total=run.task.steps, desc=f"{name:40s}", position=place, leave=False, mininterval=1.0) as bar:

        def report(training: Training) -> None:
            if not starter.is_alive():
                sys.exit(1)
            bar.set_postfix({run.task.metric: f"{training.curve[-1][1]:.3f}"}, refresh=False)
            bar.update(training.step - bar.n)

        complete(run, folder, checkpoint_seconds, report)


def run_all(runs: list[Run], folder: Path, num_workers: int, checkpoint_seconds: float) -> bool:
    """Completes all runs in so many processes; whether all of them succeeded."""
    runs = [run for run in runs if run.result(folder) is None]
    print(f"{len(runs)} runs to be done", flush=True)
    context = multiprocessing.get_context("spawn")
    next_run, lock = context.Value("i", 0), context.RLock()
    workers = [
        context.Process(target=work, args=(place, runs, next_run, folder, checkpoint_seconds, lock), daemon=True)
        for place in range(min(num_workers, len(runs)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return all(worker.exitcode == 0 for worker in workers)


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
    parser.add_argument("--output", type=Path, default=FOLDER, help="where RESULTS.md and curves.png go")
    args = parser.parse_args(argv)
    for name in ("seeds", "steps", "workers"):
        if getattr(args, name) is not None and getattr(args, name) < 1:
            parser.error(f"--{name} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    tasks = {name: replace(task, steps=args.steps or task.steps) for name, task in TASKS.items()}
    chosen = [tasks[name] for name in args.tasks]
    how = (args.run_dir, args.workers, args.checkpoint_seconds)
    succeeded = True
    while succeeded and (pilots := missing_pilots(chosen, args.architectures, args.run_dir)):
        succeeded = run_all(pilots, *how)
    succeeded &= run_all(runs_of(chosen, args.architectures, args.seeds, args.run_dir), *how)
    print(write_report(list(tasks.values()), args.run_dir, args.output))
    return 0 if succeeded else 1


if __name__ == "__main__":
    sys.exit(main())
