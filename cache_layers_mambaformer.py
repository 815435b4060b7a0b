"""The layers of a cache, one for each layer of the model: the view that the mixins of Transformers expect.

A layer is composed of stores: one for the keys of attention, one for the states of a recurrent mixer. A storage that
changes where keys lie is a `Buffer`; one that changes how they are encoded is a subclass of `KeyValueStore`, chosen in
`make_layer`. Which keys stay is the `Retention` of `cache_retention_mambaformer`, and under a pruning policy a
`PrunedKeyValueStore` decides it.
"""

import functools
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Any, Protocol, cast

import torch
from torch import nn
from transformers.cache_utils import CacheLayerMixin, LinearAttentionCacheLayerMixin

from .cache_buffers_mambaformer import Buffer
from .cache_eviction_mambaformer import PrunedRetention
from .cache_history_mambaformer import CacheLengths
from .cache_keys_mambaformer import KeyValueStore, Removal, StateSpec
from .cache_policies_mambaformer import Budget, PruningPolicy
from .cache_pruned_mambaformer import PrunedKeyValueStore
from .cache_quantized_mambaformer import QuantizedKeyValueStore
from .cache_retention_mambaformer import Layout, Retention
from .cache_states_mambaformer import RecurrentStore
from .cache_states_quantized_mambaformer import QuantizedRecurrentStore
from .modeling_stack_mambaformer import LayerSpec

if TYPE_CHECKING:
    from .configuration_mambaformer import MambaFormerConfig


class CacheStore(Protocol):
    """The part of a cache that one mixer of one layer needs; nothing outside of a store reads its attributes.

    A forward is a transaction: `update` stages tokens or writes them into slots that nothing visible occupies, and
    `commit` or `discard` ends it. A crop has two phases: first every store plans it and changes nothing, then all
    stores carry it out.
    """

    def update(self, *args: Any, **kwargs: Any) -> Any:  # keys and values, or a state and its name
        """Stages the new tokens of the open forward."""

    def commit(self) -> None:
        """Makes the updates of the open forward visible."""

    def discard(self) -> None:
        """Drops the updates of the open forward."""

    def reset(self) -> None:
        """Returns to the state before the first token; fixed storage keeps its addresses."""

    def extend_reach(self, reach: int, tokens_seen: torch.Tensor, columns: int) -> None:
        """Makes the last `reach` tokens removable from now on.

        Args:
            tokens_seen: real tokens of each row so far, (rows or 1,).
            columns: sequence length so far, padding included.
        """

    def plan_crop(self, removal: Removal) -> object | None:
        """The argument of `crop` for a removal; `None` if the sequence has to be encoded again instead."""

    def crop(self, plan: Any) -> None:  # each kind of store has its own kind of plan
        """Carries out a plan of `plan_crop`."""

    def select_rows(self, rows: torch.Tensor) -> None:
        """Makes row i a copy of the earlier row `rows[i]`."""

    def fork(self) -> "CacheStore":
        """An independent store that continues from here."""
        ...

    def state(self, columns: int | None = None) -> dict[str, torch.Tensor]:
        """The visible tensors by name, as views; with a sequence length, only slots that so many columns fill."""
        ...

    def load_state(self, state: dict[str, torch.Tensor], columns: int) -> None:
        """Takes the tensors that `state(columns)` returned, of a sequence of `columns` columns."""

    def spec(self, rows: int, columns: int, layer: nn.Module) -> dict[str, StateSpec]:
        """The shapes of `state(columns)`, in a cache for `layer` of the model."""
        ...

    def dtypes(self) -> set[torch.dtype]:
        """The dtypes of the keys, values and states that were fed, whatever form they are stored in."""
        ...

    def buffers(self) -> dict[str, torch.Tensor]:
        """The tensors that hold the state by name, with all of their slots."""
        ...

    def set_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        """Makes these tensors, shaped like the tensors of `buffers()`, hold the state."""

    def nbytes(self) -> dict[str, int]:
        """Bytes by kind of tensor."""
        ...

    def slack(self, columns: int) -> dict[str, int]:
        """Bytes of slots without a token, in a sequence of `columns` columns, by kind of tensor."""
        ...

    def evicted(self, columns: int) -> dict[str, int]:
        """Bytes that tensors of tokens that a pruning policy has evicted would take, by kind."""
        ...

    def shared(self) -> dict[str, int]:
        """Bytes that a fork may have too, by kind of tensor."""
        ...


