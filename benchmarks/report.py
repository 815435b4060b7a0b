"""What was found: rows with their bars, points of a curve, and the files they are written to."""

import json
import operator
import os
import platform
import statistics
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path

import torch

from mambaformer.ops_cpu_interface_mambaformer import kernels

PACKAGES = ("torch", "transformers", "torchao", "llama-cpp-python")
HOLDS, MISSED = "holds", "**MISSED**"
SIGNS = {">=": operator.ge, "<=": operator.le}
PLOTS = {"prefill": "seconds of a prefill", "decode": "seconds a token", "cache": "bytes of the cache"}


@dataclass(frozen=True)
class Bar:
    """What the median of a row's ratios has to reach."""

    sign: str
    value: float

    def __str__(self) -> str:
        return f"{self.sign} {self.value:.2f}"

    def holds(self, ratio: float) -> bool:
        return SIGNS[self.sign](ratio, self.value)


def at_least(value: float) -> Bar:
    return Bar(">=", value)


def at_most(value: float) -> Bar:
    return Bar("<=", value)


@dataclass(frozen=True)
class Row:
    """One line of the table.

    Args:
        ours, against: medians, in words.
        ratios: one for each round; what they are the ratio of, `what` says.
        problem: why there is nothing to tell: a peer is missing, or the case has failed.
    """

    what: str
    ours: str = ""
    against: str = ""
    ratios: list[float] = field(default_factory=list)
    bar: Bar | None = None
    note: str = ""
    problem: str = ""

    @property
    def ratio(self) -> float | None:
        return statistics.median(self.ratios) if self.ratios else None

    @property
    def verdict(self) -> str:
        if self.problem or self.bar is None:
            return self.problem
        return HOLDS if self.bar.holds(self.ratio) else MISSED


@dataclass(frozen=True)
class Point:
    """One value of a curve over the context; `skipped` says why there is none."""

    kind: str
    family: str
    series: str
    rows: int
    context: int
    value: float | None = None
    skipped: str = ""


@dataclass(frozen=True)
class Case:
    """Something to measure: `run` yields rows and points. `bars` is what the table shows if it cannot run."""

    name: str
    title: str
    run: Callable[..., Iterator[Row | Point]]
    bars: str = ""
    needs: tuple[str, ...] = ()


def milliseconds(seconds: float) -> str:
    return f"{1e3 * seconds:.1f} ms"


def megabytes(nbytes: float) -> str:
    return f"{nbytes / 1e6:.1f} MB"


# ---- what it was measured on


