"""Expert vectors: what they mean, their files, and the bases they act in, judged by a plain SVD in float64."""

import copy
import errno
import json
import logging
import os
import pickle
import random
import threading

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import mambaformer.expert_bases_files_mambaformer as svd_files
import mambaformer.expert_bases_mambaformer as svd
import mambaformer.expert_vectors_mambaformer as experts
import mambaformer.files_mambaformer as files
from mambaformer.expert_bases_mambaformer import (
    SingularBases,
    SingularBasis,
    compute_basis,
)
from mambaformer.expert_linear_mambaformer import apply_expert_linear, merged_weight, scale_basis
from mambaformer.expert_vectors_mambaformer import (
    BASE_FINGERPRINT,
    ExpertVector,
    ExpertVectorLibrary,
    check_expert_vector,
    check_spectrum,
    expert_key,
    resolve_expert_vector,
    spectrum_of,
)

SHAPES = {"tall": (11, 6), "wide": (6, 11), "square": (7, 7), "column": (5, 1), "row": (1, 5)}
TOLERANCE = {"rtol": 0, "atol": 1e-10}


def random_tensor(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def random_linear(out_features, in_features, bias=False):
    module = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(random_tensor(out_features, in_features, seed=1))
        if bias:
            module.bias.copy_(random_tensor(out_features, seed=2))
    return module


def oracle(weight, z):
    """`U diag(s * z) V^T`, the definition."""
    left, values, right = torch.linalg.svd(weight.detach(), full_matrices=False)
    scales = torch.ones_like(values)
    scales[: len(z)] = z
    return left @ torch.diag(values * scales) @ right


def random_expert(seed=0, name="chef", **options):
    vectors = {"layers.0.q_proj": random_tensor(6, seed=seed, dtype=torch.float32)}
    vectors["lm_head"] = random_tensor(3, seed=seed + 100, dtype=torch.float32)
    return ExpertVector(vectors, name, **options)


@pytest.fixture
def counted_svd(monkeypatch):
    """The shapes of the matrices that were decomposed."""
    seen, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, *a, **k: seen.append(matrix.shape) or svd(matrix, *a, **k))
    return seen


# Meaning


