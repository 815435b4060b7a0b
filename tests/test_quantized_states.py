"""Law 13: recurrent states in 8 bits obey the other laws, judged by an oracle that rounds after each token."""

import random

import pytest
import torch

import gated_linear_attention  # noqa: F401  (adds a recurrent mixer)
from mambaformer import ops_state_codes_mambaformer as reference
from mambaformer.cache_options_mambaformer import CacheOptions
from mambaformer.ops_mambaformer import rounded_scan, selective_scan
from mambaformer.ops_state_codes_mambaformer import decode_states, encode_states, round_states
from oracle import assert_same_logits, expected, read_on
from patterns import GREEDY
from reference import rounded_state
from sequences import feed, feed_row, one_turn, ragged_turns, random_rows, rows_of
from tiny_models import PATTERNS, shared_expert, shared_model, without_kernels_too

VARIANTS = {
    "states": {},
    "all": {"storage": "quantized", "kv_bits": 4},
    "static": {"storage": "static", "max_cache_len": 96},
}
RECURRENT = [pattern for pattern in PATTERNS if pattern not in ("full", "sliding", "sliding_sinks", "llama")]

every_pattern = pytest.mark.parametrize("pattern", RECURRENT)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def cache_of(model, variant, **options):
    return model.make_cache(**VARIANTS[variant], state_bits=8, **options)


def fields_of(cache):
    return {"kv_bits": cache.options.kv_bits, "state_bits": cache.options.state_bits}


# ---- codes


@without_kernels_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numbers", [1, 3, 4, 8, 16, 17, 40])
def test_states_are_rounded_as_the_oracle_rounds_them(numbers, dtype):
    states = torch.randn(3, 5, numbers, dtype=torch.float64) * 10.0 ** torch.linspace(-9, 9, 5)[:, None]
    states[1, 2] = 0
    states = states.to(dtype)
    positions = torch.tensor([0, 7, 123_456_789_012])
    found = round_states(states, positions)
    wanted = [
        rounded_state(each, position) for each, position in zip(states.double(), positions.tolist(), strict=True)
    ]
    assert found.dtype is dtype and torch.equal(found.double(), torch.stack(wanted))


@without_kernels_too
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_rounded_state_is_its_own_rounding_and_exact_as_codes(dtype):
    states = torch.randn(2, 40, 16, dtype=dtype) * torch.logspace(-30, 30, 40, dtype=dtype)[:, None]
    rounded = round_states(states, torch.tensor([3, 4]))
    assert torch.equal(round_states(rounded, torch.tensor([9, 0])), rounded)
    codes = encode_states(rounded)
    assert codes.shape == (2, 40, 17) and codes.dtype is torch.int8
    assert torch.equal(decode_states(codes, dtype), rounded)
    steps = 2.0 ** codes[..., -1:].to(dtype)
    assert ((rounded - states).abs() < steps).all() and (steps <= states.abs().amax(-1, keepdim=True) / 63).all()


@without_kernels_too
def test_no_infinity_is_hidden_and_the_tiniest_states_are_zero_or_a_step():
    for wrong in (float("nan"), float("inf"), -float("inf"), 3.4e38):
        states = torch.ones(1, 2, 16)
        states[0, 1, 3] = wrong
        rounded = round_states(states, torch.tensor([0]))
        assert rounded[0, 0].eq(1).all() and decode_states(encode_states(rounded), torch.float32)[0, 1].isnan().all()
        assert decode_states(encode_states(states), torch.float32)[0, 1].isnan().all()
    tiny = round_states(torch.full((1, 1, 16), 1e-38), torch.tensor([0]))
    assert set(tiny.flatten().tolist()) <= {0.0, 2.0**-126}
    assert torch.equal(decode_states(encode_states(tiny), torch.float32), tiny)


