"""Linear modules that bitsandbytes and quanto have quantized: all that the project knows of them.

Their weights are codes in a shape of their own, and part of what scales the codes may be kept by the module. So the
module tells its matrix. Neither library is imported before there is such a module; classes are told by their names.

    Linear4bit    codes (out * in / 2, 1), or (out, in / 2) as its kernel for CPUs packs them at the first forward
    Linear8bitLt  W = codes * SCB / 127                               (one scale a row; kept by the weight, then by it)
    QLinear       `qweight`, made again in every forward until the module is frozen
"""

import copy
import importlib
import weakref
from typing import Any

import torch
from torch import Tensor, nn

_BITSANDBYTES = ("Params4bit", "Int8Params")


class QuantizedMatrix:
    """The matrix (out, in) that such a module multiplies with, read only when it is needed."""

    ndim = 2

    def __init__(self, module: nn.Module, weight: Tensor):
        self._module, self._weight = weakref.ref(module), weakref.ref(weight)
        state = _state_of(weight)
        self.shape = torch.Size(weight.shape if state is None else state.shape)
        self.dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        self.is_meta = weight.is_meta

    @property
    def device(self) -> torch.device:
        return self._weight().device

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def is_of(self, weight: Tensor) -> bool:
        return self._weight() is weight

    def stamp(self) -> tuple:
        """Changes with every write that counts; that the codes are packed for a CPU is no change."""
        weight = self._weight()
        return tuple(part._version for part in _inner_tensors(weight)), str(weight.device)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix itself, in `dtype` (float32)."""
        with torch.no_grad():
            return _values_of(self._module()).to(dtype or torch.float32)


_known: weakref.WeakKeyDictionary[nn.Module, QuantizedMatrix] = weakref.WeakKeyDictionary()


def matrix_of(module: nn.Module) -> QuantizedMatrix | None:
    """The matrix of a module that one of these libraries has quantized; the same object while it has that weight."""
    weight = module._parameters.get("weight")
    if weight is None or not _is_quantized(module, weight):
        return None
    found = _known.get(module)
    if found is None or not found.is_of(weight):
        found = _known[module] = QuantizedMatrix(module, weight)
    return found


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module, however its weight is stored."""
    matrix = matrix_of(module)
    return tuple(module.weight.shape if matrix is None else matrix.shape)


def _is_quantized(module: nn.Module, weight: Tensor) -> bool:
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _state_of(weight) is not None
    if kind == "Int8Params":
        return weight.dtype == torch.int8
    return type(module).__name__ == "QLinear" and getattr(module, "weight_qtype", None) is not None


def check_can_be_read(name: str, module: nn.Module) -> None:
    """Raises a ValueError for a weight of codes that nothing here can make a matrix of."""
    weight = module.weight
    if matrix_of(module) is None and not weight.is_floating_point():
        raise ValueError(
            f"`{name}` is a {type(module).__name__} whose weight, {weight.dtype} of shape {tuple(weight.shape)}, "
            "cannot be read as a matrix: quantize the model by torchao, bitsandbytes or quanto, or merge the expert "
            "before the model is quantized."
        )


def is_of_bitsandbytes(weight: Tensor) -> bool:
    return type(weight).__name__ in _BITSANDBYTES


def _state_of(weight: Tensor) -> Any:
    return getattr(weight, "quant_state", None) if type(weight).__name__ == "Params4bit" else None


def _inner_tensors(weight: Tensor) -> list[Tensor]:
    if not hasattr(weight, "__tensor_flatten__"):
        return [weight]
    inner = [getattr(weight, name) for name in weight.__tensor_flatten__()[0]]
    return [weight, *(part for each in inner for part in _inner_tensors(each))]


def _values_of(module: nn.Module) -> Tensor:
    weight = module._parameters["weight"]
    if type(weight).__name__ == "Params4bit":
        library, data, state = importlib.import_module("bitsandbytes.functional"), weight.data, weight.quant_state
        if getattr(state, "packing_format_for_cpu", False):
            state, scales = copy.copy(state), state.absmax.T.reshape(-1).float()
            state.original_nested = False  # its inverse would round the scales again, or leave them transposed
            data, state = library._convert_weight_packed_for_cpu_inverse(data, state)
            state.absmax = scales
        return library.dequantize_4bit(data, state)
    if type(weight).__name__ == "Int8Params":
        scales = weight.SCB if getattr(weight, "SCB", None) is not None else module.state.SCB
        return weight.data.float() * (scales.to(weight.device).float() / 127)[:, None]
    return module.qweight.dequantize()


def keep_codes_in_order(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit codes for the CPU at the first forward; the product is the same.

    Packing rounds scales, so a used model would have another fingerprint; `state_dict` cannot undo it where a row has
    several scales, and returns other weights; and it fails where sizes do not divide by its blocks, as they seldom do
    in the small projections of Mamba.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.support_avx512bf16_for_cpu = False


__all__ = [
    "QuantizedMatrix",
    "check_can_be_read",
    "is_of_bitsandbytes",
    "keep_codes_in_order",
    "matrix_of",
    "shape_of",
]
