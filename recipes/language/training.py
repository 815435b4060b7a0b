"""Training that may be killed at any moment: resuming from the last complete checkpoint yields the same run."""

import argparse
import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PreTrainedModel, Trainer, TrainerCallback, TrainingArguments

from mambaformer.files_mambaformer import write_atomically
from recipes.language.tokens import BitsPerByte, nats_of_labels

COMPLETE = "complete"  # an empty file, written last into a checkpoint


class PretrainingTrainer(Trainer):
    """Norms, biases, and the decay and skip of Mamba's states (A_log, D) get no weight decay."""

    def get_decay_parameter_names(self, model) -> list[str]:
        names = super().get_decay_parameter_names(model)
        return [name for name in names if name.rsplit(".", 1)[1] not in ("A_log", "D")]


class Checkpoints(TrainerCallback):
    """Marks each checkpoint when all of it is on the disk, and writes the curve so far to `log.json`."""

    def on_save(self, args, state, control, **kwargs):
        os.sync()
        Path(args.output_dir, f"checkpoint-{state.global_step}", COMPLETE).touch()

    def on_log(self, args, state, control, **kwargs):
        write_json(Path(args.output_dir, "log.json"), state.log_history)


def write_text(path: Path, text: str) -> None:
    """A kill leaves the old file or the new one."""
    write_atomically(path, text.encode())


def write_json(path: Path, value) -> None:
    write_text(path, json.dumps(value, indent=1) + "\n")


def digest(value) -> str:
    """A name for a JSON value by its content."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


def make_once(path: Path, make: Callable[[Path], object]) -> None:
    """Makes a folder atomically: a kill leaves either all of it or nothing."""
    if not path.exists():
        partial = path.with_name(path.name + ".partial")
        shutil.rmtree(partial, ignore_errors=True)
        partial.parent.mkdir(parents=True, exist_ok=True)
        make(partial)
        os.rename(partial, path)


def last_complete_checkpoint(run: Path) -> Path | None:
    """The newest complete checkpoint; incomplete ones are removed."""
    found = sorted(run.glob("checkpoint-*"), key=_step)
    whole = [path for path in found if (path / COMPLETE).exists()]
    for path in found:
        if path not in whole:
            shutil.rmtree(path)
    return whole[-1] if whole else None


def _step(checkpoint: Path) -> int:
    return int(checkpoint.name.rsplit("-", 1)[1])


def keep_settings(run: Path, settings: dict) -> None:
    """Writes the settings of a run when it starts.

    Raises:
        ValueError: the run was started with other settings, so it cannot go on with these.
    """
    run.mkdir(parents=True, exist_ok=True)
    file = run / "settings.json"
    before = json.loads(file.read_text()) if file.exists() else settings
    if before != settings:
        other = {key: (before.get(key), settings[key]) for key in settings if before.get(key) != settings[key]}
        raise ValueError(f"{run} was started with other settings (then, now): {other}; remove it to start afresh")
    write_json(file, settings)


def add_intervals(parser: argparse.ArgumentParser, eval_every: int, save_every: int, log_every: int) -> None:
    """Adds the arguments for actions at regular steps."""
    parser.add_argument("--eval-every", type=int, default=eval_every, help="steps")
    parser.add_argument("--save-every", type=int, default=save_every, help="steps, a multiple of --log-every")
    parser.add_argument("--log-every", type=int, default=log_every, help="steps")


def parse_with_intervals(parser: argparse.ArgumentParser, argv: list[str] | None) -> argparse.Namespace:
    args = parser.parse_args(argv)
    if args.save_every % args.log_every:
        parser.error("--save-every must be a multiple of --log-every: a resumed run would log other averages")
    return args


def arguments(run: Path | str, learning_rate: float, seed: int, **own) -> TrainingArguments:
    """The `TrainingArguments` that all trainings share, updated by those of one training."""
    shared = {
        "output_dir": str(run),
        "learning_rate": learning_rate,
        "lr_scheduler_type": "cosine",
        "max_grad_norm": 1.0,
        "weight_decay": 0.0,
        "report_to": [],
        "seed": seed,
        "data_seed": seed,
        "use_cpu": not torch.cuda.is_available(),
        "dataloader_pin_memory": False,
        "label_names": ["labels"],
    }
    return TrainingArguments(**shared | own)


def go_on(trainer: Trainer) -> None:
    """Trains, resuming from the last complete checkpoint if there is one."""
    checkpoint = last_complete_checkpoint(Path(trainer.args.output_dir))
    trainer.train(resume_from_checkpoint=None if checkpoint is None else str(checkpoint))


def trainer_for(model: PreTrainedModel, run: Path, held_out: dict[str, Dataset], tokenizer, args, **kwargs) -> Trainer:
    """A trainer for `args` (those of the command line) that evaluates bits per byte of each domain."""
    of_run = arguments(
        run,
        args.learning_rate,
        args.seed,
        max_steps=args.max_steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        optim="adamw_torch",
        warmup_steps=max(1, args.max_steps // 20),
        weight_decay=0.1,
        adam_beta2=0.95,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.save_every,
        save_total_limit=2,
        logging_steps=args.log_every,
    )
    return PretrainingTrainer(
        model,
        of_run,
        eval_dataset=held_out,
        data_collator=_batch,
        compute_metrics=BitsPerByte(tokenizer),
        preprocess_logits_for_metrics=nats_of_labels,
        **kwargs,
    )


def _batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Blocks are their own labels; windows bring theirs."""
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": torch.tensor([row.get("labels", row["input_ids"]) for row in rows])}


def train(
    model: PreTrainedModel, run: Path, blocks: Dataset, held_out: dict[str, Dataset], tokenizer, args
) -> PreTrainedModel:
    """Trains, resuming from the last complete checkpoint if there is one; returns the trained model."""
    checkpoint = last_complete_checkpoint(run)
    if checkpoint is not None and _step(checkpoint) == args.max_steps:
        return type(model).from_pretrained(checkpoint, dtype=torch.float32)
    model.config.use_cache = False
    callbacks = [Checkpoints()]
    trainer = trainer_for(model, run, held_out, tokenizer, args, train_dataset=blocks, callbacks=callbacks)
    go_on(trainer)
    return model


def evaluate(model: PreTrainedModel, run: Path, held_out: dict[str, Dataset], tokenizer, args) -> dict[str, dict]:
    """Bits per byte, bytes and tokens of each domain, and a digest of its text."""
    trainer = trainer_for(model, run, held_out, tokenizer, args)
    figures = ("bits_per_byte", "bytes", "tokens")
    results = {}
    for domain, windows in held_out.items():
        found = trainer.evaluate(windows)
        results[domain] = {name: found[f"eval_{name}"] for name in figures} | {"text": digest(windows["input_ids"][:])}
    return results
