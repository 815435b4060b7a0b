"""Pretraining at toy size: it goes on after a kill as if there had been none, and counts its bits per byte right."""

import json
import math
import os
import shutil
from pathlib import Path

import pytest
import torch

from language_runs import DOMAINS, run_and_kill, write_texts
from mambaformer import MambaFormerForCausalLM
from recipes.language import evaluate, pretrain, shapes, texts, tokens, training

TOY = ["--arch", "hybrid", "--hidden-size", "16", "--vocab-size", "300", "--length", "16", "--batch-size", "2"]
TOY += ["--max-steps", "12", "--eval-every", "5", "--save-every", "4", "--log-every", "2", "--held-out-bytes", "150"]


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """Two finished runs with the same text: one in one go, one that was killed in between."""
    whole, cut = (tmp_path_factory.mktemp("pretrain") / name for name in ("whole", "cut"))
    write_texts(whole / "data" / "texts")
    pretrain.main([*TOY, "--run-dir", str(whole), "--output", str(whole / "output")])
    cut.mkdir()
    (cut / "data").symlink_to(whole / "data")
    run_and_kill("pretrain", 8, *TOY, "--run-dir", cut)
    left = {path.name: sorted(os.listdir(path)) for path in cut.glob("hybrid/checkpoint-*")}
    steps = []
    with pytest.MonkeyPatch.context() as patch:
        step = training.PretrainingTrainer.training_step
        counted = lambda *args, **kwargs: steps.append(1) or step(*args, **kwargs)  # noqa: E731
        patch.setattr(training.PretrainingTrainer, "training_step", counted)
        pretrain.main([*TOY, "--run-dir", str(cut)])
    assert len(steps) == 8, "it goes on behind step 4 of 12"
    return whole, cut, left


def curve(run: Path) -> list[dict]:
    """The log, without what clocks say."""
    clocks = ("runtime", "per_second", "train_loss", "total_flos")
    entries = json.loads((run / "hybrid" / "log.json").read_text())
    return [{key: value for key, value in entry.items() if not key.endswith(clocks)} for entry in entries]


def weights(run: Path) -> dict[str, torch.Tensor]:
    return MambaFormerForCausalLM.from_pretrained(run / "hybrid" / "checkpoint-12").state_dict()


def test_a_run_killed_while_it_wrote_a_checkpoint_resumes_to_equal_weights(runs):
    whole, cut, left = runs
    assert "optimizer.pt" in left["checkpoint-8"] and "complete" not in left["checkpoint-8"]
    assert "complete" in left["checkpoint-4"]
    assert curve(cut) == curve(whole)
    assert [entry["step"] for entry in curve(whole) if "loss" in entry] == [2, 4, 6, 8, 10, 12]
    torch.testing.assert_close(weights(cut), weights(whole), rtol=0, atol=0)


def test_a_finished_run_is_only_evaluated_again(runs, monkeypatch):
    whole, _, _ = runs
    before = (whole / "hybrid" / "results.json").read_text()
    monkeypatch.setattr(training.PretrainingTrainer, "train", None)
    pretrain.main([*TOY, "--run-dir", str(whole)])
    assert (whole / "hybrid" / "results.json").read_text() == before


def test_other_settings_do_not_go_on_with_a_run(runs):
    with pytest.raises(ValueError, match=r"'learning_rate': \(0.002, 0.1\)"):
        pretrain.main([*TOY, "--run-dir", str(runs[0]), "--learning-rate", "0.1"])


def test_the_saved_model_is_a_hub_folder_whose_card_has_the_figures(runs):
    whole, _, _ = runs
    folder = whole / "output"
    assert json.loads((folder / "config.json").read_text())["dtype"] == "bfloat16"
    assert {"modeling_mambaformer.py", "tokenizer.json", "generation_config.json"} <= set(os.listdir(folder))
    held_out = json.loads((whole / "hybrid" / "results.json").read_text())["held_out"]
    card = (folder / "README.md").read_text()
    assert card.startswith("---\n") and all(f"{held_out[name]['bits_per_byte']:.4f}" in card for name in DOMAINS)
    assert "](curves.png)" in card
    assert (whole / "curves.png").stat().st_size == (folder / "curves.png").stat().st_size > 0


