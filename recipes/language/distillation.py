"""New Mamba mixers learn the attention that a window removes; the teacher is the model without the window.

Teacher and student are one model: with attention that sees everything and without its Mamba mixers, it computes what
the converted model computed (the teacher); with its windows and its mixers, it is the hybrid (the student). Only the
mixers are trained, in float32; all else is frozen (after "The Mamba in the Llama", arXiv 2408.15237).
"""

import torch
from torch import nn
from torch.nn import functional

from mambaformer import MambaFormerForCausalLM
from mambaformer.cache_retention_mambaformer import Span
from mambaformer.mixer_attention_masks_mambaformer import AttentionMasks, make_attention_masks
from mambaformer.modeling_stack_mambaformer import places_of_model

STAGES = ("layers", "logits")


class Distillation(nn.Module):
    """The Mamba mixers of `model` in layers with a window, as the module that is trained and saved.

    Args:
        model: a hybrid whose layers that have a window were given Mamba mixers.
        logits_every: the loss on the teacher's logits takes one token of so many.
        dtype: of all that is frozen.

    `stage` selects the training loss: "layers" or "logits". Evaluation always uses the logits.
    """

    def __init__(self, model: MambaFormerForCausalLM, logits_every: int = 4, dtype: torch.dtype = torch.bfloat16):
        super().__init__()
        self.frozen = [model.requires_grad_(False).to(dtype)]  # a list keeps it out of the checkpoints
        self.window, self.logits_every, self.stage = model.config.sliding_window, logits_every, STAGES[0]
        self.mixers = nn.ModuleDict()
        for idx, layer in enumerate(model.model.layers):
            if layer.spec.is_recurrent:
                mixer = nn.ModuleDict({"mamba": layer.mamba, "mamba_layernorm": layer.mamba_layernorm})
                self.mixers[str(idx)] = mixer.float().requires_grad_()

    @property
    def model(self) -> MambaFormerForCausalLM:
        return self.frozen[0]

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> dict:
        of_layers = self.training and self.stage == "layers"
        return {"loss": self.layers_loss(input_ids) if of_layers else self.logits_loss(input_ids)}

    def prepare(self, input_ids: torch.Tensor) -> tuple[torch.Tensor, dict, tuple[torch.Tensor, torch.Tensor]]:
        """Embeddings (rows, tokens, hidden_size), the attention of each window, cosines and sines."""
        stack, span = self.model.model, Span(input_ids.shape[1])
        hidden_states = stack.embed_tokens(input_ids)
        masks = make_attention_masks(places_of_model(stack), stack.config, span, None, hidden_states, None)
        masks.setdefault(None, AttentionMasks())
        return hidden_states, masks, stack.rotary_emb(hidden_states, span.positions(input_ids.device))

    def attended(self, layer: nn.Module, hidden_states: torch.Tensor, masks: AttentionMasks, rotation) -> torch.Tensor:
        """The output of attention, (rows, tokens, hidden_size)."""
        return layer.self_attn(layer.self_attn_layernorm(hidden_states), {}, masks, rotation)[0]

    def remembered(self, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        """The output of the Mamba mixer, (rows, tokens, hidden_size), in float32."""
        return layer.mamba(layer.mamba_layernorm(hidden_states.float()), {})

    def after_mlp(self, layer: nn.Module, hidden_states: torch.Tensor) -> torch.Tensor:
        return hidden_states + layer.mlp(layer.mlp_layernorm(hidden_states), {})

    def logits(self, hidden_states: torch.Tensor, kept: slice) -> torch.Tensor:
        return self.model.lm_head(self.model.model.norm(hidden_states[:, kept])).float()

    def layers_loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Mean over the mixers of the part of the lost attention that a mixer does not restore.

        Each mixer reads the teacher's own hidden states, so that all of them learn at once, and none from another's
        errors: ||mixer - (attention - attention in the window)||^2 / ||attention - attention in the window||^2.
        """
        hidden_states, masks, rotation = self.prepare(input_ids)
        losses = []
        for layer in self.model.model.layers:
            with torch.no_grad():
                whole = self.attended(layer, hidden_states, masks[None], rotation)
            if layer.spec.is_recurrent:
                with torch.no_grad():
                    seen = self.attended(layer, hidden_states, masks[layer.window], rotation)
                    lost = whole.float() - seen.float()
                given_back = self.remembered(layer, hidden_states + seen)
                losses.append(functional.mse_loss(given_back, lost) / lost.pow(2).mean())
            with torch.no_grad():
                hidden_states = self.after_mlp(layer, hidden_states + whole)
        return torch.stack(losses).mean()

    @torch.no_grad()
    def teacher(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states (rows, tokens, hidden_size) of the model whose attention sees everything."""
        hidden_states, masks, rotation = self.prepare(input_ids)
        for layer in self.model.model.layers:
            hidden_states = hidden_states + self.attended(layer, hidden_states, masks[None], rotation)
            hidden_states = self.after_mlp(layer, hidden_states)
        return hidden_states

    def student(self, input_ids: torch.Tensor) -> torch.Tensor:
        """The last hidden states (rows, tokens, hidden_size) of the hybrid."""
        hidden_states, masks, rotation = self.prepare(input_ids)
        for layer in self.model.model.layers:
            hidden_states = hidden_states + self.attended(layer, hidden_states, masks[layer.window], rotation)
            if layer.spec.is_recurrent:
                hidden_states = hidden_states + self.remembered(layer, hidden_states).to(hidden_states.dtype)
            hidden_states = self.after_mlp(layer, hidden_states)
        return hidden_states

    def logits_loss(self, input_ids: torch.Tensor) -> torch.Tensor:
        """Kullback-Leibler divergence of the hybrid from the teacher, in nats a token, after the first window."""
        kept = slice(self.window, None, self.logits_every)
        with torch.no_grad():
            wanted = self.logits(self.teacher(input_ids), kept).log_softmax(-1)
        found = self.logits(self.student(input_ids), kept).log_softmax(-1)
        return functional.kl_div(found, wanted, reduction="none", log_target=True).sum(-1).mean()
