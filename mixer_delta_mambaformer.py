"""Gated DeltaNet: linear attention that corrects what its state says of a key."""

import functools
from collections.abc import Callable
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .cache_keys_mambaformer import StateSpec
from .configuration_mambaformer import MambaFormerConfig
from .expert_bases_mambaformer import at_least_float32
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear
from .mixer_base_mambaformer import Lengths, RecurrentMixer, States
from .mixer_parts_mambaformer import MambaFormerConv1d, MambaFormerGatedRMSNorm, init_log_rates, init_step_bias
from .ops_eligibility_mambaformer import is_replaceable
from .ops_mambaformer import conv_window, matrix_recurrence

L2_EPS = 1e-6  # under the root of the lengths of queries and keys


class Sizes(NamedTuple):
    """Heads of queries and keys, heads of values, and the widths of a key and of a value."""

    key_heads: int
    heads: int
    key_size: int
    value_size: int

    @property
    def parts(self) -> list[int]:
        """Channels of queries, keys and values."""
        return [self.key_heads * self.key_size] * 2 + [self.heads * self.value_size]


class MambaFormerGatedDeltaMixer(RecurrentMixer):
    """The gated delta rule (arXiv 2412.06464, section 3), optionally with negative eigenvalues (arXiv 2411.12537)."""

    name = "gated_delta"

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        heads = config.linear_num_key_heads, config.linear_num_value_heads
        widths = config.linear_key_head_dim, config.linear_value_head_dim
        self.sizes = sizes = Sizes(
            *cast(tuple[int, int, int, int], heads + widths)
        )  # the configuration fills in `None`
        hidden, channels, values = config.hidden_size, sum(sizes.parts), sizes.parts[-1]
        self.largest_beta = 2.0 if config.linear_allow_neg_eigval else 1.0
        self.qkv_proj = nn.Linear(hidden, channels, bias=False)
        self.z_proj = nn.Linear(hidden, values, bias=False)
        self.b_proj = nn.Linear(hidden, sizes.heads, bias=False)
        self.a_proj = nn.Linear(hidden, sizes.heads, bias=False)
        self.conv1d = MambaFormerConv1d(channels, config.linear_conv_kernel_dim, bias=False)
        self.dt_bias, self.A_log = (nn.Parameter(torch.ones(sizes.heads)) for _ in range(2))
        self.norm = MambaFormerGatedRMSNorm(sizes.value_size, sizes.value_size, config.rms_norm_eps, False)
        self.out_proj = nn.Linear(values, hidden, bias=False)

    @torch.no_grad()
    def init_mixer_weights(self, config: MambaFormerConfig) -> None:
        init_log_rates(self.A_log)
        init_step_bias(self.dt_bias, config)

    def before(self, hidden_states: Tensor, vectors: dict[str, ScaledBasis]) -> tuple[Tensor, ...]:
        """Queries, keys and values before the convolution; the gate; and the inputs of beta and of the decay."""
        return tuple(
            apply_expert_linear(getattr(self, name), hidden_states, vectors.get(name))
            for name in ("qkv_proj", "z_proj", "b_proj", "a_proj")
        )

    def recur(
        self,
        states: States,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, States, dict[str, Tensor] | None]:
        x, _, b, a = inputs
        u, window = self.conv1d(x, states.get("conv"), lengths, positions)
        wide = at_least_float32(x.dtype)
        beta = self.largest_beta * torch.sigmoid(b.to(wide))
        g = -torch.exp(self.A_log.to(wide)) * F.softplus(a.to(wide) + self.dt_bias.to(wide))
        y, state = _recur(self.sizes, u, g, beta, states.get("ssm"), lengths, positions)
        tape = {"x": x, "u": u, "g": g, "beta": beta} if is_replaceable(self.conv1d) else None
        return y, {"conv": window, "ssm": state}, tape

    def advance(self) -> Callable[[States, dict[str, Tensor], Lengths], States]:
        return functools.partial(_advance, self.sizes, self.conv1d.kernel_size[0])

    def after(self, mixed: Tensor, inputs: tuple[Tensor, ...], vectors: dict[str, ScaledBasis]) -> Tensor:
        gate = inputs[1].unflatten(-1, (self.sizes.heads, self.sizes.value_size))
        return apply_expert_linear(self.out_proj, self.norm(mixed, gate).flatten(-2), vectors.get("out_proj"))

    def state_specs(self) -> dict[str, StateSpec]:
        channels, _, kernel_size = self.conv1d.weight.shape
        return {
            "conv": StateSpec((kernel_size - 1, channels)),
            "ssm": StateSpec((self.sizes.heads, self.sizes.key_size, self.sizes.value_size), is_wide=True),
        }


def _recur(
    sizes: Sizes,
    u: Tensor,
    g: Tensor,
    beta: Tensor,
    state: Tensor | None,
    lengths: Lengths,
    positions: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Outputs (rows, tokens, heads, value size) and the state after the convolved inputs `u`."""
    q, k, v = u.split(sizes.parts, dim=-1)
    q, k = (_unit(each.unflatten(-1, (sizes.key_heads, sizes.key_size))) for each in (q, k))
    v = v.unflatten(-1, (sizes.heads, sizes.value_size))
    return matrix_recurrence(q * sizes.key_size**-0.5, k, v, g, beta, state, lengths, positions)


def _advance(sizes: Sizes, kernel_size: int, states: States, tape: dict[str, Tensor], lengths: Lengths) -> States:
    _, state = _recur(sizes, tape["u"], tape["g"], tape["beta"], states.get("ssm"), lengths)
    return {"conv": conv_window(tape["x"], kernel_size, states.get("conv"), lengths), "ssm": state}


def _unit(vectors: Tensor) -> Tensor:
    """Vectors of length 1, in float32 at least."""
    wide = vectors.to(at_least_float32(vectors.dtype))
    return wide * torch.rsqrt(wide.pow(2).sum(-1, keepdim=True) + L2_EPS)


__all__ = ["MambaFormerGatedDeltaMixer"]
