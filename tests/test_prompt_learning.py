"""PEFT's adapters that are no LoRA: virtual tokens, (IA)^3, and prefixes of keys and values."""

import peft
import pytest
import torch

from mambaformer import MambaFormerForSequenceClassification
from patterns import VOCAB, tiny_config
from sequences import random_rows
from tiny_models import random_model

NUM_VIRTUAL = 4
IDS = torch.tensor(random_rows(0, (9, 9)))
MASK = torch.ones_like(IDS)
MASK[1, :3] = 0
GREEDY = {"max_new_tokens": 5, "do_sample": False, "pad_token_id": VOCAB}
VIRTUAL = {
    "prompt tuning": lambda task: peft.PromptTuningConfig(task_type=task, num_virtual_tokens=NUM_VIRTUAL),
    "p-tuning": lambda task: peft.PromptEncoderConfig(
        task_type=task, num_virtual_tokens=NUM_VIRTUAL, encoder_hidden_size=16
    ),
    "multitask prompt tuning": lambda task: peft.MultitaskPromptTuningConfig(
        task_type=task, num_virtual_tokens=NUM_VIRTUAL, num_tasks=2
    ),
}
SCALED = {
    "attention and MLP": (["k_proj", "v_proj", "down_proj"], ["down_proj"]),
    "Mamba": (["in_proj", "x_proj", "dt_proj", "out_proj"], ["out_proj"]),
}
pytestmark = pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")


@torch.no_grad()
def adapted(model, config):
    """The model with this adapter, every number of it drawn large."""
    wrapped = peft.get_peft_model(model, config).double().eval()
    source = torch.Generator().manual_seed(1)
    for parameter in wrapped.parameters():
        if parameter.requires_grad:
            parameter.copy_(torch.randn(parameter.shape, generator=source, dtype=parameter.dtype))
    return wrapped


def with_virtual_tokens(wrapped, model, tasks):
    virtual = wrapped.get_prompt(2, **tasks)
    embeds = torch.cat([virtual, model.get_input_embeddings()(IDS)], dim=1)
    return embeds, torch.nn.functional.pad(MASK, (NUM_VIRTUAL, 0), value=1)


def gradients(loss, wrapped):
    trained = [parameter for parameter in wrapped.parameters() if parameter.requires_grad]
    return torch.autograd.grad(loss, trained, allow_unused=True)


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("kind", VIRTUAL)
def test_virtual_tokens_train_and_generate_as_embeddings_before_the_prompt(kind):
    """On Transformers 5.24 each step of `generate` fed the virtual tokens again: all tokens but the first were wrong.

    PEFT looks for the cache under its older name in the inputs of a step, and saw none.
    """
    model = random_model(tiny_config("everything"))
    wrapped = adapted(model, VIRTUAL[kind]("CAUSAL_LM"))
    tasks = {"task_ids": torch.tensor([0, 1])} if "multitask" in kind else {}
    embeds, mask = with_virtual_tokens(wrapped, model, tasks)
    labels = torch.nn.functional.pad(IDS, (NUM_VIRTUAL, 0), value=-100)
    found = wrapped(input_ids=IDS, attention_mask=MASK, labels=IDS, **tasks)
    wanted = model(inputs_embeds=embeds, attention_mask=mask, labels=labels, use_cache=False)
    same(found.logits, wanted.logits)
    same(gradients(found.loss, wrapped), gradients(wanted.loss, wrapped))
    answer = wrapped.generate(input_ids=IDS, attention_mask=MASK, **tasks, **GREEDY)[:, IDS.shape[1] :]
    for n in range(answer.shape[1]):
        with torch.no_grad():
            logits = model(inputs_embeds=embeds, attention_mask=mask, use_cache=False).logits[:, -1]
        assert answer[:, n].tolist() == logits.argmax(-1).tolist()
        embeds = torch.cat([embeds, model.get_input_embeddings()(answer[:, n : n + 1])], dim=1)
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.parametrize(
    "options", [{"num_beams": 2}, {"cache_implementation": "static", "max_cache_len": 40}], ids=str
)
def test_virtual_tokens_survive_beams_and_static_storage(options):
    model = random_model(tiny_config("everything"))
    wrapped = adapted(model, VIRTUAL["prompt tuning"]("CAUSAL_LM"))
    embeds, mask = with_virtual_tokens(wrapped, model, {})
    wanted = model.generate(inputs_embeds=embeds, attention_mask=mask, **GREEDY, **options)
    found = wrapped.generate(input_ids=IDS, attention_mask=MASK, **GREEDY, **options)
    assert torch.equal(found[:, IDS.shape[1] :], wanted)


def test_virtual_tokens_come_before_what_is_classified():
    stack = random_model(tiny_config("everything")).model
    model = MambaFormerForSequenceClassification(stack.config).double().eval()
    model.model.load_state_dict(stack.state_dict())
    wrapped = adapted(model, VIRTUAL["prompt tuning"]("SEQ_CLS"))
    embeds, mask = with_virtual_tokens(wrapped, model, {})
    with torch.no_grad():
        same(
            wrapped(input_ids=IDS, attention_mask=MASK).logits,
            model(inputs_embeds=embeds, attention_mask=mask).logits,
        )


@pytest.mark.parametrize("kind", SCALED)
def test_scaled_activations_are_trained_and_generate_as_uncached(kind):
    model = random_model(tiny_config("everything"))
    targets, of_inputs = SCALED[kind]
    config = peft.IA3Config(task_type="CAUSAL_LM", target_modules=targets, feedforward_modules=of_inputs)
    base = model(IDS, attention_mask=MASK).logits
    wrapped = adapted(model, config)
    outputs = wrapped(input_ids=IDS, attention_mask=MASK, labels=IDS)
    assert (outputs.logits - base).abs().max() > 0.1
    assert all(grad is not None and bool(grad.any()) for grad in gradients(outputs.loss, wrapped))
    answer, mask = wrapped.generate(input_ids=IDS, attention_mask=MASK, **GREEDY), MASK
    for n in range(IDS.shape[1], answer.shape[1]):
        with torch.no_grad():
            logits = wrapped(input_ids=answer[:, :n], attention_mask=mask, use_cache=False).logits[:, -1]
        assert answer[:, n].tolist() == logits.argmax(-1).tolist()
        mask = torch.nn.functional.pad(mask, (0, 1), value=1)


@pytest.mark.parametrize("is_projected", [False, True])
def test_prefix_tuning_is_refused_with_what_to_use_instead(is_projected):
    """`generate` spoke of two caches under two names, of which the user had given neither."""
    options = {"prefix_projection": True, "encoder_hidden_size": 16} if is_projected else {}
    config = peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=NUM_VIRTUAL, **options)
    wrapped = adapted(random_model(tiny_config("everything")), config)
    for call in (wrapped, lambda **inputs: wrapped.generate(**inputs, **GREEDY)):
        with pytest.raises(TypeError, match=r"Mamba.*[Pp]refix tuning.*prompt tuning"):
            call(input_ids=IDS, attention_mask=MASK)
