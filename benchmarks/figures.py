"""Figures of `make bench-memory`: values with their bars, the file that keeps them, the tables and the plot."""

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

from report import HOLDS, MISSED, Bar, at_least, at_most

START, END = "<!-- bench-memory: start -->", "<!-- bench-memory: end -->"
PLOT = "memory.png"


@dataclass(frozen=True)
class Figure:
    """One measured value.

    Args:
        unit: printed behind the value, such as "x", " %" or " MB".
        bar: a bound that the value has to keep, `at_most(...)` or `at_least(...)`.
        note: a few words for the table.
    """

    value: float
    unit: str = ""
    bar: Bar | None = None
    note: str = ""

    @property
    def verdict(self) -> str:
        if self.bar is None:
            return ""
        return HOLDS if math.isfinite(self.value) and self.bar.holds(self.value) else MISSED

    def __str__(self) -> str:
        value = f"{self.value:,.0f}" if abs(self.value) >= 1000 else f"{self.value:.4g}"
        return f"{value}{self.unit}"


# A case measures some figures; a plain number has no unit and no bar. The first line of its docstring is its title.
# Cases that compare storages call their figures "bytes" (a ratio to dense storage) and "loss" (per cent): the plot
# shows these two.
MemoryCase: TypeAlias = Callable[[], Mapping[str, "Figure | float"]]


def title_of(case: MemoryCase) -> str:
    return (case.__doc__ or "").strip().partition("\n")[0].rstrip(".")


class MemoryResults:
    """`memory.json` of a folder; a case that runs again replaces its figures.

    Args:
        cases: all cases by name, in the order of the table.
        page: the page whose text between two marks is the table.
    """

    def __init__(self, folder: Path, cases: Mapping[str, MemoryCase], page: Path):
        self.cases, self.page, self.path = cases, page, folder / "memory.json"
        self.found: dict[str, dict] = json.loads(self.path.read_text()) if self.path.exists() else {}

    def add(self, name: str, figures: Mapping[str, Figure | float], **about: object) -> None:
        """Takes in the figures of a case and writes all files."""
        as_figures = {what: each if isinstance(each, Figure) else Figure(each) for what, each in figures.items()}
        self.found[name] = {
            "title": title_of(self.cases[name]),
            **about,
            "figures": {what: asdict(each) | {"verdict": each.verdict} for what, each in as_figures.items()},
        }
        self.write()

    def write(self) -> None:
        self.found = {name: self.found[name] for name in self.cases if name in self.found}
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self.path.write_text(json.dumps(self.found, indent=1) + "\n")
        if not self.page.exists():
            return
        text = self.page.read_text()
        before, mark, rest = text.partition(START)
        after = rest.partition(END)[2]
        if mark:
            self.page.write_text(f"{before}{START}\n{self.text()}\n{END}{after}")

    def figures(self, name: str) -> dict[str, Figure]:
        return {what: _figure(entry) for what, entry in self.found.get(name, {}).get("figures", {}).items()}

    def missed(self, names: list[str]) -> list[str]:
        """The figures of these cases that miss their bars."""
        figures = [(name, what, figure) for name in names for what, figure in self.figures(name).items()]
        return [
            f"{name}, {what}: {figure}, not {figure.bar}" for name, what, figure in figures if figure.verdict == MISSED
        ]

    def text(self) -> str:
        lines = ["| case | figure | measured | bar | |", "|---|---|---|---|---|"]
        for name, case in self.cases.items():
            label = f"{title_of(case) or name} (`{name}`)"
            for what, figure in self.figures(name).items():
                bar = "" if figure.bar is None else f"{figure.bar}{figure.unit}"
                remark = "; ".join(filter(None, (figure.verdict, figure.note)))
                lines.append(f"| {label} | {what} | {figure} | {bar} | {remark} |")
                label = ""
            if name not in self.found:
                lines.append(f"| {label} | | not run | | |")
        parts = ["\n".join(lines), _about(self.found)]
        image = self._plot()
        if image is not None:
            parts.insert(1, f"![loss against bytes of each storage](../benchmarks/{image.name})")
        return "\n\n".join(filter(None, parts))

    def _plot(self) -> Path | None:
        points = {name: self.figures(name) for name in self.found}
        points = {name: figures for name, figures in points.items() if {"bytes", "loss"} <= figures.keys()}
        if not points:
            return None
        try:
            return plot_losses(points, self.path.parent / PLOT)
        except ImportError:  # no matplotlib: the earlier plot stays
            path = self.path.parent / PLOT
            return path if path.exists() else None


def _figure(entry: dict) -> Figure:
    known = {name: value for name, value in entry.items() if name != "verdict"}
    return Figure(**{**known, "bar": Bar(**entry["bar"]) if entry["bar"] else None})


def _about(found: dict[str, dict]) -> str:
    """A line for each machine and state of the code that cases were measured on."""
    cases: dict[str, list[str]] = {}
    for name, entry in found.items():
        machine = entry["machine"]
        packages = ", ".join(f"{package} {version}" for package, version in machine["packages"].items())
        line = f"{machine['cpu']}, {machine['threads']} threads, Python {machine['python']}, {packages}"
        cases.setdefault(f"{line}; commit {machine['commit']}", []).append(name)
    return "\n".join(f"- {', '.join(names)}: {line}." for line, names in cases.items())


def plot_losses(points: Mapping[str, Mapping[str, Figure]], path: Path) -> Path:
    """Loss against bytes, a point for each case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, panel = pyplot.subplots(figsize=(7, 5))
    for name, figures in points.items():
        x, y = figures["bytes"].value, figures["loss"].value
        panel.plot([x], [y], marker="o", linestyle="")
        panel.annotate(name, (x, y), textcoords="offset points", xytext=(5, 4), fontsize=8)
    panel.set(xlabel="bytes, of dense storage in float32", ylabel="loss, per cent more", xscale="log")
    panel.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path


__all__ = ["Figure", "MemoryCase", "MemoryResults", "at_least", "at_most"]
