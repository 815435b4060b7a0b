"""Loads a saved folder as a user of the Hub does: another process, a copied folder, never an `import mambaformer`."""

import json
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch

from cases import random_expert, random_model, tiny_config

ROOT = Path(__file__).resolve().parent.parent
USER_SCRIPT = """
    import json, sys, torch
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification

    folder, again = sys.argv[1:]
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    config = AutoConfig.from_pretrained(folder, trust_remote_code=True)
    base = AutoModel.from_pretrained(folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    classifier = AutoModelForSequenceClassification.from_pretrained(folder, trust_remote_code=True, num_labels=3)
    with torch.no_grad():
        hidden = base(ids).last_hidden_state
        found = {
            "class": type(model).__name__,
            "layer_types": config.layer_types,
            "hidden_matches": torch.equal(hidden, model.model(ids).last_hidden_state),
            "labels": list(classifier(ids).logits.shape),
            "logits": model(ids, expert_vector="bold").logits[0, -1].tolist(),
        }
    def answer(model):
        options = dict(max_new_tokens=12, do_sample=False, expert_schedule={0: None, 6: "bold"})
        return model.generate(ids, past_key_values=model.make_cache(), **options).tolist()
    found["tokens"] = answer(model)
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    found["tokens_again"] = answer(reloaded)
    cache = model.make_cache()
    model(ids, past_key_values=cache, expert_vector="bold")
    cache.save(again + "/session")
    loaded = reloaded.load_cache(again + "/session")
    with torch.no_grad():
        after = [one(ids, past_key_values=kept).logits for one, kept in ((model, cache), (reloaded, loaded))]
    found["session_matches"] = torch.equal(*after)
    found["imported_package"] = "mambaformer" in sys.modules
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, the expert that it was saved with, and its folder."""
    model = random_model(tiny_config("everything")).float()
    expert = random_expert(model, seed=3, name="bold")
    model.experts.add(expert)
    folder = tmp_path_factory.mktemp("hub") / "model"
    model.save_pretrained(folder)
    return model, expert, folder


@pytest.fixture(scope="module")
def found(saved, tmp_path_factory):
    """What a fresh process saw that loaded the folder."""
    script = tmp_path_factory.mktemp("user") / "script.py"
    script.write_text(textwrap.dedent(USER_SCRIPT))
    again = tmp_path_factory.mktemp("hub") / "again"
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", script, saved[2], again],
        capture_output=True,
        text=True,
        cwd=script.parent,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_the_saved_folder_has_every_room_but_the_converter_and_its_experts(saved):
    rooms = {path.name for path in ROOT.glob("*_mambaformer.py")} - {"convert_mambaformer.py", "blocks_mambaformer.py"}
    assert {path.name for path in saved[2].glob("*_mambaformer.py")} == rooms
    assert (saved[2] / "experts" / "bold.safetensors").is_file()


def test_a_process_that_never_imports_the_package_loads_and_runs_all_auto_classes(found):
    assert not found["imported_package"]
    assert found["class"] == "MambaFormerForCausalLM"
    assert found["layer_types"] == tiny_config("everything").layer_types
    assert found["hidden_matches"]
    assert found["labels"] == [1, 3]


def test_remote_code_computes_what_the_package_computes(saved, found):
    model, expert, _ = saved
    ids = torch.tensor([[5, 6, 7, 8, 9]])
    with torch.no_grad():
        logits = model(ids, expert_vector=expert).logits[0, -1]
    torch.testing.assert_close(torch.tensor(found["logits"]), logits, atol=1e-5 * logits.abs().max().item(), rtol=0)
    options = {"max_new_tokens": 12, "do_sample": False, "expert_schedule": {0: None, 6: expert}}
    assert model.generate(ids, **options).tolist() == found["tokens"]


def test_a_session_of_remote_code_goes_on_in_the_reloaded_model(found):
    assert found["session_matches"]


def test_a_model_saved_by_remote_code_generates_the_same_after_reloading(found):
    assert found["tokens_again"] == found["tokens"]
