"""Sessions (the law of the disk): saved, loaded in a fresh process, continued = continued, bit for bit.

Also what a crash, a second writer or a damaged, foreign or forged file can do: nothing. `SCENARIOS` are the caches
that are saved; a child process loads and continues all of them and leaves its logits in a file.
"""

import contextlib
import json
import os
import pickle
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, load_file, save_file
from torch.testing._internal.two_tensor import TwoTensor

from cases import (
    CACHE_VARIANTS,
    MODELS,
    PATTERNS,
    TRAINED_SMALL,
    VOCAB,
    assert_same_logits,
    expected,
    feed_row,
    new_model,
    random_expert,
    random_model,
    random_rows,
    rows_for,
    rows_of,
    shared_model,
    tiny_config,
)
from mambaformer import ExpertVector, MambaFormerCache
from mambaformer import files_mambaformer as files
from mambaformer.files_mambaformer import digest_of, sealed, write_tensors

TESTS = Path(__file__).resolve().parent
DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SPREAD = ["mamba", "llama", "everything"]  # patterns that go through every scenario


# -------------------------------------------------------------------------------------------------- what is saved


def some_ids(model, seed, rows=3, columns=6):
    return torch.tensor(rows_for(model, seed, lengths=(columns,) * rows))


def some_mask(seed, rows=3, columns=6):
    """Pads anywhere, one row of nothing else, one without."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0], mask[1] = False, True
    return mask.long()


def experts_of(model):
    """Two experts for some of the modules; the second has fewer scales."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = [name for name in names if name != "lm_head"][::3]
    return random_expert(model, 1, modules=chosen, name="a"), random_expert(model, 2, rank=4, modules=chosen)


def plain(model, options):
    cache = model.make_cache(**options)
    model(some_ids(model, 1), past_key_values=cache)
    model(some_ids(model, 2, columns=1), past_key_values=cache)
    return cache


def padded(model, options):
    cache = model.make_cache(**options)
    for seed in (1, 2):
        model(some_ids(model, seed), attention_mask=some_mask(seed), past_key_values=cache)
    return cache


def one_expert(model, options):
    cache = model.make_cache(**options)
    model(some_ids(model, 1), past_key_values=cache, expert_vector=experts_of(model)[0])
    return cache


def expert_per_row(model, options):
    cache, (a, b) = model.make_cache(**options), experts_of(model)
    model(some_ids(model, 1), attention_mask=some_mask(1), past_key_values=cache, expert_vector=[a, None, b])
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    return cache


def forked(model, options):
    origin = plain(model, options)
    fork = origin.fork()
    model(some_ids(model, 3, columns=2), past_key_values=origin)
    model(some_ids(model, 4, columns=2), past_key_values=fork)
    return fork


