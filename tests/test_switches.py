"""Law 5: after a change of expert vector, the logits of a fresh forward under the new one; the policies of caches."""

import random

import pytest
import torch

from mambaformer import ExpertVector
from oracle import assert_same_logits, expected, tails, uncached_logits
from patterns import GREEDY
from sequences import cut, feed, feed_row, one_turn, padded_turn, ragged_turns, random_ids, random_rows, rows_of
from tiny_models import (
    every_cache,
    every_pattern,
    main_patterns,
    new_cache,
    new_model,
    random_expert,
    shared_expert,
    shared_model,
    without_kernels_too,
)


@every_pattern
@every_cache
@pytest.mark.parametrize("by", ["set_expert_vector", "forward"])
def test_a_switch_equals_a_fresh_forward_under_the_new_expert(pattern, variant, by):
    model, row = shared_model(pattern), rows_of(pattern, 1)[0]
    one, two = shared_expert(pattern, 1), shared_expert(pattern, 2, rank=5)
    cache, start = new_cache(model, variant), 0
    for expert, piece in zip((one, two, None, one), cut(row, [4, 3, 1, 4]), strict=True):
        if by == "set_expert_vector":
            cache.set_expert_vector(expert)
        given = {} if by == "set_expert_vector" else {"expert_vector": expert}
        wanted = expected(model, [row], [expert])[0][start : start + len(piece)]
        assert_same_logits(feed_row(model, cache, piece, **given), wanted)
        start += len(piece)


@without_kernels_too
@every_pattern
@every_cache
def test_each_row_of_a_ragged_batch_switches_by_itself(pattern, variant):
    model, rows, rng = shared_model(pattern), rows_of(pattern, 1), random.Random(43)
    one, two = shared_expert(pattern, 1), shared_expert(pattern, 2, rank=5)
    cache = new_cache(model, variant)
    for step, experts in enumerate([[one, None, two], [two, None, two], [None, one, one], [None, None, None]]):
        given = experts if any(experts) else None
        more = rows_of(pattern, step, [rng.randint(0, 3) for _ in rows])
        whole = [old + new for old, new in zip(rows, more, strict=True)] if step else rows
        found = feed(model, cache, ragged_turns(rng, more if step else rows, count=2), expert_vector=given)
        wanted = expected(model, whole, experts)
        assert_same_logits(found, tails(wanted, [len(row) for row in rows] if step else [0] * 3))
        rows = whole


@every_pattern
@every_cache
def test_back_at_the_base_the_logits_are_bit_equal_to_the_base(pattern, variant):
    model, row = shared_model(pattern), rows_of(pattern, 1)[0]
    with torch.no_grad():
        base = model(torch.tensor([row]), past_key_values=new_cache(model, variant), logits_to_keep=4).logits
        cache = new_cache(model, variant)
        feed_row(model, cache, row[:-4], [3, 1, 4], expert_vector=shared_expert(pattern, 1))
        back = model(torch.tensor([row[-4:]]), past_key_values=cache, expert_vector=None).logits
        again = model(torch.tensor([row]), past_key_values=new_cache(model, variant), logits_to_keep=4).logits
    assert torch.equal(back, base)
    assert torch.equal(again, base)


@every_pattern
@every_cache
def test_an_expert_that_is_not_given_is_the_one_in_force(pattern, variant):
    model, row, expert = shared_model(pattern), rows_of(pattern, 1)[0], shared_expert(pattern, 1)
    cache, wanted = new_cache(model, variant), expected(model, [row], [expert])[0]
    assert cache.expert_vector is None
    found = [feed_row(model, cache, row[:4], expert_vector=expert), feed_row(model, cache, row[4:9], [1, 4])]
    assert cache.expert_vector.fingerprint == expert.fingerprint
    assert_same_logits(torch.cat(found), wanted[:9])
    assert_same_logits(feed_row(model, cache, row[9:], expert_vector=None), expected(model, [row])[0][9:])
    assert cache.expert_vector is None
    assert_same_logits(feed_row(model, None, row, use_cache=False), expected(model, [row])[0])


@pytest.mark.slow
@main_patterns
def test_every_way_to_name_an_expert_means_the_same(pattern, tmp_path):
    model, rows, expert = new_model(pattern), rows_of(pattern, 1), shared_expert(pattern, 1)
    ExpertVector(dict(expert.vectors), name="math").save(tmp_path / "math.safetensors")
    model.load_expert_vectors(tmp_path / "math.safetensors")
    assert "math" in model.expert_vectors
    turns = [padded_turn(random.Random(47), rows)]
    by_object = feed(model, None, turns, use_cache=False, expert_vector=expert)
    for way in ("math", dict(expert.vectors), ["math", expert, dict(expert.vectors)]):
        assert_same_logits(feed(model, None, turns, use_cache=False, expert_vector=way), by_object)
    mixed = feed(model, None, turns, use_cache=False, expert_vector=["math", None, dict(expert.vectors)])
    assert_same_logits(mixed, expected(shared_model(pattern), rows, [expert, None, expert]))


