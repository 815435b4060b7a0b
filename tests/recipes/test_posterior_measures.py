"""Figures of `make eval-posterior`, on likelihoods that are written down."""

import json

import pytest
import torch

from recipes.language.measure_posterior import HALF, beliefs_over, changes, decisions, mixture
from recipes.language.measures import calibration_error
from recipes.language.posterior_report import END, START, lines_of, write_report

NAMES = [None, "king_james", "python"]


def likelihoods(*favoured, tokens=2 * HALF - 1, gap=0.5):
    """Each text's tokens are `gap` nats likelier under one candidate, or under one in each half."""
    found = torch.full((len(favoured), tokens, len(NAMES)), -2.0, dtype=torch.float64)
    for text, of_text in enumerate(favoured):
        one, other = of_text if isinstance(of_text, tuple) else (of_text, of_text)
        found[text, : HALF - 1, one] += gap
        found[text, HALF - 1 :, other] += gap
    return found


def test_the_posterior_is_bayes_rule():
    probabilities, evidence = beliefs_over(likelihoods(1, tokens=3))
    weights = torch.tensor([0.0, 3 * 0.5, 0.0], dtype=torch.float64).softmax(-1)
    torch.testing.assert_close(probabilities[0, 3], weights)
    wanted = torch.tensor([-6.0, -4.5, -6.0], dtype=torch.float64).logsumexp(-1) - torch.tensor(3.0).log()
    torch.testing.assert_close(evidence[0, -1], wanted)


def test_a_decision_is_right_where_the_most_probable_vector_is_the_best_in_hindsight():
    found = likelihoods(0, 1, 2)
    found[2, :20, 2] -= 1.0  # the best vector of the last text starts as the worst
    found[2, :20, 1] += 0.1
    measured = decisions(found)
    assert measured["accuracy"] == {"16": pytest.approx(2 / 3), "32": pytest.approx(2 / 3), "64": 1.0}


def test_the_mixture_pays_at_most_the_bound_above_the_best_vector():
    found = likelihoods(0, 1, 2)
    measured = mixture(found)
    excess = (measured["mixture"] - measured["best vector"]) * found.shape[1]
    assert 0 < excess <= torch.tensor(3.0).log() + 1e-9
    assert measured["most above base"] <= torch.tensor(3.0).log() + 1e-9


def test_with_switching_a_text_that_changes_its_subject_is_predicted_better_than_by_one_vector():
    found = changes(likelihoods((1, 2), (2, 1)), [("bible", "python"), ("python", "bible")], NAMES, 0.01)
    assert found["who knows the change"] < found["switching"] < found["best vector"] < found["no switching"]


def test_the_calibration_error_is_the_gap_between_probability_and_share_of_hits():
    def error(top, is_right):
        return calibration_error(torch.tensor(top), torch.tensor(is_right), 10)

    assert error([0.75] * 4, [True, True, True, False]) == 0
    assert error([0.95] * 4 + [0.55] * 4, [True] * 2 + [False] * 2 + [True] * 4) == pytest.approx(0.45)


def test_a_report_has_a_verdict_for_each_bar_and_leaves_the_rest_of_the_page(tmp_path):
    texts = likelihoods(0, 1, 2)
    changing = changes(likelihoods((1, 2)), [("bible", "python")], NAMES, 0.01)
    found = {
        "names": NAMES,
        "texts": {"bible": 3},
        "decisions": decisions(texts),
        "by_domain": {"bible": decisions(texts)["accuracy"]},
        "mixture": mixture(texts),
        "mixture_by_domain": {"bible": mixture(texts)},
        "rate": 0.01,
        "changes": {"0": changing},
        "shown": {"domains": ["bible", "python"], "probabilities": beliefs_over(texts)[0][0].tolist()},
        "cost": {
            "prefill": 7.0,
            "prefill with `drop_below=0.01`": 3.0,
            "token": 1.0,
            "token with `drop_below=0.01`": 1,
        },
    }
    found = json.loads(json.dumps(found))
    page = tmp_path / "page.md"
    page.write_text(f"before\n{START}\nthe earlier table\n{END}\nafter\n")
    missed = write_report(found, tmp_path, page)
    assert page.read_text().startswith("before\n") and page.read_text().endswith("after\n")
    assert "the earlier table" not in page.read_text() and "| bible | 3 |" in page.read_text()
    assert [line for line in missed if "prefill of 512 tokens | 7x | <= 6.5x | missed" in line]
    assert missed == [str(line) for line in lines_of(found) if not line.holds]
    assert {path.name for path in tmp_path.glob("*.png")} == {"reliability.png", "subject-change.png"}
