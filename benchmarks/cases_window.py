"""A text without end: does a model of windows and Mamba stay as fast and as small as it was at the start?"""

from collections.abc import Iterator

import torch

from models import Size, feed_in_pieces, random_ids, step, windowed
from report import Case, Row, at_most, megabytes, milliseconds
from timing import in_rounds


@torch.inference_mode()
def window(size: Size) -> Iterator[Row]:
    model, (short, long) = windowed(size), size((1024, 65536), (32, 96))
    cache = feed_in_pieces(model, random_ids(model, 1, short))
    caches = {"short": cache.fork(), "long": feed_in_pieces(model, random_ids(model, 1, long - short), cache)}
    used = {name: cache.nbytes for name, cache in caches.items()}
    logs = {name: sum(cache.report()["tokens"].values()) for name, cache in caches.items()}
    found = in_rounds({name: step(model, cache) for name, cache in caches.items()}, size(31, 1), size(5, 1))
    shape = f"windows of {model.config.sliding_window} + {model.config.num_sink_tokens} and Mamba"
    what = f"{shape}, {long:,} tokens seen against {short:,}"
    times = milliseconds(found.median("long")), milliseconds(found.median("short"))
    yield Row(f"{what}: time per token", *times, found.ratios("long", "short"), at_most(1.05))
    memory = megabytes(used["long"]), megabytes(used["short"])
    growth = (logs["long"] - logs["short"]) / (long - short)
    note = f"the log of the tokens takes {growth:.1f} bytes a token, {megabytes(logs['long'])} at {long:,} of them."
    yield Row(f"{what}: bytes of the cache", *memory, [used["long"] / used["short"]], at_most(1.01), note)
    states = {name: used[name] - logs[name] for name in used}
    memory = megabytes(states["long"]), megabytes(states["short"])
    yield Row(f"{what}: bytes without the log of tokens", *memory, [states["long"] / states["short"]], at_most(1.01))


CASES = [Case("window", "windows and Mamba, 65,536 tokens against 1,024", window, "<= 1.05 time; <= 1.01 bytes")]
