"""Bugs that a hostile reading of the first version found; each test tells its story."""

import ctypes
import inspect
import shutil

import peft
import pytest
import torch

from cases import VOCAB, expected, random_expert, random_model, random_rows, shared_expert, shared_model, tiny_config
from mambaformer import MambaFormerForCausalLM, MambaFormerForSequenceClassification

GREEDY = {"do_sample": False, "pad_token_id": VOCAB}
STORAGES = {"dense": {}, "static": {"storage": "static", "max_cache_len": 40}}


def ids_of(seed=3, length=9):
    return torch.tensor(random_rows(seed, lengths=(length,)))


def whole(model, ids, **options):
    with torch.no_grad():
        return model(ids, use_cache=False, **options).logits


def same(found, expected):
    torch.testing.assert_close(found, expected, atol=1e-10 * expected.abs().max().item(), rtol=0)


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("policy", ["recompute", "reset", "continue"])
def test_a_forward_that_fails_half_way_leaves_text_and_expert_as_they_were(policy, storage, monkeypatch):
    """A forward that failed under a new expert: the expert was in force already, and "reset" had dropped the text."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), ids_of()
    cache = model.make_cache(on_expert_change=policy, **STORAGES[storage])
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        with monkeypatch.context() as patch, pytest.raises(TypeError):
            patch.setattr(model.model.embed_tokens, "forward", lambda: None)
            model(ids[:, 5:], past_key_values=cache, expert_vector=expert)
        assert cache.get_seq_length() == 5 and cache.expert_vector is None and not cache.provenance.is_mixed
        same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


def test_a_layer_that_fails_half_way_leaves_the_cache_usable(monkeypatch):
    """Layers before the failing one had taken in their keys and states already."""
    model, ids = random_model(tiny_config("everything")), ids_of()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :6], past_key_values=cache)
        for length in (1, 3):
            with monkeypatch.context() as patch:
                patch.setattr(model.model.layers[-1].self_attn, "scaling", "no number")
                with pytest.raises((TypeError, ctypes.ArgumentError)):  # of PyTorch, and of a CPU kernel
                    model(ids[:, 6 : 6 + length], past_key_values=cache)
        same(model(ids[:, 6:], past_key_values=cache).logits, whole(model, ids)[:, 6:])


def test_an_expert_that_is_trained_gets_its_gradient_whatever_the_cache_has_seen():
    """A plan that a cache had kept from a forward without gradients was used again, and the gradient was lost."""
    model, ids = shared_model("everything"), ids_of()
    name = "model.layers.0.mamba.in_proj"
    frozen, trained = torch.full((8,), 1.5), torch.full((8,), 1.5, requires_grad=True)
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache, expert_vector={name: frozen})
    for _ in range(2):
        model(ids[:, 4:6], past_key_values=cache.fork(), expert_vector={name: trained}).logits.sum().backward()
    assert trained.grad.abs().max() > 0


def test_two_experts_that_are_trained_in_one_batch_are_never_taken_for_one():
    """Both start at ones, so their content is equal, and the second row was given the first row's scales."""
    model, ids = shared_model("everything"), ids_of().expand(2, -1)
    name = "model.layers.0.mamba.in_proj"
    scales = [torch.ones(8, requires_grad=True) for _ in range(2)]
    model(ids, expert_vector=[{name: z} for z in scales], use_cache=False).logits[1].sum().backward()
    assert scales[0].grad is None or not scales[0].grad.any()
    assert scales[1].grad.any()
    alone = torch.ones(8, requires_grad=True)
    model(ids, expert_vector=[None, {name: alone}], use_cache=False).logits[0].sum().backward()
    assert alone.grad is None or not alone.grad.any()


def test_gradients_flow_through_two_forwards_on_one_cache():
    """The second forward wrote into keys that the first one's backward pass still needed."""
    model = random_model(tiny_config("everything")).requires_grad_(False)
    ids = ids_of()
    weight = model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    cache = model.make_cache()
    parts = [model(ids[:, :5], past_key_values=cache).logits, model(ids[:, 5:], past_key_values=cache).logits]
    torch.cat(parts, dim=1).square().sum().backward()
    found, weight.grad = weight.grad, None
    model(ids, use_cache=False).logits.square().sum().backward()
    same(found, weight.grad)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_cache_filled_in_inference_mode_goes_on_outside_of_it(storage):
    """Tensors of inference mode cannot be written outside of it: every variant crashed."""
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache(**STORAGES[storage])
    with torch.inference_mode():
        model(ids[:, :4], past_key_values=cache)
    with torch.no_grad():
        one = model(ids[:, 4:5], past_key_values=cache).logits
    rest = model(ids[:, 5:], past_key_values=cache).logits
    same(torch.cat([one, rest], dim=1), whole(model, ids)[:, 4:])
    answer = model.generate(torch.cat([ids, ids[:, :1]], dim=1), past_key_values=cache, max_new_tokens=3, **GREEDY)
    expected = model.generate(torch.cat([ids, ids[:, :1]], dim=1), max_new_tokens=3, **GREEDY)
    assert answer.tolist() == expected.tolist()


