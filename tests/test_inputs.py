"""Arguments that do not fit are refused by name, with the next step, before any state has changed."""

import pytest
import torch

from mambaformer import MambaFormerForSequenceClassification
from patterns import VOCAB
from sequences import random_ids
from tiny_models import shared_expert, shared_model

IDS = torch.tensor([[3, 7, 1, 12], [5, 9, 2, 8]])


def classifier():
    model = shared_model("everything").model
    made = MambaFormerForSequenceClassification(model.config).to(torch.float64).eval()
    made.model.load_state_dict(model.state_dict())
    return made


def models():
    return [shared_model("everything"), shared_model("everything").model, classifier()]


MISSPELT = {
    "expert_vectors": ("expert_vector", {"lm_head": torch.ones(1)}),
    "attention_maks": ("attention_mask", torch.tensor([[1, 1, 1, 0], [1, 1, 1, 1]])),
    "cache_params": ("cache", None),
    "past_key_value": ("cache", None),
    "position_id": ("position_ids", torch.arange(4)[None]),
    "input_embeds": ("inputs_embeds", None),
    "seq_id": ("seq_idx", torch.zeros(2, 4, dtype=torch.int32)),
    "cu_seqlen_q": ("cu_seqlens_q", torch.tensor([0, 2, 8])),
}


@pytest.mark.parametrize("name", MISSPELT)
def test_a_misspelt_argument_is_named_with_the_one_that_was_meant(name):
    """`model(ids, expert_vectors=e)` vanished in `**kwargs`: the base answered, and nobody was told."""
    meant, value = MISSPELT[name]
    for model in models():
        cache = model.make_cache()
        with pytest.raises(TypeError, match=f"no argument `{name}`: did you mean `{meant}`"):
            model(IDS, cache=cache, **{name: value})
        assert cache.get_seq_length() == 0


def test_an_argument_that_resembles_none_gets_the_list_of_all():
    with pytest.raises(TypeError, match="no argument `zzz`: it takes input_ids, attention_mask"):
        shared_model("everything")(IDS, zzz=1)


def test_arguments_that_other_code_passes_to_every_model_are_taken():
    legitimate = {
        "return_dict": True,
        "output_router_logits": None,
        "cache_position": torch.arange(4),
        "token_type_ids": torch.zeros_like(IDS),
        "num_items_in_batch": torch.tensor(6),
        "is_causal": True,
        "max_length_q": 4,
    }
    for model in models()[:2]:
        with torch.no_grad():
            expected = model(IDS)[0]
            assert all(torch.equal(model(IDS, **{name: value})[0], expected) for name, value in legitimate.items())


BAD_IDS = {
    "a string": ("hello", TypeError, "return_tensors"),
    "a list": ([[3, 7]], TypeError, "torch.tensor"),
    "an array": (IDS.numpy(), TypeError, "torch.tensor"),
    "floats": (IDS.float(), TypeError, "inputs_embeds"),
    "booleans": (IDS > 4, TypeError, "integers"),
    "one dimension": (IDS[0], ValueError, r"input_ids\[None\]"),
    "three dimensions": (IDS[None], ValueError, "rows, tokens"),
    "no rows": (IDS[:0], ValueError, "at least one row"),
    "no tokens": (IDS[:, :0], ValueError, "at least one row and one token"),
    "a negative id": (IDS - 4, ValueError, "vocabulary has 0 to"),
    "an id too large": (IDS + VOCAB, ValueError, "own tokenizer"),
    "the largest integer": (IDS + 2**60, ValueError, "own tokenizer"),
}


@pytest.mark.parametrize("kind", BAD_IDS)
def test_token_ids_that_are_none_are_refused_with_what_to_give(kind):
    """A string ended in an `AttributeError`, an id out of range in an `IndexError` after a cache had begun."""
    ids, error, message = BAD_IDS[kind]
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    for call in (*models(), model.generate):
        cache = model.make_cache()
        cache.set_expert_vector(expert)
        with pytest.raises(error, match=message):
            call(ids, cache=cache)
        assert cache.get_seq_length() == 0 and cache.expert_vector is not None


