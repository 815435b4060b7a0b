"""One run of the sweep: an expert or a LoRA, trained on a domain with the budget that all runs have, and its gains.

A result is one JSON file, written whole when all else is done; a run that was cut off starts again. Nothing is random
but the order of blocks and the first weights of a LoRA, which the seed decides.
"""

import hashlib
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset, DatasetDict, load_from_disk
from torch import nn
from transformers import PrinterCallback, Trainer, TrainerCallback, set_seed

from recipes.language.texts import DOMAINS
from recipes.language.train_expert import blocks_of_domain, load
from recipes.language.training import arguments, digest, make_once, write_json
from recipes.language.tuners import (
    ALL,
    ExpertTuner,
    LoraTuner,
    bytes_of,
    lora_of_numbers,
    modules_of,
    numbers_of,
    projections_of,
)
from recipes.sweeps import losses_by_rate

EXPERT, LORA = "expert", "lora"
# Learning rates that may be chosen; both methods start to look in the middle.
RATES = (1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0)
FIRST_RATES = RATES[3:6]
# Where a LoRA is put: both are tried, and the better one is taken, for each size.
LORA_FAMILIES = ("attention", ALL)
TRIAL_SEED, SEED = 1, 0
BLOCKS = "blocks"  # the folder of what all runs of a sweep are trained and scored on


@dataclass(frozen=True)
class Sweep:
    """The settings that all runs share."""

    model: str
    dtype: str
    length: int  # tokens of a block; a step is one block
    steps: int
    trial_steps: int
    held_out_blocks: int  # of each domain
    trial_blocks: int  # of the text to train on, kept back to choose rates by
    weights: str  # digest of the model's files
    text: str  # digest of the documents

    @property
    def tokens(self) -> int:
        return self.steps * self.length

    def folder(self, run_dir: Path) -> Path:
        """The folder of its results; sweeps with other settings have other folders."""
        return run_dir / f"sweep-{digest(asdict(self))}"


@dataclass(frozen=True)
class Run:
    """`rank` is that of the scales, None for all of them; a LoRA has as many numbers as all families' scales have.

    A trial is shorter, has a seed of its own, and is scored on blocks that are neither held out nor trained on.
    """

    method: str
    family: str
    rank: int | None
    domain: str
    rate: float
    is_trial: bool = False

    @property
    def name(self) -> str:
        size = "full" if self.rank is None else self.rank
        kind = f"trial-{self.rate:g}" if self.is_trial else "final"
        return f"{self.method}-{self.family}-{size}-{self.domain}-{kind}"

    def settings(self, sweep: Sweep) -> dict[str, Any]:
        """All that a result depends on; a file of other settings is as good as none."""
        return {**asdict(self), "sweep": asdict(sweep)}

    def result(self, sweep: Sweep, folder: Path) -> dict[str, Any] | None:
        return _result(self.name, self.settings(sweep), folder)

    def tuner(self, model: nn.Module) -> ExpertTuner | LoraTuner:
        """As it is before the first step, on a model that it does not change."""
        if self.method == EXPERT:
            return ExpertTuner(model, self.rank, projections_of(self.family))
        modules = modules_of(model, projections_of(self.family))
        shapes = {name: tuple(module.weight.shape) for name, module in modules.items()}
        return LoraTuner(model, *lora_of_numbers(shapes, numbers_of(ExpertTuner(model, self.rank))))


def _result(name: str, settings: dict, folder: Path) -> dict[str, Any] | None:
    path = folder / f"{name}.json"
    found = json.loads(path.read_text()) if path.exists() else None
    return found if found is not None and found["settings"] == settings else None


def _write(name: str, settings: dict, found: dict, folder: Path) -> dict[str, Any]:
    result = {"settings": settings, **found}
    write_json(folder / f"{name}.json", result)
    return result


def digest_of(files: list[Path]) -> str:
    """Names files by their content, whatever they are called."""
    found = hashlib.sha256()
    for path in files:
        with open(path, "rb") as file:
            for part in iter(lambda: file.read(1 << 24), b""):
                found.update(part)
    return found.hexdigest()


# ---- what runs are made on


def prepare(sweep: Sweep, texts: Path, folder: Path) -> None:
    """Writes what workers only read: blocks of all domains, and the singular bases into their cache."""
    model, tokenizer = load(sweep.model, sweep.dtype)
    make_once(folder / BLOCKS, lambda path: _write_blocks(sweep, texts, tokenizer, path))
    model.prepare_expert_vectors(list(modules_of(model)))


def _write_blocks(sweep: Sweep, texts: Path, tokenizer, path: Path) -> None:
    for domain in DOMAINS:
        train, held_out = (part.shuffle(seed=0) for part in blocks_of_domain(texts, domain, tokenizer, sweep.length))
        needed = sweep.trial_blocks + sweep.steps
        if len(train) < needed or len(held_out) < sweep.held_out_blocks:
            raise ValueError(
                f"{domain} has {len(train)} blocks to train on and {len(held_out)} held out, of {sweep.length} tokens "
                f"each: {needed} and {sweep.held_out_blocks} are needed"
            )
        parts = {
            "trial": train.select(range(sweep.trial_blocks)),
            "train": train.select(range(sweep.trial_blocks, needed)),
            "held_out": held_out.select(range(sweep.held_out_blocks)),
        }
        DatasetDict(parts).save_to_disk(path / domain)


