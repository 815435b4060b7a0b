"""`inputs_embeds` behind a filled cache, in `forward` and in `generate`: as one forward over the whole sequence."""

import pytest
import torch

from patterns import CACHE_VARIANTS, VOCAB, tiny_config
from sequences import random_ids, random_rows
from tiny_models import random_expert, random_model, shared_model

PATTERNS = ["mamba", "full", "sliding_sinks", "hybrid_sliding", "everything"]
NUM_NEW, NUM_CACHED = 5, 7
# The pad token is no token of the vocabulary: `generate` takes what looks like it in a prompt for padding.
GREEDY = {"do_sample": False, "pad_token_id": VOCAB, "max_new_tokens": 4}


class Sequences:
    """Two sequences, perhaps with pads on the left, of which the first columns are cached."""

    def __init__(self, pattern, num_pads=0, num_columns=12):
        self.model = shared_model(pattern)
        self.ids = torch.tensor(random_rows(31, (num_columns, num_columns)))
        self.mask = torch.ones_like(self.ids)
        self.mask[1, :num_pads] = 0
        self.embeds = self.embed(self.ids)

    @torch.no_grad()
    def embed(self, ids):
        return self.model.get_input_embeddings()(ids)

    def cache(self, num_cached=NUM_CACHED, is_embedded=False, **options):
        cache = self.model.make_cache(**options)
        fed = {"inputs_embeds": self.embeds} if is_embedded else {"input_ids": self.ids}
        fed = {name: tensor[:, :num_cached] for name, tensor in fed.items()}
        with torch.no_grad():
            self.model(**fed, attention_mask=self.mask[:, :num_cached], cache=cache)
        return cache

    @torch.no_grad()
    def answer(self, num_tokens=4, **kwargs):
        """Greedy decoding by uncached forwards over whole sequences."""
        embeds, mask, said = self.embeds, self.mask, []
        for _ in range(num_tokens):
            logits = self.model(inputs_embeds=embeds, attention_mask=mask, use_cache=False, **kwargs).logits[:, -1]
            said.append(logits.argmax(-1, keepdim=True))
            embeds = torch.cat([embeds, self.embed(said[-1])], dim=1)
            mask = torch.nn.functional.pad(mask, (0, 1), value=1)
        return torch.cat(said, dim=1).tolist()


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("storage", CACHE_VARIANTS)
@pytest.mark.parametrize("num_pads", [0, 3], ids=["full", "padded"])
def test_a_forward_of_embeddings_behind_a_cache_equals_one_forward(pattern, storage, num_pads):
    seq = Sequences(pattern, num_pads)
    with torch.no_grad():
        wanted = seq.model(seq.ids, attention_mask=seq.mask, use_cache=False).logits
        for is_embedded in (False, True):
            for width in (NUM_NEW, NUM_CACHED + NUM_NEW):
                cache = seq.cache(is_embedded=is_embedded, **CACHE_VARIANTS[storage])
                found = seq.model(
                    inputs_embeds=seq.embeds[:, NUM_CACHED:], attention_mask=seq.mask[:, -width:], cache=cache
                ).logits
                same(found, wanted[:, NUM_CACHED:])


GIVEN = {
    "the new part": lambda seq, cached: {"inputs_embeds": seq.embeds[:, cached:]},
    "the new part with its mask": lambda seq, cached: {
        "inputs_embeds": seq.embeds[:, cached:],
        "attention_mask": seq.mask[:, cached:],
    },
    "the new part with a mask of all": lambda seq, cached: {
        "inputs_embeds": seq.embeds[:, cached:],
        "attention_mask": seq.mask,
    },
    "the whole sequence": lambda seq, cached: {"inputs_embeds": seq.embeds},
    "the whole sequence with its mask": lambda seq, cached: {"inputs_embeds": seq.embeds, "attention_mask": seq.mask},
    "the new part, and all ids": lambda seq, cached: {
        "inputs_embeds": seq.embeds[:, cached:],
        "input_ids": seq.ids,
        "attention_mask": seq.mask,
    },
    "the new part, and its ids": lambda seq, cached: {
        "inputs_embeds": seq.embeds[:, cached:],
        "input_ids": seq.ids[:, cached:],
    },
}


@pytest.mark.parametrize("given", GIVEN)
@pytest.mark.parametrize("num_cached", [1, 4, 6, 7, 11], ids="after {}".format)
def test_generate_goes_on_by_embeddings_from_a_filled_cache(given, num_cached):
    """Transformers took all `inputs_embeds` for the whole sequence: the first ones of a new part were lost.

    Logits were off by 6.4, and a part shorter than the cached one was refused for empty `input_ids`.
    """
    # Older Transformers makes a mask of ones for a whole sequence without one, which contradicts cached pads.
    for num_pads in (0, 0 if given == "the whole sequence" else min(num_cached, 3)):
        seq = Sequences("everything", num_pads)
        for is_embedded in (False, True):
            cache = seq.cache(num_cached, is_embedded)
            arguments = GIVEN[given](seq, num_cached)
            found = seq.model.generate(cache=cache, **arguments, **GREEDY)
            num_ids = arguments["input_ids"].shape[1] if "input_ids" in arguments else 0
            assert found[:, num_ids:].tolist() == seq.answer()
            assert cache.get_seq_length() == 12 + 3


