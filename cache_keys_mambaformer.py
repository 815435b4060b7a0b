"""Keys and values of one attention layer in a cache.

Storage and retention compose: a `Buffer` grows or has a fixed size, a `Retention` keeps all keys or slides. A store
whose keys and values are encoded overrides `encode` and `decode` (`cache_quantized_mambaformer`).

Stores implement the protocol `CacheStore` of `cache_layers_mambaformer`.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from torch import nn

from .cache_buffers_mambaformer import Buffer, expand_index
from .cache_codes_mambaformer import VectorCodec
from .cache_retention_mambaformer import Layout, Retention


@dataclass(frozen=True)
class StateSpec:
    """The shape of one tensor of a store's state, and its dtype.

    Args:
        is_wide: whether the dtype is at least float32, or else a dtype of the model's weights.
        dtype: the dtype, where it does not depend on the model.
    """

    shape: tuple[int, ...]
    is_wide: bool = False
    dtype: torch.dtype | None = None


@dataclass(frozen=True)
class Removal:
    """The last tokens of each row, to be removed.

    Args:
        columns: sequence length before, padding included.
        by_row: columns that each row loses; a single number if all rows lose equally many.
        tokens: real tokens that each row loses: an integer if all rows lose equally many, else a tensor (rows,).
        most: the maximum of `tokens`.
        tokens_seen: real tokens of each row before: an integer if no row ever had padding, else a tensor (rows or 1,).
        overshoot: `CacheLengths.overshoot` before the removal.
    """

    columns: int
    by_row: list[int]
    tokens: int | torch.Tensor
    most: int
    overshoot: int = 0
    tokens_seen: int | torch.Tensor = 0

    @property
    def columns_left(self) -> int:
        return self.columns - min(self.by_row)


@dataclass(frozen=True)
class KeyValueSlots:
    """All slots of keys and of values for a kernel, (rows, heads, slots, head_dim or bytes), and how it writes them.

    Args:
        codecs: of keys and of values, if they are stored as codes.
    """

    keys: torch.Tensor
    values: torch.Tensor
    codecs: tuple[VectorCodec, VectorCodec] | None = None


class KeyValueStore:
    """Keys and values of one layer, each (rows, heads, slots, head_dim).

    Args:
        retention: which keys stay.
        row_shape: (heads, head_dim).
        max_length: longest sequence that fixed storage holds; `None` for storage that grows.
        buffer: storage of one tensor, `(dim, fixed_size) -> Buffer`.
    """

    def __init__(
        self,
        retention: Retention,
        row_shape: tuple[int, int],
        max_length: int | None = None,
        buffer: Callable[[int, int | None], Buffer] = Buffer,
    ):
        fixed_size = None if max_length is None else retention.num_slots(max_length)
        self.retention, self.row_shape = retention, row_shape
        self.keys, self.values = buffer(2, fixed_size), buffer(2, fixed_size)
        self.staged: list[torch.Tensor] = []  # the keys and values of all slots after the commit
        self.num_slots = self.staged_slots = 0

    def update(
        self,
        keys: torch.Tensor,
        values: torch.Tensor,
        layout: Layout,
        is_saved: bool = False,
        queries: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Stores new keys and values (rows, heads, tokens, head_dim); returns all that attention sees.

        `queries` are for stores with a pruning policy.
        """
        stored = self._put(self.encode("keys", keys), self.encode("values", values), layout, is_saved)
        return self.decode("keys", stored[0]), self.decode("values", stored[1])

    def _put(
        self, keys: torch.Tensor, values: torch.Tensor, layout: Layout, is_saved: bool = False
    ) -> list[torch.Tensor]:
        """Stores new keys and values in their stored form; returns the slots that attention sees."""
        layout = layout.to(keys.device)
        seen, self.staged = [], []
        self.staged_slots = layout.num_slots
        for buffer, new in ((self.keys, keys), (self.values, values)):
            buffer.reserve(new, layout.num_slots, self.retention.most_slots)
            if layout.sources is None:
                buffer.write(layout.slots, new, is_saved)
                seen.append(buffer.view(layout.num_slots))
            else:
                stored_and_new = torch.cat([buffer.view(layout.num_stored), new], dim=2) if layout.num_stored else new
                self.staged.append(stored_and_new.gather(2, expand_index(layout.sources, stored_and_new, 2)))
                seen.append(stored_and_new)
        return seen

    def encode(self, name: str, new: torch.Tensor) -> torch.Tensor:
        """The stored form of new `"keys"` or `"values"`: unchanged."""
        return new

    def decode(self, name: str, stored: torch.Tensor) -> torch.Tensor:
        """Stored `"keys"` or `"values"` as attention sees them: unchanged."""
        return stored

    def visible(self) -> dict[str, torch.Tensor]:
        """The keys and values that attention sees, by name."""
        return {name: self.decode(name, stored) for name, stored in self.state().items()}

    def place(self, like: torch.Tensor, layout: Layout) -> KeyValueSlots:
        """The slots for a kernel that writes keys and values shaped like `like` into them, and reads them.

        `layout` is one that writes in place.
        """
        self.staged, self.staged_slots = [], layout.num_slots
        for buffer in (self.keys, self.values):
            buffer.reserve(like, layout.num_slots, self.retention.most_slots)
        return KeyValueSlots(self.keys.make_own(), self.values.make_own())

    def keep_slots(self, index: torch.Tensor) -> None:
        """Makes slot j of each head a copy of the earlier slot `index[..., j]`, and frees the other slots.

        `index` is (rows, heads, slots). The storage grows, and no forward is open.
        """
        for buffer in (self.keys, self.values):
            stored = buffer.view(self.num_slots)
            kept = stored.gather(2, index[..., None].expand(*index.shape, stored.shape[3]))
            buffer.reset()
            buffer.reserve(kept, index.shape[2])
            buffer.write(0, kept)
        self.num_slots = self.staged_slots = index.shape[2]

    def commit(self) -> None:
        if self.staged:
            keys, values = self.staged
            self.keys.replace(keys)
            self.values.replace(values)
            self.staged = []
        self.num_slots = self.staged_slots

    def discard(self) -> None:
        self.staged, self.staged_slots = [], self.num_slots

    def reset(self) -> None:
        self.staged, self.num_slots, self.staged_slots = [], 0, 0
        self.keys.reset()
        self.values.reset()

    def select_rows(self, rows: torch.Tensor) -> None:
        self.keys.select_rows(rows)
        self.values.select_rows(rows)

    def fork(self) -> "KeyValueStore":
        other = copy.copy(self)
        other.keys, other.values = self.keys.fork(), self.values.fork()
        other.staged, other.staged_slots = [], self.num_slots
        return other

    def state(self, columns: int | None = None) -> dict[str, torch.Tensor]:
        if self.keys.tensor is None:
            return {}
        size = self.num_slots if columns is None else min(self.num_slots, columns)
        return {"keys": self.keys.view(size), "values": self.values.view(size)}

    def load_state(self, state: dict[str, torch.Tensor], columns: int) -> None:
        num_slots = self.keys.fixed_size or self.retention.num_slots(columns)
        self._put(state["keys"], state["values"], Layout(num_slots, key_positions=None, slots=0))
        self.commit()

    def spec(self, rows: int, columns: int, layer: nn.Module) -> dict[str, StateSpec]:
        heads, head_dim = self.row_shape
        shape = (rows, heads, self.retention.num_slots(columns), head_dim)
        return {"keys": StateSpec(shape), "values": StateSpec(shape)}

    def dtypes(self) -> set[torch.dtype]:
        return {tensor.dtype for tensor in self.buffers().values()}

    def buffers(self) -> dict[str, torch.Tensor]:
        tensors = {"keys": self.keys.tensor, "values": self.values.tensor}
        return {name: tensor for name, tensor in tensors.items() if tensor is not None}

    def set_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        for name, tensor in buffers.items():
            getattr(self, name).tensor = tensor

    def nbytes(self) -> dict[str, int]:
        return {name: tensor.nbytes for name, tensor in self.buffers().items()}

    def slack(self, columns: int) -> dict[str, int]:
        used = self.num_slots if self.keys.fixed_size is None else self.retention.num_slots(columns)
        tensors = self.buffers().items()
        return {name: tensor.nbytes - tensor.nbytes // tensor.shape[2] * used for name, tensor in tensors}

    def evicted(self, columns: int) -> dict[str, int]:
        return {}

    def shared(self) -> dict[str, int]:
        pairs = {"keys": self.keys, "values": self.values}.items()
        return {name: buffer.tensor.nbytes for name, buffer in pairs if buffer.is_shared and buffer.tensor is not None}

    def extend_reach(self, reach: int, tokens_seen: torch.Tensor, columns: int) -> None:
        """Widens a ring, so that `reach` tokens can be taken back."""
        if self.retention.window is None or self.retention.spare >= reach:
            return
        narrow, self.retention = self.retention, replace(self.retention, spare=reach)
        num_slots = self.retention.num_slots(columns)
        if self.num_slots in (0, num_slots):
            return
        positions = self.retention.positions(tokens_seen, num_slots)
        # Keys that the narrow ring has overwritten are outside of every window: any key may take their slots.
        sources = narrow.slot(positions.clamp(min=0)).clamp(max=self.num_slots - 1)
        for buffer in (self.keys, self.values):
            stored = buffer.view(self.num_slots)
            buffer.tensor, buffer.is_shared = stored.gather(2, expand_index(sources, stored, 2)), False
        self.num_slots = self.staged_slots = num_slots

    def plan_crop(self, removal: Removal) -> int | None:
        """Slots in use after a removal; `None` if keys that queries would see then were overwritten."""
        longest = removal.columns + removal.overshoot
        has_wrapped = self.retention.num_slots(longest) < longest
        if has_wrapped and removal.overshoot + removal.most > self.retention.spare:
            return None
        if self.keys.fixed_size is not None:
            return self.num_slots
        return min(self.num_slots, self.retention.num_slots(removal.columns_left))

    def crop(self, plan: int) -> None:
        self.num_slots = self.staged_slots = plan


__all__ = ["KeyValueSlots", "KeyValueStore", "Removal", "StateSpec"]
