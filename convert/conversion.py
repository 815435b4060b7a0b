"""`convert(source, ...)`: opens a source, builds the model of its configuration, copies the weights."""

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from torch import nn
from transformers.configuration_utils import PreTrainedConfig

from ..configuration_mambaformer import LAYER_MIXERS, SLIDING_LAYER_TYPES, MambaFormerConfig
from ..files_folders_mambaformer import staged_folder
from ..modeling_mambaformer import MambaFormerForCausalLM
from .families import Family, check_rope
from .gguf import source_of_gguf
from .mamba_delta import MAMBA_FIELDS, MambaDelta, config_of, is_delta_tensor, load_mamba_delta
from .sources import Source, Tokenizer, Weights, check_output_dir, source_of_folder, source_of_model

# The type of an attention layer after a Mamba mixer was added to it.
UPCYCLED = {"full_attention": "hybrid", "sliding_attention": "hybrid_sliding"}


def convert(
    source: nn.Module | str | os.PathLike,
    *,
    upcycle: str | Sequence[int] | None = None,
    window: int | None = None,
    num_sink_tokens: int = 0,
    window_positions: str = "absolute",
    output_dir: str | os.PathLike | None = None,
    dtype: torch.dtype | str | None = None,
    mamba: dict[str, object] | None = None,
    mamba_delta: str | os.PathLike | None = None,
    gguf_file: str | None = None,
    seed: int = 0,
) -> MambaFormerForCausalLM:
    """Returns a MambaFormer with `source`'s weights that computes `source`'s logits.

    The weights are copied; the global random state does not change. A bfloat16 or float16 Mamba whose residual stream
    Transformers keeps in float32 (`residual_in_fp32`) is computed with a residual stream in the model's own dtype.

    Args:
        source: a Llama, Mistral, Qwen2, Mamba or dense Jamba model for causal language modeling, a directory that
            `from_pretrained` reads, or a `*.gguf` file with the architecture llama, qwen2, mamba or jamba; of a split
            model (`...-00001-of-00003.gguf`), any of its files.
        upcycle: attention layers that get a Mamba mixer, `"all"` or their indices. The new output projections start
            at zero, so the logits are the source's until the model is trained.
        window: attention window of these layers; the first `num_sink_tokens` tokens stay visible. The logits are no
            longer the source's: train the new Mamba mixers to recover the tokens that the window removes.
        window_positions: `"relative"` limits the distance to sinks, so that the model reads sequences of any length
            (StreamingLLM); see `MambaFormerConfig`. `window` then needs no `upcycle`: without it, all attention layers
            get the window.
        output_dir: where to save the result, with the tokenizer when `source` is a directory or a file.
        dtype: of the result, by default the source's.
        mamba: `mamba_*` and `time_step_*` fields of the configuration for the new mixers.
        mamba_delta: a file of Mamba weights that were trained with this source's weights (`save_mamba_delta`). The
            file defines the layers and the window, so `upcycle`, `window` and `mamba` must not be passed.
        gguf_file: name of the GGUF file inside the directory `source`.
        seed: of the new mixers' initial weights.

    Raises:
        ValueError: a family, field, tensor or argument cannot be converted; the message names it.
        TypeError: `source` is neither a model nor a path.
    """
    opened = _open(source, gguf_file)
    check_output_dir(output_dir, opened.folder)
    if not isinstance(seed, int) or not -(2**63) <= seed < 2**64:
        raise ValueError(f"`seed` must be an integer of 64 bits, got {seed!r}.")
    delta = None
    if mamba_delta is not None:
        delta = _load_delta(mamba_delta, upcycle, window, num_sink_tokens, mamba)
        upcycle, window, num_sink_tokens, mamba = _as_arguments(delta, opened.family.layer_types(opened.config))
    windows = window, num_sink_tokens, window_positions
    config, new_layers = _target_config(opened.family, opened.config, upcycle, mamba, *windows)
    dtype = _resolve_dtype(dtype)
    tokenizer = opened.tokenizer() if output_dir is not None and opened.tokenizer is not None else None
    weights = opened.weights()
    with torch.device("meta"):
        target = MambaFormerForCausalLM(config)
    origin = _match_tensors(target, weights, opened.family, new_layers)
    target = _build(target, new_layers, dtype or weights.dtype, seed)
    nn.Module.to(target, weights.device)
    _copy_weights(target, weights, origin)
    if delta is None:
        _start_as_identity(target, new_layers)
    else:
        _apply_delta(delta, target)
    vars(target)["generation_config"] = copy.deepcopy(weights.generation_config)
    if output_dir is not None:
        _save(target, Path(output_dir), tokenizer)
    return target.eval()


def _open(source: object, gguf_file: str | None) -> Source:
    if isinstance(source, nn.Module):
        if gguf_file is not None:
            raise ValueError("`gguf_file` names a file in a directory but `source` is a model: leave `gguf_file` out.")
        return source_of_model(source)
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"`source` must be a model, a directory or a GGUF file, got {type(source).__name__}.")
    path = Path(source)
    if gguf_file is not None:
        path = path / gguf_file
    if path.is_file() and path.suffix == ".gguf":
        return source_of_gguf(path)
    if gguf_file is None and (path / "config.json").is_file():
        return source_of_folder(path)
    raise ValueError(
        f"{str(path)!r} is neither a *.gguf file nor a directory with a config.json: give the path of a checkpoint on "
        "this machine (download it first if it is on the Hub)."
    )


