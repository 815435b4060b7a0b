"""Prefix caches over every storage: quantized, pruned, streaming, with a bounded log, in threads and on disk."""

import os
import random
import signal
import threading
import time

import pytest
import torch

from damage import in_a_process, kill_myself
from mambaformer import PrefixCache
from mambaformer import files_mambaformer as files
from mambaformer.cache_policies_mambaformer import policy_fields
from oracle import assert_same_logits, expected
from patterns import GREEDY, tiny_config
from sequences import feed_row, random_rows
from tiny_models import random_model, shared_expert, shared_model

KEY_DIFF = {"name": "key_diff", "budget": 4, "interval": 5, "sinks": 1, "recent": 1}
SNAP_KV = {"name": "snap_kv", "budget": 0.4, "interval": 6, "sinks": 1, "recent": 0, "window": 3, "kernel_size": 3}
STORAGES = {
    "byte": {"storage": "quantized"},
    "mixed": {"storage": "quantized", "kv_bits": {"keys": 6, "values": 4}},
    "states": {"state_bits": 8},
    "pruned": {"policy": KEY_DIFF},
    "scored_by_queries": {"policy": SNAP_KV},
    "all": {"storage": "quantized", "kv_bits": 5, "state_bits": 8, "policy": SNAP_KV, "rollback_reach": 3},
    "bounded_log": {"remember": 40, "park_bytes": 10**7},
}
PATTERNS = ["full", "hybrid", "jamba", "everything"]
# Patterns of `STORAGES` that have what the storage is about.
CASES = [
    (pattern, name) for pattern in PATTERNS for name in STORAGES if pattern != "full" or name not in ("states", "all")
]
PLENTY = 2**30

every_case = pytest.mark.parametrize(("pattern", "storage"), CASES)
every_storage = pytest.mark.parametrize("storage", STORAGES)


def make_prefixes(model, storage, **options):
    return PrefixCache(model, **{"max_bytes": PLENTY, "min_tokens": 2, **STORAGES[storage], **options})


def fields_of(prefixes):
    """What the oracle has to know of the caches."""
    options = prefixes.options
    fields = {"kv_bits": options.kv_bits, "state_bits": options.state_bits}
    fields["policy"] = None if options.policy is None else policy_fields(options.policy)
    return {name: value for name, value in fields.items() if value is not None}


def answer(model, prefixes, row, expert=None):
    """Feeds the tokens of a request after its longest prefix; compares with the oracle; returns cache and prefix."""
    cache = prefixes.fetch(torch.tensor([row]), expert_vector=expert)
    start = cache.get_seq_length()
    found = feed_row(model, cache, row[start:])
    wanted = expected(model, [row], [expert], **fields_of(prefixes))[0]
    assert_same_logits(found, wanted[start:])
    return cache, start


# ---- laws


@every_case
def test_each_turn_continues_from_the_end_of_the_last_one(pattern, storage):
    model, row = shared_model(pattern), random_rows(1, (37,))[0]
    prefixes, known = make_prefixes(model, storage), 0
    for length in (9, 10, 18, 24, 37):
        cache, start = answer(model, prefixes, row[:length])
        assert start == known and prefixes.insert(cache) == 1
        known = length


@every_case
def test_any_branch_of_a_stored_sequence_equals_the_oracle(pattern, storage):
    model, row, rng = shared_model(pattern), random_rows(1, (23,))[0], random.Random(0)
    prefixes, starts = make_prefixes(model, storage), set()
    prefixes.insert(answer(model, prefixes, row)[0])
    for length in (1, 2, 5, 6, 8, 11, 12, 13, 17, 18, 19, 20, 21, 22, 23):
        branch = row[:length] + random_rows(100 + length, (rng.randint(1, 7),))[0]
        starts.add(answer(model, prefixes, branch)[1])
    assert prefixes.report()["requests"]["hits"] >= 5 and len(starts) > 3


@every_storage
def test_the_expert_vector_is_part_of_the_key_and_may_change_later(storage):
    model, row, expert = shared_model("everything"), random_rows(1, (20,))[0], shared_expert("everything", 1)
    prefixes = make_prefixes(model, storage)
    prefixes.insert(answer(model, prefixes, row[:12], expert)[0])
    assert answer(model, prefixes, row)[1] == 0
    cache, start = answer(model, prefixes, row[:15], expert)
    assert start == 12
    cache.set_expert_vector(None)
    wanted = expected(model, [row], **fields_of(prefixes))[0][15:]
    assert_same_logits(feed_row(model, cache, row[15:]), wanted)
    assert prefixes.insert(cache) == 1 and answer(model, prefixes, [*row, 3])[1] == 20


