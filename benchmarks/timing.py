"""How things are measured: in rounds that alternate, and peaks of memory."""

import gc
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from tqdm.auto import tqdm


@dataclass(frozen=True)
class Rounds:
    """Seconds of each contender in each round; what is compared was measured side by side."""

    seconds: dict[str, list[float]]

    def median(self, name: str) -> float:
        return statistics.median(self.seconds[name])

    def ratios(self, name: str, over: str) -> list[float]:
        """Time of `name` over that of `over`, one for each round."""
        return [a / b for a, b in zip(self.seconds[name], self.seconds[over], strict=True)]


def seconds_of(run: Callable[[], object]) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def in_rounds(
    contenders: dict[str, Callable[[], object]],
    rounds: int,
    calls: int = 1,
    warm_up: int = 1,
    before: Callable[[str], object] = lambda name: None,
) -> Rounds:
    """Times all contenders `rounds` times, in turns; a round counts the median of a contender's `calls`.

    Whoever comes first changes from round to round, so that nobody always follows the same neighbour. `before` makes
    things ready for a contender, by its name, when its turn comes; that is not timed.
    """
    for name, run in contenders.items():
        before(name)
        for _ in range(warm_up):
            run()
    names = list(contenders)
    seconds: dict[str, list[float]] = {name: [] for name in names}
    gc.collect()
    for turn in tqdm(range(rounds), " | ".join(names), unit="round", delay=5, leave=False):
        first = turn % len(names)
        for name in names[first:] + names[:first]:
            before(name)
            seconds[name].append(statistics.median(seconds_of(contenders[name]) for _ in range(calls)))
    return Rounds(seconds)


def memory_readers(num_bytes: int = 1 << 30) -> dict[str, Callable[[], object]]:
    """Ways to read `num_bytes` of memory once, with all threads; which is the fastest depends on the machine."""
    matrix = torch.ones(num_bytes // 4096, 1024)
    vector = torch.ones(1024)
    return {"sum": matrix.sum, "max": matrix.max, "product": lambda: torch.mv(matrix, vector)}


def read_bandwidth(num_bytes: int = 1 << 30, rounds: int = 5) -> float:
    """Bytes a second that memory is read with, by the fastest way at its best."""
    found = in_rounds(memory_readers(num_bytes), rounds)
    return num_bytes / min(min(seconds) for seconds in found.seconds.values())


class PeakMemory:
    """Bytes by which the process grew at most inside a `with`; `None` where the system does not tell.

    Linux keeps a high-water mark that can be set back; elsewhere the mark of the whole process is all there is.
    """

    def __enter__(self) -> "PeakMemory":
        gc.collect()
        self.nbytes: int | None = None
        try:
            Path("/proc/self/clear_refs").write_text("5")
            self.before = _status("VmRSS")
        except OSError:
            self.before = None
        return self

    def __exit__(self, *error) -> None:
        if self.before is not None:
            self.nbytes = max(_status("VmHWM") - self.before, 0)


def _status(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def free_memory() -> int | None:
    """Bytes that may still be used without swapping, if the system tells."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable")) * 1024
    except (OSError, StopIteration):
        pages = "SC_AVPHYS_PAGES"
        return os.sysconf(pages) * os.sysconf("SC_PAGE_SIZE") if pages in os.sysconf_names else None
