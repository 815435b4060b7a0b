"""States of recurrent mixers, and their rollback by replay.

A recurrent state cannot be truncated. To remove the last tokens, a store keeps a checkpoint of its states and, for
each forward since then, the mixer inputs that a replay needs; it replays the tokens that stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import nn

from .cache_buffers_mambaformer import as_normal_tensor, fill_zeros, is_writable, select_rows_of
from .cache_keys_mambaformer import Removal, StateSpec

# The states of a mixer by name.
States = dict[str, torch.Tensor]
# Forwards of single tokens between two checkpoints, at most. The states after a token take about as much memory as the
# inputs to replay eight tokens.
TOKENS_PER_CHECKPOINT = 8


def split_at_reach(
    num_tokens: int, lengths: torch.Tensor | None, reach: int
) -> list[tuple[slice, torch.Tensor | None]]:
    """The tokens of a forward before its last `reach` ones, if any, and the last ones, each with their lengths."""
    beyond = num_tokens - reach
    if reach == 0 or beyond <= 0:
        return [(slice(None), lengths)]
    if lengths is None:
        return [(slice(beyond), None), (slice(beyond, None), None)]
    return [(slice(beyond), lengths.clamp(max=beyond)), (slice(beyond, None), (lengths - beyond).clamp(min=0))]


@dataclass(frozen=True)
class ReplaySegment:
    """The tape of one forward of a recurrent mixer, from which its first tokens can be replayed.

    Args:
        inputs: tensors that the mixer needs for a replay, by name, (rows, tokens, ...) each, left-aligned.
        advance: `(states, inputs, lengths) -> states`, the states after the tokens of `inputs`.
        initial_states: a checkpoint, the states before the first token; `None` if a replay starts at an earlier
            segment.
        lengths: real tokens of each row, (rows,); `None` when all are real.
    """

    inputs: dict[str, torch.Tensor]
    advance: Callable[[States, dict[str, torch.Tensor], torch.Tensor | None], States]
    initial_states: States | None
    lengths: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Width, pads included."""
        return next(iter(self.inputs.values())).shape[1]

    def remove_last(self, tokens: int | torch.Tensor) -> tuple["ReplaySegment", int | torch.Tensor]:
        """The segment without the last `tokens` of each row (an integer or (rows,)), and the tokens that it lacked."""
        if isinstance(tokens, int) and self.lengths is None:
            left = max(self.num_tokens - tokens, 0)
            return self._cut(left, None), tokens - (self.num_tokens - left)
        tokens = torch.as_tensor(tokens, device="cpu") if isinstance(tokens, int) else tokens
        lengths = torch.full_like(tokens, self.num_tokens) if self.lengths is None else self.lengths
        tokens = tokens.to(lengths.device)
        left = (lengths - tokens).clamp(min=0)
        return self._cut(int(left.max()), left), tokens - (lengths - left)

    def _cut(self, num_tokens: int, lengths: torch.Tensor | None) -> "ReplaySegment":
        inputs = self.inputs
        if num_tokens < self.num_tokens:  # a copy, as a view would keep the removed tokens in memory
            inputs = {name: tensor[:, :num_tokens].clone() for name, tensor in inputs.items()}
        return replace(self, inputs=inputs, lengths=lengths)

    def select_rows(self, rows: torch.Tensor) -> "ReplaySegment":
        def select(tensor: torch.Tensor) -> torch.Tensor:
            return tensor.index_select(0, rows.to(tensor.device))

        inputs = {name: select(tensor) for name, tensor in self.inputs.items()}
        states = self.initial_states
        states = None if states is None else {name: select(state) for name, state in states.items()}
        lengths = None if self.lengths is None else select(self.lengths)
        return replace(self, inputs=inputs, initial_states=states, lengths=lengths)

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), *(self.initial_states or {}).values()))


@runtime_checkable
class HasStateSpecs(Protocol):
    """A mixer that declares its states."""

    def state_specs(self) -> dict[str, StateSpec]: ...