@every_storage
def test_rows_of_a_batch_are_stored_and_answered_one_by_one(storage):
    model, system = shared_model("everything"), random_rows(1, (9,))[0]
    rows = [system + random_rows(seed, (6,))[0] for seed in (2, 3)]
    prefixes = make_prefixes(model, storage)
    prefixes.insert(answer(model, prefixes, system)[0])
    cache = prefixes.fetch(torch.tensor(rows))
    assert cache.get_seq_length() == 9
    with torch.no_grad():
        found = model(torch.tensor(rows)[:, 9:], cache=cache).logits
    wanted = expected(model, rows, **fields_of(prefixes))
    assert_same_logits([*found], [each[9:] for each in wanted])
    assert prefixes.insert(cache) == 2
    for row in rows:
        assert answer(model, prefixes, [*row, 5])[1] == 15


@every_case
def test_generate_equals_generate_with_such_a_cache(pattern, storage):
    model = shared_model(pattern)
    prefixes, chat = make_prefixes(model, storage), torch.tensor([random_rows(1, (9,))[0]])
    for turn in range(3):
        options = {"max_new_tokens": 5, "prompt_lookup_num_tokens": 3 if turn == 1 else None, **GREEDY}
        wanted = model.generate(chat, cache=model.make_cache(**STORAGES[storage]), **options)
        assert torch.equal(model.generate(chat, prefix_cache=prefixes, **options), wanted)
        chat = torch.cat([wanted, torch.tensor([random_rows(10 + turn, (4,))[0]])], 1)
    assert prefixes.report()["requests"] == {"all": 3, "hits": 2}
    for options in ({"num_beams": 3}, {"num_return_sequences": 2, "num_beams": 2}):
        options |= {"max_new_tokens": 4, **GREEDY}
        found = model.generate(chat, prefix_cache=prefixes, **options)
        assert torch.equal(found, model.generate(chat, cache=model.make_cache(**STORAGES[storage]), **options))


@pytest.mark.parametrize("storage", [{}, {"storage": "quantized", "kv_bits": 4}])
def test_windows_at_positions_within_the_cache_continue_exactly(storage):
    model = random_model(tiny_config("everything", window_positions="relative", num_sink_tokens=2), loudness=1.2)
    prefixes, row = PrefixCache(model, PLENTY, min_tokens=2, **storage), random_rows(1, (30,))[0]
    for length in (11, 12, 22, 30):
        prefixes.insert(answer(model, prefixes, row[:length])[0])
    assert answer(model, prefixes, [*row, 3])[1] == 30
    for length in (5, 14, 25):
        answer(model, prefixes, row[:length] + random_rows(length, (6,))[0])


def test_requests_get_the_options_of_the_prefix_cache_whoever_stored_the_states():
    model, row, expert = shared_model("everything"), random_rows(1, (12,))[0], shared_expert("everything", 1)
    prefixes = make_prefixes(model, "bounded_log", rollback_reach=4)
    cache = model.make_cache(on_expert_change="continue")
    feed_row(model, cache, row)
    assert prefixes.insert(cache) == 1
    fetched = prefixes.fetch(torch.tensor([[*row, 3]]))
    assert fetched.options == prefixes.options and fetched.on_expert_change == "recompute"
    assert (fetched.parked.max_bytes, fetched.rollback_reach, fetched.history.bounds.remember) == (10**7, 4, 40)
    feed_row(model, fetched, [3], expert_vector=expert)
    assert fetched.report()["parked"]["states"] > 0


def test_a_sequence_longer_than_the_log_is_not_stored():
    model, row = shared_model("everything"), random_rows(1, (30,))[0]
    prefixes = make_prefixes(model, "bounded_log", remember=20, park_bytes=0)
    cache, _ = answer(model, prefixes, row[:20])
    assert prefixes.insert(cache) == 1
    cache, start = answer(model, prefixes, row)
    assert start == 20 and cache.token_ids.tolist() == [row[-20:]]
    assert prefixes.insert(cache) == 0
    assert prefixes.report()["not stored"] == {"tokens that were forgotten": 1}


