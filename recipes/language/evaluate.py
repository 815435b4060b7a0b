"""Computes the figures of the models in `checkpoints/` again, and compares them with what their cards say.

    python -m recipes.language.evaluate                 # all that is there
    python -m recipes.language.evaluate --only tiny     # some of it

A card is made out of the `figures.json` beside it, so first they must say the same; then the shipped weights are
measured by the code that measured them for the card. A figure may be off by the tolerance that the card states; times
and samples are not compared. Needs the extra `train` and, for the held-out text, the Debian packages that it names if
they are missing. An evaluation that was cut off goes on from its last part; behind one that came to its end, the next
starts afresh.

The exit code is 1 if a figure is off or cannot be computed again because the text here is another one.
"""

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from huggingface_hub import ModelCard
from transformers import AutoTokenizer

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM
from mambaformer.convert import find_smollm2
from recipes.language.card import BITS_PER_BYTE_TOLERANCE, FIGURES, card_of
from recipes.language.distill import MAMBA_DELTA
from recipes.language.hybrid_card import RECALLED, TOLERANCES, hybrid_card
from recipes.language.measure_hybrid import Parts, Plan, measure
from recipes.language.pretrain import parse as settings_of_pretraining
from recipes.language.texts import DOMAINS, collect
from recipes.language.tokens import held_out_windows
from recipes.language.train_expert import TEXTS
from recipes.language.training import evaluate, make_once

FOLDERS = {"tiny": "mambaformer-tiny", "hybrid": "smollm2-hybrid"}


@dataclass(frozen=True)
class Comparison:
    """A figure as it is stated and as it was found."""

    name: str
    stated: float
    found: float
    tolerance: float

    @property
    def holds(self) -> bool:
        return abs(self.found - self.stated) <= self.tolerance  # not so where one of them is NaN

    def __str__(self) -> str:
        stated, found, off = (f"{value:>18,.4f}" for value in (self.stated, self.found, self.found - self.stated))
        return f"{self.name:44s}{stated}{found}{off}  {'' if self.holds else f'OFF by more than {self.tolerance}'}"


HEAD = f"{'figure':44s}{'stated':>18s}{'found':>18s}{'difference':>18s}"


def numbers(figures: dict, tolerances: dict[str, float], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple, float]]:
    """(path, value) of each figure that has a tolerance, by the last name of its path."""
    for name, value in figures.items():
        if isinstance(value, dict):
            yield from numbers(value, tolerances, (*path, name))
        elif name in tolerances:
            yield (*path, name), value


def compare(stated: dict, found: dict, tolerances: dict[str, float], other_text: list[str]) -> list[Comparison]:
    """All figures that both have but those of domains whose text is another one.

    Raises:
        ValueError: one has figures that the other has not.
    """
    before, now = (dict(numbers(figures, tolerances)) for figures in (stated, found))
    if before.keys() != now.keys():
        raise ValueError(f"stated or found, but not both: {sorted(before.keys() ^ now.keys())[:5]}")
    return [
        Comparison(" ".join(path), before[path], now[path], tolerances[path[-1]])
        for path in before
        if not set(path) & set(other_text)
    ]


def card_problems(folder: Path, expected: str) -> list[str]:
    """Where the README.md of a folder is not what `figures.json` makes of it; how its head is laid out is free."""
    found, expected = ModelCard.load(folder / "README.md"), ModelCard(expected)
    scores, expected_scores = (
        [(one.dataset_name, one.metric_name, one.metric_value) for one in card.data.eval_results or []]
        for card in (found, expected)
    )
    problems = [
        f"the model index says {a}, {FIGURES} {b}" for a, b in zip(scores, expected_scores, strict=False) if a != b
    ]
    if len(scores) != len(expected_scores):
        problems.append(f"the model index has {len(scores)} figures, not {len(expected_scores)}")
    lines, expected_lines = (card.text.strip().splitlines() for card in (found, expected))
    for line, expected_line in zip(lines, expected_lines, strict=False):
        if line.rstrip() != expected_line.rstrip():
            problems.append(f"the card says {line!r}, {FIGURES} {expected_line!r}")
    if len(lines) != len(expected_lines):
        problems.append(f"the card has {len(lines)} lines, not {len(expected_lines)}")
    return [f"{folder}: {problem}" for problem in problems]


