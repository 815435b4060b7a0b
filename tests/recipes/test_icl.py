"""The comparison of `make icl`, at toy size: the prompts are what they claim, and runs are fair, exact and whole."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from recipes.icl import learners, runs, tasks
from recipes.icl import run as command
from recipes.icl import table as report

ROOT = Path(__file__).resolve().parents[2]


def prompts_of(name, rows=64, stream=(1, 2), **options):
    task = replace(tasks.TASKS[name], **options)
    return task, task.sample(rows, tasks.generator_of(*stream))


NAMES = ("sparse_parity", "vector_recall", "token_recall", "linear_regression", "many_outlier_regression")


# ---- prompts


def test_a_parity_is_that_of_two_coordinates_and_of_no_others():
    task, prompts = prompts_of("sparse_parity")
    x, y = prompts.inputs[:, ::2].numpy(), prompts.targets[:, ::2, 0].numpy()
    assert set(np.unique(x)) == {-1, 1}
    pairs = [(i, j) for i in range(task.dimension) for j in range(i)]
    fits = np.stack([(x[:, :, i] * x[:, :, j] == y).all(axis=1) for i, j in pairs])
    assert (fits.sum(axis=0) == 1).all()
    assert len(set(fits.argmax(axis=0))) > len(pairs) // 2  # each prompt has its own


def test_secret_coordinates_are_among_the_first_and_then_among_all():
    task = tasks.TASKS["sparse_parity"]
    pairs = [(i, j) for i in range(task.dimension) for j in range(i)]
    largest = []
    for step in (0, task.stage_steps - 1, task.stage_steps, 4 * task.stage_steps, task.steps - 1, None):
        prompts = task.sample(256, tasks.generator_of(5), step)
        x, y = prompts.inputs[:, ::2], prompts.targets[:, ::2, 0]
        fits = torch.stack([(x[..., i] * x[..., j] == y).all(dim=1) for i, j in pairs])
        assert (fits.sum(dim=0) == 1).all() and (x != 0).all()
        largest.append(max(i for (i, _), used in zip(pairs, fits.any(dim=1), strict=True) if used))
    assert largest == [2, 2, 3, 6, 9, 9]
    assert [task.stage(step) for step in (0, task.stage_steps, task.steps)] == [3, 4, 10]


@pytest.mark.parametrize("name", ["sparse_parity", "linear_regression", "many_outlier_regression"])
def test_answers_are_fed_behind_their_questions_and_asked_for_at_them(name):
    task, prompts = prompts_of(name)
    fed = prompts.inputs[:, 1::2]
    assert torch.equal(fed[..., 0], prompts.targets[:, :-1:2, 0]) and not fed[..., 1:].any()
    assert not prompts.asked[:, 1::2].any()
    assert prompts.inputs.shape[1] == 2 * task.examples - 1
    assert not (prompts.counted & ~prompts.asked).any() and prompts.counted.any()
    assert not prompts.counted[:, : prompts.counted.shape[1] * 3 // 4 - 1].any()


def test_least_squares_solves_a_regression_from_as_many_examples_as_dimensions():
    task, prompts = prompts_of("linear_regression")
    x, y = prompts.inputs[:, ::2].double().numpy(), prompts.targets[:, ::2, 0].double().numpy()
    for row in range(8):
        secret = np.linalg.solve(x[row, : task.dimension], y[row, : task.dimension])
        assert np.abs(x[row] @ secret - y[row]).max() < 1e-3
    scores = task.baseline(prompts)[:, ::2]
    assert scores[:, task.dimension + 1 :].median() < 1e-9
    # What is left without an example is the variance of y, and each example takes away a dimension of it.
    _, many = prompts_of("linear_regression", rows=4096, examples=3)
    assert task.baseline(many)[:, ::2].mean(dim=0).tolist() == pytest.approx([1, 0.8, 0.6], abs=0.1)


def test_three_of_four_pairs_are_outliers_and_the_others_one_regression():
    task, prompts = prompts_of("many_outlier_regression")
    x, y, asked = prompts.inputs[:, ::2], prompts.targets[:, ::2, 0], prompts.asked[:, ::2]
    is_outlier = (x == 1).all(dim=-1)
    assert torch.equal(asked, ~is_outlier) and (y[is_outlier] == 1).all()
    assert is_outlier.float().mean() == pytest.approx(task.outlier_rate, abs=0.03)
    assert y[asked].var() == pytest.approx(1, abs=0.3)
    for row in range(8):
        inliers, answers = x[row, asked[row]].double().numpy(), y[row, asked[row]].double().numpy()
        assert np.abs(inliers @ np.linalg.lstsq(inliers, answers)[0] - answers).max() < 1e-5
    assert task.baseline(prompts)[prompts.counted].median() < 1e-6


@pytest.mark.parametrize("name", ["vector_recall", "token_recall"])
def test_each_key_is_asked_for_once_and_its_answer_is_the_value_behind_it(name):
    task, prompts = prompts_of(name)
    pairs = task.pairs
    for inputs, targets, asked in zip(prompts.inputs, prompts.targets, prompts.asked, strict=True):
        rows = [tuple(np.atleast_1d(value)) for value in inputs.numpy()]
        book = dict(zip(rows[: 2 * pairs : 2], rows[1 : 2 * pairs : 2], strict=True))
        assert len(book) == pairs and set(rows[2 * pairs :]) == set(book)
        assert [book[key] for key in rows[2 * pairs :]] == [
            tuple(np.atleast_1d(value)) for value in targets[2 * pairs :].numpy()
        ]
        assert asked.tolist() == [False] * (2 * pairs) + [True] * pairs


def test_values_are_never_keys_and_vectors_have_unit_variance():
    task, prompts = prompts_of("token_recall")
    keys, values = prompts.inputs[:, : 2 * task.pairs : 2], prompts.inputs[:, 1 : 2 * task.pairs : 2]
    assert keys.max() < task.vocab_size // 2 <= values.min() and values.max() < task.vocab_size
    _, prompts = prompts_of("vector_recall")
    assert torch.allclose(prompts.inputs.square().mean(dim=-1), torch.ones(()))


@pytest.mark.parametrize("name", NAMES)
def test_prompts_are_decided_by_seed_and_step_alone(name):
    (_, one), (_, again), (_, step), (_, seed) = (
        prompts_of(name, rows=4, stream=stream) for stream in ((1, 2), (1, 2), (1, 3), (2, 1))
    )
    assert torch.equal(one.inputs, again.inputs) and torch.equal(one.targets, again.targets)
    assert not torch.equal(one.inputs, step.inputs) and not torch.equal(one.inputs, seed.inputs)


@pytest.mark.parametrize("name", NAMES)
def test_right_answers_score_best_and_their_loss_is_none(name):
    task, prompts = prompts_of(name)
    right, wrong = prompts.targets, prompts.targets.roll(1, dims=0)
    if task.vocab_size is not None:
        right, wrong = (torch.nn.functional.one_hot(ids, task.vocab_size).float() for ids in (right, wrong))
    right, wrong = (20 * answers if task.metric == tasks.ACCURACY else answers for answers in (right, wrong))
    best = 1.0 if task.metric == tasks.ACCURACY else 0.0
    assert task.loss(right, prompts) < 1e-6 and (task.scores(right, prompts)[prompts.asked] == best).all()
    assert task.loss(wrong, prompts) > 0.1 and task.scores(wrong, prompts)[prompts.asked].mean() != best


# ---- learners


@pytest.mark.parametrize("name", NAMES)
def test_all_three_have_the_same_size(name):
    task = tasks.TASKS[name]
    sizes = [runs.Run(task, kind, 0).learner().num_parameters() for kind in learners.ARCHITECTURES]
    assert max(sizes) / min(sizes) < 1.02


def test_the_transformer_alone_is_told_positions():
    rope = {
        kind: learners.options_of(kind, tasks.TASKS["token_recall"]).get("rope_parameters")
        for kind in learners.ARCHITECTURES
    }
    assert [kind for kind, parameters in rope.items() if parameters] == ["transformer"]
    with pytest.raises(ValueError, match="choose from"):
        learners.options_of("rnn", tasks.TASKS["token_recall"])


@pytest.mark.parametrize("kind", ["transformer", "mamba", "mambaformer"])
def test_what_comes_later_in_a_prompt_changes_no_answer(kind):
    task, prompts = prompts_of("linear_regression", rows=2)
    learner = runs.Run(task, kind, 0).learner()
    changed = prompts.inputs.clone()
    changed[:, 9:] += 1
    with torch.no_grad():
        before, after = learner(prompts.inputs), learner(changed)
    assert torch.allclose(before[:, :9], after[:, :9], atol=1e-5)
    assert (before[:, 9:] - after[:, 9:]).abs().max() > 1e-2


# ---- runs


def toy(kind="mambaformer", **options):
    task = replace(
        tasks.TASKS["linear_regression"], **{"dimension": 2, "examples": 6, "rows": 8, "steps": 12, **options}
    )
    return runs.Run(task, kind, 0)


@pytest.fixture
def few_held_out(monkeypatch):
    monkeypatch.setattr(runs, "HELD_OUT_ROWS", 16)


@pytest.mark.parametrize("kind", ["transformer", "mamba", "mambaformer"])
def test_some_steps_lower_the_loss(kind, few_held_out):
    options = {"dimension": 1, "num_secret": 1, "examples": 8, "steps": 20, "learning_rate": 5e-3}
    training = runs.Training(runs.Run(replace(tasks.TASKS["sparse_parity"], **options), kind, 0))
    prompts = training.task.sample(64, tasks.generator_of(0))
    losses = []
    while training.step < 20:
        losses.append(training.task.loss(training.learner(prompts.inputs), prompts).item())
        training.advance()
    assert losses[-1] < 0.5 * losses[0]


def test_a_run_that_was_cut_goes_on_to_the_same_bits(tmp_path, few_held_out):
    whole = runs.complete(toy(), tmp_path / "whole")

    def cut(training):
        if training.step == 7:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        runs.complete(toy(), tmp_path / "cut", 0.0, cut)
    steps = []
    resumed = runs.complete(toy(), tmp_path / "cut", 0.0, lambda training: steps.append(training.step))
    assert steps[0] == 7  # step 7 itself was not in the checkpoint
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0}
    assert [path.name for path in (tmp_path / "cut").iterdir()] == [
        "linear_regression-mambaformer-steps12-rate0.003-seed0.json"
    ]


def test_each_stage_is_scored_at_its_end_and_all_of_the_task_in_the_end(tmp_path, few_held_out):
    options = {"dimension": 4, "examples": 8, "stage_steps": 5, "steps": 12, "rows": 4}
    run = runs.Run(replace(tasks.TASKS["sparse_parity"], **options), "mamba", 0)
    result = runs.complete(run, tmp_path)
    assert [stage for stage, _ in result["stages"]] == [3, 4]
    assert result["stages"][-1][1] == result["score"]
    training = runs.Training(run)
    for _ in range(5):
        training.advance()
    task, scores = training.task, []
    for idx in range(runs.HELD_OUT_BATCHES):
        prompts = task.sample(16, tasks.generator_of(runs.HELD_OUT, idx), step=4)
        scores += task.scores(training.learner(prompts.inputs), prompts)[prompts.counted].tolist()
    assert result["stages"][0][1] == pytest.approx(sum(scores) / len(scores))
    (line,) = [line for line in report._stages(task, {"mamba": {0: result}}) if "Mamba" in line]
    assert line == f"| Mamba | {result['stages'][0][1]:.4f} | {result['stages'][1][1]:.4f} |"
    assert toy().task.stage(0) is None


def test_other_settings_are_another_run(tmp_path, few_held_out):
    runs.complete(toy(), tmp_path)
    assert toy().result(tmp_path) is not None
    for options in ({"steps": 13}, {"learning_rate": 1e-3}, {"examples": 7}):
        assert toy(**options).result(tmp_path) is None
    training = runs.Training(toy())
    training.advance()
    training.save(tmp_path / "checkpoint")
    other = runs.Training(toy(steps=13))
    other.resume(tmp_path / "checkpoint")
    assert other.step == 0


@pytest.mark.parametrize(
    ("metric", "scores", "tried", "best"),
    [
        ("accuracy", (0.0, 0.1, 0.2, 0.7, 0.3, 0.9), [1e-3, 3e-3, 1e-2], 3e-3),
        ("squared error", (0.1, 0.2, 0.3, 0.7, 0.0, 0.0), [1e-4, 3e-4, 1e-3, 3e-3], 1e-4),
        ("squared error", (0.0, 0.3, 0.2, 0.7, 0.0, 0.0), [3e-4, 1e-3, 3e-3], 1e-3),
        ("accuracy", (0.0, 0.0, 0.0, 0.1, 0.2, 0.3), [1e-3, 3e-3, 1e-2, 3e-2], 3e-2),
    ],
)
def test_the_learning_rate_is_that_of_the_best_pilot(tmp_path, monkeypatch, metric, scores, tried, best):
    """They go on beyond the better of the first two until it has a worse one on either side, or none."""
    task = toy(steps=40).task
    monkeypatch.setattr(type(task), "metric", metric)
    scores, done = dict(zip(runs.RATES, scores, strict=True)), []
    while missing := command.missing_pilots([task], ["mamba"], tmp_path):
        assert {pilot.task.steps for pilot in missing} == {10} and missing[0].seed not in range(9)
        for pilot in missing:
            assert runs.with_best_rate(task, "mamba", tmp_path) is None
            found = {"settings": pilot.settings(), "stages": [[None, 0.5], [None, scores[pilot.task.learning_rate]]]}
            pilot.file(tmp_path, "json").write_text(json.dumps(found))
            done.append(pilot.task.learning_rate)
    assert sorted(done) == tried
    assert runs.with_best_rate(task, "mamba", tmp_path) == replace(task, learning_rate=best)
    assert runs.with_best_rate(task, "transformer", tmp_path) is None


def test_a_file_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "result.json"
    runs.write_atomically(path, b"old")

    def full(descriptor):
        raise OSError("No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space"):
        runs.write_atomically(path, b"new")
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_table_tells_what_was_run_and_what_was_not(tmp_path, few_held_out, monkeypatch):
    pytest.importorskip("matplotlib")
    monkeypatch.setattr(report, "HELD_OUT_ROWS", 16)
    run = toy()
    while pilots := command.missing_pilots([run.task], [run.architecture], tmp_path):
        for pilot in pilots:
            runs.complete(pilot, tmp_path)
    best = runs.with_best_rate(run.task, run.architecture, tmp_path)
    results = [runs.complete(replace(run, task=best, seed=seed), tmp_path) for seed in (0, 1)]
    table = report.write_report([run.task], tmp_path, tmp_path / "report")
    scores = [result["score"] for result in results]
    assert f"{sum(scores) / 2:.4f} ({scores[0]:.4f}, {scores[1]:.4f})" in table.splitlines()[2]
    assert table.count("not run") == 2 and "least squares" in table
    assert table in (tmp_path / "report/RESULTS.md").read_text()
    assert (tmp_path / "report/curves.png").read_bytes().startswith(b"\x89PNG")


# ---- the command


def start(folder, *arguments):
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    command = [
        sys.executable,
        "-m",
        "recipes.icl.run",
        "--run-dir",
        folder,
        "--output",
        folder,
        "--workers",
        "1",
        *arguments,
    ]
    silent = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True, **silent)


def test_a_killed_command_goes_on_with_the_same_curve(tmp_path):
    """Both its processes at once, in the middle of a run."""
    pytest.importorskip("matplotlib")
    arguments = ("--tasks", "token_recall", "--architectures", "mambaformer", "--seeds", "1", "--steps", "24")
    arguments += ("--checkpoint-seconds", "0")
    name = "token_recall-mambaformer-steps24-rate*-seed0"
    killed = start(tmp_path, *arguments)
    wait_for(tmp_path, f"{name}.pt", killed)
    os.killpg(killed.pid, signal.SIGKILL)
    killed.wait()
    assert not list(tmp_path.glob(f"{name}.json"))
    assert start(tmp_path, *arguments).wait(timeout=600) == 0
    (path,) = tmp_path.glob(f"{name}.json")
    resumed = json.loads(path.read_text())
    task = replace(tasks.TASKS["token_recall"], steps=24)
    run = runs.Run(runs.with_best_rate(task, "mambaformer", tmp_path), "mambaformer", 0)
    whole = json.loads(json.dumps(runs.complete(run, tmp_path / "whole")))
    assert {**resumed, "seconds": 0} == {**whole, "seconds": 0} and len(whole["curve"]) == 25


def wait_for(folder, pattern, process):
    give_up = time.monotonic() + 600
    while not list(folder.glob(pattern)):
        assert process.poll() is None and time.monotonic() < give_up
        time.sleep(0.05)
