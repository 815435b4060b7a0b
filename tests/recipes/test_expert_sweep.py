"""Training of experts and the sweep over them, at toy size: equal budgets, true bytes, kills that change nothing."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file

from language_runs import DOMAINS, ROOT, write_texts
from mambaformer import ExpertVector, MambaFormerConfig, MambaFormerForCausalLM
from recipes import sweeps
from recipes.language import expert_runs, sweep_experts, tokens, train_expert, tuners

pytestmark = pytest.mark.filterwarnings("ignore:.*activation_checkpointing:FutureWarning")  # peft asks for it

RANKS = (None, 4)
TOY = ["--dtype", "float32", "--ranks", "full", "4", "--steps", "3", "--trial-steps", "2", "--length", "16"]
TOY += ["--held-out-blocks", "3", "--trial-blocks", "2", "--workers", "1"]


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with texts of all domains and a toy hybrid with every kind of module."""
    folder = tmp_path_factory.mktemp("world")
    write_texts(folder / "texts", 30, 8)
    tokenizer = tokens.train_tokenizer(folder / "texts", 300)
    tokenizer.save_pretrained(folder / "model")
    torch.manual_seed(0)
    toy_model(len(tokenizer)).save_pretrained(folder / "model")
    return folder


def toy_model(vocab_size: int = 50) -> MambaFormerForCausalLM:
    config = MambaFormerConfig(
        vocab_size=vocab_size, hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
        num_key_value_heads=1, layer_types=["full_attention", "hybrid_sliding", "linear_attention"], sliding_window=8,
        initializer_range=0.3,
    )  # fmt: skip
    return MambaFormerForCausalLM(config).eval()


@pytest.fixture(scope="module")
def sweep(world):
    """A finished sweep."""
    assert sweep_experts.main(arguments(world, "whole")) == 0
    return folder_of(world, "whole")


def folder_of(world: Path, name: str) -> Path:
    """Where the only sweep in the run-dir of this name has its results."""
    (folder,) = (world / name).iterdir()
    return folder


def arguments(world: Path, name: str, *more: str) -> list[str]:
    folders = {"--model": "model", "--texts": "texts", "--run-dir": name, "--output": f"{name}-report"}
    return [*TOY, *(str(part) for key, value in folders.items() for part in (key, world / value)), *more]


def results(folder: Path, pattern: str = "*.json") -> dict[str, dict]:
    """All results without their times."""
    found = {path.stem: json.loads(path.read_text()) for path in sorted(folder.glob(pattern))}
    return {name: {k: v for k, v in value.items() if "seconds" not in k} for name, value in found.items()}


# ---- what is trained


def test_families_cover_every_linear_module_but_the_head_exactly_once():
    model = toy_model()
    families = [list(tuners.modules_of(model, tuners.projections_of(family))) for family in tuners.FAMILIES]
    assert all(families)
    every = [name for family in families for name in family]
    assert sorted(every) == sorted(set(model.linear_modules()) - {"lm_head"})
    assert set(tuners.modules_of(model, tuners.projections_of("all"))) == set(every)


def test_a_model_without_a_family_is_refused():
    with pytest.raises(ValueError, match="none of the linear modules"):
        tuners.modules_of(toy_model(), ["c_proj"])


def test_scales_are_float32_and_get_gradients_from_a_bfloat16_model():
    model, ids = toy_model(), torch.randint(0, 50, (1, 32))
    gradients = []
    for dtype in (torch.float32, torch.bfloat16):
        tuner = tuners.ExpertTuner(model.to(dtype))
        tuner(ids, ids)["loss"].backward()
        assert {scale.dtype for scale in tuner.scales} == {torch.float32}
        gradients.append(torch.cat([scale.grad for scale in tuner.scales]))
    assert torch.cosine_similarity(*gradients, dim=0) > 0.98


def test_a_lora_has_nearly_the_numbers_asked_for_at_the_shapes_of_smollm2():
    shapes = {}
    for layer in range(30):
        wide = {"q": (576, 576), "k": (192, 576), "v": (192, 576), "o": (576, 576)}
        shapes |= {f"{layer}.{name}": shape for name, shape in wide.items()}
    for numbers in (4_640, 18_000, 62_240, 117_280, 300_000):
        rank, names = tuners.lora_of_numbers(shapes, numbers)
        assert len(set(names)) == len(names)
        assert sum(rank * sum(shapes[name]) for name in names) == pytest.approx(numbers, rel=0.03 * max(1, rank * 8))
    assert tuners.lora_of_numbers(shapes, 230_400) == (2, tuners.lora_of_numbers(shapes, 115_200)[1])
    with pytest.raises(ValueError, match="at least 768"):
        tuners.lora_of_numbers(shapes, 100)


def test_a_lora_leaves_the_model_as_it_was():
    model, ids = toy_model(), torch.randint(0, 50, (1, 8))
    before = model(ids).logits
    tuner = tuners.LoraTuner(model, 1, ["model.layers.0.self_attn.q_proj"])
    with torch.no_grad():
        for matrix in tuner.matrices:
            matrix.fill_(1.0)
    assert tuners.numbers_of(tuner) == 32
    assert torch.equal(model(ids).logits, before)
    assert not torch.equal(tuner.frozen[0](ids).logits, before)


