"""Sessions (law 6): saved, loaded in a fresh process, continued = continued, bit for bit.

`SCENARIOS` of `saved_caches.py` are the caches that are saved; a child process loads and continues all of them and
leaves its logits in a file.
"""

import os
import pickle
import subprocess
import sys
from pathlib import Path

import peft
import pytest
import torch
from safetensors.torch import load_file
from torch.testing._internal.two_tensor import TwoTensor

from mambaformer import ExpertVector, MambaFormerCache
from mambaformer.files_mambaformer import digest_of
from oracle import assert_same_logits, expected, uncached_logits
from patterns import CACHE_VARIANTS, tiny_config
from saved_caches import (
    combinations,
    conditions,
    content_of,
    equal,
    every_scenario,
    experts_of,
    go_on,
    in_turn,
    made,
    model_of,
    some_ids,
)
from sequences import feed_row, random_ids, random_rows, rows_of
from tiny_models import every_cache, every_pattern, random_expert, random_model, shared_model

TESTS = Path(__file__).resolve().parent


# -------------------------------------------------------------------------------------------------- what is saved

# ---------------------------------------------------------------------------------------------- the law of the disk

CHILD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from saved_caches import go_on, in_turn

folder, found = Path(sys.argv[1]), {}

def action(model, name, variant, scenario):
    for n, logits in enumerate(go_on(model, model.load_cache(folder / name))):
        found[f"{name}.{n}"] = logits.contiguous()

