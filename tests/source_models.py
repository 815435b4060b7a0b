"""Models of other families that are converted: small, random, with large weights."""

import copy
import functools

import torch
import transformers

from patterns import VOCAB

SIZES = {"vocab_size": VOCAB, "hidden_size": 32, "num_hidden_layers": 3, "eos_token_id": None}
ATTENTION = SIZES | {"intermediate_size": 48, "num_attention_heads": 4, "num_key_value_heads": 2}
JAMBA = ATTENTION | {"attn_layer_period": 2, "attn_layer_offset": 1, "num_experts": 1, "mamba_d_state": 4}
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 100.0,
    "factor": 4.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 16,
}
YARN_ROPE = {"rope_type": "yarn", "rope_theta": 100.0, "factor": 4.0, "original_max_position_embeddings": 16}

# Every row is a source: its family, and what sets it apart.
SOURCES = {
    "llama": ("Llama", ATTENTION),
    "llama_tied_with_biases": (
        "Llama",
        ATTENTION | {"tie_word_embeddings": True, "attention_bias": True, "mlp_bias": True, "head_dim": 12},
    ),
    "llama_gelu": ("Llama", ATTENTION | {"hidden_act": "gelu", "rms_norm_eps": 1e-2, "num_key_value_heads": None}),
    "llama_rope_llama3": ("Llama", ATTENTION | {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 64}),
    "llama_rope_yarn": ("Llama", ATTENTION | {"rope_parameters": YARN_ROPE, "max_position_embeddings": 64}),
    "llama_rope_linear": (
        "Llama",
        ATTENTION | {"rope_parameters": {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.0}},
    ),
    "mistral": ("Mistral", ATTENTION | {"sliding_window": 5}),
    "mistral_without_window": ("Mistral", ATTENTION | {"sliding_window": None, "head_dim": 6, "hidden_act": "gelu"}),
    "qwen2": ("Qwen2", ATTENTION | {"tie_word_embeddings": True, "head_dim": 12, "hidden_act": "gelu"}),
    "qwen2_with_window": (
        "Qwen2",
        ATTENTION | {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1},
    ),
    "mamba": ("Mamba", SIZES | {"state_size": 4, "layer_norm_epsilon": 1e-3}),
    "mamba_untied_with_biases": (
        "Mamba",
        SIZES
        | {"state_size": 5, "conv_kernel": 3, "expand": 3, "time_step_rank": 7, "tie_word_embeddings": False}
        | {"use_bias": True, "use_conv_bias": False},
    ),
    "jamba": ("Jamba", JAMBA),
    "jamba_with_biases": (
        "Jamba",
        JAMBA
        | {"mamba_d_conv": 3, "mamba_expand": 3, "mamba_dt_rank": 3}
        | {"mamba_proj_bias": True, "mamba_conv_bias": False},
    ),
}


@functools.cache
def source(name):
    """One model a row of `SOURCES`, for the whole run; never change it."""
    return new_source(*SOURCES[name])


def new_source(family, fields):
    config = getattr(transformers, f"{family}Config")(**{"bos_token_id": None, "pad_token_id": None} | fields)
    return loud(getattr(transformers, f"{family}ForCausalLM")(config).eval())


@torch.no_grad()
def loud(model):
    """Draws weights so large that the logits depend on every earlier token."""
    torch.manual_seed(0)
    for name, parameter in model.named_parameters():
        if name.endswith(("A_log", "mixer.D", "mamba.D")):
            parameter.mul_(0.5 + torch.rand_like(parameter))
        elif name.endswith("dt_proj.bias"):
            parameter.uniform_(-3, 0.5)
        elif "norm" in name:
            parameter.uniform_(0.7, 1.3)
        elif parameter.ndim == 2 and "embed" not in name:
            parameter.normal_(0, 1.2 / parameter.shape[1] ** 0.5)
        else:
            parameter.normal_(0, 0.5)
    return model


def some_ids(rows=2, length=14):
    return torch.randint(VOCAB, (rows, length), generator=torch.Generator().manual_seed(5))


@torch.no_grad()
def all_logits(model, ids):
    return model(ids, use_cache=False).logits


def changed(name, **fields):
    """A copy of a source with other fields in its configuration, its weights as they were."""
    model = copy.deepcopy(source(name))
    for field, value in fields.items():
        setattr(model.config, field, value)
    return model


def rope(**fields):
    return {"rope_type": "default", "rope_theta": 100.0} | fields
