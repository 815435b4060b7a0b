"""Law 11: sequences packed into a row get the logits and gradients they have alone, however the border is told."""

import functools
import random
from dataclasses import dataclass

import pytest
import torch
from torch.nn import functional as F
from transformers import DataCollatorWithFlattening, Trainer, TrainingArguments

from oracle import assert_same_logits, expected
from patterns import PLAIN_SGD, VOCAB, tiny_config
from reference import reference_logits
from sequences import random_rows
from tiny_models import every_random_pattern, random_expert, random_model, shared_model

# The oldest supported Transformers knows it only by its older name.
pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing")

# Lengths of the sequences in one row: around the window of 5, its sinks, and the 4 taps of the convolution.
ONE_ROW = {
    "mixed": (5, 1, 9, 3),
    "single_tokens": (1, 1, 1, 1),
    "alone": (7,),
    "tiny": (1, 2, 1, 3, 1, 1, 2, 1, 4, 1),
    "longer_than_the_window": (17, 2, 11),
    "ends_with_one": (12, 1),
    "starts_with_one": (1, 12),
}
# Rows of packed sequences, which are of different lengths and so end in pads.
SEVERAL_ROWS = ((5, 3), (1, 4, 2), (10,), (1, 1, 1))


@dataclass(frozen=True)
class Packed:
    """Rows of packed sequences: `segments` (rows, width) numbers them from 1 in each row and is 0 at pads."""

    ids: torch.Tensor
    segments: torch.Tensor
    sequences: list[list[int]]  # row after row

    def of_sequences(self, values: torch.Tensor) -> list[torch.Tensor]:
        """The part (tokens, ...) of (rows, width, ...) that belongs to each sequence."""
        return [
            values[row, self.segments[row] == number]
            for row in range(len(self.ids))
            for number in range(1, int(self.segments[row].max()) + 1)
        ]

    def starts(self) -> torch.Tensor:
        """True at the first token of each sequence, and at each pad: it belongs to none."""
        before = F.pad(self.segments[:, :-1], (1, 0), value=-1)
        return (self.segments != before) | (self.segments == 0)

    def positions(self, first: int = 0) -> torch.Tensor:
        columns = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        return first + columns - torch.where(self.starts(), columns, 0).cummax(1).values

    def labels(self) -> torch.Tensor:
        return self.ids.masked_fill(self.starts(), -100)


def pack(lengths_of_rows, seed=0, extra=0):
    """Random sequences of these lengths, each row filled up with pads that are ordinary tokens."""
    rng = random.Random(seed)
    width = max(map(sum, lengths_of_rows)) + extra
    ids = torch.tensor([[rng.randrange(VOCAB) for _ in range(width)] for _ in lengths_of_rows])
    segments, sequences = torch.zeros_like(ids), []
    for row, lengths in enumerate(lengths_of_rows):
        stops = torch.tensor(lengths).cumsum(0).tolist()
        for number, (length, stop) in enumerate(zip(lengths, stops, strict=True)):
            segments[row, stop - length : stop] = number + 1
            sequences.append(ids[row, stop - length : stop].tolist())
    return Packed(ids, segments, sequences)


def cumulative(packed):
    """What flash attention is told: where each sequence starts in the one row, and where the last one ends."""
    starts = packed.starts()[0].nonzero()[:, 0]
    lengths = torch.cat([starts, torch.tensor([packed.ids.shape[1]])]).int()
    longest = int(lengths.diff().max())
    return {"cu_seq_lens_q": lengths, "cu_seq_lens_k": lengths, "max_length_q": longest, "max_length_k": longest}


def numbers(packed):
    """`seq_idx` of the Mamba kernels; each pad is a sequence of its own."""
    return {"seq_idx": packed.starts().cumsum(1).int() - 1}


