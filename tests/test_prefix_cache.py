"""The prefix cache: answers equal those of a fresh cache, and no token of a stored prefix is read twice."""

import random
import threading

import pytest
import torch

from mambaformer import PrefixCache
from mambaformer.cache_prefix_tree_mambaformer import Entry, PrefixTree
from patterns import GREEDY, tiny_config
from sequences import rows_of
from tiny_models import MODELS, random_expert, random_model, shared_expert, shared_model

PLENTY = 2**30


class TokensRead:
    """Counts the tokens that a model is fed."""

    def __init__(self, model):
        self.model, self.count = model, 0

    def __enter__(self):
        embeddings = self.model.get_input_embeddings()
        self.handle = embeddings.register_forward_hook(lambda module, args, output: self.add(args[0].numel()))
        return self

    def __exit__(self, *_):
        self.handle.remove()

    def add(self, count):
        self.count += count


def ids_of(pattern, seed, length):
    return torch.tensor(rows_of(pattern, seed, (length,)))


def make_prefixes(pattern, **options):
    return PrefixCache(shared_model(pattern), **{"max_bytes": PLENTY, "min_tokens": 2, **options})


def stored(prefixes, model, ids, **options):
    """Stores the states after `ids`."""
    cache = model.make_cache()
    with torch.no_grad():
        model(ids, cache=cache, **options)
    return prefixes.insert(cache)


def assert_continues(model, cache, ids, **options):
    """The logits after the rest of `ids` are those of one forward."""
    start = cache.get_seq_length()
    with torch.no_grad():
        found = model(ids[:, start:], cache=cache).logits
        expected = model(ids, **options).logits[:, start:]
    scale = expected.abs().max()
    assert (found - expected).abs().max() <= 1e-10 * scale


def test_the_tree_finds_what_a_search_of_all_sequences_finds():
    rng, tree, entries = random.Random(0), PrefixTree(), {}
    for _ in range(400):
        ids = tuple(rng.randrange(3) for _ in range(rng.randint(1, 9)))
        if ids in entries and rng.random() < 0.5:
            tree.remove(entries.pop(ids), torch.tensor(ids))
        elif ids not in entries:
            entries[ids] = tree.node_at(torch.tensor(ids)).entry = Entry(None, len(ids), 1)
        asked = tuple(rng.randrange(3) for _ in range(rng.randint(1, 12)))
        match = tree.match(torch.tensor(asked))
        lengths = [n for n in range(len(asked) + 1) if any(known[:n] == asked[:n] for known in entries)]
        whole = [known for known in entries if asked[: len(known)] == known]
        assert match.length == max(lengths, default=0)
        assert match.entry is (entries[max(whole, key=len)] if whole else None)
        beyond = [known for known in entries if known[: match.length] == asked[: match.length]]
        assert {id(entry) for entry in match.longer} == {
            id(entries[each]) for each in beyond if len(each) > match.length
        }


@pytest.mark.parametrize("pattern", MODELS)
def test_each_turn_of_a_chat_reads_only_its_new_tokens(pattern):
    model, prefixes = shared_model(pattern), make_prefixes(pattern)
    chat, plain = ids_of(pattern, 1, 9), ids_of(pattern, 1, 9)
    for turn in range(3):
        with TokensRead(model) as read:
            known = chat.shape[1] - 5 if turn else 0
            chat = model.generate(chat, max_new_tokens=4, prefix_cache=prefixes, **GREEDY)
        assert read.count == chat.shape[1] - 1 - known
        plain = model.generate(plain, max_new_tokens=4, **GREEDY)
        assert torch.equal(chat, plain)
        new = ids_of(pattern, 10 + turn, 4)
        chat, plain = torch.cat([chat, new], 1), torch.cat([plain, new], 1)
    report = prefixes.report()
    assert report["requests"] == {"all": 3, "hits": 2}


