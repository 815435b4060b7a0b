"""Work on many small matrices side by side: Python threads whose PyTorch operations run on one thread each.

Threads of OpenMP wait for each other several times in a decomposition, which costs milliseconds each time where other
programs need the processors too. Threads that share nothing do not wait.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import torch

SECONDS_TO_START = 60


class SideBySide:
    """A context manager whose `submit(function, *arguments)` runs it in one of `workers` threads, or at once for 1.

    The threads start at the first call. Leaving waits for the functions that run, and drops the others.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, function: Callable, *arguments: Any) -> Future:
        if self.workers <= 1:
            return completed(function, *arguments)
        if self._pool is None:
            self._pool = _started(self.workers)
        return self._pool.submit(function, *arguments)

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def completed(function: Callable, *arguments: Any) -> Future:
    """Runs a function here and now; an exception is that of the caller."""
    future: Future = Future()
    future.set_result(function(*arguments))
    return future


def _started(workers: int) -> ThreadPoolExecutor:
    """PyTorch has a number of threads for each Python thread, and one with which new threads begin.

    The first operation of a thread reads the latter, and setting the former sets both. So all workers set it, and the
    caller sets it back when the last one has read it.
    """
    before = torch.get_num_threads()
    everyone = threading.Barrier(workers + 1, timeout=SECONDS_TO_START)

    def begin() -> None:
        if torch.backends.openmp.is_available():  # elsewhere the number cannot be changed any more
            torch.set_num_threads(1)
            torch.get_num_threads()
        everyone.wait()

    pool = ThreadPoolExecutor(workers, "mambaformer", initializer=begin)
    try:
        for _ in range(workers):  # each starts a thread, because none is idle before all have begun
            pool.submit(int)
        everyone.wait()
    except BaseException:
        everyone.abort()
        pool.shutdown(wait=False, cancel_futures=True)
        raise
    finally:
        if torch.backends.openmp.is_available():
            torch.set_num_threads(before)
    return pool


__all__ = ["SideBySide", "completed"]
