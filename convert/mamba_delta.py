"""Trained Mamba blocks of a hybrid as one file, without the weights of the attention model that it was made from.

`save_blocks(hybrid, path)` writes the file, and `convert(source, blocks=path)` adds the blocks to the source again.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from ..configuration_mambaformer import LAYER_MIXERS, MambaFormerConfig
from ..files_header_mambaformer import json_of
from ..files_mambaformer import is_sealed, read_tensors, sealed, write_tensors

BLOCKS_FORMAT, FORMAT_VERSION = "mambaformer-blocks", 1
# Fields that a hybrid has and its source has not.
OWN_FIELDS = ("layer_types", "sliding_window", "num_sink_tokens")
HEADER_PARTS = ("fields", "beside", "metadata")
MAX_NORM = 1e30  # the sum of squares of larger values is infinite
WEIGHTS_TOLERANCE = 0.05  # relative, of the Frobenius norm; quantizing to 4 bits changes it by far less


@dataclass(frozen=True)
class MambaBlocks:
    """The Mamba blocks of a hybrid.

    Args:
        fields: the configuration's fields for the layers with a block, the blocks' sizes, and the attention window.
        tensors: by their names in the hybrid, `model.layers.{i}.mamba...`.
        beside: the Frobenius norm that each attention output projection in the same layer had in training.
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
    """Writes the Mamba blocks of a hybrid (`MambaFormerForCausalLM`) atomically.

    Raises:
        ValueError: no layer has both attention and Mamba, or the model has layers with Mamba alone.
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
    """Reads a file that `save_blocks` wrote.

    Raises:
        ValueError: the file is damaged or of another kind.
        OSError: the file is missing or not readable.
    """
    tensors, header = read_tensors(Path(path), BLOCKS_FORMAT, FORMAT_VERSION, "`save_blocks(model, path)`")
    if not is_sealed(header, tensors):
        raise ValueError(f"{path} does not hold what was saved (checksum mismatch): it is damaged, fetch it again.")
    try:
        blocks = MambaBlocks(tensors=tensors, **{name: json_of(header[name]) for name in HEADER_PARTS})
        _check_blocks(blocks)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} holds no Mamba blocks that fit each other: {error}") from error
    return blocks


def _check_blocks(blocks: MambaBlocks) -> None:
    """Raises a ValueError unless fields, tensors and norms describe the same layers: all sizes come from tensors."""
    if not all(isinstance(getattr(blocks, part), dict) for part in HEADER_PARTS):
        raise ValueError(f"{list(HEADER_PARTS)} of its header are no JSON objects.")
    fields, kinds = blocks.fields, blocks.fields.get("layer_types")
    if fields.keys() != {*OWN_FIELDS, *block_fields()}:
        raise ValueError(f"its fields are {sorted(fields)[:20]}.")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in LAYER_MIXERS for kind in kinds):
        raise ValueError("its `layer_types` are no list of layer types.")
    layers = [idx for idx, kind in enumerate(kinds) if _has_block(kind)]
    if blocks.beside.keys() != {f"model.layers.{idx}.self_attn.o_proj" for idx in layers}:
        raise ValueError("its norms are not those of the layers in its `layer_types`.")
    if not all(type(norm) in (int, float) and 0 <= norm < MAX_NORM for norm in blocks.beside.values()):
        raise ValueError("its norms are not finite numbers.")
    for name, tensor in blocks.tensors.items():
        if not is_block(name) or not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ValueError(f"`{name[:200]}` is no finite floating-point tensor of a Mamba block.")
    for idx in layers:
        _check_sizes(blocks, f"model.layers.{idx}.mamba")


def _check_sizes(blocks: MambaBlocks, prefix: str) -> None:
    """Compares fields and tensors: the fields decide how much memory is allocated before tensors are copied."""
    names = ("A_log", "conv1d.weight", "dt_proj.weight", "in_proj.weight")
    found = {name: tuple(blocks.tensors[f"{prefix}.{name}"].shape) for name in names}
    config = MambaFormerConfig(
        hidden_size=found["in_proj.weight"][-1] if found["in_proj.weight"] else 0,
        num_attention_heads=1,
        num_hidden_layers=1,
        **{name: blocks.fields[name] for name in block_fields()},
    )
    channels = config.mamba_intermediate_size
    known = {
        "A_log": (channels, config.mamba_d_state),
        "conv1d.weight": (channels, 1, config.mamba_d_conv),
        "dt_proj.weight": (channels, config.mamba_dt_rank),
        "in_proj.weight": (2 * channels, config.hidden_size),
    }
    if found != known:
        raise ValueError(f"the tensors of `{prefix}` have the shapes {found}, and its fields say {known}.")


def _has_block(layer_type: str) -> bool:
    return "recurrent" in LAYER_MIXERS[layer_type]


@torch.no_grad()
def _norms_beside(model: nn.Module) -> dict[str, float]:
    kinds = enumerate(model.config.layer_types)
    names = [f"model.layers.{idx}.self_attn.o_proj" for idx, kind in kinds if _has_block(kind)]
    return {name: model.get_submodule(name).weight.float().norm().item() for name in names}


__all__ = ["MambaBlocks", "load_blocks", "save_blocks"]
