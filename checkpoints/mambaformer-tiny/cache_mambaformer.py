"""The cache of MambaFormer: all state of one request, and none that another request could see.

A forward is a transaction, `with cache.transaction(...)`: layers write into slots that nothing visible occupies, or
stage the states that they would overwrite. The end of the block makes all of it visible at once; an exception leaves
the cache as it was.
"""

import weakref
from collections.abc import Callable, Iterator
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_history_mambaformer import (
    Action,
    CacheLengths,
    Change,
    Encoding,
    NewTokens,
    Provenance,
    Status,
    TokenHistory,
    make_removal,
)
from .cache_keys_mambaformer import Layout, Removal, as_index
from .cache_layers_mambaformer import STORAGES, CacheStore, make_layer
from .cache_lock_mambaformer import CacheLock, not_while_fed
from .cache_session_mambaformer import load_session, save_session
from .cache_transaction_mambaformer import CacheTransaction
from .modeling_stack_mambaformer import LayerSpec, places_of_model, specs_of

# Tokens that `generate` can take back at once when it speculates; the library drafts 20 at a time by default.
DEFAULT_REACH = 64


class MambaFormerCache(Cache):
    """Holds a request: states, keys and values, positions, tokens, the expert in force and the weights it saw.

    Make one with `model.make_cache(...)`. Rows never see each other, and no other cache or model is ever written.

    Args:
        config: configuration of the model it serves.
        storage: `"dense"` grows with the sequence at amortised cost, `"static"` has a fixed size and fixed addresses.
        max_cache_len: columns (tokens with their pads) that static storage holds.
        on_expert_change: the treatment of a sequence that was encoded with another expert vector or other weights.
            `"recompute"` encodes it again at the next forward; `"reset"` drops it, and the caller feeds it again;
            `"continue"` keeps it as it was encoded; `"error"` refuses the change.
        resolve: turns what a user may call an expert into `(expert, key)`; a model's caches bring the model's.
        rollback_reach: tokens that `crop` takes back at once; beyond it, and under static storage, it is as exact but
            the next forward encodes the remaining tokens again. See `activate_past_recording`.
        model: the stack whose weights a saved cache is tied to; it is not kept alive.
        specs: of the layers, as a fork takes them over; by default those of `model`, or else of `config`.

    Raises:
        ValueError: an unknown option, or static storage without `max_cache_len`.
    """

    def __init__(
        self,
        config,
        storage: str = "dense",
        max_cache_len: int | None = None,
        on_expert_change: str = "recompute",
        resolve: Callable | None = None,
        rollback_reach: int = 0,
        model: Any = None,
        specs: list[LayerSpec] | None = None,
    ):
        _check_options(storage, max_cache_len, rollback_reach)
        self.config, self.storage, self.max_columns = config, storage, max_cache_len
        self.resolve = resolve
        self._model = None if model is None else weakref.ref(model)
        self.lengths = CacheLengths()
        self.history = TokenHistory(config, max_cache_len)
        self.provenance = Provenance(on_expert_change)
        self.prepared_expert_vectors = None
        self.open_transaction: CacheTransaction | None = None
        self.lock = CacheLock()
        self.rollback_reach = 0
        # Of the model's layers as they are now, which need not be as the configuration describes them.
        if specs is None:
            specs = specs_of(config) if model is None else [place.spec for place in places_of_model(model)]
        self.specs = specs
        super().__init__(
            layers=[make_layer(config, each, self.lengths, storage, max_cache_len) for each in self.specs]
        )
        if rollback_reach:
            self.activate_past_recording(rollback_reach)

    # ---- a forward, as the model drives it

    def transaction(
        self, change: Change, new: NewTokens, num_tokens: int, lengths: torch.Tensor | None, device: torch.device
    ) -> CacheTransaction:
        """Context of a forward of `num_tokens` columns with `lengths` (rows,) real tokens each.

        Nothing is visible of the forward before the end of the block. States that have to be computed again are
        dropped at its start: if the forward fails, the next one computes them from the history of tokens.
        """
        return CacheTransaction(self, change, new, num_tokens, lengths, device)

    def layout(self, layer_idx: int) -> Layout:
        """How layer `layer_idx` takes in the open forward."""
        return self.open_transaction.layouts[self.layers[layer_idx].attention.retention]

    def update(self, key_states, value_states, layer_idx: int, *args, is_saved: bool = False):
        """Takes in (rows, heads, tokens, head_dim) of the open forward; returns the keys and values attention sees.

        `is_saved`: a graph may save the returned tensors, so they must never be overwritten.
        """
        return self.layers[layer_idx].update(key_states, value_states, self.layout(layer_idx), is_saved)

    def recurrent_states(self, layer_idx: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """States that layer `layer_idx` starts the open forward from, on the device of `like`; empty at first."""
        states = self.layers[layer_idx].recurrent.state()
        # Fixed states outlive their sequence, to keep their addresses; then they are zero, and may have other rows.
        return {name: state.to(like.device) for name, state in states.items() if state.shape[0] == like.shape[0]}

    def stores(self) -> Iterator[tuple[str, CacheStore]]:
        """The stores of all layers, with names as "0.attention"."""
        for idx, layer in enumerate(self.layers):
            for kind, store in layer.stores.items():
                yield f"{idx}.{kind}", store

    def each_layer(self, method: str, *args) -> None:
        for layer in self.layers:
            layer.each_store(method, *args)

    # ---- experts and weights

    @not_while_fed("given another expert vector")
    def set_expert_vector(self, expert_vector: Any) -> None:
        """Puts an expert vector in force, as `on_expert_change` says; whatever it costs, the next forward pays.

        Args:
            expert_vector: `None` (the base), a name, an `ExpertVector`, a dict of tensors, or a list with one of these
                per row.

        Raises:
            ValueError: the policy is `"error"` and a sequence is cached, or the expert vector is unknown or does not
                fit.
        """
        if expert_vector is not None and self.resolve is None:
            raise ValueError("This cache belongs to no model yet: make it with `model.make_cache()`.")
        self._check_one_a_row(expert_vector)
        resolved, key = (None, None) if expert_vector is None else self.resolve(expert_vector)
        for row in resolved if isinstance(resolved, list) else [resolved]:
            if row is not None and self.model is not None:
                self.model.check_expert_vector(row)
        change = self.decide_change(resolved, key, self.provenance.in_force.weights)
        if change.action is Action.RESET:
            self.reset()
        self.put_in_force(change)

    def decide_change(self, expert, key, weights) -> Change:
        """The change to an expert vector, identified by `key`, and to weights with this stamp.

        Raises:
            ValueError: the change is refused; nothing has changed.
        """
        self._check_one_a_row(expert)
        return self.provenance.decide_change(expert, key, weights, self.lengths, self.history)

    def _check_one_a_row(self, expert) -> None:
        if isinstance(expert, (list, tuple)) and self.lengths.rows not in (None, len(expert)):
            raise ValueError(
                f"`expert_vector` has {len(expert)} entries but the cache has {self.lengths.rows} rows: give one each."
            )

    def put_in_force(self, change: Change) -> None:
        """Puts the expert vector and weights of `change` in force."""
        if self.provenance.put_in_force(change):
            self.prepared_expert_vectors = None

    @property
    def expert_vector(self) -> Any:
        """The expert vector in force: `None` (the base), an `ExpertVector`, or a list with one of these per row."""
        return self.provenance.expert

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
        return is_uniform and not self.history.has_embeddings

    # Fields of the configuration that a cache takes its shape from.
    depends_on = (
        "layer_types",
        "recurrent_mixer",
        "sliding_window",
        "num_sink_tokens",
        "num_key_value_heads",
        "head_dim",
        "vocab_size",
    )
    depends_on += ("hidden_size", "mamba_d_state", "mamba_d_conv", "mamba_expand")

    def fits(self, config) -> bool:
        """Whether a model of `config` can use this cache."""
        return all(getattr(self.config, name) == getattr(config, name) for name in self.depends_on)

    # ---- what users and `generate` do to it

    @property
    def token_ids(self) -> torch.Tensor | None:
        """Ids of all columns fed, (rows, columns), pads included; -1 where embeddings were fed. A copy."""
        ids = self.history.token_ids
        return None if ids.tensor is None else ids.view(self.get_seq_length())

    def common_prefix(self, input_ids: torch.Tensor, attention_mask: torch.Tensor | None = None) -> int:
        """Number of leading columns that `input_ids` (rows, columns) shares with the cached sequence, in all rows.

        `cache.crop(cache.common_prefix(ids) - cache.get_seq_length())` keeps these columns. A column that was fed as
        an embedding is shared with no token. Padding is shared with padding, whatever its token is.

        Args:
            attention_mask: (rows, columns), 0 at padding; all tokens are real without it.

        Raises:
            ValueError: `input_ids` has another number of rows.
        """
        cached = self.token_ids
        if cached is None:
            return 0
        if input_ids.dim() != 2 or input_ids.shape[0] != cached.shape[0]:
            raise ValueError(
                f"`input_ids` must be ({cached.shape[0]}, columns), one row for each of the cache, and is"
                f" {tuple(input_ids.shape)}."
            )
        length = min(cached.shape[1], input_ids.shape[1])
        is_real = self.history.read_mask(length)
        given = torch.ones_like(is_real) if attention_mask is None else attention_mask[:, :length].to(is_real).bool()
        is_same = (input_ids[:, :length].to(cached.device) == cached[:, :length]) | ~is_real
        differ = (~(is_same & (given == is_real))).any(0).nonzero()
        return int(differ[0]) if len(differ) else length

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
    def max_batch_size(self) -> int:
        """The same: rows are added and taken away by selecting."""
        return self.batch_size

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
    def is_croppable(self) -> bool:
        """`crop` always restores the state before the removed tokens; it may cost an encoding of the others."""
        return True

    @property
    def is_linear(self) -> list[bool]:
        """Never true of a layer, also where all are Mamba.

        Since Transformers 5.24.0 `generate` feeds the whole prompt to a cache whose layers are all linear, also the
        tokens that it holds already.
        """
        return [False] * len(self.layers)

    @property
    def replay_reach(self) -> int:
        """Tokens at the end of the open forward whose mixer inputs recurrent layers keep for replay."""
        return 0 if torch.compiler.is_compiling() else self.rollback_reach

    @not_while_fed("changed")
    def activate_past_recording(self, reach: int = DEFAULT_REACH) -> None:
        """From now on keeps what it takes to `crop` up to `reach` tokens at once.

        Mamba layers keep a checkpoint of their states and the inputs of the tokens since; windows keep `reach` keys
        more. `generate` calls it when it speculates. Static storage, whose states are overwritten in place, does not
        record: there `crop` is as exact, but the remaining tokens are encoded again.

        Raises:
            ValueError: `reach` is no number of tokens.
        """
        _check_reach(reach)
        if self.max_columns is not None or reach <= self.rollback_reach:
            return
        if not self.lengths.is_empty:
            # A ring that grows now has lost what it overwrote before.
            self.lengths.overshoot += reach - self.rollback_reach
        self.rollback_reach = reach
        start = self.lengths.start
        counts = torch.tensor([start], device="cpu") if isinstance(start, int) else start
        for layer in self.layers:
            layer.extend_reach(reach, counts, self.lengths.columns)

    @not_while_fed("cropped")
    def crop(self, tokens_to_remove: Any) -> None:
        """Takes back the last columns, as if they had never been fed.

        Within `rollback_reach` it takes effect at once. Beyond it keys are still taken back at once where all are
        kept; where a state has moved on or a window has lost keys, the next forward encodes what is left again.

        Args:
            tokens_to_remove: -k for the last k columns, or one such number a row (a list or a tensor (rows,)). Columns
                that only some rows lose become pads of those rows.

        Raises:
            ValueError: more columns than were fed, a positive number (the meaning in older versions of Transformers),
                or beyond the reach, a sequence that cannot be encoded again: embeddings, or several experts.
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
        """Crops tokens and lengths, which invalidates the states; returns what had encoded them."""
        encoded = self.provenance.invalidate()
        self.history.crop(removal)
        self.lengths.crop(removal, self.history.token_ids.tensor.device)
        return encoded

    @not_while_fed("reset")
    def reset(self) -> None:
        """Forgets the sequence; the expert vector in force stays."""
        self.each_layer("reset")
        self.forget_sequence()

    def forget_sequence(self) -> None:
        """Resets tokens and lengths; the states are left to the caller."""
        self.history = TokenHistory(self.config, self.max_columns)
        self.lengths.reset()
        self.provenance.is_mixed = False

    @not_while_fed("given other rows")
    def select_rows(self, rows: torch.Tensor) -> None:
        """Makes row i of the cache what row `rows[i]` was.

        Raises:
            ValueError: there is no such row.
        """
        rows = as_index(rows).long()
        self._check_rows(rows)
        if self.provenance.select_rows(rows, self.resolve):
            self.prepared_expert_vectors = None
        if self.lengths.is_empty:
            return
        encoded = self.provenance.invalidate()  # until all layers have followed
        self.history.select_rows(rows)
        self.lengths.select_rows(rows)
        self.each_layer("select_rows", rows)
        self.provenance.encoded = encoded

    def _check_rows(self, rows: torch.Tensor) -> None:
        num_rows = self._num_known_rows()
        # On a device the look at the values would stop the host at every step of a beam search.
        is_known = rows.device.type != "cpu" or bool(((rows >= 0) & (rows < num_rows)).all())
        is_known = is_known and rows.dim() == 1 and rows.numel() > 0
        if num_rows and not is_known:
            raise ValueError(f"The cache has rows 0 to {num_rows - 1}, and these were asked for: {rows.tolist()}.")

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows([row for row in range(self._num_known_rows()) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        indices = as_index(indices)
        self.select_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def _num_known_rows(self) -> int:
        if self.lengths.rows is not None:
            return self.lengths.rows
        return len(self.expert_vector) if isinstance(self.expert_vector, list) else 0

    @not_while_fed("forked", changes=False)
    def fork(self) -> "MambaFormerCache":
        """An independent cache that goes on from here; what neither side has written since is shared."""
        return self.duplicate()

    def duplicate(self) -> "MambaFormerCache":
        """`fork`, also in the middle of a forward."""
        options = (self.config, self.storage, self.max_columns, self.on_expert_change, self.resolve)
        other = MambaFormerCache(*options, self.rollback_reach, self.model, specs=[])
        other.specs, other.layers = self.specs, [layer.fork(other.lengths) for layer in self.layers]
        self.lengths.fork_into(other.lengths)
        other.history, other.provenance = self.history.fork(), self.provenance.fork()
        other.prepared_expert_vectors = self.prepared_expert_vectors
        return other

    def __deepcopy__(self, memo) -> "MambaFormerCache":
        return self.fork()

    # ---- sessions

    @property
    def model(self) -> Any:
        """The stack of the model that made it, or `None` if there is none (any more)."""
        return None if self._model is None else self._model()

    @not_while_fed("pickled", changes=False)
    def __getstate__(self) -> dict:
        # A copy in another process belongs to no model, and nobody uses it there.
        return {name: value for name, value in self.__dict__.items() if name != "lock"} | {"_model": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.lock = CacheLock()

    @not_while_fed("saved", changes=False)
    def save(self, path) -> None:
        """Writes the cache as a safetensors file, whole or not at all; a file that was there stays if writing fails.

        It holds the tokens, the states, the expert in force with its vectors, and the fingerprint of the weights.

        Raises:
            ValueError: the cache belongs to no model.
            OSError: the file cannot be written.
        """
        save_session(self, path)

    @classmethod
    def load(
        cls, path, model, on_weights_change: str = "error", max_cache_len: int | None = None
    ) -> "MambaFormerCache":
        """The cache that `save` wrote, for `model`: it goes on as the saved one would have, bit for bit.

        Replay segments are not in the file, so only tokens that are fed after loading are within the reach.

        Args:
            on_weights_change: `"error"` refuses a model of other weights; `"recompute"` encodes the tokens again at
                the next forward.
            max_cache_len: columns that static storage has room for from now on; by default as many as it had. A file
                whose storage is far larger than both its content and the model's `max_position_embeddings` is loaded
                only with this argument, since all of the room is allocated at once.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a damaged file or one of another kind (nothing is ever unpickled), a newer version, more room
                than the file and the model justify, or a model of another configuration or other weights. No cache
                has been built then.
        """
        return load_session(path, model, on_weights_change, max_cache_len)

    # ---- its tensors

    def buffers(self) -> dict[str, torch.Tensor]:
        """All tensors that a decode step reads or writes, with all of their slots."""
        tensors = self.lengths.buffers() | self.history.tensors()
        for name, store in self.stores():
            tensors |= {f"{name}.{key}": tensor for key, tensor in store.buffers().items()}
        return tensors

    def set_buffers(self, tensors: dict[str, torch.Tensor]) -> None:
        """Makes these tensors, named and shaped like those of `buffers`, hold what the cache holds."""
        self.lengths.set_buffers(tensors)
        self.history.set_tensors(tensors)
        for name, store in self.stores():
            store.set_buffers({key: tensors[f"{name}.{key}"] for key in store.buffers()})

    @not_while_fed("read", changes=False)
    def to_dict(self) -> dict:
        """The nested view of the cache hand-out: `{"layers": {"initial_mamba": {...}, "layer_0": {...}, ...}}`.

        A layer has `mamba_cache` (`{"conv", "ssm"}`), `attn_kv_cache` (`{"keys", "values"}`), either of them `None`
        where there is none, and `cache_length`, the columns fed. Tensors are views of what the cache holds.
        """
        starts_with_mamba = self.specs[:1] == [LayerSpec(is_recurrent=True)]
        names = ["initial_mamba"] if starts_with_mamba else []
        names += [f"layer_{idx}" for idx in range(len(self.layers) - len(names))]
        length, layers = self.get_seq_length(), zip(names, self.layers, strict=True)
        return {"layers": {name: layer.to_dict() | {"cache_length": length} for name, layer in layers}}

    def report(self) -> dict[str, dict[str, int]]:
        """Bytes of the sequence by layer type and kind, and of its token history; without the expert vector.

        Kinds are `keys`, `values`, `conv`, `ssm` and `past`, which is what `activate_past_recording` keeps.
        """
        found: dict[str, dict[str, int]] = {}
        for spec, layer in zip(self.specs, self.layers, strict=True):
            kinds = found.setdefault(_layer_type(spec), {})
            for store in layer.stores.values():
                for kind, nbytes in store.nbytes().items():
                    kinds[kind] = kinds.get(kind, 0) + nbytes
        found["tokens"] = self.history.nbytes()
        return found

    @property
    def nbytes(self) -> int:
        """Those of `report` in all."""
        return sum(sum(kinds.values()) for kinds in self.report().values())


def _layer_type(spec: LayerSpec) -> str:
    """The name in `config.layer_types` of a layer with this spec."""
    if not spec.attends:
        return "linear_attention" if spec.is_recurrent else "other"
    if spec.is_recurrent:
        return "hybrid" if spec.window is None else "hybrid_sliding"
    return "full_attention" if spec.window is None else "sliding_attention"


def _check_options(storage: str, max_cache_len: int | None, rollback_reach: int) -> None:
    if storage not in STORAGES:
        raise ValueError(f"`storage` must be {' or '.join(map(repr, STORAGES))}, got {storage!r}.")
    if (storage == "static") != (max_cache_len is not None):
        raise ValueError("`max_cache_len` (columns to hold) goes with storage='static', and only with it.")
    if max_cache_len is not None and not _is_count(max_cache_len, 1):
        raise ValueError(f"`max_cache_len` must be a positive integer, got {max_cache_len!r}.")
    _check_reach(rollback_reach)


def _is_count(value: Any, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


def _check_reach(reach: Any) -> None:
    if not _is_count(reach, 0):
        raise ValueError(f"`rollback_reach` counts tokens and must be an integer of at least 0, got {reach!r}.")


__all__ = ["MambaFormerCache"]