def test_rounding_is_unbiased_over_positions_where_nearest_stalls():
    states = torch.full((20_000, 1, 16), 0.3)
    states[..., 0] = 127
    mean = round_states(states, torch.arange(20_000))[..., 1:].mean(0)
    assert torch.allclose(mean, torch.tensor(0.3), atol=0.015)  # the spread of the mean is 0.0032
    assert decode_states(encode_states(states), torch.float32)[..., 1:].eq(0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("numbers", [4, 16, 24])
def test_the_scan_rounds_after_each_token_however_it_is_cut(numbers, dtype):
    torch.manual_seed(0)
    rows, length, channels = 3, 70, 21
    u, dt, gate = (torch.randn(rows, length, channels, dtype=dtype) for _ in range(3))
    B, C = (torch.randn(rows, length, numbers, dtype=dtype) for _ in range(2))
    A, D = torch.randn(channels, numbers), torch.randn(channels)
    positions = torch.tensor([0, 5, 1000])[:, None] + torch.arange(length)
    lengths = torch.tensor([70, 33, 0])
    state = round_states(torch.randn(rows, channels, numbers, dtype=torch.float64).to(D.dtype), positions[:, 0])
    options = {"dt_softplus": True, "A_is_log": True}
    y, last = rounded_scan(u, dt, A, B, C, D, gate, state, lengths, positions=positions, **options)
    found, now = [], state
    for token in range(length):
        one = slice(token, token + 1)
        inputs = u[:, one], dt[:, one], A, B[:, one], C[:, one], D, gate[:, one]
        step, now = selective_scan(*inputs, now, (lengths - token).clamp(0, 1), **options)
        now = round_states(now, positions[:, token])
        found.append(step)
    close = {"rtol": 0, "atol": 1e-10 if dtype is torch.float64 else 0.05}
    torch.testing.assert_close(torch.cat(found, 1), y, **close)
    if dtype is torch.float64:
        torch.testing.assert_close(now, last, **close)
    cut = [rounded_scan(u[:, a:b], dt[:, a:b], A, B[:, a:b], C[:, a:b], D, gate[:, a:b], state if a == 0 else None,
                        positions=positions[:, a:b], **options) for a, b in ((0, 40),)]  # fmt: skip
    rest = rounded_scan(u[:, 40:], dt[:, 40:], A, B[:, 40:], C[:, 40:], D, gate[:, 40:], cut[0][1],
                        positions=positions[:, 40:], **options)  # fmt: skip
    whole = rounded_scan(u, dt, A, B, C, D, gate, state, positions=positions, **options)
    assert torch.equal(torch.cat([cut[0][0], rest[0]], 1), whole[0]) and torch.equal(rest[1], whole[1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("numbers", [1, 5, 16, 33])
def test_kernels_have_the_bits_of_the_reference(numbers, dtype):
    states = torch.randn(3, 40, numbers, dtype=dtype) * torch.logspace(-44, 37, 40, dtype=dtype)[:, None]
    states[1, 7], states[2, 8] = torch.inf, 0
    positions = torch.tensor([3, 2**40 + 5, 0])
    rounded = round_states(states, positions)
    torch.testing.assert_close(rounded, reference.round_reference(states, positions), rtol=0, atol=0, equal_nan=True)
    for each in (states, rounded):
        codes = encode_states(each)
        assert torch.equal(codes, reference.encode_reference(each))
        found, wanted = decode_states(codes, dtype), reference.decode_reference(codes, dtype)
        torch.testing.assert_close(found, wanted, rtol=0, atol=0, equal_nan=True)


def test_the_kernel_of_the_scan_is_used_and_equals_the_reference(monkeypatch):
    torch.manual_seed(0)
    u, dt, gate = (torch.randn(2, 70, 37, dtype=torch.float64) for _ in range(3))
    B, C = (torch.randn(2, 70, 16, dtype=torch.float64) for _ in range(2))
    A, D, positions = torch.randn(37, 16), torch.randn(37), torch.arange(70).expand(2, -1) + torch.tensor([[4], [0]])
    arguments = (u, dt, A, B, C, D, gate, None, torch.tensor([70, 12]), True, True, positions)
    wanted = reference.scan_rounded(*arguments)
    monkeypatch.setattr(reference, "scan", None)
    for found, each in zip(rounded_scan(*arguments), wanted, strict=True):
        torch.testing.assert_close(found, each, rtol=0, atol=1e-10)


# ---- laws


@without_kernels_too
@every_pattern
@every_variant
def test_any_split_equals_the_oracle(pattern, variant):
    model, row = shared_model(pattern), rows_of(pattern, 1, (20,))[0]
    for sizes in ([20], [1, 12, 1, 1, 5], [7, 1, 1, 11]):
        cache = cache_of(model, variant)
        found = feed_row(model, cache, row, sizes)
        assert_same_logits(found, expected(model, [row], **fields_of(cache))[0])


@without_kernels_too
@every_pattern
@every_variant
def test_padding_anywhere_in_any_turn_equals_the_oracle(pattern, variant):
    model, rows = shared_model(pattern), rows_of(pattern, 2)
    for seed in range(2):
        cache = cache_of(model, variant)
        found = feed(model, cache, ragged_turns(random.Random(seed), rows, 3))
        assert_same_logits(found, expected(model, rows, **fields_of(cache)))


@without_kernels_too
@every_pattern
@every_variant
@pytest.mark.parametrize("reach", [0, 4])
def test_a_rollback_is_as_if_the_tokens_had_never_been_fed(pattern, variant, reach):
    model, rows = shared_model(pattern), rows_of(pattern, 3, (11, 11))
    cache = cache_of(model, variant, rollback_reach=reach)
    feed(model, cache, [one_turn(rows)])
    feed(model, cache, [one_turn(random_rows(9, (1, 1))) for _ in range(3)])
    cache.crop(-3)
    read_on(model, cache, rows, cache_fields=fields_of(cache))


@every_variant
def test_rows_that_lose_different_numbers_of_tokens_keep_their_positions(variant):
    model, rows = shared_model("everything"), rows_of("everything", 3, (9, 12))
    cache = cache_of(model, variant, rollback_reach=8)
    feed(model, cache, ragged_turns(random.Random(3), rows, 2))
    feed(model, cache, [one_turn(random_rows(9, (5, 5)))])
    cache.crop([-5, -2])
    kept = [rows[0], rows[1] + random_rows(9, (5, 5))[1][:3]]
    read_on(model, cache, kept, cache_fields=fields_of(cache))


@every_variant
def test_rows_that_change_places_and_forks_are_the_rows_themselves(variant):
    model, rows = shared_model("everything"), rows_of("everything", 4)
    cache = cache_of(model, variant)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    fork = cache.fork()
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    read_on(model, cache, [rows[2], rows[0], rows[0]], cache_fields=fields_of(cache))
    read_on(model, fork, rows, cache_fields=fields_of(cache))


@every_variant
def test_a_change_of_expert_vector_encodes_the_sequence_again(variant):
    model, rows, expert = shared_model("everything"), rows_of("everything", 5), shared_expert("everything", 1)
    cache = cache_of(model, variant)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    cache.set_expert_vector(expert)
    read_on(model, cache, rows, [expert] * 3, cache_fields=fields_of(cache))


@every_pattern
@every_variant
def test_a_session_continues_bit_for_bit(pattern, variant, tmp_path):
    model, rows = shared_model(pattern), rows_of(pattern, 6)
    cache = cache_of(model, variant)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    cache.save(tmp_path / "session")
    loaded = model.load_cache(tmp_path / "session")
    assert loaded.options == cache.options
    for found, wanted in zip(loaded.layers, cache.layers, strict=True):
        if wanted.recurrent is not None:
            read, kept = found.recurrent.visible(), wanted.recurrent.visible()
            assert read.keys() == kept.keys() and all(torch.equal(read[name], kept[name]) for name in kept)
            assert found.recurrent.state().get("ssm", torch.zeros(1, dtype=torch.int8)).dtype is torch.int8
    more = [one_turn(random_rows(7, (1, 1, 1))), one_turn(random_rows(8, (4, 4, 4)))]
    for found, wanted in zip(feed(model, loaded, more), feed(model, cache, more), strict=True):
        assert torch.equal(found, wanted)


@pytest.mark.slow
def test_static_equals_dense_and_compiled_equals_eager():
    model, row = shared_model("everything"), rows_of("everything", 1, (14,))[0]
    caches = [cache_of(model, variant) for variant in ("states", "static", "static")]
    step = torch.compile(model, backend="eager", fullgraph=True)
    results = []
    with torch.no_grad():
        for cache, run in zip(caches, (model, model, step), strict=True):
            model(torch.tensor([row[:10]]), cache=cache)
            addresses = [tensor.data_ptr() for tensor in cache.buffers().values()]
            results.append([run(torch.tensor([[token]]), cache=cache).logits for token in row[10:]])
            if cache.max_columns:
                assert [tensor.data_ptr() for tensor in cache.buffers().values()] == addresses
    for one, two, three in zip(*results, strict=True):
        assert_same_logits(one, two)
        assert_same_logits(two, three)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 5}, {"num_beams": 2}])
