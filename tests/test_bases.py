"""Singular bases: their files, the limit of the folder, their accuracy, and what users see of the work."""

import logging
import os
import threading

import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from transformers.utils import logging as transformers_logging

import mambaformer.expert_bases_files_mambaformer as svd_files
import mambaformer.expert_bases_mambaformer as svd
import mambaformer.ops_cpu_threads_mambaformer as threads
from loops import normal
from mambaformer.expert_bases_mambaformer import SingularBases, compute_basis
from mambaformer.expert_linear_mambaformer import merged_weight
from mambaformer.files_mambaformer import digest_of, with_checksum
from tiny_models import new_model


def plant(folder, weight, tensors, **changes):
    """A file as this project writes it, checksum and all, for `weight`."""
    digest = digest_of({"weight": weight})
    header = {"format": svd_files.BASIS_FORMAT, "version": str(svd_files.FORMAT_VERSION), "weight": digest} | changes
    save_file(tensors, folder / f"{digest}.safetensors", with_checksum(header, tensors))
    return folder / f"{digest}.safetensors"


def exact_tensors(weight):
    basis = compute_basis(weight)
    return {"vectors": basis.vectors, "values": basis.values}


def basis_files(folder):
    return sorted(path for path in folder.iterdir() if path.suffix == ".safetensors")


def assert_same_basis(found, weight):
    expected = compute_basis(weight)
    assert torch.equal(found.vectors, expected.vectors)
    assert torch.equal(found.values, expected.values)


# Files are checked


def not_finite(tensors):
    tensors["vectors"][0, 1] = torch.nan


def not_orthonormal(tensors):
    tensors["vectors"][:, 1] *= 1.01


def ascending(tensors):
    tensors["vectors"], tensors["values"] = tensors["vectors"].flip(1).contiguous(), tensors["values"].flip(0)


def infinite_values(tensors):
    tensors["values"][0] = torch.inf


def negative_values(tensors):
    tensors["values"][-1] *= -1


def other_values(tensors):
    tensors["values"] *= 1.001


def of_another_weight(tensors):
    tensors["vectors"] = compute_basis(normal(6, 6, seed=3).to(tensors["vectors"].dtype)).vectors


def two_directions_turned(tensors):
    a, b = tensors["vectors"][:, 0].clone(), tensors["vectors"][:, 1].clone()
    tensors["vectors"][:, 0], tensors["vectors"][:, 1] = 0.8 * a + 0.6 * b, 0.8 * b - 0.6 * a


def other_dtype(tensors):
    tensors["vectors"] = tensors["vectors"].to(torch.float16)


def cut_to_fewer_directions(tensors):
    tensors["vectors"], tensors["values"] = tensors["vectors"][:, :4].contiguous(), tensors["values"][:4].contiguous()


def more_than_a_basis(tensors):
    tensors["more"] = torch.zeros(1)


WRONG = (not_finite, not_orthonormal, ascending, infinite_values, negative_values, other_values, of_another_weight)
WRONG += (two_directions_turned, other_dtype, cut_to_fewer_directions, more_than_a_basis)


@pytest.mark.parametrize("spoil", WRONG, ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize(("shape", "dtype"), [((9, 6), torch.float64), ((6, 9), torch.float32)])
def test_a_sealed_file_that_is_not_the_basis_is_made_again(spoil, shape, dtype, tmp_path):
    """Only the checksum was looked at: any numbers under a right one were taken for the basis of the weight."""
    weight = normal(*shape, dtype=dtype)
    tensors = exact_tensors(weight)
    spoil(tensors)
    file = plant(tmp_path, weight, tensors)
    planted = file.read_bytes()
    assert_same_basis(SingularBases(tmp_path).get("q", weight), weight)
    assert file.read_bytes() != planted
    assert svd_files.BasisFolder(tmp_path).read(digest_of({"weight": weight}), weight) is not None


@pytest.mark.parametrize("scale", [0.0, 1e-30, 1.0, 1e30])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40), (1, 5)])
def test_a_right_file_is_used_whatever_the_size_of_the_numbers(shape, dtype, scale, tmp_path, monkeypatch):
    weight = (normal(*shape) * scale).to(dtype)
    weight[:, 0] = weight[:, -1]  # as many directions as columns, but for one
    expected = SingularBases(tmp_path).get("q", weight)
    monkeypatch.setattr(svd, "compute_basis", None)
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")  # few bits in products, which must not make files look wrong
    try:
        found = SingularBases(tmp_path).get("q", weight)
    finally:
        torch.set_float32_matmul_precision(before)
    assert torch.equal(found.vectors, expected.vectors)


