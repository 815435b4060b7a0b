"""Kernels for keys and values as codes: the same bytes as PyTorch's, and attention on what these stand for."""

import pytest
import torch

from mambaformer import decode_program_mambaformer as decode_program
from mambaformer.cache_codes_mambaformer import BITS, VectorCodec
from mambaformer.cache_keys_mambaformer import KeyValueSlots
from mambaformer.decode_slots_mambaformer import describe_codecs
from mambaformer.ops_cpu_codes_mambaformer import encode_on_cpu
from mambaformer.ops_cpu_interface_mambaformer import kernels
from patterns import tiny_config
from sequences import random_rows
from tiny_models import random_model

pytestmark = pytest.mark.skipif(kernels() is None, reason="there are no kernels")
every_bits = pytest.mark.parametrize("bits", BITS)
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)


def vectors_of(size, dtype):
    """Random vectors of many scales, and vectors whose numbers are equal, zero, tied, huge, tiny or not finite."""
    source = torch.Generator().manual_seed(size)
    random = torch.randn(400, size, generator=source, dtype=torch.float64)
    random *= 10.0 ** torch.randint(-6, 7, (400, 1), generator=source)
    integers = torch.randint(-9, 10, (200, size), generator=source, dtype=torch.float64)  # sums of integers tie
    ends = torch.tensor([0.0, -0.0, 1.0, -3.0, 1e38, 3e38, 1e-38, 1e-44, float("inf"), float("nan")])
    equal = ends.double()[:, None].expand(-1, size)
    one = torch.zeros(2 * size, size, dtype=torch.float64)
    one[torch.arange(2 * size), torch.arange(2 * size) % size] = 1.0
    one[0, 0], one[1, -1] = float("inf"), float("nan")
    return torch.cat([random, integers, integers * -0.0, equal, one, -one]).to(dtype)


@every_bits
@every_dtype
@pytest.mark.parametrize("size", [1, 2, 8, 12, 16, 32, 48, 64, 80, 96, 128, 130])
def test_the_bytes_are_those_of_pytorch(size, dtype, bits):
    codec, vectors = VectorCodec(size, bits), vectors_of(size, dtype)
    found = encode_on_cpu(vectors, codec.fields)
    assert found is not None and torch.equal(found, codec.encode_reference(vectors))


def test_bytes_of_strided_vectors_and_of_many_threads():
    codec, vectors = VectorCodec(64, 5), torch.randn(3, 700, 2, 64).transpose(1, 2)
    torch.set_num_threads(3)
    try:
        found = encode_on_cpu(vectors, codec.fields)
    finally:
        torch.set_num_threads(1)
    assert torch.equal(found, codec.encode_reference(vectors))


# ---- a decode step on codes against the same step as modules

SHAPES = [(16, 2, 1), (32, 3, 3), (48, 4, 1), (64, 9, 3), (96, 2, 1), (128, 2, 2), (144, 1, 1)]
# Below float64 the layers of both round differently, so now and then a number lies on the other side of a tie.
TOLERANCE = {torch.float64: 1e-10, torch.float32: 2e-3, torch.bfloat16: 1e-1}
STORAGES = ({"storage": "quantized"}, {"storage": "static", "max_cache_len": 180})
PROMPT = random_rows(1, (150, 150))
# A window stages several new keys, so its layers run as modules then.
STEPS = {"sliding_attention": ([[1], [2]], [[3], [4]]), "full_attention": ([[1], [2]], [[5, 6, 7], [8, 9, 10]])}


def logits_of_steps(model, is_lowered, monkeypatch, **options):
    """Logits of each decode step, run as a program or as modules."""
    ran, run = [], decode_program.DecodePrograms.run
    cache = model.make_cache(**options)
    with torch.inference_mode(), monkeypatch.context() as patch:
        model(torch.tensor(PROMPT), cache=cache)
        patch.setattr(
            decode_program.DecodePrograms,
            "run",
            lambda *args, **kwargs: ran.append(run(*args, **kwargs)) or ran[-1] if is_lowered else None,
        )
        steps = STEPS[model.config.layer_types[0]]
        logits = [model(torch.tensor(tokens), cache=cache).logits for tokens in steps]
    assert all(hidden_states is not None for hidden_states in ran) and len(ran) == is_lowered * len(steps)
    return logits


@every_dtype
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("kv_bits", [*BITS, {"keys": 6, "values": 3}], ids=str)
@pytest.mark.parametrize("kind", STEPS)
def test_a_step_on_codes_is_one_on_decoded_keys_and_values(kind, shape, dtype, kv_bits, monkeypatch):
    head_dim, heads, key_heads = shape
    fields = {"layer_types": [kind] * 2, "sliding_window": 70, "num_sink_tokens": 1}
    fields |= {"head_dim": head_dim, "num_attention_heads": heads, "num_key_value_heads": key_heads}
    model = random_model(tiny_config("full", **fields), loudness=0.8).to(dtype)
    for options in STORAGES:
        found, wanted = (
            logits_of_steps(model, is_lowered, monkeypatch, kv_bits=kv_bits, **options) for is_lowered in (True, False)
        )
        for one, other in zip(found, wanted, strict=True):
            assert (one - other).abs().max() <= TOLERANCE[dtype] * other.abs().max()


def test_groups_that_end_inside_of_a_vector_are_left_to_pytorch():
    codec = VectorCodec(80, 8)  # two groups of 40
    slots = torch.zeros(1, 1, 4, codec.nbytes, dtype=torch.uint8)
    placed = KeyValueSlots(slots, slots.clone(), (codec, codec))
    assert describe_codecs(placed, torch.zeros(1, 1, 1, 80)) is None
    assert describe_codecs(placed, torch.zeros(1, 1, 1, 80, dtype=torch.float64)) is not None


@pytest.mark.parametrize("wrong", ["type", "bytes", "rows", "order"])
def test_slots_of_another_form_are_refused(wrong):
    codec, like = VectorCodec(64, 6), torch.zeros(1, 2, 1, 64)
    slots = torch.zeros(1, 2, 4, codec.nbytes, dtype=torch.uint8)
    assert describe_codecs(KeyValueSlots(slots, slots, (codec, codec)), like) is not None
    damaged = {
        "type": slots.to(torch.int8),
        "bytes": slots[..., 1:].contiguous(),
        "rows": slots.expand(2, -1, -1, -1).contiguous(),
        "order": slots.transpose(1, 2).contiguous().transpose(1, 2),
    }[wrong]
    assert describe_codecs(KeyValueSlots(slots, damaged, (codec, codec)), like) is None
