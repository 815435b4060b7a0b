"""The cache of MambaFormer: the state of one request, all of it, and separate from every other request.

A forward is a transaction, `with cache.transaction(...)`: layers write into slots that nothing visible occupies, or
stage the states that they would overwrite. The end of the block makes all of it visible at once; an exception leaves
the cache as it was.
"""

import os
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from transformers.cache_utils import Cache

from .cache_buffers_mambaformer import as_index, check_rows
from .cache_contract_mambaformer import CacheContractMixin
from .cache_history_mambaformer import (
    Action,
    CacheLengths,
    Change,
    Encoding,
    NewTokens,
    Provenance,
    Resolve,
    Status,
    TokenHistory,
    make_removal,
)
from .cache_keys_mambaformer import KeyValueStore, Removal
from .cache_layers_mambaformer import CacheLayer, CacheStore, extend_reach_of, make_layer
from .cache_lock_mambaformer import CacheLock, not_while_fed
from .cache_options_mambaformer import CacheOptions, check_reach
from .cache_parked_mambaformer import ParkedStates
from .cache_pruned_mambaformer import PrunedKeyValueStore
from .cache_report_mambaformer import bytes_held, make_report
from .cache_retention_mambaformer import Layout
from .cache_session_mambaformer import SessionModel, load_session, save_session
from .cache_states_mambaformer import RecurrentStore
from .cache_transaction_mambaformer import CacheTransaction
from .expert_vectors_mambaformer import ExpertKey, ExpertVectorsLike, ResolvedExpertVector
from .modeling_stack_mambaformer import LayerSpec, ModelStack, places_of_model, specs_of

if TYPE_CHECKING:
    from .configuration_mambaformer import MambaFormerConfig
    from .expert_runtime_mambaformer import PreparedExpertVectors

# Tokens that `generate` can take back at once when it speculates; the library drafts 20 at a time by default.
DEFAULT_REACH = 64