def test_a_file_of_the_version_before_is_made_again_at_once(tmp_path):
    """`prepare` took any file of the right name for a basis, and the first forward then computed all without a bar."""
    weight = normal(9, 6)
    file = plant(tmp_path, weight, exact_tensors(weight), version="1")
    SingularBases(tmp_path).prepare({"q": weight})
    assert b'"version":"2"' in file.read_bytes()


@pytest.mark.parametrize("kind", ["pipe", "folder", "link to nothing", "larger than memory"])
def test_what_is_no_file_of_the_right_size_is_never_opened(kind, tmp_path):
    """A pipe of the right name stopped the process for good, and a file of any size was read into memory."""
    weight = normal(9, 6)
    path = tmp_path / f"{digest_of({'weight': weight})}.safetensors"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "link to nothing":
        path.symlink_to(tmp_path / "nothing")
    else:
        with open(path, "wb") as file:
            file.truncate(1 << 40)
    found = []
    reader = threading.Thread(target=lambda: found.append(SingularBases(tmp_path).get("q", weight)), daemon=True)
    reader.start()
    reader.join(20)
    assert not reader.is_alive()
    assert_same_basis(found[0], weight)


def test_a_folder_that_others_may_write_is_used_with_what_is_right_in_it(tmp_path):
    """Bases are numbers, each is proved against its weight: a team may share them, unlike compiled kernels."""
    tmp_path.chmod(0o777)
    right, wrong = normal(9, 6), normal(9, 6, seed=1)
    file = plant(tmp_path, right, exact_tensors(right))
    file.chmod(0o666)
    plant(tmp_path, wrong, exact_tensors(right))
    os.utime(file, (1, 1))
    bases = SingularBases(tmp_path)
    assert_same_basis(bases.get("right", right), right)
    assert_same_basis(bases.get("wrong", wrong), wrong)
    assert file.stat().st_mtime > 1  # it was read
    assert len(basis_files(tmp_path)) == 2


# The folder has a limit


def stored_size(weight):
    return (
        exact_tensors(weight)["vectors"].nbytes + exact_tensors(weight)["values"].nbytes + svd_files.MOST_HEADER_BYTES
    )


def with_limit(folder, limit):
    bases = SingularBases(folder)
    bases._disk = svd_files.BasisFolder(folder, limit)
    return bases


def test_the_least_recently_used_files_go_first(tmp_path):
    """The folder only grew: 20 steps of training left 740 files."""
    weights = [normal(50, 40, seed=seed) for seed in range(6)]
    room = 3 * stored_size(weights[0])
    for idx, weight in enumerate(weights[:3]):
        with_limit(tmp_path, room).get("q", weight)
        os.utime(svd_files.BasisFolder(tmp_path).path_of(digest_of({"weight": weight})), (100 + idx, 100 + idx))
    other = tmp_path / "model.safetensors"
    other.write_bytes(bytes(100_000))
    os.utime(other, (1, 1))
    with_limit(tmp_path, room).get("q", weights[0])  # used again, so the next one is the oldest now
    with_limit(tmp_path, room).get("q", weights[3])
    kept = {digest_of({"weight": weights[idx]}) for idx in (0, 2, 3)}
    assert {file.stem for file in basis_files(tmp_path)} == kept | {"model"}


def test_many_bases_stay_within_the_limit_and_are_right(tmp_path):
    weights = [normal(50, 40, seed=seed) for seed in range(20)]
    bases = with_limit(tmp_path, 4 * stored_size(weights[0]))
    bases.prepare({str(idx): weight for idx, weight in enumerate(weights)}, progress=False)
    assert len(basis_files(tmp_path)) in (3, 4)
    for idx, weight in enumerate(weights):
        assert_same_basis(bases.get(str(idx), weight), weight)
    assert sum(file.stat().st_size for file in basis_files(tmp_path)) <= bases._disk.limit