# ---- the search for a rate


@pytest.mark.parametrize("best", [0, 3, 4, 8])
def test_a_rate_is_looked_for_until_both_neighbours_are_worse(best):
    runs = expert_runs
    template = runs.Run("expert", "all", 4, "python", 0.0)
    losses = runs.trials(template, lambda trial: abs(runs.RATES.index(trial.rate) - best))
    assert runs.RATES[best] in losses
    around = {runs.RATES[idx] for idx in (best - 1, best + 1) if 0 <= idx < len(runs.RATES)}
    assert around <= set(losses)
    assert len(losses) <= 3 + abs(best - 4)


def test_a_rate_that_diverges_is_not_chosen():
    template = expert_runs.Run("lora", "all", 4, "python", 0.0)
    losses = expert_runs.trials(template, lambda run: float("nan") if run.rate > 3e-3 else -run.rate)
    assert losses == {1e-3: -1e-3, 3e-3: -3e-3, 1e-2: float("inf"), 3e-2: float("inf")}
    assert sweeps.best_rate(losses) == 3e-3


# ---- the sweep


def test_all_runs_see_equally_many_tokens_and_only_what_is_named_is_trained(sweep):
    found = results(sweep, "*-final.json")
    # Experts of all and LoRAs on two domains, three families on one; each at two ranks.
    assert len(found) == (2 * 2 + 3) * len(RANKS)
    assert {result["tokens"] for result in found.values()} == {3 * 16}
    trials = results(sweep, "*-trial-*.json")
    assert {result["tokens"] for result in trials.values()} == {2 * 16}
    whole, *families = (found[f"expert-{name}-4-python-final"] for name in ("all", "attention", "mamba", "mlp"))
    assert whole["numbers"] == sum(family["numbers"] for family in families)
    assert set(whole["nats"]) == set(DOMAINS)


def test_bytes_are_those_of_the_saved_files_which_load(sweep, world):
    found = results(sweep, "*-final.json")
    for name, result in found.items():
        is_lora = name.startswith("lora")
        file = sweep / "trained" / (f"{name}/adapter_model.safetensors" if is_lora else f"{name}.safetensors")
        tensors = load_file(file).values()
        assert {tensor.dtype for tensor in tensors} == {torch.float32}
        assert result["bytes"] == sum(tensor.numel() for tensor in tensors) * 4 == result["numbers"] * 4
        assert result["file_bytes"] == file.stat().st_size
    (lora,) = (name for name in found if name.startswith("lora") and "-full-python" in name)
    assert found[lora]["bytes"] == pytest.approx(found["expert-all-full-python-final"]["bytes"], rel=0.05)
    model = MambaFormerForCausalLM.from_pretrained(world / "model")
    ids = torch.arange(16)[None]
    base = model(ids).logits
    expert = ExpertVector.load(sweep / "trained/expert-all-full-python-final.safetensors")
    assert not torch.equal(model(ids, expert_vector=expert).logits, base)
    assert not torch.equal(PeftModel.from_pretrained(model, sweep / "trained" / lora)(ids).logits, base)


def test_a_rate_is_the_best_of_its_trials(sweep):
    found = results(sweep)
    for rank in ("full", 4):
        trials = {name: result for name, result in found.items() if name.startswith(f"expert-all-{rank}-python-trial")}
        best = min(trials.values(), key=lambda result: sum(result["nats"]["python"]))["settings"]["rate"]
        finals = [f"expert-{family}-{rank}-python-final" for family in ("all", "mamba")]
        assert {found[name]["settings"]["rate"] for name in [*finals, f"expert-all-{rank}-bible-final"]} == {best}


KILLED = """if True:
    import os, signal
    from pathlib import Path
    from recipes.language import sweep_experts

    def replace(source, target):
        if Path(target).suffix == ".json" and len(list(Path(target).parent.glob("*.json"))) == 4:
            os.kill(os.getppid(), signal.SIGKILL)
            os.kill(os.getpid(), signal.SIGKILL)
        whole(source, target)

    whole, os.replace = os.replace, replace
    if __name__ == "__main__":
        sweep_experts.main()
"""


def test_a_sweep_that_was_killed_ends_as_one_that_was_not(sweep, world):
    """Killed in the middle of writing its fifth result, the worker too."""
    script = world / "killed.py"
    some = arguments(world, "cut", "--ranks", "4", "--domains", "python", "--families-on")
    script.write_text(KILLED)
    paths = os.pathsep.join([str(ROOT), *sys.path])
    command = [sys.executable, script, *some]
    done = subprocess.run(command, capture_output=True, env={**os.environ, "PYTHONPATH": paths})
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
    cut = folder_of(world, "cut")
    before = {path.name: path.stat().st_mtime_ns for path in cut.glob("*.json")}
    assert len(before) == 4 and len(list(cut.glob(".*.tmp"))) == 1
    assert sweep_experts.main(some) == 0
    assert not list(cut.glob(".*.tmp"))
    assert {name: (cut / name).stat().st_mtime_ns for name in before} == before, "finished runs are kept"
    found, expected = results(cut), results(sweep)
    assert sum(name.endswith("final") for name in found) == 2
    assert found == {name: expected[name] for name in found}


