"""Turns SmolLM2 into a hybrid: most layers attend to a window, and Mamba mixers learn the earlier tokens.

    python -m recipes.language.distill --output checkpoints/smollm2-hybrid

All mixers together learn the teacher's logits. With `--layers-steps`, each of them first learns, beside the teacher's
own hidden states, what attention loses in its layer. Only the mixers are trained, and `mamba_delta.safetensors` holds
nothing else. Text, checkpoints and curves go to `runs/distill`. Needs the extra `train` and the Debian packages that
it names if they are missing. A run that was cut off goes on from its last complete checkpoint when it is started again
with the same arguments.
"""

import argparse
import json
from pathlib import Path

import torch
from datasets import DatasetDict, concatenate_datasets, load_from_disk
from safetensors.torch import load_model
from transformers import AutoTokenizer, Trainer, set_seed

from mambaformer import convert, save_mamba_delta
from mambaformer.convert import find_smollm2
from recipes.language.distillation import STAGES, Distillation
from recipes.language.texts import DOMAINS, collect
from recipes.language.train_expert import TEXTS, blocks_of_domain
from recipes.language.training import (
    Checkpoints,
    add_intervals,
    arguments,
    digest,
    go_on,
    keep_settings,
    last_complete_checkpoint,
    make_once,
    parse_with_intervals,
)

MAMBA_DELTA = "mamba_delta.safetensors"
# Two thirds of SmolLM2's layers: those where a window costs least, tried one layer at a time (see NOTES.md).
WINDOWED = [0, 1, 2, 6, 9, 11, 12, 13, 14, 15, 16, 19, 21, 22, 24, 25, 26, 27, 28, 29]
SHORTEST_STEP = 2e-4  # of dt at first: a state then remembers about 5,000 tokens
# Settings that identify a run; it cannot resume with other values.
SETTINGS = ("layers", "window", "sinks", "expand", "length", "held_out_blocks", "seed", "logits_every")


def prepare(folder: Path, tokenizer, length: int, texts: Path) -> DatasetDict:
    """Blocks of `length` tokens of all domains, to train on and held out; what is there already is taken as it is."""
    make_once(texts, collect)
    make_once(folder, lambda path: _blocks(tokenizer, length, texts).save_to_disk(path))
    return load_from_disk(folder)


def _blocks(tokenizer, length: int, texts: Path) -> DatasetDict:
    splits = zip(*(blocks_of_domain(texts, domain, tokenizer, length) for domain in DOMAINS), strict=True)
    return DatasetDict(zip(("train", "held_out"), map(concatenate_datasets, splits), strict=True))


def _made_from(args: argparse.Namespace) -> dict[str, str]:
    return {name: str(getattr(args, name)) for name in ("source", "texts")}


