"""What a model uploads, and where a loaded model finds its expert files. Nothing here needs a network."""

import json
import shutil
import warnings

import huggingface_hub
import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM, MambaFormerForSequenceClassification
from patterns import tiny_config
from tiny_models import random_expert, random_model

EXPERT_FILE = "expert_vectors/bold.safetensors"


def model_with_an_expert(config=None):
    model = random_model(tiny_config() if config is None else config)
    model.expert_vectors.add("bold", random_expert(model, seed=3))
    return model


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, and its folder with the expert vector `bold`."""
    model = model_with_an_expert()
    folder = tmp_path_factory.mktemp("saved") / "model"
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture
def adapter(saved, tmp_path):
    """The folder of a PEFT adapter, which names the model's folder as its base."""
    base = MambaFormerForCausalLM.from_pretrained(saved[1])
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`", FutureWarning)  # peft asks for it
        get_peft_model(base, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "config.json").exists()
    return tmp_path / "adapter"


@pytest.fixture
def hub(saved, tmp_path):
    """Arguments of `from_pretrained` for a repository that was fetched from the Hub at two revisions.

    Only `v1` has the expert vector; the newest revision names none.
    """
    repository = tmp_path / "cache" / "models--someone--model"
    for revision, commit, names in (("main", "a" * 40, None), ("v1", "b" * 40, ["bold"])):
        (repository / "refs").mkdir(parents=True, exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
        snapshot = repository / "snapshots" / commit
        shutil.copytree(saved[1], snapshot)
        name_experts(snapshot, names)
        if names is None:
            shutil.rmtree(snapshot / "expert_vectors")
    return {"pretrained_model_name_or_path": "someone/model", "cache_dir": tmp_path / "cache"}


def name_experts(folder, names):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "expert_vectors": names}))


def has_its_expert(loaded, model):
    return loaded.expert_vectors.names == ["bold"] and loaded.expert_vectors["bold"] == model.expert_vectors["bold"]


# ---- uploads


@pytest.fixture
def commits(monkeypatch):
    """What is sent to the Hub: `(repository, {path in the repository: bytes})`, one for each commit."""
    found = []

    def create_repo(self, repo_id, **kwargs):
        return huggingface_hub.RepoUrl(f"https://huggingface.co/someone/{repo_id.split('/')[-1]}")

    def create_commit(self, repo_id, operations, **kwargs):
        files = {}
        for operation in operations:
            with operation.as_file() as file:
                files[operation.path_in_repo] = file.read()
        found.append((repo_id, files))

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "create_commit", create_commit)
    return found


def write_and_load(files, folder):
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    return MambaFormerForCausalLM.from_pretrained(folder)


def save_into_a_new_folder(model, folder):
    model.save_pretrained(folder, push_to_hub=True)


def save_into_the_same_folder_again(model, folder):
    model.save_pretrained(folder)
    model.save_pretrained(folder, push_to_hub=True)


def save_over_another_model(model, folder):
    other = random_model(tiny_config(), seed=9)
    other.expert_vectors.add("bold", random_expert(other, seed=8))
    other.save_pretrained(folder)
    model.save_pretrained(folder, push_to_hub=True)


def push(model, folder):
    model.push_to_hub(folder.name)


def push_after_a_save(model, folder):
    model.save_pretrained(folder)
    model.push_to_hub(f"someone/{folder.name}")


@pytest.mark.parametrize(
    "upload",
    [
        save_into_a_new_folder,
        save_into_the_same_folder_again,
        save_over_another_model,
        push,
        push_after_a_save,
    ],
)
def test_an_upload_has_every_file_that_its_configuration_names(upload, saved, commits, tmp_path):
    """`save_pretrained(push_to_hub=True)` left the files out that Transformers had not seen change."""
    upload(model_with_an_expert(), tmp_path / "bolder")
    [(repository, files)] = commits
    assert repository == "someone/bolder"
    loaded = write_and_load(files, tmp_path / "fetched")
    assert EXPERT_FILE in files and has_its_expert(loaded, saved[0])
    assert {path.name for path in saved[1].glob("*.py")} == {name for name in files if name.endswith(".py")}


def test_an_upload_of_a_folder_that_was_not_saved_has_the_expert_files(saved, commits, tmp_path):
    """Transformers uploads a folder `consolidated` of its own after a distributed save."""
    other = tmp_path / "consolidated"
    other.mkdir()
    saved[0]._upload_modified_files(other, "someone/bolder", files_timestamps={})
    assert list(commits[0][1]) == [EXPERT_FILE]


def test_an_upload_of_a_model_without_expert_vectors_has_no_folder_of_them(commits, tmp_path):
    random_model(tiny_config()).save_pretrained(tmp_path / "plain", push_to_hub=True)
    assert not [name for name in commits[0][1] if name.startswith("expert_vectors/")]


@pytest.mark.parametrize("positional", [True, False])
def test_only_the_main_process_writes_expert_files(positional, tmp_path):
    """Every process of a distributed run wrote them, into one folder."""
    model = model_with_an_expert()
    if positional:
        model.save_pretrained(tmp_path / "other", False)
    else:
        model.save_pretrained(tmp_path / "other", is_main_process=False)
    assert not (tmp_path / "other" / "expert_vectors").exists()


# ---- where expert files are looked for


@pytest.mark.parametrize("load", [MambaFormerForCausalLM, AutoModelForCausalLM])
def test_the_folder_of_an_adapter_gets_the_expert_vectors_of_its_base(load, saved, adapter):
    """It asked for `expert_vectors/bold.safetensors` in the adapter's folder."""
    assert has_its_expert(load.from_pretrained(adapter), saved[0])


@pytest.mark.parametrize("load", [MambaFormerForCausalLM, AutoModelForCausalLM])
def test_an_adapter_inside_its_base_gets_the_expert_vectors_of_that_folder(load, saved, adapter, tmp_path):
    folder = tmp_path / "both"
    shutil.copytree(saved[1], folder)
    shutil.copytree(adapter, folder, dirs_exist_ok=True)
    assert has_its_expert(load.from_pretrained(folder), saved[0])


def config_class(folder):
    return MambaFormerConfig.from_pretrained(folder)


def config_file(folder):
    return MambaFormerConfig.from_pretrained(folder / "config.json")


def auto_config(folder):
    return AutoConfig.from_pretrained(folder)


@pytest.mark.parametrize("config", [config_class, config_file, auto_config])
def test_weights_in_memory_get_the_expert_vectors_of_their_configuration(config, saved):
    """`from_pretrained(None, config=..., state_dict=...)` asked for expert files in a folder called None."""
    model, folder = saved
    loaded = MambaFormerForCausalLM.from_pretrained(None, config=config(folder), state_dict=model.state_dict())
    assert has_its_expert(loaded, model)


@pytest.mark.parametrize("kind", [str, lambda folder: folder, lambda folder: folder / "config.json", auto_config])
def test_a_configuration_from_elsewhere_brings_its_expert_vectors(kind, saved, tmp_path):
    model, folder = saved
    weights = tmp_path / "weights"
    shutil.copytree(folder, weights)
    shutil.rmtree(weights / "expert_vectors")
    loaded = MambaFormerForCausalLM.from_pretrained(weights, config=kind(folder))
    assert has_its_expert(loaded, model)


def test_a_configuration_of_unknown_origin_comes_from_the_weights_folder(saved):
    model, folder = saved
    config = MambaFormerConfig.from_dict(json.loads((folder / "config.json").read_text()))
    assert has_its_expert(MambaFormerForCausalLM.from_pretrained(folder, config=config), model)


def test_named_experts_without_any_folder_are_refused_with_a_way_out(saved):
    model, _ = saved
    config = tiny_config()
    config.expert_vectors = ["bold"]
    with pytest.raises(ValueError, match=r"\['bold'\].*`config.expert_vectors = None`"):
        MambaFormerForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())
    config.expert_vectors = None
    MambaFormerForCausalLM.from_pretrained(None, config=config, state_dict=model.state_dict())


@pytest.mark.parametrize(
    "load",
    [
        MambaFormerForCausalLM,
        MambaFormerForSequenceClassification,
        AutoModel,
        AutoModelForCausalLM,
        AutoModelForSequenceClassification,
    ],
)
def test_every_class_loads_expert_vectors_from_a_subfolder(load, saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "all" / "small")
    assert has_its_expert(load.from_pretrained(tmp_path / "all", subfolder="small"), saved[0])


@pytest.mark.parametrize("load", [MambaFormerForCausalLM, AutoModelForCausalLM])
def test_a_revision_brings_its_own_expert_vectors(load, saved, hub):
    assert load.from_pretrained(**hub).expert_vectors.names == []
    assert has_its_expert(load.from_pretrained(**hub, revision="v1"), saved[0])


def test_a_revision_of_the_weights_is_sought_in_their_own_repository(saved, hub, tmp_path):
    """The folder of the configuration knows no revision; a repository of its own may not have it."""
    config = AutoConfig.from_pretrained(
        hub["pretrained_model_name_or_path"], cache_dir=hub["cache_dir"], revision="v1"
    )
    assert config.expert_vectors == ["bold"]
    other = AutoConfig.from_pretrained(saved[1])
    assert has_its_expert(MambaFormerForCausalLM.from_pretrained(**hub, revision="v1", config=other), saved[0])


def test_a_variant_of_the_weights_has_the_same_expert_vectors(saved, tmp_path):
    model = model_with_an_expert()
    model.save_pretrained(tmp_path, variant="fp64")
    assert (tmp_path / "model.fp64.safetensors").exists() and (tmp_path / EXPERT_FILE).exists()
    assert has_its_expert(MambaFormerForCausalLM.from_pretrained(tmp_path, variant="fp64"), saved[0])


def test_loading_information_comes_with_expert_vectors(saved):
    loaded, information = MambaFormerForCausalLM.from_pretrained(saved[1], output_loading_info=True)
    assert has_its_expert(loaded, saved[0]) and not information["missing_keys"]


@pytest.mark.parametrize("subfolder", ["", "small"])
def test_a_missing_expert_file_is_named_with_its_folder_and_a_way_out(subfolder, saved, tmp_path):
    """The message was `does not appear to have a file named ...`, with an address on the Hub made of a local path."""
    shutil.copytree(saved[1], tmp_path / "copied" / subfolder)
    shutil.rmtree(tmp_path / "copied" / subfolder / "expert_vectors")
    place = rf"`{subfolder}` of `.*copied`" if subfolder else "`.*copied`"
    advice = 'Copy the folder `expert_vectors`.*"expert_vectors": null'
    with pytest.raises(OSError, match=f"{place}.*`{EXPERT_FILE}`.*{advice}"):
        MambaFormerForCausalLM.from_pretrained(tmp_path / "copied", subfolder=subfolder)
    name_experts(tmp_path / "copied" / subfolder, None)
    assert MambaFormerForCausalLM.from_pretrained(tmp_path / "copied", subfolder=subfolder).expert_vectors.names == []


@pytest.mark.parametrize("name", ["../outside", "a/b", ""])
def test_a_configuration_cannot_name_files_outside_its_folder(name, saved, tmp_path):
    shutil.copytree(saved[1], tmp_path / "copied")
    shutil.copy(saved[1] / EXPERT_FILE, tmp_path / "copied" / "outside.safetensors")
    name_experts(tmp_path / "copied", [name])
    with pytest.raises(ValueError, match="`expert_vectors` must be a list of names"):
        MambaFormerForCausalLM.from_pretrained(tmp_path / "copied")


def test_a_model_of_an_adapter_computes_with_the_expert_vector_by_name(saved, adapter):
    ids = torch.tensor([[5, 6, 7]])
    loaded = MambaFormerForCausalLM.from_pretrained(adapter)
    with torch.no_grad():
        expected = saved[0](ids, expert_vector="bold").logits
        torch.testing.assert_close(loaded(ids, expert_vector="bold").logits, expected, atol=1e-10, rtol=0)
