"""The CPU kernels for few tokens: each against its formula, written out in float64, and what they leave to PyTorch."""

from collections import Counter
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from mambaformer import decode_program_mambaformer as stack
from mambaformer import expert_linear_mambaformer as expert_linear
from mambaformer import ops_cpu_decode_mambaformer as kernels
from mambaformer.ops_cpu_decode_mambaformer import (
    apply_rope_on_cpu,
    attention_on_cpu,
    packed_linear_on_cpu,
    plain_linear_on_cpu,
    rms_norm_on_cpu,
    scale_singular_values_on_cpu,
    silu_gate_on_cpu,
)
from mambaformer.weights_quantized_mambaformer import PackedWeight, packed_rows
from oracle import assert_same_logits, expected
from patterns import tiny_config
from sequences import feed_row, random_rows
from tiny_models import random_expert, random_model

TOLERANCE = {torch.float32: 2e-6, torch.float64: 1e-13, torch.bfloat16: 1e-2}
every_dtype = pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
every_thread_count = pytest.mark.parametrize("threads", [1, 2, 3])
# Widths below, at and between the widths of vectors, so that every kernel has remainders.
WIDTHS = (1, 5, 16, 33, 64, 576)


@pytest.fixture
def threads(request):
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(1)


def normal(*shape, dtype=torch.float64):
    source = torch.Generator().manual_seed(sum(shape))
    return torch.randn(*shape, generator=source, dtype=torch.float64).to(dtype)


def assert_near(got, wanted):
    assert got is not None, "left to PyTorch"
    assert got.shape == wanted.shape
    assert torch.isfinite(got).all()
    tolerance = TOLERANCE[got.dtype] * max(1.0, float(wanted.abs().max()))
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=tolerance)


@every_dtype
@pytest.mark.parametrize("threads", [1, 3], indirect=True)
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 7, 8])
@pytest.mark.parametrize(("width", "outputs"), [(1, 1), (5, 3), (16, 64), (33, 65), (576, 130), (130, 576)])
def test_a_product_of_few_rows(dtype, threads, rows, width, outputs):
    states, weight, bias = normal(rows, 1, width, dtype=dtype), normal(outputs, width, dtype=dtype), normal(outputs)
    wanted = F.linear(states.double(), weight.double())
    assert_near(plain_linear_on_cpu(states, weight), wanted)
    bias = bias.to(dtype)
    assert_near(plain_linear_on_cpu(states, weight, bias), wanted + bias.double())


@every_dtype
def test_a_row_gets_the_same_bits_in_any_batch(dtype):
    states, weight = normal(8, 1, 70, dtype=dtype), normal(33, 70, dtype=dtype)
    for rows in range(1, 9):
        assert torch.equal(plain_linear_on_cpu(states[:rows], weight), plain_linear_on_cpu(states, weight)[:rows])


@every_dtype
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("rank", [1, 5, 64, 200])
@pytest.mark.parametrize("width", [200, 576])
def test_an_expert_on_few_rows(dtype, threads, rank, width):
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    basis = (normal(width, rank + 7, dtype=dtype) / width**0.5)[:, :rank]  # a cut of a larger basis
    for shape, delta in (((3, 2, width), normal(rank, dtype=wide)), ((3, 1, width), normal(3, 1, rank, dtype=wide))):
        states = normal(*shape, dtype=dtype)
        change = ((states.double() @ basis.double()) * delta.double()) @ basis.double().mT
        assert_near(scale_singular_values_on_cpu(states, basis, delta), states.double() + change)
    still = torch.zeros(rank, dtype=wide)
    assert torch.equal(scale_singular_values_on_cpu(states, basis, still), states), (
        "an expert of ones gives the base's own bits"
    )


@every_dtype
@pytest.mark.parametrize("width", WIDTHS)
def test_norm_and_gate(dtype, width):
    states, gates = normal(3, 2, width, dtype=dtype), 5 * normal(3, 2, width, dtype=dtype)
    weight, wide = normal(width, dtype=dtype), states.double()
    wanted = weight.double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
    assert_near(rms_norm_on_cpu(states, weight, 1e-3), wanted)
    assert_near(silu_gate_on_cpu(gates, states), F.silu(gates.double()) * wide)


