"""The cache of MambaFormer: all state of one request, and none that another request could see.

A forward is a transaction, `with cache.step(...)`: layers write where nothing visible lives, or stage the states that
they would overwrite. The end of the block makes all of it visible at once; an exception leaves the cache as it was.
"""

import weakref
from collections.abc import Callable
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
    plan_removal,
)
from .cache_keys_mambaformer import Layout, Removal, Retention, Span, as_index, plan_layout
from .cache_layers_mambaformer import CacheLayer, make_layer
from .cache_session_mambaformer import load_session, save_session
from .cache_use_mambaformer import CacheUse, not_while_fed
from .modeling_stack_mambaformer import Facts, facts_of, places_of_model

# Tokens that `generate` can take back at once when it speculates; the library drafts 20 at a time by default.
DEFAULT_REACH = 64


class CacheStep:
    """Context of one forward that feeds a cache; made by `MambaFormerCache.step`.

    Args:
        change: treatment of the sequence that is cached, and the expert vector and weights of the forward.
        new: columns that were not fed before.
        num_tokens, lengths: width of the forward, with the columns that are fed again, and real tokens of each row.

    Attributes:
        span: positions of the tokens of the forward.
        layouts: where each retention of the layers puts their keys.
    """

    __slots__ = ("backup", "cache", "change", "device", "layouts", "lengths", "new", "num_tokens", "span")

    def __init__(self, cache, change: Change, new: NewTokens, num_tokens: int, lengths, device):
        self.cache, self.change, self.new = cache, change, new
        self.num_tokens, self.lengths, self.device = num_tokens, lengths, device
        self.span: Span | None = None
        self.layouts: dict[Retention, Layout] = {}
        self.backup: MambaFormerCache | None = None

    def __enter__(self) -> "CacheStep":
        self.cache._begin(self)
        return self

    def __exit__(self, error_type, *_) -> None:
        if error_type is None:
            self.cache._commit(self)
        else:
            self.cache._discard(self)


class UncachedStep:
    """The same context for a forward without a cache, which has nothing to commit."""

    __slots__ = ("span",)

    def __init__(self, span: Span):
        self.span = span

    def __enter__(self) -> "UncachedStep":
        return self

    def __exit__(self, *_) -> None:
        pass


