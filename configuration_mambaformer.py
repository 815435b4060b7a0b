# Copyright 2026 the MambaFormer authors. Licensed under the Apache License, Version 2.0.
"""Configuration of MambaFormer. The layer pattern is data; all fields are checked on construction."""

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeGuard

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers.activations import ACT2FN
from transformers.configuration_utils import PreTrainedConfig

# The mixers of each layer type, in the order in which a token passes through them. The names are Transformers' own;
# "recurrent" is the mixer that `recurrent_mixer` names.
LAYER_MIXERS = {
    "linear_attention": ("recurrent",),
    "conv": ("short_conv",),
    "full_attention": ("attention",),
    "sliding_attention": ("attention",),
    "hybrid": ("attention", "recurrent"),
    "hybrid_sliding": ("attention", "recurrent"),
}
MIXERS_WITH_STATES = frozenset({"recurrent", "short_conv"})  # besides attention, which has keys and values
# The style by which tensor parallelism splits each module of a mixer, by its name in a layer. A mixer without a row is
# not split. `weights_parallel_mambaformer` defines the styles of Mamba. The table stands here because tools read the
# plan from a configuration, before there is a model.
TENSOR_PARALLEL_PLANS = {
    "attention": {
        "self_attn.q_proj": "colwise",
        "self_attn.k_proj": "colwise",
        "self_attn.v_proj": "colwise",
        "self_attn.o_proj": "rowwise",
    },
    "mamba": {
        "mamba": "mambaformer_channels",
        "mamba.in_proj": "mambaformer_packed_channels",
        "mamba.conv1d": "mambaformer_channels",
        "mamba.x_proj": "rowwise",
        "mamba.dt_proj": "colwise",
        "mamba.out_proj": "rowwise",
    },
    "mlp": {"mlp.gate_proj": "colwise", "mlp.up_proj": "colwise", "mlp.down_proj": "rowwise"},
}
SLIDING_LAYER_TYPES = ("sliding_attention", "hybrid_sliding")
WINDOW_POSITIONS = ("absolute", "relative")
GATED_NORMS = ("none", "before_gate", "after_gate")
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
# Every layer is a Python object of some 30 KB before its weights; the deepest published model (DeepNet, arXiv
# 2203.00555) has 1,000 layers.
MAX_LAYERS = 10_000
MAX_SIZE = 2**31  # sizes of tensors; above it products with fractions are not exact
FILE_NAME = r"[A-Za-z0-9_-][A-Za-z0-9_.-]*"  # of an expert vector, without its ending


@dataclass(frozen=True)
class Kind:
    """The values that a field may have: in words for the message, and as a test of a value that is not `None`."""

    words: str
    allows: Callable[[object], bool]
    is_optional: bool = False

    def check(self, name: str, value: object) -> None:
        """Raises a `ValueError` that names the field if `value` is not allowed."""
        if value is None and self.is_optional:
            return
        if value is None or not self.allows(value):
            ending = " or None" if self.is_optional else ""
            raise ValueError(f"`{name}` must be {self.words}{ending}, got {shown(value)}.")


def shown(value: object) -> str:
    """Any value as text for a message, cut to 200 characters."""
    try:
        text = repr(value)
    except ValueError:  # an integer of too many digits
        text = f"an {type(value).__name__} of more digits than can be shown"
    return text if len(text) <= 200 else f"{text[:200]}..."


def is_integer(value: object, lowest: int = 1) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool) and lowest <= value < MAX_SIZE


def is_number(value: object) -> TypeGuard[float]:
    """A finite number that float32 holds."""
    return isinstance(value, (int, float)) and not isinstance(value, bool) and -1e30 <= value <= 1e30


def is_positive(value: object) -> bool:
    return is_number(value) and value >= 1e-30


def is_list_of_words(value: object) -> TypeGuard[list[str]]:
    return isinstance(value, (list, tuple)) and all(isinstance(each, str) for each in value)


def _are_token_ids(value: object) -> bool:
    return all(is_integer(each, -1) for each in (value if isinstance(value, (list, tuple)) else [value]))


def _are_labels(value: object) -> bool:
    return isinstance(value, dict) and all(
        isinstance(label, str) and re.fullmatch(r"-?[0-9]{1,9}", str(key)) for key, label in value.items()
    )


def _is_step_limit(value: object) -> bool:
    if not isinstance(value, (list, tuple)) or len(value) != 2:
        return False
    return all(each is None or is_positive(each) for each in value)


