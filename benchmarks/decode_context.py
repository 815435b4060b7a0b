"""Does a decoding step slow down with the context by more than attention's own reading of keys and values?

    python benchmarks/decode_context.py

Runs a hybrid of SmolLM2's shape (30 layers of attention, Mamba and MLP, float32, random weights) on caches of 1k and
4k tokens. Each round times one step on either cache, and within it the calls of attention (Transformers' own SDPA
function, in all layers). Rounds alternate, so that both contexts see the same machine; medians count.
"""

import argparse
import statistics
import time

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM


def smollm2_shape() -> MambaFormerConfig:
    return MambaFormerConfig(
        vocab_size=49152,
        hidden_size=576,
        intermediate_size=1536,
        num_hidden_layers=30,
        layer_types=["hybrid"] * 30,
        num_attention_heads=9,
        num_key_value_heads=3,
        rope_parameters={"rope_type": "default", "rope_theta": 100000.0},
    )


def filled_cache(model, num_tokens: int):
    """A cache of `num_tokens`, fed in pieces so that memory stays small."""
    cache = model.make_cache()
    for _ in range(num_tokens // 512):
        model(torch.randint(0, 1000, (1, 512)), past_key_values=cache, logits_to_keep=1)
    return cache


class TimedAttention:
    """SDPA that adds up the seconds it takes."""

    def __init__(self):
        self.seconds = 0.0

    def __call__(self, *args, **kwargs):
        started = time.perf_counter()
        result = sdpa_attention_forward(*args, **kwargs)
        self.seconds += time.perf_counter() - started
        return result


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs=2, default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    attention = TimedAttention()
    AttentionInterface.register("timed_sdpa", attention)
    model = MambaFormerForCausalLM(smollm2_shape()).eval()
    model.set_attn_implementation("timed_sdpa")
    caches, token = {context: filled_cache(model, context) for context in args.contexts}, torch.tensor([[1]])
    steps, reads = {context: [] for context in caches}, {context: [] for context in caches}
    for _ in range(args.rounds):
        for context, cache in caches.items():
            attention.seconds, started = 0.0, time.perf_counter()
            model(token, past_key_values=cache)
            steps[context].append(1e3 * (time.perf_counter() - started))
            reads[context].append(1e3 * attention.seconds)
    rests = {c: [s - r for s, r in zip(steps[c], reads[c], strict=True)] for c in caches}
    found = {c: [statistics.median(times[c]) for times in (steps, reads, rests)] for c in caches}
    for context, (step, read, rest) in found.items():
        print(f"{context:6d} tokens: step {step:7.2f} ms, of it attention {read:6.2f} ms, the rest {rest:7.2f} ms")
    short, long = found.values()
    print(f"the step grows by {long[0] - short[0]:.2f} ms, attention in it by {long[1] - short[1]:.2f} ms, ", end="")
    print(f"the rest to {long[2] / short[2]:.3f} of what it was")


if __name__ == "__main__":
    main()