def test_writers_side_by_side_keep_the_limit_and_never_fail(tmp_path, caplog):
    """Each has its own count of what is there, and removes files that others are about to read or remove."""
    weights = [normal(24, 16, seed=seed) for seed in range(24)]
    expected = [compute_basis(weight).vectors for weight in weights]
    limit, failures = 20 * stored_size(weights[0]), []

    def work(start):
        try:
            for step in range(len(weights)):
                idx = (start + step) % len(weights)
                found = with_limit(tmp_path, limit).get(str(idx), weights[idx])
                assert torch.equal(found.vectors, expected[idx])
        except BaseException as error:
            failures.append(error)

    writers = [threading.Thread(target=work, args=(8 * idx,)) for idx in range(3)]
    for writer in writers:
        writer.start()
    for writer in writers:
        writer.join()
    assert not failures
    assert not caplog.records
    assert sum(file.stat().st_size for file in basis_files(tmp_path)) <= limit * (1 + 3 / 16)


def test_files_of_writers_that_were_killed_are_removed(tmp_path):
    left = tmp_path / f".{'0' * 16}-{'1' * 32}.tmp"
    left.write_bytes(b"half a basis of a weight that nobody has any more")
    SingularBases(tmp_path).get("q", normal(9, 6))
    assert not left.exists()


def test_a_limit_of_0_keeps_the_disk_clean_without_a_word(tmp_path, monkeypatch, caplog):
    monkeypatch.setenv(svd_files.LIMIT, "0")
    weight = normal(9, 6)
    assert_same_basis(SingularBases(tmp_path / "new").get("q", weight), weight)
    assert not (tmp_path / "new").exists()
    assert not caplog.records


@pytest.mark.parametrize("text", ["four", "4GB", "-1", "nan", "inf"])
def test_a_limit_that_is_no_size_is_refused(text, tmp_path, monkeypatch):
    monkeypatch.setenv(svd_files.LIMIT, text)
    with pytest.raises(ValueError, match=rf"MAMBAFORMER_BASES_GB='{text}'.*such as 4"):
        SingularBases(tmp_path)


def test_the_limit_is_in_gigabytes_and_4_by_default(tmp_path, monkeypatch):
    monkeypatch.delenv(svd_files.LIMIT, raising=False)
    assert svd_files.limit_in_bytes() == 4_000_000_000
    monkeypatch.setenv(svd_files.LIMIT, "0.5")
    assert SingularBases(tmp_path)._disk.limit == 500_000_000


@pytest.mark.parametrize("change", ["in place", "replaced"])
def test_bases_of_weights_in_training_stay_off_the_disk(change, tmp_path):
    """Each step of training wrote a basis of every weight, and none of them could ever be asked for again."""
    module, bases = nn.Linear(6, 9, bias=False), SingularBases(tmp_path)
    for seed in range(5):
        new = normal(9, 6, seed=seed, dtype=torch.float32)
        with torch.no_grad():
            module.weight.copy_(new) if change == "in place" else setattr(module, "weight", nn.Parameter(new))
        assert_same_basis(bases.get("q", module.weight), new)
        assert bases.get("q", module.weight, dtype=torch.float64).vectors.dtype == torch.float64
    assert len(basis_files(tmp_path)) == 1
    assert len(bases._entries) == 1
    bases.prepare({"q": module.weight})  # who asks for it means it
    assert len(basis_files(tmp_path)) == 2


def test_weights_in_another_dtype_are_not_weights_in_training(tmp_path):
    module, bases = nn.Linear(6, 9), SingularBases(tmp_path)
    for dtype in (torch.float32, torch.bfloat16):
        bases.get("q", module.to(dtype).weight)
    assert len(basis_files(tmp_path)) == 2


@pytest.mark.slow
def test_training_a_model_under_an_expert_leaves_the_files_of_its_start(tmp_path):
    """20 steps with an expert vector in force, all weights trained, left 20 files for each module that it scales."""
    model = new_model("everything")
    model._singular_bases = SingularBases(tmp_path)
    names = list(model.linear_modules())[:3]
    expert = {name: torch.tensor([1.5, 0.5]).double() for name in names}
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3)
    for _ in range(4):
        ids = torch.randint(0, model.config.vocab_size, (1, 5))
        model(ids, labels=ids, expert_vector=expert, use_cache=False).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    assert len(basis_files(tmp_path)) == 3