def test_merging_is_noticed_by_a_cache_of_a_model_that_was_made_in_inference_mode():
    """Weights of inference mode do not count their writes."""
    with torch.inference_mode():
        model = random_model(tiny_config("paper"))
    expert, ids = random_expert(model, 1), ids_of()
    with torch.inference_mode():
        cache = model(ids[:, :5]).past_key_values
        model.merge_expert_vector(expert)
        same(model(ids[:, 5:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 5:])


@pytest.mark.parametrize("storage", STORAGES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_model_that_changes_its_dtype_goes_on_with_its_cache(storage, dtype):
    """Keys of the old dtype met queries of the new one."""
    model, ids = random_model(tiny_config("everything")).float(), ids_of()
    caches = [model.make_cache(on_expert_change=policy, **STORAGES[storage]) for policy in ("recompute", "continue")]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :5], past_key_values=cache)
        model.to(dtype)
        expected = whole(model, ids)[:, 5:]
        for cache in caches:
            found = model(ids[:, 5:], past_key_values=cache).logits
            assert found.dtype == dtype
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_positions_that_were_chosen_once_are_counted_on_when_they_are_not_chosen_again():
    """Later turns without `position_ids` were not remembered, and encoding the text again crashed."""
    model, expert, ids = shared_model("llama"), shared_expert("llama", 1), ids_of(length=90)
    cache = model.make_cache()
    chosen = torch.arange(5)[None] - 7  # growing up to the counted ones: a decrease would start another sequence
    with torch.no_grad():
        model(ids[:, :5], position_ids=chosen, past_key_values=cache)
        model(ids[:, 5:88], past_key_values=cache)
        found = model(ids[:, 88:], past_key_values=cache, expert_vector=expert).logits
    positions = torch.cat([chosen, torch.arange(5, 90)[None]], dim=1)
    same(found, whole(model, ids, position_ids=positions, expert_vector=expert)[:, 88:])


def test_what_stands_at_a_pad_of_embeddings_never_reaches_a_real_token():
    """NaN at a pad passed through attention, since 0 * NaN is NaN."""
    model, ids = shared_model("everything"), ids_of()
    embeds = model.get_input_embeddings()(ids).detach()
    mask = torch.ones_like(ids)
    mask[0, 4] = 0
    clean = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    embeds[0, 4] = float("nan")
    found = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits
    assert torch.equal(found[mask.bool()], clean[mask.bool()])


def test_an_expert_is_merged_once_whichever_model_of_one_stack_is_asked():
    """The causal model and its stack each kept their own account, so an expert could be applied twice."""
    model = random_model(tiny_config("everything"))
    expert = random_expert(model, 1)
    before = whole(model, ids_of())
    model.model.merge_expert_vector(expert)
    for attempt in (lambda: model.merge_expert_vector(expert), lambda: model(ids_of(), expert_vector=expert)):
        with pytest.raises(ValueError, match="unmerge_expert_vector"):
            attempt()
    with pytest.raises(ValueError, match="unmerge_expert_vector"):
        model(ids_of(), expert_vector=None)
    model.unmerge_expert_vector()
    assert torch.equal(whole(model, ids_of()), before)


def test_a_classifier_takes_experts_that_were_made_with_a_head():
    """Merging looked for an `lm_head` that a classifier does not have."""
    config = tiny_config("everything", num_labels=3, pad_token_id=0)
    classifier = MambaFormerForSequenceClassification(config).double().eval()
    expert = random_expert(random_model(config), 1)
    ids = ids_of(length=6).clamp(min=1)
    with torch.no_grad():
        on_the_fly = classifier(ids, expert_vector=expert).logits
        classifier.merge_expert_vector(expert)
        same(classifier(ids).logits, on_the_fly)
        padded = torch.cat([ids, torch.zeros_like(ids)], dim=1)
        same(classifier(padded).logits, on_the_fly)
        same(classifier(padded.flip(1), attention_mask=(padded != 0).flip(1)).logits, classifier(ids.flip(1)).logits)


def test_the_attention_implementation_can_be_changed():
    """Transformers looks for one way of writing the dispatch, and silently changed nothing without it."""
    model, ids = random_model(tiny_config("everything")), ids_of()
    sdpa = whole(model, ids)
    model.set_attn_implementation("eager")
    assert model.config._attn_implementation == "eager"
    same(whole(model, ids), sdpa)
    with torch.no_grad():
        outputs = model(ids, output_attentions=True, output_hidden_states=True)
    assert len(outputs.attentions) == 4 and len(outputs.hidden_states) == 6
    same(outputs.attentions[0].sum(-1), torch.ones(1, 4, 9, dtype=torch.float64))