def repeated(model, options):
    cache = model.make_cache(**options)
    model(some_ids(model, 1, rows=2), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    return cache


def cropped(model, options):
    cache = padded(model, options)
    cache.crop(-4)
    return cache


def cropped_and_fed(model, options):
    cache = cropped(model, options)
    model(some_ids(model, 5, columns=2), past_key_values=cache)
    return cache


def empty(model, options):
    return model.make_cache(**options)


def empty_with_experts(model, options):
    cache, (a, b) = model.make_cache(**options), experts_of(model)
    cache.set_expert_vector([a, b, None])
    return cache


def emptied(model, options):
    cache = one_expert(model, options)
    cache.reset()
    return cache


@torch.inference_mode()
def made_in_inference_mode(model, options):
    return padded(model, options)


def with_a_graph(model, options):
    with torch.enable_grad():
        return plain(model, options)


@torch.autocast("cpu", torch.bfloat16)
def under_autocast(model, options):
    return padded(model, options)


def waiting_to_be_encoded_again(model, options):
    cache = padded(model, options)
    cache.set_expert_vector(experts_of(model)[1])
    return cache


def mixed(model, options):
    cache, (a, b) = model.make_cache(**options, on_expert_change="continue"), experts_of(model)
    for seed, expert in ((1, a), (2, b)):
        model(some_ids(model, seed), past_key_values=cache, expert_vector=expert)
    return cache


def about_to_mix(model, options):
    cache = model.make_cache(**options, on_expert_change="continue")
    model(some_ids(model, 1), past_key_values=cache)
    cache.set_expert_vector(experts_of(model)[0])
    return cache


def under_reset(model, options):
    cache = model.make_cache(**options, on_expert_change="reset")
    model(some_ids(model, 1), past_key_values=cache, expert_vector=experts_of(model)[0])
    return cache


def under_error(model, options):
    cache = model.make_cache(**options, on_expert_change="error")
    model(some_ids(model, 1), past_key_values=cache, expert_vector=experts_of(model)[0])
    return cache


def with_embeddings(model, options):
    cache = plain(model, options)
    embeds = torch.randn(3, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    model(inputs_embeds=embeds.to(model.dtype), past_key_values=cache)
    return cache


def with_own_positions(model, options):
    cache = padded(model, options)
    model(some_ids(model, 5), position_ids=torch.arange(20, 26)[None].expand(3, -1), past_key_values=cache)
    return cache


def merged(model, options):
    return padded(model, options)  # under `conditions`


def with_changed_weights(model, options):
    cache = padded(model, options)
    with torch.no_grad():
        model.base_model.norm.weight.mul_(1)  # the values are the same, but nobody can know
    return cache


def mixing_with_changed_weights(model, options):
    cache = mixed(model, options)
    with torch.no_grad():
        model.base_model.norm.weight.mul_(1)
    return cache


SCENARIOS = {
    make.__name__: make
    for make in (
        plain,
        padded,
        one_expert,
        expert_per_row,
        forked,
        repeated,
        cropped,
        cropped_and_fed,
        empty,
        empty_with_experts,
        emptied,
        made_in_inference_mode,
        with_a_graph,
        under_autocast,
        waiting_to_be_encoded_again,
        mixed,
        about_to_mix,
        under_reset,
        under_error,
        with_embeddings,
        with_own_positions,
        merged,
        with_changed_weights,
        mixing_with_changed_weights,
    )
}
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)
every_cache = pytest.mark.parametrize("variant", CACHE_VARIANTS)
every_pattern = pytest.mark.parametrize("pattern", MODELS)


@contextlib.contextmanager
def conditions(model, scenario):
    """What the model is like while the cache of a scenario lives."""
    if scenario != "merged":
        yield
        return
    model.merge_expert_vector(experts_of(model)[0])
    try:
        yield
    finally:
        model.unmerge_expert_vector()


@torch.no_grad()
def made(model, scenario, variant):
    return SCENARIOS[scenario](model, CACHE_VARIANTS[variant])


@torch.no_grad()
def go_on(model, cache):
    """The logits of turns behind the text, and those under another expert or an empty tensor where it is refused."""
    found = [
        model(some_ids(model, 11, columns=3), attention_mask=some_mask(12, columns=3), past_key_values=cache).logits
    ]
    found.append(model(some_ids(model, 13, columns=1), past_key_values=cache).logits)
    try:
        fork = cache.fork()
        fork.crop(-2)
        fork.set_expert_vector(experts_of(model)[1] if cache.expert_vector is None else None)
        found.append(model(some_ids(model, 14, columns=2), past_key_values=fork).logits)
    except ValueError:
        found.append(torch.empty(0))
    found.append(model(some_ids(model, 15, columns=1), past_key_values=cache).logits)
    return found


def contents_of(path):
    """Tensors and header of a file, read at once, as it may be replaced meanwhile."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), header["__metadata__"]


def content_of(path):
    """All that a file says, comparable: safetensors shuffles the fields of a header."""
    tensors, header = contents_of(path)
    return header, digest_of(tensors)


def equal(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def model_of(pattern, dtype):
    return new_model(pattern).to(DTYPES[dtype])


def combinations():
    """(pattern, dtype, variant, scenario) in an order that needs each model once."""
    for pattern in [*PATTERNS, *TRAINED_SMALL]:
        for dtype in ["float64"] if pattern in TRAINED_SMALL else DTYPES:
            whole = pattern in SPREAD and dtype == "float64"
            for variant in CACHE_VARIANTS:
                for scenario in SCENARIOS if whole else ("expert_per_row", "cropped_and_fed"):
                    yield pattern, dtype, variant, scenario


def in_turn(action):
    """Calls `action(model, name, variant, scenario)` for every combination."""
    model = known = None
    for pattern, dtype, variant, scenario in combinations():
        if known != (pattern, dtype):
            model, known = model_of(pattern, dtype), (pattern, dtype)
        with conditions(model, scenario):
            action(model, f"{pattern}-{dtype}-{variant}-{scenario}", variant, scenario)


# ---------------------------------------------------------------------------------------------- the law of the disk

CHILD = """
import sys
from pathlib import Path
import torch
from safetensors.torch import save_file
torch.set_num_threads(1)
from test_sessions import go_on, in_turn

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
    assert (loaded.storage, loaded.max_columns) == (cache.storage, cache.max_columns)
    assert (loaded.status, loaded.provenance.is_mixed, loaded.is_initialized) == ("current", False, True)
    assert torch.equal(loaded.lengths.tokens_seen, cache.lengths.tokens_seen)
    assert type(loaded.lengths.columns) is type(cache.lengths.columns)


def test_a_change_of_expert_that_is_taken_back_after_loading_uses_the_saved_states(tmp_path):
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
    assert sorted(names) == sorted(f"experts.{n}.{name}" for n, e in enumerate((a, b)) for name in e)


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


@pytest.fixture
def saved(tmp_path):
    """A model, a small session of it, and its file."""
    model = random_model(tiny_config("paper", num_hidden_layers=2))
    cache = made(model, "expert_per_row", "dense")
    cache.save(tmp_path / "s")
    return model, cache, tmp_path / "s"


def test_another_configuration_is_refused_with_the_fields_that_differ(saved):
    other = random_model(tiny_config("paper", num_hidden_layers=2, rms_norm_eps=1e-3, num_key_value_heads=2))
    message = r"`num_key_value_heads` is 2, not 4, `rms_norm_eps` is 0.001, not 1e-05"
    with pytest.raises(ValueError, match=message):
        other.load_cache(saved[2])


@pytest.mark.parametrize("change", ["values", "dtype", "merged"])
def test_other_weights_are_refused_unless_the_text_is_to_be_encoded_again(change, saved):
    model, cache, path = saved
    tokens = cache.token_ids.clone()
    mask = cache.history.mask.view(6).clone()
    if change == "dtype":
        model = model.float()
    elif change == "merged":
        model.merge_expert_vector(random_expert(model, 5))
        with pytest.raises(ValueError, match="with what was merged"):
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
    with pytest.raises(ValueError, match=r"offloaded: \['layers.0"):
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


@pytest.fixture
def two_sessions(tmp_path):
    """A model, two sessions of it, what their files say, and a path that holds the first."""
    model = random_model(tiny_config("mamba"))
    caches = [made(model, name, "dense") for name in ("plain", "padded")]
    contents = []
    for cache in caches:
        cache.save(tmp_path / "s")
        contents.append(content_of(tmp_path / "s"))
    caches[0].save(tmp_path / "s")
    return model, caches, contents, tmp_path / "s"


def in_a_process(action):
    """Runs `action` in a forked process; returns its id."""
    process = os.fork()
    if not process:
        try:
            action()
        finally:
            os._exit(1)
    return process


def kill_myself(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_process_killed_while_saving_leaves_the_old_or_the_new_session(two_sessions):
    model, caches, contents, path = two_sessions
    chance, seen = random.Random(0), [0, 0]
    for _ in range(80):
        has_begun, tell = os.pipe()

        def save_for_ever(tell=tell):
            while True:
                for cache in caches:
                    cache.save(path)
                os.write(tell, b".")

        process = in_a_process(save_for_ever)
        os.read(has_begun, 1)  # on a busy machine a process may take long to start
        time.sleep(chance.uniform(0.0, 0.04))
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
        os.close(has_begun)
        os.close(tell)
        which = contents.index(content_of(path))
        seen[which] += 1
        assert torch.equal(model.load_cache(path).token_ids, caches[which].token_ids)
    assert min(seen) > 0
    caches[0].save(path)
    assert [file.name for file in path.parent.iterdir()] == ["s"]


@pytest.mark.parametrize("num_bytes", [0, 1, 8, 100, 5000, None])
def test_a_write_cut_short_leaves_the_old_session_and_the_next_save_cleans_up(num_bytes, two_sessions, monkeypatch):
    model, caches, contents, path = two_sessions

    class CutShort:
        def __init__(self, *arguments):
            self.file = open(*arguments)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:num_bytes])
            self.file.flush()
            kill_myself()

    monkeypatch.setattr(files, "open", CutShort, raising=False)
    assert os.WTERMSIG(os.waitpid(in_a_process(lambda: caches[1].save(path)), 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    (left,) = [file for file in path.parent.iterdir() if file != path]
    assert num_bytes in (None, left.stat().st_size)
    assert content_of(path) == contents[0]
    assert torch.equal(model.load_cache(path).token_ids, caches[0].token_ids)
    caches[1].save(path)
    assert list(path.parent.iterdir()) == [path] and content_of(path) == contents[1]


@pytest.mark.parametrize(
    ("step", "call", "which"), [("fsync", 1, 0), ("replace", 1, 0), ("fsync", 2, 1), ("close", 1, 1)]
)
def test_a_kill_at_every_step_of_a_save_leaves_a_whole_session(step, call, which, two_sessions, monkeypatch):
    _, caches, contents, path = two_sessions
    original, calls = getattr(os, step), []

    def step_or_die(*arguments):
        calls.append(1)
        return kill_myself() if len(calls) == call else original(*arguments)

    monkeypatch.setattr(os, step, step_or_die)
    assert os.WTERMSIG(os.waitpid(in_a_process(lambda: caches[1].save(path)), 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    assert content_of(path) == contents[which]
    caches[0].save(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_session_and_nothing_else(step, two_sessions, monkeypatch):
    _, caches, contents, path = two_sessions

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        caches[1].save(path)
    assert list(path.parent.iterdir()) == [path] and content_of(path) == contents[0]


def test_saves_from_threads_and_processes_to_one_path_never_mix(two_sessions):
    model, caches, contents, path = two_sessions
    failures = []

    def save_often(times=12):
        try:
            for n in range(times):
                caches[n % 2].save(path)
                assert content_of(path) in contents
        except BaseException as error:
            failures.append(error)

    def save_and_leave():
        save_often()
        os._exit(bool(failures))

    processes = [in_a_process(save_and_leave) for _ in range(3)]
    threads = [threading.Thread(target=save_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        assert model.load_cache(path).get_seq_length() in (7, 12)
    for thread in threads:
        thread.join()
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0, 0]
    assert not failures
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(two_sessions, monkeypatch):
    """The library's own reader opens a file twice, and had the header of one with the tensors of the other."""
    model, caches, contents, path = two_sessions
    check = files._check_header
    monkeypatch.setattr(files, "_check_header", lambda *arguments: caches[1].save(path) or check(*arguments))
    assert torch.equal(model.load_cache(path).token_ids, caches[0].token_ids)
    assert content_of(path) == contents[1]


def test_a_save_leaves_the_temporary_files_of_writers_that_live(two_sessions):
    _, caches, _, path = two_sessions
    with files.temporary_beside(path) as temporary:
        caches[1].save(path)
        assert temporary.exists()
    with files.temporary_beside(path.with_name("other")) as temporary:
        pass
    assert list(path.parent.iterdir()) == [path]


def test_a_private_file_stays_private_and_a_long_name_is_no_obstacle(two_sessions):
    _, caches, _, path = two_sessions
    path.chmod(0o600)
    caches[1].save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    caches[1].save(path.with_name("n" * 255))


# --------------------------------------------------------------------------------------- damaged and foreign files


@pytest.fixture
def no_pickle(monkeypatch):
    """Whoever unpickles, fails the test."""

    def explode(*_, **__):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, explode)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_missing_files_and_folders_say_so(saved, tmp_path):
    with pytest.raises(FileNotFoundError):
        saved[0].load_cache(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder"):
        saved[0].load_cache(tmp_path)
    with pytest.raises(TypeError, match="got Linear"):
        MambaFormerCache.load(saved[2], torch.nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError):
        saved[1].save(tmp_path / "no" / "folder")


def test_pickles_are_named_and_never_run(saved, tmp_path, request):
    torch.save({"q": Bomb(tmp_path / "exploded")}, tmp_path / "zip")
    torch.save({"q": Bomb(tmp_path / "exploded")}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    for protocol in range(2, 6):
        (tmp_path / f"pickle{protocol}").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol))
    (tmp_path / "text").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), 0))
    request.getfixturevalue("no_pickle")
    for kind in ("zip", "legacy", "pickle2", "pickle3", "pickle4", "pickle5"):
        with pytest.raises(ValueError, match="which can run code"):
            saved[0].load_cache(tmp_path / kind)
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        saved[0].load_cache(tmp_path / "text")
    assert not (tmp_path / "exploded").exists()


def test_safetensors_files_of_another_kind_say_so(saved, tmp_path):
    model, _, path = saved
    random_expert(model, 1).save(tmp_path / "expert")
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    for name, found in (("expert", "mambaformer.expert_vector"), ("plain", "None")):
        with pytest.raises(ValueError, match=f"not of format 'mambaformer.session' .its header says '?{found}"):
            model.load_cache(tmp_path / name)
    with pytest.raises(ValueError, match=r"not of format 'mambaformer.expert_vector'.*pass a file that `ExpertVector"):
        ExpertVector.load(path)
    with pytest.raises(ValueError, match=r"pass a file that `cache.save\(path\)` wrote"):
        model.load_cache(tmp_path / "expert")
    for version, message in (("2", "upgrade"), ("0", "unknown version"), ("x", "unknown version")):
        tensors, header = contents_of(path)
        write_tensors(tmp_path / "v", tensors, sealed(header | {"version": version}, tensors))
        with pytest.raises(ValueError, match=message):
            model.load_cache(tmp_path / "v")


def header_edited(data, chance):
    """The file with one edit of its header that leaves it valid JSON."""
    size = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + size])
    place, key = header, chance.choice(list(header))
    if key == "__metadata__" or chance.random() < 0.5:
        place = header[key]
        key = chance.choice(list(place))
    edit = chance.choice(["drop", "rename", "value", "copy"])
    if edit == "drop":
        del place[key]
    elif edit == "rename":
        place[key + "x"] = place.pop(key)
    elif edit == "copy":
        place[key + "x"] = place[key]
    else:
        new = ["", "0", "null", "F32", "I64", "BOOL", "F8_E4M3", "{}", [], [1], [0, 8], 0, -1, 2**63, None, {}, 1e300]
        place[key] = chance.choice([*new, str(place[key]).replace("1", "2"), str(place[key]).replace("false", "true")])
    edited = json.dumps(header).encode()
    return len(edited).to_bytes(8, "little") + edited + data[8 + size :]


