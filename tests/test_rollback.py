"""Law 3: after `crop`, as if the tokens had never been fed; and within the reach, without encoding anything again."""

import random

import pytest
import torch

from mambaformer import mixer_base_mambaformer as mixer_base
from mambaformer.cache_states_mambaformer import ReplaySegment
from oracle import assert_same_logits, expected, uncached_logits
from patterns import PATTERNS, VOCAB
from sequences import draw_row, feed, feed_row, one_turn, padded_turn, random_ids, random_rows, rows_of
from tiny_models import MODELS, TRAINED_SMALL, shared_expert, shared_model

REACH = 8
# How a cache comes by its reach: from the start, in mid-text, or not at all; the last two always encode again.
REACHES = {
    "recorded": {"rollback_reach": REACH},
    "activated": {},
    "dense": {},
    "static": {"storage": "static", "max_cache_len": 96},
}


class Text:
    """A batch in a cache, and what its rows are: tokens fed and not taken back."""

    def __init__(self, model, cache, num_rows, rng, experts=None):
        self.model, self.cache, self.rng, self.experts = model, cache, rng, experts
        self.columns = [[] for _ in range(num_rows)]  # per row: token ids, `None` for a pad

    @property
    def rows(self):
        return [[token for token in row if token is not None] for row in self.columns]

    def feed(self, lengths, is_padded=True):
        """Feeds `lengths[b]` new tokens to row b and compares their logits with the oracle's."""
        pieces = [draw_row(self.model, self.rng, length) for length in lengths]
        turn = padded_turn(self.rng, pieces) if is_padded else one_turn(pieces)
        found = feed(self.model, self.cache, [turn])
        for row, ids, mask in zip(self.columns, turn.ids.tolist(), turn.mask.tolist(), strict=True):
            row.extend(token if real else None for token, real in zip(ids, mask, strict=True))
        wanted = expected(self.model, self.rows, self.experts)
        for logits, all_logits, length in zip(found, wanted, lengths, strict=True):
            assert_same_logits(logits, all_logits[len(all_logits) - length :])

    def crop(self, removed):
        """Takes the last columns back: one number, or one a row."""
        each = [removed] * len(self.columns) if isinstance(removed, int) else removed
        self.cache.crop(-removed if isinstance(removed, int) else [-k for k in removed])
        width = len(self.columns[0])
        for row, k in zip(self.columns, each, strict=True):
            row[width - k :] = [None] * (k - min(each))
        assert self.cache.get_seq_length() == len(self.columns[0])


def make_text(pattern, reach, num_rows, seed):
    model, rng = shared_model(pattern), random.Random(seed)
    text = Text(model, model.make_cache(**REACHES[reach]), num_rows, rng)
    text.feed([12] * num_rows, is_padded=False)
    if reach == "activated":
        text.cache.activate_past_recording(REACH)
    return text


@pytest.mark.without_kernels_too
@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("pattern", MODELS)
def test_rolled_back_text_goes_on_as_if_never_fed(pattern, reach):
    """Drafts of several tokens of which some stay, single tokens, and crops of crops."""
    text = make_text(pattern, reach, 2, seed=0)
    for drafted, removed in [(5, 3), (1, 0), (4, 4), (6, 2), (1, 1), (3, 1)]:
        text.feed([drafted] * 2, is_padded=False)
        text.crop(removed)
        if reach == "recorded":
            assert text.cache.status != "stale"
    text.feed([1, 1], is_padded=False)
    text.crop(1)
    text.crop(2)
    text.feed([7, 7], is_padded=False)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("pattern", MODELS)
def test_rows_are_rolled_back_each_by_its_own_depth(pattern, reach):
    text = make_text(pattern, reach, 3, seed=1)
    for removed in ([3, 0, 1], [0, 2, 2], [4, 4, 1], [0, 0, 3]):
        text.feed([4, 4, 4], is_padded=False)
        text.crop(removed)
        if reach == "recorded":
            assert text.cache.status != "stale"
    text.feed([2, 2, 2], is_padded=False)


@pytest.mark.parametrize("reach", REACHES)
@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("seed", range(3))
def test_rollback_with_pads_anywhere(pattern, reach, seed):
    text = make_text(pattern, reach, 3, seed=10 + seed)
    rng = text.rng
    for _ in range(6):
        text.feed([rng.randint(0, 4) for _ in range(3)])
        width = len(text.columns[0])
        text.crop(rng.randint(0, 5) if rng.random() < 0.5 else [rng.randint(0, min(6, width - 1)) for _ in range(3)])
    text.feed([3, 1, 2])


