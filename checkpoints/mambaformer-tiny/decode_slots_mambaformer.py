"""The stored form of keys and values, as a decode program reads and writes it: numbers, or codes of a few bits."""

import torch
from torch import Tensor

from .cache_codes_mambaformer import VectorCodec
from .cache_keys_mambaformer import KeyValueSlots
from .ops_cpu_decode_mambaformer import LANES

PLAIN_NUMBERS = (0,) * 8


def describe_codecs(slots: KeyValueSlots, like: Tensor) -> tuple[int, ...] | None:
    """The fields of both `Codec`s; `None` if kernels do not take these slots.

    Args:
        like: new keys, (rows, key heads, tokens, head_dim).
    """
    if slots.codecs is None:
        return PLAIN_NUMBERS if _are_slots(slots, like, (like.shape[3], like.shape[3]), like.dtype) else None
    keys, values = slots.codecs
    if not (_takes(keys, like) and _takes(values, like)):
        return None
    if not _are_slots(slots, like, (keys.nbytes, values.nbytes), torch.uint8):
        return None
    return (*keys.fields, *values.fields)


def _takes(codec: VectorCodec, like: Tensor) -> bool:
    """Whether groups end where vectors of the processor do."""
    return codec.size == like.shape[3] and codec.group_size % LANES[like.dtype] == 0


def _are_slots(slots: KeyValueSlots, like: Tensor, widths: tuple[int, int], dtype: torch.dtype) -> bool:
    """Whether these are slots for the rows and key heads of `like`, of these widths."""
    capacity = slots.keys.shape[2]
    for tensor, width in zip((slots.keys, slots.values), widths, strict=True):
        if tensor.shape != (like.shape[0], like.shape[1], capacity, width) or tensor.dtype is not dtype:
            return False
        if not tensor.is_contiguous() or tensor.is_neg():
            return False
    return True


__all__ = ["describe_codecs"]
