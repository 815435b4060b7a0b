"""The package as it is installed: its parts, the function and the sub-package named `convert`, the wheel."""

import importlib.metadata
import subprocess
import sys
import zipfile

import mambaformer
from cases import ROOT

SHIPPED = {path.name for path in ROOT.glob("*_mambaformer.py")}
CONVERT = {f"convert/{path.name}" for path in (ROOT / "convert").glob("*.py")}
# The order of imports could decide which of the two a name is bound to.
IMPORTS = (
    "from mambaformer import convert",
    "from mambaformer.convert.families import FAMILIES; assert FAMILIES",
    "from mambaformer.convert import families; assert families.FAMILIES",
    "import mambaformer.convert; assert sys.modules['mambaformer.convert'].find_smollm2",
    "from mambaformer.convert.cli import main; assert callable(main)",
)
EACH_FIRST = """
import os, sys, torch, transformers
for statement in sys.argv[1:]:
    child = os.fork()  # a process that has not imported the package yet
    if child == 0:
        exec(statement)
        import mambaformer
        from mambaformer import convert
        os._exit(0 if convert is mambaformer.convert and callable(convert) else 1)
    assert os.waitpid(child, 0)[1] == 0, statement
"""
FROM_THE_WHEEL = """
import sys
sys.path[:0] = [sys.argv[1]]
import mambaformer
assert mambaformer.__file__.startswith(sys.argv[1]), mambaformer.__file__
from mambaformer.convert.families import FAMILIES
from transformers import LlamaConfig, LlamaForCausalLM
sizes = dict(vocab_size=64, hidden_size=32, intermediate_size=32, num_attention_heads=2, num_hidden_layers=2)
hybrid = mambaformer.convert(LlamaForCausalLM(LlamaConfig(**sizes)), upcycle="all", output_dir=sys.argv[2])
assert hybrid.config.layer_types == ["hybrid", "hybrid"], hybrid.config.layer_types
"""


def test_convert_is_the_function_whatever_is_imported_first():
    done = subprocess.run([sys.executable, "-c", EACH_FIRST, *IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_command_is_an_entry_point():
    (command,) = importlib.metadata.entry_points(group="console_scripts", name="mambaformer-convert")
    assert command.load() is sys.modules["mambaformer.convert.cli"].main


def test_a_wheel_holds_the_package_and_its_converters_and_works(tmp_path):
    """It is built from a copy: setuptools leaves its own folders in the one that it builds in."""
    sources, wheels, installed = tmp_path / "sources", tmp_path / "wheels", tmp_path / "installed"
    copy_sources(sources)
    pip = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    done = subprocess.run([*pip, "--wheel-dir", wheels, sources], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    (wheel,) = wheels.glob("mambaformer-*.whl")
    with zipfile.ZipFile(wheel) as file:
        names = {name.removeprefix("mambaformer/") for name in file.namelist() if name.endswith(".py")}
        file.extractall(installed)
    assert names == {"__init__.py", *SHIPPED, *CONVERT}
    run = [sys.executable, "-c", FROM_THE_WHEEL, installed, tmp_path / "hybrid"]
    done = subprocess.run(run, capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "hybrid").glob("*.py")} == SHIPPED


def copy_sources(target):
    """What Git would give: the files of the package and its description."""
    (target / "convert").mkdir(parents=True)
    for name in ("__init__.py", "pyproject.toml", "README.md", "LICENSE", *SHIPPED, *CONVERT):
        (target / name).write_bytes((ROOT / name).read_bytes())


def test_the_version_is_that_of_the_installed_package():
    assert mambaformer.__version__ == importlib.metadata.version("mambaformer")
