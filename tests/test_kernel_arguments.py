"""What kernels are given: anything whose memory is not laid out as it seems is left to PyTorch, or refused by name.

Kernels compute addresses from shapes, strides and sizes, some of which come from files. Every case here read or wrote
memory that was not the tensor's own, or read another tensor's numbers, before it was checked.
"""

import copy
import json
import math
import struct
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from loops import conv_arguments, scan_arguments
from mambaformer import MambaFormerForCausalLM
from mambaformer import decode_program_mambaformer as stack
from mambaformer.cache_keys_mambaformer import KeyValueSlots
from mambaformer.cache_retention_mambaformer import Layout
from mambaformer.expert_linear_mambaformer import apply_linear
from mambaformer.mixer_attention_masks_mambaformer import AttentionMasks
from mambaformer.ops_cpu_decode_mambaformer import (
    apply_rope_on_cpu,
    attention_on_cpu,
    packed_linear_on_cpu,
    plain_linear_on_cpu,
    rms_norm_on_cpu,
    scale_singular_values_on_cpu,
    silu_gate_on_cpu,
)
from mambaformer.ops_mambaformer import causal_conv1d, selective_scan
from mambaformer.weights_quantized_mambaformer import PackedWeight, packed_weight
from patterns import tiny_config
from sequences import random_rows
from tiny_models import random_expert, random_model

has_int4_kernels = torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


def normal(*shape, dtype=torch.float32):
    source = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)


def negated(tensor):
    """The same numbers, in the memory of the opposite ones."""
    return torch._neg_view(-tensor)


def half_of(tensor):
    """A tensor of complex numbers whose imaginary part, conjugated, is a view with the negative bit."""
    return torch.complex(tensor, -tensor).conj().imag


# ------------------------------------------------------------------------------------------------------- files of int4


@pytest.fixture(scope="module")
def saved(request, tmp_path_factory):
    """A folder of a model with weights of the kind that the test names."""
    config = tiny_config("llama", head_dim=16, vocab_size=64, intermediate_size=64)
    model = random_model(config).float()
    settings = Int8WeightOnlyConfig() if request.param == "int8" else PrototypeInt4WeightOnlyConfig(group_size=32)
    quantize_(model, settings, lambda module, name: isinstance(module, nn.Linear))
    folder = tmp_path_factory.mktemp(request.param)
    model.save_pretrained(folder)
    return folder


NAME = "model.layers.1.mlp.up_proj"


def rewrite(folder, to, change):
    """Copies a model, with `change(entry of the weight in the metadata, header)` made to its file."""
    for path in folder.iterdir():
        (to / path.name).write_bytes(path.read_bytes())
    content = (folder / "model.safetensors").read_bytes()
    (size,) = struct.unpack_from("<Q", content)
    header = json.loads(content[8 : 8 + size])
    entry = json.loads(header["__metadata__"][f"{NAME}.weight"])
    change(entry["_data"], header)
    header["__metadata__"][f"{NAME}.weight"] = json.dumps(entry)
    new = json.dumps(header).encode()
    (to / "model.safetensors").write_bytes(struct.pack("<Q", len(new)) + new + content[8 + size :])


def block_size(value):
    return lambda entry, header: entry.update(block_size=value)


def tensor_of(part, **fields):
    """Changes a tensor's type or shape in the header, over the same bytes."""
    return lambda entry, header: header[f"{NAME}._weight_{part}"].update(fields)


def flattened(part):
    """A tensor of the same bytes and another number of dimensions."""

    def change(entry, header):
        about = header[f"{NAME}._weight_{part}"]
        about["shape"] = [math.prod(about["shape"])]

    return change


