"""`make bench`: ours against its peers, one case after the other, medians and ratios.

    python benchmarks/bench.py                          # all of it
    python benchmarks/bench.py --only decode-8k window  # these cases; the rows of others stay as they are
    python benchmarks/bench.py --quick                  # toys of one round: shows that everything runs

Writes `results.json`, `RESULTS.md` and plots after each case, so a run that is cut off goes on with `--missing`. The
exit code is 1 if a case failed or, but for toys, a bar was missed.
"""

import argparse
import gc
import sys
import time
import traceback
from pathlib import Path

from transformers.utils import logging

import cases_decode
import cases_experts
import cases_prefill
import cases_sweeps
import cases_training
import cases_window
from models import Size, is_installed
from report import MISSED, Case, Point, Results, Row, machine
from timing import read_bandwidth

MODULES = (cases_prefill, cases_decode, cases_window, cases_training, cases_experts, cases_sweeps)
CASES = [case for module in MODULES for case in module.CASES]
FAILED = "FAILED"


def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def run(case: Case, size: Size) -> list[Row | Point]:
    """What the case finds; if it fails or a peer is missing, what it found until then and a row that says so."""
    found: list[Row | Point] = []
    missing = [package for package in case.needs if not is_installed(package)]
    if missing:
        return [Row(case.title, problem=f"missing: {', '.join(missing)}")]
    try:
        for item in case.run(size):
            found.append(item)
            say(f"    {_line(item)}")
    except (FileNotFoundError, ImportError) as error:
        found.append(Row(case.title, problem=f"missing: {_first_line(error)}"))
    except Exception as error:  # one case that fails must not take the others' results with it
        traceback.print_exc()
        found.append(Row(case.title, problem=f"{FAILED}: {type(error).__name__}: {_first_line(error)}"))
    return found


def _first_line(error: Exception) -> str:
    return str(error).strip().partition("\n")[0][:200].replace("|", "/")


def _line(item: Row | Point) -> str:
    if isinstance(item, Row):
        ratio = "" if item.ratio is None else f", {item.ratio:.3f}"
        return f"{item.what}: {item.ours} {item.against}{ratio} {item.verdict}"
    value = item.skipped or f"{item.value:.4g}"
    return f"{item.kind} of {item.family}, {item.series}, batch {item.rows}, context {item.context}: {value}"


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    names = [case.name for case in CASES]
    parser.add_argument("--only", nargs="+", choices=names, metavar="NAME", help=f"cases: {', '.join(names)}")
    parser.add_argument("--missing", action="store_true", help="only cases that are not in the results yet")
    parser.add_argument("--quick", action="store_true", help="toy sizes, one round; written to runs/bench-quick")
    parser.add_argument("--output", type=Path, help="folder for the results (default: this one)")
    args = parser.parse_args(argv)
    if args.output is None:
        here = Path(__file__).resolve().parent
        args.output = here.parent / "runs" / "bench-quick" if args.quick else here
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.set_verbosity_error()
    size, results = Size(args.quick), Results(args.output, CASES)
    chosen = [case for case in CASES if not args.only or case.name in args.only]
    chosen = [case for case in chosen if not (args.missing and case.name in results.found)]
    about = {"machine": machine(), "bandwidth": read_bandwidth(size(1 << 30, 1 << 20))}
    say(f"memory reads {about['bandwidth'] / 1e9:.1f} GB/s")
    for index, case in enumerate(chosen):
        say(f"[{index + 1}/{len(chosen)}] {case.name}: {case.title}")
        started = time.perf_counter()
        found = run(case, size)
        results.add(case, found, **about, quick=args.quick, seconds=time.perf_counter() - started)
        gc.collect()
    say(f"written to {args.output}")
    rows = [row for case in chosen for row in results.rows()[case.name]]
    bad = [row for row in rows if row.problem.startswith(FAILED) or (row.verdict == MISSED and not args.quick)]
    for row in bad:
        say(f"{row.verdict.strip('*')}: {row.what}")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
