"""Measures the hybrid that `make distill` made of SmolLM2 and SmolLM2 itself, and writes the model card.

    python -m recipes.language.measure_hybrid checkpoints/smollm2-hybrid

Three models, all in bfloat16: the source converted as it is, with windows and Mamba mixers that add nothing, and with
the trained mixers. Figures go to `figures.json` in the folder, and from there to its README.md. Needs the extra
`train` and the Debian packages that it names if they are missing. What is measured is kept part by part in
`runs/measure`; a run that was cut off goes on from there when it is started again.
"""

import argparse
import json
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

from mambaformer import convert
from mambaformer.convert import find_smollm2, load_mamba_delta
from recipes.language.card import FIGURES
from recipes.language.distill import MAMBA_DELTA
from recipes.language.hybrid_card import write_hybrid_card
from recipes.language.measures import (
    BEFORE,
    answer,
    cache_behind,
    losses_by_length,
    make_facts,
    recall,
    seconds_of_steps,
    tokens_computed,
)
from recipes.language.texts import DOMAINS, collect
from recipes.language.train_expert import TEXTS, blocks_of_split
from recipes.language.training import digest, make_once, write_json

MODELS = ("original", "untrained", "trained")
QUESTIONS = (
    "Tell me about a shepherd and his son.",
    "Explain in three sentences why the sky is blue.",
    "Write a Python function that returns the largest number of a list.",
)
ABOUT_A_TEXT = "Here is a text.\n\n{}\n\nWhat is this text about? Answer in two sentences."


@dataclass(frozen=True)
class Plan:
    """The measurements.

    Args:
        lengths: tokens of the windows that text is cut into.
        windows: of the longest length, in each domain.
        distances: tokens between a fact and the question for it.
        texts: with a fact at each distance, in each domain.
        rounds: of decoding steps behind the longest window.
        sample_tokens: of each sampled answer.
        context: tokens of the text that the last sample is about.
    """

    lengths: tuple[int, ...] = (512, 2048, 4096, 8192)
    windows: int = 2
    distances: tuple[int, ...] = (200, 500, 1000, 2000, 4000, 6000)
    texts: int = 4
    rounds: int = 7
    sample_tokens: int = 60
    context: int = 1500


class Parts:
    """Results that are computed once, each in a file that is named by what it is and by all that it depends on, but
    for the code: remove the folder when that has changed."""

    def __init__(self, folder: Path):
        self.folder = folder

    def __call__(self, name: str, depends_on: list, total: int, compute: Callable[[Callable[[int], object]], object]):
        """`compute` is given what moves a progress bar of `total` tokens."""
        path = self.folder / f"{name}-{digest(depends_on)}.json"
        if not path.exists():
            self.folder.mkdir(parents=True, exist_ok=True)
            with tqdm(total=total, desc=name, unit="token") as bar:
                write_json(path, compute(bar.update))
        return json.loads(path.read_text())


# ---- measurements


def models_of(source: Path, mamba_delta: Path) -> tuple[dict[str, PreTrainedModel], object]:
    """The three models, in bfloat16, and their tokenizer, from a folder or a GGUF file."""
    of_file = {"gguf_file": source.name} if source.is_file() else {}
    folder = source.parent if of_file else source
    loaded = AutoModelForCausalLM.from_pretrained(folder, **of_file)
    models = {"original": convert(loaded, dtype=torch.bfloat16)}
    models |= {
        name: convert(loaded, mamba_delta=mamba_delta, dtype=torch.bfloat16) for name in ("untrained", "trained")
    }
    with torch.no_grad():
        for layer in models["untrained"].model.layers:
            if layer.spec.is_recurrent:
                layer.mamba.out_proj.weight.zero_()
    return models, AutoTokenizer.from_pretrained(folder, **of_file)


