"""Measuring at toy size: figures are what their names say, a cut costs one part, and a wrong figure is found."""

import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from language_runs import write_texts
from mambaformer import MambaFormerConfig, MambaFormerForCausalLM, convert, save_mamba_delta
from recipes.language import evaluate, hybrid_card, measure_hybrid, measures, tokens

DISTANCES = (120, 300)
TEMPLATE = "{% for message in messages %}{{ message['content'] }}\n{% endfor %}"


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """Texts, a toy Llama with its tokenizer, and blocks for two of its layers in the folder of a model."""
    folder = tmp_path_factory.mktemp("measure")
    write_texts(folder / "texts", 50, 50)
    tokenizer = tokens.train_tokenizer(folder / "texts", 280)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder / "llama")
    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2, "num_hidden_layers": 3}
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id}
    source = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), initializer_range=0.2, **sizes, **ends)).eval()
    source.save_pretrained(folder / "llama")
    hybrid = convert(source, upcycle=[0, 2], window=8, num_sink_tokens=1, mamba={"mamba_expand": 0.5})
    for idx in (0, 2):
        torch.nn.init.normal_(hybrid.model.layers[idx].mamba.out_proj.weight, 0, 0.5)
    (folder / "checkpoints" / "smollm2-hybrid").mkdir(parents=True)
    save_mamba_delta(hybrid, folder / "checkpoints/smollm2-hybrid/mamba_delta.safetensors", metadata={"steps": 3})
    return folder


def toy_plan():
    return measure_hybrid.Plan(
        lengths=(16, 32, 64), windows=2, distances=DISTANCES, texts=2, rounds=1, sample_tokens=3, context=20
    )


def measure(world: Path, folder: Path, runs: str) -> dict:
    places = {"--source": world / "llama", "--texts": world / "texts", "--run-dir": world / runs}
    arguments = [str(part) for pair in places.items() for part in pair]
    measure_hybrid.main([str(folder), *arguments], toy_plan())
    return json.loads((folder / "figures.json").read_text())


def evaluate_hybrid(world: Path, models: Path) -> int:
    places = {"--models": models, "--source": world / "llama", "--texts": world / "texts", "--run-dir": world / "eval"}
    return evaluate.main(["--only", "hybrid", *(str(part) for pair in places.items() for part in pair)])


@pytest.fixture(scope="module")
def figures(world):
    """A finished measurement."""
    return measure(world, world / "checkpoints/smollm2-hybrid", "whole")


@pytest.fixture
def shipped(world, figures, tmp_path):
    """A copy of the folder of models that may be tampered with."""
    return Path(shutil.copytree(world / "checkpoints", tmp_path / "checkpoints"))


def toy_hybrid() -> MambaFormerForCausalLM:
    config = MambaFormerConfig(
        vocab_size=50, hidden_size=16, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        layer_types=["full_attention", "hybrid_sliding"], sliding_window=8, initializer_range=0.3,
    )  # fmt: skip
    return MambaFormerForCausalLM(config).double().eval()


