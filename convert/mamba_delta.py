"""Trained Mamba weights of a hybrid as one file, a delta to the attention model that the hybrid was made from.

`save_mamba_delta(hybrid, path)` writes the file, and `convert(source, mamba_delta=path)` adds it to the source again.
"""

import json
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor, nn

from ..configuration_mambaformer import LAYER_MIXERS, MambaFormerConfig
from ..files_header_mambaformer import json_of
from ..files_mambaformer import has_valid_checksum, read_tensors, with_checksum, write_tensors
from ..modeling_mambaformer import MambaFormerForCausalLM

DELTA_FORMAT, FORMAT_VERSION = "mambaformer-blocks", 1  # named in version 0.1, which called a delta blocks
# Fields that a hybrid has and its source has not.
OWN_FIELDS = ("layer_types", "sliding_window", "num_sink_tokens")
# The fields of Mamba-1.
MAMBA_FIELDS = ("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank", "mamba_conv_bias", "mamba_proj_bias")
MAMBA_FIELDS += ("mamba_inner_norms", "time_step_min", "time_step_max", "time_step_floor")
HEADER_PARTS = ("fields", "beside", "metadata")
MAX_NORM = 1e30  # the sum of squares of larger values is infinite
WEIGHTS_TOLERANCE = 0.05  # relative, of the Frobenius norm; quantizing to 4 bits changes it by far less


@dataclass(frozen=True)
class MambaDelta:
    """The Mamba weights of a hybrid.

    Args:
        fields: the configuration's fields for the layers with a Mamba mixer, the mixer's sizes, and the window.
        tensors: by their names in the hybrid, `model.layers.{i}.mamba...`.
        attention_norms: the Frobenius norm that each attention output projection in the same layer had in training.
        metadata: values that fit into JSON.
    """

    fields: Mapping[str, object]
    tensors: Mapping[str, Tensor]
    attention_norms: Mapping[str, float]
    metadata: Mapping[str, object]

    @property
    def layer_types(self) -> list[str]:
        return cast(list[str], self.fields["layer_types"])

    def check_source(self, model: MambaFormerForCausalLM) -> None:
        """Refuses a hybrid of the same layers whose attention weights are not those of the training.

        Raises:
            ValueError: names the projection.
        """
        norms = _attention_norms(model)
        for name, norm in self.attention_norms.items():
            if not abs(norms[name] - norm) <= WEIGHTS_TOLERANCE * norm:
                raise ValueError(
                    f"The Mamba weights were trained with other attention weights: `{name}` has the norm "
                    f"{norms[name]:.4g} in the source and had {norm:.4g} in training. Use the source of the training."
                )


def is_delta_tensor(name: str) -> bool:
    """Whether the tensor `name` of a hybrid belongs to a Mamba mixer or its norm."""
    return ".mamba." in name or ".mamba_layernorm." in name


def save_mamba_delta(
    model: MambaFormerForCausalLM,
    path: str | os.PathLike,
    dtype: torch.dtype = torch.bfloat16,
    metadata: Mapping[str, object] | None = None,
) -> None:
    """Writes the Mamba weights of a hybrid atomically.

    Raises:
        ValueError: no layer has both attention and Mamba, or the model has layers with Mamba alone.
    """
    config = model.config
    layer_types = config.layer_types or []
    if "linear_attention" in layer_types or not any(map(_has_mamba, layer_types)):
        raise ValueError(
            f"`layer_types` are {sorted(set(layer_types))}: only 'hybrid' and 'hybrid_sliding' layers have Mamba "
            "weights that can be added to attention; save other models by `save_pretrained`."
        )
    tensors = {name: tensor.to(dtype).cpu() for name, tensor in model.state_dict().items() if is_delta_tensor(name)}
    header = {
        "format": DELTA_FORMAT,
        "version": str(FORMAT_VERSION),
        "fields": json.dumps({name: getattr(config, name) for name in (*OWN_FIELDS, *MAMBA_FIELDS)}),
        "beside": json.dumps(_attention_norms(model)),
        "metadata": json.dumps(dict(metadata or {}), allow_nan=False),
    }
    write_tensors(Path(path), tensors, with_checksum(header, tensors))


