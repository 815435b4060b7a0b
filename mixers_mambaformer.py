"""The mixers of a layer, attention, Mamba and MLP, with the norm and the rotary embedding that they use.

Every mixer sees packed rows: the real tokens of a row come first, and what stands behind them are pads.
"""

import functools
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F
from transformers.activations import ACT2FN
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .cache_keys_mambaformer import Layout, Retention, Span, plan_uncached
from .cache_mambaformer import MambaFormerCache
from .cache_states_mambaformer import ReplaySegment, split_at_reach
from .configuration_mambaformer import MambaFormerConfig
from .expert_bases_mambaformer import at_least_float32
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear
from .inputs_packing_mambaformer import Sequences
from .inputs_padding_mambaformer import Packing
from .modeling_stack_mambaformer import Place
from .ops_cpu_decode_mambaformer import (
    few_queries_attention,
    gated,
    rms_normed,
    rotated,
)
from .ops_eligibility_mambaformer import is_own_attention, is_replaceable, is_silu, replaceable_by_kernels
from .ops_mambaformer import causal_conv1d, conv_window, selective_scan
from .weights_parallel_mambaformer import CountsReplacements, mesh_of_inputs, used_by_shards

# Attention that leaves out the causal mask by itself; whatever needs another mask falls back on the first of them.
CAUSAL_BY_ITSELF = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
SMALLEST_BLOCK = 128  # queries of a layer with a window that are computed at a time; fewer are not worth the calls


@replaceable_by_kernels
class MambaFormerRMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467, equation 4), computed in float32 at least."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        normed = rms_normed(hidden_states, self.weight, self.variance_epsilon)
        if normed is not None:
            return normed
        wide = hidden_states.to(at_least_float32(hidden_states.dtype))
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        return self.weight * wide.to(hidden_states.dtype)


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
    module, query, key, value, attention_mask, scaling, dropout=0.0, packing: Packing | None = None, **kwargs
):
    """Attention written out; returns (rows, tokens, heads, head_dim) and the weights (rows, heads, tokens, keys).

    With a `packing`, the weights are returned in the order in which the tokens were given.
    """
    rows, heads, num_tokens, head_dim = query.shape
    grouped = query.reshape(rows, key.shape[1], -1, head_dim)  # (rows, key heads, group * tokens, head_dim)
    weights = (grouped @ key.transpose(2, 3) * scaling).view(rows, heads, num_tokens, -1)
    if attention_mask is not None:
        weights = weights + attention_mask
    weights = torch.softmax(weights, dim=-1, dtype=at_least_float32(weights.dtype)).to(query.dtype)
    weights = F.dropout(weights, p=dropout, training=module.training)
    shown = weights
    if packing is not None:
        shown = packing.unpack(weights.transpose(1, 2)).transpose(1, 2)
        weights = packing.pack(shown.transpose(1, 2)).transpose(1, 2)  # gradients reach what is shown
    grouped = weights.reshape(rows, key.shape[1], -1, weights.shape[-1])
    return (grouped @ value).view(rows, heads, num_tokens, -1).transpose(1, 2).contiguous(), shown


