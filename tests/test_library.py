"""Every supported version of Transformers: both names of the cache, in and out, without a warning."""

import inspect
import logging
import subprocess
import sys

import pytest
import torch
from transformers.modeling_outputs import CausalLMOutputWithPast

from mambaformer import MambaFormerConfig
from mambaformer.library_mambaformer import CACHE_NAME, CACHE_NAMES, NEWEST_TESTED, cache_of, warn_if_untested
from tiny_models import random_expert, shared_model

IDS = torch.tensor([[3, 7, 1, 12, 5, 9]])


@pytest.fixture
def warnings_of_transformers(caplog):
    """What the library logs, also what it would say only once a process."""
    with torch.no_grad():
        shared_model("mamba")(IDS)  # the first run of all says that it compiles kernels
    caplog.clear()
    logger = logging.getLogger("transformers")
    was_propagated, logger.propagate = logger.propagate, True
    for method in ("warning_once", "warning_advice"):
        getattr(getattr(logging.Logger, method, None), "cache_clear", lambda: None)()
    with caplog.at_level(logging.WARNING):
        yield caplog
    logger.propagate = was_propagated


@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("pattern", ["mamba", "everything"])
def test_forward_takes_and_returns_the_cache_under_both_names(pattern, name, warnings_of_transformers):
    """After the rename, `model(ids, past_key_values=c)` vanished in `**kwargs`: a silently unused cache."""
    model = shared_model(pattern)
    cache = model.make_cache()
    with torch.no_grad():
        whole = model(IDS).logits
        first = model(IDS[:, :4], **{name: cache})
        second = model(IDS[:, 4:], **{name: first[name]})
    assert second.cache is second.past_key_values is second["cache"] is second["past_key_values"] is cache
    assert second.get("cache") is second.get("past_key_values") is cache
    assert "cache" in second and "past_key_values" in second
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), whole, rtol=0, atol=1e-10)
    assert isinstance(second, CausalLMOutputWithPast) and not warnings_of_transformers.records


@pytest.mark.parametrize("which", ["stack", "classifier"])
@pytest.mark.parametrize("name", CACHE_NAMES)
def test_other_heads_know_both_names(name, which, warnings_of_transformers):
    from mambaformer import MambaFormerForSequenceClassification

    model = shared_model("everything").model
    if which == "classifier":
        classifier = MambaFormerForSequenceClassification(model.config).to(torch.float64).eval()
        classifier.model.load_state_dict(model.state_dict())
        model = classifier
    cache = model.make_cache()
    with torch.no_grad():
        model(IDS[:, :4], **{name: cache})
        continued = model(IDS[:, 4:], **{name: cache})
        whole = model(IDS)
    assert continued.cache is continued.past_key_values is cache
    torch.testing.assert_close(continued[0][:, -1], whole[0][:, -1], rtol=0, atol=1e-10)
    assert not warnings_of_transformers.records


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", CACHE_NAMES)
@pytest.mark.parametrize("pattern", ["mamba", "everything"])
def test_generate_continues_a_chat_under_both_names(pattern, name, beams, warnings_of_transformers):
    """Transformers 5.24.0 fed a cache of Mamba layers alone the whole prompt again: silently wrong tokens."""
    model = shared_model(pattern)
    options = {"max_new_tokens": 4, "do_sample": False, "num_beams": beams, "pad_token_id": 0}
    cache = model.make_cache()
    answer = model.generate(IDS, return_dict_in_generate=True, **{name: cache}, **options)
    assert answer.cache is answer.past_key_values is answer[name] is cache
    if beams == 1:
        chat = torch.cat([answer.sequences, IDS], dim=1)
        again = model.generate(chat, **{name: answer.cache}, **options)
        assert again.tolist() == model.generate(chat, **options).tolist()
    assert not warnings_of_transformers.records


def test_two_different_caches_are_refused_and_equal_ones_are_not():
    model = shared_model("everything")
    one, other = model.make_cache(), model.make_cache()
    for call in (model, model.model, model.generate):
        with pytest.raises(ValueError, match="two names of one argument"):
            call(IDS, cache=one, past_key_values=other)
    assert one.get_seq_length() == other.get_seq_length() == 0
    model(IDS, cache=one, past_key_values=one)
    assert one.get_seq_length() == IDS.shape[1]
    assert cache_of(None, None) is None


def test_signatures_name_both_so_that_inspection_finds_them():
    model = shared_model("everything")
    for method in (model.forward, model.model.forward, model.prepare_inputs_for_generation):
        assert set(CACHE_NAMES) <= set(inspect.signature(method).parameters)
    assert set(CACHE_NAMES) <= set(MambaFormerConfig.keys_to_ignore_at_inference)


def test_an_expert_vector_switches_under_the_new_name():
    model = shared_model("everything")
    expert = random_expert(model, 3)
    cache = model.make_cache()
    with torch.no_grad():
        model(IDS[:, :3], cache=cache)
        switched = model(IDS[:, 3:], cache=cache, expert_vector=expert).logits
        fresh = model(IDS, expert_vector=expert).logits[:, 3:]
    torch.testing.assert_close(switched, fresh, rtol=0, atol=1e-10)


def test_a_newer_version_is_named_once_and_still_imports(warnings_of_transformers):
    warn_if_untested("6.1.0")
    warn_if_untested("6.1.0")
    messages = [record.getMessage() for record in warnings_of_transformers.records]
    assert len(messages) == 1 and "6.1.0" in messages[0] and NEWEST_TESTED in messages[0]
    warn_if_untested(NEWEST_TESTED)
    warn_if_untested("5.16.1")
    assert len(warnings_of_transformers.records) == 1


@pytest.mark.slow
def test_import_of_the_package_warns_of_nothing():
    code = "import mambaformer, transformers; print(transformers.__version__)"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0 and "mambaformer" not in done.stderr.lower(), done.stderr
    assert ("cache" if tuple(map(int, done.stdout.split(".")[:2])) >= (5, 24) else "past_key_values") == CACHE_NAME
