"""`make_cache(remember=n)`: a log of tokens that is bounded, for sequences without end."""

import random

import pytest
import torch

from oracle import assert_same_logits, expected, read_on
from patterns import GREEDY
from sequences import feed, feed_row, one_turn, padded_turn, ragged_turns, random_cut, random_rows, rows_of
from tiny_models import every_random_pattern, shared_expert, shared_model

REMEMBER = 4


def long_cache(pattern, length=200, remember=REMEMBER, **options):
    """A cache that has forgotten most of a row, and the row."""
    model, row = shared_model(pattern), random_rows(1, (length,))[0]
    cache = model.make_cache(remember=remember, **options)
    feed_row(model, cache, row)
    return model, cache, row


# ---- laws


@every_random_pattern
def test_any_split_equals_the_oracle(pattern):
    model, row, rng = shared_model(pattern), rows_of(pattern, 1, (24,))[0], random.Random(7)
    for sizes in ([24], [1] * 24, random_cut(rng, 24)):
        cache = model.make_cache(remember=REMEMBER)
        assert_same_logits(feed_row(model, cache, row, sizes), expected(model, [row])[0])
        assert cache.get_seq_length() == 24 and cache.token_ids.tolist() == [row[-REMEMBER:]]


@every_random_pattern
@pytest.mark.parametrize("whole_mask", [False, True])
def test_padding_anywhere_in_any_turn_equals_the_oracle(pattern, whole_mask):
    model, rows = shared_model(pattern), rows_of(pattern, 2, (17, 6, 11))
    for seed in range(3):
        cache, turns = model.make_cache(remember=REMEMBER), ragged_turns(random.Random(seed), rows, 5)
        assert_same_logits(feed(model, cache, turns, whole_mask), expected(model, rows))
        fed = torch.cat([turn.ids for turn in turns], 1)
        assert torch.equal(cache.token_ids, fed[:, -REMEMBER:])


@every_random_pattern
def test_a_rollback_within_reach_is_as_if_the_tokens_had_never_been_fed(pattern):
    model, rows, rng = shared_model(pattern), rows_of(pattern, 3, (40, 30)), random.Random(0)
    cache = model.make_cache(remember=REMEMBER, rollback_reach=3)
    first = padded_turn(rng, rows, side="left")
    feed(model, cache, [first])
    feed(model, cache, [one_turn(random_rows(9, (1, 1))) for _ in range(3)])
    cache.crop(-3)
    assert torch.equal(cache.token_ids, first.ids[:, -REMEMBER:])
    feed(model, cache, [one_turn(random_rows(9, (1, 1))) for _ in range(2)])
    cache.crop([-2, -2])
    rows = read_on(model, cache, rows)
    feed(model, cache, [one_turn([[5], [6]])])
    cache.crop([-1, 0])
    read_on(model, cache, [rows[0], [*rows[1], 6]])


@every_random_pattern
def test_rows_that_change_places_forks_and_sessions_continue(pattern, tmp_path):
    model, rows = shared_model(pattern), rows_of(pattern, 4, (15, 4, 9))
    cache = model.make_cache(remember=REMEMBER)
    feed(model, cache, ragged_turns(random.Random(0), rows, 4))
    cache.save(tmp_path / "session")
    fork, loaded = cache.fork(), model.load_cache(tmp_path / "session")
    assert loaded.options == cache.options and torch.equal(loaded.token_ids, cache.token_ids)
    assert loaded.get_seq_length() == cache.get_seq_length()
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    read_on(model, cache, [rows[2], rows[0], rows[0]])
    read_on(model, fork, rows)
    loaded.save(tmp_path / "again")
    read_on(model, loaded, rows)
    read_on(model, model.load_cache(tmp_path / "again"), rows)


def test_speculation_and_a_continued_chat_equal_plain_decoding():
    model = shared_model("everything")
    ids, common = torch.tensor([random_rows(3, (8,))[0] * 3]), {"max_new_tokens": 10, **GREEDY}
    wanted = model.generate(ids, **common)
    cache = model.make_cache(remember=REMEMBER)
    assert torch.equal(model.generate(ids, cache=cache, prompt_lookup_num_tokens=4, **common), wanted)
    more = torch.cat([wanted, torch.tensor([[5, 6, 7]])], dim=1)
    assert torch.equal(model.generate(more, cache=cache, **common), model.generate(more, **common))
    with pytest.raises(ValueError, match="do not start with"):
        model.generate(ids.flip(1).repeat(1, 3), cache=cache, **common)


def test_a_reset_cache_remembers_a_new_sequence():
    model, cache, _ = long_cache("everything")
    cache.reset()
    row = random_rows(5, (4,))[0]
    feed_row(model, cache, row)
    assert cache.common_prefix(torch.tensor([row])) == 4
    read_on(model, cache, [row], [shared_expert("everything", 1)], expert_vector=shared_expert("everything", 1))


