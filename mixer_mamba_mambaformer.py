"""Mamba-1, the selective state space mixer."""

import functools
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor, nn
from transformers import initialization as init

from .cache_keys_mambaformer import StateSpec
from .cache_states_quantized_mambaformer import POSITIONS
from .configuration_mambaformer import MambaFormerConfig
from .decode_builder_mambaformer import Columns, ProgramBuilder
from .decode_workspace_mambaformer import Intermediate
from .expert_bases_mambaformer import at_least_float32
from .expert_linear_mambaformer import ScaledBasis, apply_expert_linear
from .mixer_base_mambaformer import Lengths, MambaFormerRMSNorm, RecurrentMixer, States
from .mixer_parts_mambaformer import MambaFormerConv1d, init_step_bias
from .ops_eligibility_mambaformer import is_replaceable, replaceable_by_kernels
from .ops_mambaformer import conv_window, rounded_scan, selective_scan
from .weights_parallel_mambaformer import mesh_of_inputs, used_by_shards


@replaceable_by_kernels
class MambaFormerMambaMixer(RecurrentMixer):
    """Selective state space mixer, Mamba-1 (arXiv 2312.00752, algorithm 2), optionally with Jamba's inner norms."""

    name = "mamba"
    read_by_kernels = ("has_inner_norms", "rank", "state_size")

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__(config, layer_idx)
        channels, self.state_size = config.mamba_intermediate_size, config.mamba_d_state
        self.rank = cast(int, config.mamba_dt_rank)  # the configuration fills in "auto"
        self.in_proj = nn.Linear(config.hidden_size, 2 * channels, bias=config.mamba_proj_bias)
        self.conv1d = MambaFormerConv1d(channels, config.mamba_d_conv, config.mamba_conv_bias)
        self.x_proj = nn.Linear(channels, self.rank + 2 * self.state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, channels, bias=True)
        self.A_log = nn.Parameter(torch.empty(channels, self.state_size))
        self.D = nn.Parameter(torch.ones(channels))
        self.out_proj = nn.Linear(channels, config.hidden_size, bias=config.mamba_proj_bias)
        if config.mamba_inner_norms:
            self.dt_layernorm = MambaFormerRMSNorm(self.rank, config.rms_norm_eps)
            self.b_layernorm = MambaFormerRMSNorm(self.state_size, config.rms_norm_eps)
            self.c_layernorm = MambaFormerRMSNorm(self.state_size, config.rms_norm_eps)
        self.has_inner_norms = config.mamba_inner_norms

    @classmethod
    def split_sizes(cls, config: MambaFormerConfig) -> dict[str, int]:
        return {"mamba_expand * hidden_size": config.mamba_intermediate_size}

    @torch.no_grad()
    def init_mixer_weights(self, config: MambaFormerConfig) -> None:
        """S4D-real and the step sizes of the paper (section 3.6): A = -(1 ... N), dt log-uniform in its range."""
        states = torch.arange(1, self.state_size + 1, dtype=torch.float32, device=self.A_log.device)
        init.copy_(self.A_log, torch.log(states).expand_as(self.A_log))
        init.ones_(self.D)
        init.uniform_(self.dt_proj.weight, -(self.rank**-0.5), self.rank**-0.5)
        init_step_bias(self.dt_proj.bias, config)

    def before(self, hidden_states: Tensor, vectors: dict[str, ScaledBasis]) -> tuple[Tensor, ...]:
        """Inputs of the convolution and the gate, (rows, tokens, channels) each."""
        return apply_expert_linear(self.in_proj, hidden_states, vectors.get("in_proj")).chunk(2, dim=-1)

    def recur(
        self,
        states: States,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths = None,
        positions: Tensor | None = None,
    ) -> tuple[Tensor, States, dict[str, Tensor] | None]:
        """Convolution and selective scan, gated."""
        return self._recur(selective_scan, states, inputs, vectors, lengths, positions, positions)

    def recur_rounded(
        self,
        states: States,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths,
        positions: Tensor,
    ) -> tuple[Tensor, States, dict[str, Tensor] | None]:
        return self._recur(rounded_scan, states, inputs, vectors, lengths, None, positions)

    def _recur(
        self,
        scan: Callable[..., tuple[Tensor, Tensor]],
        states: States,
        inputs: tuple[Tensor, ...],
        vectors: dict[str, ScaledBasis],
        lengths: Lengths,
        conv_positions: Tensor | None,
        positions: Tensor | None,
    ) -> tuple[Tensor, States, dict[str, Tensor] | None]:
        x, gate = inputs
        u, window = self.conv1d(x, states.get("conv"), lengths, conv_positions)
        dt, B, C = self.selection(u, vectors)
        options = {"lengths": lengths, "dt_softplus": True, "A_is_log": True, "positions": positions}
        y, state = scan(u, dt, self.A_log, B, C, self.D, gate, states.get("ssm"), **options)
        # `advance` does not call the module of the convolution.
        tape = {"x": x, "u": u, "dt": dt, "B": B} if is_replaceable(self.conv1d) else None
        return y, {"conv": window, "ssm": state}, tape

    def advance(self) -> Callable[[States, dict[str, Tensor], Lengths], States]:
        A = -torch.exp(self.A_log.to(at_least_float32(self.A_log.dtype)))  # a copy: training may go on
        return functools.partial(_advance_states, A, self.conv1d.kernel_size[0])

    def advance_rounded(self) -> Callable[[States, dict[str, Tensor], Lengths], States]:
        return self.advance()  # which rounds if the tape has positions

    def after(self, mixed: Tensor, inputs: tuple[Tensor, ...], vectors: dict[str, ScaledBasis]) -> Tensor:
        return apply_expert_linear(self.out_proj, mixed, vectors.get("out_proj"))

    def lower(
        self, program: ProgramBuilder, hidden_states: Intermediate, vectors: dict[str, ScaledBasis]
    ) -> Intermediate:
        inputs = program.linear(hidden_states, self.in_proj, vectors.get("in_proj"))
        channels = inputs.width // 2
        x, gate = Columns(inputs, 0, channels), Columns(inputs, channels, channels)
        u = program.conv_step(x, self.conv1d, "conv")
        selected = program.linear(u, self.x_proj, vectors.get("x_proj"))
        norms = [self.dt_layernorm, self.b_layernorm, self.c_layernorm] if self.has_inner_norms else []
        dt, B, C = program.inner_norms(selected, (self.rank, self.state_size, self.state_size), norms)
        dt = program.linear(dt, self.dt_proj, vectors.get("dt_proj"))
        y = program.selective_scan_step(u, dt, B, C, gate, self, "ssm")
        return program.linear(y, self.out_proj, vectors.get("out_proj"))

    def state_specs(self) -> dict[str, StateSpec]:
        channels, _, kernel_size = self.conv1d.weight.shape
        return {
            "conv": StateSpec((kernel_size - 1, channels)),
            "ssm": StateSpec((channels, self.state_size), is_wide=True),
        }

    def selection(self, inputs: Tensor, vectors: dict[str, ScaledBasis]) -> tuple[Tensor, ...]:
        """The step sizes before softplus (rows, tokens, channels), and B and C (rows, tokens, state size)."""
        sizes = [self.rank, self.state_size, self.state_size]
        dt, B, C = apply_expert_linear(self.x_proj, inputs, vectors.get("x_proj")).split(sizes, dim=-1)
        if self.has_inner_norms:
            dt, B, C = self.dt_layernorm(dt), self.b_layernorm(B), self.c_layernorm(C)
        mesh = mesh_of_inputs(self.x_proj)
        if mesh is not None:
            B, C = used_by_shards(B, mesh), used_by_shards(C, mesh)
        return apply_expert_linear(self.dt_proj, dt, vectors.get("dt_proj")), B, C


def _advance_states(A: Tensor, kernel_size: int, states: States, tape: dict[str, Tensor], lengths: Lengths) -> States:
    window = conv_window(tape["x"], kernel_size, states.get("conv"), lengths)
    u, dt, B, state = tape["u"], tape["dt"], tape["B"], states.get("ssm")
    scan, positions = (rounded_scan, tape[POSITIONS]) if POSITIONS in tape else (selective_scan, None)
    options = {"lengths": lengths, "dt_softplus": True, "positions": positions}
    _, state = scan(u, dt, A, B, B, initial_state=state, **options)
    return {"conv": window, "ssm": state}