def _is_dtype(value: object) -> bool:
    return isinstance(getattr(torch, value, None) if isinstance(value, str) else value, torch.dtype)


SIZE = Kind("a positive integer", is_integer)
OPTIONAL_SIZE = Kind("a positive integer", is_integer, is_optional=True)
POSITIVE = Kind("a positive finite number", is_positive)
NUMBER = Kind("a finite number of at least 0", lambda value: is_number(value) and value >= 0)
SWITCH = Kind("True or False", lambda value: isinstance(value, bool))
OPTIONAL_SWITCH = Kind("True or False", lambda value: isinstance(value, bool), is_optional=True)
WORDS = Kind("a list of strings", is_list_of_words, is_optional=True)
TOKEN_ID = Kind("a token id of at least -1", lambda value: is_integer(value, -1), is_optional=True)
LABEL_IDS = Kind("a dict of labels", lambda value: isinstance(value, dict), is_optional=True)

FIELD_KINDS = {
    **dict.fromkeys(("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads"), SIZE),
    **dict.fromkeys(("max_position_embeddings", "mamba_d_state", "mamba_d_conv"), SIZE),
    **dict.fromkeys(("intermediate_size", "num_key_value_heads", "head_dim", "sliding_window"), OPTIONAL_SIZE),
    "mamba_dt_rank": Kind("a positive integer or 'auto'", lambda value: value == "auto" or is_integer(value)),
    "mamba_expand": Kind("a positive number that makes `mamba_expand * hidden_size` an integer", is_positive),
    "num_sink_tokens": Kind("an integer of at least 0", lambda value: is_integer(value, 0)),
    "window_positions": Kind(" or ".join(map(repr, WINDOW_POSITIONS)), lambda value: value in WINDOW_POSITIONS),
    **dict.fromkeys(("time_step_min", "time_step_max", "time_step_floor", "rms_norm_eps"), POSITIVE),
    "attention_dropout": Kind("at least 0 and below 1", lambda value: is_number(value) and 0 <= value < 1),
    "initializer_range": NUMBER,
    **dict.fromkeys(("mlp_bias", "attention_bias", "attention_output_bias", "mamba_conv_bias"), SWITCH),
    **dict.fromkeys(("mamba_proj_bias", "mamba_inner_norms", "tie_word_embeddings", "use_cache"), SWITCH),
    "hidden_act": Kind(f"one of {sorted(ACT2FN)}", lambda value: isinstance(value, str) and value in ACT2FN),
    **dict.fromkeys(("mamba_head_dim", "mamba_num_groups", "linear_conv_kernel_dim", "conv_L_cache"), SIZE),
    **dict.fromkeys(("mamba_num_heads", "linear_num_key_heads", "linear_num_value_heads"), OPTIONAL_SIZE),
    **dict.fromkeys(("linear_key_head_dim", "linear_value_head_dim"), OPTIONAL_SIZE),
    **dict.fromkeys(("linear_allow_neg_eigval", "conv_bias"), SWITCH),
    "mamba_gated_norm": Kind(f"one of {GATED_NORMS}", lambda value: value in GATED_NORMS),
    "time_step_limit": Kind(
        "the smallest and the largest step size, both positive or None", _is_step_limit, is_optional=True
    ),
    "recurrent_mixer": Kind("the name of a mixer", lambda value: isinstance(value, str) and value.isidentifier()),
    "layer_types": Kind(f"a list of layer types out of {sorted(LAYER_MIXERS)}", is_list_of_words, is_optional=True),
    "rope_parameters": Kind("a dict", lambda value: isinstance(value, dict), is_optional=True),
    **dict.fromkeys(("pad_token_id", "bos_token_id"), TOKEN_ID),
    "eos_token_id": Kind("a token id of at least -1 or a list of them", _are_token_ids, is_optional=True),
    "expert_vectors": Kind(
        "a list of names of letters, digits, '-', '_' and '.' (not at the start)",
        lambda value: is_list_of_words(value) and all(re.fullmatch(FILE_NAME, name) for name in value),
        is_optional=True,
    ),
    # Fields of every configuration of Transformers.
    "dtype": Kind("a torch.dtype or the name of one, as 'float32'", _is_dtype, is_optional=True),
    "architectures": WORDS,
    **dict.fromkeys(("output_hidden_states", "return_dict"), OPTIONAL_SWITCH),
    "is_encoder_decoder": SWITCH,
    "chunk_size_feed_forward": Kind("an integer of at least 0", lambda value: is_integer(value, 0)),
    "id2label": Kind("a dict from label numbers to labels", _are_labels, is_optional=True),
    "label2id": LABEL_IDS,
    "problem_type": Kind("a string", lambda value: isinstance(value, str), is_optional=True),
}
# Arguments that are not fields; Transformers turns them into fields.
ARGUMENT_KINDS = {
    "rope_scaling": FIELD_KINDS["rope_parameters"],
    "rope_theta": Kind("a positive finite number", is_positive, is_optional=True),
    "torch_dtype": FIELD_KINDS["dtype"],
    "num_labels": SIZE,
    "per_layer_config": Kind("left out: all layers share these fields", lambda value: False, is_optional=True),
}
ROPE_KINDS = {
    "rope_theta": POSITIVE,
    "factor": POSITIVE,
    "original_max_position_embeddings": POSITIVE,
    "low_freq_factor": POSITIVE,
    "high_freq_factor": POSITIVE,
    **dict.fromkeys(
        ("attention_factor", "beta_fast", "beta_slow", "mscale", "mscale_all_dim"),
        Kind(NUMBER.words, NUMBER.allows, is_optional=True),
    ),
    "truncate": OPTIONAL_SWITCH,
}
SCALED = ("rope_theta", "factor")
ROPE_REQUIRED = {
    "default": ("rope_theta",),
    "linear": SCALED,
    "llama3": (*SCALED, "original_max_position_embeddings", "low_freq_factor", "high_freq_factor"),
    "yarn": (*SCALED, "original_max_position_embeddings"),
}


