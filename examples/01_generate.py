"""Loads a model folder as any user of the Hub does, and generates with a cache.

    python examples/01_generate.py [FOLDER]

The folder brings its own code, so nothing here imports `mambaformer`.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "mambaformer-tiny"
folder = sys.argv[1] if len(sys.argv) > 1 else TINY
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
prompt = tokenizer("And it came to pass", return_tensors="pt")

cache = model.make_cache()
answer = model.generate(**prompt, max_new_tokens=40, do_sample=False, past_key_values=cache)
print(tokenizer.decode(answer[0]))

# The last token is not in the cache: nothing has been predicted from it yet.
print(f"\nThe cache holds {cache.get_seq_length()} tokens in {cache.nbytes:,} bytes:")
for layer_type, sizes in cache.report().items():
    print(f"  {layer_type}: " + ", ".join(f"{kind} {size:,}" for kind, size in sizes.items()))

without = model.generate(**prompt, max_new_tokens=40, do_sample=False, use_cache=False)
assert torch.equal(answer, without)
print("Without a cache the tokens are the same.")
