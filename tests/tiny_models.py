"""Models of the tests: random ones with large weights, trained ones, and expert vectors for them."""

import atexit
import functools
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from torch import nn

import gated_linear_attention  # noqa: F401  (adds a recurrent mixer)
from loops import normal
from mambaformer import ExpertVector, MambaFormerConfig, MambaFormerForCausalLM, convert
from mambaformer.convert import find_smollm2
from patterns import CACHE_VARIANTS, PATTERNS, ROOT, tiny_config


def load_trained(folder, **options):
    """The model of a folder in the repo, in float64 and eval mode; the laws read on behind any end of text."""
    if not (folder / "model.safetensors").is_file():
        raise FileNotFoundError(f"{folder} is part of the repo and the laws run on its weights, but it is missing")
    model = MambaFormerForCausalLM.from_pretrained(folder, dtype=torch.float64, **options).eval()
    model.generation_config.eos_token_id = None
    return model


@functools.cache
def folder_of_smollm2():
    """SmolLM2 with the trained blocks, as a folder with its tokenizer."""
    blocks = ROOT / "checkpoints" / "smollm2-hybrid" / "mamba_delta.safetensors"
    if not blocks.is_file():
        raise FileNotFoundError(f"{blocks} is part of the repo and the laws run on its weights, but it is missing")
    folder = Path(tempfile.mkdtemp(prefix="smollm2-hybrid-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    convert(find_smollm2(), mamba_delta=blocks, output_dir=folder)
    return folder


def load_smollm2(num_layers=6, window=48):
    """Its first layers, half of them with a window, which is shortened so that the tests' texts are far longer."""
    config = MambaFormerConfig.from_pretrained(folder_of_smollm2())
    config.num_hidden_layers, config.layer_types = num_layers, config.layer_types[:num_layers]
    config.sliding_window = window
    return load_trained(folder_of_smollm2(), config=config)


# Trained models, by what loads them. The tokenizer of a model is found in the folder that it names as its own
# (`name_or_path`).
TRAINED = {
    "trained_tiny": functools.partial(load_trained, ROOT / "checkpoints" / "mambaformer-tiny"),
    "trained_smollm2": load_smollm2,
}
TRAINED_SMALL = ["trained_tiny"]  # small enough for the oracle, and for decomposing all weights
ALL_TRAINED_PARAMS = [*TRAINED_SMALL, pytest.param("trained_smollm2", marks=pytest.mark.long)]
# What a law is tried on; a trained model stands beside the patterns as one more.
MODELS = [*PATTERNS, *TRAINED_SMALL]

MAIN_PATTERNS = ["mamba", "paper", "llama", "everything"]

every_pattern = pytest.mark.parametrize("pattern", MODELS)
every_random_pattern = pytest.mark.parametrize("pattern", PATTERNS)
every_cache = pytest.mark.parametrize("variant", CACHE_VARIANTS)
main_patterns = pytest.mark.parametrize("pattern", [*MAIN_PATTERNS, *TRAINED_SMALL])
without_kernels_too = pytest.mark.without_kernels_too


def random_model(config, seed=0, loudness=1.5):
    """A float64 model in eval mode, every weight drawn anew and large: a wrong state or key moves logits by O(1).

    `loudness` is by how much linear modules amplify; below 1, roundings do not grow from layer to layer.
    """
    torch.manual_seed(seed)
    model = MambaFormerForCausalLM(config).to(torch.float64).eval()
    source = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            parameter.copy_(_loud_values(name, parameter.shape, source, loudness))
    return model


def _loud_values(name, shape, source, loudness):
    noise = torch.randn(shape, generator=source, dtype=torch.float64)
    if name.endswith("A_log"):  # memories from one token to dozens
        return torch.log(0.5 + 7.5 * torch.rand(shape, generator=source, dtype=torch.float64))
    if name.endswith("dt_proj.bias"):  # the inverse of softplus at steps from 0.01 to 1.5
        steps = torch.logspace(-2, 0.18, shape[0], dtype=torch.float64)
        return torch.log(torch.expm1(steps))[torch.randperm(shape[0], generator=source)]
    if name.endswith("dt_proj.weight"):
        return 0.5 * noise
    if "norm" in name:
        return 1 + 0.2 * noise
    if name.endswith("bias"):
        return 0.3 * noise
    if name.endswith("conv1d.weight"):
        return noise
    if len(shape) == 2 and "embed" not in name:
        return loudness * noise / shape[1] ** 0.5
    return noise


def random_expert(model, seed, rank=None, modules=None, name=None):
    """An `ExpertVector` with scales between 0.3 and 1.7 for all linear modules or `modules`, top `rank` of each."""
    source = torch.Generator().manual_seed(seed)
    linears = {key: module for key, module in model.named_modules() if isinstance(module, torch.nn.Linear)}
    vectors = {}
    for key in linears if modules is None else modules:
        size = min(linears[key].weight.shape)
        vectors[key] = 0.3 + 1.4 * torch.rand(size if rank is None else min(rank, size), generator=source)
    return ExpertVector(vectors, name=name)


def random_linear(out_features, in_features, bias=False):
    module = nn.Linear(in_features, out_features, bias=bias, dtype=torch.float64)
    with torch.no_grad():
        module.weight.copy_(normal(out_features, in_features, seed=1))
        if bias:
            module.bias.copy_(normal(out_features, seed=2))
    return module


def small_expert(seed=0, name="chef", **options):
    """An `ExpertVector` of two modules that belong to no model."""
    vectors = {"layers.0.q_proj": normal(6, seed=seed, dtype=torch.float32)}
    vectors["lm_head"] = normal(3, seed=seed + 100, dtype=torch.float32)
    return ExpertVector(vectors, name, **options)


def new_model(pattern, loudness=1.5):
    """A model of one of `MODELS` that may be changed; trained weights are as loud as they are."""
    return TRAINED[pattern]() if pattern in TRAINED else random_model(tiny_config(pattern), loudness=loudness)


@functools.cache
def shared_model(pattern):
    """One model a pattern for the whole run; never change its weights."""
    return new_model(pattern)


@functools.cache
def shared_expert(pattern, seed, rank=None):
    return random_expert(shared_model(pattern), seed, rank)


def new_cache(model, variant, **options):
    """A cache of one of `CACHE_VARIANTS`."""
    return model.make_cache(**CACHE_VARIANTS[variant], **options)