@every_dtype
@pytest.mark.parametrize("threads", [2], indirect=True)
def test_long_norms_and_gates_are_shared_by_threads(dtype, threads):
    states, weight = normal(700, 2, 100, dtype=dtype), normal(100, dtype=dtype)
    wide = states.double()
    wanted = weight.double() * wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-3)
    assert_near(rms_norm_on_cpu(states, weight, 1e-3), wanted)
    assert_near(silu_gate_on_cpu(states, states), F.silu(wide) * wide)


def test_what_is_not_a_number_stays_so():
    states, weight = normal(1, 1, 33, dtype=torch.float32), normal(33, 33, dtype=torch.float32)
    for poison in (float("nan"), float("inf")):
        bad = states.clone()
        bad[0, 0, 32] = poison
        assert not torch.isfinite(plain_linear_on_cpu(bad, weight)).any()
        assert rms_norm_on_cpu(bad, weight[0], 1e-3).isnan().any()
        assert not torch.isfinite(silu_gate_on_cpu(bad, bad)[0, 0, 32])
    assert silu_gate_on_cpu(-states.new_full((1, 40), 200.0), states.new_ones(1, 40)).abs().max() < 1e-30
    bad = torch.full((40,), float("nan"), dtype=torch.bfloat16)
    assert silu_gate_on_cpu(bad, bad).isnan().all()


@every_dtype
@pytest.mark.parametrize("rows", [1, 2])
def test_rotation(dtype, rows):
    for states in (normal(2, 5, 3, 12, dtype=dtype), normal(2, 3, 5, 12, dtype=dtype).transpose(1, 2)):
        cos, sin = normal(rows, 3, 12, dtype=dtype), normal(rows, 3, 12, dtype=dtype).flip(0)
        first, second = states.double().chunk(2, dim=-1)
        wanted = states.double() * cos.double()[:, None] + torch.cat([-second, first], -1) * sin.double()[:, None]
        assert_near(apply_rope_on_cpu(states, cos, sin), wanted)


