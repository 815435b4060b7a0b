"""The mixer protocol, the recurrent mixer, and the RMS norm.

A mixer sees left-aligned rows: the real tokens of a row come first, padding follows.
"""

from abc import abstractmethod
from collections.abc import Callable
from typing import ClassVar

import torch
from torch import Tensor, nn

from .cache_keys_mambaformer import StateSpec
from .cache_mambaformer import MambaFormerCache
from .cache_states_mambaformer import ReplaySegment, split_at_reach
from .cache_states_quantized_mambaformer import POSITIONS, advance_rounded, lengths_of_token, round_wide
from .configuration_mambaformer import MambaFormerConfig
from .decode_builder_mambaformer import CannotLower, ProgramBuilder
from .decode_workspace_mambaformer import Intermediate
from .expert_linear_mambaformer import ScaledBasis
from .ops_eligibility_mambaformer import replaceable_by_kernels
from .ops_mambaformer import rms_norm
from .weights_parallel_mambaformer import CountsReplacements


@replaceable_by_kernels
class MambaFormerRMSNorm(nn.Module):
    """Root mean square norm (arXiv 1910.07467, equation 4), computed in float32 at least."""

    def __init__(self, hidden_size: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(hidden_size))
        self.variance_epsilon = eps

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        return rms_norm(hidden_states, self.weight, self.variance_epsilon)


class MambaFormerMixer(CountsReplacements):
    """One part of a layer, with a norm in front of it and a residual around both.

    A subclass takes `(hidden_states, vectors, **context)` and returns hidden states of the same shape, alone or with
    attention weights. `vectors` are the prepared expert vectors by name of the linear module. A mixer that has kernels
    for decode steps says so by `lower`. The class says:

    - `name`: its attribute in the layer, which is part of the names of its weights;
    - `context`: the arguments of the layer's forward that it takes.

    Tensor parallelism splits its modules by its row in `TENSOR_PARALLEL_PLANS` of `configuration_mambaformer`.
    """

    name: ClassVar[str]
    context: ClassVar[tuple[str, ...]] = ()

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx

    @classmethod
    def split_sizes(cls, config: MambaFormerConfig) -> dict[str, int]:
        """The sizes that the number of tensor-parallel processes must divide, by the field that sets them."""
        return {}

    def lower(
        self, program: ProgramBuilder, hidden_states: Intermediate, vectors: dict[str, ScaledBasis]
    ) -> Intermediate:
        """Writes the mixer as operations of a decode program; a decode step then does not call the module.

        Args:
            hidden_states: the normed hidden states, as in `forward`.

        Returns:
            The output, which the layer adds to its hidden states.

        Raises:
            CannotLower: there are no kernels for it, and a decode step calls the module.
        """
        raise CannotLower

    def init_mixer_weights(self, config: MambaFormerConfig) -> None:
        """Initializes the weights that need more than the model's normal distribution."""


# Real tokens of each row (rows,); `None` when all are real.
Lengths = Tensor | None
States = dict[str, Tensor]


