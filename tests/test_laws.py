"""The laws of the design, judged by the oracle in `reference.py`: float64, loud weights, every pattern, every cache.

Trained weights stand beside the patterns, and read real text.

Unless a test says otherwise, logits agree to 1e-10 of the logit scale.
"""

import copy
import random
import threading

import pytest
import torch

from cases import (
    CACHE_VARIANTS,
    MODELS,
    PATTERNS,
    TRAINED_PARAMS,
    Turn,
    assert_same_logits,
    cut,
    expected,
    feed,
    feed_row,
    new_model,
    one_turn,
    padded_turn,
    ragged_turns,
    random_cut,
    random_expert,
    random_model,
    random_rows,
    rows_for,
    rows_of,
    shared_expert,
    shared_model,
    tiny_config,
)
from mambaformer import ExpertVector
from reference import ReferenceRow, reference_logits, tuned_weights

MAIN_PATTERNS = ["mamba", "paper", "llama", "everything"]

without_kernels_too = pytest.mark.without_kernels_too
every_pattern = pytest.mark.parametrize("pattern", MODELS)
every_random_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_cache = pytest.mark.parametrize("variant", CACHE_VARIANTS)
main_patterns = pytest.mark.parametrize("pattern", [*MAIN_PATTERNS, *TRAINED_PARAMS])
every_mask_form = pytest.mark.parametrize("whole_mask", [False, True], ids=["mask_of_new", "mask_of_all"])


def new_cache(model, variant, **options):
    return model.make_cache(**CACHE_VARIANTS[variant], **options)


def tails(rows, counts):
    """The last entries of each row: what comes after the first `counts` of them."""
    return [row[count:] for row, count in zip(rows, counts, strict=True)]


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


@without_kernels_too
@every_random_pattern
def test_gradients_equal_those_of_the_oracle(pattern):
    model, (row, *_) = new_model(pattern), rows_of(pattern, 1)
    shares = torch.randn(len(row), model.config.vocab_size, dtype=torch.float64)
    (model(torch.tensor([row]), use_cache=False).logits[0] * shares).sum().backward()

    leaves = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    (reference_logits(leaves, model.config.to_dict(), [row])[0] * shares).sum().backward()
    for name, parameter in model.named_parameters():
        assert_same_logits(parameter.grad, leaves[name].grad)


@pytest.mark.parametrize("pattern", MAIN_PATTERNS)
def test_gradients_of_an_expert_equal_those_of_the_oracle(pattern):
    model, (row, *_) = shared_model(pattern), rows_of(pattern, 1)
    shares = torch.randn(len(row), model.config.vocab_size, dtype=torch.float64)
    gradients = []
    for judge in (False, True):
        vectors = {key: z.double().requires_grad_() for key, z in shared_expert(pattern, 1, rank=3).vectors.items()}
        if judge:
            logits = reference_logits(model.state_dict(), model.config.to_dict(), [row], [vectors])[0]
        else:
            logits = model(torch.tensor([row]), use_cache=False, expert_vector=ExpertVector(vectors)).logits[0]
        (logits * shares).sum().backward(inputs=list(vectors.values()))
        gradients.append({key: z.grad for key, z in vectors.items()})
    for key, gradient in gradients[1].items():
        assert gradient.abs().max() > 0, key
        assert_same_logits(gradients[0][key], gradient)


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


class Interrupted(Exception):
    """What a forward is broken off with."""


@main_patterns
@every_cache
def test_a_forward_that_is_broken_off_leaves_the_cache_as_it_was(pattern, variant):
    model, row, expert = new_model(pattern), rows_of(pattern, 1)[0], shared_expert(pattern, 1)

    def interrupt(*_):
        raise Interrupted

    cache, wanted = new_cache(model, variant), expected(shared_model(pattern), [row], [expert])[0]
    feed_row(model, cache, row[:4])
    for start, sizes in ((4, [2, 1, 2]), (9, [1]), (10, [2])):
        with model.model.norm.register_forward_pre_hook(interrupt), pytest.raises(Interrupted):
            feed_row(model, cache, [5] * sizes[0])
        cache.set_expert_vector(
            expert
        )  # the first time, the text has to be encoded again, and that is broken off as well
        with model.model.norm.register_forward_pre_hook(interrupt), pytest.raises(Interrupted):
            feed_row(model, cache, [7] * sizes[0])
        assert cache.get_seq_length() == start
        found = feed_row(model, cache, row[start : start + sum(sizes)], sizes)
        assert_same_logits(found, wanted[start : start + sum(sizes)])


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