class MambaFormerConfig(PreTrainedConfig):
    """Describes a MambaFormer; the default is the model of the paper (arXiv 2402.04248, section 2).

    The default pattern is one initial Mamba layer and then hybrids (attention, then Mamba), with neither position
    encoding nor MLP. The options below let the same classes express Llama-style, Mamba and dense Jamba checkpoints.

    Args:
        layer_types: one entry a layer out of `"linear_attention"` (the recurrent mixer), `"full_attention"`,
            `"sliding_attention"`, `"hybrid"` (attention, then the recurrent mixer), `"hybrid_sliding"` and `"conv"`
            (the short convolution of LFM2). Default: a recurrent layer first, hybrids after it.
        recurrent_mixer: the recurrent mixer of all layers: `"mamba"` (Mamba-1), `"mamba2"` or `"gated_delta"`, or
            another row of the table in `mixer_registry_mambaformer`.
        intermediate_size: width of the gated MLP at the end of every layer; `None` builds no MLP.
        num_key_value_heads: heads of keys and values; `None` means as many as `num_attention_heads`.
        head_dim: width of one attention head; `None` means `hidden_size // num_attention_heads`.
        attention_bias, attention_output_bias: biases on the q/k/v projections and on the output projection.
        rope_parameters: Transformers' RoPE dictionary (`{"rope_type": "default", "rope_theta": 10000.0}`); `None`
            means no position encoding.
        sliding_window: number of tokens that a query of a sliding layer sees, its own included.
        num_sink_tokens: number of first tokens that a sliding layer keeps (attention sinks, arXiv 2309.17453).
        window_positions: positions that RoPE has in sliding layers. `"absolute"`: the position in the sequence, as
            models with windows of their own are trained. `"relative"`: the position among the keys that a query sees
            (StreamingLLM, arXiv 2309.17453, section 3.2), so that no distance exceeds
            `num_sink_tokens + sliding_window - 1`, however long the sequence is. Only distances to sinks differ.
        mamba_d_state, mamba_d_conv, mamba_expand, mamba_dt_rank: N, K, E and R of Mamba (arXiv 2312.00752,
            section 3). E may be a fraction if E * hidden_size is an integer; `mamba_dt_rank="auto"` is
            `ceil(hidden_size / 16)`.
        mamba_conv_bias, mamba_proj_bias: biases on the convolution and on the in/out projections.
        mamba_inner_norms: RMS norms on dt, B and C, as in Jamba (arXiv 2403.19887, section 6.4).
        mamba_num_heads, mamba_head_dim, mamba_num_groups: H, P and G of Mamba-2 (arXiv 2405.21060, section 7), whose
            inner width is H * P; `mamba_num_heads=None` is as many heads as `mamba_expand * hidden_size` has room for.
        mamba_gated_norm: the RMS norm of Mamba-2's output over each of G groups: `"after_gate"` (after it was
            multiplied by SiLU of the gate), `"before_gate"`, or `"none"` for the gate alone.
        time_step_min, time_step_max, time_step_floor: range of dt at initialization.
        time_step_limit: the smallest and the largest dt of Mamba-2, `None` where there is no limit.
        linear_num_key_heads, linear_num_value_heads, linear_key_head_dim, linear_value_head_dim,
        linear_conv_kernel_dim: heads, their widths and the kernel size of the gated delta rule (arXiv 2412.06464).
            `None` means as many heads of keys as of attention and of `head_dim`, and values as keys.
        linear_allow_neg_eigval: beta up to 2 instead of 1 (arXiv 2411.12537).
        conv_L_cache, conv_bias: kernel size and biases of the short convolution in `"conv"` layers.
        expert_vectors: names of the expert vectors that are saved with the weights, in files
            `expert_vectors/{name}.safetensors`. Configurations of version 0.1 call the field `experts`.

    Raises:
        ValueError: a field is out of range or contradicts another field; the message names the field and the fix.
    """

    model_type = "mambaformer"
    keys_to_ignore_at_inference = ["cache", "past_key_values"]
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    layer_types: list[str] | None = None
    recurrent_mixer: str = "mamba"
    intermediate_size: int | None = None
    hidden_act: str = "silu"
    mlp_bias: bool = False
    num_attention_heads: int = 8
    num_key_value_heads: int | None = None
    head_dim: int | None = None
    attention_bias: bool = False
    attention_output_bias: bool = False
    attention_dropout: float | int = 0.0
    max_position_embeddings: int = 8192
    rope_parameters: dict | None = None
    sliding_window: int | None = None
    num_sink_tokens: int = 0
    window_positions: str = "absolute"
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int | float = 2
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_inner_norms: bool = False
    mamba_num_heads: int | None = None
    mamba_head_dim: int = 64
    mamba_num_groups: int = 1
    mamba_gated_norm: str = "after_gate"
    time_step_limit: list[float | None] | None = None
    linear_num_key_heads: int | None = None
    linear_num_value_heads: int | None = None
    linear_key_head_dim: int | None = None
    linear_value_head_dim: int | None = None
    linear_conv_kernel_dim: int = 4
    linear_allow_neg_eigval: bool = False
    conv_L_cache: int = 3
    conv_bias: bool = False
    time_step_min: float = 0.001
    time_step_max: float = 0.1
    time_step_floor: float = 1e-4
    rms_norm_eps: float = 1e-5
    initializer_range: float = 0.02
    tie_word_embeddings: bool = True
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = None
    eos_token_id: int | list[int] | None = None
    expert_vectors: list[str] | None = None

    def __post_init__(self, **kwargs):
        named = kwargs.pop("experts", None)  # the older name of `expert_vectors`
        if self.expert_vectors is None:
            self.expert_vectors = named
        self._check_kinds(kwargs)
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] + ["hybrid"] * (self.num_hidden_layers - 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        self._fill_in_recurrent_sizes()
        without_position_encoding = self.rope_parameters is None
        super().__post_init__(**kwargs)
        if without_position_encoding and not {"rope_theta", "rope_scaling"} & kwargs.keys():
            self.rope_parameters = None  # the parent fills in a default RoPE
        self._check()

    def _fill_in_recurrent_sizes(self):
        if self.mamba_dt_rank == "auto":
            self.mamba_dt_rank = math.ceil(self.hidden_size / 16)
        if self.mamba_num_heads is None and self.recurrent_mixer == "mamba2":
            self.mamba_num_heads = max(self.mamba_intermediate_size // self.mamba_head_dim, 1)
        if self.recurrent_mixer == "gated_delta":
            self.linear_num_key_heads = self.linear_num_key_heads or self.num_attention_heads
            self.linear_num_value_heads = self.linear_num_value_heads or self.linear_num_key_heads
            self.linear_key_head_dim = self.linear_key_head_dim or self.head_dim
            self.linear_value_head_dim = self.linear_value_head_dim or self.linear_key_head_dim

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path, *args, **kwargs):
        """Loads a configuration and stores its path or repository, where the files of its expert vectors are."""
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        config = loaded[0] if isinstance(loaded, tuple) else loaded  # with `return_unused_kwargs`
        config._loaded_from = os.fspath(pretrained_model_name_or_path)
        return loaded

    def to_dict(self) -> dict:
        fields = super().to_dict()
        fields.pop("_loaded_from", None)  # belongs to this object, not to the configuration
        return fields

    def __setattr__(self, name: str, value: object):
        try:
            super().__setattr__(name, value)
        except StrictDataclassError as error:  # Transformers before 5.24 checks its own fields on assignment
            kind = FIELD_KINDS.get(name)
            words = "of another type" if kind is None else kind.words
            raise ValueError(f"`{name}` must be {words}, got {shown(value)}.") from error

    @property
    def mamba_intermediate_size(self) -> int:
        """Channels of the Mamba mixer: `mamba_expand * hidden_size`."""
        return int(self.mamba_expand * self.hidden_size)

    @property
    def base_model_tp_plan(self) -> dict[str, str]:
        """Transformers' tensor-parallel plan for the mixers that the layers have."""
        kinds = {kind for layer_idx in range(self.num_hidden_layers) for kind in self.mixers(layer_idx)}
        plan = {"embed_tokens": "embedding_rowwise"}
        for kind in sorted(kinds):
            styles = TENSOR_PARALLEL_PLANS.get(self.recurrent_mixer if kind == "recurrent" else kind, {})
            plan |= {f"layers.*.{module}": style for module, style in styles.items()}
        return plan

    @base_model_tp_plan.setter
    def base_model_tp_plan(self, plan: dict[str, str] | None) -> None:
        """Transformers 5.16 sets the plan with the embedding of a tied head, which the plan has."""

    def mixers(self, layer_idx: int) -> tuple[str, ...]:
        """The mixers of layer `layer_idx`, in order: out of `"attention"`, `"recurrent"` and `"mlp"`."""
        mixers = LAYER_MIXERS[self._kinds[layer_idx]]
        return mixers if self.intermediate_size is None else (*mixers, "mlp")

    def window(self, layer_idx: int) -> int | None:
        """Number of tokens that a query of layer `layer_idx` sees, its own included; `None` without a window."""
        return self.sliding_window if self._kinds[layer_idx] in SLIDING_LAYER_TYPES else None

    @property
    def has_moving_sinks(self) -> bool:
        """Whether the distance to a sink is limited, so that queries meet sinks and windows by different angles."""
        is_relative = self.window_positions == "relative" and self.rope_parameters is not None
        return is_relative and self.num_sink_tokens > 0 and self.sliding_window is not None

    @property
    def _kinds(self) -> list[str]:
        """`layer_types`, which is a list once the configuration is made."""
        return self.layer_types or []

    def _check_kinds(self, arguments: dict):
        """Checks each field by itself, before anything is computed from it."""
        for name, kind in FIELD_KINDS.items():
            kind.check(name, getattr(self, name))
        for name, value in arguments.items():
            if name in ARGUMENT_KINDS:
                ARGUMENT_KINDS[name].check(name, value)
            own = getattr(type(self), name, None)
            if callable(own) or (isinstance(own, property) and own.fset is None):
                raise ValueError(f"`{name}` cannot be set, as the configuration computes it: leave it out.")
        self._check_rope_values("rope_parameters", self.rope_parameters or {})
        self._check_rope_values("rope_scaling", arguments.get("rope_scaling") or {})
        if self.num_hidden_layers > MAX_LAYERS:
            raise ValueError(f"`num_hidden_layers` must be at most {MAX_LAYERS}, got {self.num_hidden_layers}.")

    def _check_rope_values(self, name: str, parameters: dict):
        for key, value in parameters.items():
            if isinstance(value, dict):
                raise ValueError(
                    f"`{name}` has a dict for {shown(key)}: all layers share one RoPE, so give its values."
                )
            if key in ROPE_KINDS:
                ROPE_KINDS[key].check(f"{name}[{key!r}]", value)

    def _check(self):
        self._check_expand()
        if len(self._kinds) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self._kinds)} entries but `num_hidden_layers` is "
                f"{self.num_hidden_layers}: give one entry a layer, or leave `layer_types` out."
            )
        unknown = sorted(set(self._kinds) - LAYER_MIXERS.keys())
        if unknown:
            raise ValueError(
                f"`layer_types` has unknown entries {shown(unknown)}: choose from {sorted(LAYER_MIXERS)}."
            )
        FIELD_KINDS["head_dim"].check("head_dim", self.head_dim)
        mixers = {mixer for idx in range(self.num_hidden_layers) for mixer in self.mixers(idx)}
        if "attention" in mixers:
            self._check_attention()
        if "recurrent" in mixers:
            self._check_recurrent()
        self._check_values()

    def _check_recurrent(self):
        if self.hidden_act != "silu" and self.recurrent_mixer == "mamba":
            raise ValueError(f"`hidden_act` is {self.hidden_act!r} but Mamba layers need 'silu': set it to 'silu'.")
        heads = {
            "mamba2": ("mamba_num_heads", "mamba_num_groups"),
            "gated_delta": ("linear_num_value_heads", "linear_num_key_heads"),
        }
        many, few = heads.get(self.recurrent_mixer, ("num_attention_heads", "num_attention_heads"))
        if getattr(self, many) % getattr(self, few):
            raise ValueError(
                f"`{many}` ({getattr(self, many)}) must be a multiple of `{few}` ({getattr(self, few)}): each of the "
                "latter serves as many of the former."
            )
        low, high = self.time_step_limit or (None, None)
        if low is not None and high is not None and low > high:
            raise ValueError(f"`time_step_limit` must be ascending, got {self.time_step_limit}.")

    def _check_values(self):
        if not self.time_step_floor <= self.time_step_min <= self.time_step_max:
            raise ValueError(
                "`time_step_floor`, `time_step_min`, `time_step_max` must be positive and ascending, got "
                f"{self.time_step_floor}, {self.time_step_min}, {self.time_step_max}."
            )
        if self.pad_token_id is not None and self.pad_token_id >= self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be below `vocab_size` ({self.vocab_size}), got {self.pad_token_id}."
            )

    def _check_expand(self):
        channels = self.mamba_expand * self.hidden_size
        if channels % 1 or not is_integer(int(channels)):
            raise ValueError(
                "`mamba_expand` must be a positive number that makes `mamba_expand * hidden_size` an integer, got "
                f"{self.mamba_expand!r} with a `hidden_size` of {self.hidden_size}."
            )

    def _check_attention(self):
        if self.num_attention_heads % (self.num_key_value_heads or 1):
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads}): each key/value head serves a group of query heads."
            )
        if self.rope_parameters is not None:
            self._check_rope(self.rope_parameters)
        has_window = any(kind in SLIDING_LAYER_TYPES for kind in self._kinds)
        if has_window and self.sliding_window is None:
            raise ValueError(
                "`layer_types` has sliding layers but `sliding_window` is None: give its length in tokens."
            )

    def _check_rope(self, parameters: dict):
        if self.head_dim is not None and self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even for RoPE, got {self.head_dim}: change it or drop RoPE.")
        if parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "`rope_parameters` has a partial_rotary_factor: all channels of a head are rotated, so leave it out."
            )
        rope_type = parameters.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters` has rope_type {shown(rope_type)}: choose from {ROPE_TYPES}. Cached keys would be "
                "wrong under a type whose angles depend on the length of the sequence."
            )
        missing = [name for name in ROPE_REQUIRED[rope_type] if name not in parameters]
        if missing:
            raise ValueError(f"`rope_parameters` of rope_type {rope_type!r} need a `{'` and a `'.join(missing)}`.")
        self._check_rope_values("rope_parameters", parameters)
        if rope_type == "llama3" and not parameters["low_freq_factor"] < parameters["high_freq_factor"]:
            raise ValueError(
                "`rope_parameters['high_freq_factor']` must be above `rope_parameters['low_freq_factor']`, got "
                f"{parameters['high_freq_factor']} and {parameters['low_freq_factor']}."
            )
        if rope_type == "yarn":
            self._check_yarn(parameters)

    def _check_yarn(self, parameters: dict):
        fast, slow = parameters.get("beta_fast") or 32, parameters.get("beta_slow") or 1
        if not slow <= fast:
            raise ValueError(
                "`rope_parameters['beta_fast']` must be at least `rope_parameters['beta_slow']`, got "
                f"{fast} and {slow} (their defaults are 32 and 1)."
            )
        if not parameters["rope_theta"] > 1:
            raise ValueError(
                f"`rope_parameters['rope_theta']` must be above 1 for 'yarn', got {parameters['rope_theta']}."
            )


__all__ = ["MambaFormerConfig"]
