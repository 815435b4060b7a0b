"""GGUF files as sources of `convert`. Every key that changes the result is read, or refused by name.

Names and layouts are as llama.cpp's converter writes them.
"""

import math
import re
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor
from transformers import AutoConfig, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig

from .families import FAMILIES
from .rope import rope_from_gguf
from .sources import Source, Weights, read_tokenizer

if TYPE_CHECKING:
    from gguf import GGUFReader, ReaderField

SPLIT_NAME = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.gguf")
ROPE_FACTORS = "rope_freqs.weight"
# Start of our tensors' names -> start of the file's, for every family.
NAMES = {
    "model.embed_tokens.": "token_embd.",
    "model.norm.": "output_norm.",
    "lm_head.": "output.",
    "model.layers.*.self_attn_layernorm.": "blk.*.attn_norm.",
    "model.layers.*.self_attn.q_proj.": "blk.*.attn_q.",
    "model.layers.*.self_attn.k_proj.": "blk.*.attn_k.",
    "model.layers.*.self_attn.v_proj.": "blk.*.attn_v.",
    "model.layers.*.self_attn.o_proj.": "blk.*.attn_output.",
    "model.layers.*.mamba_layernorm.": "blk.*.attn_norm.",
    "model.layers.*.mamba.in_proj.": "blk.*.ssm_in.",
    "model.layers.*.mamba.conv1d.": "blk.*.ssm_conv1d.",
    "model.layers.*.mamba.x_proj.": "blk.*.ssm_x.",
    "model.layers.*.mamba.dt_proj.": "blk.*.ssm_dt.",
    "model.layers.*.mamba.dt_layernorm.": "blk.*.ssm_dt_norm.",
    "model.layers.*.mamba.b_layernorm.": "blk.*.ssm_b_norm.",
    "model.layers.*.mamba.c_layernorm.": "blk.*.ssm_c_norm.",
    "model.layers.*.mamba.A_log": "blk.*.ssm_a",
    "model.layers.*.mamba.D": "blk.*.ssm_d",
    "model.layers.*.mamba.out_proj.": "blk.*.ssm_out.",
    "model.layers.*.mlp_layernorm.": "blk.*.ffn_norm.",
    "model.layers.*.mlp.gate_proj.": "blk.*.ffn_gate.",
    "model.layers.*.mlp.up_proj.": "blk.*.ffn_up.",
    "model.layers.*.mlp.down_proj.": "blk.*.ffn_down.",
}
# Keys that a family reads, and neutral keys. Any other key of the architecture is refused when it is set, so that
# nothing in a file about its model is ignored.
_SIZES = {"block_count", "embedding_length", "context_length", "vocab_size", "attention.layer_norm_rms_epsilon"}
_ATTENTION = {"feed_forward_length", "attention.head_count", "attention.head_count_kv"}
_HEADS = {"attention.key_length", "attention.value_length", "rope.dimension_count"}
_ROPE = {"rope.freq_base", "rope.scale_linear"} | {
    f"rope.scaling.{name}" for name in ("type", "factor", "attn_factor", "original_context_length")
}
_ROPE |= {f"rope.scaling.yarn_{name}" for name in ("ext_factor", "attn_factor", "beta_fast", "beta_slow")}
_ROPE |= {"rope.scaling.yarn_log_multiplier"}
_SSM = {"ssm.conv_kernel", "ssm.inner_size", "ssm.state_size", "ssm.time_step_rank"}
HARMLESS = {"tensor_data_layout", "rope.scaling.finetuned", "expert_used_count", "attention.layer_norm_epsilon"}
NEUTRAL = {"logit_scale": (0, 1), "residual_scale": (0, 1), "embedding_scale": (0, 1), "attention.causal": (True,)}


