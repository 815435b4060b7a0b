"""A bounded log of tokens: `make_cache(remember=n)` keeps the last n columns of a sequence without end."""

from collections.abc import Iterable
from dataclasses import dataclass

from .cache_buffers_mambaformer import Buffer

# Forgotten columns that may wait in memory, at least, so that dropping them rarely copies.
MOST_WAITING = 64


@dataclass
class LogBounds:
    """Which columns of a sequence its log still has. Columns are counted from the start of the sequence.

    Args:
        remember: columns that users read; `None` for all.
        reach: columns beyond these, which a rollback may turn into the last ones.
        forgotten: the first columns, which no reader gets any more.
        dropped: the first columns, which have no slot any more; at most `forgotten`.
    """

    remember: int | None = None
    reach: int = 0
    forgotten: int = 0
    dropped: int = 0

    def first(self, columns: int) -> int:
        """The first readable column of a sequence of `columns` columns."""
        return self.forgotten if self.remember is None else max(self.forgotten, columns - self.remember)

    def make_room(self, columns: int, num_new: int, buffers: Iterable[Buffer]) -> tuple[int, int]:
        """Makes room in `buffers` for `num_new` columns after `columns` columns.

        Returns:
            How many new columns are not stored at all, and the slot of the first that is.
        """
        stored = columns - self.dropped
        num_dropped, num_skipped = self._forget(columns, num_new)
        for buffer in buffers:
            if num_dropped and buffer.tensor is not None:
                buffer.write(0, buffer.tensor[:, num_dropped:stored].clone())
        return num_skipped, columns + num_skipped - self.dropped

    def _forget(self, columns: int, num_new: int) -> tuple[int, int]:
        """Slots to drop at the start of the log, and new columns that are not stored at all."""
        if self.remember is None:
            return 0, 0
        kept = self.remember + self.reach
        self.forgotten = max(self.forgotten, columns + num_new - kept)
        skipped, waiting = max(self.forgotten - columns, 0), min(self.forgotten, columns) - self.dropped
        if not skipped and waiting < max(kept, MOST_WAITING):
            return 0, 0
        self.dropped = self.forgotten
        return waiting, skipped


__all__ = ["LogBounds"]
