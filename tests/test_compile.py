"""Compiled and exported: one graph for all decoding steps, whatever the expert, and the eager model's logits.

`aot_eager` captures as any compiler does and spares the tests the C++ one.
"""

import random

import pytest
import torch
from transformers import CompileConfig

from oracle import assert_same_logits, expected
from patterns import VOCAB, tiny_config
from sequences import feed, feed_row, one_turn, padded_turn, random_rows
from tiny_models import random_model, shared_expert, shared_model

MIXED = ["mamba", "sliding_sinks", "everything"]


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def num_graphs():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


def compiled(model):
    return torch.compile(model, backend="aot_eager", fullgraph=True)


def test_a_new_expert_vector_in_one_graph_raises_with_the_next_step():
    model = shared_model("everything")
    with pytest.raises(torch._dynamo.exc.Unsupported, match="run the first forward with this expert vector"):
        compiled(model)(torch.tensor([random_rows(1, [4])[0]]), expert_vector=shared_expert("everything", 1))


@pytest.mark.slow
@pytest.mark.parametrize("pattern", MIXED)
def test_one_graph_serves_every_token_expert_and_cache(pattern):
    model, row = shared_model(pattern), random_rows(1, [24])[0]
    step = compiled(model)
    for seed in (1, 2, 3):
        expert = shared_expert(pattern, seed)
        cache = model.make_cache("static", max_cache_len=40)
        cache.set_expert_vector(shared_expert(pattern, 4))
        feed_row(model, cache, row[:5])
        cache.set_expert_vector(expert)
        found = [feed_row(model, cache, row[5:12]), feed_row(step, cache, row[12:], [1] * 12)]
        assert_same_logits(torch.cat(found), expected(model, [row], [expert])[0][5:])
    assert num_graphs() == 1


@pytest.mark.slow
@torch.no_grad()
def test_a_cache_made_in_a_graph_is_fed_by_eager_forwards():
    """The graph was refused: it made the lock that keeps threads apart, and no compiler can."""
    model, row = random_model(tiny_config("everything", layer_types=["hybrid_sliding"])), random_rows(2, [9])[0]
    cache = compiled(model)(torch.tensor([row[:5]]), use_cache=True).past_key_values
    found = model(torch.tensor([row[5:]]), past_key_values=cache).logits[0]
    assert_same_logits(found, expected(model, [row])[0][5:])
    assert cache.get_seq_length() == 9 and cache.lock.rlock is cache.lock.rlock


@pytest.mark.slow
@pytest.mark.parametrize("pattern", ["mamba", "everything"])
def test_generate_compiles_its_steps_without_changes_of_expert_vector(pattern):
    model, ids = shared_model(pattern), torch.tensor([random_rows(2, [10])[0]])
    config = CompileConfig(backend="aot_eager", fullgraph=True)
    config._compile_all_devices = True
    schedule = {0: shared_expert(pattern, 1), 4: shared_expert(pattern, 2), 9: shared_expert(pattern, 3)}
    options = {"max_new_tokens": 14, "do_sample": False, "pad_token_id": VOCAB, "expert_schedule": schedule}
    wanted = model.generate(ids, **options)
    assert num_graphs() == 0
    found = model.generate(ids, cache_implementation="static", compile_config=config, **options)
    assert found.tolist() == wanted.tolist()
    # Before 5.17 the library starts to pass a mask of ones with the first compiled step, and the log to keep it.
    assert num_graphs() <= 2


@pytest.mark.long
@pytest.mark.parametrize("name", ["cache", "past_key_values"])
def test_a_compiled_call_takes_the_cache_under_both_names(name):
    """Since `generate` says `cache`, a call with `past_key_values` was left to the model, which is slow and silent."""
    model, row = shared_model("mamba"), random_rows(9, [8])[0]
    step = model.get_compiled_call(CompileConfig(backend="aot_eager", fullgraph=True))
    cache = model.make_cache("static", max_cache_len=40)
    with torch.no_grad():
        pieces = [
            step(torch.tensor([piece]), **{name: cache}).logits[0] for piece in ([*row[:5]], *([t] for t in row[5:]))
        ]
    assert_same_logits(torch.cat(pieces), expected(model, [row])[0])
    assert num_graphs() == 1