@pytest.mark.parametrize("pattern", ["mamba", "sliding", "hybrid_sliding"])
@pytest.mark.parametrize("width", [1, 7, 150])
def test_bytes_are_constant_however_long_the_sequence_is(pattern, width):
    model = shared_model(pattern)
    cache, sizes, rng = model.make_cache(remember=20), set(), random.Random(0)
    rows = [random_rows(seed, (width,))[0] for seed in range(2)]
    for step in range(600 // width + 3):
        feed(model, cache, [padded_turn(rng, rows, extra=step % 2)])
        if step * width >= 300:
            sizes.add(cache.nbytes)
    assert len(sizes) == 1
    assert all(tensor.shape[1] <= 2 * 150 + 64 for tensor in cache.history.tensors().values())


# ---- refusals


@pytest.mark.slow
def test_all_that_needs_forgotten_tokens_is_refused_and_changes_nothing():
    model, cache, row = long_cache("everything")
    expert = shared_expert("everything", 1)
    refused = {
        "encoded again": [
            lambda: cache.set_expert_vector(expert),
            lambda: feed_row(model, cache, [1], expert_vector=expert),
            lambda: cache.crop(-3),
        ],
        "cropped in its forgotten part": [lambda: cache.crop(-50), lambda: cache.crop([-50])],
        "compared with a prompt": [lambda: cache.common_prefix(torch.tensor([row]))],
    }
    for message, actions in refused.items():
        for action in actions:
            with pytest.raises(ValueError, match=f"{message}, but the cache has forgotten its first 196 columns"):
                action()
    read_on(model, cache, [row])


def test_full_attention_cannot_be_cropped_beyond_the_log_but_to_nothing():
    model, cache, row = long_cache("full", 30)
    cache.crop(-2)
    read_on(model, cache, [row[:-2]])
    with pytest.raises(ValueError, match="cropped in its forgotten part"):
        cache.crop(-20)
    cache.crop(-cache.get_seq_length())
    assert cache.get_seq_length() == 0


def test_a_policy_that_needs_no_tokens_still_changes_the_expert_vector():
    expert = shared_expert("everything", 1)
    model, cache, row = long_cache("everything", on_expert_change="reset")
    cache.set_expert_vector(expert)
    assert cache.get_seq_length() == 0
    read_on(model, cache, [[]], [expert])
    model, cache, row = long_cache("everything", on_expert_change="continue")
    cache.set_expert_vector(expert)
    found = feed_row(model, cache, [3])
    assert_same_logits(found, expected(model, [[*row, 3]], [[(0, None), (len(row), expert)]])[0][-1:])


def test_a_forward_that_fails_after_a_reset_keeps_what_cannot_be_encoded_again():
    model, cache, row = long_cache("everything", on_expert_change="reset")

    def fail(*args):
        raise RuntimeError("no memory")

    handle = model.model.norm.register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="no memory"):
        feed_row(model, cache, [3], expert_vector=shared_expert("everything", 1))
    handle.remove()
    read_on(model, cache, [row])


@pytest.mark.parametrize("in_a_file", [False, True])
def test_the_reach_may_exceed_what_is_remembered(in_a_file, tmp_path):
    """After speculation, which extends the reach, `save` refused the cache: its reach exceeded `remember`."""
    model, rows = shared_model("everything"), rows_of("everything", 5, (40, 31))
    cache = model.make_cache(remember=3)
    feed(model, cache, [one_turn([row[:25] for row in rows])])
    cache.activate_past_recording(9)
    if in_a_file:
        cache.save(tmp_path / "session")
        cache = model.load_cache(tmp_path / "session")
        assert (cache.rollback_reach, cache.token_ids.shape[1]) == (9, 3)
    feed(model, cache, ragged_turns(random.Random(0), [row[25:] for row in rows], 3))
    feed(model, cache, [one_turn(random_rows(6, (6, 6)))])
    cache.crop(-6)
    assert cache.token_ids.shape[1] == 3
    read_on(model, cache, rows)


def test_a_session_of_other_weights_is_refused(tmp_path):
    model, cache, _ = long_cache("paper")
    cache.save(tmp_path / "session")
    other = type(model)(model.config).double()
    with pytest.raises(ValueError, match="cannot be encoded again"):
        other.load_cache(tmp_path / "session", on_weights_change="recompute")


def test_parked_states_are_dropped_with_the_columns_that_they_need():
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    cache, row = model.make_cache(remember=8, park_bytes=10**7), random_rows(1, (20,))[0]
    feed_row(model, cache, row[:5])
    feed_row(model, cache, row[5:6], expert_vector=expert)
    assert cache.report()["parked"]["states"] > 0
    found = feed_row(model, cache, row[6:])
    assert_same_logits(found, expected(model, [row], [expert])[0][6:])
    assert cache.report()["parked"]["states"] == 0


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"remember": 0}, "integer of at least 1"),
        ({"remember": 2.0}, "integer of at least 1"),
        ({"remember": True}, "integer of at least 1"),
        ({"remember": 3, "storage": "static", "max_cache_len": 9}, "leave `remember` out"),
    ],
)
def test_options_that_contradict_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        shared_model("everything").make_cache(**options)
