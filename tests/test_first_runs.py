"""What a machine does only once, such as compiling kernels, never counts in a figure that an example prints."""

import importlib.util
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from patterns import ROOT, VOCAB, tiny_config
from tiny_models import random_expert, random_model

COMPILING, BASES, CACHED, UNCACHED = 20.0, 100.0, 0.01, 0.04  # seconds: once, once, and of each token


def script(folder, name):
    spec = importlib.util.spec_from_file_location(f"{name}_script", ROOT / folder / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where dataclasses look for their types
    spec.loader.exec_module(module)
    return module


class FirstRuns:
    """A clock that only a model's generations move: by the costs of first runs, and by those of each token."""

    def __init__(self):
        self.now, self.paid = 0.0, set()

    def pay_once(self, what, seconds):
        self.now += 0.0 if what in self.paid else seconds
        self.paid.add(what)

    def watch(self, generate):
        def timed(ids, **options):
            self.pay_once("kernels", COMPILING)
            schedule = options.get("expert_schedule") or {0: options.get("expert_vector")}
            for expert in filter(None, schedule.values()):
                self.pay_once(expert, BASES)
            self.now += options["max_new_tokens"] * (CACHED if options.get("use_cache", True) else UNCACHED)
            return generate(ids, **options)

        return timed


class Tokenizer:
    """Says a number for each token."""

    def apply_chat_template(self, chat, **options):
        return SimpleNamespace(input_ids=torch.arange(1, 9)[None] % VOCAB)

    def decode(self, ids, **options):
        return " ".join(str(int(i)) for i in ids) + " "


@pytest.fixture
def chat(monkeypatch):
    """`examples/07_chat.py` on a tiny model, by the clock of `FirstRuns`."""
    module, clock = script("examples", "07_chat"), FirstRuns()
    model = random_model(tiny_config("paper")).eval()
    for seed in (1, 2):
        model.expert_vectors.add(random_expert(model, seed, name=f"expert-{seed}"))
    model.generate = clock.watch(model.generate)
    loader = lambda result: SimpleNamespace(from_pretrained=lambda *_, **options: result)  # noqa: E731
    monkeypatch.setattr(module, "AutoModelForCausalLM", loader(model))
    monkeypatch.setattr(module, "AutoTokenizer", loader(Tokenizer()))
    monkeypatch.setattr(module, "time", SimpleNamespace(perf_counter=lambda: clock.now))
    return module


def test_the_speed_with_a_cache_includes_no_cost_of_a_first_run(chat, capsys):
    """The demo said "5.9 tokens per second with the cache, 9.6 without": its first answer compiled the kernels."""
    assert chat.main(["folder", "--max-new-tokens", "30"]) == 0
    (line,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("tokens per second"))
    cached, uncached = map(float, re.findall(r"\d+\.\d", line))
    assert (cached, uncached) == pytest.approx((1 / CACHED, 1 / UNCACHED), rel=1e-3)


def test_the_user_is_told_before_the_first_run_and_the_answer_streams(chat, capsys):
    chat.main(["folder", "--max-new-tokens", "30"])
    printed = capsys.readouterr().out
    order = [printed.index(words) for words in ("The first run on a machine", "warmed up in 220 seconds", "\n>")]
    assert order == sorted(order)


def test_speed_ups_of_speculation_include_no_cost_of_a_first_run(monkeypatch):
    """The first mode on the first prompt compiled the kernels, so all other modes looked many times as fast."""
    module, clock = script("benchmarks", "speculation"), FirstRuns()

    def generate(model, mode, ids, max_new_tokens, llama):
        started = clock.now
        clock.watch(lambda *_, **options: None)(ids, max_new_tokens=max_new_tokens)
        clock.pay_once(mode, 5.0)
        return [1, 2, 3], 3, clock.now - started, clock.now - started

    monkeypatch.setattr(module, "generate", generate)
    prompts = [(module.Prompt("question", "?"), torch.ones(1, 4, dtype=torch.long))] * 2
    runs = module.measure("zero", None, None, prompts, module.parse(["--max-new-tokens", "8"]))
    assert {run.mode for run in runs} == set(module.MODES)
    assert [run.speed_up for run in runs] == pytest.approx([1.0] * len(runs))