# How a border is told, in the arguments that trainers pass.
FORMS = {
    "position_ids": lambda packed: {"position_ids": packed.positions()},
    "position_ids_from_2": lambda packed: {"position_ids": packed.positions(2)},
    "seq_idx": numbers,
    "seq_idx_and_position_ids": lambda packed: numbers(packed) | {"position_ids": packed.positions()},
    "integer_mask": lambda packed: {"attention_mask": packed.segments},
    "integer_mask_and_position_ids": lambda packed: {
        "attention_mask": packed.segments,
        "position_ids": packed.positions(),
    },
}
# Cumulative lengths are of the flattened batch: one row.
FORMS_OF_ONE_ROW = FORMS | {
    "cu_seq_lens": cumulative,
    "cu_seq_lens_and_position_ids": lambda packed: cumulative(packed) | {"position_ids": packed.positions()},
    "everything": lambda packed: cumulative(packed) | numbers(packed) | {"position_ids": packed.positions()},
}
every_form = pytest.mark.parametrize("form", FORMS)
every_form_of_one_row = pytest.mark.parametrize("form", FORMS_OF_ONE_ROW)


@functools.cache
def quiet_model(pattern):
    """Roundings of gradients do not grow from layer to layer; never change its weights."""
    return random_model(tiny_config(pattern), loudness=0.8)


def weighted(logits_of_sequences):
    """A number that every logit moves, with random weights of either sign."""
    source = torch.Generator().manual_seed(5)
    parts = [torch.randn(logits.shape, generator=source, dtype=logits.dtype) for logits in logits_of_sequences]
    return sum((part * logits).sum() for part, logits in zip(parts, logits_of_sequences, strict=True))