@pytest.mark.parametrize("pattern", PATTERNS)
def test_everything_within_the_reach_comes_back_at_once(pattern):
    """However the tokens came in: in one long forward, one by one, or in pieces."""
    for sizes in ([30], [1] * 30, [20, 1, 1, 3, 1, 4], [3] * 10):
        text = Text(shared_model(pattern), shared_model(pattern).make_cache(rollback_reach=REACH), 1, random.Random(2))
        for size in sizes:
            text.feed([size], is_padded=False)
        text.crop(REACH)
        assert text.cache.status != "stale"
        text.feed([5], is_padded=False)


@pytest.mark.parametrize("pattern", MODELS)
def test_a_prompt_of_uneven_rows_longer_than_the_reach(pattern):
    text = Text(shared_model(pattern), shared_model(pattern).make_cache(rollback_reach=REACH), 3, random.Random(3))
    text.feed([20, 9, 15])
    text.feed([3, 3, 3], is_padded=False)
    text.crop([3, 0, 1])
    assert text.cache.status != "stale"
    text.crop(5)
    text.feed([2, 2, 2], is_padded=False)


@pytest.mark.parametrize("pattern", ["mamba", "sliding_sinks", "everything", *TRAINED_SMALL])
def test_surgery_takes_the_past_along(pattern):
    text = make_text(pattern, "recorded", 3, seed=4)
    text.feed([5, 5, 5], is_padded=False)
    order = [2, 0, 0]
    text.cache.reorder_cache(torch.tensor(order))
    text.columns = [list(text.columns[row]) for row in order]
    text.crop([4, 1, 3])
    assert text.cache.status != "stale"
    text.feed([2, 2, 2], is_padded=False)


@pytest.mark.parametrize("pattern", ["mamba", "sliding_sinks", "everything"])
@pytest.mark.parametrize("reach", REACHES)
def test_a_fork_rolls_back_alone(pattern, reach):
    text = make_text(pattern, reach, 2, seed=5)
    text.feed([3, 3], is_padded=False)
    fork = Text(text.model, text.cache.fork(), 2, text.rng)
    fork.columns = [list(row) for row in text.columns]
    fork.crop([2, 3])
    text.feed([2, 2], is_padded=False)
    fork.feed([4, 4], is_padded=False)
    text.crop(4)
    fork.feed([1, 1], is_padded=False)
    text.feed([3, 3], is_padded=False)


@pytest.mark.parametrize("pattern", ["mamba", "hybrid", "everything"])
@pytest.mark.parametrize("options", [{}, {"state_bits": 8}])
def test_a_fork_that_returns_to_a_checkpoint_leaves_the_origins_checkpoint(pattern, options):
    """The fork took the checkpoint's states as its own, and wrote the states of its next tokens into both."""
    model, row = shared_model(pattern), rows_of(pattern, 7, [26])[0]
    cache = model.make_cache(rollback_reach=3, **options)
    feed_row(model, cache, row[:20])
    fork = cache.fork()
    fork.crop(-3)
    feed_row(model, fork, [1, 2])
    cache.crop(-2)
    assert cache.status == "current"
    found = feed_row(model, cache, row[20:])
    assert_same_logits(found, expected(model, [row[:18] + row[20:]], **options)[0][18:])


@pytest.mark.parametrize("pattern", ["mamba", "hybrid_sliding", "everything", *TRAINED_SMALL])
def test_embeddings_come_back_within_the_reach_and_nothing_changes_beyond_it(pattern):
    """What was fed as embeddings is not remembered, so beyond the reach there is nothing to encode again."""
    model = shared_model(pattern)
    row = rows_of(pattern, 6, [30])[0]
    embeds = model.get_input_embeddings()(torch.tensor([row[:20]]))
    cache = model.make_cache(rollback_reach=REACH)
    with torch.no_grad():
        model(inputs_embeds=embeds, past_key_values=cache)
        model(torch.tensor([row[20:25]]), past_key_values=cache)
        with pytest.raises(ValueError, match="inputs_embeds"):
            cache.crop(-REACH - 10)
        cache.crop(-7)
        found = model(torch.tensor([row[18:]]), past_key_values=cache).logits[0]
    assert_same_logits(found, expected(model, [row])[0][18:])


def test_a_text_of_two_experts_comes_back_within_the_reach():
    """It cannot be encoded again; only its recorded past can take it back."""
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    row = random_rows(7, [22])[0]
    cache = model.make_cache(on_expert_change="continue", rollback_reach=REACH)
    with torch.no_grad():
        model(torch.tensor([row[:10]]), past_key_values=cache)
        model(torch.tensor([[*row[10:16], 1, 2, 3]]), past_key_values=cache, expert_vector=expert)
        cache.crop(-3)
        found = model(torch.tensor([row[16:]]), past_key_values=cache).logits[0]
        with pytest.raises(ValueError, match="rollback_reach"):
            cache.crop(-20)
    assert_same_logits(found, expected(model, [row], [[(0, None), (10, expert)]])[0][16:])


