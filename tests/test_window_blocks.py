"""Attention with a window, in blocks of queries: any size keeps the laws, and no text is compared as a whole."""

import random

import pytest
import torch

from mambaformer import mixer_attention_masks_mambaformer as masks
from mambaformer.cache_retention_mambaformer import Retention, Span, make_layout
from oracle import assert_same_logits, expected
from patterns import CACHE_VARIANTS, tiny_config
from sequences import feed, feed_row, padded_turn, ragged_turns, random_rows
from tiny_models import every_cache, random_model, shared_model

WINDOWED = ["sliding", "sliding_sinks", "hybrid_sliding", "everything"]
every_windowed_pattern = pytest.mark.parametrize("pattern", WINDOWED)


@pytest.fixture(params=[1, 4], ids="at_least_{}".format)
def blocks(request, monkeypatch):
    """Blocks as small as the window, or of four queries; counts those that were made."""
    made = []
    whole = masks._query_blocks

    def counted(*args):
        for block in whole(*args):
            made.append(block)
            yield block

    monkeypatch.setattr(masks, "SMALLEST_BLOCK", request.param)
    monkeypatch.setattr(masks, "_query_blocks", counted)
    yield made
    assert len(made) > 1


@every_windowed_pattern
def test_without_a_cache_the_oracle_is_met(pattern, blocks):
    model, rows = shared_model(pattern), random_rows(1, (23, 17, 20))
    for side in ("left", "right", "any"):
        turn = padded_turn(random.Random(5), rows, extra=2, side=side)
        assert_same_logits(feed(model, None, [turn], use_cache=False), expected(model, rows))


@every_windowed_pattern
@every_cache
@pytest.mark.parametrize("seed", range(4))
def test_ragged_turns_of_any_length_meet_the_oracle(pattern, variant, seed, blocks):
    """Behind stored keys, with rows that rest, and with sinks that come in one turn or the next."""
    model, rng, rows = shared_model(pattern), random.Random(seed), random_rows(seed, (31, 17, 26))
    turns = ragged_turns(rng, rows, 3)
    cache = model.make_cache(**CACHE_VARIANTS[variant])
    assert_same_logits(feed(model, cache, turns), expected(model, rows))


@every_cache
def test_a_first_token_alone_leaves_the_other_sinks_to_the_next_turn(variant, blocks):
    model, (row, *_) = shared_model("sliding_sinks"), random_rows(2, (24, 1, 1))
    cache = model.make_cache(**CACHE_VARIANTS[variant])
    assert_same_logits(feed_row(model, cache, row, [1, 20, 3]), expected(model, [row])[0])


@every_windowed_pattern
def test_a_rollback_behind_blocks_is_exact(pattern, blocks):
    model, (row, *_) = shared_model(pattern), random_rows(3, (24, 1, 1))
    cache = model.make_cache(rollback_reach=6)
    feed_row(model, cache, row[:20])
    cache.crop(-4)
    assert_same_logits(feed_row(model, cache, row[16:], [8]), expected(model, [row])[0][16:])


def test_gradients_are_those_of_one_mask(monkeypatch):
    model, ids = random_model(tiny_config("everything")), torch.tensor([random_rows(4, (24, 1, 1))[0]])
    gradients = []
    for smallest in (128, 1):
        monkeypatch.setattr(masks, "SMALLEST_BLOCK", smallest)
        model.zero_grad()
        model(ids, labels=ids, use_cache=False).loss.backward()
        gradients.append([parameter.grad.clone() for parameter in model.parameters()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("retention", [Retention(200, 4), Retention(100, 0), Retention(128, 3, spare=8)])
@pytest.mark.parametrize("fed", [0, 2, 150, 900])
def test_blocks_are_the_mask_without_what_no_query_of_them_sees(retention, fed):
    """At their real size: what is left out is invisible, no key comes twice, and far fewer keys are compared."""
    span = Span(1000, start=fed, columns=fed)
    layout = make_layout(retention, span, torch.device("cpu"))
    queries, keys = span.positions(torch.device("cpu")), layout.key_positions
    mask = retention.is_visible(queries[0, :, None], keys[0])
    compared = 0
    for block in masks._query_blocks(retention, retention.window, layout.num_stored, queries, keys):
        columns = torch.cat([torch.arange(keys.shape[1])[part] for part in block.keys])
        assert len(columns) == len(set(columns.tolist()))
        assert torch.equal(block.mask[0, 0], mask[block.queries][:, columns])
        assert block.mask.sum() == mask[block.queries].sum()
        compared += block.mask.numel()
    assert compared < 0.55 * mask.numel()


def test_masks_moved_to_another_device_have_their_blocks_there():
    block = masks.QueryBlock(slice(0, 2), (slice(0, 1), slice(3, 5)), torch.ones(1, 1, 2, 3, dtype=torch.bool))
    attention = masks.AttentionMasks(blocks=(block,))
    (moved,) = attention.to("meta").blocks
    assert moved.mask.is_meta and moved.mask.shape == block.mask.shape
    assert (moved.queries, moved.keys) == (block.queries, block.keys) and not block.mask.is_meta
    assert masks.AttentionMasks().to("meta").mask is None
    assert masks.AttentionMasks(mask=block.mask).to("meta").mask.is_meta