@pytest.mark.parametrize("pattern", MODELS)
def test_a_branch_is_stored_where_the_second_request_leaves_the_first(pattern):
    model, prefixes = shared_model(pattern), make_prefixes(pattern)
    system = ids_of(pattern, 1, 8)
    users = [ids_of(pattern, seed, 5) for seed in (2, 3, 4)]
    for first, user in enumerate(users):
        user[0, 0] = first
    requests = [torch.cat([system, user], 1) for user in users]
    reused = []
    for ids in requests:
        cache = prefixes.fetch(ids)
        reused.append(prefixes.report()["tokens"]["reused"])
        assert_continues(model, cache, ids)
        prefixes.insert(cache)
    assert reused[0] == 0 and reused[2] - reused[1] == 8


@pytest.mark.parametrize("pattern", ["full", "llama"])
def test_attention_alone_answers_from_any_length_of_a_stored_sequence(pattern):
    model, prefixes = shared_model(pattern), make_prefixes(pattern)
    stored(prefixes, model, ids_of(pattern, 1, 12))
    ids = torch.cat([ids_of(pattern, 1, 12)[:, :7], ids_of(pattern, 2, 6)], 1)
    cache = prefixes.fetch(ids)
    assert cache.get_seq_length() == 7 and prefixes.report()["requests"]["hits"] == 1
    assert_continues(model, cache, ids)


def test_a_repeated_prompt_leaves_one_token_to_feed():
    model, prefixes, ids = shared_model("everything"), make_prefixes("everything"), ids_of("everything", 1, 9)
    for _ in range(3):
        cache = prefixes.fetch(ids)
        assert cache.get_seq_length() < 9
        assert_continues(model, cache, ids)
        prefixes.insert(cache)
    assert prefixes.report()["tokens"]["reused"] == 8


def test_no_request_is_answered_under_another_expert_vector_or_other_weights():
    model = random_model(tiny_config("everything"))
    prefixes = PrefixCache(model, PLENTY, min_tokens=2)
    expert, ids = random_expert(model, 1), ids_of("everything", 1, 9)
    stored(prefixes, model, ids, expert_vector=expert)
    longer = torch.cat([ids, ids_of("everything", 2, 3)], 1)
    assert prefixes.fetch(longer).get_seq_length() == 0
    cache = prefixes.fetch(longer, expert_vector=expert)
    assert cache.get_seq_length() == 9
    assert_continues(model, cache, longer, expert_vector=expert)
    with torch.no_grad():
        next(model.parameters()).mul_(1.25)
    cache = prefixes.fetch(longer, expert_vector=expert)
    assert cache.get_seq_length() == 0
    assert_continues(model, cache, longer, expert_vector=expert)
    report = prefixes.report()
    assert (report["missed"]["other expert vector"], report["missed"]["other weights"]) == (1, 1)


def test_a_schedule_of_expert_vectors_is_stored_under_its_last_one():
    model, expert, prefixes = shared_model("everything"), shared_expert("everything", 1), make_prefixes("everything")
    ids = ids_of("everything", 1, 9)
    options = {"max_new_tokens": 6, "expert_schedule": {0: None, 3: expert}, **GREEDY}
    found = model.generate(ids, prefix_cache=prefixes, **options)
    assert torch.equal(found, model.generate(ids, **options))
    cache = prefixes.fetch(found, expert_vector=expert)
    assert cache.get_seq_length() == found.shape[1] - 1
    assert_continues(model, cache, found, expert_vector=expert)


@pytest.mark.parametrize("options", [{"num_return_sequences": 3, "do_sample": True}, {"num_beams": 3}])
def test_several_answers_read_their_prompt_once(options):
    pattern = "everything"
    model, prefixes, ids = shared_model(pattern), make_prefixes(pattern), ids_of(pattern, 1, 12)
    options = {**GREEDY, "max_new_tokens": 4, **options}
    torch.manual_seed(3)
    expected = model.generate(ids, **options)
    for known in (0, 11):
        torch.manual_seed(3)
        with TokensRead(model) as read:
            found = model.generate(ids, prefix_cache=prefixes, **options)
        assert torch.equal(found, expected)
        assert read.count == 11 - known + 3 * 4


def test_a_cache_of_a_prompt_serves_beams_without_repeating_its_rows_by_hand():
    model, ids = shared_model("everything"), ids_of("everything", 1, 12)
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :10], cache=cache)
    found = model.generate(ids, cache=cache, num_beams=3, max_new_tokens=4, **GREEDY)
    assert torch.equal(found, model.generate(ids, num_beams=3, max_new_tokens=4, **GREEDY))