class Bench:
    """The model and the blocks that a process makes its runs on; no run changes them."""

    def __init__(self, sweep: Sweep, folder: Path):
        self.sweep, self.folder = sweep, folder
        self.model, _ = load(sweep.model, sweep.dtype)
        self.model.eval().requires_grad_(False)
        self.blocks = {domain: load_from_disk(folder / BLOCKS / domain) for domain in DOMAINS}

    def base(self) -> dict[str, Any]:
        """Nats a token of each block under the model as it is: {"held_out" or "trial": {domain: [...]}}."""
        settings = {"sweep": asdict(self.sweep)}
        found = _result("base", settings, self.folder)
        if found is None:
            splits = ("held_out", "trial")
            nats = {split: {name: self.nats(self.model, name, split) for name in DOMAINS} for split in splits}
            found = _write("base", settings, nats, self.folder)
        return found

    @torch.no_grad()
    def nats(self, model: nn.Module, domain: str, split: str) -> list[float]:
        """The mean loss of each block, in nats a token."""
        return [model(**_batch([row]))["loss"].item() for row in self.blocks[domain][split]]


# ---- one run


def _batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")}


class _Reports(TrainerCallback):
    def __init__(self, report: Callable[[int], None]):
        self.report = report

    def on_step_end(self, args, state, control, **kwargs):
        self.report(state.global_step)


def train(tuner: nn.Module, blocks: Dataset, run: Run, sweep: Sweep, report: Callable[[int], None]) -> int:
    """Trains by the recipe of all runs; returns how many tokens it saw."""
    seed = TRIAL_SEED if run.is_trial else SEED
    steps = sweep.trial_steps if run.is_trial else sweep.steps
    of_run = arguments(
        tempfile.gettempdir(),  # nothing is saved
        run.rate,
        seed,
        max_steps=steps,
        per_device_train_batch_size=1,
        warmup_steps=max(1, steps // 10),
        save_strategy="no",
        logging_strategy="no",
        include_num_input_tokens_seen="all",
        disable_tqdm=True,
        use_cpu=True,
    )
    trainer = Trainer(tuner, of_run, train_dataset=blocks, data_collator=_batch, callbacks=[_Reports(report)])
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    tuner.eval()
    return trainer.state.num_input_tokens_seen


def complete(run: Run, bench: Bench, report: Callable[[int], None] = lambda step: None) -> dict[str, Any]:
    """Makes a run if it is not made yet; returns its result. `report` is called with each step."""
    sweep, folder = bench.sweep, bench.folder
    found = run.result(sweep, folder)
    if found is not None:
        return found
    started = time.process_time()
    set_seed(TRIAL_SEED if run.is_trial else SEED)
    tuner = run.tuner(bench.model)
    tokens = train(tuner, bench.blocks[run.domain]["train"], run, sweep, report)
    trained = time.process_time() - started
    domains, split = ((run.domain,), "trial") if run.is_trial else (DOMAINS, "held_out")
    found = {
        "numbers": numbers_of(tuner),
        "tokens": tokens,
        "nats": {domain: bench.nats(tuner, domain, split) for domain in domains},
        "training_seconds": round(trained, 1),
        "seconds": round(time.process_time() - started, 1),
    }
    if not run.is_trial:
        found |= _saved(tuner, folder / "trained" / run.name)
    return _write(run.name, run.settings(sweep), found, folder)


def _saved(tuner: ExpertTuner | LoraTuner, path: Path) -> dict[str, int]:
    """Keeps what was trained, and tells its bytes: of the tensors alone, and of the file with its names."""
    shutil.rmtree(path, ignore_errors=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    file = tuner.save(path)
    return {"bytes": bytes_of(file), "file_bytes": file.stat().st_size}


# ---- learning rates


def trials(run: Run, loss: Callable[[Run], float]) -> dict[float, float]:
    """{rate: loss} of the trials of this run, searched in the same way for experts and LoRAs."""
    return losses_by_rate(RATES, FIRST_RATES, lambda rate: loss(replace(run, rate=rate, is_trial=True)))


def loss_of_trial(result: dict[str, Any]) -> float:
    return statistics.fmean(result["nats"][result["settings"]["domain"]])


def chosen(run: Run, sweep: Sweep, folder: Path) -> Run:
    """This run with the rate that was best in its trials, and for a LoRA on the modules that were.

    Raises:
        ValueError: not all trials have been made.
    """

    def score(trial: Run) -> float:
        found = trial.result(sweep, folder)
        if found is None:
            raise ValueError(f"the trial {trial.name} is missing in {folder}")
        return loss_of_trial(found)

    families = LORA_FAMILIES if run.method == LORA else (ALL,)
    losses = {
        (loss, family, rate)
        for family in families
        for rate, loss in trials(replace(run, family=family), score).items()
    }
    _, family, rate = min(losses)
    return replace(run, rate=rate, family=family if run.method == LORA else run.family)