def test_a_folder_inside_the_repository_gets_the_code_that_is_there(runs, tmp_path, monkeypatch):
    """The code was links to the repository's, which led nowhere after a plain copy of the folder."""
    code = (runs[0] / "output" / "ops_mambaformer.py").read_text()
    for file in (runs[0] / "output").glob("*_mambaformer.py"):
        (tmp_path / file.name).write_text(file.read_text() + "# newer\n")
    monkeypatch.setattr(pretrain, "ROOT", tmp_path)
    output = tmp_path / "checkpoints" / "tiny"
    for _ in range(2):
        pretrain.publish(runs[0] / "output", output)
        assert not any(path.is_symlink() for path in output.iterdir())
        assert (output / "ops_mambaformer.py").read_text() == code + "# newer\n"
        assert os.listdir(output.parent) == ["tiny"]
    assert (runs[0] / "output" / "ops_mambaformer.py").read_text() == code


def test_an_evaluation_finds_the_stated_figures_and_a_wrong_one(runs, tmp_path, capsys):
    whole, _, _ = runs
    folder = tmp_path / "checkpoints" / "mambaformer-tiny"
    shutil.copytree(whole / "output", folder)
    places = {
        "--models": tmp_path / "checkpoints",
        "--texts": whole / "data" / "texts",
        "--run-dir": tmp_path / "eval",
    }
    arguments = ["--only", "tiny", *(str(part) for pair in places.items() for part in pair)]
    assert evaluate.main(arguments) == 0
    stated = json.loads((folder / "figures.json").read_text())
    stated["hybrid"]["held_out"]["manual"]["bits_per_byte"] += 0.01
    (folder / "figures.json").write_text(json.dumps(stated))
    capsys.readouterr()
    assert evaluate.main(arguments) == 1
    printed = capsys.readouterr().out
    assert printed.count("OFF") == 1 and "the model index says" in printed and "the card says '| manual |" in printed


def test_bits_per_byte_are_those_of_one_long_forward(runs):
    """A window as long as the text scores all of it in one forward; the figure is nats over ln 2 and bytes."""
    whole, _, _ = runs
    tokenizer = tokens.PreTrainedTokenizerFast.from_pretrained(whole / "data" / "tokenizer-300")
    texts = list(tokens._first_bytes(whole / "data" / "texts", "bible", 150))
    ids = [
        tokenizer.eos_token_id,
        *(i for text in texts for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]),
    ]
    windows = tokens.held_out_windows(whole / "data" / "texts", "bible", tokenizer, len(ids), 150)
    model = MambaFormerForCausalLM.from_pretrained(whole / "hybrid" / "model", dtype=torch.float32)
    args = pretrain.parse(TOY)
    found = training.evaluate(model, whole / "hybrid", {"bible": windows}, tokenizer, args)["bible"]
    with torch.no_grad():
        nats = model(torch.tensor([ids]), labels=torch.tensor([ids])).loss.item() * (len(ids) - 1)
    num_bytes = sum(len(text.encode()) for text in texts)
    assert 148 <= num_bytes <= 150 and found["bytes"] == num_bytes and found["tokens"] == len(ids) - 1
    assert found["bits_per_byte"] == pytest.approx(nats / math.log(2) / num_bytes, rel=1e-5)


def test_windows_score_each_token_once_behind_at_least_half_a_window(runs):
    texts = runs[0] / "data" / "texts"
    tokenizer = tokens.PreTrainedTokenizerFast.from_pretrained(runs[0] / "data" / "tokenizer-300")
    one = tokens.held_out_windows(texts, "manual", tokenizer, 10, 150)
    scored = [label for row in one for label in row["labels"] if label != -100]
    documents = tokens._first_bytes(texts, "manual", 150)
    assert scored == [i for text in documents for i in [*tokenizer(text).input_ids, tokenizer.eos_token_id]]
    assert all(sum(label == -100 for label in row["labels"]) >= 5 for row in one.select(range(1, len(one))))