def read_on(model, cache, rows, experts=None, seed=29, **options):
    """Feeds every row a new, ragged continuation and asserts that it is read as the oracle reads the whole row."""
    rng = random.Random(seed)
    more = rows_for(model, seed, [rng.randint(1, 4) for _ in rows])
    found = feed(model, cache, ragged_turns(rng, more, count=2), **options)
    whole = [old + new for old, new in zip(rows, more, strict=True)]
    assert_same_logits(found, tails(expected(model, whole, experts), [len(row) for row in rows]))
    return whole


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
def test_a_row_that_is_selected_keeps_its_expert_whoever_stood_beside_it(variant):
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


# Law 5: after a change of expert, the logits of a fresh forward under the new one; back to base, bit-equal to base.


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
def test_a_switch_that_is_taken_back_before_the_next_forward_changes_nothing(pattern, variant):
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


# Law 7: two caches, two threads, two experts on one model: neither can be seen from the other.


def decode(model, variant, row, expert, steps=None):
    """Logits of a text read token by token after a prefill of three; `steps` is called between the forwards."""
    cache, found = new_cache(model, variant), []
    for start, piece in zip([0, *range(3, len(row))], cut(row, [3] + [1] * (len(row) - 3)), strict=True):
        given = {"expert_vector": expert} if start == 0 else {}
        found.append(feed_row(model, cache, piece, **given))
        if steps is not None:
            steps()
    return torch.cat(found)


