"""Laws 0 to 2, judged by the oracle in `reference.py`: the papers' equations, any split into forwards, pads anywhere.

Float64, large random weights, every pattern, every cache variant; trained weights read real text. Unless a test says
otherwise, logits agree to 1e-10 of the logit scale.
"""

import random

import pytest
import torch

from oracle import assert_same_logits, expected, read_on, uncached_logits
from reference import ReferenceRow, tuned_weights
from sequences import (
    Turn,
    feed,
    feed_row,
    one_turn,
    padded_turn,
    ragged_turns,
    random_cut,
    random_ids,
    random_rows,
    rows_of,
)
from tiny_models import (
    every_cache,
    every_pattern,
    main_patterns,
    new_cache,
    random_expert,
    shared_expert,
    shared_model,
    without_kernels_too,
)

every_mask_form = pytest.mark.parametrize("whole_mask", [False, True], ids=["mask_of_new", "mask_of_all"])


# Law 0: a forward says what the papers say.


@every_pattern
def test_a_forward_without_cache_equals_the_oracle(pattern):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    for row, wanted in zip(rows, expected(model, rows), strict=True):
        assert_same_logits(feed_row(model, None, row, use_cache=False), wanted)


@without_kernels_too
@every_pattern
@every_cache
def test_a_forward_that_fills_a_cache_equals_the_oracle(pattern, variant):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    for row, wanted in zip(rows, expected(model, rows), strict=True):
        assert_same_logits(feed_row(model, new_cache(model, variant), row), wanted)


@without_kernels_too
@every_pattern
def test_a_batch_of_ragged_rows_without_cache_equals_the_oracle(pattern):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    for side in ("left", "right", "any"):
        turn = padded_turn(random.Random(5), rows, extra=2, side=side)
        assert_same_logits(feed(model, None, [turn], use_cache=False), expected(model, rows))


@without_kernels_too
@every_pattern
@pytest.mark.parametrize("rank", [None, 3])
def test_an_expert_on_the_fly_equals_the_oracle(pattern, rank):
    model, rows, expert = shared_model(pattern), rows_of(pattern, 1), shared_expert(pattern, 1, rank)
    wanted = expected(model, rows, [expert] * 3)
    assert (wanted[0] - expected(model, rows)[0]).abs().max() > 0.1
    turn = padded_turn(random.Random(5), rows)
    assert_same_logits(feed(model, None, [turn], use_cache=False, expert_vector=expert), wanted)


@pytest.mark.parametrize("pattern", ["everything", "paper"])
def test_every_linear_module_obeys_its_own_expert(pattern):
    model, row = shared_model(pattern), rows_of(pattern, 2)[0][:4]
    base = expected(model, [row])[0]
    for module in shared_expert(pattern, 1).vectors:
        expert = random_expert(model, 3, modules=[module])
        wanted = expected(model, [row], [expert])[0]
        assert (wanted - base).abs().max() > 1e-3, module
        assert_same_logits(feed_row(model, None, row, use_cache=False, expert_vector=expert), wanted)


@main_patterns
def test_embeddings_given_by_the_caller_equal_token_ids(pattern):
    model, row = shared_model(pattern), rows_of(pattern, 1)[0]
    with torch.no_grad():
        embeddings = model.get_input_embeddings()(torch.tensor([row]))
        found = model(inputs_embeds=embeddings, use_cache=False).logits[0]
    assert_same_logits(found, expected(model, [row])[0])


@main_patterns
@pytest.mark.parametrize("side", ["left", "right"])
def test_logits_to_keep_keeps_the_last_columns(pattern, side):
    model, turn = shared_model(pattern), padded_turn(random.Random(3), rows_of(pattern, 1), side=side)
    with torch.no_grad():
        everything = model(turn.ids, attention_mask=turn.mask.long()).logits
        last = model(turn.ids, attention_mask=turn.mask.long(), logits_to_keep=4).logits
    real = turn.mask[:, -4:]
    assert_same_logits(last[real], everything[:, -4:][real])


def test_indices_of_logits_to_keep_count_from_either_end():
    """What refuses indices that are too large must not refuse those from the end."""
    model, ids = shared_model("everything"), random_ids()
    found = uncached_logits(model, ids, logits_to_keep=torch.tensor([2, -1, -9]))
    assert_same_logits(found, uncached_logits(model, ids)[:, [2, 8, 0]])