class MambaFormerCache(CacheContractMixin, Cache):
    """The state of one request: recurrent states, keys and values, tokens, expert vector, version of the weights.

    Make one with `model.make_cache(...)`. Rows are independent of each other. A cache changes no other cache and no
    model.

    Args:
        config: configuration of the model that feeds the cache.
        options: see `CacheOptions`; `make_cache` takes them as keywords.
        resolve: turns the `expert_vector` of a user into `(expert_vector, key)`; `make_cache` passes the model's own.
        model: the stack whose weights a saved cache is tied to; the cache does not keep it alive.
        specs: specs of the layers; by default the specs of `model`, or of `config` without a model.
    """

    layers: list[CacheLayer]
    _is_user_defined = False  # `generate` sets it on a cache that it is given, and the library reads it

    def __init__(
        self,
        config: "MambaFormerConfig",
        options: CacheOptions | None = None,
        resolve: Resolve | None = None,
        model: ModelStack | None = None,
        specs: list[LayerSpec] | None = None,
    ):
        self.options = options = CacheOptions() if options is None else options
        self.config, self.max_columns = config, options.max_cache_len
        self.resolve = resolve
        self._model = None if model is None else weakref.ref(model)
        self.lengths = CacheLengths()
        self.history = TokenHistory(config, self.max_columns, options.remember)
        self.provenance = Provenance(options.on_expert_change)
        # Of the expert vector in force, by the model.
        self.prepared_expert_vectors: PreparedExpertVectors | None = None
        self.open_transaction: CacheTransaction | None = None
        self.lock = CacheLock()
        self.rollback_reach = 0
        # The model's own layers, since users may have changed them and the configuration describes others.
        if specs is None:
            specs = specs_of(config) if model is None else [place.spec for place in places_of_model(model)]
        options.check_layers(specs)
        self.specs = specs
        super().__init__(layers=[])
        self.parked = ParkedStates(options.park_bytes)
        self.layers = self.empty_layers()
        if options.rollback_reach:
            self.activate_past_recording(options.rollback_reach)

    def empty_layers(self) -> list[CacheLayer]:
        """Layers like those of the cache, before the first token."""
        options, dtype = self.options, torch.float32 if self.model is None else self.model.dtype
        kind = options.storage, self.max_columns, options.bits, dtype
        layers = [
            make_layer(self.config, spec, self.lengths, *kind, options.pruning, budget, options.state_bits)
            for spec, budget in zip(self.specs, options.budgets(self.specs), strict=True)
        ]
        if self.rollback_reach:
            extend_reach_of(layers, CacheLengths(), self.rollback_reach, 0)
        return layers

    def put_layers(self, layers: list[CacheLayer]) -> None:
        """Replaces the layers; they share the lengths of the cache from now on."""
        self.layers = layers
        for layer in layers:
            layer.lengths = self.lengths

    # ---- methods that a forward calls

    def transaction(
        self, change: Change, new: NewTokens, num_tokens: int, lengths: torch.Tensor | None, device: torch.device
    ) -> CacheTransaction:
        """Context of a forward of `num_tokens` columns, of which `lengths` (rows,) are real tokens.

        The forward becomes visible at the end of the block. States that have to be computed again are dropped at its
        start: if the forward fails, the next one computes them from the history of tokens.
        """
        return CacheTransaction(self, change, new, num_tokens, lengths, device)

    def layout(self, layer_idx: int) -> Layout:
        """The slots of the open forward's tokens in layer `layer_idx`."""
        if self.open_transaction is None:
            raise RuntimeError("Layers read and write a cache only in `with cache.transaction(...)`: call the model.")
        return self.open_transaction.layouts[self.key_store(layer_idx).retention]

    def key_store(self, layer_idx: int) -> KeyValueStore | PrunedKeyValueStore:
        """The keys and values of layer `layer_idx`."""
        store = self.layers[layer_idx].attention
        if store is None:
            raise ValueError(f"The cache has no keys of layer {layer_idx}: make a cache for the layers of this model.")
        return store

    def recurrent_store(self, layer_idx: int) -> RecurrentStore:
        """The states of the recurrent mixer of layer `layer_idx`."""
        store = self.layers[layer_idx].recurrent
        if store is None:
            raise ValueError(
                f"The cache has no states of layer {layer_idx}: make a cache for the layers of this model."
            )
        return store

    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args,
        is_saved: bool = False,
        queries: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores (rows, heads, tokens, head_dim) of the open forward; returns the keys and values that attention sees.

        Args:
            is_saved: a graph may save the returned tensors, so that they must never be overwritten.
            queries: of the same tokens, (rows, query heads, tokens, head_dim), for policies that read them.
        """
        return self.key_store(layer_idx).update(key_states, value_states, self.layout(layer_idx), is_saved, queries)

    def recurrent_states(self, layer_idx: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """States of layer `layer_idx` before the open forward, on the device of `like`; none if the cache is empty."""
        states = self.recurrent_store(layer_idx).visible()
        # Fixed states keep their addresses after a reset; they are zero then, and may have another number of rows.
        return {name: state.to(like.device) for name, state in states.items() if state.shape[0] == like.shape[0]}

    def token_positions(self, like: torch.Tensor) -> torch.Tensor:
        """Positions in their rows of the open forward's tokens (rows, tokens, ...), padding not counted."""
        if self.open_transaction is None:
            raise RuntimeError("Layers read and write a cache only in `with cache.transaction(...)`: call the model.")
        return self.open_transaction.span.positions(like.device).expand(like.shape[0], -1)

    def stores(self) -> Iterator[tuple[str, CacheStore]]:
        """The stores of all layers, with names such as "0.attention"."""
        for idx, layer in enumerate(self.layers):
            for kind, store in layer.stores.items():
                yield f"{idx}.{kind}", store

    def each_layer(self, method: str, *args: object) -> None:
        for layer in self.layers:
            layer.each_store(method, *args)

    # ---- expert vector and weights

    @not_while_fed("given another expert vector")
    def set_expert_vector(self, expert_vector: ExpertVectorsLike) -> None:
        """Puts an expert vector in force, as `on_expert_change` says; the next forward does the work.

        Args:
            expert_vector: `None` (the base), a name, an `ExpertVector`, a dict of tensors, or a list with one of these
                per row.

        Raises:
            ValueError: the policy is `"error"` and a sequence is cached, or the expert vector is unknown or does not
                fit.
        """
        self._check_one_per_row(expert_vector)
        resolved, key = (None, None) if expert_vector is None else self.resolve_with_key(expert_vector)
        for row in resolved if isinstance(resolved, list) else [resolved]:
            if row is not None and self.model is not None:
                self.model.check_expert_vector(row)
        change = self.decide_change(resolved, key, self.provenance.in_force.weights)
        if change.action is Action.RESET:
            self.reset()
        self.put_in_force(change)

    def resolve_with_key(self, expert_vector: ExpertVectorsLike) -> tuple[ResolvedExpertVector, ExpertKey]:
        """The expert vector that a user means, and the key of its content."""
        if self.resolve is None:
            raise ValueError("This cache belongs to no model yet: make it with `model.make_cache()`.")
        return self.resolve(expert_vector)

    def decide_change(self, expert_vector: ResolvedExpertVector, key: ExpertKey, weights: object) -> Change:
        """The change to an expert vector with this key and to weights with this stamp; nothing changes yet.

        Raises:
            ValueError: the change is refused.
        """
        self._check_one_per_row(expert_vector)
        change = self.provenance.decide_change(expert_vector, key, weights, self.lengths, self.history)
        resumed = self.parked.find(change.encoding) if change.recomputes else None
        return change if resumed is None else replace(change, resumed=resumed)

    def _check_one_per_row(self, expert_vector: ExpertVectorsLike | ResolvedExpertVector) -> None:
        if isinstance(expert_vector, (list, tuple)) and self.lengths.rows not in (None, len(expert_vector)):
            raise ValueError(
                f"`expert_vector` has {len(expert_vector)} entries but the cache has {self.lengths.rows} rows: give "
                "one for each row."
            )

    def put_in_force(self, change: Change) -> None:
        """Puts the expert vector and weights of `change` in force."""
        if self.provenance.put_in_force(change):
            self.prepared_expert_vectors = None

    @property
    def expert_vector(self) -> ResolvedExpertVector:
        """The expert vector in force: `None` (the base), an `ExpertVector`, or a list with one of these per row."""
        return self.provenance.expert_vector

    @property
    def on_expert_change(self) -> str:
        return self.provenance.policy

    @property
    def status(self) -> Status:
        """The state of the cached sequence: `"empty"`, `"current"`, `"stale"` or `"diverged"`."""
        return Status.EMPTY if self.lengths.is_empty else self.provenance.status

    @property
    def can_be_encoded_again(self) -> bool:
        """Whether the tokens and the expert vector in force determine all states."""
        is_uniform = self.lengths.is_empty or self.provenance.is_uniform
        return is_uniform and self.history.is_complete

    # Fields of the configuration that the shape of a cache depends on.
    depends_on = (
        "layer_types",
        "recurrent_mixer",
        "sliding_window",
        "num_sink_tokens",
        "window_positions",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    depends_on += ("hidden_size", "mamba_d_state", "mamba_d_conv", "mamba_expand")
    depends_on += ("mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "conv_L_cache")
    depends_on += ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
    depends_on += ("linear_conv_kernel_dim",)

    def fits(self, config: "MambaFormerConfig") -> bool:
        """Whether a model of `config` can use this cache."""
        return all(getattr(self.config, name) == getattr(config, name) for name in self.depends_on)

    # ---- methods that users and `generate` call

    @property
    def token_ids(self) -> torch.Tensor | None:
        """Ids of all columns fed, or of the last `remember`, pads included; -1 where embeddings were fed. A copy."""
        ids = self.history.token_ids
        return None if ids.tensor is None else self.history.view("token_ids", self.get_seq_length())

    def common_prefix(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
        """Number of leading columns that `input_ids` (rows, columns) shares with the cached sequence, in all rows.

        `cache.crop(cache.common_prefix(ids) - cache.get_seq_length())` keeps these columns. A column that was fed as
        an embedding equals no token. Padding equals padding, whatever its tokens are.

        Args:
            attention_mask: (rows, columns), 0 at padding; by default all tokens are real.

        Raises:
            TypeError: `input_ids` holds no integers.
            ValueError: another number of rows, a mask of another shape, or columns are forgotten (`remember`).
        """
        return self.history.common_prefix(self.get_seq_length(), input_ids, attention_mask)

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, pads included."""
        return self.lengths.num_columns()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return not self.lengths.is_empty

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return -1 if self.lengths.rows is None else self.lengths.rows

    @property
    def max_cache_len(self) -> int:
        """Columns that static storage holds, or -1."""
        return self.get_max_length()

    def get_max_length(self, layer_idx: int = 0) -> int:
        return self.layers[layer_idx].get_max_length()

    get_max_cache_shape = get_max_length  # its name before transformers 5.19

    @property
    def is_initialized(self) -> bool:
        return not self.lengths.is_empty

    @property
    def is_linear(self) -> list[bool]:
        """False for every layer, also if all are Mamba.

        Since Transformers 5.24.0 `generate` feeds the complete prompt to a cache whose layers are all linear, with the
        tokens that the cache has already.
        """
        return [False] * len(self.layers)

    @property
    def replay_reach(self) -> int:
        """Tokens at the end of the open forward whose mixer inputs the recurrent layers keep for a replay."""
        return 0 if torch.compiler.is_compiling() else self.rollback_reach

    @not_while_fed("changed")
    def activate_past_recording(self, reach: int = DEFAULT_REACH) -> None:
        """From now on keeps the states that `crop` needs to take back up to `reach` tokens at once.

        Mamba layers keep a checkpoint of their states and the inputs of the tokens since; windows keep `reach` more
        keys. `generate` calls it when it speculates. Static storage overwrites its states in place and keeps none of
        these: its `crop` is as exact, but the next forward encodes the remaining tokens again.

        Raises:
            ValueError: `reach` is not a number of tokens.
        """
        check_reach(reach)
        if self.max_columns is not None or reach <= self.rollback_reach:
            return
        added, self.rollback_reach = reach - self.rollback_reach, reach
        self.history.bounds.reach = reach
        extend_reach_of(self.layers, self.lengths, reach, added)
        self.parked.extend_reach(reach, added)

    @not_while_fed("cropped")
    def crop(self, tokens_to_remove: int | Sequence[int] | torch.Tensor) -> None:
        """Takes back the last columns, as if they had never been fed.

        Within `rollback_reach` it takes effect at once, and so it does beyond it in models that keep all keys and have
        no recurrent states. Otherwise the next forward encodes the remaining columns again.

        Args:
            tokens_to_remove: -k for the last k columns, or one such number per row (a list or a tensor (rows,)).
                Columns that only some rows lose become pads of those rows.

        Raises:
            ValueError: more columns than were fed, a positive number (the meaning in older versions of Transformers),
                or, beyond the reach, a sequence that cannot be encoded again: embeddings, or several expert vectors.
        """
        removal = make_removal(tokens_to_remove, self.lengths, self.history)
        if not any(removal.by_row):
            return
        if removal.columns_left == 0:
            self.reset()
            return
        stores = [store for _, store in self.stores()]
        is_encoded = self.provenance.encoded is not None
        plans = [store.plan_crop(removal) if is_encoded else None for store in stores]
        if any(plan is None for plan in plans):
            self.provenance.check_uniform()
            self.history.check_replayable()
            self._crop_history(removal)
        else:
            encoded = self._crop_history(removal)
            for store, plan in zip(stores, plans, strict=True):
                store.crop(plan)
            self.provenance.encoded = encoded

    def _crop_history(self, removal: Removal) -> Encoding | None:
        """Crops tokens and lengths, which invalidates the states; returns their encoding."""
        encoded = self.provenance.invalidate()
        self.parked.crop(removal, self.history)
        self.history.crop(removal)
        self.lengths.crop(removal, self.history.device)
        return encoded

    @not_while_fed("reset")
    def reset(self) -> None:
        """Drops the sequence; the expert vector in force stays."""
        self.each_layer("reset")
        self.forget_sequence()

    def forget_sequence(self) -> None:
        """Resets tokens and lengths, but not the states."""
        self.history = self.history.make_empty()
        self.lengths.reset()
        self.parked.clear()
        self.provenance.is_mixed = False

    @not_while_fed("given other rows")
    def select_rows(self, rows: torch.Tensor | Sequence[int]) -> None:
        """Makes row i of the cache a copy of the earlier row `rows[i]`.

        Raises:
            ValueError: there is no such row.
        """
        index = as_index(rows).long()
        if self.num_selectable_rows():
            check_rows(index, self.num_selectable_rows(), "cache")
        if self.provenance.select_rows(index, self.resolve):
            self.prepared_expert_vectors = None
        if self.lengths.is_empty:
            return
        encoded = self.provenance.invalidate()  # until all layers have the new rows
        self.history.select_rows(index)
        self.lengths.select_rows(index)
        self.parked.select_rows(index)
        self.each_layer("select_rows", index)
        self.provenance.encoded = encoded

    def num_selectable_rows(self) -> int:
        """Rows of the sequence, or of the expert vectors before the first forward; 0 if neither has any yet."""
        if self.lengths.rows is not None:
            return self.lengths.rows
        return len(self.expert_vector) if isinstance(self.expert_vector, list) else 0

    @not_while_fed("forked", changes=False)
    def fork(self) -> "MambaFormerCache":
        """An independent cache that continues from here; both share the memory that neither writes."""
        return self.duplicate()

    def duplicate(self, options: CacheOptions | None = None) -> "MambaFormerCache":
        """`fork`, allowed also in the middle of a forward.

        Args:
            options: of the copy, if not the same; they have the same storage and form of states. Parked states stay
                behind then.
        """
        other = MambaFormerCache(self.config, options or self.options, self.resolve, self.model, specs=[])
        other.rollback_reach = self.rollback_reach
        other.specs, other.layers = self.specs, [layer.fork(other.lengths) for layer in self.layers]
        self.lengths.fork_into(other.lengths)
        other.history, other.provenance = self.history.fork(), self.provenance.fork()
        if options is None:
            other.parked = self.parked.fork()
        else:
            other.history.bounds.remember, other.provenance.policy = options.remember, options.on_expert_change
            other.activate_past_recording(options.rollback_reach)
        other.prepared_expert_vectors = self.prepared_expert_vectors
        return other

    # ---- sessions

    @property
    def model(self) -> ModelStack | None:
        """The stack of the model that made the cache; `None` if there was none or it has been deleted."""
        return None if self._model is None else self._model()

    @not_while_fed("pickled", changes=False)
    def __getstate__(self) -> dict:
        # A copy in another process belongs to no model and has a lock of its own.
        return {name: value for name, value in self.__dict__.items() if name != "lock"} | {"_model": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.lock = CacheLock()

    @not_while_fed("saved", changes=False)
    def save(self, path: str | os.PathLike) -> None:
        """Writes the cache as a safetensors file, atomically: an earlier file stays if writing fails.

        The file has the tokens, the states, the expert vector in force, and the fingerprint of the weights.

        Raises:
            ValueError: the cache belongs to no model.
            OSError: the file cannot be written.
        """
        save_session(self, path)

    @classmethod
    def load(
        cls,
        path: str | os.PathLike,
        model: SessionModel,
        on_weights_change: str = "error",
        max_cache_len: int | None = None,
    ) -> "MambaFormerCache":
        """The cache that `save` wrote, for `model`: it continues as the saved cache would have, bit for bit.

        Replay segments are not in the file, so the reach covers only tokens that are fed after loading.

        Args:
            on_weights_change: `"error"` refuses a model with other weights; `"recompute"` encodes the tokens again at
                the next forward.
            max_cache_len: columns that static storage holds from now on; by default as many as before. A file whose
                storage is far larger than both its content and the model's `max_position_embeddings` is loaded only
                with this argument, since static storage is allocated completely when the file is loaded.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged file or a file of another kind (nothing is ever unpickled), a newer version, more
                storage than the file and the model justify, or a model with another configuration or other weights.
                Nothing has been allocated then.
        """
        return load_session(path, model, on_weights_change, max_cache_len)

    # ---- tensors

    def buffers(self) -> dict[str, torch.Tensor]:
        """All tensors that a decode step reads or writes, by name, with all of their slots."""
        tensors = self.lengths.buffers() | self.history.tensors()
        for name, store in self.stores():
            tensors |= {f"{name}.{key}": tensor for key, tensor in store.buffers().items()}
        return tensors

    def set_buffers(self, tensors: dict[str, torch.Tensor]) -> None:
        """Replaces the tensors of `buffers()` by these, which have the same names and shapes."""
        self.lengths.set_buffers(tensors)
        self.history.set_tensors(tensors)
        for name, store in self.stores():
            store.set_buffers({key: tensors[f"{name}.{key}"] for key in store.buffers()})

    @not_while_fed("read", changes=False)
    def to_dict(self) -> dict:
        """The nested view of the cache hand-out: `{"layers": {"initial_mamba": {...}, "layer_0": {...}, ...}}`.

        A layer has `mamba_cache` (`{"conv", "ssm"}`), `attn_kv_cache` (`{"keys", "values"}`), each `None` in a layer
        without it, and `cache_length`, the columns fed. Tensors are views of the cache.
        """
        starts_with_mamba = self.specs[:1] == [LayerSpec(is_recurrent=True)]
        names = ["initial_mamba"] if starts_with_mamba else []
        names += [f"layer_{idx}" for idx in range(len(self.layers) - len(names))]
        length, layers = self.get_seq_length(), zip(names, self.layers, strict=True)
        return {"layers": {name: layer.to_dict() | {"cache_length": length} for name, layer in layers}}

    def report(self) -> dict[str, dict[str, int]]:
        """Bytes by layer type and kind of tensor, of the token history, and of parked states.

        Kinds are `keys`, `values`, `conv`, `ssm` and `past`: the tape and the checkpoints for rollback. The expert
        vector is not counted. Two entries say what some of these bytes are: `"slack"` are slots without a token, and
        `"shared"` is memory that a fork had at its start and that this cache has not written since. With a pruning
        policy `"evicted"` is what the keys and values that it removed would take.
        """
        return make_report(self)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors in `report()`; memory that is shared with a fork counts in both."""
        return bytes_held(self.report())


__all__ = ["MambaFormerCache"]
