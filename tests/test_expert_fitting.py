"""Expert vectors that are fitted to a few examples: what is found, what stays as it was, and what is refused."""

import functools

import pytest
import torch

from mambaformer import ExpertVector, fit_expert_vector
from oracle import expected
from patterns import tiny_config
from tiny_models import main_patterns, random_expert, random_model, shared_model

LENGTH = 24


@functools.cache
def model_with_candidates(pattern):
    """A model whose logits are spread, and three candidates."""
    model = shared_model(pattern)
    return model, [random_expert(model, seed, name=f"candidate-{seed}") for seed in (1, 2, 3)]


def sampled(model, expert_vector, rows, seed=0, length=LENGTH):
    """Sequences (rows, length) that the model draws token by token under an expert vector."""
    source = torch.Generator().manual_seed(seed)
    ids = torch.randint(model.config.vocab_size, (rows, 1), generator=source)
    cache = model.make_cache()
    with torch.no_grad():
        for _ in range(length - 1):
            logits = model(ids[:, -1:], cache=cache, expert_vector=expert_vector).logits[:, -1]
            ids = torch.cat([ids, torch.multinomial(logits.softmax(-1), 1, generator=source)], dim=1)
    return ids


def loss_by_oracle(model, rows, expert_vector, counted=None):
    """Nats per counted token, row by row."""
    total = number = 0
    for index, row in enumerate(rows):
        first = max(1, 1 if counted is None else counted[index])
        log_probs = expected(model, [row], [expert_vector])[0].log_softmax(-1)
        total -= sum(log_probs[t - 1, row[t]].item() for t in range(first, len(row)))
        number += len(row) - first
    return total / number


@main_patterns
def test_a_planted_blend_is_recovered(pattern):
    model, candidates = model_with_candidates(pattern)
    planted = ExpertVector.blend([(0.6, candidates[0]), (0.4, candidates[2])])
    ids = sampled(model, planted, rows=48)
    fitted = fit_expert_vector(
        model, list(ids), candidates, blend_epochs=10, epochs=0, examples_per_step=16, batch_size=16
    )
    weights = torch.tensor(list(fitted.metadata["fit"]["weights"].values()))
    assert (weights - torch.tensor([0.6, 0.0, 0.4])).abs().max() < 0.12


@main_patterns
def test_the_losses_are_those_of_the_oracle(pattern):
    model, candidates = model_with_candidates(pattern)
    rows = [row[: 5 + 4 * number].tolist() for number, row in enumerate(sampled(model, candidates[1], rows=4))]
    fitted = fit_expert_vector(model, rows, candidates, epochs=1, rank=3)
    fit = fitted.metadata["fit"]
    assert fit["loss_of_base"] == pytest.approx(loss_by_oracle(model, rows, None), rel=1e-9)
    for each in candidates:
        assert fit["losses_of_candidates"][each.name] == pytest.approx(loss_by_oracle(model, rows, each), rel=1e-9)
    assert fit["loss"] == pytest.approx(loss_by_oracle(model, rows, fitted), rel=1e-9)
    assert fit["loss"] <= min(fit["loss_of_base"], *fit["losses_of_candidates"].values())
    assert fit["tokens"] == sum(len(row) - 1 for row in rows)


def test_the_likelihood_is_never_below_the_best_candidate():
    model, candidates = model_with_candidates("paper")
    rows = list(sampled(model, candidates[1], rows=4))
    wild = {"learning_rate": 30.0, "blend_learning_rate": 3.0, "epochs": 1}
    fitted = fit_expert_vector(model, rows, candidates, **wild)
    assert fitted == candidates[1]
    assert fitted.metadata["fit"]["weights"] == {"candidate-1": 0.0, "candidate-2": 1.0, "candidate-3": 0.0}
    assert fit_expert_vector(model, sampled(model, None, rows=4).unbind(), [], **wild).is_base


