"""The uncertainty of one vector: the Fisher diagonal, the evidence, samples, files, and averaged predictions."""

import json
import math

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from loops import normal
from mambaformer import ExpertPosterior, ExpertVector, fit_isotropic, fit_laplace
from mambaformer.expert_laplace_mambaformer import fisher_diagonal, mean_loss, prior_precision
from oracle import assert_same_logits, expected
from sequences import rows_of
from tiny_models import every_pattern, random_expert, shared_model, small_expert

FEW = ["model.layers.0.self_attn.q_proj", "model.layers.1.mlp.down_proj"]


def trained(pattern="llama", modules=None, name="chef"):
    """An expert vector in float64, so that laws hold to 1e-10."""
    vector = random_expert(shared_model(pattern), 1, modules=modules)
    return ExpertVector({key: z.double() for key, z in vector.vectors.items()}, name, {"steps": 3})


def uncertain(pattern="llama", sigma=0.1):
    vector = trained(pattern)
    deviations = {key: sigma * torch.rand(len(z), dtype=torch.float64) for key, z in vector.vectors.items()}
    return ExpertVector(vector.vectors, vector.name, vector.metadata, deviations)


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def fisher_by_enumeration(model, vector, row):
    """sum_t sum_y p_t(y) (d log p_t(y) / dz)^2, one backward pass for each token and label."""
    leaves = {name: z.clone().requires_grad_() for name, z in vector.vectors.items()}
    log_probs = model(torch.tensor([row]), expert_vector=leaves, use_cache=False).logits[0].log_softmax(-1)
    fisher = {name: torch.zeros_like(z) for name, z in vector.vectors.items()}
    for log_prob in log_probs.flatten():
        gradients = torch.autograd.grad(log_prob, list(leaves.values()), retain_graph=True)
        for name, gradient in zip(leaves, gradients, strict=True):
            fisher[name] += log_prob.detach().exp() * gradient.square()
    return fisher


def test_the_fisher_diagonal_is_its_expectation_over_all_labels():
    model, vector, row = shared_model("llama"), trained(modules=FEW), [3, 7, 11]
    wanted = fisher_by_enumeration(model, vector, row)
    draws = [fisher_diagonal(model, vector, [torch.tensor([row] * 32)], generator(seed))[0] for seed in range(30)]
    for name in FEW:
        means = torch.stack([draw[name] / 32 for draw in draws])
        error = means.std(0) / math.sqrt(len(draws))
        z = (means.mean(0) - wanted[name]) / error.clamp(min=1e-9 * wanted[name].max())
        assert z.square().mean() < 3 and z.abs().max() < 8


@every_pattern
def test_the_gradients_of_rows_are_those_of_single_sequences(pattern):
    model, vector = shared_model(pattern), trained(pattern)
    rows = torch.tensor([row[:5] for row in rows_of(pattern, 2)[:2]])
    draw, found = generator(5), {name: torch.zeros(len(z)).double() for name, z in vector.vectors.items()}
    logits = torch.stack(expected(model, rows.tolist(), [vector] * len(rows)))
    labels = logits.softmax(-1).flatten(0, 1).multinomial(1, generator=draw).view(rows.shape)
    for row, wanted in zip(rows, labels, strict=True):
        leaves = {name: z.clone().requires_grad_() for name, z in vector.vectors.items()}
        log_probs = model(row[None], expert_vector=leaves, use_cache=False).logits[0].log_softmax(-1)
        log_probs.gather(-1, wanted[:, None]).sum().backward()
        for name, z in leaves.items():
            found[name] += z.grad.square()
    fisher, tokens = fisher_diagonal(model, vector, [rows], generator(5))
    assert tokens == rows.numel()
    for name, values in found.items():
        assert (fisher[name] - values).abs().max() <= 1e-9 * values.max().clamp(min=1)


def log_evidence(delta, curvature, distance):
    return -delta * distance / 2 - (curvature / delta).log1p().sum().item() / 2


