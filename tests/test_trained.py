"""Trained weights: that their states are large and matter, and the laws on long real text, against one plain forward.

The other law tests run on the same models with short texts, against the oracle in `reference.py`. A plain forward
here has no cache, no pads and no cuts: one row, all of it at once.
"""

import os
import random
import subprocess
import sys
import textwrap

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer

from oracle import assert_same_logits
from patterns import NO_TOKEN, ROOT, TINY
from sequences import feed, feed_row, one_turn, ragged_turns, random_cut, rows_of
from tiny_models import ALL_TRAINED_PARAMS, TRAINED_SMALL, new_model, shared_expert, shared_model

LENGTHS = (280, 190, 235)
STORAGES = {"dense": {}, "recorded": {"rollback_reach": 64}, "static": {"storage": "static", "max_cache_len": 700}}
# What a lost state does to the logits at least, where the laws tolerate 1e-10. Blocks that were trained for the little
# which windows lose move them less than those of a model that was trained with them.
MOVED = {"trained_tiny": 1e-4, "trained_smollm2": 5e-7}

every_model = pytest.mark.parametrize("name", ALL_TRAINED_PARAMS)
small_model = pytest.mark.parametrize("name", TRAINED_SMALL)
every_storage = pytest.mark.parametrize("storage", STORAGES)
dense_and_static = pytest.mark.parametrize("storage", ["dense", "static"])


def new_cache(model, storage, **options):
    return model.make_cache(**STORAGES[storage], **options)


@torch.no_grad()
def plain(model, row, expert=None):
    """Logits (tokens, vocabulary) of a row from one forward."""
    given = {} if expert is None else {"expert_vector": expert}
    return model(torch.tensor([row]), use_cache=False, **given).logits[0]


# -------------------------------------------------------------------------------------------------------- the premise


def states_of(cache, state):
    """The stores of a cache that hold a Mamba state ("ssm" or "conv"), and that state."""
    stores = [layer.recurrent for layer in cache.layers if getattr(layer, "recurrent", None) is not None]
    return [(store, store.states[state]) for store in stores]


@pytest.mark.slow
@every_model
@pytest.mark.parametrize("state", ["ssm", "conv"])
def test_the_mamba_states_of_a_text_move_the_logits(name, state):
    """The laws would see nothing in states that are small, or that nothing depends on."""
    model, (row, *_) = shared_model(name), rows_of(name, 1, LENGTHS)
    cache, wanted = model.make_cache(), plain(model, row)[-8:]
    feed_row(model, cache, row[:-8])
    num_states = len(states_of(cache, state))
    config = model.config
    assert num_states == sum("recurrent" in config.mixers(layer) for layer in range(config.num_hidden_layers))

    def moved_by_zeroing(which):
        fork = cache.fork()
        for store, tensor in states_of(fork, state)[which]:
            store.states[state] = torch.zeros_like(tensor)
        moved = feed_row(model, fork, row[-8:]) - wanted
        return (moved.abs().max() / wanted.abs().max()).item()

    each = [moved_by_zeroing(slice(n, n + 1)) for n in range(num_states)]
    assert min(each) > MOVED[name], f"of the logit scale, for each of the states: {each}"
    assert moved_by_zeroing(slice(None)) > 5 * MOVED[name]


# ------------------------------------------------------------------------------------------------- laws on long texts


@pytest.mark.slow
@every_model
@dense_and_static
def test_a_long_text_in_pieces_is_one_forward(name, storage):
    model, (row, *_) = shared_model(name), rows_of(name, 1, LENGTHS)
    for singles in (0.2, 0.8):
        sizes = random_cut(random.Random(1), len(row), singles)
        assert_same_logits(feed_row(model, new_cache(model, storage), row, sizes), plain(model, row))


@small_model
@pytest.mark.parametrize(
    "dtype, tolerance", [(torch.float32, 1e-5), (torch.bfloat16, 0.05)], ids=["float32", "bfloat16"]
)
def test_a_long_text_in_pieces_loses_only_the_digits_of_its_dtype(name, dtype, tolerance):
    """Tolerances: those of the laws on short texts; that of bfloat16 is what roundings were seen to cost there."""
    model, (row, *_) = new_model(name).to(dtype), rows_of(name, 1, LENGTHS)
    found = feed_row(model, model.make_cache(), row, random_cut(random.Random(1), len(row)))
    assert_same_logits(found.double(), plain(shared_model(name), row), tolerance)


