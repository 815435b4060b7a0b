"""The frame of `make bench-memory`: figures, bars, the file and the table."""

import importlib
import json
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parent.parent / "benchmarks"
ABOUT = {"machine": {"cpu": "", "threads": 1, "python": "", "packages": {}, "commit": "abc"}, "seconds": 1.0}


@pytest.fixture(scope="module")
def suite():
    sys.path.insert(0, str(FOLDER))
    try:
        yield importlib.import_module("memory")
    finally:
        sys.path.remove(str(FOLDER))


@pytest.fixture
def page(tmp_path):
    figures = importlib.import_module("figures")
    path = tmp_path / "page.md"
    path.write_text(f"before\n{figures.START}\nearlier table\n{figures.END}\nafter\n")
    return path


def bytes_case():
    """The bytes of something.

    More about it.
    """
    return {"bytes": 2.0}


def unlucky_case():
    raise ValueError("no luck")


def test_every_case_has_a_title(suite):
    figures = importlib.import_module("figures")
    cases = suite.all_cases()
    assert cases and all(figures.title_of(case) for case in cases.values())


def test_a_missed_bar_is_shown_and_other_cases_keep_their_figures(suite, page, tmp_path):
    figures = importlib.import_module("figures")
    cases = {"one": bytes_case, "two": bytes_case, "three": bytes_case}
    results = figures.MemoryResults(tmp_path, cases, page)
    results.add("one", {"bytes": figures.Figure(1.2, "x", figures.at_most(1.05))}, **ABOUT)
    results = figures.MemoryResults(tmp_path, cases, page)
    results.add("two", {"tokens": 12345, "bytes": figures.Figure(1.01, "x", figures.at_most(1.05), "a note")}, **ABOUT)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("\nafter\n") and "earlier" not in text
    assert "| The bytes of something (`one`) | bytes | 1.2x | <= 1.05x | **MISSED** |" in text
    assert "| The bytes of something (`two`) | tokens | 12,345 |" in text
    assert "|  | bytes | 1.01x | <= 1.05x | holds; a note |" in text
    assert "| The bytes of something (`three`) | | not run | | |" in text
    assert results.missed(["one", "two"]) == ["one, bytes: 1.2x, not <= 1.05"]
    assert json.loads((tmp_path / "memory.json").read_text())["one"]["figures"]["bytes"]["verdict"] == "**MISSED**"


def test_a_value_that_is_no_number_misses_its_bar(suite):
    figures = importlib.import_module("figures")
    assert figures.Figure(float("nan"), bar=figures.at_most(1.0)).verdict == "**MISSED**"


def test_a_case_that_fails_leaves_the_others(suite, page, tmp_path, capsys):
    figures = importlib.import_module("figures")
    cases = {"unlucky": unlucky_case, "one": bytes_case}
    results = figures.MemoryResults(tmp_path, cases, page)
    assert suite.run(cases, results) == ["unlucky: ValueError: no luck"]
    assert list(results.found) == ["one"]


def test_storages_are_plotted_as_loss_against_bytes(suite, page, tmp_path):
    pytest.importorskip("matplotlib")
    figures = importlib.import_module("figures")
    results = figures.MemoryResults(tmp_path, {"one": bytes_case}, page)
    results.add("one", {"bytes": 0.3, "loss": 0.1}, **ABOUT)
    assert (tmp_path / "memory.png").exists() and "memory.png" in page.read_text()