def machine() -> dict[str, object]:
    return {
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "kernels": "compiled" if kernels() else "none, all is computed by PyTorch",
        "system": f"{platform.system()} {platform.machine()}",
        "python": platform.python_version(),
        "packages": {name: _version(name) for name in PACKAGES},
        "commit": _commit(),
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _version(package: str) -> str:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return "missing"


def _commit() -> str:
    command = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return "unknown"


# ---- files


class Results:
    """`results.json` of a folder, and the table and plots made from it; a case that runs again replaces its rows."""

    def __init__(self, folder: Path, cases: list[Case]):
        self.folder, self.cases = folder, cases
        self.path = folder / "results.json"
        self.found: dict[str, dict] = json.loads(self.path.read_text())["cases"] if self.path.exists() else {}

    def add(self, case: Case, found: list[Row | Point], **about) -> None:
        """Takes in a case and writes all files."""
        rows = [
            {**asdict(item), "ratio": item.ratio, "verdict": item.verdict} for item in found if isinstance(item, Row)
        ]
        points = [asdict(item) for item in found if isinstance(item, Point)]
        self.found[case.name] = {**about, "rows": rows, "points": points}
        self.write()

    def write(self) -> None:
        self.folder.mkdir(parents=True, exist_ok=True)
        self.found = {case.name: self.found[case.name] for case in self.cases if case.name in self.found}
        self.path.write_text(json.dumps({"cases": self.found}, indent=1) + "\n")
        (self.folder / "RESULTS.md").write_text(self._text(self._plot()))

    def rows(self) -> dict[str, list[Row]]:
        """Rows of all cases that have run, by the case's name."""
        return {name: [_row(entry) for entry in found["rows"]] for name, found in self.found.items()}

    def points(self) -> list[Point]:
        return [Point(**entry) for found in self.found.values() for entry in found["points"]]

    def _plot(self) -> list[str]:
        points = self.points()
        kinds = [kind for kind in PLOTS if any(point.kind == kind and not point.skipped for point in points)]
        try:
            return [plot(points, kind, self.folder / f"{kind}.png").name for kind in kinds]
        except ImportError:
            return []

    def _text(self, plots: list[str]) -> str:
        points = self.points()
        parts = [
            INTRODUCTION,
            *([TOYS] if any(found["quick"] for found in self.found.values()) else []),
            "\n".join(_about(self.found)),
            "\n".join(self._table()),
            *_notes(self.rows()),
        ]
        parts += [f"![{PLOTS[Path(name).stem]} against the context]({name})" for name in plots]
        if points and not plots:
            parts.append("No plots: matplotlib is missing.")
        parts += ["\n".join(_curves(points, kind)) for kind in PLOTS if any(point.kind == kind for point in points)]
        return "\n\n".join(filter(None, parts)) + "\n"

    def _table(self) -> list[str]:
        lines = ["| case | what | ours | against | median (least to most) | bar | |", "|---|---|---|---|---|---|---|"]
        found = self.rows()
        for case in self.cases:
            for row in found.get(case.name, [Row(case.title, problem="not run")]):
                bar = str(row.bar or (case.bars if row.what == case.title else ""))
                cells = (case.name, row.what, row.ours, row.against, _spread(row), bar, row.verdict)
                lines.append(f"| {' | '.join(cells)} |")
        return lines


INTRODUCTION = """# Measured

Made by `make bench`, one case after the other. What a row compares ran in one process, in rounds that alternate. Times
are medians, the ratio is the median of the rounds' ratios, and behind it are the least and the most of them. A bar
that was not reached is MISSED. "x as fast" is the other's time over ours; a share or a cost is named as such. Ours and
Transformers' models have equal weights, and where a row has a bar in float32, their logits were compared first.

A curve ends where the next point would take too long or too much memory; its decoding starts from keys that mean
nothing, which cost what any others would."""
TOYS = "**Toy sizes and single rounds (`--quick`): this shows that the cases run, and says nothing about speed.**"


def _row(entry: dict) -> Row:
    known = {name: value for name, value in entry.items() if name not in ("ratio", "verdict")}
    return Row(**{**known, "bar": Bar(**entry["bar"]) if entry["bar"] else None})


def _spread(row: Row) -> str:
    if not row.ratios:
        return ""
    spread = f" ({min(row.ratios):.2f} to {max(row.ratios):.2f})" if len(row.ratios) > 1 else ""
    return f"{row.ratio:.3f}{spread}"


def _about(found: dict[str, dict]) -> list[str]:
    """A line for each machine and state of the code that rows were measured on."""
    seen: dict[str, list[tuple[str, dict]]] = {}
    for name, entry in found.items():
        seen.setdefault(json.dumps(entry["machine"], sort_keys=True), []).append((name, entry))
    lines = []
    for entries in seen.values():
        about = entries[0][1]["machine"]
        packages = ", ".join(f"{name} {version}" for name, version in about["packages"].items())
        speeds = [entry["bandwidth"] / 1e9 for _, entry in entries]
        which = "All cases" if len(seen) == 1 else ", ".join(name for name, _ in entries)
        minutes = sum(entry["seconds"] for _, entry in entries) / 60
        lines.append(
            f"- {which}: {about['cpu']}, {about['cores']} cores, {about['threads']} threads, {about['system']}, "
            f"Python {about['python']}, {packages}; CPU kernels: {about['kernels']}; memory reads {min(speeds):.1f} "
            f"to {max(speeds):.1f} GB/s; commit {about['commit']}; {minutes:.0f} minutes."
        )
    return lines


def _notes(found: dict[str, list[Row]]) -> list[str]:
    noted = dict.fromkeys(f"- {name}: {row.note}" for name, rows in found.items() for row in rows if row.note)
    return ["\n".join(noted)] if noted else []


def _curves(points: list[Point], kind: str) -> list[str]:
    """A table with a line for each model and batch and a column for each context."""
    points = [point for point in points if point.kind == kind]
    contexts = sorted({point.context for point in points})
    lines = [f"| {PLOTS[kind]} | {' | '.join(f'{context:,}' for context in contexts)} |"]
    lines.append("|---" * (len(contexts) + 1) + "|")
    for name in dict.fromkeys((point.family, point.series, point.rows) for point in points):
        by_context = {point.context: point for point in points if (point.family, point.series, point.rows) == name}
        cells = [_cell(by_context.get(context)) for context in contexts]
        lines.append(f"| {name[0]}, {name[1]}, batch {name[2]} | {' | '.join(cells)} |")
    return lines


def _cell(point: Point | None) -> str:
    if point is None:
        return ""
    if point.skipped:
        return f"skipped: {point.skipped}"
    return megabytes(point.value) if point.kind == "cache" else f"{point.value:.4g} s"


def plot(points: list[Point], kind: str, path: Path) -> Path:
    """A panel for each family, a line for each series and batch."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    points = [point for point in points if point.kind == kind and not point.skipped]
    families = list(dict.fromkeys(point.family for point in points))
    figure, panels = pyplot.subplots(1, len(families), figsize=(5 * len(families), 4), squeeze=False)
    for family, panel in zip(families, panels[0], strict=True):
        lines: dict[tuple[str, int], list[Point]] = {}
        for point in points:
            if point.family == family:
                lines.setdefault((point.series, point.rows), []).append(point)
        for (series, rows), line in lines.items():
            style = {
                "color": "tab:blue" if series == "ours" else "tab:orange",
                "linestyle": "-" if rows == 1 else "--",
            }
            values = [point.value for point in line]
            panel.plot([point.context for point in line], values, marker="o", label=f"{series}, batch {rows}", **style)
        panel.set(title=family, xlabel="context", ylabel=PLOTS[kind], xscale="log", yscale="log")
        panel.grid(alpha=0.3)
        panel.legend()
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)
    return path
