"""What a cache is made of: one layer for each of the model, the clock that they share, the log of the tokens."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from .cache_keys_mambaformer import Buffer, IdBuffer, KeyValueStore, Retention, counted_positions, usable
from .cache_states_mambaformer import RecurrentStore
from .modeling_stack_mambaformer import Facts


@dataclass
class Clock:
    """Two lengths, two names: `columns` were fed (pads included), of which row b had `counts[b]` real tokens.

    `columns` is an integer, or a tensor () under static storage. `counts` is `None` while no row ever had a pad.
    `overshoot` is by how many tokens at most a row has been further than it is now: what they overwrote is lost.
    """

    columns: Any = 0
    counts: torch.Tensor | None = None
    is_empty: bool = True
    overshoot: int = 0
    # What `columns` was when the host last knew it: the tensor, its version, its value.
    known: tuple[torch.Tensor, int, int] | None = field(default=None, repr=False, compare=False)

    def num_columns(self) -> int:
        """`columns` as an integer; one on a device is read only if others have written it, as compiled steps do."""
        if isinstance(self.columns, int):
            return self.columns
        if not self._is_known():
            value = int(self.columns)
            if self.columns.is_inference():  # it does not count what is written
                return value
            self.known = self.columns, self.columns._version, value
        return self.known[2]

    def advance(self, num_tokens: int) -> None:
        """Adds to `columns`, in place where it is a tensor, without a look at its value."""
        is_known = not torch.compiler.is_compiling() and not isinstance(self.columns, int) and self._is_known()
        self.columns += num_tokens
        if is_known:
            self.known = self.columns, self.columns._version, self.known[2] + num_tokens

    def move_to(self, device) -> None:
        """Makes `columns` a tensor, so that a compiled step never depends on its value."""
        if isinstance(self.columns, int):
            value, self.columns = self.columns, torch.full((), self.columns, device=device)
            if not self.columns.is_inference():
                self.known = self.columns, self.columns._version, value
        self.columns = usable(self.columns)

    def _is_known(self) -> bool:
        known, columns = self.known, self.columns
        return known is not None and known[0] is columns and known[1] == columns._version

    @property
    def start(self) -> Any:
        """Real tokens before the next one, as a `Span` wants them."""
        if self.counts is not None:
            return self.counts
        return self.columns if isinstance(self.columns, int) else self.columns[None]


class CacheLayer:
    """What every layer of the cache can do; the stores do the work and each implements all of it."""

    is_croppable = True
    record_past = False  # what the library asks a layer by `Cache.is_recording_past`

    def _set_up(self, clock: Clock, stores: dict[str, Any], max_cache_len: int | None) -> None:
        self.clock, self.stores, self.max_columns = clock, stores, max_cache_len
        self.attention: KeyValueStore | None = stores.get("attention")
        self.recurrent: RecurrentStore | None = stores.get("mamba")
        self.is_sliding = self.attention is not None and self.attention.retention.window is not None

    @property
    def is_compileable(self) -> bool:
        """Whether the storage has a fixed size and fixed addresses."""
        return self.max_columns is not None

    def each_store(self, method: str, *args) -> None:
        for store in self.stores.values():
            getattr(store, method)(*args)

    def record_past_of(self, reach: int, counts: torch.Tensor, columns: int) -> None:
        """Makes the last `reach` tokens removable; rows hold `counts` (rows or 1,) tokens in `columns`."""
        self.record_past = True
        self.each_store("record_past", reach, counts, columns)

    def fork_into(self, other: "CacheLayer") -> None:
        other.record_past = self.record_past
        for name, store in self.stores.items():
            store.fork_into(other.stores[name])

    def reset(self) -> None:
        self.each_store("drop")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.each_store("select_rows", beam_idx)

    def get_seq_length(self) -> int:
        return self.clock.num_columns()

    def get_max_length(self) -> int:
        return -1 if self.max_columns is None else self.max_columns

    get_max_cache_shape = get_max_length  # its name before transformers 5.19

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next forward's mask covers, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to do: stores take shape from what they are first given."""

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("Layers share one clock and go back together: call `crop` of the cache.")

    def offload(self) -> None:
        raise NotImplementedError("This cache stays on the device of its model: keys are not offloaded.")

    prefetch = offload


class AttentionCacheLayer(CacheLayer, CacheLayerMixin):
    """Keys and values of an attention layer."""

    supports_early_init = False

    def __init__(self, clock: Clock, stores: dict[str, Any], max_cache_len: int | None = None):
        self._set_up(clock, stores, max_cache_len)

    def update(self, key_states, value_states, layout, is_recorded=False, *args, **kwargs):
        return self.attention.update(key_states, value_states, layout, is_recorded)

    @property
    def keys(self) -> torch.Tensor | None:
        return self.attention.tensors().get("keys")

    @property
    def values(self) -> torch.Tensor | None:
        return self.attention.tensors().get("values")

    @property
    def is_initialized(self) -> bool:
        return self.attention.keys.tensor is not None