# Accuracy and threads


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("shape", [(160, 96), (96, 160), (128, 128)])
def test_scaled_weights_are_those_of_an_svd_in_float64(shape, dtype):
    """Float32 vectors of neighbouring singular values mixed: W' was off by 2e-5 to 2e-4 at SmolLM2's sizes."""
    weight = normal(*shape).to(dtype)
    left, values, right = torch.linalg.svd(weight.double(), full_matrices=False)
    z = 1 + 0.5 * normal(min(shape), seed=1)
    basis = compute_basis(weight)
    assert basis.vectors.dtype == torch.float32
    found = merged_weight(weight.double(), basis, z)
    torch.testing.assert_close(found, left @ torch.diag(values * z) @ right, rtol=0, atol=1e-6)
    torch.testing.assert_close(basis.values.double(), values, rtol=1e-6, atol=1e-6)
    identity = torch.eye(min(shape), dtype=torch.float64)
    torch.testing.assert_close(basis.vectors.double().mT @ basis.vectors.double(), identity, rtol=0, atol=2e-7)


@pytest.mark.parametrize("rows", [7, 16, 100])
def test_a_weight_reduced_in_blocks_has_the_basis_of_the_whole(rows, monkeypatch):
    weight = normal(100, 6, dtype=torch.float32)
    expected = compute_basis(weight)
    monkeypatch.setattr(svd, "REDUCTION_ROWS", rows)
    found = compute_basis(weight)
    torch.testing.assert_close(found.vectors.abs(), expected.vectors.abs(), rtol=0, atol=1e-6)
    torch.testing.assert_close(found.values, expected.values)


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


