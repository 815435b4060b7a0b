"""Worker processes that take the runs of a sweep one by one, and the search for a learning rate."""

import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from tqdm.auto import tqdm

Job = TypeVar("Job")


class Progress:
    """The progress bar of one worker; it ends the process when the parent process is gone."""

    def __init__(self, place: int):
        self._starter = multiprocessing.parent_process()
        self._bar = tqdm(position=place, leave=False, mininterval=1.0)

    def begin(self, name: str, steps: int | None = None) -> None:
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description_str(f"{name:40s}", refresh=False)
        self._bar.reset(steps)

    def at(self, step: int, figures: str = "") -> None:
        """Reports the number of finished steps, with `figures` as the text after the bar."""
        if not self._starter.is_alive():
            sys.exit(1)
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


# A worker calls it once, and calls the returned function for each job.
Start = Callable[[], Callable[[Job, Progress], object]]


def run_all(jobs: Sequence[Job], start: Start[Job], num_workers: int) -> bool:
    """Runs all jobs in `num_workers` processes of one thread each; returns whether all succeeded."""
    context = multiprocessing.get_context("spawn")
    next_job, lock = context.Value("i", 0), context.RLock()
    workers = [
        context.Process(target=_work, args=(place, jobs, next_job, start, lock), daemon=True)
        for place in range(min(num_workers, len(jobs)))
    ]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    return all(worker.exitcode == 0 for worker in workers)


def _work(place: int, jobs: Sequence[Job], next_job, start: Start[Job], lock) -> None:
    """The body of a worker process: takes one job after another until none is left."""
    torch.set_num_threads(1)
    tqdm.set_lock(lock)
    do, progress = start(), Progress(place)
    while True:
        with next_job.get_lock():
            idx, next_job.value = next_job.value, next_job.value + 1
        if idx >= len(jobs):
            return progress.close()
        do(jobs[idx], progress)


def losses_by_rate(
    rates: Sequence[float], first: Sequence[float], loss: Callable[[float], float | None]
) -> dict[float, float | None]:
    """{rate: loss} of the `first` of `rates`, extended until the best rate has a worse neighbor on both sides.

    The search ends early at the ends of `rates`, or when `loss` returns None for a rate that has no result yet. A loss
    that is NaN counts as infinite.

    Args:
        rates: ascending.
        first: consecutive members of `rates`, ascending.
    """
    low, high = rates.index(first[0]), rates.index(first[-1])
    losses: dict[float, float | None] = {}
    while True:
        tried = rates[low : high + 1]
        losses |= {rate: _comparable(loss(rate)) for rate in tried if rate not in losses}
        if None in losses.values():
            return losses
        best = best_rate(losses)
        if best == tried[0] and low > 0:
            low -= 1
        elif best == tried[-1] and high < len(rates) - 1:
            high += 1
        else:
            return losses


def best_rate(losses: dict[float, float]) -> float:
    """The rate with the smallest loss; of equal losses, the smallest rate."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def _comparable(loss: float | None) -> float | None:
    return math.inf if loss is not None and math.isnan(loss) else loss