def _load_delta(path: str | os.PathLike, upcycle: object, window: object, sinks: object, mamba: object) -> MambaDelta:
    arguments = {"upcycle": upcycle, "window": window, "num_sink_tokens": sinks, "mamba": mamba}
    needless = [name for name, value in arguments.items() if value]
    if needless:
        raise ValueError(
            f"The file of `mamba_delta` defines {needless} too: leave {'it' if len(needless) == 1 else 'them'} out."
        )
    return load_mamba_delta(path)


def _as_arguments(delta: MambaDelta, layer_types: list[str]) -> tuple[list[int], int | None, int, dict[str, object]]:
    """Arguments of `convert` that create the layers of the delta."""
    layers = [idx for idx, kind in enumerate(delta.layer_types) if kind in UPCYCLED.values()]
    mamba = {name: delta.fields[name] for name in MAMBA_FIELDS}
    if "sliding_attention" in layer_types:  # the window is the source's own
        return layers, None, 0, mamba
    window, sinks = (delta.fields[name] for name in ("sliding_window", "num_sink_tokens"))
    return layers, cast("int | None", window), cast(int, sinks), mamba


@torch.no_grad()
def _apply_delta(delta: MambaDelta, target: MambaFormerForCausalLM) -> None:
    """Writes the trained Mamba weights into `target`.

    Raises:
        ValueError: they were trained with another model.
    """
    own = {name: tensor for name, tensor in target.state_dict().items() if is_delta_tensor(name)}
    differ = [name for name, value in delta.fields.items() if getattr(target.config, name) != value]
    differ += sorted(name for name in own.keys() ^ delta.tensors.keys())
    differ += [name for name in own.keys() & delta.tensors.keys() if own[name].shape != delta.tensors[name].shape]
    if differ:
        raise ValueError(
            f"The Mamba weights do not fit the source, in {differ[:5]}: use the source that they were trained with."
        )
    delta.check_source(target)
    for name, tensor in own.items():
        tensor.copy_(delta.tensors[name])


def _resolve_dtype(dtype: torch.dtype | str | None) -> torch.dtype | None:
    """None means the dtype of the source."""
    if dtype in (None, "auto"):
        return None
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point dtype such as 'float32' or 'bfloat16', got {dtype!r}.")
    return resolved


def _target_config(
    family: Family,
    source: PreTrainedConfig,
    upcycle: str | Sequence[int] | None,
    mamba: dict[str, object] | None,
    window: int | None,
    num_sink_tokens: int,
    window_positions: str,
) -> tuple[MambaFormerConfig, list[int]]:
    """The result's configuration, and the layers that get a new Mamba mixer."""
    fields, layer_types = family.config_fields(source), family.layer_types(source)
    check_rope(fields.get("rope_parameters"))
    new_layers = _layers_to_upcycle(upcycle, layer_types)
    fields |= _new_mamba_fields(mamba, new_layers, layer_types)
    streams = window is not None and upcycle is None and window_positions == "relative"
    windowed = [idx for idx, kind in enumerate(layer_types) if kind in UPCYCLED] if streams else new_layers
    fields |= _window_fields(window, num_sink_tokens, windowed, layer_types)
    for layer_idx in windowed:
        layer_types[layer_idx] = layer_types[layer_idx] if window is None else "sliding_attention"
    for layer_idx in new_layers:
        layer_types[layer_idx] = UPCYCLED[layer_types[layer_idx]]
    fields |= _positions_field(window_positions, layer_types)
    is_recurrent = any("recurrent" in LAYER_MIXERS[kind] for kind in layer_types)
    if is_recurrent and fields["hidden_act"] != "silu":
        raise ValueError(
            f"`hidden_act` is {fields['hidden_act']!r} in the source but Mamba mixers compute with 'silu': "
            "only a source without Mamba layers can keep it, converted without `upcycle`."
        )
    return config_of(fields | {"layer_types": layer_types}), new_layers


def _layers_to_upcycle(upcycle: object, layer_types: list[str]) -> list[int]:
    if upcycle is None:
        return []
    able = [layer_idx for layer_idx, kind in enumerate(layer_types) if kind in UPCYCLED]
    if upcycle == "all" and able:
        return able
    if not isinstance(upcycle, (list, tuple)) or not all(type(layer_idx) is int for layer_idx in upcycle):
        hint = "this source has no attention layer" if upcycle == "all" else "give 'all' or a list of layer indices"
        raise ValueError(f"`upcycle` is {upcycle!r}: {hint}.")
    unable = sorted(set(upcycle) - set(able))
    if unable:
        raise ValueError(f"`upcycle` names layers {unable} but the attention layers of this source are {able}.")
    return sorted(set(upcycle))


