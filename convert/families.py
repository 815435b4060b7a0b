"""`FAMILIES` has one row for each family of Transformers models that can be written as a MambaFormer."""

import copy
import re
from collections.abc import Callable
from dataclasses import dataclass, field

from transformers.configuration_utils import PreTrainedConfig

# Types whose rotation of a position never changes. The angles of "dynamic" and "longrope" depend on the length of the
# sequence, so a cached key would depend on the time of its caching.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
ROPE_KEYS = {
    "rope_type", "type", "rope_theta", "partial_rotary_factor", "factor", "original_max_position_embeddings",
    "low_freq_factor", "high_freq_factor", "attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim",
    "truncate",
}  # fmt: skip
# Fields that change the computation of other models, with their neutral values. Transformers drops a field that the
# class of the family does not have; a checkpoint that sets such a field was not made for that class.
_OFF, _ONE, _DENSE = (None, False, 0), (None, 1), (None, 0, 1)
OPTIONS: dict[str, tuple[object, ...]] = dict.fromkeys(
    ("sliding_window", "attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), _OFF
)
OPTIONS |= dict.fromkeys(("attention_bias", "mlp_bias", "qkv_bias", "qk_norm", "use_qk_norm", "qk_layernorm"), _OFF)
OPTIONS |= dict.fromkeys(("alibi", "use_parallel_residual", "rope_interleaved", "rotary_interleaved"), _OFF)
OPTIONS |= dict.fromkeys(("attention_multiplier", "query_pre_attn_scalar", "no_rope_layer_interval"), _OFF)
OPTIONS |= dict.fromkeys(("logit_scale", "logits_scaling", "embedding_multiplier", "residual_multiplier"), _ONE)
OPTIONS |= dict.fromkeys(("partial_rotary_factor", "rotary_pct", "rope_pct"), _ONE)
OPTIONS |= dict.fromkeys(("num_experts", "num_local_experts", "n_routed_experts"), _DENSE)


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_COMMON_FIELDS = _same("vocab_size", "hidden_size", "hidden_act", "num_hidden_layers", "initializer_range")
_COMMON_FIELDS |= _same("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
_ATTENTION_FIELDS = _same("intermediate_size", "num_attention_heads", "num_key_value_heads", "attention_dropout")
_ATTENTION_FIELDS |= _same("head_dim", "max_position_embeddings", "rms_norm_eps")
_WINDOW_FIELDS = _same("rope_parameters", "sliding_window")
_LLAMA_FIELDS = _same("rope_parameters", "attention_bias", "mlp_bias") | {"attention_output_bias": "attention_bias"}
# No RoPE: Jamba has no position encoding.
_JAMBA_FIELDS = _same("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank")
_JAMBA_FIELDS |= _same("mamba_conv_bias", "mamba_proj_bias")
_MAMBA_FIELDS = _same("time_step_min", "time_step_max", "time_step_floor") | {
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_rank": "time_step_rank",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
    "rms_norm_eps": "layer_norm_epsilon",
}

_LLAMA_NAMES = _same("model.embed_tokens.", "model.norm.", "lm_head.") | {
    "model.layers.*.self_attn.": "model.layers.*.self_attn.",
    "model.layers.*.self_attn_layernorm.": "model.layers.*.input_layernorm.",
    "model.layers.*.mlp.": "model.layers.*.mlp.",
    "model.layers.*.mlp_layernorm.": "model.layers.*.post_attention_layernorm.",
}
_MAMBA_NAMES = {
    "model.embed_tokens.": "backbone.embeddings.",
    "model.norm.": "backbone.norm_f.",
    "lm_head.": "lm_head.",
    "model.layers.*.mamba.": "backbone.layers.*.mixer.",
    "model.layers.*.mamba_layernorm.": "backbone.layers.*.norm.",
}
_JAMBA_NAMES = {
    "model.embed_tokens.": "model.embed_tokens.",
    "model.norm.": "model.final_layernorm.",
    "lm_head.": "lm_head.",
    "model.layers.*.self_attn.": "model.layers.*.self_attn.",
    "model.layers.*.self_attn_layernorm.": "model.layers.*.input_layernorm.",
    "model.layers.*.mamba.": "model.layers.*.mamba.",
    "model.layers.*.mamba_layernorm.": "model.layers.*.input_layernorm.",
    "model.layers.*.mlp.": "model.layers.*.feed_forward.",
    "model.layers.*.mlp_layernorm.": "model.layers.*.pre_ff_layernorm.",
}


@dataclass(frozen=True)
class Family:
    """The rules by which a family of Transformers models becomes a MambaFormer.

    Args:
        fields: our configuration field -> the source's; a field that is missing or None there keeps our default.
        names: start of our tensors' names -> start of the source's; `*` is the layer's index.
        layer_types: the source's configuration -> our `layer_types`.
        constants: configuration fields with the same value in all models of the family.
        refuse: raises `ValueError` for a configuration that cannot be expressed.
    """

    fields: dict[str, str]
    names: dict[str, str]
    layer_types: Callable[[PreTrainedConfig], list[str]]
    constants: dict[str, object] = field(default_factory=dict)
    refuse: Callable[[PreTrainedConfig], None] = lambda config: None

    def config_fields(self, source: PreTrainedConfig) -> dict:
        """Arguments of the `MambaFormerConfig` of the same computation, without `layer_types`."""
        self.refuse(source)
        self._refuse_options(source)
        values = {ours: copy.deepcopy(getattr(source, theirs, None)) for ours, theirs in self.fields.items()}
        return self.constants | {ours: value for ours, value in values.items() if value is not None}

    def _refuse_options(self, source: PreTrainedConfig):
        read = {*self.fields.values(), *self.constants}
        values = {name: getattr(source, name, None) for name in OPTIONS if name not in read}
        dropped = {name: value for name, value in values.items() if value not in OPTIONS[name]}
        if dropped:
            raise ValueError(
                f"The source's configuration sets {dropped}, which a {source.model_type} in Transformers does not "
                "compute: remove these fields if the weights were trained without them."
            )

    def source_name(self, name: str) -> str | None:
        """The source's name of our tensor `name`; None when the source has no such tensor."""
        index = re.search(r"(?<=layers\.)\d+", name)
        pattern = name if index is None else name[: index.start()] + "*" + name[index.end() :]
        for ours, theirs in self.names.items():
            if pattern.startswith(ours):
                source_name = theirs + pattern.removeprefix(ours)
                return source_name if index is None else source_name.replace("*", index.group())
        return None


def _all_full(config: PreTrainedConfig) -> list[str]:
    return ["full_attention"] * config.num_hidden_layers


def _all_mamba(config: PreTrainedConfig) -> list[str]:
    return ["linear_attention"] * config.num_hidden_layers


def _mistral_layers(config: PreTrainedConfig) -> list[str]:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def _jamba_layers(config: PreTrainedConfig) -> list[str]:
    return ["full_attention" if kind == "attention" else "linear_attention" for kind in config.layers_block_type]


def _refuse_mixture_of_experts(config: PreTrainedConfig) -> None:
    if max(config.layers_num_experts) > 1:
        raise ValueError(
            f"`num_experts` is {config.num_experts} in the source: a MambaFormer has dense MLPs only, so only "
            "Jamba checkpoints with `num_experts=1` can be converted."
        )


FAMILIES = {
    "llama": Family(_COMMON_FIELDS | _ATTENTION_FIELDS | _LLAMA_FIELDS, _LLAMA_NAMES, _all_full),
    "mistral": Family(_COMMON_FIELDS | _ATTENTION_FIELDS | _WINDOW_FIELDS, _LLAMA_NAMES, _mistral_layers),
    "qwen2": Family(
        _COMMON_FIELDS | _ATTENTION_FIELDS | _WINDOW_FIELDS,
        _LLAMA_NAMES,
        lambda config: list(config.layer_types),
        constants={"attention_bias": True},
    ),
    # Mamba has no attention; one head divides every width.
    "mamba": Family(_COMMON_FIELDS | _MAMBA_FIELDS, _MAMBA_NAMES, _all_mamba, constants={"num_attention_heads": 1}),
    "jamba": Family(
        _COMMON_FIELDS | _ATTENTION_FIELDS | _JAMBA_FIELDS,
        _JAMBA_NAMES,
        _jamba_layers,
        constants={"mamba_inner_norms": True},
        refuse=_refuse_mixture_of_experts,
    ),
}


def find_family(model_type: str | None) -> Family:
    """The row of `FAMILIES` for `model_type`.

    Raises:
        ValueError: there is none.
    """
    if not isinstance(model_type, str) or model_type not in FAMILIES:
        raise ValueError(
            f"`model_type` is {model_type!r} in the source: convert one of {', '.join(sorted(FAMILIES))}."
        )
    return FAMILIES[model_type]


def check_rope(rope_parameters: dict | None) -> None:
    """Raises a `ValueError` for a position encoding that a MambaFormer cannot compute."""
    if rope_parameters is None:
        return
    rope_type = rope_parameters.get("rope_type", rope_parameters.get("type", "default"))
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"`rope_parameters` has rope_type {rope_type!r} in the source: use one of {ROPE_TYPES}.")
    if rope_parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError(
            "`rope_parameters` has a `partial_rotary_factor` in the source: a MambaFormer rotates all channels."
        )
    unknown = sorted(rope_parameters.keys() - ROPE_KEYS)
    if unknown:
        raise ValueError(
            f"`rope_parameters` has unknown keys {unknown} in the source: all layers must share one RoPE, "
            f"with keys out of {sorted(ROPE_KEYS)}."
        )


__all__ = ["FAMILIES", "Family", "check_rope", "find_family"]
