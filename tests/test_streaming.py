"""Streaming without end: sinks at positions within the cache, and exact angles at any count of tokens."""

import random
from collections import Counter

import pytest
import torch

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM
from mambaformer import decode_program_mambaformer as decode_program
from mambaformer import ops_cpu_decode_mambaformer as ops_cpu_decode
from mambaformer import ops_cpu_interface_mambaformer as interface
from oracle import assert_same_logits, expected, read_on, uncached_logits
from patterns import GREEDY, tiny_config
from sequences import feed, feed_row, one_turn, padded_turn, ragged_turns, random_cut, random_rows, rows_for
from tiny_models import random_expert, random_model, without_kernels_too

MIXED = {"keys": 6, "values": 4}
VARIANTS = {
    "dense": {},
    "static": {"storage": "static", "max_cache_len": 96},
    "quantized": {"storage": "quantized", "kv_bits": MIXED},
}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
WINDOWS = {
    "sliding": {"num_sink_tokens": 2},
    "sliding_sinks": {"rope_parameters": ROPE},
    "hybrid_sliding": {},
    "another_mixer": {"rope_parameters": ROPE, "num_sink_tokens": 3},
    "everything": {},
}
every_window = pytest.mark.parametrize("pattern", WINDOWS)
every_variant = pytest.mark.parametrize("variant", VARIANTS)
_models = {}


def streaming_model(pattern, **fields):
    """A model whose sinks move, of its own weights for each pattern; never change them."""
    key = pattern, str(fields)
    if key not in _models:
        config = tiny_config(pattern, **{**WINDOWS[pattern], "window_positions": "relative", **fields})
        _models[key] = random_model(config, loudness=1.2)
    return _models[key]


def rows_of(pattern, seed, lengths):
    return rows_for(streaming_model(pattern), seed, lengths)


def cache_of(model, variant, **options):
    return model.make_cache(**VARIANTS[variant], **options)


def fields_of(cache):
    return {} if cache.options.kv_bits is None else {"kv_bits": cache.options.kv_bits}


# ---- laws


@every_window
def test_positions_within_the_cache_matter(pattern):
    """The oracle's logits differ from those of absolute positions from the first limited distance on."""
    relative, absolute = streaming_model(pattern), streaming_model(pattern, window_positions="absolute")
    row, size = rows_of(pattern, 1, (18,))[0], relative.config.sliding_window + relative.config.num_sink_tokens
    difference = (expected(relative, [row])[0] - expected(absolute, [row])[0]).abs().amax(1)
    assert difference[:size].max() < 1e-12 and difference[size:].min() > 1e-3


@without_kernels_too
@every_window
def test_a_forward_without_cache_equals_the_oracle(pattern):
    model, rows = streaming_model(pattern), rows_of(pattern, 1, (18, 5, 9))
    for side in ("left", "right", "any"):
        turn = padded_turn(random.Random(5), rows, extra=2, side=side)
        assert_same_logits(feed(model, None, [turn], use_cache=False), expected(model, rows))


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["eager", "sdpa"])
def test_every_implementation_and_blocks_of_queries_equal_the_oracle(implementation):
    model = random_model(tiny_config("everything", window_positions="relative"), loudness=1.0)
    model.config._attn_implementation = implementation
    row = random_rows(3, (150,))[0]
    wanted = expected(model, [row])[0]
    assert_same_logits(uncached_logits(model, torch.tensor([row]))[0], wanted)
    assert_same_logits(feed_row(model, model.make_cache(), row, [3, 146, 1]), wanted)


@without_kernels_too
@every_window
@every_variant
def test_any_split_equals_the_oracle(pattern, variant):
    model, row, rng = streaming_model(pattern), rows_of(pattern, 1, (20,))[0], random.Random(7)
    for sizes in ([20], [1] * 20, [7, 1, 1, 11], random_cut(rng, 20)):
        cache = cache_of(model, variant)
        found = feed_row(model, cache, row, sizes)
        assert_same_logits(found, expected(model, [row], **fields_of(cache))[0])


@without_kernels_too
@every_window
@every_variant
def test_padding_anywhere_in_any_turn_equals_the_oracle(pattern, variant):
    model, rows = streaming_model(pattern), rows_of(pattern, 2, (17, 6, 11))
    for seed in range(3):
        cache = cache_of(model, variant)
        found = feed(model, cache, ragged_turns(random.Random(seed), rows, 4))
        assert_same_logits(found, expected(model, rows, **fields_of(cache)))


