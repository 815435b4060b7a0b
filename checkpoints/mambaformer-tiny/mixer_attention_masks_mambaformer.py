"""Which keys each query of a forward sees: masks, blocks of queries, and the implementation that takes them."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch.nn import functional as F
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .cache_keys_mambaformer import Layout, Retention, Span, plan_uncached
from .inputs_packing_mambaformer import Sequences
from .inputs_padding_mambaformer import Packing
from .modeling_stack_mambaformer import Place

# Attention that leaves out the causal mask by itself; whatever needs another mask falls back on the first of them.
CAUSAL_BY_ITSELF = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
SMALLEST_BLOCK = 128  # queries of a layer with a window that are computed at a time; fewer are not worth the calls


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
        attends, window, _ = place.spec
        if attends and window not in found:
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
