"""Law 12: caches that evict keys obey the other laws, judged by an oracle that evicts token by token."""

import random

import pytest
import torch

import mambaformer
from mambaformer.cache_policies_mambaformer import POLICIES, policy_fields, resolve_policy
from oracle import assert_same_logits, expected, read_on
from patterns import GREEDY
from sequences import feed, feed_row, one_turn, ragged_turns, random_rows, rows_of
from tiny_models import shared_expert, shared_model, without_kernels_too

# Short intervals, so that rows of a dozen tokens evict several times.
VARIANTS = {
    "key_norm": {"budget": 4, "interval": 5, "sinks": 1, "recent": 1},
    "key_diff": {"budget": 0.5, "interval": 4, "sinks": 1, "recent": 2},
    "tova": {"budget": 3, "interval": 4, "sinks": 0, "recent": 1},
    "snap_kv": {"budget": 0.4, "interval": 6, "sinks": 1, "recent": 0, "window": 3, "kernel_size": 3},
    "expected_attention": {"budget": 4, "interval": 5, "sinks": 1, "recent": 1, "window": 4},
    "sinks_and_window": {"budget": 5, "interval": 4, "sinks": 2, "recent": 0},
}
PATTERNS = ["full", "hybrid", "llama", "jamba", "paper", "everything"]

every_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_policy = pytest.mark.parametrize("name", VARIANTS)


def policy_of(name, **fields):
    return POLICIES[name](**VARIANTS[name] | fields)


def cache_of(model, name, policy=None, **options):
    return model.make_cache(policy=policy or policy_of(name), **options)


def fields_of(cache):
    return {"policy": policy_fields(cache.options.policy)}


def test_every_policy_is_tested():
    assert VARIANTS.keys() == POLICIES.keys()


@without_kernels_too
@every_pattern
@every_policy
def test_any_split_equals_the_oracle(pattern, name):
    model, row = shared_model(pattern), rows_of(pattern, 1, (20,))[0]
    for sizes in ([20], [1] * 20, [1, 12, 1, 1, 5], [7, 1, 1, 11]):
        cache = cache_of(model, name)
        found = feed_row(model, cache, row, sizes)
        assert_same_logits(found, expected(model, [row], **fields_of(cache))[0])


def test_the_oracle_sees_that_keys_are_missing():
    model, row = shared_model("full"), rows_of("full", 1, (20,))[0]
    whole = expected(model, [row])[0]
    for name in VARIANTS:
        pruned = expected(model, [row], policy=policy_fields(policy_of(name)))[0]
        interval = VARIANTS[name]["interval"]
        assert_same_logits(pruned[:interval], whole[:interval])
        assert (pruned - whole).abs().max() > 0.1


@without_kernels_too
@every_pattern
@every_policy
def test_padding_anywhere_in_any_turn_equals_the_oracle(pattern, name):
    model, rows = shared_model(pattern), rows_of(pattern, 2)
    for seed in range(2):
        cache = cache_of(model, name)
        found = feed(model, cache, ragged_turns(random.Random(seed), rows, 3))
        assert_same_logits(found, expected(model, rows, **fields_of(cache)))


@every_policy
def test_one_row_with_padding_equals_the_oracle(name):
    model, row = shared_model("everything"), rows_of("everything", 2, (14,))
    for seed in range(4):
        cache = cache_of(model, name)
        found = feed(model, cache, ragged_turns(random.Random(seed), row, 2))
        assert_same_logits(found, expected(model, row, **fields_of(cache)))


@every_pattern
@every_policy
@pytest.mark.parametrize("reach", [0, 4])
def test_a_rollback_is_as_if_the_tokens_had_never_been_fed(pattern, name, reach):
    model = shared_model(pattern)
    for length in (8, 9, 10, 11):  # within an interval and across an eviction
        rows = rows_of(pattern, 3, (length, length))
        cache = cache_of(model, name, rollback_reach=reach)
        feed(model, cache, [one_turn(rows)])
        feed(model, cache, [one_turn(random_rows(9, (1, 1))) for _ in range(3)])
        cache.crop(-3)
        read_on(model, cache, rows, cache_fields=fields_of(cache))


@every_policy
def test_a_crop_across_evictions_within_reach_encodes_nothing_again(name):
    model = shared_model("full")
    for length in range(8, 13):
        rows = rows_of("full", 3, (length, length))
        cache = cache_of(model, name, rollback_reach=5)
        feed(model, cache, [one_turn(rows)])
        cache.batch_select_indices(torch.tensor([1, 0]))
        feed(model, cache, [one_turn(random_rows(9, (3, 3))), one_turn(random_rows(8, (2, 2)))])
        fork = cache.fork()
        for each in (fork, cache):
            each.crop(-5)
            assert each.status == "current"
            read_on(model, each, rows[::-1], cache_fields=fields_of(cache))


