"""The folders in `checkpoints/` load wherever they are copied to, by a process that does not have the package."""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from patterns import ROOT, TINY, tiny_config
from tiny_models import random_model

SCRIPT = ROOT / "scripts" / "folders.py"
UNSHIPPED = "unshipped_mambaformer.py"
USER_SCRIPT = """
import json, sys
from transformers import AutoModelForCausalLM, AutoTokenizer
folder = sys.argv[1]
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
ids = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)("In the beginning God", return_tensors="pt")
tokens = model.generate(**ids, max_new_tokens=6, do_sample=False)[0].tolist()
print(json.dumps([type(model).__name__, tokens, "mambaformer" in sys.modules]))
"""


@pytest.fixture(scope="module")
def folders():
    """The script as a module."""
    spec = importlib.util.spec_from_file_location("folders", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def repository(tmp_path):
    """The shipped code, a file that is not shipped, a model folder, and a folder of blocks alone."""
    for path in ROOT.glob("*_mambaformer.py"):
        shutil.copy(path, tmp_path)
    (tmp_path / UNSHIPPED).write_text('"""Imported by no shipped file."""\n')
    for name in ("tiny", "blocks"):
        (tmp_path / "checkpoints" / name).mkdir(parents=True)
    (tmp_path / "checkpoints" / "tiny" / "config.json").write_text("{}")
    return tmp_path


def run(repository: Path, *options: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SCRIPT, "--root", repository, *options], capture_output=True, text=True)


def by_copy(target: Path) -> Path:
    subprocess.run(["cp", "-r", TINY, target], check=True)
    return target


def by_zip(target: Path) -> Path:
    archive = target.with_suffix(".zip")
    with zipfile.ZipFile(archive, "w") as file:
        for path in TINY.iterdir():
            # Neither Windows nor a plain zip has symbolic links: they arrive as files that hold their target.
            name = f"{target.name}/{path.name}"
            file.writestr(name, os.readlink(path)) if path.is_symlink() else file.write(path, name)
    with zipfile.ZipFile(archive) as file:
        file.extractall(target.parent)
    return target


@pytest.mark.slow
@pytest.mark.parametrize("copied", [by_copy, by_zip])
def test_a_copied_folder_loads_and_generates_without_the_package(copied, tmp_path):
    """`cp -r checkpoints/mambaformer-tiny` did not load: its code was relative links, broken in the copy."""
    folder = copied(tmp_path / "elsewhere")
    script = tmp_path / "user.py"
    script.write_text(USER_SCRIPT)
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    paths = [
        path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if (Path(path) / "transformers").is_dir()
    ]
    environment |= {"HF_MODULES_CACHE": str(tmp_path / "modules"), "PYTHONPATH": os.pathsep.join(paths)}
    done = subprocess.run(
        [sys.executable, "-W", "error::FutureWarning", script, folder],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    name, tokens, imported_package = json.loads(done.stdout.splitlines()[-1])
    assert (name, len(tokens) > 6, imported_package) == ("MambaFormerForCausalLM", True, False)


def test_the_folders_of_this_repository_hold_the_code_of_its_root():
    done = subprocess.run([sys.executable, SCRIPT, "--check"], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


def test_the_shipped_files_are_the_ones_that_save_pretrained_writes(folders, tmp_path):
    random_model(tiny_config("everything")).save_pretrained(tmp_path)
    assert set(folders.shipped_files()) == {path.name for path in tmp_path.glob("*.py")}


def test_the_flat_root_holds_shipped_files_only(folders):
    """Files that model folders do not need stand in packages, such as `convert`."""
    assert {path.name for path in ROOT.glob("*_mambaformer.py")} == set(folders.shipped_files())


def test_a_refresh_writes_every_shipped_file_into_model_folders_only(folders, repository):
    assert run(repository).returncode == 0
    written = {path.name for path in (repository / "checkpoints" / "tiny").glob("*.py")}
    assert written == set(folders.shipped_files()) and UNSHIPPED not in written
    assert not list((repository / "checkpoints" / "blocks").iterdir())
    assert run(repository, "--check").returncode == 0


def leave_out(file: Path) -> None:
    file.unlink()


def change(file: Path) -> None:
    file.write_text(file.read_text() + "\n# another\n")


def link(file: Path) -> None:
    file.unlink()
    file.symlink_to(f"../../{file.name}")


def add(file: Path) -> None:
    (file.parent / UNSHIPPED).write_text("")


@pytest.mark.parametrize(
    ("harm", "complaint"),
    [
        (leave_out, "is missing"),
        (change, "differs"),
        (link, "is a link"),
        (add, f"{UNSHIPPED} is no shipped"),
    ],
)
def test_the_check_names_a_wrong_copy_and_changes_nothing_until_a_refresh(harm, complaint, repository):
    run(repository)
    file = repository / "checkpoints" / "tiny" / "ops_mambaformer.py"
    harm(file)
    before = {path.name for path in file.parent.iterdir()}
    done = run(repository, "--check")
    assert done.returncode == 1 and complaint in done.stdout and "make folders" in done.stdout
    assert {path.name for path in file.parent.iterdir()} == before
    assert run(repository).returncode == 0 and run(repository, "--check").returncode == 0
    assert not file.is_symlink()


def test_a_new_relative_import_anywhere_adds_a_shipped_file(folders, repository):
    (repository / "fresh_mambaformer.py").write_text('"""New."""\n')
    ops = repository / "ops_mambaformer.py"
    ops.write_text(ops.read_text() + "\n\ndef late():\n    from .fresh_mambaformer import nothing\n")
    assert set(folders.shipped_files(repository)) == {*folders.shipped_files(), "fresh_mambaformer.py"}


def test_other_files_of_a_folder_stay_as_they_are(repository):
    note = repository / "checkpoints" / "tiny" / "README.md"
    note.write_text("mine")
    run(repository)
    assert note.read_text() == "mine"