@dataclass(frozen=True)
class QueryBlock:
    """Queries of a layer with a window, and the keys that any of them may see: all of a text is never compared.

    Args:
        queries: which of the forward's tokens.
        keys: parts of the keys, in order.
        mask: (rows, 1, queries, keys of these parts).
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor

    def seen(self, states: torch.Tensor) -> torch.Tensor:
        """What a block sees of (rows, heads, keys, head_dim)."""
        parts = [states[:, :, part] for part in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass(frozen=True)
class AttentionPlan:
    """What attention layers that retain alike share in one forward: the mask and the implementation that takes it.

    `packing` is the way back to the order of the tokens, given when the weights are to be returned. `blocks` stand for
    the mask where there are many more tokens than a window has. `sequences` are those of packed rows, with one plan in
    `of_groups` for each of their groups.
    """

    mask: Any = None
    implementation: str = "sdpa"
    packing: Packing | None = None
    blocks: tuple[QueryBlock, ...] = ()
    sequences: Sequences | None = None
    of_groups: tuple["AttentionPlan", ...] = ()

    def to(self, device, non_blocking: bool = False) -> "AttentionPlan":
        """The same for a layer on `device`; Accelerate asks for it where layers are on several."""
        if self.of_groups:
            of_groups = tuple(plan.to(device, non_blocking) for plan in self.of_groups)
            return replace(self, sequences=self.sequences.to(device, non_blocking), of_groups=of_groups)
        if self.mask is None and not self.blocks:
            return self
        blocks = tuple(replace(block, mask=block.mask.to(device, non_blocking=non_blocking)) for block in self.blocks)
        mask = None if self.mask is None else self.mask.to(device, non_blocking=non_blocking)
        return replace(self, mask=mask, blocks=blocks)


@replaceable_by_kernels
class MambaFormerAttention(CountsReplacements):
    """Multi-head attention with grouped keys and values (arXiv 2305.13245), rotated or without positions."""

    read_by_kernels = ("head_dim",)

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__()
        self.config, self.layer_idx = config, layer_idx
        self.head_dim = config.head_dim
        self.num_key_value_groups = config.num_attention_heads // config.num_key_value_heads
        self.scaling = config.head_dim**-0.5
        self.is_causal, self.attention_dropout = True, config.attention_dropout
        query_size, key_size = config.num_attention_heads * self.head_dim, config.num_key_value_heads * self.head_dim
        self.q_proj = nn.Linear(config.hidden_size, query_size, bias=config.attention_bias)
        self.k_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.v_proj = nn.Linear(config.hidden_size, key_size, bias=config.attention_bias)
        self.o_proj = nn.Linear(query_size, config.hidden_size, bias=config.attention_output_bias)

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention: AttentionPlan,
        experts: dict[str, ScaledBasis],
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: MambaFormerCache | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Packed (rows, tokens, hidden) -> the same shape, and the attention weights where they are computed."""
        heads = (*hidden_states.shape[:-1], -1, self.head_dim)
        query = apply_expert_linear(self.q_proj, hidden_states, experts.get("q_proj")).view(heads).transpose(1, 2)
        key = apply_expert_linear(self.k_proj, hidden_states, experts.get("k_proj")).view(heads).transpose(1, 2)
        value = apply_expert_linear(self.v_proj, hidden_states, experts.get("v_proj")).view(heads).transpose(1, 2)
        if position_embeddings is not None:
            query, key = rotate(query, *position_embeddings), rotate(key, *position_embeddings)
        if cache is not None:
            is_saved = any(states.requires_grad for states in (query, key, value))
            key, value = cache.update(key, value, self.layer_idx, is_saved=is_saved)
        mixed, weights = self.attend(query, key, value, attention, **kwargs)
        return apply_expert_linear(self.o_proj, mixed.flatten(2), experts.get("o_proj")), weights

    def attend(self, query, key, value, attention: AttentionPlan, **kwargs):
        """Attention of (rows, heads, tokens, head_dim): (rows, tokens, heads, head_dim), and its weights."""
        if attention.of_groups:
            return self._attend_groups(query, key, value, attention, **kwargs), None
        dropout = self.attention_dropout if self.training else 0.0
        if dropout == 0.0 and not torch.compiler.is_compiling() and is_own_attention(attention.implementation):
            mixed = few_queries_attention(query, key, value, attention.mask, self.scaling)
            if mixed is not None:
                return mixed, None
        if attention.packing is not None:
            kwargs["packing"] = attention.packing
        forward: Callable = ALL_ATTENTION_FUNCTIONS.get_interface(attention.implementation, eager_attention_forward)
        forward = functools.partial(forward, self, dropout=dropout, scaling=self.scaling, **kwargs)
        if not attention.blocks:
            return forward(query, key, value, attention.mask)
        mixed = [
            forward(query[:, :, block.queries], block.seen(key), block.seen(value), block.mask)[0]
            for block in attention.blocks
        ]
        return torch.cat(mixed, dim=1), None

    def _attend_groups(self, query, key, value, attention: AttentionPlan, **kwargs) -> torch.Tensor:
        """`attend` of packed rows: sequences of similar length are the rows of a batch."""
        shape = (query.shape[0], query.shape[2])
        flat = (states.transpose(1, 2).flatten(0, 1) for states in (query, key, value))
        groups = zip(*(attention.sequences.group(states) for states in flat), attention.of_groups, strict=True)
        mixed = [
            self.attend(q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2), plan, **kwargs)[0]
            for q, k, v, plan in groups
        ]
        return attention.sequences.ungroup(mixed).unflatten(0, shape)


