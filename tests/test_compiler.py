"""The loader of CPU kernels: without a compiler or with a bad one, from folders that others can write, in two
processes, on other processors.
"""

import json
import os
import subprocess
import sys
import time

import pytest
import torch

from loops import conv_arguments, scan_arguments
from mambaformer import ops_cpu_build_mambaformer as compiler
from mambaformer import ops_cpu_interface_mambaformer as interface
from mambaformer.files_mambaformer import private_folder
from mambaformer.ops_cpu_build_mambaformer import cpu_library
from mambaformer.ops_cpu_interface_mambaformer import STORED
from mambaformer.ops_mambaformer import causal_conv1d, selective_scan
from patterns import ROOT

ANSWER = 'extern "C" int answer() { return 42; }'


@pytest.fixture
def folder(monkeypatch, tmp_path):
    """Where kernels are looked for: a new folder, with nothing loaded and nothing said before."""
    monkeypatch.setenv("MAMBAFORMER_CACHE", str(tmp_path))
    monkeypatch.setattr(compiler, "_libraries", {})
    for said in (compiler._warn_once, compiler._announce, compiler._version_of):
        said.cache_clear()
    return tmp_path / "kernels"


@pytest.fixture
def warnings(caplog):
    """Asserts that one warning was logged and returns it; what is said of a compilation is not counted."""

    def one():
        found = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
        found = [message for message in found if not message.startswith("Compiling")]
        assert len(found) == 1, found
        return found[0]

    return one


def forget(monkeypatch):
    """As if in a new process."""
    monkeypatch.setattr(compiler, "_libraries", {})
    compiler._warn_once.cache_clear()


def the_file(folder):
    (path,) = folder.iterdir()
    return path


def without_compiler(monkeypatch):
    monkeypatch.setattr(compiler, "COMPILERS", ("no-such-compiler",))
    monkeypatch.delenv("CXX", raising=False)


def built(path, source):
    """The content of a library of this source; the file is gone."""
    subprocess.run(["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", path], input=source.encode(), check=True)
    content = path.read_bytes()
    path.unlink()
    return content


def run(script, *arguments, **environment):
    paths = [str(ROOT.parent), str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])]
    return subprocess.Popen(
        [sys.executable, "-c", script, *map(str, arguments)],
        env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment,
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


@pytest.mark.slow
def test_without_a_compiler_pytorch_computes_the_same_and_one_warning_says_so(folder, monkeypatch, caplog):
    expected = [selective_scan(**scan_arguments()), causal_conv1d(**conv_arguments())]
    monkeypatch.setattr(compiler, "_libraries", {})
    caplog.clear()
    without_compiler(monkeypatch)
    found = [selective_scan(**scan_arguments()), causal_conv1d(**conv_arguments())]
    assert cpu_library(ANSWER) is None
    assert [record.levelname for record in caplog.records] == ["WARNING"]
    assert "C++ compiler" in caplog.text
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)


def test_source_that_does_not_compile_is_left_to_pytorch_with_the_error(folder, caplog):
    assert cpu_library("int broken(") is None
    assert "failed" in caplog.text and not list(folder.iterdir())


def test_the_switch_leaves_everything_to_pytorch_without_a_word(folder, monkeypatch, caplog):
    monkeypatch.setenv(compiler.SWITCH, "0")
    assert cpu_library(ANSWER) is None
    assert not caplog.records and not folder.exists()


@pytest.mark.parametrize("kept", [0, 100, 5000])
def test_a_library_that_was_cut_short_is_compiled_again(folder, monkeypatch, kept):
    cpu_library(ANSWER)
    path = the_file(folder)
    whole = path.read_bytes()
    path.unlink()  # what this process has mapped stays as it is
    path.write_bytes(whole[:kept])
    path.chmod(0o600)
    forget(monkeypatch)
    assert cpu_library(ANSWER).answer() == 42
    assert path.read_bytes() == whole and list(folder.iterdir()) == [path]


