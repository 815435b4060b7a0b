"""Recurrent states in 8 bits: bytes, loss and the time of a decode step, against states in float32."""

import argparse
import inspect
import statistics
from pathlib import Path

import torch
from torch.nn import functional
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from figures import Figure, at_most
from mambaformer import MambaFormerForCausalLM, convert
from mambaformer.convert import find_smollm2
from models import Size, smollm2, step
from timing import in_rounds

CONTEXT, PIECE = 8192, 512
CHECKPOINTS = Path(__file__).resolve().parent.parent / "checkpoints"


def states_of_hybrid() -> dict[str, Figure]:
    """States of SmolLM2's hybrid in 8 bits, 8,192 tokens of Python source."""
    source = find_smollm2()
    model = convert(smollm2(Size()), mamba_delta=CHECKPOINTS / "smollm2-hybrid" / "mamba_delta.safetensors")
    return _measure(model, AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name))


def states_of_tiny() -> dict[str, Figure]:
    """States of mambaformer-tiny in 8 bits, 8,192 tokens of Python source."""
    folder = CHECKPOINTS / "mambaformer-tiny"
    model = MambaFormerForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return _measure(model, AutoTokenizer.from_pretrained(folder))


@torch.inference_mode()
def _measure(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> dict[str, Figure]:
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, :CONTEXT]
    caches = [model.make_cache(), model.make_cache(state_bits=8)]
    plain, rounded = (_loss(model, ids, cache) for cache in caches)
    of_states, of_all = zip(*map(_bytes_of_states, caches), strict=True)
    steps = in_rounds(
        {name: step(model, cache) for name, cache in zip(("plain", "rounded"), caches, strict=True)}, 15, 8
    )
    return {
        "bytes": Figure(of_states[1] / of_states[0], "x", at_most(0.3), "states without convolution windows"),
        "bytes with convolution windows": Figure(of_all[1] / of_all[0], "x"),
        "loss": Figure(100 * (rounded / plain - 1), " %", at_most(0.2)),
        "time of a decode step": Figure(statistics.median(steps.ratios("rounded", over="plain")), "x"),
    }


def _loss(model: PreTrainedModel, ids: torch.Tensor, cache) -> float:
    """Nats a token, with the tokens fed in pieces."""
    total = 0.0
    for start in range(0, ids.shape[1] - 1, PIECE):
        stop = min(start + PIECE, ids.shape[1] - 1)
        logits = model(ids[:, start:stop], cache=cache).logits[0].float()
        total += functional.cross_entropy(logits, ids[0, start + 1 : stop + 1], reduction="sum").item()
    return total / (ids.shape[1] - 1)


def _bytes_of_states(cache) -> tuple[int, int]:
    """Bytes of matrix states, and of these with convolution windows."""
    kinds = [layer.recurrent.nbytes() for layer in cache.layers if layer.recurrent is not None]
    states = sum(each["ssm"] for each in kinds)
    return states, states + sum(each["conv"] for each in kinds)


CASES = {"states-hybrid": states_of_hybrid, "states-tiny": states_of_tiny}
