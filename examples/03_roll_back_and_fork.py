"""Takes tokens back out of a cache, and continues one cache in two directions.

    python examples/03_roll_back_and_fork.py [FOLDER]

A Mamba state cannot be truncated like keys and values. With `rollback_reach=n` the cache keeps what it needs to
restore any state of the last n tokens.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "mambaformer-tiny"
folder = sys.argv[1] if len(sys.argv) > 1 else TINY
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32").eval()
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)


def encode(text: str) -> torch.Tensor:
    return tokenizer(text, return_tensors="pt").input_ids


@torch.no_grad()
def last_logits(ids: torch.Tensor, cache=None) -> torch.Tensor:
    return model(ids, past_key_values=cache, use_cache=cache is not None).logits[:, -1]


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """The largest difference, relative to the largest logit."""
    return ((found - expected).abs().max() / expected.abs().max()).item()


beginning, wrong, right, other = map(
    encode, ("In the beginning", " the function returns None", " God created the heaven", " was the Word")
)

cache = model.make_cache(rollback_reach=32)
last_logits(beginning, cache)
last_logits(wrong, cache)
cache.crop(-wrong.shape[1])  # as if these tokens had never been fed
branch = cache.fork()  # shares memory with `cache` until one of them is fed
found = last_logits(right, cache)
error = distance(found, last_logits(torch.cat([beginning, right], dim=1)))
print(f"Rolled back and fed other tokens: {error:.1e} of the logit scale from a run without the rollback.")
assert error < 1e-4

found = last_logits(other, branch)
branch_error = distance(found, last_logits(torch.cat([beginning, other], dim=1)))
print(f"A fork, fed something else again: {branch_error:.1e}.")
assert branch_error < 1e-4

# Speculative decoding uses the same rollback: drafts from the prompt, checked in one forward, rejected ones removed.
ids = encode("In the beginning God created the heaven and the earth. And the earth")
plain = model.generate(ids, max_new_tokens=40, do_sample=False)
drafted = model.generate(ids, max_new_tokens=40, do_sample=False, prompt_lookup_num_tokens=4)
assert torch.equal(plain, drafted)
print("Prompt lookup decoding yields the tokens of plain greedy decoding.")