def test_the_loss_by_length_is_that_of_each_window_alone(monkeypatch):
    monkeypatch.setattr(measures, "PART", 5)
    monkeypatch.setattr(measures, "TOKENS_AT_ONCE", 32)
    model, text, lengths, done = toy_hybrid(), torch.randint(50, (128,)), (8, 32, 64), []
    found = measures.losses_by_length(model, text, lengths, done.append)
    assert sum(done) == measures.tokens_computed(128, lengths) == 2 * 64 + 2 * 32 + 12 * 8
    for length in lengths:
        nats = []
        for window in text.split(length):
            with torch.no_grad():
                log_p = model(window[None], use_cache=False).logits[0].log_softmax(-1)
            nats.append(-log_p[torch.arange(length - 1), window[1:]])
        assert found[length]["nats"] == pytest.approx(torch.stack(nats).mean().item(), rel=1e-5)
        of_second_half = torch.stack([window[-length // 2 :] for window in nats])
        assert found[length]["second_half"] == pytest.approx(of_second_half.mean().item(), rel=1e-5)


def test_lengths_that_do_not_fit_into_each_other_are_refused():
    for lengths in ((8, 12), (8, 48)):
        with pytest.raises(ValueError, match="must divide the next"):
            measures.losses_by_length(toy_hybrid(), torch.zeros(64, dtype=torch.long), lengths, print)


class Copyist:
    """A model that remembers its last `memory` tokens, and says what stood behind the last place that looked alike."""

    def __init__(self, memory: int, vocab_size: int):
        self.memory, self.vocab_size, self.fed = memory, vocab_size, []

    def make_cache(self):
        return Tape([])

    def __call__(self, input_ids, past_key_values, logits_to_keep=0):
        logits = torch.zeros(1, input_ids.shape[1], self.vocab_size)
        for place, token in enumerate(input_ids[0].tolist()):
            past_key_values.tokens.append(token)
            logits[0, place, self.guess(past_key_values.tokens[-self.memory :])] = 50.0
        self.fed.append(list(past_key_values.tokens))
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])

    def guess(self, tokens: list[int], alike: int = 8) -> int:
        starts = range(len(tokens) - alike - 1, -1, -1)
        return next((tokens[i + alike] for i in starts if tokens[i : i + alike] == tokens[-alike:]), 0)


class Tape:
    def __init__(self, tokens: list[int]):
        self.tokens = tokens

    def fork(self):
        return Tape(list(self.tokens))


def test_every_token_of_a_question_comes_as_far_behind_its_fact_as_is_said(world):
    tokenizer = evaluate.AutoTokenizer.from_pretrained(world / "llama")
    facts = measures.make_facts(tokenizer, 2, 0)
    text = torch.zeros(400, dtype=torch.long)
    model = Copyist(1000, len(tokenizer))
    found = measures.recall(model, text, facts, DISTANCES)
    assert list(found) == list(DISTANCES) and all(one["exact"] for one in found.values())
    for fed, fact, distance in zip(model.fed[-2:], facts, DISTANCES, strict=True):
        asked = fact.opening + fact.answer[:-1]
        assert len(fed) == 400 + len(asked), "no question sees another one"
        first = 400 - distance
        assert fed[400:] == asked and fed[first : first + len(asked)] == asked
        assert fed[first + len(asked)] == fact.answer[-1]
    assert sum(token != 0 for token in fed[:400]) == sum(len(fact.tokens) for fact in facts)


def test_what_lies_further_back_than_a_model_remembers_is_not_recalled(world):
    tokenizer = evaluate.AutoTokenizer.from_pretrained(world / "llama")
    facts, text = measures.make_facts(tokenizer, 2, 1), torch.zeros(400, dtype=torch.long)
    for memory, exact in ((250, [True, False]), (50, [False, False])):
        found = measures.recall(Copyist(memory, len(tokenizer)), text, facts, DISTANCES)
        assert [one["exact"] for one in found.values()] == exact
        assert [one["answer_nats"] < 1 for one in found.values()] == exact


def test_facts_that_have_no_room_are_refused(world):
    tokenizer = evaluate.AutoTokenizer.from_pretrained(world / "llama")
    facts, text = measures.make_facts(tokenizer, 2, 0), torch.zeros(400, dtype=torch.long)
    for distances in ((10, 300), (120, 130), (120, 500)):
        with pytest.raises(ValueError, match="no room"):
            measures.with_facts(text, facts, distances)


def test_a_measurement_has_all_figures_and_its_card_the_same(world, figures):
    card = (world / "checkpoints/smollm2-hybrid/README.md").read_text()
    assert set(figures["loss"]) == {"original", "untrained", "trained"}
    nats = [figures["loss"][name]["bible"]["64"]["nats"] for name in figures["loss"]]
    assert len(set(nats)) == 3, "the three are different models"
    assert f"{figures['cache']['trained']['bytes']:,}" in card and "base_model: HuggingFaceTB" in card
    assert figures["cache"]["trained"]["bytes"] < figures["cache"]["original"]["bytes"]
    assert evaluate.card_problems(world / "checkpoints/smollm2-hybrid", hybrid_card.hybrid_card(figures)) == []


def without_times(figures: dict) -> dict:
    sizes = {name: found["bytes"] for name, found in figures["cache"].items()}
    return {**figures, "cache": sizes}


def test_a_measurement_that_was_cut_off_goes_on_from_its_last_part(world, figures, shipped, monkeypatch):
    calls, recall, folder = [], measures.recall, shipped / "smollm2-hybrid"

    def counted(*args):
        calls.append(1)
        if len(calls) == 8:
            raise KeyboardInterrupt
        return recall(*args)

    monkeypatch.setattr(measure_hybrid, "recall", counted)
    with pytest.raises(KeyboardInterrupt):
        measure(world, folder, "cut")
    again = measure(world, folder, "cut")
    assert len(calls) == 8 + (3 * 3 * 2 - 6), "two texts in each domain of each model; three domains were done"
    assert without_times(again) == without_times(figures)


def test_an_evaluation_finds_the_stated_figures_again(world, shipped, capsys):
    assert evaluate_hybrid(world, shipped) == 0
    assert "all figures hold" in capsys.readouterr().out
    assert not (world / "eval" / "hybrid").exists(), "the next one computes all of it again"


def test_a_wrong_figure_is_found(world, shipped, capsys):
    file = shipped / "smollm2-hybrid/figures.json"
    stated = json.loads(file.read_text())
    stated["loss"]["trained"]["python"]["32"]["nats"] -= 0.05
    file.write_text(json.dumps(stated))
    hybrid_card.write_hybrid_card(shipped / "smollm2-hybrid", stated)
    assert evaluate_hybrid(world, shipped) == 1
    off = [line for line in capsys.readouterr().out.splitlines() if "OFF" in line]
    assert len(off) == 1 and off[0].startswith("loss trained python 32 nats")


def test_other_blocks_do_not_have_the_stated_figures(world, shipped):
    blocks = shipped / "smollm2-hybrid/mamba_delta.safetensors"
    hybrid = convert(world / "llama", mamba_delta=blocks)
    for layer in hybrid.model.layers:
        if layer.spec.is_recurrent:
            torch.nn.init.zeros_(layer.mamba.out_proj.weight)
    save_mamba_delta(hybrid, blocks)
    assert evaluate_hybrid(world, shipped) == 1


def test_another_text_is_told_from_a_wrong_figure(world, shipped, tmp_path, capsys):
    shutil.copytree(world / "texts", tmp_path / "texts")
    held_out = tmp_path / "texts" / "python-held_out.jsonl"
    held_out.write_text(held_out.read_text().replace("words", "swords"))
    places = {"--models": shipped, "--source": world / "llama", "--texts": tmp_path / "texts", "--run-dir": tmp_path}
    arguments = [str(part) for pair in places.items() for part in pair]
    assert evaluate.main(["--only", "hybrid", *arguments]) == 1
    printed = capsys.readouterr().out
    assert "python: the text here is not the one of the card" in printed and "OFF" not in printed
    assert printed.endswith("no figure is off, but NOT all could be compared\n")


@pytest.mark.parametrize("place", ["| all | **hybrid** |", "value: "])
def test_a_card_that_does_not_say_what_the_figures_say_is_found(world, shipped, capsys, place):
    """Both a table of the text and the model index at its head."""
    card = shipped / "smollm2-hybrid/README.md"
    before, _, after = card.read_text().partition(place)
    digit = next(i for i, letter in enumerate(after) if letter in "12345678")
    card.write_text(before + place + after[:digit] + "9" + after[digit + 1 :])
    assert evaluate_hybrid(world, shipped) == 1
    assert capsys.readouterr().out.count(", figures.json ") == 1


def test_facts_are_counted_over_all_domains_and_distances():
    of_bible, of_python = ({"200": {"exact": 2}, "500": {"exact": 1}}, {"200": {"exact": 3}, "500": {"exact": 0}})
    recall = {"trained": {"bible": of_bible, "python": of_python}, "original": {"bible": of_bible}}
    assert evaluate.recalled({"recall": recall}) == {"trained": 6, "original": 3}


def test_a_figure_that_is_not_a_number_does_not_hold():
    found = evaluate.compare({"a": {"nats": 1.0}}, {"a": {"nats": float("nan")}}, {"nats": 0.1}, [])
    assert [one.holds for one in found] == [False]
    with pytest.raises(ValueError, match="not both"):
        evaluate.compare({"a": {"nats": 1.0}}, {}, {"nats": 0.1}, [])
