"""Measures how well next-token predictions of an expert vector are calibrated: the point vector, and its posterior.

    python -m recipes.language.measure_uncertainty king_james.safetensors --domain bible --output row.json

For each domain, the loss in nats a token and the expected calibration error (15 bins of the probability of the top
token): for the base, the point vector, and the average over samples of its Laplace posterior, with one entry a seed.
The training blocks that the Fisher information is computed from are drawn as `--training-blocks` and `--training-seed`
say. Needs the extra `train` and the Debian packages that it names if they are missing.
"""

import argparse
import json
import math
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from torch import Tensor

from mambaformer import ExpertVector, MambaFormerForCausalLM, fit_laplace
from recipes.language.measures import calibration_error
from recipes.language.texts import DOMAINS, collect
from recipes.language.train_expert import HYBRID, TEXTS, blocks_of_split, load
from recipes.language.training import make_once

BINS = 15
ROWS = 2  # of a forward


def figures_of(log_probs: Tensor, ids: Tensor) -> dict[str, float]:
    """Loss, calibration error, and confidence minus accuracy of predictions (rows, tokens, vocabulary) of `ids`."""
    log_probs, labels = log_probs[:, :-1].flatten(0, 1), ids[:, 1:].flatten()
    top, token = log_probs.max(-1)
    confidence, is_right = top.exp(), token == labels
    return {
        "loss": -log_probs.gather(-1, labels[:, None]).mean().item(),
        "calibration_error": calibration_error(confidence, is_right, BINS),
        "overconfidence": (confidence.mean() - is_right.double().mean()).item(),
    }


def predict(model: MambaFormerForCausalLM, vectors: Sequence[ExpertVector | None], blocks: dict[str, Tensor]):
    """For each domain, log-probabilities of the next token, averaged over the vectors with equal weights."""
    total: dict[str, Tensor] = {}
    for vector in vectors:
        for name, log_probs in _predictions_of(model, vector, blocks).items():
            total[name] = log_probs if name not in total else torch.logaddexp(total[name], log_probs)
    return {name: log_probs - math.log(len(vectors)) for name, log_probs in total.items()}


@torch.no_grad()
def _predictions_of(
    model: MambaFormerForCausalLM, vector: ExpertVector | None, blocks: dict[str, Tensor]
) -> dict[str, Tensor]:
    if vector is not None:
        model.merge_expert_vector(vector)
    try:
        parts = {
            name: [model(ids, use_cache=False).logits.float().log_softmax(-1) for ids in each.split(ROWS)]
            for name, each in blocks.items()
        }
    finally:
        if vector is not None:
            model.unmerge_expert_vector()
    return {name: torch.cat(each) for name, each in parts.items()}


def measure(
    model: MambaFormerForCausalLM,
    vector: ExpertVector,
    training: Tensor,
    blocks: dict[str, Tensor],
    samples: int = 4,
    seeds: Sequence[int] = (0, 1, 2),
    num_tokens: int | None = None,
    report: Callable[[str], None] = lambda text: None,
) -> dict[str, object]:
    """The figures of each domain in `blocks` (token ids (rows, tokens)): of the base, the point and the posterior.

    Args:
        training: token ids (rows, tokens) from the training data of the vector.
        num_tokens: tokens of all its training data; by default those of `training`.
    """

    def figures(vectors: Sequence[ExpertVector | None]) -> dict[str, dict[str, float]]:
        return {name: figures_of(each, blocks[name]) for name, each in predict(model, vectors, blocks).items()}

    result: dict[str, object] = {}
    for name, vectors in (("base", [None]), ("point", [vector])):
        result[name] = figures(vectors)
        report(f"{name} {result[name]}")
    fitted = fit_laplace(model, vector, training.split(ROWS), num_tokens, torch.Generator().manual_seed(0))
    report(str(fitted.metadata["laplace"]))
    result["prior_precision"] = fitted.metadata["laplace"]["prior_precision"]
    result["laplace"] = []
    for seed in seeds:
        drawn = fitted.sample(samples, torch.Generator().manual_seed(seed))
        result["laplace"] = [*result["laplace"], figures(drawn)]
        report(f"laplace, seed {seed} {result['laplace'][-1]}")
    return result


def _blocks(texts: Path, domain: str, split: str, tokenizer, length: int, count: int, seed: int) -> Tensor:
    chosen = blocks_of_split(texts, domain, split, tokenizer, length).shuffle(seed=seed)
    return torch.tensor(chosen.select(range(count))["input_ids"])


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("vector", type=Path, help="file of an expert vector")
    parser.add_argument("--domain", choices=DOMAINS, required=True, help="that it was trained on")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS, default=list(DOMAINS), help="to measure on")
    parser.add_argument("--model", default=HYBRID)
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the domains; made if it is not there")
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--held-out-blocks", type=int, default=8, help="of each domain")
    parser.add_argument("--training-blocks", type=int, default=4)
    parser.add_argument("--training-seed", type=int, default=0, help="of the order of the training blocks")
    parser.add_argument("--num-tokens", type=int, help="of all training data; default: of the training blocks")
    parser.add_argument("--samples", type=int, default=4)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--output", type=Path, required=True, help="file of the figures (*.json)")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    make_once(args.texts, collect)
    model, tokenizer = load(args.model, "float32")
    model.eval().requires_grad_(False)
    draw = args.training_blocks, args.training_seed
    training = _blocks(args.texts, args.domain, "train", tokenizer, args.length, *draw)
    blocks = {
        name: _blocks(args.texts, name, "held_out", tokenizer, args.length, args.held_out_blocks, 0)
        for name in args.domains
    }
    vector = ExpertVector.load(args.vector)
    result = measure(model, vector, training, blocks, args.samples, args.seeds, args.num_tokens, print)
    settings = {name: str(value) for name, value in vars(args).items() if name != "output"}
    args.output.write_text(json.dumps({"settings": settings, **result}, indent=1) + "\n")


if __name__ == "__main__":
    main()