def test_flex_attention_sees_what_sdpa_sees():
    """Flex attention asks for whole blocks of positions, and read behind the end of ours."""
    model = random_model(tiny_config("sliding_sinks")).float()
    ids = ids_of(length=12).expand(2, -1)
    mask = torch.ones_like(ids)
    mask[0, :4] = mask[1, 6] = 0
    expected = whole(model, ids, attention_mask=mask)
    model.set_attn_implementation("flex_attention")
    found = whole(model, ids, attention_mask=mask)
    bound = 1e-4 * expected.abs().max().item()
    torch.testing.assert_close(found[mask.bool()], expected[mask.bool()], atol=bound, rtol=0)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_chat_whose_expert_changes_under_reset_is_fed_again_as_a_whole(storage):
    """The text was dropped after `generate` had cut the input to the new turn, so the answer knew only that turn."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), ids_of()
    cache = model.make_cache(on_expert_change="reset", **STORAGES[storage])
    first = model.generate(ids, past_key_values=cache, max_new_tokens=4, **GREEDY)
    text = torch.cat([first, ids[:, :3]], dim=1)
    options = {"max_new_tokens": 4, "expert_vector": expert, **GREEDY}
    assert model.generate(text, past_key_values=cache, **options).tolist() == model.generate(text, **options).tolist()
    with pytest.raises(ValueError, match="whole sequence"):
        model.generate(ids[:, :2], past_key_values=cache, max_new_tokens=4, expert_vector=None, **GREEDY)


def test_experts_of_a_checkpoint_outlive_its_folder(tmp_path):
    """They were read when first used, from a place that might be gone by then."""
    model = random_model(tiny_config("paper"))
    model.expert_vectors.add("bold", random_expert(model, 1))
    model.save_pretrained(tmp_path / "model")
    loaded = MambaFormerForCausalLM.from_pretrained(tmp_path / "model")
    shutil.rmtree(tmp_path / "model")
    assert loaded.expert_vectors["bold"] == model.expert_vectors["bold"]
    loaded.save_pretrained(tmp_path / "again")
    assert (tmp_path / "again/expert_vectors/bold.safetensors").is_file()
    MambaFormerForCausalLM(loaded.config).save_pretrained(tmp_path / "fresh")
    assert not (tmp_path / "fresh/experts").exists()


def test_one_expert_for_every_row_is_one_for_every_row_of_this_batch():
    """Three equal experts were taken for one, and passed for a batch of two."""
    model, expert = shared_model("paper"), shared_expert("paper", 1)
    with pytest.raises(ValueError, match="3 entries for 2 rows"):
        model(ids_of().expand(2, -1), expert_vector=[expert] * 3)


def test_text_that_was_rolled_back_under_continue_is_not_encoded_by_the_next_expert():
    """After `crop`, what was left was encoded again by the new expert although the policy says it stays."""
    model, expert, ids = shared_model("hybrid"), shared_expert("hybrid", 1), ids_of()
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
        same(found, model(ids[:, 7:], past_key_values=plain, expert_vector=expert).logits)


@pytest.mark.parametrize("storage", STORAGES)
def test_a_cache_that_was_reset_takes_another_batch(storage):
    """Static buffers kept the rows of the text before."""
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache(**STORAGES[storage])
    with torch.no_grad():
        for rows in (2, 1, 3):
            cache.reset()
            found = [model(part.expand(rows, -1), past_key_values=cache).logits for part in ids.split(5, dim=1)]
            same(torch.cat(found, dim=1), whole(model, ids).expand(rows, -1, -1))


def test_the_loss_is_that_of_the_real_tokens_wherever_the_pads_stand():
    """The first token behind a left pad was scored by the logits at that pad, which come after it."""
    model, ids = shared_model("everything"), ids_of(length=6)
    pad = torch.full((1, 3), 5)
    alone = model(ids, labels=ids, use_cache=False).loss
    for parts in ([pad, ids], [ids, pad], [ids[:, :2], pad, ids[:, 2:]]):
        text = torch.cat(parts, dim=1)
        mask = torch.cat([torch.zeros_like(part) if part is pad else torch.ones_like(part) for part in parts], dim=1)
        same(model(text, attention_mask=mask, labels=text, use_cache=False).loss, alone)


def test_experts_of_ones_must_name_modules_of_the_model():
    """They count as the base, and passed unchecked whatever they named."""
    model = shared_model("paper")
    for vectors in ({"model.nowhere": torch.ones(3)}, {"lm_head": torch.ones(500)}):
        with pytest.raises(ValueError, match="model"):
            model(ids_of(), expert_vector=vectors)


def test_experts_per_row_that_were_set_before_the_first_token_follow_the_rows():
    """A list set on an empty cache did not grow with `batch_repeat_interleave`."""
    model, expert, ids = shared_model("paper"), shared_expert("paper", 1), ids_of()
    cache = model.make_cache()
    cache.set_expert_vector([expert, None])
    cache.batch_repeat_interleave(2)
    with torch.no_grad():
        found = model(ids.expand(4, -1), past_key_values=cache).logits
    same(found[:2], whole(model, ids, expert_vector=expert).expand(2, -1, -1))
    same(found[2:], whole(model, ids).expand(2, -1, -1))


def test_the_number_of_experts_is_checked_against_this_batch_and_no_earlier_one():
    """The length of a list was remembered with the plan, and refused rows that were repeated since."""
    model, expert, ids = shared_model("paper"), shared_expert("paper", 1), ids_of()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, expert_vector=[expert])
        cache.batch_repeat_interleave(2)
        found = model(ids[:, 5:].expand(2, -1), past_key_values=cache).logits
        same(found[1:], whole(model, ids, expert_vector=expert)[:, 5:])
        with pytest.raises(ValueError, match="3 entries for 2 rows"):
            model(ids[:, :1].expand(2, -1), past_key_values=cache, expert_vector=[expert] * 3)


def test_an_expert_that_is_trained_takes_the_place_of_its_frozen_twin_in_a_cache():
    """`set_expert_vector` compared by content and kept the twin, so nothing was trained."""
    model, ids, name = shared_model("everything"), ids_of(), "model.layers.0.mamba.in_proj"
    trained = torch.full((8,), 1.5, requires_grad=True)
    cache = model.make_cache()
    cache.set_expert_vector({name: torch.full((8,), 1.5)})
    cache.set_expert_vector({name: trained})
    model(ids, past_key_values=cache).logits.sum().backward()
    assert trained.grad.any()


def test_decoding_a_frozen_model_with_gradients_enabled_copies_no_keys():
    """Every token copied all keys, lest a graph needed them, although there was no graph."""
    model, ids = random_model(tiny_config("full")).requires_grad_(False), ids_of()
    cache, addresses = model.make_cache(), set()
    for token in ids.split(1, dim=1):
        model(token, past_key_values=cache)
        addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) == 1


def test_weights_are_not_tied_while_an_expert_is_merged_into_one_of_them():
    """Tying took the expert out of the head without a word."""
    model = random_model(tiny_config("paper"))
    model.merge_expert_vector(random_expert(model, 1))
    with pytest.raises(ValueError, match="unmerge_expert_vector"):
        model.tie_weights()
    model.unmerge_expert_vector()
    model.tie_weights()


@pytest.mark.parametrize("policy", ["reset", "error", "recompute"])
def test_rows_of_one_expert_that_are_left_of_a_mixed_batch_have_that_expert(policy):
    """A list of one expert was told from the expert itself, and "reset" dropped the text for nothing."""
    model, ids = shared_model("everything"), ids_of()
    first, second = shared_expert("everything", 1), shared_expert("everything", 2)
    cache = model.make_cache(on_expert_change=policy)
    with torch.no_grad():
        model(ids[:, :6].expand(3, -1), past_key_values=cache, expert_vector=[first, second, None])
        bases = cache.fork()
        cache.batch_select_indices(torch.tensor([1]))
        assert cache.expert_vector == second and cache.status != "stale"
        same(
            model(ids[:, 6:], past_key_values=cache, expert_vector=second).logits,
            whole(model, ids, expert_vector=second)[:, 6:],
        )
        bases.batch_select_indices(torch.tensor([2]))
        assert bases.expert_vector is None
        same(model(ids[:, 6:], past_key_values=bases, expert_vector=None).logits, whole(model, ids)[:, 6:])


def test_an_expert_that_was_set_and_taken_back_leaves_no_trace():
    """Under "continue" the text counted as mixed from then on, and could not be rolled back."""
    model, expert, ids = shared_model("hybrid"), shared_expert("hybrid", 1), ids_of()
    for policy in ("recompute", "continue"):
        cache = model.make_cache(on_expert_change=policy)
        with torch.no_grad():
            model(ids, past_key_values=cache)
            cache.set_expert_vector(expert)
            cache.set_expert_vector(None)
            assert cache.status != "stale" and not cache.provenance.is_mixed
            cache.crop(-4)
            same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


def test_gradients_reach_the_states_and_attention_weights_that_a_padded_forward_returns():
    """What was returned was a copy beside the graph: its gradient was None, in the library's own test too."""
    model, rows = random_model(tiny_config("everything")), random_rows(5, lengths=(6, 9))
    model.set_attn_implementation("eager")
    ids, mask = torch.tensor([[7, 7, 7, *rows[0]], rows[1]]), torch.tensor([[0] * 3 + [1] * 6, [1] * 9])

    def gradients(ids, mask):
        outputs = model(ids, attention_mask=mask, output_hidden_states=True, output_attentions=True, use_cache=False)
        shown = [*outputs.hidden_states[:-1], *outputs.attentions]
        return torch.autograd.grad((outputs.logits[:, -1] ** 2)[0].sum(), shown)

    found, alone = gradients(ids, mask), gradients(ids[:1, 3:], None)
    for both, one in zip(found, alone, strict=True):
        assert one.abs().max() > 0
        same(both[:1, :, 3:, :6] if both.dim() == 4 else both[:1, 3:], one)


