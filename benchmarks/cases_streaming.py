"""Streaming without end: loss at any position, and time and bytes of millions of tokens."""

import statistics
import time
from pathlib import Path

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from figures import Figure, at_most
from mambaformer import MambaFormerCache, MambaFormerConfig, MambaFormerForCausalLM, convert
from mambaformer.convert import find_smollm2
from models import Size, smollm2

ROOT = Path(__file__).resolve().parent.parent
WINDOW, SINKS = 256, 4
PREFIX, TEXT = 1024, 1024  # tokens that fill the windows, and tokens whose loss is measured
POSITIONS = (102_400, 1_024_000)  # multiples of the window: a key keeps its slot
STREAM, ENDS, CHUNK, REMEMBER = 4_000_000, 100_000, 4_000, 4_096


@torch.inference_mode()
def loss_at_positions() -> dict[str, Figure]:
    """Loss per token of SmolLM2 in windows of 256 + 4 sinks, behind 100,000 and 1,000,000 tokens against the start."""
    ids, figures = _text(PREFIX + TEXT), {}
    for kind in ("relative", "absolute"):
        model = convert(smollm2(Size()), window=WINDOW, num_sink_tokens=SINKS, window_positions="relative")
        model.config.window_positions = kind
        losses = {position: _loss_behind(model, ids, position) for position in (0, *POSITIONS)}
        figures[f"{kind} positions: loss at the start"] = Figure(losses[0], " nats")
        for position in POSITIONS:
            change = abs(losses[position] / losses[0] - 1) * 100
            bar = at_most(0.5) if kind == "relative" else None
            figures[f"{kind} positions: change behind {position:,}"] = Figure(change, " %", bar)
    return figures


def _text(num_tokens: int) -> torch.Tensor:
    """Prose and code of this project as tokens (1, num_tokens)."""
    source = find_smollm2()
    tokenizer = AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)
    text = "\n".join((ROOT / name).read_text() for name in ("README.md", "LICENSE", "tests/reference.py"))
    return tokenizer(text, return_tensors="pt").input_ids[:, :num_tokens]


def _loss_behind(model: MambaFormerForCausalLM, ids: torch.Tensor, position: int) -> float:
    """Loss per token of the last `TEXT` ids, with `position` tokens more in front of the windows."""
    cache = model.make_cache()
    model(ids[:, :PREFIX], cache=cache)
    move_window(model, cache, position)
    logits = model(ids[:, PREFIX:], cache=cache).logits
    return F.cross_entropy(logits[0, :-1].double(), ids[0, PREFIX + 1 :]).item()


def move_window(model: MambaFormerForCausalLM, cache: MambaFormerCache, num_tokens: int) -> None:
    """Moves a sequence to a later position: as if `num_tokens` tokens stood between its sinks and its windows.

    The state of windows depends on the tokens in them and on their positions alone, so it is what a stream of that
    length ends with. `num_tokens` is a multiple of the window.
    """
    device = model.get_input_embeddings().weight.device
    frequencies, _ = model.model.rotary_emb.inverse_frequencies(device, torch.float32)
    angles = num_tokens * frequencies.double()
    for layer in cache.layers:
        keys = layer.attention.state()["keys"][:, :, SINKS:]
        first, second = keys.double().chunk(2, dim=-1)
        turned = first * angles.cos() - second * angles.sin(), second * angles.cos() + first * angles.sin()
        keys.copy_(torch.cat(turned, dim=-1))
    cache.lengths.columns += num_tokens


@torch.inference_mode()
def long_stream(num_tokens: int = STREAM) -> dict[str, Figure | float]:
    """4,000,000 tokens through mambaformer-tiny in windows of 256 + 4 sinks: the last 100,000 against the first.

    The first and the last 100,000 are read in turns, so that the machine's own load is in both.
    """
    model = _streaming_tiny()
    far, near = (model.make_cache(remember=REMEMBER) for _ in range(2))
    chunk = torch.randint(0, model.config.vocab_size, (1, CHUNK), generator=torch.Generator().manual_seed(0))
    for _ in range((num_tokens - ENDS) // CHUNK):
        _read(model, chunk, far)
    seconds: dict[str, list[float]] = {"far": [], "near": []}
    for _ in range(ENDS // CHUNK):
        seconds["far"].append(_read(model, chunk, far))
        seconds["near"].append(_read(model, chunk, near))
    assert far.get_seq_length() == num_tokens
    first, last = (statistics.median(seconds[which]) / CHUNK for which in ("near", "far"))
    return {
        "tokens streamed": float(num_tokens),
        "time per token": Figure(last / first, "x", at_most(1.03), f"{last * 1e6:.0f} us"),
        "bytes": Figure(far.nbytes / near.nbytes, "x", at_most(1.0), f"{far.nbytes / 1e6:.1f} MB"),
    }


def _read(model: MambaFormerForCausalLM, ids: torch.Tensor, cache: MambaFormerCache) -> float:
    """Feeds `ids`; returns seconds."""
    started = time.perf_counter()
    logits = model(ids, cache=cache, logits_to_keep=1).logits
    seconds = time.perf_counter() - started
    assert bool(logits.isfinite().all())
    return seconds


def _streaming_tiny() -> MambaFormerForCausalLM:
    folder = ROOT / "checkpoints" / "mambaformer-tiny"
    config = MambaFormerConfig.from_pretrained(folder)
    sliding = {"full_attention": "sliding_attention", "hybrid": "hybrid_sliding"}
    config.layer_types = [sliding.get(kind, kind) for kind in config.layer_types]
    config.sliding_window, config.num_sink_tokens, config.window_positions = WINDOW, SINKS, "relative"
    return MambaFormerForCausalLM.from_pretrained(folder, config=config).eval()


CASES = {"streaming-loss": loss_at_positions, "streaming-4m": long_stream}