@pytest.mark.parametrize("rank", [None, 1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_merged_equals_on_the_fly_equals_the_definition(shape, bias, rank):
    module = random_linear(*shape, bias)
    rank = min(rank or 99, *shape)
    z = random_tensor(rank, seed=3) * 2
    expected = oracle(module.weight, z)
    basis = compute_basis(module.weight)
    merged = merged_weight(module.weight, basis, z)
    torch.testing.assert_close(merged, expected, **TOLERANCE)
    hidden_states = random_tensor(2, 5, shape[1], seed=4)
    found = apply_expert_linear(module, hidden_states, scale_basis(basis, z))
    torch.testing.assert_close(found, nn.functional.linear(hidden_states, expected, module.bias), **TOLERANCE)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_every_row_gets_its_own_expert(shape, bias):
    module = random_linear(*shape, bias)
    narrow = min(shape)
    rows = [random_tensor(narrow, seed=5), None, random_tensor(max(1, narrow - 2), seed=6), torch.ones(narrow)]
    hidden_states = random_tensor(4, 3, shape[1], seed=7)
    found = apply_expert_linear(module, hidden_states, scale_basis(compute_basis(module.weight), rows))
    for row, z in enumerate(rows):
        expected = module.weight if z is None else oracle(module.weight, z)
        expected = nn.functional.linear(hidden_states[row], expected, module.bias)
        torch.testing.assert_close(found[row], expected, **TOLERANCE)
    base = module(hidden_states)
    assert torch.equal(found[1], base[1])
    assert torch.equal(found[3], base[3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_ones_and_no_expert_give_the_bits_of_the_base(shape, dtype):
    module = random_linear(*shape, bias=True).to(dtype)
    hidden_states = random_tensor(2, 3, shape[1]).to(dtype)
    base = module(hidden_states)
    basis = compute_basis(module.weight)
    assert torch.equal(apply_expert_linear(module, hidden_states), base)
    cast = basis.to(dtype, "cpu")
    assert torch.equal(apply_expert_linear(module, hidden_states, scale_basis(cast, torch.ones(24))), base)
    assert torch.equal(merged_weight(module.weight, basis, torch.ones(24)), module.weight)
    assert scale_basis(cast, None) is None
    assert scale_basis(cast, [None, None]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_half_precision_stays_in_its_dtype_and_near_the_definition(shape, dtype):
    """Looser: a few roundings of 8 (11) bits each, on outputs of scale 10."""
    module = random_linear(*shape, bias=True).to(dtype)
    hidden_states = random_tensor(2, 3, shape[1]).to(dtype)
    z = 1 + 0.3 * random_tensor(24, dtype=torch.float32)
    found = apply_expert_linear(module, hidden_states, scale_basis(compute_basis(module.weight).to(dtype, "cpu"), z))
    assert found.dtype == dtype
    exact = nn.functional.linear(hidden_states.double(), oracle(module.weight.double(), z), module.bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=60 * torch.finfo(dtype).eps)


def test_only_the_first_columns_of_the_basis_are_used():
    module = random_linear(9, 6)
    basis = compute_basis(module.weight)
    poisoned = SingularBasis(basis.vectors.clone(), basis.values, basis.side)
    poisoned.vectors[:, 2:] = torch.nan
    z = random_tensor(2)
    assert torch.equal(merged_weight(module.weight, poisoned, z), merged_weight(module.weight, basis, z))
    hidden_states = random_tensor(1, 4, 6)
    found = apply_expert_linear(module, hidden_states, scale_basis(poisoned, [z]))
    assert torch.equal(found, apply_expert_linear(module, hidden_states, scale_basis(basis, [z])))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_gradients_reach_the_scales_and_the_activations(shape):
    module = random_linear(*shape, bias=True).requires_grad_(False)
    basis = compute_basis(module.weight)
    z = random_tensor(3, seed=8).requires_grad_()
    hidden_states = random_tensor(2, 2, shape[1], seed=9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, x: apply_expert_linear(module, x, scale_basis(basis, z)), (z, hidden_states)
    )
    assert torch.autograd.gradcheck(
        lambda z, x: apply_expert_linear(module, x, scale_basis(basis, [z, None])), (z, hidden_states)
    )


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_project_compiles_as_one_graph(shape):
    module = random_linear(*shape, bias=True)
    scaled = scale_basis(compute_basis(module.weight), [random_tensor(3), None])
    hidden_states = random_tensor(2, 5, shape[1])
    compiled = torch.compile(apply_expert_linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(module, hidden_states, scaled), apply_expert_linear(module, hidden_states, scaled), **TOLERANCE
    )


def test_per_row_scales_refuse_activations_without_as_many_rows():
    """Broadcasting would have mixed the rows (B, in) x (B, 1, r) -> (B, B, r), or repeated one row, in silence."""
    module = random_linear(6, 4)
    scaled = scale_basis(compute_basis(module.weight), [random_tensor(3), None])
    for shape in [(2, 4), (1, 3, 4), (3, 3, 4)]:
        with pytest.raises(ValueError, match="expert vectors for 2 rows"):
            apply_expert_linear(module, random_tensor(*shape), scaled)


def test_a_wrapped_module_is_seen_only_from_outside():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states):
            return self.inner(hidden_states)

    module = random_linear(4, 6)
    scaled = scale_basis(compute_basis(module.weight), random_tensor(4))
    hidden_states = random_tensor(2, 3, 6)
    assert torch.equal(
        apply_expert_linear(Wrapper(module), hidden_states, scaled), apply_expert_linear(module, hidden_states, scaled)
    )


# Bases


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (8, 8), (300, 8)])
def test_a_basis_is_orthonormal_descending_and_on_the_narrow_side(shape, dtype, monkeypatch):
    monkeypatch.setattr(svd, "REDUCTION_ROWS", 64)  # so that (300, 8) takes several blocks
    weight = random_tensor(*shape).to(dtype)
    basis = compute_basis(weight)
    atol = 1e-12 if dtype == torch.float64 else 2e-5
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    assert basis.side == ("input" if shape[0] >= shape[1] else "output")
    assert basis.vectors.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(basis.values.double(), values, rtol=0, atol=atol)
    vectors = basis.vectors.double()
    torch.testing.assert_close(vectors.mT @ vectors, torch.eye(8, dtype=torch.float64), rtol=0, atol=atol)
    expected = right.mT if basis.side == "input" else left
    torch.testing.assert_close((vectors * expected).sum(0).abs(), torch.ones(8).double(), rtol=0, atol=atol)
    again = compute_basis(weight)
    assert torch.equal(again.vectors, basis.vectors)
    cut = compute_basis(weight, rank=3)
    assert torch.equal(cut.vectors, basis.vectors[:, :3])
    assert torch.equal(cut.values, basis.values[:3])


def test_a_float32_basis_of_an_ill_conditioned_weight_is_as_good_as_a_plain_svd():
    """Singular values from 1 to 1e-6: the normal equations (W^T W) would lose the last third of them."""
    left, right = torch.linalg.qr(random_tensor(400, 30)).Q, torch.linalg.qr(random_tensor(30, 30, seed=1)).Q
    exact = torch.logspace(0, -6, 30, dtype=torch.float64)
    weight = (left * exact @ right.mT).float()
    torch.testing.assert_close(compute_basis(weight).values.double(), exact, rtol=0, atol=5e-7)


@pytest.mark.parametrize(
    "weight",
    [torch.zeros(3), torch.zeros(2, 2, dtype=torch.int8), torch.zeros(2, 3, device="meta"), torch.zeros(0, 3)],
)
def test_a_weight_without_a_basis_is_named(weight, tmp_path):
    with pytest.raises(ValueError, match=r"without quantization"):
        compute_basis(weight)
    with pytest.raises(ValueError, match=r"`model.q_proj`.*without quantization"):
        SingularBases(tmp_path).get("model.q_proj", weight)
    with pytest.raises(ValueError, match=r"`model.q_proj`.*without quantization"):
        SingularBases(tmp_path).prepare({"model.q_proj": weight})


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_weight_that_is_not_finite_is_refused(value, tmp_path):
    weight = random_tensor(5, 4)
    weight[3, 2] = value
    with pytest.raises(ValueError, match=r"`q_proj`.*NaN or infinite"):
        SingularBases(tmp_path).get("q_proj", weight)


def test_a_rank_beyond_the_weight_is_refused(tmp_path):
    basis = compute_basis(random_tensor(5, 4))
    for call in (
        lambda: compute_basis(random_tensor(5, 4), rank=5),
        lambda: SingularBases(tmp_path).get("q", random_tensor(5, 4), rank=0),
        lambda: scale_basis(basis, torch.ones(5)),
        lambda: merged_weight(random_tensor(5, 4), basis, torch.ones(5)),
    ):
        with pytest.raises(ValueError, match="between 1 and"):
            call()


def test_the_second_process_reads_the_basis_from_disk(tmp_path, counted_svd):
    weight = random_tensor(9, 5)
    first = SingularBases(tmp_path).get("q", weight)
    assert len(counted_svd) == 1
    second = SingularBases(tmp_path).get("another name, same content", weight.clone())
    assert len(counted_svd) == 1
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.values, second.values)
    assert first.side == second.side


def test_a_basis_in_memory_needs_neither_disk_nor_svd(tmp_path, counted_svd, monkeypatch):
    weight = nn.Parameter(random_tensor(9, 5))
    bases = SingularBases(tmp_path)
    first = bases.get("q", weight)
    monkeypatch.setattr(svd_files, "read_tensors", None)
    monkeypatch.setattr(svd, "digest_of", None)
    assert bases.get("q", weight).vectors.data_ptr() == first.vectors.data_ptr()
    assert torch.equal(bases.get("q", weight, rank=2).vectors, first.vectors[:, :2])
    assert len(counted_svd) == 1


def test_rank_and_dtype_are_as_asked_and_a_higher_rank_is_fetched(tmp_path):
    weight = random_tensor(9, 5, dtype=torch.float32)
    exact = compute_basis(weight)
    bases = SingularBases(tmp_path)
    for rank in (2, 4, 1, None):
        found = bases.get("q", weight, rank=rank, dtype=torch.bfloat16, device="cpu")
        assert torch.equal(found.vectors, exact.vectors[:, :rank].bfloat16())
        assert torch.equal(found.values, exact.values[:rank])  # as exact as ever: they tell weights apart
    found = bases.get("q", weight, rank=3)
    assert found.vectors.dtype == torch.float32
    assert found.vectors.untyped_storage().nbytes() == 5 * 3 * 4  # no larger basis is kept alive behind it


def test_rows_of_any_length_and_none_share_a_half_precision_basis(tmp_path):
    basis = SingularBases(tmp_path).get("q", random_tensor(9, 5), dtype=torch.bfloat16)
    scaled = scale_basis(basis, [None, torch.tensor([1 + 2**-12, 3.0]), torch.tensor([2.0])])
    expected = torch.tensor([[0.0, 0.0], [2**-12, 2.0], [1.0, 0.0]])[:, None]
    assert torch.equal(scaled.delta.float(), expected)
    assert scaled.vectors.shape == (5, 2)


@pytest.mark.parametrize(
    "damage",
    [
        lambda data: b"",
        lambda data: data[:-1],
        lambda data: data[: len(data) // 2],
        lambda data: data[:-9] + bytes([data[-9] ^ 1]) + data[-8:],
        lambda data: data.replace(b'"version":"2"', b'"version":"3"'),
        lambda data: b"PK\x03\x04" + data,
    ],
)
def test_a_damaged_cache_file_is_computed_again_and_replaced(damage, tmp_path, counted_svd):
    weight = random_tensor(9, 5)
    expected = SingularBases(tmp_path).get("q", weight)
    (file,) = tmp_path.iterdir()
    whole = file.read_bytes()
    file.write_bytes(damage(whole))
    assert file.read_bytes() != whole
    found = SingularBases(tmp_path).get("q", weight)
    assert len(counted_svd) == 2
    assert torch.equal(found.vectors, expected.vectors)
    SingularBases(tmp_path).get("q", weight)
    assert len(counted_svd) == 2
    assert len(list(tmp_path.iterdir())) == 1


def test_a_cache_file_of_another_shape_is_not_believed(tmp_path):
    """Right format, right checksum, wrong content: a file renamed by hand."""
    small, large = random_tensor(9, 5), random_tensor(12, 8)
    expected = compute_basis(large)
    bases = SingularBases(tmp_path)
    bases.get("q", small)
    (file,) = tmp_path.iterdir()
    os.replace(file, bases._disk.path_of(svd.digest_of({"weight": large})))
    assert torch.equal(bases.get("p", large).vectors, expected.vectors)


def test_weights_changed_in_place_get_a_new_basis_and_the_old_one_is_dropped(tmp_path, counted_svd):
    weight = nn.Parameter(random_tensor(9, 5))
    bases = SingularBases(tmp_path)
    for step in range(3):
        for dtype in (torch.float64, torch.float32):
            found = bases.get("q", weight, dtype=dtype)
            torch.testing.assert_close(found.vectors, compute_basis(weight).vectors.to(dtype), **TOLERANCE)
        assert len(bases._entries["q"].casts) == 2
        assert len(bases._entries) == 1
        with torch.no_grad():
            weight.mul_(random_tensor(9, 5, seed=step + 1))


def test_a_new_weight_where_a_freed_one_was_gets_its_own_basis(tmp_path):
    """Address, version, shape and dtype may all come back after `module.weight = nn.Parameter(...)`."""
    memory = random_tensor(9, 5)
    bases = SingularBases(tmp_path)
    old = memory.detach()
    bases.get("q", old)
    memory.data.copy_(random_tensor(9, 5, seed=1))
    new = memory.detach()
    assert (old.data_ptr(), old._version) == (new.data_ptr(), new._version)
    assert torch.equal(bases.get("q", new).vectors, compute_basis(new).vectors)


def test_swapped_weights_get_swapped_bases(tmp_path):
    first, second = random_tensor(9, 5), random_tensor(9, 5, seed=1)
    bases = SingularBases(tmp_path)
    for weight in (first, second, first):
        assert torch.equal(bases.get("q", weight).vectors, compute_basis(weight).vectors)


def test_the_same_values_in_another_shape_or_dtype_are_another_weight(tmp_path):
    weight = random_tensor(6, 4, dtype=torch.float32)
    bases = SingularBases(tmp_path)
    bases.get("q", weight)
    assert bases.get("q", weight.reshape(4, 6)).side == "output"
    assert bases.get("q", weight.double()).vectors.dtype == torch.float64
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_costs_time_only_and_warns_once(tmp_path, caplog, counted_svd):
    (tmp_path / "file").write_text("")
    weights = {"q": random_tensor(9, 5), "k": random_tensor(5, 9)}
    bases = SingularBases(tmp_path / "file" / "folder")
    with caplog.at_level(logging.WARNING):
        bases.prepare(weights, progress=False)
        for name, weight in weights.items():
            assert torch.equal(bases.get(name, weight).vectors, compute_basis(weight).vectors)
            bases.get(name, weight, dtype=torch.float32)
    assert len(caplog.records) == 1
    assert "MAMBAFORMER_CACHE" in caplog.text
    assert len(counted_svd) == 4  # two of them by this test


def test_the_folder_is_the_variables_else_under_the_hub_home(tmp_path, monkeypatch):
    monkeypatch.setenv("MAMBAFORMER_CACHE", str(tmp_path / "mine"))
    assert SingularBases().cache_dir == tmp_path / "mine" / "singular_bases"
    assert SingularBases(tmp_path).cache_dir == tmp_path
    monkeypatch.delenv("MAMBAFORMER_CACHE")
    monkeypatch.setattr(files.hub_constants, "HF_HOME", str(tmp_path / "home"))
    assert SingularBases().cache_dir == tmp_path / "home" / "mambaformer" / "singular_bases"


def test_prepare_computes_what_is_missing_with_a_bar_and_nothing_without(tmp_path, counted_svd, monkeypatch):
    bars, tqdm = [], svd.tqdm

    def bar(total, **options):
        bars.append(total)
        return tqdm(total=total, disable=True)

    monkeypatch.setattr(svd, "tqdm", bar)
    weights = {"q": random_tensor(9, 5), "k": random_tensor(5, 9)}
    SingularBases(tmp_path).prepare({"q": weights["q"]}, progress=False)
    bases = SingularBases(tmp_path)
    bases.prepare(weights)
    bases.prepare(weights)
    assert len(counted_svd) == 2
    SingularBases(tmp_path).prepare(weights, progress=True)
    SingularBases(tmp_path / "new").prepare(weights, progress=False)
    assert bars == [1]  # nothing is shown where nothing is missing, nor where none is wanted
    bases.get("k", weights["k"])
    assert len(counted_svd) == 4


def test_two_threads_compute_a_basis_once(tmp_path, counted_svd):
    weights = [nn.Parameter(random_tensor(30, 20, seed=seed)) for seed in range(4)]
    expected = [compute_basis(weight).vectors for weight in weights]
    counted_svd.clear()
    bases, start, found = SingularBases(tmp_path), threading.Barrier(4), [[] for _ in range(4)]

    def work(mine):
        start.wait()
        for idx, weight in enumerate(weights):
            mine.append(bases.get(f"q{idx}", weight).vectors)

    threads = [threading.Thread(target=work, args=(mine,)) for mine in found]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for mine in found:
        assert len(mine) == 4
        assert all(torch.equal(a, b) for a, b in zip(mine, expected, strict=True))
    assert len(counted_svd) == 4


def test_bases_made_while_only_inferring_can_be_trained_through(tmp_path):
    """Tensors made under `torch.inference_mode` cannot be saved for a backward pass, and these outlive the call."""
    module = random_linear(6, 4)
    bases = SingularBases(tmp_path)
    with torch.inference_mode():
        bases.get("q", module.weight, rank=2, dtype=torch.float64)
        assert bases.get("k", random_tensor(5, 9), rank=2).rank == 2  # a weight that counts no versions
    z = torch.ones(2, dtype=torch.float64, requires_grad=True)
    basis = bases.get("q", module.weight, rank=2, dtype=torch.float64)
    apply_expert_linear(module, random_tensor(1, 2, 4), scale_basis(basis, z)).sum().backward()
    assert z.grad.abs().sum() > 0


def test_bases_and_library_can_be_copied_with_their_model(tmp_path):
    weight = random_tensor(6, 4)
    bases, library = SingularBases(tmp_path), ExpertVectorLibrary()
    bases.get("q", weight)
    library.add(random_expert())
    for duplicate in (copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        assert torch.equal(duplicate(bases).get("q", weight).vectors, bases.get("q", weight).vectors)
        assert duplicate(library)["chef"] == library["chef"]
        assert duplicate(library["chef"]).name == "chef"


# Expert vectors


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
    expert = random_expert()
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
    assert not random_expert().is_base


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
    expert = random_expert()
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
    expert = ExpertVector({"q": random_tensor(50)})
    assert ExpertVector.blend([(1.0, expert)]) == expert
    assert ExpertVector.blend([(0.0, random_expert()), (1, expert)]) == expert
    assert ExpertVector.blend([(0, expert)]).is_base
    assert ExpertVector.blend([(1, expert), (-1, expert)]).is_base
    thirds = ExpertVector.blend([(1 / 3, expert)] * 3)
    torch.testing.assert_close(thirds.vectors["q"], expert.vectors["q"], rtol=0, atol=1e-14)


def test_a_blend_passes_gradients_on():
    z = torch.tensor([2.0, 3.0], requires_grad=True)
    blended = ExpertVector.blend([(0.5, ExpertVector({"q": z})), (2.0, random_expert())])
    blended.vectors["q"].sum().backward()
    assert torch.equal(z.grad, torch.tensor([0.5, 0.5]))


def test_a_blend_of_nothing_or_of_other_things_is_refused():
    with pytest.raises(ValueError, match="nothing to blend"):
        ExpertVector.blend([])
    with pytest.raises(ValueError, match="finite"):
        ExpertVector.blend([(float("nan"), random_expert())])
    with pytest.raises(TypeError, match="dict"):
        ExpertVector.blend([(1.0, {})])


# Files


def test_what_is_saved_is_what_is_loaded(tmp_path):
    shared = torch.rand(3, requires_grad=True)
    vectors = {"a": shared, "b": shared, "c": torch.rand(5, dtype=torch.float64), "d": torch.rand(8)[::2]}
    for expert in (ExpertVector(vectors, "näme", {"step": 3, "spectrum": {"a": [1.5]}}), ExpertVector({})):
        expert.save(tmp_path / "e.safetensors")
        loaded = ExpertVector.load(str(tmp_path / "e.safetensors"))
        assert loaded == expert
        assert (loaded.name, loaded.metadata) == (expert.name, expert.metadata)
        assert loaded.vectors.keys() == expert.vectors.keys()
        assert all(torch.equal(loaded.vectors[key], expert.vectors[key]) for key in expert)
        assert all(loaded.vectors[key].dtype == expert.vectors[key].dtype for key in expert)
        assert not loaded.requires_grad
    assert [file.name for file in tmp_path.iterdir()] == ["e.safetensors"]


def test_a_loaded_expert_does_not_hang_on_its_file(tmp_path):
    expert = random_expert()
    expert.save(tmp_path / "e")
    loaded = ExpertVector.load(tmp_path / "e")
    with open(tmp_path / "e", "r+b") as file:
        file.truncate(0)
    assert torch.equal(loaded["lm_head"], expert["lm_head"])


def test_a_pickle_is_named_and_never_run(tmp_path):
    class Bomb:
        def __reduce__(self):
            return (open, (str(tmp_path / "exploded"), "w"))

    torch.save({"q": Bomb()}, tmp_path / "zip")
    torch.save({"q": Bomb()}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    (tmp_path / "pickle").write_bytes(pickle.dumps(Bomb()))
    (tmp_path / "pickle2").write_bytes(pickle.dumps(Bomb(), protocol=2))
    for kind in ("zip", "legacy", "pickle", "pickle2"):
        with pytest.raises(ValueError, match="which can run code"):
            ExpertVector.load(tmp_path / kind)
    assert not (tmp_path / "exploded").exists()


def header_with(**changes):
    fields = {"format": "mambaformer.expert_vector", "version": "1", "name": '"n"', "metadata": "{}"}
    fields["fingerprint"] = ExpertVector({"q": torch.full((3,), 2.0)}).fingerprint
    return {key: value for key, value in (fields | changes).items() if value is not None}


@pytest.mark.parametrize(
    ("header", "message"),
    [
        (None, "not of format"),
        ({"format": "pt"}, "not of format"),
        (header_with(version="2"), "upgrade"),
        (header_with(version="17"), "upgrade"),
        (header_with(version="one"), "unknown version"),
        (header_with(version=None), "unknown version"),
        (header_with(fingerprint=None), "not a valid expert"),
        (header_with(fingerprint=BASE_FINGERPRINT), "fingerprint mismatch"),
        (header_with(name="3"), "not a valid expert"),
        (header_with(name="{"), "not a valid expert"),
        (header_with(metadata="[1]"), "not a valid expert"),
    ],
)
def test_files_of_another_kind_say_so(header, message, tmp_path):
    save_file({"q": torch.full((3,), 2.0)}, tmp_path / "e", header)
    with pytest.raises(ValueError, match=message):
        ExpertVector.load(tmp_path / "e")


@pytest.mark.parametrize("bad", [torch.full((3, 1), 2.0), torch.tensor([torch.nan]), torch.ones(3).int()])
def test_files_with_wrong_vectors_say_so(bad, tmp_path):
    save_file({"q": bad}, tmp_path / "e", header_with())
    with pytest.raises(ValueError, match="not a valid expert vector: The vector of `q`"):
        ExpertVector.load(tmp_path / "e")


def test_a_file_by_other_hands_in_half_precision_is_read(tmp_path):
    save_file({"q": torch.full((3,), 2.0).bfloat16()}, tmp_path / "e", header_with())
    assert ExpertVector.load(tmp_path / "e").name == "n"


def test_missing_files_and_folders_say_so(tmp_path):
    with pytest.raises(FileNotFoundError):
        ExpertVector.load(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder"):
        ExpertVector.load(tmp_path)


def test_a_save_to_a_place_that_cannot_hold_it_names_the_place(tmp_path, monkeypatch):
    """The message named a hidden temporary file, or no file on a full disk; a folder got a file next to it."""
    expert = random_expert()
    with pytest.raises(FileNotFoundError, match=f"make it first: '{tmp_path / 'no'}'"):
        expert.save(tmp_path / "no" / "e")
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError, match=f"name of a file in it: '{tmp_path / 'folder'}'"):
        expert.save(tmp_path / "folder")

    def full(_):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match=f"No space left on device: '{tmp_path / 'e'}'") as refused:
        expert.save(tmp_path / "e")
    assert refused.value.errno == errno.ENOSPC
    assert [each.name for each in tmp_path.iterdir()] == ["folder"]


def test_every_cut_of_a_file_is_refused(tmp_path):
    random_expert().save(tmp_path / "e")
    data = (tmp_path / "e").read_bytes()
    for length in [*range(20), *range(20, len(data), 7), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ValueError, match="damaged or cut"):
            ExpertVector.load(tmp_path / "cut")


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path):
    expert = random_expert(metadata={"spectrum": {"lm_head": [3.0, 2.0]}})
    expert.save(tmp_path / "e")
    data = (tmp_path / "e").read_bytes()
    chance = random.Random(0)
    refused = 0
    for position in chance.sample(range(len(data)), min(300, len(data))):
        mutated = bytearray(data)
        mutated[position] ^= 1 << chance.randrange(8)
        (tmp_path / "mutated").write_bytes(mutated)
        try:
            loaded = ExpertVector.load(tmp_path / "mutated")
        except ValueError:
            refused += 1
        else:
            assert loaded == expert, position
            assert (loaded.name, loaded.metadata) == (expert.name, expert.metadata), position
            assert all(torch.equal(loaded.vectors[key], expert.vectors[key]) for key in expert), position
    assert refused > 200


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_file_whole(step, tmp_path, monkeypatch):
    old = random_expert(0)
    old.save(tmp_path / "e")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            random_expert(1).save(tmp_path / "e")
    assert ExpertVector.load(tmp_path / "e") == old
    assert [file.name for file in tmp_path.iterdir()] == ["e"]


def test_a_save_reaches_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: order.append("fsync") or fsync(*a))
    monkeypatch.setattr(os, "replace", lambda *a: order.append("replace") or replace(*a))
    random_expert().save(tmp_path / "e")
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder


# Checks against a model


def test_an_expert_that_fits_passes_the_check():
    check_expert_vector(random_expert(), {"layers.0.q_proj": (6, 9), "lm_head": (20, 3), "other": (1, 1)})


def test_unknown_modules_are_named_with_the_nearest_known_ones():
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj.*Did you mean.*model\.layers\.0\.q_proj"):
        check_expert_vector(random_expert(), {"model.layers.0.q_proj": (6, 9), "lm_head": (20, 3)})
    with pytest.raises(ValueError, match=r"layers\.0\.q_proj.*Some that exist: \['lm_head'\]"):
        check_expert_vector(random_expert(), {"lm_head": (20, 3)})


def test_a_vector_of_another_model_is_named_without_hints_and_one_without_a_name_has_none():
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
        check_expert_vector(random_expert(), {"layers.0.q_proj": size, "lm_head": (20, 3)})


def test_the_spectrum_tells_other_weights():
    weight = torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.0, 0.5]))
    spectrum = spectrum_of({"q": compute_basis(weight)})
    assert spectrum == {"q": pytest.approx([4.0, 3.0, 2.0, 1.0])}
    expert = ExpertVector({"q": torch.ones(5)}, metadata={"spectrum": json.loads(json.dumps(spectrum))})
    check_spectrum(expert, "q", compute_basis(1.04 * weight).values)
    check_spectrum(expert, "q", compute_basis(weight, rank=2).values)
    check_spectrum(expert, "not recorded", compute_basis(9 * weight).values)
    check_spectrum(random_expert(), "q", compute_basis(9 * weight).values)
    for other in (1.06 * weight, 0.94 * weight, torch.diag(torch.tensor([4.0, 3.0, 2.0, 1.1])), torch.nan * weight):
        values = other.diagonal()
        with pytest.raises(ValueError, match="trained on other weights"):
            check_spectrum(expert, "q", values)


