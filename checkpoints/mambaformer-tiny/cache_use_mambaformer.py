"""Who uses a cache: at most one thread feeds it, and nobody reads or changes it in the middle of a forward.

A forward runs without Python's lock for most of its time, so a second thread could feed, save or crop a cache whose
layers have not all taken in the same tokens. That is refused, with the next step in the message. Threads that read
between two forwards (a session that is saved while a chat goes on) are let in, and a forward waits for them.
"""

import functools
import threading
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch

from .cache_keys_mambaformer import Layout, Retention, Span, plan_layout

if TYPE_CHECKING:
    from .cache_history_mambaformer import Change, NewTokens


class CacheUse:
    """The lock of one cache; the thread that feeds it may enter it again."""

    def __init__(self):
        if not torch.compiler.is_compiling():  # a graph cannot make locks: a cache made in one gets its lock later
            self.lock = threading.RLock()
        self.depth = 0  # of forwards of the thread that has the lock
        self.is_open = False  # a forward has begun and is not committed
        self.owner: int | None = None  # the thread whose `generate` feeds the cache

    def __getattr__(self, name: str) -> Any:
        if name != "lock":
            raise AttributeError(name)
        return vars(self).setdefault("lock", threading.RLock())  # the same one for all threads

    def check_owner(self, action: str) -> None:
        if self.owner is not None and self.owner != threading.get_ident():
            raise _in_use("`generate` of another thread feeds this cache", action)

    def check_not_open(self, action: str) -> None:
        if self.is_open:
            raise _in_use("A forward that feeds this cache is not finished", action)


class Feeding:
    """Context of a forward that feeds a cache.

    Raises:
        ValueError: another thread feeds the cache.
    """

    __slots__ = ("use",)

    def __init__(self, use: CacheUse):
        self.use = use

    def __enter__(self) -> None:
        use = self.use
        use.check_owner("fed")
        if not use.lock.acquire(blocking=False):
            if use.depth:
                raise _in_use("Another thread feeds this cache", "fed")
            use.lock.acquire()  # another thread reads it, which ends soon
        use.depth += 1

    def __exit__(self, *_) -> None:
        use = self.use
        use.depth -= 1
        if not use.depth:
            use.is_open = False  # also where an interrupt came between `begin` and its end
        use.lock.release()


class Alone:
    """Context of what must not happen in the middle of a forward; `changes`: nor during another thread's `generate`.

    Raises:
        ValueError: a forward that feeds the cache is not finished.
    """

    __slots__ = ("action", "changes", "use")

    def __init__(self, use: CacheUse, action: str, changes: bool):
        self.use, self.action, self.changes = use, action, changes

    def __enter__(self) -> None:
        use = self.use
        if self.changes:
            use.check_owner(self.action)
        if not use.lock.acquire(blocking=False):
            if use.depth:
                raise _in_use("Another thread feeds this cache", self.action)
            use.lock.acquire()
        if use.is_open:
            use.lock.release()
            use.check_not_open(self.action)

    def __exit__(self, *_) -> None:
        self.use.lock.release()


class Owning:
    """Context of a `generate`: between its forwards no other thread may feed or change the cache.

    Raises:
        ValueError: another thread feeds the cache.
    """

    def __init__(self, cache: Any):
        self.use: CacheUse | None = getattr(cache, "use", None)

    def __enter__(self) -> None:
        if self.use is not None:
            with Feeding(self.use):
                self.earlier, self.use.owner = self.use.owner, threading.get_ident()

    def __exit__(self, *_) -> None:
        if self.use is not None:
            self.use.owner = self.earlier