def test_leading_scales_gain_beyond_the_blend():
    """On sequences that were not fitted, under a vector that no blend of the candidates is near."""
    model, candidates = model_with_candidates("llama")
    hidden = random_expert(model, 9, rank=4)
    fit = functools.partial(fit_expert_vector, model, list(sampled(model, hidden, rows=64)), candidates)
    blend = fit(epochs=0)
    fitted = fit(epochs=6, rank=4, prior_scale=0.5, learning_rate=0.05, examples_per_step=16)
    others = sampled(model, hidden, rows=16, seed=1).tolist()
    best = loss_by_oracle(model, others, hidden)
    left, before = (loss_by_oracle(model, others, each) - best for each in (fitted, blend))
    assert 0 < left < 0.4 * before


@main_patterns
def test_one_batch_or_many_and_the_seed_decide_nothing_else(pattern):
    model, candidates = model_with_candidates(pattern)
    rows = [row[: 6 + number].tolist() for number, row in enumerate(sampled(model, random_expert(model, 9), rows=8))]
    fit = functools.partial(fit_expert_vector, model, rows, candidates, epochs=2, rank=3, examples_per_step=4)
    one = fit(batch_size=8)
    assert one not in (ExpertVector({}), *candidates)  # else the fit fell back, and nothing is compared
    torch.manual_seed(123)
    before = torch.get_rng_state()
    many, again, other = fit(batch_size=3), fit(batch_size=8), fit(batch_size=8, seed=1)
    assert torch.equal(torch.get_rng_state(), before)
    assert all((one[name] - many[name]).abs().max() < 1e-6 for name in one)
    assert one == again
    assert one != other


@pytest.mark.parametrize("precision", [1e-6, 1e6])
def test_a_narrow_prior_keeps_the_blend(precision):
    model, candidates = model_with_candidates("paper")
    rows = list(sampled(model, random_expert(model, 9), rows=8))
    fit = functools.partial(fit_expert_vector, model, rows, candidates, epochs=8, examples_per_step=2)
    blend, fitted = fit(epochs=0), fit(prior_scale=precision**-0.5, learning_rate=0.01)
    distance = max(((fitted[name] - blend.vectors.get(name, 1)).abs().max().item() for name in fitted), default=0.0)
    assert distance < 0.01 if precision == 1e6 else distance > 0.04


def test_held_back_examples_stop_the_fit(monkeypatch):
    model, _ = model_with_candidates("paper")
    losses, kept, steps = iter([3.0, 2.0, 1.0, 1.5]), [], []

    def held_back_loss(fit):
        kept.append(fit._scales.expert_vector())
        return next(losses)

    monkeypatch.setattr("mambaformer.expert_fitting_mambaformer._Fit._held_back_loss", held_back_loss)
    rows = list(sampled(model, None, rows=4))
    options = {"epochs": 9, "rank": 2, "held_back": 0.25, "learning_rate": 1e-3}
    fitted = fit_expert_vector(model, rows, [], progress=steps.append, **options)
    assert [each.held_back_loss for each in steps] == [2.0, 1.0, 1.5]
    assert {(each.stage, each.num_steps) for each in steps} == {("scales", 9)}
    assert fitted == kept[2]
    assert kept[3] != kept[2]


def test_only_the_answer_of_a_pair_counts():
    model, candidates = model_with_candidates("everything")
    rows = sampled(model, candidates[0], rows=3).tolist()
    pairs = [(row[:7], row[7:12]) for row in rows]
    fit = fit_expert_vector(model, pairs, candidates, blend_epochs=0, epochs=0).metadata["fit"]
    expected_loss = loss_by_oracle(model, [row[:12] for row in rows], None, counted=[7, 7, 7])
    assert fit["loss_of_base"] == pytest.approx(expected_loss, rel=1e-9)
    assert fit["tokens"] == 15


def test_strings_are_tokenized_and_answers_get_no_start_token():
    def tokenizer(text, add_special_tokens=True):
        return {"input_ids": [0] * add_special_tokens + [ord(letter) - 96 for letter in text]}

    model, candidates = model_with_candidates("paper")
    fit = functools.partial(fit_expert_vector, model, candidates=candidates, epochs=1, rank=2)
    assert fit(["abc", ("de", "fg")], tokenizer=tokenizer) == fit([[0, 1, 2, 3], (torch.tensor([0, 4, 5]), [6, 7])])