def _window_fields(
    window: int | None, num_sink_tokens: int, windowed: list[int], layer_types: list[str]
) -> dict[str, object]:
    if window is None:
        if num_sink_tokens:
            raise ValueError("`num_sink_tokens` needs a `window`: without one, attention sees all tokens.")
        return {}
    if not windowed:
        raise ValueError("`window` is for layers that get a Mamba mixer: pass the layers as `upcycle`.")
    if "sliding_attention" in layer_types:
        raise ValueError("The source has sliding layers, and a model has one window: leave `window` out.")
    return {"sliding_window": window, "num_sink_tokens": num_sink_tokens}


def _positions_field(window_positions: str, layer_types: list[str]) -> dict[str, object]:
    if window_positions == "relative" and not any(kind in SLIDING_LAYER_TYPES for kind in layer_types):
        raise ValueError("`window_positions` is for layers with a window, and there are none: pass a `window`.")
    return {"window_positions": window_positions}


def _new_mamba_fields(
    mamba: dict[str, object] | None, new_layers: list[int], layer_types: list[str]
) -> dict[str, object]:
    if not mamba:
        return {}
    unknown = sorted(set(mamba) - set(MAMBA_FIELDS))
    if unknown:
        raise ValueError(f"`mamba` has unknown fields {unknown}: choose from {sorted(MAMBA_FIELDS)}.")
    if not new_layers:
        raise ValueError("`mamba` describes new Mamba mixers but there are none: pass the layers as `upcycle`.")
    if "linear_attention" in layer_types:
        raise ValueError("The source's own Mamba layers fix the sizes of the new mixers: leave `mamba` out.")
    return mamba


def _match_tensors(
    shell: MambaFormerForCausalLM, weights: Weights, family: Family, new_layers: list[int]
) -> dict[str, str]:
    """The source's name of each tensor of `shell`, a model on the meta device, except those of new mixers.

    Raises:
        ValueError: one of the two lacks a tensor or has it in another shape.
    """
    new = tuple(f"model.layers.{layer_idx}.mamba{end}" for layer_idx in new_layers for end in (".", "_layernorm."))
    ours = {name: tensor.shape for name, tensor in shell.state_dict().items() if not name.startswith(new)}
    origin = {name: family.source_name(name) or name for name in ours}
    shapes, used = weights.shapes, set(origin.values())
    differ = [(theirs, ours[name]) for name, theirs in origin.items() if shapes.get(theirs, ours[name]) != ours[name]]
    problems = {
        "missing in the source": sorted(used - shapes.keys()),
        "not used": sorted(shapes.keys() - used),
        "of another shape": sorted(f"{theirs} {[*shapes[theirs]]}, not {[*shape]}" for theirs, shape in differ),
    }
    problems = {problem: names for problem, names in problems.items() if names}
    if problems:
        raise ValueError(
            f"The source's tensors do not match its configuration: {problems}. Pass a complete ...ForCausalLM."
        )
    return origin


def _build(
    shell: MambaFormerForCausalLM, new_layers: list[int], dtype: torch.dtype, seed: int
) -> MambaFormerForCausalLM:
    """Moves `shell` to the CPU and initializes its new mixers; the other tensors are uninitialized memory."""
    nn.Module.to(shell, dtype)
    shell.to_empty(device="cpu")
    shell.tie_weights()
    # Only the CPU's generator is seeded, then restored; `torch.manual_seed` would also seed those of other devices.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for layer_idx in new_layers:
            shell.get_submodule(f"model.layers.{layer_idx}.mamba").apply(shell._init_weights)
    return shell


@torch.no_grad()
def _copy_weights(target: MambaFormerForCausalLM, weights: Weights, origin: dict[str, str]) -> None:
    """Fills each tensor of `target` that `origin` names."""
    tensors = target.state_dict()
    for name, theirs in origin.items():
        tensors[name].copy_(weights.read(theirs))
    if target.config.tie_word_embeddings:
        embedding, head = (weights.read(origin[name]) for name in ("model.embed_tokens.weight", "lm_head.weight"))
        if not torch.equal(embedding, head):
            raise ValueError(
                "`tie_word_embeddings` is true in the source but its embedding and its head differ: "
                "set `config.tie_word_embeddings = False` on the source."
            )


@torch.no_grad()
def _start_as_identity(target: MambaFormerForCausalLM, new_layers: list[int]) -> None:
    """Zeroes the output of each new mixer and copies the norm of the attention in the same layer."""
    tensors = target.state_dict()
    for prefix in (f"model.layers.{layer_idx}" for layer_idx in new_layers):
        for parameter in target.get_submodule(f"{prefix}.mamba.out_proj").parameters():
            parameter.zero_()
        tensors[f"{prefix}.mamba_layernorm.weight"].copy_(tensors[f"{prefix}.self_attn_layernorm.weight"])


def _save(target: MambaFormerForCausalLM, output_dir: Path, tokenizer: Tokenizer | None) -> None:
    """Writes the model and its tokenizer atomically: an interrupted save leaves the folder unchanged."""
    with staged_folder(output_dir) as folder:
        target.save_pretrained(folder.path)
        if tokenizer is not None:
            tokenizer.save_pretrained(folder.path)


__all__ = ["convert"]
