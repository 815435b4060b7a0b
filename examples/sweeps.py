"""What sweeps of many runs share: worker processes that take the runs one by one, and the search for a rate.

`icl` and `language` have this module as a link, since a script finds only the modules of its own folder.
"""

import math
import multiprocessing
import sys
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from tqdm.auto import tqdm

Job = TypeVar("Job")


class Progress:
    """The bar of one worker; it ends the process if the one that started it is gone."""

    def __init__(self, place: int):
        self._starter = multiprocessing.parent_process()
        self._bar = tqdm(position=place, leave=False, mininterval=1.0)

    def begin(self, name: str, steps: int | None = None) -> None:
        self._bar.set_postfix_str("", refresh=False)
        self._bar.set_description_str(f"{name:40s}", refresh=False)
        self._bar.reset(steps)

    def at(self, step: int, figures: str = "") -> None:
        """So many steps are done; `figures` stand behind the bar."""
        if not self._starter.is_alive():
            sys.exit(1)
        self._bar.set_postfix_str(figures, refresh=False)
        self._bar.update(step - self._bar.n)

    def close(self) -> None:
        self._bar.close()


# A worker calls it once, and then what it returns for each job that it takes.
Start = Callable[[], Callable[[Job, Progress], object]]


def run_all(jobs: Sequence[Job], start: Start[Job], num_workers: int) -> bool:
    """Does all jobs in so many processes of one thread each; whether all of them succeeded."""
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
    """A process: takes one job after the other until none is left."""
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
    """{rate: loss} of the `first` of `rates`, and on beyond the best of them to where the loss rises again.

    The search ends early only at the ends of `rates`, or where `loss` does not know one of the rates yet and says
    None: then as far as it has come. A loss that is NaN counts as infinite.

    Args:
        rates: ascending.
        first: neighbours among `rates`, ascending.
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
    """The one of the least loss; of equal ones the smallest."""
    return min(losses, key=lambda rate: (losses[rate], rate))


def _comparable(loss: float | None) -> float | None:
    return math.inf if loss is not None and math.isnan(loss) else loss
