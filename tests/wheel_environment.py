"""The wheel at work in an environment that has nothing else of this repository: `make test-wheel`.

    python -I -W error tests/wheel_environment.py

Plain Python without pytest: prints each check, and exits with 1 if one failed. It leaves the repository, so that only
the installed package can be imported.
"""

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
WORK = Path(tempfile.mkdtemp(prefix="mambaformer-wheel-"))
os.environ.update(HF_HUB_OFFLINE="1", HF_HOME=str(WORK / "home"), MAMBAFORMER_CACHE=str(WORK / "cache"))
os.chdir(WORK)

import torch  # noqa: E402
import transformers  # noqa: E402
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig, LlamaForCausalLM  # noqa: E402

import mambaformer  # noqa: E402

PACKAGE = Path(mambaformer.__file__).parent
RELOAD = """
import sys
import torch
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("saved", trust_remote_code=True)
assert "transformers_modules" in type(model).__module__ and "mambaformer" not in sys.modules
ids = [int(token) for token in sys.argv[1].split(",")]
print(*model.generate(torch.tensor([ids]), max_new_tokens=12, do_sample=False)[0].tolist())
"""


def the_package_is_the_one_of_the_wheel():
    assert "site-packages" in PACKAGE.parts, PACKAGE
    assert (PACKAGE / "py.typed").is_file()
    version = metadata.version("mambaformer")
    assert mambaformer.__version__ == version
    assert f'version = "{version}"' in (ROOT / "pyproject.toml").read_text()


def every_file_is_the_one_of_the_repository():
    def digests(folder: Path) -> dict[str, str]:
        files = [*folder.glob("*_mambaformer.py"), *folder.glob("convert/*.py")]
        return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}

    assert digests(PACKAGE) == digests(ROOT)


def a_model_folder_loads_without_remote_code_and_generates():
    folder = shutil.copytree(ROOT / "checkpoints" / "mambaformer-tiny", WORK / "copy")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    assert isinstance(model, mambaformer.MambaFormerForCausalLM)
    ids = tokenizer("In the beginning God", return_tensors="pt").input_ids
    tokens = model.generate(ids, max_new_tokens=12, do_sample=False)[0]
    assert len(tokens) == ids.shape[1] + 12
    assert tokenizer.decode(tokens).startswith("In the beginning God")
    model.save_pretrained(WORK / "saved")
    arguments = ",".join(str(token) for token in ids[0].tolist())
    command = [sys.executable, "-I", "-W", "error", "-c", RELOAD, arguments]
    answer = subprocess.run(command, cwd=WORK, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stderr
    assert answer.stdout.split() == [str(token) for token in tokens.tolist()]


def a_checkpoint_is_converted_by_the_command():
    sizes = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 32, "num_attention_heads": 2}
    source = LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=2)).eval()
    source.save_pretrained(WORK / "llama")
    command = Path(sys.executable).parent / "mambaformer-convert"
    done = subprocess.run([command, "llama", "hybrid", "--upcycle", "all"], cwd=WORK, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    hybrid, ids = AutoModelForCausalLM.from_pretrained(WORK / "hybrid").eval(), torch.arange(9)[None]
    torch.testing.assert_close(hybrid(ids).logits, source(ids).logits, atol=1e-5, rtol=0)


CHECKS = (
    the_package_is_the_one_of_the_wheel,
    every_file_is_the_one_of_the_repository,
    a_model_folder_loads_without_remote_code_and_generates,
    a_checkpoint_is_converted_by_the_command,
)


def main() -> int:
    print(f"Python {sys.version.split()[0]}, PyTorch {torch.__version__}, Transformers {transformers.__version__}")
    transformers.utils.logging.disable_progress_bar()
    try:
        for check in CHECKS:
            check()
            print(f"ok      {check.__name__.replace('_', ' ')}", flush=True)
    finally:
        shutil.rmtree(WORK)
    print(f"{len(CHECKS)} passed, 0 failed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
