"""Codes of keys and values: a few bits for each number, as a pure function of one token's key or value.

Since no code depends on another token, a sequence has the same codes however it was cut into forwards. A vector is
rotated before it is rounded (signs, then a Hadamard transform), which spreads a channel of large values over all
others (QuaRot, arXiv 2404.00456, section 4.2); then each group of at most 64 numbers is rounded to a uniform grid.

One token and head are `ceil(head_dim / 16) * 2 * bits` bytes of codes and, for each group, a scale of 2 bytes; grids
of fewer than 6 bits have a zero point of 2 bytes more. CPU kernels read and write the same bytes (`csrc/codes.h`).
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_backends_mambaformer import run_kernel
from .ops_cpu_codes_mambaformer import CodecFields

BITS = (8, 6, 5, 4, 3)
LARGEST_GROUP = 64
# Grids that are symmetric about zero from so many bits on: below, the shift of a group is worth its two bytes.
SYMMETRIC_FROM = 6
# Bits of a code are stored in planes, low bits first; 16 codes fill whole bytes of each plane.
PLANES = {8: (8,), 6: (4, 2), 5: (4, 1), 4: (4,), 3: (2, 1)}
BLOCK = 16
# Codes of 8 bits are stored as signed bytes, so that products with them are sums of small numbers.
SIGN = 0x80


@dataclass(frozen=True)
class VectorCodec:
    """Turns vectors (..., size) into bytes (..., nbytes) and back.

    Args:
        size: numbers of a vector: the width of an attention head.
        bits: of each number; one of `BITS`.

    Raises:
        ValueError: `bits` is none of `BITS`.
    """

    size: int
    bits: int
    signs: tuple[float, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self):
        check_bits(self.bits)
        object.__setattr__(self, "signs", rotation_signs(self.size))

    @property
    def is_symmetric(self) -> bool:
        return self.bits >= SYMMETRIC_FROM

    @property
    def num_groups(self) -> int:
        """Groups of equal size, with a scale each."""
        groups = -(-self.size // LARGEST_GROUP)
        return groups if self.size % groups == 0 else 1

    @property
    def group_size(self) -> int:
        return self.size // self.num_groups

    @property
    def num_code_bytes(self) -> int:
        return self._padded_size // 8 * self.bits

    @property
    def _padded_size(self) -> int:
        return -(-self.size // BLOCK) * BLOCK

    @property
    def nbytes(self) -> int:
        """Bytes of one vector."""
        return self.num_code_bytes + self.num_groups * (2 if self.is_symmetric else 4)

    @property
    def fields(self) -> CodecFields:
        """The description that kernels take."""
        return self.bits, self.num_groups, self.nbytes, not self.is_symmetric

    def encode(self, vectors: Tensor) -> Tensor:
        """(..., size) in any floating type -> (..., nbytes), unsigned bytes.

        A vector that holds NaN or infinity is decoded as NaN.
        """
        codes = run_kernel("encode", vectors, self.fields)
        return self.encode_reference(vectors) if codes is None else codes

    def encode_reference(self, vectors: Tensor) -> Tensor:
        """`encode` in PyTorch; kernels give the same bytes."""
        groups = rotate(vectors.to(_arithmetic(vectors.dtype)), self.signs).unflatten(-1, (self.num_groups, -1))
        stored = self._grid(groups)
        scale, shift = self._scale_and_shift(stored.to(groups.dtype))
        # A group of equal numbers has a scale of zero, and any code stands for its shift.
        levels = ((groups - shift) / torch.where(scale == 0, 1, scale)).round().clamp(0, 2**self.bits - 1)
        codes = levels.nan_to_num(0.0).to(torch.uint8).flatten(-2)
        return torch.cat([self._packed(codes), stored.flatten(-2).contiguous().view(torch.uint8)], dim=-1)

    def decode(self, codes: Tensor, dtype: torch.dtype) -> Tensor:
        """(..., nbytes) -> (..., size): what the codes stand for, in the arithmetic of `dtype`, then in `dtype`."""
        packed, stored = codes.split([self.num_code_bytes, self.nbytes - self.num_code_bytes], dim=-1)
        grid = stored.clone(memory_format=torch.contiguous_format).view(torch.bfloat16).to(_arithmetic(dtype))
        scale, shift = self._scale_and_shift(grid.unflatten(-1, (self.num_groups, -1)))
        levels = self._unpacked(packed).to(grid.dtype).unflatten(-1, (self.num_groups, -1))
        return rotate_back((levels * scale + shift).flatten(-2), self.signs).to(dtype)

    @property
    def _half(self) -> float:
        return 2.0 ** (self.bits - 1) - 0.5

    def _grid(self, groups: Tensor) -> Tensor:
        """The stored numbers of each group, (..., groups, 1 or 2) in bfloat16: its scale, and its shift if it has one.

        Adding zero gives a zero the positive sign, which the minimum of zeros of both signs need not have.
        """
        if self.is_symmetric:
            return _as_stored(groups.abs().amax(-1, keepdim=True) / self._half)
        low, high = groups.amin(-1, keepdim=True), groups.amax(-1, keepdim=True)
        shift = _as_stored(low + 0.0)
        scale = _as_stored((high - shift.to(high.dtype)).clamp(min=0) / (2**self.bits - 1) + 0.0)
        return torch.cat([scale, shift], dim=-1)

    def _scale_and_shift(self, grid: Tensor) -> tuple[Tensor, Tensor]:
        """(..., groups, 1) each: the number of level n is `scale * n + shift`."""
        scale = grid[..., :1]
        return scale, -self._half * scale if self.is_symmetric else grid[..., 1:]

    def _packed(self, codes: Tensor) -> Tensor:
        """(..., size) of small integers -> (..., num_code_bytes)."""
        codes = F.pad(codes ^ SIGN if self.bits == 8 else codes, (0, self._padded_size - self.size))
        planes, low = [], 0
        for bits in PLANES[self.bits]:
            parts = (codes >> low) & (2**bits - 1)
            if bits == 4:  # of each block first the even codes, then the odd ones: a word of 32 bits each
                parts = parts.unflatten(-1, (-1, BLOCK // 2, 2)).transpose(-2, -1).flatten(-3)
            parts = parts.unflatten(-1, (-1, 8 // bits))
            plane = parts[..., 0]
            for part in range(1, 8 // bits):
                plane = plane | (parts[..., part] << (part * bits))
            planes.append(plane)
            low += bits
        return torch.cat(planes, dim=-1)

    def _unpacked(self, packed: Tensor) -> Tensor:
        """(..., num_code_bytes) -> (..., size) of small integers."""
        codes, low = torch.zeros((), dtype=torch.uint8, device=packed.device), 0
        sizes = [self._padded_size * bits // 8 for bits in PLANES[self.bits]]
        for bits, plane in zip(PLANES[self.bits], packed.split(sizes, dim=-1), strict=True):
            parts = torch.stack([(plane >> (part * bits)) & (2**bits - 1) for part in range(8 // bits)], dim=-1)
            parts = parts.flatten(-2)
            if bits == 4:
                parts = parts.unflatten(-1, (-1, 2, BLOCK // 2)).transpose(-2, -1).flatten(-3)
            codes = codes | (parts << low)
            low += bits
        codes = codes[..., : self.size]
        return codes ^ SIGN if self.bits == 8 else codes


def check_bits(bits: object) -> None:
    """Refuses a number of bits that there is no grid for.

    Raises:
        ValueError: `bits` is none of `BITS`.
    """
    if type(bits) is not int or bits not in BITS:
        raise ValueError(
            f"Keys and values are stored in {', '.join(map(str, BITS))} bits, and {bits!r} was asked for."
        )


def rotate(vectors: Tensor, signs: tuple[float, ...]) -> Tensor:
    """An orthogonal transform of the last dimension: signs, then a Hadamard transform of blocks."""
    return _hadamard(vectors * vectors.new_tensor(signs))


def rotate_back(vectors: Tensor, signs: tuple[float, ...]) -> Tensor:
    """The inverse of `rotate`."""
    return _hadamard(vectors) * vectors.new_tensor(signs)


def _hadamard(vectors: Tensor) -> Tensor:
    """The orthonormal transform of each block, by sums and differences, so that no result depends on other vectors."""
    size = vectors.shape[-1]
    block, step = size & -size, 1  # the largest power of two that divides the size
    while step < block:
        pairs = vectors.unflatten(-1, (-1, 2, step))
        one, other = pairs[..., 0, :], pairs[..., 1, :]
        vectors = torch.stack([one + other, one - other], dim=-2).flatten(-3)
        step *= 2
    return vectors * block**-0.5


def rotation_signs(size: int) -> tuple[float, ...]:
    """Fixed signs, 1 or -1: stored codes depend on them, so they never change."""
    return tuple(2.0 * ((index + 1) * 0x9E3779B1 >> 15 & 1) - 1.0 for index in range(size))


def _as_stored(grid: Tensor) -> Tensor:
    """In bfloat16; infinity becomes NaN, so that no sum of decoded numbers can hide it."""
    stored = grid.to(torch.bfloat16)
    return torch.where(stored.isfinite(), stored, torch.nan)


def _arithmetic(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


__all__ = ["BITS", "VectorCodec", "check_bits", "rotate", "rotate_back", "rotation_signs"]