@every_cache
def test_chosen_positions_turn_keys_and_queries_and_are_remembered(variant):
    """RoPE sees distances only: positions that are all 7 later change nothing, twice the distances do."""
    model, row, expert = shared_model("llama"), random_rows(1)[0], shared_expert("llama", 1)
    usual = torch.arange(len(row))[None]
    shifted, doubled = ({"position_ids": positions, "use_cache": False} for positions in (usual + 7, usual * 2))
    assert_same_logits(feed_row(model, None, row, **shifted), expected(model, [row])[0])
    apart = feed_row(model, None, row, expert_vector=expert, **doubled)
    assert (apart - expected(model, [row], [expert])[0]).abs().max() > 1e-2
    cache = new_cache(model, variant)
    feed_row(model, cache, row[:5], position_ids=2 * usual[:, :5])
    found = feed_row(model, cache, row[5:], position_ids=2 * usual[:, 5:], expert_vector=expert)
    assert_same_logits(found, apart[5:])


def test_later_turns_count_on_from_chosen_positions():
    """Later turns without `position_ids` were not remembered, and encoding the text again crashed."""
    model, expert, ids = shared_model("llama"), shared_expert("llama", 1), random_ids(length=90)
    cache = model.make_cache()
    chosen = torch.arange(5)[None] - 7  # growing up to the counted ones: a decrease would start another sequence
    with torch.no_grad():
        model(ids[:, :5], position_ids=chosen, past_key_values=cache)
        model(ids[:, 5:88], past_key_values=cache)
        found = model(ids[:, 88:], past_key_values=cache, expert_vector=expert).logits
    positions = torch.cat([chosen, torch.arange(5, 90)[None]], dim=1)
    assert_same_logits(found, uncached_logits(model, ids, position_ids=positions, expert_vector=expert)[:, 88:])


@every_pattern
def test_a_wrong_state_or_key_moves_the_logits(pattern):
    """The laws see nothing if the models are quiet (with the default init a wrong SSM state moves logits by 1e-5)."""
    model, row = shared_model(pattern), rows_of(pattern, 1)[0]
    weights, honest = tuned_weights(model.state_dict()), expected(model, [row])[0]

    def read_with(damage):
        reader = ReferenceRow(model.config.to_dict())
        for token in row[:6]:
            reader.read(token, weights)
        damage(reader)
        return torch.stack([reader.read(token, weights) for token in row[6:]])

    def zero_h(reader):
        reader.h = [0.0 * h for h in reader.h]

    def zero_conv_inputs(reader):
        reader.conv_inputs = [[torch.zeros_like(x) for x in inputs] for inputs in reader.conv_inputs]

    def shuffle_keys(reader):
        reader.keys = [keys[1:] + keys[:1] for keys in reader.keys]

    damages = [zero_h, zero_conv_inputs] if model.config.layer_types[0] in ("linear_attention", "hybrid") else []
    damages += [shuffle_keys] if set(model.config.layer_types) != {"linear_attention"} else []
    for damage in damages:
        assert (read_with(damage) - honest[6:]).abs().max() > 1e-2, damage.__name__


# Law 1: any cutting of a sequence into forwards gives the logits of the single forward.


@without_kernels_too
@every_pattern
@every_cache
def test_any_cutting_equals_the_single_forward(pattern, variant):
    model, rng = shared_model(pattern), random.Random(7)
    (row, _, other) = rows_of(pattern, 1)
    for tokens in (row, other):
        wanted = expected(model, [tokens])[0]
        for sizes in ([1] * len(tokens), random_cut(rng, len(tokens)), random_cut(rng, len(tokens), singles=0.2)):
            assert_same_logits(feed_row(model, new_cache(model, variant), tokens, sizes), wanted)


@every_pattern
def test_the_cache_made_by_the_first_forward_is_continued(pattern):
    model, row = shared_model(pattern), rows_of(pattern, 1)[0]
    with torch.no_grad():
        first = model(torch.tensor([row[:5]]))
        second = model(torch.tensor([row[5:]]), past_key_values=first.past_key_values)
    assert second.past_key_values is first.past_key_values
    assert_same_logits(torch.cat([first.logits[0], second.logits[0]]), expected(model, [row])[0])


@every_pattern
@every_cache
def test_a_reset_cache_reads_a_new_text_as_a_new_cache_does(pattern, variant):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    cache = new_cache(model, variant)
    feed_row(model, cache, rows[0], [4, 1, 1, 6])
    cache.reset()
    assert cache.get_seq_length() == 0
    assert_same_logits(feed_row(model, cache, rows[2], [3, 1, 6]), expected(model, rows[2:])[0])