def gradients_of(model, value):
    """By name, of all parameters."""
    named = dict(model.named_parameters())
    found = torch.autograd.grad(value, list(named.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(named, found, strict=True) if gradient is not None}


def assert_same_gradients(found, wanted):
    assert found.keys() == wanted.keys()
    for name, gradient in wanted.items():
        assert_same_logits(found[name], gradient)


def run(model, packed, form, forms=FORMS_OF_ONE_ROW, **options):
    """Logits (tokens, vocabulary) of each sequence in a packed forward."""
    return packed.of_sequences(model(packed.ids, use_cache=False, **forms[form](packed), **options).logits)


def run_alone(model, packed, experts=None):
    """The same of each sequence in a forward of its own."""
    experts = experts or [None] * len(packed.sequences)
    pairs = zip(packed.sequences, experts, strict=True)
    return [model(torch.tensor([ids]), use_cache=False, expert_vector=expert).logits[0] for ids, expert in pairs]


# ---- against the oracle


@functools.cache
def gradients_of_the_oracle(pattern):
    """Of `weighted`, for the sequences of `ONE_ROW["mixed"]`, token by token."""
    model = quiet_model(pattern)
    weights = {name: tensor.detach().requires_grad_() for name, tensor in model.named_parameters()}
    logits = reference_logits(weights, model.config.to_dict(), pack([ONE_ROW["mixed"]]).sequences)
    found = torch.autograd.grad(weighted(logits), list(weights.values()), allow_unused=True)
    return {name: gradient for name, gradient in zip(weights, found, strict=True) if gradient is not None}


@every_random_pattern
@every_form_of_one_row
def test_packed_sequences_have_the_logits_and_gradients_of_the_oracle(pattern, form):
    """Packing was refused (`position_ids` from 0) or sequences saw each other in silence: off by 0.64 to 1.14."""
    model, packed = quiet_model(pattern), pack([ONE_ROW["mixed"]])
    found = run(model, packed, form)
    assert_same_logits(found, expected(model, packed.sequences))
    assert_same_gradients(gradients_of(model, weighted(found)), gradients_of_the_oracle(pattern))


@every_form_of_one_row
@pytest.mark.parametrize("lengths", ONE_ROW)
@pytest.mark.parametrize("pattern", ["sliding_sinks", "everything"])
@torch.no_grad()
def test_logits_are_those_of_the_oracle_for_any_lengths(pattern, lengths, form):
    model, packed = shared_model(pattern), pack([ONE_ROW[lengths]], seed=1)
    assert_same_logits(run(model, packed, form), expected(model, packed.sequences))


@every_random_pattern
@every_form
@torch.no_grad()
def test_rows_of_packed_sequences_may_end_in_pads(pattern, form):
    model, packed = shared_model(pattern), pack(SEVERAL_ROWS, extra=2)
    assert_same_logits(run(model, packed, form), expected(model, packed.sequences))


@every_form
def test_gradients_of_rows_that_end_in_pads_are_those_of_the_sequences_alone(form):
    model, packed = quiet_model("everything"), pack(SEVERAL_ROWS, extra=2)
    wanted = gradients_of(model, weighted(run_alone(model, packed)))
    assert_same_gradients(gradients_of(model, weighted(run(model, packed, form))), wanted)


# ---- with everything else that a forward takes


@every_form_of_one_row
def test_packed_embeddings_have_the_logits_and_gradients_of_tokens(form):
    model, packed = quiet_model("everything"), pack([ONE_ROW["mixed"]])
    embeds = model.get_input_embeddings()(packed.ids).detach().requires_grad_()
    arguments = FORMS_OF_ONE_ROW[form](packed)
    found = packed.of_sequences(model(inputs_embeds=embeds, use_cache=False, **arguments).logits)
    assert_same_logits(found, expected(model, packed.sequences))
    for number, logits in enumerate(found):
        (gradient,) = torch.autograd.grad(logits.square().sum(), embeds, retain_graph=True)
        reached = (gradient != 0).any(-1)
        assert torch.equal(reached, packed.segments == number + 1), "a gradient crosses a border"


@every_form_of_one_row
@torch.no_grad()
def test_a_sequence_of_nans_leaves_its_neighbours_finite(form):
    """A state that is only multiplied by 0 at a border hands NaN on."""
    model, packed = quiet_model("everything"), pack([ONE_ROW["mixed"]])
    embeds = model.get_input_embeddings()(packed.ids)
    embeds[packed.segments == 1] = float("nan")
    arguments = FORMS_OF_ONE_ROW[form](packed)
    found = packed.of_sequences(model(inputs_embeds=embeds, use_cache=False, **arguments).logits)
    assert found[0].isnan().all()
    assert_same_logits(found[1:], expected(model, packed.sequences)[1:])


@every_form
def test_every_row_of_packed_sequences_may_have_an_expert_of_its_own(form):
    model, packed = quiet_model("everything"), pack(SEVERAL_ROWS, extra=1)
    experts = [None, random_expert(model, 1), random_expert(model, 2, rank=4), None]
    of_sequences = [expert for expert, row in zip(experts, SEVERAL_ROWS, strict=True) for _ in row]
    found = run(model, packed, form, expert_vector=experts)
    assert_same_logits(found, expected(model, packed.sequences, of_sequences))
    wanted = gradients_of(model, weighted(run_alone(model, packed, of_sequences)))
    assert_same_gradients(gradients_of(model, weighted(found)), wanted)


@every_form_of_one_row
def test_an_expert_is_trained_on_packed_sequences(form):
    model, packed = quiet_model("everything"), pack([ONE_ROW["mixed"]])
    vectors = {name: z.double().requires_grad_() for name, z in random_expert(model, 3).vectors.items()}
    found = weighted(run(model, packed, form, expert_vector=vectors))
    wanted = weighted(run_alone(model, packed, [vectors] * len(packed.sequences)))
    gradients = [torch.autograd.grad(value, list(vectors.values())) for value in (found, wanted)]
    for one, other in zip(*gradients, strict=True):
        assert other.abs().max() > 1e-8
        assert_same_logits(one, other)


@pytest.mark.parametrize("use_reentrant", [False, True])
@every_form_of_one_row
def test_gradient_checkpointing_leaves_packed_gradients_as_they_are(form, use_reentrant):
    model, packed = random_model(tiny_config("everything"), loudness=0.8).train(), pack([ONE_ROW["mixed"]])
    wanted = gradients_of(model, weighted(run_alone(model, packed)))
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    if use_reentrant:
        model.enable_input_require_grads()
    model.zero_grad()
    weighted(run(model, packed, form)).backward()
    assert_same_gradients({name: p.grad for name, p in model.named_parameters()}, wanted)


@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
@every_form
@torch.no_grad()
def test_every_attention_implementation_keeps_the_borders(implementation, form):
    model, packed = random_model(tiny_config("everything")), pack(SEVERAL_ROWS)
    model.set_attn_implementation(implementation)
    assert_same_logits(run(model, packed, form), expected(model, packed.sequences))


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        "position_ids",
        "everything",
        *(pytest.param(form, marks=pytest.mark.long) for form in ("seq_idx", "integer_mask", "cu_seq_lens")),
    ],
)
def test_a_compiled_forward_keeps_the_borders(form):
    """Under `torch.compile` nothing was looked at, and sequences saw each other."""
    torch._dynamo.reset()
    model = random_model(tiny_config("hybrid_sliding", layer_types=["hybrid_sliding"]), loudness=0.8)
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    packed = pack([(5, 1, 9, 3)])
    found = run(compiled, packed, form)
    assert_same_logits(found, expected(model, packed.sequences))
    wanted = gradients_of(model, weighted(run_alone(model, packed)))
    assert_same_gradients(gradients_of(model, weighted(found)), wanted)