@every_pattern
@every_cache
def test_two_interleaved_caches_give_what_each_gives_alone(pattern, variant):
    model, (row, _, other) = shared_model(pattern), rows_of(pattern, 1)
    expert = shared_expert(pattern, 1)
    before = model.config.to_dict()
    alone = [decode(model, variant, row[:10], expert), decode(model, variant, other, None)]
    caches, found = [new_cache(model, variant) for _ in range(2)], [[], []]
    for start in range(0, 10, 2):
        for which, (tokens, used) in enumerate(((row[:10], expert), (other, None))):
            pieces = [[3], [1], [1, 1]][min(start // 2, 2)]
            done = sum(len(piece) for piece in found[which])
            piece = tokens[done : done + sum(pieces)]
            given = {"expert_vector": used} if start == 0 else {}
            found[which].append(feed_row(model, caches[which], piece, pieces, **given))
    for which in range(2):
        assert torch.equal(torch.cat(found[which]), alone[which])
    assert model.config.to_dict() == before


@main_patterns
@every_cache
def test_two_threads_with_two_experts_give_what_each_gives_alone(pattern, variant):
    """The model is new, so the threads also meet in whatever it prepares when an expert is first used."""
    rows, experts = [rows_of(pattern, seed)[0] for seed in (1, 2, 3)], [shared_expert(pattern, 1), None]
    experts.append(shared_expert(pattern, 2, rank=3))
    alone = [decode(shared_model(pattern), variant, *pair) for pair in zip(rows, experts, strict=True)]
    model, barrier = new_model(pattern), threading.Barrier(3, timeout=60)
    found = [None] * 3

    def work(which):
        torch.set_num_threads(1)
        found[which] = decode(model, variant, rows[which], experts[which], steps=barrier.wait)

    threads = [threading.Thread(target=work, args=(which,)) for which in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for one, other in zip(found, alone, strict=True):
        assert torch.equal(one, other)


# Law 9: forms. Static = dense and one row = that row in a batch also follow from the laws above.


@without_kernels_too
@every_pattern
def test_static_equals_dense(pattern):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    turns = ragged_turns(random.Random(61), rows, count=4)
    dense, static = (feed(model, new_cache(model, variant), turns) for variant in ("dense", "static"))
    assert_same_logits(static, dense, tolerance=1e-12)


@every_pattern
def test_a_row_in_a_batch_equals_that_row_alone(pattern):
    model, rows = shared_model(pattern), rows_of(pattern, 1)
    batch = feed(model, model.make_cache(), ragged_turns(random.Random(67), rows, count=3))
    alone = [feed_row(model, model.make_cache(), row) for row in rows]
    assert_same_logits(batch, alone, tolerance=1e-12)


@every_pattern
@pytest.mark.parametrize("rank", [None, 3])
def test_merged_equals_on_the_fly_and_unmerging_is_bit_exact(pattern, rank):
    model, rows, expert = new_model(pattern), rows_of(pattern, 1), shared_expert(pattern, 1, rank)
    turns = ragged_turns(random.Random(71), rows, count=2)
    weights, base = copy.deepcopy(model.state_dict()), feed(model, model.make_cache(), turns)
    model.merge_expert_vector(expert)
    assert_same_logits(feed(model, model.make_cache(), turns), expected(shared_model(pattern), rows, [expert] * 3))
    model.unmerge_expert_vector()
    assert model.state_dict().keys() == weights.keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]), name
    for one, other in zip(feed(model, model.make_cache(), turns), base, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("pattern", ["llama", "paper"], ids=["untied", "tied"])
def test_a_head_that_changed_is_tuned_by_its_new_singular_vectors(pattern):
    """What a cache keeps of an expert, ready to use, belongs to the weights that it was made for."""
    model, row, expert = new_model(pattern), rows_of(pattern, 1)[0], shared_expert(pattern, 1)
    cache = model.make_cache()
    feed_row(model, cache, row[:5], expert_vector=expert)
    with torch.no_grad():
        model.lm_head.weight.copy_(model.lm_head.weight.flip(1).contiguous())
    wanted = reference_logits(model.state_dict(), model.config.to_dict(), [row], [dict(expert.vectors)])[0]
    assert_same_logits(feed_row(model, cache, row[5:]), wanted[5:])


@every_pattern
@every_cache
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_attention_implementations_agree_with_the_oracle(pattern, variant, attention):
    model, rows, rng = new_model(pattern), rows_of(pattern, 1), random.Random(73)
    model.set_attn_implementation(attention)
    cache, wanted = new_cache(model, variant), expected(shared_model(pattern), rows)
    assert_same_logits(feed(model, cache, ragged_turns(rng, rows, count=3)), wanted)
    assert_same_logits(feed_row(model, new_cache(model, variant), rows[0], [5, 1, 6]), wanted[0])


@every_random_pattern
@pytest.mark.parametrize("expert_seed", [None, 1], ids=["base", "expert"])
def test_gradient_checkpointing_leaves_gradients_as_they_are(pattern, expert_seed):
    expert = None if expert_seed is None else shared_expert(pattern, expert_seed)
    turn = padded_turn(random.Random(79), rows_of(pattern, 1))
    gradients, runs = [], []
    for checkpointing in (False, True):
        model = new_model(pattern).train()
        if checkpointing:  # its name changes within transformers 5
            getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)()
        first_norm = next(model.model.layers[1].children())
        first_norm.register_forward_pre_hook(lambda *_, on=checkpointing: runs.append(on))
        labels = turn.ids.masked_fill(~turn.mask, -100)
        mask = turn.mask.long()
        model(turn.ids, attention_mask=mask, labels=labels, use_cache=False, expert_vector=expert).loss.backward()
        gradients.append({name: parameter.grad for name, parameter in model.named_parameters()})
    assert runs == [False, True, True]  # forward, and with checkpointing once more on the way back
    for name, gradient in gradients[0].items():
        assert gradient.abs().max() > 0, name
        assert_same_logits(gradients[1][name], gradient)


@pytest.mark.parametrize("with_expert", [False, True], ids=["base", "expert"])
def test_one_graph_decodes_any_number_of_tokens_from_a_static_cache(with_expert):
    """`aot_eager` captures as any compiler does and spares the test the C++ one; so does the single layer."""
    torch._dynamo.reset()
    model, row = random_model(tiny_config("hybrid_sliding", layer_types=["hybrid_sliding"])), random_rows(1)[0]
    expert = random_expert(model, 1) if with_expert else None
    cache, wanted = new_cache(model, "static"), expected(model, [row], [expert])[0]
    found = feed_row(model, cache, row[:4], expert_vector=expert)
    torch._dynamo.utils.counters.clear()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    assert_same_logits(torch.cat([found, feed_row(compiled, cache, row[4:], [1] * 8)]), wanted)
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 1


@every_cache
def test_a_compiled_model_equals_the_eager_one(variant):
    torch._dynamo.reset()
    model, rows = random_model(tiny_config("hybrid_sliding", layer_types=["hybrid_sliding"])), random_rows(1)
    compiled, turns = torch.compile(model, backend="aot_eager"), ragged_turns(random.Random(75), rows, count=2)
    assert_same_logits(feed(compiled, new_cache(model, variant), turns), expected(model, rows))


def tensors_in(nested):
    """Every tensor inside dicts, lists and tuples."""
    if isinstance(nested, torch.Tensor):
        return [nested]
    children = nested.values() if isinstance(nested, dict) else nested if isinstance(nested, (list, tuple)) else []
    return [tensor for child in children for tensor in tensors_in(child)]


@without_kernels_too
@every_pattern
@every_cache
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bfloat16", "float16"])
def test_half_precision_runs_near_the_oracle_with_wide_states(pattern, variant, dtype):
    """Tolerance: about three times what roundings were seen to cost; a lost state or key costs much more."""
    model, rows = new_model(pattern, loudness=0.75).to(dtype), rows_of(pattern, 1)
    config, cache = model.config, new_cache(model, variant)
    found = feed(model, cache, ragged_turns(random.Random(83), rows, count=3))
    wanted = reference_logits(model.state_dict(), config.to_dict(), rows)
    assert_same_logits([logits.double() for logits in found], wanted, 0.05 if dtype is torch.bfloat16 else 0.01)
    specs = [mixer.state_specs() for mixer in model.modules() if hasattr(mixer, "state_specs")]
    stores = [layer.recurrent.state() for layer in cache.layers if layer.recurrent is not None]
    assert len(specs) == sum("recurrent" in config.mixers(layer) for layer in range(config.num_hidden_layers))
    for of_layer, states in zip(specs, stores, strict=True):
        for name, spec in of_layer.items():
            assert states[name].shape == (3, *spec.shape)
            assert states[name].dtype is (torch.float32 if spec.is_wide else dtype)


@every_random_pattern
def test_float16_does_not_overflow_on_wide_activations(pattern):
    """Activations of a few thousand are common in real models; their squares and sums leave float16."""
    config = tiny_config(pattern, tie_word_embeddings=False)
    model, rows = random_model(config, loudness=1.0), random_rows(1)
    with torch.no_grad():
        model.get_input_embeddings().weight.mul_(2000)
    model = model.to(torch.float16)
    found = feed(model, model.make_cache(), ragged_turns(random.Random(89), rows, count=3))
    wanted = reference_logits(model.state_dict(), config.to_dict(), rows)
    assert_same_logits([logits.double() for logits in found], wanted, 0.02)


def moved_by_roundings(state, config, rows, wanted):
    """How far roundings of the weights to float32 move the oracle's logits (tokens, vocabulary) of each row."""
    source, moved = torch.Generator().manual_seed(101), [torch.zeros(()) for _ in rows]
    for _ in range(4):
        rounded = {
            name: weight.double() * (1 + 2**-24 * torch.randn(weight.shape, generator=source, dtype=torch.float64))
            for name, weight in state.items()
        }
        found = reference_logits(rounded, config, rows)
        moved = [
            torch.maximum(most, (one - other).abs().amax(-1, keepdim=True))
            for most, one, other in zip(moved, found, wanted, strict=True)
        ]
    return moved


@without_kernels_too
@main_patterns
@every_cache
def test_float32_keeps_five_digits(pattern, variant):
    """One token of these rows nearly cancels before a norm, which multiplies any rounding by hundreds.

    Another order of additions in a kernel took it from 2e-6 to 1.4e-5, and roundings of the weights alone move the
    oracle by 1.1e-5 there. So each token is allowed five times what such roundings cost it.
    """
    model, rows = new_model(pattern, loudness=1.0).to(torch.float32), rows_of(pattern, 1)
    found = feed(model, new_cache(model, variant), ragged_turns(random.Random(97), rows, count=3))
    state, config = model.state_dict(), model.config.to_dict()
    wanted = reference_logits(state, config, rows)
    for one, other, moved in zip(found, wanted, moved_by_roundings(state, config, rows, wanted), strict=True):
        tolerance = torch.clamp(5 * moved, min=1e-5 * max(1.0, other.abs().max().item()))
        assert ((one.double() - other).abs() <= tolerance).all()


def test_a_turn_is_what_the_cases_say():
    """The generators of this file are honest: every real token is dealt once, in order, and pads do occur."""
    rows = random_rows(1)
    for seed in range(20):
        turns = ragged_turns(random.Random(seed), rows, count=4)
        dealt = [torch.cat([turn.ids[row, turn.mask[row]] for turn in turns]).tolist() for row in range(3)]
        assert dealt == rows
        assert any(not turn.mask.all() for turn in turns)
        assert all(isinstance(turn, Turn) for turn in turns)