# Law 2: real tokens get the logits they have alone, for any pad pattern in any turn.


@without_kernels_too
@every_pattern
@every_cache
@every_mask_form
def test_pads_anywhere_in_any_turn_change_nothing(pattern, variant, whole_mask):
    model, rows, rng = shared_model(pattern), rows_of(pattern, 1), random.Random(11)
    for some, side in ((rows, "left"), (rows, "right"), (rows, None), (rows[:1], None)):
        cache, turns = new_cache(model, variant), ragged_turns(rng, some, count=4, side=side)
        assert_same_logits(feed(model, cache, turns, whole_mask), expected(model, some))
        assert cache.get_seq_length() == sum(turn.ids.shape[1] for turn in turns)


@every_pattern
@every_cache
@every_mask_form
def test_pads_between_single_tokens_change_nothing(pattern, variant, whole_mask):
    """Decoding a ragged batch: at each step every row either speaks or rests."""
    model, rows, rng = shared_model(pattern), rows_of(pattern, 4, (6, 3, 7)), random.Random(13)
    waiting, turns = [list(row) for row in rows], []
    while any(waiting):
        turns.append(padded_turn(rng, [[row.pop(0)] if row and rng.random() < 0.7 else [] for row in waiting]))
    assert_same_logits(feed(model, new_cache(model, variant), turns, whole_mask), expected(model, rows))


@every_pattern
@every_cache
def test_positions_go_on_after_pads_when_no_mask_is_given(pattern, variant):
    """Transformers' Bamba starts again at position 0 in a hand-written loop that gives no `position_ids`."""
    model, rows, rng = shared_model(pattern), rows_of(pattern, 1, (9, 6, 8)), random.Random(17)
    cache = new_cache(model, variant)
    first = padded_turn(rng, [row[:-4] for row in rows], side="left")
    steps = [one_turn([[row[step]] for row in rows]) for step in (-4, -3, -2, -1)]
    assert_same_logits(feed(model, cache, [first, *steps]), expected(model, rows))


@every_pattern
@every_cache
def test_pads_that_come_late_change_nothing_and_are_remembered(pattern, variant):
    model, rows, rng = shared_model(pattern), rows_of(pattern, 1, (11, 6, 9)), random.Random(21)
    cache, expert = new_cache(model, variant), shared_expert(pattern, 1)
    even = [one_turn([row[:3] for row in rows]), one_turn([[row[3]] for row in rows])]
    ragged = ragged_turns(rng, [row[4:] for row in rows], count=2)
    assert_same_logits(feed(model, cache, even + ragged), expected(model, rows))
    read_on(model, cache, rows, [expert] * 3, expert_vector=expert)


@main_patterns
@every_cache
def test_a_row_of_pads_before_its_first_token_changes_nothing(pattern, variant):
    model, rows, rng = shared_model(pattern), rows_of(pattern, 1), random.Random(19)
    late = [padded_turn(rng, [rows[0][:5], [], rows[2][:3]]), padded_turn(rng, [rows[0][5:], rows[1], rows[2][3:]])]
    assert_same_logits(feed(model, new_cache(model, variant), late), expected(model, rows))


@every_cache
def test_the_cache_remembers_the_ids_of_every_column(variant):
    model, turns = shared_model("everything"), ragged_turns(random.Random(23), random_rows(1), count=3)
    cache = new_cache(model, variant)
    feed(model, cache, turns)
    columns = torch.cat([turn.ids for turn in turns], 1)
    real = torch.cat([turn.mask for turn in turns], 1)
    assert cache.token_ids.shape == columns.shape
    assert torch.equal(cache.token_ids[real], columns[real])


# Law 4: reorder, repeat, select and fork give the same rows run by themselves.

# Law 5: after a change of expert, the logits of a fresh forward under the new one; back to base, bit-equal to base.

# Law 7: two caches, two threads, two experts on one model: neither can be seen from the other.

# Law 9: forms. Static = dense and one row = that row in a batch also follow from the laws above.


def test_a_turn_is_what_the_cases_say():
    """The generators of this file are honest: every real token is dealt once, in order, and pads do occur."""
    rows = random_rows(1)
    for seed in range(20):
        turns = ragged_turns(random.Random(seed), rows, count=4)
        dealt = [torch.cat([turn.ids[row, turn.mask[row]] for turn in turns]).tolist() for row in range(3)]
        assert dealt == rows
        assert any(not turn.mask.all() for turn in turns)
        assert all(isinstance(turn, Turn) for turn in turns)