def test_hidden_states_can_be_asked_for_by_index():
    """A list of indices was taken for a yes."""
    model, ids = shared_model("everything"), ids_of()
    with torch.no_grad():
        every = model(ids, output_hidden_states=True).hidden_states
        some = model(ids, output_hidden_states=[0, -2, 99]).hidden_states
        first = model(ids, output_hidden_states=0).hidden_states
    assert [states is not None for states in some] == [True, False, False, False, True, False]
    assert torch.equal(some[0], every[0]) and torch.equal(some[4], every[4])
    assert torch.equal(first[0], every[0]) and first[1:] == (None,) * 5


def test_the_classifier_names_what_it_takes():
    """`inputs_embeds` went through `**kwargs`, where Transformers does not look for it."""
    classifier = (
        MambaFormerForSequenceClassification(tiny_config("paper", num_labels=3, pad_token_id=0)).double().eval()
    )
    ids, mask = torch.tensor([[0, 5, 9], [4, 5, 6]]), torch.tensor([[0, 1, 1], [1, 1, 1]])
    taken = inspect.signature(classifier.forward).parameters
    assert {"position_ids", "past_key_values", "inputs_embeds", "use_cache", "expert_vector"} <= taken.keys()
    with torch.no_grad():
        embeds = classifier.get_input_embeddings()(ids)
        same(classifier(inputs_embeds=embeds, attention_mask=mask).logits, classifier(ids).logits)


