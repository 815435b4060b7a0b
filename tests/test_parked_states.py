"""Parked states: a change of expert vector and back encodes only the columns since, and changes no logits."""

import copy
import random
import threading

import pytest
import torch

from mambaformer import MambaFormerCache
from mambaformer.cache_policies_mambaformer import POLICIES, policy_fields
from oracle import assert_same_logits, expected, read_on, tails
from patterns import GREEDY
from sequences import feed, feed_row, one_turn, padded_turn, ragged_turns, random_ids, random_rows, rows_of
from tiny_models import every_pattern, main_patterns, new_model, shared_expert, shared_model, without_kernels_too

ROOMY = 1 << 30
VARIANTS = {
    "dense": {},
    "reach": {"rollback_reach": 4},
    "quantized": {"storage": "quantized", "kv_bits": {"keys": 6, "values": 4}},
    "rounded": {"state_bits": 8},
    "pruned": {"policy": POLICIES["snap_kv"](0.4, interval=6, sinks=1, recent=0, window=3, kernel_size=3)},
}
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def cache_of(model, variant="dense", park_bytes=ROOMY, **options):
    """A cache that parks states; options that no layer of the model has a use for are left out."""
    options, specs = VARIANTS[variant] | options, model.make_cache().specs
    if not any(spec.attends and spec.window is None for spec in specs):
        options.pop("policy", None)
    if not any(spec.is_recurrent for spec in specs):
        options.pop("state_bits", None)
    return model.make_cache(**options, park_bytes=park_bytes)


def fields_of(cache):
    options = cache.options
    fields = {"kv_bits": options.kv_bits, "state_bits": options.state_bits}
    return fields | ({} if options.policy is None else {"policy": policy_fields(options.policy)})


@pytest.fixture
def widths(monkeypatch):
    """Columns that each forward encodes."""
    found, transaction = [], MambaFormerCache.transaction

    def counted(self, change, new, num_tokens, *args):
        found.append(num_tokens)
        return transaction(self, change, new, num_tokens, *args)

    monkeypatch.setattr(MambaFormerCache, "transaction", counted)
    return found


# ---- laws


@without_kernels_too
@every_pattern
@every_variant
def test_a_change_back_encodes_only_the_columns_since(pattern, variant, widths):
    model, row = shared_model(pattern), rows_of(pattern, 1, (16,))[0]
    one, two = shared_expert(pattern, 1), shared_expert(pattern, 2, rank=5)
    cache, start = cache_of(model, variant), 0
    steps = [(one, 5), (two, 2), (one, 3), (None, 1), (two, 1), (one, 1), (one, 1), (None, 2)]
    for expert, length in steps:
        found = feed_row(model, cache, row[start : start + length], expert_vector=expert)
        wanted = expected(model, [row], [expert], **fields_of(cache))[0][start : start + length]
        assert_same_logits(found, wanted)
        start += length
    assert widths == [5, 7, 5, 11, 5, 3, 1, 5]


@without_kernels_too
@every_pattern
@every_variant
def test_ragged_rows_with_their_own_expert_vectors_change_and_return(pattern, variant):
    model, rows, rng = shared_model(pattern), rows_of(pattern, 1), random.Random(43)
    one, two = shared_expert(pattern, 1), shared_expert(pattern, 2, rank=5)
    cache, experts = cache_of(model, variant), ([one, None, two], [two, None, two], [None] * 3)
    for step, which in enumerate((0, 1, 0, 2, 1, 0, 2)):
        more = rows_of(pattern, step, [rng.randint(0, 3) for _ in rows])
        whole = [old + new for old, new in zip(rows, more, strict=True)] if step else rows
        given = experts[which] if any(experts[which]) else None
        found = feed(model, cache, ragged_turns(rng, more if step else rows, count=2), expert_vector=given)
        wanted = expected(model, whole, experts[which], **fields_of(cache))
        assert_same_logits(found, tails(wanted, [len(row) for row in rows] if step else [0] * 3))
        rows = whole
    assert len(cache.parked) == 2