def test_the_model_stays_as_it_was():
    model = random_model(tiny_config("everything")).train()
    model.lm_head.eval()
    modes = [module.training for module in model.modules()]
    weights = {name: (each.clone(), each.requires_grad) for name, each in model.named_parameters()}
    rows = torch.randint(model.config.vocab_size, (4, 9)).unbind()
    with torch.inference_mode():
        fit_expert_vector(model, rows, [random_expert(model, 1)], epochs=1)
    with pytest.raises(ZeroDivisionError):
        fit_expert_vector(model, rows, [], progress=lambda step: 1 / 0)
    assert [module.training for module in model.modules()] == modes
    for name, each in model.named_parameters():
        assert torch.equal(each, weights[name][0])
        assert each.grad is None
        assert each.requires_grad == weights[name][1]
    assert len(model.expert_vectors) == 0


def test_candidates_are_those_of_the_model_by_default():
    model = random_model(tiny_config("paper"))
    model.expert_vectors.add("one", random_expert(model, 1))
    rows = sampled(model, model.expert_vectors["one"], rows=4).unbind()
    fitted = model.fit_expert_vector(rows, name="mine", epochs=0)
    assert fitted.name == "mine"
    assert fitted.metadata["fit"]["weights"].keys() == {"one"}
    named = fit_expert_vector(model, rows, ["one", None], epochs=0)
    assert named == fitted
    model.expert_vectors.add(fitted)


@pytest.mark.parametrize(
    "examples, options, message",
    [
        ([], {}, "empty: give at least one"),
        ("abc", {}, "pass a list of sequences"),
        (["abc"], {}, "pass `tokenizer=`"),
        ([[]], {}, "Example 0 has no token to predict"),
        ([[1, 2], [3]], {}, "Example 1 has no token to predict"),
        ([([1, 2], [])], {}, "Example 0 has no token to predict"),
        ([[1, 10_000]], {}, r"examples\[0\]` has ids from 1 to 10000"),
        ([[1, -1]], {}, "has ids from -1"),
        ([torch.ones(3)], {}, "neither a string, token ids"),
        ([["a", "b"]], {}, "neither a string, token ids"),
        ([torch.ones(2, 3, dtype=torch.long)], {}, "pass one sequence"),
        ([[1, 2]], {"candidates": [ExpertVector({"model.layers.0.other_proj": [2.0]})]}, "does not have"),
        ([[1, 2]], {"candidates": ["unknown"]}, "no expert vector named 'unknown'"),
        ([[1, 2]], {"candidates": [[None]]}, "Candidate 0 is a list"),
        ([[1, 2]], {"rank": 0}, "`rank` must be"),
        ([[1, 2]], {"epochs": 1.5}, "`epochs` must be"),
        ([[1, 2]], {"held_back": 1}, "`held_back` must be"),
        ([[1, 2]], {"prior_scale": 0.0}, "`prior_scale` must be"),
        ([[1, 2]], {"learning_rate": float("nan")}, "`learning_rate` must be"),
    ],
)
def test_what_cannot_be_fitted_is_refused(examples, options, message):
    model, _ = model_with_candidates("paper")
    with pytest.raises((TypeError, ValueError), match=message):
        fit_expert_vector(model, examples, **options)


def test_a_candidate_of_other_weights_is_refused():
    model, other = random_model(tiny_config("paper")), random_model(tiny_config("paper"), seed=1, loudness=3.0)
    foreign = random_expert(other, 1)
    foreign = ExpertVector(foreign.vectors, metadata={"spectrum": other.spectrum(list(foreign.vectors))})
    with pytest.raises(ValueError, match="trained on other weights"):
        fit_expert_vector(model, [[1, 2, 3]], [foreign])


def test_a_likelihood_that_is_not_finite_is_refused():
    model = random_model(tiny_config("paper"))
    with torch.no_grad():
        model.model.norm.weight.fill_(torch.nan)
    with pytest.raises(ValueError, match="not finite"):
        fit_expert_vector(model, [[1, 2, 3]], [])