def test_ids_of_any_integer_type_and_at_the_ends_of_the_vocabulary_are_taken():
    model = shared_model("everything")
    ids = torch.tensor([[0, VOCAB - 1, 5]])
    with torch.no_grad():
        expected = model(ids).logits
        for dtype in (torch.int32, torch.int16, torch.uint8):
            assert torch.equal(model(ids.to(dtype)).logits, expected)


def test_embeddings_that_are_none_are_refused_too():
    model = shared_model("everything")
    for embeds, error in (([[1.0]], TypeError), (torch.ones(2, 3), ValueError), (torch.ones(0, 3, 32), ValueError)):
        with pytest.raises(error, match="inputs_embeds"):
            model(inputs_embeds=embeds)


OPTIONS = {"max_len": "max_cache_len", "on_expert_changes": "on_expert_change", "rollback": "rollback_reach"}


@pytest.mark.parametrize("name", OPTIONS)
def test_a_misspelt_option_of_a_cache_is_named_with_the_one_that_was_meant(name, tmp_path):
    model = shared_model("everything")
    with pytest.raises(TypeError, match=f"`make_cache` has no argument `{name}`: did you mean `{OPTIONS[name]}`"):
        model.make_cache(**{name: 8})
    with pytest.raises(TypeError, match="`load_cache` has no argument `on_weight_change`: did you mean `on_weights"):
        model.load_cache(tmp_path, on_weight_change="recompute")
    with pytest.raises(TypeError, match="`make_cache` has no argument `zzz`: it takes storage, max_cache_len"):
        model.make_cache(zzz=1)


OF_GENERATE = {
    "expert_vectors": "expert_vector",
    "expert_schedules": "expert_schedule",
    "attention_maks": "attention_mask",
    "max_new_token": "max_new_tokens",
    "input_embeds": "inputs_embeds",
    "stopping_criterias": "stopping_criteria",
    "cache_params": "cache",
}


@pytest.mark.parametrize("name", OF_GENERATE)
def test_a_misspelt_argument_of_generate_is_named_before_the_cache_changes(name):
    """Transformers refuses them too, but says neither which argument was meant nor that it is no model's."""
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    cache = model.make_cache()
    cache.set_expert_vector(expert)
    with pytest.raises(TypeError, match=f"no argument `{name}`: did you mean `{OF_GENERATE[name]}`"):
        model.generate(IDS, cache=cache, **{name: 3})
    with pytest.raises(ValueError, match="zzz"):
        model.generate(IDS, cache=cache, zzz=3)
    assert cache.get_seq_length() == 0 and cache.expert_vector is expert


def test_arguments_that_generate_knows_are_taken():
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    options = {"max_new_tokens": 2, "do_sample": False, "pad_token_id": VOCAB, "use_cache": True, "top_k": None}
    options |= {"logits_processor": [], "stopping_criteria": [], "streamer": None, "synced_gpus": False}
    found = model.generate(IDS, expert_vector=expert, attention_mask=torch.ones_like(IDS), **options)
    assert torch.equal(found, model.generate(input_ids=IDS, expert_schedule={0: expert}, tokenizer=None, **options))


def test_hidden_states_can_be_asked_for_by_index():
    """A list of indices was taken for a yes."""
    model, ids = shared_model("everything"), random_ids()
    with torch.no_grad():
        every = model(ids, output_hidden_states=True).hidden_states
        some = model(ids, output_hidden_states=[0, -2, 99]).hidden_states
        first = model(ids, output_hidden_states=0).hidden_states
    assert [states is not None for states in some] == [True, False, False, False, True, False]
    assert torch.equal(some[0], every[0]) and torch.equal(some[4], every[4])
    assert torch.equal(first[0], every[0]) and first[1:] == (None,) * 5
