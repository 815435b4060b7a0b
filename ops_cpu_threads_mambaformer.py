"""Parallel work on many small matrices: Python threads whose PyTorch operations run on one thread each.

OpenMP threads synchronize several times in a decomposition, which costs milliseconds each time on a busy machine.
Threads that share nothing do not synchronize.
"""

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor

import torch

SECONDS_TO_START = 60


class SideBySide:
    """A context manager whose `submit(function, *arguments)` runs a function in one of `workers` threads.

    With one worker the function runs in the caller's thread. The threads start at the first call. The end of the
    context waits for running functions and cancels the others.
    """

    def __init__(self, workers: int):
        self.workers = workers
        self._pool: ThreadPoolExecutor | None = None

    def submit(self, function: Callable, *arguments: object) -> Future:
        if self.workers <= 1:
            return completed(function, *arguments)
        if self._pool is None:
            self._pool = _start_workers(self.workers)
        return self._pool.submit(function, *arguments)

    def __enter__(self) -> "SideBySide":
        return self

    def __exit__(self, *_: object) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=True)


def completed(function: Callable, *arguments: object) -> Future:
    """Runs a function in the caller's thread, which gets its exception."""
    future: Future = Future()
    future.set_result(function(*arguments))
    return future


def _start_workers(workers: int) -> ThreadPoolExecutor:
    """A pool whose threads run PyTorch operations on one thread each.

    PyTorch has a number of threads for each Python thread, and a default for new ones. The first operation of a thread
    reads the default, and setting the number sets both. So all workers set it, and the caller restores the default
    when the last worker has read it.
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
        for _ in range(workers):  # each call starts a thread, because none is idle before all have started
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
