"""A change of expert vector and back, with parked states and without."""

import statistics
from pathlib import Path

import torch

from figures import Figure, at_most
from mambaformer import ExpertVector, convert
from models import Size, random_ids, smollm2
from timing import seconds_of

CONTEXT = 4096
DELTA = Path(__file__).resolve().parent.parent / "checkpoints" / "smollm2-hybrid" / "mamba_delta.safetensors"


@torch.inference_mode()
def change_and_back() -> dict[str, Figure]:
    """A change of expert vector and back, 4,096 tokens of SmolLM2's hybrid."""
    torch.manual_seed(0)
    model = convert(smollm2(Size()), mamba_delta=DELTA)
    linear = {name: module for name, module in model.linear_modules().items() if name.endswith("down_proj")}
    scales = {name: 1 + 0.1 * torch.randn(min(module.weight.shape)) for name, module in linear.items()}
    expert, token, cache = ExpertVector(scales), random_ids(model, 1, 1), model.make_cache(park_bytes=2**31)

    def feed(ids: torch.Tensor, expert_vector: ExpertVector | None) -> None:
        model(ids, cache=cache, expert_vector=expert_vector, logits_to_keep=1)

    feed(random_ids(model, 1, CONTEXT), None)
    feed(token, expert)
    parked_bytes, back = cache.parked.nbytes, []
    for _ in range(5):
        back.append(seconds_of(lambda: feed(token, None)))
        feed(token, expert)
    cache.parked.clear()
    seconds, recomputed = statistics.median(back), seconds_of(lambda: feed(token, None))
    return {
        "time of the way back, of recomputing": Figure(seconds / recomputed, "x", at_most(0.02)),
        "time of the way back": Figure(1e3 * seconds, " ms"),
        "parked bytes": Figure(parked_bytes / 1e6, " MB"),
    }


CASES = {"change-and-back": change_and_back}
