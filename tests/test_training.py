"""Fine-tuning: the whole model with `Trainer`, experts, and adapters of PEFT beside experts."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainerCallback, TrainingArguments

from mambaformer import MambaFormerForCausalLM
from oracle import assert_same_logits, expected
from patterns import ALL_FIVE, tiny_config
from reference import reference_logits, tuned_weights
from sequences import feed, one_turn, random_rows
from tiny_models import random_expert, random_model

# The oldest supported Transformers knows it only by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing")

ROWS = random_rows(0, (9, 9))
IDS = torch.tensor(ROWS)
# On both sides of the singular bases, and in every mixer.
ADAPTED = ["q_proj", "k_proj", "o_proj", "in_proj", "x_proj", "dt_proj", "out_proj", "up_proj", "down_proj", "lm_head"]


# ---- the whole model


class StopAt(TrainerCallback):
    """Cuts a run off after so many steps, once its checkpoint is written."""

    def __init__(self, step):
        self.step = step

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop |= state.global_step == self.step


def texts():
    """Rows that count upwards: the next token can be learned."""
    starts = torch.arange(16)
    rows = (starts[:, None] + torch.arange(12)) % 7
    return [{"input_ids": row, "labels": row} for row in rows]


def trainer(folder, callbacks=(), **options):
    torch.manual_seed(1)
    model = MambaFormerForCausalLM(tiny_config("everything", tie_word_embeddings=True))
    arguments = TrainingArguments(
        output_dir=str(folder),
        max_steps=24,
        save_steps=10,
        per_device_train_batch_size=4,
        learning_rate=1e-2,
        logging_steps=1,
        report_to=[],
        bf16=False,
        use_cpu=True,
        dataloader_pin_memory=False,
        disable_tqdm=True,
        **options,
    )
    return Trainer(model, arguments, train_dataset=texts(), callbacks=list(callbacks))


def losses(run):
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


@pytest.mark.slow
def test_a_resumed_run_ends_with_the_weights_of_an_uninterrupted_one(tmp_path):
    whole = trainer(tmp_path / "whole")
    whole.train()
    assert whole.model.config.layer_types == ALL_FIVE
    assert losses(whole)[-1] < 0.6 * losses(whole)[0]

    trainer(tmp_path / "cut", [StopAt(10)]).train()
    resumed = trainer(tmp_path / "cut")
    resumed.train(resume_from_checkpoint=True)
    assert losses(resumed) == losses(whole)
    for name, weight in whole.model.state_dict().items():
        assert torch.equal(weight, resumed.model.state_dict()[name]), name


@pytest.mark.slow
def test_a_run_with_gradient_checkpointing_ends_where_one_without_ends(tmp_path):
    plain, checkpointed = trainer(tmp_path / "plain"), trainer(tmp_path / "saving", gradient_checkpointing=True)
    plain.train()
    checkpointed.train()
    assert checkpointed.model.is_gradient_checkpointing
    assert losses(checkpointed) == losses(plain)


def gradients(model, parameters, **options):
    """Of the loss of `IDS` with pads, each as a copy."""
    mask = torch.ones_like(IDS)
    mask[0, :3] = 0
    for parameter in parameters:
        parameter.grad = None
    model(IDS, attention_mask=mask, labels=IDS, **options).loss.backward()
    return [parameter.grad.clone() for parameter in parameters]


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_gradients_are_the_same_with_gradient_checkpointing(use_reentrant):
    model = random_model(tiny_config("everything"), loudness=0.8).train()
    parameters = list(model.parameters())
    plain, runs = gradients(model, parameters), []
    model.model.layers[1].mamba.register_forward_hook(lambda *_: runs.append(1))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    for one, other in zip(gradients(model, parameters), plain, strict=True):
        assert_same_logits(one, other)
    assert len(runs) == 2  # forward, and again for the backward pass


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_an_expert_is_trained_through_gradient_checkpointing(use_reentrant):
    model = random_model(tiny_config("everything"), loudness=0.8).train().requires_grad_(False)
    start = random_expert(model, seed=2)
    vectors = {name: z.double().requires_grad_() for name, z in start.vectors.items()}
    plain = gradients(model, vectors.values(), expert_vector=vectors)
    assert all(gradient.abs().max() > 1e-8 for gradient in plain)
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    model.enable_input_require_grads()
    for one, other in zip(gradients(model, vectors.values(), expert_vector=vectors), plain, strict=True):
        assert_same_logits(one, other)


# ---- adapters of PEFT


def adapted(modules=ADAPTED, name="default", model=None, **options):
    """A `PeftModel` with loud random LoRA weights, and the model in it."""
    model = random_model(tiny_config("everything")) if model is None else model
    torch.manual_seed(len(name))
    options = {"r": 3, "lora_alpha": 6, "target_modules": modules, "init_lora_weights": False} | options
    wrapped = get_peft_model(model, LoraConfig(**options), adapter_name=name)
    return wrapped.eval(), model


def dense_weights(model, vectors=None, adapter="default"):
    """The state of a plain model that should compute the same: W' = U diag(s * z) V^T of the base, plus B A."""
    state, deltas = {}, {}
    for name, module in model.named_modules():
        if hasattr(module, "lora_A") and adapter in module.lora_A:
            deltas[f"{name}.weight"] = module.get_delta_weight(adapter).detach()
    for name, tensor in model.state_dict().items():
        if "lora_" not in name:
            state[name.replace("base_layer.", "")] = tensor.detach().clone()
    state = tuned_weights(state, vectors)
    return {name: tensor + deltas.get(name, 0) for name, tensor in state.items()}


