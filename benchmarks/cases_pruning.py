"""Loss and recall of SmolLM2 when a policy prunes its keys.

Budgets are numbers of keys: half and a quarter of the sequence. Text and facts are the same for all policies.
"""

import functools
import random
from pydoc_data import topics

import torch
from torch.nn import functional as F
from transformers import AutoTokenizer

from figures import Figure, at_least, at_most
from mambaformer import (
    TOVA,
    ExpectedAttention,
    KeyDiff,
    KeyNorm,
    MambaFormerForCausalLM,
    PruningPolicy,
    SinksAndWindow,
    SnapKV,
    convert,
    split_budget,
)
from mambaformer.convert import find_smollm2
from models import Size, smollm2

CONTEXT, PIECE = 4096, 512
HALF, QUARTER = CONTEXT // 2, CONTEXT // 4
NUM_TEXTS, DIGITS = 10, 5
LEAST = {HALF: 1536, QUARTER: 256}  # keys of each layer, so that six layers keep all of them
# Nats per token of an answer, in thousandths, that a window of 256 tokens in each layer alone costs the first text.
LAYER_LOSSES = (
    2, 0, 5, 12, 0, 13, 21, 1496, 37, 4, 4, 20, 0, 0, 43,
    0, 12, 156, 2142, 0, 0, 46, 11, 138, 0, 0, 1, 2, 1, 1,
)  # fmt: skip
OPENINGS = (
    "The locker of {} opens with the code ",
    "The ship on which {} sails carries the number ",
    "The library card of {} has the number ",
    "The telephone in the office of {} has the number ",
    "The parcel for {} has the tracking number ",
    "The race horse that belongs to {} wears the number ",
)
NAMES = ("Hannah Moreau", "Oliver Grant", "Priya Nair", "Samuel Ortega", "Ingrid Holm", "Tomas Novak", "Mei Tanaka")


@functools.cache
def _model() -> MambaFormerForCausalLM:
    return convert(smollm2(Size()))


@functools.cache
def _tokenizer():
    source = find_smollm2()
    return AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name)


@functools.cache
def _text() -> torch.Tensor:
    """Tokens of Python's manual, (tokens,)."""
    pages = "\n\n".join(page for _, page in sorted(topics.topics.items()) if isinstance(page, str))
    return torch.tensor(_tokenizer()(pages).input_ids)


# ---- loss


@torch.inference_mode()
def _nats_and_bytes(policy: PruningPolicy | None) -> tuple[float, int]:
    """Mean loss over the context, and the bytes of keys, values and queries behind it."""
    model, ids, cache, nats = _model(), _text()[None, : CONTEXT + 1], _model().make_cache(policy=policy), []
    for start in range(0, CONTEXT, PIECE):
        logits = model(ids[:, start : start + PIECE], cache=cache).logits[0]
        nats.append(F.cross_entropy(logits, ids[0, start + 1 : start + PIECE + 1], reduction="none"))
    stored = sum(tensor.nbytes for _, store in cache.stores() for tensor in store.state().values())
    return float(torch.cat(nats).mean()), stored


@functools.cache
def _of_all_keys() -> tuple[float, int]:
    return _nats_and_bytes(None)


def _loss(policy: PruningPolicy, most: float | None = None) -> dict[str, Figure]:
    (whole, all_bytes), (pruned, kept_bytes) = _of_all_keys(), _nats_and_bytes(policy)
    bar = None if most is None else at_most(most)
    return {
        "bytes": Figure(kept_bytes / all_bytes, "x"),
        "loss": Figure(100 * (pruned / whole - 1), " %", bar),
    }


def snap_kv_half() -> dict[str, Figure]:
    """SnapKV, half of the keys of 4,096 tokens."""
    return _loss(SnapKV(budget=HALF), 1.0)


def snap_kv_quarter() -> dict[str, Figure]:
    """SnapKV, a quarter of the keys of 4,096 tokens."""
    return _loss(SnapKV(budget=QUARTER), 3.0)


def tova_quarter() -> dict[str, Figure]:
    """TOVA, a quarter of the keys of 4,096 tokens."""
    return _loss(TOVA(budget=QUARTER))