@every_pattern
@every_variant
@pytest.mark.parametrize("tokens", [3, 6, 12])
def test_a_rollback_reaches_into_parked_columns(pattern, variant, tokens):
    """The states are parked behind column 9; tokens are taken back behind it, within its reach, and beyond."""
    model, row, expert = shared_model(pattern), rows_of(pattern, 3, (13,))[0], shared_expert(pattern, 1)
    cache = cache_of(model, variant)
    feed_row(model, cache, row[:9], [5, 1, 1, 1, 1])
    feed_row(model, cache, row[9:], expert_vector=expert)
    cache.crop(-tokens)
    cache.set_expert_vector(None)
    read_on(model, cache, [row[: 13 - tokens]], cache_fields=fields_of(cache))


@every_pattern
@every_variant
def test_rows_taken_back_by_different_depths_leave_parked_states_right(pattern, variant):
    model, rows, expert = shared_model(pattern), rows_of(pattern, 4, (9, 9, 9)), shared_expert(pattern, 1)
    for depths in ([1, 0, 2], [0, 4, 6], [3, 3, 3], [5, 2, 9]):
        cache = cache_of(model, variant)
        feed(model, cache, [one_turn([row[:5] for row in rows]), one_turn([[row[5]] for row in rows])])
        feed(model, cache, [one_turn([row[6:] for row in rows])], expert_vector=expert)
        cache.crop([-depth for depth in depths])
        left = [row[: 9 - depth] for row, depth in zip(rows, depths, strict=True)]
        cache.set_expert_vector(None)
        read_on(model, cache, left, cache_fields=fields_of(cache))
        cache.set_expert_vector(expert)
        feed(model, cache, [one_turn([[7], [8], [9]])])


def test_within_its_reach_a_parked_state_is_cropped_and_not_dropped(widths):
    model, row, expert = shared_model("everything"), rows_of("everything", 3, (12,))[0], shared_expert("everything", 1)
    cache = cache_of(model, "reach")
    feed_row(model, cache, row[:9])
    feed_row(model, cache, row[9:11], expert_vector=expert)
    cache.crop(-4)
    assert len(cache.parked) == 1
    assert_same_logits(feed_row(model, cache, row[7:], expert_vector=None), expected(model, [row])[0][7:])
    assert widths == [9, 11, 5]


@every_pattern
@every_variant
def test_selected_reordered_and_forked_rows_take_their_parked_states_along(pattern, variant, widths):
    model, rows = shared_model(pattern), rows_of(pattern, 4)
    one, two = shared_expert(pattern, 1), shared_expert(pattern, 2)
    cache = cache_of(model, variant)
    experts = [one, None, two]
    feed(model, cache, ragged_turns(random.Random(0), rows, 2), expert_vector=experts)
    columns = cache.get_seq_length()
    cache.set_expert_vector(None)
    rows = [row + more for row, more in zip(rows, [[1], [2], [3]], strict=True)]
    feed(model, cache, [one_turn([row[-1:] for row in rows])])
    fork = cache.fork()
    cache.reorder_cache(torch.tensor([1, 2, 0]))
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    assert len(cache.parked) == 1
    chosen = [0, 1, 1]  # rows of before
    cache.set_expert_vector([experts[row] for row in chosen])
    widths.clear()
    ids = one_turn([[5], [6], [7]])
    found = feed(model, cache, [ids])
    whole = [rows[row] + ids.ids[n].tolist() for n, row in enumerate(chosen)]
    assert widths == [2] and cache.get_seq_length() == columns + 2
    wanted = expected(model, whole, [experts[row] for row in chosen], **fields_of(cache))
    assert_same_logits(found, [logits[-1:] for logits in wanted])
    fork.set_expert_vector(experts)
    read_on(model, fork, rows, experts, cache_fields=fields_of(fork))
    copy.deepcopy(fork)


