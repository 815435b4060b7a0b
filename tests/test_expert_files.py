"""Files of expert vectors: read as they were written, or refused; a crash leaves the old file."""

import errno
import os
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from mambaformer.expert_vectors_mambaformer import (
    BASE_FINGERPRINT,
    ExpertVector,
)
from tiny_models import small_expert


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
    expert = small_expert()
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
        (header_with(version="2"), "neither a vector"),
        (header_with(version="3"), "upgrade"),
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
    expert = small_expert()
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
    small_expert().save(tmp_path / "e")
    data = (tmp_path / "e").read_bytes()
    for length in [*range(20), *range(20, len(data), 7), len(data) - 1]:
        (tmp_path / "cut").write_bytes(data[:length])
        with pytest.raises(ValueError, match="damaged or cut"):
            ExpertVector.load(tmp_path / "cut")


def test_a_changed_byte_is_refused_or_changes_nothing(tmp_path):
    expert = small_expert(metadata={"spectrum": {"lm_head": [3.0, 2.0]}})
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
    old = small_expert(0)
    old.save(tmp_path / "e")

    def fail(*_):
        raise OSError("disk full")

    with monkeypatch.context() as patch:
        patch.setattr(os, step, fail)
        with pytest.raises(OSError, match="disk full"):
            small_expert(1).save(tmp_path / "e")
    assert ExpertVector.load(tmp_path / "e") == old
    assert [file.name for file in tmp_path.iterdir()] == ["e"]


def test_a_save_reaches_the_disk_before_it_takes_the_name(tmp_path, monkeypatch):
    order, fsync, replace = [], os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda *a: order.append("fsync") or fsync(*a))
    monkeypatch.setattr(os, "replace", lambda *a: order.append("replace") or replace(*a))
    small_expert().save(tmp_path / "e")
    assert order == ["fsync", "replace", "fsync"]  # the file, its name, the folder