def test_a_model_may_exit_early_to_assist_itself():
    """Transformers lowers `num_hidden_layers` while the first layers propose tokens; all ran, and an index failed."""
    model, ids = random_model(tiny_config("everything"), loudness=0.7), ids_of()
    greedy = model.generate(ids, max_new_tokens=8, **GREEDY)
    for exit_at in (1, 3):
        assert (
            model.generate(ids, max_new_tokens=8, assistant_early_exit=exit_at, **GREEDY).tolist() == greedy.tolist()
        )
    shallow = random_model(tiny_config("everything", layer_types=model.config.layer_types[:3]))
    shallow.load_state_dict(
        {name: weight for name, weight in model.state_dict().items() if name in shallow.state_dict()}
    )
    model.config.num_hidden_layers = 3
    assert torch.equal(whole(model, ids), whole(shallow, ids))


# ---- found by the state machine (test_state_machine.py)


def test_a_static_cache_of_inference_mode_rolls_back_outside_of_it():
    """`crop` wrote into the clock's tensor, which inference mode had made."""
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache("static", max_cache_len=20)
    with torch.inference_mode():
        model(ids, past_key_values=cache)
    cache.crop(-4)
    with torch.no_grad():
        same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


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
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            model(ids[:, 5:], past_key_values=cache, **options)
        same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


def test_indices_of_logits_to_keep_count_from_either_end():
    """What refuses indices that are too large must not refuse those from the end."""
    model, ids = shared_model("everything"), ids_of()
    found = whole(model, ids, logits_to_keep=torch.tensor([2, -1, -9]))
    same(found, whole(model, ids)[:, [2, 8, 0]])


@pytest.mark.parametrize("rows", [[-1, -2], [0, 2], [[0, 1]]])
def test_rows_that_do_not_exist_are_refused_before_the_experts_change_places(rows):
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), ids_of()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5].expand(2, -1), past_key_values=cache, expert_vector=[expert, None])
        with pytest.raises(ValueError, match="rows 0 to 1"):
            cache.reorder_cache(torch.tensor(rows))
        found = model(ids[:, 5:].expand(2, -1), past_key_values=cache).logits
        same(found[:1], whole(model, ids, expert_vector=expert)[:, 5:])
        same(found[1:], whole(model, ids)[:, 5:])


def test_an_expert_of_inference_mode_can_be_trained_through():
    """The plan that the cache keeps was made of inference tensors, which no backward pass may save."""
    model, ids = random_model(tiny_config("everything")), ids_of()
    cache = model.make_cache()
    with torch.inference_mode():
        model(ids[:, :5], past_key_values=cache, expert_vector=random_expert(model, 1))
    model(ids[:, 5:], past_key_values=cache).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0