def held_out(texts: Path, domain: str, tokenizer, length: int, count: int) -> Tensor:
    """(count, length): parts of the held-out documents of a domain, one behind the other, spread over all of them.

    Raises:
        ValueError: there is less text.
    """
    blocks = blocks_of_split(texts, domain, "held_out", tokenizer, length)
    if len(blocks) < count:
        raise ValueError(f"the held-out text of {domain!r} has {len(blocks)} parts of {length} tokens, not {count}")
    return torch.tensor(blocks.select([i * len(blocks) // count for i in range(count)])["input_ids"])


def measure(source: Path, mamba_delta: Path, texts: Path, plan: Plan, parts: Parts) -> dict:
    """All figures; see `hybrid_card` for what they look like."""
    models, tokenizer = models_of(source, mamba_delta)
    keys = {name: [*model.weights_fingerprint()[1:], model.config.to_json_string()] for name, model in models.items()}
    windows, stories = {}, {}
    for domain in DOMAINS:
        windows[domain] = held_out(texts, domain, tokenizer, max(plan.lengths), plan.windows)
        stories[domain] = held_out(texts, domain, tokenizer, BEFORE + max(plan.distances), plan.texts)
    figures = {
        "plan": asdict(plan),
        "made_of": dict(load_mamba_delta(mamba_delta).metadata),
        "layers": models["trained"].config.layer_types,
        "window": [models["trained"].config.sliding_window, models["trained"].config.num_sink_tokens],
        "block_parameters": sum(t.numel() for t in load_mamba_delta(mamba_delta).tensors.values()),
        "text": {domain: digest([windows[domain].tolist(), stories[domain].tolist()]) for domain in DOMAINS},
        "loss": {name: {} for name in models},
        "recall": {name: {} for name in models},
    }
    for name, model in models.items():
        for domain in DOMAINS:
            figures["loss"][name][domain] = of_loss(parts, name, model, keys[name], domain, windows[domain], plan)
            figures["recall"][name][domain] = of_recall(
                parts, name, model, keys[name], domain, stories[domain], tokenizer, plan
            )
    figures["cache"] = of_cache(parts, models, keys, windows["manual"][0], plan)
    figures["samples"] = of_samples(parts, models, keys, stories["manual"][0], tokenizer, plan)
    return figures


def of_loss(parts: Parts, name: str, model, key: list, domain: str, windows: Tensor, plan: Plan) -> dict:
    """{length: {"nats", "second_half"}} of one model on one domain."""
    text, lengths = windows.flatten(), plan.lengths
    depends_on = [key, text.tolist(), lengths]
    total = tokens_computed(len(text), lengths)
    return parts(f"loss-{name}-{domain}", depends_on, total, lambda bar: losses_by_length(model, text, lengths, bar))


def of_recall(parts: Parts, name: str, model, key: list, domain: str, texts: Tensor, tokenizer, plan: Plan) -> dict:
    """{distance: {"exact", "asked", "answer_nats"}} of one model on one domain."""
    facts = [make_facts(tokenizer, len(plan.distances), number) for number in range(len(texts))]
    depends_on = [key, texts.tolist(), plan.distances, [[fact.tokens for fact in of_text] for of_text in facts]]

    def compute(bar) -> dict:
        found = []
        for text, of_text in zip(texts, facts, strict=True):
            found.append(recall(model, text, of_text, plan.distances))
            bar(len(text))
        return {
            distance: {
                "exact": sum(answers[distance]["exact"] for answers in found),
                "asked": len(found),
                "answer_nats": sum(answers[distance]["answer_nats"] for answers in found) / len(found),
            }
            for distance in plan.distances
        }

    return parts(f"recall-{name}-{domain}", depends_on, texts.numel(), compute)


def of_cache(parts: Parts, models: dict, keys: dict, text: Tensor, plan: Plan) -> dict:
    """{model: {"bytes", "step_seconds"}} behind a text."""

    def compute(bar) -> dict:
        caches = {}
        for name, model in models.items():
            caches[name] = cache_behind(model, text)
            bar(len(text))
        sizes = {name: cache.nbytes for name, cache in caches.items()}
        seconds = seconds_of_steps(models, caches, plan.rounds)
        return {name: {"bytes": sizes[name], "step_seconds": seconds[name]} for name in models}

    return parts("cache", [keys, text.tolist(), plan.rounds], len(models) * len(text), compute)


def of_samples(parts: Parts, models: dict, keys: dict, text: Tensor, tokenizer, plan: Plan) -> list[dict]:
    """[{"question", "answers": {model: ...}}]; the last question is about a text, which is left out here."""
    long_question = ABOUT_A_TEXT.format(tokenizer.decode(text[: plan.context]))
    questions = dict(zip(QUESTIONS, QUESTIONS, strict=True))
    questions[ABOUT_A_TEXT.format(f"[{plan.context:,} tokens of {DOMAINS[-1]} text]")] = long_question

    def compute(bar) -> list[dict]:
        samples = [{"question": shown, "answers": {}} for shown in questions]
        for sample, question in zip(samples, questions.values(), strict=True):
            for name, model in models.items():
                sample["answers"][name] = answer(model, tokenizer, question, plan.sample_tokens)
                bar(plan.sample_tokens)
        return samples

    total = len(questions) * len(models) * plan.sample_tokens
    return parts("samples", [keys, list(questions.values()), plan.sample_tokens], total, compute)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help=f"where {MAMBA_DELTA} is, and figures and card are put")
    parser.add_argument("--source", type=Path, help="a folder or GGUF file; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the domains; made if it is not there")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/measure"), help="where parts are kept")
    parser.add_argument("--card-only", action="store_true", help="only rewrite the card from the existing figures")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None, plan: Plan | None = None) -> None:
    args = parse(argv)
    path = args.folder / FIGURES
    if not args.card_only:
        make_once(args.texts, collect)
        source = args.source or find_smollm2()
        figures = measure(source, args.folder / MAMBA_DELTA, args.texts, plan or Plan(), Parts(args.run_dir))
        write_json(path, figures)
    write_hybrid_card(args.folder, json.loads(path.read_text()))
    print(f"wrote {path} and {args.folder / 'README.md'}")


if __name__ == "__main__":
    main()
