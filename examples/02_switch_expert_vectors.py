"""Re-tunes frozen weights while generating: by name, by schedule, mixed, and a different vector for each row.

    python examples/02_switch_expert_vectors.py [FOLDER]

An expert vector scales the singular values of linear modules. The two vectors here are made by hand to show an effect;
`python -m recipes.language.train_expert` trains useful ones.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "mambaformer-tiny"
folder = sys.argv[1] if len(sys.argv) > 1 else TINY
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
ids = tokenizer("And it came to pass", return_tensors="pt").input_ids
options = {"max_new_tokens": 24, "do_sample": False}


def show(title: str, answer: torch.Tensor) -> torch.Tensor:
    print(f"[{title}] {tokenizer.decode(answer[0])!r}")
    return answer


# One scale for each of the largest singular values; the others keep the scale 1.
down_projections = [name for name in model.linear_modules() if name.endswith("mlp.down_proj")]
model.expert_vectors.add("bold", {name: [3.0] * 16 for name in down_projections})
model.expert_vectors.add("calm", {name: [0.2] * 16 for name in down_projections})
model.expert_vectors.add(model.expert_vectors.blend([(0.7, "bold"), (0.3, "calm")], name="mixed"))

base = show("base", model.generate(ids, **options))
for name in model.expert_vectors.names:
    show(name, model.generate(ids, expert_vector=name, **options))

# The vector changes after 12 new tokens. The cache encodes the earlier tokens again, so the result is exact.
switched = show("base, then bold", model.generate(ids, expert_schedule={0: None, 12: "bold"}, **options))
first = model.generate(ids, **{**options, "max_new_tokens": 12})
assert torch.equal(switched, model.generate(first, expert_vector="bold", **{**options, "max_new_tokens": 12}))

# Two rows of one batch under two vectors: each row equals its own run.
two = torch.cat([ids, ids])
rows = model.generate(two, attention_mask=torch.ones_like(two), expert_vector=[None, "bold"], **options)
assert torch.equal(rows[:1], base)

# Merged into the weights, a vector costs nothing per token; unmerging restores the weights bit for bit.
model.merge_expert_vector("bold")
assert torch.equal(model.generate(ids, **options), rows[1:])
model.unmerge_expert_vector()
assert torch.equal(model.generate(ids, **options), base)
print("Schedule, batch and merged weights agree with the single runs.")