@main_patterns
@every_cache
def test_identity_is_content_and_not_a_name(pattern, variant):
    """vllm#30931, peft#2523: a cache built under one adapter was reused for another one of the same name."""
    model, row = shared_model(pattern), rows_of(pattern, 1)[0]
    one = ExpertVector(dict(shared_expert(pattern, 1).vectors), name="math")
    twin = ExpertVector({key: z.clone() for key, z in one.vectors.items()}, name="history")
    impostor = ExpertVector(dict(shared_expert(pattern, 2).vectors), name="math")
    assert one.fingerprint == twin.fingerprint != impostor.fingerprint
    strict = new_cache(model, variant, on_expert_change="error")
    found = [feed_row(model, strict, piece, expert_vector=e) for piece, e in ((row[:5], one), (row[5:], twin))]
    assert_same_logits(torch.cat(found), expected(model, [row], [one])[0])
    cache = new_cache(model, variant)
    feed_row(model, cache, row[:5], expert_vector=one)
    found = feed_row(model, cache, row[5:], expert_vector=impostor)
    assert_same_logits(found, expected(model, [row], [impostor])[0][5:])


@every_pattern
@every_cache
def test_policy_continue_leaves_old_tokens_to_the_old_expert(pattern, variant):
    model, rows, rng = shared_model(pattern), rows_of(pattern, 1), random.Random(53)
    one, two = shared_expert(pattern, 1), shared_expert(pattern, 2)
    cache = new_cache(model, variant, on_expert_change="continue")
    stops = [[0, 5, 8, 12], [0, 3, 3, 7], [0, 1, 6, 10]]  # where each row is cut
    found, segments = [[], [], []], [[], [], []]
    for turn, experts in enumerate([[one, one, one], [None, None, None], [two, None, one]]):
        pieces = [row[stop[turn] : stop[turn + 1]] for row, stop in zip(rows, stops, strict=True)]
        given = experts if turn == 2 else experts[0]
        read = feed(model, cache, ragged_turns(rng, pieces, count=2), expert_vector=given)
        for row in range(3):
            found[row].append(read[row])
            segments[row].append((stops[row][turn], experts[row]))
    assert_same_logits([torch.cat(pieces) for pieces in found], expected(model, rows, segments))


@every_pattern
@every_cache
@pytest.mark.parametrize("by", ["set_expert_vector", "forward"])
def test_policy_reset_starts_an_empty_text(pattern, variant, by):
    model, rows, expert = shared_model(pattern), rows_of(pattern, 1), shared_expert(pattern, 1)
    cache, rng = new_cache(model, variant, on_expert_change="reset"), random.Random(59)
    feed(model, cache, ragged_turns(rng, rows, count=2))
    given = {"expert_vector": expert} if by == "forward" else {}
    if by == "set_expert_vector":
        cache.set_expert_vector(expert)
        assert cache.get_seq_length() == 0
    turns = ragged_turns(rng, rows, count=3)
    assert_same_logits(feed(model, cache, turns, **given), expected(model, rows, [expert] * 3))
    assert cache.get_seq_length() == sum(turn.ids.shape[1] for turn in turns)


@every_pattern
@every_cache
@pytest.mark.parametrize("by", ["set_expert_vector", "forward"])
def test_policy_error_refuses_and_changes_nothing(pattern, variant, by):
    model, row = shared_model(pattern), rows_of(pattern, 1)[0]
    one, two = shared_expert(pattern, 1), shared_expert(pattern, 2)
    cache, wanted = new_cache(model, variant, on_expert_change="error"), expected(model, [row], [one])[0]
    found = [feed_row(model, cache, row[:5], expert_vector=one)]
    for refused in (two, None, [two]):
        with pytest.raises(ValueError, match="expert"):
            cache.set_expert_vector(refused) if by == "set_expert_vector" else feed_row(
                model, cache, [7], expert_vector=refused
            )
    assert cache.get_seq_length() == 5
    found.append(feed_row(model, cache, row[5:], [3, 4]))
    assert_same_logits(torch.cat(found), wanted)


@pytest.mark.parametrize("policy", ["recompute", "reset", "continue", "error"])
@every_cache
def test_any_policy_takes_an_expert_before_the_first_token(policy, variant):
    model, row, expert = shared_model("everything"), random_rows(1)[0], shared_expert("everything", 1)
    cache = new_cache(model, variant, on_expert_change=policy)
    cache.set_expert_vector(shared_expert("everything", 2))
    cache.set_expert_vector(expert)
    assert_same_logits(feed_row(model, cache, row, [5, 1, 6]), expected(model, [row], [expert])[0])


@main_patterns
@every_cache
def test_a_switch_taken_back_before_the_next_forward_changes_nothing(pattern, variant):
    model, row = shared_model(pattern), rows_of(pattern, 1)[0]
    one, two = shared_expert(pattern, 1), shared_expert(pattern, 2)
    cache = new_cache(model, variant)
    feed_row(model, cache, row[:5], expert_vector=one)
    cache.set_expert_vector(two)
    cache.set_expert_vector(one)
    assert_same_logits(feed_row(model, cache, row[5:], [3, 4]), expected(model, [row], [one])[0][5:])


