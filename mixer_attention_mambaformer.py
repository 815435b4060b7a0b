"""Attention with grouped keys and values, and the rotary embedding of its queries and keys."""

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import nn
from torch.nn import functional as F
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_eviction_mambaformer import PrunedLayout
from .cache_mambaformer import MambaFormerCache
from .configuration_mambaformer import MambaFormerConfig
from .decode_builder_mambaformer import ProgramBuilder, Setting
from .decode_workspace_mambaformer import Intermediate
from .expert_bases_mambaformer import at_least_float32
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear
from .inputs_packing_mambaformer import SequenceGrouping
from .inputs_padding_mambaformer import LeftAlignment
from .mixer_attention_masks_mambaformer import AttentionMasks, QueryBlock
from .mixer_attention_sinks_mambaformer import rotate_queries, separate_sinks, turn_sinks
from .mixer_base_mambaformer import MambaFormerMixer
from .ops_eligibility_mambaformer import is_own_attention, replaceable_by_kernels
from .ops_mambaformer import apply_rope, attention


class MambaFormerRotaryEmbedding(nn.Module):
    """Cosines and sines of RoPE (arXiv 2104.09864, equation 34) for given positions.

    It keeps no buffer: the frequencies follow from the configuration, so they stay right when a model is built on the
    meta device or moved to another dtype.
    """

    def __init__(self, config: MambaFormerConfig):
        super().__init__()
        self.config = config

    def inverse_frequencies(self, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, float]:
        """Frequencies (head_dim / 2,) and the factor on cosines and sines."""
        parameters, head_dim = self.config.rope_parameters or {}, cast(int, self.config.head_dim)
        rope_type = parameters.get("rope_type", "default")
        if rope_type != "default":
            frequencies, factor = ROPE_INIT_FUNCTIONS[rope_type](self.config, device)
            return frequencies.to(dtype), factor
        exponents = torch.arange(0, head_dim, 2, device=device).to(dtype) / head_dim
        return 1.0 / (parameters["rope_theta"] ** exponents), 1.0

    def forward(self, hidden_states: torch.Tensor, position_ids: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """Positions (..., tokens) -> cosines and sines (..., tokens, head_dim) in the states' dtype.

        Angles are float64 products of the position and the frequency, so that they are exact after millions of
        tokens: float32 would round an angle of 4,000,000 to a quarter. Frequencies are in float32 at least.
        """
        device, dtype = position_ids.device, hidden_states.dtype
        frequencies, factor = self.inverse_frequencies(device, at_least_float32(dtype))
        exact = torch.float32 if device.type == "mps" else torch.float64  # MPS has no float64
        angles = position_ids[..., None].to(exact) * frequencies.to(exact)
        cos, sin = (angles.cos() * factor).to(dtype), (angles.sin() * factor).to(dtype)
        return torch.cat([cos, cos], dim=-1), torch.cat([sin, sin], dim=-1)


def eager_attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float,
    dropout: float = 0.0,
    alignment: LeftAlignment | None = None,
    **kwargs,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention written out; returns (rows, tokens, heads, head_dim) and the weights (rows, heads, tokens, keys).

    With an `alignment`, the weights are returned in the caller's order of tokens.
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
    """Multi-head attention with grouped keys and values (arXiv 2305.13245), with RoPE or without positions."""

    name = "self_attn"
    context = ("attention", "position_embeddings", "cache")
    read_by_kernels = ("head_dim",)

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        self.config = config
        # The configuration fills in fields that are `None`.
        self.head_dim, num_key_value_heads = cast(int, config.head_dim), cast(int, config.num_key_value_heads)
        self.num_key_value_groups = config.num_attention_heads // num_key_value_heads
        self.scaling = self.head_dim**-0.5
        self.is_causal, self.attention_dropout = True, config.attention_dropout
        query_size, key_size = config.num_attention_heads * self.head_dim, num_key_value_heads * self.head_dim
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
            sink_angles = attention.sink_angles if attention.key_angles is None else None
            query = rotate_queries(query, position_embeddings, sink_angles)
            key = apply_rope(key, *position_embeddings)
        is_saved = cache is not None and any(states.requires_grad for states in (query, key, value))
        if cache is not None and attention.chunks:
            mixed, weights = self._attend_chunks(query, key, value, attention, cache, is_saved, **kwargs), None
        else:
            if cache is not None:
                key, value = cache.update(key, value, self.layer_idx, is_saved=is_saved, queries=query)
            mixed, weights = self.attend(query, key, value, attention, **kwargs)
        return apply_expert_linear(self.o_proj, mixed.flatten(2), vectors.get("o_proj")), weights

    def lower(
        self, program: ProgramBuilder, hidden_states: Intermediate, vectors: dict[str, ScaledBasis]
    ) -> Intermediate:
        query, key, value = program.linears(
            hidden_states,
            (self.q_proj, vectors.get("q_proj")),
            (self.k_proj, vectors.get("k_proj")),
            (self.v_proj, vectors.get("v_proj")),
        )
        program.only_if(self._has_no_dropout)
        moves_sinks, scaling = program.window is not None and self.config.has_moving_sinks, Setting(self, "scaling")
        queries, slots = program.rotate_and_store(query, key, value, self.head_dim, scaling, moves_sinks)
        return program.linear(program.attend(queries, slots), self.o_proj, vectors.get("o_proj"))

    def _has_no_dropout(self) -> bool:
        return not (self.attention_dropout and self.training)

    def attend(
        self, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, masks: AttentionMasks, **kwargs
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Attention of (rows, heads, tokens, head_dim): (rows, tokens, heads, head_dim), and its weights."""
        if masks.sequences is not None and masks.sequences.grouping is not None:
            return self._attend_groups(query, key, value, masks.sequences.grouping, masks.groups, **kwargs), None
        if masks.is_sink is not None:
            key = separate_sinks(key, masks.is_sink)
        elif masks.key_angles is not None:
            key = turn_sinks(key, masks.num_sinks, masks.key_angles)
        dropout = self.attention_dropout if self.training else 0.0
        if masks.alignment is not None:
            kwargs["alignment"] = masks.alignment
        function: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(masks.implementation, eager_attention_forward)
        function = functools.partial(function, self, dropout=dropout, scaling=self.scaling, **kwargs)
        if masks.blocks:
            return self._attend_blocks(query, key, value, masks.blocks, function), None
        if dropout == 0.0 and is_own_attention(masks.implementation):
            return attention(query, key, value, masks.mask, self.scaling, function)
        return function(query, key, value, masks.mask)

    def _attend_blocks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        blocks: tuple[QueryBlock, ...],
        function: Callable,
    ) -> torch.Tensor:
        """`attend` of many tokens in a layer with a window."""
        mixed = [
            function(query[:, :, block.queries], block.select_keys(key), block.select_keys(value), block.mask)[0]
            for block in blocks
        ]
        return torch.cat(mixed, dim=1)

    def _attend_chunks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        masks: AttentionMasks,
        cache: MambaFormerCache,
        is_saved: bool,
        **kwargs,
    ) -> torch.Tensor:
        """`attend` of a forward that evicts keys between its tokens."""
        store, layout = cache.key_store(self.layer_idx), cast(PrunedLayout, cache.layout(self.layer_idx))
        mixed = []
        for (chunk, at_chunk), mask in zip(layout.each_chunk(), masks.chunks[layout.retention], strict=True):
            q, k, v = chunk.select(query), chunk.select(key), chunk.select(value)
            k, v = store.update(k, v, at_chunk, is_saved, q)
            mixed.append(self.attend(q, k, v, mask, **kwargs)[0])
        return layout.join(mixed)

    def _attend_groups(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        grouping: SequenceGrouping,
        groups: tuple[AttentionMasks, ...],
        **kwargs,
    ) -> torch.Tensor:
        """`attend` of packed rows: sequences of similar length are the rows of a batch."""
        shape = (query.shape[0], query.shape[2])
        flat = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        mixed = [
            self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), masks, **kwargs)[0]
            for q, k, v, masks in zip(*(grouping.group(states) for states in flat), groups, strict=True)
        ]
        return grouping.ungroup(mixed).unflatten(0, shape)