BAD_FILES = {
    "int4": {
        "a group of 0": ("block_size", block_size([1, 0])),
        "a negative group": ("block_size", block_size([1, -32])),
        "a group that does not divide": ("block_size", block_size([1, 7])),
        "a group beyond the weight": ("block_size", block_size([1, 10**6])),
        "a group over rows": ("block_size", block_size([2, 32])),
        "a group of another size": ("scale", block_size([1, 16])),
        "a group that is no integer": ("block_size", block_size([1, 32.0])),
        "one size": ("block_size", block_size([32])),
        "no size": ("block_size", block_size(None)),
        "a word": ("block_size", block_size("32")),
        "codes of another type": ("qdata", tensor_of("qdata", dtype="F32", shape=[64, 4])),
        "codes of another shape": ("qdata", tensor_of("qdata", shape=[16, 64])),
        "codes in a row": ("qdata", flattened("qdata")),
        "scales of another shape": ("scale", tensor_of("scale", shape=[64, 1])),
        "scales of another type": ("scale", tensor_of("scale", dtype="I32")),
        "zeros of another shape": ("zero_point", flattened("zero_point")),
    },
    "int8": {
        "codes of another type": ("qdata", tensor_of("qdata", dtype="F16", shape=[64, 16])),
        "codes without a sign": ("qdata", tensor_of("qdata", dtype="U8")),
        "scales of another type": ("scale", tensor_of("scale", dtype="I32")),
        "too few scales": ("scale", block_size([1, 16])),
        "a block of 0": ("block_size", block_size([1, 0])),
        "a block beyond the weight": ("block_size", block_size([1, 10**6])),
    },
}


@pytest.mark.parametrize(
    ("saved", "name"), [(kind, n) for kind in BAD_FILES for n in BAD_FILES[kind]], indirect=["saved"]
)
def test_a_file_whose_sizes_contradict_each_other_is_refused_by_name(saved, name, request, tmp_path):
    """An int4 `block_size` of 0 divided by zero, and one of 10^6 read far beyond the weight's memory."""
    field, change = BAD_FILES[request.node.callspec.params["saved"]][name]
    rewrite(saved, tmp_path, change)
    with pytest.raises(ValueError, match=field) as raised:
        MambaFormerForCausalLM.from_pretrained(tmp_path)
    assert NAME in str(raised.value)


@pytest.mark.parametrize("saved", BAD_FILES, indirect=True)
def test_a_file_that_was_not_changed_is_read(saved, tmp_path):
    rewrite(saved, tmp_path, lambda entry, header: None)
    MambaFormerForCausalLM.from_pretrained(tmp_path)


# -------------------------------------------------------------------------------------------------- weights in memory


def packed_int8(**changes):
    codes = torch.randint(-128, 128, (64, 32), generator=torch.Generator().manual_seed(3)).to(torch.int8)
    return PackedWeight(**{"kind": "int8", "qdata": codes, "scale": normal(64)} | changes)


def packed_int4(**changes):
    codes = torch.randint(0, 16, (64, 32), dtype=torch.int32, generator=torch.Generator().manual_seed(3))
    packed = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    fields = {"kind": "int4", "qdata": packed, "scale_and_zero": normal(1, 64, 2), "group_size": 32, "block_n": 64}
    return PackedWeight(**fields | {"has_halves": True} | changes)


BAD_PACKED = {
    "int8 scales that are too few": lambda: packed_int8(scale=normal(63)),
    "int8 scales in a column": lambda: packed_int8(scale=normal(64, 1)),
    "int8 scales with gaps": lambda: packed_int8(scale=normal(64, 2)[:, 0]),
    "int8 scales of float64": lambda: packed_int8(scale=normal(64, dtype=torch.float64)),
    "int8 scales with the negative bit": lambda: packed_int8(scale=negated(normal(64))),
    "int8 codes of float": lambda: packed_int8(qdata=normal(64, 32)),
    "int8 codes without a sign": lambda: packed_int8(qdata=packed_int8().qdata.view(torch.uint8)),
    "int8 codes of one row for all": lambda: packed_int8(qdata=packed_int8().qdata[:1].expand(64, 32)),
    "int8 codes that are turned": lambda: packed_int8(qdata=packed_int8().qdata.t().contiguous().t()),
    "int8 codes in three dimensions": lambda: packed_int8(qdata=packed_int8().qdata[None]),
    "int4 groups of 0": lambda: packed_int4(group_size=0),
    "int4 groups of -32": lambda: packed_int4(group_size=-32),
    "int4 groups of 7": lambda: packed_int4(group_size=7),
    "int4 groups of 16": lambda: packed_int4(group_size=16),
    "int4 groups of a million": lambda: packed_int4(group_size=10**6),
    "int4 scales that are too few": lambda: packed_int4(scale_and_zero=normal(1, 63, 2)),
    "int4 scales that are turned": lambda: packed_int4(scale_and_zero=normal(64, 1, 2)),
    "int4 scales of float16": lambda: packed_int4(scale_and_zero=normal(1, 64, 2).half()),
    "int4 scales with the negative bit": lambda: packed_int4(scale_and_zero=negated(normal(1, 64, 2))),
    "int4 codes of int8": lambda: packed_int4(qdata=packed_int4().qdata.view(torch.int8)),
    "int4 codes with gaps": lambda: packed_int4(qdata=packed_int4().qdata.repeat(1, 2)[:, ::2]),
}


