"""The short convolution of LFM2, between two gates."""

import functools
from collections.abc import Callable

from torch import Tensor, nn

from .cache_keys_mambaformer import StateSpec
from .configuration_mambaformer import MambaFormerConfig
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear
from .mixer_base_mambaformer import Lengths, RecurrentMixer, States
from .mixer_parts_mambaformer import MambaFormerConv1d
from .ops_eligibility_mambaformer import is_replaceable
from .ops_mambaformer import conv_window


class MambaFormerShortConvMixer(RecurrentMixer):
    """[B, C, u] = W_in x; y = W_out (C * conv(B * u)) (LFM2, arXiv 2511.23404, section 2)."""

    name = "short_conv"

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        hidden = config.hidden_size
        self.in_proj = nn.Linear(hidden, 3 * hidden, bias=config.conv_bias)
        self.conv1d = MambaFormerConv1d(hidden, config.conv_L_cache, config.conv_bias, activation=None)
        self.out_proj = nn.Linear(hidden, hidden, bias=config.conv_bias)

    def before(self, hidden_states: Tensor, vectors: dict[str, ScaledBasis]) -> tuple[Tensor, ...]:
        """Inputs of the convolution and the gate of its outputs, (rows, tokens, hidden) each."""
        B, C, u = apply_expert_linear(self.in_proj, hidden_states, vectors.get("in_proj")).chunk(3, dim=-1)
        return B * u, C

    def recur(
        self,
        states: States,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, States, dict[str, Tensor] | None]:
        y, window = self.conv1d(inputs[0], states.get("conv"), lengths, positions)
        return y, {"conv": window}, {"x": inputs[0]} if is_replaceable(self.conv1d) else None

    def advance(self) -> Callable[[States, dict[str, Tensor], Lengths], States]:
        return functools.partial(_advance_window, self.conv1d.kernel_size[0])

    def after(self, mixed: Tensor, inputs: tuple[Tensor, ...], vectors: dict[str, ScaledBasis]) -> Tensor:
        return apply_expert_linear(self.out_proj, inputs[1] * mixed, vectors.get("out_proj"))

    def state_specs(self) -> dict[str, StateSpec]:
        channels, _, kernel_size = self.conv1d.weight.shape
        return {"conv": StateSpec((kernel_size - 1, channels))}


def _advance_window(kernel_size: int, states: States, tape: dict[str, Tensor], lengths: Lengths) -> States:
    return {"conv": conv_window(tape["x"], kernel_size, states.get("conv"), lengths)}


__all__ = ["MambaFormerShortConvMixer"]
