"""Laws 4, 6 and 7 between threads: a cache that a thread feeds is refused to others, instead of going wrong."""

import contextlib
import copy
import pickle
import threading

import pytest
import torch
from transformers import LogitsProcessor

from patterns import tiny_config
from sequences import random_rows
from tiny_models import random_model

IDS = torch.tensor([random_rows(1)[0][:10]])
IN_USE = "wait until that call has returned, or give each thread its own `cache.fork\\(\\)`"
STEPS = 40


def model_of(pattern="everything"):
    return random_model(tiny_config(pattern, head_dim=16))


@torch.no_grad()
def feed(model, cache, ids):
    return model(ids, cache=cache).logits


def same(found, wanted):
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


class Stopped:
    """A forward of another thread that stands still in the middle of its layers."""

    def __init__(self, model, run):
        self.inside, self.may_go_on, self.result = threading.Event(), threading.Event(), []
        hook = model.model.layers[2].register_forward_hook(self._stop)
        thread = threading.Thread(target=lambda: self.result.append(run()))
        thread.start()
        assert self.inside.wait(30)
        self._end = thread.join, hook.remove

    def _stop(self, *_):
        if not self.may_go_on.is_set():
            self.inside.set()
            assert self.may_go_on.wait(30)

    def finish(self):
        self.may_go_on.set()
        for end in self._end:
            end()
        return self.result[0]


USES = {
    "feed": lambda model, cache, path: feed(model, cache, IDS[:, 5:6]),
    "feed by the older name": lambda model, cache, path: model(IDS[:, 5:6], past_key_values=cache),
    "feed without a head": lambda model, cache, path: model.model(IDS[:, 5:6], None, None, cache),
    "generate": lambda model, cache, path: model.generate(IDS, cache=cache, max_new_tokens=1),
    "save": lambda model, cache, path: cache.save(path),
    "fork": lambda model, cache, path: cache.fork(),
    "copy": lambda model, cache, path: copy.deepcopy(cache),
    "pickle": lambda model, cache, path: pickle.dumps(cache),
    "export": lambda model, cache, path: cache.to_dict(),
    "crop": lambda model, cache, path: cache.crop(-1),
    "reset": lambda model, cache, path: cache.reset(),
    "reorder": lambda model, cache, path: cache.reorder_cache(torch.tensor([0])),
    "repeat": lambda model, cache, path: cache.batch_repeat_interleave(2),
    "expert": lambda model, cache, path: cache.set_expert_vector(None),
    "record": lambda model, cache, path: cache.activate_past_recording(9),
}


@pytest.mark.parametrize("use", USES)
@pytest.mark.parametrize("storage", ["dense", "static"])
def test_a_cache_that_another_thread_feeds_says_so(use, storage, tmp_path):
    """Two threads that fed one cache mixed their tokens, and 48 of 320 files saved meanwhile were sealed but wrong."""
    model = model_of()
    cache = model.make_cache(storage, **({"max_cache_len": 24} if storage == "static" else {}))
    feed(model, cache, IDS[:, :4])
    stopped = Stopped(model, lambda: feed(model, cache, IDS[:, 4:5]))
    try:
        with pytest.raises(ValueError, match=IN_USE):
            USES[use](model, cache, tmp_path / "session.safetensors")
    finally:
        found = stopped.finish()
    assert not list(tmp_path.iterdir())
    wanted = feed(model, None, IDS)
    same(found, wanted[:, 4:5])
    same(feed(model, cache, IDS[:, 5:]), wanted[:, 5:])