# Storage of keys and values, by its name in `make_cache`.
STORAGES: dict[str, Callable[[int, int | None], Buffer]] = {"dense": Buffer, "static": Buffer, "quantized": Buffer}


class CacheLayer:
    """The methods that every layer of the cache has; its stores do the work."""

    is_croppable = True
    record_past = False  # the library reads it in `Cache.is_recording_past`
    supports_early_init = False

    def __init__(
        self,
        lengths: CacheLengths,
        attention: KeyValueStore | PrunedKeyValueStore | None = None,
        recurrent: RecurrentStore | None = None,
        max_columns: int | None = None,
    ):
        self.lengths, self.max_columns = lengths, max_columns
        self.attention, self.recurrent = attention, recurrent
        stores: dict[str, CacheStore | None] = {"attention": attention, "recurrent": recurrent}
        self.stores = {name: store for name, store in stores.items() if store is not None}
        self.is_sliding = attention is not None and attention.retention.window is not None

    @property
    def is_compileable(self) -> bool:
        """Whether the storage has a fixed size and fixed addresses."""
        return self.max_columns is not None

    def each_store(self, method: str, *args: object) -> None:
        for store in self.stores.values():
            getattr(store, method)(*args)

    def extend_reach(self, reach: int, tokens_seen: torch.Tensor, columns: int) -> None:
        """Makes the last `reach` tokens removable; the arguments are those of `CacheStore.extend_reach`."""
        self.record_past = True
        self.each_store("extend_reach", reach, tokens_seen, columns)

    def fork(self, lengths: CacheLengths) -> "CacheLayer":
        attention = None if self.attention is None else self.attention.fork()
        recurrent = None if self.recurrent is None else self.recurrent.fork()
        other = type(self)(lengths, attention, recurrent, self.max_columns)
        other.record_past = self.record_past
        return other

    def reset(self) -> None:
        self.each_store("reset")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.each_store("select_rows", beam_idx)

    def to_dict(self) -> dict[str, dict[str, torch.Tensor] | None]:
        """The layer's part of `MambaFormerCache.to_dict`, without its length."""
        mamba = None if self.recurrent is None else self.recurrent.visible() or None
        keys = None if self.attention is None else self.attention.visible() or None
        return {"mamba_cache": mamba, "attn_kv_cache": keys}

    def get_seq_length(self) -> int:
        return self.lengths.num_columns()

    def get_max_length(self) -> int:
        return -1 if self.max_columns is None else self.max_columns

    get_max_cache_shape = get_max_length  # its name before transformers 5.19

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        """Columns that the next forward's mask covers, and the first of them."""
        return self.get_seq_length() + query_length, 0

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to do: stores take the shape of the first tensors that they get."""

    def crop(self, tokens_to_remove: int) -> None:
        raise NotImplementedError(
            "The layers of this cache share their lengths and are cropped together: call `crop` of the cache."
        )

    def offload(self) -> None:
        raise NotImplementedError(
            "This cache stays on the device of its model and does not offload keys: leave "
            "`cache_implementation='offloaded'` out."
        )

    prefetch = offload


class AttentionCacheLayer(CacheLayer, CacheLayerMixin):
    """Keys and values of an attention layer."""

    attention: KeyValueStore | PrunedKeyValueStore

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layout: Layout,
        is_saved: bool = False,
        queries: torch.Tensor | None = None,
        *args,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return self.attention.update(key_states, value_states, layout, is_saved, queries)

    @property
    def keys(self) -> torch.Tensor | None:
        return self.attention.visible().get("keys")

    @property
    def values(self) -> torch.Tensor | None:
        return self.attention.visible().get("values")

    @property
    def is_initialized(self) -> bool:
        return bool(self.attention.buffers())


class RecurrentCacheLayer(CacheLayer, LinearAttentionCacheLayerMixin):
    """Convolution window and matrix state of a recurrent layer."""

    recurrent: RecurrentStore
    number_of_states = 1

    def update_conv_state(self, conv_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.recurrent.update("conv", conv_states)
        return conv_states

    def update_recurrent_state(self, recurrent_states: torch.Tensor, state_idx: int = 0, **kwargs) -> torch.Tensor:
        self.recurrent.update("ssm", recurrent_states, is_wide=True)
        return recurrent_states

    @property
    def conv_states(self) -> dict[int, torch.Tensor | None]:
        return {0: self.recurrent.visible().get("conv")}

    @property
    def recurrent_states(self) -> dict[int, torch.Tensor | None]:
        return {0: self.recurrent.visible().get("ssm")}

    @property
    def has_previous_state(self) -> dict[int, bool]:
        return {0: bool(self.recurrent.states) and not self.lengths.is_empty}


class HybridCacheLayer(RecurrentCacheLayer, AttentionCacheLayer):
    """Both, for a layer of attention and a recurrent mixer."""


class StatelessCacheLayer(CacheLayer, CacheLayerMixin):
    """Nothing, for a layer of the user that keeps nothing from token to token."""

    keys = values = None
    is_initialized = True

    def update(self, *args, **kwargs):
        raise NotImplementedError("The cache was made for a layer without attention: make a cache for the new layers.")


def make_layer(
    config: "MambaFormerConfig",
    spec: LayerSpec,
    lengths: CacheLengths,
    storage: str = "dense",
    max_columns: int | None = None,
    kv_bits: dict[str, int] | None = None,
    dtype: torch.dtype = torch.float32,
    policy: PruningPolicy | None = None,
    budget: Budget | None = None,
    state_bits: int | None = None,
) -> CacheLayer:
    """An empty cache layer for a layer of this spec.

    Its storage is fixed if `max_columns` is set, its keys and values are codes if `kv_bits` is, and its recurrent
    states are if `state_bits` is. `dtype` is that of the activations. `policy` prunes keys to `budget`, unless the
    layer has a window of its own.
    """
    attention = recurrent = None
    if spec.attends:
        row_shape = cast(tuple[int, int], (config.num_key_value_heads, config.head_dim))  # `None` is filled in by now
        store = KeyValueStore if kv_bits is None else functools.partial(QuantizedKeyValueStore, kv_bits, dtype)
        if policy is None or spec.window is not None:
            attention = store(Retention.of(config, spec.window), row_shape, max_columns, STORAGES[storage])
        else:
            protected = policy.sinks + policy.recent
            retention = PrunedRetention.with_budget(1.0 if budget is None else budget, policy.interval, protected)
            inner = store(retention, row_shape, max_columns, STORAGES[storage])
            attention = PrunedKeyValueStore(inner, policy, config.num_attention_heads)
    if spec.is_recurrent:
        make = RecurrentStore if state_bits is None else functools.partial(QuantizedRecurrentStore, dtype)
        recurrent = make(is_fixed=max_columns is not None)
    return LAYER_CLASSES[spec.attends, spec.is_recurrent](lengths, attention, recurrent, max_columns)


def extend_reach_of(layers: Iterable[CacheLayer], lengths: CacheLengths, reach: int, added: int) -> None:
    """Makes the last `reach` tokens of a sequence removable from now on, `added` more than before."""
    if not lengths.is_empty:
        # A ring that grows now has lost the keys that it overwrote before.
        lengths.overshoot += added
    start = lengths.start
    tokens_seen = torch.tensor([start], device="cpu") if isinstance(start, int) else start
    for layer in layers:
        layer.extend_reach(reach, tokens_seen, lengths.num_columns())


# By whether the layer has attention, and whether it has a recurrent mixer.
LAYER_CLASSES: dict[tuple[bool, bool], type[CacheLayer]] = {
    (False, False): StatelessCacheLayer,
    (True, False): AttentionCacheLayer,
    (False, True): RecurrentCacheLayer,
    (True, True): HybridCacheLayer,
}


__all__ = ["STORAGES", "CacheLayer", "CacheStore", "extend_reach_of", "make_layer"]
