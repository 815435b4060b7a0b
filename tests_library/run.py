"""Runs the library's common model tests on our classes and tells what became of each.

Every test passes, or is listed in `test_mambaformer.py` as not applicable with the reason, or needs a device or
package that this machine lacks. A test that skips itself for any other reason counts as failed: the library decides by
inspection what a model can do, and a name that it does not find would go unnoticed.

Usage: python tests_library/run.py [--peers] [pytest arguments]; with --peers, Llama, Jamba and Bamba run too, and what
one of them passes but ours leave out is told.
"""

import os
import sys
from collections import Counter
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["RUN_SLOW"] = "1"  # slow tests need an accelerator besides, which is what should decide

import pytest
import transformers

from library import fetch, is_complete

FOLDER = Path(__file__).parent
OURS = "not applicable: "
MACHINE = "test requires "
ORDER = ("passed", "machine", "not applicable", "failed")


class Outcomes:
    """A pytest plugin that keeps the worst outcome of each test, its subtests and its phases: {(class, test): ...}."""

    def __init__(self):
        self.found: dict[tuple[str, str], tuple[str, str]] = {}

    def pytest_runtest_logreport(self, report):
        if report.when != "call" and report.passed:
            return
        owner, name = report.nodeid.split("::")[-2:]
        outcome = self.judged(report)
        known = self.found.get((owner, name), outcome)
        self.found[owner, name] = max(known, outcome, key=lambda one: ORDER.index(one[0]))

    @staticmethod
    def judged(report) -> tuple[str, str]:
        if report.passed:
            return "passed", ""
        if report.failed:
            return "failed", report.longreprtext.strip().splitlines()[-1]
        reason = report.longrepr[2].removeprefix("Skipped: ")
        if reason.startswith(OURS):
            return "not applicable", reason.removeprefix(OURS)
        if reason.startswith(MACHINE):
            return "machine", reason
        return "failed", f"it skipped itself: {reason}"


def run(file: str, arguments: list[str]) -> tuple[Outcomes, int]:
    outcomes = Outcomes()
    options = ["-c", str(FOLDER / "pytest.ini"), "-p", "no:cacheprovider", "-q", "--tb=short", "--disable-warnings"]
    status = pytest.main([*options, f"--confcutdir={FOLDER}", str(FOLDER / file), *arguments], plugins=[outcomes])
    return outcomes, int(status)


def tell(outcomes: Outcomes) -> int:
    """Prints what became of the tests; returns how many failed."""
    left_out: dict[str, set[str]] = {}
    for (owner, name), (outcome, reason) in outcomes.found.items():
        if outcome in ("not applicable", "machine"):
            left_out.setdefault(reason, set()).add(name if outcome == "machine" else f"{owner}.{name}")
    print("\nLeft out:")
    for reason, names in sorted(left_out.items()):
        print(f"  {reason}: {', '.join(sorted(names))}")
    for (owner, name), (outcome, reason) in outcomes.found.items():
        if outcome == "failed":
            print(f"FAILED {owner}.{name}: {reason}")
    counts = Counter(outcome for outcome, _ in outcomes.found.values())
    print(
        f"transformers {transformers.__version__}: {counts['passed']} passed, "
        f"{counts['not applicable']} not applicable, {counts['machine']} need another machine, "
        f"{counts['failed']} failed"
    )
    return counts["failed"]


def tell_what_peers_pass(ours: Outcomes, peers: Outcomes) -> None:
    for (owner, name), (outcome, reason) in sorted(ours.found.items()):
        passing = [peer for (peer, test), (state, _) in peers.found.items() if test == name and state == "passed"]
        if outcome != "passed" and passing:
            print(f"{', '.join(passing)} pass, {owner} does not: {name} ({reason})")


def main(arguments: list[str]) -> int:
    with_peers = "--peers" in arguments
    arguments = [argument for argument in arguments if argument != "--peers"]
    print(f"The library's tests: {fetch()}")
    if not is_complete():
        print("It has no generation and export tests: LIBRARY_TESTS=<a checkout's tests> runs those too.")
    ours, status = run("test_mambaformer.py", arguments)
    peers = run("test_peers.py", arguments)[0] if with_peers else None
    failed = tell(ours)
    if peers is not None:
        tell_what_peers_pass(ours, peers)
    return 1 if failed or status not in (0, 1) or not ours.found else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
