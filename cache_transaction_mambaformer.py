"""One forward as a transaction on a cache: begun, then committed or discarded."""

from typing import TYPE_CHECKING

import torch

from .cache_eviction_mambaformer import PrunedRetention, make_pruned_layout
from .cache_retention_mambaformer import Layout, Retention, Span, make_layout

if TYPE_CHECKING:
    from .cache_history_mambaformer import CacheLengths, Change, NewTokens
    from .cache_mambaformer import MambaFormerCache


class CacheTransaction:
    """Context of one forward that feeds a cache; made by `MambaFormerCache.transaction`.

    The end of the block commits the forward. An exception that leaves the block discards the forward: the cache is as
    it was before, or, if its states were dropped, the next forward computes them again from the history of tokens.
    Parked states are parked again.

    Args:
        cache: the cache that is fed.
        change: treatment of the cached sequence, and the expert vector and weights of the forward.
        new: columns that were not fed before.
        num_tokens: width of the forward, with the columns that are encoded again.
        lengths: real tokens of each row, (rows,); `None` when all are real.

    Attributes:
        span: positions of the tokens of the forward.
        layouts: the slots of their keys, for each retention of the layers.
    """

    __slots__ = ("backup", "cache", "change", "device", "layouts", "lengths", "new", "num_tokens", "span")

    span: Span

    def __init__(
        self,
        cache: "MambaFormerCache",
        change: "Change",
        new: "NewTokens",
        num_tokens: int,
        lengths: torch.Tensor | None,
        device: torch.device,
    ):
        self.cache, self.change, self.new = cache, change, new
        self.num_tokens, self.lengths, self.device = num_tokens, lengths, device
        self.layouts: dict[Retention, Layout] = {}
        self.backup: MambaFormerCache | None = None

    def __enter__(self) -> "CacheTransaction":
        cache, change = self.cache, self.change
        if not torch.compiler.is_compiling():
            cache.lock.check_not_open("fed")  # by a hook of its own forward
            cache.lock.is_open = True
        cache.each_layer("discard")
        if cache.max_columns is not None:
            cache.lengths.move_to(self.device)
        before = self._lengths_before()
        columns = before.columns if isinstance(before.columns, int) else None
        self.span = Span(self.num_tokens, start=before.start, lengths=self.lengths, columns=columns)
        retentions = {layer.attention.retention for layer in cache.layers if layer.attention is not None}
        self.layouts = {kind: self._make_layout(kind) for kind in retentions}
        if change.replaces_states:
            self._replace_states()
        cache.open_transaction = self
        return self

    def _make_layout(self, retention: Retention) -> Layout:
        if isinstance(retention, PrunedRetention):
            return make_pruned_layout(retention, self.span, self.device)
        return make_layout(retention, self.span, self.device, self.cache.max_columns)

    def _lengths_before(self) -> "CacheLengths":
        """The lengths of the sequence that the forward continues."""
        if self.change.resumed is not None:
            return self.change.resumed.lengths
        lengths = self.cache.lengths
        return lengths.before_first_token() if self.change.replaces_states else lengths

    def _replace_states(self) -> None:
        """Drops or parks the states of the cache, and starts from parked or empty ones."""
        cache, resumed = self.cache, self.change.resumed
        if resumed is not None:
            cache.parked.remove(resumed)  # before others are parked, which may drop it
        if self.change.recomputes and self.change.encoding is not None:
            cache.parked.park(cache, self.change.encoding.weights)
        # States that cannot be computed again are kept until the forward has succeeded.
        self.backup = None if cache.history.is_complete else cache.duplicate()
        cache.provenance.invalidate()
        cache.lengths.overshoot = 0
        cache.each_layer("reset")
        if resumed is not None:
            cache.put_layers(resumed.layers)
            cache.lengths.overshoot = resumed.lengths.overshoot

    def __exit__(self, error_type: type[BaseException] | None, *_) -> None:
        cache = self.cache
        cache.open_transaction = None
        if error_type is None:
            self._commit()
        else:
            cache.each_layer("discard")
            if self.backup is not None:
                for name in ("layers", "lengths", "history", "provenance"):
                    setattr(cache, name, getattr(self.backup, name))
            if self.change.resumed is not None:
                cache.put_layers(cache.empty_layers())
                cache.parked.add(self.change.resumed)
        self.backup = None
        if not torch.compiler.is_compiling():
            cache.lock.is_open = False

    def _commit(self) -> None:
        cache, change, new = self.cache, self.change, self.new
        is_change = change.encoding is not None
        if is_change:
            cache.provenance.invalidate()  # an exception from here on costs a recompute, and never a wrong state
        if change.drops_tokens:
            cache.forget_sequence()
        self.backup = None
        cache.each_layer("commit")
        cache.history.append(cache.lengths, new)
        if cache.history.bounds.forgotten:
            cache.parked.clear()  # the columns since cannot be encoded again
        cache.lengths.advance(self.span, new.token_ids)
        if is_change:
            cache.put_in_force(change)
            cache.provenance.commit(change)


class UncachedForward:
    """The same context for a forward without a cache, which has nothing to commit."""

    __slots__ = ("span",)

    def __init__(self, span: Span):
        self.span = span

    def __enter__(self) -> "UncachedForward":
        return self

    def __exit__(self, *_) -> None:
        pass


__all__ = ["CacheTransaction", "UncachedForward"]