@pytest.mark.parametrize("pattern", PATTERNS)
@pytest.mark.parametrize("kind", ["dense", "dense by its older name", "static"])
def test_generate_of_embeddings_behind_every_cache_and_pattern(pattern, kind):
    seq = Sequences(pattern, num_pads=3)
    name = "past_key_values" if "older" in kind else "cache"
    cache = seq.cache(**CACHE_VARIANTS[kind.split()[0]])
    new = {"inputs_embeds": seq.embeds[:, NUM_CACHED:], "attention_mask": seq.mask}
    assert seq.model.generate(**new, **{name: cache}, **GREEDY).tolist() == seq.answer()


def test_beams_and_several_answers_go_on_by_embeddings():
    seq, beams = Sequences("everything"), {"num_beams": 3, "num_return_sequences": 2}
    wanted = seq.model.generate(inputs_embeds=seq.embeds, **GREEDY, **beams)
    for embeds in (seq.embeds, seq.embeds[:, NUM_CACHED:]):
        cache = seq.cache()
        cache.batch_repeat_interleave(3)
        assert torch.equal(seq.model.generate(inputs_embeds=embeds, cache=cache, **GREEDY, **beams), wanted)


def test_chunks_of_a_prompt_of_embeddings_are_refused_for_what_they_are():
    """The library cuts ids, of which there are none: a mask of no columns was refused in the middle of a prefill."""
    seq = Sequences("everything", num_pads=3)
    for cache in (None, seq.cache()):
        with pytest.raises(ValueError, match="`prefill_chunk_size` cuts `input_ids`"):
            seq.model.generate(
                inputs_embeds=seq.embeds, attention_mask=seq.mask, prefill_chunk_size=3, cache=cache, **GREEDY
            )
        assert cache is None or cache.get_seq_length() == NUM_CACHED


def test_a_change_of_expert_encodes_the_cached_ids_again_under_new_embeddings():
    seq = Sequences("everything", num_pads=3)
    expert = random_expert(seq.model, 1)
    for embeds in (seq.embeds, seq.embeds[:, NUM_CACHED:]):
        cache = seq.cache()
        found = seq.model.generate(
            inputs_embeds=embeds, attention_mask=seq.mask, cache=cache, expert_vector=expert, **GREEDY
        )
        assert found.tolist() == seq.answer(expert_vector=expert)


def test_turns_of_embeddings_and_of_ids_follow_each_other(tmp_path):
    """Copies, rows and saved sessions know which embeddings they hold, so the whole sequence is told from a part."""
    seq = Sequences("everything", num_pads=3)
    for change in (
        lambda cache: cache.fork(),
        lambda cache: cache.batch_repeat_interleave(2) or cache.batch_select_indices(torch.tensor([0, 2])) or cache,
        lambda cache: cache.save(tmp_path / "session") or seq.model.load_cache(tmp_path / "session"),
        lambda cache: (seq.model(seq.ids[:, 8:9], cache=cache), cache.crop(-1), cache)[-1],
    ):
        for embeds in (seq.embeds, seq.embeds[:, 8:]):
            with torch.no_grad():
                cache = change(seq.cache(is_embedded=True, rollback_reach=4))
                seq.model(seq.ids[:, 7:8], cache=cache)
                found = seq.model.generate(inputs_embeds=embeds, attention_mask=seq.mask, cache=cache, **GREEDY)
            assert found.tolist() == seq.answer()


def test_a_prompt_that_could_be_either_is_refused_before_the_cache_changes():
    seq = Sequences("everything", num_columns=20)
    almost = seq.embeds.clone()
    almost[0, 2] += 1
    bad = {
        "neither": {"inputs_embeds": almost},
        "with its mask": {"inputs_embeds": almost, "attention_mask": seq.mask},
        "a mask of another width": {"inputs_embeds": seq.embeds, "attention_mask": seq.mask[:, :9]},
    }
    for is_embedded in (False, True):
        for name, arguments in bad.items():
            cache = seq.cache(is_embedded=is_embedded)
            with pytest.raises(ValueError, match=r"`attention_mask` .*\(2, 27\)"):
                seq.model.generate(cache=cache, **arguments, **GREEDY)
            assert cache.get_seq_length() == NUM_CACHED, name


def test_ids_with_a_mask_that_fits_neither_form_are_refused():
    """All ids with the mask of the new ones fed the cached tokens a second time: logits off by 6.6."""
    seq, cache = Sequences("everything"), None
    for width in (NUM_NEW, NUM_NEW + 1, 30):
        cache = seq.cache()
        mask = torch.ones(2, width, dtype=torch.long)
        with pytest.raises(ValueError, match=r"`attention_mask` .*\(2, 19\)"):
            seq.model.generate(seq.ids, attention_mask=mask, cache=cache, **GREEDY)
        assert cache.get_seq_length() == NUM_CACHED


def test_a_filled_cache_without_a_prompt_is_refused():
    """A token that nobody gave, `bos_token_id`, was sliced away, and the empty rest was refused."""
    model = random_model(tiny_config("paper", bos_token_id=1))
    cache = model.make_cache()
    model(torch.tensor([[3, 4]]), cache=cache)
    with pytest.raises(ValueError, match="pass the new tokens"):
        model.generate(cache=cache, **GREEDY)
    assert cache.get_seq_length() == 2


def test_nan_at_a_pad_of_embeddings_never_reaches_a_real_token():
    """NaN at a pad passed through attention, since 0 * NaN is NaN."""
    model, ids = shared_model("everything"), random_ids()
    embeds = model.get_input_embeddings()(ids).detach()
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    clean = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    embeds[0, 4] = float("nan")
    found = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    assert torch.equal(found[mask.bool()], clean[mask.bool()])