def test_a_broken_library_without_a_working_compiler_is_left_to_pytorch(folder, monkeypatch, caplog):
    cpu_library(ANSWER)
    path = the_file(folder)
    path.unlink()
    path.write_bytes(b"no library")
    path.chmod(0o600)
    forget(monkeypatch)
    monkeypatch.setattr(compiler, "_compile", lambda *_: (_ for _ in ()).throw(compiler._NoKernels("out of order")))
    assert cpu_library(ANSWER) is None
    assert "out of order" in caplog.text


def test_what_cannot_be_loaded_is_left_to_pytorch(folder, monkeypatch, caplog):
    monkeypatch.setattr(compiler, "_compile", lambda *arguments: arguments[-1].write_bytes(b"no library"))
    assert cpu_library(ANSWER) is None
    assert "WARNING" in caplog.text


# -------------------------------------------------------------------------------------------- compilers that misbehave

BAD_COMPILERS = {
    "prints bytes that are no text": ("printf '\\377\\376 broken' >&2; exit 1", "failed"),
    "is of a version that is no text": ("printf '\\377\\376'; exec c++ \"$@\"", None),
    "leaves the functions out": ("echo 'int other;' | c++ -shared -x c++ - -o \"$out\"", "lacks functions"),
    "makes nothing": ("exit 0", "made no library"),
    "makes a folder": ('mkdir "$out"', "made no library"),
    "makes an empty file": (': > "$out"', "cannot be loaded"),
    "makes a text": ('echo text > "$out"', "cannot be loaded"),
    "cuts the library short": ('c++ "$@" && truncate -s 5000 "$out"', "cut short"),
    "cuts the headers short": ('c++ "$@" && truncate -s 100 "$out"', "cut short"),
    "fills the disk": ("echo 'ld: final link failed: No space left on device' >&2; exit 1", "No space left"),
    "is killed": ("kill -9 $$", "signal 9"),
    "hangs": ("sleep 600 & wait", "seconds"),
    "asks a question": ("read answer && exit 0; echo 'no answer' >&2; exit 1", "no answer"),
}


def install(monkeypatch, tmp_path, script):
    """A compiler that is a shell script; `$out` is the file that it is to make."""
    path = tmp_path / "bad-compiler"
    head = '#!/bin/bash\nif [ "$1" = --version ]; then echo bad 1.0; exit 0; fi\nout="${@: -1}"\n'
    path.write_text(("#!/bin/bash\n" if "377" in script and "exec" in script else head) + script + "\n")
    path.chmod(0o755)
    monkeypatch.setenv("CXX", str(path))


@pytest.mark.parametrize("name", BAD_COMPILERS)
def test_a_compiler_that_misbehaves_costs_one_warning_and_no_result(name, folder, monkeypatch, tmp_path, warnings):
    """Bytes that are not UTF-8 raised UnicodeDecodeError out of the forward, and a library without the functions an
    AttributeError."""
    script, words = BAD_COMPILERS[name]
    install(monkeypatch, tmp_path, script)
    if name == "hangs":
        monkeypatch.setattr(compiler, "SECONDS_TO_COMPILE", 1)
    started = time.monotonic()
    library = cpu_library(ANSWER, ["answer"])
    assert time.monotonic() - started < 300, "it waited for the end of what hangs"
    if words is None:
        assert library.answer() == 42
        return
    assert library is None and words in warnings()
    assert not list(folder.iterdir()), "what was made is not used the next time"


def test_a_forward_is_right_with_a_compiler_that_leaves_functions_out(folder, monkeypatch, tmp_path, warnings):
    monkeypatch.setenv(compiler.SWITCH, "0")
    expected = [selective_scan(**scan_arguments()), causal_conv1d(**conv_arguments())]
    monkeypatch.delenv(compiler.SWITCH)
    forget(monkeypatch)
    install(monkeypatch, tmp_path, 'echo "int nothing;" | c++ -shared -x c++ - -o "$out"')
    found = [selective_scan(**scan_arguments()), causal_conv1d(**conv_arguments())]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert "lacks functions" in warnings()


