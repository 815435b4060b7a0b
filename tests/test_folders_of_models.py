"""`save_pretrained` over an old model: the folder holds the old model or the new one, and the user's other files."""

import json
import os
import signal

import huggingface_hub
import pytest
import torch
from safetensors import torch as safetensors_torch
from transformers import AutoModelForCausalLM

from damage import in_a_process, kill_myself
from mambaformer import MambaFormerConfig, MambaFormerForCausalLM
from mambaformer import files_folders_mambaformer as folders
from mambaformer.expert_vectors_mambaformer import ExpertVector
from patterns import tiny_config
from tiny_models import random_expert, random_model

IDS = torch.arange(8)[None]


@pytest.fixture(scope="module")
def models():
    """An old and a new model with other weights, sizes and experts; `both` is in both."""
    found = []
    for seed, names in ((1, ["old", "both"]), (2, ["both", "new"])):
        model = random_model(tiny_config("paper", num_hidden_layers=2 + seed), seed=seed)
        for n, name in enumerate(names):
            model.expert_vectors.add(name, random_expert(model, 10 * seed + n, rank=2))
        found.append(model)
    return found


@pytest.fixture
def folder(models, tmp_path):
    """The old model's, with a user's own files."""
    path = tmp_path / "model"
    models[0].save_pretrained(path)
    (path / "README.md").write_text("mine")
    (path / "notes").mkdir()
    (path / "notes" / "model-00001-of-00009.safetensors").write_text("mine")
    ExpertVector({"q": torch.ones(2)}).save(path / "expert_vectors" / "mine.safetensors")
    return path


def content_of(path):
    return {str(file.relative_to(path)): file.read_bytes() for file in path.rglob("*") if file.is_file()}


def logits(model):
    with torch.no_grad():
        return model(IDS, use_cache=False).logits


def holds(path, model):
    loaded = MambaFormerForCausalLM.from_pretrained(path).eval()
    assert sorted(loaded.expert_vectors.names) == sorted(model.expert_vectors.names)
    assert all(loaded.expert_vectors[name] == model.expert_vectors[name] for name in model.expert_vectors)
    return torch.equal(logits(loaded), logits(model))


class Broken(Exception):
    pass


def failing_at(call, function):
    calls = []

    def fail(*arguments, **options):
        calls.append(1)
        if len(calls) == call:
            raise Broken(f"call {call}")
        return function(*arguments, **options)

    fail.calls = calls
    return fail


STEPS = {
    "configuration": (MambaFormerConfig, "save_pretrained"),
    "expert": (ExpertVector, "save"),
    "weights": (safetensors_torch, "serialize_file"),
    "move": (os, "replace"),
    "keep the old file": (os, "link"),
    "copy a mode": (folders.shutil, "copymode"),
    "look for stale files": (folders, "stale_files"),
}


@pytest.mark.slow
@pytest.mark.parametrize("step", STEPS)
def test_a_save_that_fails_anywhere_leaves_the_old_model_and_no_half_files(step, models, folder, monkeypatch):
    """A save that failed at the weights left the new configuration with the old weights: nothing could be loaded."""
    before, owner = content_of(folder), STEPS[step][0]
    name, function = STEPS[step][1], getattr(*STEPS[step])
    for call in range(1, 200):
        failing = failing_at(call, function)
        monkeypatch.setattr(owner, name, failing if owner is not MambaFormerConfig else _as_method(failing))
        try:
            models[1].save_pretrained(folder)
        except Broken:
            assert content_of(folder) == before, call
            assert holds(folder, models[0]) if call < 3 else True
            continue
        break
    monkeypatch.undo()
    assert call > 1
    assert holds(folder, models[1])
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def _as_method(function):
    return lambda self, *arguments, **options: function(self, *arguments, **options)