@every_policy
def test_rows_lose_different_numbers_of_tokens(name):
    model, rows = shared_model("everything"), rows_of("everything", 3, (12, 12, 12))
    cache = cache_of(model, name)
    feed(model, cache, [one_turn(rows)])
    cache.crop([-1, 0, -5])
    read_on(model, cache, [rows[0][:11], rows[1], rows[2][:7]], cache_fields=fields_of(cache))


def test_a_crop_within_an_interval_encodes_nothing_again():
    model, rows = shared_model("full"), rows_of("full", 3, (11, 11))
    cache = cache_of(model, "key_norm")  # evicts after 5, 10 and 15 tokens
    feed(model, cache, [one_turn(rows)])
    cache.crop(-1)
    assert cache.status == "current"
    cache.crop(-1)
    assert cache.status == "stale"


@every_policy
def test_rows_that_change_places_and_forks_are_the_rows_themselves(name):
    model, rows = shared_model("everything"), rows_of("everything", 4)
    cache = cache_of(model, name)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    fork = cache.fork()
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    read_on(model, cache, [rows[2], rows[0], rows[0]], cache_fields=fields_of(cache))
    read_on(model, fork, rows, cache_fields=fields_of(cache))


@every_policy
def test_a_change_of_expert_vector_encodes_the_sequence_again(name):
    model, rows, expert = shared_model("everything"), rows_of("everything", 5), shared_expert("everything", 1)
    cache = cache_of(model, name)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    cache.set_expert_vector(expert)
    read_on(model, cache, rows, [expert] * 3, cache_fields=fields_of(cache))


@every_pattern
@every_policy
def test_a_session_continues_bit_for_bit(pattern, name, tmp_path):
    model, rows = shared_model(pattern), rows_of(pattern, 6)
    cache = cache_of(model, name)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    cache.save(tmp_path / "session")
    loaded = model.load_cache(tmp_path / "session")
    assert loaded.options == cache.options
    more = [one_turn(random_rows(7, (1, 1, 1))), one_turn(random_rows(8, (7, 7, 7)))]
    for found, wanted in zip(feed(model, loaded, more), feed(model, cache, more), strict=True):
        assert torch.equal(found, wanted)


@every_policy
def test_a_forward_that_fails_leaves_the_cache_as_it_was(name, monkeypatch):
    model, rows = shared_model("full"), rows_of("full", 6)
    cache = cache_of(model, name)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    monkeypatch.setattr(model.model.norm, "forward", lambda *_: 1 / 0)
    for width in (1, 3, 9):
        with pytest.raises(ZeroDivisionError):
            feed(model, cache, [one_turn(random_rows(7, (width,) * 3))])
    monkeypatch.undo()
    read_on(model, cache, rows, cache_fields=fields_of(cache))


@every_policy
def test_layers_have_budgets_of_their_own(name):
    model, rows = shared_model("paper"), rows_of("paper", 6)
    for budget in ([None, 0.4, 5], {1: 4, 2: 0.7}, {2: 4}):
        cache = cache_of(model, name, policy_of(name, budget=budget))
        found = feed(model, cache, ragged_turns(random.Random(0), rows, 3))
        assert_same_logits(found, expected(model, rows, **fields_of(cache)))
        found = feed_row(model, cache_of(model, name, cache.options.policy), rows[0], [3, 1, 8])
        assert_same_logits(found, expected(model, rows[:1], **fields_of(cache))[0])


@every_policy
@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 5}])
def test_speculation_and_chunks_generate_what_plain_decoding_does(name, options):
    model = shared_model("everything")
    ids = torch.tensor([random_rows(3, (8,))[0] * 3])
    common = {"max_new_tokens": 12, **GREEDY}
    plain = model.generate(ids, cache=cache_of(model, name), **common)
    assert torch.equal(model.generate(ids, cache=cache_of(model, name), **common, **options), plain)


@every_policy
def test_beams_are_the_sequences_themselves(name):
    model, ids = shared_model("everything"), torch.tensor(random_rows(3, (8, 8)))
    cache = cache_of(model, name)
    beams = model.generate(ids, cache=cache, max_new_tokens=7, num_beams=3, **GREEDY)
    uncached = model.generate(ids, max_new_tokens=7, num_beams=3, use_cache=False, **GREEDY)
    assert beams.shape == uncached.shape
    assert (beams != uncached).any(), "the policy changes nothing here"
    row = beams[0].tolist()
    found = feed_row(model, cache_of(model, name), row)
    assert_same_logits(found, expected(model, [row], **fields_of(cache))[0])


@every_policy
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_attention_implementation_gives_the_same_logits(name, implementation):
    model, row = shared_model("full"), rows_of("full", 1, (14,))[0]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation(implementation)
        cache = cache_of(model, name)
        found = feed_row(model, cache, row, [3, 9, 1, 1])
    finally:
        model.set_attn_implementation(before)
    assert_same_logits(found, expected(model, [row], **fields_of(cache))[0])


