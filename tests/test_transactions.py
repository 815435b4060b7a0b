"""A forward is a transaction: one that fails, or any call that is refused, leaves the cache as it was."""

import ctypes

import pytest
import torch

from oracle import assert_same_logits, expected, uncached_logits
from patterns import VOCAB, tiny_config
from sequences import feed_row, random_ids, rows_of
from tiny_models import every_cache, main_patterns, new_cache, new_model, random_model, shared_expert, shared_model


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


@every_cache
@pytest.mark.parametrize("policy", ["recompute", "reset", "continue"])
def test_a_failed_forward_leaves_sequence_and_expert_vector_as_they_were(policy, variant, monkeypatch):
    """A forward that failed under a new expert: the expert was in force already, and "reset" had dropped the text."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), random_ids()
    cache = new_cache(model, variant, on_expert_change=policy)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(model.model.embed_tokens, "forward", lambda: None)
            model(ids[:, 5:], past_key_values=cache, expert_vector=expert)
        assert cache.get_seq_length() == 5 and cache.expert_vector is None and not cache.provenance.is_mixed
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])


def test_a_failed_layer_leaves_the_cache_usable(monkeypatch):
    """Layers before the failing one had taken in their keys and states already."""
    model, ids = random_model(tiny_config("everything")), random_ids()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        for length in (1, 3):
            with monkeypatch.context() as patch:
                patch.setattr(model.model.layers[-1].self_attn, "scaling", "no number")
                with pytest.raises((TypeError, ctypes.ArgumentError)):  # of PyTorch, and of a CPU kernel
                    model(ids[:, 6 : 6 + length], past_key_values=cache)
        assert_same_logits(model(ids[:, 6:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 6:])


@every_cache
def test_embeddings_survive_a_failed_switch_under_reset(variant, monkeypatch):
    """ "reset" drops the text, but only once the forward that follows has succeeded."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), random_ids()
    cache = new_cache(model, variant, on_expert_change="reset")
    with torch.no_grad():
        model(inputs_embeds=model.model.embed_tokens(ids[:, :5]), past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(model.model.norm, "forward", lambda _: 1 / 0)
            model(ids[:, 5:], past_key_values=cache, expert_vector=expert)
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])


