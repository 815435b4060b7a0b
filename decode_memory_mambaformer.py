"""The memory that the addresses in a decode program point to.

A weight can be replaced while another thread computes, and its memory can move while the weight stays. So a decode
step compares all addresses before it runs, and holds the memory while it runs.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .ops_cpu_interface_mambaformer import Weight

# Attributes of a module or a tensor by name. Any: users may put anything there, and `hold` finds out.
Holder = Mapping[str, Any]
_address_of, _storage_of = Tensor.data_ptr, Tensor.untyped_storage  # looked up once


class HeldMemory:
    """Tensors by the places where users can replace them, with the addresses that a program has of them."""

    def __init__(self):
        self._places: list[tuple[Holder, str]] = []
        self._addresses: list[int] = []
        # Inner tensors of quantized weights, by the parameters of the module.
        self._packed_places: list[tuple[Holder, str]] = []
        self._packed_addresses: list[int] = []

    def add(self, holder: Holder, name: str, address: int) -> None:
        self._places.append((holder, name))
        self._addresses.append(address)

    def add_linear(self, module: nn.Module, weight: Weight) -> None:
        """Adds the weight and the bias of a linear module, as they are described to a kernel."""
        parameters = module._parameters
        if weight.bias:
            self.add(parameters, "bias", weight.bias)
        if not weight.scale:
            self.add(parameters, "weight", weight.data)
            return
        for name in ("qdata", "scale" if "scale" in vars(parameters["weight"]) else "scale_and_zero"):
            self._packed_places.append((parameters, name))
        self._packed_addresses += weight.data, weight.scale

    def add_all(self, other: "HeldMemory") -> None:
        self._places += other._places
        self._addresses += other._addresses
        self._packed_places += other._packed_places
        self._packed_addresses += other._packed_addresses

    def hold(self) -> list[torch.UntypedStorage] | None:
        """The memory, which lives as long as this list does; `None` if any of it is elsewhere now, or gone.

        A tensor alone is not enough: another thread that writes `weight.data` gives it other memory.
        """
        try:
            tensors = [holder[name] for holder, name in self._places]
            tensors += [vars(parameters["weight"])[name] for parameters, name in self._packed_places]
            storages = list(map(_storage_of, tensors))
            is_there = list(map(_address_of, tensors)) == self._addresses + self._packed_addresses
            return storages if is_there else None
        except (KeyError, TypeError):  # a parameter that became an attribute, as by pruning, or was set to `None`
            return None


__all__ = ["HeldMemory"]
