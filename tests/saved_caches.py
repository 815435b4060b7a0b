"""Caches that sessions are made of, each in a state of its own, and how they continue."""

import contextlib
import json

import pytest
import torch
from safetensors.torch import load

from mambaformer.files_mambaformer import digest_of
from patterns import CACHE_VARIANTS, PATTERNS
from sequences import rows_for
from tiny_models import TRAINED_SMALL, new_model, random_expert

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16}
SPREAD = ["mamba", "llama", "everything"]  # patterns that go through every scenario


def some_ids(model, seed, rows=3, columns=6):
    return torch.tensor(rows_for(model, seed, lengths=(columns,) * rows))


def some_mask(seed, rows=3, columns=6):
    """Pads anywhere, one row of nothing else, one without."""
    mask = torch.rand(rows, columns, generator=torch.Generator().manual_seed(seed)) > 0.4
    mask[0], mask[1] = False, True
    return mask.long()


def experts_of(model):
    """Two experts for some of the modules; the second has fewer scales."""
    names = [name for name, module in model.named_modules() if isinstance(module, torch.nn.Linear)]
    chosen = [name for name in names if name != "lm_head"][::3]
    return random_expert(model, 1, modules=chosen, name="a"), random_expert(model, 2, rank=4, modules=chosen)


def plain(model, options):
    cache = model.make_cache(**options)
    model(some_ids(model, 1), past_key_values=cache)
    model(some_ids(model, 2, columns=1), past_key_values=cache)
    return cache


def padded(model, options):
    cache = model.make_cache(**options)
    for seed in (1, 2):
        model(some_ids(model, seed), attention_mask=some_mask(seed), past_key_values=cache)
    return cache


def one_expert(model, options):
    cache = model.make_cache(**options)
    model(some_ids(model, 1), past_key_values=cache, expert_vector=experts_of(model)[0])
    return cache


def expert_per_row(model, options):
    cache, (a, b) = model.make_cache(**options), experts_of(model)
    model(some_ids(model, 1), attention_mask=some_mask(1), past_key_values=cache, expert_vector=[a, None, b])
    cache.reorder_cache(torch.tensor([2, 0, 2]))
    return cache


def forked(model, options):
    origin = plain(model, options)
    fork = origin.fork()
    model(some_ids(model, 3, columns=2), past_key_values=origin)
    model(some_ids(model, 4, columns=2), past_key_values=fork)
    return fork


def repeated(model, options):
    cache = model.make_cache(**options)
    model(some_ids(model, 1, rows=2), past_key_values=cache)
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0, 1]))
    return cache


def cropped(model, options):
    cache = padded(model, options)
    cache.crop(-4)
    return cache


def cropped_and_fed(model, options):
    cache = cropped(model, options)
    model(some_ids(model, 5, columns=2), past_key_values=cache)
    return cache


def empty(model, options):
    return model.make_cache(**options)


def empty_with_experts(model, options):
    cache, (a, b) = model.make_cache(**options), experts_of(model)
    cache.set_expert_vector([a, b, None])
    return cache


def emptied(model, options):
    cache = one_expert(model, options)
    cache.reset()
    return cache


@torch.inference_mode()
def made_in_inference_mode(model, options):
    return padded(model, options)


def with_a_graph(model, options):
    with torch.enable_grad():
        return plain(model, options)


@torch.autocast("cpu", torch.bfloat16)
def under_autocast(model, options):
    return padded(model, options)


def waiting_to_be_encoded_again(model, options):
    cache = padded(model, options)
    cache.set_expert_vector(experts_of(model)[1])
    return cache


def mixed(model, options):
    cache, (a, b) = model.make_cache(**options, on_expert_change="continue"), experts_of(model)
    for seed, expert in ((1, a), (2, b)):
        model(some_ids(model, seed), past_key_values=cache, expert_vector=expert)
    return cache


def about_to_mix(model, options):
    cache = model.make_cache(**options, on_expert_change="continue")
    model(some_ids(model, 1), past_key_values=cache)
    cache.set_expert_vector(experts_of(model)[0])
    return cache


def under_reset(model, options):
    cache = model.make_cache(**options, on_expert_change="reset")
    model(some_ids(model, 1), past_key_values=cache, expert_vector=experts_of(model)[0])
    return cache