@every_pattern
def test_a_fork_and_its_origin_use_the_same_parked_states_and_do_not_meet(pattern):
    model, row, expert = shared_model(pattern), rows_of(pattern, 5, (9,))[0], shared_expert(pattern, 1)
    cache = cache_of(model)
    feed_row(model, cache, row)
    feed_row(model, cache, [3], expert_vector=expert)
    fork = cache.fork()
    for each in (cache, fork):
        each.set_expert_vector(None)
    found = [feed_row(model, each, [token, 7]) for each, token in ((cache, 1), (fork, 2))]
    for logits, token in zip(found, (1, 2), strict=True):
        assert_same_logits(logits, expected(model, [[*row, 3, token, 7]])[0][-2:])
    read_on(model, cache, [[*row, 3, 1, 7]])
    read_on(model, fork, [[*row, 3, 2, 7]])


@main_patterns
def test_a_forward_that_fails_parks_the_states_again(pattern, widths):
    model, row, expert = new_model(pattern), rows_of(pattern, 1)[0], shared_expert(pattern, 1)

    def interrupt(*_):
        raise RuntimeError("interrupted")

    cache = cache_of(model)
    feed_row(model, cache, row[:6])
    feed_row(model, cache, row[6:8], expert_vector=expert)
    for _ in range(2):
        with model.model.norm.register_forward_pre_hook(interrupt), pytest.raises(RuntimeError, match="interrupted"):
            feed_row(model, cache, [5], expert_vector=None)
        assert cache.get_seq_length() == 8 and cache.expert_vector is not None
    widths.clear()
    found = feed_row(model, cache, row[8:9])
    assert_same_logits(found, expected(shared_model(pattern), [row], [expert])[0][8:9])
    found = feed_row(model, cache, row[9:], expert_vector=None)
    assert_same_logits(found, expected(shared_model(pattern), [row])[0][9:])
    assert widths == [1, 6]


def test_positions_chosen_by_hand_stay_with_their_columns(widths):
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    ids, positions = random_ids(length=9), torch.tensor([[0, 1, 2, 3, 7, 8, 9, 20, 21]])
    wanted = []
    for park_bytes in (0, ROOMY):
        cache = cache_of(model, park_bytes=park_bytes)
        with torch.no_grad():
            model(ids[:, :4], cache=cache)
            model(ids[:, 4:7], cache=cache, position_ids=positions[:, 4:7], expert_vector=expert)
            last = model(ids[:, 7:], cache=cache, position_ids=positions[:, 7:], expert_vector=None).logits
        wanted.append(last)
    assert widths == [4, 7, 9, 4, 7, 5]
    assert_same_logits(wanted[1], wanted[0])


def test_pads_and_chosen_positions_after_parked_columns_are_counted_on():
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    rows, rng, found = rows_of("everything", 2), random.Random(3), []
    first, second, third = padded_turn(rng, rows), padded_turn(rng, [[1, 2], [], [3]]), one_turn([[4], [5], [6]])
    for park_bytes in (0, ROOMY):
        cache = cache_of(model, park_bytes=park_bytes)
        feed(model, cache, [first])
        feed(model, cache, [second], expert_vector=expert)
        found.append(feed(model, cache, [third], position_ids=torch.tensor([[90], [91], [92]]), expert_vector=None))
    assert_same_logits(found[1], found[0])


@main_patterns
def test_reach_that_grows_later_grows_for_parked_states_too(pattern):
    model, row, expert = shared_model(pattern), rows_of(pattern, 3, (14,))[0], shared_expert(pattern, 1)
    cache = cache_of(model)
    feed_row(model, cache, row[:9])
    feed_row(model, cache, row[9:11], expert_vector=expert)
    cache.activate_past_recording(3)
    feed_row(model, cache, row[11:13], expert_vector=None)
    cache.crop(-2)
    read_on(model, cache, [row[:11]])
    cache.crop(-1)
    cache.set_expert_vector(expert)
    feed_row(model, cache, [3])


