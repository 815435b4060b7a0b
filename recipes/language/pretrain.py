"""Trains a small hybrid from scratch, and a Llama of the same size on the same tokens, and compares them.

    python -m recipes.language.pretrain

Text, tokenizer, checkpoints, curves and the trained models go to `runs/pretrain`. Needs the extra `train`, and the
Debian packages that the command names if they are missing. A run that was interrupted resumes from its last
complete checkpoint when it is started again with the same arguments.
"""

import argparse
import json
import os
import shutil
from pathlib import Path

import torch
from datasets import Dataset, load_from_disk
from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerFast, set_seed

from mambaformer import MambaFormerConfig
from recipes.language import texts
from recipes.language.card import CURVES, FIGURES, plot_curves, write_card
from recipes.language.shapes import ARCHITECTURES, build
from recipes.language.tokens import blocks_to_train_on, held_out_windows, train_tokenizer
from recipes.language.training import (
    add_intervals,
    evaluate,
    keep_settings,
    make_once,
    parse_with_intervals,
    train,
    write_json,
)

ROOT = Path(__file__).resolve().parents[2]
# Settings that both architectures share; they are stored with each run, which cannot resume with other values.
SETTINGS = (
    "hidden_size",
    "max_steps",
    "batch_size",
    "length",
    "learning_rate",
    "seed",
    "held_out_bytes",
    "vocab_size",
)


def prepare(folder: Path, args: argparse.Namespace) -> tuple[PreTrainedTokenizerFast, Dataset, dict[str, Dataset]]:
    """Tokenizer, blocks to train on, and held-out windows by domain; what is there already is taken as it is."""
    make_once(folder / "texts", texts.collect)
    text = folder / "texts"
    of_tokens = folder / f"tokenizer-{args.vocab_size}"
    of_blocks = folder / f"blocks-{args.vocab_size}-{args.length}-{args.seed}"
    make_once(of_tokens, lambda path: train_tokenizer(text, args.vocab_size).save_pretrained(path))
    make_once(of_blocks, lambda path: blocks_to_train_on(text, of_tokens, args.length, args.seed).save_to_disk(path))
    tokenizer = PreTrainedTokenizerFast.from_pretrained(of_tokens)
    held_out = {
        domain: held_out_windows(text, domain, tokenizer, args.length, args.held_out_bytes) for domain in texts.DOMAINS
    }
    return tokenizer, load_from_disk(of_blocks), held_out


def export(model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """A folder as the Hub has them, with the weights in bfloat16."""
    ends = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model.config.use_cache = True
    model.generation_config = GenerationConfig(**ends)
    shutil.rmtree(folder, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def publish(folder: Path, output: Path) -> None:
    """Replaces a folder by a finished one. Inside this repository, its code is that of the repository."""
    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shutil.copytree(folder, partial)
    if ROOT in output.resolve().parents:
        for file in partial.glob("*_mambaformer.py"):
            shutil.copyfile(ROOT / file.name, file)
    replaced = output.with_name(output.name + ".replaced")
    shutil.rmtree(replaced, ignore_errors=True)
    if output.exists():
        os.rename(output, replaced)
    os.rename(partial, output)
    shutil.rmtree(replaced, ignore_errors=True)


def run(arch: str, args: argparse.Namespace) -> dict:
    """Trains one architecture, or resumes it; returns the content of `results.json` in its folder."""
    folder = args.run_dir / arch
    tokenizer, blocks, held_out = prepare(args.run_dir / "data", args)
    keep_settings(folder, {name: getattr(args, name) for name in SETTINGS})
    set_seed(args.seed)
    model = build(arch, len(tokenizer), args.hidden_size, tokenizer.eos_token_id)
    tokens = args.max_steps * args.batch_size * args.length
    about = {
        "parameters": model.num_parameters(),
        "tokens": tokens,
        "epochs": round(tokens / (len(blocks) * args.length), 2),
        "threads": torch.get_num_threads(),
        **{name: getattr(args, name) for name in SETTINGS},
    }
    print(f"{arch}: {about['parameters']:,} parameters, {tokens:,} tokens, {about['epochs']} epochs")
    model = train(model, folder, blocks, held_out, tokenizer, args)
    export(model, tokenizer, folder / "model")
    saved = type(model).from_pretrained(folder / "model", dtype=torch.float32)
    results = {**about, "held_out": evaluate(saved, folder, held_out, tokenizer, args)}
    write_json(folder / "results.json", results)
    return results


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--arch", nargs="+", choices=ARCHITECTURES, default=list(ARCHITECTURES))
    parser.add_argument("--run-dir", type=Path, default=Path("runs/pretrain"), help="text, checkpoints, curves")
    parser.add_argument("--output", type=Path, help="folder that the trained hybrid is copied to")
    parser.add_argument("--hidden-size", type=int, default=256)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--length", type=int, default=512, help="tokens of a block")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-steps", type=int, default=2000)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--held-out-bytes", type=int, default=120_000, help="of each domain")
    add_intervals(parser, eval_every=250, save_every=100, log_every=10)
    parser.add_argument("--seed", type=int, default=0)
    args = parse_with_intervals(parser, argv)
    if args.output and args.output.exists() and not (args.output / FIGURES).is_file():
        parser.error(
            f"--output {args.output} exists and is not what this has written before: remove it, or take another"
        )
    return args


def results_beside(args: argparse.Namespace) -> dict[str, dict]:
    """Those of the architectures that are not to be trained now.

    Raises:
        ValueError: they were trained otherwise, so that there would be nothing to compare.
    """
    files = {arch: args.run_dir / arch / "results.json" for arch in ARCHITECTURES if arch not in args.arch}
    results = {arch: json.loads(file.read_text()) for arch, file in files.items() if file.exists()}
    for arch, found in results.items():
        other = [name for name in SETTINGS if name != "learning_rate" and found[name] != getattr(args, name)]
        if other:
            raise ValueError(
                f"the {arch} in {args.run_dir} was trained with another {', '.join(other)}: train both alike, in one "
                "command, or take another --run-dir"
            )
    return results


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    results = results_beside(args)
    for arch in args.arch:
        run(arch, args)
    results |= {arch: json.loads((args.run_dir / arch / "results.json").read_text()) for arch in args.arch}
    results = {arch: results[arch] for arch in ARCHITECTURES if arch in results}
    plot_curves(args.run_dir, results, args.run_dir / CURVES)
    if "hybrid" in results:
        model = args.run_dir / "hybrid" / "model"
        shutil.copy(args.run_dir / CURVES, model)
        write_card(model, MambaFormerConfig.from_pretrained(model), results)
        if args.output:
            publish(model, args.output)
    for arch, found in results.items():
        scores = ", ".join(f"{name} {score['bits_per_byte']:.3f}" for name, score in found["held_out"].items())
        print(f"{arch}: held-out bits per byte: {scores}")


if __name__ == "__main__":
    main()
