"""`make bench-memory`: bytes, losses and times of the storages of a cache, one case after the other.

    python benchmarks/memory.py                      # all cases
    python benchmarks/memory.py --only dense-8k      # these cases; the figures of others stay as they are
    python benchmarks/memory.py --missing            # the cases without figures

Writes `memory.json`, the plot `memory.png` and the table in `docs/results.md` after each case, so a run that is cut
off continues with `--missing`. The exit code is 1 if a case failed or missed a bar.

A module of cases has `CASES: dict[str, MemoryCase]`, which `figures.py` describes; `MODULES` lists the modules.
"""

import argparse
import gc
import importlib
import sys
import time
import traceback
from pathlib import Path

from transformers.utils import logging

from figures import MemoryCase, MemoryResults
from report import machine

HERE = Path(__file__).resolve().parent
MODULES = (
    "cases_layout",
    "cases_prefix",
    "cases_parked",
    "cases_streaming",
    "cases_quantized_cache",
    "cases_quantized_states",
    "cases_pruning",
)


def all_cases() -> dict[str, MemoryCase]:
    """The cases of all modules by name."""
    found = [importlib.import_module(name) for name in MODULES if (HERE / f"{name}.py").exists()]
    return {name: case for module in found for name, case in module.CASES.items()}


def parse(argv: list[str] | None, names: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"cases: {', '.join(names)}")
    parser.add_argument("--missing", action="store_true", help="only cases that have no figures yet")
    parser.add_argument("--output", type=Path, default=HERE, help="folder of memory.json (default: this one)")
    parser.add_argument("--page", type=Path, default=HERE.parent / "docs" / "results.md", help="page with the table")
    return parser.parse_args(argv)


def run(cases: dict[str, MemoryCase], results: MemoryResults) -> list[str]:
    """Measures these cases; returns a line for each failure and each missed bar."""
    problems = []
    for index, (name, case) in enumerate(cases.items()):
        say(f"[{index + 1}/{len(cases)}] {name}")
        started = time.perf_counter()
        try:
            figures = case()
        except Exception as error:  # one case that fails must not take the figures of others with it
            traceback.print_exc()
            problems.append(f"{name}: {type(error).__name__}: {error}")
            continue
        results.add(name, figures, machine=machine(), seconds=round(time.perf_counter() - started, 1))
        for what, figure in results.figures(name).items():
            say(f"    {what}: {figure} {figure.verdict}")
        problems += results.missed([name])
        gc.collect()
    return problems


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def main(argv: list[str] | None = None) -> int:
    cases = all_cases()
    args = parse(argv, list(cases))
    logging.set_verbosity_error()
    results = MemoryResults(args.output, cases, args.page)
    chosen = {name: case for name, case in cases.items() if not args.only or name in args.only}
    chosen = {name: case for name, case in chosen.items() if not (args.missing and name in results.found)}
    problems = run(chosen, results)
    for problem in problems:
        say(problem)
    return 1 if problems else 0


if __name__ == "__main__":
    sys.exit(main())
