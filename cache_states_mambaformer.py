"""The states of recurrent mixers, and their rollback by replay.

A recurrent state cannot be truncated. To remove the last tokens, a store keeps a checkpoint of its states and, for
each forward since then, the mixer inputs that replay needs; it replays the tokens that stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cache_keys_mambaformer import Removal, StateSpec, as_index, is_writable, select_rows_of, usable, zeroed

# Single tokens that a recurrent store replays at most, before the tokens of the forward that is cropped. The states
# after a token take about as much memory as the inputs to replay eight tokens.
TOKENS_PER_CHECKPOINT = 8


def split_at_reach(num_tokens: int, lengths: torch.Tensor | None, reach: int) -> list[tuple[slice, Any]]:
    """The tokens of a forward that are beyond `reach` from its end, if any, and the rest, each with its lengths."""
    beyond = num_tokens - reach
    if reach == 0 or beyond <= 0:
        return [(slice(None), lengths)]
    if lengths is None:
        return [(slice(beyond), None), (slice(beyond, None), None)]
    return [(slice(beyond), lengths.clamp(max=beyond)), (slice(beyond, None), (lengths - beyond).clamp(min=0))]


@dataclass(frozen=True)
class ReplaySegment:
    """The inputs of a recurrent mixer in one forward: enough to replay its first tokens.

    Args:
        inputs: tensors that the mixer asked to keep, by name, (rows, tokens, ...) each, left-aligned.
        advance: `(states, inputs, lengths) -> states`, by name, after the tokens of `inputs`.
        initial_states: a checkpoint, the states before its first token; `None` if replay starts at an earlier segment.
        lengths: real tokens of each row, (rows,); `None` when all are real.
    """

    inputs: dict[str, torch.Tensor]
    advance: Callable
    initial_states: dict[str, torch.Tensor] | None
    lengths: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Width, pads included."""
        return next(iter(self.inputs.values())).shape[1]

    def without_last(self, tokens: Any) -> tuple["ReplaySegment", Any]:
        """The segment less the last `tokens` of each row (an integer or (rows,)), and how many it did not have."""
        if isinstance(tokens, int) and self.lengths is None:
            left = max(self.num_tokens - tokens, 0)
            return self._cut(left, None), tokens - (self.num_tokens - left)
        tokens = as_index(tokens)
        lengths = torch.full_like(tokens, self.num_tokens) if self.lengths is None else self.lengths
        tokens = tokens.to(lengths.device)
        left = (lengths - tokens).clamp(min=0)
        return self._cut(int(left.max()), left), tokens - (lengths - left)

    def _cut(self, num_tokens: int, lengths: torch.Tensor | None) -> "ReplaySegment":
        inputs = self.inputs
        if num_tokens < self.num_tokens:  # copied: a view would keep the removed tokens in memory
            inputs = {name: tensor[:, :num_tokens].clone() for name, tensor in inputs.items()}
        return replace(self, inputs=inputs, lengths=lengths)

    def select_rows(self, rows: torch.Tensor) -> "ReplaySegment":
        def select(tensor):
            return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))

        inputs = {name: select(tensor) for name, tensor in self.inputs.items()}
        states = self.initial_states
        states = None if states is None else {name: select(state) for name, state in states.items()}
        return replace(self, inputs=inputs, initial_states=states, lengths=select(self.lengths))

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), *(self.initial_states or {}).values()))


