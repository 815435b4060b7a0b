"""Writes the results of all runs of the sweep: EXPERTS.md and experts.png."""

import json
import statistics
from pathlib import Path
from typing import Any

from recipes.language.expert_runs import EXPERT, FIRST_RATES, LORA, RATES, SEED, TRIAL_SEED, Run, Sweep, loss_of_trial
from recipes.language.texts import DOMAINS
from recipes.language.tuners import ALL, FAMILIES

TITLES = {"attention": "attention (q, k, v, o)", "mamba": "Mamba (in, x, dt, out)", "mlp": "MLP (gate, up, down)"}
TITLES |= {ALL: "all modules"}
INTRODUCTION = """# Experts on a hybrid: what each family of modules and each rank is worth

Made by `make experts-sweep`. An expert of rank r scales the r largest singular values of each matrix: r numbers, where
a LoRA of rank 1 takes as many as the matrix has inputs and outputs together. Each LoRA here has, as nearly as whole
matrices allow, the bytes of the expert of all modules in the line above it, both in float32: rank 1 on some matrices,
spread over the model. "File" also counts names and metadata, which outweigh the tensors of small experts.

Gains are nats a token less on held-out text than without an expert (higher is better, below zero it costs), with the
standard error over {held_out_blocks} blocks of {length} tokens, the same for all runs. The weights of `{model}` are
frozen, in {dtype}; what is trained is float32. Every run sees {tokens:,} tokens of its domain: {steps} steps of one
block, in the same order, AdamW without weight decay, gradients clipped at norm 1, a tenth of the steps to warm up,
then half a cosine to zero, seed {seed}. Seconds are of one core, training alone.{left_out}"""
LEFT_OUT = "\nTo save time, single families were trained on {some} alone."
RATES_TEXT = """## How the learning rates were chosen

For both methods in the same way: runs of {trial_steps} steps on `{domain}` with seed {seed}, their loss measured on
{trial_blocks} blocks that are neither trained on nor held out. The search starts at {middle:g} and its two neighbours
on a grid with about three to the decade ({low:g} to {high:g}), and goes on until the best rate has a worse one on
either side, or the grid ends. A LoRA is tried both on attention and on all modules, and the better place is taken.
Experts of a single family take the rate of the expert of all modules of their rank. The base's loss on the same blocks
is {base:.4f}. Bold: what was taken."""
CAPTION = "held-out gain on the own domain, by rank and by bytes; bars are standard errors over blocks"


def write_report(runs: list[Run], sweep: Sweep, folder: Path, output: Path) -> str:
    """Writes EXPERTS.md and experts.png to `output`, of the runs that are done; returns the tables of gains."""
    base = json.loads((folder / "base.json").read_text())
    found = {run: run.result(sweep, folder) for run in runs}
    found = {run: {**result, "gains": gains(result, base)} for run, result in found.items() if result is not None}
    domains = list(dict.fromkeys(run.domain for run in runs))
    tables = "\n\n".join(f"## Trained on {domain}\n\n{_table(domain, found)}" for domain in domains)
    output.mkdir(parents=True, exist_ok=True)
    about = {name: getattr(sweep, name) for name in ("held_out_blocks", "length", "dtype", "tokens", "steps")}
    some = list(dict.fromkeys(run.domain for run in runs if run.family in FAMILIES and run.method == EXPERT))
    left_out = LEFT_OUT.format(some=" and ".join(some)) if some and len(some) < len(domains) else ""
    model = Path(sweep.model).name
    parts = [INTRODUCTION.format(**about, model=model, seed=SEED, left_out=left_out), tables]
    if found:
        plot(found, domains, output / "experts.png")
        parts.append(f"![{CAPTION}](experts.png)")
    parts.append(_rates(runs, sweep, folder, statistics.fmean(base["trial"][domains[0]]), domains[0]))
    (output / "EXPERTS.md").write_text("\n\n".join(parts) + "\n")
    return tables


def gains(result: dict[str, Any], base: dict[str, Any]) -> dict[str, tuple[float, float]]:
    """{domain: (nats a token that the run is better than the base, standard error over blocks)}."""
    pairs = {name: zip(base["held_out"][name], nats, strict=True) for name, nats in result["nats"].items()}
    return {name: _mean([before - after for before, after in blocks]) for name, blocks in pairs.items()}


def _mean(values: list[float]) -> tuple[float, float]:
    error = statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0
    return statistics.fmean(values), error