@pytest.mark.parametrize("rows", [1, 40])
@pytest.mark.parametrize("name", BAD_PACKED)
def test_packed_weights_that_contradict_themselves_are_left_to_pytorch(name, rows):
    states = normal(rows, 1, 32)
    good = packed_int8() if name.startswith("int8") else packed_int4()
    if rows == 1 and (good.kind == "int8" or has_int4_kernels):
        assert packed_linear_on_cpu(states, good) is not None
    assert packed_linear_on_cpu(states, BAD_PACKED[name]()) is None


CHANGED_WEIGHTS = {
    "int8 codes of another type": ("int8", "qdata", lambda codes: codes.float()),
    "int8 scales of another type": ("int8", "scale", lambda scale: scale.double()),
    "int8 scales with the negative bit": ("int8", "scale", negated),
    "int8 scales as an imaginary part": ("int8", "scale", half_of),
    "int4 scales with the negative bit": ("int4", "scale_and_zero", negated),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGED_WEIGHTS)
def test_a_quantized_weight_in_another_layout_means_what_torchao_says(name):
    kind, field, change = CHANGED_WEIGHTS[name]
    module, states = nn.Linear(32, 64), normal(1, 1, 32)
    quantize_(module, Int8WeightOnlyConfig() if kind == "int8" else PrototypeInt4WeightOnlyConfig(group_size=32))
    before = module(states)
    setattr(module.weight, field, change(getattr(module.weight, field)))
    torch.testing.assert_close(apply_linear(module, states), before, rtol=1e-5, atol=1e-5)


def test_a_group_size_that_was_changed_in_memory_is_not_computed_with():
    module = nn.Linear(32, 64)
    quantize_(module, PrototypeInt4WeightOnlyConfig(group_size=32))
    for size in (0, -32, 7, 16, 10**6):
        weight = copy.deepcopy(module.weight)
        weight.block_size = (1, size)
        assert packed_weight(weight) is None


# ------------------------------------------------------------------------------------------------------ plain tensors

DTYPES = [torch.float32, torch.float64, torch.bfloat16]
KERNELS = {
    "linear": (plain_linear_on_cpu, lambda n: [n(2, 1, 16), n(8, 16), n(8)]),
    "rescale": (scale_singular_values_on_cpu, lambda n: [n(2, 1, 16), n(16, 3), n(3)]),
    "norm": (lambda *args: rms_norm_on_cpu(*args, 1e-5), lambda n: [n(2, 1, 16), n(16)]),
    "rotate": (apply_rope_on_cpu, lambda n: [n(2, 4, 1, 16), n(2, 1, 16), n(2, 1, 16)]),
    "gate": (silu_gate_on_cpu, lambda n: [n(2, 16), n(2, 16)]),
    "attend": (lambda q, k, v: attention_on_cpu(q, k, v, None, 0.3),
               lambda n: [n(2, 4, 1, 16), n(2, 2, 5, 16), n(2, 2, 5, 16)]),
    "int8": (lambda x, bias: packed_linear_on_cpu(x, packed_int8(), bias), lambda n: [n(2, 1, 32), n(64)]),
}  # fmt: skip


