"""Quantized storage of keys and values: each token's key and value as codes of a few bits.

Codes are a pure function of one token's key or value (`cache_codes_mambaformer`), so the laws of split, padding,
rollback, surgery and disk hold among quantized caches as they do among others. Queries see the decoded keys and
values of all tokens, the tokens of their own forward included.
"""

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from .cache_buffers_mambaformer import Buffer
from .cache_codes_mambaformer import VectorCodec, check_bits
from .cache_keys_mambaformer import KeyValueSlots, KeyValueStore, StateSpec
from .cache_retention_mambaformer import Layout, Retention

DEFAULT_KV_BITS = 8


def resolve_kv_bits(kv_bits: int | Mapping[str, int] | None, is_quantized: bool) -> dict[str, int] | None:
    """Bits of keys and of values, `{"keys": n, "values": n}`; `None` for storage in the type of the activations.

    Args:
        kv_bits: a number for both, a number for each, or `None`.
        is_quantized: the storage is called quantized, so `None` means `DEFAULT_KV_BITS`.

    Raises:
        ValueError: an unsupported number of bits, or other names than `"keys"` and `"values"`.
    """
    if kv_bits is None:
        kv_bits = DEFAULT_KV_BITS if is_quantized else None
    if kv_bits is None:
        return None
    by_kind = dict(kv_bits) if isinstance(kv_bits, Mapping) else {"keys": kv_bits, "values": kv_bits}
    if by_kind.keys() != {"keys", "values"}:
        raise ValueError(f"`kv_bits` must be a number of bits or {{'keys': n, 'values': n}}, got {kv_bits!r}.")
    for bits in by_kind.values():
        check_bits(bits)
    return by_kind


class QuantizedKeyValueStore(KeyValueStore):
    """Keys and values as codes, (rows, heads, slots, bytes) each.

    Args:
        kv_bits: bits of `"keys"` and of `"values"`.
        dtype: of the activations; the other arguments are those of `KeyValueStore`.
    """

    def __init__(
        self,
        kv_bits: Mapping[str, int],
        dtype: torch.dtype,
        retention: Retention,
        row_shape: tuple[int, int],
        max_length: int | None = None,
        buffer: Callable[[int, int | None], Buffer] = Buffer,
    ):
        super().__init__(retention, row_shape, max_length, buffer)
        self.codecs = {name: VectorCodec(row_shape[1], bits) for name, bits in kv_bits.items()}
        self.activation_dtype = dtype  # of the last forward, once there is one; keys and values are decoded to it

    def encode(self, name: str, new: Tensor) -> Tensor:
        if new.requires_grad and torch.is_grad_enabled():
            raise ValueError(
                "Rounding has no gradient, so a quantized cache is fed without one: call the model under "
                "`torch.no_grad()`, or train with storage='dense'."
            )
        self.activation_dtype = new.dtype
        return self.codecs[name].encode(new)

    def decode(self, name: str, stored: Tensor) -> Tensor:
        return self.codecs[name].decode(stored, self.activation_dtype)

    def place(self, like: Tensor, layout: Layout) -> KeyValueSlots:
        self.activation_dtype = like.dtype
        self.staged, self.staged_slots = [], layout.num_slots
        for name, buffer in (("keys", self.keys), ("values", self.values)):
            codes = like.new_empty((*like.shape[:3], self.codecs[name].nbytes), dtype=torch.uint8)
            buffer.reserve(codes, layout.num_slots, self.retention.most_slots)
        codecs = self.codecs["keys"], self.codecs["values"]
        return KeyValueSlots(self.keys.make_own(), self.values.make_own(), codecs)

    def dtypes(self) -> set[torch.dtype]:
        return {self.activation_dtype}

    def spec(self, rows: int, columns: int, layer: torch.nn.Module) -> dict[str, StateSpec]:
        shape = (rows, self.row_shape[0], self.retention.num_slots(columns))
        codecs = self.codecs.items()
        return {name: StateSpec((*shape, codec.nbytes), dtype=torch.uint8) for name, codec in codecs}


__all__ = ["DEFAULT_KV_BITS", "QuantizedKeyValueStore", "resolve_kv_bits"]