def test_generation_equals_the_greedy_oracle_of_its_own_cache(options):
    model = shared_model("everything")
    ids = torch.tensor([random_rows(3, (8,))[0] * 3])
    common = {"max_new_tokens": 10, **GREEDY}
    plain = model.generate(ids, cache=model.make_cache(state_bits=8), **common)
    found = model.generate(ids, cache=model.make_cache(state_bits=8), **common, **options)
    assert "num_beams" in options or torch.equal(found, plain)


# ---- sizes and refusals


def test_bytes_are_those_of_the_codes():
    model, rows = shared_model("mamba"), torch.tensor(random_rows(1, (16,)))
    plain, byte = model.make_cache(), model.make_cache(state_bits=8)
    with torch.no_grad():
        model(rows, cache=plain)
        model(rows, cache=byte)
    numbers = model.config.mamba_d_state
    kinds = [cache.report()["linear_attention"] for cache in (plain, byte)]
    assert kinds[1]["ssm"] / kinds[0]["ssm"] == pytest.approx((numbers + 1) / (8 * numbers))
    assert kinds[1]["conv"] == kinds[0]["conv"]


def test_checkpoints_for_rollback_are_codes_too():
    model, rows = shared_model("mamba"), torch.tensor(random_rows(1, (16,)))
    cache = model.make_cache(state_bits=8, rollback_reach=4)
    with torch.no_grad():
        model(rows, cache=cache)
        model(rows[:, :2], cache=cache)
    segments = [segment for layer in cache.layers for segment in layer.recurrent.segments]
    checkpoints = [segment.initial_states["ssm"] for segment in segments if segment.initial_states]
    assert checkpoints and all(checkpoint.dtype is torch.int8 for checkpoint in checkpoints)


