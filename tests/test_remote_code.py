"""Loads a saved folder as a user of the Hub does: another process, a copied folder, never an `import mambaformer`."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch

from mambaformer import ExpertVector
from patterns import ROOT, tiny_config
from tiny_models import random_expert, random_model

USER_SCRIPT = """
    import json, sys, torch
    from torch.nn import functional as F
    from transformers import AutoConfig, AutoModel, AutoModelForCausalLM, AutoModelForSequenceClassification
    from transformers import Trainer, TrainingArguments

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
    arguments = TrainingArguments(again + "/run", label_smoothing_factor=0.1, report_to=[], use_cpu=True, bf16=False)
    loss = Trainer(model, arguments).compute_loss(model, {"input_ids": ids, "labels": ids})
    wanted = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], label_smoothing=0.1)
    found["smoothed_losses"] = [loss.item(), wanted.item()]
    name = "model.layers.0.mamba.in_proj"
    made = model.expert_vectors.add("made", {name: [1.5, 0.5], "lm_head": torch.tensor([0.25])})
    mixed = model.expert_vectors.blend([(0.5, "bold"), (2.0, "made")], name="mixed")
    model.expert_vectors.add(mixed)
    mixed.save(again + "/mixed.safetensors")
    found["loaded"] = reloaded.load_expert_vectors(again + "/mixed.safetensors")
    with torch.no_grad():
        logits = [one(ids, expert_vector="mixed").logits for one in (model, reloaded)]
        found["mixed"], found["mixed_matches"] = logits[0][0, -1].tolist(), torch.equal(*logits)
        before = model(ids).logits
        model.merge_expert_vector("mixed")
        found["merged"] = model(ids).logits[0, -1].tolist()
        model.unmerge_expert_vector()
        found["unmerged_matches"] = torch.equal(model(ids).logits, before)
    model.save_pretrained(again)
    reloaded = AutoModelForCausalLM.from_pretrained(again, trust_remote_code=True)
    found["names"] = reloaded.expert_vectors.names
    found["imported_package"] = "mambaformer" in sys.modules
    print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A model, the expert that it was saved with, and its folder."""
    model = random_model(tiny_config("everything")).float()
    expert = random_expert(model, seed=3, name="bold")
    model.expert_vectors.add(expert)
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
    rooms = {path.name for path in ROOT.glob("*_mambaformer.py") if not path.name.startswith(("convert_", "blocks_"))}
    assert {path.name for path in saved[2].glob("*_mambaformer.py")} == rooms
    assert (saved[2] / "expert_vectors" / "bold.safetensors").is_file()


def test_all_auto_classes_run_in_a_process_without_the_package(found):
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


def test_label_smoothing_scores_the_next_token_of_remote_code_too(found):
    """`Trainer` knows causal models by the name of their class, and scored each token by its own logits."""
    loss, wanted = found["smoothed_losses"]
    assert loss == pytest.approx(wanted, rel=1e-5)


def test_a_folder_alone_makes_blends_saves_and_loads_expert_vectors(saved, found):
    """Only `ExpertVector` could make and blend them, which such a user cannot import."""
    model, expert, _ = saved
    made = ExpertVector({"model.layers.0.mamba.in_proj": torch.tensor([1.5, 0.5]), "lm_head": torch.tensor([0.25])})
    mixed = ExpertVector.blend([(0.5, expert), (2.0, made)])
    with torch.no_grad():
        logits = model(torch.tensor([[5, 6, 7, 8, 9]]), expert_vector=mixed).logits[0, -1]
    for name in ("mixed", "merged"):
        torch.testing.assert_close(torch.tensor(found[name]), logits, atol=1e-5 * logits.abs().max().item(), rtol=0)
    assert found["loaded"] == ["mixed"] and found["mixed_matches"]
    assert found["unmerged_matches"]
    assert found["names"] == ["bold", "made", "mixed"]
