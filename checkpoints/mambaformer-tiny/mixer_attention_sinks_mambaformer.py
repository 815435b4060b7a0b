"""Attention sinks at positions within the cache: `MambaFormerConfig(window_positions="relative")`.

StreamingLLM (arXiv 2309.17453, section 3.2) gives the keys that a query sees the positions 0, 1, 2, ... in their
order. Keys in the window keep their distance p - j to the query, so only sinks move: sink i has the distance
min(p, sinks + window - 1) - i. No stored key is ever rotated again. A query is rotated twice instead, by its own
position for keys of the window and by a limited one for sinks.

One product of doubled vectors gives both scores, whatever computes attention: a query is [q, q for sinks], a key of
the window is [k, 0], a sink is [0, k]. For a single query the sinks are turned instead, in a copy of the keys.
"""

from typing import NamedTuple, TypeAlias

import torch
from torch import Tensor

from .cache_retention_mambaformer import Span
from .configuration_mambaformer import MambaFormerConfig
from .inputs_packing_mambaformer import Sequences
from .ops_mambaformer import apply_rope

Angles: TypeAlias = tuple[Tensor, Tensor]  # cosines and sines


class SinkAngles(NamedTuple):
    """The rotation by which queries meet sinks; for a single query also that of sinks which has the same effect."""

    queries: Angles
    keys: Angles | None


def needs_sink_angles(config: MambaFormerConfig, span: Span, sequences: Sequences | None) -> bool:
    """Whether a query of the forward may be further from sinks than their largest distance; reads no tensor."""
    if not config.has_moving_sinks:
        return False
    longest = span.num_tokens
    if sequences is not None and sequences.grouping is not None:
        longest = max(group.length for group in sequences.grouping.groups)
    if span.columns is None or isinstance(longest, torch.SymInt):
        return True
    return span.columns + longest > _size(config)


def positions_for_sinks(config: MambaFormerConfig, positions: Tensor, tokens_before: Tensor) -> Tensor:
    """Positions (rows or 1, queries) at which queries meet sinks.

    Args:
        positions: of the queries in RoPE.
        tokens_before: number of tokens before each query in its own sequence, which `position_ids` may differ from.
    """
    return positions - (tokens_before - (_size(config) - 1)).clamp(min=0)


def turns_keys(config: MambaFormerConfig, span: Span, sequences: Sequences | None) -> bool:
    """Whether the forward has one query per row, for which sinks are turned; YaRN would scale them once more."""
    if sequences is not None or isinstance(span.num_tokens, torch.SymInt) or span.num_tokens != 1:
        return False
    return (config.rope_parameters or {}).get("rope_type") != "yarn"


def turn_sinks(key: Tensor, num_sinks: int, angles: Angles) -> Tensor:
    """Keys (rows, heads, keys, head_dim) whose first `num_sinks` are turned by angles of (rows or 1, 1, head_dim)."""
    sinks, others = key[:, :, :num_sinks], key[:, :, num_sinks:]
    cos, sin = (each.expand(-1, sinks.shape[2], -1).contiguous() for each in angles)
    return torch.cat([apply_rope(sinks, cos, sin), others], dim=2)


def stack_positions(config: MambaFormerConfig, positions: Tensor, tokens_before: Tensor, turns_keys: bool) -> Tensor:
    """Positions (2 or 3, rows or 1, queries): of queries, of queries that meet sinks, and how far sinks are turned."""
    for_sinks = positions_for_sinks(config, positions, tokens_before)
    return torch.stack([positions, for_sinks, positions - for_sinks] if turns_keys else [positions, for_sinks])


def split_angles(cos: Tensor, sin: Tensor) -> tuple[Angles, SinkAngles]:
    """Cosines and sines of `stack_positions` -> the angles of queries, and those for sinks."""
    turned = (cos[2], sin[2]) if cos.shape[0] == 3 else None
    return (cos[0], sin[0]), SinkAngles((cos[1], sin[1]), turned)


def _size(config: MambaFormerConfig) -> int:
    """The most keys that a query of a layer with a window sees."""
    return config.num_sink_tokens + (config.sliding_window or 0)


def rotate_queries(query: Tensor, angles: Angles, sink_angles: Angles | None) -> Tensor:
    """Queries (rows, heads, queries, head_dim) as they meet keys; with `sink_angles`, of doubled width."""
    rotated = apply_rope(query, *angles)
    return rotated if sink_angles is None else torch.cat([rotated, apply_rope(query, *sink_angles)], dim=-1)


def separate_sinks(key: Tensor, is_sink: Tensor) -> Tensor:
    """Keys (rows, heads, keys, head_dim) of doubled width: zeros, where `is_sink` (rows or 1, keys), come first."""
    is_sink = is_sink[:, None, :, None]
    return torch.cat([key.masked_fill(is_sink, 0), key.masked_fill(~is_sink, 0)], dim=-1)


__all__ = [
    "Angles",
    "SinkAngles",
    "needs_sink_angles",
    "positions_for_sinks",
    "rotate_queries",
    "separate_sinks",
    "split_angles",
    "stack_positions",
    "turn_sinks",
    "turns_keys",
]
