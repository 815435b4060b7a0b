"""The library of a model: expert vectors by name, and everything that users may pass as one."""

import pytest
import torch
from safetensors.torch import save_file

from mambaformer.expert_vectors_mambaformer import (
    BASE_FINGERPRINT,
    ExpertVector,
    ExpertVectorLibrary,
    expert_key,
    resolve_expert_vector,
)
from tiny_models import small_expert


def test_a_library_holds_experts_by_name(tmp_path):
    library = ExpertVectorLibrary()
    assert library.names == []
    chef, nurse = small_expert(0), small_expert(1, name=None)
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
    with pytest.raises(ValueError, match="library is empty"):
        library["chef"]
    library.add(small_expert())
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
    library, chef = ExpertVectorLibrary(), small_expert()
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
    library, chef = ExpertVectorLibrary(), small_expert()
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
        ([(0.5, 3)], TypeError, "got int for an expert vector"),
        ([(float("inf"), "chef")], ValueError, "finite"),
        ([(10**400, "chef")], TypeError, "for a weight"),
    ],
)
def test_a_library_refuses_blends_of_other_things(parts, error, hint):
    library = ExpertVectorLibrary()
    library.add(small_expert())
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
    small_expert(0).save(tmp_path / "file-a.safetensors")
    small_expert(1, name=None).save(tmp_path / "file-b.safetensors")
    library = ExpertVectorLibrary()
    assert library.load(tmp_path / "file-a.safetensors") == ["chef"]
    assert library.load(str(tmp_path / "file-b.safetensors")) == ["file-b"]
    assert library.load(tmp_path / "file-a.safetensors", name="cook") == ["cook"]
    assert library["file-b"] == small_expert(1)
    assert library["cook"].name == "cook"


def test_a_folder_is_loaded_whole_or_not_at_all(tmp_path):
    library = ExpertVectorLibrary()
    with pytest.raises(ValueError, match=r"no \*\.safetensors"):
        library.load(tmp_path)
    small_expert(0).save(tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match="only with a file"):
        library.load(tmp_path, name="x")
    save_file({"q": torch.ones(2)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model\.safetensors"):
        library.load(tmp_path)
    assert len(library) == 0
    small_expert(1).save(tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match="two expert vectors named 'chef'"):
        library.load(tmp_path)
    assert len(library) == 0


def test_whatever_users_pass_resolves_to_experts():
    library, expert = ExpertVectorLibrary(), small_expert()
    library.add(expert)
    assert resolve_expert_vector(None) is None
    assert resolve_expert_vector("chef", library) is expert
    assert resolve_expert_vector(expert) is expert
    assert resolve_expert_vector(dict(expert.vectors)) == expert
    assert resolve_expert_vector([None, "chef"], library) == [None, expert]
    assert resolve_expert_vector((expert, dict(expert.vectors))) == [expert, expert]


def test_an_expert_vector_of_ones_resolves_to_the_base_unless_trained():
    assert resolve_expert_vector({"q": torch.ones(3)}) is None
    assert resolve_expert_vector([ExpertVector({}), small_expert()])[0] is None
    trained = ExpertVector({"q": torch.ones(3, requires_grad=True)})
    assert resolve_expert_vector(trained) is trained


def test_an_expert_of_another_copy_of_the_class_is_an_expert():
    """The remote-code loader may load this module twice."""

    class Twin:
        name, metadata = "twin", {}
        vectors = small_expert().vectors
        fingerprint = small_expert().fingerprint

    twin, library = Twin(), ExpertVectorLibrary()
    assert resolve_expert_vector(twin) is twin
    assert small_expert() == twin
    library.add("other", twin)
    assert library["other"] == small_expert()
    assert ExpertVector.blend([(1, twin)]) == small_expert()


@pytest.mark.parametrize("value", [3, 1.5, torch.ones(3), object(), [[None]], [None, 3]])
def test_what_is_no_expert_is_refused(value):
    with pytest.raises(TypeError, match="expert_vector"):
        resolve_expert_vector(value)


def test_names_without_a_library_and_empty_lists_are_refused():
    with pytest.raises(ValueError, match="no library"):
        resolve_expert_vector("chef")
    with pytest.raises(ValueError, match="library is empty"):
        resolve_expert_vector("chef", ExpertVectorLibrary())
    with pytest.raises(ValueError, match="empty list"):
        resolve_expert_vector([])


def test_the_key_is_the_content_row_by_row():
    a, b = small_expert(0), small_expert(1)
    assert expert_key(None) == BASE_FINGERPRINT
    assert expert_key(a) == a.fingerprint
    assert expert_key([a, None, b], rows=3) == (a.fingerprint, BASE_FINGERPRINT, b.fingerprint)
    assert expert_key([a, small_expert(0, name="same")]) == a.fingerprint
    assert expert_key([None, None]) == BASE_FINGERPRINT
    assert expert_key(a, rows=5) == a.fingerprint
    with pytest.raises(ValueError, match="2 expert vectors for a batch of 3 rows"):
        expert_key([a, b], rows=3)