def test_parked_states_stay_with_the_cache_that_is_stored():
    """`insert` forked them, so that the cache copied their keys when it resumed them."""
    model, row, expert = shared_model("everything"), random_rows(1, (12,))[0], shared_expert("everything", 1)
    prefixes, cache = make_prefixes(model, "bounded_log"), model.make_cache(park_bytes=10**7)
    feed_row(model, cache, row)
    feed_row(model, cache, [3], expert_vector=expert)
    assert prefixes.insert(cache) == 1
    (parked,) = cache.parked.states
    assert not any(store.shared() for layer in parked.layers for store in layer.stores.values())
    (entry,) = prefixes._entries
    assert len(entry.cache.parked) == 0
    assert_same_logits(feed_row(model, cache, [4], expert_vector=None), expected(model, [[*row, 3, 4]])[0][-1:])


# ---- refusals


def test_states_in_another_form_are_not_stored_and_the_reason_is_counted():
    model, row = shared_model("everything"), random_rows(1, (12,))[0]
    prefixes = make_prefixes(model, "all")
    own = STORAGES["all"]
    for name, value in (("kv_bits", 8), ("state_bits", None), ("policy", KEY_DIFF)):
        cache = model.make_cache(**{**own, name: value})
        feed_row(model, cache, row)
        assert prefixes.insert(cache) == 0
        assert prefixes.report()["not stored"][f"other `{name}`"] == 1
    cache = model.make_cache(**own)
    feed_row(model, cache, row)
    assert prefixes.insert(cache) == 1


@pytest.mark.parametrize("storage", ["byte", "all"])
def test_codes_of_autocast_answer_no_request(storage):
    model, row = (
        random_model(tiny_config("full" if storage == "byte" else "everything")).float(),
        random_rows(1, (9,))[0],
    )
    prefixes = make_prefixes(model, storage)
    cache = model.make_cache(**STORAGES[storage])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        feed_row(model, cache, row)
    assert prefixes.insert(cache) == 0 and prefixes.report()["not stored"] == {"states of autocast": 1}


def test_options_without_a_meaning_are_refused():
    model = shared_model("everything")
    with pytest.raises(ValueError, match="leave storage='static' out"):
        model.make_prefix_cache(PLENTY, storage="static", max_cache_len=32)
    with pytest.raises(ValueError, match="`kv_bits`"):
        model.make_prefix_cache(PLENTY, storage="quantized", kv_bits={"keys": 8})
    with pytest.raises(TypeError, match="did you mean `kv_bits`"):
        model.make_prefix_cache(PLENTY, kv_bit=8)


# ---- threads


@pytest.mark.parametrize("storage", ["mixed", "scored_by_queries", "all", "bounded_log"])
def test_threads_share_a_prefix_cache_that_is_saved_meanwhile(storage, tmp_path):
    model, system, wrong = shared_model("everything"), random_rows(1, (9,))[0], []
    size = make_prefixes(model, storage)
    size.insert(answer(model, size, system)[0])
    prefixes = make_prefixes(model, storage, max_bytes=7 * size.nbytes)  # entries are evicted, too
    rows = {seed: system + random_rows(seed, (5,))[0] for seed in range(2, 6)}
    for row in rows.values():
        expected(model, [row], **fields_of(prefixes))  # the oracle is for one thread

    def chat(seed):
        try:
            for _ in range(4):
                prefixes.insert(answer(model, prefixes, rows[seed])[0])
        except BaseException as error:
            wrong.append(error)

    threads = [threading.Thread(target=chat, args=(seed,)) for seed in rows]
    for thread in threads:
        thread.start()
    while any(thread.is_alive() for thread in threads):
        prefixes.save(tmp_path)
    for thread in threads:
        thread.join()
    assert not wrong and prefixes.report()["requests"]["all"] == 16
    loaded = make_prefixes(model, storage)
    assert loaded.load(tmp_path) == len(list(tmp_path.iterdir()))


# ---- on disk


@every_storage
def test_a_saved_prefix_cache_continues_bit_for_bit(storage, tmp_path):
    model, row = shared_model("everything"), random_rows(1, (22,))[0]
    prefixes, loaded = make_prefixes(model, storage), make_prefixes(model, storage)
    prefixes.insert(answer(model, prefixes, row[:14])[0])
    assert prefixes.save(tmp_path) == 1 and loaded.load(tmp_path) == 1
    found, wanted = (feed_row(model, each.fetch(torch.tensor([row])), row[14:]) for each in (loaded, prefixes))
    assert torch.equal(found, wanted)
    assert make_prefixes(model, "byte" if storage != "byte" else "mixed").load(tmp_path) == 0