def test_generate_sees_weights_that_changed_under_a_compiled_step():
    """The graph cannot look at the weights; the call around it does."""
    from patterns import tiny_config
    from tiny_models import random_model

    model, row = random_model(tiny_config("everything")), random_rows(3, [14])[0]
    config = CompileConfig(backend="aot_eager", fullgraph=True)
    step = model.get_compiled_call(config)
    cache = model.make_cache("static", max_cache_len=40)
    feed_row(step, cache, row[:8], [6, 1, 1])
    assert num_graphs() == 1
    with torch.no_grad():
        model.lm_head.weight.mul_(1.5)
        model.model.layers[0].mamba.D.add_(0.5)
    found = feed_row(step, cache, row[8:], [1] * 6)
    assert_same_logits(found, expected(model, [row])[0][8:])


@pytest.mark.long
def test_rows_that_change_places_between_compiled_steps_keep_their_experts():
    """The plan of the experts is made anew then, which no graph can do: the call around it leaves it to the model."""
    model, rows = shared_model("everything"), random_rows(7, (12, 12))
    experts = [shared_expert("everything", 1), None]
    step = model.get_compiled_call(CompileConfig(backend="aot_eager", fullgraph=True))
    cache = model.make_cache("static", max_cache_len=40)
    cache.set_expert_vector(experts)
    feed(step, cache, [one_turn([row[:6] for row in rows]), one_turn([row[6:7] for row in rows])])
    cache.reorder_cache(torch.tensor([1, 0]))
    found = feed(step, cache, [one_turn([row[n : n + 1] for row in rows[::-1]]) for n in range(7, 12)])
    for logits, wanted in zip(found, expected(model, rows, experts)[::-1], strict=True):
        assert_same_logits(logits, wanted[7:])
    assert num_graphs() > 0


@pytest.mark.long
def test_a_return_to_the_base_between_compiled_steps_leaves_the_graph():
    """The base needs no plan, so only the text tells that it has to be encoded again."""
    model, row = shared_model("mamba"), random_rows(8, [12])[0]
    step = model.get_compiled_call(CompileConfig(backend="aot_eager", fullgraph=True))
    cache = model.make_cache("static", max_cache_len=40)
    cache.set_expert_vector(shared_expert("mamba", 1))
    feed_row(step, cache, row[:8], [6, 1, 1])
    cache.set_expert_vector(None)
    assert_same_logits(feed_row(step, cache, row[8:], [1] * 4), expected(model, [row])[0][8:])
    assert num_graphs() == 2  # with an expert and without


@pytest.mark.long
@pytest.mark.parametrize("pattern", MIXED)
def test_an_exported_step_decodes_like_the_model(pattern):
    model, row = shared_model(pattern), random_rows(4, [16])[0]
    cache = model.make_cache("static", max_cache_len=24)
    feed_row(model, cache, row[:8])
    with torch.no_grad():
        program = torch.export.export(model.decode_step(cache), (torch.tensor([[row[8]]]),))
        step = program.module()
        found = torch.cat([step(torch.tensor([[token]]))[0] for token in row[8:]])
    assert_same_logits(found, expected(model, [row])[0][8:])
    assert_same_logits(feed_row(model, cache, row[8:]), expected(model, [row])[0][8:])  # it is as it was


@pytest.mark.long
def test_an_exported_step_goes_on_from_pads_under_experts_of_each_row():
    model, rows = shared_model("everything"), random_rows(5, (12, 9))
    experts = [shared_expert("everything", 1), None]
    cache = model.make_cache("static", max_cache_len=24)
    cache.set_expert_vector(experts)
    feed(model, cache, [padded_turn(random.Random(6), [row[:-4] for row in rows], side="left")])
    with torch.no_grad():
        tail = torch.tensor([row[-4:] for row in rows])
        step = torch.export.export(model.decode_step(cache), (tail[:, :1],)).module()
        found = torch.cat([step(tail[:, n : n + 1]) for n in range(4)], dim=1)
    for logits, wanted in zip(found, expected(model, rows, experts), strict=True):
        assert_same_logits(logits, wanted[-4:])


def test_a_step_that_has_nothing_fixed_to_go_on_from_is_refused():
    model = shared_model("mamba")
    with pytest.raises(ValueError, match="storage='static'"):
        model.decode_step(model.make_cache())
    with pytest.raises(ValueError, match="feed it to the model once"):
        model.decode_step(model.make_cache("static", max_cache_len=8))