def _table(domain: str, found: dict[Run, dict]) -> str:
    heads = [
        "trained",
        "rank",
        "numbers",
        "bytes",
        "file",
        "rate",
        *(f"gain on {name}" for name in DOMAINS),
        "seconds",
    ]
    lines = [_row(heads), "|" + "---|" * len(heads)]
    for run, result in sorted(found.items(), key=lambda item: _order(item[0])):
        if run.domain == domain:
            sizes = [f"{result[name]:,}" for name in ("numbers", "bytes", "file_bytes")]
            values = [f"{gain:+.4f} ± {error:.4f}" for gain, error in (result["gains"][name] for name in DOMAINS)]
            seconds = f"{result['training_seconds']:.0f}"
            lines.append(_row([_title(run), _rank(run), *sizes, f"{run.rate:g}", *values, seconds]))
    return "\n".join(lines)


def _order(run: Run) -> tuple:
    """Single families first, then pairs of equal bytes."""
    place = (run.method == LORA or run.family == ALL, list(TITLES).index(run.family) if run.method == EXPERT else 0)
    rank = float("inf") if run.rank is None else run.rank
    return (0, place[1], rank) if not place[0] else (1, rank, run.method == LORA)


def _title(run: Run) -> str:
    return TITLES[run.family] if run.method == EXPERT else f"LoRA on {run.family} of equal bytes"


def _rank(run: Run) -> str:
    if run.method == LORA:
        return "as above"
    return "full" if run.rank is None else str(run.rank)


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _rates(runs: list[Run], sweep: Sweep, folder: Path, base: float, domain: str) -> str:
    """All trials that were made: a line for each search, its losses by rate."""
    taken = {(run.method, run.family, run.rank, run.rate) for run in runs if run.method == LORA or run.family == ALL}
    kinds = [(EXPERT, ALL), (LORA, "attention"), (LORA, ALL)]
    searched = [(method, family, rank) for rank in dict.fromkeys(run.rank for run in runs) for method, family in kinds]
    lines = [_row(["searched", "rank", *(f"{rate:g}" for rate in RATES)]), "|" + "---|" * (len(RATES) + 2)]
    for method, family, rank in searched:
        cells = []
        for rate in RATES:
            result = Run(method, family, rank, domain, rate, is_trial=True).result(sweep, folder)
            cell = "" if result is None else f"{loss_of_trial(result):.4f}"
            cells.append(f"**{cell}**" if (method, family, rank, rate) in taken else cell)
        title = f"expert, {TITLES[ALL]}" if method == EXPERT else f"LoRA on {family}"
        lines.append(_row([title, "full" if rank is None else str(rank), *cells]))
    text = RATES_TEXT.format(
        trial_steps=sweep.trial_steps, trial_blocks=sweep.trial_blocks, domain=domain, seed=TRIAL_SEED, base=base,
        middle=FIRST_RATES[1], low=RATES[0], high=RATES[-1],
    )  # fmt: skip
    return f"{text}\n\n" + "\n".join(lines)


def plot(found: dict[Run, dict], domains: list[str], path: Path) -> None:
    """A column for each domain: gain against rank above, against bytes below; a line for each family and for LoRA."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot, ticker

    sizes = sorted({run.rank for run in found}, key=_size)
    figure, axes = pyplot.subplots(2, len(domains), figsize=(5.5 * len(domains), 8), squeeze=False)
    for domain, (by_rank, by_bytes) in zip(domains, axes.T, strict=True):
        for idx, kind in enumerate((*FAMILIES, ALL, LORA)):
            mine = {run: found[run] for run in found if run.domain == domain and _line(run) == kind}
            mine = dict(sorted(mine.items(), key=lambda item: _size(item[0].rank)))
            if not mine:
                continue
            values, errors = zip(*(result["gains"][domain] for result in mine.values()), strict=True)
            style = {"marker": "o", "capsize": 3, "color": f"C{idx}", "linestyle": "--" if kind == LORA else "-"}
            style["label"] = "LoRA of the bytes of all modules" if kind == LORA else TITLES[kind]
            by_rank.errorbar([sizes.index(run.rank) for run in mine], values, errors, **style)
            by_bytes.errorbar([result["bytes"] for result in mine.values()], values, errors, **style)
        by_rank.set_xticks(range(len(sizes)), ["full" if rank is None else str(rank) for rank in sizes])
        by_rank.set(title=f"trained on {domain}", xlabel="rank of the expert")
        by_bytes.set(xscale="log", xlabel="bytes of what was trained")
        by_bytes.xaxis.set_minor_formatter(ticker.NullFormatter())
        for axis in (by_rank, by_bytes):
            axis.set_ylabel("held-out gain (nats a token)")
            axis.grid(alpha=0.3)
        by_rank.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def _line(run: Run) -> str:
    return LORA if run.method == LORA else run.family


def _size(rank: int | None) -> float:
    return float("inf") if rank is None else rank