def test_the_same_tokens_in_two_forms_are_two_files(tmp_path):
    """The name of a file left the form out, so that a second prefix cache kept the file of the first."""
    model, row = shared_model("everything"), random_rows(1, (14,))[0]
    for storage in ("byte", "mixed"):
        prefixes = make_prefixes(model, storage)
        prefixes.insert(answer(model, prefixes, row)[0])
        assert prefixes.save(tmp_path) == 1
    loaded = make_prefixes(model, "mixed")
    assert loaded.load(tmp_path) == 1 and answer(model, loaded, [*row, 3])[1] == 14


def old_and_new(storage, folder):
    """A model, a prefix cache that was saved to `folder`, one that is to be saved there, and the rows of each."""
    model, expert = shared_model("hybrid"), shared_expert("hybrid", 1)
    rows = [random_rows(seed, (length,))[0] for seed, length in ((1, 9), (2, 13), (3, 11))]
    old, new = make_prefixes(model, storage), make_prefixes(model, storage)
    for prefixes, chosen in ((old, rows[:2]), (new, rows[1:])):
        for row in chosen:
            cache = prefixes.fetch(torch.tensor([[*row, 0]]), expert_vector=expert)
            feed_row(model, cache, row)
            prefixes.insert(cache)
    old.save(folder)
    return model, old, new, rows, expert


def assert_nothing_lost_or_wrong(model, storage, folder, rows, expert):
    """All entries that are in both prefix caches are there, and what is there continues as the oracle says."""
    loaded = make_prefixes(model, storage)
    assert loaded.load(folder) == len(list(folder.glob("*.safetensors")))
    starts = [answer(model, loaded, [*row, 4], expert)[1] for row in rows]
    assert starts[1] == 13 and starts[0] in (0, 9) and starts[2] in (0, 11)
    return starts


STEPS = [("fsync", 1), ("replace", 1), ("replace", 2), ("close", 1), ("unlink", 1), ("unlink", 2), ("unlink", 3)]


@every_storage
@pytest.mark.parametrize(("step", "call"), STEPS)
def test_a_kill_at_any_step_of_a_save_loses_no_entry(step, call, storage, tmp_path, monkeypatch):
    model, _, new, rows, expert = old_and_new(storage, tmp_path)
    original, calls = getattr(os, step), []

    def step_or_die(*arguments, **options):
        calls.append(1)
        return kill_myself() if len(calls) == call else original(*arguments, **options)

    monkeypatch.setattr(os, step, step_or_die)
    os.waitpid(in_a_process(lambda: new.save(tmp_path)), 0)
    monkeypatch.undo()
    assert_nothing_lost_or_wrong(model, storage, tmp_path, rows, expert)
    assert new.save(tmp_path) == 2
    assert len(list(tmp_path.iterdir())) == 2  # no temporary file of the writer that was killed
    assert assert_nothing_lost_or_wrong(model, storage, tmp_path, rows, expert) == [0, 13, 11]


@pytest.mark.parametrize("storage", ["all", "bounded_log"])
@pytest.mark.parametrize("num_bytes", [0, 8, 5000, None])
def test_a_write_cut_short_loses_no_entry(num_bytes, storage, tmp_path, monkeypatch):
    model, _, new, rows, expert = old_and_new(storage, tmp_path)

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
    assert os.WTERMSIG(os.waitpid(in_a_process(lambda: new.save(tmp_path)), 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    assert assert_nothing_lost_or_wrong(model, storage, tmp_path, rows, expert) == [9, 13, 0]
    assert new.save(tmp_path) == 2 and len(list(tmp_path.iterdir())) == 2


@pytest.mark.slow
@every_storage
def test_processes_killed_at_random_while_saving_lose_no_entry(storage, tmp_path):
    model, old, new, rows, expert = old_and_new(storage, tmp_path)
    new.save(tmp_path)
    start = time.monotonic()
    old.save(tmp_path)
    new.save(tmp_path)
    chance, seen, duration = random.Random(0), set(), time.monotonic() - start
    for num_killed in range(60):
        has_begun, tell = os.pipe()

        def save_for_ever(tell=tell):
            os.write(tell, b".")
            while True:
                old.save(tmp_path)
                new.save(tmp_path)

        process = in_a_process(save_for_ever)
        os.read(has_begun, 1)
        time.sleep(chance.uniform(0.0, 1.5) * duration)
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
        os.close(has_begun)
        os.close(tell)
        seen.add(tuple(assert_nothing_lost_or_wrong(model, storage, tmp_path, rows, expert)))
        if num_killed > 9 and len(seen) > 1:
            break
    else:
        pytest.fail(f"60 kills met one state of the folder alone: {seen}")
    new.save(tmp_path)
    assert len(list(tmp_path.iterdir())) == 2
