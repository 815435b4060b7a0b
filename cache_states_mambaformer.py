"""The states of recurrent mixers: kept, and taken back.

A state forgets how it came about, so what was fed last is remembered beside it: a checkpoint, and for each forward
since then what its mixer needs to run the tokens that stay once more.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch

from .cache_keys_mambaformer import Removal, as_index, is_writable, select_rows_of, usable, zeroed

# Single tokens that a recurrent store runs again at most, before those of the forward that is taken back. The states
# of a token weigh about as much as what it takes to compute them from those of eight tokens before.
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
class Passage:
    """What one forward gave a recurrent mixer: enough to run its first tokens again.

    Args:
        inputs: what the mixer asked to keep, by name, (rows, tokens, ...) each, packed.
        advance: `(states, inputs, lengths) -> states`, by name, after the tokens of `inputs`.
        before: the states in front of it; `None` where those of an earlier passage have to do.
        lengths: real tokens of each row, (rows,); `None` when all are real.
    """

    inputs: dict[str, torch.Tensor]
    advance: Callable
    before: dict[str, torch.Tensor] | None
    lengths: torch.Tensor | None = None

    @property
    def num_tokens(self) -> int:
        """Width, pads included."""
        return next(iter(self.inputs.values())).shape[1]

    def without_last(self, tokens: Any) -> tuple["Passage", Any]:
        """The passage less the last `tokens` of each row (an integer or (rows,)), and how many it did not have."""
        if isinstance(tokens, int) and self.lengths is None:
            left = max(self.num_tokens - tokens, 0)
            return self._cut(left, None), tokens - (self.num_tokens - left)
        tokens = as_index(tokens)
        lengths = torch.full_like(tokens, self.num_tokens) if self.lengths is None else self.lengths
        tokens = tokens.to(lengths.device)
        left = (lengths - tokens).clamp(min=0)
        return self._cut(int(left.max()), left), tokens - (lengths - left)

    def _cut(self, num_tokens: int, lengths: torch.Tensor | None) -> "Passage":
        inputs = self.inputs
        if num_tokens < self.num_tokens:  # copied: a view would keep what was taken back in memory
            inputs = {name: tensor[:, :num_tokens].clone() for name, tensor in inputs.items()}
        return replace(self, inputs=inputs, lengths=lengths)

    def select_rows(self, rows: torch.Tensor) -> "Passage":
        def select(tensor):
            return None if tensor is None else tensor.index_select(0, rows.to(tensor.device))

        before = None if self.before is None else {name: select(state) for name, state in self.before.items()}
        inputs = {name: select(tensor) for name, tensor in self.inputs.items()}
        return replace(self, inputs=inputs, before=before, lengths=select(self.lengths))

    def nbytes(self) -> int:
        return sum(tensor.nbytes for tensor in (*self.inputs.values(), *(self.before or {}).values()))


class RecurrentStore:
    """The states of one recurrent mixer, by name; what they are is the mixer's business.

    Mamba keeps `"conv"` (rows, kernel - 1, channels), its last inputs, and `"ssm"` (rows, channels, state), float32.

    A state forgets how it came about. To take back up to `reach` tokens, the store keeps the last passages from a
    checkpoint on, and runs again what is left of them. Fixed states are overwritten in place and have no past.
    """

    def __init__(self, is_fixed: bool = False):
        self.is_fixed, self.reach = is_fixed, 0
        self.states: dict[str, torch.Tensor] = {}
        self.staged: dict[str, torch.Tensor] = {}
        self.past: list[Passage] = []
        self.staged_past: list[Passage] = []

    def update(self, name: str, state: torch.Tensor) -> None:
        self.staged[name] = state

    def record(self, passage: Passage | None, is_whole: bool = True) -> None:
        """Remembers how the states of the open forward came about, if that is known.

        `is_whole`: the passage has all tokens of the forward, so what came before it leads up to it.
        """
        if passage is not None:
            self.staged_past = [*self.past, passage] if is_whole else [passage]

    def commit(self) -> None:
        for name, state in self.staged.items():
            old = self.states.get(name)
            keeps_address = self.is_fixed and old is not None and (old.shape, old.dtype) == (state.shape, state.dtype)
            if keeps_address and is_writable(old) and not torch.is_grad_enabled():
                old.copy_(state)
            else:
                self.states[name] = state.clone() if self.is_fixed else state
        if self.past or self.staged_past:
            self.past = self._within_reach(self.staged_past)
        self.staged, self.staged_past = {}, []

    def _within_reach(self, past: list[Passage]) -> list[Passage]:
        """The newest passages that hold `reach` tokens, from a checkpoint on; not every passage becomes one."""
        if len(past) < 2:
            return past
        since_checkpoint, checkpoints = 0, (passage.before is not None for passage in reversed(past[:-1]))
        for passage, is_checkpoint in zip(reversed(past), (False, *checkpoints), strict=True):
            since_checkpoint += passage.num_tokens
            if is_checkpoint and since_checkpoint <= TOKENS_PER_CHECKPOINT:
                past[-1] = replace(past[-1], before=None)
            if is_checkpoint:
                break
        num_tokens = 0
        for idx in range(len(past) - 1, -1, -1):
            num_tokens += past[idx].num_tokens
            if num_tokens >= self.reach and past[idx].before is not None:
                return past[idx:]
        return past

    def discard(self) -> None:
        self.staged, self.staged_past = {}, []

    def drop(self) -> None:
        # A state of zeros is the state before the first token.
        self.states = {name: zeroed(state) for name, state in self.states.items()} if self.is_fixed else {}
        self.staged, self.staged_past, self.past = {}, [], []

    def select_rows(self, rows: torch.Tensor) -> None:
        may_write = self.is_fixed and not torch.is_grad_enabled()
        self.states = {name: select_rows_of(state, rows, may_write) for name, state in self.states.items()}
        self.past = [passage.select_rows(rows) for passage in self.past]

    def fork_into(self, other: "RecurrentStore") -> None:
        other.states = {name: state.clone() if self.is_fixed else state for name, state in self.states.items()}
        other.past, other.reach = list(self.past), self.reach

    def tensors(self) -> dict[str, torch.Tensor]:
        return {name: usable(state) for name, state in self.states.items()}

    def nbytes(self) -> dict[str, int]:
        found = {name: state.nbytes for name, state in self.states.items()}
        return found | ({"past": sum(passage.nbytes() for passage in self.past)} if self.past else {})

    def record_past(self, reach: int, *_) -> None:
        """Keeps the past of the forwards to come, so that `reach` tokens can be taken back."""
        self.reach = reach

    def rewound(self, removal: Removal) -> tuple[dict[str, torch.Tensor], list[Passage]] | None:
        """States and past after a removal; `None` when it goes beyond what is remembered."""
        if removal.most == 0:
            return self.states, self.past
        # What may be trained through later keeps its graph, whatever mode the caller is in.
        needs_graph = any(tensor.requires_grad for passage in self.past for tensor in passage.inputs.values())
        with torch.set_grad_enabled(needs_graph or torch.is_grad_enabled()):
            return self._run_again(removal.tokens)

    def _run_again(self, tokens: Any) -> tuple[dict[str, torch.Tensor], list[Passage]] | None:
        earlier, again = list(self.past), []
        while earlier:
            passage, tokens = earlier.pop().without_last(tokens)
            again.insert(0, passage)
            is_enough = tokens == 0 if isinstance(tokens, int) else not bool(tokens.any())
            if is_enough and passage.before is not None:
                break
        else:
            return None
        states = again[0].before
        for passage in again:
            if passage.num_tokens:
                earlier.append(replace(passage, before=states))
                states = passage.advance(states, passage.inputs, passage.lengths)
        # A state of zeros is the state before the first token.
        return states or {name: torch.zeros_like(state) for name, state in self.states.items()}, earlier

    def rewind(self, rewound: tuple[dict[str, torch.Tensor], list[Passage]]) -> None:
        self.states, self.past = rewound