class RecurrentCacheLayer(CacheLayer, LinearAttentionCacheLayerMixin):
    """Convolution window and state of a Mamba layer."""

    supports_early_init = False
    number_of_states = 1

    def __init__(self, clock: Clock, stores: dict[str, Any], max_cache_len: int | None = None):
        self._set_up(clock, stores, max_cache_len)

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.recurrent.update("conv", conv_states)
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.recurrent.update("ssm", recurrent_states)
        return recurrent_states

    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:
        return {0: self.recurrent.states.get("conv")}

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        return {0: self.recurrent.states.get("ssm")}

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return {0: "ssm" in self.recurrent.states and not self.clock.is_empty}


class HybridCacheLayer(RecurrentCacheLayer, AttentionCacheLayer):
    """Both, for a layer of attention and Mamba."""


class StatelessCacheLayer(AttentionCacheLayer):
    """Nothing, for a layer that a user put in and that keeps nothing from token to token."""

    keys = values = None
    is_initialized = True


LAYER_CLASSES = {
    (): StatelessCacheLayer,
    ("attention",): AttentionCacheLayer,
    ("mamba",): RecurrentCacheLayer,
    ("attention", "mamba"): HybridCacheLayer,
}


def make_layer(config, facts: Facts, clock: Clock, max_columns: int | None = None) -> CacheLayer:
    """An empty cache layer for a layer of these facts; its storage is fixed if `max_columns` is given."""
    has_attention, has_mamba, window = facts
    stores: dict[str, Any] = {}
    if has_attention:
        stores["attention"] = KeyValueStore(Retention.of(config, window), max_columns)
    if has_mamba:
        stores["mamba"] = RecurrentStore(is_fixed=max_columns is not None)
    return LAYER_CLASSES[tuple(stores)](clock, stores, max_columns)


class TokenLog:
    """What was fed, column by column with its pads: enough to feed it again."""

    def __init__(self, config, fixed_size: int | None = None):
        self.token_ids, self.mask, self.position_ids = (
            IdBuffer(config, fixed_size),
            Buffer(1, fixed_size),
            Buffer(1, fixed_size),
        )
        self.embedding_marks = Buffer(1, fixed_size)
        self.has_embeddings = False

    def append(self, columns, token_ids, mask=None, position_ids=None, embedding_marks=None) -> None:
        """Remembers (rows, tokens) behind `columns`; a mask, positions or marks are kept from their first use on."""
        size = columns + token_ids.shape[1] if isinstance(columns, int) else self.token_ids.fixed_size
        if isinstance(columns, int):
            slots = columns
        else:
            slots = (columns + torch.arange(token_ids.shape[1], device=token_ids.device))[None]
        self.token_ids.reserve(token_ids, size)
        self.token_ids.write(slots, token_ids)
        if mask is not None or self.mask.tensor is not None:
            mask = torch.ones_like(token_ids, dtype=torch.bool) if mask is None else mask
            self._start(self.mask, mask, size, lambda like: torch.ones_like(like))
            self.mask.write(slots, mask)
        if position_ids is not None:
            self._start(self.position_ids, position_ids, size, self._counted_positions)
            self.position_ids.write(slots, position_ids)
        if embedding_marks is not None or self.embedding_marks.tensor is not None:
            marks = torch.zeros_like(token_ids) if embedding_marks is None else embedding_marks
            self._start(self.embedding_marks, marks, size, lambda like: torch.zeros_like(like))
            self.embedding_marks.write(slots, marks)

    def _start(self, buffer: Buffer, like: torch.Tensor, size: int, earlier: Callable) -> None:
        is_new = buffer.tensor is None
        buffer.reserve(like, size)
        if is_new:
            buffer.tensor = earlier(buffer.tensor)

    def _counted_positions(self, like: torch.Tensor) -> torch.Tensor:
        mask = torch.ones_like(like) if self.mask.tensor is None else self.mask.tensor.to(like.dtype)
        return counted_positions(mask)[:, : like.shape[1]]

    def add_pads(self, pads: torch.Tensor) -> None:
        """Makes pads of the columns (rows, columns) that are true."""
        like = torch.ones_like(self.token_ids.tensor, dtype=torch.bool)
        self._start(self.mask, like, like.shape[1], lambda mask: torch.ones_like(mask))
        self.mask.write(0, self.mask.view(pads.shape[1]) & ~pads)

    def buffers(self) -> dict[str, Buffer]:
        names = ("token_ids", "mask", "position_ids", "embedding_marks")
        return {name: getattr(self, name) for name in names}

    def fork(self) -> "TokenLog":
        other = TokenLog(self.token_ids.config)
        for name, buffer in self.buffers().items():
            setattr(other, name, buffer.fork())
        other.has_embeddings = self.has_embeddings
        return other
