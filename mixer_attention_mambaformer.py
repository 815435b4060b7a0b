"""Attention with grouped keys and values, and the rotary embedding of its queries and keys."""

import functools
from collections.abc import Callable

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_mambaformer import MambaFormerCache
from .configuration_mambaformer import MambaFormerConfig
from .expert_bases_mambaformer import at_least_float32
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear
from .inputs_padding_mambaformer import LeftAlignment
from .mixer_attention_masks_mambaformer import AttentionMasks
from .mixer_base_mambaformer import MambaFormerMixer
from .ops_cpu_decode_mambaformer import few_queries_attention, rotated
from .ops_eligibility_mambaformer import is_own_attention, replaceable_by_kernels


class MambaFormerRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE (arXiv 2104.09864, equation 34) for given positions.

    Keeps no buffer: the frequencies follow from the configuration, so there is nothing to go stale when a model is
    built on the meta device or moved to another dtype.
    """

    def __init__(self, config: MambaFormerConfig):
        super().__init__()
        self.config = config

    def inverse_frequencies(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
        """Frequencies (head_dim / 2,) and the factor on cosines and sines."""
        rope_type = self.config.rope_parameters.get("rope_type", "default")
        if rope_type != "default":
            frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](self.config, device)
            return frequencies.to(dtype), factor
        exponents = torch.arange(0, self.config.head_dim, 2, device=device).to(dtype) / self.config.head_dim
        return 1.0 / (self.config.rope_parameters["rope_theta"] ** exponents), 1.0

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (rows or 1, tokens) -> cosines and sines (rows or 1, tokens, head_dim) in the states' dtype."""
        dtype = at_least_float32(hidden_states.dtype)
        frequencies, factor = self.inverse_frequencies(position_ids.device, dtype)
        angles = position_ids[..., None].to(dtype) * frequencies
        angles = torch.cat([angles, angles], dim=-1)
        return (angles.cos() * factor).to(hidden_states.dtype), (angles.sin() * factor).to(hidden_states.dtype)


def rotate(states: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turns (rows, heads, tokens, head_dim) by the angles of (rows or 1, tokens, head_dim)."""
    turned = rotated(states, cos, sin)
    if turned is not None:
        return turned
    first, second = states.chunk(2, dim=-1)
    return states * cos[:, None] + torch.cat([-second, first], dim=-1) * sin[:, None]


def eager_attention_forward(
    module, query, key, value, attention_mask, scaling, dropout=0.0, alignment: LeftAlignment | None = None, **kwargs
):
    """Attention written out; returns (rows, tokens, heads, head_dim) and the weights (rows, heads, tokens, keys).

    With an `alignment`, the weights are returned in the order in which the tokens were given.
    """
    rows, heads, num_tokens, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, head_dim)  # (rows, key heads, group * tokens, head_dim)
    weights = (grouped @ key.transpose(2, 3) * scaling).view(rows, heads, num_tokens, -1)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = torch.softmax(weights, dim=-1, dtype=at_least_float32(weights.dtype)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    shown = weights
    if alignment is not None:
        shown = alignment.restore(weights.transpose(1, 2)).transpose(1, 2)
        weights = alignment.align(shown.transpose(1, 2)).transpose(1, 2)  # gradients reach what is shown
    grouped = weights.reshape(rows, key.shape[1], -1, weights.shape[-1])
    return (grouped @ value).view(rows, heads, num_tokens, -1).transpose(1, 2).contiguous(), shown


@replaceable_by_kernels
class MambaFormerAttention(MambaFormerMixer):
    """Multi-head attention with grouped keys and values (arXiv 2305.13245), rotated or without positions."""

    name, lowering = "self_attn", "attention"
    context = ("attention", "position_embeddings", "cache")
    read_by_kernels = ("head_dim",)

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal, self.attention_dropout = True, config.attention_dropout
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)

    @classmethod
    def split_sizes(cls, config: MambaFormerConfig) -> dict[str, int]:
        return {name: getattr(config, name) for name in ("num_attention_heads", "num_key_value_heads")}

    def forward(
        self,
        hidden_states: torch.Tensor,
        vectors: dict[str, ScaledBasis],
        attention: AttentionMasks,
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: MambaFormerCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Left-aligned (rows, tokens, hidden) -> the same shape, and the attention weights if they are computed."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = apply_expert_linear(self.q_proj, hidden_states, vectors.get("q_proj")).view(heads).transpose(1, 2)
        key = apply_expert_linear(self.k_proj, hidden_states, vectors.get("k_proj")).view(heads).transpose(1, 2)
        value = apply_expert_linear(self.v_proj, hidden_states, vectors.get("v_proj")).view(heads).transpose(1, 2)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            is_saved = any(states.requires_grad for states in (query, key, value))
            key, value = cache.update(key, value, self.layer_idx, is_saved=is_saved)
        mixed, weights = self.attend(query, key, value, attention, **kwargs)
        return apply_expert_linear(self.o_proj, mixed.flatten(2), vectors.get("o_proj")), weights

    def attend(self, query, key, value, attention: AttentionMasks, **kwargs):
        """Attention of (rows, heads, tokens, head_dim): (rows, tokens, heads, head_dim), and its weights."""
        if attention.groups:
            return self._attend_groups(query, key, value, attention, **kwargs), None
        dropout = self.attention_dropout if self.training else 0.0
        if dropout == 0.0 and not torch.compiler.is_compiling() and is_own_attention(attention.implementation):
            mixed = few_queries_attention(query, key, value, attention.mask, self.scaling)
            if mixed is not None:
                return mixed, None
        if attention.alignment is not None:
            kwargs["alignment"] = attention.alignment
        forward: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(attention.implementation, eager_attention_forward)
        forward = functools.partial(forward, self, dropout=dropout, scaling=self.scaling, **kwargs)
        if not attention.blocks:
            return forward(query, key, value, attention.mask)
        mixed = [
            forward(query[:, :, block.queries], block.select_keys(key), block.select_keys(value), block.mask)[0]
            for block in attention.blocks
        ]
        return torch.cat(mixed, dim=1), None

    def _attend_groups(self, query, key, value, attention: AttentionMasks, **kwargs) -> torch.Tensor:
        """`attend` of packed rows: sequences of similar length are the rows of a batch."""
        shape = (query.shape[0], query.shape[2])
        flat = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        grouping = attention.sequences.grouping
        groups = zip(*(grouping.group(states) for states in flat), attention.groups, strict=True)
        mixed = [
            self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), masks, **kwargs)[0]
            for q, k, v, masks in groups
        ]
        return grouping.ungroup(mixed).unflatten(0, shape)
