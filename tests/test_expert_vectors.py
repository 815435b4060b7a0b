"""Expert vectors: their values, fingerprints, blends and checks."""

import json

import numpy as np
import pytest
import torch

import mambaformer.expert_vectors_mambaformer as experts
from loops import normal
from mambaformer.expert_bases_mambaformer import (
    compute_basis,
)
from mambaformer.expert_spectra_mambaformer import check_spectrum, spectrum_of
from mambaformer.expert_vectors_mambaformer import (
    BASE_FINGERPRINT,
    ExpertVector,
    check_expert_vector,
)
from tiny_models import small_expert


@pytest.mark.parametrize(
    "vectors",
    [
        {"q": torch.ones(2, 2)},
        {"q": torch.tensor(1.0)},
        {"q": torch.ones(0)},
        {"q": torch.ones(3, dtype=torch.int64)},
        {"q": torch.ones(3, dtype=torch.complex64)},
        {"q": torch.tensor([1.0, torch.nan])},
        {"q": torch.tensor([1.0, -torch.inf])},
        {"": torch.ones(3)},
        {1: torch.ones(3)},
    ],
)
def test_vectors_that_cannot_scale_are_refused(vectors):
    with pytest.raises(ValueError, match="vector"):
        ExpertVector(vectors)


@pytest.mark.parametrize(
    ("value", "dtype"),
    [
        ([2.0, 0.25], torch.float32),
        ((2, 0.25), torch.float32),
        (np.array([2.0, 0.25]), torch.float64),
        (np.array([2.0, 0.25], dtype=np.float16), torch.float32),
        (np.array([0.25, 2.0], dtype=">f4")[::-1], torch.float32),
    ],
)
def test_numbers_in_lists_and_arrays_are_vectors(value, dtype):
    expert = ExpertVector({"q": value})
    assert expert["q"].tolist() == [2.0, 0.25] and expert["q"].dtype == dtype
    if isinstance(value, np.ndarray):
        value[:] = 7
    assert expert["q"].tolist() == [2.0, 0.25]


@pytest.mark.parametrize(
    "value",
    [["a"], [1.0, None], [[1.0], [1.0, 2.0]], [1j], [10**400], np.array(["a"]), np.array([object()]), 1.0, "a", {}],
)
def test_values_that_are_no_numbers_are_refused_by_the_name_of_their_module(value):
    with pytest.raises(TypeError, match="`q`"):
        ExpertVector({"q": value})


@pytest.mark.parametrize("value", [np.array([1, 2]), np.float64(2.0), np.ones((2, 2)), [1e300]])
def test_arrays_of_other_shapes_or_types_are_refused(value):
    with pytest.raises(ValueError, match="`q`"):
        ExpertVector({"q": value})


def test_values_that_are_no_tensors_are_refused():
    with pytest.raises(TypeError, match="map module names"):
        ExpertVector([torch.ones(2)])
    with pytest.raises(TypeError, match="name"):
        ExpertVector({}, name=3)
    with pytest.raises(TypeError, match="metadata"):
        ExpertVector({}, metadata=[3])
    with pytest.raises(ValueError, match="JSON"):
        ExpertVector({}, metadata={"a": object()})
    with pytest.raises(ValueError, match="JSON"):
        ExpertVector({}, metadata={"a": float("nan")})


def test_vectors_are_copies_in_float32_or_better_unless_they_are_trained():
    half, double, trained = torch.ones(2).half(), torch.ones(2).double(), torch.ones(2, requires_grad=True)
    expert = ExpertVector({"half": half, "double": double, "trained": trained})
    half.zero_()
    double.zero_()
    assert expert.vectors["half"].dtype == torch.float32
    assert expert.vectors["double"].dtype == torch.float64
    assert expert.is_base
    assert expert.vectors["trained"] is trained
    assert expert.requires_grad
    with pytest.raises(TypeError):
        expert.vectors["half"] = half


def test_an_expert_reads_like_a_mapping():
    expert = small_expert()
    assert list(expert) == ["layers.0.q_proj", "lm_head"]
    assert len(expert) == 2
    assert "lm_head" in expert
    assert "q" not in expert
    assert expert["lm_head"].shape == (3,)
    assert bool(ExpertVector({}))
    assert "chef" in repr(expert)
    assert expert.fingerprint[:8] in repr(expert)