def test_what_a_compiler_has_started_ends_with_it(folder, monkeypatch, tmp_path):
    """Only the compiler itself was killed after its time, and the passes that it had started went on."""
    left = tmp_path / "left"
    install(monkeypatch, tmp_path, f"(sleep 3; touch {left}) & wait")
    monkeypatch.setattr(compiler, "SECONDS_TO_COMPILE", 1)
    assert cpu_library(ANSWER) is None
    time.sleep(3)
    assert not left.exists()


def test_a_stored_library_without_the_functions_is_compiled_again(folder, monkeypatch):
    cpu_library(ANSWER)
    path = the_file(folder)
    monkeypatch.setattr(compiler, "_libraries", {})
    content = built(path.with_name("other.so"), "int nothing;")
    path.unlink()
    planted = path.with_name(f"{path.stem.split('-')[0]}-{compiler._digest(content)}.so")
    planted.write_bytes(content)
    planted.chmod(0o600)
    assert cpu_library(ANSWER, ["answer"]).answer() == 42
    assert list(folder.iterdir()) == [path]


# A library whose `interface_value` disagrees with Python about the size of `Weight`.
DISAGREEING = "extern \"C\" long interface_value(const char *name) { return *name == 'V' ? 1 : 104; }"
VALUES = {"VERSION": 1, "Weight": 112}


def test_a_library_with_a_structure_of_another_size_is_not_used(folder, warnings):
    assert cpu_library(DISAGREEING, ["interface_value"], VALUES) is None
    assert "Weight (104, not 112)" in warnings()
    assert not list(folder.iterdir()), "the library is not found the next time"


def test_a_forward_is_right_with_a_library_of_other_structures(folder, monkeypatch, warnings):
    monkeypatch.setenv(compiler.SWITCH, "0")
    expected = [selective_scan(**scan_arguments()), causal_conv1d(**conv_arguments())]
    monkeypatch.delenv(compiler.SWITCH)
    forget(monkeypatch)
    for name, planted in {"SOURCE": DISAGREEING, "FUNCTIONS": ["interface_value"], "VALUES": VALUES}.items():
        monkeypatch.setattr(interface, name, planted)
    found = [selective_scan(**scan_arguments()), causal_conv1d(**conv_arguments())]
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-10)
    assert interface.kernels() is None and "Weight" in warnings()


def test_a_stored_library_of_other_structures_is_compiled_again(folder, monkeypatch):
    agreeing = DISAGREEING.replace("104", "112")
    assert cpu_library(agreeing, ["interface_value"], VALUES)
    path = the_file(folder)
    monkeypatch.setattr(compiler, "_libraries", {})
    content = built(path.with_name("other.so"), DISAGREEING)
    path.unlink()
    planted = path.with_name(f"{path.stem.split('-')[0]}-{compiler._digest(content)}.so")
    planted.write_bytes(content)
    planted.chmod(0o600)
    assert cpu_library(agreeing, ["interface_value"], VALUES)
    assert list(folder.iterdir()) == [path]


def test_the_first_compilation_says_so_once_and_for_how_long(folder, caplog):
    """The first forward compiled for 20 seconds without a word."""
    cpu_library(ANSWER)
    cpu_library(ANSWER.replace("42", "43"))
    (record,) = caplog.records
    assert record.levelname == "WARNING", "less is not shown by default"
    assert "seconds, once for this machine" in record.getMessage() and str(folder) in record.getMessage()


@pytest.mark.slow
def test_a_user_sees_the_announcement_on_stderr_and_only_the_first_time(tmp_path):
    """Loggers of this package have no handler, so a message below `WARNING` is shown to nobody."""
    script = f"from mambaformer.ops_cpu_build_mambaformer import cpu_library; print(cpu_library({ANSWER!r}).answer())"
    shown = [run(script, MAMBAFORMER_CACHE=str(tmp_path)).communicate() for _ in range(2)]
    assert [output for output, _ in shown] == ["42\n"] * 2
    assert ["once for this machine" in errors for _, errors in shown] == [True, False]


