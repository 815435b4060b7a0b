"""Law 4: reorder, repeat, select and fork give the same rows run by themselves."""

import random

import pytest
import torch

from oracle import assert_same_logits, read_on, uncached_logits
from sequences import feed, one_turn, ragged_turns, random_ids, random_rows, rows_of
from tiny_models import every_cache, every_pattern, main_patterns, new_cache, shared_expert, shared_model

# What is done to a cache of three rows -> which rows it then holds.
SURGERY = {
    "reorder": (lambda cache: cache.reorder_cache(torch.tensor([2, 0, 0])), [2, 0, 0]),
    "repeat": (lambda cache: cache.batch_repeat_interleave(2), [0, 0, 1, 1, 2, 2]),
    "select": (lambda cache: cache.batch_select_indices(torch.tensor([2, 1])), [2, 1]),
    "select_one": (lambda cache: cache.batch_select_indices(torch.tensor([1])), [1]),
    "fork": (lambda cache: cache.fork(), [0, 1, 2]),
}


def operate(cache, operation, *things):
    """Does `operation` to a cache and to lists with one entry a row; returns the resulting cache and lists."""
    act, order = SURGERY[operation]
    made = act(cache)
    return (made if operation == "fork" else cache), *([thing[row] for row in order] for thing in things)


@every_pattern
@every_cache
@pytest.mark.parametrize("operation", SURGERY)
def test_surgery_gives_the_same_rows_run_by_themselves(pattern, variant, operation):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    cache = new_cache(model, variant)
    feed(model, cache, ragged_turns(random.Random(31), rows, count=3))
    read_on(model, *operate(cache, operation, rows))


@main_patterns
@every_cache
@pytest.mark.parametrize("operation", SURGERY)
def test_surgery_takes_each_rows_expert_along(pattern, variant, operation):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    experts = [shared_expert(pattern, 1), None, shared_expert(pattern, 2, rank=3)]
    cache = new_cache(model, variant)
    feed(model, cache, ragged_turns(random.Random(31), rows, count=3), expert_vector=experts)
    read_on(model, *operate(cache, operation, rows, experts))


@every_cache
def test_a_selected_row_keeps_its_expert_vector_whatever_the_other_rows_had(variant):
    """Identity is content: `[e]`, what is left of `[e, None]`, and `e` are one expert, and `[None]` is the base."""
    model, rows, expert = shared_model("paper"), random_rows(1, (6, 6)), shared_expert("paper", 1)
    for kept, same in ((0, expert), (0, [expert]), (1, None), (1, [None])):
        cache = new_cache(model, variant, on_expert_change="error")
        feed(model, cache, [one_turn(rows)], expert_vector=[expert, None])
        cache.batch_select_indices(torch.tensor([kept]))
        used = [expert] if kept == 0 else [None]
        read_on(model, cache, [rows[kept]], used, expert_vector=same)


@main_patterns
@every_cache
@pytest.mark.parametrize("operation", SURGERY)
def test_surgery_takes_each_rows_remembered_text_along(pattern, variant, operation):
    """The switch after the surgery re-encodes what each row remembers, pads included."""
    model, rows, expert = shared_model(pattern), rows_of(pattern, 1), shared_expert(pattern, 1)
    cache = new_cache(model, variant)
    feed(model, cache, ragged_turns(random.Random(31), rows, count=3))
    cache, rows = operate(cache, operation, rows)
    cache.set_expert_vector(expert)
    read_on(model, cache, rows, [expert] * len(rows))


@pytest.mark.slow
@main_patterns
@every_cache
@pytest.mark.parametrize("operation", SURGERY)
def test_surgery_between_a_switch_and_the_next_forward_is_exact(pattern, variant, operation):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    experts = [None, shared_expert(pattern, 2), shared_expert(pattern, 1)]
    cache = new_cache(model, variant)
    feed(model, cache, ragged_turns(random.Random(31), rows, count=3))
    cache.set_expert_vector(experts)
    read_on(model, *operate(cache, operation, rows, experts))


@every_pattern
@every_cache
def test_surgery_after_surgery_is_exact(pattern, variant):
    """A beam search in miniature: rows are copied, dropped and reordered between single tokens."""
    model, rows, rng = shared_model(pattern), rows_of(pattern, 37, (4, 2, 3)), random.Random(37)
    cache = new_cache(model, variant)
    feed(model, cache, ragged_turns(rng, rows, count=2))
    for step in range(4):
        order = [rng.randrange(3) for _ in rows]
        cache.reorder_cache(torch.tensor(order))
        rows = read_on(model, cache, [rows[old] for old in order], seed=step)
    cache.batch_select_indices(torch.tensor([1]))
    cache.batch_repeat_interleave(3)
    read_on(model, cache, [rows[1]] * 3)


