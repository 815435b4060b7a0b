"""The Python examples of README, docs/ and the model cards run as they stand, with warnings as errors.

Each runs in a folder that has what its reader would have: a saved model under the name that the example uses. The code
of `SETTINGS` for its section, `DEFAULT` for a new one, stands before an example.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from transformers import LlamaConfig, LlamaForCausalLM

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM
from patterns import ROOT
from tiny_models import random_expert

CARDS = ("checkpoints/mambaformer-tiny/README.md", "checkpoints/smollm2-hybrid/README.md")
PAGES = ("README.md", *sorted(f"docs/{page.name}" for page in (ROOT / "docs").glob("*.md")), *CARDS)
PATH = 'path = "model"\n'
DEFAULT = f"""
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
{PATH}
model = AutoModelForCausalLM.from_pretrained(path, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=True)
ids = tokenizer("In the beginning God", return_tensors="pt").input_ids
"""
DEEP = """
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("deep", trust_remote_code=True)
small_model = AutoModelForCausalLM.from_pretrained("deep", trust_remote_code=True)
ids, drafts = torch.arange(12)[None], torch.arange(24).reshape(2, 12)
"""
SESSIONS = """
new_ids, chats = ids[:, :3], [ids, torch.cat([ids, ids], dim=1)]
prefix = model.make_cache()
model(ids[:, :2], past_key_values=prefix)
prefix.save("system_prompt.safetensors")
"""
# Code in front of the examples of a section.
SETTINGS = {
    "MambaFormer for Transformers": "",
    "Load and generate": PATH,
    "A saved folder alone": "",
    "Convert a checkpoint": "",
    "Use": DEFAULT.replace('return_tensors="pt").input_ids', 'return_tensors="pt").input_ids.repeat(2, 1)'),
    "Rollback and speculation": DEEP,
    "Weights in int8 and int4": PATH + "from transformers import AutoModelForCausalLM\n",
    "Sessions": DEFAULT + SESSIONS,
    "How sure one vector is": DEFAULT + "batches = [ids]\n",
    "mambaformer-tiny": 'path = "checkpoints/mambaformer-tiny"\n',
    "smollm2-hybrid": "from transformers import AutoModelForCausalLM\n",
}
RUNNER = """
import json, sys, traceback
found = {}
for name, code in json.load(open(sys.argv[1])):
    try:
        exec(compile(code, name, "exec"), {"__name__": "example"})
        found[name] = None
    except BaseException:
        found[name] = traceback.format_exc()
json.dump(found, open(sys.argv[2], "w"))
"""


def examples() -> dict[str, str]:
    """Page, section and number -> the code of each Python block, in an order in which they can share a process."""
    found: dict[str, str] = {}
    for page in PAGES:
        section, lines = "", (ROOT / page).read_text().splitlines()
        for number, line in enumerate(lines):
            is_code = "\n".join(lines[:number]).count("\n```") % 2
            if line.startswith("#") and not is_code:
                section = line.lstrip("# ")
            if line == "```python":
                code = "\n".join(lines[number + 1 : lines.index("```", number)])
                count = sum(name.startswith(f"{page}: {section} ") for name in found)
                found[f"{page}: {section} {count + 1}"] = SETTINGS.get(section, DEFAULT) + code + "\n"
    # Once the package is imported, the Auto classes prefer it to the code of a folder.
    return dict(sorted(found.items(), key=lambda item: "mambaformer import" in item[1]))


EXAMPLES = examples()


def save_with_experts(folder: Path) -> MambaFormerForCausalLM:
    """mambaformer-tiny with two small expert vectors of the names that the examples use."""
    model = MambaFormerForCausalLM.from_pretrained(ROOT / "checkpoints" / "mambaformer-tiny")
    for seed, name in enumerate(("king_james", "python")):
        modules = [f"model.layers.{layer}.mlp.down_proj" for layer in range(2)]
        model.expert_vectors.add(random_expert(model, seed, rank=16, modules=modules, name=name))
    model.save_pretrained(folder)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(ROOT / "checkpoints" / "mambaformer-tiny" / file, folder)
    return model


@pytest.fixture(scope="module")
def outcomes(request, tmp_path_factory):
    """Name of each example that this run asks for -> the traceback that it ended with, or None."""
    asked = {item.callspec.params["name"] for item in request.session.items if "outcomes" in item.fixturenames}
    folder = tmp_path_factory.mktemp("reader")
    save_with_experts(folder / "model").expert_vectors.save(folder / "checkpoints" / "expert-vectors")
    for copy in ("checkpoints/mambaformer-tiny", "my-hybrid"):
        shutil.copytree(ROOT / "checkpoints" / "mambaformer-tiny", folder / copy)
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).save_pretrained(folder / "path" / "to" / "llama")
    MambaFormerForCausalLM(MambaFormerConfig(**sizes, num_hidden_layers=9)).save_pretrained(folder / "deep")
    (folder / "runner.py").write_text(RUNNER)
    (folder / "examples.json").write_text(
        json.dumps([(name, code) for name, code in EXAMPLES.items() if name in asked])
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "runner.py", "examples.json", "found.json"],
        cwd=folder,
        env={**os.environ, "HF_MODULES_CACHE": str(folder / "modules")},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    return json.loads((folder / "found.json").read_text())


def in_the_lane(name):
    return name if name.startswith("README") else pytest.param(name, marks=pytest.mark.long)


@pytest.mark.slow
@pytest.mark.parametrize("name", [in_the_lane(name) for name in EXAMPLES])
def test_an_example_of_a_page_runs_without_a_warning(name, outcomes):
    assert outcomes[name] is None, outcomes[name]


def test_every_section_with_settings_has_an_example():
    """A heading that is renamed would leave its examples without what they start from."""
    pages = "".join((ROOT / page).read_text() for page in PAGES)
    headings = {line.lstrip("# ") for line in pages.splitlines() if re.match("#+ ", line)}
    assert set(SETTINGS) <= headings
