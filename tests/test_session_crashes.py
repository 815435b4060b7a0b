"""Sessions under kills, full disks and other writers: a path holds the old session or the new one."""

import os
import random
import signal
import threading
import time

import pytest
import torch

from damage import in_a_process, kill_myself
from mambaformer import files_mambaformer as files
from patterns import tiny_config
from saved_caches import content_of, made
from tiny_models import random_model


@pytest.fixture
def two_sessions(tmp_path):
    """A model, two sessions of it, what their files say, and a path that holds the first."""
    model = random_model(tiny_config("mamba"))
    caches = [made(model, name, "dense") for name in ("plain", "padded")]
    contents = []
    for cache in caches:
        cache.save(tmp_path / "s")
        contents.append(content_of(tmp_path / "s"))
    caches[0].save(tmp_path / "s")
    return model, caches, contents, tmp_path / "s"


@pytest.mark.slow
def test_a_process_killed_while_saving_leaves_the_old_or_the_new_session(two_sessions):
    model, caches, contents, path = two_sessions
    chance, seen = random.Random(0), [0, 0]
    for _ in range(80):
        has_begun, tell = os.pipe()

        def save_for_ever(tell=tell):
            while True:
                for cache in caches:
                    cache.save(path)
                os.write(tell, b".")

        process = in_a_process(save_for_ever)
        os.read(has_begun, 1)  # on a busy machine a process may take long to start
        time.sleep(chance.uniform(0.0, 0.04))
        os.kill(process, signal.SIGKILL)
        assert os.WIFSIGNALED(os.waitpid(process, 0)[1])
        os.close(has_begun)
        os.close(tell)
        which = contents.index(content_of(path))
        seen[which] += 1
        assert torch.equal(model.load_cache(path).token_ids, caches[which].token_ids)
    assert min(seen) > 0
    caches[0].save(path)
    assert [file.name for file in path.parent.iterdir()] == ["s"]


@pytest.mark.parametrize("num_bytes", [0, 1, 8, 100, 5000, None])
def test_a_write_cut_short_leaves_the_old_session_and_the_next_save_cleans_up(num_bytes, two_sessions, monkeypatch):
    model, caches, contents, path = two_sessions

    class CutShort:
        def __init__(self, *arguments):
            self.file = open(*arguments)  # noqa: SIM115

        def __enter__(self):
            return self

        def __exit__(self, *_):
            self.file.close()

        def write(self, data):
            self.file.write(data[:num_bytes])
            self.file.flush()
            kill_myself()

    monkeypatch.setattr(files, "open", CutShort, raising=False)
    assert os.WTERMSIG(os.waitpid(in_a_process(lambda: caches[1].save(path)), 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    (left,) = [file for file in path.parent.iterdir() if file != path]
    assert num_bytes in (None, left.stat().st_size)
    assert content_of(path) == contents[0]
    assert torch.equal(model.load_cache(path).token_ids, caches[0].token_ids)
    caches[1].save(path)
    assert list(path.parent.iterdir()) == [path] and content_of(path) == contents[1]


@pytest.mark.parametrize(
    ("step", "call", "which"), [("fsync", 1, 0), ("replace", 1, 0), ("fsync", 2, 1), ("close", 1, 1)]
)
def test_a_kill_at_every_step_of_a_save_leaves_a_whole_session(step, call, which, two_sessions, monkeypatch):
    _, caches, contents, path = two_sessions
    original, calls = getattr(os, step), []

    def step_or_die(*arguments):
        calls.append(1)
        return kill_myself() if len(calls) == call else original(*arguments)

    monkeypatch.setattr(os, step, step_or_die)
    assert os.WTERMSIG(os.waitpid(in_a_process(lambda: caches[1].save(path)), 0)[1]) == signal.SIGKILL
    monkeypatch.undo()
    assert content_of(path) == contents[which]
    caches[0].save(path)
    assert list(path.parent.iterdir()) == [path]


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_a_save_that_fails_leaves_the_old_session_and_nothing_else(step, two_sessions, monkeypatch):
    _, caches, contents, path = two_sessions

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr(os, step, fail)
    with pytest.raises(OSError, match="disk full"):
        caches[1].save(path)
    assert list(path.parent.iterdir()) == [path] and content_of(path) == contents[0]


def test_saves_from_threads_and_processes_to_one_path_never_mix(two_sessions):
    model, caches, contents, path = two_sessions
    failures = []

    def save_often(times=12):
        try:
            for n in range(times):
                caches[n % 2].save(path)
                assert content_of(path) in contents
        except BaseException as error:
            failures.append(error)

    def save_and_leave():
        save_often()
        os._exit(bool(failures))

    processes = [in_a_process(save_and_leave) for _ in range(3)]
    threads = [threading.Thread(target=save_often) for _ in range(4)]
    for thread in threads:
        thread.start()
    for _ in range(40):
        assert model.load_cache(path).get_seq_length() in (7, 12)
    for thread in threads:
        thread.join()
    assert [os.waitpid(process, 0)[1] for process in processes] == [0, 0, 0]
    assert not failures
    assert list(path.parent.iterdir()) == [path]


def test_a_file_that_is_replaced_while_it_is_read_is_read_as_it_was(two_sessions, monkeypatch):
    """The library's own reader opens a file twice, and had the header of one with the tensors of the other."""
    model, caches, contents, path = two_sessions
    check = files._check_header
    monkeypatch.setattr(files, "_check_header", lambda *arguments: caches[1].save(path) or check(*arguments))
    assert torch.equal(model.load_cache(path).token_ids, caches[0].token_ids)
    assert content_of(path) == contents[1]


def test_a_save_leaves_the_temporary_files_of_writers_that_live(two_sessions):
    _, caches, _, path = two_sessions
    with files.temporary_for(path) as temporary:
        caches[1].save(path)
        assert temporary.exists()
    with files.temporary_for(path.with_name("other")) as temporary:
        pass
    assert list(path.parent.iterdir()) == [path]


def test_a_private_file_stays_private_and_a_long_name_is_no_obstacle(two_sessions):
    _, caches, _, path = two_sessions
    path.chmod(0o600)
    caches[1].save(path)
    assert path.stat().st_mode & 0o777 == 0o600
    caches[1].save(path.with_name("n" * 255))
