"""Keys and values of one attention layer under a pruning policy.

The store has an inner store, of whatever storage, and removes slots from it at the evictions that
`cache_eviction_mambaformer` places. For a policy that reads queries (`cache_policies_mambaformer`) it keeps the newest
queries too.
"""

import copy
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache_eviction_mambaformer import Chunk, PrunedLayout, PrunedRetention
from .cache_keys_mambaformer import KeyValueSlots, KeyValueStore, Removal, StateSpec
from .cache_policies_mambaformer import PruningPolicy, round_scores
from .cache_retention_mambaformer import Layout


class BeforeEviction(NamedTuple):
    """The keys and queries of rows of `tokens` tokens each, before they evicted keys; it shares their memory."""

    tokens: int
    store: KeyValueStore
    queries: Tensor | None

    def fork(self) -> "BeforeEviction":
        return self._replace(store=self.store.fork())

    def select_rows(self, rows: Tensor) -> "BeforeEviction":
        self.store.select_rows(rows)
        return self._replace(queries=_select_rows(self.queries, rows))


class PrunedKeyValueStore:
    """Keys and values of one layer, of which a policy keeps some.

    A forward within one interval writes in place, as the inner store does. A forward that passes an eviction works on
    a fork, which replaces the inner store at the commit.

    Args:
        store: holds the keys and values; its retention is a `PrunedRetention`.
        policy: scores keys.
        query_heads: heads of queries.
    """

    def __init__(self, store: KeyValueStore, policy: PruningPolicy, query_heads: int):
        self.store, self.policy, self.query_heads = store, policy, query_heads
        # The last `query_window` queries of each interval, (rows, heads, query_window, head_dim).
        self.queries: Tensor | None = None
        self.staged, self.staged_queries = store, self.queries
        # The evictions of the last `reach` tokens, so that a removal may go back behind them.
        self.past: list[BeforeEviction] = []
        self.staged_past, self.reach = self.past, 0
        self.open: PrunedLayout | None = None  # of a forward that has fed the layer

    @property
    def retention(self) -> PrunedRetention:
        return cast(PrunedRetention, self.store.retention)

    # ---- a forward

    def update(
        self, keys: Tensor, values: Tensor, layout: Layout, is_saved: bool = False, queries: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Stores keys and values of the layout's current chunk, after earlier ones; returns all that attention sees.

        Raises:
            ValueError: the forward evicts keys between its tokens and is not fed in chunks, or the policy reads
                queries and there are none.
        """
        layout = cast(PrunedLayout, layout)
        if layout.current is None and len(layout.chunks) > 1:
            raise ValueError(
                "This forward passes a position at which the cache evicts keys, and a layer of your own does not "
                f"attend in chunks: feed tokens only up to the next multiple of {self.retention.interval} at once."
            )
        index = layout.current or 0
        if index == 0:
            self._open(layout)
        else:
            self._evict(self.staged, layout.chunks[index - 1])
        chunk = layout.chunks[index]
        if self.policy.query_window:
            self._keep_queries(queries, chunk)
        return self.staged.update(keys, values, chunk.layout, is_saved)

    def _open(self, layout: PrunedLayout) -> None:
        self.open, self.staged_queries, self.staged_past = layout, self.queries, self.past
        self.staged = self.store if len(layout.chunks) == 1 else self.store.fork()

    def _keep_queries(self, queries: Tensor | None, chunk: Chunk) -> None:
        """Keeps the queries of the last `query_window` positions before the next eviction."""
        if queries is None:
            raise ValueError(
                f"The policy {self.policy.name!r} reads queries, and the layer gives the cache none: pass `queries=` "
                "to `cache.update`, or choose a policy that reads keys alone, as 'key_diff'."
            )
        window, interval = self.policy.query_window, self.retention.interval
        first = torch.tensor(chunk.first, device=queries.device)[:, None] % interval
        counts = torch.tensor(chunk.counts, device=queries.device)[:, None]
        # For each slot of the window, the token of the chunk that it keeps.
        tokens = torch.arange(interval - window, interval, device=queries.device) - first
        is_new = ((tokens >= 0) & (tokens < counts))[:, None, :, None]
        index = tokens.clamp(0, queries.shape[2] - 1)[:, None, :, None]
        shape = (*queries.shape[:2], window, queries.shape[3])
        new = queries.detach().gather(2, index.expand(shape))
        old = self.staged_queries
        if old is None or old.shape != shape:
            old = torch.zeros_like(new)
        self.staged_queries = torch.where(is_new, new, old.to(new))

    def place(self, like: Tensor, layout: Layout) -> KeyValueSlots | None:
        """All slots of keys and of values for a kernel, as `KeyValueStore.place`; `None` where modules have to run."""
        if not isinstance(layout, PrunedLayout) or layout.retention != self.retention or len(layout.chunks) != 1:
            return None
        (chunk,) = layout.chunks
        if self._is_read(chunk):
            return None
        placed = self.store.place(like, chunk.layout)
        if placed is not None:
            self._open(layout)
        return placed

    def _is_read(self, chunk: Chunk) -> bool:
        """Whether the policy will read queries of the chunk."""
        window, interval = self.policy.query_window, self.retention.interval
        spans = zip(chunk.first, chunk.counts, strict=True)
        return window > 0 and any(first % interval + count > interval - window for first, count in spans)

    def _evict(self, store: KeyValueStore, chunk: Chunk) -> None:
        """Removes the keys that leave `store` after `chunk`."""
        store.commit()
        store.crop(max(chunk.stored))
        groups = chunk.evicting()
        if not groups:
            return
        if self.reach and len(chunk.first) == 1:
            tokens = chunk.first[0] + chunk.counts[0]
            self.staged_past = [*self.staged_past, BeforeEviction(tokens, store.fork(), self.staged_queries)]
        with torch.no_grad():
            visible = store.visible()
            keys, values = visible["keys"], visible["values"]
            index = torch.arange(max(chunk.kept), device=keys.device).repeat(*keys.shape[:2], 1)
            for (stored, kept), rows in groups.items():
                queries = None if self.staged_queries is None else self.staged_queries[rows]
                index[rows, :, :kept] = self._best(keys[rows, :, :stored], values[rows, :, :stored], queries, kept)
        store.keep_slots(index)

    def _best(self, keys: Tensor, values: Tensor, queries: Tensor | None, kept: int) -> Tensor:
        """The slots (rows, heads, kept) that stay, in order."""
        stored, policy = keys.shape[2], self.policy
        sinks = min(policy.sinks, kept)
        recent = min(policy.recent, kept - sinks)
        grouped = keys.new_zeros(0) if queries is None else queries.unflatten(1, (keys.shape[1], -1))
        scores = round_scores(policy.score(keys, values, grouped * keys.shape[-1] ** -0.5))
        scores[..., :sinks] = scores[..., stored - recent :] = torch.inf
        ranked = scores.argsort(dim=-1, descending=True, stable=True)  # of equal scores, the oldest stays
        return ranked[..., :kept].sort(dim=-1).values

    def commit(self) -> None:
        if self.open is None:
            return
        self.store, self.queries = self.staged, self.staged_queries
        last = self.open.chunks[-1]
        self._evict(self.store, last)
        fewest = min(first + count for first, count in zip(last.first, last.counts, strict=True))
        self.past = [each for each in self.staged_past if each.tokens > fewest - self.reach]
        self.open = None

    def discard(self) -> None:
        self.open, self.staged, self.staged_queries, self.staged_past = None, self.store, self.queries, self.past
        self.store.discard()

    # ---- between forwards

    def reset(self) -> None:
        self.store.reset()
        self.queries, self.past = None, []
        self.discard()

    def select_rows(self, rows: Tensor) -> None:
        self.store.select_rows(rows)
        self.queries = _select_rows(self.queries, rows)
        self.past = [each.select_rows(rows) for each in self.past]
        self.discard()

    def fork(self) -> "PrunedKeyValueStore":
        other = copy.copy(self)
        other.store, other.past = self.store.fork(), [each.fork() for each in self.past]
        other.discard()
        return other

    def visible(self) -> dict[str, Tensor]:
        """The keys and values that attention sees, by name."""
        return self.store.visible()

    def state(self, columns: int | None = None) -> dict[str, Tensor]:
        """Keys, values and queries; with a sequence length, padded to the slots of `spec`."""
        state = self.store.state(columns)
        if columns is not None:
            num_slots = self.retention.num_slots(columns)
            state = {name: F.pad(each, (0, 0, 0, num_slots - each.shape[2])) for name, each in state.items()}
        if not state or not self.policy.query_window:
            return state
        queries = self.queries
        if queries is None:
            keys = self.visible()["keys"]
            queries = keys.new_zeros(keys.shape[0], self.query_heads, self.policy.query_window, keys.shape[3])
        return state | {"queries": queries}

    def load_state(self, state: dict[str, Tensor], columns: int) -> None:
        self.store.load_state({name: state[name] for name in ("keys", "values")}, columns)
        self.queries, self.past = state.get("queries"), []
        self.discard()

    def spec(self, rows: int, columns: int, layer: nn.Module) -> dict[str, StateSpec]:
        specs = self.store.spec(rows, columns, layer)
        if self.policy.query_window:
            shape = (rows, self.query_heads, self.policy.query_window, self.store.row_shape[1])
            specs["queries"] = StateSpec(shape)
        return specs

    def dtypes(self) -> set[torch.dtype]:
        return self.store.dtypes()

    def buffers(self) -> dict[str, Tensor]:
        return self.store.buffers() | ({} if self.queries is None else {"queries": self.queries})

    def set_buffers(self, buffers: dict[str, Tensor]) -> None:
        self.store.set_buffers({name: tensor for name, tensor in buffers.items() if name != "queries"})
        self.queries = buffers.get("queries", self.queries)

    def nbytes(self) -> dict[str, int]:
        sizes = self.store.nbytes() | ({} if self.queries is None else {"queries": self.queries.nbytes})
        past = sum(sum(each.store.nbytes().values()) for each in self.past)
        return sizes | ({"past": past} if past else {})

    def slack(self, columns: int) -> dict[str, int]:
        return self.store.slack(columns)

    def shared(self) -> dict[str, int]:
        return self.store.shared()

    def evicted(self, columns: int) -> dict[str, int]:
        """Bytes that the keys and values of evicted tokens would take."""
        tensors = self.store.buffers().items()
        removed = columns - self.store.num_slots
        return {name: tensor.nbytes // tensor.shape[2] * removed for name, tensor in tensors}

    def extend_reach(self, reach: int, tokens_seen: Tensor, columns: int) -> None:
        """Keeps the keys of later evictions for a while; within an interval all tokens can be taken back anyway."""
        self.reach = reach

    def plan_crop(self, removal: Removal) -> tuple[int, int | None] | None:
        """Slots in use after a removal, and the index in `past` that it returns to.

        `None` if a row goes back behind an eviction that has not been kept.
        """
        before, interval = _as_list(removal.tokens_seen), self.retention.interval
        removed = _as_list(removal.tokens)
        num_rows = max(len(before), len(removed))
        before, removed = before * (num_rows // len(before)), removed * (num_rows // len(removed))
        after = [old - tokens for old, tokens in zip(before, removed, strict=True)]
        num_slots, index = max(self.retention.stored(new) for new in after), None
        if any(old // interval != new // interval for old, new in zip(before, after, strict=True)):
            kept = [
                n
                for n, each in enumerate(self.past)
                if {(new // interval + 1) * interval for new in after} == {each.tokens}
            ]
            if not kept:
                return None
            index = kept[0]
        return num_slots, index

    def crop(self, plan: tuple[int, int | None]) -> None:
        num_slots, index = plan
        if index is not None:
            _, self.store, self.queries = self.past[index]
            self.past = self.past[:index]
            self.discard()
        self.store.crop(num_slots)


def _select_rows(queries: Tensor | None, rows: Tensor) -> Tensor | None:
    return None if queries is None else queries.index_select(0, rows.to(queries.device))


def _as_list(counts: int | Tensor) -> list[int]:
    return counts.reshape(-1).tolist() if isinstance(counts, Tensor) else [counts]


__all__ = ["PrunedKeyValueStore"]