@dataclass(frozen=True)
class Architecture:
    """The rules for files of one `general.architecture`.

    Args:
        keys: the keys that are read, without the architecture's name.
        fields: the file -> fields of Transformers' configuration, without the sizes that all architectures have.
        neighbours_rotate: whether RoPE rotates neighbouring elements of a head in the file, not its halves.
    """

    keys: set[str]
    fields: Callable[["GGUFFile"], dict[str, object]]
    neighbours_rotate: bool = False


class GGUFFile:
    """The metadata and tensors of a GGUF file, or of all files of a split model.

    Args:
        path: the file, or any file of the split model.

    Raises:
        ValueError: the file is not a GGUF file, damaged, or a file of the split model is missing.
        OSError: the file may not be read.
        ImportError: the package `gguf` is not installed.
    """

    def __init__(self, path: Path):
        readers = _read_parts(path)
        first = next(iter(readers.values()))
        self.path = next(iter(readers))
        values = {name: _value(name, entry) for name, entry in first.fields.items()}
        self.architecture = values.get("general.architecture")
        prefix = f"{self.architecture}."
        # Values of any type: each is checked where it is read.
        self.metadata: dict = {
            key.removeprefix(prefix): value for key, value in values.items() if key.startswith(prefix)
        }
        self.general: dict = {key: value for key, value in values.items() if not key.startswith(prefix)}
        self.has_tokenizer = "tokenizer.ggml.tokens" in values
        self.tensors = {tensor.name: tensor for reader in readers.values() for tensor in reader.tensors}
        count = sum(len(reader.tensors) for reader in readers.values())
        if len(self.tensors) != count:
            raise ValueError(f"{self.path}: two files of the split model hold the same tensor: fetch them again.")

    def integer(self, key: str, default: int | None = None) -> int:
        """A positive integer of the metadata; an array must hold the same number for all layers."""
        value = self.metadata.get(key, default)
        if isinstance(value, list) and value and len(set(value)) == 1:
            value = value[0]
        if isinstance(value, list):
            raise ValueError(
                f"`{key}` in {self.path} differs by layer: only a model with equal layers can be converted."
            )
        return self._checked(key, value, int)

    def number(self, key: str) -> float:
        """A positive number of the metadata."""
        return self._checked(key, self.metadata.get(key), (int, float))

    def _checked(self, key: str, value, kind: type | tuple[type, ...]):
        if value is None:
            raise ValueError(f"{self.path} has no `{self.architecture}.{key}`: the file is incomplete, make it again.")
        if not isinstance(value, kind) or isinstance(value, bool) or not 0 < value < math.inf:
            raise ValueError(f"`{self.architecture}.{key}` in {self.path} is {value!r} but must be positive.")
        return value

    def shape(self, name: str) -> torch.Size:
        """Shape of a tensor in PyTorch's order; GGUF stores the fastest dimension first."""
        shape = [int(size) for size in reversed(self.tensors[name].shape.tolist())]
        if name.endswith("ssm_conv1d.weight"):
            shape.insert(1, 1)
        return torch.Size(shape)

    def read(self, name: str) -> Tensor:
        """A tensor, dequantized to float32; unquantized tensors keep their dtype."""
        from_gguf = _package().dequantize
        tensor = self.tensors[name]
        try:
            values = from_gguf(tensor.data, tensor.tensor_type)
        except Exception as error:
            raise ValueError(
                f"The tensor `{name}` in {self.path} is stored as {tensor.tensor_type.name}, which the installed "
                f"package gguf cannot read: {error}. Update it by `pip install -U gguf`."
            ) from error
        return torch.from_numpy(values.copy()).reshape(self.shape(name))