def test_rows_of_a_batch_share_the_prefix_that_all_begin_with():
    model, prefixes = shared_model("everything"), make_prefixes("everything")
    system = ids_of("everything", 1, 8)
    stored(prefixes, model, system)
    ids = torch.cat([system.expand(2, -1), torch.tensor(rows_of("everything", 2, (5, 5)))], 1)
    cache = prefixes.fetch(ids)
    assert (cache.batch_size, cache.get_seq_length()) == (2, 8)
    assert_continues(model, cache, ids)
    assert prefixes.insert(cache) == 2
    assert prefixes.fetch(torch.cat([ids[1:], ids[:1]], 1)).get_seq_length() == 13


def test_what_is_done_to_a_fetched_cache_never_reaches_the_stored_one():
    model, prefixes, ids = shared_model("everything"), make_prefixes("everything"), ids_of("everything", 1, 9)
    stored(prefixes, model, ids)
    longer = torch.cat([ids, ids_of("everything", 2, 3)], 1)
    cache = prefixes.fetch(longer)
    with torch.no_grad():
        model(ids_of("everything", 5, 4), cache=cache, expert_vector=shared_expert("everything", 1))
    cache.batch_repeat_interleave(2)
    cache.reset()
    assert_continues(model, prefixes.fetch(longer), longer)


