"""Quantized storage of recurrent states: 8 bits for each number, rounded after every token.

A rounded state is a pure function of the tokens of its row (`ops_state_codes_mambaformer`), so the laws of split,
padding, rollback, surgery and disk hold among these caches as they do among others. The output of a token is computed
from its state before rounding. States that are as wide as float32 are rounded; convolution windows stay as they are.
"""

import functools
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor, nn

from .cache_keys_mambaformer import StateSpec
from .cache_states_mambaformer import RecurrentStore, ReplaySegment, States
from .expert_bases_mambaformer import at_least_float32
from .ops_state_codes_mambaformer import decode_states, encode_states, round_states

STATE_BITS = (8,)
# The name of the positions (rows, tokens) in the tape of rounded states.
POSITIONS = "positions"

Advance = Callable[[States, dict[str, Tensor], Tensor | None], States]


def check_state_bits(bits: object) -> None:
    """Refuses a number of bits that there is no grid for.

    Raises:
        ValueError: `bits` is neither 8 nor `None`.
    """
    if bits is not None and (type(bits) is not int or bits not in STATE_BITS):
        raise ValueError(
            f"`state_bits` must be 8, or None for recurrent states of full precision, and {bits!r} was given."
        )


class QuantizedRecurrentStore(RecurrentStore):
    """Recurrent states as codes, (rows, ..., numbers + 1) signed bytes for states (rows, ..., numbers).

    Args:
        dtype: of the activations; the other arguments are those of `RecurrentStore`.
    """

    rounds_states = True

    def __init__(self, dtype: torch.dtype, is_fixed: bool = False):
        super().__init__(is_fixed)
        self.dtype = at_least_float32(dtype)  # of the last forward, once there is one; states are decoded to it
        self.wide_names: set[str] = set()

    def update(self, name: str, state: Tensor, is_wide: bool = False) -> None:
        if is_wide:
            self.dtype = state.dtype
            self.wide_names.add(name)
            state = encode_states(state)
        self.staged[name] = state

    def stage_segment(self, segment: ReplaySegment | None, is_complete: bool = True) -> None:
        if segment is not None and segment.initial_states is not None:
            segment = replace(segment, initial_states=self._encode(segment.initial_states))
        super().stage_segment(segment, is_complete)

    def fork(self) -> "QuantizedRecurrentStore":
        other = QuantizedRecurrentStore(self.dtype, self.is_fixed)
        other.wide_names = set(self.wide_names)
        self._fork_into(other)
        return other

    def visible(self) -> States:
        return self._decode(super().visible())

    def load_state(self, state: dict[str, Tensor], columns: int) -> None:
        self.wide_names = {name for name, tensor in state.items() if tensor.dtype is torch.int8}
        super().load_state(state, columns)

    def dtypes(self) -> set[torch.dtype]:
        return {self.dtype if name in self.wide_names else state.dtype for name, state in self.states.items()}

    def spec(self, rows: int, columns: int, layer: nn.Module) -> dict[str, StateSpec]:
        specs = self.specs_of(layer)
        exact = {name: spec for name, spec in super().spec(rows, columns, layer).items() if not specs[name].is_wide}
        wide = {name: spec.shape for name, spec in specs.items() if spec.is_wide}
        return exact | {
            name: StateSpec((rows, *shape[:-1], shape[-1] + 1), dtype=torch.int8) for name, shape in wide.items()
        }

    def replay(self, segment: ReplaySegment, states: States) -> States:
        return self._encode(super().replay(segment, self._decode(states)))

    def _encode(self, states: States) -> States:
        return {name: encode_states(state) if name in self.wide_names else state for name, state in states.items()}

    def _decode(self, states: States) -> States:
        names = self.wide_names
        return {name: decode_states(state, self.dtype) if name in names else state for name, state in states.items()}


def advance_rounded(advance: Advance, wide_names: frozenset[str]) -> Advance:
    """`advance` one token at a time, with the wide states rounded after each: the tape has `POSITIONS`, too."""
    return functools.partial(_advance_rounded, advance, wide_names)


def _advance_rounded(
    advance: Advance, wide_names: frozenset[str], states: States, tape: dict[str, Tensor], lengths: Tensor | None
) -> States:
    positions = tape[POSITIONS]
    for token in range(positions.shape[1]):
        one = {name: tensor[:, token : token + 1] for name, tensor in tape.items() if name != POSITIONS}
        states = advance(states, one, lengths_of_token(lengths, token))
        states = round_wide(states, wide_names, positions[:, token])
    return states


def round_wide(states: States, wide_names: frozenset[str], positions: Tensor) -> States:
    """The states after tokens at `positions` (rows,), with the wide ones rounded.

    Padding does not change a state, and a rounded state is its own rounding.
    """
    return {name: round_states(state, positions) if name in wide_names else state for name, state in states.items()}


def lengths_of_token(lengths: Tensor | None, token: int) -> Tensor | None:
    """The lengths of a forward's token by itself: 1 where it is real, else 0."""
    return None if lengths is None else (lengths - token).clamp(0, 1)


__all__ = ["QuantizedRecurrentStore", "advance_rounded", "check_state_bits"]
