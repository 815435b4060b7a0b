"""Gradients: the oracle's, with and without checkpointing, through caches, rollbacks and expert vectors."""

import random

import pytest
import torch

from mambaformer import ExpertVector
from oracle import assert_same_logits, uncached_logits
from patterns import tiny_config
from reference import reference_logits
from sequences import padded_turn, random_ids, random_rows, rows_of
from tiny_models import (
    MAIN_PATTERNS,
    every_random_pattern,
    new_model,
    random_expert,
    random_model,
    shared_expert,
    shared_model,
    without_kernels_too,
)


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


def test_a_trained_expert_vector_gets_its_gradient_from_a_used_cache():
    """A plan that a cache had kept from a forward without gradients was used again, and the gradient was lost."""
    model, ids = shared_model("everything"), random_ids()
    name = "model.layers.0.mamba.in_proj"
    frozen, trained = torch.full((8,), 1.5), torch.full((8,), 1.5, requires_grad=True)
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :4], past_key_values=cache, expert_vector={name: frozen})
    for _ in range(2):
        model(ids[:, 4:6], past_key_values=cache.fork(), expert_vector={name: trained}).logits.sum().backward()
    assert trained.grad.abs().max() > 0


def test_two_equal_expert_vectors_in_training_keep_their_own_gradients():
    """Both start at ones, so their content is equal, and the second row was given the first row's scales."""
    model, ids = shared_model("everything"), random_ids().expand(2, -1)
    name = "model.layers.0.mamba.in_proj"
    scales = [torch.ones(8, requires_grad=True) for _ in range(2)]
    model(ids, expert_vector=[{name: z} for z in scales], use_cache=False).logits[1].sum().backward()
    assert scales[0].grad is None or not scales[0].grad.any()
    assert scales[1].grad.any()
    alone = torch.ones(8, requires_grad=True)
    model(ids, expert_vector=[None, {name: alone}], use_cache=False).logits[0].sum().backward()
    assert alone.grad is None or not alone.grad.any()


def test_a_trained_expert_vector_replaces_its_frozen_twin_in_a_cache():
    """`set_expert_vector` compared by content and kept the twin, so nothing was trained."""
    model, ids, name = shared_model("everything"), random_ids(), "model.layers.0.mamba.in_proj"
    trained = torch.full((8,), 1.5, requires_grad=True)
    cache = model.make_cache()
    cache.set_expert_vector({name: torch.full((8,), 1.5)})
    cache.set_expert_vector({name: trained})
    model(ids, past_key_values=cache).logits.sum().backward()
    assert trained.grad.any()


def test_gradients_flow_through_two_forwards_on_one_cache():
    """The second forward wrote into keys that the first one's backward pass still needed."""
    model = random_model(tiny_config("everything")).requires_grad_(False)
    ids = random_ids()
    weight = model.model.layers[1].self_attn.q_proj.weight.requires_grad_(True)
    cache = model.make_cache()
    parts = [model(ids[:, :5], past_key_values=cache).logits, model(ids[:, 5:], past_key_values=cache).logits]
    torch.cat(parts, dim=1).square().sum().backward()
    found, weight.grad = weight.grad, None
    model(ids, use_cache=False).logits.square().sum().backward()
    assert_same_logits(found, weight.grad)


def test_decoding_a_frozen_model_with_gradients_enabled_copies_no_keys():
    """Every token copied all keys, lest a graph needed them, although there was no graph."""
    model, ids = random_model(tiny_config("full")).requires_grad_(False), random_ids()
    cache, addresses = model.make_cache(), set()
    for token in ids.split(1, dim=1):
        model(token, past_key_values=cache)
        addresses.add(cache.layers[0].keys.data_ptr())
    assert len(addresses) == 1


def test_gradients_reach_hidden_states_and_attentions_of_a_padded_forward():
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
        assert_same_logits(both[:1, :, 3:, :6] if both.dim() == 4 else both[:1, 3:], one)


def test_a_rollback_without_gradients_keeps_later_ones():
    """The states were computed again in the caller's mode, and what was trained through them later was cut off."""
    model, ids = random_model(tiny_config("mamba")), random_ids()
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

    assert_same_logits(gradient(-2), gradient())


def test_an_expert_vector_of_inference_mode_can_be_trained_through():
    """The plan that the cache keeps was made of inference tensors, which no backward pass may save."""
    model, ids = random_model(tiny_config("everything")), random_ids()
    cache = model.make_cache()
    with torch.inference_mode():
        model(ids[:, :5], past_key_values=cache, expert_vector=random_expert(model, 1))
    model(ids[:, 5:], past_key_values=cache).logits.sum().backward()
    assert model.lm_head.weight.grad.abs().max() > 0


def test_inputs_recorded_in_inference_mode_can_be_replayed_in_training():
    """The CPU kernels save their arguments for the way back, and a graph may save nothing of inference mode."""
    model, ids = random_model(tiny_config("mamba")), random_ids()
    cache = model.make_cache(rollback_reach=8)
    model(ids[:, :4], past_key_values=cache)
    with torch.inference_mode():
        model(ids[:, 4:7], past_key_values=cache)
    cache.crop(-2)
    assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])