in_turn(action)
save_file(found, folder / "found")
"""


def run_child(script, *arguments):
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": path},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.mark.slow
def test_a_session_goes_on_in_a_fresh_process_bit_for_bit(tmp_path):
    wanted, differing = {}, []

    def action(model, name, variant, scenario):
        cache = made(model, scenario, variant)
        cache.save(tmp_path / name)
        wanted[name] = go_on(model, cache)

    in_turn(action)
    child = run_child(CHILD, tmp_path)
    output = child.communicate()[0]
    assert child.returncode == 0, output
    found = load_file(tmp_path / "found")
    for name, logits in wanted.items():
        if not equal([found[f"{name}.{n}"] for n in range(len(logits))], logits):
            differing.append(name)
    assert not differing
    assert len(wanted) == len(list(combinations())) > 200


@every_pattern
@every_cache
def test_a_loaded_session_gives_the_logits_of_the_oracle(pattern, variant, tmp_path):
    model, (row,) = shared_model(pattern), rows_of(pattern, 1, lengths=(14,))
    cache = model.make_cache(**CACHE_VARIANTS[variant])
    head = feed_row(model, cache, row[:9], [4, 5])
    cache.save(tmp_path / "s")
    tail = feed_row(model, MambaFormerCache.load(tmp_path / "s", model), row[9:], [3, 1, 1])
    assert_same_logits(torch.cat([head, tail]), expected(model, [row])[0])


@every_scenario
@every_cache
def test_a_session_that_is_loaded_and_saved_again_is_the_same_file(scenario, variant, tmp_path):
    model = model_of("everything", "float32")
    with conditions(model, scenario):
        cache = made(model, scenario, variant)
        cache.save(str(tmp_path / "first"))
        before = go_on(model, cache.fork())
        model.load_cache(tmp_path / "first").save(tmp_path / "second")
        assert content_of(tmp_path / "first") == content_of(tmp_path / "second")
        assert equal(go_on(model, cache), before)  # saving leaves the cache as it was


@every_cache
def test_loaded_is_what_was_saved_in_every_public_way(variant, tmp_path):
    model = shared_model("everything")
    cache = made(model, "expert_per_row", variant)
    cache.save(tmp_path / "s")
    loaded = model.load_cache(str(tmp_path / "s"))
    assert torch.equal(loaded.token_ids, cache.token_ids)
    assert loaded.get_seq_length() == cache.get_seq_length() == 6
    assert loaded.batch_size == cache.batch_size == 3
    assert loaded.expert_vector == cache.expert_vector
    assert [row.name for row in loaded.expert_vector] == [None, "a", None]
    assert (loaded.options.storage, loaded.max_columns) == (cache.options.storage, cache.max_columns)
    assert (loaded.status, loaded.provenance.is_mixed, loaded.is_initialized) == ("current", False, True)
    assert torch.equal(loaded.lengths.tokens_seen, cache.lengths.tokens_seen)
    assert type(loaded.lengths.columns) is type(cache.lengths.columns)


def test_a_switch_taken_back_after_loading_uses_the_saved_states(tmp_path):
    """A first version left the states out of what waits to be encoded again: they may still come to use."""
    model = shared_model("everything")
    cache = made(model, "waiting_to_be_encoded_again", "dense")
    cache.save(tmp_path / "s")
    loaded = model.load_cache(tmp_path / "s")
    assert loaded.status == "stale"
    for one in (cache, loaded):
        one.set_expert_vector(None)
        assert one.status != "stale"
    assert equal(go_on(model, loaded), go_on(model, cache))


@pytest.mark.parametrize("policy", ["recompute", "reset", "continue", "error"])
def test_weights_that_changed_before_saving_count_as_changed_after_loading(policy, tmp_path):
    model = random_model(tiny_config("paper"))
    cache = model.make_cache(on_expert_change=policy)
    with torch.no_grad():
        model(some_ids(model, 1), past_key_values=cache)
        model.model.layers[0].mamba.in_proj.weight.mul_(1.5)
        cache.save(tmp_path / "s")
        loaded = model.load_cache(tmp_path / "s")
        if policy == "error":
            for one in (cache, loaded):
                with pytest.raises(ValueError, match="weights changed"):
                    model(some_ids(model, 2), past_key_values=one)
            return
        found, wanted = (model(some_ids(model, 2), past_key_values=one).logits for one in (loaded, cache))
    assert torch.equal(found, wanted)
    assert loaded.get_seq_length() == cache.get_seq_length()
    assert loaded.provenance.is_mixed == cache.provenance.is_mixed == (policy == "continue")


def test_an_expert_that_is_being_trained_is_saved_as_it_stands(tmp_path):
    model = random_model(tiny_config("paper"))
    for values in (torch.full((4,), 1.3), torch.ones(4)):
        z = values.clone().requires_grad_()
        trained = [ExpertVector({"model.layers.1.self_attn.q_proj": z})] * 3
        cache = model(some_ids(model, 1), expert_vector=trained).past_key_values
        cache.save(tmp_path / "s")
        loaded = model.load_cache(tmp_path / "s")
        assert loaded.status != "stale"
        assert not (loaded.expert_vector and loaded.expert_vector.requires_grad)
        found, wanted = (model(some_ids(model, 2), past_key_values=one).logits for one in (loaded, cache))
        assert torch.equal(found, wanted)


def test_each_expert_of_a_batch_is_in_the_file_once(tmp_path):
    model = shared_model("paper")
    a, b = experts_of(model)
    cache = model.make_cache()
    cache.set_expert_vector([a, b, None, a, ExpertVector(b.vectors)])
    cache.save(tmp_path / "s")
    names = load_file(tmp_path / "s").keys()
    assert sorted(names) == sorted(f"expert_vectors.{n}.{name}" for n, e in enumerate((a, b)) for name in e)


def test_a_cache_that_is_loaded_in_inference_mode_is_an_ordinary_one(tmp_path):
    model = shared_model("everything")
    cache = made(model, "padded", "static")
    cache.save(tmp_path / "s")
    with torch.inference_mode():
        loaded = model.load_cache(tmp_path / "s")
    for one in (loaded, cache):
        one.crop(-3)
    assert equal(go_on(model, loaded), go_on(model, cache))


def test_states_of_autocast_keep_their_dtype(tmp_path):
    model = model_of("everything", "float32")
    made(model, "under_autocast", "dense").save(tmp_path / "s")
    layer = model.load_cache(tmp_path / "s").layers[1]
    assert layer.attention.values.tensor.dtype == torch.bfloat16


def test_experts_that_differ_in_trailing_ones_stay_apart(tmp_path):
    """They are equal, and yet are computed with another number of directions: the last bits may differ."""
    model, name = shared_model("paper"), "model.layers.1.self_attn.q_proj"
    short = ExpertVector({name: torch.full((3,), 1.5)})
    long = ExpertVector({name: torch.cat([short[name], torch.ones(4)])})
    assert short == long
    cache = model.make_cache()
    cache.set_expert_vector([short, long, None])
    cache.save(tmp_path / "s")
    assert [len(row[name]) for row in model.load_cache(tmp_path / "s").expert_vector[:2]] == [3, 7]


@every_cache
def test_a_file_holds_only_the_slots_that_are_in_use(variant, tmp_path):
    model = shared_model("full")
    cache = made(model, "plain", variant)
    cache.save(tmp_path / "s")
    tensors = load_file(tmp_path / "s")
    assert tensors["tokens.token_ids"].shape == (3, 7)
    assert tensors["layers.0.attention.keys"].shape[2] == 7


def test_states_that_can_never_be_used_again_are_not_in_the_file(tmp_path):
    model = random_model(tiny_config("paper"))
    for scenario, has_states in (("with_changed_weights", False), ("mixing_with_changed_weights", True)):
        made(model, scenario, "dense").save(tmp_path / "s")
        assert any(name.startswith("layers.") for name in load_file(tmp_path / "s")) == has_states


def test_a_session_of_a_causal_model_is_one_of_its_stack_and_its_classifier(tmp_path):
    model = shared_model("paper")
    made(model, "plain", "dense").save(tmp_path / "s")
    with torch.no_grad():
        found = model.model(
            some_ids(model, 2), past_key_values=model.model.load_cache(tmp_path / "s")
        ).last_hidden_state
        logits = model(some_ids(model, 2), past_key_values=model.load_cache(tmp_path / "s")).logits
    assert torch.equal(model.lm_head(found), logits)


def test_generate_goes_on_from_a_loaded_chat(tmp_path):
    model = shared_model("everything")
    ids = some_ids(model, 1)
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    whole = model.generate(ids, max_new_tokens=12, do_sample=False, pad_token_id=0)
    cache = model.make_cache()
    first = model.generate(ids, past_key_values=cache, **options)
    cache.save(tmp_path / "s")
    assert torch.equal(model.generate(first, past_key_values=model.load_cache(tmp_path / "s"), **options), whole)


def test_a_prefix_is_saved_once_and_forked_for_many_continuations(tmp_path):
    model, rows = shared_model("everything"), random_rows(1, lengths=(9, 13, 13))
    cache = model.make_cache()
    feed_row(model, cache, rows[0])
    cache.save(tmp_path / "s")
    prefix = model.load_cache(tmp_path / "s")
    for row in rows[1:]:
        found = feed_row(model, prefix.fork(), row, [5, 8])
        assert_same_logits(found, expected(model, [rows[0] + row])[0][9:])


# --------------------------------------------------------------------------------------------- the right model only


def test_another_configuration_is_refused_with_the_fields_that_differ(saved_session):
    other = random_model(tiny_config("paper", num_hidden_layers=2, rms_norm_eps=1e-3, num_key_value_heads=2))
    message = r"`num_key_value_heads` is 2, not 4, `rms_norm_eps` is 0.001, not 1e-05"
    with pytest.raises(ValueError, match=message):
        other.load_cache(saved_session[2])


@pytest.mark.parametrize("change", ["values", "dtype", "merged"])
def test_other_weights_are_refused_unless_the_text_is_to_be_encoded_again(change, saved_session):
    model, cache, path = saved_session
    tokens = cache.token_ids.clone()
    mask = cache.history.mask.view(6).clone()
    if change == "dtype":
        model = model.float()
    elif change == "merged":
        model.merge_expert_vector(random_expert(model, 5))
        with pytest.raises(ValueError, match="merge the expert vector that was merged"):
            model.load_cache(path)
        model.unmerge_expert_vector()
        assert torch.equal(model.load_cache(path).token_ids, tokens)
        return
    else:
        with torch.no_grad():
            model.model.layers[1].mamba.D[3] += 1e-9
    with pytest.raises(ValueError, match=r"other weights\. Load the model that it was saved with"):
        model.load_cache(path)
    with pytest.raises(ValueError, match="on_weights_change"):
        model.load_cache(path, on_weights_change="ignore")
    loaded = MambaFormerCache.load(path, model, on_weights_change="recompute")
    assert loaded.status == "stale"
    with torch.no_grad():
        found = model(some_ids(model, 2), past_key_values=loaded).logits
        whole = model(
            torch.cat([tokens, some_ids(model, 2)], dim=1),
            attention_mask=torch.cat([mask, torch.ones(3, 6)], dim=1),
            expert_vector=loaded.expert_vector,
            use_cache=False,
        ).logits[:, 6:]
    assert_same_logits(found, whole, 1e-10 if found.dtype == torch.float64 else 1e-5)


@pytest.mark.parametrize("scenario", ["with_embeddings", "mixed", "about_to_mix"])
def test_a_text_that_cannot_be_encoded_again_needs_the_weights_it_had(scenario, tmp_path):
    model = random_model(tiny_config("paper"))
    made(model, scenario, "dense").save(tmp_path / "s")
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    with pytest.raises(ValueError, match="cannot be encoded again"):
        model.load_cache(tmp_path / "s", on_weights_change="recompute")


def test_the_weights_are_read_once_for_many_saves(tmp_path, monkeypatch):
    model = random_model(tiny_config("paper"))
    cache, calls = made(model, "plain", "dense"), []
    state_dict = type(model.model).state_dict
    monkeypatch.setattr(type(model.model), "state_dict", lambda self: calls.append(1) or state_dict(self))
    for _ in range(3):
        cache.save(tmp_path / "s")
        model.load_cache(tmp_path / "s")
    assert len(calls) == 1
    with torch.no_grad():
        model.model.norm.weight.mul_(2)
    cache.save(tmp_path / "s")
    assert len(calls) == 2


def test_a_fingerprint_tells_names_dtypes_shapes_and_every_bit():
    base = {"a": torch.arange(4.0), "b": torch.zeros(())}
    others = [
        {"a": torch.arange(4.0)},
        {"c": base["a"], "b": base["b"]},
        {"a": base["a"].view(2, 2), "b": base["b"]},
        {"a": base["a"].view(torch.int32), "b": base["b"]},
        {"a": base["a"], "b": torch.tensor(-0.0)},
        {"a": TwoTensor(base["a"], base["a"]), "b": base["b"]},
        {"a": TwoTensor(base["a"], base["a"] + 1), "b": base["b"]},
    ]
    assert len({digest_of(tensors) for tensors in [base, *others]}) == 1 + len(others)
    assert digest_of(dict(reversed(base.items()))) == digest_of(base)
    assert digest_of({"a": TwoTensor(base["a"], base["a"])}) == digest_of({"a": TwoTensor(base["a"], base["a"])})


def test_offloaded_weights_are_named():
    model = random_model(tiny_config("paper"))
    cache = made(model, "plain", "dense")
    model.model.layers[0].to("meta")
    with pytest.raises(ValueError, match=r"\['layers.0.*are offloaded"):
        cache.save("never written")


def test_a_cache_without_its_model_cannot_be_saved(tmp_path):
    model = random_model(tiny_config("paper"))
    cache = made(model, "plain", "dense")
    unpickled = pickle.loads(pickle.dumps(cache))
    for lost in (MambaFormerCache(model.config), unpickled):
        with pytest.raises(ValueError, match="belongs to no model"):
            lost.save(tmp_path / "s")
    del model
    with pytest.raises(ValueError, match="belongs to no model"):
        cache.save(tmp_path / "s")
    assert not list(tmp_path.iterdir())
    assert torch.equal(unpickled.token_ids, cache.token_ids)


# ------------------------------------------------------------------------------------------ crashes and other writers

# --------------------------------------------------------------------------------------- damaged and foreign files

# ------------------------------------------------------------------------------- whole files by somebody else's hand


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_a_session_is_tied_to_the_adapters_too(tmp_path):
    """The weights of a model are the same with its adapter on and off; what they compute is not."""
    model, ids = random_model(tiny_config("everything")), random_ids()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "in_proj"], init_lora_weights=False)
    )
    adapted.eval()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    cache.save(tmp_path / "session.safetensors")
    with adapted.disable_adapter(), pytest.raises(ValueError, match="other weights"):
        model.load_cache(tmp_path / "session.safetensors")
    cache = model.load_cache(tmp_path / "session.safetensors")
    with torch.no_grad():
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])


def test_a_session_of_nothing_but_pads_can_be_loaded(tmp_path):
    """With the last real token taken back there were no states in the file, which said that there were."""
    model, ids = shared_model("everything"), random_ids()
    cache = model.make_cache(rollback_reach=4)
    with torch.no_grad():
        model(torch.tensor([[9, 5]]), attention_mask=torch.tensor([[0, 1]]), past_key_values=cache)
        cache.crop(-1)
        cache.save(tmp_path / "session.safetensors")
        cache = model.load_cache(tmp_path / "session.safetensors")
        assert_same_logits(model(ids, past_key_values=cache).logits, uncached_logits(model, ids))