@pytest.mark.parametrize("storage", STORAGES)
def test_a_text_of_embeddings_survives_a_failed_change_of_expert_under_reset(storage, monkeypatch):
    """ "reset" drops the text, but only once the forward that follows has succeeded."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), ids_of()
    cache = model.make_cache(on_expert_change="reset", **STORAGES[storage])
    with torch.no_grad():
        model(inputs_embeds=model.model.embed_tokens(ids[:, :5]), past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(model.model.norm, "forward", lambda _: 1 / 0)
            model(ids[:, 5:], past_key_values=cache, expert_vector=expert)
        same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


def test_a_text_that_was_dropped_does_not_come_back_when_a_later_forward_fails(monkeypatch):
    """What is kept aside until a change of expert has succeeded is let go then."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), ids_of()
    cache = model.make_cache(on_expert_change="reset")
    with torch.no_grad():
        model(inputs_embeds=model.model.embed_tokens(ids[:, :7]), past_key_values=cache)
        model(ids[:, :4], past_key_values=cache, expert_vector=expert)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(model.model.norm, "forward", lambda _: 1 / 0)
            model(ids[:, 4:], past_key_values=cache)
        same(model(ids[:, 4:], past_key_values=cache).logits, whole(model, ids, expert_vector=expert)[:, 4:])


def test_recording_can_start_after_a_forward_that_failed(monkeypatch):
    """Rings that were emptied for encoding again had no slot to be widened from."""
    model, expert, ids = shared_model("everything"), shared_expert("everything", 1), ids_of()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :7], past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(ZeroDivisionError):
            patched.setattr(model.model.norm, "forward", lambda _: 1 / 0)
            model(ids[:, 7:], past_key_values=cache, expert_vector=expert)
        cache.activate_past_recording(3)
        same(model(ids[:, 7:], past_key_values=cache).logits, whole(model, ids)[:, 7:])


@pytest.mark.parametrize("pattern", ["mamba", "hybrid", "everything"])
@pytest.mark.parametrize("reach", [1, 2, 3])
def test_a_forward_longer_than_the_reach_starts_the_past_anew(pattern, reach):
    """Its last tokens were put behind older ones, as if those between had never been: silently wrong states."""
    model, ids = shared_model(pattern), ids_of()
    for removed in (1, 2, 4):
        cache = model.make_cache(rollback_reach=reach)
        with torch.no_grad():
            model(ids[:, :3], past_key_values=cache)
            model(ids[:, 3:7], past_key_values=cache)
            cache.crop(-removed)
            same(model(ids[:, 7 - removed :], past_key_values=cache).logits, whole(model, ids)[:, 7 - removed :])


def test_a_model_that_was_moved_to_another_dtype_and_back_is_another_model():
    """The allocator put the weights where they had been, and the stamp by addresses saw nothing: 4 times in 50."""
    model, ids = random_model(tiny_config("full", hidden_size=128)), ids_of()
    for _ in range(50):
        cache = model.make_cache(on_expert_change="error")
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model.to(torch.float32).to(torch.float64)
            with pytest.raises(ValueError, match="weights changed"):
                model(ids, past_key_values=cache)


# ---- found by a second hostile reading


def test_a_fused_optimizer_step_is_noticed():
    """It counts no version, and it is Trainer's default: caches and singular bases went on from the old weights."""
    model, ids = random_model(tiny_config("paper")), ids_of()
    cache, expert = model.make_cache(), random_expert(model, 1)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        whole(model, ids, expert_vector=expert)
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])
    wanted = expected(model, ids.tolist(), [expert])[0]
    same(whole(model, ids, expert_vector=expert)[0], wanted)


@pytest.mark.parametrize("between", [None, "other"])
def test_rows_change_places_while_another_expert_is_about_to_take_over(between):
    """The key that had encoded the rows kept their old order, and going back to it was taken for no change."""
    model, ids = shared_model("everything"), ids_of()
    first, second, other = (shared_expert("everything", seed) for seed in (1, 2, 3))
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :6].expand(2, -1), past_key_values=cache, expert_vector=[first, second])
        cache.set_expert_vector(None if between is None else other)
        cache.select_rows(torch.tensor([1, 0]))
        cache.set_expert_vector([first, second])
        found = model(ids[:, 6:].expand(2, -1), past_key_values=cache).logits
        for row, expert in zip(found, (first, second), strict=True):
            same(row[None], whole(model, ids, expert_vector=expert)[:, 6:])


