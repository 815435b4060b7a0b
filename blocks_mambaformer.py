"""Mamba blocks that were trained beside the attention of another model, as one file without that model's weights.

`save_blocks(hybrid, path)` writes them, and `convert(source, blocks=path)` puts them onto the source again.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from .configuration_mambaformer import LAYER_MIXERS, MambaFormerConfig
from .files_mambaformer import is_sealed, read_tensors, sealed, write_tensors

BLOCKS_FORMAT, FORMAT_VERSION = "mambaformer-blocks", 1
# What a hybrid has that the model it was made of has not.
OWN_FIELDS = ("layer_types", "sliding_window", "num_sink_tokens")
WEIGHTS_TOLERANCE = 0.05  # relative, of the Frobenius norm; quantizing to 4 bits moves it by far less


@dataclass(frozen=True)
class MambaBlocks:
    """The Mamba blocks of a hybrid.

    Args:
        fields: the fields of the configuration that say where they are, their sizes, and the window beside them.
        tensors: by their names in the hybrid, `model.layers.{i}.mamba...`.
        beside: the Frobenius norm of each attention output projection beside a block, as it was in training.
        metadata: anything that JSON can hold.
    """

    fields: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    beside: Mapping[str, float]
    metadata: Mapping[str, object]

    def check_source(self, model: nn.Module) -> None:
        """Raises a ValueError unless `model`, a hybrid of the same layers, has the weights they were trained on."""
        found = _norms_beside(model)
        for name, norm in self.beside.items():
            if not abs(found[name] - norm) <= WEIGHTS_TOLERANCE * norm:
                raise ValueError(
                    f"The blocks were trained beside other weights: `{name}` has the norm {found[name]:.4g} in the "
                    f"source, and had {norm:.4g}. Use the model that they were trained on."
                )


def is_block(name: str) -> bool:
    """Whether the tensor `name` of a hybrid belongs to a Mamba block or its norm."""
    return ".mamba." in name or ".mamba_layernorm." in name


def block_fields() -> list[str]:
    """Fields of the configuration that describe Mamba blocks."""
    return [name for name in MambaFormerConfig().to_dict() if name.startswith(("mamba_", "time_step_"))]


def save_blocks(
    model: nn.Module,
    path: str | os.PathLike,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Writes the Mamba blocks of a hybrid (`MambaFormerForCausalLM`), whole or not at all.

    Raises:
        ValueError: the model has no Mamba block beside attention, or has Mamba layers of its own.
    """
    config = model.config
    if "linear_attention" in config.layer_types or not any(map(_has_block, config.layer_types)):
        raise ValueError(
            f"`layer_types` are {sorted(set(config.layer_types))}: blocks are what stands beside attention, in "
            "'hybrid' or 'hybrid_sliding' layers; save other models by `save_pretrained`."
        )
    tensors = {name: tensor.to(dtype).cpu() for name, tensor in model.state_dict().items() if is_block(name)}
    header = {
        "format": BLOCKS_FORMAT,
        "version": str(FORMAT_VERSION),
        "fields": json.dumps({name: getattr(config, name) for name in (*OWN_FIELDS, *block_fields())}),
        "beside": json.dumps(_norms_beside(model)),
        "metadata": json.dumps(dict(metadata or {}), allow_nan=False),
    }
    write_tensors(Path(path), tensors, sealed(header, tensors))


def load_blocks(path: str | os.PathLike) -> MambaBlocks:
    """Reads what `save_blocks` wrote.

    Raises:
        ValueError: anything else than such a file, whole and undamaged.
        OSError: it is missing or may not be read.
    """
    tensors, header = read_tensors(Path(path), BLOCKS_FORMAT, FORMAT_VERSION, "`save_blocks(model, path)`")
    if not is_sealed(header, tensors):
        raise ValueError(f"{path} does not hold what was saved (checksum mismatch): it is damaged, fetch it again.")
    return MambaBlocks(
        tensors=tensors, **{name: json.loads(header[name]) for name in ("fields", "beside", "metadata")}
    )


def _has_block(layer_type: str) -> bool:
    return "mamba" in LAYER_MIXERS[layer_type]


@torch.no_grad()
def _norms_beside(model: nn.Module) -> dict[str, float]:
    kinds = enumerate(model.config.layer_types)
    names = [f"model.layers.{idx}.self_attn.o_proj" for idx, kind in kinds if _has_block(kind)]
    return {name: model.get_submodule(name).weight.float().norm().item() for name in names}


__all__ = ["MambaBlocks", "load_blocks", "save_blocks"]