@every_pattern
@every_cache
def test_a_fork_and_its_origin_never_see_each_other(pattern, variant):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    origin = new_cache(model, variant)
    feed(model, origin, ragged_turns(random.Random(41), rows, count=3))
    fork = origin.fork()
    forked = read_on(model, fork, rows, seed=1)
    told = read_on(model, origin, rows, seed=2)
    forked = read_on(model, fork, forked, seed=3)
    fork.reorder_cache(torch.tensor([1, 2, 0]))
    told = read_on(model, origin, told, seed=4)
    origin.reset()
    read_on(model, fork, [forked[1], forked[2], forked[0]], seed=5)


@main_patterns
@every_cache
def test_a_switch_of_the_fork_leaves_the_origins_expert(pattern, variant):
    model, rows, (one, two) = shared_model(pattern), rows_of(pattern, 1), (shared_expert(pattern, s) for s in (1, 2))
    origin = new_cache(model, variant)
    feed(model, origin, ragged_turns(random.Random(41), rows, count=3), expert_vector=one)
    fork = origin.fork()
    fork.set_expert_vector(two)
    told = read_on(model, origin, rows, [one] * 3, seed=1)
    forked = read_on(model, fork, rows, [two] * 3, seed=2)
    told = read_on(model, origin, told, [one] * 3, seed=3)
    for cache, text in ((origin, told), (fork, forked)):  # each encodes again what it was told itself
        cache.set_expert_vector(None)
        read_on(model, cache, text, seed=4)


def test_expert_vectors_set_before_the_first_token_follow_the_rows():
    """A list set on an empty cache did not grow with `batch_repeat_interleave`."""
    model, expert, ids = shared_model("paper"), shared_expert("paper", 1), random_ids()
    cache = model.make_cache()
    cache.set_expert_vector([expert, None])
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        found = model(ids.expand(4, -1), past_key_values=cache).logits
    assert_same_logits(found[:2], uncached_logits(model, ids, expert_vector=expert).expand(2, -1, -1))
    assert_same_logits(found[2:], uncached_logits(model, ids).expand(2, -1, -1))


@pytest.mark.parametrize("policy", ["reset", "error", "recompute"])
def test_rows_selected_from_a_mixed_batch_keep_their_expert_vector(policy):
    """A list of one expert was told from the expert itself, and "reset" dropped the text for nothing."""
    model, ids = shared_model("everything"), random_ids()
    first, second = shared_expert("everything", 1), shared_expert("everything", 2)
    cache = model.make_cache(on_expert_change=policy)
    with torch.no_grad():
        model(ids[:, :6].expand(3, -1), past_key_values=cache, expert_vector=[first, second, None])
        bases = cache.fork()
        cache.batch_select_indices(torch.tensor([1]))
        assert cache.expert_vector == second and cache.status != "stale"
        assert_same_logits(
            model(ids[:, 6:], past_key_values=cache, expert_vector=second).logits,
            uncached_logits(model, ids, expert_vector=second)[:, 6:],
        )
        bases.batch_select_indices(torch.tensor([2]))
        assert bases.expert_vector is None
        assert_same_logits(
            model(ids[:, 6:], past_key_values=bases, expert_vector=None).logits, uncached_logits(model, ids)[:, 6:]
        )


@pytest.mark.parametrize("between", [None, "other"])
def test_rows_can_be_reordered_before_a_switch_takes_effect(between):
    """The key that had encoded the rows kept their old order, and going back to it was taken for no change."""
    model, ids = shared_model("everything"), random_ids()
    first, second, other = (shared_expert("everything", seed) for seed in (1, 2, 3))
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :6].expand(2, -1), past_key_values=cache, expert_vector=[first, second])
        cache.set_expert_vector(None if between is None else other)
        cache.select_rows(torch.tensor([1, 0]))
        cache.set_expert_vector([first, second])
        found = model(ids[:, 6:].expand(2, -1), past_key_values=cache).logits
        for row, expert in zip(found, (first, second), strict=True):
            assert_same_logits(row[None], uncached_logits(model, ids, expert_vector=expert)[:, 6:])


@every_cache
def test_a_reset_cache_takes_another_batch(variant):
    """Static buffers kept the rows of the text before."""
    model, ids = shared_model("everything"), random_ids()
    cache = new_cache(model, variant)
    with torch.no_grad():
        for rows in (2, 1, 3):
            cache.reset()
            found = [model(part.expand(rows, -1), past_key_values=cache).logits for part in ids.split(5, dim=1)]
            assert_same_logits(torch.cat(found, dim=1), uncached_logits(model, ids).expand(rows, -1, -1))