class Doubled(torch.nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_a_parametrization_that_is_removed_is_noticed():
    """It writes through `weight.data`; that there are fewer modules is what can be seen."""
    model, ids = random_model(tiny_config("everything")), ids_of()
    linear = model.model.layers[1].self_attn.v_proj
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        torch.nn.utils.parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


def test_what_leaves_no_trace_can_be_told():
    """A NumPy view writes past every count; caches and singular bases look again after `weights_changed`."""
    model, ids = random_model(tiny_config("everything")), ids_of()
    expert = random_expert(model, 1)
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, expert_vector=expert)
        model.model.layers[1].self_attn.v_proj.weight.numpy()[...] *= 1.5
        model.weights_changed()
        found = model(ids[:, 5:], past_key_values=cache).logits[0]
    same(found, expected(model, ids.tolist(), [expert])[0][5:])


def test_a_cache_that_outlives_its_model_is_not_taken_for_the_next_ones():
    """The next model's weights were often put where the old ones had been, and the stamp was one of addresses."""
    config, ids = tiny_config("paper"), ids_of()
    for seed in range(10):
        model = random_model(config, seed)
        cache = model.make_cache()
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache)
            del model
            model = random_model(config, seed + 1)
            same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # peft asks for it
def test_a_session_is_tied_to_the_adapters_too(tmp_path):
    """The weights of a model are the same with its adapter on and off; what they compute is not."""
    model, ids = random_model(tiny_config("everything")), ids_of()
    adapted = peft.get_peft_model(
        model, peft.LoraConfig(target_modules=["q_proj", "in_proj"], init_lora_weights=False)
    )
    adapted.eval()
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    cache.save(tmp_path / "session.safetensors")
    with adapted.disable_adapter(), pytest.raises(ValueError, match="other weights"):
        model.load_cache(tmp_path / "session.safetensors")
    cache = model.load_cache(tmp_path / "session.safetensors")
    with torch.no_grad():
        same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


def test_a_session_of_nothing_but_pads_can_be_loaded(tmp_path):
    """With the last real token taken back there were no states in the file, which said that there were."""
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache(rollback_reach=4)
    with torch.no_grad():
        model(torch.tensor([[9, 5]]), attention_mask=torch.tensor([[0, 1]]), past_key_values=cache)
        cache.crop(-1)
        cache.save(tmp_path / "session.safetensors")
        cache = model.load_cache(tmp_path / "session.safetensors")
        same(model(ids, past_key_values=cache).logits, whole(model, ids))


def test_an_expert_that_does_not_fit_is_refused_before_the_text_is_dropped():
    """`set_expert_vector` took anything, and under "reset" the text was gone when the next forward complained."""
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache(on_expert_change="reset")
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        with pytest.raises(ValueError, match="does not have"):
            cache.set_expert_vector({"x": torch.tensor([0.5, 2.0])})
        with pytest.raises(ValueError, match="2 entries but the cache has 1 rows"):
            cache.set_expert_vector([None, None])
        same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda cache: cache.activate_past_recording(9.5), "counts tokens"),
        (lambda cache: cache.activate_past_recording(-3), "counts tokens"),
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
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache(rollback_reach=4)
    with torch.no_grad():
        model(ids[:, :5].expand(2, -1), past_key_values=cache)
        with pytest.raises(ValueError, match=message):
            call(cache)
        assert cache.rollback_reach == 4
        same(model(ids[:, 5:].expand(2, -1), past_key_values=cache).logits[:1], whole(model, ids)[:, 5:])


def test_what_the_librarys_cache_offers_is_answered_or_refused_by_name():
    """Its sizes and a layer's own `crop` failed with errors about attributes."""
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache("static", max_cache_len=20)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert (cache.max_batch_size, cache.max_cache_len, cache.get_max_cache_shape()) == (1, 20, 20)
    cache.batch_select_indices(torch.tensor([True]))
    for refused in (lambda: cache.layers[1].crop(-1), lambda: cache.layers[0].offload()):
        with pytest.raises(NotImplementedError):
            refused()


def test_refused_speculation_leaves_the_users_cache_as_it_was():
    """The library refused two rows after the cache had started to record for them."""
    model, ids = shared_model("everything"), ids_of()
    cache = model.make_cache()
    with pytest.raises(ValueError, match="one row at a time"):
        model.generate(
            ids.expand(2, -1), past_key_values=cache, prompt_lookup_num_tokens=3, max_new_tokens=5, **GREEDY
        )
    assert cache.rollback_reach == 0


def test_what_was_taken_back_is_not_kept_in_memory():
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


def out_of_memory(*args, **kwargs):
    raise torch.OutOfMemoryError("no memory")