# ------------------------------------------------------------------------------- folders that others can write

PLANTED = 'extern "C" int answer() { return 666; }'


def plant(folder, mode=0o600):
    """Puts another library in the place of the one of ANSWER, with the name that its content asks for."""
    cpu_library(ANSWER)
    path, other = the_file(folder), folder.parent / "planted.so"
    subprocess.run(["c++", "-shared", "-fPIC", "-x", "c++", "-", "-o", other], input=PLANTED.encode(), check=True)
    content = other.read_bytes()
    path.unlink()
    planted = path.with_name(f"{path.stem.split('-')[0]}-{compiler._digest(content)}.so")
    planted.write_bytes(content)
    planted.chmod(mode)
    return planted


def give_away(path, monkeypatch):
    """Makes it belong to another user; where only root can do that, this user becomes another one."""
    if os.geteuid() == 0:
        os.chown(path, 12345, -1)
    else:
        monkeypatch.setattr(os, "geteuid", lambda: 12345)


UNTRUSTED = {
    "a folder that all can write": lambda folder, file, patch: folder.chmod(0o777),
    "a folder with a sticky bit that all can write": lambda folder, file, patch: folder.chmod(0o1777),
    "a folder that a group can write": lambda folder, file, patch: folder.chmod(0o770),
    "a parent that all can write": lambda folder, file, patch: folder.parent.chmod(0o777),
    "a file that all can write": lambda folder, file, patch: file.chmod(0o666),
    "a file that a group can write": lambda folder, file, patch: file.chmod(0o660),
    "a file of another user": lambda folder, file, patch: give_away(file, patch),
    "a folder of another user": lambda folder, file, patch: give_away(folder, patch),
}


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "geteuid"), reason="no POSIX owners")
@pytest.mark.parametrize("name", UNTRUSTED)
def test_a_library_that_another_user_could_have_put_there_never_runs(name, folder, monkeypatch, caplog, warnings):
    """A library in a folder that others can write was loaded, and its code ran with this user's rights."""
    planted = plant(folder)
    UNTRUSTED[name](folder, planted, monkeypatch)
    forget(monkeypatch)
    caplog.clear()
    mode = folder.stat().st_mode
    assert cpu_library(ANSWER, ["answer"]) is None
    assert "not trusted" in warnings() and "MAMBAFORMER_CACHE" in warnings()
    assert folder.stat().st_mode == mode, "a folder that exists is not changed"
    found = selective_scan(**scan_arguments())
    monkeypatch.setenv(compiler.SWITCH, "0")
    monkeypatch.setattr(compiler, "_libraries", {})
    torch.testing.assert_close(found, selective_scan(**scan_arguments()), rtol=1e-10, atol=1e-10)


def test_a_link_in_a_folder_that_others_can_write_is_not_followed(folder, monkeypatch, tmp_path, warnings):
    plant(folder)
    public = tmp_path / "public"
    public.mkdir()
    public.chmod(0o777)
    (public / "kernels").symlink_to(folder)
    monkeypatch.setenv("MAMBAFORMER_CACHE", str(public))
    forget(monkeypatch)
    assert cpu_library(ANSWER) is None
    assert str(public) in warnings()


def test_a_link_from_a_folder_of_ours_is_followed(folder, monkeypatch, tmp_path):
    cpu_library(ANSWER)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "kernels").symlink_to(os.path.relpath(folder, tmp_path / "mine"))
    monkeypatch.setenv("MAMBAFORMER_CACHE", str(tmp_path / "mine"))
    monkeypatch.setattr(compiler, "_libraries", {})
    monkeypatch.setattr(compiler, "_compile", lambda *_: pytest.fail("compiled again"))
    assert cpu_library(ANSWER).answer() == 42


