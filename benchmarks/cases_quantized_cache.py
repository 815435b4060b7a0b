"""Quantized keys and values of SmolLM2 against dense float32: bytes, losses, and the time of a decode step."""

import argparse
import functools
import inspect
import os
import pydoc_data.topics
from collections.abc import Callable, Mapping

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
def filled(kv_bits: int | Mapping[str, int] | None, num_tokens: int) -> MambaFormerCache:
    """A cache of the right size whose keys and values are random: what a step costs does not depend on them."""
    cache = model().make_cache() if kv_bits is None else model().make_cache("quantized", kv_bits=kv_bits)
    model()(random_ids(model(), 1, 1), cache=cache)
    numbers = torch.randn(1, *next(iter(cache.stores()))[1].row_shape, num_tokens).transpose(2, 3).contiguous()
    for _, store in cache.stores():
        store.load_state({name: store.encode(name, numbers) for name in ("keys", "values")}, num_tokens)
    cache.lengths.columns = num_tokens
    return cache


def decode_steps() -> dict[str, Callable[[], object]]:
    caches = {"dense": filled(None, CONTEXT), "empty": filled(None, 1)}
    caches |= {mix: filled(kv_bits, CONTEXT) for mix, kv_bits in MIXES.items()}
    return {name: step(model(), cache) for name, cache in caches.items()}


def decode(threads: int) -> Callable[[], dict[str, Figure]]:
    @torch.inference_mode()
    def run() -> dict[str, Figure]:
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            found = in_rounds(decode_steps(), ROUNDS, CALLS)
        finally:
            torch.set_num_threads(before)
        figures = {f"step, {mix}": Figure(fastest(found, mix) / fastest(found, "dense"), "x") for mix in MIXES}
        dense = fastest(found, "dense") - fastest(found, "empty")
        for mix in MIXES:
            own = fastest(found, mix) - fastest(found, "empty")
            figures[f"attention, {mix}"] = Figure(own / dense, "x", at_most(0.6))
        return figures

    run.__doc__ = f"Time of a decode step after {CONTEXT:,} tokens against dense float32, {threads} threads."
    return run


def fastest(found: Rounds, name: str) -> float:
    return min(found.seconds[name])


CASES = {f"quantized-{mix}": quantized(mix) for mix in MIXES}
CASES |= {f"quantized-decode-{threads}": decode(threads) for threads in (1, 2) if threads <= (os.cpu_count() or 1)}
