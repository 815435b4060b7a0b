"""The layers of a cache, one for each layer of the model: the view that the mixins of Transformers expect."""

from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from .cache_history_mambaformer import CacheLengths
from .cache_keys_mambaformer import KeyValueStore, Retention
from .cache_states_mambaformer import RecurrentStore
from .modeling_stack_mambaformer import Facts


class CacheLayer:
    """What every layer of the cache can do; the stores do the work and each implements all of it."""

    is_croppable = True
    record_past = False  # what the library asks a layer by `Cache.is_recording_past`

    def _set_up(self, lengths: CacheLengths, stores: dict[str, Any], max_cache_len: int | None) -> None:
        self.lengths, self.stores, self.max_columns = lengths, stores, max_cache_len
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
        return self.lengths.num_columns()

    def get_max_length(self) -> int:
        return -1 if self.max_columns is None else self.max_columns

    get_max_cache_shape = get_max_length  # its name before transformers 5.19

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next forward's mask covers, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to do: stores take shape from what they are first given."""

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError("Layers share their lengths and are cropped together: call `crop` of the cache.")

    def offload(self) -> None:
        raise NotImplementedError("This cache stays on the device of its model: keys are not offloaded.")

    prefetch = offload


class AttentionCacheLayer(CacheLayer, CacheLayerMixin):
    """Keys and values of an attention layer."""

    supports_early_init = False

    def __init__(self, lengths: CacheLengths, stores: dict[str, Any], max_cache_len: int | None = None):
        self._set_up(lengths, stores, max_cache_len)

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

    def __init__(self, lengths: CacheLengths, stores: dict[str, Any], max_cache_len: int | None = None):
        self._set_up(lengths, stores, max_cache_len)

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
        return {0: "ssm" in self.recurrent.states and not self.lengths.is_empty}


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


def make_layer(config, facts: Facts, lengths: CacheLengths, max_columns: int | None = None) -> CacheLayer:
    """An empty cache layer for a layer of these facts; its storage is fixed if `max_columns` is given."""
    has_attention, has_mamba, window = facts
    stores: dict[str, Any] = {}
    if has_attention:
        stores["attention"] = KeyValueStore(Retention.of(config, window), max_columns)
    if has_mamba:
        stores["mamba"] = RecurrentStore(is_fixed=max_columns is not None)
    return LAYER_CLASSES[tuple(stores)](lengths, stores, max_columns)


__all__ = ["CacheLayer", "make_layer"]