def source_of_gguf(path: Path) -> Source:
    """A GGUF file as a source; for a split model, the path of any of its files. No tensor is read yet.

    Raises:
        ValueError: the file cannot be read or converted; the message names the key or the tensor.
        OSError: the file may not be read.
        ImportError: the package `gguf` is not installed.
    """
    file = GGUFFile(path)
    name = str(file.architecture)
    if name not in ARCHITECTURES or file.general.get("general.type", "model") != "model":
        raise ValueError(
            f"{file.path} holds a {file.general.get('general.type', 'model')!r} with `general.architecture` "
            f"{file.architecture!r}: convert a model with one of {', '.join(sorted(ARCHITECTURES))}."
        )
    architecture = ARCHITECTURES[name]
    _refuse_other_keys(file, architecture)
    config = _config(file, architecture)
    family = replace(FAMILIES[name], names=NAMES)
    tokenizer = read_tokenizer(file.path.parent, gguf_file=file.path.name) if file.has_tokenizer else None
    return Source(family, config, lambda: _weights(file, architecture, config), tokenizer)


def _weights(file: GGUFFile, architecture: Architecture, config: PreTrainedConfig) -> Weights:
    shapes = {name: file.shape(name) for name in file.tensors if name != ROPE_FACTORS}
    if config.tie_word_embeddings and "token_embd.weight" in shapes:
        shapes["output.weight"] = shapes["token_embd.weight"]
    heads = {}
    if architecture.neighbours_rotate:
        heads = {"attn_q": config.num_attention_heads, "attn_k": config.num_key_value_heads}

    def read(name: str) -> Tensor:
        stored = "token_embd.weight" if config.tie_word_embeddings and name == "output.weight" else name
        tensor = file.read(stored)
        if name.endswith("ssm_a"):
            if not bool((tensor < 0).all()):
                raise ValueError(f"`{name}` in {file.path} holds decay rates that are not negative: fetch it again.")
            return (-tensor).log()
        for projection, count in heads.items():
            if f".{projection}." in name:
                return tensor.unflatten(0, (count, -1, 2)).transpose(1, 2).reshape(tensor.shape)
        return tensor

    generation_config = GenerationConfig.from_model_config(config)
    return Weights(shapes, read, torch.float32, torch.device("cpu"), generation_config)


def _refuse_other_keys(file: GGUFFile, architecture: Architecture) -> None:
    read_or_harmless = architecture.keys | HARMLESS
    other = {key: value for key, value in file.metadata.items() if key not in read_or_harmless}
    used = {key: value for key, value in other.items() if not _is_neutral(key, value)}
    for key, value in file.metadata.items():
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if key in _ROPE - {"rope.scaling.type"} and not is_number:
            raise ValueError(f"`{file.architecture}.{key}` in {file.path} is {value!r} but must be a number.")
    if used:
        names = {f"{file.architecture}.{key}": value for key, value in sorted(used.items())}
        raise ValueError(f"{file.path} has {names}: a MambaFormer cannot compute this.")


def _is_neutral(key: str, value: object) -> bool:
    if isinstance(value, list):
        return all(_is_neutral(key, one) for one in value)
    return value in NEUTRAL[key] if key in NEUTRAL else not value


