"""Bytes of dense storage against the bytes of its keys and values."""

import torch

from figures import Figure, at_most
from mambaformer import convert
from models import Size, fill, key_value_bytes, random_ids, smollm2, step

CONTEXT = 8192


@torch.inference_mode()
def dense_bytes() -> dict[str, Figure]:
    """Dense storage of SmolLM2 behind 8,192 tokens, against its keys and values alone."""
    model = convert(smollm2(Size()))
    ids, exact = random_ids(model, 1, CONTEXT), key_value_bytes(model, CONTEXT)
    prefilled = _bytes_of_keys(fill(model, ids, piece=CONTEXT))
    grown = fill(model, ids[:, :-64], piece=512)
    decode = step(model, grown)
    for _ in range(64):
        decode()
    return {
        "bytes after one prefill": Figure(prefilled / exact, "x", at_most(1.05)),
        "bytes after prefill in pieces and 64 decode steps": Figure(_bytes_of_keys(grown) / exact, "x", at_most(1.05)),
    }


def _bytes_of_keys(cache) -> int:
    return sum(store.nbytes()[kind] for _, store in cache.stores() for kind in ("keys", "values"))


CASES = {"dense-8k": dense_bytes}
