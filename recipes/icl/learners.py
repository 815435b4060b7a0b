"""Transformer, Mamba and MambaFormer of equal depth and size, out of one configuration, between two linear maps.

Depth is counted as in arXiv 2402.04248: two blocks out of attention, MLP and Mamba are one layer. Mamba has
no MLP and so twice as many blocks of its own; MambaFormer's first Mamba block stands where the Transformer has its
position encoding.
"""

from typing import Any

from torch import Tensor, nn

from mambaformer import MambaFormerConfig, MambaFormerModel
from recipes.icl.tasks import Task

HIDDEN_SIZE, DEPTH = 64, 2
SHARED = {"hidden_size": HIDDEN_SIZE, "num_attention_heads": 4, "initializer_range": HIDDEN_SIZE**-0.5}
ARCHITECTURES = {
    "transformer": {
        "layer_types": ["full_attention"] * DEPTH,
        "intermediate_size": 256,
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    },
    "mamba": {"layer_types": ["linear_attention"] * (2 * DEPTH)},
    "mambaformer": {"layer_types": ["linear_attention"] + ["hybrid"] * DEPTH},
}
TITLES = {"transformer": "Transformer", "mamba": "Mamba", "mambaformer": "MambaFormer"}


def options_of(architecture: str, task: Task) -> dict[str, Any]:
    """The options of `MambaFormerConfig` for one of `ARCHITECTURES`, with the vocabulary of a task."""
    if architecture not in ARCHITECTURES:
        raise ValueError(f"There is no architecture {architecture!r}: choose from {sorted(ARCHITECTURES)}.")
    layers = ARCHITECTURES[architecture]
    return {**SHARED, **layers, "num_hidden_layers": len(layers["layer_types"]), "vocab_size": task.vocab_size or 1}


class InContextLearner(nn.Module):
    """A stack with a linear output layer and, for tasks with vectors as inputs, a linear input layer."""

    def __init__(self, config: MambaFormerConfig, task: Task):
        super().__init__()
        self.model = MambaFormerModel(config)
        self.read_in = nn.Linear(task.width, config.hidden_size) if task.vocab_size is None else None
        self.read_out = nn.Linear(config.hidden_size, task.outputs)

    def forward(self, inputs: Tensor) -> Tensor:
        """Vectors (rows, tokens, width), or ids (rows, tokens) -> answers (rows, tokens, outputs)."""
        fed = {"input_ids": inputs} if self.read_in is None else {"inputs_embeds": self.read_in(inputs)}
        return self.read_out(self.model(**fed, use_cache=False).last_hidden_state)

    def num_parameters(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters())