@pytest.mark.slow
@every_model
@dense_and_static
def test_long_rows_with_pads_anywhere_are_what_they_are_alone(name, storage):
    model, rows = shared_model(name), rows_of(name, 1, LENGTHS)
    turns = ragged_turns(random.Random(2), rows, count=4)
    assert_same_logits(feed(model, new_cache(model, storage), turns), [plain(model, row) for row in rows])


@pytest.mark.long
@every_model
@every_storage
def test_drafts_that_are_taken_back_leave_no_trace_in_a_long_text(name, storage):
    """First all of a draft, then what each row had wrong."""
    model, rows, drafts = shared_model(name), rows_of(name, 1, LENGTHS), rows_of(name, 2, (40, 40, 40))
    cache, rights = new_cache(model, storage), (2, 9, 5)
    feed(model, cache, [one_turn([row[:180] for row in rows])])
    feed(model, cache, [one_turn(drafts)])
    cache.crop(-40)
    assert (cache.status == "stale") == (storage != "recorded")
    mixed = [row[180 : 180 + right] + draft[right:9] for row, draft, right in zip(rows, drafts, rights, strict=True)]
    feed(model, cache, [one_turn(mixed)])
    cache.crop([right - 9 for right in rights])
    rest = [row[180 + right :] for row, right in zip(rows, rights, strict=True)]
    found = feed(model, cache, ragged_turns(random.Random(3), rest, count=3))
    assert_same_logits(found, [plain(model, row)[-len(tokens) :] for row, tokens in zip(rows, rest, strict=True)])


@pytest.mark.slow
@every_model
@dense_and_static
def test_rows_of_long_texts_are_reordered_repeated_selected_and_forked(name, storage):
    model, rows, ends = shared_model(name), rows_of(name, 1, LENGTHS), rows_of(name, 4, (9, 7, 8, 5))
    origin = new_cache(model, storage)
    feed(model, origin, ragged_turns(random.Random(5), rows, count=2))
    fork = origin.fork()
    fork.reorder_cache(torch.tensor([2, 0, 1]))
    fork.batch_select_indices(torch.tensor([2, 0]))
    fork.batch_repeat_interleave(2)
    for cache, order in ((fork, [1, 1, 2, 2]), (origin, [0, 1, 2])):
        found = feed(model, cache, ragged_turns(random.Random(6), ends[: len(order)], count=2))
        wanted = [plain(model, rows[row] + end)[-len(end) :] for row, end in zip(order, ends, strict=False)]
        assert_same_logits(found, wanted)


@pytest.mark.slow
@small_model
@dense_and_static
def test_a_long_text_follows_the_expert_and_comes_back_to_the_base_bit_for_bit(name, storage):
    model, (row, *_), expert = shared_model(name), rows_of(name, 1, LENGTHS), shared_expert(name, 1)
    first, cache = new_cache(model, storage), new_cache(model, storage)
    with torch.no_grad():
        base = model(torch.tensor([row]), past_key_values=first, logits_to_keep=8).logits[0]
    feed_row(model, cache, row[:200])
    cache.set_expert_vector(expert)
    assert_same_logits(feed_row(model, cache, row[200:-8], [1, len(row) - 209]), plain(model, row, expert)[200:-8])
    cache.set_expert_vector(None)
    assert torch.equal(feed_row(model, cache, row[-8:]), base)


@small_model
def test_two_experts_on_two_long_texts_in_turns_are_not_seen_from_each_other(name):
    model, experts = shared_model(name), (shared_expert(name, 1), None)
    rows = [row[:190] for row in rows_of(name, 1, LENGTHS)]
    caches, found = [model.make_cache(), model.make_cache()], ([], [])
    for start in (0, 100, 101, 150):
        end = {0: 100, 100: 101, 101: 150, 150: 190}[start]
        for which in (0, 1):
            given = {"expert_vector": experts[which]} if start == 0 else {}
            found[which].append(feed_row(model, caches[which], rows[which][start:end], **given))
    for which in (0, 1):
        assert_same_logits(torch.cat(found[which]), plain(model, rows[which], experts[which]))


def merge(model, name):
    model.merge_expert_vector(shared_expert(name, 1))


def load(model, name):
    model.load_state_dict({key: weight * 1.02 for key, weight in model.state_dict().items()})


def descend(model, name):
    ids = torch.tensor(rows_of(name, 7, (60,)))
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.SGD(model.parameters(), lr=0.05).step()


