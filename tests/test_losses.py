"""The loss that a trainer is given: `Trainer` with label smoothing, gradient accumulation and pads on either side."""

import pickle

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch.nn import functional as F
from transformers import DataCollatorForLanguageModeling, PreTrainedTokenizerFast, Trainer, TrainingArguments

from mambaformer import MambaFormerForCausalLM, MambaFormerForSequenceClassification
from oracle import assert_same_logits
from patterns import PATTERNS, PLAIN_SGD, VOCAB, tiny_config
from sequences import random_ids, random_rows
from tiny_models import random_model, shared_model

# Its length is what `Trainer` counts wrongly, so the rows are short and of different lengths.
ROWS = random_rows(3, (7, 3, 5, 2, 6, 4, 1, 8))
SIDES = ["left", "right", "middle"]
# The oldest supported Transformers knows it only by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing")


def places(side, length, width):
    """Columns of the real tokens of a row."""
    if side == "middle":
        return [*range(length - length // 2), *range(width - length // 2, width)]
    return range(width - length, width) if side == "left" else range(length)


def padded(rows, side, width=None, first_label=True):
    """A batch whose pads are ordinary tokens without a label; `first_label`: whether a row's first token has one."""
    width = width or max(len(row) for row in rows)
    ids = torch.full((len(rows), width), 5)
    mask, labels = torch.zeros_like(ids), torch.full_like(ids, -100)
    for index, row in enumerate(rows):
        columns = list(places(side, len(row), width))
        ids[index, columns] = labels[index, columns] = torch.tensor(row)
        mask[index, columns] = 1
        if not first_label:
            labels[index, columns[0]] = -100
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def counted(batch):
    """The targets that `Trainer` counts in a batch."""
    return (batch["labels"][:, 1:] != -100).sum()


def gradients(model, loss):
    model.zero_grad()
    loss.backward()
    return {name: parameter.grad.clone() for name, parameter in model.named_parameters() if parameter.grad is not None}


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_same_logits(found[name], gradient)


def loss_alone(model, rows):
    """The mean over the targets of all rows, each row fed by itself without pads and scored by hand."""
    total, count = 0, 0
    for row in rows:
        ids = torch.tensor([row])
        logits = model(ids, use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, ids[0, 1:], reduction="sum")
        count += len(row) - 1
    return total / count


def arguments(folder, **options):
    return TrainingArguments(output_dir=str(folder), **PLAIN_SGD | {"learning_rate": 1.0, "max_steps": 1} | options)


def collate(side, **options):
    return lambda examples: padded([example["input_ids"] for example in examples], side, **options)


def step_of(folder, model, examples, collator, rows, accumulated, **options):
    """The step that `Trainer` takes with plain SGD at a rate of 1: minus the gradient, by name."""
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    chosen = arguments(folder, per_device_train_batch_size=rows, gradient_accumulation_steps=accumulated, **options)
    Trainer(model, chosen, train_dataset=examples, data_collator=collator).train()
    return {name: parameter.detach() - before[name] for name, parameter in model.named_parameters()}


def examples_of(rows):
    return [{"input_ids": row} for row in rows]


# ---- pads


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_loss_and_gradients_of_padded_rows_are_those_of_the_rows_alone(pattern, side):
    """The first token after left pads is no target, but `Trainer` counts it: short rows lost 12% of their loss."""
    model = random_model(tiny_config(pattern), loudness=0.8).train()
    rows = ROWS[:3]
    wanted = loss_alone(model, rows)
    by_hand = gradients(model, wanted)
    batch = padded(rows, side, width=9)
    for count in (None, counted(batch), int(counted(batch))):
        loss = model(**batch, num_items_in_batch=count, use_cache=False).loss
        assert_same_logits(loss, wanted)
        assert_same_gradients(gradients(model, loss), by_hand)


@pytest.mark.parametrize("side", SIDES)
def test_labels_at_pads_count_neither_as_targets_nor_in_the_mean(side):
    """With labels that are the input ids, `Trainer` counts pads too, which diluted the loss."""
    model = shared_model("everything")
    batch = padded(ROWS[:3], side, width=9)
    batch["labels"] = batch["input_ids"].clone()
    with torch.no_grad():
        wanted = loss_alone(model, ROWS[:3])
        assert_same_logits(model(**batch).loss, wanted)
        assert_same_logits(model(**batch, num_items_in_batch=counted(batch)).loss, wanted)


@pytest.mark.parametrize("side", SIDES)
def test_labels_that_are_shifted_already_give_the_same_loss(side):
    model = shared_model("everything")
    batch = padded(ROWS[:3], side, width=9)
    shifted = F.pad(batch["labels"], (0, 1), value=-100)[:, 1:]
    with torch.no_grad():
        wanted = model(**batch).loss
        assert_same_logits(model(**batch, shift_labels=shifted).loss, wanted)
        count = (shifted != -100).sum()
        assert_same_logits(model(**batch, shift_labels=shifted, num_items_in_batch=count).loss, wanted)


def test_some_labels_left_out_at_real_tokens_are_no_targets():
    model, batch = shared_model("everything"), padded(ROWS[:1], "left", width=9)
    batch["labels"][0, [4, 6]] = -100
    with torch.no_grad():
        logits, label = model(**batch).logits[0], batch["labels"][0]
        wanted = F.cross_entropy(logits[[2, 4, 6, 7]], label[[3, 5, 7, 8]])
        assert_same_logits(model(**batch).loss, wanted)
        assert_same_logits(model(**batch, num_items_in_batch=counted(batch)).loss, wanted)


def test_a_batch_without_a_target_has_no_mean_and_adds_nothing_to_a_count():
    """As for Transformers' models: a mean over nothing is NaN, and a sum over nothing is 0 of any count."""
    model = shared_model("everything")
    for batch in (padded([[3], [4]], "left", width=4), padded([[3, 4]], "right", first_label=False)):
        batch["labels"][:, 1:] = torch.where(batch["attention_mask"][:, :-1] == 0, batch["labels"][:, 1:], -100)
        assert model(**batch).loss.isnan()
        loss = model(**batch, num_items_in_batch=torch.tensor(7)).loss
        assert loss == 0 and loss.requires_grad
    batch["labels"][:] = -100
    assert model(**batch).loss.isnan() and model(**batch, num_items_in_batch=7).loss == 0


def test_pads_before_the_first_token_predict_nothing():
    """A loss outside the model (label smoothing, TRL) scored the first token by logits that had seen it."""
    model = shared_model("everything")
    batch = padded(ROWS[:3], "left", width=9)
    with torch.no_grad():
        outputs = model(**batch, output_hidden_states=True)
    leading = batch["attention_mask"] == 0
    assert (outputs.logits[leading] == 0).all() and (outputs.hidden_states[-1][leading] == 0).all()
    assert (outputs.logits[~leading] != 0).any(-1).all()


def test_the_loss_keeps_float64():
    """Transformers' loss rounds logits to float32, and gradients with them."""
    model, ids = shared_model("paper"), torch.tensor(ROWS[:1])
    loss = model(ids, labels=ids).loss
    assert loss.dtype is torch.float64
    assert_same_logits(loss, loss_alone(model, ROWS[:1]), tolerance=1e-14)


def test_a_loss_of_the_users_own_is_called_with_the_targets():
    model, seen = random_model(tiny_config("paper")), []

    def own(logits, labels, vocab_size, **kwargs):
        seen.append((labels, kwargs["num_items_in_batch"], vocab_size))
        return logits.sum()

    model.loss_function = own
    batch = padded(ROWS[:2], "left")
    assert model(**batch, num_items_in_batch=9).loss == model(**batch).logits.sum()
    labels, count, size = seen[0]
    assert size == VOCAB and (labels != -100).sum() == sum(len(row) - 1 for row in ROWS[:2])
    assert count == 9 * 8 / 9


class Own(MambaFormerForCausalLM):
    """A user's subclass, whose name says nothing of what it is."""


def with_adapter(model):
    config = LoraConfig(r=2, target_modules=["q_proj", "in_proj"], init_lora_weights=False)
    return get_peft_model(model, config)


def of_subclass(model):
    own = Own(model.config).double().eval()
    own.load_state_dict(model.state_dict())
    return own


FORMS = {"plain": lambda model: model, "adapter": with_adapter, "subclass": of_subclass}


# ---- gradient accumulation


@pytest.mark.slow
@pytest.mark.parametrize("side", ["right", "middle"])
def test_accumulated_micro_batches_make_the_step_of_one_batch(tmp_path, side):
    """The sum over each micro-batch is divided by the targets of all of them."""
    whole, parts = (random_model(tiny_config("everything"), loudness=0.8) for _ in range(2))
    wanted = step_of(tmp_path, whole, examples_of(ROWS), collate(side), rows=8, accumulated=1)
    found = step_of(tmp_path, parts, examples_of(ROWS), collate(side), rows=2, accumulated=4)
    alone = random_model(tiny_config("everything"), loudness=0.8)
    assert_same_gradients(found, wanted)
    assert_same_gradients(found, {name: -g for name, g in gradients(alone, loss_alone(alone, ROWS)).items()})


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 4])
def test_a_subclass_under_any_name_takes_the_step_of_the_rows_alone(tmp_path, accumulated):
    """`Trainer` reads in a class's name whether labels are shifted, and counted first tokens of others as targets."""
    model, alone = (random_model(tiny_config("everything"), loudness=0.8) for _ in range(2))
    model = of_subclass(model)
    found = step_of(tmp_path, model, examples_of(ROWS), collate("right"), 8 // accumulated, accumulated)
    assert_same_gradients(found, {name: -g for name, g in gradients(alone, loss_alone(alone, ROWS)).items()})


@pytest.mark.slow
def test_left_pads_accumulate_exactly_when_first_tokens_have_no_label(tmp_path):
    models = [random_model(tiny_config("everything"), loudness=0.8) for _ in range(3)]
    collator = collate("left", first_label=False)
    wanted = step_of(tmp_path, models[0], examples_of(ROWS), collator, rows=8, accumulated=1)
    found = step_of(tmp_path, models[1], examples_of(ROWS), collator, rows=2, accumulated=4)
    assert_same_gradients(found, wanted)
    alone = {name: -g for name, g in gradients(models[2], loss_alone(models[2], ROWS)).items()}
    assert_same_gradients(found, alone)


@pytest.mark.slow
@pytest.mark.parametrize("side", SIDES)
def test_one_step_of_trainer_is_that_of_the_rows_alone(tmp_path, side):
    """Left pads made the step of short rows 12% smaller."""
    model, alone = (random_model(tiny_config("everything"), loudness=0.8) for _ in range(2))
    found = step_of(tmp_path, model, examples_of(ROWS), collate(side), rows=8, accumulated=1)
    assert_same_gradients(found, {name: -g for name, g in gradients(alone, loss_alone(alone, ROWS)).items()})


PROBLEMS = {
    "classes": ({"num_labels": 3}, [0, 2, 1, 1, 0, 2, 1]),
    "some_classes_ignored": ({"num_labels": 3}, [0, -100, 1, 1, -100, -100, 1]),
    "one_value": ({"num_labels": 1}, [0.5, -1.0, 2.0, 0.0, 3.0, 1.0, -100.0]),
    "one_whole_value": ({"num_labels": 1}, [5, -1, 2, 0, 3, 1, -4]),
    "two_values": ({"num_labels": 2, "problem_type": "regression"}, [[0.1 * n, -n] for n in range(7)]),
    "several_labels": ({"num_labels": 3}, [[1.0, 0.0, 1.0 * (n % 2)] for n in range(7)]),
}


def classifier(**options):
    """A float64 classifier with the loud weights of `random_model`, and a loud head."""
    config = tiny_config("everything", **{"pad_token_id": 5} | options)
    torch.manual_seed(0)
    model = MambaFormerForSequenceClassification(config).double().eval()
    model.model.load_state_dict(random_model(tiny_config("everything"), loudness=0.8).model.state_dict())
    torch.nn.init.normal_(model.score.weight)
    return model


def loss_of_problem(logits, labels, options):
    """By hand, the mean over what has a label."""
    labels = torch.tensor(labels)
    if options["num_labels"] == 1 or "problem_type" in options:
        return ((logits - labels.reshape(logits.shape)) ** 2).mean()
    if labels.is_floating_point():
        shares = torch.sigmoid(logits)
        return -(labels * shares.log() + (1 - labels) * (1 - shares).log()).mean()
    kept = labels != -100
    return -logits.log_softmax(-1)[kept].gather(1, labels[kept, None]).mean()


def collate_labels(examples):
    batch = padded([example["input_ids"] for example in examples], "right")
    return {**batch, "labels": torch.tensor([example["labels"] for example in examples])}


@pytest.mark.slow
@pytest.mark.parametrize("problem", PROBLEMS)
def test_a_classifiers_step_does_not_grow_with_accumulation(tmp_path, problem):
    """`Trainer` leaves the division to a forward with `**kwargs`; this one ignored the count: x8 for 8 parts."""
    options, labels = PROBLEMS[problem]
    examples = [{"input_ids": row, "labels": label} for row, label in zip(ROWS, labels, strict=False)]
    hand, whole, parts = (classifier(**options) for _ in range(3))
    logits = torch.cat([hand(torch.tensor([row]), attention_mask=torch.ones(1, len(row))).logits for row in ROWS[:7]])
    wanted = gradients(hand, loss_of_problem(logits, labels, options))
    if problem != "one_value":  # `Trainer` counts no -100, which is a value here: then only a whole batch is exact
        found = step_of(tmp_path, parts, examples, collate_labels, rows=2, accumulated=4)
        assert_same_gradients(found, {name: -gradient for name, gradient in wanted.items()} | unused(found))
    found = step_of(tmp_path, whole, examples, collate_labels, rows=7, accumulated=1)
    assert_same_gradients(found, {name: -gradient for name, gradient in wanted.items()} | unused(found))
    assert parts.config.problem_type == options.get("problem_type")  # a forward writes nothing


def unused(step):
    """Parameters without a gradient do not move."""
    return {name: torch.zeros_like(change) for name, change in step.items() if not change.any()}


@pytest.mark.parametrize(
    "options, labels, message",
    [
        ({"num_labels": 3}, torch.tensor([0, 3]), "class indices below 3"),
        ({"num_labels": 3}, torch.tensor([0, -1]), "class indices below 3"),
        ({"num_labels": 3}, torch.tensor([0, 1, 2]), "one a row"),
        ({"num_labels": 3}, torch.tensor([0.0, 1.0]), "must be \\(2, 3\\)"),
        ({"num_labels": 1}, torch.tensor([0.0, 1.0, 2.0]), "must be \\(2, 1\\)"),
        ({"num_labels": 2, "problem_type": "single_label_classification"}, torch.ones(2, 2), "config.problem_type"),
    ],
)
def test_labels_that_do_not_fit_a_classifier_are_refused(options, labels, message):
    batch = padded(ROWS[:2], "right") | {"labels": labels}
    model = classifier(**options)
    cache = model.make_cache()
    with pytest.raises(ValueError, match=message), torch.no_grad():
        model(**batch, cache=cache)
    assert cache.get_seq_length() == 0  # a classifier had fed it by then


def test_labels_may_be_integers_of_any_width():
    """Labels of 32 bits were a RuntimeError of PyTorch, after the cache was fed."""
    model, batch = classifier(num_labels=3), padded(ROWS[:2], "right")
    types = (torch.int8, torch.int32, torch.long)
    losses = {model(**batch | {"labels": torch.tensor([2, 1], dtype=dtype)}).loss.item() for dtype in types}
    assert len(losses) == 1
    model, ids = shared_model("everything"), batch["input_ids"]
    assert len({model(ids, labels=ids.to(dtype)).loss.item() for dtype in types}) == 1


# ---- label smoothing


def smoothed_loss_of(model, batch, epsilon):
    """By hand: the next token has 1 - epsilon of the weight, and all tokens share epsilon."""
    with torch.no_grad():
        scores = -model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(-1)
    scores, labels = scores[:, :-1], batch["labels"][:, 1:]
    kept = labels != -100
    right = scores[kept].gather(1, labels[kept, None])[:, 0]
    return ((1 - epsilon) * right + epsilon * scores[kept].mean(-1)).mean()


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("is_counted", [False, True])
def test_label_smoothing_scores_the_next_token(tmp_path, form, is_counted):
    """`Trainer` shifts labels only for classes that it knows by name, and trained the model to copy its input."""
    model = FORMS[form](random_model(tiny_config("everything"), loudness=0.8))
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    batch = padded(ROWS[:4], "right")
    wanted = smoothed_loss_of(model, batch, 0.1)
    count = counted(batch) if is_counted else None
    # Its smoother sums in float32.
    assert_same_logits(trainer.compute_loss(model, dict(batch), num_items_in_batch=count), wanted, tolerance=1e-6)


def test_label_smoothing_trains_nothing_at_left_pads(tmp_path):
    """The first token after left pads was scored by its own logits; pads predict nothing and have no gradient."""
    model = random_model(tiny_config("everything"), loudness=0.8)
    trainer = Trainer(model, arguments(tmp_path, label_smoothing_factor=0.1))
    batches = {side: padded(ROWS[:3], side, width=9) for side in ("left", "right")}
    counts = {side: counted(batch) for side, batch in batches.items()}
    assert counts["left"] == counts["right"] + 3
    found = {
        side: gradients(model, trainer.compute_loss(model, dict(batch), num_items_in_batch=counts["right"]))
        for side, batch in batches.items()
    }
    for name, gradient in found["right"].items():
        assert_same_logits(found["left"][name], gradient, tolerance=1e-6)


# ---- what else a trainer does


def test_evaluation_and_prediction_leave_caches_out(tmp_path):
    """Outputs that `Trainer` gathers must be tensors of logits; a cache in them cannot be concatenated."""
    model = random_model(tiny_config("everything"), loudness=0.8)
    options = {"include_num_input_tokens_seen": "non_padding", "per_device_eval_batch_size": 3}
    trainer = Trainer(
        model, arguments(tmp_path, **options), eval_dataset=examples_of(ROWS), data_collator=collate("left")
    )
    batches = [padded(ROWS[start : start + 3], "left") for start in (0, 3, 6)]
    with torch.no_grad():
        losses = [(loss_alone(model, ROWS[start : start + 3]), len(ROWS[start : start + 3])) for start in (0, 3, 6)]
    wanted = sum(loss * count for loss, count in losses) / len(ROWS)
    assert_same_logits(torch.tensor(trainer.evaluate()["eval_loss"]), wanted.float(), tolerance=1e-6)
    model.config.use_cache = True
    found = trainer.predict(examples_of(ROWS))
    assert found.predictions.shape == (8, max(batch["input_ids"].shape[1] for batch in batches), VOCAB)
    assert {"cache", "past_key_values"} <= set(model.config.keys_to_ignore_at_inference)


@pytest.mark.parametrize("problem", ["classes", "one_value", "several_labels"])
def test_a_classifier_is_evaluated_and_predicts_as_row_by_row(tmp_path, problem):
    """Caches in the outputs cannot be gathered, nor may batches of other widths change a row's answer."""
    options, labels = PROBLEMS[problem]
    examples = [{"input_ids": row, "labels": label} for row, label in zip(ROWS, labels, strict=False)]
    model = classifier(**options, use_cache=True)
    with torch.no_grad():
        wanted = torch.cat([model(torch.tensor([row])).logits for row in ROWS[:7]])
    chosen = arguments(tmp_path, per_device_eval_batch_size=7)
    trainer = Trainer(model, chosen, eval_dataset=examples, data_collator=collate_labels)
    loss = loss_of_problem(wanted, labels, options).item()
    assert trainer.evaluate()["eval_loss"] == pytest.approx(loss, rel=1e-5)
    trainer.args.per_device_eval_batch_size = 2
    assert_same_logits(torch.tensor(trainer.predict(examples).predictions), wanted)


@pytest.mark.slow
@pytest.mark.parametrize("accumulated", [1, 4])
def test_label_smoothing_of_classes_scores_each_row_by_its_own_logits(tmp_path, accumulated):
    """Only causal models shift labels."""
    examples = [{"input_ids": row, "labels": index % 3} for index, row in enumerate(ROWS)]
    model, alone = classifier(num_labels=3), classifier(num_labels=3)
    options = {"rows": 8 // accumulated, "accumulated": accumulated, "label_smoothing_factor": 0.1}
    found = step_of(tmp_path, model, examples, collate_labels, **options)
    logits = torch.cat([alone(torch.tensor([row])).logits for row in ROWS])
    wanted = gradients(alone, F.cross_entropy(logits, torch.arange(8) % 3, label_smoothing=0.1))
    for name, gradient in wanted.items():
        assert_same_logits(found[name], -gradient, tolerance=1e-6)


@pytest.mark.parametrize("problem", PROBLEMS)
def test_classifiers_train_in_bfloat16_autocast_with_a_loss_in_float32(problem):
    options, labels = PROBLEMS[problem]
    model = classifier(**options)
    batch = collate_labels([{"input_ids": row, "labels": label} for row, label in zip(ROWS, labels, strict=False)])
    with torch.no_grad():
        wanted = model(**batch).loss
    model = model.float().train()
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, num_items_in_batch=(batch["labels"] != -100).sum(), use_cache=False).loss
    loss.backward()
    assert loss.dtype is torch.float32
    assert abs(loss - wanted) < 0.05 * wanted
    assert all(parameter.grad is None or parameter.grad.isfinite().all() for parameter in model.parameters())


def test_outputs_of_training_can_be_pickled():
    model = random_model(tiny_config("everything"), loudness=0.8)
    outputs = model(**padded(ROWS[:2], "left"), use_cache=False)
    again = pickle.loads(pickle.dumps(outputs))
    assert torch.equal(again.loss, outputs.loss) and torch.equal(again.logits, outputs.logits)


def test_bfloat16_autocast_trains_with_a_loss_in_float32():
    model = random_model(tiny_config("everything"), loudness=0.8).float().train()
    batch = padded(ROWS[:3], "left")
    with torch.autocast("cpu", torch.bfloat16):
        loss = model(**batch, num_items_in_batch=counted(batch), use_cache=False).loss
    loss.backward()
    wanted = loss_alone(model, ROWS[:3])
    assert loss.dtype is torch.float32 and abs(loss - wanted) < 0.05 * wanted
    assert all(parameter.grad.isfinite().all() for parameter in model.parameters())


@pytest.mark.slow
def test_the_collator_for_language_modeling_trains_as_rows_alone(tmp_path):
    """It takes every pad id for a pad, in labels too, and pads on the side that the tokenizer says."""
    from tokenizers import Tokenizer, models

    vocabulary = {f"t{index}": index for index in range(VOCAB)}
    tokens = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    rows = [[token if token != 5 else 6 for token in row] for row in ROWS]
    for side in ("left", "right"):
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokens, pad_token="t5", padding_side=side)
        model, alone = (random_model(tiny_config("everything"), loudness=0.8) for _ in range(2))
        collator = DataCollatorForLanguageModeling(tokenizer, mlm=False)
        found = step_of(tmp_path, model, examples_of(rows), collator, rows=8, accumulated=1)
        assert_same_gradients(found, {name: -g for name, g in gradients(alone, loss_alone(alone, rows)).items()})


def test_the_loss_counts_real_tokens_wherever_the_pads_stand():
    """The first token behind a left pad was scored by the logits at that pad, which come after it."""
    model, ids = shared_model("everything"), random_ids(length=6)
    pad = torch.full((1, 3), 5)
    alone = model(ids, labels=ids, use_cache=False).loss
    for parts in ([pad, ids], [ids, pad], [ids[:, :2], pad, ids[:, 2:]]):
        text = torch.cat(parts, dim=1)
        mask = torch.cat([torch.zeros_like(part) if part is pad else torch.ones_like(part) for part in parts], dim=1)
        assert_same_logits(model(text, attention_mask=mask, labels=text, use_cache=False).loss, alone)