def test_the_fingerprint_is_that_of_the_content():
    values = torch.tensor([0.5, 1.0, 2.0])
    reference = ExpertVector({"q": values, "k": 3 * values})
    same = [
        ExpertVector({"k": 3 * values, "q": values}, name="other", metadata={"a": 1}),
        ExpertVector({"q": values.double(), "k": (3 * values).double()}),
        ExpertVector({"q": torch.cat([values, torch.ones(4)]), "k": 3 * values, "v": torch.ones(7)}),
    ]
    for expert in same:
        assert expert.fingerprint == reference.fingerprint
        assert expert == reference
        assert hash(expert) == hash(reference)
    different = [
        ExpertVector({"q": values}),
        ExpertVector({"q": 3 * values, "k": values}),
        ExpertVector({"q": values, "kk": 3 * values}),
        ExpertVector({"q": torch.cat([torch.ones(1), values]), "k": 3 * values}),
        ExpertVector({"q": values * (1 + 2**-20), "k": 3 * values}),
        ExpertVector({"q": values.double() + 2**-40, "k": 3 * values}),
    ]
    assert len({expert.fingerprint for expert in [reference, *different]}) == 7
    assert reference != "a string"
    assert len(reference.fingerprint) == 64


def test_the_fingerprint_does_not_run_names_and_values_together():
    """Without lengths, the bytes of a value could be read as the next module's name."""
    value = torch.tensor([2.0], dtype=torch.float64)
    tail = torch.frombuffer(bytearray(b"\x01b\x01b\x01b\x01@"), dtype=torch.float64)  # about 2.2
    first = ExpertVector({"a": torch.cat([tail, value])})
    second = ExpertVector({"a" + tail.numpy().tobytes().decode(): value})
    assert first.fingerprint != second.fingerprint


def test_zeros_of_either_sign_do_the_same():
    assert ExpertVector({"q": torch.tensor([0.0])}) == ExpertVector({"q": torch.tensor([-0.0])})


def test_an_expert_of_ones_is_the_base():
    assert ExpertVector({}).fingerprint == BASE_FINGERPRINT
    ones = ExpertVector({"q": torch.ones(3), "k": torch.ones(1).double()})
    assert ones.fingerprint == BASE_FINGERPRINT
    assert ones.is_base
    assert not small_expert().is_base


def test_the_fingerprint_follows_vectors_that_change():
    trained = torch.ones(2, requires_grad=True)
    expert = ExpertVector({"q": trained})
    assert expert.is_base
    trained.data.mul_(2)  # leaves no trace but the values
    assert not expert.is_base
    frozen = ExpertVector({"q": torch.ones(2)})
    assert frozen.is_base
    frozen.vectors["q"].mul_(2)
    assert not frozen.is_base


def test_the_fingerprint_of_fixed_vectors_is_computed_once(monkeypatch):
    expert = small_expert()
    first = expert.fingerprint
    monkeypatch.setattr(experts, "_fingerprint", None)
    assert expert.fingerprint == first


def test_a_blend_is_the_sum_of_the_changes():
    a = ExpertVector({"q": torch.tensor([2.0, 3.0, 0.5]).double(), "k": torch.tensor([5.0])})
    b = ExpertVector({"q": torch.tensor([4.0]), "v": torch.tensor([0.0, 2.0])})
    blended = ExpertVector.blend([(0.5, a), (-0.25, b)], name="mix")
    assert blended.name == "mix"
    expected = {"q": [1 + 0.5 - 0.75, 2.0, 0.75], "k": [3.0], "v": [1.25, 0.75]}
    assert blended.vectors.keys() == expected.keys()
    for key, values in expected.items():
        torch.testing.assert_close(
            blended.vectors[key].double(), torch.tensor(values, dtype=torch.float64), rtol=0, atol=1e-15
        )
    assert blended.vectors["q"].dtype == torch.float64
    assert blended.vectors["k"].dtype == torch.float32


