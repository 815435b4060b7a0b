"""Loads a saved hybrid as a user of the Hub does, streams an answer, and changes its expert vector while generating.

    python examples/07_chat.py demo --prompt "Tell me about a shepherd and his son."

It never imports `mambaformer`: the folder brings its own code. Every line printed under "checked" is a comparison of
two generations; the exit code is 1 if one fails.
"""

import argparse
import sys
import time

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer


class SwitchStreamer(TextStreamer):
    """Prints the answer as it comes, and the name of an expert where it takes over."""

    def __init__(self, tokenizer, schedule: dict[int, str | None]):
        super().__init__(tokenizer, skip_prompt=True, skip_special_tokens=True)
        self.schedule, self.num_new_tokens = schedule, -1  # the first thing put is the prompt

    def put(self, value: torch.Tensor) -> None:
        if self.num_new_tokens in self.schedule:
            self.flush_words()
            print(f"\n[{self.schedule[self.num_new_tokens] or 'base'}] ", end="", flush=True)
        self.num_new_tokens += 1
        super().put(value)

    def flush_words(self) -> None:
        """Prints what is held back until a word is whole."""
        if self.token_cache:
            text = self.tokenizer.decode(self.token_cache, skip_special_tokens=True)
            self.on_finalized_text(text[self.print_len :])
            self.token_cache, self.print_len = [], 0


class Check:
    """Collects what was checked."""

    def __init__(self):
        self.all_hold = True

    def __call__(self, claim: str, holds: bool) -> None:
        self.all_hold &= holds
        print(f"  {'holds' if holds else 'FAILS'}: {claim}")


def warm_up(model, ids: torch.Tensor, options: dict) -> None:
    """Runs each path once, so no timed run includes the costs of a first run: kernels are compiled and the singular
    bases of the experts are computed once per machine, and each process loads both.
    """
    short = {**options, "max_new_tokens": 3}
    for expert in [None, *model.expert_vectors.names]:
        model.generate(ids, expert_vector=expert, **short)
    model.generate(ids, use_cache=False, **short)


def speeds(runs: dict, num_tokens: int, rounds: int = 3) -> dict[str, float]:
    """New tokens per second of each run, in its fastest round; the runs alternate, so load hits them alike."""
    seconds = {name: [] for name in runs}
    for _ in range(rounds):
        for name, run in runs.items():
            started = time.perf_counter()
            run()
            seconds[name].append(time.perf_counter() - started)
    return {name: num_tokens / min(found) for name, found in seconds.items()}


def switch_schedule(names: list[str], num_tokens: int) -> dict[int, str | None]:
    """The base first, then each expert for an equal share of the new tokens."""
    share = num_tokens // (len(names) + 1)
    return {share * index: name for index, name in enumerate([None, *names])}


def fresh_runs(model, ids: torch.Tensor, schedule: dict[int, str | None], options: dict) -> torch.Tensor:
    """The same answer by independent generations: each starts with an empty cache from the tokens so far."""
    starts = [*schedule, options["max_new_tokens"]]
    text = ids
    for start, end, expert in zip(starts, starts[1:], schedule.values(), strict=False):
        text = model.generate(text, **{**options, "max_new_tokens": end - start}, expert_vector=expert)
    return text


def print_speeds(model, ids: torch.Tensor, options: dict) -> None:
    runs = {
        "with the cache": lambda: model.generate(ids, **options),
        "without": lambda: model.generate(ids, use_cache=False, **options),
    }
    figures = speeds(runs, options["max_new_tokens"])
    print("tokens per second, prompt included: " + ", ".join(f"{speed:.1f} {name}" for name, speed in figures.items()))


def print_bytes(report: dict[str, dict[str, int]]) -> None:
    print("cache, bytes by layer type and kind:")
    for layer_type, kinds in report.items():
        print(f"  {layer_type}: " + ", ".join(f"{kind} {size:,}" for kind, size in kinds.items()))


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", help="a saved model with its tokenizer and experts")
    parser.add_argument("--prompt", default="Tell me about a shepherd and his son.")
    parser.add_argument("--max-new-tokens", type=int, default=72)
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> int:
    args = parse(argv)
    tokenizer = AutoTokenizer.from_pretrained(args.folder, trust_remote_code=True)
    model = AutoModelForCausalLM.from_pretrained(args.folder, trust_remote_code=True).eval()
    kinds = [f"{model.config.layer_types.count(kind)} x {kind}" for kind in dict.fromkeys(model.config.layer_types)]
    print(f"{type(model).__name__}: {', '.join(kinds)}; experts: {', '.join(model.expert_vectors.names)}")
    chat = [{"role": "user", "content": args.prompt}]
    ids = tokenizer.apply_chat_template(
        chat, add_generation_prompt=True, return_tensors="pt", return_dict=True
    ).input_ids
    options = {"max_new_tokens": args.max_new_tokens, "do_sample": False, "repetition_penalty": 1.25}

    print("The first run on a machine compiles kernels and computes the experts' singular bases: up to some minutes.")
    started = time.perf_counter()
    warm_up(model, ids, options)
    print(f"warmed up in {time.perf_counter() - started:.0f} seconds")

    print(f"\n> {args.prompt}\n")
    cache = model.make_cache()
    streamer = TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
    answer = model.generate(ids, streamer=streamer, past_key_values=cache, **options)

    # No end of text while experts take turns, so that each of them gets to speak.
    schedule = switch_schedule(model.expert_vectors.names, args.max_new_tokens)
    model.generation_config.eos_token_id = None
    print("\nThe same prompt, with the expert changed in mid-text:")
    switched = model.generate(ids, streamer=SwitchStreamer(tokenizer, schedule), expert_schedule=schedule, **options)

    print("\nchecked:")
    check = Check()
    short = {**options, "max_new_tokens": min(24, args.max_new_tokens)}
    cached = model.generate(ids, **short)
    uncached = model.generate(ids, use_cache=False, **short)
    check("the text generated with the cache is the text generated without it", torch.equal(cached, uncached))
    again = fresh_runs(model, ids, schedule, options)
    check(
        "the switched text is that of fresh runs under each expert from the text so far", torch.equal(switched, again)
    )
    plain = model.generate(ids, **options)
    check("the experts change the text", not torch.equal(switched, plain))
    print_speeds(model, ids, short)
    print(f"after {cache.get_seq_length()} tokens ({answer.shape[1] - ids.shape[1]} of them new):")
    print_bytes(cache.report())
    return 0 if check.all_hold else 1


if __name__ == "__main__":
    sys.exit(main())
