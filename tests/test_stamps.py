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

import cases
from mambaformer.weights_parallel_mambaformer import CountsReplacements
from mambaformer.weights_version_mambaformer import _stamp_of_all, _StorageNumbers, _WeightNumbers, weights_stamp


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
    model = cases.new_model("everything").model
    before = seen(model)
    assert model._seen_weights.last[0].is_unchanged(model)
    CHANGES[name](model)
    assert seen(model) != before


@pytest.mark.parametrize("part", ["qdata", "scale"])
def test_a_write_to_a_part_of_a_quantized_weight_is_seen(part):
    model = cases.new_model("everything").float()
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
        model = cases.new_model("everything").model
    before = seen(model)
    model.norm.weight = nn.Parameter(torch.ones(model.norm.weight.shape, dtype=torch.float64))
    between = seen(model)
    with torch.no_grad():
        model.norm.weight.zero_()
    assert len({before, between, seen(model)}) == 3


def test_adapters_are_asked_each_time():
    model = cases.new_model("everything").model
    seen(model)
    wrapper = CountsReplacements()
    wrapper.base_layer, wrapper.scaling = model.layers[0].mlp.up_proj, {"default": 1.0}
    model.layers[0].mlp.up_proj = wrapper
    before = seen(model)
    wrapper.scaling["default"] = 2.0
    assert seen(model) != before


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model))])
def test_a_copy_has_seen_nothing(copied):
    model = cases.new_model("everything").model
    before, other = seen(model), copied(model)
    assert other._seen_weights.last is None
    assert seen(other) != before == seen(model)


def test_a_write_while_the_stamp_is_made_is_seen_next_time(monkeypatch):
    model = cases.new_model("everything").model
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
