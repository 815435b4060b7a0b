"""What an expert costs: per token on the fly and merged, and once when it is changed in mid-text."""

import statistics
from collections.abc import Callable, Iterator

import torch

from mambaformer import ExpertVector, convert
from models import Size, check_same, feed, feed_in_pieces, random_ids, smollm2, step
from report import Case, Row, at_most, milliseconds
from timing import in_rounds, seconds_of


def random_expert(model, rank: int, seed: int) -> ExpertVector:
    """Scales around 1 for the leading directions of every projection."""
    source = torch.Generator().manual_seed(seed)
    ranks = {name: min(rank, *module.weight.shape) for name, module in model.linear_modules().items()}
    scales = {name: 1 + 0.1 * torch.randn(r, generator=source) for name, r in ranks.items() if name.endswith("_proj")}
    return ExpertVector(scales)


@torch.inference_mode()
def expert_decode(size: Size) -> Iterator[Row]:
    """One model in turns: of three, where in memory the weights of each lie would count for more than the bar does."""
    model, rank = convert(smollm2(size)), size(64, 8)
    ids, expert = random_ids(model, 1, size(128, 8)), random_expert(model, rank, 1)
    caches = {name: model.make_cache() for name in ("base", "on the fly", "merged")}
    caches["on the fly"].set_expert_vector(expert)
    steps = {name: step(model, cache) for name, cache in caches.items()}
    merged, logits = False, {}

    def make_ready(name: str) -> None:
        nonlocal merged
        if merged != (name == "merged"):
            model.unmerge_expert_vector() if merged else model.merge_expert_vector(expert)
            merged = not merged
        if name in logits:
            steps[name]()  # encodes the text again, if the weights have changed

    for name, cache in caches.items():
        make_ready(name)
        logits[name] = feed(model, ids, cache)[0]
    check_same(["on the fly", "merged"], logits)
    found = in_rounds(steps, size(21, 1), size(50, 1), before=make_ready)
    for name, bar in (("on the fly", at_most(1.15)), ("merged", at_most(1.01))):
        times = milliseconds(found.median(name)), milliseconds(found.median("base"))
        what = f"decode, SmolLM2-135M, an expert of rank {rank} {name}: time per token against the base"
        yield Row(what, *times, found.ratios(name, "base"), bar)


def change(model, cache, expert: ExpertVector) -> Callable[[], object]:
    """Puts `expert` in force and decodes a token under it."""
    decode = step(model, cache)

    def run() -> None:
        cache.set_expert_vector(expert)
        decode()

    return run


@torch.inference_mode()
def expert_switch(size: Size) -> Iterator[Row]:
    """Two experts take turns, both made ready before; the next token pays for the change."""
    model, rank, num_tokens = convert(smollm2(size)), size(64, 8), size(512, 16)
    ids, experts = random_ids(model, 1, num_tokens), [random_expert(model, rank, seed) for seed in (1, 2)]
    what, rounds = f"SmolLM2-135M, an expert of rank {rank} changed behind {num_tokens} tokens", size(5, 1)
    for policy in ("recompute", "continue"):
        cache = model.make_cache(on_expert_change=policy)
        cache.set_expert_vector(experts[0])
        feed_in_pieces(model, ids, cache)
        changes = [change(model, cache, expert) for expert in (experts * rounds)[1:]]
        yield Row(f"{what}, {policy}: the next token", milliseconds(statistics.median(map(seconds_of, changes))))
    cache = feed_in_pieces(model, ids)
    decode, merging, after = step(model, cache), [], []
    for _ in range(rounds):
        merging.append(seconds_of(lambda: model.merge_expert_vector(experts[0])))
        after.append(seconds_of(decode))
        model.unmerge_expert_vector()
    yield Row(f"{what}, merged: the merging", milliseconds(statistics.median(merging)))
    yield Row(f"{what}, merged: the next token, which encodes the text again", milliseconds(statistics.median(after)))


CASES = [
    Case("expert-decode", "decode with an expert of rank 64", expert_decode, "<= 1.15 on the fly; <= 1.01 merged"),
    Case("expert-switch", "an expert changed in mid-text", expert_switch),
]