def test_a_first_save_that_fails_leaves_no_folder(models, tmp_path, monkeypatch):
    monkeypatch.setattr(safetensors_torch, "serialize_file", failing_at(1, None))
    with pytest.raises(Broken):
        models[0].save_pretrained(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("mine")
    with pytest.raises(ValueError, match="is a file: give a folder"):
        models[0].save_pretrained(tmp_path / "file")


def test_an_empty_name_is_not_the_current_folder(models, tmp_path, monkeypatch):
    """A variable that was not set filled the current folder with 45 files."""
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`save_directory` is empty"):
        models[0].save_pretrained("")
    assert not list(tmp_path.iterdir())


def test_files_of_the_old_model_go_and_those_of_the_user_stay(models, folder):
    """An expert vector that was renamed stayed under its old name for ever."""
    mine = {name: content_of(folder)[name] for name in ("README.md", "expert_vectors/mine.safetensors")}
    models[1].save_pretrained(folder)
    after = content_of(folder)
    assert {name for name in after if name.startswith("expert_vectors/")} == {
        f"expert_vectors/{name}.safetensors" for name in ("both", "new", "mine")
    }
    assert mine.items() <= after.items() and "notes/model-00001-of-00009.safetensors" in after
    plain = random_model(tiny_config("paper"))
    plain.save_pretrained(folder)
    left = [name for name in content_of(folder) if name.startswith("expert_vectors/")]
    assert left == ["expert_vectors/mine.safetensors"]
    assert holds(folder, plain)


def test_a_folder_with_the_older_names_loads_and_is_saved_with_the_new_ones(models, folder):
    """Version 0.1 wrote `experts` into the configuration and the files under `experts/`."""
    os.replace(folder / "expert_vectors", folder / "experts")
    config = json.loads((folder / "config.json").read_text())
    config["experts"] = config.pop("expert_vectors")
    (folder / "config.json").write_text(json.dumps(config))
    assert holds(folder, models[0])
    again = MambaFormerForCausalLM.from_pretrained(folder)
    assert again.config.expert_vectors == ["old", "both"] and "experts" not in again.config.to_dict()
    models[1].save_pretrained(folder)
    assert holds(folder, models[1])
    assert {name for name in content_of(folder) if "experts" in name} == {"experts/mine.safetensors"}


@pytest.mark.parametrize("variant", [None, "fp64"])
def test_weights_in_other_shards_are_not_loaded_instead_of_the_new_ones(variant, models, tmp_path):
    """Sibling: an unsharded file is loaded before an index, so a sharded save over it loaded the old weights."""
    for size, model in (("50GB", models[0]), ("20KB", models[1]), ("60KB", models[0]), ("50GB", models[1])):
        model.save_pretrained(tmp_path, max_shard_size=size, variant=variant)
        loaded = MambaFormerForCausalLM.from_pretrained(tmp_path, variant=variant).eval()
        assert torch.equal(logits(loaded), logits(model))
    assert [file.name for file in tmp_path.glob("*.safetensors*")] == [
        f"model{'.fp64' if variant else ''}.safetensors"
    ]


def test_names_in_an_old_configuration_never_lead_out_of_the_folder(models, folder, tmp_path):
    (tmp_path / "x.safetensors").write_text("mine")
    config = json.loads((folder / "config.json").read_text())
    for names in (["../../x", "../x", "old"], "old", 3, [None], {"old": 1}):
        (folder / "config.json").write_text(json.dumps(config | {"expert_vectors": names}))
        models[1].save_pretrained(folder)
    (folder / "config.json").write_text("[" * 100_000)
    models[1].save_pretrained(folder)
    assert (tmp_path / "x.safetensors").read_text() == "mine"
    assert holds(folder, models[1])


def test_a_process_killed_while_saving_leaves_a_folder_to_clean(models, folder, monkeypatch):
    before = content_of(folder)
    monkeypatch.setattr(safetensors_torch, "serialize_file", lambda *_, **__: kill_myself())
    process = in_a_process(lambda: models[1].save_pretrained(folder))
    assert os.WTERMSIG(os.waitpid(process, 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    left = content_of(folder)
    assert before.items() <= left.items() and len(left) > len(before)
    assert holds(folder, models[0])
    models[1].save_pretrained(folder)
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
    assert holds(folder, models[1])


def test_a_save_leaves_the_files_of_another_save_that_is_going_on(models, folder):
    with folders.staged_folder(folder) as staged:
        (staged.path / "more.txt").write_text("mine")
        models[1].save_pretrained(folder)
    assert (folder / "more.txt").read_text() == "mine"
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]


def test_a_reader_finds_every_file_at_any_time(models, folder, monkeypatch):
    names, replace, missing = set(content_of(folder)), os.replace, []

    def watched(source, target):
        missing.extend(name for name in ("config.json", "model.safetensors") if not (folder / name).exists())
        replace(source, target)

    monkeypatch.setattr(os, "replace", watched)
    models[1].save_pretrained(folder)
    assert not missing and "config.json" in names


def test_a_link_is_replaced_and_a_private_file_stays_private(models, folder, tmp_path):
    weights, shared = folder / "model.safetensors", tmp_path / "blob"
    weights.rename(shared)
    weights.symlink_to(shared)
    (folder / "config.json").chmod(0o600)
    old = shared.read_bytes()
    models[1].save_pretrained(folder)
    assert shared.read_bytes() == old and not weights.is_symlink()
    assert (folder / "config.json").stat().st_mode & 0o777 == 0o600
    assert holds(folder, models[1])


def test_a_model_that_was_loaded_from_the_folder_is_saved_over_itself(folder, models):
    loaded = MambaFormerForCausalLM.from_pretrained(folder)
    loaded.expert_vectors.add("more", random_expert(loaded, 5))
    loaded.save_pretrained(folder)
    assert sorted(AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True).expert_vectors.names) == [
        "both",
        "more",
        "old",
    ]


# ---- uploads


@pytest.fixture
def uploads(monkeypatch, folder):
    """Names of what is sent to the Hub, and the model that the folder holds then."""
    found = []

    def create_repo(self, repo_id, **kwargs):
        found.append(repo_id)
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id}")

    def create_commit(self, repo_id, operations, **kwargs):
        found.append({operation.path_in_repo: str(operation.path_or_fileobj) for operation in operations})
        if kwargs.get("commit_message") == "fail":
            raise Broken

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    return found


def test_an_upload_sends_what_was_saved_and_nothing_else(models, folder, uploads):
    """The upload looks at the folder for files that are newer than its own start: moved files must count."""
    models[1].save_pretrained(folder, push_to_hub=True)
    assert uploads[0] == "model"
    assert uploads[1].keys() >= {"config.json", "model.safetensors", "expert_vectors/new.safetensors", "README.md"}
    assert not [name for name in uploads[1] if name.startswith((".", "notes"))]
    assert all(path.startswith(f"{folder}/") and "/." not in path for path in uploads[1].values())
    assert holds(folder, models[1])


def test_an_upload_that_fails_leaves_what_was_saved(models, folder, uploads):
    with pytest.raises(Broken):
        models[1].save_pretrained(folder, push_to_hub=True, commit_message="fail")
    assert holds(folder, models[1])
    assert not [path for path in folder.iterdir() if path.name.startswith(".")]
