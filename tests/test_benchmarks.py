"""The suite behind `make bench`, at toy size: every case runs, and the table tells what was found."""

import importlib
import json
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def suite():
    """The modules of the suite, which find each other as those of a script do."""
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("bench")
    finally:
        sys.path.remove(str(FOLDER))


# One compiles for a minute, the other starts processes.
SLOW = {"decode-compiled", "training"}
NAMES = [
    "prefill-mamba",
    "prefill-jamba",
    "decode-mamba",
    "decode-jamba",
    "decode-8k",
    "decode-bound",
    "decode-int4",
    "decode-compiled",
    "window",
    "packing",
    "training",
    "expert-decode",
    "expert-switch",
    "sweep-prefill-mamba",
    "sweep-prefill-jamba",
    "sweep-prefill-llama",
    "sweep-decode-mamba",
    "sweep-decode-jamba",
    "sweep-decode-llama",
]


def test_the_names_of_all_cases_are_known(suite):
    assert [case.name for case in suite.CASES] == NAMES


@pytest.mark.slow
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize("name", [name for name in NAMES if name not in SLOW])
def test_a_case_runs_and_says_what_it_found(suite, name, capsys):
    case = next(case for case in suite.CASES if case.name == name)
    found = suite.run(case, suite.Size(is_quick=True))
    assert found
    for item in found:
        if isinstance(item, suite.Row):
            assert not item.problem or item.problem.startswith("missing: "), item.problem
            assert item.ratios or item.ours or item.problem
        else:
            assert item.skipped or item.value > 0


def test_a_training_step_is_one_of_both_models(suite):
    """What the processes of the case `training` do, without the processes."""
    training = importlib.import_module("cases_training")
    models = suite.cases_training.pair("Mamba", suite.Size(is_quick=True))
    ids = torch.randint(0, 100, (1, 8))
    for model in models.values():
        training.training_step(model.train(), ids)()
        assert all(parameter.grad is None for parameter in model.parameters())


def case_of(suite, name, run, needs=()):
    return suite.Case(name, f"the title of {name}", run, ">= 2.00", needs)


def add(results, case, found):
    about = {**dict.fromkeys(("commit", "cpu", "cores", "threads", "system", "python", "kernels"), ""), "packages": {}}
    results.add(case, found, machine=about, bandwidth=1e9, quick=False, seconds=1.0)


def test_a_missed_bar_is_shown_and_other_cases_keep_their_rows(suite, tmp_path):
    report = importlib.import_module("report")
    first, second, third = (case_of(suite, name, None) for name in ("first", "second", "third"))
    cases = [first, second, third]
    add(report.Results(tmp_path, cases), first, [suite.Row("one", "1 s", "2 s", [1.0, 2.0, 1.5], report.at_least(2))])
    add(report.Results(tmp_path, cases), second, [suite.Row("two", "1 s", "2 s", [1.0, 1.1], report.at_most(1.05))])
    text = (tmp_path / "RESULTS.md").read_text()
    assert "| first | one | 1 s | 2 s | 1.500 (1.00 to 2.00) | >= 2.00 | **MISSED** |" in text
    assert "| second | two | 1 s | 2 s | 1.050 (1.00 to 1.10) | <= 1.05 | holds |" in text
    assert "| third | the title of third |  |  |  | >= 2.00 | not run |" in text
    found = json.loads((tmp_path / "results.json").read_text())["cases"]
    assert found["first"]["rows"][0]["verdict"] == "**MISSED**" and found["first"]["rows"][0]["ratio"] == 1.5


def test_a_case_that_fails_says_so_and_keeps_what_it_found(suite, capsys):
    def run(size):
        yield suite.Row("before", "1 s")
        raise ValueError("no luck | here\nand more")

    found = suite.run(case_of(suite, "unlucky", run), suite.Size(True))
    assert [item.what for item in found] == ["before", "the title of unlucky"]
    assert found[1].verdict == "FAILED: ValueError: no luck / here"


def test_a_peer_that_is_not_installed_is_named(suite):
    found = suite.run(case_of(suite, "lonely", None, needs=("torch", "no_such_package")), suite.Size(True))
    assert [item.verdict for item in found] == ["missing: no_such_package"]


def test_models_that_differ_are_not_compared(suite):
    models = importlib.import_module("models")
    same, other = torch.randn(1, 8), torch.randn(1, 8)
    models.check_same(("a", "b"), {"a": same, "b": same.clone()})
    with pytest.raises(ValueError, match="a and b differ by"):
        models.check_same(("a", "b"), {"a": same, "b": other})
    with pytest.raises(ValueError, match="a and b differ by"):
        models.check_same(("a", "b"), {"a": same, "b": torch.full_like(same, torch.nan)})


def test_a_curve_ends_before_it_takes_too_long(suite):
    sweeps = importlib.import_module("cases_sweeps")
    budget = sweeps.Budget(seconds=10.0)
    assert budget.why_not(128) == ""
    budget.spent = {128: 1.0, 512: 5.0}
    assert budget.predicted(2048) == pytest.approx(25.0, rel=1e-3)
    assert budget.why_not(2048) == budget.why_not(8192) == "it would take 25 s, the limit is 10 s"


def test_a_curve_ends_before_memory_does(suite):
    budget = importlib.import_module("cases_sweeps").Budget(seconds=10.0)
    budget.spent, budget.grown = {128: 0.01}, {128: 1 << 50}
    assert "GB of memory" in budget.why_not(512)


def test_rounds_compare_what_ran_side_by_side(suite):
    timing, calls = importlib.import_module("timing"), []
    contenders = {name: lambda name=name: calls.append(name) for name in "abc"}
    found = timing.in_rounds(contenders, rounds=3, calls=2, before=lambda name: calls.append(name.upper()))
    assert "".join(calls) == "AaBbCc" + "AaaBbbCcc" + "BbbCccAaa" + "CccAaaBbb"
    assert len(found.ratios("a", "b")) == 3


def test_a_filled_cache_is_as_large_as_a_fed_one(suite):
    models = importlib.import_module("models")
    for model in models.pair("Llama", models.Size(True)).values():
        ids = models.random_ids(model, 2, 40)
        with torch.inference_mode():
            filled, fed = models.fill(model, ids, piece=16), models.feed_in_pieces(model, ids, piece=16)
        assert models.cache_bytes(filled) == models.cache_bytes(fed)
        assert model.config._attn_implementation == "sdpa"
