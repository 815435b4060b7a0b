"""What recurrent mixers have in common: the short convolution, the gated norm, and initial decays."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .configuration_mambaformer import MambaFormerConfig
from .ops_eligibility_mambaformer import replaceable_by_kernels
from .ops_mambaformer import causal_conv1d
from .ops_reference_mambaformer import arithmetic_dtype


@replaceable_by_kernels
class MambaFormerConv1d(nn.Conv1d):
    """`causal_conv1d` as a module, so that hooks that move or split weights see it run."""

    def __init__(self, channels: int, kernel_size: int, bias: bool, activation: str | None = "silu"):
        super().__init__(channels, channels, kernel_size, groups=channels, bias=bias, padding="valid")
        self.activation = activation

    def forward(
        self,
        inputs: Tensor,
        initial_state: Tensor | None = None,
        lengths: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        weight = self.weight[:, 0]
        return causal_conv1d(inputs, weight, self.bias, initial_state, lengths, positions, self.activation)


class MambaFormerGatedRMSNorm(nn.Module):
    """RMS norm over each group of channels, with a SiLU gate before or after it (arXiv 2405.21060, section 7.1).

    Args:
        size: channels that the weight scales; an input may have several times as many.
        group_size: channels that are normalized together.
        is_gated_first: whether the gate multiplies before the norm.
    """

    def __init__(self, size: int, group_size: int, eps: float, is_gated_first: bool):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.group_size, self.variance_epsilon, self.is_gated_first = group_size, eps, is_gated_first

    def forward(self, hidden_states: Tensor, gate: Tensor) -> Tensor:
        dtype = arithmetic_dtype(hidden_states)
        wide, open_share = hidden_states.to(dtype), F.silu(gate.to(dtype))
        if self.is_gated_first:
            wide = wide * open_share
        groups = wide.unflatten(-1, (-1, self.group_size))
        groups = groups * torch.rsqrt(groups.pow(2).mean(-1, keepdim=True) + self.variance_epsilon)
        normed = self.weight * groups.flatten(-2).to(hidden_states.dtype)
        return normed if self.is_gated_first else (normed * open_share).to(hidden_states.dtype)


@torch.no_grad()
def init_step_bias(bias: Tensor, config: MambaFormerConfig) -> None:
    """Step sizes softplus(bias) log-uniform in the range of the configuration (arXiv 2312.00752, section 3.6)."""
    low, high = config.time_step_min, config.time_step_max
    steps = low * (high / low) ** torch.rand(bias.shape, device=bias.device)
    steps = steps.clamp(min=config.time_step_floor)
    init.copy_(bias, steps + torch.log(-torch.expm1(-steps)))  # the inverse of softplus


@torch.no_grad()
def init_log_rates(log_rates: Tensor, low: float = 1.0, high: float = 16.0) -> None:
    """Decay rates, one a head, uniform in a range (arXiv 2405.21060, appendix D)."""
    init.copy_(log_rates, torch.empty(log_rates.shape, device=log_rates.device).uniform_(low, high).log())


__all__ = ["MambaFormerConv1d", "MambaFormerGatedRMSNorm", "init_log_rates", "init_step_bias"]
