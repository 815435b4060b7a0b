"""How well the posterior over expert vectors finds the vector that fits, and what predictions under it are worth.

    python -m recipes.language.measure_posterior

Held-out parts of six domains, under the base and the six expert vectors of `checkpoints/expert-vectors`, on the hybrid
of SmolLM2. Likelihoods are computed once and kept in `runs/posterior`, so a run that is cut off goes on. Writes
`posterior.json`, plots, and the table in `docs/results.md`. The exit code is 1 if a bar is missed.
"""

import argparse
import json
import random
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers.utils import logging

from mambaformer import MambaFormerForCausalLM
from mambaformer.expert_beliefs_mambaformer import Beliefs
from recipes.language.posterior_report import CALIBRATED_AFTER, write_report
from recipes.language.texts import DOMAINS, MORE_DOMAINS, read
from recipes.language.train_expert import HYBRID, VECTORS, load, texts_of, vector_of

ROOT = Path(__file__).resolve().parents[2]
PARTS, TOKENS = 16, 257  # of each domain; the first token is given
PAIRS, HALF = 12, 128  # texts that change their subject, for each seed
SEEDS = (0, 1, 2)
TUNING_PAIRS, RATES = 12, (0.002, 0.005, 0.01, 0.02, 0.05, 0.1)
DECIDED_AFTER = (16, 32, 64)
PROMPT, NEW, ROUNDS = 512, 64, 5


# ---- texts


def parts_of(domain: str, split: str, tokenizer, number: int, length: int, seed: int = 0) -> Tensor:
    """Pieces of a split's documents that do not overlap, (number, length), in an order that the seed draws."""
    pieces = []
    for text in read(texts_of(domain), domain, split):
        ids = tokenizer(text).input_ids
        pieces += [ids[start : start + length] for start in range(0, len(ids) - length + 1, length)]
    chosen = random.Random(seed).sample(pieces, min(number, len(pieces)))
    return torch.tensor(chosen)


def pairs_of(split: str, tokenizer, number: int, seed: int) -> tuple[Tensor, list[tuple[str, str]]]:
    """Texts (number, 2 * HALF) whose subject changes in the middle, and their two domains."""
    draw = random.Random(seed)
    domains = [tuple(draw.sample(DOMAINS + MORE_DOMAINS, 2)) for _ in range(number)]
    pieces = {name: iter(parts_of(name, split, tokenizer, number * 2, HALF, seed)) for name in DOMAINS + MORE_DOMAINS}
    return torch.stack([torch.cat([next(pieces[one]), next(pieces[other])]) for one, other in domains]), domains


# ---- likelihoods


@torch.inference_mode()
def log_likelihoods(model: MambaFormerForCausalLM, ids: Tensor, names: list[str | None]) -> Tensor:
    """Of each token but the first under each candidate, (texts, tokens - 1, candidates) in float64."""
    found = []
    for rows in tqdm(ids.split(8), "texts"):
        of_candidates = []
        for name in names:
            logits = model(rows, expert_vector=name, use_cache=False).logits[:, :-1]
            of_candidates.append(logits.log_softmax(-1).gather(-1, rows[:, 1:, None])[..., 0].double())
        found.append(torch.stack(of_candidates, dim=-1))
    return torch.cat(found)


def kept(path: Path, compute: Callable[[], Tensor]) -> Tensor:
    """What `compute` returns, from the file if it is there."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_suffix(".partial")
        torch.save(compute(), partial)
        partial.rename(path)
    return torch.load(path)


# ---- beliefs


def beliefs_over(likelihoods: Tensor, switching: float = 0.0) -> tuple[Tensor, Tensor]:
    """Probabilities after 0 to n tokens, (texts, n + 1, candidates), and the mixture's log-evidence (texts, n)."""
    texts, _, candidates = likelihoods.shape
    log_prior = torch.full((1, candidates), 1 / candidates, dtype=torch.float64).log()
    beliefs, is_observed = Beliefs.of_prior(log_prior, texts), torch.ones(texts, dtype=torch.bool)
    after = [beliefs]
    for tokens in likelihoods.unbind(1):
        after.append(after[-1].after(tokens, is_observed, log_prior, switching))
    probabilities = torch.stack([each.log_probabilities for each in after], dim=1).exp()
    return probabilities, torch.stack([each.log_evidence for each in after[1:]], dim=1)


def decisions(likelihoods: Tensor) -> dict:
    """How often the most probable vector is the best one in hindsight, and how probable it was held to be."""
    probabilities, _ = beliefs_over(likelihoods)
    best = likelihoods.sum(1).argmax(-1)
    is_right = probabilities.argmax(-1) == best[:, None]  # (texts, tokens + 1)
    top = probabilities.max(-1).values
    after = torch.tensor(CALIBRATED_AFTER)
    return {
        "accuracy": {str(n): is_right[:, n].double().mean().item() for n in DECIDED_AFTER},
        "top": top[:, after].flatten().tolist(),
        "is_right": is_right[:, after].flatten().tolist(),
    }


