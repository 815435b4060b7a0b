"""Each numbered example runs as a user runs it: in a process of its own, elsewhere, with warnings as errors.

`07_chat.py` and `09_demo.py` run in `make demo`, and `08_serve.py` in test_serve.py.
"""

import os
import re
import shutil
import subprocess
import sys

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from patterns import ROOT, TINY

EXAMPLES = ROOT / "examples"
# The last line that each prints, when all that it asserts holds.
LAST_LINES = {
    "01_generate": "Without a cache the tokens are the same.",
    "02_switch_expert_vectors": "Schedule, batch and merged weights agree with the single runs.",
    "03_roll_back_and_fork": "Prompt lookup decoding yields the tokens of plain greedy decoding.",
    "04_save_and_resume_a_session": "first process:  'And it came to pass",
    "05_batch_of_chats": "Each row of the batch equals the chat run alone.",
    "06_convert_a_model": "of their scale before training.",
    "10_which_expert_vector": "was base before the language changed, and is french now.",
}
CASES = [
    "01_generate",
    "04_save_and_resume_a_session",
    *(pytest.param(name, marks=pytest.mark.long) for name in LAST_LINES if name[:2] in ("02", "03", "05", "10")),
]
TESTED_ELSEWHERE = {"07_chat", "08_serve", "09_demo"}


def run(name, place, *arguments):
    """What the example prints."""
    environment = {**os.environ, "HF_MODULES_CACHE": str(place / "modules")}
    command = [sys.executable, "-W", "error", EXAMPLES / f"{name}.py", *arguments]
    done = subprocess.run(command, cwd=place, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_every_example_has_a_number_and_is_tested():
    names = sorted(path.stem for path in EXAMPLES.glob("*.py"))
    assert set(names) == LAST_LINES.keys() | TESTED_ELSEWHERE
    assert [int(name[:2]) for name in names] == list(range(1, len(names) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_an_example_runs_on_a_copied_model_folder_without_the_package(name, tmp_path):
    assert not re.search(r"^(from|import) mambaformer", (EXAMPLES / f"{name}.py").read_text(), re.MULTILINE)
    folder = shutil.copytree(TINY, tmp_path / "copy")
    lines = run(name, tmp_path, folder)
    assert LAST_LINES[name] in lines[-1]
    if name.startswith("04"):
        first, second = ([line for line in lines if line.startswith(process)][-1] for process in ("first", "second"))
        assert first.partition(":")[2].strip() == second.partition(":")[2].strip()


@pytest.mark.slow
def test_a_model_is_converted_by_the_example(tmp_path):
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4)).save_pretrained(tmp_path / "llama")
    lines = run("06_convert_a_model", tmp_path, tmp_path / "llama")
    assert LAST_LINES["06_convert_a_model"] in lines[-1] and "2 of the layers hybrid" in lines[1]