def test_the_folder_is_made_for_its_user_alone_whatever_the_umask_is(folder):
    before = os.umask(0)
    try:
        cpu_library(ANSWER)
    finally:
        os.umask(before)
    assert folder.stat().st_mode & 0o777 == 0o700
    assert the_file(folder).stat().st_mode & 0o777 in (0o600, 0o700)


@pytest.mark.skipif(not os.path.isdir("/proc/self/fd"), reason="a folder has no path but its name")
def test_a_checked_folder_stays_that_folder_when_its_name_changes_hands(tmp_path):
    """The check is of the folder itself: between check and use another user could give its name to another folder."""
    folder = tmp_path / "kernels"
    with private_folder(folder) as private:
        (private / "ours").touch()
        folder.rename(tmp_path / "moved")
        folder.mkdir()
        (folder / "theirs").touch()
        assert [path.name for path in private.iterdir()] == ["ours"]


@pytest.mark.parametrize("kind", ["a file", "read-only", "full"])
def test_a_folder_that_cannot_be_written_is_named(kind, folder, monkeypatch, tmp_path, warnings):
    """It said to install a C++ compiler, on a machine that has one."""
    if kind == "a file":
        folder.write_text("in the way")
    else:
        error = OSError(30 if kind == "read-only" else 28, "of the disk")
        refuse = lambda *_: (_ for _ in ()).throw(error)  # noqa: E731
        monkeypatch.setattr(compiler, "temporary_for", refuse)
    assert cpu_library(ANSWER) is None
    message = warnings()
    assert str(folder) in message and "MAMBAFORMER_CACHE" in message and "compiler" not in message


def test_a_cache_folder_in_the_home_of_no_user_is_named_and_costs_no_result(folder, monkeypatch, warnings):
    """RuntimeError ("Could not determine home directory") came out of the forward."""
    monkeypatch.setenv("MAMBAFORMER_CACHE", "~no-such-user/cache")
    assert cpu_library(ANSWER) is None
    message = warnings()
    assert "~no-such-user/cache" in message and "MAMBAFORMER_CACHE" in message and "compiler" not in message


@pytest.mark.slow
def test_two_processes_that_compile_at_once_both_get_the_library(tmp_path):
    script = f"""
from mambaformer.ops_cpu_build_mambaformer import cpu_library
print(cpu_library({ANSWER!r}).answer())
"""
    processes = [run(script, MAMBAFORMER_CACHE=str(tmp_path)) for _ in range(2)]
    assert [output_of(process) for process in processes] == ["42\n"] * 2
    assert len(list((tmp_path / "kernels").iterdir())) == 1


@pytest.mark.slow
def test_an_import_compiles_nothing(tmp_path):
    script = "import mambaformer, mambaformer.ops_mambaformer, mambaformer.modeling_mambaformer"
    output_of(run(script, MAMBAFORMER_CACHE=str(tmp_path)))
    assert not (tmp_path / "kernels").exists()


ON_OTHER_PROCESSOR = """
import json, sys, torch
from loops import conv_arguments, scan_arguments
from mambaformer.ops_cpu_interface_mambaformer import kernels
from test_compiler import all_results

assert torch.backends.cpu.get_cpu_capability() == sys.argv[1]
print(json.dumps(all_results()))
assert kernels() is not None
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


@pytest.mark.slow
@pytest.mark.skipif(torch.backends.cpu.get_cpu_capability() not in compiler.CAPABILITIES, reason="not on x86-64")
@pytest.mark.parametrize("capability", ["default", "avx2"])
def test_processors_with_shorter_vectors_compute_the_same(capability):
    name = {"default": "DEFAULT", "avx2": "AVX2"}[capability]
    found = json.loads(output_of(run(ON_OTHER_PROCESSOR, name, ATEN_CPU_CAPABILITY=capability)))
    for case, expected in all_results().items():
        tolerance = {"float64": 1e-11, "float32": 1e-4, "bfloat16": 3e-2}[case.split(".")[1]]
        scale = max(map(abs, expected))
        assert found[case] == pytest.approx(expected, rel=tolerance, abs=tolerance * scale), case