@dataclass(frozen=True)
class Evaluation:
    """The result for a folder: disagreements of card and figures, domains with other text, old and new figures."""

    problems: list[str]
    other_text: list[str]
    comparisons: list[Comparison]

    @property
    def holds(self) -> bool:
        return not self.is_wrong and not self.other_text

    @property
    def is_wrong(self) -> bool:
        return bool(self.problems) or not all(one.holds for one in self.comparisons)

    @property
    def verdict(self) -> str:
        if self.is_wrong:
            return "NOT all figures hold"
        return "no figure is off, but NOT all could be compared" if self.other_text else "all figures hold"


def evaluate_tiny(folder: Path, args: argparse.Namespace) -> Evaluation:
    """The hybrid that `make pretrain` has trained, on the windows that its card was made with."""
    stated = json.loads((folder / FIGURES).read_text())
    about = stated["hybrid"]
    settings = settings_of_pretraining([])
    vars(settings).update((name, about[name]) for name in vars(settings).keys() & about.keys())
    tokenizer = AutoTokenizer.from_pretrained(folder)
    held_out = {
        domain: held_out_windows(args.texts, domain, tokenizer, about["length"], about["held_out_bytes"])
        for domain in DOMAINS
    }
    model = MambaFormerForCausalLM.from_pretrained(folder, dtype=torch.float32)
    found = evaluate(model, args.run_dir / "tiny", held_out, tokenizer, settings)
    other = [domain for domain in DOMAINS if found[domain]["text"] != about["held_out"][domain]["text"]]
    tolerances = {"bits_per_byte": BITS_PER_BYTE_TOLERANCE, "bytes": 0, "tokens": 0}
    problems = card_problems(folder, card_of(MambaFormerConfig.from_pretrained(folder), stated))
    return Evaluation(problems, other, compare(about["held_out"], found, tolerances, other))


def evaluate_hybrid(folder: Path, args: argparse.Namespace) -> Evaluation:
    """SmolLM2 with the Mamba weights that `make distill` trained, compared with SmolLM2 and with windows alone."""
    stated = json.loads((folder / FIGURES).read_text())
    plan = Plan(**{name: tuple(value) if isinstance(value, list) else value for name, value in stated["plan"].items()})
    parts = Parts(args.run_dir / "hybrid")
    found = measure(args.source or find_smollm2(), folder / MAMBA_DELTA, args.texts, plan, parts)
    other = [domain for domain in DOMAINS if found["text"][domain] != stated["text"][domain]]
    problems = card_problems(folder, hybrid_card(stated))
    comparisons = compare(stated, found, TOLERANCES, other)
    if not other:
        before, now = recalled(stated), recalled(found)
        comparisons += [Comparison(f"all facts {name}", before[name], now[name], RECALLED) for name in before]
    return Evaluation(problems, other, comparisons)


def recalled(figures: dict) -> dict[str, int]:
    """{model: facts that it finds, of all distances and domains}."""
    return {
        name: sum(answers["exact"] for domain in found.values() for answers in domain.values())
        for name, found in figures["recall"].items()
    }


EVALUATIONS = {"tiny": evaluate_tiny, "hybrid": evaluate_hybrid}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=FOLDERS, default=list(FOLDERS))
    parser.add_argument("--models", type=Path, default=Path("checkpoints"), help="where the folders of the models are")
    parser.add_argument("--source", type=Path, help="what the hybrid was made of, if it is not SmolLM2-135M-Instruct")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the domains; made if it is not there")
    parser.add_argument("--run-dir", type=Path, default=Path("runs/eval"), help="where an evaluation keeps its parts")
    args = parser.parse_args(argv)
    missing = [str(args.models / FOLDERS[name]) for name in args.only if not (args.models / FOLDERS[name]).is_dir()]
    if missing:
        parser.error(f"there is no {', no '.join(missing)}: train it first, or name by --only what is there")
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    make_once(args.texts, collect)
    holds = True
    for name in args.only:
        result = EVALUATIONS[name](args.models / FOLDERS[name], args)
        print(f"\n{FOLDERS[name]}\n{HEAD}")
        print(*result.comparisons, *result.problems, sep="\n")
        for domain in result.other_text:
            print(f"{domain}: the text here is not the one of the card (other versions of its sources): not compared")
        print(result.verdict)
        holds &= result.holds
        shutil.rmtree(args.run_dir / name, ignore_errors=True)
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