class RecurrentStore:
    """The states of one recurrent mixer, by names that the mixer chooses.

    Mamba has `"conv"` (rows, kernel size - 1, channels), its last inputs, and `"ssm"` (rows, channels, state size) in
    float32.

    To remove up to `reach` tokens, the store keeps the newest segments from a checkpoint on, and replays the tokens
    that stay. Fixed states are overwritten in place and have no segments.
    """

    rounds_states = False  # whether wide states are rounded after each token

    def __init__(self, is_fixed: bool = False):
        self.is_fixed, self.reach = is_fixed, 0
        self.is_shared = False  # a fork has the states and segments too
        self.states: States = {}
        self.staged: States = {}
        self.segments: list[ReplaySegment] = []
        self.staged_segments: list[ReplaySegment] = []

    def update(self, name: str, state: torch.Tensor, is_wide: bool = False) -> None:
        """Stages a state; `is_wide` as in its `StateSpec`."""
        self.staged[name] = state

    def stage_segment(self, segment: ReplaySegment | None, is_complete: bool = True) -> None:
        """Stages the segment of the open forward, if there is one.

        Args:
            is_complete: the segment has all tokens of the forward, so it continues the earlier segments.
        """
        if segment is not None:
            self.staged_segments = [*self.segments, segment] if is_complete else [segment]

    def commit(self) -> None:
        self.is_shared = self.is_shared and not self.staged
        for name, state in self.staged.items():
            if not self.is_fixed:
                self.states[name] = state
                continue
            old = self.states.get(name)
            if old is not None and _can_overwrite(old, state):
                old.copy_(state)
            else:
                self.states[name] = state.clone()
        if self.segments or self.staged_segments:
            self.segments = self._within_reach(self.staged_segments)
        self.staged, self.staged_segments = {}, []

    def _within_reach(self, segments: list[ReplaySegment]) -> list[ReplaySegment]:
        """The newest segments that hold `reach` tokens, from a checkpoint on; drops checkpoints that are too close."""
        if len(segments) < 2:
            return segments
        since_checkpoint, is_checkpoint = segments[-1].num_tokens, False
        for segment in reversed(segments[:-1]):
            since_checkpoint += segment.num_tokens
            is_checkpoint = segment.initial_states is not None
            if is_checkpoint:
                break
        if is_checkpoint and since_checkpoint <= TOKENS_PER_CHECKPOINT:
            segments[-1] = replace(segments[-1], initial_states=None)
        num_tokens = 0
        for idx in range(len(segments) - 1, -1, -1):
            num_tokens += segments[idx].num_tokens
            if num_tokens >= self.reach and segments[idx].initial_states is not None:
                return segments[idx:]
        return segments

    def discard(self) -> None:
        self.staged, self.staged_segments = {}, []

    def reset(self) -> None:
        # A state of zeros is the state before the first token.
        self.states = {name: fill_zeros(state) for name, state in self.states.items()} if self.is_fixed else {}
        self.staged, self.staged_segments, self.segments = {}, [], []
        self.is_shared = False

    def select_rows(self, rows: torch.Tensor) -> None:
        may_write = self.is_fixed and not torch.is_grad_enabled()
        self.states = {name: select_rows_of(state, rows, may_write) for name, state in self.states.items()}
        self.segments = [segment.select_rows(rows) for segment in self.segments]
        self.is_shared = False

    def fork(self) -> "RecurrentStore":
        other = RecurrentStore(self.is_fixed)
        self._fork_into(other)
        return other

    def _fork_into(self, other: "RecurrentStore") -> None:
        other.states = {name: state.clone() if self.is_fixed else state for name, state in self.states.items()}
        other.segments, other.reach = list(self.segments), self.reach
        self.is_shared = other.is_shared = not self.is_fixed

    def state(self, columns: int | None = None) -> dict[str, torch.Tensor]:
        return {name: as_normal_tensor(state) for name, state in self.states.items()}

    def visible(self) -> States:
        """The states as the mixer takes them."""
        return self.state()

    def load_state(self, state: dict[str, torch.Tensor], columns: int) -> None:
        for name, tensor in state.items():
            self.update(name, tensor)
        self.commit()

    def spec(self, rows: int, columns: int, layer: nn.Module) -> dict[str, StateSpec]:
        return {name: StateSpec((rows, *spec.shape), is_wide=True) for name, spec in self.specs_of(layer).items()}

    @staticmethod
    def specs_of(layer: nn.Module) -> dict[str, StateSpec]:
        """The states of the layer's mixer, with the shape of one row."""
        return next(each for each in layer.modules() if isinstance(each, HasStateSpecs)).state_specs()  # or wrapped

    def dtypes(self) -> set[torch.dtype]:
        return {state.dtype for state in self.states.values()}

    def buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.states)

    def set_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        self.states = dict(buffers)

    def nbytes(self) -> dict[str, int]:
        sizes = {name: state.nbytes for name, state in self.states.items()}
        return sizes | ({"past": sum(segment.nbytes() for segment in self.segments)} if self.segments else {})

    def slack(self, columns: int) -> dict[str, int]:
        return {}

    def evicted(self, columns: int) -> dict[str, int]:
        return {}

    def shared(self) -> dict[str, int]:
        return self.nbytes() if self.is_shared else {}

    def extend_reach(self, reach: int, tokens_seen: torch.Tensor, columns: int) -> None:
        self.reach = reach

    def plan_crop(self, removal: Removal) -> tuple[States, list[ReplaySegment]] | None:
        """States and segments after a removal; `None` if the segments have fewer tokens."""
        if removal.most == 0:
            return self.states, self.segments
        # A state that may get gradients later keeps its graph, whatever mode the caller is in.
        needs_graph = any(tensor.requires_grad for each in self.segments for tensor in each.inputs.values())
        with torch.set_grad_enabled(needs_graph or torch.is_grad_enabled()):
            return self._replay(removal.tokens)

    def _replay(self, tokens: int | torch.Tensor) -> tuple[States, list[ReplaySegment]] | None:
        """The states and segments without the last `tokens` of each row."""
        segments, replayed = list(self.segments), []
        while segments:
            segment, tokens = segments.pop().remove_last(tokens)
            replayed.insert(0, segment)
            are_removed = tokens == 0 if isinstance(tokens, int) else not bool(tokens.any())
            if are_removed and segment.initial_states is not None:
                states = segment.initial_states
                break
        else:
            return None
        for segment in replayed:
            if segment.num_tokens:
                segments.append(replace(segment, initial_states=states))
                states = self.replay(segment, states)
        # A state of zeros is the state before the first token.
        return states or {name: torch.zeros_like(state) for name, state in self.states.items()}, segments

    def replay(self, segment: ReplaySegment, states: States) -> States:
        """The states after the tokens of `segment`, from the states before them, as they are stored."""
        return segment.advance(states, segment.inputs, segment.lengths)

    def crop(self, plan: tuple[States, list[ReplaySegment]]) -> None:
        states, self.segments = plan
        self.states = dict(states)  # which may be a checkpoint that a fork has too


def _can_overwrite(old: torch.Tensor, new: torch.Tensor) -> bool:
    is_same_kind = old.shape == new.shape and old.dtype == new.dtype
    return is_same_kind and is_writable(old) and not torch.is_grad_enabled()


__all__ = ["RecurrentStore", "ReplaySegment", "split_at_reach"]
