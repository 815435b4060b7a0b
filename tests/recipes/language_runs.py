"""Texts of three domains, and a command that is killed while it writes a checkpoint."""

import json
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
DOMAINS = ("bible", "python", "manual")
# Really killed, in the middle of writing a checkpoint: weights and optimizer are there, the rest is not.
KILLED = """
import importlib, os, signal, sys, torch
name, step = sys.argv.pop(1), int(sys.argv.pop(1))
torch.set_num_threads(1)
from transformers import Trainer

def save_rng_state(self, output_dir):
    if self.state.global_step == step:
        os.kill(os.getpid(), signal.SIGKILL)
    whole(self, output_dir)

whole, Trainer._save_rng_state = Trainer._save_rng_state, save_rng_state
importlib.import_module(f"recipes.language.{name}").main()
"""


def write_texts(folder: Path, num_train: int = 40, num_held_out: int = 3) -> None:
    """Documents of all domains as `texts.collect` writes them."""
    folder.mkdir(parents=True)
    for number, domain in enumerate(DOMAINS):
        for split, count in (("train", num_train), ("held_out", num_held_out)):
            texts = [f"{domain} {split} {i}: {'é' * (i % 3)} {i * (number + 7)} words\n" * 3 for i in range(count)]
            lines = [json.dumps({"name": str(i), "text": text}) for i, text in enumerate(texts)]
            (folder / f"{domain}-{split}.jsonl").write_text("\n".join(lines) + "\n")


def run_and_kill(name: str, step: int, *arguments) -> None:
    """Runs the command `recipes.language.{name}` in a process of its own until it writes the checkpoint of `step`."""
    command = [sys.executable, "-c", KILLED, name, str(step), *arguments]
    done = subprocess.run(command, capture_output=True, cwd=ROOT)
    assert done.returncode == -signal.SIGKILL, done.stderr.decode()