def test_modes_of_autograd_may_alternate(widths):
    model, row, expert = new_model("everything"), rows_of("everything", 1)[0], shared_expert("everything", 1)
    cache, wanted = cache_of(model), expected(shared_model("everything"), [row])[0]
    modes = (torch.inference_mode, torch.no_grad, torch.enable_grad, torch.inference_mode, torch.no_grad)
    for n, mode in enumerate(modes):
        with mode():
            given = None if n % 2 == 0 else expert
            logits = model(torch.tensor([row[2 * n : 2 * n + 2]]), cache=cache, expert_vector=given).logits[0]
        if n % 2 == 0:
            assert_same_logits(logits.detach(), wanted[2 * n : 2 * n + 2])
    # The third records a graph: it starts from the first token, and its states are not parked.
    assert widths == [2, 4, 6, 4, 8]


def test_changed_weights_drop_parked_states(widths):
    model, row, expert = new_model("everything"), rows_of("everything", 1)[0], shared_expert("everything", 1)
    cache = cache_of(model)
    feed_row(model, cache, row[:5])
    feed_row(model, cache, row[5:7], expert_vector=expert)
    with torch.no_grad():
        model.model.layers[0].mamba_layernorm.weight.mul_(1.5)
    found = feed_row(model, cache, row[7:9], expert_vector=None)
    assert_same_logits(found, expected(model, [row])[0][7:9])
    assert widths[-1] == 9 and len(cache.parked) == 0


def test_a_merged_expert_vector_drops_parked_states(widths):
    model, row, expert = new_model("everything"), rows_of("everything", 1)[0], shared_expert("everything", 1)
    cache = cache_of(model)
    feed_row(model, cache, row[:5])
    model.merge_expert_vector(expert)
    found = feed_row(model, cache, row[5:8])
    assert_same_logits(found, expected(shared_model("everything"), [row], [expert])[0][5:8])
    model.unmerge_expert_vector()
    assert_same_logits(feed_row(model, cache, row[8:10]), expected(shared_model("everything"), [row])[0][8:10])
    assert widths == [5, 8, 10] and len(cache.parked) == 0


def test_embeddings_are_refused_as_without_parking():
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), random_ids()
    cache = cache_of(model)
    with torch.no_grad():
        model(ids[:, :4], cache=cache)
        model(ids[:, 4:5], cache=cache, expert_vector=expert)
        model(inputs_embeds=model.model.embed_tokens(ids[:, 5:7]), cache=cache)
        with pytest.raises(ValueError, match="inputs_embeds"):
            model(ids[:, 7:], cache=cache, expert_vector=None)
        found = model(ids[:, 7:], cache=cache).logits[0]
    assert_same_logits(found, expected(model, ids.tolist(), [expert])[0][7:])


# ---- generation, sessions, prefixes


@pytest.mark.parametrize("options", [{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}])
def test_generation_that_alternates_gives_the_same_tokens_for_less_work(options, widths):
    model = shared_model("everything")
    one, two = shared_expert("everything", 1), shared_expert("everything", 2)
    schedule = {0: one, 4: two, 8: one, 12: two, 16: one}
    common = {"expert_schedule": schedule, "max_new_tokens": 20, **GREEDY, **options}
    ids, results, totals = torch.tensor([random_rows(3, (8,))[0] * 2]), [], []
    for park_bytes in (0, ROOMY):
        widths.clear()
        results.append(model.generate(ids, cache=cache_of(model, park_bytes=park_bytes), **common))
        totals.append(sum(widths))
    assert torch.equal(results[0], results[1])
    assert totals[1] < 0.75 * totals[0]


def test_a_session_has_no_parked_states_and_keeps_the_budget(tmp_path):
    model, row, expert = shared_model("everything"), rows_of("everything", 1)[0], shared_expert("everything", 1)
    cache = cache_of(model)
    feed_row(model, cache, row[:5])
    feed_row(model, cache, row[5:7], expert_vector=expert)
    cache.save(tmp_path / "session")
    loaded = model.load_cache(tmp_path / "session")
    assert loaded.options == cache.options and len(loaded.parked) == 0
    found = feed_row(model, loaded, row[7:9], expert_vector=None)
    assert_same_logits(found, expected(model, [row])[0][7:9])
    assert len(loaded.parked) == 1


