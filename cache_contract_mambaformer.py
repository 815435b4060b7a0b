"""The part of Transformers' cache contract that follows from other methods, for caches and posteriors."""

from collections.abc import Sequence
from typing import TypeVar

import torch

from .cache_buffers_mambaformer import as_index

T = TypeVar("T", bound="CacheContractMixin")


class CacheContractMixin:
    """The selections of rows in Transformers' words, and properties that say what the other methods can do.

    A class with it has `select_rows`, `num_selectable_rows`, `batch_size` and `fork`.
    """

    @property
    def batch_size(self) -> int:
        raise NotImplementedError

    def select_rows(self, rows: torch.Tensor | Sequence[int]) -> None:
        """Makes row i a copy of the earlier row `rows[i]`."""
        raise NotImplementedError

    def num_selectable_rows(self) -> int:
        """Rows that a selection may name; 0 if it may name any."""
        raise NotImplementedError

    def fork(self: T) -> T:
        """An independent copy that continues from here."""
        raise NotImplementedError

    def __deepcopy__(self: T, memo: dict) -> T:
        return self.fork()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self.select_rows(beam_idx)

    def batch_repeat_interleave(self, repeats: int) -> None:
        self.select_rows([row for row in range(self.num_selectable_rows()) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor | Sequence[int] | Sequence[bool]) -> None:
        index = as_index(indices)
        self.select_rows(index.nonzero().flatten() if index.dtype == torch.bool else index)

    @property
    def max_batch_size(self) -> int:
        """The same as `batch_size`: rows are added and removed by selecting rows."""
        return self.batch_size

    @property
    def is_croppable(self) -> bool:
        """`crop` always restores the state before the removed tokens; it may encode the remaining ones again."""
        return True


__all__ = ["CacheContractMixin"]
