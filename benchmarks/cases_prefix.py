"""Conversations through a prefix cache."""

import torch

from figures import Figure, at_most
from mambaformer import convert
from models import Size, cache_bytes, fill, random_ids, smollm2

CONTEXT, QUESTION, ANSWER = 4096, 32, 8


@torch.inference_mode()
def second_turn() -> dict[str, Figure]:
    """The second turn of a chat of 4,096 tokens through a prefix cache, SmolLM2."""
    torch.manual_seed(0)
    model = convert(smollm2(Size()))
    prefixes = model.make_prefix_cache(max_bytes=2**31)
    options = {"prefix_cache": prefixes, "max_new_tokens": ANSWER, "do_sample": False, "eos_token_id": None}
    chat = model.generate(random_ids(model, 1, CONTEXT), **options)
    read_before = prefixes.report()["tokens"]["read"]
    chat = torch.cat([chat, random_ids(model, 1, QUESTION)], 1)
    model.generate(chat, **options)
    read = prefixes.report()["tokens"]["read"] - read_before
    # The last token of the answer has not been fed yet, so it is new as well.
    return {"tokens read beyond the new ones": Figure(read - QUESTION - 1, "", at_most(0))}


@torch.inference_mode()
def shared_prefix() -> dict[str, Figure]:
    """Eight continuations of one prefix of 4,096 tokens, SmolLM2: bytes, where each copies the prefix's keys."""
    model = convert(smollm2(Size()))
    prefix = fill(model, random_ids(model, 1, CONTEXT), piece=CONTEXT)
    forks = [prefix.fork() for _ in range(8)]
    for fork in forks:
        model(random_ids(model, 1, 1), cache=fork, logits_to_keep=1)
    total = prefix.nbytes + sum(map(cache_bytes, forks))
    new = prefix.nbytes / CONTEXT * len(forks)
    return {
        "bytes now": Figure(total / 1e6, " MB"),
        "bytes if pages were shared": Figure((prefix.nbytes + new) / 1e6, " MB"),
    }


CASES = {"second-turn": second_turn, "shared-prefix": shared_prefix}