def test_a_prefix_cache_stores_no_parked_states():
    model, row, expert = shared_model("everything"), random_rows(1, (24,))[0], shared_expert("everything", 1)
    cache, plain = cache_of(model), model.make_cache()
    feed_row(model, cache, row, expert_vector=expert)
    feed_row(model, cache, [3], expert_vector=None)
    feed_row(model, plain, [*row, 3])
    sizes = []
    for each in (cache, plain):
        prefixes = model.make_prefix_cache(max_bytes=ROOMY)
        prefixes.insert(each)
        sizes.append(prefixes.nbytes)
    assert abs(sizes[0] - sizes[1]) < 100  # the token ids may have a spare slot more


def test_threads_have_parked_states_of_their_own():
    model, row, expert = shared_model("everything"), rows_of("everything", 1)[0], shared_expert("everything", 1)
    wanted, failures = expected(model, [row])[0], []

    def chat():
        cache = cache_of(model)
        for start in (0, 4, 8):
            found = feed_row(model, cache, row[start : start + 2], expert_vector=None)
            if (found - wanted[start : start + 2]).abs().max() > 1e-9:
                failures.append(start)
            feed_row(model, cache, row[start + 2 : start + 4], expert_vector=expert)

    threads = [threading.Thread(target=chat) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures


# ---- the budget


def test_the_oldest_states_go_first_and_the_budget_holds():
    model, row = shared_model("everything"), rows_of("everything", 1)[0]
    experts = [shared_expert("everything", seed) for seed in (1, 2, 3)]
    probe = cache_of(model)
    feed_row(model, probe, row[:6])
    size = probe.nbytes - sum(probe.report()["tokens"].values())
    cache = cache_of(model, park_bytes=int(2.5 * size))
    for expert in (None, *experts):
        feed_row(model, cache, row[:6] if expert is None else [1], expert_vector=expert)
        assert cache.parked.nbytes <= int(2.5 * size)
    fingerprints = [experts[0].fingerprint, experts[1].fingerprint]
    assert [state.encoding.expert_vector_key for state in cache.parked.states] == fingerprints
    report = cache.report()
    assert cache.nbytes == sum(sum(report[part].values()) for part in {*model.config.layer_types, "tokens", "parked"})
    assert sum(cache.report()["parked"].values()) == cache.parked.nbytes
    cache.reset()
    assert len(cache.parked) == 0


def test_states_larger_than_the_budget_are_dropped_and_others_stay():
    model, row, expert = shared_model("everything"), rows_of("everything", 1)[0], shared_expert("everything", 1)
    cache = cache_of(model, park_bytes=1)
    feed_row(model, cache, row[:5])
    found = feed_row(model, cache, row[5:7], expert_vector=expert)
    assert_same_logits(found, expected(model, [row], [expert])[0][5:7])
    assert len(cache.parked) == 0
    assert_same_logits(feed_row(model, cache, row[7:], expert_vector=None), expected(model, [row])[0][7:])


def test_parked_keys_are_not_copied_when_they_come_back():
    model, row, expert = shared_model("full"), rows_of("full", 1)[0], shared_expert("full", 1)
    cache = cache_of(model)
    feed_row(model, cache, row[:5])
    addresses = [layer.keys.data_ptr() for layer in cache.layers]
    feed_row(model, cache, row[5:7], expert_vector=expert)
    feed_row(model, cache, row[7:9], expert_vector=None)
    assert [layer.keys.data_ptr() for layer in cache.layers] == addresses


@pytest.mark.parametrize("park_bytes", [-1, 1.5, True, "1GB", None])
def test_a_budget_that_is_no_number_of_bytes_is_refused(park_bytes):
    with pytest.raises(ValueError, match="park_bytes"):
        shared_model("full").make_cache(park_bytes=park_bytes)


@pytest.mark.parametrize("policy", ["reset", "continue", "error"])
def test_policies_that_never_encode_again_refuse_a_budget(policy):
    with pytest.raises(ValueError, match="on_expert_change"):
        shared_model("full").make_cache(park_bytes=1, on_expert_change=policy)


def test_static_storage_refuses_a_budget():
    with pytest.raises(ValueError, match="fixed addresses"):
        shared_model("full").make_cache("static", max_cache_len=8, park_bytes=1)