@pytest.mark.parametrize("name", KERNELS)
def test_the_negative_bit_is_seen_by_every_kernel(name):
    """The memory was read without its sign: a product had the opposite one."""
    kernel, arguments = KERNELS[name]
    good = arguments(normal)
    assert kernel(*good) is not None
    for index, tensor in enumerate(good):
        for change in (negated, half_of):
            bad = [*good[:index], change(tensor), *good[index + 1 :]]
            torch.testing.assert_close(bad[index], tensor)
            assert bad[index].is_neg() and kernel(*bad) is None, index


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("function", "make"), [(causal_conv1d, conv_arguments), (selective_scan, scan_arguments)])
def test_convolution_and_scan_see_the_negative_bit_of_arguments_and_gradients(function, make, dtype):
    arguments = {name: value.to(dtype) for name, value in make(2, 40, 21).items()}
    wanted, tolerance = function(**arguments), {"rtol": 0.02, "atol": 0.05 if dtype == torch.bfloat16 else 1e-4}
    for name in arguments:
        found = function(**arguments | {name: negated(arguments[name])})
        torch.testing.assert_close(found, wanted, **tolerance)
    leaves = {name: value.clone().requires_grad_() for name, value in arguments.items()}
    outputs = function(**leaves)
    incoming = [normal(*output.shape, dtype=output.dtype) for output in outputs]
    wanted = torch.autograd.grad(outputs, list(leaves.values()), incoming, retain_graph=True)
    found = torch.autograd.grad(outputs, list(leaves.values()), [negated(each) for each in incoming])
    torch.testing.assert_close(found, wanted, **tolerance)


BIASES = {"one number": lambda: normal(1), "one too few": lambda: normal(7), "a column": lambda: normal(8, 1),
          "a row": lambda: normal(1, 8), "numbers with gaps": lambda: normal(8, 2)[:, 0],
          "one for all": lambda: normal(1).expand(8), "a number": lambda: normal(1)[0]}  # fmt: skip


@torch.no_grad()
@pytest.mark.parametrize("name", BIASES)
def test_a_bias_of_another_shape_or_layout_is_left_to_pytorch(name):
    """A bias of shape (1,) was read as if it had one number for each output: 28 bytes of other memory."""
    states, weight, bias = normal(2, 1, 16), normal(8, 16), BIASES[name]()
    assert plain_linear_on_cpu(states, weight, bias) is None
    assert packed_linear_on_cpu(normal(2, 1, 32), packed_int8(), bias) is None
    module = nn.Linear(16, 8)
    module.weight, module.bias = nn.Parameter(weight), nn.Parameter(bias)
    try:
        wanted = F.linear(states, weight, bias)
    except RuntimeError:
        with pytest.raises(RuntimeError):
            apply_linear(module, states)
    else:
        torch.testing.assert_close(apply_linear(module, states), wanted)


