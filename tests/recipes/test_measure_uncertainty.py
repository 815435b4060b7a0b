"""The calibration of predictions under an expert vector and under its posterior."""

import math

import pytest
import torch

from mambaformer import ExpertVector
from recipes.language.measure_uncertainty import figures_of, measure, predict
from recipes.language.measures import calibration_error
from tiny_models import new_model, random_expert


def test_the_calibration_error_is_the_weighted_distance_within_bins():
    confidence = torch.tensor([0.95, 0.97, 0.5, 0.5])
    is_right = torch.tensor([True, False, True, True])
    assert calibration_error(confidence, is_right) == pytest.approx((abs(1.92 - 1) + abs(1.0 - 2)) / 4, abs=1e-6)
    assert calibration_error(torch.ones(3), torch.ones(3, dtype=torch.bool)) == 0


def test_figures_are_those_of_the_next_tokens():
    log_probs = torch.tensor([[[0.8, 0.2], [0.4, 0.6], [0.5, 0.5]]]).log()
    figures = figures_of(log_probs, torch.tensor([[1, 0, 0]]))
    assert figures["loss"] == pytest.approx(-(math.log(0.8) + math.log(0.4)) / 2)
    assert figures["calibration_error"] == pytest.approx((0.2 + 0.6) / 2)
    assert figures["overconfidence"] == pytest.approx(0.7 - 0.5)


def test_predictions_are_averaged_and_the_model_is_as_it_was():
    model = new_model("llama")
    vector = random_expert(model, 1)
    ids = torch.tensor([[1, 2, 3, 4]])
    found = predict(model, [None, vector], {"a": ids})["a"]
    with torch.no_grad():
        single = [model(ids, expert_vector=each, use_cache=False).logits.softmax(-1) for each in (None, vector)]
    assert (found.exp() - sum(single) / 2).abs().max() < 1e-5
    result = measure(model, ExpertVector(vector.vectors), ids, {"a": ids}, samples=2, seeds=(0, 1))
    assert len(result["laplace"]) == 2 and result["point"]["a"].keys() == result["laplace"][0]["a"].keys()