@pytest.mark.parametrize("use", USES)
def test_a_hook_cannot_use_the_cache_of_its_own_forward(use, tmp_path):
    """A hook that fed or saved the cache found some layers a token further than others."""
    model, cache, seen = model_of(), None, []

    def hook(*_):
        if not seen:
            seen.append(True)
            with pytest.raises(ValueError, match=IN_USE):
                USES[use](model, cache, tmp_path / "session.safetensors")

    cache = model.make_cache()
    feed(model, cache, IDS[:, :4])
    model.model.layers[2].register_forward_hook(hook)
    found = feed(model, cache, IDS[:, 4:])
    assert seen
    same(found, feed(model, None, IDS)[:, 4:])


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_a_forward_that_fails_gives_the_cache_back(error):
    model = model_of()
    cache, wanted = model.make_cache(), feed(model, None, IDS)
    feed(model, cache, IDS[:, :4])

    def fail(*_):
        raise error

    hook = model.model.layers[2].register_forward_hook(fail)
    for _ in range(2):
        with pytest.raises(error):
            feed(model, cache, IDS[:, 4:6])
    with pytest.raises(ValueError, match="must be"):
        model(IDS, cache=cache, attention_mask=torch.ones(1, 3))
    hook.remove()
    same(feed(model, cache, IDS[:, 4:6]), wanted[:, 4:6])
    found = []
    thread = threading.Thread(target=lambda: found.append(feed(model, cache, IDS[:, 6:])))
    thread.start()
    thread.join()
    same(found[0], wanted[:, 6:])


def test_sessions_saved_while_a_thread_feeds_are_right_or_refused(tmp_path):
    """48 of 320 such files were sealed but wrong; the thread that feeds must never pay for who saves."""
    model, ids = model_of(), torch.tensor([random_rows(3, (STEPS,))[0]])
    wanted, cache, failures = feed(model, None, ids), model.make_cache(), []

    def feed_all():
        try:
            found = [feed(model, cache, token) for token in ids.split(1, dim=1)]
            same(torch.cat(found, dim=1), wanted)
        except Exception as error:
            failures.append(error)

    thread, saved = threading.Thread(target=feed_all), []
    thread.start()
    while thread.is_alive():
        path = tmp_path / f"{len(saved)}.safetensors"
        with contextlib.suppress(ValueError):
            cache.save(path)
            saved.append(path)
    thread.join()
    assert not failures
    for path in saved[:: max(1, len(saved) // 8)]:
        loaded = model.load_cache(path)
        length = loaded.get_seq_length()
        if length < STEPS:
            same(feed(model, loaded, ids[:, length:]), wanted[:, length:])


class Meanwhile(LogitsProcessor):
    """Runs something in another thread between two forwards of `generate`."""

    def __init__(self, run):
        self.run, self.results = run, []

    def __call__(self, input_ids, scores):
        thread = threading.Thread(target=self._in_thread)
        thread.start()
        thread.join()
        return scores

    def _in_thread(self):
        try:
            self.results.append(self.run())
        except ValueError as error:
            self.results.append(error)


@pytest.mark.parametrize("use", USES)
def test_generate_keeps_its_cache_between_two_steps(use, tmp_path):
    """Another thread that fed or cropped the cache between two tokens of `generate` changed the sequence silently."""
    model = model_of()
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    wanted, cache = model.generate(IDS, **options), model.make_cache()
    meanwhile = Meanwhile(lambda: USES[use](model, cache, tmp_path / "session.safetensors"))
    found = model.generate(IDS, cache=cache, logits_processor=[meanwhile], **options)
    assert torch.equal(found, wanted)
    reads = ("save", "fork", "copy", "pickle", "export")
    assert len(meanwhile.results) == 4
    assert all(isinstance(result, ValueError) != (use in reads) for result in meanwhile.results)
    feed(model, cache, found[:, -1:])  # `generate` gives it back


COPIES = {"pickled": lambda cache: pickle.loads(pickle.dumps(cache)), "copied": copy.deepcopy}


@pytest.mark.parametrize("kind", COPIES)
@pytest.mark.parametrize("storage", ["dense", "static"])
def test_a_copy_of_a_used_cache_belongs_to_its_new_owner(storage, kind):
    """A lock can be neither pickled nor copied, so the copy needs one of its own, also between two forwards."""
    model = model_of()
    cache = model.make_cache(storage, 16 if storage == "static" else None)
    feed(model, cache, IDS[:, :4])
    twin = COPIES[kind](cache)
    assert twin.lock is not cache.lock and twin.lock.rlock is not cache.lock.rlock
    wanted = feed(model, None, IDS)[:, 4:]
    for each in (twin, COPIES[kind](twin), cache):
        same(feed(model, each, IDS[:, 4:]), wanted)
