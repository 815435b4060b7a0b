"""Which keys each query of a forward sees: masks, blocks of queries, and the implementation that takes them."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

import torch
from torch.nn import functional as F
from torch.nn.attention.flex_attention import BlockMask
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS

from .cache_eviction_mambaformer import Chunk, PrunedLayout, PrunedRetention
from .cache_mambaformer import MambaFormerCache
from .cache_retention_mambaformer import Layout, Retention, Span, make_uncached_layout
from .configuration_mambaformer import MambaFormerConfig
from .inputs_packing_mambaformer import Sequences
from .inputs_padding_mambaformer import LeftAlignment
from .mixer_attention_sinks_mambaformer import Angles, SinkAngles
from .modeling_stack_mambaformer import Place

# Implementations that apply the causal mask without a tensor; other masks are left to the first of them.
CAUSAL_BY_ITSELF = ("sdpa", "flash_attention_2", "flash_attention_3", "flash_attention_4")
SMALLEST_BLOCK = 128  # queries of a layer with a window in one call; smaller blocks cost more calls than they save


@dataclass(frozen=True)
class QueryBlock:
    """Queries of a layer with a window, and the keys that any of them may see.

    Blocks keep the work proportional to the window: a query is never compared with all keys of a long sequence.

    Args:
        queries: the range of the forward's tokens.
        keys: ranges of the keys, in order.
        mask: (rows, 1, queries, keys of these ranges).
    """

    queries: slice
    keys: tuple[slice, ...]
    mask: torch.Tensor

    def select_keys(self, states: torch.Tensor) -> torch.Tensor:
        """The part of keys or values (rows, heads, keys, head_dim) that the block sees."""
        parts = [states[:, :, part] for part in self.keys]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)


@dataclass(frozen=True)
class AttentionMasks:
    """The mask of one forward, and the attention implementation that takes it; layers with equal windows share it.

    Args:
        mask: in the form of the implementation; `None` means causal, or that a single query sees all keys.
        implementation: the name of an attention function of Transformers.
        alignment: restores the order of the tokens; present if attention weights are returned.
        blocks: replace the mask where there are many more tokens than a window has.
        sequences: the sequences of packed rows, with the masks of each of their groups in `groups`.
        sink_angles: cosines and sines (rows or 1, queries, head_dim) by which queries meet sinks; `None` where all
            keys have the same angles.
        num_sinks: with `sink_angles`, the number of sinks, which have the first slots of a cache.
        is_sink: (rows or 1, keys), the sinks among the keys; `None` where
        key_angles: turn the sinks for the only query instead.
        chunks: the masks of each chunk of a forward that evicts keys, by the retention of the layer. Empty where
            all layers have the same single chunk, whose mask is `mask`.
    """

    mask: torch.Tensor | BlockMask | None = None
    implementation: str = "sdpa"
    alignment: LeftAlignment | None = None
    blocks: tuple[QueryBlock, ...] = ()
    sequences: Sequences | None = None
    groups: tuple["AttentionMasks", ...] = ()
    sink_angles: Angles | None = None
    is_sink: torch.Tensor | None = None
    num_sinks: int = 0
    key_angles: Angles | None = None
    chunks: dict[PrunedRetention, tuple["AttentionMasks", ...]] = field(default_factory=dict)

    def to(self, device: torch.device, non_blocking: bool = False) -> "AttentionMasks":
        """The same masks on `device`; Accelerate calls this where layers are on several devices."""

        def move(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.to(device, non_blocking=non_blocking)

        def move_angles(angles: Angles | None) -> Angles | None:
            return None if angles is None else (move(angles[0]), move(angles[1]))

        is_sink = self.is_sink
        moved = replace(
            self,
            sink_angles=move_angles(self.sink_angles),
            key_angles=move_angles(self.key_angles),
            is_sink=None if is_sink is None else move(is_sink),
        )
        if self.sequences is not None and self.groups:
            groups = tuple(masks.to(device, non_blocking) for masks in self.groups)
            return replace(moved, sequences=self.sequences.to(device, non_blocking), groups=groups)
        chunks = {kind: tuple(each.to(device, non_blocking) for each in masks) for kind, masks in self.chunks.items()}
        blocks = tuple(replace(block, mask=move(block.mask)) for block in self.blocks)
        mask = self.mask
        if mask is not None:  # a mask of flex attention takes no other argument
            mask = mask.to(device) if isinstance(mask, BlockMask) else move(mask)
        return replace(moved, mask=mask, blocks=blocks, chunks=chunks)


def make_attention_masks(
    places: list[Place],
    config: MambaFormerConfig,
    span: Span,
    cache: MambaFormerCache | None,
    hidden_states: torch.Tensor,
    alignment: LeftAlignment | None,
    sequences: Sequences | None = None,
    sink_angles: SinkAngles | None = None,
) -> dict[int | None, AttentionMasks]:
    """The masks of the layers in these places, by their windows.

    `alignment` is given when the attention weights are to be returned, which only written-out attention can.
    `sink_angles` are for layers with a window.
    """
    by_window: dict[int | None, AttentionMasks] = {}
    alignment = alignment if config._attn_implementation == "eager" else None
    for place in places:
        attends, window, _ = place.spec
        if attends and window not in by_window:
            retention, device = Retention.of(config, window), hidden_states.device
            layout = make_uncached_layout(retention, span, device) if cache is None else cache.layout(place.position)
            angles = None if window is None else sink_angles
            has_sinks = angles is not None and angles.keys is None
            if cache is not None and isinstance(layout, PrunedLayout):
                masks = _make_pruned_masks(places, config, cache, hidden_states, alignment)
            elif sequences is None:
                masks = _make_masks(config, retention, layout, span, hidden_states, has_sinks)
            else:
                masks = _make_packed_masks(config, retention, sequences, hidden_states, has_sinks)
            if angles is not None:
                masks = replace(masks, sink_angles=angles.queries, key_angles=angles.keys, num_sinks=retention.sinks)
            by_window[window] = replace(masks, alignment=alignment)
    return by_window


def can_group(config: MambaFormerConfig, output_attentions: bool | None) -> bool:
    """Whether attention of packed rows may read the lengths of their sequences, and need not return its weights."""
    implementation = config._attn_implementation
    is_shown = config.output_attentions if output_attentions is None else output_attentions
    is_shown = is_shown and implementation == "eager"
    return not (torch.compiler.is_compiling() or implementation == "flex_attention" or is_shown)


def _implementation_of(config: MambaFormerConfig, is_plain: bool) -> str:
    """The implementation chosen; a flash kernel takes only a causal mask, and keys as wide as values (`is_plain`)."""
    implementation = config._attn_implementation or "eager"
    return "sdpa" if implementation.startswith("flash") and not is_plain else implementation


def _make_packed_masks(
    config: MambaFormerConfig,
    retention: Retention,
    sequences: Sequences,
    hidden_states: torch.Tensor,
    has_sinks: bool,
) -> AttentionMasks:
    if sequences.grouping is None:
        positions, indices, implementation = sequences.positions, sequences.indices, _implementation_of(config, False)
        masks = _masks_from_positions(config, retention, implementation, positions, positions, hidden_states, indices)
        return replace(masks, is_sink=retention.is_sink(positions) if has_sinks else None)
    device, groups = hidden_states.device, []
    for group in sequences.grouping.groups:
        span = Span(group.length)
        layout = make_uncached_layout(retention, span, device)
        groups.append(_make_masks(config, retention, layout, span, hidden_states, has_sinks))
    return AttentionMasks(sequences=sequences, groups=tuple(groups))


def _make_masks(
    config: MambaFormerConfig,
    retention: Retention,
    layout: Layout,
    span: Span,
    hidden_states: torch.Tensor,
    has_sinks: bool,
) -> AttentionMasks:
    masks = _make_plain_masks(config, retention, layout, span, hidden_states, has_sinks)
    if not has_sinks:
        return masks
    positions = layout.key_positions
    if positions is None:  # sinks are in the first slots
        positions = torch.arange(layout.num_slots, device=hidden_states.device)[None]
    return replace(masks, is_sink=retention.is_sink(positions))


def _make_plain_masks(
    config: MambaFormerConfig,
    retention: Retention,
    layout: Layout,
    span: Span,
    hidden_states: torch.Tensor,
    has_sinks: bool,
) -> AttentionMasks:
    implementation, device = _implementation_of(config, is_plain=not has_sinks), hidden_states.device
    key_positions = layout.key_positions
    if key_positions is None and (implementation in CAUSAL_BY_ITSELF or span.num_tokens == 1):
        return AttentionMasks(None, implementation)
    implementation = _implementation_of(config, is_plain=False)
    query_positions = span.positions(device)
    key_positions = query_positions if key_positions is None else key_positions
    num_queries = query_positions.shape[1]
    rows = max(query_positions.shape[0], key_positions.shape[0])
    window = retention.window
    can_cut = implementation == "sdpa" and not isinstance(num_queries, torch.SymInt)
    if window is not None and can_cut and num_queries > _block_size(window):
        query_positions, key_positions = query_positions.expand(rows, -1), key_positions.expand(rows, -1)
        blocks = _query_blocks(retention, window, layout.num_stored, query_positions, key_positions)
        return AttentionMasks(None, implementation, blocks=tuple(blocks))
    return _masks_from_positions(config, retention, implementation, query_positions, key_positions, hidden_states)


def _masks_from_positions(
    config: MambaFormerConfig,
    retention: Retention,
    implementation: str,
    query_positions: torch.Tensor,
    key_positions: torch.Tensor,
    hidden_states: torch.Tensor,
    sequences: torch.Tensor | None = None,
) -> AttentionMasks:
    """The mask of `implementation`, from positions (rows or 1, queries) and (rows or 1, keys).

    `sequences` (rows, tokens) numbers the sequence of each token, of queries and keys alike, where a row has several.
    """
    num_queries, num_keys, device = query_positions.shape[1], key_positions.shape[1], hidden_states.device
    rows = max(query_positions.shape[0], key_positions.shape[0])
    if implementation == "flex_attention":
        # It calls `is_visible` for every row of the batch, and for full blocks, beyond the last query and key too.
        rows = hidden_states.shape[0]
        query_positions, key_positions = _pad_to_blocks(query_positions), _pad_to_blocks(key_positions)
        sequences = None if sequences is None else _pad_to_blocks(sequences)
    query_positions, key_positions = query_positions.expand(rows, -1), key_positions.expand(rows, -1)

    def is_visible(row: torch.Tensor, head: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
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
    return AttentionMasks(mask, implementation)


def _make_pruned_masks(
    places: list[Place],
    config: MambaFormerConfig,
    cache: MambaFormerCache,
    hidden_states: torch.Tensor,
    alignment: LeftAlignment | None,
) -> AttentionMasks:
    """The masks of all layers with a pruning policy.

    Raises:
        ValueError: attention weights are to be returned, and the forward evicts keys between its tokens.
    """
    pruned = (cache.layout(place.position) for place in places if place.spec.attends and place.window is None)
    layouts = {layout.retention: layout for layout in pruned if isinstance(layout, PrunedLayout)}
    longest = max(len(layout.chunks) for layout in layouts.values())
    is_one_chunk = longest == 1 and len(layouts) == 1
    if alignment is not None and not is_one_chunk:
        raise ValueError(
            "The cache evicts keys between the tokens of this forward, or other numbers of keys in each layer, so "
            "there are no attention weights of one shape: feed fewer tokens at once, or leave `output_attentions` out."
        )
    by_retention = {
        retention: tuple(_mask_of_chunk(config, chunk, hidden_states) for chunk in layout.chunks)
        for retention, layout in layouts.items()
    }
    if is_one_chunk:
        return next(iter(by_retention.values()))[0]
    return AttentionMasks(None, _implementation_of(config, is_plain=False), chunks=by_retention)


def _mask_of_chunk(config: MambaFormerConfig, chunk: Chunk, hidden_states: torch.Tensor) -> AttentionMasks:
    """Queries see the slots up to that of their own key."""
    implementation, keys = _implementation_of(config, is_plain=True), chunk.layout.key_positions
    if keys is None and (implementation in CAUSAL_BY_ITSELF or chunk.width == 1):
        return AttentionMasks(None, implementation)
    queries, implementation = chunk.query_slots(hidden_states.device), _implementation_of(config, is_plain=False)
    keys = queries if keys is None else keys
    return _masks_from_positions(config, Retention(), implementation, queries, keys, hidden_states)


def _block_size(window: int) -> int:
    return max(window, SMALLEST_BLOCK)


def _query_blocks(
    retention: Retention, window: int, num_stored: int, query_positions: torch.Tensor, key_positions: torch.Tensor
) -> Iterator[QueryBlock]:
    """Blocks of adjoining queries, from positions (rows, queries) and (rows, stored and new keys).

    Rows are left-aligned, so a distance of a window in columns is one in the positions of every row.
    """
    num_queries, size, sinks = query_positions.shape[1], _block_size(window), retention.sinks
    for start in range(0, num_queries, size):
        end, first = min(start + size, num_queries), max(0, start - window + 1)  # first: of the new keys
        stored = num_stored if start < window else min(sinks, num_stored)
        ends = ((0, stored), (num_stored, num_stored + min(sinks, first)), (num_stored + first, num_stored + end))
        keys = tuple(slice(*part) for part in ends if part[0] < part[1])
        positions = torch.cat([key_positions[:, part] for part in keys], dim=1)
        visible = retention.is_visible(query_positions[:, start:end, None], positions[:, None])
        yield QueryBlock(slice(start, end), keys, visible[:, None])


def _pad_to_blocks(positions: torch.Tensor) -> torch.Tensor:
    return F.pad(positions, (0, -positions.shape[1] % 128), value=-1)
