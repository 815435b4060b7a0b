"""The loader of CPU kernels: without a compiler, with a broken file, in two processes, on other processors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from loops import conv_arguments, scan_arguments
from mambaformer import compiler_mambaformer as compiler
from mambaformer.compiler_mambaformer import cpu_library
from mambaformer.cpu_scan_mambaformer import STORED
from mambaformer.ops_mambaformer import causal_conv1d, selective_scan

ANSWER = 'extern "C" int answer() { return 42; }'
ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where kernels are looked for: a new folder, with nothing loaded and nothing said before."""
    monkeypatch.setenv("MAMBAFORMER_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_libraries", {})
    compiler._warn_once.cache_clear()
    return tmp_path / "kernels"


def without_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)


def run(script, *arguments, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT.parent), str(ROOT / "tests")])} | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def output_of(process):
    found, errors = process.communicate()
    assert process.returncode == 0, errors
    return found


def test_a_library_is_compiled_once_and_found_again(folder, monkeypatch):
    assert cpu_library(ANSWER).answer() == 42
    assert [path.suffix for path in folder.iterdir()] == [".so"]
    monkeypatch.setattr(compiler, "_libraries", {})
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert cpu_library(ANSWER).answer() == 42


def test_without_a_compiler_pytorch_computes_the_same_and_one_warning_says_so(folder, monkeypatch, caplog):
    expected = [selective_scan(**scan_arguments()), causal_conv1d(**conv_arguments())]
    monkeypatch.setattr(compiler, "_libraries", {})
    without_compiler(monkeypatch)
    found = [selective_scan(**scan_arguments()), causal_conv1d(**conv_arguments())]
    assert cpu_library(ANSWER) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "C++ compiler" in caplog.text
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_source_that_does_not_compile_is_left_to_pytorch_with_the_compilers_words(folder, caplog):
    assert cpu_library("int broken(") is None
    assert "failed" in caplog.text and not list(folder.iterdir())


def test_the_switch_leaves_everything_to_pytorch_without_a_word(folder, monkeypatch, caplog):
    monkeypatch.setenv(compiler.SWITCH, "0")
    assert cpu_library(ANSWER) is None
    assert not caplog.records and not folder.exists()


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_library_that_was_cut_short_is_compiled_again(folder, kept):
    path = compiler._compiled(ANSWER)
    whole = path.read_bytes()
    path.write_bytes(whole[:kept])
    assert cpu_library(ANSWER).answer() == 42
    assert path.read_bytes() == whole and list(folder.iterdir()) == [path]


def test_a_broken_library_without_a_working_compiler_is_left_to_pytorch(folder, monkeypatch, caplog):
    compiler._compiled(ANSWER).write_bytes(b"no library")
    monkeypatch.setattr(compiler, "_compile", lambda *_: (_ for _ in ()).throw(RuntimeError("out of order")))
    assert cpu_library(ANSWER) is None
    assert "out of order" in caplog.text


def test_what_cannot_be_loaded_is_left_to_pytorch(folder, monkeypatch, caplog):
    monkeypatch.setattr(compiler, "_compile", lambda *arguments: arguments[-1].write_bytes(b"no library"))
    assert cpu_library(ANSWER) is None
    assert "WARNING" in caplog.text


def test_two_processes_that_compile_at_once_both_get_the_library(tmp_path):
    script = f"""
from mambaformer.compiler_mambaformer import cpu_library
print(cpu_library({ANSWER!r}).answer())
"""
    processes = [run(script, MAMBAFORMER_CACHE=str(tmp_path)) for _ in range(2)]
    assert [output_of(process) for process in processes] == ["42\n"] * 2
    assert len(list((tmp_path / "kernels").iterdir())) == 1


def test_an_import_compiles_nothing(tmp_path):
    script = "import mambaformer, mambaformer.ops_mambaformer, mambaformer.modeling_mambaformer"
    output_of(run(script, MAMBAFORMER_CACHE=str(tmp_path)))
    assert not (tmp_path / "kernels").exists()


ON_OTHER_PROCESSOR = """
import json, sys, torch
from loops import conv_arguments, scan_arguments
from mambaformer import compiler_mambaformer as compiler, cpu_scan_mambaformer as cpu_scan
from test_compiler import all_results

assert torch.backends.cpu.get_cpu_capability() == sys.argv[1]
print(json.dumps(all_results()))
assert compiler._libraries[cpu_scan.SCAN_SOURCE] is not None
"""


def all_results():
    """Sums over outputs and gradients of both functions in every dtype, weighed so that each number counts."""
    results = {}
    for function, make_arguments in ((causal_conv1d, conv_arguments), (selective_scan, scan_arguments)):
        for dtype in STORED:
            arguments = {k: v.to(dtype).requires_grad_() for k, v in make_arguments(2, 40, 21).items()}
            outputs = function(**arguments)
            gradients = torch.autograd.grad([output.sum() for output in outputs], list(arguments.values()))
            results[f"{function.__name__} {dtype}"] = [
                (tensor.double().flatten() @ torch.linspace(1, 2, tensor.numel(), dtype=torch.float64)).item()
                for tensor in (*outputs, *gradients)
            ]
    return results


@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in compiler.CAPABILITIES, reason="not on x86-64")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_processors_with_shorter_vectors_compute_the_same(capability):
    name = {"default": "DEFAULT", "avx2": "AVX2"}[capability]
    found = json.loads(output_of(run(ON_OTHER_PROCESSOR, name, ATEN_CPU_CAPABILITY=capability)))
    for case, expected in all_results().items():
        tolerance = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 3e-2}[case.split(".")[1]]
        scale = max(map(abs, expected))
        assert found[case] == pytest.approx(expected, rel=tolerance, abs=tolerance * scale), case