@torch.no_grad()
@pytest.mark.parametrize("num_tokens", [3, 20])
def test_one_segment_is_recorded_per_layer_and_only_of_tokens_within_the_reach(num_tokens, monkeypatch):
    """A segment of the tokens beyond the reach was recorded too, with a copy of their inputs, and dropped."""
    model, segments = shared_model("mamba"), []

    def counted(*fields):
        segments.append(ReplaySegment(*fields))
        return segments[-1]

    monkeypatch.setattr(mixer_base, "ReplaySegment", counted)
    model(torch.ones(2, num_tokens, dtype=torch.long), cache=model.make_cache(rollback_reach=REACH))
    assert [segment.num_tokens for segment in segments] == [min(num_tokens, REACH)] * model.config.num_hidden_layers


def test_a_window_that_is_widened_late_does_not_promise_what_it_lost():
    model = shared_model("sliding")
    text = Text(model, model.make_cache(), 1, random.Random(8))
    text.feed([20], is_padded=False)
    text.cache.activate_past_recording(REACH)
    text.crop(1)
    assert text.cache.status == "stale"  # the ring of five had overwritten the key that is needed again
    text.feed([REACH], is_padded=False)
    text.crop(REACH)
    assert text.cache.status != "stale"
    text.feed([4], is_padded=False)


def test_crops_that_add_up_beyond_the_reach_of_a_window():
    model = shared_model("sliding")
    text = Text(model, model.make_cache(rollback_reach=REACH), 1, random.Random(9))
    text.feed([30], is_padded=False)
    text.crop(5)
    text.feed([2], is_padded=False)
    text.crop(5)
    assert text.cache.status != "stale"
    text.crop(1)
    assert text.cache.status == "stale"
    text.feed([3], is_padded=False)


def test_what_is_recorded_stays_small():
    """One token at a time for long: the past holds about the reach, not the text."""
    model = shared_model("mamba")
    cache = model.make_cache(rollback_reach=REACH)
    sizes = []
    with torch.inference_mode():
        for _ in range(60):
            model(torch.tensor([[1]]), past_key_values=cache)
            sizes.append(cache.report()["linear_attention"]["past"])
    assert max(sizes[30:]) == max(sizes[:30])
    state_of_a_layer = cache.report()["linear_attention"]["ssm"]
    assert max(sizes) < 2 * (REACH + 8) * state_of_a_layer


@pytest.mark.slow
def test_a_compiled_forward_that_records_nothing_ends_the_past():
    """Were it kept, `crop` would run the tokens of the eager forwards again, and take the rest for never fed."""
    torch.compiler.reset()
    model, row = shared_model("mamba"), random_rows(12, [16])[0]
    cache = model.make_cache(rollback_reach=REACH)
    feed_row(model, cache, row[:8])
    feed_row(torch.compile(model, backend="aot_eager"), cache, row[8:12])
    cache.crop(-6)
    assert_same_logits(feed_row(model, cache, row[6:]), expected(model, [row])[0][6:])
    torch.compiler.reset()


def test_a_row_that_was_fed_little_keeps_the_start_of_its_window():
    """The row that was fed the most says nothing about the keys that another one has lost."""
    model = shared_model("sliding")
    text = Text(model, model.make_cache(rollback_reach=REACH), 2, random.Random(13))
    text.feed([30, 30], is_padded=False)
    text.crop(5)
    text.feed([6, 1])
    text.crop([0, 12])  # the second row loses seven tokens, and was four further before
    assert text.cache.status == "stale"
    text.feed([2, 2], is_padded=False)


@pytest.mark.parametrize("is_reset", [False, True])
def test_a_window_that_is_filled_anew_has_never_been_further(is_reset):
    """Were it still thought to have been, tokens within the reach would cost an encoding of all the others."""
    model = shared_model("sliding")
    text = Text(model, model.make_cache(rollback_reach=REACH), 1, random.Random(14))
    text.feed([30], is_padded=False)
    text.crop(25)
    assert text.cache.status == "stale"
    if is_reset:
        text.cache.reset()
        text.columns = [[]]
    text.feed([4], is_padded=False)
    text.crop(2)
    assert text.cache.status != "stale"
    text.feed([3], is_padded=False)


def test_a_loaded_window_knows_how_far_it_has_been(tmp_path):
    """What the tokens that were taken back had overwritten is not in the file either."""
    model = shared_model("sliding")
    text = Text(model, model.make_cache(rollback_reach=REACH), 1, random.Random(15))
    text.feed([30], is_padded=False)
    text.crop(5)
    text.cache.save(tmp_path / "session.safetensors")
    text.cache = model.load_cache(tmp_path / "session.safetensors")
    text.crop(5)
    assert text.cache.status == "stale"
    text.feed([3], is_padded=False)


