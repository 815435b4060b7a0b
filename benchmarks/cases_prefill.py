"""A prompt at once: Mamba and Jamba against Transformers', and against the matrix products that nobody gets around."""

from collections.abc import Callable, Iterator

import torch
from torch.nn.functional import linear

from models import Size, check_same, feed, pair, random_ids
from report import Case, Row, at_least, milliseconds
from timing import in_rounds


def prefills(models: dict, ids: torch.Tensor) -> dict[str, Callable[[], object]]:
    """A prefill of each model into a cache of its own; refused if the logits differ."""
    check_same(models, {name: feed(model, ids)[0] for name, model in models.items()})
    return {name: lambda model=model: feed(model, ids) for name, model in models.items()}


def products(model, num_tokens: int) -> Callable[[], object]:
    """The matrix products alone of one prefill of Mamba layers, and the head for the last token."""
    weights = [
        getattr(layer.mamba, name).weight
        for layer in model.model.layers
        for name in ("in_proj", "x_proj", "dt_proj", "out_proj")
    ]
    inputs = {width: torch.randn(1, num_tokens, width) for width in {weight.shape[1] for weight in weights}}
    last = torch.randn(1, 1, model.config.hidden_size)

    def run() -> None:
        for weight in weights:
            linear(inputs[weight.shape[1]], weight)
        linear(last, model.lm_head.weight)

    return run


@torch.inference_mode()
def prefill_mamba(size: Size) -> Iterator[Row]:
    models = pair("Mamba", size)
    ids = random_ids(models["ours"], 1, size(1024, 16))
    contenders = {**prefills(models, ids), "products": products(models["ours"], ids.shape[1])}
    found = in_rounds(contenders, size(9, 1))
    ours, what = milliseconds(found.median("ours")), f"prefill {ids.shape[1]:,} tokens, Mamba-130M, float32"
    peer = milliseconds(found.median("transformers"))
    ratios = found.ratios("transformers", "ours")
    yield Row(f"{what}: x as fast as Transformers", ours, peer, ratios, at_least(3.0))
    text = f"{what}: share of the speed of the matrix products alone"
    yield Row(text, ours, milliseconds(found.median("products")), found.ratios("products", "ours"), at_least(0.70))


@torch.inference_mode()
def prefill_jamba(size: Size) -> Iterator[Row]:
    models = pair("Jamba", size)
    ids = random_ids(models["ours"], 1, size(1024, 16))
    found = in_rounds(prefills(models, ids), size(9, 1))
    yield Row(
        f"prefill {ids.shape[1]:,} tokens, dense Jamba-150M, float32: x as fast as Transformers",
        milliseconds(found.median("ours")),
        milliseconds(found.median("transformers")),
        found.ratios("transformers", "ours"),
        at_least(1.7),
    )


CASES = [
    Case("prefill-mamba", "prefill 1,024 tokens, Mamba-130M", prefill_mamba, ">= 3.00; >= 0.70 of products"),
    Case("prefill-jamba", "prefill 1,024 tokens, dense Jamba-150M", prefill_jamba, ">= 1.70"),
]
