"""Curves over the context, without bars: prefill, decode and bytes of the cache, ours and Transformers'."""

import statistics
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch

from models import Size, cache_bytes, feed, feed_in_pieces, fill, pair, random_ids, step
from report import Case, Point
from timing import PeakMemory, free_memory, in_rounds, seconds_of

# What one model may take for one prefill, and for filling one cache from its start.
PREFILL_SECONDS, FILL_SECONDS = 40.0, 90.0
SHARE_OF_MEMORY = 0.6  # of what is free


@dataclass
class Budget:
    """Tells from the points that a model has done what the next one will take, so that none takes the machine down."""

    seconds: float
    spent: dict[int, float] = field(default_factory=dict)
    grown: dict[int, int] = field(default_factory=dict)
    stopped: str = ""

    def predicted(self, context: int) -> float:
        """Seconds, going on as they have grown from the last point but one to the last."""
        done = sorted(self.spent)
        if not done:
            return 0.0
        last = done[-1]
        power = 1.0
        if len(done) > 1:
            before = done[-2]
            power = max(_power(self.spent[last] / self.spent[before], last / before), 1.0)
        return self.spent[last] * (context / last) ** power

    def why_not(self, context: int) -> str:
        """Why this context is skipped, and with it all longer ones; empty if it is not."""
        if self.stopped:
            return self.stopped
        seconds, free = self.predicted(context), free_memory()
        last = max(self.grown, default=0)  # short contexts take mostly what does not grow
        memory = self.grown[last] * context / last if last else 0
        if seconds > self.seconds:
            self.stopped = f"it would take {seconds:.0f} s, the limit is {self.seconds:.0f} s"
        elif free is not None and memory > SHARE_OF_MEMORY * free:
            self.stopped = f"it would take {memory / 1e9:.0f} GB of memory"
        return self.stopped

    def measure(self, context: int, run: Callable[[], object]) -> None:
        """Runs it once, and notes what it took."""
        with PeakMemory() as peak:
            self.spent[context] = seconds_of(run)
        if peak.nbytes is not None:
            self.grown[context] = peak.nbytes


def _power(growth: float, of: float) -> float:
    return torch.log(torch.tensor(growth)).item() / torch.log(torch.tensor(of)).item()


def warm(family: str, size: Size) -> dict:
    """The models, past what their first forward alone has to do; a budget would take it for slowness."""
    models = pair(family, size)
    for model in models.values():
        feed_in_pieces(model, random_ids(model, 1, 17), piece=16)
    return models


def contexts(size: Size) -> tuple[int, ...]:
    return size((128, 512, 2048, 8192, 32768), (8, 16))


def sweep_prefill(family: str) -> Callable[[Size], Iterator[Point]]:
    """A prefill in one forward; the first call of a point is measured too, if it is a long one."""

    @torch.inference_mode()
    def run(size: Size) -> Iterator[Point]:
        models = warm(family, size)
        for rows in (1, 8):
            budgets = {name: Budget(PREFILL_SECONDS) for name in models}
            for context in contexts(size):
                ids = random_ids(models["ours"], rows, context)
                prefills = {name: lambda model=model, ids=ids: feed(model, ids) for name, model in models.items()}
                skipped = {name: budgets[name].why_not(context) for name in models}
                left = {name: prefills[name] for name in models if not skipped[name]}
                for name, prefill in left.items():
                    budgets[name].measure(context, prefill)
                seconds = _repeated(left, {name: budgets[name].spent[context] for name in left}, size(3, 1))
                for name in models:
                    yield Point("prefill", family, name, rows, context, seconds.get(name), skipped[name])

    return run


def _repeated(runs: dict[str, Callable[[], object]], first: dict[str, float], rounds: int) -> dict[str, float]:
    """Medians of more rounds, where all of them are short; otherwise the first times stand."""
    if not runs or sum(first.values()) > 10:
        return first
    found = in_rounds(runs, rounds, warm_up=0)
    return {name: found.median(name) for name in runs}


def sweep_decode(family: str) -> Callable[[Size], Iterator[Point]]:
    """A decoding step, and the bytes of its cache, which grows from context to context.

    The steps that were timed stay in it: a context is up to some dozens of tokens longer than it says.
    """

    @torch.inference_mode()
    def run(size: Size) -> Iterator[Point]:
        models = warm(family, size)
        for rows in (1, 8):
            budgets, caches = {name: Budget(FILL_SECONDS) for name in models}, dict.fromkeys(models)
            for context in contexts(size):
                skipped = {name: budgets[name].why_not(context) for name in models}
                left = {name: model for name, model in models.items() if not skipped[name]}
                for name, model in left.items():
                    caches[name] = _grown(model, caches[name], budgets[name], rows, context)
                sizes = {name: cache_bytes(caches[name]) for name in left}
                found = _steps(left, caches, rows, size)
                for name in models:
                    about = (family, name, rows, context)
                    yield Point("decode", *about, found.get(name), skipped[name])
                    yield Point("cache", *about, sizes.get(name), skipped[name])

    return run


def _grown(model, cache, budget: Budget, rows: int, context: int):
    """The cache filled up to `context` tokens; the budget is that of a filling from the start."""
    before = max(budget.spent, default=0)
    ids = random_ids(model, rows, context - before)
    started = time.perf_counter()
    with PeakMemory() as peak:
        cache = fill(model, ids, cache)
    budget.spent[context] = budget.spent.get(before, 0.0) + time.perf_counter() - started
    if peak.nbytes is not None:
        budget.grown[context] = budget.grown.get(before, 0) + peak.nbytes
    return cache


def _steps(models: dict, caches: dict, rows: int, size: Size) -> dict[str, float]:
    if not models:
        return {}
    steps = {name: step(model, caches[name], rows) for name, model in models.items()}
    found = in_rounds(steps, size(5, 1), size(3, 1))
    return {name: statistics.median(found.seconds[name]) for name in models}


CASES = [
    *(
        Case(f"sweep-prefill-{family.lower()}", f"curves of prefill, {family}", sweep_prefill(family))
        for family in ("Mamba", "Jamba", "Llama")
    ),
    *(
        Case(f"sweep-decode-{family.lower()}", f"curves of decode, {family}", sweep_decode(family))
        for family in ("Mamba", "Jamba", "Llama")
    ),
]
