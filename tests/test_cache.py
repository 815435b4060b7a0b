"""The cache as users meet it: the hand-out's example and view, its accounts, its options, and what it refuses."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DynamicCache

from mambaformer import ExpertVector, MambaFormerCache
from mambaformer.cache_buffers_mambaformer import Buffer
from mambaformer.cache_history_mambaformer import CacheLengths, NewTokens, TokenHistory
from mambaformer.cache_retention_mambaformer import Retention, Span, make_layout
from oracle import assert_same_logits, uncached_logits
from patterns import CACHE_VARIANTS, GREEDY, VOCAB, tiny_config
from sequences import feed_row, random_ids, random_rows
from tiny_models import every_cache, new_cache, random_expert, random_model, shared_expert, shared_model

# ---------------------------------------------------------------------------------------------- the cache hand-out


def test_the_usage_example_of_the_cache_hand_out_runs_as_it_is_written():
    model = shared_model("paper")
    expert_vector = shared_expert("paper", 1)
    tokens = torch.tensor(random_rows(0)[:1])
    initial_tokens, next_token = tokens[:, :-1], tokens[:, -1:]

    # Process initial prompt
    outputs = model(input_ids=initial_tokens, use_cache=True, expert_vector=expert_vector, return_dict=True)
    past_key_values = outputs["past_key_values"]

    # Process next token incrementally
    outputs = model(
        input_ids=next_token,
        use_cache=True,
        expert_vector=expert_vector,
        past_key_values=past_key_values,
        return_dict=True,
    )
    past_key_values = outputs["past_key_values"]

    whole = model(tokens, expert_vector=expert_vector, use_cache=False).logits
    assert_same_logits(outputs["logits"][:, -1], whole[:, -1])
    assert past_key_values.get_seq_length() == tokens.shape[1]
    assert past_key_values.expert_vector == expert_vector


def test_to_dict_is_the_nested_view_of_the_cache_hand_out():
    model = shared_model("paper")
    cache = model(torch.tensor(random_rows(0)[:1])).past_key_values
    layers = cache.to_dict()["layers"]
    assert list(layers) == ["initial_mamba", "layer_0", "layer_1"]
    config, length = model.config, cache.get_seq_length()
    assert layers["initial_mamba"]["attn_kv_cache"] is None
    assert all(layer["cache_length"] == length for layer in layers.values())
    channels = config.mamba_intermediate_size
    assert layers["layer_0"]["mamba_cache"]["conv"].shape == (1, config.mamba_d_conv - 1, channels)
    assert layers["layer_0"]["mamba_cache"]["ssm"].shape == (1, channels, config.mamba_d_state)
    keys = layers["layer_1"]["attn_kv_cache"]["keys"]
    assert keys.shape == (1, config.num_key_value_heads, length, config.head_dim)


def test_a_decoding_step_without_full_attention_costs_the_same_at_any_length():
    """Section "Performance" of the hand-out: O(1) a token. Counted in bytes held, not in seconds."""
    model = shared_model("hybrid_sliding")
    cache, sizes = model.make_cache(), []
    for _ in range(8):
        model(torch.randint(0, VOCAB, (1, 16)), past_key_values=cache)
        sizes.append(sum(cache.report()["hybrid_sliding"].values()))
    assert len(set(sizes)) == 1


# ------------------------------------------------------------------------------------------------------- accounting


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
def test_nbytes_is_the_sum_of_all_tensors_the_cache_holds(variant):
    model = shared_model("everything")
    cache = model.make_cache(**CACHE_VARIANTS[variant])
    assert cache.nbytes == 0
    model(torch.tensor(random_rows(0)[:1]), past_key_values=cache)
    held = [buffer.tensor for buffer in cache.history.buffers().values() if buffer.tensor is not None]
    for layer in cache.layers:
        held += layer.recurrent.states.values() if layer.recurrent else []
        held += [layer.attention.keys.tensor, layer.attention.values.tensor] if layer.attention else []
    assert cache.nbytes == sum(tensor.nbytes for tensor in held) > 0
    assert set(cache.report()) == {*model.config.layer_types, "tokens", "slack", "shared"}


def test_a_report_says_which_bytes_are_spare_and_which_are_shared():
    model = shared_model("everything")
    cache = model.make_cache()
    ids = torch.tensor(random_rows(0)[:1])
    with torch.no_grad():
        model(ids, past_key_values=cache)
        report = cache.report()
        full = [layer.attention for layer in cache.layers if layer.attention and not layer.is_sliding]
        assert all(store.keys.tensor.shape[2] == ids.shape[1] + 64 for store in full)
        assert report["slack"]["keys"] == 64 * sum(store.keys.tensor[0, :, 0].nbytes for store in full)
        assert report["shared"] == {}
        fork = cache.fork()
        kinds = ("keys", "values", "conv", "ssm")
        every = {kind: sum(report[name].get(kind, 0) for name in model.config.layer_types) for kind in kinds}
        assert cache.report()["shared"] == fork.report()["shared"] == every
        model(ids[:, :1], past_key_values=fork)
        assert fork.report()["shared"] == {}
    held = {*model.config.layer_types, "tokens"}
    assert fork.nbytes == cache.nbytes == sum(sum(report[name].values()) for name in held)


def test_a_report_says_what_a_policy_has_evicted():
    model = shared_model("full")
    pruned, plain = model.make_cache(policy="key_norm", budget=0.5), model.make_cache()
    with torch.no_grad():
        for cache in (pruned, plain):
            model(torch.tensor(random_rows(1, (300,))), past_key_values=cache)
    report, per_key = pruned.report(), plain.layers[0].attention.keys.tensor[:, :, 0].nbytes
    stored = [layer.attention.visible()["keys"].shape[2] for layer in pruned.layers]
    assert max(stored) < 200
    assert report["evicted"]["keys"] == report["evicted"]["values"] == sum((300 - size) * per_key for size in stored)
    assert pruned.nbytes == sum(sum(report[part].values()) for part in ("full_attention", "tokens"))


def test_the_slack_of_static_storage_shrinks_with_the_sequence():
    model, found = shared_model("full"), []
    cache = model.make_cache("static", max_cache_len=32)
    for _ in range(2):
        feed_row(model, cache, random_rows(1, (8,))[0])
        report = cache.report()
        found.append(report["slack"]["keys"] / report["full_attention"]["keys"])
    assert found == [24 / 32, 16 / 32]


@torch.no_grad()
def test_appending_a_token_to_a_dense_cache_rarely_copies_it():
    buffer, addresses = Buffer(dim=1), set()
    for n in range(2000):
        new = torch.full((1, 1), n)
        buffer.reserve(new, n + 1)
        buffer.write(n, new)
        addresses.add(buffer.tensor.data_ptr())
    assert buffer.view(2000).flatten().tolist() == list(range(2000))
    assert len(addresses) < 40


def test_storage_is_hardly_larger_than_its_keys():
    """A buffer had a quarter more slots than its keys; a full ring, which never grows, had 64 slots too many."""
    one, buffer = torch.zeros(1, 2, 1, 4), Buffer(dim=2)
    buffer.reserve(one, 8192)
    assert buffer.tensor.shape[2] <= 1.01 * 8192
    for size in range(8193, 16384, 61):
        buffer.reserve(one, size)
        assert buffer.tensor.shape[2] <= 1.05 * size
    model = shared_model("sliding_sinks")
    cache = model.make_cache()
    feed_row(model, cache, random_rows(1, (12,))[0], [9, 1, 2])
    window, sinks = model.config.sliding_window, model.config.num_sink_tokens
    assert [layer.attention.keys.tensor.shape[2] for layer in cache.layers] == [window + sinks] * 2


@pytest.mark.parametrize("window, sinks", [(1, 0), (4, 0), (4, 2), (3, 5)])
def test_every_slot_of_a_ring_holds_the_newest_position_that_lives_there(window, sinks):
    retention = Retention(window, sinks)
    for count in range(20):
        slots = [-1] * (window + sinks)
        for position in range(count):
            slots[retention.slot(position)] = position
        assert retention.positions(torch.tensor([count]), window + sinks)[0].tolist() == slots
        visible = retention.is_visible(torch.tensor(count - 1), torch.arange(count))
        expected = [count - 1 - p < window or p < sinks for p in range(count)]
        assert visible.tolist() == expected
        assert {p for p, seen in enumerate(expected) if seen} <= set(slots) | {-1}


def test_layouts_that_need_no_mask_have_none():
    device = torch.device("cpu")
    for retention in (Retention(), Retention(8), Retention(8, 2)):
        assert make_layout(retention, Span(6), device).key_positions is None
        assert make_layout(retention, Span(1, start=40, columns=40), device).key_positions is None
        assert make_layout(retention, Span(2, start=40, columns=40), device).key_positions is not None
    assert make_layout(Retention(8), Span(9), device).key_positions is not None


# ------------------------------------------------------------------------------------------------------ taking back


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
@pytest.mark.parametrize("pattern", ["mamba", "full", "sliding_sinks", "hybrid_sliding", "everything"])
def test_crop_then_replay_equals_never_fed(pattern, variant):
    model = shared_model(pattern)
    ids = torch.tensor(random_rows(3, lengths=(14, 14)))
    mask = torch.ones_like(ids)
    mask[0, :3] = mask[1, 8] = mask[1, 12:] = 0
    cache = model.make_cache(**CACHE_VARIANTS[variant])
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache)
        cache.crop(-5)
        assert cache.get_seq_length() == 9
        again = model(ids[:, 9:], attention_mask=mask, past_key_values=cache).logits
        whole = model(ids, attention_mask=mask, use_cache=False).logits[:, 9:]
    assert_same_logits(again[mask[:, 9:].bool()], whole[mask[:, 9:].bool()])


def test_a_crop_that_cannot_be_exact_raises_and_changes_nothing():
    model, expert = shared_model("paper"), shared_expert("paper", 1)
    ids = torch.tensor(random_rows(3)[:1])
    cache = model.make_cache(on_expert_change="continue")
    model(ids, past_key_values=cache)
    logits = model(ids[:, :2], past_key_values=cache.fork(), expert_vector=expert).logits
    cache.set_expert_vector(expert)
    for steps, message in ((3, "-k"), (-ids.shape[1] - 1, "at most"), (-2, "several expert vectors")):
        with pytest.raises(ValueError, match=message):
            cache.crop(steps)
    assert cache.get_seq_length() == ids.shape[1]
    assert_same_logits(model(ids[:, :2], past_key_values=cache).logits, logits)


def test_changed_weights_are_never_used_silently():
    model = random_model(tiny_config("everything"))
    ids = torch.tensor(random_rows(3)[:1])
    caches = {policy: model.make_cache(on_expert_change=policy) for policy in ("recompute", "error", "reset")}
    for cache in caches.values():
        model(ids, past_key_values=cache)
    with torch.no_grad():
        model.model.layers[0].mamba.in_proj.weight.mul_(1.5)
    whole = model(torch.cat([ids, ids[:, :2]], dim=1), use_cache=False).logits
    assert_same_logits(model(ids[:, :2], past_key_values=caches["recompute"]).logits, whole[:, -2:])
    with pytest.raises(ValueError, match="weights changed"):
        model(ids[:, :2], past_key_values=caches["error"])
    assert_same_logits(model(ids, past_key_values=caches["reset"]).logits, whole[:, : ids.shape[1]])
    model.load_state_dict(model.state_dict())
    assert_same_logits(
        model(ids[:, :1], past_key_values=caches["recompute"]).logits[:, -1], whole_after(model, ids)[:, -1]
    )


def whole_after(model, ids):
    return model(torch.cat([ids, ids[:, :2], ids[:, :1]], dim=1), use_cache=False).logits


# -------------------------------------------------------------------------------------------------- what it refuses


def snapshot(cache):
    """All that a cache holds, bit for bit."""
    copies = [
        value.clone() for layer in cache.layers for store in layer.stores.values() for value in store.state().values()
    ]
    return copies, cache.token_ids.clone(), cache.get_seq_length(), cache.expert_vector, cache.status == "stale"


def bad_calls(model, ids):
    """Forwards that must be refused, by a word of the message."""
    expert = random_expert(model, 1)
    name = next(iter(expert.vectors))
    too_long = {name: torch.zeros(1 + min(model.get_submodule(name).weight.shape))}
    spectrum = {"spectrum": {name: [1e6, 1e5, 1e4, 1e3]}}
    next_ids, one = ids[:, :2], torch.ones
    return {
        "singular values": {"input_ids": next_ids, "expert_vector": too_long},
        "modules that this model does not have": {"input_ids": next_ids, "expert_vector": {"model.x": 2 * one(3)}},
        "(?i)nan|finite": {"input_ids": next_ids, "expert_vector": {name: torch.tensor([float("nan")])}},
        "no expert vector named": {"input_ids": next_ids, "expert_vector": "nobody"},
        "other weights": {"input_ids": next_ids, "expert_vector": ExpertVector(expert.vectors, metadata=spectrum)},
        "takes None, a name": {"input_ids": next_ids, "expert_vector": 3.5},
        "entries": {"input_ids": next_ids, "expert_vector": [expert, None, None]},
        "`attention_mask` is": {"input_ids": next_ids, "attention_mask": one(2, 5)},
        "2-D": {"input_ids": next_ids, "attention_mask": one(2, 1, 2, 2)},
        "marks other cached tokens": {"input_ids": next_ids, "attention_mask": one(2, ids.shape[1] + 2)},
        "2 rows|3 rows": {"input_ids": ids[:1].expand(3, -1)},
        "exactly one of": {"input_ids": next_ids, "inputs_embeds": one(2, 2, 32).double()},
        "inputs_embeds` must": {"inputs_embeds": one(2, 2, 31).double()},
        "`input_ids` must": {"input_ids": one(2, 2)},
        "at least one row and one token": {"input_ids": next_ids[:, :0]},
        "`position_ids` must": {"input_ids": next_ids, "position_ids": one(2, 3)},
        "would need": {"input_ids": torch.zeros(2, 90, dtype=torch.long)},
        "vocabulary has 0 to": {"input_ids": next_ids + VOCAB},
    }


def test_bad_input_gets_a_clear_error_and_leaves_cache_and_model_as_they_were():
    model = random_model(tiny_config("everything"))
    ids = torch.tensor(random_rows(3, lengths=(8, 8)))
    mask = torch.ones_like(ids)
    mask[1, :2] = 0
    cache = model.make_cache("static", max_cache_len=40)
    with torch.no_grad():
        model(ids, attention_mask=mask, past_key_values=cache, expert_vector=[random_expert(model, 5), None])
        expected = model(ids[:, :3], past_key_values=cache.fork()).logits
        for message, arguments in bad_calls(model, ids).items():
            before = snapshot(cache)
            with pytest.raises((ValueError, TypeError), match=message):
                model(past_key_values=cache, **arguments)
            after = snapshot(cache)
            assert all(torch.equal(a, b) for a, b in zip(before[0], after[0], strict=True)), message
            assert torch.equal(before[1], after[1]) and before[2:] == after[2:], message
        assert torch.equal(model(ids[:, :3], past_key_values=cache).logits, expected)


def test_caches_of_other_models_and_other_libraries_are_refused():
    model, other = shared_model("everything"), shared_model("paper")
    ids = torch.tensor(random_rows(3)[:1])
    cache = other(ids).past_key_values
    with pytest.raises(ValueError, match="another configuration"):
        model(ids, past_key_values=cache)
    for foreign in (DynamicCache(), ((ids, ids),)):  # tuples, as caches once were, had no method that was asked first
        with pytest.raises(TypeError, match="make_cache"):
            model(ids, past_key_values=foreign)
        with pytest.raises(TypeError, match="make_cache"):
            model.generate(ids, past_key_values=foreign, max_new_tokens=2)
    whole = other(torch.cat([ids, ids[:, :1]], dim=1)).logits
    assert_same_logits(other(ids[:, :1], past_key_values=cache).logits[:, -1], whole[:, -1])


@pytest.mark.parametrize(
    "options, message",
    [
        ({"storage": "paged"}, "storage"),
        ({"storage": "static"}, "max_cache_len"),
        ({"max_cache_len": 5}, "max_cache_len"),
        ({"storage": "static", "max_cache_len": 0}, "`max_cache_len` must be an integer of at least 1"),
        ({"on_expert_change": "ignore"}, "on_expert_change"),
    ],
)
def test_options_of_a_cache_are_checked(options, message):
    with pytest.raises(ValueError, match=message):
        shared_model("paper").make_cache(**options)


def test_a_cache_without_a_model_takes_no_expert():
    with pytest.raises(ValueError, match="make_cache"):
        MambaFormerCache(tiny_config("paper")).set_expert_vector("king")


def test_merging_is_refused_twice_and_undone_bit_for_bit():
    model, expert = random_model(tiny_config("paper")), random_expert(random_model(tiny_config("paper")), 1)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with pytest.raises(ValueError, match="nothing to undo"):
        model.unmerge_expert_vector()
    with pytest.raises(TypeError, match="one expert"):
        model.merge_expert_vector([expert, None])
    model.merge_expert_vector(expert)
    with pytest.raises(ValueError, match="merged already"):
        model.merge_expert_vector(expert)
    with pytest.raises(ValueError, match="unmerge_expert_vector"):
        model(torch.tensor([[1]]), expert_vector=expert)
    with pytest.raises(ValueError, match="tied"):
        model.save_pretrained("never-written")
    model.unmerge_expert_vector()
    assert model.lm_head.weight is model.model.embed_tokens.weight
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class OpRecorder(TorchDispatchMode):
    """Lists every operation with the sizes of what it makes; views make nothing."""

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.found.append((str(func), tuple(result.shape)))
        return result


@pytest.mark.parametrize("pattern", ["mamba", "full", "sliding_sinks", "hybrid_sliding", "everything"])
def test_a_decoding_step_does_the_same_work_at_any_length(pattern):
    """No copy, mask or bookkeeping grows with the text: what reads all keys is the attention operation alone."""
    model, found = shared_model(pattern), []
    with torch.no_grad():
        for length in (130, 700):
            cache = model.make_cache()
            model(torch.randint(0, VOCAB, (1, length)), past_key_values=cache)
            model(torch.tensor([[1]]), past_key_values=cache)
            with OpRecorder() as recorder:
                model(torch.tensor([[1]]), past_key_values=cache)
            attention_free = [(op, shape) for op, shape in recorder.found if "attention" not in op]
            found.append(attention_free)
    assert found[0] == found[1]


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
def test_forks_that_went_apart_are_each_encoded_again_from_their_own_text(variant):
    model, expert = shared_model("everything"), shared_expert("everything", 1)
    ids = torch.tensor(random_rows(3, lengths=(12, 12)))
    origin = model.make_cache(**CACHE_VARIANTS[variant])
    with torch.no_grad():
        model(ids[:1, :5], past_key_values=origin)
        fork = origin.fork()
        for row, cache in ((0, origin), (1, fork)):
            model(ids[row : row + 1, 5:9], past_key_values=cache)
        for row, cache in ((0, origin), (1, fork)):
            text = torch.cat([ids[:1, :5], ids[row : row + 1, 5:]], dim=1)
            found = model(text[:, 9:], past_key_values=cache, expert_vector=expert).logits
            assert_same_logits(found, model(text, expert_vector=expert, use_cache=False).logits[:, 9:])
            assert torch.equal(cache.token_ids, text)


@pytest.mark.parametrize(("vocab_size", "width"), [(61, 2), (65534, 2), (65535, 4), (200_000, 4)])
@pytest.mark.parametrize("fixed_size", [None, 40])
def test_tokens_are_remembered_in_few_bytes_and_given_back_as_they_were(vocab_size, width, fixed_size):
    config = tiny_config("mamba", vocab_size=vocab_size)
    history, ids = TokenHistory(config, fixed_size), torch.randint(0, vocab_size, (2, 30))
    ids[0, :4] = torch.tensor([-1, 0, vocab_size - 1, vocab_size // 2])
    for start in range(0, 30, 10):
        history.append(CacheLengths(start), NewTokens(ids[:, start : start + 10]))
    fork = history.fork()
    fork.append(CacheLengths(30), NewTokens(ids[:, :1]))
    assert torch.equal(history.token_ids.view(30), ids) and torch.equal(fork.token_ids.view(31)[:, 30], ids[:, 0])
    assert history.token_ids.tensor.element_size() == width


def test_tokens_survive_a_vocabulary_that_grows():
    config = tiny_config("mamba")
    history, ids = TokenHistory(config), torch.tensor([[-1, 60, 0]])
    history.append(CacheLengths(0), NewTokens(ids))
    config.vocab_size = 100_000
    history.append(CacheLengths(3), NewTokens(ids + 90_000))
    assert history.token_ids.view(6).tolist() == [[-1, 60, 0, 89_999, 90_060, 90_000]]


@every_cache
def test_a_cache_filled_in_inference_mode_continues_outside_of_it(variant):
    """Tensors of inference mode cannot be written outside of it: every variant crashed."""
    model, ids = shared_model("everything"), random_ids()
    cache = new_cache(model, variant)
    with torch.inference_mode():
        model(ids[:, :4], past_key_values=cache)
    with torch.no_grad():
        one = model(ids[:, 4:5], past_key_values=cache).logits
    rest = model(ids[:, 5:], past_key_values=cache).logits
    assert_same_logits(torch.cat([one, rest], dim=1), uncached_logits(model, ids)[:, 4:])
    answer = model.generate(torch.cat([ids, ids[:, :1]], dim=1), past_key_values=cache, max_new_tokens=3, **GREEDY)
    expected = model.generate(torch.cat([ids, ids[:, :1]], dim=1), max_new_tokens=3, **GREEDY)
    assert answer.tolist() == expected.tolist()


def test_methods_of_the_librarys_cache_are_answered_or_refused_by_name():
    """Its sizes and a layer's own `crop` failed with errors about attributes."""
    model, ids = shared_model("everything"), random_ids()
    cache = model.make_cache("static", max_cache_len=20)
    with torch.no_grad():
        model(ids, past_key_values=cache)
    assert (cache.max_batch_size, cache.max_cache_len, cache.get_max_cache_shape()) == (1, 20, 20)
    cache.batch_select_indices(torch.tensor([True]))
    for refused in (lambda: cache.layers[1].crop(-1), lambda: cache.layers[0].offload()):
        with pytest.raises(NotImplementedError):
            refused()
