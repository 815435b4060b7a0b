"""Which models and caches the laws are tried on: layer patterns, cache variants, and the options of tests."""

from pathlib import Path

import gated_linear_attention  # noqa: F401  (adds a recurrent mixer)
from mambaformer import MambaFormerConfig

ROOT = Path(__file__).resolve().parent.parent
TINY = ROOT / "checkpoints" / "mambaformer-tiny"
VOCAB = 61
NO_TOKEN = 10**6  # beyond every vocabulary

# `generate` takes tokens equal to the pad id for pads unless it is given a mask.
GREEDY = {"do_sample": False, "pad_token_id": NO_TOKEN}
ROPE = {"rope_type": "default", "rope_theta": 100.0}
ALL_FIVE = ["linear_attention", "hybrid", "sliding_attention", "hybrid_sliding", "full_attention"]

# Each layer type alone, then mixes; between them every option is on somewhere and off somewhere.
PATTERNS = {
    "mamba": {"layer_types": ["linear_attention"] * 2},
    "full": {"layer_types": ["full_attention"] * 2},
    "sliding": {"layer_types": ["sliding_attention"] * 2, "rope_parameters": ROPE},
    "sliding_sinks": {"layer_types": ["sliding_attention"] * 2, "sliding_window": 3, "num_sink_tokens": 2},
    "hybrid": {"layer_types": ["hybrid"] * 2, "mamba_conv_bias": False, "mamba_d_conv": 2},
    "hybrid_sliding": {"layer_types": ["hybrid_sliding"] * 2, "num_sink_tokens": 1, "rope_parameters": ROPE},
    "paper": {"num_hidden_layers": 3, "layer_types": None, "num_key_value_heads": 4},
    "llama": {
        "layer_types": ["full_attention"] * 2,
        "rope_parameters": ROPE,
        "intermediate_size": 48,
        "tie_word_embeddings": False,
        "head_dim": 12,
    },
    "jamba": {
        "layer_types": ["linear_attention", "full_attention", "linear_attention"],
        "intermediate_size": 24,
        "mamba_inner_norms": True,
        "mamba_expand": 1,
        "num_key_value_heads": 1,
    },
    "another_mixer": {
        "layer_types": ["linear_attention", "hybrid_sliding"],
        "recurrent_mixer": "gated_linear_attention",
        "intermediate_size": 24,
    },
    "mamba2": {
        "layer_types": ["linear_attention", "hybrid"],
        "recurrent_mixer": "mamba2",
        "mamba_num_heads": 4,
        "mamba_head_dim": 6,
        "mamba_num_groups": 2,
        "time_step_limit": [0.3, 1.5],
    },
    "gated_delta": {
        "layer_types": ["linear_attention", "hybrid_sliding"],
        "recurrent_mixer": "gated_delta",
        "linear_num_value_heads": 4,
        "linear_num_key_heads": 2,
        "linear_key_head_dim": 6,
        "linear_value_head_dim": 5,
        "linear_allow_neg_eigval": True,
        "rope_parameters": ROPE,
        "intermediate_size": 24,
    },
    "conv": {"layer_types": ["conv", "full_attention", "conv"], "conv_bias": True, "intermediate_size": 24},
    "everything": {
        "layer_types": ALL_FIVE,
        "rope_parameters": ROPE,
        "intermediate_size": 48,
        "mlp_bias": True,
        "attention_bias": True,
        "attention_output_bias": True,
        "mamba_proj_bias": True,
        "mamba_inner_norms": True,
        "num_sink_tokens": 1,
        "tie_word_embeddings": False,
    },
}

CACHE_VARIANTS = {
    "dense": {"storage": "dense"},
    "static": {"storage": "static", "max_cache_len": 96},
}

LINEAR_SHAPES = {"tall": (11, 6), "wide": (6, 11), "square": (7, 7), "column": (5, 1), "row": (1, 5)}

# Arguments of `Trainer` and its like for a few steps of SGD that write, show and report nothing.
PLAIN_SGD = {
    "report_to": [],
    "use_cpu": True,
    "bf16": False,
    "dataloader_pin_memory": False,
    "disable_tqdm": True,
    "save_strategy": "no",
    "optim": "sgd",
    "learning_rate": 0.1,
    "lr_scheduler_type": "constant",
    "max_grad_norm": 0.0,
    "max_steps": 3,
}


def tiny_config(pattern="everything", **over):
    """A `MambaFormerConfig` with four heads of a few channels for one of `PATTERNS`; `over` wins over both."""
    fields = {
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "mamba_d_state": 4,
        "sliding_window": 5,
    }
    fields |= PATTERNS[pattern] | over
    if fields["layer_types"] is not None:
        fields["num_hidden_layers"] = len(fields["layer_types"])
    return MambaFormerConfig(**fields)