def _config(file: GGUFFile, architecture: Architecture) -> PreTrainedConfig:
    """Transformers' configuration of the file's model."""
    layers = file.integer("block_count")
    if layers > len(file.tensors):
        raise ValueError(f"{file.path} has {len(file.tensors)} tensors for {layers} blocks: tensors are missing.")
    fields = {
        "num_hidden_layers": layers,
        "hidden_size": file.integer("embedding_length"),
        "vocab_size": _vocab_size(file),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    ids = {"bos_token_id": "bos", "eos_token_id": "eos", "pad_token_id": "padding"}
    fields |= {name: file.general.get(f"tokenizer.ggml.{key}_token_id") for name, key in ids.items()}
    fields |= architecture.fields(file)
    try:
        return AutoConfig.for_model(str(file.architecture), **fields)
    except Exception as error:  # its checks raise errors of several kinds
        raise ValueError(f"The sizes in {file.path} fit no {file.architecture} of Transformers: {error}") from error


def _vocab_size(file: GGUFFile) -> int:
    if "token_embd.weight" not in file.tensors:
        raise ValueError(f"{file.path} lacks the tensor `token_embd.weight`: give a file that holds a complete model.")
    rows = file.shape("token_embd.weight")[0]
    size = file.integer("vocab_size", rows)
    if size != rows:
        raise ValueError(f"`{file.architecture}.vocab_size` in {file.path} is {size} but the embedding has {rows}.")
    return size


def _attention_fields(file: GGUFFile) -> dict[str, object]:
    return {
        "intermediate_size": file.integer("feed_forward_length"),
        "num_attention_heads": file.integer("attention.head_count"),
        "max_position_embeddings": file.integer("context_length"),
        "rms_norm_eps": file.number("attention.layer_norm_rms_epsilon"),
    }


def _llama_fields(file: GGUFFile) -> dict[str, object]:
    fields = _qwen2_fields(file)
    biases = {"attention_bias": "blk.0.attn_q.bias", "mlp_bias": "blk.0.ffn_gate.bias"}
    return fields | {field: name in file.tensors for field, name in biases.items()}


def _qwen2_fields(file: GGUFFile) -> dict[str, object]:
    heads = file.integer("attention.head_count")
    head_dim = _head_dim(file, heads)
    factors = file.read(ROPE_FACTORS) if ROPE_FACTORS in file.tensors else None
    return _attention_fields(file) | {
        "num_key_value_heads": file.integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rope_parameters": rope_from_gguf(file.metadata, head_dim, factors),
    }


def _head_dim(file: GGUFFile, heads: int) -> int:
    """Width of a head: from the metadata, or from the number of rows of the query projection."""
    rows = file.shape("blk.0.attn_q.weight")[0] if "blk.0.attn_q.weight" in file.tensors else 0
    usual = rows // heads or file.integer("embedding_length") // heads
    sizes = {key: file.integer(key, usual) for key in ("attention.key_length", "attention.value_length")}
    sizes["rope.dimension_count"] = file.integer("rope.dimension_count", sizes["attention.key_length"])
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"{file.path} has heads of {sizes}: a MambaFormer's queries, keys and values have one size, and RoPE "
            "rotates all channels of a head."
        )
    return sizes["attention.key_length"]


def _ssm_fields(file: GGUFFile) -> dict[str, object]:
    """Fields of Mamba layers, by their names in Jamba's configuration."""
    inner, hidden = file.integer("ssm.inner_size"), file.integer("embedding_length")
    if inner % hidden:
        raise ValueError(f"`ssm.inner_size` in {file.path} is {inner}: it must be a multiple of {hidden}, the width.")
    prefix = next((re.sub("ssm_in.*", "", name) for name in file.tensors if name.endswith("ssm_in.weight")), "")
    return {
        "mamba_d_state": file.integer("ssm.state_size"),
        "mamba_d_conv": file.integer("ssm.conv_kernel"),
        "mamba_expand": inner // hidden,
        "mamba_dt_rank": file.integer("ssm.time_step_rank"),
        "mamba_conv_bias": f"{prefix}ssm_conv1d.bias" in file.tensors,
        "mamba_proj_bias": f"{prefix}ssm_in.bias" in file.tensors,
    }


def _mamba_fields(file: GGUFFile) -> dict[str, object]:
    ours = _ssm_fields(file)
    fields = {theirs: ours[name] for name, theirs in FAMILIES["mamba"].fields.items() if name in ours}
    return fields | {"layer_norm_epsilon": file.number("attention.layer_norm_rms_epsilon")}


def _jamba_fields(file: GGUFFile) -> dict[str, object]:
    counts = file.metadata.get("attention.head_count_kv")
    layers = file.integer("block_count")
    by_layer = counts if isinstance(counts, list) and len(counts) == layers else []
    heads, places = sorted(set(by_layer) - {0}), [idx for idx, count in enumerate(by_layer) if count]
    period = places[1] - places[0] if len(places) > 1 else layers
    if len(heads) != 1 or places != list(range(places[0], layers, period)) or places[0] >= period:
        raise ValueError(
            f"`attention.head_count_kv` in {file.path} is {counts}: it must be a list with a number for each layer, 0 "
            "for Mamba, with attention layers at equal distances."
        )
    return {
        **_attention_fields(file),
        **_ssm_fields(file),
        "num_key_value_heads": heads[0],
        "attn_layer_offset": places[0],
        "attn_layer_period": period,
        "num_experts": 1,
    }