def test_the_view_of_the_hand_out_has_decoded_states():
    model, row = shared_model("mamba"), rows_of("mamba", 1, (9,))[0]
    cache, plain = model.make_cache(state_bits=8), model.make_cache()
    feed_row(model, cache, row)
    feed_row(model, plain, row)
    found, exact = (each.to_dict()["layers"]["initial_mamba"]["mamba_cache"]["ssm"] for each in (cache, plain))
    assert found.shape == exact.shape and found.dtype == exact.dtype
    assert 0 < (found - exact).norm() / exact.norm() < 0.05


@pytest.mark.parametrize("state_bits", [0, 4, 16, 8.0, True, "8", {"ssm": 8}])
def test_other_bits_are_refused(state_bits):
    with pytest.raises(ValueError, match="state_bits"):
        shared_model("mamba").make_cache(state_bits=state_bits)


def test_a_model_without_recurrent_layers_is_refused():
    with pytest.raises(ValueError, match="no layer of this model"):
        shared_model("full").make_cache(state_bits=8)


def test_a_forward_with_gradients_is_refused_and_changes_nothing():
    model, ids = shared_model("mamba"), torch.tensor([[1, 2, 3, 4]])
    cache = model.make_cache(state_bits=8)
    with pytest.raises(ValueError, match="no gradient"):
        model(ids, cache=cache)
    assert cache.get_seq_length() == 0
    found = feed_row(model, cache, ids[0].tolist())
    assert_same_logits(found, expected(model, ids.tolist(), state_bits=8)[0])


def test_sessions_of_before_quantized_states_are_read(tmp_path, monkeypatch):
    model, row = shared_model("everything"), rows_of("everything", 1, (9,))[0]
    cache = model.make_cache()
    feed_row(model, cache, row)
    of_today = CacheOptions.to_dict
    monkeypatch.setattr(
        CacheOptions, "to_dict", lambda *args: {k: v for k, v in of_today(*args).items() if k != "state_bits"}
    )
    cache.save(tmp_path / "session")
    assert model.load_cache(tmp_path / "session").options == cache.options
