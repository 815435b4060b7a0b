"""The names that the package gives: `convert` is a function and a sub-package. `make test-wheel` tests the wheel."""

import ast
import importlib
import importlib.util
import re
import subprocess
import sys

import pytest

from patterns import ROOT

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


@pytest.mark.long
def test_convert_is_the_function_whatever_is_imported_first():
    done = subprocess.run([sys.executable, "-c", EACH_FIRST, *IMPORTS], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_the_description_of_the_package_names_its_command_and_its_packages():
    description = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'^mambaformer-convert = "(.+):(.+)"$', description, re.MULTILINE).groups()
    assert callable(getattr(importlib.import_module(module), function))
    packages = re.search(r"^packages = (\[.+\])$", description, re.MULTILINE)[1]
    assert packages == '["mambaformer", "mambaformer.convert"]' and (ROOT / "convert" / "__init__.py").is_file()


@pytest.mark.parametrize(
    "folder", ["benchmarks", "convert", "examples", "recipes", "scripts", "tests", "tests_library"]
)
def test_every_name_imported_from_the_package_is_there(folder):
    """A trained recipe imported a class from the room that it had left; only the slow lane ran that line."""
    imports = [
        node
        for path in (ROOT / folder).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text()))
        if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "mambaformer"
    ]
    for node in imports:
        module = importlib.import_module(node.module)
        missing = [each.name for each in node.names if not hasattr(module, each.name)]
        assert all(importlib.util.find_spec(f"{node.module}.{name}") for name in missing), (node.module, missing)