@every_form_of_one_row
def test_hidden_states_of_packed_sequences_are_those_of_the_sequences_alone(form):
    model, packed = quiet_model("everything"), pack([ONE_ROW["mixed"]])
    options = {"use_cache": False, "output_hidden_states": True}
    found = model(packed.ids, **FORMS_OF_ONE_ROW[form](packed), **options).hidden_states
    for number, ids in enumerate(packed.sequences):
        alone = model(torch.tensor([ids]), **options).hidden_states
        for states, wanted in zip(found, alone, strict=True):
            assert_same_logits(packed.of_sequences(states)[number], wanted[0])


# ---- losses


def loss_alone(model, sequences):
    """The mean over the targets of all sequences, each fed by itself and scored by hand."""
    total, count = 0, 0
    for ids in sequences:
        logits = model(torch.tensor([ids]), use_cache=False).logits[0, :-1]
        total = total + F.cross_entropy(logits, torch.tensor(ids[1:], dtype=torch.long), reduction="sum")
        count += len(ids) - 1
    return total / count


@pytest.mark.parametrize("with_first_labels", [False, True])
@every_form_of_one_row
def test_the_loss_of_packed_sequences_is_that_of_the_sequences_alone(form, with_first_labels):
    """A sequence's first token is no target: nothing of its own sequence predicts it."""
    model, packed = quiet_model("everything"), pack([ONE_ROW["mixed"]])
    wanted = loss_alone(model, packed.sequences)
    labels = packed.ids if with_first_labels else packed.labels()
    arguments = FORMS_OF_ONE_ROW[form](packed)
    for count in (None, (labels[:, 1:] != -100).sum()):
        loss = model(packed.ids, labels=labels, num_items_in_batch=count, use_cache=False, **arguments).loss
        assert_same_logits(loss, wanted)
    assert_same_gradients(gradients_of(model, loss), gradients_of(model, wanted))


@pytest.mark.parametrize("form", [form for form in FORMS if "mask" in form])
@torch.no_grad()
def test_labels_at_the_pads_of_packed_rows_are_no_targets(form):
    model, packed = quiet_model("everything"), pack(SEVERAL_ROWS, extra=2)
    wanted = loss_alone(model, packed.sequences)
    arguments = FORMS[form](packed)
    for count in (None, packed.ids[:, 1:].numel()):
        loss = model(packed.ids, labels=packed.ids, num_items_in_batch=count, **arguments).loss
        assert_same_logits(loss, wanted)


def arguments_of(folder, **options):
    return TrainingArguments(output_dir=str(folder), **PLAIN_SGD | {"logging_steps": 1} | options)


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def pad(examples):
    """The same sequences in a padded batch."""
    rows = [torch.tensor(example["input_ids"]) for example in examples]
    pad_rows = functools.partial(torch.nn.utils.rnn.pad_sequence, batch_first=True)
    mask = pad_rows([torch.ones_like(row) for row in rows])
    ids = pad_rows(rows)
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


TOLD = {
    "position_ids": {},
    "position_ids_from_2": {"position_ids_start": 2},
    "cu_seq_lens": {"return_position_ids": False, "return_flash_attn_kwargs": True},
    "seq_idx": {"return_position_ids": False, "return_seq_idx": True},
    "everything": {"return_flash_attn_kwargs": True, "return_seq_idx": True},
}