def number_in_a_new_thread():
    numbers = []
    thread = threading.Thread(target=lambda: numbers.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    return numbers[0]


def test_workers_run_on_one_thread_each_and_nobody_else_does(two_threads):
    """On a busy machine, two threads of LAPACK that wait for each other took 13 s, two that do not took 0.9 s."""
    with threads.SideBySide(2) as workers:
        assert workers.submit(torch.get_num_threads).result() == 1
        assert [future.result() for future in [workers.submit(torch.get_num_threads) for _ in range(8)]] == [1] * 8
        assert torch.get_num_threads() == 2
        assert number_in_a_new_thread() == 2
        (torch.ones(300, 300) @ torch.ones(300, 300)).sum()
        assert workers.submit(torch.get_num_threads).result() == 1
    assert torch.get_num_threads() == 2
    assert number_in_a_new_thread() == 2


def test_side_by_side_gives_what_one_by_one_gives(two_threads, tmp_path, monkeypatch):
    monkeypatch.setattr(svd, "SIDE_BY_SIDE", 20)  # some of them are large
    shapes = [(30, 20), (20, 30), (40, 24), (7, 7)] * 4
    weights = {f"q{idx}": normal(*shape, seed=idx) for idx, shape in enumerate(shapes)}
    ranks, asked = {"q0": 3, "q5": 1}, []

    def asking(name):
        return lambda: asked.append(name) or weights[name]

    for folder in ("new", "new", "other"):  # computed, read, and read by an object that has nothing in memory
        bases = SingularBases(tmp_path / folder)
        for _ in range(2):
            found = bases.get_all({name: asking(name) for name in weights}, ranks)
            assert found.keys() == weights.keys()
            for name, weight in weights.items():
                expected = compute_basis(weight).cut(ranks.get(name, min(weight.shape)))
                assert torch.equal(found[name].vectors, expected.vectors)
    assert asked == list(weights) * 6  # once each and in order: processes that share weights ask together


def test_an_error_in_a_worker_names_its_module_once_and_stops(two_threads, tmp_path):
    weights = {f"q{idx}": normal(9, 6, seed=idx) for idx in range(12)}
    weights["q3"][2, 2] = torch.nan
    bases = SingularBases(tmp_path)
    with pytest.raises(ValueError, match=r"`q3`.*NaN") as caught:
        bases.prepare(weights, progress=False)
    assert str(caught.value).count("There is no singular basis") == 1
    weights["q3"] = normal(9, 6, seed=12)
    bases.prepare(weights, progress=False)
    assert len(basis_files(tmp_path)) == 12


def test_no_thread_is_left_when_all_is_done(two_threads, tmp_path):
    before = threading.active_count()
    SingularBases(tmp_path).prepare({str(idx): normal(9, 6, seed=idx) for idx in range(8)}, progress=False)
    assert threading.active_count() == before


# What users see


@pytest.fixture
def long_work(monkeypatch):
    monkeypatch.setattr(svd, "WORTH_TELLING", 0)


def first_use(model, folder):
    model._singular_bases = SingularBases(folder)
    names = list(model.linear_modules())[:5]
    model(torch.zeros(1, 3, dtype=torch.long), expert_vector={name: torch.tensor([2.0]).double() for name in names})


@pytest.mark.slow
def test_the_first_use_of_an_expert_says_what_it_does_once(long_work, tmp_path, caplog, capfd):
    """129 seconds passed without a word: the bar was for `prepare_expert_vectors` alone."""
    for _ in range(2):
        first_use(new_model("everything"), tmp_path)
    (record,) = [record for record in caplog.records if record.name == svd.__name__]
    assert record.levelno == logging.WARNING  # shown without any setting
    assert "up to 5 weights" in record.getMessage()
    assert "once" in record.getMessage()
    assert f"kept in {tmp_path}" in record.getMessage()
    shown = capfd.readouterr().err
    assert "Singular bases: 100%" in shown
    assert "5/5" in shown
    assert len(shown.splitlines()) <= 3  # in a file or pipe, not a line for each of hundreds


def test_long_work_that_begins_with_small_weights_is_told(tmp_path, caplog, capfd, monkeypatch):
    """SmolLM2's hybrid begins with a `dt_proj` of 36 columns, by which all 290 weights seemed quick."""
    monkeypatch.setattr(svd, "WORTH_TELLING", 12**3)
    weights = {f"q{idx}": normal(20, size, seed=idx) for idx, size in enumerate([2, 3, 20, 20, 2])}
    SingularBases(tmp_path).get_all({name: (lambda weight=weight: weight) for name, weight in weights.items()})
    assert "up to 3 weights" in caplog.text
    assert "3/3" in capfd.readouterr().err


@pytest.mark.parametrize("use", ["merge", "spectrum"])
def test_other_first_uses_say_it_too(use, long_work, tmp_path, caplog, capfd):
    model = new_model("everything")
    model._singular_bases = SingularBases(tmp_path)
    names = list(model.linear_modules())[:4]
    if use == "merge":
        model.merge_expert_vector({name: torch.tensor([2.0]).double() for name in names})
    else:
        model.spectrum(names)
    assert "up to 4 weights" in caplog.text
    assert "4/4" in capfd.readouterr().err


def test_the_bar_of_transformers_switch_is_off(long_work, tmp_path, capfd):
    transformers_logging.disable_progress_bar()
    try:
        first_use(new_model("everything"), tmp_path)
        new_model("everything").prepare_expert_vectors()
    finally:
        transformers_logging.enable_progress_bar()
    assert "Singular bases" not in capfd.readouterr().err


def test_short_work_and_training_are_not_told(tmp_path, caplog, capfd, monkeypatch):
    first_use(new_model("everything"), tmp_path)
    module, bases = nn.Linear(6, 9), SingularBases(tmp_path)
    for step in range(3):
        if step == 1:
            monkeypatch.setattr(svd, "WORTH_TELLING", 0)  # the weight has changed since, as at each step of training
        bases.get_all({"q": lambda: module.weight})
        with torch.no_grad():
            module.weight.add_(1)
    assert not caplog.records
    assert not capfd.readouterr().err


def test_without_the_disk_the_line_does_not_promise_it(long_work, tmp_path, caplog, monkeypatch):
    monkeypatch.setenv(svd_files.LIMIT, "0")
    first_use(new_model("everything"), tmp_path)
    assert "not kept on disk, because MAMBAFORMER_BASES_GB is 0" in caplog.text


def test_a_merge_that_is_refused_computes_nothing(tmp_path):
    """With hundreds of bases to compute, the refusal must come first."""
    model = new_model("everything")
    model._singular_bases = SingularBases(tmp_path)
    first, last = list(model.linear_modules())[:2]
    nn.utils.parametrize.register_parametrization(model.linear_modules()[last], "weight", nn.Identity())
    with pytest.raises(ValueError, match="parametrized"):
        model.merge_expert_vector({name: torch.tensor([2.0]).double() for name in (first, last)})
    assert not basis_files(tmp_path)
