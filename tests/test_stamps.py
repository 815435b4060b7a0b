"""Stamps of weights: a look at what was seen last is as good as a new stamp, whatever has changed."""

import copy
import pickle
import threading
import time

import pytest
import torch
from torch import nn
from torch.nn.utils import parametrize
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from mambaformer.weights_parallel_mambaformer import CountsReplacements
from mambaformer.weights_version_mambaformer import _stamp_of_all, _StorageNumbers, _WeightNumbers, weights_stamp
from oracle import assert_same_logits, expected, uncached_logits
from patterns import tiny_config
from sequences import random_ids
from tiny_models import every_cache, new_cache, new_model, random_expert, random_model


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def write(model):
    model.layers[0].mlp.down_proj.weight.data.view(-1)  # a look is no change
    with torch.no_grad():
        model.layers[0].mlp.down_proj.weight[0, 0] += 1


def move(model):
    model.norm.weight.data = model.norm.weight.data.clone()


def turn(model):
    """The same memory, read in another order."""
    weight = model.layers[0].mlp.up_proj.weight
    weight.data = weight.data.T


def shorten(model):
    weight = model.embed_tokens.weight
    weight.data = weight.data[:-1]


def replace_parameter(model):
    model.norm.weight = nn.Parameter(model.norm.weight.detach().clone())


def replace_module(model):
    model.layers[0].mlp.up_proj = copy.deepcopy(model.layers[0].mlp.up_proj)


def replace_and_put_back(model):
    mlp = model.layers[0].mlp
    mlp.up_proj, mlp.up_proj = nn.Identity(), mlp.up_proj


def change_class(model):
    model.norm.__class__ = type("Norm", (type(model.norm),), {})


def add_bias(model):
    module = model.layers[0].mlp.up_proj
    module.bias = nn.Parameter(torch.zeros(module.out_features, dtype=torch.float64))


def add_parameter(model):
    model.layers[0].mlp.act_fn.register_parameter("slope", nn.Parameter(torch.ones(1)))


def remove_layer(model):
    model.layers = model.layers[:-1]


CHANGES = {
    "write": write,
    "move": move,
    "turn": turn,
    "shorten": shorten,
    "replace parameter": replace_parameter,
    "replace module": replace_module,
    "replace and put back": replace_and_put_back,
    "change class": change_class,
    "add bias": add_bias,
    "add parameter": add_parameter,
    "remove layer": remove_layer,
    "share memory": nn.Module.share_memory,
    "parametrize": lambda model: parametrize.register_parametrization(
        model.layers[0].mlp.up_proj, "weight", Doubled()
    ),
    "assign": lambda model: model.load_state_dict(
        {name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True
    ),
    "convert": lambda model: model.float(),
    "merge": lambda model: setattr(model, "num_merges", getattr(model, "num_merges", 0) + 1),
    "tell": lambda model: model.weights_changed(),
}


def seen(model):
    """The stamp, which is the same at a second look and as one that is made anew."""
    stamp = weights_stamp(model)
    assert stamp == weights_stamp(model) == _stamp_of_all(model)
    return stamp


@pytest.mark.parametrize("name", CHANGES)
def test_every_change_is_seen_once(name):
    model = new_model("everything").model
    before = seen(model)
    assert model._seen_weights.last[0].is_unchanged(model)
    CHANGES[name](model)
    assert seen(model) != before


@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_a_write_to_a_part_of_a_quantized_weight_is_seen(part):
    model = new_model("everything").float()
    quantize_(model, Int8WeightOnlyConfig(version=2), lambda module, name: "up_proj" in name)
    model = model.model
    before, weight = seen(model), model.layers[-1].mlp.up_proj.weight
    assert model._seen_weights.last is not None
    with torch.no_grad():
        getattr(weight, part).zero_()
    assert seen(model) != before


def test_weights_without_counters_and_with_them_stand_side_by_side():
    """A model that is loaded in inference mode counts no writes; a weight that is added later does."""
    with torch.inference_mode():
        model = new_model("everything").model
    before = seen(model)
    model.norm.weight = nn.Parameter(torch.ones(model.norm.weight.shape, dtype=torch.float64))
    between = seen(model)
    with torch.no_grad():
        model.norm.weight.zero_()
    assert len({before, between, seen(model)}) == 3


def test_adapters_are_asked_each_time():
    model = new_model("everything").model
    seen(model)
    wrapper = CountsReplacements()
    wrapper.base_layer, wrapper.scaling = model.layers[0].mlp.up_proj, {"default": 1.0}
    model.layers[0].mlp.up_proj = wrapper
    before = seen(model)
    wrapper.scaling["default"] = 2.0
    assert seen(model) != before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_seen_nothing(copied):
    model = new_model("everything").model
    before, other = seen(model), copied(model)
    assert other._seen_weights.last is None
    assert seen(other) != before == seen(model)


def test_a_write_while_the_stamp_is_made_is_seen_next_time(monkeypatch):
    model = new_model("everything").model
    module = "mambaformer.weights_version_mambaformer._stamp_of_all"

    def stamp_and_write(model):
        stamp = _stamp_of_all(model)
        write(model)
        return stamp

    with monkeypatch.context() as patch:
        patch.setattr(module, stamp_and_write)
        early = weights_stamp(model)
    assert weights_stamp(model) != early


class SlowNumbers:
    """1, 2, ..., each so late that other threads come between."""

    def __init__(self):
        self.last = 0

    def __next__(self):
        self.last += 1
        number = self.last
        time.sleep(0.05)
        return number


@pytest.mark.parametrize("kind", [_StorageNumbers, _WeightNumbers])
def test_threads_that_meet_a_weight_at_once_give_it_one_number(kind):
    """A new model was used by three threads: the second number of its memory made each compute its text again."""
    numbers, weight, found = kind(), nn.Parameter(torch.ones(3)), []
    numbers.numbers = SlowNumbers()
    threads = [threading.Thread(target=lambda: found.append(numbers(weight))) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert [*found, numbers(weight)] == [1] * 5
    assert numbers(nn.Parameter(torch.ones(3))) == 2


@every_cache
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_cache_continues_after_its_model_changes_dtype(variant, dtype):
    """Keys of the old dtype met queries of the new one."""
    model, ids = random_model(tiny_config("everything")).float(), random_ids()
    caches = [new_cache(model, variant, on_expert_change=policy) for policy in ("recompute", "continue")]
    with torch.no_grad():
        for cache in caches:
            model(ids[:, :5], past_key_values=cache)
        model.to(dtype)
        expected = uncached_logits(model, ids)[:, 5:]
        for cache in caches:
            found = model(ids[:, 5:], past_key_values=cache).logits
            assert found.dtype == dtype
            assert (found - expected).abs().max() < 0.1 * expected.abs().max()


def test_a_model_moved_to_another_dtype_and_back_is_another_model():
    """The allocator put the weights where they had been, and the stamp by addresses saw nothing: 4 times in 50."""
    model, ids = random_model(tiny_config("full", hidden_size=128)), random_ids()
    for _ in range(50):
        cache = model.make_cache(on_expert_change="error")
        with torch.no_grad():
            model(ids, past_key_values=cache)
            model.to(torch.float32).to(torch.float64)
            with pytest.raises(ValueError, match="weights changed"):
                model(ids, past_key_values=cache)


def test_merging_is_noticed_in_a_model_made_in_inference_mode():
    """Weights of inference mode do not count their writes."""
    with torch.inference_mode():
        model = random_model(tiny_config("paper"))
    expert, ids = random_expert(model, 1), random_ids()
    with torch.inference_mode():
        cache = model(ids[:, :5]).past_key_values
        model.merge_expert_vector(expert)
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, model(ids, use_cache=False).logits[:, 5:])


def test_a_fused_optimizer_step_is_noticed():
    """It counts no version, and it is Trainer's default: caches and singular bases went on from the old weights."""
    model, ids = random_model(tiny_config("paper")), random_ids()
    cache, expert = model.make_cache(), random_expert(model, 1)
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        uncached_logits(model, ids, expert_vector=expert)
    model(ids, labels=ids, use_cache=False).loss.backward()
    torch.optim.AdamW(model.parameters(), lr=0.1, fused=True).step()
    with torch.no_grad():
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])
    wanted = expected(model, ids.tolist(), [expert])[0]
    assert_same_logits(uncached_logits(model, ids, expert_vector=expert)[0], wanted)