def test_the_two_architectures_have_the_same_size_and_fit_in_15_megabytes():
    hybrid, llama = (shapes.build(arch, 4096, 256, 0).num_parameters() for arch in ("hybrid", "llama"))
    assert abs(llama / hybrid - 1) < 0.01
    assert hybrid > 5e6 and 2 * hybrid < 14e6


def test_neither_norms_nor_biases_nor_the_decay_of_states_get_weight_decay(runs, tmp_path):
    args = pretrain.parse(TOY)
    tokenizer = tokens.PreTrainedTokenizerFast.from_pretrained(runs[0] / "data" / "tokenizer-300")
    for arch in ("hybrid", "llama"):
        model = shapes.build(arch, 300, 16, 0)
        trainer = training.trainer_for(model, tmp_path, {}, tokenizer, args)
        groups = trainer.create_optimizer().param_groups
        decayed = {id(weight) for group in groups if group["weight_decay"] for weight in group["params"]}
        for name, weight in model.named_parameters():
            assert (id(weight) in decayed) == (weight.dim() > 1 and not name.endswith("A_log")), name


def test_documents_are_never_split_and_a_missing_source_says_what_to_install(tmp_path, monkeypatch):
    documents = [(f"chapter {i}", f"text {i}") for i in range(45)]
    sources = [texts.Source(name, name, "none", lambda: iter(documents)) for name in DOMAINS]
    monkeypatch.setattr(texts, "SOURCES", sources)
    monkeypatch.setattr(texts, "check_installed", lambda sources: None)
    texts.collect(tmp_path / "texts")
    held_out, trained = (texts.read(tmp_path / "texts", "bible", split) for split in ("held_out", "train"))
    assert held_out == ["text 10", "text 30"] and sorted(held_out + trained) == sorted(text for _, text in documents)
    monkeypatch.undo()
    monkeypatch.setattr(texts, "SOURCES", [texts.Source("no", "bible", "none", None, ("no-such-package-x",))])
    with pytest.raises(ValueError, match=r"no-such-package-x"):
        texts.collect(tmp_path / "other")


def test_a_book_is_cut_between_paragraphs_and_nothing_is_lost():
    paragraphs = [f"paragraph {i} " * 100 for i in range(50)]
    chapters = list(texts._chapters("\n\n".join(paragraphs)))
    assert len(chapters) > 1 and all(len(chapter) < 18_000 for chapter in chapters)
    assert "\n\n".join(chapter.removesuffix("\n") for chapter in chapters) == "\n\n".join(paragraphs)


def test_a_folder_that_is_something_else_is_not_replaced(tmp_path, capsys):
    (tmp_path / "checkpoints").mkdir()
    with pytest.raises(SystemExit):
        pretrain.parse(["--output", str(tmp_path / "checkpoints")])
    assert "exists and is not what this has written before" in capsys.readouterr().err
    assert pretrain.parse(["--output", str(tmp_path / "new")]).output == tmp_path / "new"


def test_an_architecture_that_was_trained_otherwise_is_no_comparison(runs, tmp_path):
    """Said before anything is trained; another learning rate is no objection."""
    found = json.loads((runs[0] / "hybrid" / "results.json").read_text())
    (tmp_path / "llama").mkdir()
    (tmp_path / "llama" / "results.json").write_text(json.dumps(found | {"max_steps": 999, "learning_rate": 1.0}))
    arguments = [*TOY, "--run-dir", str(tmp_path), "--arch", "hybrid"]
    with pytest.raises(ValueError, match=r"the llama in .* was trained with another max_steps: train both alike"):
        pretrain.main(arguments)
    assert os.listdir(tmp_path) == ["llama"]
    assert pretrain.results_beside(pretrain.parse([*arguments, "--max-steps", "999"])).keys() == {"llama"}
