"""Quantized keys and values of SmolLM2 against dense float32: bytes, losses, and the time of a decode step."""

import argparse
import copy
import functools
import inspect
import os
import pydoc_data.topics
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from transformers import AutoTokenizer

from figures import Figure, at_most
from mambaformer import MambaFormerCache, MambaFormerForCausalLM, convert
from mambaformer.convert import find_smollm2
from models import Size, random_ids, smollm2, step
from timing import Rounds, in_rounds

CONTEXT, TEXT_TOKENS, ROUNDS, CALLS = 8192, 1536, 11, 3
MIXES: dict[str, int | Mapping[str, int]] = {
    "8": 8,
    "6-4": {"keys": 6, "values": 4},
    "6-3": {"keys": 6, "values": 3},
    "4": 4,
}
BARS = {"8": (0.28, 0.1), "6-4": (0.17, 0.5)}  # of bytes against float32, and of the loss in per cent


@functools.lru_cache(maxsize=1)
def model() -> MambaFormerForCausalLM:
    return convert(smollm2(Size()))


@functools.lru_cache(maxsize=1)
def model_in_int8() -> MambaFormerForCausalLM:
    """With all projections and the head in 8 bits, by torchao."""
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    quantized = copy.deepcopy(model())
    quantize_(quantized, Int8WeightOnlyConfig())
    return quantized


@functools.lru_cache(maxsize=1)
def texts() -> dict[str, torch.Tensor]:
    """Code and English from Python's own library, as token ids (1, TEXT_TOKENS)."""
    source = find_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    english = "\n".join(pydoc_data.topics.topics.values())
    texts = {"code": inspect.getsource(argparse), "English": english}
    return {
        name: tokenizer(text[: 12 * TEXT_TOKENS], return_tensors="pt").input_ids[:, :TEXT_TOKENS]
        for name, text in texts.items()
    }


@torch.inference_mode()
def loss(**options) -> float:
    """Nats a token, the mean over all texts, with all keys and values as the cache keeps them."""
    losses = [model()(ids, labels=ids, cache=model().make_cache(**options)).loss for ids in texts().values()]
    return torch.stack(losses).mean().item()


@functools.lru_cache(maxsize=1)
def exact_loss() -> float:
    return loss()


def quantized(mix: str) -> Callable[[], dict[str, Figure]]:
    kv_bits = MIXES[mix]

    def run() -> dict[str, Figure]:
        most_bytes, most_loss = BARS.get(mix, (None, None))
        cache = filled(kv_bits, num_tokens=1024)
        ratio = bytes_of_keys(cache) / bytes_of_keys(filled(None, num_tokens=1024))
        change = 100 * (loss(storage="quantized", kv_bits=kv_bits) / exact_loss() - 1)
        return {
            "bytes": Figure(ratio, "x", most_bytes and at_most(most_bytes)),
            "loss": Figure(change, " %", most_loss and at_most(most_loss)),
        }

    run.__doc__ = f"Keys and values in {mix.replace('-', ' and ')} bits, SmolLM2, {TEXT_TOKENS:,} tokens of each text."
    return run


def bytes_of_keys(cache: MambaFormerCache) -> int:
    tensors = (tensor for _, store in cache.stores() for tensor in store.state().values())
    return sum(tensor.nbytes for tensor in tensors)


@torch.inference_mode()
def filled(
    kv_bits: int | Mapping[str, int] | None, num_tokens: int, rows: int = 1, own: MambaFormerForCausalLM | None = None
) -> MambaFormerCache:
    """A cache of the right size whose keys and values are random: what a step costs does not depend on them.

    A cache belongs to the weights of one model: `own`, by default SmolLM2 in float32.
    """
    own = own or model()
    cache = own.make_cache() if kv_bits is None else own.make_cache("quantized", kv_bits=kv_bits)
    own(random_ids(own, rows, 1), cache=cache)
    numbers = torch.randn(rows, *next(iter(cache.stores()))[1].row_shape, num_tokens).transpose(2, 3).contiguous()
    for _, store in cache.stores():
        store.load_state({name: store.encode(name, numbers) for name in ("keys", "values")}, num_tokens)
    cache.lengths.columns = num_tokens
    return cache


@dataclass(frozen=True)
class DecodeSteps:
    """Decode steps after `CONTEXT` tokens: dense float32 keys and values against codes, with the same weights."""

    threads: int
    rows: int = 1
    has_int8_weights: bool = False
    mixes: tuple[str, ...] = tuple(MIXES)
    most_step: float | None = None  # the bar of the time of a complete step

    @torch.inference_mode()
    def measure(self) -> dict[str, Figure]:
        with threads_of_torch(self.threads):
            found = in_rounds(self.by_storage(), ROUNDS, CALLS)
        bar = None if self.most_step is None else at_most(self.most_step)
        dense, empty = fastest(found, "dense"), fastest(found, "empty")
        figures = {f"step, {mix}": Figure(fastest(found, mix) / dense, "x", bar) for mix in self.mixes}
        for mix in self.mixes:
            attention = (fastest(found, mix) - empty) / (dense - empty)
            figures[f"attention, {mix}"] = Figure(attention, "x", at_most(0.6))
        return figures

    def by_storage(self) -> dict[str, Callable[[], object]]:
        own = model_in_int8() if self.has_int8_weights else model()
        caches = {"dense": filled(None, CONTEXT, self.rows, own), "empty": filled(None, 1, self.rows, own)}
        caches |= {mix: filled(MIXES[mix], CONTEXT, self.rows, own) for mix in self.mixes}
        return {name: step(own, cache, self.rows) for name, cache in caches.items()}


def decode(steps: DecodeSteps) -> Callable[[], dict[str, Figure]]:
    def run() -> dict[str, Figure]:
        return steps.measure()

    weights = "int8" if steps.has_int8_weights else "float32"
    run.__doc__ = (
        f"Time of a decode step after {CONTEXT:,} tokens against dense float32, {weights} weights, "
        f"batch of {steps.rows}, {steps.threads} threads."
    )
    return run


@contextmanager
def threads_of_torch(threads: int) -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def fastest(found: Rounds, name: str) -> float:
    return min(found.seconds[name])


CASES = {f"quantized-{mix}": quantized(mix) for mix in MIXES}
for threads in range(1, min(os.cpu_count() or 1, 2) + 1):
    CASES[f"quantized-decode-{threads}"] = decode(DecodeSteps(threads))
    CASES[f"quantized-decode-int8-{threads}"] = decode(
        DecodeSteps(threads, has_int8_weights=True, mixes=("8", "6-4"), most_step=0.6)
    )
    CASES[f"quantized-decode-batch-{threads}"] = decode(
        DecodeSteps(threads, rows=4, mixes=("8", "6-4"), most_step=0.6)
    )
