"""The gated MLP that ends a layer."""

from typing import cast

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_mambaformer import MambaFormerConfig
from .decode_builder_mambaformer import ProgramBuilder
from .decode_workspace_mambaformer import Intermediate
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear
from .mixer_base_mambaformer import MambaFormerMixer
from .ops_eligibility_mambaformer import is_silu, replaceable_by_kernels
from .ops_mambaformer import silu_gate


@replaceable_by_kernels
class MambaFormerMLP(MambaFormerMixer):
    """Gated MLP (arXiv 2002.05202, equation 6)."""

    name = "mlp"

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        width = self.split_sizes(config)["intermediate_size"]
        self.gate_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.up_proj = nn.Linear(config.hidden_size, width, bias=config.mlp_bias)
        self.down_proj = nn.Linear(width, config.hidden_size, bias=config.mlp_bias)
        self.act_fn = ACT2FN[config.hidden_act]

    @classmethod
    def split_sizes(cls, config: MambaFormerConfig) -> dict[str, int]:
        return {"intermediate_size": cast(int, config.intermediate_size)}  # a layer without an MLP has `None`

    def forward(self, hidden_states: torch.Tensor, vectors: dict[str, ScaledBasis]) -> torch.Tensor:
        gates = apply_expert_linear(self.gate_proj, hidden_states, vectors.get("gate_proj"))
        states = apply_expert_linear(self.up_proj, hidden_states, vectors.get("up_proj"))
        inner = silu_gate(gates, states) if is_silu(self.act_fn) else self.act_fn(gates) * states
        return apply_expert_linear(self.down_proj, inner, vectors.get("down_proj"))

    def lower(
        self, program: ProgramBuilder, hidden_states: Intermediate, vectors: dict[str, ScaledBasis]
    ) -> Intermediate:
        gates, states = program.linears(
            hidden_states, (self.gate_proj, vectors.get("gate_proj")), (self.up_proj, vectors.get("up_proj"))
        )
        return program.linear(program.gate(gates, states, self.act_fn), self.down_proj, vectors.get("down_proj"))