def train_stage(stage: str, module: Distillation, blocks: DatasetDict, args: argparse.Namespace) -> None:
    """Trains, or goes on, or takes what has been trained."""
    run = args.run_dir / stage
    steps, rate = getattr(args, f"{stage}_steps"), getattr(args, f"{stage}_rate")
    keep_settings(run, {"steps": steps, "rate": rate, **_made_from(args), **{n: getattr(args, n) for n in SETTINGS}})
    finished = run / f"checkpoint-{steps}"
    if last_complete_checkpoint(run) != finished:
        module.stage = stage
        of_run = arguments(
            run,
            rate,
            args.seed,
            max_steps=steps,
            per_device_train_batch_size=1,
            per_device_eval_batch_size=1,
            adam_beta2=0.95,
            warmup_steps=max(1, steps // 20),
            eval_strategy="steps",
            eval_steps=args.eval_every,
            save_steps=args.save_every,
            save_total_limit=2,
            logging_steps=args.log_every,
        )
        module.model.to(of_run.device)  # the trainer moves only what it trains
        held_out = blocks["held_out"].shuffle(seed=0).select(range(args.held_out_blocks))
        datasets = {"train_dataset": blocks["train"], "eval_dataset": held_out}
        go_on(Trainer(module, of_run, **datasets, data_collator=_batch, callbacks=[Checkpoints()]))
    load_model(module, finished / "model.safetensors")


def _batch(rows: list[dict]) -> dict[str, torch.Tensor]:
    ids = torch.tensor([row["input_ids"] for row in rows])
    return {"input_ids": ids, "labels": ids}


def build(args: argparse.Namespace):
    """The source with windows in some layers and Mamba mixers there that add nothing yet; and its tokenizer."""
    source = args.source or find_smollm2()
    of_tokenizer = {"gguf_file": source.name} if source.is_file() else {}
    tokenizer = AutoTokenizer.from_pretrained(source.parent if of_tokenizer else source, **of_tokenizer)
    sizes = {"mamba_expand": args.expand, "time_step_min": SHORTEST_STEP}
    model = convert(source, upcycle=args.layers, window=args.window, num_sink_tokens=args.sinks, mamba=sizes)
    return model, tokenizer


def plot_curves(runs: Path, stages: list[str], length: int, path: Path) -> None:
    """The loss of each stage while training, and what the hybrid is away from the teacher on held-out text."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    titles = {"layers": "part of the lost attention not given back", "logits": "divergence from the teacher (nats)"}
    figure, axes = pyplot.subplots(1, len(stages) + 1, figsize=(4.3 * (len(stages) + 1), 3.5))
    held_out, before = [], 0
    for stage, axis in zip(stages, axes, strict=False):
        log = json.loads((runs / stage / "log.json").read_text())
        trained = [(entry["step"] * length / 1000, entry["loss"]) for entry in log if "loss" in entry]
        axis.plot(*zip(*trained, strict=True))
        axis.set(title=f"{stage}: {titles[stage]}", xlabel="thousand tokens")
        held_out += [
            (before + entry["step"] * length / 1000, entry["eval_loss"]) for entry in log if "eval_loss" in entry
        ]
        before = held_out[-1][0]
    axes[-1].plot(*zip(*held_out, strict=True), marker="o")
    axes[-1].set(title="held out: divergence from the teacher (nats)", xlabel="thousand tokens of all stages")
    for axis in axes:
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(path, dpi=110)
    pyplot.close(figure)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--output", type=Path, default=Path("checkpoints/smollm2-hybrid"), help="the folder for the Mamba weights"
    )
    parser.add_argument("--run-dir", type=Path, default=Path("runs/distill"), help="checkpoints, curves")
    parser.add_argument("--texts", type=Path, default=TEXTS, help="folder of the domains; made if it is not there")
    parser.add_argument("--source", type=Path, help="a folder or GGUF file; SmolLM2-135M-Instruct if not given")
    parser.add_argument("--layers", type=int, nargs="+", default=WINDOWED, help="those that get a window and a mixer")
    parser.add_argument("--window", type=int, default=256, help="tokens that attention sees in these layers")
    parser.add_argument("--sinks", type=int, default=4, help="first tokens that it sees besides")
    parser.add_argument("--expand", type=float, default=0.5, help="channels of a mixer for each of the hidden size")
    parser.add_argument("--length", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--layers-steps", type=int, default=0, help="of learning layer by layer; 0 leaves it out")
    parser.add_argument("--layers-rate", type=float, default=2e-3)
    parser.add_argument("--logits-steps", type=int, default=110)
    parser.add_argument("--logits-rate", type=float, default=2e-3)
    parser.add_argument("--logits-every", type=int, default=2, help="one token of so many counts")
    parser.add_argument("--held-out-blocks", type=int, default=6)
    add_intervals(parser, eval_every=40, save_every=10, log_every=5)
    parser.add_argument("--seed", type=int, default=0)
    return parse_with_intervals(parser, argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    set_seed(args.seed)
    model, tokenizer = build(args)
    module = Distillation(model, args.logits_every)
    of_text = args.run_dir / f"blocks-{args.length}-{digest(_made_from(args))}"
    blocks = prepare(of_text, tokenizer, args.length, args.texts)
    steps = {stage: getattr(args, f"{stage}_steps") for stage in STAGES}
    stages = [stage for stage in STAGES if steps[stage]]
    for stage in stages:
        train_stage(stage, module, blocks, args)
    args.output.mkdir(parents=True, exist_ok=True)
    about = {"steps": steps, "tokens_per_step": args.length}
    save_mamba_delta(model, args.output / MAMBA_DELTA, metadata=about)
    plot_curves(args.run_dir, stages, args.length, args.output / "curves.png")


if __name__ == "__main__":
    main()