def test_the_spectrum_of_a_low_rank_weight_is_not_judged_by_its_noise():
    expert = ExpertVector({}, metadata={"spectrum": {"q": [5.0, 1e-7, 1e-8, 0.0]}})
    check_spectrum(expert, "q", torch.tensor([5.0, 3e-7, 0.0, 0.0]))


# The library and what users pass


def test_a_library_holds_experts_by_name(tmp_path):
    library = ExpertVectorLibrary()
    assert library.names == []
    chef, nurse = random_expert(0), random_expert(1, name=None)
    library.add(chef)
    library.add("nurse-2.1", nurse)
    assert library["chef"] is chef
    assert library["nurse-2.1"] == nurse
    assert library["nurse-2.1"].name == "nurse-2.1"
    assert list(library) == library.names == ["chef", "nurse-2.1"]
    assert len(library) == 2
    assert "chef" in library
    assert "pilot" not in library
    library.save(tmp_path / "new" / "folder")
    other = ExpertVectorLibrary()
    assert other.load(tmp_path / "new" / "folder") == ["chef", "nurse-2.1"]
    assert other["nurse-2.1"] == nurse
    del other["chef"]
    assert other.names == ["nurse-2.1"]


def test_an_unknown_name_lists_the_known_ones():
    library = ExpertVectorLibrary()
    with pytest.raises(ValueError, match="none yet"):
        library["chef"]
    library.add(random_expert())
    with pytest.raises(ValueError, match=r"'cook'.*\['chef'\]"):
        library["cook"]
    with pytest.raises(ValueError, match=r"'cook'.*\['chef'\]"):
        del library["cook"]