WEIGHTS = {
    "one row for all": lambda: normal(1, 16).expand(8, 16),
    "rows that overlap": lambda: torch.as_strided(normal(40), (8, 16), (3, 1)),
    "one number for all": lambda: normal(1, 1).expand(8, 16),
    "turned": lambda: normal(16, 8).t(),
    "with the negative bit": lambda: negated(normal(8, 16)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", WEIGHTS)
def test_a_weight_in_another_layout_means_what_pytorch_says(name):
    states, weight = normal(2, 1, 16), WEIGHTS[name]()
    module = nn.Linear(16, 8, bias=False)
    module.weight = nn.Parameter(weight)
    torch.testing.assert_close(apply_linear(module, states), F.linear(states, weight))
    assert plain_linear_on_cpu(states, weight) is None


def test_weights_of_other_dimensions_and_without_memory_are_left_to_pytorch():
    states, freed = normal(2, 1, 16), normal(8, 16)
    freed.untyped_storage().resize_(0)
    assert plain_linear_on_cpu(states, freed) is None, "as sharded training frees its weights"
    for weight in (normal(8, 16, 1), normal(8, 16)[None], normal(16), normal(8, 17)):
        assert plain_linear_on_cpu(states, weight) is None
    assert plain_linear_on_cpu(normal(2, 1, 0), normal(8, 0)) is None
    assert plain_linear_on_cpu(normal(0, 1, 16), normal(8, 16)) is None
    assert rms_norm_on_cpu(normal(2, 0), normal(0), 1e-5) is None
    assert scale_singular_values_on_cpu(states, normal(16, 0), normal(0)) is None, "nothing would have been written"
    assert attention_on_cpu(normal(1, 4, 1, 16), normal(1, 0, 3, 16), normal(1, 0, 3, 16), None, 1.0) is None


# ------------------------------------------------------------------------------------------------ parts of a layer


def layer_and_step(pattern="everything", **options):
    model = random_model(tiny_config(pattern, head_dim=16, **options))
    cache = model.make_cache(on_expert_change="continue")
    ids = torch.tensor([random_rows(1)[0][:8]])
    with torch.no_grad():
        model(ids[:, :5], past_key_values=cache)
    return model, cache, ids


def parameter_of(module, name, value):
    setattr(module, name, nn.Parameter(value, requires_grad=False))


PARTS = {
    "a norm with the negative bit": ("llama", "self_attn_layernorm.weight", negated),
    "a projection with the negative bit": ("llama", "mlp.down_proj.weight", negated),
    "a bias with the negative bit": ("mamba", "mamba.dt_proj.bias", negated),
    "A with the negative bit": ("mamba", "mamba.A_log", negated),
    "D with the negative bit": ("mamba", "mamba.D", negated),
    "a convolution with the negative bit": ("mamba", "mamba.conv1d.weight", negated),
    "an inner norm with the negative bit": ("jamba", "mamba.b_layernorm.weight", negated),
    "an inner norm of one number": ("jamba", "mamba.b_layernorm.weight", lambda weight: weight[:1]),
    "a norm of one number": ("llama", "mlp_layernorm.weight", lambda weight: weight[:1]),
    "a norm in two dimensions": ("llama", "mlp_layernorm.weight", lambda weight: weight[None]),
    "a bias of one number": ("mamba", "mamba.dt_proj.bias", lambda bias: bias[:1]),
    "a D of one number": ("mamba", "mamba.D", lambda D: D[:1].expand(len(D))),
    "an A of one row": ("mamba", "mamba.A_log", lambda A: A[:1].expand(A.shape)),
    "an A that is turned": ("mamba", "mamba.A_log", lambda A: A.t().contiguous().t()),
}


@torch.no_grad()
@pytest.mark.parametrize("name", PARTS)
def test_a_layer_s_parameter_in_another_layout_means_what_pytorch_says(name):
    """The kernel for all layers read a norm of one number beyond its end, and the negative bit not at all."""
    pattern, path, change = PARTS[name]
    model, cache, ids = layer_and_step(pattern)
    module = model.model.layers[0].get_submodule(path.rpartition(".")[0])
    parameter_of(module, path.rpartition(".")[2], change(getattr(module, path.rpartition(".")[2]).data))
    found = model(ids[:, 5:6], past_key_values=cache.fork()).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("MAMBAFORMER_CPU_KERNELS", "0")
        patch.setattr(stack.DecodePrograms, "run", lambda *_: None)
        wanted = model(ids[:, 5:6], past_key_values=cache.fork()).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)


SHAPES = {
    "a bias of the convolution of one number": ("mamba", "mamba.conv1d.bias", lambda bias: bias[:1]),
    "a D that is short": ("mamba", "mamba.D", lambda D: D[:3]),
    "an A that is narrow": ("mamba", "mamba.A_log", lambda A: A[:, :1].contiguous()),
    "a convolution that is short": ("mamba", "mamba.conv1d.weight", lambda weight: weight[:3].contiguous()),
    "a bias that is short": ("mamba", "mamba.dt_proj.bias", lambda bias: bias[:3]),
    "a norm that is short": ("llama", "self_attn_layernorm.weight", lambda weight: weight[:3]),
}


@torch.no_grad()
@pytest.mark.parametrize("name", SHAPES)
def test_a_parameter_of_an_impossible_shape_is_an_error(name):
    pattern, path, change = SHAPES[name]
    model, cache, ids = layer_and_step(pattern)
    module = model.model.layers[0].get_submodule(path.rpartition(".")[0])
    parameter_of(module, path.rpartition(".")[2], change(getattr(module, path.rpartition(".")[2]).data))
    with pytest.raises((RuntimeError, ValueError)):
        model(ids[:, 5:6], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("storage", ["dense", "static"])
def test_projections_of_other_heads_do_not_write_beyond_the_cache(storage):
    """With "continue" the cache keeps keys of the old number of heads, and the kernel wrote those of the new one."""
    model = random_model(tiny_config("llama", head_dim=16, num_attention_heads=4, num_key_value_heads=1))
    options = {"max_cache_len": 20} if storage == "static" else {}
    cache, ids = model.make_cache(storage, on_expert_change="continue", **options), torch.tensor([random_rows(1)[0]])
    model(ids[:, :5], past_key_values=cache)
    for layer in model.model.layers:
        for name in ("k_proj", "v_proj"):
            old = getattr(layer.self_attn, name)
            setattr(layer.self_attn, name, nn.Linear(old.in_features, 64, bias=False, dtype=old.weight.dtype))
        layer.self_attn.num_key_value_groups = 1
    with pytest.raises(RuntimeError):
        model(ids[:, 5:6], past_key_values=cache)


@torch.no_grad()
@pytest.mark.parametrize("change", [
    lambda buffer: buffer[:, :, :6].contiguous(),
    lambda buffer: buffer.transpose(2, 3).contiguous().transpose(2, 3),
    lambda buffer: buffer.float(),
    negated,
], ids=["short", "turned", "of another type", "with the negative bit"])  # fmt: skip
@pytest.mark.parametrize("name", ["keys", "values"])
def test_slots_of_another_layout_are_not_written_to_by_the_kernel(name, change, monkeypatch):
    model, cache, ids = layer_and_step("llama")
    model(ids[:, 5:6], past_key_values=cache)
    store = cache.layers[0].attention
    buffer = getattr(store, name)
    place = type(store).place

    def placed(self, like, layout):
        slots = place(self, like, layout)
        return replace(slots, **{name: change(getattr(slots, name))}) if self is store else slots

    wanted = model(ids[:, 6:7], past_key_values=cache.fork()).logits
    before = buffer.tensor.clone()
    monkeypatch.setattr(type(store), "place", placed)
    found = model(ids[:, 6:7], past_key_values=cache).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
    assert torch.equal(buffer.tensor[:, :, :6], before[:, :, :6])


@torch.no_grad()
@pytest.mark.parametrize("slot", [-1, 20, 10**9, -(10**9)])
def test_slots_beyond_the_capacity_are_an_error_and_not_other_memory(slot, monkeypatch):
    """The kernel wrote a key wherever a slot of the plan said."""
    model = random_model(tiny_config("llama", head_dim=16))
    cache, ids = model.make_cache("static", max_cache_len=20), torch.tensor([random_rows(1)[0]])
    model(ids[:, :5], past_key_values=cache)
    describe = stack.ProgramStep._describe_layout

    def elsewhere(step, window, attention, layout):
        layout.slots.fill_(slot)
        return describe(step, window, attention, layout)

    monkeypatch.setattr(stack.ProgramStep, "_describe_layout", elsewhere)
    with pytest.raises((IndexError, RuntimeError)):
        model(ids[:, 5:6], past_key_values=cache)


@torch.no_grad()
def test_more_keys_than_slots_are_left_to_pytorch():
    model, cache, ids = layer_and_step("llama")
    model(ids[:, 5:6], past_key_values=cache)
    (program,) = model.model._decode_programs.recent
    slots = program.linked.key_slots[0]
    keys = torch.zeros(2, slots.key_heads, 8, slots.head_dim, dtype=torch.float64)

    def fits(slots, num_slots, rows=1):
        """Whether a step runs on storage of eight slots."""
        step = stack.ProgramStep(program.linked, torch.zeros(rows, 1, 32, dtype=torch.float64), None)
        layout = Layout(num_slots, None, slots)
        store = SimpleNamespace(place=lambda *_: KeyValueSlots(keys[:rows], keys[:rows]))
        cache = SimpleNamespace(key_store=lambda _: store, layout=lambda _: layout)
        inputs = stack.LayerArguments({None: AttentionMasks()}, None, cache, None, {})
        return step.add_layouts({None: 0}, inputs) and step.add_key_slots(cache)

    for num_slots, first_slot, does_fit in (
        (8, 7, True),
        (9, 7, False),
        (8, 8, False),
        (-1, 0, False),
        (8, -1, False),
    ):
        assert fits(first_slot, num_slots) == does_fit
    for slots, does_fit in (([0, 7], True), ([0, 8], False), ([-1, 0], False)):
        assert fits(torch.tensor(slots)[:, None], 8, rows=2) == does_fit


@torch.no_grad()
def test_an_expert_s_scales_of_another_layout_are_left_to_pytorch():
    model, cache, ids = layer_and_step("llama")
    expert = random_expert(model, 1, rank=3)
    wanted = model(ids[:, 5:6], past_key_values=cache.fork(), expert_vector=expert).logits
    scaled = {name: negated(z) for name, z in expert.vectors.items()}
    found = model(ids[:, 5:6], past_key_values=cache.fork(), expert_vector=scaled).logits
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-9)
