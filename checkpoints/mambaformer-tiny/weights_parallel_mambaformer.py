"""Where weights are, and what wraps them: adapters, offloading, tensor parallelism.

Other rooms see modules only from outside. Everything that the project assumes about PEFT (adapters), Accelerate
(weights that are on the `meta` device until they are needed) and DTensor (a process has a part of a weight) is here.
"""

import json
from collections.abc import Callable, Mapping
from typing import TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers.integrations.tensor_parallel import ALL_PARALLEL_STYLES, PackedColwiseParallel, TensorParallelLayer

from .weights_quantized_modules_mambaformer import QuantizedMatrix, matrix_of

if torch.distributed.is_available():
    from torch.distributed.device_mesh import DeviceMesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard, distribute_tensor
    from torch.distributed.tensor.placement_types import _StridedShard

# Attributes that change the output of PEFT's wrappers (`BaseTunerLayer`, `AuxiliaryTrainingWrapper`).
ADAPTER_SETTINGS = ("_active_adapter", "_disable_adapters", "merged_adapters", "scaling")


# ---- adapters


class CountsReplacements(nn.Module):
    """Counts how often a submodule is replaced by another one.

    An adapter that is merged and unloaded writes through `weight.data`, which no version counter sees, and puts the
    old module back: the replacement is the only trace.
    """

    num_replacements = 0

    def __setattr__(self, name: str, value: Tensor | nn.Module) -> None:
        if name in self.__dict__.get("_modules", ()):
            self.__dict__["num_replacements"] = self.num_replacements + 1
        super().__setattr__(name, value)


def base_linear(module: nn.Module) -> nn.Module:
    """The linear module itself, inside of the adapters that wrap it."""
    inner = module._modules.get("base_layer")
    while inner is not None:
        module, inner = inner, inner._modules.get("base_layer")
    return module


def is_adapter(module: nn.Module) -> bool:
    return "base_layer" in module._modules or "original_module" in module._modules


def adapter_stamp(module: nn.Module) -> str:
    """Identifies the state of an adapter that its weights do not show: switched, disabled, merged, rescaled."""
    settings = [getattr(module, name, None) for name in ADAPTER_SETTINGS]
    # Adapters that are chosen for each row of a batch are hooks with an argument, registered for one forward.
    hooks = [getattr(hook, "keywords", None) for hook in module._forward_pre_hooks.values()]
    return repr((settings, hooks))


def adapters_of(model: nn.Module) -> str:
    """Identifies the state of all adapters of a model that its weights do not show; "" without adapters."""
    stamps = {name: adapter_stamp(module) for name, module in model.named_modules() if is_adapter(module)}
    return json.dumps(stamps) if stamps else ""


def writes_stamp(model: nn.Module) -> int:
    """Changes whenever an adapter may have been merged into the weights below it, through `weight.data`."""
    modules = list(model.modules())
    merged = [
        tuple(getattr(module, "merged_adapters", ())) for module in modules if hasattr(module, "merged_adapters")
    ]
    return hash((sum(module.__dict__.get("num_replacements", 0) for module in modules), tuple(merged)))


# ---- offloaded weights


def offloaded(module: nn.Module) -> Mapping[str, Tensor] | None:
    """Accelerate's map of the offloaded weights of `module`, by parameter name; `None` if there is none."""
    hook = getattr(module, "_hf_hook", None)
    maps = (getattr(each, "weights_map", None) for each in getattr(hook, "hooks", [hook]) if each is not None)
    return next((each for each in maps if each is not None), None)


def weight_of(module: nn.Module) -> Tensor | QuantizedMatrix:
    """The weight of a linear module, gathered or loaded; processes that share it must all call this."""
    module = base_linear(module)
    return matrix_of(module) or cast(Tensor, _parameter_of(module, "weight"))


def _parameter_of(module: nn.Module, name: str) -> Tensor | None:
    """All of a parameter, which may be split over processes or offloaded."""
    parameter = getattr(module, name, None)
    if is_shard(parameter):
        return parameter.full_tensor()
    elsewhere = offloaded(module) if parameter is not None and parameter.is_meta else None
    return parameter if elsewhere is None else elsewhere[name].to(_execution_device(module))


def _execution_device(module: nn.Module) -> torch.device | str:
    hook = getattr(module, "_hf_hook", None)
    devices = (each.execution_device for each in getattr(hook, "hooks", [hook]))
    return next((device for device in devices if device is not None), "cpu")