@pytest.mark.parametrize("name", ["", ".hidden", "..", "a/b", "a\\b", "a b", "a\n", "ä", None, 3])
def test_names_that_cannot_be_file_names_are_refused(name):
    library = ExpertVectorLibrary()
    expert = ExpertVector({}, name=name) if name is None or isinstance(name, str) else ExpertVector({})
    with pytest.raises(ValueError, match=r"add\(name|name="):
        library.add(expert) if name is None else library.add(name, expert)
    assert len(library) == 0


def test_a_library_makes_experts_of_dicts():
    """`add` took an `ExpertVector` alone, a class that remote code does not let its users import."""
    library, chef = ExpertVectorLibrary(), random_expert()
    assert library.add("cook", dict(chef.vectors)) is library["cook"]
    assert library["cook"] == chef and library["cook"].name == "cook"
    assert library.add(chef) is chef
    assert library.add("chef", {"q": [2.0, 0.5]}) == ExpertVector({"q": torch.tensor([2.0, 0.5])})
    assert library.names == ["cook", "chef"]


@pytest.mark.parametrize(
    ("arguments", "error", "hint"),
    [
        (("bold", None), TypeError, "`ExpertVector` or a dict"),
        (("bold", [1.0]), TypeError, "`ExpertVector` or a dict"),
        (("bold", 3), TypeError, "`ExpertVector` or a dict"),
        (("bold",), TypeError, "`ExpertVector` or a dict"),
        (({"q": [2.0]},), ValueError, "has no name"),
        ((ExpertVector({"q": [2.0]}), "bold"), TypeError, r"name comes first: `add\('bold', \.\.\.\)`"),
        (({"q": [2.0]}, {"q": [2.0]}), ValueError, "cannot name"),
        (("bold", {"q": [float("nan")]}), ValueError, "NaN"),
        (("bold", {"q": [[2.0]]}), ValueError, "shape"),
        (("bold", {"q": []}), ValueError, "shape"),
        (("bold", {"q": "2.0"}), TypeError, "tensor, an array or a list"),
        (("../bold", {"q": [2.0]}), ValueError, "cannot name"),
    ],
)
def test_a_library_refuses_other_things_and_keeps_what_it_has(arguments, error, hint):
    library = ExpertVectorLibrary()
    library.add("bold", {"q": [3.0]})
    with pytest.raises(error, match=hint):
        library.add(*arguments)
    assert library.names == ["bold"] and library["bold"]["q"].tolist() == [3.0]