def test_a_blend_of_one_is_that_one_and_of_none_the_base():
    expert = ExpertVector({"q": normal(50)})
    assert ExpertVector.blend([(1.0, expert)]) == expert
    assert ExpertVector.blend([(0.0, small_expert()), (1, expert)]) == expert
    assert ExpertVector.blend([(0, expert)]).is_base
    assert ExpertVector.blend([(1, expert), (-1, expert)]).is_base
    thirds = ExpertVector.blend([(1 / 3, expert)] * 3)
    torch.testing.assert_close(thirds.vectors["q"], expert.vectors["q"], rtol=0, atol=1e-14)


def test_a_blend_passes_gradients_on():
    z = torch.tensor([2.0, 3.0], requires_grad=True)
    blended = ExpertVector.blend([(0.5, ExpertVector({"q": z})), (2.0, small_expert())])
    blended.vectors["q"].sum().backward()
    assert torch.equal(z.grad, torch.tensor([0.5, 0.5]))


def test_a_blend_of_nothing_or_of_other_things_is_refused():
    with pytest.raises(ValueError, match="nothing to blend"):
        ExpertVector.blend([])
    with pytest.raises(ValueError, match="finite"):
        ExpertVector.blend([(float("nan"), small_expert())])
    with pytest.raises(TypeError, match="dict"):
        ExpertVector.blend([(1.0, {})])


def test_an_expert_that_fits_passes_the_check():
    check_expert_vector(small_expert(), {"layers.0.q_proj": (6, 9), "lm_head": (20, 3), "other": (1, 1)})


def test_unknown_modules_are_named_with_the_nearest_known_ones():
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj.*Did you mean.*model\.layers\.0\.q_proj"):
        check_expert_vector(small_expert(), {"model.layers.0.q_proj": (6, 9), "lm_head": (20, 3)})
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj.*The model has \['lm_head'\]"):
        check_expert_vector(small_expert(), {"lm_head": (20, 3)})


def test_an_expert_vector_of_another_model_is_named_without_hints():
    """An expert of 30 layers listed nine modules that it might mean; one given as a dict was called `None`."""
    names = [f"model.layers.{n}.mlp.up_proj" for n in range(30)]
    others = ExpertVector({name: torch.rand(2) for name in names}, "other")
    with pytest.raises(ValueError, match=r"'other' has vectors for 24 modules .*made for another model") as refused:
        check_expert_vector(others, dict.fromkeys(names[:6], (4, 4)))
    assert "Did you mean" not in str(refused.value)
    for sizes in ({"lm_head": (20, 3)}, {"q": (1, 1)}):
        with pytest.raises(ValueError, match="The expert vector has"):
            check_expert_vector(ExpertVector({"q": torch.rand(2)}), sizes)


@pytest.mark.parametrize("size", [(5, 9), (9, 5)])
def test_vectors_longer_than_the_spectrum_are_refused(size):
    with pytest.raises(ValueError, match=r"6 scales for `layers.0.q_proj`.*only 5 singular values"):
        check_expert_vector(small_expert(), {"layers.0.q_proj": size, "lm_head": (20, 3)})


def test_the_spectrum_tells_other_weights():
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5]))
    spectrum = spectrum_of({"q": compute_basis(weight)})
    assert spectrum == {"q": pytest.approx([4.0, 3.0, 2.0, 1.0])}
    expert = ExpertVector({"q": torch.ones(5)}, metadata={"spectrum": json.loads(json.dumps(spectrum))})
    check_spectrum(expert, "q", compute_basis(1.04 * weight).values)
    check_spectrum(expert, "q", compute_basis(weight, rank=2).values)
    check_spectrum(expert, "not recorded", compute_basis(9 * weight).values)
    check_spectrum(small_expert(), "q", compute_basis(9 * weight).values)
    for other in (1.06 * weight, 0.94 * weight, torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.1])), torch.nan * weight):
        values = other.diagonal()
        with pytest.raises(ValueError, match="trained on other weights"):
            check_spectrum(expert, "q", values)


def test_the_spectrum_of_a_low_rank_weight_is_not_judged_by_its_noise():
    expert = ExpertVector({}, metadata={"spectrum": {"q": [5.0, 1e-7, 1e-8, 0.0]}})
    check_spectrum(expert, "q", torch.tensor([5.0, 3e-7, 0.0, 0.0]))