class MambaFormerCache(Cache):
    """Holds a request: states, keys and values, positions, tokens, the expert in force and the weights it saw.

    Make one with `model.make_cache(...)`. Rows never see each other, and no other cache or model is ever written.

    Args:
        config: configuration of the model it serves.
        storage: `"dense"` grows with the text at amortised cost, `"static"` has a fixed size and fixed addresses.
        max_cache_len: columns (tokens with their pads) that static storage holds.
        on_expert_change: what happens to a text that was encoded under another expert or other weights.
            `"recompute"` encodes it again at the next forward; `"reset"` drops it, and the caller feeds it again;
            `"continue"` keeps it as it was encoded; `"error"` refuses the change.
        resolve: turns what a user may call an expert into `(expert, key)`; a model's caches bring the model's.
        rollback_reach: tokens that `crop` takes back at once; beyond it, and under static storage, it is as exact but
            the next forward encodes what is left of the text again. See `activate_past_recording`.
        model: the stack whose weights a saved cache is tied to; it is not kept alive.
        facts: of the layers, as a fork takes them over; by default those of `model`, or else of `config`.

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
        facts: list[Facts] | None = None,
    ):
        _check_options(storage, max_cache_len, rollback_reach)
        self.config, self.storage, self.max_columns = config, storage, max_cache_len
        self.resolve = resolve
        self._model = None if model is None else weakref.ref(model)
        self.lengths = CacheLengths()
        self.history = TokenHistory(config, max_cache_len)
        self.provenance = Provenance(on_expert_change)
        self.prepared_expert_vectors = None
        self._step: CacheStep | None = None
        self.use = CacheUse()
        self.rollback_reach = 0
        # Of the model's layers as they are now, which need not be as the configuration describes them.
        if facts is None:
            facts = facts_of(config) if model is None else [place.facts for place in places_of_model(model)]
        self.facts = facts
        super().__init__(layers=[make_layer(config, each, self.lengths, max_cache_len) for each in self.facts])
        if rollback_reach:
            self.activate_past_recording(rollback_reach)

    # ---- a forward, as the model drives it

    def step(self, change: Change, new: NewTokens, num_tokens: int, lengths, device) -> CacheStep:
        """Context of a forward of `num_tokens` columns with `lengths` (rows,) real tokens each.

        Nothing is visible of the forward before the end of the block. States that have to be computed again are
        dropped at its start: if the forward fails, the next one computes them from the history of tokens.
        """
        return CacheStep(self, change, new, num_tokens, lengths, device)

    def _begin(self, step: CacheStep) -> None:
        if not torch.compiler.is_compiling():
            self.use.check_not_open("fed")  # by a hook, out of its own forward
            self.use.is_open = True
        self._each_layer("discard")
        if self.max_columns is not None:
            self.lengths.move_to(step.device)
        change = step.change
        start = self.lengths.before_first_token() if change.starts_empty else self.lengths
        columns = start.columns if isinstance(start.columns, int) else None
        step.span = span = Span(step.num_tokens, start=start.start, lengths=step.lengths, columns=columns)
        retentions = {layer.attention.retention for layer in self.layers if layer.attention is not None}
        step.layouts = {kind: plan_layout(kind, span, step.device, self.max_columns) for kind in retentions}
        self._step = step
        if change.starts_empty:
            # States that cannot be computed again are kept until the forward has succeeded.
            step.backup = self._forked() if self.history.has_embeddings else None
            self.provenance.invalidate()
            self.lengths.overshoot = 0
            self._each_layer("drop")

    def _discard(self, step: CacheStep) -> None:
        self._each_layer("discard")
        backup, step.backup = step.backup, None
        if backup is not None:
            for name in ("layers", "lengths", "history", "provenance"):
                setattr(self, name, getattr(backup, name))
        self._close()

    def _commit(self, step: CacheStep) -> None:
        change, new = step.change, step.new
        is_change = change.encoding is not None
        if is_change:
            self.provenance.invalidate()  # an exception from here on costs an encoding, and never a wrong state
        if change.action is Action.RESET:
            self._forget_sequence()
        step.backup = None
        self._each_layer("commit")
        self.history.append(self.lengths, new)
        self.lengths.advance(step.span, new.token_ids)
        if is_change:
            self._put_in_force(change)
            self.provenance.commit(change)
        self._close()

    def _close(self) -> None:
        self._step = None
        if not torch.compiler.is_compiling():
            self.use.is_open = False

    def layout(self, layer_idx: int) -> Layout:
        """How layer `layer_idx` takes in the open forward."""
        return self._step.layouts[self.layers[layer_idx].attention.retention]

    def update(self, key_states, value_states, layer_idx: int, *args, is_recorded: bool = False, **kwargs):
        """Takes in (rows, heads, tokens, head_dim) of the open forward; returns the keys and values attention sees.

        `is_recorded`: a graph may save what is returned, so it must never be overwritten.
        """
        return self.layers[layer_idx].update(key_states, value_states, self.layout(layer_idx), is_recorded)

    def recurrent_states(self, layer_idx: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """States that layer `layer_idx` starts the open forward from, on the device of `like`; empty at first."""
        states = self.layers[layer_idx].recurrent.tensors()
        # Fixed states outlive their sequence, to keep their addresses; then they are zero, and may have other rows.
        return {name: state.to(like.device) for name, state in states.items() if state.shape[0] == like.shape[0]}

    def _each_layer(self, method: str, *args) -> None:
        for layer in self.layers:
            layer.each_store(method, *args)

    # ---- experts and weights

    @not_while_fed("given another expert")
    def set_expert_vector(self, expert) -> None:
        """Puts `expert` in force, as `on_expert_change` says; whatever it costs, the next forward pays.

        Args:
            expert: whatever `expert_vector=` takes: `None` (the base), a name, an `ExpertVector`, a dict of tensors,
                or a list with one of these per row.

        Raises:
            ValueError: the policy is `"error"` and a text is cached, or the expert is not known or does not fit.
        """
        if expert is not None and self.resolve is None:
            raise ValueError("This cache belongs to no model yet: make it with `model.make_cache()`.")
        self._check_one_a_row(expert)
        expert, key = (None, None) if expert is None else self.resolve(expert)
        for row in expert if isinstance(expert, list) else [expert]:
            if row is not None and self.model is not None:
                self.model.check_expert(row)
        change = self.plan(expert, key, self.provenance.in_force.weights)
        if change.action is Action.RESET:
            self.reset()
        self._put_in_force(change)

    def plan(self, expert, key, weights) -> Change:
        """The change to an expert vector, identified by `key`, and to weights with this stamp.

        Raises:
            ValueError: the change is refused; nothing has changed.
        """
        self._check_one_a_row(expert)
        return self.provenance.plan_change(expert, key, weights, self.lengths, self.history)

    def _check_one_a_row(self, expert) -> None:
        if isinstance(expert, (list, tuple)) and self.lengths.rows not in (None, len(expert)):
            raise ValueError(
                f"`expert_vector` has {len(expert)} entries but the cache has {self.lengths.rows} rows: give one each."
            )

    def _put_in_force(self, change: Change) -> None:
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
        is_one = not self.provenance.is_mixed and self.status != Status.DIVERGED
        return is_one and not self.history.has_embeddings

    # Fields of the configuration that a cache takes its shape from.
    depends_on = ("layer_types", "sliding_window", "num_sink_tokens", "num_key_value_heads", "head_dim", "vocab_size")
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
    def recorded_reach(self) -> int:
        """Tokens of the open forward that recurrent layers have to remember the making of."""
        return 0 if torch.compiler.is_compiling() else self.rollback_reach

    @not_while_fed("changed")
    def activate_past_recording(self, reach: int = DEFAULT_REACH) -> None:
        """From now on keeps what it takes to `crop` up to `reach` tokens at once.

        Mamba layers keep a checkpoint of their states and the inputs of the tokens since; windows keep `reach` keys
        more. `generate` calls it when it speculates. Static storage, whose states are overwritten in place, does not
        record: there `crop` is as exact, but the text that is left is encoded again.

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
            layer.record_past_of(reach, counts, self.lengths.columns)

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
                or beyond the reach, a text that cannot be encoded again: embeddings or one of mixed experts.
        """
        removal = plan_removal(tokens_to_remove, self.lengths, self.history)
        if not any(removal.by_row):
            return
        if removal.columns_left == 0:
            self.reset()
            return
        stores = [store for layer in self.layers for store in layer.stores.values()]
        is_encoded = self.provenance.encoded is not None
        rewound = [store.rewound(removal) if is_encoded else None for store in stores]
        if any(answer is None for answer in rewound):
            self._check_can_be_encoded_again()
            self._crop_history(removal)
        else:
            encoded = self._crop_history(removal)
            for store, answer in zip(stores, rewound, strict=True):
                store.rewind(answer)
            self.provenance.encoded = encoded

    def _check_can_be_encoded_again(self) -> None:
        if self.provenance.is_mixed or self.status == Status.DIVERGED:
            raise ValueError(
                "The cached text was encoded under several experts or weights (on_expert_change='continue') and cannot"
                " be rolled back so far: make the cache with a larger `rollback_reach`, or fork it before feeding what"
                " may have to be taken back."
            )
        self.history.check_replayable()

    def _crop_history(self, removal: Removal) -> Encoding | None:
        """Crops tokens and lengths, which invalidates the states; returns what had encoded them."""
        encoded = self.provenance.invalidate()
        self.history.crop(removal)
        self.lengths.crop(removal, self.history.token_ids.tensor.device)
        return encoded

    @not_while_fed("reset")
    def reset(self) -> None:
        """Forgets the sequence; the expert vector in force stays."""
        self._each_layer("drop")
        self._forget_sequence()

    def _forget_sequence(self) -> None:
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
        self._each_layer("select_rows", rows)
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
        return self._forked()

    def _forked(self) -> "MambaFormerCache":
        options = (self.config, self.storage, self.max_columns, self.on_expert_change, self.resolve)
        other = MambaFormerCache(*options, self.rollback_reach, self.model, self.facts)
        for layer, copy in zip(self.layers, other.layers, strict=True):
            layer.fork_into(copy)
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
        return {name: value for name, value in self.__dict__.items() if name != "use"} | {"_model": None}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self.use = CacheUse()

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

        What a cache has recorded to roll back is not in the file: its reach starts anew behind what is loaded.

        Args:
            on_weights_change: `"error"` refuses a model of other weights; `"recompute"` encodes the text again at the
                next forward.
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

    # ---- what it holds

    @not_while_fed("read", changes=False)
    def to_dict(self) -> dict:
        """The nested view of the cache hand-out: `{"layers": {"initial_mamba": {...}, "layer_0": {...}, ...}}`.

        A layer has `mamba_cache` (`{"conv", "ssm"}`), `attn_kv_cache` (`{"keys", "values"}`), either of them `None`
        where there is none, and `cache_length`, the columns fed. Tensors are views of what the cache holds.
        """
        starts_with_mamba = self.facts[:1] == [(False, True, None)]
        names = ["initial_mamba"] if starts_with_mamba else []
        names += [f"layer_{idx}" for idx in range(len(self.layers) - len(names))]
        return {"layers": {name: self._layer_dict(layer) for name, layer in zip(names, self.layers, strict=True)}}

    def _layer_dict(self, layer: CacheLayer) -> dict:
        return {
            "mamba_cache": layer.recurrent.tensors() or None if layer.recurrent is not None else None,
            "attn_kv_cache": layer.attention.tensors() or None if layer.attention is not None else None,
            "cache_length": self.get_seq_length(),
        }

    def report(self) -> dict[str, dict[str, int]]:
        """Bytes that the text takes, by layer type and kind, and those of the token log; not those of an expert.

        Kinds are `keys`, `values`, `conv`, `ssm` and `past`, which is what `activate_past_recording` keeps.
        """
        found: dict[str, dict[str, int]] = {}
        for facts, layer in zip(self.facts, self.layers, strict=True):
            kinds = found.setdefault(_layer_type(*facts), {})
            for store in layer.stores.values():
                for kind, nbytes in store.nbytes().items():
                    kinds[kind] = kinds.get(kind, 0) + nbytes
        found["tokens"] = self.history.nbytes()
        return found

    @property
    def nbytes(self) -> int:
        """Those of `report` in all."""
        return sum(sum(kinds.values()) for kinds in self.report().values())


def _layer_type(has_attention: bool, has_mamba: bool, window: int | None) -> str:
    """The name in `config.layer_types` of a layer with these facts."""
    if not has_attention:
        return "linear_attention" if has_mamba else "other"
    if has_mamba:
        return "hybrid" if window is None else "hybrid_sliding"
    return "full_attention" if window is None else "sliding_attention"


def _check_options(storage: str, max_cache_len: int | None, rollback_reach: int) -> None:
    if storage not in ("dense", "static"):
        raise ValueError(f"`storage` must be 'dense' or 'static', got {storage!r}.")
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