@pytest.mark.slow
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("told", TOLD)
def test_trainer_with_flattened_batches_trains_as_with_padded_ones(tmp_path, told, smoothing):
    """`DataCollatorWithFlattening` was refused."""
    examples = [{"input_ids": row} for row in random_rows(6, (5, 2, 9, 1, 3, 7))]
    options = {
        "per_device_train_batch_size": 3,
        "gradient_accumulation_steps": 2,
        "label_smoothing_factor": smoothing,
        "remove_unused_columns": False,
    }
    runs = []
    for collator in (pad, DataCollatorWithFlattening(**TOLD[told])):
        model = random_model(tiny_config("everything"), loudness=0.8)
        trainer = Trainer(model, arguments_of(tmp_path, **options), train_dataset=examples, data_collator=collator)
        trainer.train()
        runs.append((trainer, dict(model.named_parameters())))
    (padded, wanted), (packed, found) = runs
    # The smoother sums in float32.
    assert losses_of(packed) == pytest.approx(losses_of(padded), rel=1e-4 if smoothing else 1e-9)
    for name, weight in wanted.items():
        assert_same_logits(found[name].detach(), weight.detach(), tolerance=1e-6 if smoothing else 1e-10)


# ---- refusals


@pytest.mark.parametrize(
    "arguments",
    [
        {"seq_idx": torch.zeros(1, 5, dtype=torch.int32)},
        {"seq_idx": torch.zeros(18, dtype=torch.int32)},
        {"seq_idx": torch.zeros(1, 18)},
        {"cu_seq_lens_q": torch.tensor([0, 5, 17]), "cu_seq_lens_k": torch.tensor([0, 5, 17])},
        {"cu_seq_lens_q": torch.tensor([0, 5, 20]), "cu_seq_lens_k": torch.tensor([0, 5, 20])},
        {"cu_seq_lens_q": torch.tensor([1, 5, 18]), "cu_seq_lens_k": torch.tensor([1, 5, 18])},
        {"cu_seq_lens_q": torch.tensor([0, 9, 5, 18]), "cu_seq_lens_k": torch.tensor([0, 9, 5, 18])},
        {"cu_seq_lens_q": torch.tensor([0, 5, 18]), "cu_seq_lens_k": torch.tensor([0, 6, 18])},
        {"cu_seq_lens_q": torch.tensor([[0, 5, 18]]), "cu_seq_lens_k": torch.tensor([[0, 5, 18]])},
        {"cu_seq_lens_q": torch.tensor([0.0, 5.0, 18.0]), "cu_seq_lens_k": torch.tensor([0.0, 5.0, 18.0])},
    ],
    ids=lambda arguments: str({name: value.tolist() for name, value in arguments.items()})[:60],
)
def test_borders_that_do_not_fit_the_row_are_refused(arguments):
    model, packed = shared_model("everything"), pack([ONE_ROW["mixed"]])
    with pytest.raises((ValueError, TypeError), match=r"seq_idx|cu_seq_lens"):
        model(packed.ids, use_cache=False, **arguments)


def test_cumulative_lengths_are_of_one_row():
    model, packed = shared_model("everything"), pack(SEVERAL_ROWS)
    lengths = torch.tensor([0, 5, packed.ids.shape[1]])
    with pytest.raises(ValueError, match="cu_seq_lens"):
        model(packed.ids, cu_seq_lens_q=lengths, cu_seq_lens_k=lengths, use_cache=False)


@every_form_of_one_row
@torch.no_grad()
def test_a_cache_takes_no_packed_sequences_and_stays_as_it_was(form):
    """A cache holds one sequence a row; the borders of several would be lost."""
    model, packed = shared_model("everything"), pack([ONE_ROW["mixed"]])
    cache, row = model.make_cache(), random_rows(8, (6,))[0]
    model(torch.tensor([row[:4]]), past_key_values=cache)
    arguments = FORMS_OF_ONE_ROW[form](packed)
    with pytest.raises(ValueError, match="cache"):
        model(packed.ids, past_key_values=cache, **arguments)
    found = model(torch.tensor([row[4:]]), past_key_values=cache).logits[0]
    assert_same_logits(found, expected(model, [row])[0][4:])


@torch.no_grad()
def test_left_pads_with_positions_of_their_own_are_no_packed_sequences():
    """Clients count positions by the mask, and pads have position 1 or 0 there: no border among real tokens."""
    model, row = shared_model("everything"), random_rows(9, (6,))[0]
    ids = torch.tensor([[3, 4, 5, *row]])
    mask = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1, 1]])
    for at_pads in (0, 1):
        positions = (mask.cumsum(1) - 1).masked_fill(mask == 0, at_pads)
        found = model(ids, attention_mask=mask, position_ids=positions).logits[0, 3:]
        assert_same_logits(found, expected(model, [row])[0])
