"""Storage of a cache: tensors that grow or have a fixed size, and rules for writing them in place.

A new storage of keys and values is one class with the methods of `Buffer` and a row in `STORAGES` of
`cache_layers_mambaformer`.
"""

import copy
from collections.abc import Sequence

import torch

# Spare slots of a new buffer, and of one that grows: at least so many, or this part of its size. A step of decoding
# reads all slots, and growth copies them once in `size / SPARE_FRACTION` steps, about 1 % of a step's time.
MIN_SPARE_SLOTS, SPARE_FRACTION = 64, 24


class Buffer:
    """A tensor whose dimension `dim` grows or has a fixed size; slots that were never written are zero.

    A fork shares a growing buffer until one side writes. A fixed buffer keeps its address, unless autograd is on: a
    tensor that a graph may have saved for its backward pass is never overwritten.

    Attributes:
        tensor: all slots; `None` before the first write.
        is_shared: a fork or a graph has the tensor too.
    """

    def __init__(self, dim: int, fixed_size: int | None = None):
        self.dim, self.fixed_size = dim, fixed_size
        self.tensor: torch.Tensor | None = None
        self.is_shared = False

    def reserve(self, like: torch.Tensor, size: int, most: int | None = None) -> None:
        """Allocates at least `size` slots shaped like the slots of `like`; spare slots only up to `most` in all."""
        if self.tensor is not None and self.tensor.shape[0] != like.shape[0]:
            self.tensor = None  # of a sequence that was dropped: the cache checks the rows of its own sequence
        if self.tensor is not None and (self.tensor.dtype != like.dtype or self.tensor.device != like.device):
            self.tensor, self.is_shared = self.tensor.to(like.device, like.dtype), False
        if self.tensor is not None and self.tensor.shape[self.dim] >= size:
            return
        spare = MIN_SPARE_SLOTS if self.tensor is None else max(MIN_SPARE_SLOTS, size // SPARE_FRACTION)
        spare = spare if most is None else max(min(spare, most - size), 0)
        shape = list(like.shape)
        shape[self.dim] = self.fixed_size or size + spare
        old, self.tensor, self.is_shared = self.tensor, like.new_zeros(shape), False
        if old is not None:
            self.tensor.narrow(self.dim, 0, old.shape[self.dim]).copy_(old)

    def write(self, slots: int | torch.Tensor, new: torch.Tensor, is_saved: bool = False) -> None:
        """Writes `new` into adjoining slots from `slots` on, or into the slots of a tensor (rows or 1, tokens).

        Args:
            is_saved: a graph may save the buffer for its backward pass.
        """
        tensor = self.make_own()
        self.is_shared = is_saved
        new = new.to(tensor.dtype)
        if isinstance(slots, int):
            tensor.narrow(self.dim, slots, new.shape[self.dim]).copy_(new)
        elif slots.shape[0] == 1:
            tensor.index_copy_(self.dim, slots[0], new)
        else:
            tensor.scatter_(self.dim, expand_index(slots, new, self.dim), new)

    def make_own(self) -> torch.Tensor:
        """The tensor, copied first if a fork or a graph has it too."""
        if self.tensor is None:
            raise RuntimeError("The buffer has no slots: call `reserve` before `write`.")
        if self.is_shared or not is_writable(self.tensor):
            self.tensor = (self.tensor if torch.is_grad_enabled() else self.tensor.detach()).clone()
            self.is_shared = False
        return self.tensor

    def view(self, size: int) -> torch.Tensor:
        """The first `size` slots."""
        if self.tensor is None:
            raise RuntimeError("The buffer has no slots: call `reserve` before `view`.")
        return self.tensor if size == self.tensor.shape[self.dim] else self.tensor.narrow(self.dim, 0, size)

    def replace(self, new: torch.Tensor) -> None:
        """Writes `new` into the first slots, or takes it as the tensor if it has all of them."""
        is_complete = self.tensor is not None and new.shape[self.dim] == self.tensor.shape[self.dim]
        if self.fixed_size is None and is_complete:
            self.tensor, self.is_shared = new, False
        else:
            self.write(0, new)

    def select_rows(self, rows: torch.Tensor) -> None:
        if self.tensor is not None:
            may_write = self.fixed_size is not None and not self.is_shared
            self.tensor, self.is_shared = select_rows_of(self.tensor, rows, may_write), False

    def reset(self) -> None:
        if self.tensor is not None:
            self.tensor = None if self.fixed_size is None else fill_zeros(self.tensor, self.is_shared)
        self.is_shared = False

    def fork(self) -> "Buffer":
        other = copy.copy(self)
        if self.tensor is not None:
            other.tensor = self.tensor if self.fixed_size is None else self.tensor.clone()
            self.is_shared = other.is_shared = self.fixed_size is None or self.is_shared
        return other


class IdBuffer(Buffer):
    """Token ids (rows, columns): two bytes each if the vocabulary of `config` fits into them, else four.

    A sequence may be long where all other states are of constant size. -1 marks columns that were fed as embeddings.
    """

    def __init__(self, config, fixed_size: int | None = None):
        super().__init__(1, fixed_size)
        self.config = config

    def reserve(self, like: torch.Tensor, size: int, most: int | None = None) -> None:
        dtype = torch.int16 if self.config.vocab_size < 0xFFFF else torch.int32
        if self.tensor is not None and self.tensor.dtype != dtype:  # the vocabulary was resized
            self.tensor, self.is_shared = self.view(self.tensor.shape[1]).to(dtype), False
        super().reserve(torch.empty_like(like, dtype=dtype), size, most)

    def view(self, size: int) -> torch.Tensor:
        """The ids in the first `size` columns, as a copy in int64."""
        stored = super().view(size)
        ids = stored.long()
        if stored.dtype == torch.int32:
            return ids
        ids = ids & 0xFFFF  # two bytes without a sign
        return torch.where(ids == 0xFFFF, -1, ids)


def as_index(values: torch.Tensor | Sequence[int] | Sequence[bool]) -> torch.Tensor:
    """An index as a tensor: a tensor stays on its device, a list goes to the CPU whatever the default device is."""
    return values if isinstance(values, torch.Tensor) else torch.as_tensor(values, device="cpu")


def check_count(name: str, value: object, lowest: int) -> None:
    """Raises `ValueError` if `value` is no integer of at least `lowest`."""
    if type(value) is not int or value < lowest:
        raise ValueError(f"`{name}` must be an integer of at least {lowest}, got {value!r}.")


def check_rows(rows: torch.Tensor, num_rows: int, owner: str) -> None:
    """Raises `ValueError` if `rows` is no selection of the `num_rows` rows of `owner`."""
    # On a GPU a check of the values would synchronize host and device at every step of a beam search.
    do_exist = rows.device.type != "cpu" or bool(((rows >= 0) & (rows < num_rows)).all())
    if not (do_exist and rows.dim() == 1 and rows.numel() > 0):
        raise ValueError(f"The {owner} has rows 0 to {num_rows - 1}, and the selection was {rows.tolist()}.")


def count_leading(holds: torch.Tensor) -> int:
    """How many of the first entries of a boolean (n,) are true."""
    fails = (~holds).nonzero()
    return int(fails[0]) if len(fails) else len(holds)


def count_common_columns(
    ids: torch.Tensor, mask: torch.Tensor | None, cached: torch.Tensor, is_real: torch.Tensor
) -> int:
    """Number of leading columns that are equal in all rows; padding equals padding, whatever its tokens are.

    Args:
        ids, mask: (rows, columns), 0 in the mask at padding; `None` where all tokens are real.
        cached, is_real: the same of a cached sequence, (rows, its columns), the mask boolean.
    """
    length = min(cached.shape[1], ids.shape[1])
    cached, is_real = cached[:, :length], is_real[:, :length]
    mask = torch.ones_like(is_real) if mask is None else mask[:, :length].to(is_real).bool()
    is_same = (ids[:, :length].to(cached.device) == cached) | ~is_real
    return count_leading((is_same & (mask == is_real)).all(0))


def is_writable(tensor: torch.Tensor) -> bool:
    """Whether a tensor may be written in place: not if a graph leads to it, or if it was made in inference mode."""
    if torch.compiler.is_compiling():
        return True
    return not tensor.requires_grad and (torch.is_inference_mode_enabled() or not tensor.is_inference())


def as_normal_tensor(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor itself, or a copy outside of inference mode if it was made there, where autograd refuses it."""
    is_locked = not torch.compiler.is_compiling() and tensor.is_inference() and not torch.is_inference_mode_enabled()
    return tensor.clone() if is_locked else tensor


def fill_zeros(tensor: torch.Tensor, is_shared: bool = False) -> torch.Tensor:
    """A tensor of zeros: the same one, unless it may not be written in place."""
    return torch.zeros_like(tensor) if is_shared or not is_writable(tensor) else tensor.zero_()


def expand_index(index: torch.Tensor, like: torch.Tensor, dim: int) -> torch.Tensor:
    """Expands `index` (rows or 1, n) to the shape of `like`, with n along `dim`."""
    shape = [index.shape[0]] + [1] * (like.dim() - 1)
    shape[dim] = index.shape[1]
    full = list(like.shape)
    full[dim] = index.shape[1]
    return index.view(shape).expand(full)


def select_rows_of(tensor: torch.Tensor, rows: torch.Tensor, may_write: bool) -> torch.Tensor:
    """The rows of a tensor with indices `rows`; written into the tensor itself if `may_write` and the shape stays."""
    selected = tensor.index_select(0, rows.to(tensor.device))
    return tensor.copy_(selected) if may_write and selected.shape == tensor.shape and is_writable(tensor) else selected


__all__ = ["Buffer", "IdBuffer"]
