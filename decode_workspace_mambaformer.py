"""The workspace of a decode program: where each intermediate result lives, planned before the program runs.

A buffer holds some elements per token. It needs memory from the first operation that uses it to the last one, and
buffers that are never needed together share memory: a linear scan over the operations.
"""

from collections.abc import Sequence
from dataclasses import dataclass

# Buffers start at multiples of this number of elements per token, so that their rows start like those of tensors.
ALIGNMENT = 16


@dataclass(frozen=True, eq=False)
class Intermediate:
    """An intermediate result, (rows, tokens, width)."""

    width: int


class Workspace:
    """Places for buffers, in elements per token from the start of the workspace.

    Args:
        first: the buffer at the start, which is needed throughout.
        uses: the buffers that each operation reads or writes, operation by operation.
    """

    def __init__(self, first: Intermediate, uses: Sequence[Sequence[Intermediate]]):
        self._lives = {first: (0, len(uses))} | _lives_of(uses)
        self._lives[first] = (0, len(uses))
        self._offsets: dict[Intermediate, int] = {}
        self.size = 0
        live: list[Intermediate] = []  # sorted by offset
        for buffer, (start, _) in self._lives.items():  # in the order of their first use
            live = [other for other in live if self._lives[other][1] >= start]
            self._place(buffer, live)
        self._check()

    def offset(self, buffer: Intermediate) -> int:
        return self._offsets[buffer]

    def _end(self, buffer: Intermediate) -> int:
        return self._offsets[buffer] + _aligned(buffer.width)

    def _place(self, buffer: Intermediate, live: list[Intermediate]) -> None:
        """Puts `buffer` into the first gap between the buffers that are `live`, and among these."""
        offset, width = 0, _aligned(buffer.width)
        index = len(live)
        for number, other in enumerate(live):
            if self._offsets[other] >= offset + width:
                index = number
                break
            offset = self._end(other)
        live.insert(index, buffer)
        self._offsets[buffer] = offset
        self.size = max(self.size, offset + width)

    def _check(self) -> None:
        """Proves that every buffer is inside of the workspace and overlaps none that is needed at the same time.

        Raises:
            RuntimeError: it is not so; the program must not run.
        """
        for buffer, offset in self._offsets.items():
            if offset < 0 or offset + buffer.width > self.size:
                raise RuntimeError(f"A buffer of {buffer.width} elements at {offset} is outside of the workspace.")
        live: list[Intermediate] = []
        for buffer, (start, _) in self._lives.items():
            live = [other for other in live if self._lives[other][1] >= start]
            offset, end = self._offsets[buffer], self._end(buffer)
            if any(offset < self._end(other) and self._offsets[other] < end for other in live):
                raise RuntimeError("Two buffers of the workspace that are needed together overlap.")
            live.append(buffer)


def _lives_of(uses: Sequence[Sequence[Intermediate]]) -> dict[Intermediate, tuple[int, int]]:
    """The first and the last operation that use each buffer."""
    lives: dict[Intermediate, tuple[int, int]] = {}
    for index, buffers in enumerate(uses):
        for buffer in buffers:
            lives[buffer] = (lives.get(buffer, (index, index))[0], index)
    return lives


def _aligned(width: int) -> int:
    return -(-width // ALIGNMENT) * ALIGNMENT


__all__ = ["Intermediate", "Workspace"]
