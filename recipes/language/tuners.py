"""Trainable additions to a frozen model: the scales of an expert vector, or the matrices of a LoRA of equal size."""

import copy
import math
from collections.abc import Mapping
from pathlib import Path

import torch
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file
from torch import nn

from mambaformer import ExpertVector

FAMILIES = {
    "attention": ("q_proj", "k_proj", "v_proj", "o_proj"),
    "mamba": ("in_proj", "x_proj", "dt_proj", "out_proj"),
    "mlp": ("gate_proj", "up_proj", "down_proj"),
}
ALL = "all"


def projections_of(family: str) -> list[str]:
    """The last names of a family's linear modules; of all families for "all"."""
    return [name for key, names in FAMILIES.items() if family in (key, ALL) for name in names]


def modules_of(model: nn.Module, projections: list[str] | None = None) -> dict[str, nn.Module]:
    """The linear modules with these last names (default: all), by the names that experts use, without the head.

    Raises:
        ValueError: the model has none of them.
    """
    found = model.linear_modules()
    found.pop("lm_head", None)  # tied to the embedding, and too large for its gain
    if projections is not None:
        found = {name: module for name, module in found.items() if name.rsplit(".", 1)[1] in projections}
    if not found:
        raise ValueError(f"the model has none of the linear modules {projections}")
    return found


class ExpertTuner(nn.Module):
    """A frozen model and the scales z of its singular values, by module; only z is registered, trained and saved.

    z is float32, whatever the model's dtype.
    """

    def __init__(self, model: nn.Module, rank: int | None = None, projections: list[str] | None = None):
        super().__init__()
        self.frozen = [model.requires_grad_(False)]  # a list, so that its weights stay out of the checkpoints
        found = modules_of(model, projections)
        self.names = list(found)
        ranks = [min(min(module.weight.shape), rank or module.weight.shape[0]) for module in found.values()]
        self.scales = nn.ParameterList([nn.Parameter(torch.ones(rank)) for rank in ranks])
        model.prepare_expert_vectors(self.names)

    def vectors(self) -> dict[str, torch.Tensor]:
        return dict(zip(self.names, self.scales, strict=True))

    def expert(self, name: str, metadata: dict | None = None) -> ExpertVector:
        return ExpertVector({key: z.detach() for key, z in self.vectors().items()}, name=name, metadata=metadata)

    def save(self, path: Path) -> Path:
        """Writes what was trained; returns the file with the tensors."""
        file = path.with_name(path.name + ".safetensors")
        self.expert(path.name.replace("=", "-")).save(file)
        return file

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> dict:
        model = self.frozen[0]
        outputs = model(input_ids=input_ids, labels=labels, expert_vector=self.vectors(), use_cache=False)
        return {"loss": outputs.loss}


class LoraTuner(nn.Module):
    """The same for PEFT's LoRA (arXiv 2106.09685), on a copy of the model; its matrices are float32 too."""

    def __init__(self, model: nn.Module, rank: int, names: list[str]):
        super().__init__()
        # lora_alpha = r: the product of both matrices is added as it is.
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=names, task_type="CAUSAL_LM")
        self.frozen = [get_peft_model(copy.deepcopy(model), config)]
        self.matrices = nn.ParameterList([weight for weight in self.frozen[0].parameters() if weight.requires_grad])

    def save(self, path: Path) -> Path:
        """Writes PEFT's folder; returns the file with the tensors."""
        self.frozen[0].save_pretrained(path, save_embedding_layers=False)
        return path / "adapter_model.safetensors"

    def forward(self, input_ids: torch.Tensor, labels: torch.Tensor | None = None, **kwargs) -> dict:
        return {"loss": self.frozen[0](input_ids=input_ids, labels=labels, use_cache=False).loss}


def numbers_of(tuner: nn.Module) -> int:
    return sum(parameter.numel() for parameter in tuner.parameters())


def bytes_of(file: Path) -> int:
    """Of the tensors in a safetensors file; names and metadata not counted."""
    return sum(tensor.nbytes for tensor in load_file(file).values())


def lora_of_numbers(shapes: Mapping[str, tuple[int, int]], numbers: int) -> tuple[int, list[str]]:
    """Rank and modules of the LoRA whose count of numbers comes near to `numbers`.

    A LoRA of rank r has r * (out + in) numbers for a weight (out, in). If rank 1 on all modules of `shapes` is too
    much, it is put on some of them, spread over the model: taken in order of the reversed bits of their index, as
    long as they fit, and one more if that comes nearer.

    Raises:
        ValueError: `numbers` is nearer to none at all than to rank 1 on the smallest module.
    """
    costs = {name: sum(shape) for name, shape in shapes.items()}
    rank = max(1, numbers // sum(costs.values()))
    left, chosen = numbers, []
    for name in _spread(list(costs)):
        if rank * costs[name] <= left:
            chosen.append(name)
            left -= rank * costs[name]
    rest = [name for name in costs if name not in chosen]
    nearest = min(rest, key=lambda name: abs(left - rank * costs[name]), default=None)
    if nearest is not None and abs(left - rank * costs[nearest]) < left:
        chosen.append(nearest)
    if not chosen:
        raise ValueError(f"there is no LoRA of about {numbers} numbers: rank 1 takes at least {min(costs.values())}")
    return rank, chosen


def _spread(names: list[str]) -> list[str]:
    """Any first few are about evenly spaced (van der Corput's sequence)."""
    bits = max(1, math.ceil(math.log2(len(names))))
    order = sorted(range(len(names)), key=lambda idx: f"{idx:0{bits}b}"[::-1])
    return [names[idx] for idx in order]