class RecurrentStore:
    """The states of one recurrent mixer, by name; the mixer decides which they are.

    Mamba keeps `"conv"` (rows, kernel - 1, channels), its last inputs, and `"ssm"` (rows, channels, state), float32.

    To remove up to `reach` tokens, the store keeps the last segments from a checkpoint on, and replays the rest of
    them. Fixed states are overwritten in place and have no segments.
    """

    def __init__(self, is_fixed: bool = False):
        self.is_fixed, self.reach = is_fixed, 0
        self.states: dict[str, torch.Tensor] = {}
        self.staged: dict[str, torch.Tensor] = {}
        self.segments: list[ReplaySegment] = []
        self.staged_segments: list[ReplaySegment] = []

    def update(self, name: str, state: torch.Tensor) -> None:
        self.staged[name] = state

    def record(self, segment: ReplaySegment | None, is_whole: bool = True) -> None:
        """Stages the segment of the open forward, if there is one.

        `is_whole`: the segment has all tokens of the forward, so it continues the segments before it.
        """
        if segment is not None:
            self.staged_segments = [*self.segments, segment] if is_whole else [segment]

    def commit(self) -> None:
        for name, state in self.staged.items():
            old = self.states.get(name)
            keeps_address = self.is_fixed and old is not None and (old.shape, old.dtype) == (state.shape, state.dtype)
            if keeps_address and is_writable(old) and not torch.is_grad_enabled():
                old.copy_(state)
            else:
                self.states[name] = state.clone() if self.is_fixed else state
        if self.segments or self.staged_segments:
            self.segments = self._within_reach(self.staged_segments)
        self.staged, self.staged_segments = {}, []

    def _within_reach(self, segments: list[ReplaySegment]) -> list[ReplaySegment]:
        """The newest segments that hold `reach` tokens, from a checkpoint on; not every segment becomes one."""
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
        self.states = {name: zeroed(state) for name, state in self.states.items()} if self.is_fixed else {}
        self.staged, self.staged_segments, self.segments = {}, [], []

    def select_rows(self, rows: torch.Tensor) -> None:
        may_write = self.is_fixed and not torch.is_grad_enabled()
        self.states = {name: select_rows_of(state, rows, may_write) for name, state in self.states.items()}
        self.segments = [segment.select_rows(rows) for segment in self.segments]

    def fork(self) -> "RecurrentStore":
        other = RecurrentStore(self.is_fixed)
        other.states = {name: state.clone() if self.is_fixed else state for name, state in self.states.items()}
        other.segments, other.reach = list(self.segments), self.reach
        return other

    def state(self, columns: int | None = None) -> dict[str, torch.Tensor]:
        return {name: usable(state) for name, state in self.states.items()}

    def load_state(self, state: dict[str, torch.Tensor], columns: int) -> None:
        for name, tensor in state.items():
            self.update(name, tensor)
        self.commit()

    def spec(self, rows: int, columns: int, layer: Any) -> dict[str, StateSpec]:
        mixer = next(each for each in layer.modules() if hasattr(each, "state_specs"))  # `layer` may be wrapped
        return {name: StateSpec((rows, *spec.shape), is_wide=True) for name, spec in mixer.state_specs().items()}

    def buffers(self) -> dict[str, torch.Tensor]:
        return dict(self.states)

    def set_buffers(self, buffers: dict[str, torch.Tensor]) -> None:
        self.states = dict(buffers)

    def nbytes(self) -> dict[str, int]:
        sizes = {name: state.nbytes for name, state in self.states.items()}
        return sizes | ({"past": sum(segment.nbytes() for segment in self.segments)} if self.segments else {})

    def extend_reach(self, reach: int, *_) -> None:
        self.reach = reach

    def plan_crop(self, removal: Removal) -> tuple[dict[str, torch.Tensor], list[ReplaySegment]] | None:
        """States and segments after a removal; `None` if it goes beyond the segments."""
        if removal.most == 0:
            return self.states, self.segments
        # A state that may be trained through later keeps its graph, whatever mode the caller is in.
        needs_graph = any(tensor.requires_grad for each in self.segments for tensor in each.inputs.values())
        with torch.set_grad_enabled(needs_graph or torch.is_grad_enabled()):
            return self._replay(removal.tokens)

    def _replay(self, tokens: Any) -> tuple[dict[str, torch.Tensor], list[ReplaySegment]] | None:
        segments, replayed = list(self.segments), []
        while segments:
            segment, tokens = segments.pop().without_last(tokens)
            replayed.insert(0, segment)
            is_enough = tokens == 0 if isinstance(tokens, int) else not bool(tokens.any())
            if is_enough and segment.initial_states is not None:
                break
        else:
            return None
        states = replayed[0].initial_states
        for segment in replayed:
            if segment.num_tokens:
                segments.append(replace(segment, initial_states=states))
                states = segment.advance(states, segment.inputs, segment.lengths)
        # A state of zeros is the state before the first token.
        return states or {name: torch.zeros_like(state) for name, state in self.states.items()}, segments

    def crop(self, plan: tuple[dict[str, torch.Tensor], list[ReplaySegment]]) -> None:
        self.states, self.segments = plan


__all__ = ["RecurrentStore", "ReplaySegment", "split_at_reach"]