@pytest.mark.parametrize("size", [1e-6, 1.0, 1e6])
def test_the_prior_precision_maximizes_the_evidence_on_a_grid(size):
    curvature = size * normal(200, seed=4).square()
    curvature[::3] = 0
    vectors = {"q": 1 + 0.1 * normal(120, seed=5), "k": 1 + 0.1 * normal(80, seed=6)}
    fisher = {"q": curvature[:120], "k": curvature[120:]}
    delta = prior_precision(fisher, vectors)
    distance = sum((z - 1).square().sum().item() for z in vectors.values())
    grid = [delta * math.exp(step / 50) for step in range(-400, 401)]
    best = max(grid, key=lambda each: log_evidence(each, curvature, distance))
    assert best == delta


def test_the_posterior_has_the_precision_of_data_and_prior():
    model, vector = shared_model("llama"), trained()
    batches = [torch.tensor(row)[None, :6] for row in rows_of("llama", 1)]
    fisher, tokens = fisher_diagonal(model, vector, batches, generator())
    fitted = fit_laplace(model, vector, batches, num_tokens=4 * tokens, generator=generator())
    delta = prior_precision({name: 4 * values for name, values in fisher.items()}, vector.vectors)
    assert fitted == vector and fitted.metadata["steps"] == 3
    assert fitted.metadata["laplace"] == {"prior_precision": delta, "fisher_tokens": tokens}
    for name, sigma in fitted.deviations.items():
        assert (sigma**-2 - 4 * fisher[name] - delta).abs().max() < 1e-9 * (4 * fisher[name] + delta).max()


def test_the_isotropic_form_takes_all_that_the_loss_tolerates():
    model, vector = shared_model("llama"), trained()
    batches = [torch.tensor([row[:6] for row in rows_of("llama", 1)])]
    fitted = fit_isotropic(model, vector, batches, tolerance=0.01, samples=3, seed=2)
    sigma = fitted.metadata["isotropic"]["sigma"]
    allowed = 1.01 * mean_loss(model, [vector], batches)
    for factor, is_tolerated in ((1.0, True), (1 + 0.002 / sigma, False)):
        deviations = {name: factor * each for name, each in fitted.deviations.items()}
        drawn = ExpertVector(vector.vectors, deviations=deviations).sample(3, generator(2))
        assert (mean_loss(model, drawn, batches) <= allowed) == is_tolerated
    assert 0 < sigma < 1 and all((each == sigma).all() for each in fitted.deviations.values())


def test_samples_have_the_mean_and_variance_of_the_posterior():
    vector = ExpertVector(
        {"q": [1.5, 0.5], "k": [2.0]}, "chef", {"steps": 3}, deviations={"q": torch.tensor([0.2, 0.0])}
    )
    samples = vector.sample(4000, generator())
    drawn = torch.stack([each["q"] for each in samples])
    assert drawn[:, 0].mean().item() == pytest.approx(1.5, abs=0.02)
    assert drawn[:, 0].std().item() == pytest.approx(0.2, rel=0.05)
    assert (drawn[:, 1] == 0.5).all() and all(each["k"].tolist() == [2.0] for each in samples)
    assert samples[1].name == "chef-sample-1" and samples[1].metadata == {"steps": 3} and not samples[1].deviations
    again = vector.sample(2, generator())
    assert again == samples[:2] and again[0] != again[1]


def test_files_keep_deviations_and_files_without_stay_as_they_were(tmp_path):
    vector, plain = uncertain(), trained()
    vector.save(tmp_path / "vector.safetensors")
    loaded = ExpertVector.load(tmp_path / "vector.safetensors")
    assert loaded == vector and loaded.metadata == vector.metadata and loaded.deviations.keys() == set(vector)
    assert all(torch.equal(loaded.deviations[name], sigma) for name, sigma in vector.deviations.items())
    assert loaded.sample(2, generator()) == vector.sample(2, generator())
    shared_model("llama").check_expert_vector(loaded)
    plain.save(tmp_path / "plain.safetensors")
    with safe_open(tmp_path / "plain.safetensors", "pt") as file:
        assert file.metadata()["version"] == "1" and set(file.keys()) == set(plain)
    assert not ExpertVector.load(tmp_path / "plain.safetensors").deviations