class RecurrentMixer(MambaFormerMixer):
    """A mixer with a state of fixed size: `before`, the recurrence `recur`, `after`.

    The recurrence runs any number of tokens from any state. Its tape is what `advance` needs to repeat it without its
    outputs, so that a cache can take tokens back; caches, sessions and rollback never ask which mixer it is.
    """

    context = ("cache", "lengths", "positions")

    @abstractmethod
    def before(self, hidden_states: Tensor, vectors: dict[str, ScaledBasis]) -> tuple[Tensor, ...]:
        """The inputs of the recurrence, (rows, tokens, ...) each, from hidden states (rows, tokens, hidden)."""

    @abstractmethod
    def recur(
        self,
        states: States,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, States, dict[str, Tensor] | None]:
        """The recurrence over `inputs` from `states` ({} before the first token).

        Args:
            lengths: real tokens of each row; padding after them must not change the row's states.
            positions: (rows, tokens), positions of tokens in their own sequences: states start from zeros at 0.

        Returns:
            Outputs (rows, tokens, ...), the new states, and the tape: tensors (rows, tokens, ...) by name, or `None`
            if `advance` cannot repeat these tokens.
        """

    @abstractmethod
    def advance(self) -> Callable[[States, dict[str, Tensor], Lengths], States]:
        """A pure function `(states, tape, lengths) -> states` that repeats the recurrence with the present weights."""

    def recur_rounded(
        self,
        states: States,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths,
        positions: Tensor,
    ) -> tuple[Tensor, States, dict[str, Tensor] | None]:
        """`recur` with the wide states rounded after each token, which is at `positions` (rows, tokens) of its row.

        Here one token at a time, for any mixer; one with a kernel overrides it and `advance_rounded`.
        """
        outputs, tapes = [], []
        for token in range(positions.shape[1]):
            one = tuple(each[:, token : token + 1] for each in inputs)
            mixed, states, tape = self.recur(states, one, vectors, lengths_of_token(lengths, token))
            states = round_wide(states, self.wide_names(), positions[:, token])
            outputs.append(mixed)
            tapes.append(tape)
        joined = None
        if all(tape is not None for tape in tapes):
            joined = {name: torch.cat([tape[name] for tape in tapes], dim=1) for name in tapes[0]}
        return torch.cat(outputs, dim=1), states, joined

    def advance_rounded(self) -> Callable[[States, dict[str, Tensor], Lengths], States]:
        """`advance` with the wide states rounded after each token, as in `recur_rounded`; the tape has positions."""
        return advance_rounded(self.advance(), self.wide_names())

    def wide_names(self) -> frozenset[str]:
        """The states that are float32 at least."""
        return frozenset(name for name, spec in self.state_specs().items() if spec.is_wide)

    @abstractmethod
    def after(self, mixed: Tensor, inputs: tuple[Tensor, ...], vectors: dict[str, ScaledBasis]) -> Tensor:
        """Hidden states (rows, tokens, hidden) from the outputs of the recurrence."""

    @abstractmethod
    def state_specs(self) -> dict[str, StateSpec]:
        """The states that a cache keeps for this mixer, by name, with the shape of one row."""

    def forward(
        self,
        hidden_states: Tensor,
        vectors: dict[str, ScaledBasis],
        cache: MambaFormerCache | None = None,
        lengths: Lengths = None,
        positions: Tensor | None = None,
    ) -> Tensor:
        """Left-aligned (rows, tokens, hidden) of which `lengths` (rows,) are real -> the same shape.

        `positions` (rows, tokens) are given where a row without a cache holds several sequences.
        """
        inputs = self.before(hidden_states, vectors)
        if cache is None:
            mixed, _, _ = self.recur({}, inputs, vectors, lengths, positions)
        else:
            mixed = self._recur_in_cache(cache, inputs, vectors, lengths)
        return self.after(mixed, inputs, vectors)

    def _recur_in_cache(
        self,
        cache: MambaFormerCache,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths,
    ) -> Tensor:
        """`recur` from the states of a cache; stores the new states, and the replay segment of the tokens in reach."""
        store, states = cache.recurrent_store(self.layer_idx), cache.recurrent_states(self.layer_idx, inputs[0])
        positions = cache.token_positions(inputs[0]) if store.rounds_states else None
        parts = split_at_reach(inputs[0].shape[1], lengths, cache.replay_reach)
        outputs, segment = [], None
        for number, (tokens, real) in enumerate(parts, start=1):
            part = tuple(each[:, tokens] for each in inputs)
            if positions is None:
                mixed, new_states, tape = self.recur(states, part, vectors, real)
            else:
                mixed, new_states, tape = self.recur_rounded(states, part, vectors, real, positions[:, tokens])
            if number == len(parts) and cache.replay_reach and tape is not None:
                segment = self._segment(_copy_views(tape, part), states, real, positions, tokens)
            states = new_states
            outputs.append(mixed)
        wide_names = self.wide_names()
        for name, state in states.items():
            store.update(name, state, name in wide_names)
        store.stage_segment(segment, is_complete=len(parts) == 1)
        return outputs[0] if len(outputs) == 1 else torch.cat(outputs, dim=1)

    def _segment(
        self, tape: dict[str, Tensor], states: States, lengths: Lengths, positions: Tensor | None, tokens: slice
    ) -> ReplaySegment:
        """The replay segment of a tape; `positions` of all tokens of the forward where states are rounded."""
        if positions is None:
            return ReplaySegment(tape, self.advance(), states, lengths)
        return ReplaySegment(tape | {POSITIONS: positions[:, tokens]}, self.advance_rounded(), states, lengths)


def _copy_views(tape: dict[str, Tensor], inputs: tuple[Tensor, ...]) -> dict[str, Tensor]:
    """The tape, with copies of its inputs: a view would keep the inputs of the prompt in memory."""
    views = {id(each) for each in inputs}
    return {name: each.clone() if id(each) in views else each for name, each in tape.items()}