def reference(model, vectors=None, adapter="default"):
    return reference_logits(dense_weights(model, vectors, adapter), model.config.to_dict(), ROWS)


def logits_of(model, **options):
    with torch.no_grad():
        return list(model(input_ids=IDS, **options).logits)


def test_an_adapter_adds_to_the_base_and_an_expert_scales_the_base_alone():
    wrapped, model = adapted()
    expert = random_expert(random_model(model.config), seed=4)
    assert model.linear_modules().keys() == expert.vectors.keys()
    base, tuned = reference(model), reference(model, expert.vectors)
    assert (base[0] - tuned[0]).abs().max() > 0.1
    assert_same_logits(logits_of(wrapped), base)
    assert_same_logits(logits_of(wrapped, expert_vector=expert), tuned)
    assert_same_logits(logits_of(wrapped, expert_vector=[None, expert]), [base[0], tuned[1]])
    before = logits_of(wrapped)
    model.merge_expert_vector(expert)
    assert_same_logits(logits_of(wrapped), tuned)
    model.unmerge_expert_vector()
    assert all(torch.equal(one, other) for one, other in zip(logits_of(wrapped), before, strict=True))


def test_adapters_train_together_with_an_expert_vector_on_a_frozen_base():
    wrapped, model = adapted(init_lora_weights=True)
    expert = random_expert(random_model(model.config), seed=4)
    before = {name: weight.detach().clone() for name, weight in model.named_parameters()}
    optimizer = torch.optim.AdamW([weight for weight in wrapped.parameters() if weight.requires_grad], lr=1e-2)
    found = []
    for _ in range(12):
        loss = wrapped.train()(input_ids=IDS, labels=IDS, expert_vector=expert).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        found.append(loss.item())
    assert found[-1] < 0.8 * found[0]
    for name, weight in model.named_parameters():
        assert torch.equal(weight, before[name]) == ("lora_" not in name), name


@pytest.mark.parametrize("with_expert", [False, True])
def test_generate_through_an_adapter_says_what_the_dense_weights_say(with_expert):
    wrapped, model = adapted()
    expert = random_expert(random_model(model.config), seed=4) if with_expert else None
    dense = random_model(model.config)
    dense.load_state_dict(dense_weights(model, expert and expert.vectors))
    options = {"max_new_tokens": 8, "do_sample": False}
    found = wrapped.generate(input_ids=IDS, expert_vector=expert, **options)
    assert torch.equal(found, dense.generate(IDS, **options))
    if not with_expert:
        assert torch.equal(found, wrapped.merge_and_unload().generate(IDS, **options))


def two_adapters():
    wrapped, model = adapted(name="one")
    wrapped.add_adapter("other", LoraConfig(r=2, target_modules=["in_proj", "v_proj"], init_lora_weights=False))
    return wrapped, model


def rescale(wrapped):
    for module in wrapped.modules():
        if hasattr(module, "set_scale"):
            module.set_scale("one", 0.5)


EVENTS = {
    "switched": lambda wrapped: wrapped.set_adapter("other"),
    "disabled": lambda wrapped: wrapped.base_model.disable_adapter_layers(),
    "rescaled": rescale,
    "unloaded": lambda wrapped: wrapped.unload(),
}


def assert_noticed(model, cache, event, **options):
    """Half of the text is fed before the event; what comes after it is as if all of it had been fed after it."""
    half = IDS[:, :5]
    with torch.no_grad():
        model(half, past_key_values=cache, **options)
        before = model(IDS, **options).logits[:, 5:]
        event()
        found = model(IDS[:, 5:], past_key_values=cache, **options).logits
        after = model(IDS, **options).logits[:, 5:]
    assert (before - after).abs().max() > 0.01
    assert_same_logits(found, after)


