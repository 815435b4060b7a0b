"""Publishes the pretrained models: learning curves, the model card, and the tolerance of its figures."""

import json
from pathlib import Path

from huggingface_hub import EvalResult, ModelCardData

from recipes.language.texts import DOMAINS, HELD_OUT_EVERY, SOURCES
from recipes.language.training import write_json, write_text

FIGURES = "figures.json"  # in a model's folder: all that its card says in numbers
CURVES = "curves.png"
BITS_PER_BYTE_TOLERANCE = 0.001  # other processors and threads sum in another order

CARD = """
# mambaformer-tiny

A hybrid of Mamba and attention with {parameters:,} parameters, trained from scratch on the King James Bible, Python's
standard library, and Debian's manual pages and books: `make pretrain` of MambaFormer for Transformers. It is meant for
tests and demos that need a trained Mamba; as a language model it is far too small to be of use, and it has never seen
more than {length} tokens at once.

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
ids = tokenizer("And it came to pass", return_tensors="pt").input_ids
print(tokenizer.decode(model.generate(ids, max_new_tokens=60, do_sample=True, temperature=0.8, top_p=0.95)[0]))
```

## Held-out bits per byte

| domain | bytes | {heads} |
|---|---|{lines}|
{rows}

All are the saved bfloat16 weights, computed in float32. Documents that were never trained on (every {every}th chapter,
source file or manual page), in windows of {length} tokens that overlap by half: each token is scored once, behind
at least {half} others; ends of text are scored too, and have no bytes. `make eval` computes the hybrid's figures again
from the weights in this folder, and fails if one is off by more than {tolerance}; the text is that of Debian packages,
which it names if they are missing.

{comparison}

## Training

{tokens:,} tokens ({epochs} passes) in {steps:,} steps of {batch} x {length} tokens, in the same order for all models,
in float32 on a CPU. AdamW (betas 0.9 and 0.95, weight decay 0.1, none on norms, biases, `A_log` and `D`), gradients
clipped at norm 1, learning rates {rates}, cosine to zero behind a warm-up of 5 %, seed {seed}. The tokenizer is
a byte-level BPE of {vocab:,} tokens, trained on the same text.

Layers: {layers}, each with a gated MLP; RoPE; embedding tied to the head.

![loss and held-out bits per byte against tokens]({curves})

## Sources

| source | domain | licence |
|---|---|---|
{sources}
"""


def plot_curves(runs: Path, results: dict[str, dict], path: Path) -> None:
    """A panel for the loss while training and one for the held-out bits per byte of each domain."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    panels = {"loss": "training loss (nats a token)"}
    panels |= {f"eval_{domain}_bits_per_byte": f"{domain}: held-out bits per byte" for domain in DOMAINS}
    figure, axes = pyplot.subplots(1, len(panels), figsize=(4 * len(panels), 3.5))
    for (key, title), axis in zip(panels.items(), axes, strict=True):
        for arch, found in results.items():
            log = [entry for entry in json.loads((runs / arch / "log.json").read_text()) if key in entry]
            axis.plot(
                [entry["step"] * found["batch_size"] * found["length"] for entry in log],
                [entry[key] for entry in log],
                marker="" if key == "loss" else "o",
                label=f"{arch}, {found['parameters'] / 1e6:.2f}M",
            )
        axis.set(title=title, xlabel="tokens")
        axis.grid(alpha=0.3)
        axis.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def write_card(folder: Path, config, results: dict[str, dict]) -> None:
    """Writes the README.md of the hybrid, and the figures of every architecture in `results` to the same folder."""
    write_json(folder / FIGURES, results)
    write_text(folder / "README.md", card_of(config, results))


def card_of(config, results: dict[str, dict]) -> str:
    """The text of that README.md."""
    about = results["hybrid"]
    by_arch = {arch: found["held_out"] for arch, found in results.items()}
    rows = [
        f"| {domain} | {about['held_out'][domain]['bytes']:,} | "
        + " | ".join(f"{found[domain]['bits_per_byte']:.4f}" for found in by_arch.values())
        + " |"
        for domain in DOMAINS
    ]
    sources = [f"| {source.name} | {source.domain} | {source.licence} |" for source in SOURCES]
    text = CARD.format(
        parameters=about["parameters"],
        heads=" | ".join(f"{arch} ({found['parameters']:,} parameters)" for arch, found in results.items()),
        lines="|".join("---" for _ in results),
        rows="\n".join(rows),
        every=HELD_OUT_EVERY,
        half=about["length"] // 2,
        comparison=_comparison(by_arch),
        steps=about["max_steps"],
        batch=about["batch_size"],
        rates=", ".join(f"{found['learning_rate']:g} ({arch})" for arch, found in results.items()),
        vocab=config.vocab_size,
        layers=", ".join(f"`{kind}`" for kind in config.layer_types),
        sources="\n".join(sources),
        curves=CURVES,
        tolerance=BITS_PER_BYTE_TOLERANCE,
        **{name: about[name] for name in ("tokens", "epochs", "length", "seed")},
    )
    scores = [
        score(domain, "bits_per_byte", "bits per byte", about["held_out"][domain]["bits_per_byte"])
        for domain in DOMAINS
    ]
    return front_matter("mambaformer-tiny", scores, metrics=["bits_per_byte"]) + text


def _comparison(scores: dict[str, dict]) -> str:
    if "llama" not in scores:
        return ""
    ratios = [
        f"{domain} {scores['hybrid'][domain]['bits_per_byte'] / scores['llama'][domain]['bits_per_byte'] - 1:+.1%}"
        for domain in DOMAINS
    ]
    return f"The hybrid against the Llama: {', '.join(ratios)} (less is better)."


def score(domain: str, metric: str, name: str, value: float) -> EvalResult:
    """A figure on the held-out text of a domain, as the Hub reads it."""
    return EvalResult(
        task_type="text-generation",
        dataset_type=f"{domain}-held-out",
        dataset_name=f"held-out {domain}",
        metric_type=metric,
        metric_name=name,
        metric_value=round(value, 4),
    )


def front_matter(name: str, scores: list[EvalResult], **own) -> str:
    """The head of a card for the model of that name, between its lines of dashes."""
    shared = {
        "language": "en",
        "license": "apache-2.0",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mamba", "attention", "hybrid", "ssm", "custom_code"],
    }
    data = ModelCardData(**shared | own, model_name=name, eval_results=scores)
    return f"---\n{data.to_yaml()}\n---\n"