def test_results_of_other_settings_do_not_count(sweep, world):
    runs = expert_runs
    parsed = sweep_experts.parse(arguments(world, "whole"))
    settings = sweep_experts.sweep_of(parsed)
    run = runs.chosen(runs.Run("expert", "all", 4, "python", 0.0), settings, sweep)
    assert run.result(settings, sweep) is not None
    other = sweep_experts.parse(arguments(world, "whole", "--steps", "4"))
    write_texts(world / "other-texts", 29, 8)
    texts = sweep_experts.parse(arguments(world, "whole", "--texts", str(world / "other-texts")))
    assert run.result(sweep_experts.sweep_of(other), sweep) is None
    folders = {sweep_experts.sweep_of(args).folder(world / "whole") for args in (other, parsed, texts)}
    assert len(folders) == 3 and sweep in folders


def test_too_little_text_is_refused(world):
    with pytest.raises(ValueError, match="are needed"):
        sweep_experts.main(arguments(world, "short", "--held-out-blocks", "5000"))


def test_the_report_has_a_line_for_each_run_and_both_figures(sweep, world):
    report = (world / "whole-report/EXPERTS.md").read_text()
    found = results(sweep, "*-final.json")
    lines = [line for line in report.splitlines() if "±" in line]
    assert len(lines) == len(found)
    base = json.loads((sweep / "base.json").read_text())["held_out"]["manual"]
    nats = found["expert-mlp-4-python-final"]["nats"]["manual"]
    gain = sum(before - after for before, after in zip(base, nats, strict=True)) / len(base)
    (line,) = (line for line in lines if line.startswith("| MLP") and "| 4 |" in line)
    assert f"{gain:+.4f} ±" in line
    assert report.count("**") // 2 >= 2 * len(RANKS)
    assert "single families were trained on python alone" in report
    assert (world / "whole-report/experts.png").stat().st_size > 10_000


# ---- one expert


def test_smollm2_is_trained_on_as_it_is_or_as_the_hybrid_that_is_shipped():
    """Put together on the fly; a sweep's results belong to the blocks too."""
    model, tokenizer = train_expert.load("smollm2-hybrid", "bfloat16")
    windowed = [kind for kind in model.config.layer_types if kind == "hybrid_sliding"]
    assert len(windowed) == 20 and model.dtype == torch.bfloat16 and len(tokenizer) == model.config.vocab_size
    assert model.model.layers[0].mamba.out_proj.weight.count_nonzero() > 0
    plain, hybrid = (train_expert.files_of(name) for name in ("smollm2", "smollm2-hybrid"))
    assert hybrid == [*plain, ROOT / "checkpoints/smollm2-hybrid/mamba_delta.safetensors"]


def test_a_source_that_is_no_model_is_refused(tmp_path, capsys):
    with pytest.raises(ValueError, match="'smollm2' or 'smollm2-hybrid'"):
        train_expert.files_of(str(tmp_path))
    with pytest.raises(SystemExit):
        sweep_experts.parse(["--model", str(tmp_path)])
    assert "there is no model in the folder" in capsys.readouterr().err


@pytest.mark.parametrize("source", ["file", "domain"])
def test_an_expert_trains_on_a_file_or_a_domain_and_goes_on_after_a_kill(world, source, monkeypatch):
    """The kill comes in the middle of its second checkpoint: the weights are there, the rest is not."""
    trainer = train_expert.Trainer
    (world / "text.txt").write_text("a line of a text\n" * 200)
    text = ["--text", str(world / "text.txt")] if source == "file" else ["--domain", "python"]
    options = [*text, "--texts", str(world / "texts"), "--model", str(world / "model"), "--name", source]
    options += ["--steps", "6", "--eval-every", "2", "--length", "16", "--held-out-blocks", "2"]

    def trained(name: str) -> ExpertVector:
        output = world / f"{source}-{name}.safetensors"
        train_expert.main([*options, "--run-dir", str(world / name), "--output", str(output)])
        return ExpertVector.load(output)

    def save_rng_state(self, output_dir):
        if self.state.global_step == 4:
            raise KeyboardInterrupt
        whole(self, output_dir)

    expected = trained("in-one-go")
    whole = trainer._save_rng_state
    with monkeypatch.context() as patch:
        patch.setattr(trainer, "_save_rng_state", save_rng_state)
        with pytest.raises(KeyboardInterrupt):
            trained("in-two")
    expert = trained("in-two")
    assert not expert.is_base and len(expert) == 7 + 11 + 7
    assert expert == expected == trained("in-two")  # as it is when it has ended already
    assert expert.metadata["text"] == ("text.txt" if source == "file" else "python")
