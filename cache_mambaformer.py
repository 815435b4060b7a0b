"""The cache of MambaFormer: all that one request has, and nothing that another one could see.

*A forward is a transaction.* Layers write where nothing visible lives, or stage what they would overwrite; a change of
expert is planned first. `commit` makes all of it true at once, so a forward that fails leaves the cache as it was.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from transformers.cache_utils import Cache

from .cache_keys_mambaformer import (
    Layout,
    Removal,
    Retention,
    Span,
    as_index,
    counted_positions,
    plan_layout,
    usable,
)
from .cache_layers_mambaformer import CacheLayer, Clock, TokenLog, make_layer
from .cache_session_mambaformer import load_session, save_session
from .cache_use_mambaformer import CacheUse, not_while_fed
from .expert_vectors_mambaformer import collapsed_key
from .modeling_stack_mambaformer import Facts, facts_of, places_of_model

EXPERT_CHANGE_POLICIES = ("recompute", "reset", "continue", "error")
# Tokens that `generate` can take back at once when it speculates; the library drafts 20 at a time by default.
DEFAULT_REACH = 64


@dataclass(frozen=True)
class InForce:
    """What a text is encoded under: an expert, by the key of its content, and weights, by their stamp."""

    expert_key: Any = None
    weights: Any = None


@dataclass(frozen=True)
class Transition:
    """What a forward does to the request before its tokens: nothing is true of it until the commit.

    Args:
        expert, in_force: what the forward puts in force.
        anew: the remembered tokens are encoded again, or dropped, so the forward starts from empty states.
        drops_text: they are dropped.
        mixes: they stay as something else encoded them.
    """

    expert: Any
    in_force: InForce
    anew: bool = False
    drops_text: bool = False
    mixes: bool = False


# Goes on as before. A compiled step takes it without a look at the expert's key, on which its graph would depend.
UNCHANGED = Transition(None, InForce())


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
        _check_options(storage, max_cache_len, on_expert_change, rollback_reach)
        self.config, self.storage, self.max_columns = config, storage, max_cache_len
        self.on_expert_change, self.resolve = on_expert_change, resolve
        self._model = None if model is None else weakref.ref(model)
        self.clock = Clock()
        self.log = TokenLog(config, max_cache_len)
        # What is in force, and what the states were encoded under (`None`: they have to be computed again).
        self.expert_vector, self.in_force = None, InForce()
        self.encoded_under: InForce | None = self.in_force
        self.is_mixed, self.expert_plan = False, None
        self._rows: int | None = None
        self._layouts: dict[Retention, Layout] = {}
        self._kept: MambaFormerCache | None = None
        self.use = CacheUse()
        self.rollback_reach = 0
        # Of the model's layers as they are now, which need not be as the configuration describes them.
        if facts is None:
            facts = facts_of(config) if model is None else [place.facts for place in places_of_model(model)]
        self.facts = facts
        super().__init__(layers=[make_layer(config, each, self.clock, max_cache_len) for each in self.facts])
        if rollback_reach:
            self.activate_past_recording(rollback_reach)

    # ---- a forward, as the model drives it

    def begin(self, transition: Transition, num_tokens: int, lengths: torch.Tensor | None, device) -> Span:
        """Opens a forward of `num_tokens` columns with `lengths` (rows,) real tokens each.

        Nothing is seen of it before `commit`; a forward that fails calls `abandon`. Where states had to be dropped,
        the next forward computes them again from the remembered tokens.
        """
        if not torch.compiler.is_compiling():
            self.use.check_not_open("fed")  # by a hook, out of its own forward
            self.use.is_open = True
        self._each_layer("discard")
        if transition.anew:
            # States that cannot be computed again are kept until the forward has succeeded.
            self._kept = self._forked() if self.log.has_embeddings else None
            self.encoded_under, self.clock.overshoot = None, 0
            self._each_layer("drop")
        if self.max_columns is not None:
            self.clock.move_to(device)
        clock = Clock(columns=self.clock.columns * 0) if transition.anew else self.clock
        columns = clock.columns if isinstance(clock.columns, int) else None
        span = Span(num_tokens, start=clock.start, lengths=lengths, columns=columns)
        retentions = {layer.attention.retention for layer in self.layers if layer.attention is not None}
        self._layouts = {kind: plan_layout(kind, span, device, self.max_columns) for kind in retentions}
        return span

    def abandon(self) -> None:
        """Undoes what `begin` and the layers did."""
        self._each_layer("discard")
        if self._kept is not None:
            for name in ("layers", "clock", "log", "encoded_under"):
                setattr(self, name, getattr(self._kept, name))
            self._kept = None
        self.use.is_open = False

    def commit(
        self, transition: Transition, span: Span, token_ids, mask=None, position_ids=None, embedding_marks=None
    ) -> None:
        """Makes the forward of `span` true.

        Args:
            token_ids: the columns that were not fed before, (rows, tokens); so are `mask` and `position_ids`.
            embedding_marks: of columns that were given as embeddings, so that `token_ids` says nothing.
        """
        if transition is not UNCHANGED:
            self.encoded_under = None  # whatever cuts this short, a state that is further than the text is never used
        if transition.drops_text:
            self._forget_text()
        self._kept = None
        self._each_layer("commit")
        if position_ids is None and self.log.position_ids.tensor is not None:
            position_ids = self._counted_positions(token_ids, mask)
        self.log.append(self.clock.columns, token_ids, mask, position_ids, embedding_marks)
        self.log.has_embeddings |= embedding_marks is not None
        # The counts first: under static storage the span's start is a view of the columns.
        if span.lengths is not None or self.clock.counts is not None:
            self.clock.counts = span.ends(token_ids.device)
        self.clock.advance(token_ids.shape[1])
        if self.clock.overshoot:
            fed = span.num_tokens if span.lengths is None else int(span.lengths.min())
            self.clock.overshoot = max(self.clock.overshoot - fed, 0)
        self.clock.is_empty, self._rows = False, token_ids.shape[0]
        if transition is not UNCHANGED:
            self._put_in_force(transition)
            self.encoded_under, self.is_mixed = self.in_force, self.is_mixed or transition.mixes
        if not torch.compiler.is_compiling():
            self.use.is_open = False

    def _counted_positions(self, token_ids: torch.Tensor, mask: torch.Tensor | None) -> torch.Tensor:
        start = self.clock.start
        mask = torch.ones_like(token_ids) if mask is None else mask
        return counted_positions(mask, start if isinstance(start, int) else start[:, None])

    def layout(self, layer_idx: int) -> Layout:
        """How layer `layer_idx` takes in the open forward."""
        return self._layouts[self.layers[layer_idx].attention.retention]

    def update(self, key_states, value_states, layer_idx: int, *args, is_recorded: bool = False, **kwargs):
        """Takes in (rows, heads, tokens, head_dim) of the open forward; returns the keys and values attention sees.

        `is_recorded`: a graph may save what is returned, so it must never be overwritten.
        """
        return self.layers[layer_idx].update(key_states, value_states, self.layout(layer_idx), is_recorded)

    def recurrent_states(self, layer_idx: int, like: torch.Tensor) -> dict[str, torch.Tensor]:
        """States that layer `layer_idx` starts the open forward from, on the device of `like`; empty at first."""
        states = self.layers[layer_idx].recurrent.tensors()
        # Fixed states outlive their text, to keep their addresses; then they are zero, and may have other rows.
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
        transition = self.plan(expert, key, self.in_force.weights)
        if transition.drops_text:
            self.reset()
        self._put_in_force(transition)

    def plan(self, expert, key, weights) -> Transition:
        """What it takes to go on under an expert, told from others by `key`, and weights with this stamp.

        Raises:
            ValueError: the change is refused; nothing has changed.
        """
        self._check_one_a_row(expert)
        in_force = InForce(key, weights)
        if in_force == self.encoded_under:
            in_force = self.encoded_under
        if self.clock.is_empty or in_force is self.encoded_under:
            return Transition(expert, in_force)
        is_change, policy = in_force != self.in_force, self.on_expert_change
        if policy == "continue" and (is_change or self.encoded_under is not None):
            self._check_encoded()
            return Transition(expert, in_force, mixes=True)
        if not is_change:
            return Transition(expert, in_force, anew=True)
        if policy == "error":
            what = "expert vector" if key != self.in_force.expert_key else "weights"
            raise ValueError(
                f"The {what} changed while {self.get_seq_length()} columns are cached and `on_expert_change` is "
                "'error': call `cache.reset()` and feed the text again, or make the cache with another policy."
            )
        if policy == "recompute":
            self._check_history()
        return Transition(expert, in_force, anew=True, drops_text=policy == "reset")

    def _check_one_a_row(self, expert) -> None:
        if isinstance(expert, (list, tuple)) and self._rows not in (None, len(expert)):
            raise ValueError(
                f"`expert_vector` has {len(expert)} entries but the cache has {self._rows} rows: give one each."
            )

    def _put_in_force(self, transition: Transition) -> None:
        if transition.in_force.expert_key != self.in_force.expert_key:
            self.expert_plan = None
        self.expert_vector, self.in_force = transition.expert, transition.in_force

    def _check_encoded(self) -> None:
        if self.encoded_under is None:
            raise ValueError(
                "Part of the text was rolled back, and what is left has to be encoded by the old expert before another"
                " one goes on from it: feed a token first, or use on_expert_change='recompute'."
            )

    @property
    def is_stale(self) -> bool:
        """Whether the next forward has to encode the remembered tokens again first."""
        if self.clock.is_empty or self.encoded_under == self.in_force:
            return False
        return self.encoded_under is None or self.on_expert_change != "continue"

    @property
    def is_settled(self) -> bool:
        """Whether a text is cached and goes on under exactly what encoded it; compares no keys."""
        return not self.clock.is_empty and self.encoded_under is self.in_force

    def is_about_to_mix(self) -> bool:
        """Whether the next token goes on from a text that something else than what is in force has encoded."""
        return not self.clock.is_empty and not self.is_stale and self.encoded_under != self.in_force

    def history(self) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Token ids, mask and own positions of all columns, (rows, columns) each; `None` for what was never given."""
        self._check_history()
        columns = self.get_seq_length()
        found = [b.view(columns) if b.tensor is not None else None for b in self.log.buffers().values()]
        return found[0], found[1], found[2]

    def _check_history(self) -> None:
        if self.log.has_embeddings:
            raise ValueError(
                "The cached text would have to be encoded again, but part of it was fed as `inputs_embeds`, which are "
                "not remembered: call `cache.reset()` and feed it again, or use on_expert_change='continue'."
            )

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
        return None if self.log.token_ids.tensor is None else self.log.token_ids.view(self.get_seq_length())

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Columns fed so far, pads included."""
        return self.clock.num_columns()

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        return self.layers[layer_idx].get_mask_sizes(query_length)

    def has_previous_state(self, layer_idx: int | None = None, state_idx: int | None = None) -> bool:
        return not self.clock.is_empty

    @property
    def batch_size(self) -> int:
        """Rows, or -1 before the first forward."""
        return -1 if self._rows is None else self._rows

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
        return not self.clock.is_empty

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
        if not self.clock.is_empty:
            # A ring that grows now has lost what it overwrote before.
            self.clock.overshoot += reach - self.rollback_reach
        self.rollback_reach = reach
        start = self.clock.start
        counts = torch.tensor([start], device="cpu") if isinstance(start, int) else start
        for layer in self.layers:
            layer.record_past_of(reach, counts, self.clock.columns)

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
        columns = self.get_seq_length()
        removed = self._checked_removal(tokens_to_remove, columns)
        if max(removed, default=0) == 0:
            return
        if min(removed) == columns:
            self.reset()
            return
        removal = self._removal(removed, columns)
        stores = [store for layer in self.layers for store in layer.stores.values()]
        rewound = [None if self.encoded_under is None else store.rewound(removal) for store in stores]
        if any(answer is None for answer in rewound):
            self._check_can_encode_again()
            self._set_back(removal, removed)
        else:
            encoded_under = self.encoded_under
            self._set_back(removal, removed)
            for store, answer in zip(stores, rewound, strict=True):
                store.rewind(answer)
            self.encoded_under = encoded_under

    def _checked_removal(self, tokens_to_remove: Any, columns: int) -> list[int]:
        """Columns that each row loses; a single number where all lose as many."""
        given = tokens_to_remove.tolist() if isinstance(tokens_to_remove, torch.Tensor) else tokens_to_remove
        is_for_all = not isinstance(given, (list, tuple))
        given = [given] if is_for_all else given
        is_complete = is_for_all or len(given) == self._rows
        if not is_complete or not all(isinstance(k, int) and 0 <= -k <= columns for k in given):
            raise ValueError(
                f"`crop` takes -k for the last k columns, with k at most {columns}, or one such number for each of the"
                f" {self._rows or 0} rows; got {tokens_to_remove}."
            )
        removed = [-k for k in given]
        return removed[:1] if len(set(removed)) == 1 else removed

    def _removal(self, removed: list[int], columns: int) -> Removal:
        columns_left, overshoot = columns - min(removed), self.clock.overshoot
        if self.clock.counts is None:
            tokens = removed[0] if len(removed) == 1 else torch.tensor(removed, device="cpu")
            return Removal(columns, columns_left, tokens, max(removed), overshoot)
        tokens = (self.log.mask.view(columns) & self._is_removed(removed, columns)).sum(1)
        return Removal(columns, columns_left, tokens, int(tokens.max()), overshoot)

    def _is_removed(self, removed: list[int], columns: int) -> torch.Tensor:
        """Whether a column is lost, (rows or 1, columns)."""
        device = self.log.token_ids.tensor.device
        return torch.arange(columns, device=device) >= columns - torch.tensor(removed, device=device)[:, None]

    def _check_can_encode_again(self) -> None:
        if self.is_mixed or self.is_about_to_mix():
            raise ValueError(
                "The cached text was encoded under several experts or weights (on_expert_change='continue') and cannot"
                " be rolled back so far: make the cache with a larger `rollback_reach`, or fork it before feeding what"
                " may have to be taken back."
            )
        self._check_history()

    def _set_back(self, removal: Removal, removed: list[int]) -> None:
        """Sets the text back; columns that only some rows lose are pads of those rows from now on."""
        self.encoded_under = None  # the states have not followed yet
        if len(removed) > 1:
            self.log.add_pads(self._is_removed(removed, removal.columns)[:, : removal.columns_left])
        if len(removed) > 1 or self.clock.counts is not None:
            counts = removal.columns if self.clock.counts is None else self.clock.counts
            device = self.log.token_ids.tensor.device
            self.clock.counts = counts - torch.as_tensor(removal.tokens, device=device)
        self.clock.overshoot += removal.most
        if isinstance(self.clock.columns, int):
            self.clock.columns = removal.columns_left
        else:
            self.clock.columns = usable(self.clock.columns).fill_(removal.columns_left)

    @not_while_fed("reset")
    def reset(self) -> None:
        """Forgets the text; the expert in force stays."""
        self._each_layer("drop")
        self._forget_text()

    def _forget_text(self) -> None:
        self.log = TokenLog(self.config, self.max_columns)
        self.clock.columns, self.clock.counts, self.clock.is_empty = self.clock.columns * 0, None, True
        self.clock.overshoot = 0
        self._rows, self.is_mixed = None, False

    @not_while_fed("given other rows")
    def select_rows(self, rows: torch.Tensor) -> None:
        """Makes row i of the cache what row `rows[i]` was.

        Raises:
            ValueError: there is no such row.
        """
        rows = as_index(rows).long()
        self._check_rows(rows)
        encoded_under = self._select_experts(rows)
        if self.clock.is_empty:
            self.encoded_under = encoded_under
            return
        self.encoded_under = None  # until all layers have followed the text
        for buffer in self.log.buffers().values():
            buffer.select_rows(rows)
        if self.clock.counts is not None:
            counts = self.clock.counts
            self.clock.counts = counts.expand(self._rows).index_select(0, rows.to(counts.device))
        self._rows = rows.shape[0]
        self._each_layer("select_rows", rows)
        self.encoded_under = encoded_under

    def _check_rows(self, rows: torch.Tensor) -> None:
        num_rows = self._num_known_rows()
        # On a device the look at the values would stop the host at every step of a beam search.
        is_known = rows.device.type != "cpu" or bool(((rows >= 0) & (rows < num_rows)).all())
        is_known = is_known and rows.dim() == 1 and rows.numel() > 0
        if num_rows and not is_known:
            raise ValueError(f"The cache has rows 0 to {num_rows - 1}, and these were asked for: {rows.tolist()}.")

    def _select_experts(self, rows: torch.Tensor) -> InForce | None:
        """Deals the experts in force to the rows as they are to be; returns what will have encoded them then."""
        encoded_under = self.encoded_under
        if encoded_under is not None and isinstance(encoded_under.expert_key, tuple):
            key = collapsed_key([encoded_under.expert_key[row] for row in rows.tolist()])
            encoded_under = replace(encoded_under, expert_key=key)
        if isinstance(self.expert_vector, list):
            self.expert_vector, key = self.resolve([self.expert_vector[row] for row in rows.tolist()])
            self.in_force, self.expert_plan = InForce(key, self.in_force.weights), None
        return self.in_force if encoded_under == self.in_force else encoded_under

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows([row for row in range(self._num_known_rows()) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        indices = as_index(indices)
        self.select_rows(indices.nonzero().flatten() if indices.dtype == torch.bool else indices)

    def _num_known_rows(self) -> int:
        if self._rows is not None:
            return self._rows
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
        columns, counts = self.clock.columns, self.clock.counts
        other.clock.columns = columns if isinstance(columns, int) else columns.clone()
        other.clock.counts = None if counts is None else counts.clone()
        other.clock.is_empty, other.clock.overshoot = self.clock.is_empty, self.clock.overshoot
        other.log = self.log.fork()
        for name in ("expert_vector", "in_force", "encoded_under", "is_mixed", "expert_plan", "_rows"):
            setattr(other, name, getattr(self, name))
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
        found["tokens"] = {k: b.tensor.nbytes for k, b in self.log.buffers().items() if b.tensor is not None}
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


def _check_options(storage: str, max_cache_len: int | None, on_expert_change: str, rollback_reach: int) -> None:
    if storage not in ("dense", "static"):
        raise ValueError(f"`storage` must be 'dense' or 'static', got {storage!r}.")
    if on_expert_change not in EXPERT_CHANGE_POLICIES:
        raise ValueError(f"`on_expert_change` must be one of {EXPERT_CHANGE_POLICIES}, got {on_expert_change!r}.")
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
