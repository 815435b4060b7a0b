"""A layer: a sequence of steps, each a norm, a mixer and a residual."""

import torch
from transformers.modeling_layers import GradientCheckpointingLayer

from .cache_mambaformer import MambaFormerCache
from .configuration_mambaformer import MambaFormerConfig
from .decode_builder_mambaformer import ProgramBuilder
from .expert_linear_mambaformer import ScaledBasis
from .mixer_attention_masks_mambaformer import AttentionMasks
from .mixer_base_mambaformer import MambaFormerRMSNorm, RecurrentMixer
from .mixer_registry_mambaformer import mixers_of
from .modeling_stack_mambaformer import LayerSpec
from .ops_eligibility_mambaformer import replaceable_by_kernels
from .weights_parallel_mambaformer import CountsReplacements

NO_VECTORS: dict[str, ScaledBasis] = {}


@replaceable_by_kernels
class MambaFormerLayer(CountsReplacements, GradientCheckpointingLayer):
    """A sequence of steps, `hidden_states + mixer(norm(hidden_states))` each, for the mixers of one layer type."""

    _is_replayed = False
    read_by_kernels = ("steps", "window")

    def __init__(self, config: MambaFormerConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        mixers = {mixer.name: mixer for mixer in mixers_of(config, layer_idx)}
        self.steps, self.window = tuple(mixers), config.window(layer_idx)
        self.recurrent = frozenset(name for name, mixer in mixers.items() if issubclass(mixer, RecurrentMixer))
        self.contexts = {name: mixer.context for name, mixer in mixers.items()}
        self.expert_names = {name: f"layers.{layer_idx}.{name}" for name in mixers}
        for name, mixer in mixers.items():
            setattr(self, f"{name}_layernorm", MambaFormerRMSNorm(config.hidden_size, config.rms_norm_eps))
            setattr(self, name, mixer(config, layer_idx))

    @property
    def spec(self) -> LayerSpec:
        """The properties that the layer's part of a cache depends on."""
        return LayerSpec("self_attn" in self.steps, self.window, not self.recurrent.isdisjoint(self.steps))

    @property
    def gradient_checkpointing(self) -> bool:
        """Whether a backward pass replays this layer. Without gradients none does, and the layer may use a cache."""
        return self._is_replayed and torch.is_grad_enabled()

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, is_replayed: bool) -> None:
        self._is_replayed = is_replayed

    def forward(
        self,
        hidden_states: torch.Tensor,
        attention: AttentionMasks | None,
        expert_vectors: dict[str, dict[str, ScaledBasis]],
        position_embeddings: tuple[torch.Tensor, torch.Tensor] | None = None,
        cache: MambaFormerCache | None = None,
        lengths: torch.Tensor | None = None,
        positions: torch.Tensor | None = None,
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        context = {
            "attention": attention,
            "position_embeddings": position_embeddings,
            "cache": cache,
            "lengths": lengths,
            "positions": positions,
        }
        attentions = None
        for name in self.steps:
            hidden_states, weights = self.step(name, hidden_states, expert_vectors, context, **kwargs)
            attentions = weights if attentions is None else attentions
        return hidden_states, attentions

    def step(
        self,
        name: str,
        hidden_states: torch.Tensor,
        expert_vectors: dict[str, dict[str, ScaledBasis]],
        context: dict[str, object],
        **kwargs,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """One step: the hidden states after it, and the attention weights if its mixer returns them."""
        normed = getattr(self, f"{name}_layernorm")(hidden_states)
        arguments = {argument: context[argument] for argument in self.contexts[name]}
        if name == "self_attn":
            arguments |= kwargs  # those of the attention function that a user has chosen
        mixed = getattr(self, name)(normed, self.vectors_of(name, expert_vectors), **arguments)
        mixed, weights = mixed if isinstance(mixed, tuple) else (mixed, None)
        return hidden_states + mixed, weights

    def lower_step(self, name: str, program: ProgramBuilder, vectors: dict[str, dict[str, ScaledBasis]]) -> None:
        """Writes `step` as operations of a decode program; raises `CannotLower` if there are no kernels for it."""
        normed = program.norm(program.residual, getattr(self, f"{name}_layernorm"))
        mixed = getattr(self, name).lower(program, normed, self.vectors_of(name, vectors))
        program.add_to_residual(mixed)

    def vectors_of(self, mixer: str, expert_vectors: dict[str, dict[str, ScaledBasis]]) -> dict[str, ScaledBasis]:
        """Prepared expert vectors of one mixer of this layer, by the names of its linear modules."""
        return expert_vectors.get(self.expert_names[mixer], NO_VECTORS)


__all__ = ["MambaFormerLayer"]
