"""Saves a chat's cache to a file; another process loads it and continues without encoding the text again.

    python examples/04_save_and_resume_a_session.py [FOLDER]

The file stores content hashes of the weights, so a model with other weights refuses it.
"""

import subprocess
import sys
import tempfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

TINY = Path(__file__).resolve().parents[1] / "checkpoints" / "mambaformer-tiny"
folder = sys.argv[1] if len(sys.argv) > 1 else TINY
model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, dtype="float32")
tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
options = {"max_new_tokens": 12, "do_sample": False}


def continue_chat(text: torch.Tensor, cache) -> torch.Tensor:
    """`text` is the whole chat; only the tokens that are not in the cache are computed."""
    turn = tokenizer(" And he said unto them,", return_tensors="pt").input_ids
    return model.generate(torch.cat([text, turn], dim=1), past_key_values=cache, **options)


def resume(session: str) -> None:
    """The second process."""
    cache = model.load_cache(session)
    # The cache knows its tokens. The newest token of the first answer was never fed, so it is missing.
    print(f"second process: loaded {cache.get_seq_length()} tokens under {cache.expert_vector or 'the base weights'}")
    print(f"second process: {tokenizer.decode(continue_chat(cache.token_ids, cache)[0])!r}")


def main() -> None:
    prompt = tokenizer("And it came to pass", return_tensors="pt").input_ids
    cache = model.make_cache()
    answer = model.generate(prompt, past_key_values=cache, **options)
    print(f"first process:  {tokenizer.decode(answer[0])!r}")
    with tempfile.TemporaryDirectory() as place:
        session = Path(place, "chat.safetensors")
        cache.save(session)
        print(f"first process:  saved {session.stat().st_size:,} bytes", flush=True)
        subprocess.run([sys.executable, __file__, folder, session], check=True)
    print(f"first process:  {tokenizer.decode(continue_chat(cache.token_ids, cache)[0])!r}")


if __name__ == "__main__":
    resume(sys.argv[2]) if len(sys.argv) > 2 else main()
