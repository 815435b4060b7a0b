"""Runs two chats with turns of different lengths as one batch; each row equals the chat run alone.

    python examples/05_batch_of_chats.py [FOLDER]

Padding may stand anywhere: on the left in the first turn, in the middle of a row in the second.
"""

import sys
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "mambaformer-tiny"
folder = sys.argv[1] if len(sys.argv) > 1 else TINY
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
options = {"max_new_tokens": 10, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
CHATS = [
    ("And it came to pass in those days that", " And David said"),
    ("def main", "(argument): return the name of the"),
]


def encode(text: str) -> list[int]:
    return tokenizer(text).input_ids


def pad_left(rows: list[list[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask; the pad is an ordinary token id, since the mask alone says what a pad is."""
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    return ids, torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])


def answers(rows: list[list[str]]) -> list[str]:
    """Both turns of each chat in one batch with one cache; the text of the second answer of each row."""
    cache = model.make_cache()
    ids = mask = torch.zeros(len(rows), 0, dtype=torch.long)
    for turn in zip(*rows, strict=True):
        new_ids, new_mask = pad_left([encode(text) for text in turn])
        ids, mask = torch.cat([ids, new_ids], dim=1), torch.cat([mask, new_mask], dim=1)
        length = ids.shape[1]
        ids = model.generate(ids, attention_mask=mask, past_key_values=cache, **options)
        mask = torch.cat([mask, torch.ones(len(rows), ids.shape[1] - length, dtype=torch.long)], dim=1)
    return [tokenizer.decode(row[length:]) for row in ids]


together = answers(CHATS)
for chat, answer in zip(CHATS, together, strict=True):
    assert answers([chat]) == [answer]
    print(f"{' ... '.join(chat)!r} -> {answer!r}")
print("Each row of the batch equals the chat run alone.")
