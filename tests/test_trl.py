"""TRL's `SFTTrainer` as people use it: packed and padding-free batches train as padded ones do."""

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from torch.nn import functional as F
from transformers import PreTrainedTokenizerFast
from trl import SFTConfig, SFTTrainer

from oracle import assert_same_logits
from patterns import PLAIN_SGD, VOCAB, tiny_config
from sequences import random_rows
from tiny_models import random_model

PAD = VOCAB - 1
# Sequences of at most 12 tokens, packed into rows of 16.
ROWS = [[token % PAD for token in row] for row in random_rows(7, (5, 12, 1, 9, 3, 7, 2, 11))]
# TRL still names the oldest name of gradient checkpointing; Datasets forks where torch has threads.
pytestmark = [
    pytest.mark.filterwarnings("ignore:.*activation_checkpointing"),
    pytest.mark.filterwarnings("ignore:.*label_smoothing_factor"),
]


def tokenizer():
    vocabulary = {f"t{index}": index for index in range(VOCAB)}
    model = Tokenizer(WordLevel(vocabulary, unk_token="t0"))
    return PreTrainedTokenizerFast(tokenizer_object=model, pad_token=f"t{PAD}", eos_token="t1")


def new_model():
    return random_model(tiny_config("everything"), loudness=0.8)


def train(folder, rows_a_step, peft_config=None, **options):
    """Three steps of plain SGD over all of `ROWS`; the trainer, whose model is in float64."""
    of_this_run = {"logging_steps": 1, "max_length": 16, "per_device_train_batch_size": rows_a_step}
    arguments = SFTConfig(output_dir=str(folder), **PLAIN_SGD | of_this_run | options)
    model = new_model()
    torch.manual_seed(1)  # of the adapters
    trainer = SFTTrainer(
        model,
        args=arguments,
        train_dataset=Dataset.from_dict({"input_ids": ROWS}),
        processing_class=tokenizer(),
        peft_config=peft_config,
    )
    trainer.train()
    return trainer


def losses_of(trainer):
    return [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]


def loss_by_hand(model):
    total = 0
    with torch.no_grad():
        for row in ROWS:
            logits = model(torch.tensor([row])).logits[0, :-1]
            total += F.cross_entropy(logits, torch.tensor(row[1:], dtype=torch.long), reduction="sum").item()
    return total / sum(len(row) - 1 for row in ROWS)


def assert_same_run(found, wanted, tolerance=1e-6):
    """The same losses and weights; TRL's fused head and `Trainer`'s smoother compute losses in float32."""
    assert losses_of(found) == pytest.approx(losses_of(wanted), rel=tolerance)
    weights = dict(wanted.model.named_parameters())
    for name, weight in found.model.named_parameters():
        assert_same_logits(weight.detach(), weights[name].detach(), tolerance)


# The number of rows of 16 that `ROWS` make: 50 tokens by best fit, or cut wherever a row is full.
PACKED = {
    "default": {"packing": True, "per_device_train_batch_size": 4},
    "split": {"packing": True, "packing_strategy": "bfd_split", "per_device_train_batch_size": 4},
    "padding_free": {"padding_free": True, "max_length": None},
    "multiple_of_8": {"packing": True, "pad_to_multiple_of": 8, "per_device_train_batch_size": 4},
    "without_checkpointing": {"packing": True, "gradient_checkpointing": False, "per_device_train_batch_size": 4},
}


@pytest.mark.slow
@pytest.mark.parametrize("options", PACKED)
def test_packed_runs_of_trl_are_padded_runs(tmp_path, options):
    """TRL's default packing was refused: its positions start again at 0 within a row."""
    padded = train(tmp_path / "padded", rows_a_step=len(ROWS))
    assert losses_of(padded)[0] == pytest.approx(loss_by_hand(new_model()), rel=1e-6)
    packed = train(tmp_path / "packed", rows_a_step=len(ROWS), **PACKED[options])
    assert len(packed.train_dataset) == (4 if "packing" in PACKED[options] else len(ROWS))
    assert_same_run(packed, padded)


@pytest.mark.slow
def test_packed_rows_accumulate_over_micro_batches(tmp_path):
    padded = train(tmp_path / "padded", rows_a_step=len(ROWS))
    packed = train(tmp_path / "packed", rows_a_step=1, packing=True, gradient_accumulation_steps=4)
    assert_same_run(packed, padded)


@pytest.mark.slow
def test_packed_rows_train_adapters_as_padded_ones(tmp_path):
    config = LoraConfig(r=2, target_modules=["q_proj", "in_proj", "out_proj"], init_lora_weights=False)
    padded = train(tmp_path / "padded", rows_a_step=len(ROWS), peft_config=config)
    packed = train(tmp_path / "packed", rows_a_step=4, packing=True, peft_config=config)
    assert_same_run(packed, padded)


@pytest.mark.slow
def test_label_smoothing_of_packed_rows(tmp_path):
    padded = train(tmp_path / "padded", rows_a_step=len(ROWS), label_smoothing_factor=0.1)
    packed = train(tmp_path / "packed", rows_a_step=4, packing=True, label_smoothing_factor=0.1)
    assert_same_run(packed, padded)