def test_a_library_blends_names_vectors_dicts_and_the_base():
    library, chef = ExpertVectorLibrary(), random_expert()
    library.add("chef", chef)
    parts = [(0.5, "chef"), (0.25, ExpertVector({"q": [3.0]})), (0.25, {"q": [5.0]}), (7, None)]
    expected = [(0.5, chef), (0.25, ExpertVector({"q": [3.0]})), (0.25, ExpertVector({"q": [5.0]}))]
    blended = library.blend(parts, name="mix")
    assert blended == ExpertVector.blend(expected) and blended.name == "mix"
    assert library.names == ["chef"]


@pytest.mark.parametrize(
    ("parts", "error", "hint"),
    [
        ([], ValueError, "nothing to blend"),
        ([("chef", 0.5)], TypeError, "'chef' for a weight"),
        (["chef"], TypeError, r"pairs \(weight, expert vector\), got 'chef'"),
        ([0.5, "chef"], TypeError, "pairs"),
        ([(0.5, "cook")], ValueError, r"'cook'.*\['chef'\]"),
        ([(0.5, 3)], TypeError, "got int for the latter"),
        ([(float("inf"), "chef")], ValueError, "finite"),
        ([(10**400, "chef")], TypeError, "for a weight"),
    ],
)
def test_a_library_refuses_blends_of_other_things(parts, error, hint):
    library = ExpertVectorLibrary()
    library.add(random_expert())
    with pytest.raises(error, match=hint):
        library.blend(parts)


