"""The C++ of `csrc/`: the module that ships it is up to date, and Python declares the interface of `interface.h`."""

import ctypes
import re
import shutil
import subprocess
import sys

import pytest

from mambaformer import ops_cpu_interface_mambaformer as interface
from mambaformer import ops_cpu_structures_mambaformer as table
from patterns import ROOT

TABLE = "ops_cpu_structures_mambaformer.py"
SCRIPT = ROOT / "scripts" / "sources.py"
HEADER = re.sub(r"//.*|\\\n", "", (ROOT / "csrc" / "interface.h").read_text())
LETTERS = {"Long": "n", "double": "d", "int": "i"}


def run(root, *options):
    return subprocess.run([sys.executable, SCRIPT, "--root", root, *options], capture_output=True, text=True)


@pytest.fixture
def repository(tmp_path):
    """A copy of `csrc/` and the table of structures, with the generated module."""
    shutil.copytree(ROOT / "csrc", tmp_path / "csrc")
    shutil.copy(ROOT / TABLE, tmp_path)
    assert run(tmp_path).returncode == 0
    return tmp_path


def test_the_shipped_module_is_what_csrc_generates():
    done = run(ROOT, "--check")
    assert done.returncode == 0, done.stdout


def test_a_changed_header_makes_the_module_out_of_date(repository):
    header = repository / "csrc" / "scan.h"
    header.write_text(header.read_text() + "// changed\n")
    done = run(repository, "--check")
    assert done.returncode == 1 and "make sources" in done.stdout
    assert run(repository).returncode == 0 and run(repository, "--check").returncode == 0


def test_a_header_that_is_not_included_is_refused(repository):
    (repository / "csrc" / "other.h").touch()
    done = run(repository, "--check")
    assert done.returncode != 0 and "other.h" in done.stderr


@pytest.mark.long
@pytest.mark.skipif(not shutil.which("c++"), reason="no C++ compiler")
def test_the_compiler_warns_about_nothing_but_a_planted_fault(repository):
    assert run(repository, "--warnings").returncode == 0
    source = repository / "csrc" / "kernels.cpp"
    source.write_text(source.read_text() + "static int never_used() { return 1; }\n")
    done = run(repository, "--warnings")
    assert done.returncode == 1 and "never_used" in done.stderr


def test_a_changed_table_makes_the_header_out_of_date(repository):
    table, header = repository / TABLE, repository / "csrc" / "structures.h"
    table.write_text(table.read_text().replace("Long mask_row, mask_query;", "Long mask_row, mask_query, more;"))
    done = run(repository, "--check")
    assert done.returncode == 1 and "structures.h" in done.stdout and "make sources" in done.stdout
    assert run(repository).returncode == 0 and "mask_query, more;" in header.read_text()
    assert header.read_text().startswith("// Generated from ")


def test_the_classes_have_the_names_and_the_order_of_the_table():
    assert [of.__name__ for of in interface.STRUCTURES] == list(table.STRUCTURES)
    assert {of.__name__ for of in interface.KINDS} == set(table.OPERATIONS.values())


def test_fields_are_read_from_their_declarations(monkeypatch):
    declaration = "const void *one, *two;  // (D, K)\nView three, four;\nLong five[3];\ndouble six;"
    monkeypatch.setitem(table.STRUCTURES, "Some", table.Structure("Fields of every form.", declaration))
    assert table.ctypes_fields("Some", interface.View) == [
        ("one", ctypes.c_int64),
        ("two", ctypes.c_int64),
        ("three", interface.View),
        ("four", interface.View),
        ("five", ctypes.c_int64 * 3),
        ("six", ctypes.c_double),
    ]


@pytest.mark.parametrize("of", interface.STRUCTURES, ids=lambda of: of.__name__)
def test_structures_have_no_padding(of):
    assert ctypes.sizeof(of) == sum(ctypes.sizeof(field) for _, field in of._fields_)
    assert ctypes.sizeof(of) % 8 == 0


def test_python_declares_the_functions_of_the_header():
    assert set(re.findall(r"^(?:int|Long) (\w+)\(", HEADER, re.MULTILINE)) <= set(interface.FUNCTIONS)
    templates = re.findall(r"void (\w+)_##name[\w#]*\((.*?)\);", HEADER, re.DOTALL)
    letters = {
        name: "".join("p" if "*" in each else LETTERS[each.split()[-2]] for each in arguments.split(","))
        for name, arguments in templates
    }
    assert letters == interface._ARGUMENTS


def test_the_library_has_the_values_that_python_expects():
    library = interface.kernels()
    if library is None:
        pytest.skip("no kernels")
    assert {name: library.interface_value(name.encode()) for name in interface.VALUES} == interface.VALUES
    assert library.interface_value(b"nothing") == -1
