"""Mamba-2, the state space mixer with one decay per head."""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .cache_keys_mambaformer import StateSpec
from .configuration_mambaformer import MambaFormerConfig
from .expert_bases_mambaformer import at_least_float32
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear
from .mixer_base_mambaformer import Lengths, RecurrentMixer, States
from .mixer_parts_mambaformer import MambaFormerConv1d, MambaFormerGatedRMSNorm, init_log_rates, init_step_bias
from .ops_eligibility_mambaformer import is_replaceable
from .ops_mambaformer import conv_window, matrix_recurrence


class Sizes(NamedTuple):
    """H, P, G and N of the paper."""

    heads: int
    head_size: int
    groups: int
    state_size: int

    def split(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (rows, tokens, heads, head size), and B and C (rows, tokens, groups, state size)."""
        channels, packed = self.heads * self.head_size, self.groups * self.state_size
        x, B, C = u.split([channels, packed, packed], dim=-1)
        of_group = (self.groups, self.state_size)
        return x.unflatten(-1, (self.heads, self.head_size)), B.unflatten(-1, of_group), C.unflatten(-1, of_group)


class MambaFormerMamba2Mixer(RecurrentMixer):
    """State space duality (arXiv 2405.21060, section 7), with the norm of the output before or after its gate."""

    name = "mamba2"

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads = cast(int, config.mamba_num_heads)  # the configuration fills in `None`
        self.sizes = sizes = Sizes(heads, config.mamba_head_dim, config.mamba_num_groups, config.mamba_d_state)
        self.step_limits = tuple(config.time_step_limit or (None, None))
        channels, packed = sizes.heads * sizes.head_size, 2 * sizes.groups * sizes.state_size
        self.in_sizes = [channels, channels + packed, sizes.heads]  # gate; x, B and C; dt
        self.in_proj = nn.Linear(config.hidden_size, sum(self.in_sizes), bias=config.mamba_proj_bias)
        self.conv1d = MambaFormerConv1d(channels + packed, config.mamba_d_conv, config.mamba_conv_bias)
        self.dt_bias, self.A_log, self.D = (nn.Parameter(torch.ones(sizes.heads)) for _ in range(3))
        self.norm = None
        if config.mamba_gated_norm != "none":
            is_gated_first = config.mamba_gated_norm == "after_gate"
            group_size = channels // sizes.groups
            self.norm = MambaFormerGatedRMSNorm(channels, group_size, config.rms_norm_eps, is_gated_first)
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=config.mamba_proj_bias)

    @torch.no_grad()
    def init_mixer_weights(self, config: MambaFormerConfig) -> None:
        init_log_rates(self.A_log)
        init.ones_(self.D)
        init_step_bias(self.dt_bias, config)

    def before(self, hidden_states: Tensor, vectors: dict[str, ScaledBasis]) -> tuple[Tensor, ...]:
        """The gate (rows, tokens, channels), inputs of the convolution, and steps (rows, tokens, heads)."""
        projected = apply_expert_linear(self.in_proj, hidden_states, vectors.get("in_proj"))
        return projected.split(self.in_sizes, dim=-1)

    def recur(
        self,
        states: States,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, States, dict[str, Tensor] | None]:
        _, x, dt = inputs
        u, window = self.conv1d(x, states.get("conv"), lengths, positions)
        dt = self.step_sizes(dt)
        y, state = _scan(self.sizes, self.rates(), u, dt, states.get("ssm"), lengths, positions)
        y = torch.addcmul(y, self.sizes.split(u)[0].to(y.dtype), self.D.to(y.dtype)[:, None]).to(u.dtype)
        tape = {"x": x, "u": u, "dt": dt} if is_replaceable(self.conv1d) else None
        return y.flatten(-2), {"conv": window, "ssm": state}, tape

    def step_sizes(self, dt: Tensor) -> Tensor:
        """softplus(dt + bias) within the limits, (rows, tokens, heads), in float32 at least."""
        wide = at_least_float32(dt.dtype)
        dt = F.softplus(dt.to(wide) + self.dt_bias.to(wide))
        return dt if self.step_limits == (None, None) else dt.clamp(*self.step_limits)

    def rates(self) -> Tensor:
        """A (heads,), negative."""
        return -torch.exp(self.A_log.to(at_least_float32(self.A_log.dtype)))

    def advance(self) -> Callable[[States, dict[str, Tensor], Lengths], States]:
        # The rates are a copy: training may go on.
        return functools.partial(_advance, self.sizes, self.rates(), self.conv1d.kernel_size[0])

    def after(self, mixed: Tensor, inputs: tuple[Tensor, ...], vectors: dict[str, ScaledBasis]) -> Tensor:
        gate = inputs[0]
        mixed = mixed * F.silu(gate) if self.norm is None else self.norm(mixed, gate)
        return apply_expert_linear(self.out_proj, mixed, vectors.get("out_proj"))

    def state_specs(self) -> dict[str, StateSpec]:
        channels, _, kernel_size = self.conv1d.weight.shape
        return {
            "conv": StateSpec((kernel_size - 1, channels)),
            "ssm": StateSpec((self.sizes.heads, self.sizes.state_size, self.sizes.head_size), is_wide=True),
        }


def _scan(
    sizes: Sizes,
    A: Tensor,
    u: Tensor,
    dt: Tensor,
    state: Tensor | None,
    lengths: Lengths,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (rows, tokens, heads, head size), in the dtype of dt, and the state after the convolved inputs `u`."""
    x, B, C = sizes.split(u)
    return matrix_recurrence(C, B, dt[..., None] * x, dt * A, None, state, lengths, positions)


def _advance(
    sizes: Sizes, A: Tensor, kernel_size: int, states: States, tape: dict[str, Tensor], lengths: Lengths
) -> States:
    _, state = _scan(sizes, A, tape["u"], tape["dt"], states.get("ssm"), lengths)
    return {"conv": conv_window(tape["x"], kernel_size, states.get("conv"), lengths), "ssm": state}


__all__ = ["MambaFormerMamba2Mixer"]
