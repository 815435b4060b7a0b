"""Where weights are, and what stands around them: adapters, offloading, tensor parallelism.

The rest of the project sees modules only from outside. What it has to know of PEFT (adapters), Accelerate (weights
that are on the `meta` device until they are needed) and DTensor (a process has only a part of a weight) is here.
"""

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel, TensorParallelLayer

from .weights_quantized_modules_mambaformer import QuantizedMatrix, matrix_of

if torch.distributed.is_available():
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

# Attributes by which PEFT's wrappers (`BaseTunerLayer`, `AuxiliaryTrainingWrapper`) compute something else.
ADAPTER_SETTINGS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


# ---------------------------------------------------------------------------------------------------------- adapters


class CountsReplacements(nn.Module):
    """Counts how often a submodule is put in another one's place.

    An adapter that is merged and unloaded writes through `weight.data`, which no version counter sees, and puts the
    old module back; that it was there is all that is left to see.
    """

    num_replacements = 0

    def __setattr__(self, name: str, value: Any) -> None:
        if name in self.__dict__.get("_modules", ()):
            self.__dict__["num_replacements"] = self.num_replacements + 1
        super().__setattr__(name, value)


def base_linear(module: nn.Module) -> nn.Module:
    """The linear module itself, inside of whatever adapters wrap it."""
    while "base_layer" in module._modules:
        module = module._modules["base_layer"]
    return module


def is_adapter(module: nn.Module) -> bool:
    return "base_layer" in module._modules or "original_module" in module._modules


def adapter_stamp(module: nn.Module) -> str:
    """What tells apart the states of an adapter that its weights do not show: switched, disabled, merged, rescaled."""
    settings = [getattr(module, name, None) for name in ADAPTER_SETTINGS]
    # Adapters that are chosen for each row of a batch are hooks with an argument, for as long as one forward lasts.
    hooks = [getattr(hook, "keywords", None) for hook in module._forward_pre_hooks.values()]
    return repr((settings, hooks))


def adapters_of(model: nn.Module) -> str:
    """What tells apart the states of all adapters of a model that its weights do not show; "" without any."""
    found = {name: adapter_stamp(module) for name, module in model.named_modules() if is_adapter(module)}
    return json.dumps(found) if found else ""


def writes_stamp(model: nn.Module) -> Any:
    """Changes whenever an adapter may have been merged into the weights below it, through `weight.data`."""
    modules = list(model.modules())
    merged = [tuple(module.merged_adapters) for module in modules if hasattr(module, "merged_adapters")]
    return hash((sum(module.__dict__.get("num_replacements", 0) for module in modules), tuple(merged)))


# ------------------------------------------------------------------------------------------------ offloaded weights


def offloaded(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Accelerate's map of the weights of `module` that are elsewhere, by parameter name; `None` if there is none."""
    hook = getattr(module, "_hf_hook", None)
    maps = (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", [hook]) if each is not None)
    return next((each for each in maps if each is not None), None)


def weight_of(module: nn.Module, name: str = "weight") -> Tensor | QuantizedMatrix | None:
    """All of a parameter of a linear module, wherever it is; processes that share it must all ask for it."""
    module = base_linear(module)
    matrix = matrix_of(module) if name == "weight" else None
    if matrix is not None:
        return matrix
    weight = getattr(module, name, None)
    if is_shard(weight):
        return weight.full_tensor()
    if weight is not None and weight.is_meta and offloaded(module) is not None:
        return offloaded(module)[name].to(_execution_device(module))
    return weight


def _execution_device(module: nn.Module) -> Any:
    hook = module._hf_hook
    devices = (each.execution_device for each in getattr(hook, "hooks", [hook]))
    return next((device for device in devices if device is not None), "cpu")


# ------------------------------------------------------------------------------------------------------------ shards


def is_shard(tensor: Any) -> bool:
    """Whether this process has a part of `tensor`, which knows where the others are."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def bias_beside(outputs: Tensor, module: nn.Module) -> Tensor | None:
    """The bias of a linear module, or the part of it that is in its `outputs` (..., out)."""
    bias = getattr(base_linear(module), "bias", None)
    if is_shard(bias) and outputs.shape[-1] != bias.shape[0]:
        return bias.to_local()
    return weight_of(module, "bias")


def placed_like(weight: Tensor, old: Tensor) -> Tensor:
    """`weight` split as `old` is, so that it can take its place. Errors: ValueError if `old` is offloaded."""
    if old.is_meta:
        raise ValueError(
            "Offloaded weights are only read, so no expert can be merged into them: pass it as `expert_vector`, or "
            "load the model without offloading."
        )
    if is_shard(old):
        return distribute_tensor(weight, old.device_mesh, old.placements, src_data_rank=None)
    return weight


def agreed(tensor: Tensor, mesh: Any) -> Tensor:
    """What the first process has computed, in all of them: signs of singular vectors are anyone's choice."""
    tensor = tensor.contiguous().clone()
    torch.distributed.broadcast(tensor, group=mesh.get_group(), group_src=0)
    return tensor


def part_of(vectors: Tensor, width: int, mesh: Any) -> Tensor:
    """The rows of `vectors` (channels, ...) that belong to the `width` channels of this process."""
    return vectors.narrow(0, mesh.get_local_rank() * width, width)


def sum_over_shards(partial: Tensor, mesh: Any) -> Tensor:
    """The sum over all processes, for what each goes on with on its own: gradients are summed, too."""
    total = DTensor.from_local(partial, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    return total.to_local()


def used_by_shards(states: Tensor, mesh: Any) -> Tensor:
    """The same states, known to all processes, of which each uses a part: their gradient is the sum of all."""
    if not torch.is_grad_enabled():
        return states
    whole = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
    return whole.to_local(grad_placements=[Partial()])


def mesh_of(module: nn.Module) -> Any:
    """The processes that a linear module is split over; `None` if it is whole."""
    weight = getattr(base_linear(module), "weight", None)
    return weight.device_mesh if is_shard(weight) else None


def mesh_of_inputs(module: nn.Module) -> Any:
    """The processes of which each has some of a linear module's inputs; `None` if each has all of them.

    Data parallelism (FSDP) splits weights too, by their outputs, but its processes have texts of their own.
    """
    mesh = mesh_of(module)
    return mesh if mesh is not None and base_linear(module).weight.placements[-1].is_shard(1) else None


def num_shards(module: nn.Module) -> int:
    """How many processes the inputs of a linear module are split over."""
    mesh = mesh_of_inputs(module)
    return 1 if mesh is None else mesh.size(mesh.ndim - 1)


class ChannelParallel(TensorParallelLayer):
    """Each process has some channels, the first dimension of every parameter, and computes with them as if alone."""

    def should_use_local_tensors(self, module):
        return True

    def shard_param(self, module, param, mesh):
        _shard(module, param, mesh, Shard(0))


class PackedChannelParallel(PackedColwiseParallel):
    """ "packed_colwise" with a bias: each process has some channels of both halves, which stand side by side."""

    def shard_param(self, module, param, mesh):
        _shard(module, param, mesh, _StridedShard(dim=0, split_factor=2))


def _shard(module: nn.Module, param: str, mesh: Any, placement: Any) -> None:
    whole = module._parameters[param]
    if whole is not None:
        split = distribute_tensor(whole, mesh, [placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(split, requires_grad=whole.requires_grad)


if torch.distributed.is_available():
    ALL_PARALLEL_STYLES.register("mambaformer_channels", ChannelParallel())
    ALL_PARALLEL_STYLES.register("mambaformer_packed_channels", PackedChannelParallel())