WRONG_EXPERTS = {
    "unknown_name": lambda model: "nobody",
    "unknown_module": lambda model: ExpertVector({"model.layers.99.mamba.in_proj": torch.full((3,), 0.5)}),
    "too_long": lambda model: ExpertVector({"model.layers.0.mamba.in_proj": torch.full((999,), 0.5)}),
    "too_few_rows": lambda model: [None, random_expert(model, 1)],
}


@pytest.mark.parametrize("wrong", WRONG_EXPERTS)
@every_cache
def test_a_wrong_expert_is_refused_and_changes_nothing(wrong, variant):
    model, rows = shared_model("everything"), [row[:7] for row in random_rows(1)]
    cache = new_cache(model, variant)
    found = feed(model, cache, [one_turn([row[:4] for row in rows])])
    rest = one_turn([row[4:] for row in rows])
    with pytest.raises((ValueError, TypeError)):
        feed(model, cache, [rest], expert_vector=WRONG_EXPERTS[wrong](model))
    found = [torch.cat(pair) for pair in zip(found, feed(model, cache, [rest]), strict=True)]
    assert_same_logits(found, expected(model, rows))


@every_cache
def test_a_chat_whose_expert_vector_changes_under_reset_is_fed_again(variant):
    """The text was dropped after `generate` had cut the input to the new turn, so the answer knew only that turn."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), random_ids()
    cache = new_cache(model, variant, on_expert_change="reset")
    first = model.generate(ids, past_key_values=cache, max_new_tokens=4, **GREEDY)
    text = torch.cat([first, ids[:, :3]], dim=1)
    options = {"max_new_tokens": 4, "expert_vector": expert, **GREEDY}
    assert model.generate(text, past_key_values=cache, **options).tolist() == model.generate(text, **options).tolist()
    with pytest.raises(ValueError, match="complete sequence"):
        model.generate(ids[:, :2], past_key_values=cache, max_new_tokens=4, expert_vector=None, **GREEDY)


def test_a_rollback_under_continue_is_not_recomputed_by_the_next_expert():
    """After `crop`, what was left was encoded again by the new expert although the policy says it stays."""
    model, expert, ids = shared_model("hybrid"), shared_expert("hybrid", 1), random_ids()
    cache = model.make_cache(on_expert_change="continue")
    with torch.no_grad():
        model(ids, past_key_values=cache)
        cache.crop(-3)
        with pytest.raises(ValueError, match="rolled back"):
            cache.set_expert_vector(expert)
        model(ids[:, 6:7], past_key_values=cache)
        found = model(ids[:, 7:], past_key_values=cache, expert_vector=expert).logits
        plain = model.make_cache(on_expert_change="continue")
        model(ids[:, :7], past_key_values=plain)
        assert_same_logits(found, model(ids[:, 7:], past_key_values=plain, expert_vector=expert).logits)


def test_a_list_of_equal_expert_vectors_has_one_for_each_row():
    """Three equal experts were taken for one, and passed for a batch of two."""
    model, expert = shared_model("paper"), shared_expert("paper", 1)
    with pytest.raises(ValueError, match="3 entries for 2 rows"):
        model(random_ids().expand(2, -1), expert_vector=[expert] * 3)


def test_expert_vectors_of_ones_must_name_modules_of_the_model():
    """They count as the base, and passed unchecked whatever they named."""
    model = shared_model("paper")
    for vectors in ({"model.nowhere": torch.ones(3)}, {"lm_head": torch.ones(500)}):
        with pytest.raises(ValueError, match="model"):
            model(random_ids(), expert_vector=vectors)


def test_a_list_of_expert_vectors_is_counted_against_this_batch():
    """The length of a list was remembered with the plan, and refused rows that were repeated since."""
    model, expert, ids = shared_model("paper"), shared_expert("paper", 1), random_ids()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, expert_vector=[expert])
        cache.batch_repeat_interleave(2)
        found = model(ids[:, 5:].expand(2, -1), past_key_values=cache).logits
        assert_same_logits(found[1:], uncached_logits(model, ids, expert_vector=expert)[:, 5:])
        with pytest.raises(ValueError, match="3 entries for 2 rows"):
            model(ids[:, :1].expand(2, -1), past_key_values=cache, expert_vector=[expert] * 3)


def test_an_expert_vector_set_and_taken_back_leaves_no_trace():
    """Under "continue" the text counted as mixed from then on, and could not be rolled back."""
    model, expert, ids = shared_model("hybrid"), shared_expert("hybrid", 1), random_ids()
    for policy in ("recompute", "continue"):
        cache = model.make_cache(on_expert_change=policy)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.set_expert_vector(expert)
            cache.set_expert_vector(None)
            assert cache.status != "stale" and not cache.provenance.is_mixed
            cache.crop(-4)
            assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])