ARCHITECTURES = {
    "llama": Architecture(_SIZES | _ATTENTION | _HEADS | _ROPE, _llama_fields, neighbours_rotate=True),
    "qwen2": Architecture(_SIZES | _ATTENTION | _HEADS | _ROPE, _qwen2_fields),
    "mamba": Architecture(_SIZES | _SSM, _mamba_fields),
    "jamba": Architecture(_SIZES | _ATTENTION | _SSM, _jamba_fields),
}


def _read_parts(path: Path) -> dict[Path, "GGUFReader"]:
    """The file, or all files of its split model in order: path -> reader."""
    reader = _reader(path)
    count = _split(reader, "count") or 1
    if count <= 1:
        return {path: reader}
    name = SPLIT_NAME.fullmatch(path.name)
    if name is None or int(name["count"]) != count:
        raise ValueError(
            f"{path} is one of {count} files of a split model but is not named ...-00001-of-{count:05}.gguf: restore "
            "its name, and put all files into one folder."
        )
    paths = [path.with_name(f"{name['stem']}-{number:05}-of-{count:05}.gguf") for number in range(1, count + 1)]
    missing = [str(part.name) for part in paths if not part.is_file()]
    if missing:
        raise ValueError(f"{path} is one of {count} files of a split model: fetch the others, {missing}.")
    readers = {part: reader if part == path else _reader(part) for part in paths}
    for number, (part, of_part) in enumerate(readers.items()):
        if (_split(of_part, "count"), _split(of_part, "no")) != (count, number):
            raise ValueError(f"{part} is not file {number + 1} of {count} by its own header: fetch it again.")
    announced = _split(reader, "tensors.count")
    held = sum(len(of_part.tensors) for of_part in readers.values())
    if announced not in (None, held):
        raise ValueError(
            f"The {count} files of {path} hold {held} tensors and announce {announced}: fetch them again."
        )
    return readers


def _split(reader: "GGUFReader", key: str) -> int | None:
    entry = reader.fields.get(f"split.{key}")
    value = None if entry is None else entry.contents()
    if value is not None and not isinstance(value, int):
        raise ValueError(f"`split.{key}` in the GGUF file is {value!r} but must be a number: fetch the file again.")
    return value


def _reader(path: Path) -> "GGUFReader":
    with path.open("rb") as file:  # errors of a missing file or of permissions reach the user
        start = file.read(4)
    if start != b"GGUF":
        raise ValueError(f"{path} is not a GGUF file: it starts with {start!r}. Fetch it again.")
    try:
        return _package().GGUFReader(path)
    except ImportError:
        raise
    except Exception as error:  # the package has no error class: a truncated file raises any of six classes
        raise ValueError(
            f"{path} is damaged or cut short, or of an unknown version of GGUF ({type(error).__name__}: {error}): "
            "fetch it again."
        ) from error


def _package():
    try:
        import gguf
    except ImportError as error:
        raise ImportError("GGUF files need the package gguf: run `pip install mambaformer[demo]`.") from error
    return gguf


def _value(name: str, entry: "ReaderField") -> object:
    """The Python value of a key; `None` for long lists of the tokenizer."""
    if name.startswith("tokenizer.") and len(entry.data) > 1:
        return None
    value = entry.contents()
    values = value if isinstance(value, list) else [value]
    if entry.types[-1].name == "FLOAT32":  # the shortest decimal with this float32 value, so 0.1 reads as 0.1
        values = [float(str(np.float32(one))) for one in values]
    return values if isinstance(value, list) else values[0]


__all__ = ["GGUFFile", "source_of_gguf"]