@pytest.mark.parametrize("storage", STORAGES)
def test_a_commit_or_a_reordering_that_is_cut_short_costs_an_encoding_and_never_a_wrong_number(storage, monkeypatch):
    """Some layers had moved on and others not, and the cache said that it was up to date."""
    model, ids = shared_model("everything"), ids_of()
    other = ids.flip(1)
    with torch.no_grad():
        cache = model.make_cache(**STORAGES[storage])
        model(torch.cat([ids, other])[:, :5], past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(cache.history, "append", out_of_memory)
            model(torch.cat([ids, other])[:, 5:7], past_key_values=cache)
        both = model(torch.cat([ids, other])[:, 5:7], past_key_values=cache).logits
        same(both[:1], whole(model, ids[:, :7])[:, 5:])
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(cache.layers[3].attention, "select_rows", out_of_memory)
            cache.reorder_cache(torch.tensor([1, 0]))
        both = model(torch.cat([other, ids])[:, 7:], past_key_values=cache).logits
        same(both[:1], whole(model, other)[:, 7:])
        same(both[1:], whole(model, ids)[:, 7:])


def test_a_rollback_that_is_cut_short_costs_an_encoding_and_never_a_wrong_number(monkeypatch):
    model, ids = shared_model("everything"), ids_of()
    with torch.no_grad():
        cache = model.make_cache(rollback_reach=4)
        model(ids, past_key_values=cache)
        with monkeypatch.context() as patched, pytest.raises(torch.OutOfMemoryError):
            patched.setattr(cache.layers[3].recurrent, "crop", out_of_memory)
            cache.crop(-2)
        columns = cache.get_seq_length()
        same(model(ids[:, columns - 9 :], past_key_values=cache).logits[:, -1], whole(model, ids)[:, -1])


@pytest.mark.parametrize("write", ["load", "train"])
def test_unmerging_never_mixes_two_models(write):
    """The modules that the expert had scaled got their old weights back, and all others kept the new ones."""
    model, other, ids = random_model(tiny_config("paper")), random_model(tiny_config("paper"), seed=1), ids_of()
    model.merge_expert_vector(random_expert(model, 1, modules=["model.layers.1.self_attn.q_proj"]))
    if write == "load":
        model.load_state_dict(other.state_dict())
    else:
        model(ids, labels=ids, use_cache=False).loss.backward()
        torch.optim.SGD(model.parameters(), lr=0.1).step()
    before = whole(model, ids)
    with pytest.raises(ValueError, match="mix two models"):
        model.unmerge_expert_vector()
    same(whole(model, ids), before)


def test_nothing_is_merged_into_a_weight_that_is_computed():
    """The merged weight was written into the value of a parametrization, which is computed anew."""
    model = random_model(tiny_config("everything"))
    torch.nn.utils.parametrize.register_parametrization(model.model.layers[1].self_attn.v_proj, "weight", Doubled())
    with pytest.raises(ValueError, match="is parametrized"):
        model.merge_expert_vector(random_expert(model, 1, modules=["model.layers.1.self_attn.v_proj"]))


def test_a_rollback_without_gradients_keeps_those_that_are_wanted_later():
    """The states were computed again in the caller's mode, and what was trained through them later was cut off."""
    model, ids = random_model(tiny_config("mamba")), ids_of()
    weight = model.model.layers[0].mamba.in_proj.weight

    def gradient(*crops):
        model.zero_grad()
        cache = model.make_cache(rollback_reach=4)
        model(ids[:, :7] if crops else ids[:, :5], past_key_values=cache)
        for columns in crops:
            with torch.no_grad():
                cache.crop(columns)
        model(ids[:, 5:], past_key_values=cache).logits.sum().backward()
        return weight.grad.clone()

    same(gradient(-2), gradient())


def test_forks_of_a_prefix_notice_every_set_of_weights_that_is_tried_on_them():
    """Addresses come back: a later candidate of an evolution strategy was put where the first one had been."""
    model, ids = random_model(tiny_config("paper")), ids_of()
    parameters = list(model.parameters())
    base = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(base * 1.05, parameters)
        prefix = model.make_cache()
        model(ids[:, :5], past_key_values=prefix)
        for scale in range(8):
            torch.nn.utils.vector_to_parameters(base * (1 + 0.1 * scale), parameters)
            same(model(ids[:, 5:], past_key_values=prefix.fork()).logits, whole(model, ids)[:, 5:])


def test_what_was_recorded_in_inference_mode_may_be_run_again_behind_what_is_trained():
    """The CPU kernels save their arguments for the way back, and a graph may save nothing of inference mode."""
    model, ids = random_model(tiny_config("mamba")), ids_of()
    cache = model.make_cache(rollback_reach=8)
    model(ids[:, :4], past_key_values=cache)
    with torch.inference_mode():
        model(ids[:, 4:7], past_key_values=cache)
    cache.crop(-2)
    same(model(ids[:, 5:], past_key_values=cache).logits, whole(model, ids)[:, 5:])