@every_policy
def test_gradients_flow_through_the_keys_that_stay(name):
    model, ids = shared_model("llama"), torch.tensor(rows_of("llama", 1, (13,)))
    gradients = []
    for sizes in ([13], [4, 1, 8]):
        embeds = model.get_input_embeddings()(ids).detach().requires_grad_()
        cache, logits = cache_of(model, name), []
        for piece in embeds.split(sizes, dim=1):
            logits.append(model(inputs_embeds=piece, cache=cache).logits)
        torch.cat(logits, dim=1)[:, -1].square().sum().backward()
        gradients.append(embeds.grad)
    assert_same_logits(*gradients)


@every_policy
@pytest.mark.parametrize("kv_bits", [8, {"keys": 6, "values": 4}])
def test_quantized_keys_are_scored_as_their_codes_stand(name, kv_bits):
    model, rows = shared_model("everything"), rows_of("everything", 2)
    cache = cache_of(model, name, storage="quantized", kv_bits=kv_bits)
    found = feed(model, cache, ragged_turns(random.Random(0), rows, 3))
    assert_same_logits(found, expected(model, rows, kv_bits=cache.options.kv_bits, **fields_of(cache)))


# ---- memory, views and refusals


def test_evicted_keys_leave_memory_at_once():
    model = shared_model("full")
    cache, whole = model.make_cache(policy="key_norm", budget=64), model.make_cache()
    with torch.no_grad():
        for ids in torch.tensor(random_rows(1, (512,))).split(130, dim=1):
            model(ids, cache=cache)
            model(ids, cache=whole)
    assert cache.to_dict()["layers"]["layer_0"]["attn_kv_cache"]["keys"].shape[2] == 64
    kept, every = (each.report()["full_attention"]["keys"] for each in (cache, whole))
    assert kept <= every / 4


def test_a_policy_by_name_or_by_object_is_the_same():
    model = shared_model("full")
    named = model.make_cache(policy="snap_kv", budget=0.25).options.policy
    assert named == model.make_cache(policy=mambaformer.SnapKV(budget=0.25)).options.policy
    assert named == resolve_policy({"name": "snap_kv", "budget": 0.25})


def test_caches_that_no_policy_can_prune_are_refused():
    model = shared_model("full")
    with pytest.raises(ValueError, match="static"):
        model.make_cache("static", max_cache_len=32, policy="key_norm")
    for pattern in ("mamba", "sliding"):
        with pytest.raises(ValueError, match="no such layer"):
            shared_model(pattern).make_cache(policy="key_norm")
    with pytest.raises(ValueError, match="`policy` must be one of"):
        model.make_cache(policy="h2o")
    with pytest.raises(ValueError, match="belongs to a policy"):
        model.make_cache(budget=0.5)
    with pytest.raises(ValueError, match="3 entries and the model has 2 layers"):
        model.make_cache(policy="key_norm", budget=[0.5] * 3)


def test_attention_weights_across_an_eviction_are_refused_and_nothing_changes():
    model, row = shared_model("full"), rows_of("full", 1, (14,))[0]
    before = model.config._attn_implementation
    try:
        model.set_attn_implementation("eager")
        cache = cache_of(model, "key_norm")
        with pytest.raises(ValueError, match="attention weights"), torch.no_grad():
            model(torch.tensor([row]), cache=cache, output_attentions=True)
        assert cache.get_seq_length() == 0
        found = feed_row(model, cache, row, [4, 1, 5, 4], output_attentions=True)
    finally:
        model.set_attn_implementation(before)
    assert_same_logits(found, expected(model, [row], **fields_of(cache))[0])


def test_a_layer_of_the_user_that_feeds_whole_forwards_is_refused_across_an_eviction():
    model = shared_model("full")
    cache, heads = cache_of(model, "key_norm"), (1, 2, 9, model.config.head_dim)
    new = torch.zeros(heads, dtype=torch.float64)
    store, span = cache.key_store(0), mambaformer.cache_retention_mambaformer.Span(9)
    layout = mambaformer.cache_eviction_mambaformer.make_pruned_layout(store.retention, span, new.device)
    with pytest.raises(ValueError, match="passes a position"):
        store.update(new, new, layout)


def test_sessions_of_before_policies_are_read(tmp_path, monkeypatch):
    model, row = shared_model("everything"), rows_of("everything", 1, (9,))[0]
    cache = model.make_cache()
    feed_row(model, cache, row)
    of_today = type(cache.options).to_dict
    monkeypatch.setattr(
        type(cache.options), "to_dict", lambda *args: {k: v for k, v in of_today(*args).items() if k != "policy"}
    )
    cache.save(tmp_path / "session")
    assert model.load_cache(tmp_path / "session").options == cache.options
