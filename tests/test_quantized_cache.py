"""Law 13: keys and values as codes obey the other laws, judged by an oracle that rounds each token by itself."""

import random

import pytest
import torch

from mambaformer.cache_codes_mambaformer import BITS, VectorCodec
from mambaformer.cache_options_mambaformer import CacheOptions
from oracle import assert_same_logits, expected, read_on
from patterns import GREEDY
from reference import rounded
from sequences import feed, feed_row, one_turn, ragged_turns, random_rows, rows_of
from tiny_models import PATTERNS, shared_expert, shared_model, without_kernels_too

BYTE = {"keys": 8, "values": 8}
MIXED = {"keys": 6, "values": 4}
COARSE = {"keys": 3, "values": 5}
VARIANTS = {
    "byte": {"storage": "quantized"},
    "mixed": {"storage": "quantized", "kv_bits": MIXED},
    "static": {"storage": "static", "max_cache_len": 96, "kv_bits": COARSE},
}
ATTENDING = [pattern for pattern in PATTERNS if pattern != "mamba"]

every_pattern = pytest.mark.parametrize("pattern", ATTENDING)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def cache_of(model, variant, **options):
    return model.make_cache(**VARIANTS[variant], **options)


def fields_of(cache):
    return {"kv_bits": cache.options.kv_bits}


# ---- codes


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("size", [1, 2, 6, 7, 8, 12, 64, 80, 96, 128])
def test_codes_stand_for_what_the_oracle_rounds_to(size, bits):
    codec, vectors = VectorCodec(size, bits), 3 * torch.randn(5, size, dtype=torch.float64)
    codes = codec.encode(vectors)
    assert codes.shape == (5, codec.nbytes) and codes.dtype == torch.uint8
    wanted = torch.stack([rounded(vector, bits) for vector in vectors])
    torch.testing.assert_close(codec.decode(codes, torch.float64), wanted, rtol=0, atol=1e-12)


@pytest.mark.parametrize("bits", BITS)
def test_a_code_depends_on_no_other_vector_and_decodes_to_itself(bits):
    codec, vectors = VectorCodec(64, bits), torch.randn(3, 2, 9, 64)
    codes = codec.encode(vectors)
    alone = torch.stack([codec.encode(vector) for vector in vectors.flatten(0, 2)])
    assert torch.equal(codes.flatten(0, 2), alone)
    assert torch.equal(codec.encode(codec.decode(codes, torch.float64)), codes)


def test_zeros_stay_zeros_and_no_infinity_is_hidden():
    for bits in BITS:
        codec = VectorCodec(8, bits)
        assert torch.equal(codec.decode(codec.encode(torch.zeros(2, 8)), torch.float32), torch.zeros(2, 8))
        for wrong in (float("nan"), float("inf")):
            vector = torch.ones(8)
            vector[3] = wrong
            assert codec.decode(codec.encode(vector), torch.float32).isnan().all()


@pytest.mark.parametrize("bits, most", [(8, 0.006), (6, 0.026), (5, 0.05), (4, 0.1), (3, 0.22)])
def test_the_error_of_rounding_is_small_and_no_channel_spoils_the_others(bits, most):
    vectors = torch.randn(200, 64)
    vectors[:, 7] *= 50  # a channel as attention's keys have
    error = VectorCodec(64, bits).decode(VectorCodec(64, bits).encode(vectors), torch.float32) - vectors
    assert error.norm() / vectors.norm() < most


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
    assert loaded.options.kv_bits == cache.options.kv_bits and loaded.options.storage == cache.options.storage
    for found, wanted in zip(loaded.layers, cache.layers, strict=True):
        if wanted.attention is not None:
            assert torch.equal(found.keys, wanted.keys) and torch.equal(found.values, wanted.values)
    more = [one_turn(random_rows(7, (1, 1, 1))), one_turn(random_rows(8, (4, 4, 4)))]
    for found, wanted in zip(feed(model, loaded, more), feed(model, cache, more), strict=True):
        assert torch.equal(found, wanted)


