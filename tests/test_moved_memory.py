"""Law 8 for memory: weights whose memory has moved are never read where it was, and live while a kernel reads them."""

import gc
import threading
from multiprocessing.reduction import ForkingPickler

import pytest
import torch
from torch import nn
from torch.multiprocessing import reductions  # it teaches ForkingPickler to send tensors
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from mambaformer import decode_program_mambaformer as stack
from mambaformer import ops_cpu_decode_mambaformer as decode
from mambaformer import ops_cpu_scan_mambaformer as scan
from mambaformer import ops_mambaformer as ops
from patterns import tiny_config
from sequences import random_rows
from tiny_models import random_expert, random_model

IDS = torch.tensor([random_rows(1)[0][:10]])


def model_of(pattern="everything", dtype=torch.float32):
    """Its weights are numbers of `dtype`, so that they survive a way there and back."""
    return random_model(tiny_config(pattern, head_dim=16)).to(dtype).to(torch.float64)


@torch.no_grad()
def feed(model, cache, ids, **options):
    return model(ids, cache=cache, **options).logits


def poison(model):
    """Puts NaN where freed memory of the sizes of weights is given out again."""
    sizes = {weight.numel() for weight in model.parameters()}
    kept = [torch.full((size,), float("nan"), dtype=torch.float64) for size in sizes for _ in range(8)]
    assert kept


# ---- what moves memory


def share(model):
    model.share_memory()


def send(model):
    for weight in model.parameters():
        ForkingPickler.dumps(weight.detach())


def send_state(model):
    ForkingPickler.dumps(model.state_dict())


def there_and_back(model):
    model.to(torch.float32).to(torch.float64)


def put_data(model):
    for weight in model.parameters():
        weight.data = weight.data.clone()


def set_storage(model):
    with torch.no_grad():
        for weight in model.parameters():
            weight.set_(weight.detach().clone())


def resizable(model):
    """All weights, but those whose bytes NumPy has looked at to find their singular bases."""
    return [weight for weight in model.parameters() if weight.untyped_storage().resizable()]


def resize_storage(model):
    for weight in resizable(model):
        weight.untyped_storage().resize_(2 * weight.untyped_storage().nbytes())


def free_and_fill(model):
    """As FSDP does with weights that it gathers for each forward."""
    for weight in resizable(model):
        kept, storage = weight.detach().clone(), weight.untyped_storage()
        size = storage.nbytes()
        storage.resize_(0)
        storage.resize_(size)
        weight.data.copy_(kept)


def assign(model):
    model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)


MOVES = {
    "share_memory": share,
    "sent to another process": send,
    "sent as a state_dict": send_state,
    "to another dtype and back": there_and_back,
    "weight.data": put_data,
    "set_": set_storage,
    "storage resized": resize_storage,
    "storage freed and filled": free_and_fill,
    "load_state_dict(assign=True)": assign,
}


@pytest.mark.parametrize("has_expert", [False, True], ids=["base", "expert"])
@pytest.mark.parametrize("move", MOVES)
def test_memory_that_moves_between_two_steps_is_found(move, has_expert):
    """`share_memory()` moves bytes inside of the same storage; the decode kernel read freed memory (NaN logits)."""
    model = model_of()
    expert = random_expert(model, 1, rank=3) if has_expert else None
    wanted, cache = feed(model, None, IDS, expert_vector=expert), model.make_cache()
    feed(model, cache, IDS[:, :4], expert_vector=expert)
    found = [feed(model, cache, IDS[:, 4:5]), feed(model, cache, IDS[:, 5:6])]
    MOVES[move](model)
    gc.collect()
    poison(model)
    found += [feed(model, cache, token) for token in IDS[:, 6:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), wanted[:, 4:], rtol=1e-10, atol=1e-10)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["int8", "int4"])
