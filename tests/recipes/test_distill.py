"""Distillation at toy size: teacher and student are the two models, only mixers learn, and a kill changes nothing."""

import json
import os

import pytest
import torch
import transformers
from safetensors.torch import load_file

from language_runs import run_and_kill, write_texts
from mambaformer import convert
from recipes.language import distill, tokens
from recipes.language.distillation import Distillation

WINDOW, LENGTH = 8, 48
TOY = ["--layers", "0", "2", "--window", str(WINDOW), "--sinks", "2", "--length", str(LENGTH), "--layers-steps", "8"]
TOY += ["--logits-steps", "4", "--eval-every", "4", "--save-every", "4", "--log-every", "2", "--held-out-blocks", "2"]


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A folder of a small Llama that sees far, its tokenizer, and texts."""
    folder = tmp_path_factory.mktemp("source")
    write_texts(folder / "texts", num_held_out=20)
    tokenizer = tokens.train_tokenizer(folder / "texts", 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=len(tokenizer), num_key_value_heads=2, **shape)
    model = transformers.LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1 / parameter.shape[1] ** 0.5)
    model.save_pretrained(folder)
    return folder


@pytest.fixture
def distillation(source):
    """Blocks that add something."""
    args = distill.parse([*TOY, "--source", str(source)])
    model, _ = distill.build(args)
    found = Distillation(model, 1, torch.float32)
    with torch.no_grad():
        for mixer in found.mixers.values():
            mixer["mamba"].out_proj.weight.normal_(0, 0.2)
    return found


def arguments(source, run, *more):
    folders = {"--source": source, "--texts": source / "texts", "--run-dir": run, "--output": run / "output"}
    return [*TOY, *(str(part) for pair in folders.items() for part in pair), *more]


def some_ids():
    return torch.randint(0, 300, (2, LENGTH))


def test_the_teacher_is_the_source_and_the_student_is_the_hybrid(distillation, source):
    ids, kept = some_ids(), slice(None)
    teacher = transformers.LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        of_teacher = distillation.logits(distillation.teacher(ids), kept)
        of_student = distillation.logits(distillation.student(ids), kept)
        expected, hybrid = teacher(ids).logits, distillation.model(ids).logits
    scale = expected.abs().max()
    assert (of_teacher - expected).abs().max() < 1e-5 * scale
    assert (of_student - hybrid).abs().max() < 1e-5 * scale
    assert (of_student - of_teacher).abs().max() > 0.1 * scale


def test_the_divergence_of_logits_is_that_of_the_two_models(distillation, source):
    ids = some_ids()
    teacher = transformers.LlamaForCausalLM.from_pretrained(source)
    with torch.no_grad():
        found = distillation.logits_loss(ids).item()
        wanted = teacher(ids).logits[:, WINDOW:].log_softmax(-1)
        hybrid = distillation.model(ids).logits[:, WINDOW:].log_softmax(-1)
    expected = (wanted.exp() * (wanted - hybrid)).sum(-1).mean().item()
    assert expected > 0.01
    assert found == pytest.approx(expected, rel=1e-4)


def test_the_loss_of_layers_is_one_for_silent_mixers_and_zero_for_perfect_ones(distillation):
    for mixer in distillation.mixers.values():
        torch.nn.init.zeros_(mixer["mamba"].out_proj.weight)
    ids = some_ids()
    assert distillation.layers_loss(ids).item() == pytest.approx(1)
    layers = {id(layer): layer for layer in distillation.model.model.layers}
    lost = {}
    attended = distillation.attended

    def remember(layer, hidden_states, plan, rotation):
        found = attended(layer, hidden_states, plan, rotation)
        lost.setdefault(id(layer), []).append(found.float())
        return found

    distillation.attended = remember
    distillation.remembered = lambda layer, hidden_states: lost[id(layer)][0] - lost[id(layer)][1]
    assert distillation.layers_loss(ids).item() == pytest.approx(0, abs=1e-6)
    assert set(lost) == set(layers)


@pytest.mark.parametrize("stage", ["layers", "logits"])
def test_only_mixers_learn_in_float32_and_both_stages_lower_their_loss(distillation, stage):
    distillation = Distillation(distillation.model)  # in bfloat16
    ids, loss = some_ids(), getattr(distillation, f"{stage}_loss")
    frozen = {name: p for name, p in distillation.model.named_parameters() if "mamba" not in name}
    assert {p.dtype for p in frozen.values()} == {torch.bfloat16} and not any(p.requires_grad for p in frozen.values())
    assert {p.dtype for p in distillation.parameters()} == {torch.float32}
    optimizer, losses = torch.optim.AdamW(distillation.parameters(), lr=1e-2), []
    for _ in range(30):
        losses.append(loss(ids))
        losses[-1].backward()
        optimizer.step()
        optimizer.zero_grad()
    assert losses[-1] < 0.95 * losses[0]


@pytest.fixture(scope="module")
def runs(source, tmp_path_factory):
    """Two finished runs: one in one go, one that was killed in each of its stages."""
    whole, cut = (tmp_path_factory.mktemp("distill") / name for name in ("whole", "cut"))
    distill.main(arguments(source, whole))
    run_and_kill("distill", 8, *arguments(source, cut))
    assert "complete" not in os.listdir(cut / "layers" / "checkpoint-8")
    run_and_kill("distill", 4, *arguments(source, cut))
    assert not (cut / "output").exists()
    distill.main(arguments(source, cut))
    return whole, cut


def curve(run):
    clocks = ("runtime", "per_second", "train_loss", "total_flos")
    entries = json.loads((run / "log.json").read_text())
    return [{key: value for key, value in entry.items() if not key.endswith(clocks)} for entry in entries]


@pytest.mark.parametrize("stage", ["layers", "logits"])
def test_a_run_that_was_killed_in_both_stages_has_the_same_curves(runs, stage):
    whole, cut = runs
    assert curve(cut / stage) == curve(whole / stage)
    assert any("eval_loss" in entry for entry in curve(whole / stage))


def test_the_weights_of_a_killed_run_are_the_same(runs, source):
    whole, cut = (load_file(run / "output" / "mamba_delta.safetensors") for run in runs)
    assert all(torch.equal(whole[name], cut[name]) for name in whole | cut)
    hybrid = convert(source, mamba_delta=runs[0] / "output" / "mamba_delta.safetensors")
    assert hybrid.config.layer_types == ["hybrid_sliding", "full_attention", "hybrid_sliding"]
    last = load_file(runs[0] / "logits" / "checkpoint-4" / "model.safetensors")
    trained = last["mixers.2.mamba.out_proj.weight"]
    assert trained.abs().max() > 0
    assert torch.equal(hybrid.model.layers[2].mamba.out_proj.weight, trained.bfloat16().float())
    assert (runs[0] / "output" / "curves.png").stat().st_size > 10_000


def test_other_settings_do_not_go_on_with_a_run(runs, source):
    with pytest.raises(ValueError, match=r"'window': \(8, 9\)"):
        distill.main(arguments(source, runs[0], "--window", "9"))