@replaceable_by_kernels
class MambaFormerConv1d(nn.Conv1d):
    """The causal convolution of `causal_conv1d`, as a module, so that whoever moves or splits weights sees it run."""

    def forward(
        self,
        inputs: torch.Tensor,
        initial_state: torch.Tensor | None = None,
        lengths: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return causal_conv1d(inputs, self.weight[:, 0], self.bias, initial_state, lengths, positions)


@replaceable_by_kernels
class MambaFormerMambaMixer(CountsReplacements):
    """Selective state space mixer, Mamba-1 (arXiv 2312.00752, algorithm 2), with Jamba's inner norms if asked for."""

    read_by_kernels = ("has_inner_norms", "rank", "state_size")

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        channels, self.state_size, self.rank = (
            config.mamba_intermediate_size,
            config.mamba_d_state,
            config.mamba_dt_rank,
        )
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=config.mamba_proj_bias)
        self.conv1d = MambaFormerConv1d(
            channels, channels, config.mamba_d_conv, groups=channels, bias=config.mamba_conv_bias, padding="valid"
        )
        self.x_proj = nn.Linear(channels, self.rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels, bias=True)
        self.A_log = nn.Parameter(torch.empty(channels, self.state_size))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=config.mamba_proj_bias)
        if config.mamba_inner_norms:
            self.dt_layernorm = MambaFormerRMSNorm(self.rank, config.rms_norm_eps)
            self.b_layernorm = MambaFormerRMSNorm(self.state_size, config.rms_norm_eps)
            self.c_layernorm = MambaFormerRMSNorm(self.state_size, config.rms_norm_eps)
        self.has_inner_norms = config.mamba_inner_norms

    def forward(
        self,
        hidden_states: torch.Tensor,
        experts: dict[str, ScaledBasis],
        cache: MambaFormerCache | None = None,
        lengths: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Left-aligned (rows, tokens, hidden) of which `lengths` (rows,) are real -> the same shape.

        `positions` (rows, tokens) are those of tokens in their own sequences, where a row without a cache has several.
        """
        inputs, gate = apply_expert_linear(self.in_proj, hidden_states, experts.get("in_proj")).chunk(2, dim=-1)
        if cache is None:
            mixed, _, _ = self.advance({}, inputs, gate, experts, lengths, positions=positions)
        else:
            mixed = self._advance_cache(cache, inputs, gate, lengths, experts)
        return apply_expert_linear(self.out_proj, mixed, experts.get("out_proj"))

    def _advance_cache(self, cache: MambaFormerCache, inputs, gate, lengths, experts) -> torch.Tensor:
        layer, states = cache.layers[self.layer_idx], cache.recurrent_states(self.layer_idx, inputs)
        mixed, segment, reach = [], None, cache.replay_reach
        for tokens, real in split_at_reach(inputs.shape[1], lengths, reach):
            y, states, segment = self.advance(states, inputs[:, tokens], gate[:, tokens], experts, real, reach > 0)
            mixed.append(y)
        layer.update_conv_state(states["conv"])
        layer.update_recurrent_state(states["ssm"])
        layer.recurrent.record(segment, is_whole=len(mixed) == 1)
        return mixed[0] if len(mixed) == 1 else torch.cat(mixed, dim=1)

    def advance(
        self,
        states: dict[str, torch.Tensor],
        inputs: torch.Tensor,
        gate: torch.Tensor,
        experts: dict[str, ScaledBasis],
        lengths: torch.Tensor | None = None,
        is_recorded: bool = False,
        positions: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, dict[str, torch.Tensor], ReplaySegment | None]:
        """Convolution and scan from `states` ({} at first): output, states, and what they took if recorded."""
        mixed, window = self.conv1d(inputs, states.get("conv"), lengths, positions)
        dt, B, C = self.selection(mixed, experts)
        options = {"lengths": lengths, "dt_softplus": True, "A_is_log": True, "positions": positions}
        y, state = selective_scan(mixed, dt, self.A_log, B, C, self.D, gate, states.get("ssm"), **options)
        segment = None
        if is_recorded and is_replaceable(self.conv1d):  # tokens are run again without a call of the module
            # A view would keep the inputs of a whole prompt in memory.
            recorded = {"x": inputs.clone(), "u": mixed, "dt": dt, "B": B}
            A = -torch.exp(self.A_log.to(at_least_float32(self.A_log.dtype)))  # as it is now, should it be trained
            segment = ReplaySegment(
                recorded, functools.partial(_advance_states, A, self.conv1d.kernel_size[0]), states, lengths
            )
        return y, {"conv": window, "ssm": state}, segment

    def state_shapes(self) -> dict[str, tuple[int, ...]]:
        """The shape of one row of each state that a cache keeps for this mixer."""
        channels, _, kernel = self.conv1d.weight.shape
        return {"conv": (kernel - 1, channels), "ssm": (channels, self.state_size)}

    def selection(self, inputs: torch.Tensor, experts: dict[str, ScaledBasis]) -> tuple[torch.Tensor, ...]:
        """The step sizes before softplus (rows, tokens, channels), and B and C (rows, tokens, state)."""
        sizes = [self.rank, self.state_size, self.state_size]
        dt, B, C = apply_expert_linear(self.x_proj, inputs, experts.get("x_proj")).split(sizes, dim=-1)
        if self.has_inner_norms:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        mesh = mesh_of_inputs(self.x_proj)
        if mesh is not None:
            B, C = used_by_shards(B, mesh), used_by_shards(C, mesh)
        return apply_expert_linear(self.dt_proj, dt, experts.get("dt_proj")), B, C


def _advance_states(
    A: torch.Tensor,
    num_taps: int,
    states: dict[str, torch.Tensor],
    inputs: dict[str, torch.Tensor],
    lengths: torch.Tensor | None,
) -> dict[str, torch.Tensor]:
    """The states after tokens that `MambaFormerMambaMixer.advance` recorded, without their outputs."""
    window = conv_window(inputs["x"], num_taps, states.get("conv"), lengths)
    u, dt, B, state = inputs["u"], inputs["dt"], inputs["B"], states.get("ssm")
    _, state = selective_scan(u, dt, A, B, B, initial_state=state, lengths=lengths, dt_softplus=True)
    return {"conv": window, "ssm": state}


@replaceable_by_kernels
class MambaFormerMLP(CountsReplacements):
    """Gated MLP (arXiv 2002.05202, equation 6)."""

    def __init__(self, config: MambaFormerConfig):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=config.mlp_bias)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: torch.Tensor, experts: dict[str, ScaledBasis]) -> torch.Tensor:
        gates = apply_expert_linear(self.gate_proj, hidden_states, experts.get("gate_proj"))
        states = apply_expert_linear(self.up_proj, hidden_states, experts.get("up_proj"))
        inner = gated(gates, states) if is_silu(self.act_fn) else None
        inner = self.act_fn(gates) * states if inner is None else inner
        return apply_expert_linear(self.down_proj, inner, experts.get("down_proj"))


def plan_attention(
    places: list[Place],
    config,
    span: Span,
    cache,
    hidden_states: torch.Tensor,
    packing: Packing | None,
    sequences: Sequences | None = None,
) -> dict[int | None, AttentionPlan]:
    """One plan for each retention of the layers in these places, by its window.

    `packing` is given when the attention weights are to be returned, which only written-out attention can.
    """
    found = {}
    packing = packing if config._attn_implementation == "eager" else None
    for place in places:
        has_attention, _, window = place.facts
        if has_attention and window not in found:
            retention, device = Retention.of(config, window), hidden_states.device
            layout = plan_uncached(retention, span, device) if cache is None else cache.layout(place.position)
            if sequences is None:
                plan = _attention_plan(config, retention, layout, span, hidden_states)
            else:
                plan = _packed_attention_plan(config, retention, sequences, hidden_states)
            found[window] = replace(plan, packing=packing)
    return found


def can_group(config, output_attentions: bool | None) -> bool:
    """Whether attention of packed rows may look at their borders, and need not return its weights."""
    implementation = config._attn_implementation
    is_shown = config.output_attentions if output_attentions is None else output_attentions
    is_shown = is_shown and implementation == "eager"
    return not (torch.compiler.is_compiling() or implementation == "flex_attention" or is_shown)


def _packed_attention_plan(config, retention: Retention, sequences: Sequences, hidden_states) -> AttentionPlan:
    if not sequences.groups:
        implementation, positions, numbers = config._attn_implementation, sequences.positions, sequences.numbers
        implementation = "sdpa" if implementation.startswith("flash") else implementation
        return _masked_plan(config, retention, implementation, positions, positions, hidden_states, numbers)
    device, of_groups = hidden_states.device, []
    for group in sequences.groups:
        span = Span(group.length)
        of_groups.append(
            _attention_plan(config, retention, plan_uncached(retention, span, device), span, hidden_states)
        )
    return AttentionPlan(sequences=sequences, of_groups=tuple(of_groups))


def _attention_plan(config, retention: Retention, layout: Layout, span: Span, hidden_states) -> AttentionPlan:
    implementation, device = config._attn_implementation, hidden_states.device
    key_positions = layout.key_positions
    if key_positions is None and (implementation in CAUSAL_BY_ITSELF or span.num_tokens == 1):
        return AttentionPlan(None, implementation)
    if implementation.startswith("flash"):
        implementation = "sdpa"  # a flash kernel knows no positions but those of a plain causal mask
    query_positions = span.positions(device)
    key_positions = query_positions if key_positions is None else key_positions
    num_queries = query_positions.shape[1]
    rows = max(query_positions.shape[0], key_positions.shape[0])
    is_cut = implementation == "sdpa" and retention.window is not None and not isinstance(num_queries, torch.SymInt)
    if is_cut and num_queries > _block_size(retention):
        query_positions, key_positions = query_positions.expand(rows, -1), key_positions.expand(rows, -1)
        blocks = _query_blocks(retention, layout.num_stored, query_positions, key_positions)
        return AttentionPlan(None, implementation, blocks=tuple(blocks))
    return _masked_plan(config, retention, implementation, query_positions, key_positions, hidden_states)


def _masked_plan(
    config,
    retention: Retention,
    implementation: str,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    hidden_states: torch.Tensor,
    sequences: torch.Tensor | None = None,
) -> AttentionPlan:
    """A mask from positions (rows or 1, queries) and (rows or 1, keys), for the implementation's own kind.

    `sequences` (rows, tokens) tells the sequence of each token, of queries and keys alike, where a row has several.
    """
    num_queries, num_keys, device = query_positions.shape[1], key_positions.shape[1], hidden_states.device
    rows = max(query_positions.shape[0], key_positions.shape[0])
    if implementation == "flex_attention":
        # It asks about every row of the batch, and about whole blocks, also beyond the last query and key.
        rows = hidden_states.shape[0]
        query_positions, key_positions = _whole_blocks(query_positions), _whole_blocks(key_positions)
        sequences = None if sequences is None else _whole_blocks(sequences)
    query_positions, key_positions = query_positions.expand(rows, -1), key_positions.expand(rows, -1)

    def is_visible(row, head, query, key):
        visible = retention.is_visible(query_positions[row, query], key_positions[row, key])
        return visible if sequences is None else visible & (sequences[row, query] == sequences[row, key])

    make_mask = ALL_MASK_ATTENTION_FUNCTIONS.get(implementation, ALL_MASK_ATTENTION_FUNCTIONS["sdpa"])
    mask = make_mask(
        batch_size=rows,
        q_length=num_queries,
        kv_length=num_keys,
        mask_function=is_visible,
        allow_is_causal_skip=False,
        dtype=hidden_states.dtype,
        device=device,
        config=config,
    )
    return AttentionPlan(mask, implementation)


def _block_size(retention: Retention) -> int:
    return max(retention.window, SMALLEST_BLOCK)


def _query_blocks(
    retention: Retention, num_stored: int, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> Iterator[QueryBlock]:
    """Blocks of adjoining queries, from the positions of (rows, queries) and of (rows, stored and new keys).

    Rows are packed, so that what lies a window back in the columns does so in the positions of all rows.
    """
    num_queries, size, sinks = query_positions.shape[1], _block_size(retention), retention.sinks
    for start in range(0, num_queries, size):
        end, first = min(start + size, num_queries), max(0, start - retention.window + 1)  # first: of the new keys
        stored = num_stored if start < retention.window else min(sinks, num_stored)
        ends = ((0, stored), (num_stored, num_stored + min(sinks, first)), (num_stored + first, num_stored + end))
        keys = tuple(slice(*part) for part in ends if part[0] < part[1])
        positions = torch.cat([key_positions[:, part] for part in keys], dim=1)
        visible = retention.is_visible(query_positions[:, start:end, None], positions[:, None])
        yield QueryBlock(slice(start, end), keys, visible[:, None])


def _whole_blocks(positions: torch.Tensor) -> torch.Tensor:
    return F.pad(positions, (0, -positions.shape[1] % 128), value=-1)
