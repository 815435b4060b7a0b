"""Random models through all paths that reach the CPU kernels; `sanitize.py` runs them with every access checked.

The last logits are compared with those of a forward without a cache, so the kernels demonstrably computed something.
"""

import copy
import os
import random

import pytest
import torch
from torch import nn
from torchao.prototype.quantization.int4 import PrototypeInt4WeightOnlyConfig
from torchao.quantization import Int8WeightOnlyConfig, quantize_

from mambaformer import MambaFormerConfig
from mambaformer import ops_cpu_build_mambaformer as compiler
from mambaformer.cache_codes_mambaformer import BITS
from mambaformer.weights_quantized_mambaformer import is_quantized
from tiny_models import random_expert, random_model
from world import VOCAB, random_fields

NUM_MODELS = int(os.environ.get("SANITIZED_MODELS", 300))
BATCH = 5  # models a test
# Codes are rounded twice where kernels and PyTorch lie on two sides of a tie.
TOLERANCE_OF_CODES = {torch.float64: 1e-9, torch.float32: 0.3, torch.bfloat16: 1.0}
TOLERANCE = {torch.float64: 1e-9, torch.float32: 1e-3, torch.bfloat16: 0.5}
FEATURES = ("static", "rollback", "padding", "experts", "an expert per row", "int4", "int8", "training", "generation",
            "codes")  # fmt: skip


def fields_of(rng):
    """Like the state machine's, with sizes around the widths of vectors and of groups of quantized weights."""
    fields = random_fields(rng)
    fields |= {"hidden_size": rng.choice([8, 12, 16, 32, 64, 72]), "head_dim": rng.choice([2, 6, 8, 16, 32, 48])}
    fields |= {"intermediate_size": rng.choice([None, 10, 64, 100]), "mamba_d_state": rng.randint(1, 20)}
    return fields | {"mamba_d_conv": rng.randint(1, 6), "sliding_window": rng.randint(1, 9)}


def is_linear(module):
    return isinstance(module, nn.Linear)


def takes_int4(module, name):
    return is_linear(module) and module.out_features % 16 == 0 and module.in_features % 32 == 0


def takes_int8(module, name):
    """torchao cannot quantize a weight of one column."""
    return is_linear(module) and module.in_features > 1 and not is_quantized(module.weight)


def quantized(rng, model, used):
    if rng.random() < 0.6:
        quantize_(model, PrototypeInt4WeightOnlyConfig(group_size=32), takes_int4)
        used["int4"] |= any(is_quantized(weight) for weight in model.parameters())
    quantize_(model, Int8WeightOnlyConfig(), takes_int8)
    used["int8"] |= any(type(weight).__name__ == "Int8Tensor" for weight in model.parameters())
    return model


def ids_of(rng, rows, width):
    return torch.tensor([[rng.randrange(VOCAB) for _ in range(width)] for _ in range(rows)], dtype=torch.long)


def padded_mask(rng, rows, width):
    """Keeps at least one token of each row."""
    mask = torch.tensor([[rng.random() < 0.7 for _ in range(width)] for _ in range(rows)])
    mask[:, rng.randrange(width)] = True
    return mask.long()


def drawn_expert(rng, rows, experts, used):
    """One for all rows, or one for each."""
    expert = rng.choice([None, *experts, [rng.choice([None, *experts]) for _ in range(rows)]])
    used["experts"] |= expert is not None
    used["an expert per row"] |= isinstance(expert, list)
    return expert