def mutated(data, chance):
    """The file with one random damage."""
    a, b = sorted(chance.sample(range(len(data) + 1), 2))
    block = min(64, len(data) // 4)
    first, second = (chance.randrange(len(data) // 2 - block), chance.randrange(len(data) // 2, len(data) - block))
    kind = chance.choice(["flip"] * 4 + ["head", "cut", "insert", "swap", "header", "header", "double", "gap", "junk"])
    if kind in ("flip", "head"):
        changed = bytearray(data)
        at = chance.randrange(len(data) if kind == "flip" else min(400, len(data)))
        changed[at] ^= 1 << chance.randrange(8)
        return bytes(changed)
    if kind == "cut":
        return data[: chance.choice([0, 1, 7, 8, 9, a, b])]
    if kind == "swap":
        parts = (data[:first], data[second : second + block], data[first + block : second])
        return b"".join([*parts, data[first : first + block], data[second + block :]])
    return {
        "insert": lambda: data[:a] + chance.randbytes(chance.randint(1, 16)) + data[a:],
        "header": lambda: header_edited(data, chance),
        "double": lambda: data + data,
        "gap": lambda: data[:a] + data[b:],
        "junk": lambda: data[:a] + chance.randbytes(b - a) + data[b:],
    }[kind]()


def test_a_thousand_damaged_sessions_are_refused_or_equal(saved, tmp_path, no_pickle):
    model, _, path = saved
    whole, content, chance, refused = path.read_bytes(), content_of(path), random.Random(1), 0
    for n in range(1000):
        (tmp_path / "m").write_bytes(mutated(whole, chance))
        try:
            loaded = model.load_cache(tmp_path / "m")
        except ValueError:
            refused += 1
            continue
        loaded.save(tmp_path / "again")
        assert content_of(tmp_path / "again") == content, n
    assert refused > 900


def test_a_thousand_damaged_experts_are_refused_or_equal(tmp_path, no_pickle):
    expert = random_expert(shared_model("paper"), 1, rank=3, name="x")
    expert.metadata["spectrum"] = {"lm_head": [3.0, 2.0]}
    expert.save(tmp_path / "e")
    whole, chance, refused = (tmp_path / "e").read_bytes(), random.Random(2), 0
    for n in range(1000):
        (tmp_path / "m").write_bytes(mutated(whole, chance))
        try:
            loaded = ExpertVector.load(tmp_path / "m")
        except ValueError:
            refused += 1
            continue
        assert loaded == expert, n
        assert all(torch.equal(loaded[key], expert[key]) for key in expert), n
    assert refused > 900


# ------------------------------------------------------------------------------- whole files by somebody else's hand


def with_tensor(name, change):
    def forge(tensors, session):
        tensors[name] = change(tensors[name])

    return forge


def with_field(name, value):
    def forge(tensors, session):
        session[name] = value

    return forge


def with_option(name, value):
    def forge(tensors, session):
        session["options"][name] = value

    return forge


def with_options(**options):
    def forge(tensors, session):
        session["options"] |= options

    return forge


def without_metadata(tensors, session):
    del session["experts"][0]["metadata"]


def with_spectrum(spectrum):
    def forge(tensors, session):
        session["experts"][0]["metadata"]["spectrum"] = spectrum

    return forge


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def without_tensor(name):
    def forge(tensors, session):
        del tensors[name]

    return forge


def set_at(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def as_many_columns(tensors, session):
    session["columns"] = 7


def one_more_tensor(tensors, session):
    tensors["layers.0.recurrent.more"] = torch.ones(1)


def a_mask_of_other_bytes(tensors, session):
    mask = tensors["tokens.mask"].clone()
    mask.view(torch.uint8)[0, 0] = 2
    tensors["tokens.mask"] = mask


def another_vector(tensors, session):
    name = next(name for name in tensors if name.startswith("experts.0."))
    tensors[name] = tensors[name] + 1


def an_expert_for_another_model(tensors, session):
    vectors = {"model.layers.9.self_attn.q_proj": torch.full((3,), 2.0)}
    for name in [name for name in tensors if name.startswith("experts.0.")]:
        del tensors[name]
    tensors["experts.0.model.layers.9.self_attn.q_proj"] = vectors["model.layers.9.self_attn.q_proj"]
    session["experts"][0]["fingerprint"] = ExpertVector(vectors).fingerprint


FORGERIES = {
    "id beyond the vocabulary": (with_tensor("tokens.token_ids", set_at((1, 2), VOCAB)), "vocabulary"),
    "negative id": (with_tensor("tokens.token_ids", set_at((1, 2), -1)), "vocabulary"),
    "ids as floats": (with_tensor("tokens.token_ids", torch.Tensor.double), "tokens.token_ids"),
    "ids missing": (without_tensor("tokens.token_ids"), "lacks"),
    "mask of another shape": (with_tensor("tokens.mask", lambda mask: mask[:, :5]), "tokens.mask"),
    "mask as bytes": (with_tensor("tokens.mask", lambda mask: mask.to(torch.uint8)), "tokens.mask"),
    "mask of other bytes": (a_mask_of_other_bytes, "neither true nor false"),
    "more columns": (as_many_columns, "of shape"),
    "keys of fewer slots": (with_tensor("layers.1.attention.keys", lambda k: k[:, :, :5]), "layers.1.attention.keys"),
    "keys of more heads": (
        with_tensor("layers.1.attention.keys", lambda k: torch.cat([k, k], 1)),
        "layers.1.attention.keys",
    ),
    "keys of fewer rows": (with_tensor("layers.1.attention.values", lambda v: v[:2]), "layers.1.attention.values"),
    "keys as integers": (with_tensor("layers.1.attention.keys", lambda k: k.long()), "layers.1.attention.keys"),
    "keys in float32": (with_tensor("layers.1.attention.keys", lambda k: k.float()), "layers.1.attention.keys"),
    "state of another shape": (with_tensor("layers.0.recurrent.ssm", lambda s: s.mT), "layers.0.recurrent.ssm"),
    "window too long": (
        with_tensor("layers.0.recurrent.conv", lambda c: torch.cat([c, c], 1)),
        "layers.0.recurrent.conv",
    ),
    "state missing": (without_tensor("layers.0.recurrent.conv"), "lacks"),
    "one more state": (one_more_tensor, "should not have"),
    "states said to be missing": (with_field("has_states", False), "should not have"),
    "no text": (with_field("columns", 0), "a text of 3 rows and 0 columns"),
    "negative columns": (with_field("columns", -6), "a text of"),
    "no rows": (with_field("rows", None), "a text of"),
    "other rows": (with_field("rows", 2), "for 2 rows"),
    "columns as text": (with_field("columns", "6"), "`columns`"),
    "a number for a truth value": (with_field("is_mixed", 0), "`is_mixed`"),
    "a truth value for a number": (with_field("rows", True), "`rows`"),
    "unknown field": (with_field("more", 1), "other fields"),
    "unknown option": (with_option("more", 1), "its options are"),
    "an option of another type": (with_option("rollback_reach", "3"), "its options are"),
    "a truth value for a reach": (with_option("rollback_reach", True), "its options are"),
    "an endless reach": (with_option("rollback_reach", 10**6), "longer than any text"),
    "a reach that is no size at all": (with_option("rollback_reach", 10**400), "longer than any text"),
    "windows that have been anywhere": (with_field("overshoot", 2**40), "tokens further"),
    "fewer rows than none": (with_field("rows", -3), "a text of"),
    "experts of names alone": (with_field("experts", ["a", "b"]), "not described by"),
    "an expert without metadata": (without_metadata, "not described by"),
    "a spectrum of words": (with_spectrum("rainbow"), "spectrum"),
    "a spectrum of lists": (with_spectrum({"lm_head": [[1.0]]}), "spectrum"),
    "metadata without an end": (with_spectrum(nested(200)), "nested more than"),
    "unknown storage": (with_option("storage", "tape"), "`storage`"),
    "unknown policy": (with_option("on_expert_change", "shrug"), "`on_expert_change`"),
    "static without size": (with_option("storage", "static"), "max_cache_len"),
    "an endless storage": (
        with_options(storage="static", max_cache_len=2**40),
        "room for",
    ),
    "options as a list": (with_field("options", []), "`options`"),
    "an index beyond the experts": (with_field("expert", [0, 9, None]), "in force are"),
    "a negative index": (with_field("expert", [0, -1, None]), "in force are"),
    "experts for too few rows": (with_field("expert", [0, 0]), "experts for 2 rows"),
    "experts of no kind": (with_field("experts", [1, 2]), "not described by"),
    "a vector changed": (another_vector, "fingerprint"),
    "an expert for another model": (an_expert_for_another_model, "does not have"),
    "a key of another length": (with_field("encoded_key", ["a"]), "encoded by 1 experts"),
    "a key of numbers": (with_field("encoded_key", [1, 2, 3]), "encoded by"),
    "other layers": (with_field("config", {}), "another configuration"),
}


def forged(path, forge):
    tensors, header = contents_of(path)
    session = json.loads(header["session"])
    forge(tensors, session)
    header["session"] = json.dumps(session)
    target = path.with_name("forged")
    write_tensors(target, {k: t.contiguous() for k, t in tensors.items()}, sealed(header, tensors))
    return target


@pytest.mark.parametrize("name", FORGERIES)
def test_a_whole_file_with_wrong_content_is_refused(name, saved):
    forge, message = FORGERIES[name]
    with pytest.raises(ValueError, match=f"is no session that this model can go on from: .*{message}"):
        saved[0].load_cache(forged(saved[2], forge))


def as_before_mixers(tensors, session):
    """The names of a time when Mamba was the only recurrent mixer."""
    del session["config"]["recurrent_mixer"]
    for name in [name for name in tensors if ".recurrent." in name]:
        tensors[name.replace(".recurrent.", ".mamba.")] = tensors.pop(name)


def test_a_session_of_before_there_were_mixers_continues_bit_for_bit(saved):
    model, cache, path = saved
    old = forged(path, as_before_mixers)
    assert any(".mamba.ssm" in name for name in contents_of(old)[0])
    loaded = model.load_cache(old)
    ids = some_ids(model, 3).expand(cache.batch_size, -1)
    assert torch.equal(model(ids, cache=loaded).logits, model(ids, cache=cache).logits)


def test_a_session_of_too_much_text_for_its_storage_is_refused(saved):
    model, _, path = saved
    target = forged(
        path,
        with_field(
            "options", {"storage": "static", "max_cache_len": 5, "on_expert_change": "error", "rollback_reach": 0}
        ),
    )
    with pytest.raises(ValueError, match="6 columns where 5 fit"):
        model.load_cache(target)


@pytest.fixture
def largest_allocation(monkeypatch):
    """Elements of the largest tensor that a test has asked storage for."""
    found, zeros = [0], torch.Tensor.new_zeros

    def new_zeros(self, shape, *arguments, **options):
        found[0] = max(found[0], torch.Size(shape).numel())
        if found[0] > 10**7:
            raise MemoryError(f"{shape} was asked for")
        return zeros(self, shape, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    return found


@pytest.mark.parametrize("scenario", ["plain", "empty", "with_changed_weights"])
def test_a_small_file_cannot_ask_for_gigabytes(scenario, tmp_path, largest_allocation):
    """A session of 23 KB whose `max_cache_len` said 10^7 allocated 4.9 GB before anybody had asked for the room.

    The text, the model's context or the caller justify storage; a number in a header does not.
    """
    model = random_model(tiny_config("paper"))
    cache = made(model, scenario, "static")
    cache.save(tmp_path / "s")
    target = forged(tmp_path / "s", with_options(max_cache_len=10**7))
    for options in ({}, {"on_weights_change": "recompute"}):
        with pytest.raises(ValueError, match=r"room for 10000000 columns of . rows.*pass `max_cache_len=`"):
            model.load_cache(target, **options)
    assert largest_allocation[0] < 10**6
    loaded = model.load_cache(target, max_cache_len=50)
    assert loaded.max_columns == 50
    found, wanted = (model(some_ids(model, 2), past_key_values=one).logits for one in (loaded, cache))
    assert_same_logits(found, wanted)


def test_many_rows_of_one_column_ask_for_no_more_than_one_row(tmp_path):
    """Sibling: each row multiplies the room, and costs a file without states only the bytes of its ids."""
    model = random_model(tiny_config("paper", max_position_embeddings=100))
    cache = model.make_cache("static", max_cache_len=300)
    with torch.no_grad():
        model(some_ids(model, 1, rows=2, columns=1), past_key_values=cache)
    cache.save(tmp_path / "s")
    assert model.load_cache(tmp_path / "s").max_columns == 300
    with pytest.raises(ValueError, match="room for 401 columns of 2 rows"):
        model.load_cache(forged(tmp_path / "s", with_options(max_cache_len=401)))


def test_the_caller_says_how_much_room_a_loaded_session_has(tmp_path):
    model = shared_model("everything")
    cache = made(model, "padded", "static")
    cache.save(tmp_path / "s")
    for room in (12, 30, 200):
        loaded = model.load_cache(tmp_path / "s", max_cache_len=room)
        assert loaded.max_columns == room and loaded.layers[1].attention.keys.tensor.shape[2] <= room
        if room > 20:
            for found, wanted in zip(go_on(model, loaded), go_on(model, cache.fork()), strict=True):
                assert_same_logits(found, wanted)
    for room in (11, 0, -1, "12", True):
        with pytest.raises(ValueError, match=r"12 columns where 11 fit|`max_cache_len` must be"):
            model.load_cache(tmp_path / "s", max_cache_len=room)
    made(model, "plain", "dense").save(tmp_path / "s")
    with pytest.raises(ValueError, match="grows with the text"):
        model.load_cache(tmp_path / "s", max_cache_len=50)


def test_a_forged_header_that_no_parser_survives_is_refused(saved):
    model, _, path = saved
    tensors, header = contents_of(path)
    for session in ("[" * 100_000, "{", "[]", '"x"', "1" * 10_000, '{"config": NaN}'):
        write_tensors(path, tensors, sealed(header | {"session": session}, tensors))
        with pytest.raises(ValueError, match="no session"):
            model.load_cache(path)


def test_what_is_sealed_again_unchanged_is_loaded(saved):
    """The forgeries above are refused for what they change, not for being written by hand."""
    model, cache, path = saved
    target = forged(path, lambda tensors, session: None)
    assert equal(go_on(model, model.load_cache(target)), go_on(model, cache))
