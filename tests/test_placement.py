"""Weights that are elsewhere: offloaded to disk or to memory, or split over two processes."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import accelerate
import pytest
import torch
from safetensors.torch import load_file, save_file

from in_two_processes import (
    EXPERT_SEED,
    FSDP_WRAPS,
    GENERATE,
    PATTERNS,
    RAGGED,
    ROWS,
    STEPS,
    config_of,
    count_encoded,
    learn,
    share_of,
    start_of_training,
)
from mambaformer import MambaFormerForCausalLM
from mambaformer.mixer_attention_masks_mambaformer import AttentionMasks
from oracle import assert_same_logits, expected
from patterns import CACHE_VARIANTS
from sequences import feed, one_turn
from tiny_models import random_expert, random_model

IDS = torch.tensor(ROWS)
LAUNCH = "accelerate.commands.launch --use_fsdp --fsdp_version 2 --num_processes 2 --num_machines 1"
LAUNCH += " --mixed_precision no --dynamo_backend no --main_process_port 0"  # port 0 is any that is free


def source(pattern):
    return random_model(config_of(pattern))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for pattern in (*PATTERNS, "jamba"):
        source(pattern).save_pretrained(folder / pattern)
    return folder


# ---- offloaded


def offloaded(folder, pattern="everything"):
    """With some layers in memory; the others are read from disk each time they are needed."""
    size = sum(weight.nbytes for weight in source(pattern).parameters())
    place = {"device_map": "auto", "max_memory": {"cpu": int(0.7 * size)}, "offload_folder": folder / "offloaded"}
    model = MambaFormerForCausalLM.from_pretrained(folder / pattern, dtype=torch.float64, **place).eval()
    assert set(model.hf_device_map.values()) == {"cpu", "disk"}
    return model


@pytest.mark.slow
@pytest.mark.parametrize("variant", CACHE_VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_offloaded_layers_compute_what_layers_in_memory_compute(folder, pattern, variant):
    model, plain = offloaded(folder, pattern), source(pattern)
    wanted = expected(plain, ROWS)
    assert_same_logits(list(model(IDS).logits.detach()), wanted)
    turns = [one_turn([row[start:stop] for row in ROWS]) for start, stop in ((0, 4), (4, 5), (5, 9))]
    assert_same_logits(feed(model, model.make_cache(**CACHE_VARIANTS[variant]), turns), wanted)
    assert torch.equal(model.generate(IDS, **GENERATE), plain.generate(IDS, **GENERATE))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", PATTERNS)
def test_experts_scale_offloaded_weights(folder, pattern):
    model, plain = offloaded(folder, pattern), source(pattern)
    expert = random_expert(plain, EXPERT_SEED)
    wanted = expected(plain, ROWS, [None, expert])
    assert_same_logits(list(model(IDS, expert_vector=[None, expert]).logits.detach()), wanted)
    assert model.spectrum(["lm_head"]) == plain.spectrum(["lm_head"])
    lengths = count_encoded(model)
    schedule = {"expert_schedule": {0: None, 3: expert}}
    assert torch.equal(model.generate(IDS, **schedule, **GENERATE), plain.generate(IDS, **schedule, **GENERATE))
    assert lengths == [9, 1, 1, 12, 1, 1, 1, 1]


def test_an_expert_is_not_merged_into_offloaded_weights(folder):
    model = offloaded(folder)
    with pytest.raises(ValueError, match=r"Offloaded weights are only read.*expert_vector"):
        model.merge_expert_vector(random_expert(source("everything"), EXPERT_SEED))
    assert_same_logits(list(model(IDS).logits.detach()), expected(source("everything"), ROWS))


def halves(model, change):
    """Logits of a text of which the first half was cached before the change, and the lengths that were encoded."""
    cache = model.make_cache()
    with torch.no_grad():
        model(IDS[:, :5], past_key_values=cache)
        change()
        lengths = count_encoded(model)
        return list(model(IDS[:, 5:], past_key_values=cache).logits), lengths


def test_a_cache_notices_a_new_file_under_offloaded_weights(folder):
    """They are on the meta device between forwards, where nothing of them can be seen."""
    model = offloaded(folder)
    path = folder / "everything" / "model.safetensors"
    old, on_disk = path.read_bytes(), [name for name, weight in model.named_parameters() if weight.is_meta]
    state = {name: 0.9 * w if name in on_disk else w for name, w in source("everything").state_dict().items()}
    logits, lengths = halves(model, lambda: save_file(state, path, {"format": "pt"}))
    path.write_bytes(old)
    changed = source("everything")
    changed.load_state_dict(state)
    assert lengths == [9]
    assert_same_logits(logits, [row[5:] for row in expected(changed, ROWS)])


def test_a_cache_notices_a_write_to_weights_that_are_offloaded_to_memory():
    model, plain, changed = (source("everything") for _ in range(3))
    state = {name: weight.clone() for name, weight in model.state_dict().items()}
    accelerate.cpu_offload(model, execution_device="cpu", state_dict=state)
    assert all(weight.is_meta for weight in model.parameters())
    assert_same_logits(halves(model, lambda: None)[0], [row[5:] for row in expected(plain, ROWS)])
    changed.load_state_dict({name: 0.9 * weight for name, weight in state.items()})
    logits, lengths = halves(model, lambda: [weight.mul_(0.9) for weight in state.values()])
    assert lengths[-1] == 9
    assert_same_logits(logits, [row[5:] for row in expected(changed, ROWS)])


def test_an_attention_mask_follows_its_layer_to_another_device():
    masks = AttentionMasks(torch.ones(1, 1, 2, 2), "eager")
    moved = accelerate.utils.send_to_device({"attention": masks}, torch.device("meta"))["attention"]
    assert (moved.mask.device.type, moved.implementation) == ("meta", "eager")
    assert accelerate.utils.send_to_device(AttentionMasks(), torch.device("meta")) == AttentionMasks()


# ---- two processes


@pytest.fixture(scope="module")
def split(folder):
    """What each of two processes found: a list of (tensors, notes)."""
    script = Path(__file__).with_name("in_two_processes.py")
    command = [sys.executable, "-m", *LAUNCH.split(), str(script), str(folder)]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    with subprocess.Popen(command, env=environment, start_new_session=True, **pipes) as process:
        try:
            output, _ = process.communicate(timeout=300)
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    assert process.returncode == 0, output
    return [
        (load_file(folder / f"{rank}.safetensors"), json.loads((folder / f"{rank}.json").read_text()))
        for rank in (0, 1)
    ]


@pytest.fixture(scope="module", params=PATTERNS)
def pattern(request):
    return request.param


def of_both(split, pattern, name):
    return [tensors[f"{pattern}.{name}"] for tensors, _ in split]


@pytest.mark.long
def test_split_logits_are_those_of_one_process_however_the_text_is_fed(split, pattern):
    model = source(pattern)
    for name in ("logits", "steps"):
        for found in of_both(split, pattern, name):
            assert_same_logits(list(found), expected(model, ROWS))
    for name in ("ragged_dense", "ragged_static"):
        for found in of_both(split, pattern, name):
            assert_same_logits(found, torch.cat(expected(model, RAGGED)))


@pytest.mark.long
def test_split_models_say_what_one_process_says_and_encode_every_token_once(split, pattern):
    model = source(pattern)
    expert = random_expert(model, EXPERT_SEED)
    for found in of_both(split, pattern, "text"):
        assert torch.equal(found, model.generate(IDS, **GENERATE))
    for found in of_both(split, pattern, "text_under_expert"):
        assert torch.equal(found, model.generate(IDS, expert_schedule={0: None, 3: expert}, **GENERATE))
    for _, notes in split:
        assert notes[pattern]["encoded"] == [9, *[1] * 7, 9, 1, 1, 12, *[1] * 4]


@pytest.mark.long
def test_weights_and_caches_are_shared_out(split, pattern):
    model = source(pattern)
    cache = model.make_cache()
    with torch.no_grad():  # a graph would share the buffers
        for part in IDS.split(STEPS, 1):
            model(part, past_key_values=cache)
    whole = cache.report()
    for _, notes in split:
        assert notes[pattern]["share"] < 0.52 * share_of(model)
        for kind, sizes in notes[pattern]["cache_bytes"].items():
            factor = 1 if kind == "tokens" else 2
            assert {name: factor * size for name, size in sizes.items()} == whole[kind]


@pytest.mark.long
def test_experts_scale_split_weights_on_the_fly_and_merged(split, pattern):
    model = source(pattern)
    expert = random_expert(model, EXPERT_SEED)
    wanted = expected(model, ROWS, [expert] * 2)
    for name in ("expert", "merged"):
        for found in of_both(split, pattern, name):
            assert_same_logits(list(found), wanted)
    for found in of_both(split, pattern, "rows_of_experts"):
        assert_same_logits(list(found), expected(model, ROWS, [None, expert]))


@pytest.mark.long
def test_split_gradients_are_those_of_one_process(split, pattern):
    model = source(pattern)
    wanted = learn(model, random_expert(model, EXPERT_SEED))
    for name, gradient in wanted.items():
        for found in of_both(split, pattern, name):
            difference = (found - gradient).abs().max() / gradient.abs().max()
            assert difference < 1e-9, f"{name} is off by {difference:.1e}"


@pytest.mark.long
def test_a_cache_notices_a_write_to_split_weights(split, pattern):
    model = source(pattern)
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.mul_(1 if "norm" in name else 0.5)  # norms are whole in both processes
    for found in of_both(split, pattern, "noticed"):
        assert_same_logits(list(found), [row[5:] for row in expected(model, ROWS)])


@pytest.mark.long
def test_a_split_model_is_saved_whole(split, folder, pattern):
    again = MambaFormerForCausalLM.from_pretrained(folder / f"{pattern}-again", dtype=torch.float64)
    for name, weight in source(pattern).state_dict().items():
        assert torch.equal(again.state_dict()[name], weight), name


@pytest.mark.long
def test_heads_that_cannot_be_dealt_out_evenly_are_refused(split):
    for _, notes in split:
        assert "num_key_value_heads" in notes["refused"] and "2 processes" in notes["refused"]


@pytest.mark.long
@pytest.mark.parametrize("wrap", FSDP_WRAPS)
def test_two_processes_with_fsdp_learn_what_one_learns_from_the_batch(split, wrap):
    model, optimizer, ids = start_of_training()
    losses = []
    for _ in range(4):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
    assert losses[-1] < 0.8 * losses[0]
    for tensors, notes in split:
        assert notes[wrap]["losses"] == pytest.approx(losses, rel=1e-6)  # losses are float32
        assert notes[wrap]["share"] < 0.52 * share_of(model)
        for name, weight in model.named_parameters():
            assert_same_logits(tensors[f"{wrap}.{name}"], weight.detach())
