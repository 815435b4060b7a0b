"""The lock of a cache: one thread feeds it, and no thread reads or changes it in the middle of a forward.

A forward runs mostly without Python's global lock, so a second thread could feed, save or crop a cache in which only
some layers have the new tokens. The lock refuses that with a message that says what to do. A thread that reads between
two forwards (to save a session during a chat, for example) is allowed, and the next forward waits for it.
"""

import functools
import threading
from collections.abc import Callable

import torch


class CacheLock:
    """The lock of one cache; the thread that feeds the cache may acquire it again.

    Attributes:
        depth: nested forwards of the thread that holds the lock.
        is_open: a forward has begun and is not committed.
        owner: the thread whose `generate` feeds the cache.
    """

    rlock: threading.RLock

    def __init__(self):
        if not torch.compiler.is_compiling():  # a graph cannot make locks: a cache made in one gets its lock later
            self.rlock = threading.RLock()
        self.depth = 0
        self.is_open = False
        self.owner: int | None = None

    def __getattr__(self, name: str) -> threading.RLock:
        if name != "rlock":
            raise AttributeError(name)
        return vars(self).setdefault("rlock", threading.RLock())  # the same one for all threads

    def acquire(self, action: str) -> None:
        """Acquires the lock; waits for a thread that reads the cache, and raises if another thread feeds it."""
        if not self.rlock.acquire(blocking=False):
            if self.depth:
                raise _in_use("Another thread feeds this cache", action)
            self.rlock.acquire()

    def check_owner(self, action: str) -> None:
        if self.owner is not None and self.owner != threading.get_ident():
            raise _in_use("`generate` of another thread feeds this cache", action)

    def check_not_open(self, action: str) -> None:
        if self.is_open:
            raise _in_use("A forward that feeds this cache is not finished", action)


class FeedLock:
    """Context of a forward that feeds a cache.

    Raises:
        ValueError: another thread feeds the cache.
    """

    __slots__ = ("lock",)

    def __init__(self, lock: CacheLock):
        self.lock = lock

    def __enter__(self) -> None:
        self.lock.check_owner("fed")
        self.lock.acquire("fed")
        self.lock.depth += 1

    def __exit__(self, *_) -> None:
        lock = self.lock
        lock.depth -= 1
        if not lock.depth:
            lock.is_open = False  # also after an interrupt between the start of a transaction and its end
        lock.rlock.release()


class ExclusiveLock:
    """Context of an action that must not happen in the middle of a forward.

    Args:
        action: completes "the cache cannot be".
        changes: the action changes the cache, so it is also refused during the `generate` of another thread.

    Raises:
        ValueError: a forward that feeds the cache is not finished.
    """

    __slots__ = ("action", "changes", "lock")

    def __init__(self, lock: CacheLock, action: str, changes: bool):
        self.lock, self.action, self.changes = lock, action, changes

    def __enter__(self) -> None:
        lock = self.lock
        if self.changes:
            lock.check_owner(self.action)
        lock.acquire(self.action)
        if lock.is_open:
            lock.rlock.release()
            lock.check_not_open(self.action)

    def __exit__(self, *_) -> None:
        self.lock.rlock.release()


class GenerateLock:
    """Context of a `generate`: between its forwards no other thread may feed or change the cache.

    Raises:
        ValueError: another thread feeds the cache.
    """

    def __init__(self, cache: object):
        self.lock: CacheLock | None = getattr(cache, "lock", None)

    def __enter__(self) -> None:
        if self.lock is not None:
            with FeedLock(self.lock):
                self.earlier_owner, self.lock.owner = self.lock.owner, threading.get_ident()

    def __exit__(self, *_) -> None:
        if self.lock is not None:
            self.lock.owner = self.earlier_owner


CACHE_POSITION = 3  # of `cache` among the arguments of a model's `forward`


def locks_its_cache(forward: Callable) -> Callable:
    """Decorator of a model's `forward`: the cache that it is given, under either name, is locked until it returns."""

    @functools.wraps(forward)
    def locked(self, *args, **kwargs):
        cache = kwargs.get("cache")
        if cache is None:
            cache = kwargs.get("past_key_values")
        if cache is None and len(args) > CACHE_POSITION:
            cache = args[CACHE_POSITION]
        lock = getattr(cache, "lock", None)
        if lock is None or torch.compiler.is_compiling():
            return forward(self, *args, **kwargs)
        with FeedLock(lock):
            return forward(self, *args, **kwargs)

    return locked


def not_while_fed(action: str, changes: bool = True) -> Callable:
    """Decorator of a cache's method that is refused in the middle of a forward; see `ExclusiveLock`."""

    def decorate(method: Callable) -> Callable:
        @functools.wraps(method)
        def locked(self, *args, **kwargs):
            if torch.compiler.is_compiling():
                return method(self, *args, **kwargs)
            with ExclusiveLock(self.lock, action, changes):
                return method(self, *args, **kwargs)

        return locked

    return decorate


def _in_use(reason: str, action: str) -> ValueError:
    return ValueError(
        f"{reason}, so the cache cannot be {action} now: wait until that call has returned, or give each thread its "
        "own `cache.fork()`, made before the call."
    )


__all__ = ["CacheLock", "FeedLock", "GenerateLock", "locks_its_cache", "not_while_fed"]