@every_dtype
@pytest.mark.parametrize("threads", [1, 2, 3], indirect=True)
@pytest.mark.parametrize("num_keys", [1, 7, 64, 65, 700])
@pytest.mark.parametrize(("heads", "key_heads"), [(9, 3), (4, 4), (5, 1), (8, 1)])
def test_attention_of_few_queries(dtype, threads, num_keys, heads, key_heads):
    for rows, queries, width in ((1, 1, 64), (2, 1, 16), (2, 3, 48)):
        query = normal(rows, queries, heads, width, dtype=dtype).transpose(1, 2)
        # Keys are the first slots of a buffer, whose other slots hold what must not be read.
        keys, values = (normal(rows, key_heads, num_keys + 9, width, dtype=dtype) for _ in range(2))
        keys[:, :, num_keys:] = values[:, :, num_keys:] = float("nan")
        keys, values = 2 * keys[:, :, :num_keys], values[:, :, :num_keys].flip(3)
        values = values.flip(3).contiguous()
        seen = torch.rand(rows, 1, queries, num_keys, generator=torch.Generator().manual_seed(num_keys)) > 0.5
        seen[..., num_keys // 2] = True
        for mask in (None, seen, seen[:1]):
            if mask is None and queries > 1:
                assert attention_on_cpu(query, keys, values, None, 0.3) is None, "no mask may mean a causal one"
                continue
            wanted = F.scaled_dot_product_attention(
                query.double(), keys.double(), values.double(), attn_mask=mask, scale=0.3, enable_gqa=True
            )
            assert_near(attention_on_cpu(query, keys, values, mask, 0.3), wanted.transpose(1, 2))


def test_a_query_that_sees_nothing_gets_zeros():
    query, keys = normal(1, 2, 2, 16, dtype=torch.float32), normal(1, 2, 70, 16, dtype=torch.float32)
    mask = torch.zeros(1, 1, 2, 70, dtype=torch.bool)
    mask[:, :, 1] = True
    found = attention_on_cpu(query, keys, keys, mask, 0.3)
    assert found[:, 0].eq(0).all() and found[:, 1].ne(0).any()


@every_dtype
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize(("num_keys", "place"), [(1, 0), (7, 3), (70, 0), (70, 69), (300, 200)])
def test_a_key_that_is_not_a_number_shows_where_it_is_seen(dtype, threads, num_keys, place):
    """Its score counted as if the key was masked: the result was finite, and PyTorch's NaN."""
    query, keys = normal(1, 2, 1, 32, dtype=dtype), normal(1, 2, num_keys, 32, dtype=dtype)
    mask = torch.ones(1, 1, 1, num_keys, dtype=torch.bool)
    mask[..., : num_keys // 2] = place < num_keys // 2 or num_keys == 1
    # A single key whose score is -inf is one that is not seen.
    for poison in (float("nan"), float("inf"), -float("inf"))[: 1 if num_keys == 1 else 3]:
        bad = keys.clone()
        bad[0, 0, place, 5] = poison
        for chosen in (None, mask):
            scores = 0.3 * query.double() @ bad.double().mT
            scores = scores if chosen is None else scores.masked_fill(~chosen, -float("inf"))
            wanted = scores.softmax(-1) @ keys.double()
            found = attention_on_cpu(query, bad, keys, chosen, 0.3).transpose(1, 2)
            assert torch.equal(found.isnan(), wanted.isnan())
    hidden = torch.ones(1, 1, 1, num_keys, dtype=torch.bool)
    hidden[..., place] = False
    assert attention_on_cpu(query, bad, keys, hidden, 0.3).isfinite().all()


def packed_int4(outputs, width, group, dtype):
    codes = torch.randint(0, 16, (outputs, width), generator=torch.Generator().manual_seed(width), dtype=torch.int32)
    pairs = torch.rand(width // group, outputs, 2, generator=torch.Generator().manual_seed(outputs)).to(dtype)
    qdata = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
    packed = PackedWeight("int4", qdata, None, pairs, group, packed_rows(), has_halves=True)
    scale, zero = (part.double().t().repeat_interleave(group, dim=1) for part in pairs.unbind(-1))
    return packed, (codes.double() - 8) * scale + zero


@pytest.mark.skipif("torch.backends.cpu.get_cpu_capability() not in ('AVX2', 'AVX512')")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("threads", [1, 2], indirect=True)
@pytest.mark.parametrize("rows", [1, 2, 5, 40])
def test_products_with_int4_weights(dtype, scale_dtype, threads, rows):
    for outputs, width, group in ((64, 32, 32), (192, 128, 64), (576, 576, 32)):
        packed, weight = packed_int4(outputs, width, group, scale_dtype)
        states, bias = normal(rows, 1, width, dtype=dtype), normal(outputs, dtype=dtype)
        wanted = F.linear(states.double(), weight)
        assert_near(packed_linear_on_cpu(states, packed), wanted)
        assert_near(packed_linear_on_cpu(states, packed, bias), wanted + bias.double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("rows", [1, 2, 7])
def test_products_with_int8_weights(dtype, rows):
    for outputs, width in ((3, 5), (70, 33), (64, 576)):
        codes = torch.randint(-128, 128, (outputs, width), generator=torch.Generator().manual_seed(3)).to(torch.int8)
        packed = PackedWeight("int8", codes, scale=normal(outputs, dtype=torch.float32))
        states, bias = normal(rows, 1, width, dtype=dtype), normal(outputs, dtype=dtype)
        wanted = F.linear(states.double(), codes.double() * packed.scale.double()[:, None])
        assert_near(packed_linear_on_cpu(states, packed, bias), wanted + bias.double())


def test_what_kernels_cannot_do_is_left_to_pytorch():
    states, weight = normal(1, 1, 16, dtype=torch.float32), normal(16, 16, dtype=torch.float32)
    trained = weight.clone().requires_grad_()
    assert plain_linear_on_cpu(states, weight) is not None
    assert plain_linear_on_cpu(states, weight.double()) is None
    assert plain_linear_on_cpu(states.half(), weight.half()) is None
    assert (
        plain_linear_on_cpu(states, weight.t()) is None and plain_linear_on_cpu(states, weight, weight[:, 0]) is None
    )
    assert rms_norm_on_cpu(states, weight[:, 0], 1e-5) is None
    assert plain_linear_on_cpu(states.expand(17, 1, 16), weight) is None
    assert plain_linear_on_cpu(states, trained) is None
    with torch.no_grad():
        assert plain_linear_on_cpu(states, trained) is not None
    assert torch.func.vmap(lambda row: torch.tensor(plain_linear_on_cpu(row, weight) is None))(states).all()
    assert plain_linear_on_cpu(states.to("meta"), weight.to("meta")) is None
    assert attention_on_cpu(*[normal(1, 1, 1, 12)] * 3, None, 1.0) is None


def test_shapes_that_contradict_each_other_are_left_to_pytorch_which_says_so():
    states, weight = normal(2, 1, 16, dtype=torch.float32), normal(16, 16, dtype=torch.float32)
    assert plain_linear_on_cpu(states[..., :8], weight) is None
    assert packed_linear_on_cpu(states[..., :8], PackedWeight("int8", weight.to(torch.int8), scale=weight[0])) is None
    assert (
        scale_singular_values_on_cpu(states, weight[:8], weight[0]) is None
        and scale_singular_values_on_cpu(states, weight, weight[0, :8]) is None
    )
    assert scale_singular_values_on_cpu(states, weight, weight[:3, None]) is None
    assert rms_norm_on_cpu(states, weight[0, :8], 1e-5) is None and silu_gate_on_cpu(states, states[:1]) is None
    heads, angles = normal(2, 4, 1, 16, dtype=torch.float32), normal(1, 1, 16, dtype=torch.float32)
    assert (
        apply_rope_on_cpu(heads, angles[..., :8], angles[..., :8]) is None
        and apply_rope_on_cpu(heads, angles.repeat(3, 1, 1), angles) is None
    )
    keys, mask = normal(2, 2, 5, 16, dtype=torch.float32), torch.ones(2, 1, 1, 5, dtype=torch.bool)
    assert attention_on_cpu(heads, keys, keys, mask, 1.0) is not None
    assert attention_on_cpu(heads, keys[:1], keys[:1], mask, 1.0) is None
    assert attention_on_cpu(heads, keys, keys[:, :, :4], mask, 1.0) is None
    assert attention_on_cpu(heads, keys, keys, mask[..., :4], 1.0) is None
    assert attention_on_cpu(heads, keys, keys, mask.float(), 1.0) is None
    with pytest.raises(RuntimeError):
        expert_linear.apply_linear(nn.Linear(16, 8).requires_grad_(False), states[..., :8])


def test_autocast_decides_what_products_are_computed_in():
    module, states = nn.Linear(16, 8).requires_grad_(False), torch.randn(1, 1, 16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert expert_linear.apply_linear(module, states).dtype == torch.bfloat16


def test_hooks_and_wrappers_of_linear_modules_are_not_passed_by():
    module, states, calls = nn.Linear(16, 8).requires_grad_(False), torch.randn(1, 1, 16), []
    wanted = module(states)
    for_all = (register_module_forward_hook, register_module_forward_pre_hook)
    registrations = (module.register_forward_hook, module.register_forward_pre_hook, *for_all)
    for register in registrations:
        hook = register(lambda *_: calls.append("hook"))
        torch.testing.assert_close(expert_linear.apply_linear(module, states), wanted)
        hook.remove()
    forward = module.forward
    module.forward = lambda *args: (calls.append("forward"), forward(*args))[1]
    expert_linear.apply_linear(module, states)
    del module.forward
    parametrized = nn.utils.parametrizations.weight_norm(nn.Linear(16, 8).requires_grad_(False))
    torch.testing.assert_close(expert_linear.apply_linear(parametrized, states), parametrized(states))
    torch.testing.assert_close(expert_linear.apply_linear(module, states), wanted)
    assert calls == ["hook"] * len(registrations) + ["forward"]


@pytest.fixture
def called(monkeypatch):
    """How often each kernel is called."""
    found, kernel = Counter(), kernels.kernel_of

    def counted(name, *stored):
        function = kernel(name, *stored)
        return function and (lambda *args: (found.update([name]), function(*args)))

    for module in (kernels, stack):
        monkeypatch.setattr(module, "kernel_of", counted)
    return found


@torch.no_grad()
@pytest.mark.parametrize("storage", ["dense", "static"])
@pytest.mark.parametrize(
    ("pattern", "has_expert"),
    [("everything", False), ("llama", False), ("llama", True), ("paper", False), ("paper", True), ("mamba", False)],
)
def test_a_decoding_step_is_one_call(pattern, storage, has_expert, called):
    """The laws would hold without it; so it is asked here that it runs."""
    model, row = random_model(tiny_config(pattern, head_dim=16)), random_rows(1)[0]
    expert = random_expert(model, 1, rank=3) if has_expert else None
    cache = model.make_cache(storage, **({"max_cache_len": 40} if storage == "static" else {}))
    model(torch.tensor([row[:5]]), past_key_values=cache, expert_vector=expert)
    called.clear()
    model(torch.tensor([row[5:6]]), past_key_values=cache)
    head = {"rescale": 1, "linear": 1} if has_expert else {"linear": 1}
    assert called == {"run_program": 1, "rms_norm": 1, **head}


@pytest.mark.parametrize("pattern", ["everything", "llama", "paper"])
def test_what_the_layers_do_one_by_one_is_made_of_kernels(pattern, called, monkeypatch):
    monkeypatch.setattr(stack.DecodePrograms, "run", lambda *_: None)
    model, row = random_model(tiny_config(pattern, head_dim=16)), random_rows(1)[0]
    sizes, expert = [4] + [1] * (len(row) - 4), random_expert(model, 1, rank=3)
    found = feed_row(model, model.make_cache(), row, sizes, expert_vector=None)
    assert_same_logits(found, expected(model, [row])[0])
    feed_row(model, model.make_cache(), row, sizes, expert_vector=expert)
    has_mlp, has_rope = model.config.intermediate_size is not None, model.config.rope_parameters is not None
    may_run = {"gate": has_mlp, "rotate": has_rope}
    assert set(called) == {
        "linear",
        "rescale",
        "rms_norm",
        "attend",
        *(name for name, runs in may_run.items() if runs),
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("pattern", ["everything", "llama", "paper", "mamba", "jamba"])
def test_blocks_in_one_call_have_the_bits_of_their_parts(pattern, dtype, monkeypatch):
    """Rows of a forward that kernels do not take whole must go on from the states of one that they did."""
    model = random_model(tiny_config(pattern, head_dim=16)).to(dtype)
    per_row = [random_expert(model, 1, rank=3), None]
    row = torch.tensor([random_rows(1)[0], random_rows(2)[0]])
    ragged = torch.tensor([[1, 0, 1], [1, 1, 1]])

    def decode(expert=None):
        cache = model.make_cache()
        model(row[:, :4], past_key_values=cache, expert_vector=expert)
        logits = [model(row[:, i : i + 1], past_key_values=cache).logits for i in range(4, 7)]
        logits.append(model(row[:, 7:10], attention_mask=ragged, past_key_values=cache).logits)
        return torch.cat([*logits, model(row[:, 10:11], past_key_values=cache).logits], dim=1)

    with torch.no_grad():
        found = [decode(expert) for expert in (None, per_row[0], per_row)]
        monkeypatch.setattr(stack.DecodePrograms, "run", lambda *_: None)
        for expert, logits in zip((None, per_row[0], per_row), found, strict=True):
            assert torch.equal(logits, decode(expert))
        assert not torch.equal(found[0], found[1])


@torch.no_grad()
def test_whoever_wants_to_see_a_module_run_sees_it():
    for pattern, names in (
        ("llama", ("", "self_attn", "self_attn_layernorm", "mlp", "mlp.down_proj")),
        ("mamba", ("", "mamba", "mamba_layernorm", "mamba.conv1d", "mamba.x_proj")),
    ):
        model, ids, seen = random_model(tiny_config(pattern, head_dim=16)), torch.tensor([random_rows(1)[0]]), []
        cache, layer = model.make_cache(), model.model.layers[1]
        model(ids[:, :4], past_key_values=cache)
        modules = [layer.get_submodule(name) for name in names]
        for i, module in enumerate(modules):
            for register in (module.register_forward_hook, module.register_forward_pre_hook):
                hook = register(lambda module, *_, seen=seen: seen.append(module))
                model(ids[:, 4 + i : 5 + i], past_key_values=cache)
                hook.remove()
        assert seen == [module for module in modules for _ in range(2)]


CHANGES = {
    "scaling": ("llama", lambda layer: setattr(layer.self_attn, "scaling", 3.0)),
    "epsilon": ("llama", lambda layer: setattr(layer.mlp_layernorm, "variance_epsilon", 0.5)),
    "weight": ("llama", lambda layer: layer.self_attn.q_proj.weight.mul_(1.5)),
    "weight's data": ("llama", lambda layer: layer.self_attn.q_proj.weight.data.mul_(1.5)),
    "module": ("llama", lambda layer: setattr(layer.self_attn, "k_proj", nn.Linear(32, 32, bias=False).double())),
    "A": ("mamba", lambda layer: layer.mamba.A_log.add_(1.0)),
    "A's data": ("mamba", lambda layer: layer.mamba.A_log.data.add_(1.0)),
    "convolution's data": ("mamba", lambda layer: layer.mamba.conv1d.weight.data.mul_(2.0)),
    "inner epsilon": ("jamba", lambda layer: setattr(layer.mamba.dt_layernorm, "variance_epsilon", 0.5)),
}


@torch.no_grad()
@pytest.mark.parametrize("name", CHANGES)
def test_what_is_changed_between_two_steps_counts_at_once(name):
    pattern, change = CHANGES[name]
    model, ids = random_model(tiny_config(pattern, head_dim=16)), torch.tensor([random_rows(1)[0][:7]])
    cache = model.make_cache(on_expert_change="continue")
    for token in ids[:, :6].split(1, dim=1):
        model(token, past_key_values=cache)
    before = model(ids[:, 6:], past_key_values=cache.fork()).logits
    change(model.model.layers[0])
    with_kernels = model(ids[:, 6:], past_key_values=cache.fork()).logits
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(stack.DecodePrograms, "run", lambda *_: None)
        assert torch.equal(with_kernels, model(ids[:, 6:], past_key_values=cache).logits)
    assert not torch.equal(with_kernels, before)


@torch.no_grad()
def test_sessions_that_take_turns_lower_no_layers_again(monkeypatch):
    model, token = random_model(tiny_config("llama", head_dim=16)), torch.tensor([[3]])
    experts = [None, *(random_expert(model, seed, rank=3) for seed in (1, 2, 3))]
    built, build = [], stack.DecodeProgram.__init__
    monkeypatch.setattr(stack.DecodeProgram, "__init__", lambda *args: built.append(1) or build(*args))
    caches = [model.make_cache() for _ in experts]
    for _ in range(3):
        for cache, expert in zip(caches, experts, strict=True):
            model(token, past_key_values=cache, expert_vector=expert)
    assert len(built) == len(model.model._decode_programs.recent) == stack.MOST_PROGRAMS
    model.model.layers[0].mlp.up_proj.weight.mul_(2.0)
    model(token, past_key_values=model.make_cache())
    assert len(model.model._decode_programs.recent) == 1, "programs of earlier weights are dropped"


def test_threads_that_share_a_model_do_not_disturb_each_other():
    model = random_model(tiny_config("llama", head_dim=16))
    rows = [torch.tensor([row]) for row in (random_rows(1)[0], random_rows(2)[0])]

    def decode(row):
        with torch.no_grad():
            cache = model.make_cache()
            return torch.cat([model(token, past_key_values=cache).logits for token in row.split(1, dim=1)], dim=1)

    alone = [decode(row) for row in rows]
    with ThreadPoolExecutor(2) as pool:
        for _ in range(10):
            for found, wanted in zip(pool.map(decode, rows), alone, strict=True):
                assert torch.equal(found, wanted)
