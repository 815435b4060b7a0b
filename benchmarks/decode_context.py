"""Does a decoding step slow down with the context by more than attention's own reading of keys and values?

    python benchmarks/decode_context.py

Runs a hybrid of SmolLM2's shape (30 layers of attention, Mamba and MLP, float32, random weights) on caches of 1k and
4k tokens. In each round it times one step on either cache, and attention alone (Transformers' SDPA function) on that
cache's keys and values in all layers. Rounds alternate, so that both contexts see the same machine; medians count.
"""

import argparse
import statistics
import time

import torch
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


def seconds(run) -> float:
    started = time.perf_counter()
    run()
    return time.perf_counter() - started


def attention_alone(model, cache, query: torch.Tensor) -> None:
    for layer, module in zip(cache.layers, model.model.layers, strict=True):
        sdpa_attention_forward(module.self_attn, query, layer.keys, layer.values, None, scaling=0.125)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--contexts", type=int, nargs=2, default=[1024, 4096])
    parser.add_argument("--rounds", type=int, default=60)
    args = parser.parse_args()
    torch.manual_seed(0)
    model = MambaFormerForCausalLM(smollm2_shape()).eval()
    caches = {context: filled_cache(model, context) for context in args.contexts}
    query, token = torch.randn(1, 9, 1, 64), torch.tensor([[1]])
    steps, alone = {context: [] for context in caches}, {context: [] for context in caches}
    for _ in range(args.rounds):
        for context, cache in caches.items():
            steps[context].append(seconds(lambda c=cache: model(token, past_key_values=c)))
            alone[context].append(seconds(lambda c=cache: attention_alone(model, c, query)))
    found = {c: (1e3 * statistics.median(steps[c]), 1e3 * statistics.median(alone[c])) for c in caches}
    for context, (step, attention) in found.items():
        rest = step - attention
        print(f"{context:6d} tokens: step {step:7.2f} ms, attention alone {attention:6.2f} ms, rest {rest:7.2f} ms")
    (short_step, short_attention), (long_step, long_attention) = found.values()
    print(
        f"step grows by {long_step - short_step:.2f} ms, attention alone by {long_attention - short_attention:.2f} ms"
    )


if __name__ == "__main__":
    main()