class CacheStep:
    """Context of one forward that feeds a cache, as a transaction; made by `MambaFormerCache.step`.

    The end of the block commits the forward. An exception that leaves the block discards it: the cache is as it was,
    or, if its states were dropped, the next forward computes them again from the history of tokens.

    Args:
        cache: the cache that is fed.
        change: treatment of the sequence that is cached, and the expert vector and weights of the forward.
        new: columns that were not fed before.
        num_tokens, lengths: width of the forward, with the columns that are fed again, and real tokens of each row.

    Attributes:
        span: positions of the tokens of the forward.
        layouts: where each retention of the layers puts their keys.
    """

    __slots__ = ("backup", "cache", "change", "device", "layouts", "lengths", "new", "num_tokens", "span")

    def __init__(self, cache: Any, change: "Change", new: "NewTokens", num_tokens: int, lengths: Any, device: Any):
        self.cache, self.change, self.new = cache, change, new
        self.num_tokens, self.lengths, self.device = num_tokens, lengths, device
        self.span: Span | None = None
        self.layouts: dict[Retention, Layout] = {}
        self.backup: Any = None

    def __enter__(self) -> "CacheStep":
        cache, change = self.cache, self.change
        if not torch.compiler.is_compiling():
            cache.use.check_not_open("fed")  # by a hook, out of its own forward
            cache.use.is_open = True
        cache.each_layer("discard")
        if cache.max_columns is not None:
            cache.lengths.move_to(self.device)
        starts_empty = change.starts_empty
        start = cache.lengths.before_first_token() if starts_empty else cache.lengths
        columns = start.columns if isinstance(start.columns, int) else None
        self.span = Span(self.num_tokens, start=start.start, lengths=self.lengths, columns=columns)
        retentions = {layer.attention.retention for layer in cache.layers if layer.attention is not None}
        self.layouts = {kind: plan_layout(kind, self.span, self.device, cache.max_columns) for kind in retentions}
        if starts_empty:
            self._drop_states()
        cache.open_step = self
        return self

    def _drop_states(self) -> None:
        cache = self.cache
        # States that cannot be computed again are kept until the forward has succeeded.
        self.backup = cache.duplicate() if cache.history.has_embeddings else None
        cache.provenance.invalidate()
        cache.lengths.overshoot = 0
        cache.each_layer("reset")

    def __exit__(self, error_type, *_) -> None:
        cache = self.cache
        cache.open_step = None
        if error_type is None:
            self._commit()
        else:
            cache.each_layer("discard")
            if self.backup is not None:
                for name in ("layers", "lengths", "history", "provenance"):
                    setattr(cache, name, getattr(self.backup, name))
        self.backup = None
        if not torch.compiler.is_compiling():
            cache.use.is_open = False

    def _commit(self) -> None:
        cache, change, new = self.cache, self.change, self.new
        is_change = change.encoding is not None
        if is_change:
            cache.provenance.invalidate()  # an exception from here on costs an encoding, and never a wrong state
        if change.drops_tokens:
            cache.forget_sequence()
        self.backup = None
        cache.each_layer("commit")
        cache.history.append(cache.lengths, new)
        cache.lengths.advance(self.span, new.token_ids)
        if is_change:
            cache.put_in_force(change)
            cache.provenance.commit(change)


class UncachedStep:
    """The same context for a forward without a cache, which has nothing to commit."""

    __slots__ = ("span",)

    def __init__(self, span: Span):
        self.span = span

    def __enter__(self) -> "UncachedStep":
        return self

    def __exit__(self, *_) -> None:
        pass


def feeds_its_cache(forward: Callable) -> Callable:
    """Decorator of a model's `forward`: the cache that it is given, under either name, is in use until it returns."""

    @functools.wraps(forward)
    def guarded(self, *args, **kwargs):
        cache = kwargs.get("cache")
        if cache is None:
            cache = kwargs.get("past_key_values")
        if cache is None and len(args) > CACHE_POSITION:
            cache = args[CACHE_POSITION]
        use = getattr(cache, "use", None)
        if use is None or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with Feeding(use):
            return forward(self, *args, **kwargs)

    return guarded


CACHE_POSITION = 3  # of the arguments that may be given without a name


def not_while_fed(action: str, changes: bool = True) -> Callable:
    """Decorator of a cache's method: refused in the middle of a forward. `action` completes "it cannot be"."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def guarded(self, *args, **kwargs):
            if torch.compiler.is_compiling():
                return method(self, *args, **kwargs)
            with Alone(self.use, action, changes):
                return method(self, *args, **kwargs)

        return guarded

    return decorate


def _in_use(reason: str, action: str) -> ValueError:
    return ValueError(
        f"{reason}, so it cannot be {action} now: wait until that has returned, or give each thread its own "
        "`cache.fork()`, made before."
    )


__all__ = ["CacheStep", "CacheUse", "Feeding", "Owning", "UncachedStep", "feeds_its_cache", "not_while_fed"]