def mixture(likelihoods: Tensor) -> dict:
    """Nats a token of the mixture, of the best vector in hindsight of each text, and of the base."""
    _, evidence = beliefs_over(likelihoods)
    length = likelihoods.shape[1]
    best = likelihoods.sum(1).max(-1).values
    base = likelihoods[..., 0].sum(1)
    worst_excess = (base - evidence[:, -1]).max().item()
    nats = {"mixture": -evidence[:, -1], "best vector": -best, "base": -base}
    return {name: (each / length).mean().item() for name, each in nats.items()} | {"most above base": worst_excess}


def changes(likelihoods: Tensor, domains: list[tuple[str, str]], names: list[str | None], rate: float) -> dict:
    """Nats a token where the subject changes: with switching, without, the best vector, and who knows the change."""
    length = likelihoods.shape[1]
    index = [[names.index(vector_of(name)) for name in pair] for pair in domains]
    knowing = [
        row[: HALF - 1, one].sum() + row[HALF - 1 :, other].sum()
        for row, (one, other) in zip(likelihoods, index, strict=True)
    ]
    nats = {
        "switching": beliefs_over(likelihoods, rate)[1][:, -1],
        "no switching": beliefs_over(likelihoods)[1][:, -1],
        "best vector": likelihoods.sum(1).max(-1).values,
        "who knows the change": torch.stack(knowing),
    }
    return {name: -(each / length).mean().item() for name, each in nats.items()}


# ---- cost


@torch.inference_mode()
def cost(model: MambaFormerForCausalLM, ids: Tensor, names: list[str | None]) -> dict:
    """Medians of paired runs: prefill and tokens of `posterior_mode="choose"` against plain generation."""
    options = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def seconds(new: int, **more) -> float:
        started = time.perf_counter()
        model.generate(ids, max_new_tokens=new, **options, **more)
        return time.perf_counter() - started

    def measured(drop_below: float | None) -> tuple[float, float]:
        def posterior() -> dict:
            if drop_below is None:
                return {}
            return {"expert_posterior": model.make_posterior(names, drop_below=drop_below)}

        first = seconds(1, **posterior())
        return first, (seconds(1 + NEW, **posterior()) - first) / NEW

    ratios: dict[str, list[float]] = {}
    for _ in tqdm(range(ROUNDS), "cost"):
        prefill, token = measured(None)
        for label, drop_below in (("", 0.0), (" with `drop_below=0.01`", 0.01)):
            choosing, after = measured(drop_below)
            ratios.setdefault(f"prefill{label}", []).append(choosing / prefill)
            ratios.setdefault(f"token{label}", []).append(after / token)
    return {name: statistics.median(values) for name, values in ratios.items()}


# ---- all of it


def measure(model: MambaFormerForCausalLM, tokenizer, runs: Path) -> dict:
    names: list[str | None] = [None, *(vector_of(name) for name in DOMAINS + MORE_DOMAINS)]

    def parts(domain: str) -> Tensor:
        return parts_of(domain, "held_out", tokenizer, PARTS, TOKENS)

    by_domain = {
        name: kept(runs / f"{name}.pt", lambda name=name: log_likelihoods(model, parts(name), names))
        for name in DOMAINS + MORE_DOMAINS
    }
    everything = torch.cat(list(by_domain.values()))
    tuning, _ = pairs_of("train", tokenizer, TUNING_PAIRS, seed=100)
    on_training = kept(runs / "tuning.pt", lambda: log_likelihoods(model, tuning, names))
    rate = max(RATES, key=lambda rate: beliefs_over(on_training, rate)[1][:, -1].mean().item())
    changing, pairs = {}, {}
    for seed in SEEDS:
        ids, domains = pairs_of("held_out", tokenizer, PAIRS, seed)
        pairs[seed] = domains, kept(runs / f"pairs-{seed}.pt", lambda ids=ids: log_likelihoods(model, ids, names))
        changing[str(seed)] = changes(pairs[seed][1], domains, names, rate)
    domains, likelihoods = pairs[SEEDS[0]]
    shown = beliefs_over(likelihoods, rate)[0][0]
    prompt = parts_of("python", "held_out", tokenizer, 1, PROMPT)
    return {
        "names": names,
        "texts": {name: len(each) for name, each in by_domain.items()},
        "decisions": decisions(everything),
        "by_domain": {name: decisions(each)["accuracy"] for name, each in by_domain.items()},
        "mixture": mixture(everything),
        "mixture_by_domain": {name: mixture(each) for name, each in by_domain.items()},
        "rate": rate,
        "changes": changing,
        "shown": {"domains": domains[0], "probabilities": shown.tolist()},
        "cost": cost(model, prompt, names[:6]),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--runs", type=Path, default=Path("runs/posterior"), help="folder of the likelihoods")
    parser.add_argument(
        "--output", type=Path, default=Path(__file__).parent, help="folder of posterior.json and plots"
    )
    parser.add_argument("--page", type=Path, default=ROOT / "docs" / "results.md", help="page with the table")
    args = parser.parse_args(argv)
    logging.set_verbosity_error()
    model, tokenizer = load(HYBRID, "float32")
    model.eval().load_expert_vectors(VECTORS)
    found = measure(model, tokenizer, args.runs)
    (args.output / "posterior.json").write_text(json.dumps(found, indent=1) + "\n")
    missed = write_report(found, args.output, args.page)
    print("\n".join(missed) or "all bars hold", file=sys.stderr)
    return 1 if missed else 0


if __name__ == "__main__":
    sys.exit(main())
