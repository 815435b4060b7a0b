"""Tables and plots of `measure_posterior`."""

import statistics
from dataclasses import dataclass
from pathlib import Path

import torch

from recipes.language.measures import calibration_error

START, END = "<!-- eval-posterior: start -->", "<!-- eval-posterior: end -->"
CALIBRATED_AFTER = (1, 2, 4, 8, 16, 32, 64)  # tokens, whose top probabilities are judged together
BINS = 10
RELIABILITY, SWITCH = "reliability.png", "subject-change.png"


@dataclass(frozen=True)
class Line:
    """A figure with its bar; `most` says whether the bar is an upper bound."""

    what: str
    value: float
    bar: float
    unit: str = ""
    most: bool = True

    @property
    def holds(self) -> bool:
        return self.value <= self.bar if self.most else self.value >= self.bar

    def __str__(self) -> str:
        sign, verdict = ("<=" if self.most else ">="), "holds" if self.holds else "missed"
        return f"| {self.what} | {self.value:.3g}{self.unit} | {sign} {self.bar:g}{self.unit} | {verdict} |"


def _binned(top: list[float], is_right: list[bool], bins: int) -> list[tuple[list[float], list[bool]]]:
    found: dict[int, tuple[list[float], list[bool]]] = {}
    for probability, hit in zip(top, is_right, strict=True):
        probabilities, hits = found.setdefault(min(int(probability * bins), bins - 1), ([], []))
        probabilities.append(probability)
        hits.append(hit)
    return [found[number] for number in sorted(found)]


def lines_of(found: dict) -> list[Line]:
    accuracy, mixture, cost = found["decisions"]["accuracy"], found["mixture"], found["cost"]
    top, is_right = (torch.tensor(found["decisions"][name]) for name in ("top", "is_right"))
    error = calibration_error(top, is_right, BINS)
    changes = {
        name: statistics.fmean(each[name] for each in found["changes"].values()) for name in found["changes"]["0"]
    }
    bars = {"16": 85, "32": 92, "64": 95}
    decided = [
        Line(
            f"the most probable vector is the best in hindsight, after {n} tokens", 100 * accuracy[n], bar, " %", False
        )
        for n, bar in bars.items()
    ]
    return [
        *decided,
        Line(f"expected calibration error, after {CALIBRATED_AFTER[0]} to {CALIBRATED_AFTER[-1]} tokens", error, 0.05),
        Line("mixture above the best vector of each text", mixture["mixture"] - mixture["best vector"], 0.01, " nats"),
        Line("change of subject: switching above the best vector", changes["switching"] - changes["best vector"], 0.0,
             " nats"),
        Line("change of subject: switching above who knows the change",
             changes["switching"] - changes["who knows the change"], 0.02, " nats"),
        Line("choose among 6: prefill of 512 tokens", cost["prefill"], 6.5, "x"),
        Line("choose among 6, `drop_below=0.01`: prefill", cost["prefill with `drop_below=0.01`"], 6.5, "x"),
        Line("choose among 6: a token after it", cost["token"], 1.05, "x"),
    ]  # fmt: skip


def write_report(found: dict, output: Path, page: Path) -> list[str]:
    """Writes plots to `output` and the tables between the marks of `page`; returns the lines that miss their bars."""
    lines = lines_of(found)
    table = ["| figure | measured | bar | |", "|---|---|---|---|", *map(str, lines)]
    domains = [
        "| domain | texts | right after 16 | 32 | 64 | mixture - best vector | mixture - base |",
        "|" + "---|" * 7,
    ]
    for name, number in found["texts"].items():
        accuracy, nats = found["by_domain"][name], found["mixture_by_domain"][name]
        shares = " | ".join(f"{100 * accuracy[n]:.0f} %" for n in ("16", "32", "64"))
        gains = [nats["mixture"] - nats[other] for other in ("best vector", "base")]
        domains.append(f"| {name} | {number} | {shares} | {gains[0]:+.4f} | {gains[1]:+.3f} |")
    plots = [plot_reliability(found["decisions"], output / RELIABILITY), plot_switch(found, output / SWITCH)]
    images = [f"![{path.stem}](../recipes/language/{path.name})" for path in plots]
    text = "\n\n".join(["\n".join(table), "\n".join(domains), *images])
    before, mark, rest = page.read_text().partition(START)
    if mark:
        page.write_text(f"{before}{START}\n{text}\n{END}{rest.partition(END)[2]}")
    return [str(line) for line in lines if not line.holds]


def plot_reliability(decisions: dict, path: Path) -> Path:
    """Share of hits against the probability of the most probable vector."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(4.5, 4.5))
    bins = _binned(decisions["top"], decisions["is_right"], BINS)
    x, y = ([statistics.fmean(each[n]) for each in bins] for n in (0, 1))
    panel.plot([0, 1], [0, 1], color="grey", linewidth=0.8)
    panel.plot(x, y, marker="o")
    panel.set(xlabel="probability of the most probable vector", ylabel="share of texts where it is the best")
    return _saved(figure, path)


def plot_switch(found: dict, path: Path) -> Path:
    """The posterior over the tokens of a text that changes its subject in the middle."""
    pyplot = _pyplot()
    figure, panel = pyplot.subplots(figsize=(8, 3.5))
    for name, values in zip(found["names"], zip(*found["shown"]["probabilities"], strict=True), strict=True):
        panel.plot(values, label=name or "base")
    panel.axvline(len(found["shown"]["probabilities"]) // 2, color="grey", linewidth=0.8)
    one, other = found["shown"]["domains"]
    panel.set(xlabel=f"tokens: {one}, then {other}", ylabel="probability", ylim=(-0.02, 1.02))
    panel.legend(fontsize=8)
    return _saved(figure, path)


def _pyplot():
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _saved(figure, path: Path) -> Path:
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    _pyplot().close(figure)
    return path


__all__ = ["CALIBRATED_AFTER", "lines_of", "write_report"]