def test_a_class_blend_says_where_names_are_blended():
    with pytest.raises(TypeError, match=r"'chef' is a name.*expert_vectors\.blend"):
        ExpertVector.blend([(1.0, "chef")])


def test_names_that_some_file_systems_take_for_one_are_not_saved(tmp_path):
    """On Windows and macOS one file overwrote the other, and both names loaded the same vectors."""
    library = ExpertVectorLibrary()
    library.add("chef", {"q": [2.0]})
    library.add("Chef", {"q": [3.0]})
    library.add("cook", {"q": [3.0]})
    with pytest.raises(ValueError, match=r"\['chef', 'Chef'\].*rename"):
        library.save(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    del library["Chef"]
    library.save(tmp_path / "new")


def test_a_file_is_loaded_under_its_given_else_stored_else_file_name(tmp_path):
    random_expert(0).save(tmp_path / "file-a.safetensors")
    random_expert(1, name=None).save(tmp_path / "file-b.safetensors")
    library = ExpertVectorLibrary()
    assert library.load(tmp_path / "file-a.safetensors") == ["chef"]
    assert library.load(str(tmp_path / "file-b.safetensors")) == ["file-b"]
    assert library.load(tmp_path / "file-a.safetensors", name="cook") == ["cook"]
    assert library["file-b"] == random_expert(1)
    assert library["cook"].name == "cook"


def test_a_folder_is_loaded_whole_or_not_at_all(tmp_path):
    library = ExpertVectorLibrary()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        library.load(tmp_path)
    random_expert(0).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="only with one file"):
        library.load(tmp_path, name="x")
    save_file({"q": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        library.load(tmp_path)
    assert len(library) == 0
    random_expert(1).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="two expert vectors named 'chef'"):
        library.load(tmp_path)
    assert len(library) == 0


def test_whatever_users_pass_resolves_to_experts():
    library, expert = ExpertVectorLibrary(), random_expert()
    library.add(expert)
    assert resolve_expert_vector(None) is None
    assert resolve_expert_vector("chef", library) is expert
    assert resolve_expert_vector(expert) is expert
    assert resolve_expert_vector(dict(expert.vectors)) == expert
    assert resolve_expert_vector([None, "chef"], library) == [None, expert]
    assert resolve_expert_vector((expert, dict(expert.vectors))) == [expert, expert]


def test_an_expert_that_changes_nothing_resolves_to_the_base_unless_it_is_trained():
    assert resolve_expert_vector({"q": torch.ones(3)}) is None
    assert resolve_expert_vector([ExpertVector({}), random_expert()])[0] is None
    trained = ExpertVector({"q": torch.ones(3, requires_grad=True)})
    assert resolve_expert_vector(trained) is trained


def test_an_expert_of_another_copy_of_the_class_is_an_expert():
    """The remote-code loader may load this module twice."""

    class Twin:
        name, metadata = "twin", {}
        vectors = random_expert().vectors
        fingerprint = random_expert().fingerprint

    twin, library = Twin(), ExpertVectorLibrary()
    assert resolve_expert_vector(twin) is twin
    assert random_expert() == twin
    library.add("other", twin)
    assert library["other"] == random_expert()
    assert ExpertVector.blend([(1, twin)]) == random_expert()


@pytest.mark.parametrize("value", [3, 1.5, torch.ones(3), object(), [[None]], [None, 3]])
def test_what_is_no_expert_is_refused(value):
    with pytest.raises(TypeError, match="expert_vector"):
        resolve_expert_vector(value)


def test_names_without_a_library_and_empty_lists_are_refused():
    with pytest.raises(ValueError, match="no library"):
        resolve_expert_vector("chef")
    with pytest.raises(ValueError, match="none yet"):
        resolve_expert_vector("chef", ExpertVectorLibrary())
    with pytest.raises(ValueError, match="empty list"):
        resolve_expert_vector([])


def test_the_key_is_the_content_row_by_row():
    a, b = random_expert(0), random_expert(1)
    assert expert_key(None) == BASE_FINGERPRINT
    assert expert_key(a) == a.fingerprint
    assert expert_key([a, None, b], rows=3) == (a.fingerprint, BASE_FINGERPRINT, b.fingerprint)
    assert expert_key([a, random_expert(0, name="same")]) == a.fingerprint
    assert expert_key([None, None]) == BASE_FINGERPRINT
    assert expert_key(a, rows=5) == a.fingerprint
    with pytest.raises(ValueError, match="2 expert vectors for a batch of 3 rows"):
        expert_key([a, b], rows=3)