def under_error(model, options):
    cache = model.make_cache(**options, on_expert_change="error")
    model(some_ids(model, 1), past_key_values=cache, expert_vector=experts_of(model)[0])
    return cache


def with_embeddings(model, options):
    cache = plain(model, options)
    embeds = torch.randn(3, 4, model.config.hidden_size, generator=torch.Generator().manual_seed(3))
    model(inputs_embeds=embeds.to(model.dtype), past_key_values=cache)
    return cache


def with_own_positions(model, options):
    cache = padded(model, options)
    model(some_ids(model, 5), position_ids=torch.arange(20, 26)[None].expand(3, -1), past_key_values=cache)
    return cache


def merged(model, options):
    return padded(model, options)  # under `conditions`


def with_changed_weights(model, options):
    cache = padded(model, options)
    with torch.no_grad():
        model.base_model.norm.weight.mul_(1)  # the values are the same, but nobody can know
    return cache


def mixing_with_changed_weights(model, options):
    cache = mixed(model, options)
    with torch.no_grad():
        model.base_model.norm.weight.mul_(1)
    return cache


SCENARIOS = {
    make.__name__: make
    for make in (
        plain,
        padded,
        one_expert,
        expert_per_row,
        forked,
        repeated,
        cropped,
        cropped_and_fed,
        empty,
        empty_with_experts,
        emptied,
        made_in_inference_mode,
        with_a_graph,
        under_autocast,
        waiting_to_be_encoded_again,
        mixed,
        about_to_mix,
        under_reset,
        under_error,
        with_embeddings,
        with_own_positions,
        merged,
        with_changed_weights,
        mixing_with_changed_weights,
    )
}
every_scenario = pytest.mark.parametrize("scenario", SCENARIOS)


@contextlib.contextmanager
def conditions(model, scenario):
    """What the model is like while the cache of a scenario lives."""
    if scenario != "merged":
        yield
        return
    model.merge_expert_vector(experts_of(model)[0])
    try:
        yield
    finally:
        model.unmerge_expert_vector()


@torch.no_grad()
def made(model, scenario, variant):
    return SCENARIOS[scenario](model, CACHE_VARIANTS[variant])


@torch.no_grad()
def go_on(model, cache):
    """The logits of turns behind the text, and those under another expert or an empty tensor where it is refused."""
    found = [
        model(some_ids(model, 11, columns=3), attention_mask=some_mask(12, columns=3), past_key_values=cache).logits
    ]
    found.append(model(some_ids(model, 13, columns=1), past_key_values=cache).logits)
    try:
        fork = cache.fork()
        fork.crop(-2)
        fork.set_expert_vector(experts_of(model)[1] if cache.expert_vector is None else None)
        found.append(model(some_ids(model, 14, columns=2), past_key_values=fork).logits)
    except ValueError:
        found.append(torch.empty(0))
    found.append(model(some_ids(model, 15, columns=1), past_key_values=cache).logits)
    return found


def model_of(pattern, dtype):
    return new_model(pattern).to(DTYPES[dtype])


def combinations():
    """(pattern, dtype, variant, scenario) in an order that needs each model once."""
    for pattern in [*PATTERNS, *TRAINED_SMALL]:
        for dtype in ["float64"] if pattern in TRAINED_SMALL else DTYPES:
            whole = pattern in SPREAD and dtype == "float64"
            for variant in CACHE_VARIANTS:
                for scenario in SCENARIOS if whole else ("expert_per_row", "cropped_and_fed"):
                    yield pattern, dtype, variant, scenario


def in_turn(action):
    """Calls `action(model, name, variant, scenario)` for every combination."""
    model = known = None
    for pattern, dtype, variant, scenario in combinations():
        if known != (pattern, dtype):
            model, known = model_of(pattern, dtype), (pattern, dtype)
        with conditions(model, scenario):
            action(model, f"{pattern}-{dtype}-{variant}-{scenario}", variant, scenario)


def contents_of(path):
    """Tensors and header of a file, read at once, as it may be replaced meanwhile."""
    data = path.read_bytes()
    header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
    return load(data), header["__metadata__"]


def content_of(path):
    """All that a file says, comparable: safetensors shuffles the fields of a header."""
    tensors, header = contents_of(path)
    return header, digest_of(tensors)


def equal(found, wanted):
    return len(found) == len(wanted) and all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