def test_entries_that_are_used_outlive_the_others_within_the_bytes():
    model = shared_model("everything")
    size = PrefixCache(model, PLENTY)
    stored(size, model, ids_of("everything", 0, 20))
    prefixes = make_prefixes("everything", max_bytes=3 * size.nbytes + size.nbytes // 2)
    used = ids_of("everything", 1, 20)
    stored(prefixes, model, used)
    for seed in range(2, 9):
        assert prefixes.fetch(torch.cat([used, used], 1)).get_seq_length() == 20
        stored(prefixes, model, ids_of("everything", seed, 20))
        assert prefixes.nbytes <= prefixes.max_bytes
    report = prefixes.report()
    assert (report["held"]["entries"], report["evicted"]["entries"], report["requests"]["hits"]) == (3, 5, 7)


def test_a_state_that_is_larger_than_all_the_room_evicts_nothing():
    model, size = shared_model("everything"), make_prefixes("everything")
    stored(size, model, ids_of("everything", 1, 9))
    prefixes = make_prefixes("everything", max_bytes=size.nbytes)
    stored(prefixes, model, ids_of("everything", 1, 9))
    assert stored(prefixes, model, ids_of("everything", 2, 300)) == 0
    assert len(prefixes) == 1 and prefixes.report()["not stored"]["larger than `max_bytes`"] == 1


@pytest.mark.parametrize("policy", ["continue", "reset", "error"])
def test_a_request_gets_an_ordinary_cache_whoever_stored_its_prefix(policy):
    """The policy of the cache that was stored decided what a change of expert vector did to later requests."""
    model, prefixes, expert = shared_model("everything"), make_prefixes("everything"), shared_expert("everything", 1)
    ids, cache = ids_of("everything", 1, 12), model.make_cache(on_expert_change=policy)
    with torch.no_grad():
        model(ids[:, :9], cache=cache)
    prefixes.insert(cache)
    options = {"max_new_tokens": 5, "expert_schedule": {2: expert}, **GREEDY}
    assert torch.equal(model.generate(ids, prefix_cache=prefixes, **options), model.generate(ids, **options))
    fetched = prefixes.fetch(ids)
    with torch.no_grad():
        found = model(ids[:, 9:], cache=fetched, expert_vector=expert).logits
        wanted = model(ids, expert_vector=expert).logits[:, 9:]
    assert (found - wanted).abs().max() <= 1e-10 * wanted.abs().max()


def test_states_of_autocast_answer_no_other_request():
    model = random_model(tiny_config("everything")).float()
    prefixes, ids = PrefixCache(model, PLENTY, min_tokens=2), ids_of("everything", 1, 9)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert stored(prefixes, model, ids) == 0
    assert stored(prefixes, model, ids) == 1
    longer = torch.cat([ids, ids], 1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert prefixes.fetch(longer).get_seq_length() == 0
    assert prefixes.fetch(longer).get_seq_length() == 9


def test_tokens_of_evicted_entries_leave_the_tree():
    model, prefixes = shared_model("everything"), make_prefixes("everything")
    for seed in range(4):
        stored(prefixes, model, torch.cat([ids_of("everything", 9, 5), ids_of("everything", seed, 6)], 1))
    for entry in list(prefixes._entries):
        encoding, ids = prefixes._entries.pop(entry)
        prefixes._trees[encoding].remove(entry, ids)
    assert not prefixes._trees[encoding].root.children


def test_threads_share_one_prefix_cache():
    model, prefixes = shared_model("everything"), make_prefixes("everything")
    system, wrong = ids_of("everything", 1, 8), []

    def chat(seed):
        ids = torch.cat([system, ids_of("everything", seed, 4)], 1)
        expected = model.generate(ids, max_new_tokens=4, **GREEDY)
        for _ in range(3):
            if not torch.equal(model.generate(ids, max_new_tokens=4, prefix_cache=prefixes, **GREEDY), expected):
                wrong.append(seed)

    threads = [threading.Thread(target=chat, args=(seed,)) for seed in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong and prefixes.report()["requests"]["all"] == 12


def test_what_cannot_answer_is_not_stored_and_the_reason_is_counted():
    model, prefixes, ids = shared_model("everything"), make_prefixes("everything"), ids_of("everything", 1, 9)
    expert = shared_expert("everything", 1)
    static = model.make_cache("static", max_cache_len=32)
    quantized = model.make_cache("quantized", kv_bits=4)
    mixed = model.make_cache(on_expert_change="continue")
    padded, embedded, placed, rows = (model.make_cache() for _ in range(4))
    with torch.no_grad():
        model(ids, cache=static)
        model(ids, cache=quantized)
        model(ids, cache=mixed)
        model(ids, cache=mixed, expert_vector=expert)
        model(ids, cache=padded, attention_mask=torch.tensor([[0] + [1] * 8]))
        model(inputs_embeds=model.get_input_embeddings()(ids), cache=embedded)
        model(ids, cache=placed, position_ids=torch.arange(9)[None] + 3)
        model(ids.expand(2, -1), cache=rows, expert_vector=[None, expert])
    for cache in (static, quantized, mixed, padded, embedded, placed, rows):
        assert prefixes.insert(cache) == 0
    assert sorted(prefixes.report()["not stored"].values()) == [1] * 7
    assert prefixes.fetch(ids).get_seq_length() == 0


def test_a_padded_batch_is_answered_from_an_empty_cache():
    model, prefixes, ids = shared_model("everything"), make_prefixes("everything"), ids_of("everything", 1, 9)
    stored(prefixes, model, ids)
    mask = torch.tensor([[0, 0, 1, 1, 1, 1, 1, 1, 1, 1, 1]])
    padded = torch.cat([ids[:, :2], ids], 1)
    options = {"attention_mask": mask, "max_new_tokens": 3, **GREEDY}
    found = model.generate(padded, prefix_cache=prefixes, **options)
    assert torch.equal(found, model.generate(padded, **options))
    assert prefixes.report()["missed"]["padding"] == 1


def test_a_saved_prefix_cache_answers_in_the_next_process(tmp_path):
    model, prefixes, ids = shared_model("everything"), make_prefixes("everything"), ids_of("everything", 1, 9)
    stored(prefixes, model, ids)
    stored(prefixes, model, ids_of("everything", 2, 9), expert_vector=shared_expert("everything", 1))
    assert prefixes.save(tmp_path) == 2
    times = {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}
    assert prefixes.save(tmp_path) == 2
    assert times == {path: path.stat().st_mtime_ns for path in tmp_path.iterdir()}  # nothing is written twice
    loaded = make_prefixes("everything")
    assert loaded.load(tmp_path) == 2
    longer = torch.cat([ids, ids_of("everything", 3, 3)], 1)
    cache = loaded.fetch(longer)
    assert cache.get_seq_length() == 9
    assert_continues(model, cache, longer)
    prefixes.clear()
    assert prefixes.save(tmp_path) == 0 and not list(tmp_path.iterdir())


def test_damaged_files_and_files_of_other_weights_are_left_out_with_a_warning(tmp_path, caplog):
    model, prefixes = shared_model("everything"), make_prefixes("everything")
    for seed in (1, 2):
        stored(prefixes, model, ids_of("everything", seed, 9))
    prefixes.save(tmp_path)
    damaged = sorted(tmp_path.iterdir())[0]
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert make_prefixes("everything").load(tmp_path) == 1
    other = PrefixCache(random_model(tiny_config("everything"), seed=5), PLENTY)
    assert other.load(tmp_path) == 0


@pytest.mark.parametrize("options", [{"max_bytes": 0}, {"max_bytes": 1.5}, {"max_bytes": True}, {"min_tokens": 0}])
def test_sizes_that_make_no_sense_are_refused(options):
    with pytest.raises(ValueError, match="integer of at least 1"):
        make_prefixes("everything", **options)


@pytest.mark.parametrize("options", [{"use_cache": False}, {"cache_implementation": "static"}])
def test_generate_refuses_another_cache_beside_a_prefix_cache(options):
    model, prefixes, ids = shared_model("everything"), make_prefixes("everything"), ids_of("everything", 1, 9)
    with pytest.raises(ValueError, match="brings a dynamic cache of its own"):
        model.generate(ids, prefix_cache=prefixes, max_new_tokens=2, **options, **GREEDY)
    with pytest.raises(ValueError, match="brings a dynamic cache of its own"):
        model.generate(ids, prefix_cache=prefixes, cache=model.make_cache(), max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="looks up token ids"):
        embeds = model.get_input_embeddings()(ids)
        model.generate(inputs_embeds=embeds, prefix_cache=prefixes, max_new_tokens=2, **GREEDY)
    with pytest.raises(ValueError, match="`position_ids` out"):
        model.generate(ids, prefix_cache=prefixes, position_ids=torch.arange(9)[None], max_new_tokens=2, **GREEDY)
    with pytest.raises(TypeError, match="make_prefix_cache"):
        model.generate(ids, prefix_cache="all of them", max_new_tokens=2, **GREEDY)
    for wrong, error in ((ids[0], ValueError), (ids + 2**32, ValueError), (ids[:0], ValueError), (ids > 3, TypeError)):
        with pytest.raises(error, match="`input_ids`"):
            prefixes.fetch(wrong)
    with pytest.raises(ValueError, match="shape of `input_ids`"):
        prefixes.fetch(ids, torch.ones(1, 3))
    with pytest.raises(TypeError, match="got None"):
        prefixes.insert(None)
    with pytest.raises(TypeError, match="MambaFormer model"):
        PrefixCache("everything", PLENTY)
    with pytest.raises(ValueError, match="needs the evidence of the prefix"):
        model.generate(ids, prefix_cache=prefixes, expert_posterior=[None], max_new_tokens=2, **GREEDY)
    assert prefixes.report()["requests"]["all"] == 0


@pytest.mark.parametrize("pattern", ["mamba", "everything"])
def test_common_prefix_counts_the_columns_that_all_rows_share(pattern):
    model = shared_model(pattern)
    rows = torch.tensor(rows_of(pattern, 1, (8, 8)))
    cache = model.make_cache()
    assert cache.common_prefix(rows) == 0
    mask = torch.ones_like(rows)
    mask[1, :2] = 0
    with torch.no_grad():
        model(rows, cache=cache, attention_mask=mask)
    other = rows.clone()
    other[1, 0] += 1  # a pad
    other[0, 6] = (other[0, 6] + 1) % 7
    assert cache.common_prefix(other, mask) == 6
    assert cache.common_prefix(rows, mask) == 8
    assert cache.common_prefix(rows) == 0
    assert cache.common_prefix(torch.cat([rows, rows], 1), torch.cat([mask, mask], 1)) == 8
    with pytest.raises(ValueError, match="`input_ids` must be"):
        cache.common_prefix(rows[:1])
    with pytest.raises(ValueError, match="shape of `input_ids`"):
        cache.common_prefix(rows, mask[:, :3])
    with pytest.raises(TypeError, match="must hold integers"):
        cache.common_prefix(rows.double())
