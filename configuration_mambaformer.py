# Copyright 2026 the MambaFormer authors. Licensed under the Apache License, Version 2.0.
"""Configuration of MambaFormer: the layer pattern is data, everything is checked on construction."""

import math

from transformers.configuration_utils import PreTrainedConfig

# What each layer type is made of, in the order in which a token passes through it. The names are Transformers' own.
LAYER_MIXERS = {
    "linear_attention": ("mamba",),
    "full_attention": ("attention",),
    "sliding_attention": ("attention",),
    "hybrid": ("attention", "mamba"),
    "hybrid_sliding": ("attention", "mamba"),
}
# How tensor parallelism splits what a mixer is made of; the styles of Mamba are those of `placement_mambaformer`.
MIXER_SPLITS = {
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
ROPE_TYPES = ("default", "linear", "llama3", "yarn")


class MambaFormerConfig(PreTrainedConfig):
    """Describes a MambaFormer, by default that of the paper (arXiv 2402.04248, section 2).

    The default pattern is one initial Mamba layer and then hybrids (attention, then Mamba), with neither position
    encoding nor MLP. The options below let the same classes express Llama-style, Mamba and dense Jamba checkpoints.

    Args:
        layer_types: one entry a layer out of `"linear_attention"` (Mamba), `"full_attention"`, `"sliding_attention"`,
            `"hybrid"` (attention, then Mamba) and `"hybrid_sliding"`. Default: Mamba first, hybrids after it.
        intermediate_size: width of the gated MLP that ends every layer; `None` builds no MLP.
        num_key_value_heads: heads of keys and values; `None` means as many as `num_attention_heads`.
        head_dim: width of one attention head; `None` means `hidden_size // num_attention_heads`.
        attention_bias, attention_output_bias: biases on the q/k/v projections and on the output projection.
        rope_parameters: Transformers' RoPE dictionary (`{"rope_type": "default", "rope_theta": 10000.0}`); `None`
            means no position encoding.
        sliding_window: tokens that a query of a sliding layer sees, itself included.
        num_sink_tokens: first tokens that a sliding layer never forgets (attention sinks, arXiv 2309.17453).
        mamba_d_state, mamba_d_conv, mamba_expand, mamba_dt_rank: N, K, E and R of Mamba (arXiv 2312.00752,
            section 3). E may be a fraction, if E * hidden_size is whole; `mamba_dt_rank="auto"` is
            `ceil(hidden_size / 16)`.
        mamba_conv_bias, mamba_proj_bias: biases on the convolution and on the in/out projections.
        mamba_inner_norms: RMS norms on dt, B and C, as in Jamba (arXiv 2403.19887, section 6.4).
        time_step_min, time_step_max, time_step_floor: range of dt at initialization.
        experts: names of the expert vectors that are saved beside the weights as `experts/{name}.safetensors`.

    Raises:
        ValueError: a field that is out of range or contradicts another one; the message names it and the fix.
    """

    model_type = "mambaformer"
    keys_to_ignore_at_inference = ["past_key_values"]
    default_theta = 10000.0

    vocab_size: int = 32000
    hidden_size: int = 512
    num_hidden_layers: int = 8
    layer_types: list[str] | None = None
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
    mamba_d_state: int = 16
    mamba_d_conv: int = 4
    mamba_expand: int | float = 2
    mamba_dt_rank: int | str = "auto"
    mamba_conv_bias: bool = True
    mamba_proj_bias: bool = False
    mamba_inner_norms: bool = False
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
    experts: list[str] | None = None

    def __post_init__(self, **kwargs):
        self._check_positive("hidden_size", "num_hidden_layers", "num_attention_heads")
        if self.layer_types is None:
            self.layer_types = ["linear_attention"] + ["hybrid"] * (self.num_hidden_layers - 1)
        if self.num_key_value_heads is None:
            self.num_key_value_heads = self.num_attention_heads
        if self.head_dim is None:
            self.head_dim = self.hidden_size // self.num_attention_heads
        if self.mamba_dt_rank == "auto":
            self.mamba_dt_rank = math.ceil(self.hidden_size / 16)
        without_position_encoding = self.rope_parameters is None
        super().__post_init__(**kwargs)
        if without_position_encoding and not {"rope_theta", "rope_scaling"} & kwargs.keys():
            self.rope_parameters = None  # the parent fills in a default RoPE
        self._check()
        self.base_model_tp_plan = self._split_of_each_layer()

    @property
    def mamba_intermediate_size(self) -> int:
        """Channels of the Mamba mixer: `mamba_expand * hidden_size`."""
        return int(self.mamba_expand * self.hidden_size)

    def mixers(self, layer_idx: int) -> tuple[str, ...]:
        """What layer `layer_idx` is made of: `"attention"`, `"mamba"` or both, in order."""
        return LAYER_MIXERS[self.layer_types[layer_idx]]

    def window(self, layer_idx: int) -> int | None:
        """Tokens that a query of layer `layer_idx` sees, itself included; `None` if it sees all or does not attend."""
        return self.sliding_window if self.layer_types[layer_idx] in SLIDING_LAYER_TYPES else None

    def _split_of_each_layer(self) -> dict[str, str]:
        used = {mixer for idx in range(self.num_hidden_layers) for mixer in self.mixers(idx)}
        used |= set() if self.intermediate_size is None else {"mlp"}
        plan = {f"layers.*.{name}": style for mixer in sorted(used) for name, style in MIXER_SPLITS[mixer].items()}
        return {"embed_tokens": "embedding_rowwise", **plan}

    def check_tensor_parallel(self, num_processes: int):
        """Raises a `ValueError` if heads or channels cannot be dealt out evenly to so many processes."""
        names = {mixer for idx in range(self.num_hidden_layers) for mixer in self.mixers(idx)}
        sizes = {"num_attention_heads": "attention", "num_key_value_heads": "attention"}
        uneven = [name for name, mixer in sizes.items() if mixer in names and getattr(self, name) % num_processes]
        if "mamba" in names and self.mamba_intermediate_size % num_processes:
            uneven.append("mamba_expand * hidden_size")
        if self.intermediate_size is not None and self.intermediate_size % num_processes:
            uneven.append("intermediate_size")
        if uneven:
            raise ValueError(
                f"{uneven} cannot be split evenly over {num_processes} processes: load the model with fewer of them."
            )

    def _check(self):
        self._check_positive("vocab_size", "num_key_value_heads", "head_dim", "max_position_embeddings")
        self._check_positive("mamba_d_state", "mamba_d_conv", "mamba_dt_rank")
        self._check_expand()
        optional = ("intermediate_size", "sliding_window")
        self._check_positive(*(name for name in optional if getattr(self, name) is not None))
        if len(self.layer_types) != self.num_hidden_layers:
            raise ValueError(
                f"`layer_types` has {len(self.layer_types)} entries but `num_hidden_layers` is "
                f"{self.num_hidden_layers}: give one entry a layer, or leave `layer_types` out."
            )
        unknown = sorted(set(self.layer_types) - LAYER_MIXERS.keys())
        if unknown:
            raise ValueError(f"`layer_types` has unknown entries {unknown}: choose from {sorted(LAYER_MIXERS)}.")
        if any("attention" in self.mixers(idx) for idx in range(self.num_hidden_layers)):
            self._check_attention()
        if self.hidden_act != "silu" and any("mamba" in self.mixers(idx) for idx in range(self.num_hidden_layers)):
            raise ValueError(f"`hidden_act` is {self.hidden_act!r} but Mamba layers need 'silu': set it to 'silu'.")
        self._check_values()

    def _check_values(self):
        if not 0 < self.time_step_floor <= self.time_step_min <= self.time_step_max:
            raise ValueError(
                "`time_step_floor`, `time_step_min`, `time_step_max` must be positive and ascending, got "
                f"{self.time_step_floor}, {self.time_step_min}, {self.time_step_max}."
            )
        if not 0 <= self.attention_dropout < 1:
            raise ValueError(f"`attention_dropout` must be at least 0 and below 1, got {self.attention_dropout}.")
        if not self.rms_norm_eps > 0:
            raise ValueError(f"`rms_norm_eps` must be positive, got {self.rms_norm_eps}.")
        if self.pad_token_id is not None and not -1 <= self.pad_token_id < self.vocab_size:
            raise ValueError(
                f"`pad_token_id` must be below `vocab_size` ({self.vocab_size}), got {self.pad_token_id}."
            )
        if isinstance(self.experts, str) or not all(isinstance(name, str) for name in self.experts or []):
            raise ValueError(f"`experts` must be a list of names, got {self.experts!r}.")

    def _check_expand(self):
        expand, is_number = self.mamba_expand, isinstance(self.mamba_expand, (int, float))
        if not is_number or isinstance(expand, bool) or not expand > 0 or expand * self.hidden_size % 1:
            raise ValueError(
                f"`mamba_expand` must be a positive number that makes `mamba_expand * hidden_size` whole, got "
                f"{expand!r} with a `hidden_size` of {self.hidden_size}."
            )

    def _check_positive(self, *names: str):
        for name in names:
            value = getattr(self, name)
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"`{name}` must be a positive integer, got {value!r}.")

    def _check_attention(self):
        if self.num_attention_heads % self.num_key_value_heads:
            raise ValueError(
                f"`num_attention_heads` ({self.num_attention_heads}) must be a multiple of `num_key_value_heads` "
                f"({self.num_key_value_heads}): each key/value head serves a whole group of query heads."
            )
        if self.rope_parameters is not None:
            self._check_rope()
        sliding = any(kind in SLIDING_LAYER_TYPES for kind in self.layer_types)
        if sliding and self.sliding_window is None:
            raise ValueError(
                "`layer_types` has sliding layers but `sliding_window` is None: give its length in tokens."
            )
        if not isinstance(self.num_sink_tokens, int) or self.num_sink_tokens < 0:
            raise ValueError(f"`num_sink_tokens` must be an integer of at least 0, got {self.num_sink_tokens!r}.")

    def _check_rope(self):
        if self.head_dim % 2:
            raise ValueError(f"`head_dim` must be even for RoPE, got {self.head_dim}: change it or drop RoPE.")
        if self.rope_parameters.get("partial_rotary_factor", 1.0) != 1.0:
            raise ValueError(
                "`rope_parameters` has a partial_rotary_factor: all of a head is rotated here, leave it out."
            )
        rope_type = self.rope_parameters.get("rope_type", "default")
        if rope_type not in ROPE_TYPES:
            raise ValueError(
                f"`rope_parameters` has rope_type {rope_type!r}: choose from {ROPE_TYPES}. Types whose angles depend "
                "on the length of the text would turn cached keys wrong."
            )
        if rope_type != "default" and "factor" not in self.rope_parameters:
            raise ValueError(f"`rope_parameters` of rope_type {rope_type!r} need a `factor`.")


__all__ = ["MambaFormerConfig"]