@torch.no_grad()
def chat(rng, model, experts, used):
    """Turns of any width in one cache, with padding, rollback, forks and changes of the expert now and then.

    Returns the last token's logits, and those of the whole sequence in one forward: without a cache, or in a new one
    that keeps the same codes.
    """
    rows = rng.choice([1, 1, 2, 3])
    used["static"] = rng.random() < 0.5
    reach = rng.choice([0, 0, 3])
    storage = {"storage": "static", "max_cache_len": 48} if used["static"] else {}
    used["codes"] = rng.random() < 0.4
    if used["codes"]:
        storage = {"storage": "quantized"} | storage
        storage["kv_bits"] = {"keys": rng.choice(BITS), "values": rng.choice(BITS)}
    cache = model.make_cache(**storage, rollback_reach=reach)
    ids, mask, expert = ids_of(rng, rows, 0), ids_of(rng, rows, 0), None
    for turn in range(rng.randint(3, 6)):
        width = rng.choice([1, 1, 1, 2, 3, 7]) if turn else rng.randint(1, 9)
        is_padded = rng.random() < 0.3
        used["padding"] |= is_padded
        new_ids = ids_of(rng, rows, width)
        new_mask = padded_mask(rng, rows, width) if is_padded else torch.ones_like(new_ids)
        if rng.random() < 0.3:
            expert = drawn_expert(rng, rows, experts, used)
        model(new_ids, attention_mask=new_mask, past_key_values=cache, expert_vector=expert)
        ids, mask = torch.cat([ids, new_ids], dim=1), torch.cat([mask, new_mask], dim=1)
        if reach and rng.random() < 0.4:
            used["rollback"] = True
            count = rng.randint(1, min(reach, width))
            cache.crop(-count)
            ids, mask = ids[:, :-count], mask[:, :-count]
        if rng.random() < 0.2:
            cache = cache.fork()
    last = ids_of(rng, rows, 1)
    cached = model(last, past_key_values=cache, expert_vector=expert).logits[:, -1]
    ids, mask = torch.cat([ids, last], dim=1), torch.cat([mask, torch.ones_like(last)], dim=1)
    whole = {"cache": model.make_cache(**storage)} if used["codes"] else {"use_cache": False}
    return cached, model(ids, attention_mask=mask, expert_vector=expert, **whole).logits[:, -1]


def train(rng, model):
    ids = ids_of(rng, 2, rng.choice([1, 5, 33, 70]))
    model(ids, attention_mask=padded_mask(rng, *ids.shape), labels=ids, use_cache=False).loss.backward()


def generate(rng, model, expert):
    """Greedy, or with prompt lookup, which rolls the cache back."""
    ids = ids_of(rng, 1, rng.randint(2, 12))
    options = rng.choice([{}, {"prompt_lookup_num_tokens": 3}, {"num_beams": 2}])
    model.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=6,
        do_sample=False,
        pad_token_id=0,
        eos_token_id=None,
        expert_vector=expert,
        **options,
    )


def run_model(seed):
    """Returns which of `FEATURES` the model used."""
    rng = random.Random(seed)
    used = dict.fromkeys(FEATURES, False)
    torch.set_num_threads(rng.choice([1, 2, 3]))
    dtype = rng.choice(list(TOLERANCE))
    model = random_model(MambaFormerConfig(**fields_of(rng)), seed, loudness=0.8).to(dtype)
    experts = [random_expert(model, 1), random_expert(model, 2, rank=rng.randint(1, 5))]
    if rng.random() < 0.3:
        used["training"] = True
        train(rng, copy.deepcopy(model))
    if dtype is not torch.float64 and rng.random() < 0.4:
        model = quantized(rng, model, used)
    cached, uncached = chat(rng, model, experts, used)
    scale = max(1.0, float(uncached.abs().max()))
    tolerance = (TOLERANCE_OF_CODES if used["codes"] else TOLERANCE)[dtype]
    assert torch.allclose(cached, uncached, rtol=0, atol=tolerance * scale), (seed, dtype)
    if rng.random() < 0.1:
        used["generation"] = True
        generate(rng, model, rng.choice([None, *experts]))
    return used


@pytest.mark.parametrize("first", range(0, NUM_MODELS, BATCH))
def test_random_models_touch_no_memory_but_their_own(first, record_property):
    seeds = range(first, min(first + BATCH, NUM_MODELS))
    try:
        used = [run_model(seed) for seed in seeds]
    finally:
        torch.set_num_threads(1)
    assert compiler._libraries and all(compiler._libraries.values()), "kernels ran, and were not left out"
    record_property("models", len(used))
    for feature in FEATURES:
        record_property(feature, sum(features[feature] for features in used))
