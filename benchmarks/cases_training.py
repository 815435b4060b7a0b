"""Training steps: of Mamba-130M against Transformers', and of packed sequences against padded ones.

The first takes time and peak memory of each model alone in a fresh process.
Transformers' backward pass through its loop over tokens takes minutes, so each process makes one step, its first.
"""

import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator

import torch
from torch.nn.utils.rnn import pad_sequence
from transformers import DataCollatorWithFlattening
from transformers.utils import logging

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM
from models import Size, check_same, feed, pair, random_ids
from report import Case, Row, at_least, at_most, megabytes, milliseconds
from timing import PeakMemory, in_rounds

SIDES = ("ours", "transformers")


def training_step(model, ids: torch.Tensor) -> Callable[[], None]:
    """Forward and backward; gradients are given back, as `optimizer.zero_grad()` does."""

    def run() -> None:
        model(ids, labels=ids, use_cache=False).loss.backward()
        model.zero_grad(set_to_none=True)

    return run


def training(size: Size) -> Iterator[Row]:
    models = pair("Mamba", size)
    ids = random_ids(models["ours"], 1, size(512, 16))
    with torch.inference_mode():
        check_same(models, {name: feed(model, ids)[0] for name, model in models.items()})
    what = f"training step, {ids.shape[1]} tokens, Mamba-130M, float32"
    del models
    found: dict[str, list[dict]] = {side: [] for side in SIDES}
    for _ in range(size(3, 1)):
        for side in SIDES:
            found[side].append(first_step_of(side, size))
    ours, theirs = ([step["seconds"] for step in found[side]] for side in SIDES)
    times = milliseconds(statistics.median(ours)), milliseconds(statistics.median(theirs))
    ratios = [other / own for own, other in zip(ours, theirs, strict=True)]
    yield Row(f"{what}: x as fast as Transformers", *times, ratios, at_least(2.5))
    ours, theirs = ([step["peak"] for step in found[side]] for side in SIDES)
    if None in ours + theirs:
        yield Row(f"{what}: peak memory", problem="missing: this system does not tell a process's peak")
        return
    memory = megabytes(statistics.median(ours)), megabytes(statistics.median(theirs))
    ratios = [own / other for own, other in zip(ours, theirs, strict=True)]
    note = "the peak is the growth of the process in its first step, gradients included, after the weights were there."
    yield Row(f"{what}: peak memory against Transformers", *memory, ratios, at_most(0.70), note)


def first_step_of(side: str, size: Size) -> dict:
    """Seconds of a process's first training step, and bytes by which it grows; only `side`'s model is in it."""
    command = [sys.executable, __file__, side, "quick" if size.is_quick else "full"]
    return json.loads(subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True).stdout)


def _measure_first_step(side: str, size: Size) -> None:
    logging.set_verbosity_error()
    model = pair("Mamba", size)[side].train()
    step = training_step(model, random_ids(model, 1, size(512, 16)))
    training_step(model, random_ids(model, 1, 2))()  # what is loaded at first use is no part of a step
    with PeakMemory() as peak:
        started = time.perf_counter()
        step()
        seconds = time.perf_counter() - started
    print(json.dumps({"seconds": seconds, "peak": peak.nbytes}))


# ---- packed against padded


def small_hybrid(size: Size) -> MambaFormerForCausalLM:
    """Six layers of the paper's pattern with MLPs and RoPE, 11M weights."""
    torch.manual_seed(0)
    wide, deep = size((256, 6), (32, 2))
    config = MambaFormerConfig(
        vocab_size=size(8192, 128),
        hidden_size=wide,
        intermediate_size=3 * wide,
        num_hidden_layers=deep,
        num_attention_heads=4,
        rope_parameters={"rope_type": "default", "rope_theta": 10000.0},
    )
    return MambaFormerForCausalLM(config).train()


def sequences_of(lengths: list[int], vocab_size: int) -> list[dict[str, list[int]]]:
    source = torch.Generator().manual_seed(0)
    return [{"input_ids": torch.randint(vocab_size, (n,), generator=source).tolist()} for n in lengths]


def padded_batch(examples: list[dict[str, list[int]]]) -> dict[str, torch.Tensor]:
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    ids = pad_sequence(rows, batch_first=True)
    mask = pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def packing(size: Size) -> Iterator[Row]:
    model = small_hybrid(size)
    lengths = torch.linspace(*size((20, 500, 12), (2, 9, 4))).int().tolist()
    examples = sequences_of(lengths, model.config.vocab_size)
    batches = {"packed": DataCollatorWithFlattening()(examples), "padded": padded_batch(examples)}
    with torch.no_grad():
        losses = [model(**batch, use_cache=False).loss for batch in batches.values()]
    torch.testing.assert_close(*losses, rtol=1e-5, atol=0.0)

    def step_on(batch: dict[str, torch.Tensor]) -> Callable[[], None]:
        def run() -> None:
            model(**batch, use_cache=False).loss.backward()
            model.zero_grad(set_to_none=True)

        return run

    found = in_rounds({name: step_on(batch) for name, batch in batches.items()}, size(7, 1))
    times = milliseconds(found.median("packed")), milliseconds(found.median("padded"))
    what = f"training step, {len(lengths)} sequences of {min(lengths)} to {max(lengths)} tokens"
    note = f"padded, {len(lengths) * max(lengths)} tokens are computed for {sum(lengths)}."
    yield Row(f"{what}: packed x as fast as padded", *times, found.ratios("padded", "packed"), at_least(1.5), note)


CASES = [
    Case("packing", "training step, packed against padded", packing, ">= 1.50"),
    Case("training", "training step, Mamba-130M, 512 tokens", training, ">= 2.50; <= 0.70 of the memory"),
]

if __name__ == "__main__":
    _measure_first_step(sys.argv[1], Size(is_quick=sys.argv[2] == "quick"))