def test_a_dropped_sequence_stays_dropped_when_a_later_forward_fails(monkeypatch):
    """What is kept aside until a change of expert has succeeded is let go then."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), random_ids()
    cache = model.make_cache(on_expert_change="reset")
    with torch.no_grad():
        model(inputs_embeds=model.model.embed_tokens(ids[:, :7]), past_key_values=cache)
        model(ids[:, :4], past_key_values=cache, expert_vector=expert)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(model.model.norm, "forward", lambda _: 1 / 0)
            model(ids[:, 4:], past_key_values=cache)
        assert_same_logits(
            model(ids[:, 4:], past_key_values=cache).logits, uncached_logits(model, ids, expert_vector=expert)[:, 4:]
        )


def test_recording_can_start_after_a_failed_forward(monkeypatch):
    """Rings that were emptied for encoding again had no slot to be widened from."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), random_ids()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(model.model.norm, "forward", lambda _: 1 / 0)
            model(ids[:, 7:], past_key_values=cache, expert_vector=expert)
        cache.activate_past_recording(3)
        assert_same_logits(model(ids[:, 7:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 7:])


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("no memory")


@every_cache
def test_a_commit_or_reordering_cut_short_costs_a_recompute_only(variant, monkeypatch):
    """Some layers had moved on and others not, and the cache said that it was up to date."""
    model, ids = shared_model("everything"), random_ids()
    other = ids.flip(1)
    with torch.no_grad():
        cache = new_cache(model, variant)
        model(torch.cat([ids, other])[:, :5], past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(cache.history, "append", out_of_memory)
            model(torch.cat([ids, other])[:, 5:7], past_key_values=cache)
        both = model(torch.cat([ids, other])[:, 5:7], past_key_values=cache).logits
        assert_same_logits(both[:1], uncached_logits(model, ids[:, :7])[:, 5:])
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(cache.layers[3].attention, "select_rows", out_of_memory)
            cache.reorder_cache(torch.tensor([1, 0]))
        both = model(torch.cat([other, ids])[:, 7:], past_key_values=cache).logits
        assert_same_logits(both[:1], uncached_logits(model, other)[:, 7:])
        assert_same_logits(both[1:], uncached_logits(model, ids)[:, 7:])


def test_a_rollback_cut_short_costs_a_recompute_only(monkeypatch):
    model, ids = shared_model("everything"), random_ids()
    with torch.no_grad():
        cache = model.make_cache(rollback_reach=4)
        model(ids, past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(cache.layers[3].recurrent, "crop", out_of_memory)
            cache.crop(-2)
        columns = cache.get_seq_length()
        assert_same_logits(
            model(ids[:, columns - 9 :], past_key_values=cache).logits[:, -1], uncached_logits(model, ids)[:, -1]
        )


def test_a_misfit_expert_vector_is_refused_before_the_sequence_is_dropped():
    """`set_expert_vector` took anything, and under "reset" the text was gone when the next forward complained."""
    model, ids = shared_model("everything"), random_ids()
    cache = model.make_cache(on_expert_change="reset")
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match="does not have"):
            cache.set_expert_vector({"x": torch.tensor([0.5, 2.0])})
        with pytest.raises(ValueError, match="2 entries but the cache has 1 rows"):
            cache.set_expert_vector([None, None])
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.activate_past_recording(9.5), "`rollback_reach` must be an integer of at least 0"),
        (lambda cache: cache.activate_past_recording(-3), "`rollback_reach` must be an integer of at least 0"),
        (lambda cache: cache.crop("x"), "takes -k"),
        (lambda cache: cache.crop(None), "takes -k"),
        (lambda cache: cache.crop([-1]), "takes -k"),
        (lambda cache: cache.select_rows([2]), "rows 0 to 1"),
        (lambda cache: cache.select_rows([]), "rows 0 to 1"),
        (lambda cache: cache.batch_select_indices(torch.tensor([5])), "rows 0 to 1"),
    ],
)
def test_calls_that_make_no_sense_are_refused_and_change_nothing(call, message):
    """Some were taken, some failed in the middle of PyTorch."""
    model, ids = shared_model("everything"), random_ids()
    cache = model.make_cache(rollback_reach=4)
    with torch.no_grad():
        model(ids[:, :5].expand(2, -1), past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            call(cache)
        assert cache.rollback_reach == 4
        assert_same_logits(
            model(ids[:, 5:].expand(2, -1), past_key_values=cache).logits[:1], uncached_logits(model, ids)[:, 5:]
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logits_to_keep": torch.tensor([9])}, "must be indices"),
        ({"logits_to_keep": torch.tensor([-5])}, "must be indices"),
        ({"logits_to_keep": torch.tensor([[0]])}, "must be indices"),
        ({"logits_to_keep": -1}, "number of tokens"),
        ({"logits_to_keep": 1.5}, "number of tokens"),
        ({"labels": torch.ones(1, 7, dtype=torch.long)}, r"must be \(1, 4\)"),
        ({"labels": torch.full((1, 4), VOCAB)}, "token ids below"),
        ({"labels": torch.full((1, 4), -1)}, "token ids below"),
        ({"labels": torch.ones(1, 4, dtype=torch.long), "logits_to_keep": 2}, "leave `logits_to_keep` out"),
        ({"labels": torch.ones(1, 4, dtype=torch.long), "logits_to_keep": torch.arange(4)}, "leave `logits_to_keep`"),
        ({"logits_to_keep": torch.tensor([0.0, 1.0])}, "must be indices"),
        ({"logits_to_keep": torch.tensor([True, False])}, "must be indices"),
        ({"labels": torch.ones(1, 4)}, "and integers, got torch.float32"),
        ({"labels": torch.ones(1, 4, dtype=torch.bool)}, "and integers, got torch.bool"),
        ({"labels": [[1, 2, 3, 4]]}, "and integers, got a list"),
        ({"position_ids": [[5, 6, 7, 8]]}, "got a list"),
        ({"labels": torch.ones(1, 4, dtype=torch.long), "shift_labels": torch.ones(1, 3, dtype=torch.long)}, "shift_"),
        ({"labels": torch.ones(1, 4, dtype=torch.long), "shift_labels": torch.full((1, 4), VOCAB)}, "`shift_labels`"),
    ],
)
def test_a_head_that_cannot_answer_refuses_before_the_cache_is_fed(options, message):
    """The stack had committed its four tokens by the time the head failed, in PyTorch for labels that are floats."""
    model, ids = shared_model("everything"), random_ids()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            model(ids[:, 5:], past_key_values=cache, **options)
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])


@pytest.mark.parametrize("rows", [[-1, -2], [0, 2], [[0, 1]]])
def test_rows_that_do_not_exist_are_refused_before_anything_moves(rows):
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), random_ids()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5].expand(2, -1), past_key_values=cache, expert_vector=[expert, None])
        with pytest.raises(ValueError, match="rows 0 to 1"):
            cache.reorder_cache(torch.tensor(rows))
        found = model(ids[:, 5:].expand(2, -1), past_key_values=cache).logits
        assert_same_logits(found[:1], uncached_logits(model, ids, expert_vector=expert)[:, 5:])
        assert_same_logits(found[1:], uncached_logits(model, ids)[:, 5:])
