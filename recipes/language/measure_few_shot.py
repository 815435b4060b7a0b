"""Measures `fit_expert_vector`: a vector from 32 passages, against the prompt with the same passages, and a LoRA.

    python -m recipes.language.measure_few_shot --output runs/few_shot.json

For each domain, 32 passages of 64 tokens of training documents are the examples, and 32 of held-out documents are
scored: nats per token without the first of each passage. Candidates are the vectors of the other domains. The LoRA
(PEFT) has as many numbers as the fitted vector, the same steps and passages, and the better of two learning rates,
chosen on the held-out passages to its advantage. A finished row of the JSON file is not measured again. Needs the
extra `train`.
"""

import argparse
import json
import random
import time
from collections.abc import Sequence
from pathlib import Path

import torch

from mambaformer import ExpertVector, MambaFormerForCausalLM, fit_expert_vector
from mambaformer.weights_quantized_modules_mambaformer import shape_of
from recipes.language.texts import DOMAINS, MORE_DOMAINS, read
from recipes.language.train_expert import HYBRID, VECTORS, load, texts_of, vector_of
from recipes.language.tuners import LoraTuner, lora_of_numbers, modules_of

FOUR = ("bible", "python", "french", "c")
EXAMPLES, HELD_OUT, LENGTH = 32, 32, 64
BATCH = 8
LORA_RATES = (1e-3, 3e-3)


def passages(texts: Sequence[str], tokenizer, count: int, seed: int) -> torch.Tensor:
    """Token ids (count, LENGTH) of passages that start at lines, each of a document drawn at random."""
    source, found = random.Random(seed), []
    while len(found) < count:
        lines = source.choice(texts).splitlines(keepends=True)
        start = source.randrange(len(lines))
        ids = tokenizer("".join(lines[start : start + LENGTH]).lstrip("\n"))["input_ids"][:LENGTH]
        if len(ids) == LENGTH:
            found.append(ids)
    return torch.tensor(found)


@torch.no_grad()
def loss_of(model, ids: torch.Tensor, cache=None, **options) -> float:
    """Nats per token of passages (passages, tokens), each after the sequence in `cache` if there is one."""
    total = 0.0
    for part in ids.split(BATCH):
        if cache is not None:
            options["cache"] = cache.fork()
            options["cache"].batch_repeat_interleave(len(part))
        log_probs = model(input_ids=part, **options).logits[:, :-1].float().log_softmax(-1)
        total -= log_probs.gather(2, part[:, 1:, None]).sum().item()
    return total / ids[:, 1:].numel()


@torch.no_grad()
def loss_in_context(model: MambaFormerForCausalLM, tokenizer, examples: torch.Tensor, held_out: torch.Tensor) -> float:
    """The same after a prompt with all examples, an empty line after each."""
    gap = torch.tensor(tokenizer("\n\n")["input_ids"])
    prompt = torch.cat([torch.cat([example, gap]) for example in examples])
    cache = model.make_cache()
    model(prompt[None], cache=cache, logits_to_keep=1)
    return loss_of(model, held_out, cache)


def loss_of_lora(
    model, examples: torch.Tensor, held_out: torch.Tensor, numbers: int, steps: int, rate: float
) -> float:
    torch.manual_seed(0)
    shapes = {name: shape_of(module) for name, module in modules_of(model).items()}
    tuner = LoraTuner(model, *lora_of_numbers(shapes, numbers)).eval()
    optimizer = torch.optim.Adam(tuner.parameters(), lr=rate, betas=(0.9, 0.99))
    batches = [part for _ in range(steps) for part in examples[torch.randperm(len(examples))].split(BATCH)][:steps]
    for step, part in enumerate(batches):
        optimizer.param_groups[0]["lr"] = rate * (1 - step / steps)
        optimizer.zero_grad()
        tuner(part, labels=part)["loss"].backward()
        optimizer.step()
    return loss_of(tuner.frozen[0], held_out, use_cache=False)


def measure(model: MambaFormerForCausalLM, tokenizer, domain: str, seed: int = 0, **options) -> dict:
    """The row of one domain and seed: held-out losses in nats per token, and seconds."""
    texts, own = texts_of(domain), vector_of(domain)
    examples = passages(read(texts, domain, "train"), tokenizer, EXAMPLES, seed)
    held_out = passages(read(texts, domain, "held_out"), tokenizer, HELD_OUT, seed)
    vectors = [ExpertVector.load(path) for path in sorted(VECTORS.glob("*.safetensors")) if path.stem != own]
    steps, start = [], time.perf_counter()
    fitted = fit_expert_vector(model, list(examples), vectors, seed=seed, progress=steps.append, **options)
    seconds = time.perf_counter() - start
    row = {
        "domain": domain,
        "seed": seed,
        "base": loss_of(model, held_out),
        "in_context": loss_in_context(model, tokenizer, examples, held_out),
        "few_shot": loss_of(model, held_out, expert_vector=fitted),
        **{each.name: loss_of(model, held_out, expert_vector=each) for each in vectors},
        "seconds": seconds,
        "fit": fitted.metadata["fit"],
    }
    numbers = sum(len(z) for z in fitted.vectors.values())
    if numbers:
        lora = [loss_of_lora(model, examples, held_out, numbers, len(steps), rate) for rate in LORA_RATES]
        row |= {"lora": min(lora), "lora_rates": dict(zip(map(str, LORA_RATES), lora, strict=True))}
    return row


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=HYBRID, help=f"{HYBRID!r}, or a folder of a model")
    parser.add_argument("--dtype", default="bfloat16", choices=["float32", "bfloat16"], help="of the frozen weights")
    parser.add_argument("--domains", nargs="+", choices=DOMAINS + MORE_DOMAINS, default=FOUR)
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--output", type=Path, default=Path("runs/few_shot.json"))
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    rows = json.loads(args.output.read_text()) if args.output.is_file() else []
    model, tokenizer = load(args.model, args.dtype)
    model.eval()
    done = {(row["domain"], row["seed"]) for row in rows}
    for seed in args.seeds:
        for domain in args.domains:
            if (domain, seed) not in done:
                rows.append(measure(model, tokenizer, domain, seed))
                args.output.parent.mkdir(parents=True, exist_ok=True)
                args.output.write_text(json.dumps(rows, indent=1) + "\n")
                print(
                    {key: round(value, 4) for key, value in rows[-1].items() if isinstance(value, float)}, flush=True
                )


if __name__ == "__main__":
    main()