@pytest.mark.slow
@small_model
@pytest.mark.parametrize("write", [merge, load, descend], ids=lambda write: write.__name__)
def test_a_long_text_that_other_weights_have_encoded_is_never_used(name, write):
    model, (row, *_) = new_model(name), rows_of(name, 1, LENGTHS)
    cache, strict = model.make_cache(), model.make_cache(on_expert_change="error")
    before = torch.cat([feed_row(model, one, row[:200])[None] for one in (cache, strict)])
    write(model, name)
    wanted = plain(model, row)
    assert (wanted[:200] - before).abs().max() > 1e-2
    assert_same_logits(feed_row(model, cache, row[200:], [1, len(row) - 201]), wanted[200:])
    with pytest.raises(ValueError, match="weights changed"):
        feed_row(model, strict, row[200:])


MODES = {
    "dense": {},
    "static": {"cache_implementation": "static"},
    "chunks": {"prefill_chunk_size": 64},
    "lookup": {"prompt_lookup_num_tokens": 5},
    "early exit": {"assistant_early_exit": 2},
}


@pytest.mark.slow
@small_model
@pytest.mark.parametrize("mode", MODES)
def test_every_mode_says_after_a_long_text_what_greedy_decoding_says(name, mode):
    """Each new token is the likeliest one in a plain forward of all of the answer, under the expert of its moment."""
    model, (row, *_), expert = shared_model(name), rows_of(name, 1, LENGTHS), shared_expert(name, 1)
    found = model.generate(
        torch.tensor([row]),
        max_new_tokens=24,
        do_sample=False,
        pad_token_id=NO_TOKEN,
        expert_schedule={0: None, 16: expert},
        **MODES[mode],
    )[0].tolist()
    base, tuned = (plain(model, found[:-1], one)[len(row) - 1 :].argmax(-1).tolist() for one in (None, expert))
    assert found[: len(row)] == row
    assert found[len(row) :] == base[:16] + tuned[16:]


# ------------------------------------------------------------------------------------------- the folder in the repo


USER_SCRIPT = """
    import sys
    sys.modules["mambaformer"] = None  # whoever imports it, fails
    import torch
    from safetensors.torch import load_file, save_file
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(1)
    folder, given = sys.argv[1:]
    tokenizer, found = AutoTokenizer.from_pretrained(folder), {}
    rest = load_file(given + "/rest")["rest"]
    for name in ("float64", "float32", "bfloat16"):
        model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype=getattr(torch, name))
        cache = model.load_cache(f"{given}/{name}")
        with torch.no_grad():
            found[name + ".logits"] = model(rest, past_key_values=cache).logits.contiguous()
        prompt = tokenizer("This License does not grant permission to", return_tensors="pt")
        found[name + ".tokens"] = model.generate(**prompt, max_new_tokens=12, do_sample=False)
        assert type(model).__module__.startswith("transformers_modules."), type(model)
    save_file(found, given + "/found")
"""


@pytest.mark.slow
def test_a_session_continues_bit_for_bit_where_only_the_folder_exists(tmp_path):
    model, (row, *_) = new_model("trained_tiny"), rows_of("trained_tiny", 1, LENGTHS)
    prompt = AutoTokenizer.from_pretrained(TINY)("This License does not grant permission to", return_tensors="pt")
    model.generation_config.eos_token_id = AutoTokenizer.from_pretrained(TINY).eos_token_id
    wanted, rest = {}, torch.tensor([row[250:]])
    for name in ("float64", "float32", "bfloat16"):
        model, cache = model.to(getattr(torch, name)), model.make_cache()
        feed_row(model, cache, row[:250], [200, 1, 49])
        cache.save(tmp_path / name)
        wanted[name + ".logits"] = feed_row(model, cache, row[250:])[None]
        wanted[name + ".tokens"] = model.generate(**prompt, max_new_tokens=12, do_sample=False)
    save_file({"rest": rest}, tmp_path / "rest")
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(USER_SCRIPT), TINY, tmp_path],
        env={**os.environ, "HF_MODULES_CACHE": str(tmp_path / "modules")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    found = load_file(tmp_path / "found")
    assert found.keys() == wanted.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, wanted[name]), name


def test_the_code_in_the_folder_is_that_of_the_repo():
    files = {path.name for path in ROOT.glob("*_mambaformer.py") if not path.name.startswith(("convert_", "blocks_"))}
    assert {path.name for path in TINY.glob("*.py")} == files
    differing = [name for name in sorted(files) if (TINY / name).read_bytes() != (ROOT / name).read_bytes()]
    assert not differing, "they are links to the root"
