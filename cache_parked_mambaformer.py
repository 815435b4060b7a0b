"""Parked states: the states of a sequence under expert vectors that are not in force.

After a change of expert vector the next forward encodes the sequence again. A cache with `park_bytes` keeps the states
that this forward replaces. When their expert vector comes back into force, the next forward starts from them and
encodes only the columns that were fed since: a sequence cut into two forwards, which changes no logits.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from .cache_history_mambaformer import CacheLengths, Encoding, TokenHistory, make_removal, select_encoding
from .cache_keys_mambaformer import Removal
from .cache_layers_mambaformer import CacheLayer, extend_reach_of

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache


@dataclass(eq=False)
class ParkedState:
    """The states after the first columns of a sequence, encoded with `encoding`.

    Args:
        layers: layers of a cache with the states; the cache that resumes them takes these objects.
        lengths: lengths of the columns that the states cover.
        rows: row i of the cache is row `rows[i]` of the states; `None` if both are equal. A beam search reorders a
            cache at each token, and the states follow only when they are used.
    """

    encoding: Encoding
    layers: list[CacheLayer]
    lengths: CacheLengths
    rows: Tensor | None = None

    @property
    def nbytes(self) -> int:
        stores = (store for layer in self.layers for store in layer.stores.values())
        return sum(sum(store.nbytes().values()) for store in stores)

    def select_rows(self, rows: Tensor) -> None:
        self.encoding = select_encoding(self.encoding, rows)
        self.rows = rows if self.rows is None else self.rows.index_select(0, rows.to(self.rows.device))

    def apply_rows(self) -> None:
        """Gives the states the rows that were selected since they were parked."""
        if self.rows is None:
            return
        for layer in self.layers:
            layer.each_store("select_rows", self.rows)
        self.lengths.select_rows(self.rows)
        self.rows = None

    def crop(self, removal: Removal, history: TokenHistory) -> bool:
        """Takes back what `removal` takes from the cache; False where the states would have to be encoded again.

        Args:
            history: the tokens of the cache, before the removal.
        """
        columns = self.lengths.num_columns()
        lost = [max(0, columns - (removal.columns - by_row)) for by_row in removal.by_row]
        if not any(lost):
            return True
        if min(lost) == columns:
            return False
        self.apply_rows()
        own = make_removal([-number for number in lost] if len(lost) > 1 else -lost[0], self.lengths, history)
        stores = [store for layer in self.layers for store in layer.stores.values()]
        plans = [store.plan_crop(own) for store in stores]
        if any(plan is None for plan in plans):
            return False
        for store, plan in zip(stores, plans, strict=True):
            store.crop(plan)
        self.lengths.crop(own, history.device)
        return True

    def fork(self) -> "ParkedState":
        lengths = CacheLengths()
        self.lengths.fork_into(lengths)
        return ParkedState(self.encoding, [layer.fork(lengths) for layer in self.layers], lengths, self.rows)


class ParkedStates:
    """The parked states of one cache, one for each encoding, within `max_bytes`; the oldest are dropped first."""

    def __init__(self, max_bytes: int = 0):
        self.max_bytes = max_bytes
        self.states: list[ParkedState] = []  # the least recently parked first

    def __len__(self) -> int:
        return len(self.states)

    @property
    def nbytes(self) -> int:
        return sum(state.nbytes for state in self.states)

    def find(self, encoding: Encoding | None) -> ParkedState | None:
        """The state from which a forward with `encoding` may start; `None` if there is none.

        A forward that records gradients starts from the first token, so that they reach all tokens.
        """
        if not self.states or torch.is_grad_enabled() or torch.compiler.is_compiling():
            return None
        found = [state for state in self.states if state.encoding == encoding]
        for state in found[-1:]:
            state.apply_rows()
        return found[-1] if found else None

    def park(self, cache: "MambaFormerCache", weights: object) -> None:
        """Moves the states of `cache` here, if another forward with `weights` may use them; its layers are empty then.

        States of other weights are dropped, since the stamp of these weights never comes back.
        """
        encoding = cache.provenance.encoded
        self.states = [state for state in self.states if state.encoding.weights == weights]
        if encoding is None or encoding.weights != weights or not self.max_bytes or not _may_park(cache):
            return
        lengths = CacheLengths()
        cache.lengths.fork_into(lengths)
        layers, cache.layers = cache.layers, cache.empty_layers()
        self.add(ParkedState(encoding, layers, lengths))

    def add(self, state: ParkedState) -> None:
        """Keeps a state, unless it alone exceeds the budget; drops the oldest until all fit."""
        self.states = [each for each in self.states if each.encoding != state.encoding]
        for layer in state.layers:
            layer.lengths = state.lengths
        if state.nbytes <= self.max_bytes:
            self.states.append(state)
        while self.nbytes > self.max_bytes:
            del self.states[0]

    def remove(self, state: ParkedState) -> None:
        self.states = [each for each in self.states if each is not state]

    def clear(self) -> None:
        self.states = []

    def crop(self, removal: Removal, history: TokenHistory) -> None:
        """Follows a crop of the cache; drops states that would have to be encoded again."""
        self.states = [state for state in self.states if state.crop(removal, history)]

    def select_rows(self, rows: Tensor) -> None:
        for state in self.states:
            state.select_rows(rows)

    def extend_reach(self, reach: int, added: int) -> None:
        for state in self.states:
            extend_reach_of(state.layers, state.lengths, reach, added)

    def fork(self) -> "ParkedStates":
        other = ParkedStates(self.max_bytes)
        other.states = [state.fork() for state in self.states]
        return other


def _may_park(cache: "MambaFormerCache") -> bool:
    """Whether the tokens and one encoding determine the states, and no graph leads to them."""
    if torch.compiler.is_compiling() or cache.provenance.is_mixed or cache.history.has_embeddings:
        return False
    return not any(tensor.requires_grad for tensor in _tensors_of(cache))


def _tensors_of(cache: "MambaFormerCache") -> Iterator[Tensor]:
    for _, store in cache.stores():
        yield from store.buffers().values()


__all__ = ["ParkedState", "ParkedStates"]
