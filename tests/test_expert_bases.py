"""Singular bases: what they are, and how they are kept in memory and in files."""

import copy
import logging
import os
import pickle
import threading

import pytest
import torch
from torch import nn

import mambaformer.expert_bases_files_mambaformer as svd_files
import mambaformer.expert_bases_mambaformer as svd
import mambaformer.files_mambaformer as files
from loops import normal
from mambaformer.expert_bases_mambaformer import (
    SingularBases,
    compute_basis,
)
from mambaformer.expert_linear_mambaformer import apply_expert_linear, merged_weight, scale_basis
from mambaformer.expert_vectors_mambaformer import (
    ExpertVectorLibrary,
)
from tiny_models import random_linear, small_expert


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(50, 8), (8, 50), (8, 8), (300, 8)])
def test_a_basis_is_orthonormal_descending_and_on_the_narrow_side(shape, dtype, monkeypatch):
    monkeypatch.setattr(svd, "REDUCTION_ROWS", 64)  # so that (300, 8) takes several blocks
    weight = normal(*shape).to(dtype)
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


def test_a_basis_of_an_ill_conditioned_weight_is_as_good_as_a_plain_svd():
    """Singular values from 1 to 1e-6: the normal equations (W^T W) would lose the last third of them."""
    left, right = torch.linalg.qr(normal(400, 30)).Q, torch.linalg.qr(normal(30, 30, seed=1)).Q
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
    weight = normal(5, 4)
    weight[3, 2] = value
    with pytest.raises(ValueError, match=r"`q_proj`.*NaN or infinite"):
        SingularBases(tmp_path).get("q_proj", weight)


def test_a_rank_beyond_the_weight_is_refused(tmp_path):
    basis = compute_basis(normal(5, 4))
    for call in (
        lambda: compute_basis(normal(5, 4), rank=5),
        lambda: SingularBases(tmp_path).get("q", normal(5, 4), rank=0),
        lambda: scale_basis(basis, torch.ones(5)),
        lambda: merged_weight(normal(5, 4), basis, torch.ones(5)),
    ):
        with pytest.raises(ValueError, match="between 1 and"):
            call()


def test_the_second_process_reads_the_basis_from_disk(tmp_path, counted_svd):
    weight = normal(9, 5)
    first = SingularBases(tmp_path).get("q", weight)
    assert len(counted_svd) == 1
    second = SingularBases(tmp_path).get("another name, same content", weight.clone())
    assert len(counted_svd) == 1
    assert torch.equal(first.vectors, second.vectors)
    assert torch.equal(first.values, second.values)
    assert first.side == second.side


def test_a_basis_in_memory_needs_neither_disk_nor_svd(tmp_path, counted_svd, monkeypatch):
    weight = nn.Parameter(normal(9, 5))
    bases = SingularBases(tmp_path)
    first = bases.get("q", weight)
    monkeypatch.setattr(svd_files, "read_tensors", None)
    monkeypatch.setattr(svd, "digest_of", None)
    assert bases.get("q", weight).vectors.data_ptr() == first.vectors.data_ptr()
    assert torch.equal(bases.get("q", weight, rank=2).vectors, first.vectors[:, :2])
    assert len(counted_svd) == 1


def test_rank_and_dtype_are_as_asked_and_a_higher_rank_is_fetched(tmp_path):
    weight = normal(9, 5, dtype=torch.float32)
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
    basis = SingularBases(tmp_path).get("q", normal(9, 5), dtype=torch.bfloat16)
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
    weight = normal(9, 5)
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
    small, large = normal(9, 5), normal(12, 8)
    expected = compute_basis(large)
    bases = SingularBases(tmp_path)
    bases.get("q", small)
    (file,) = tmp_path.iterdir()
    os.replace(file, bases._disk.path_of(svd.digest_of({"weight": large})))
    assert torch.equal(bases.get("p", large).vectors, expected.vectors)


def test_weights_changed_in_place_get_a_new_basis_and_the_old_one_is_dropped(tmp_path, counted_svd):
    weight = nn.Parameter(normal(9, 5))
    bases = SingularBases(tmp_path)
    for step in range(3):
        for dtype in (torch.float64, torch.float32):
            found = bases.get("q", weight, dtype=dtype)
            torch.testing.assert_close(found.vectors, compute_basis(weight).vectors.to(dtype), rtol=0, atol=1e-10)
        assert len(bases._entries["q"].casts) == 2
        assert len(bases._entries) == 1
        with torch.no_grad():
            weight.mul_(normal(9, 5, seed=step + 1))


def test_a_new_weight_where_a_freed_one_was_gets_its_own_basis(tmp_path):
    """Address, version, shape and dtype may all come back after `module.weight = nn.Parameter(...)`."""
    memory = normal(9, 5)
    bases = SingularBases(tmp_path)
    old = memory.detach()
    bases.get("q", old)
    memory.data.copy_(normal(9, 5, seed=1))
    new = memory.detach()
    assert (old.data_ptr(), old._version) == (new.data_ptr(), new._version)
    assert torch.equal(bases.get("q", new).vectors, compute_basis(new).vectors)


def test_swapped_weights_get_swapped_bases(tmp_path):
    first, second = normal(9, 5), normal(9, 5, seed=1)
    bases = SingularBases(tmp_path)
    for weight in (first, second, first):
        assert torch.equal(bases.get("q", weight).vectors, compute_basis(weight).vectors)


def test_the_same_values_in_another_shape_or_dtype_are_another_weight(tmp_path):
    weight = normal(6, 4, dtype=torch.float32)
    bases = SingularBases(tmp_path)
    bases.get("q", weight)
    assert bases.get("q", weight.reshape(4, 6)).side == "output"
    assert bases.get("q", weight.double()).vectors.dtype == torch.float64
    assert len(list(tmp_path.iterdir())) == 3


def test_a_folder_that_cannot_be_written_costs_time_only_and_warns_once(tmp_path, caplog, counted_svd):
    (tmp_path / "file").write_text("")
    weights = {"q": normal(9, 5), "k": normal(5, 9)}
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
    weights = {"q": normal(9, 5), "k": normal(5, 9)}
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
    weights = [nn.Parameter(normal(30, 20, seed=seed)) for seed in range(4)]
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
        assert bases.get("k", normal(5, 9), rank=2).rank == 2  # a weight that counts no versions
    z = torch.ones(2, dtype=torch.float64, requires_grad=True)
    basis = bases.get("q", module.weight, rank=2, dtype=torch.float64)
    apply_expert_linear(module, normal(1, 2, 4), scale_basis(basis, z)).sum().backward()
    assert z.grad.abs().sum() > 0


def test_bases_and_library_can_be_copied_with_their_model(tmp_path):
    weight = normal(6, 4)
    bases, library = SingularBases(tmp_path), ExpertVectorLibrary()
    bases.get("q", weight)
    library.add(small_expert())
    for duplicate in (copy.deepcopy, lambda it: pickle.loads(pickle.dumps(it))):
        assert torch.equal(duplicate(bases).get("q", weight).vectors, bases.get("q", weight).vectors)
        assert duplicate(library)["chef"] == library["chef"]
        assert duplicate(library["chef"]).name == "chef"