@pytest.mark.parametrize("move", ["inner tensors shared", "inner tensors replaced"])
def test_memory_of_quantized_weights_that_moves_is_found(kind, move):
    """A quantized weight has no memory of its own: its inner tensors move without it."""
    model = random_model(tiny_config("llama", hidden_size=64, intermediate_size=64, head_dim=16)).to(torch.float32)
    config = Int8WeightOnlyConfig() if kind == "int8" else PrototypeInt4WeightOnlyConfig(group_size=32)
    quantize_(model.model.layers, config)
    ids, caches = IDS, [model.make_cache() for _ in range(2)]
    for cache in caches:
        feed(model, cache, ids[:, :4])
    wanted = [feed(model, caches[0], token) for token in ids[:, 4:].split(1, dim=1)]
    found = [feed(model, caches[1], token) for token in ids[:, 4:7].split(1, dim=1)]
    for module in model.model.layers.modules():
        if isinstance(module, nn.Linear):
            for name in ("qdata", "scale", "scale_and_zero"):
                inner = getattr(module.weight, name, None)
                if inner is not None and move == "inner tensors shared":
                    inner.share_memory_()
                elif inner is not None:
                    setattr(module.weight, name, inner.clone())
    gc.collect()
    poison(model)
    found += [feed(model, caches[1], token) for token in ids[:, 7:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), torch.cat(wanted, dim=1), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("move", [share, put_data], ids=["share_memory", "weight.data"])
def test_a_cache_is_stale_when_memory_moved_and_content_changed(move):
    """The stamp saw the same storage and version: the cache passed for one of the new weights."""
    model = model_of()
    cache = model.make_cache()
    feed(model, cache, IDS[:, :6])
    move(model)
    model.model.layers[0].mlp.up_proj.weight.data.mul_(1.5)
    found = feed(model, cache, IDS[:, 6:])
    torch.testing.assert_close(found, feed(model, None, IDS)[:, 6:], rtol=1e-10, atol=1e-10)


def prune(model):
    mlp = model.model.layers[0].mlp
    for linear in (mlp.gate_proj, mlp.up_proj):
        linear.weight.data, linear.bias.data = linear.weight.data[:24], linear.bias.data[:24]
    mlp.down_proj.weight.data = mlp.down_proj.weight.data[:, :24]


def turn(model):
    linear = model.model.layers[2].self_attn.k_proj
    linear.weight.data = linear.weight.data.t()


@pytest.mark.parametrize("change", [prune, turn])
def test_the_same_memory_read_in_another_shape_counts(change):
    """A weight that is sliced or turned through `weight.data` keeps its storage, its address and its version."""
    model = model_of()
    cache = model.make_cache()
    for token in IDS[:, :6].split(1, dim=1):
        feed(model, cache, token)
    change(model)
    found = [feed(model, cache, token) for token in IDS[:, 6:].split(1, dim=1)]
    torch.testing.assert_close(torch.cat(found, dim=1), feed(model, None, IDS)[:, 6:], rtol=1e-10, atol=1e-10)


# ---- what is replaced while a kernel runs


class ReplacedMeanwhile:
    """Stands for the kernel of all layers: another thread replaces weights before it reads them."""

    def __init__(self, replace):
        self.kernel_of, self.replace, self.has_run = stack.kernel_of, replace, False

    def __call__(self, name, *dtypes):
        kernel = self.kernel_of(name, *dtypes)

        def run(*args):
            if not self.has_run:
                self.has_run = True
                thread = threading.Thread(target=self.replace)
                thread.start()
                thread.join()
            return kernel(*args)

        return run if name == "run_program" else kernel


def replace_each(model):
    for module in list(model.model.layers.modules()):
        for name, weight in list(module.named_parameters(recurse=False)):
            setattr(module, name, nn.Parameter(weight.detach().clone() * 2))


def load_assigned(model):
    model.load_state_dict({name: 2 * weight for name, weight in model.state_dict().items()}, assign=True)


def put_other_data(model):
    for weight in model.model.layers.parameters():
        weight.data = 2 * weight.data


@pytest.mark.parametrize("replace", [replace_each, load_assigned, put_other_data])
@pytest.mark.parametrize("pattern", ["everything", "llama", "paper"])
def test_weights_that_are_replaced_meanwhile_live_until_the_kernel_ends(pattern, replace, monkeypatch):
    """`load_state_dict(assign=True)` in another thread freed the weights that a kernel was reading."""
    model = model_of(pattern)
    states, cache = [], model.make_cache()
    model.model.norm.register_forward_pre_hook(lambda module, args: states.append(args[0]))
    feed(model, None, IDS[:, :6])
    feed(model, cache, IDS[:, :4])
    feed(model, cache, IDS[:, 4:5])
    old = [reductions.StorageWeakRef(weight.untyped_storage()) for weight in model.model.layers.parameters()]
    alive = []

    def meanwhile():
        replace(model)
        gc.collect()
        alive.extend(not reference.expired() for reference in old)
        poison(model)

    monkeypatch.setattr(stack, "kernel_of", ReplacedMeanwhile(meanwhile))
    model.model._decode_programs = stack.DecodePrograms()
    feed(model, cache, IDS[:, 5:6])
    assert alive and all(alive)
    torch.testing.assert_close(states[-1], states[0][:, -1:], rtol=1e-10, atol=1e-10)


WIDTH = 64


def loud(*shape):
    return nn.Parameter(torch.randn(*shape, dtype=torch.float64))


def linear(states, weights):
    return decode.plain_linear_on_cpu(states, *weights)


def norm(states, weights):
    return decode.rms_norm_on_cpu(states, *weights, 1e-5)


def convolution(states, weights):
    return ops.causal_conv1d(states, loud(WIDTH, 4), *weights)[0]


def recurrence(states, weights):
    A_log, D = weights
    B = states[..., :8]
    return ops.selective_scan(states, states, A_log, B, B, D, dt_softplus=True, A_is_log=True)[0]


# Every row is a kernel of its own, the sizes of the weights that it is given, and the module where it is looked up.
SINGLE_KERNELS = {
    "linear": (linear, [(WIDTH, WIDTH), (WIDTH,)], decode, "kernel_of"),
    "norm": (norm, [(WIDTH,)], decode, "kernel_of"),
    "convolution": (convolution, [(WIDTH,)], scan, "kernel_of"),
    "recurrence": (recurrence, [(WIDTH, 8), (WIDTH,)], scan, "kernel_of"),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SINGLE_KERNELS)
def test_a_single_kernel_keeps_the_memory_that_it_reads(name, monkeypatch):
    """Only the kernel of all layers did: beside a thread that writes `weight.data`, logits of others were off by 4."""
    run, shapes, module, attribute = SINGLE_KERNELS[name]
    weights, states, alive = [loud(*shape) for shape in shapes], loud(1, 1, WIDTH).detach(), []
    old, find = [reductions.StorageWeakRef(weight.untyped_storage()) for weight in weights], getattr(module, attribute)

    def found(*key):
        kernel = find(*key)

        def after_a_replacement(*args):
            for weight in weights:
                weight.data = 2 * weight.data
            gc.collect()
            alive.extend(not reference.expired() for reference in old)
            return kernel(*args)

        return after_a_replacement

    monkeypatch.setattr(module, attribute, found)
    assert run(states, weights) is not None
    assert alive == [True] * len(weights)


def test_a_weight_whose_memory_is_freed_is_an_error_and_no_crash():
    """The address of a freed weight is 0, which a kernel would read; PyTorch says what is wrong."""
    model = model_of("llama")
    cache = model.make_cache()
    feed(model, cache, IDS[:, :4])
    feed(model, cache, IDS[:, 4:5])
    model.model.layers[1].mlp.up_proj.weight.untyped_storage().resize_(0)
    with pytest.raises(RuntimeError, match="out of bounds for storage of size 0"):
        feed(model, cache, IDS[:, 5:6])


def test_weights_loaded_again_and_again_beside_decoding_never_show():
    """The same weights are assigned by another thread while tokens are decoded: logits must not change."""
    model = model_of("llama")
    wanted, is_done, failures = feed(model, None, IDS), threading.Event(), []

    def load():
        while not is_done.is_set():
            model.load_state_dict({name: weight.clone() for name, weight in model.state_dict().items()}, assign=True)
            poison(model)

    thread = threading.Thread(target=load)
    thread.start()
    try:
        for _ in range(10):
            cache = model.make_cache(on_expert_change="continue")
            found = torch.cat([feed(model, cache, token) for token in IDS.split(1, dim=1)], dim=1)
            failures.append(float((found - wanted).abs().max()))
    finally:
        is_done.set()
        thread.join()
    assert max(failures) < 1e-10