@torch.no_grad()
@every_window
@every_variant
@pytest.mark.parametrize("reach", [0, 4])
def test_decode_programs_move_sinks(pattern, variant, reach, monkeypatch):
    """Layers whose sinks move ran as modules between the parts of a program; heads of 12 numbers still do."""
    model, rows = streaming_model(pattern, head_dim=16), rows_of(pattern, 2, (23, 18, 20))
    cache = cache_of(model, variant, rollback_reach=reach)
    found = [feed(model, cache, ragged_turns(random.Random(1), [row[:-7] for row in rows], 2))]
    called, kernel = Counter(), interface.kernel_of

    def counted(name, *stored):
        called[name] += 1
        return kernel(name, *stored)

    for module in (ops_cpu_decode, decode_program):
        monkeypatch.setattr(module, "kernel_of", counted)
    found.append(feed(model, cache, [one_turn([[row[i]] for row in rows]) for i in range(-7, -3)]))
    assert called["run_program"] == 4 and "attend" not in called
    found.append(feed(model, cache, [padded_turn(random.Random(2), [row[-3:] for row in rows], extra=1)]))
    logits = [torch.cat(parts) for parts in zip(*found, strict=True)]
    assert_same_logits(logits, expected(model, rows, **fields_of(cache)))


@every_window
@every_variant
@pytest.mark.parametrize("reach", [0, 4])
def test_a_rollback_is_as_if_the_tokens_had_never_been_fed(pattern, variant, reach):
    model = streaming_model(pattern)
    for length in (4, 8, 16):  # before, around and after the largest distance
        rows = rows_of(pattern, 3, (length, length))
        cache = cache_of(model, variant, rollback_reach=reach)
        feed(model, cache, [one_turn(rows)])
        feed(model, cache, [one_turn(random_rows(9, (1, 1))) for _ in range(3)])
        cache.crop(-3)
        read_on(model, cache, rows, cache_fields=fields_of(cache))


@every_window
@every_variant
def test_rows_that_change_places_and_forks_are_the_rows_themselves(pattern, variant):
    model, rows = streaming_model(pattern), rows_of(pattern, 4, (15, 4, 9))
    cache = cache_of(model, variant)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    fork = cache.fork()
    cache.batch_select_indices(torch.tensor([2, 0, 0]))
    read_on(model, cache, [rows[2], rows[0], rows[0]], cache_fields=fields_of(cache))
    read_on(model, fork, rows, cache_fields=fields_of(cache))


@every_window
@every_variant
def test_a_change_of_expert_vector_encodes_the_sequence_again(pattern, variant):
    model, rows = streaming_model(pattern), rows_of(pattern, 5, (15, 4, 9))
    cache, expert = cache_of(model, variant), random_expert(model, 1)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    cache.set_expert_vector(expert)
    read_on(model, cache, rows, [expert] * 3, cache_fields=fields_of(cache))


@every_window
@every_variant
def test_a_session_continues_bit_for_bit(pattern, variant, tmp_path):
    model, rows = streaming_model(pattern), rows_of(pattern, 6, (15, 4, 9))
    cache = cache_of(model, variant)
    feed(model, cache, ragged_turns(random.Random(0), rows, 2))
    cache.save(tmp_path / "session")
    loaded = model.load_cache(tmp_path / "session")
    more = [one_turn(random_rows(7, (1, 1, 1))), one_turn(random_rows(8, (4, 4, 4)))]
    for found, wanted in zip(feed(model, loaded, more), feed(model, cache, more), strict=True):
        assert torch.equal(found, wanted)


def test_a_cache_or_session_of_other_positions_is_refused(tmp_path):
    relative, absolute = (streaming_model("everything", window_positions=kind) for kind in ("relative", "absolute"))
    row = rows_of("everything", 1, (9,))[0]
    cache = absolute.make_cache()
    feed_row(absolute, cache, row)
    with pytest.raises(ValueError, match="another configuration"):
        feed_row(relative, cache, row)
    cache.save(tmp_path / "session")
    with pytest.raises(ValueError, match="`window_positions` is 'relative', not 'absolute'"):
        relative.load_cache(tmp_path / "session")


@pytest.mark.slow
def test_static_equals_dense_and_compiled_equals_eager():
    model, row = streaming_model("everything"), rows_of("everything", 1, (20,))[0]
    dense, static, compiled = (model.make_cache(**VARIANTS[name]) for name in ("dense", "static", "static"))
    step = torch.compile(model, backend="eager", fullgraph=True)
    results = []
    with torch.no_grad():
        for cache, run in ((dense, model), (static, model), (compiled, step)):
            model(torch.tensor([row[:4]]), cache=cache)
            results.append([run(torch.tensor([[token]]), cache=cache).logits[0, 0] for token in row[4:]])
    wanted = expected(model, [row])[0][4:]
    for found in results:
        assert_same_logits(torch.stack(found), wanted)