def test_a_change_of_expert_that_fails_leaves_a_window_as_far_as_it_has_been(monkeypatch):
    """Emptied for the new expert, it had never been further; the text that comes back has been."""
    model, ids = shared_model("sliding"), torch.tensor(random_rows(18, [30]))
    cache = model.make_cache(on_expert_change="reset", rollback_reach=REACH)
    with torch.no_grad():
        model(inputs_embeds=model.get_input_embeddings()(ids), past_key_values=cache)
        cache.crop(-5)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(model.model.norm, "forward", lambda _: 1 / 0)
            model(ids[:, 25:], past_key_values=cache, expert_vector=shared_expert("sliding", 1))
        with pytest.raises(ValueError, match="inputs_embeds"):
            cache.crop(-5)
        found = model(ids[:, 25:], past_key_values=cache).logits[0]
    assert_same_logits(found, expected(model, ids.tolist())[0][25:])


def test_what_is_recorded_keeps_no_prompt_in_memory():
    """Views of the prompt's inputs look small and keep all of them alive."""
    model, sizes = shared_model("mamba"), []
    for length in (20, 200):
        cache = model.make_cache(rollback_reach=REACH)
        feed_row(model, cache, random_rows(16, [length])[0])
        recorded = [
            tensor for layer in cache.layers for one in layer.recurrent.segments for tensor in one.inputs.values()
        ]
        sizes.append(sum(tensor.untyped_storage().nbytes() for tensor in recorded))
    assert sizes[0] == sizes[1]


@pytest.mark.parametrize("wrong", [3, -21, [-1, -2], [-1, 1, 0], torch.tensor([-1.5, 0, 0]), [[-1], [0], [0]]])
def test_a_crop_that_cannot_be_is_refused(wrong):
    text = make_text("everything", "recorded", 3, seed=10)
    with pytest.raises(ValueError, match="takes -k for the last k columns, with k at most 12"):
        text.cache.crop(wrong)
    text.feed([3, 3, 3], is_padded=False)


@pytest.mark.parametrize("wrong", [-1, 2.5, "8"])
def test_a_reach_that_is_no_count_is_refused(wrong):
    with pytest.raises(ValueError, match="rollback_reach"):
        shared_model("mamba").make_cache(rollback_reach=wrong)


@pytest.mark.parametrize("pattern", MODELS)
def test_a_saved_text_can_be_rolled_back_after_it_is_loaded(pattern, tmp_path):
    """Windows come back at once, Mamba states by encoding again: their past is not in the file."""
    text = make_text(pattern, "recorded", 2, seed=11)
    text.feed([9, 7])
    text.crop([2, 3])
    text.cache.save(tmp_path / "session.safetensors")
    text.cache = text.model.load_cache(tmp_path / "session.safetensors")
    assert text.cache.rollback_reach == REACH
    text.crop([1, 4])
    text.feed([3, 3])


def test_a_static_cache_of_inference_mode_rolls_back_outside_of_it():
    """`crop` wrote into the clock's tensor, which inference mode had made."""
    model, ids = shared_model("everything"), random_ids()
    cache = model.make_cache("static", max_cache_len=20)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    cache.crop(-4)
    with torch.no_grad():
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])


@pytest.mark.parametrize("pattern", ["mamba", "hybrid", "everything"])
@pytest.mark.parametrize("reach", [1, 2, 3])
def test_a_forward_longer_than_the_reach_starts_the_record_again(pattern, reach):
    """Its last tokens were put behind older ones, as if those between had never been: silently wrong states."""
    model, ids = shared_model(pattern), random_ids()
    for removed in (1, 2, 4):
        cache = model.make_cache(rollback_reach=reach)
        with torch.no_grad():
            model(ids[:, :3], past_key_values=cache)
            model(ids[:, 3:7], past_key_values=cache)
            cache.crop(-removed)
            assert_same_logits(
                model(ids[:, 7 - removed :], past_key_values=cache).logits,
                uncached_logits(model, ids)[:, 7 - removed :],
            )


def test_removed_tokens_are_not_kept_in_memory():
    """The segment that was cut short was a view of the whole one."""
    model = shared_model("mamba")
    cache = model.make_cache(rollback_reach=64)
    with torch.no_grad():
        model(torch.randint(VOCAB, (2, 60)), past_key_values=cache)
    cache.crop(-50)
    for layer in cache.layers:
        for segment in layer.recurrent.segments:
            for tensor in segment.inputs.values():
                assert tensor.untyped_storage().nbytes() == tensor.nbytes