def load_mamba_delta(path: str | os.PathLike) -> MambaDelta:
    """Reads a file that `save_mamba_delta` wrote.

    Raises:
        ValueError: the file is damaged or of another kind.
        OSError: the file is missing or not readable.
    """
    tensors, header = read_tensors(Path(path), DELTA_FORMAT, FORMAT_VERSION, "`save_mamba_delta(model, path)`")
    if not has_valid_checksum(header, tensors):
        raise ValueError(f"{path} has another content than was saved (checksum mismatch): fetch it again.")
    try:
        fields, norms, metadata = (json_of(header[name]) for name in HEADER_PARTS)
        delta = MambaDelta(fields, tensors, norms, metadata)
        _check_delta(delta)
    except (KeyError, ValueError) as error:
        raise ValueError(f"{path} is not a valid file of Mamba weights: {error}") from error
    return delta


def _check_delta(delta: MambaDelta) -> None:
    """Raises a `ValueError` unless fields, tensors and norms describe the same layers: sizes come from tensors."""
    if not all(isinstance(part, dict) for part in (delta.fields, delta.attention_norms, delta.metadata)):
        raise ValueError(f"{list(HEADER_PARTS)} of its header are not JSON objects.")
    if delta.fields.keys() != {*OWN_FIELDS, *MAMBA_FIELDS}:
        raise ValueError(f"its fields are {sorted(delta.fields)[:20]}.")
    kinds = delta.fields.get("layer_types")
    if not isinstance(kinds, list) or not all(isinstance(kind, str) and kind in LAYER_MIXERS for kind in kinds):
        raise ValueError("its `layer_types` are not a list of layer types.")
    layers = [idx for idx, kind in enumerate(kinds) if _has_mamba(kind)]
    if delta.attention_norms.keys() != {f"model.layers.{idx}.self_attn.o_proj" for idx in layers}:
        raise ValueError("its norms are not those of the layers in its `layer_types`.")
    if not all(type(norm) in (int, float) and 0 <= norm < MAX_NORM for norm in delta.attention_norms.values()):
        raise ValueError("its norms are not finite numbers.")
    for name, tensor in delta.tensors.items():
        if not is_delta_tensor(name) or not tensor.is_floating_point() or not tensor.float().isfinite().all():
            raise ValueError(f"`{name[:200]}` is not a finite floating-point tensor of a Mamba mixer.")
    for idx in layers:
        _check_sizes(delta, f"model.layers.{idx}.mamba")


def _check_sizes(delta: MambaDelta, prefix: str) -> None:
    """Compares fields and tensors, because fields decide how much memory is allocated before tensors are copied."""
    names = ("A_log", "conv1d.weight", "dt_proj.weight", "in_proj.weight")
    shapes = {name: tuple(delta.tensors[f"{prefix}.{name}"].shape) for name in names}
    sizes = {"num_attention_heads": 1, "num_hidden_layers": 1}
    sizes["hidden_size"] = shapes["in_proj.weight"][-1] if shapes["in_proj.weight"] else 0
    config = config_of(sizes | {name: delta.fields[name] for name in MAMBA_FIELDS})
    channels = config.mamba_intermediate_size
    described = {
        "A_log": (channels, config.mamba_d_state),
        "conv1d.weight": (channels, 1, config.mamba_d_conv),
        "dt_proj.weight": (channels, config.mamba_dt_rank),
        "in_proj.weight": (2 * channels, config.hidden_size),
    }
    if shapes != described:
        raise ValueError(f"the tensors of `{prefix}` have the shapes {shapes}, and its fields describe {described}.")


def config_of(fields: dict) -> MambaFormerConfig:
    """The configuration with these fields, which checks them."""
    return MambaFormerConfig(**fields)


def _has_mamba(layer_type: str) -> bool:
    return "recurrent" in LAYER_MIXERS[layer_type]


@torch.no_grad()
def _attention_norms(model: MambaFormerForCausalLM) -> dict[str, float]:
    kinds = enumerate(model.config.layer_types or [])
    names = [f"model.layers.{idx}.self_attn.o_proj" for idx, kind in kinds if _has_mamba(kind)]
    return {name: _weight_of(model, name).float().norm().item() for name in names}


def _weight_of(model: nn.Module, name: str) -> Tensor:
    return cast(Tensor, model.get_submodule(name).weight)


__all__ = ["MambaDelta", "load_mamba_delta", "save_mamba_delta"]