@pytest.mark.parametrize(
    "options", [{"prompt_lookup_num_tokens": 4}, {"prefill_chunk_size": 5}, {"num_beams": 3}, {"use_cache": False}]
)
def test_generation_equals_plain_decoding(options):
    model = streaming_model("everything")
    ids = torch.tensor([random_rows(3, (8,))[0] * 3])
    plain = {"num_beams": options.get("num_beams", 1), "use_cache": "num_beams" not in options}
    common = {"max_new_tokens": 10, **GREEDY}
    assert torch.equal(model.generate(ids, **common, **options), model.generate(ids, **common, **plain))


def test_packed_sequences_have_the_logits_that_they_have_alone():
    model, rows = streaming_model("everything"), rows_of("everything", 2, (12, 3, 18))
    positions = torch.cat([torch.arange(len(row)) for row in rows])[None]
    found = uncached_logits(model, torch.tensor([[*rows[0], *rows[1], *rows[2]]]), position_ids=positions)[0]
    assert_same_logits(list(found.split([len(row) for row in rows])), expected(model, rows))


def test_yarn_scales_sinks_once():
    """One query turned the sinks by cosines that YaRN had scaled already."""
    yarn = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}
    model = random_model(tiny_config("sliding", num_sink_tokens=2, window_positions="relative", rope_parameters=yarn))
    row = random_rows(1, (16,))[0]
    single = uncached_logits(model, torch.tensor([row]))[0]
    assert_same_logits(feed_row(model, model.make_cache(), row, [1] * 16), single)


def test_chosen_positions_count_for_windows_and_distances_to_sinks_stay_limited():
    """Positions that are all 7 later change nothing; later turns count on by the number of tokens."""
    model, row = streaming_model("sliding"), rows_of("sliding", 1, (18,))[0]
    chosen = torch.arange(len(row))[None] + 7
    assert_same_logits(uncached_logits(model, torch.tensor([row]), position_ids=chosen)[0], expected(model, [row])[0])


def test_gradients_reach_queries_and_keys_of_sinks():
    model = random_model(tiny_config("sliding", num_sink_tokens=2, window_positions="relative"), loudness=1.0)
    row = random_rows(1, (12,))[0]
    logits = model(torch.tensor([row]), use_cache=False).logits
    logits[0, -1, 0].backward()
    assert model.model.embed_tokens.weight.grad[row[0]].abs().max() > 0
    weight = model.model.layers[0].self_attn.q_proj.weight
    with torch.no_grad():
        changed = weight[3, 4].item()
        values = []
        for step in (1e-5, -1e-5):
            weight[3, 4] = changed + step
            values.append(uncached_logits(model, torch.tensor([row]))[0, -1, 0].item())
        weight[3, 4] = changed
    assert (values[0] - values[1]) / 2e-5 == pytest.approx(weight.grad[3, 4].item(), rel=1e-5)


# ---- precision


@pytest.mark.parametrize("offset", [100_000, 4_000_000])
def test_angles_stay_exact_after_millions_of_tokens(offset):
    """Angles in float32 moved these logits by 4.6% behind a million tokens."""
    model = MambaFormerForCausalLM(tiny_config("everything", window_positions="relative")).eval()
    model.load_state_dict(streaming_model("everything").state_dict())
    ids = torch.tensor([rows_of("everything", 1, (20,))[0]])
    near = uncached_logits(model, ids)
    far = uncached_logits(model, ids, position_ids=torch.arange(20)[None] + offset)
    assert (far - near).abs().max() <= 1e-5 * near.abs().max()


def test_a_position_beyond_float32_has_an_angle_of_its_own():
    rotary = streaming_model("everything").model.rotary_emb
    positions = torch.tensor([[2**24, 2**24 + 1]])
    cos, sin = rotary(torch.zeros(1, dtype=torch.float32), positions)
    angles = positions.double()[0, :, None] * rotary.inverse_frequencies(positions.device, torch.float32)[0].double()
    torch.testing.assert_close(cos[0, :, : angles.shape[1]], angles.cos().float(), rtol=0, atol=1e-7)
    torch.testing.assert_close(sin[0, :, : angles.shape[1]], angles.sin().float(), rtol=0, atol=1e-7)


# ---- refusals


@pytest.mark.parametrize("kind", ["nearest", None, 1, True])
def test_other_positions_are_refused(kind):
    with pytest.raises(ValueError, match="`window_positions` must be 'absolute' or 'relative'"):
        MambaFormerConfig(window_positions=kind)


def test_a_configuration_of_before_has_absolute_positions(tmp_path):
    config = tiny_config("everything", window_positions="relative")
    config.save_pretrained(tmp_path)
    assert MambaFormerConfig.from_pretrained(tmp_path).window_positions == "relative"
    fields = config.to_dict()
    del fields["window_positions"]
    assert MambaFormerConfig(**fields).window_positions == "absolute"