# ---- shards


def is_shard(tensor: object) -> TypeGuard["DTensor"]:
    """Whether this process has a part of `tensor`."""
    return torch.distributed.is_available() and isinstance(tensor, DTensor)


def bias_beside(outputs: Tensor, module: nn.Module) -> Tensor | None:
    """The bias of a linear module, or the part of it that belongs to its `outputs` (..., out)."""
    module = base_linear(module)
    bias = getattr(module, "bias", None)
    if is_shard(bias) and outputs.shape[-1] != bias.shape[0]:
        return bias.to_local()
    return _parameter_of(module, "bias")


def placed_like(weight: Tensor, old: Tensor) -> Tensor:
    """`weight` split as `old` is, so that it can replace it.

    Raises:
        ValueError: `old` is offloaded.
    """
    if old.is_meta:
        raise ValueError(
            "Offloaded weights are only read, so no expert vector can be merged into them: pass it as "
            "`expert_vector`, or load the model without offloading."
        )
    if is_shard(old):
        return distribute_tensor(weight, old.device_mesh, old.placements, src_data_rank=None)
    return weight


def broadcast_from_first(tensor: Tensor, mesh: "DeviceMesh") -> Tensor:
    """The first process's tensor, in all processes: each could choose other signs of singular vectors."""
    tensor = tensor.contiguous().clone()
    torch.distributed.broadcast(tensor, group=mesh.get_group(), group_src=0)
    return tensor


def part_of(vectors: Tensor, width: int, mesh: "DeviceMesh") -> Tensor:
    """The rows of `vectors` (channels, ...) that belong to the `width` channels of this process."""
    return vectors.narrow(0, mesh.get_local_rank() * width, width)


def sum_over_shards(partial: Tensor, mesh: "DeviceMesh") -> Tensor:
    """The sum over all processes; gradients are summed too, because each process uses the sum by itself."""
    total = DTensor.from_local(partial, mesh, [Partial()], run_check=False).redistribute(placements=[Replicate()])
    return total.to_local()


def used_by_shards(states: Tensor, mesh: "DeviceMesh") -> Tensor:
    """The same states in all processes, each of which uses a part of them: their gradients are summed."""
    if not torch.is_grad_enabled():
        return states
    replicated = DTensor.from_local(states, mesh, [Replicate()], run_check=False)
    return replicated.to_local(grad_placements=[Partial()])


def mesh_of(module: nn.Module) -> "DeviceMesh | None":
    """The processes that a linear module is split over; `None` if it is not split."""
    weight = getattr(base_linear(module), "weight", None)
    return weight.device_mesh if is_shard(weight) else None


def mesh_of_inputs(module: nn.Module) -> "DeviceMesh | None":
    """The processes over which a linear module's inputs are split; `None` if each process has all inputs.

    Data parallelism (FSDP) splits weights too, by their outputs, but its processes have sequences of their own.
    """
    weight = getattr(base_linear(module), "weight", None)
    return weight.device_mesh if is_shard(weight) and weight.placements[-1].is_shard(1) else None


def num_shards(module: nn.Module) -> int:
    """The number of processes that the inputs of a linear module are split over."""
    mesh = mesh_of_inputs(module)
    return 1 if mesh is None else mesh.size(mesh.ndim - 1)


class ChannelParallel(TensorParallelLayer):
    """Each process has some channels, the first dimension of every parameter, and computes with them alone."""

    def should_use_local_tensors(self, module):
        return True

    def shard_param(self, module, param, mesh):
        _shard(module, param, mesh, Shard(0))


class PackedChannelParallel(PackedColwiseParallel):
    """ "packed_colwise" with a bias: each process has the same channels of both halves of the output."""

    def shard_param(self, module, param, mesh):
        _shard(module, param, mesh, _StridedShard(dim=0, split_factor=2))


def _shard(module: nn.Module, param: str, mesh: "DeviceMesh", placement: "Shard | _StridedShard") -> None:
    parameter = module._parameters[param]
    if parameter is not None:
        split = distribute_tensor(parameter, mesh, [placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(split, requires_grad=parameter.requires_grad)


if torch.distributed.is_available():
    # The table is annotated as one of functions, and holds styles.
    ALL_PARALLEL_STYLES.register("mambaformer_channels", cast(Callable, ChannelParallel()))
    ALL_PARALLEL_STYLES.register("mambaformer_packed_channels", cast(Callable, PackedChannelParallel()))