@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("with_expert", [False, True])
def test_a_cache_notices_what_happens_to_adapters(event, with_expert):
    wrapped, model = two_adapters()
    options = {"expert_vector": random_expert(random_model(model.config), seed=4)} if with_expert else {}
    assert_noticed(model, model.make_cache(), lambda: EVENTS[event](wrapped), **options)


@pytest.mark.parametrize("with_expert", [False, True])
def test_a_cache_notices_an_adapter_that_was_added_and_merged(with_expert):
    """PEFT writes through `weight.data`, which counts as no write, and leaves the modules as they were."""
    model = random_model(tiny_config("everything")).requires_grad_(False)
    expert = random_expert(model, seed=4)
    options = {"expert_vector": expert} if with_expert else {}
    assert_noticed(model, model.make_cache(), lambda: adapted(model=model)[0].merge_and_unload(), **options)
    assert_same_logits(logits_of(model, expert_vector=expert), expected(model, ROWS, [expert] * 2))


def test_an_expert_scales_what_an_adapter_was_merged_into():
    wrapped, model = adapted()
    expert = random_expert(random_model(model.config), seed=4)
    weights = tuned_weights(dense_weights(model), expert.vectors)
    assert_noticed(model, model.make_cache(), wrapped.merge_adapter, expert_vector=expert)
    wanted = reference_logits(weights, model.config.to_dict(), ROWS)
    assert_same_logits(logits_of(wrapped, expert_vector=expert), wanted)


def test_a_cache_notices_that_rows_change_their_adapters():
    wrapped, model = two_adapters()
    cache = model.make_cache()
    with torch.no_grad():
        wrapped(input_ids=IDS[:, :5], past_key_values=cache, adapter_names=["one", "other"])
        found = wrapped(input_ids=IDS[:, 5:], past_key_values=cache, adapter_names=["other", "one"]).logits
    wanted = [reference(model, adapter="other")[0], reference(model, adapter="one")[1]]
    assert_same_logits(list(found), [row[5:] for row in wanted])


def test_an_adapter_costs_no_encoding_again_while_nothing_changes():
    _, model = two_adapters()
    lengths = []
    model.model.layers[0].register_forward_pre_hook(lambda module, args: lengths.append(args[0].shape[1]))
    turns = [one_turn([row[start:stop] for row in ROWS]) for start, stop in ((0, 5), (5, 6), (6, 9))]
    found = feed(model, model.make_cache(), turns, expert_vector=random_expert(random_model(model.config), seed=4))
    assert lengths == [5, 1, 3] and torch.cat(found).isfinite().all()


# ---- generation while training


@pytest.mark.parametrize("options", [{}, {"cache_implementation": "static"}, {"use_cache": False}], ids=str)
def test_a_model_in_checkpointed_training_generates_as_in_eval_mode(options):
    """`generate` made a cache itself, and the forward refused it although no gradient was wanted."""
    model = random_model(tiny_config("everything"), loudness=0.8)
    wanted = model.generate(IDS, max_new_tokens=8, do_sample=False)
    model.train().gradient_checkpointing_enable()
    assert torch.equal(model.generate(IDS, max_new_tokens=8, do_sample=False, **options), wanted)
    assert model.training and model.is_gradient_checkpointing


def test_checkpointing_without_gradients_uses_a_given_cache():
    """Evaluation callbacks that leave the model in training mode fed their caches in vain."""
    model = random_model(tiny_config("everything"), loudness=0.8)
    wanted = expected(model, ROWS)
    model.train().gradient_checkpointing_enable()
    turns = [one_turn([row[start:stop] for row in ROWS]) for start, stop in ((0, 4), (4, 5), (5, 9))]
    assert_same_logits(feed(model, model.make_cache(), turns), wanted)
    with pytest.raises(ValueError, match=r"torch.no_grad"):
        model(IDS, past_key_values=model.make_cache())


def test_generating_between_two_steps_leaves_the_gradients_as_they_are():
    model = random_model(tiny_config("everything"), loudness=0.8).train()
    parameters = list(model.parameters())
    model.gradient_checkpointing_enable()
    plain = gradients(model, parameters)
    model.generate(IDS, max_new_tokens=3, do_sample=False)
    assert all(torch.equal(a, b) for a, b in zip(gradients(model, parameters), plain, strict=True))