def test_a_removed_parametrization_is_noticed():
    """It writes through `weight.data`; that there are fewer modules is what can be seen."""
    model, ids = random_model(tiny_config("everything")), random_ids()
    linear = model.model.layers[1].self_attn.v_proj
    torch.nn.utils.parametrize.register_parametrization(linear, "weight", Doubled())
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
        torch.nn.utils.parametrize.remove_parametrizations(linear, "weight", leave_parametrized=False)
        assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])


def test_writes_that_leave_no_trace_can_be_told():
    """A NumPy view writes past every count; caches and singular bases look again after `weights_changed`."""
    model, ids = random_model(tiny_config("everything")), random_ids()
    expert = random_expert(model, 1)
    cache = model.make_cache()
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache, expert_vector=expert)
        model.model.layers[1].self_attn.v_proj.weight.numpy()[...] *= 1.5
        model.weights_changed()
        found = model(ids[:, 5:], past_key_values=cache).logits[0]
    assert_same_logits(found, expected(model, ids.tolist(), [expert])[0][5:])


def test_a_cache_that_outlives_its_model_is_never_used_by_the_next():
    """The next model's weights were often put where the old ones had been, and the stamp was one of addresses."""
    config, ids = tiny_config("paper"), random_ids()
    for seed in range(10):
        model = random_model(config, seed)
        cache = model.make_cache()
        with torch.no_grad():
            model(ids[:, :5], past_key_values=cache)
            del model
            model = random_model(config, seed + 1)
            assert_same_logits(model(ids[:, 5:], past_key_values=cache).logits, uncached_logits(model, ids)[:, 5:])


def test_forks_of_a_prefix_notice_every_new_set_of_weights():
    """Addresses come back: a later candidate of an evolution strategy was put where the first one had been."""
    model, ids = random_model(tiny_config("paper")), random_ids()
    parameters = list(model.parameters())
    base = torch.nn.utils.parameters_to_vector(parameters).detach().clone()
    with torch.no_grad():
        torch.nn.utils.vector_to_parameters(base * 1.05, parameters)
        prefix = model.make_cache()
        model(ids[:, :5], past_key_values=prefix)
        for scale in range(8):
            torch.nn.utils.vector_to_parameters(base * (1 + 0.1 * scale), parameters)
            assert_same_logits(
                model(ids[:, 5:], past_key_values=prefix.fork()).logits, uncached_logits(model, ids)[:, 5:]
            )