def test_static_equals_dense_and_compiled_equals_eager():
    model, row = shared_model("everything"), rows_of("everything", 1, (14,))[0]
    dense, static, compiled = (model.make_cache(**options, kv_bits=MIXED) for options in (
        {"storage": "quantized"},
        {"storage": "static", "max_cache_len": 32},
        {"storage": "static", "max_cache_len": 32},
    ))  # fmt: skip
    step = torch.compile(model, backend="eager", fullgraph=True)
    results = []
    with torch.no_grad():
        for cache, run in ((dense, model), (static, model), (compiled, step)):
            model(torch.tensor([row[:10]]), cache=cache)
            results.append([run(torch.tensor([[token]]), cache=cache).logits for token in row[10:]])
    for one, two, three in zip(*results, strict=True):
        assert_same_logits(one, two)
        assert_same_logits(two, three)


@pytest.mark.parametrize("options", [{"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 5}])
def test_speculation_and_chunks_generate_what_plain_decoding_does(options):
    model = shared_model("everything")
    ids = torch.tensor([random_rows(3, (8,))[0] * 3])
    common = {"cache_implementation": "quantized", "cache_config": {"nbits": 4}, "max_new_tokens": 10, **GREEDY}
    assert torch.equal(model.generate(ids, **common, **options), model.generate(ids, **common))


# ---- sizes and refusals


def test_bytes_are_those_of_the_codes():
    model, rows = shared_model("full"), torch.tensor(random_rows(1, (64,)))
    plain, byte = model.make_cache(), model.make_cache("quantized")
    with torch.no_grad():
        model(rows, cache=plain)
        model(rows, cache=byte)
    head_dim = model.config.head_dim
    wanted = VectorCodec(head_dim, 8).nbytes / (8 * head_dim)
    kinds = {name: byte.report()["full_attention"][name] / plain.report()["full_attention"][name] for name in BYTE}
    assert kinds == pytest.approx(dict.fromkeys(BYTE, wanted))


def test_the_view_of_the_hand_out_has_keys_and_values_as_attention_sees_them():
    model, row = shared_model("full"), rows_of("full", 1, (9,))[0]
    cache, plain = model.make_cache("quantized"), model.make_cache()
    feed_row(model, cache, row)
    feed_row(model, plain, row)
    found, exact = (each.to_dict()["layers"]["layer_0"]["attn_kv_cache"] for each in (cache, plain))
    for name in ("keys", "values"):
        assert found[name].shape == exact[name].shape and found[name].dtype == exact[name].dtype
        assert 0 < (found[name] - exact[name]).norm() / exact[name].norm() < 0.01


@pytest.mark.parametrize("kv_bits", [0, 2, 7, 16, 8.0, True, "8", {"keys": 8}, {"keys": 8, "values": 1}, [8, 4]])
def test_bits_that_no_grid_has_are_refused(kv_bits):
    with pytest.raises(ValueError, match="bits"):
        shared_model("full").make_cache("quantized", kv_bits=kv_bits)


def test_generate_refuses_options_of_other_backends():
    model, ids = shared_model("full"), torch.tensor([[1, 2, 3]])
    with pytest.raises(ValueError, match="nbits"):
        config = {"nbits": 4, "backend": "hqq"}
        model.generate(ids, cache_implementation="quantized", cache_config=config, max_new_tokens=2, **GREEDY)
    with pytest.raises(TypeError, match="`cache_config` must be a dict"):
        model.generate(ids, cache_implementation="quantized", cache_config="int4", max_new_tokens=2, **GREEDY)


def test_a_forward_with_gradients_is_refused_and_changes_nothing():
    model, ids = shared_model("everything"), torch.tensor([[1, 2, 3, 4]])
    cache = model.make_cache("quantized")
    with pytest.raises(ValueError, match="no gradient"):
        model(ids, cache=cache)
    assert cache.get_seq_length() == 0
    found = feed_row(model, cache, ids[0].tolist())
    assert_same_logits(found, expected(model, ids.tolist(), kv_bits=BYTE)[0])


def test_sessions_of_before_quantized_storage_are_read(tmp_path, monkeypatch):
    model, row = shared_model("everything"), rows_of("everything", 1, (9,))[0]
    cache = model.make_cache()
    feed_row(model, cache, row)
    of_today = CacheOptions.to_dict
    names = {"storage", "max_cache_len", "on_expert_change", "rollback_reach"}
    monkeypatch.setattr(
        CacheOptions, "to_dict", lambda *args: {k: v for k, v in of_today(*args).items() if k in names}
    )
    cache.save(tmp_path / "session")
    assert model.load_cache(tmp_path / "session").options == cache.options