def key_diff_quarter() -> dict[str, Figure]:
    """KeyDiff, a quarter of the keys of 4,096 tokens."""
    return _loss(KeyDiff(budget=QUARTER))


def key_norm_quarter() -> dict[str, Figure]:
    """Key norm, a quarter of the keys of 4,096 tokens."""
    return _loss(KeyNorm(budget=QUARTER))


def expected_attention_half() -> dict[str, Figure]:
    """Expected attention, half of the keys of 4,096 tokens."""
    return _loss(ExpectedAttention(budget=HALF))


def expected_attention_quarter() -> dict[str, Figure]:
    """Expected attention, a quarter of the keys of 4,096 tokens."""
    return _loss(ExpectedAttention(budget=QUARTER))


def split_quarter() -> dict[str, Figure]:
    """SnapKV, a quarter of the keys of 4,096 tokens, split over layers by what each loses."""
    return _loss(_split(QUARTER), 3.0)


def split_half() -> dict[str, Figure]:
    """SnapKV, half of the keys of 4,096 tokens, split over layers by what each loses."""
    return _loss(_split(HALF), 1.0)


def _split(budget: int) -> SnapKV:
    """Layers that lose most keep all keys, the others those that SnapKV chooses."""
    return SnapKV(budget=tuple(split_budget(budget, LAYER_LOSSES, CONTEXT, LEAST[budget])))


def window_quarter() -> dict[str, Figure]:
    """Sinks and a window, a quarter of the keys of 4,096 tokens."""
    return _loss(SinksAndWindow(budget=QUARTER))


# ---- recall


@torch.inference_mode()
def _recalled(policy: PruningPolicy | None, num_texts: int = NUM_TEXTS) -> int:
    """Facts of which greedy decoding says just the answer, when their opening follows the text."""
    model, found = _model(), 0
    for number in range(num_texts):
        ids, facts = _text_with_facts(number)
        cache = model.make_cache(policy=policy)
        for part in ids[None].split(PIECE, dim=1):
            model(part, cache=cache, logits_to_keep=1)
        for opening, answer in facts:
            asked = torch.tensor([opening + answer[:-1]])
            logits = model(asked, cache=cache.fork(), logits_to_keep=len(answer)).logits[0]
            found += logits.argmax(-1).tolist() == answer
    return found


def _text_with_facts(number: int) -> tuple[torch.Tensor, list[tuple[list[int], list[int]]]]:
    """A text with facts at equal distances, and the opening and the answer of each."""
    start, draw = number * CONTEXT, random.Random(number)
    ids, facts = _text()[start : start + CONTEXT].clone(), []
    for place, (opening, name) in enumerate(zip(OPENINGS, draw.sample(NAMES, len(OPENINGS)), strict=True)):
        digits = "".join(draw.choices("0123456789", k=DIGITS))
        parts = "\n\n" + opening.format(name), digits, ".\n\n"
        opening_ids, answer, end = (_tokenizer()(part, add_special_tokens=False).input_ids for part in parts)
        fact, at = opening_ids + answer + end, place * CONTEXT // len(OPENINGS) + 64
        ids[at : at + len(fact)] = torch.tensor(fact)
        facts.append((opening_ids, answer))
    return ids, facts


def facts() -> dict[str, Figure]:
    """Facts recalled of 60 behind 4,096 tokens, against the cache of all keys (SnapKV, split over layers)."""
    whole = _recalled(None)
    half, quarter = _recalled(_split(HALF)), _recalled(_split(QUARTER))
    return {
        "of all keys": Figure(whole),
        "half of the keys": Figure(half - whole, " facts", at_least(-2)),
        "a quarter of the keys": Figure(quarter - whole, " facts", at_least(-6)),
    }


CASES = {
    "snap-kv-half": snap_kv_half,
    "snap-kv-quarter": snap_kv_quarter,
    "tova-quarter": tova_quarter,
    "key-diff-quarter": key_diff_quarter,
    "key-norm-quarter": key_norm_quarter,
    "expected-attention-half": expected_attention_half,
    "expected-attention-quarter": expected_attention_quarter,
    "split-half": split_half,
    "split-quarter": split_quarter,
    "window-quarter": window_quarter,
    "pruning-facts": facts,
}