def test_an_added_vector_keeps_its_deviations_under_another_name():
    model = shared_model("llama")
    library = type(model.expert_vectors)()
    assert library.add("cook", uncertain()).deviations.keys() == set(uncertain())


def test_deviations_that_changed_in_a_file_are_refused(tmp_path):
    path = tmp_path / "vector.safetensors"
    ExpertVector({"q": [1.5, 0.5]}, deviations={"q": [0.1, 0.2]}).save(path)
    with safe_open(path, "pt") as file:
        header = file.metadata()
    save_file(load_file(path) | {"deviations/q": torch.tensor([0.1, 0.3])}, path, header)
    with pytest.raises(ValueError, match="deviations are other"):
        ExpertVector.load(path)
    save_file(load_file(path) | {"q": torch.tensor([0.1, 0.3])}, path, header)
    with pytest.raises(ValueError, match="neither a vector nor"):
        ExpertVector.load(path)
    assert json.loads(header["metadata"]) == {}


@pytest.mark.parametrize(
    "deviations",
    [{"k": [0.1, 0.1]}, {"q": [0.1]}, {"q": [0.1, -0.1]}, {"q": [0.1, math.nan]}],
)
def test_deviations_that_do_not_fit_are_refused(deviations):
    with pytest.raises(ValueError, match="deviations"):
        ExpertVector({"q": [1.5, 0.5]}, deviations=deviations)


@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_numbers_of_samples_below_one_are_refused(n):
    with pytest.raises(ValueError, match="number of samples"):
        uncertain().sample(n)


def test_a_posterior_of_nothing_is_refused():
    model, batches = shared_model("llama"), [torch.tensor([[1, 2, 3]])]
    with pytest.raises(ValueError, match="no deviations"):
        trained().sample(2)
    with pytest.raises(ValueError, match="does not have"):
        fit_laplace(model, small_expert(), batches)
    with pytest.raises(ValueError, match="does not have"):
        fit_isotropic(model, small_expert(), batches)
    with pytest.raises(ValueError, match="is the base"):
        fit_laplace(model, ExpertVector({}), batches)
    with pytest.raises(ValueError, match="differs from the base"):
        fit_laplace(model, ExpertVector({FEW[0]: torch.ones(4)}), batches)
    with pytest.raises(ValueError, match="no tokens"):
        fit_laplace(model, trained(), [])
    with pytest.raises(ValueError, match="no tokens"):
        fit_isotropic(model, trained(), [])
    with pytest.raises(ValueError, match="num_tokens"):
        fit_laplace(model, trained(), batches, num_tokens=0)
    with pytest.raises(ValueError, match="tolerance"):
        fit_isotropic(model, trained(), batches, tolerance=0)


@every_pattern
def test_samples_as_rows_of_a_batch_equal_single_runs(pattern):
    model, row = shared_model(pattern), rows_of(pattern, 2)[0]
    samples = uncertain(pattern).sample(3, generator())
    wanted = expected(model, [row] * 3, samples)
    with torch.no_grad():
        found = model(torch.tensor([row] * 3), expert_vector=samples, use_cache=False).logits
    assert_same_logits(list(found), wanted)


@every_pattern
def test_a_posterior_that_always_switches_averages_the_samples(pattern):
    model, row = shared_model(pattern), rows_of(pattern, 2)[0]
    samples = uncertain(pattern).sample(3, generator())
    log_probs = torch.stack([each.log_softmax(-1) for each in expected(model, [row] * 3, samples)])
    posterior = ExpertPosterior(model, samples, switching=1.0)
    found = torch.cat([posterior.feed(torch.tensor([part])) for part in (row[:3], row[3:])], dim=1)[0]
    assert_same_logits(found, log_probs.logsumexp(0) - math.log(3))
    assert (posterior.probabilities - 1 / 3).abs().max() < 1e-12
