"""Linear modules that bitsandbytes and quanto have quantized: everything that the project assumes about them.

Their weights are codes in another shape than the matrix, and the module may hold some of the scales, so the matrix is
read from the module. A library is imported only when there is such a module; classes are recognized by name.

    Linear4bit    codes (out * in / 2, 1), or (out, in / 2) as its kernel for CPUs packs them at the first forward
    Linear8bitLt  W = codes * SCB / 127                         (one scale a row; of the weight, then of the module)
    QLinear       `qweight`, computed in every forward until the module is frozen
"""

import copy
import importlib
import weakref
from typing import cast

import torch
from torch import Tensor, nn

_BITSANDBYTES = ("Params4bit", "Int8Params")


class QuantizedMatrix:
    """The matrix (out, in) that a quantized module multiplies with, computed on request."""

    ndim = 2

    def __init__(self, module: nn.Module, weight: Tensor):
        self._references = weakref.ref(module), weakref.ref(weight)
        state = _state_of(weight)
        self.shape = torch.Size(weight.shape if state is None else state.shape)
        self.dtype = weight.dtype if weight.dtype.is_floating_point else torch.float32
        self.is_meta = weight.is_meta

    @property
    def device(self) -> torch.device:
        return self._living()[1].device

    def _living(self) -> tuple[nn.Module, Tensor]:
        module, weight = self._references[0](), self._references[1]()
        if module is None or weight is None:
            raise ReferenceError("The module of a quantized matrix no longer exists: call `matrix_of(module)` again.")
        return module, weight

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return True

    def is_of(self, weight: Tensor) -> bool:
        return self._references[1]() is weight

    def stamp(self) -> tuple:
        """Changes with every write that counts a version; packing the codes for a CPU does not change it."""
        _, weight = self._living()
        return tuple(part._version for part in _inner_tensors(weight)), str(weight.device)

    def values(self, dtype: torch.dtype | None = None) -> Tensor:
        """The matrix itself, in `dtype` (float32)."""
        with torch.no_grad():
            return _values_of(self._living()[0]).to(dtype or torch.float32)


_matrices: weakref.WeakKeyDictionary[nn.Module, QuantizedMatrix] = weakref.WeakKeyDictionary()


def matrix_of(module: nn.Module) -> QuantizedMatrix | None:
    """The matrix of a module that bitsandbytes or quanto has quantized; the same object for the same weight."""
    weight = module._parameters.get("weight")
    if weight is None or not _is_quantized(module, weight):
        return None
    matrix = _matrices.get(module)
    if matrix is None or not matrix.is_of(weight):
        matrix = _matrices[module] = QuantizedMatrix(module, weight)
    return matrix


def shape_of(module: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear module, which may be quantized."""
    out_features, in_features = (matrix_of(module) or cast(Tensor, module.weight)).shape
    return out_features, in_features


def _is_quantized(module: nn.Module, weight: Tensor) -> bool:
    kind = type(weight).__name__
    if kind == "Params4bit":
        return _state_of(weight) is not None
    if kind == "Int8Params":
        return weight.dtype == torch.int8
    return type(module).__name__ == "QLinear" and getattr(module, "weight_qtype", None) is not None


def check_can_be_read(name: str, module: nn.Module) -> None:
    """Raises a `ValueError` for a weight of codes whose matrix cannot be read."""
    weight = cast(Tensor, module.weight)
    if matrix_of(module) is None and not weight.is_floating_point():
        raise ValueError(
            f"`{name}` is a {type(module).__name__} whose weight, {weight.dtype} of shape {tuple(weight.shape)}, "
            "cannot be read as a matrix: quantize the model by torchao, bitsandbytes or quanto, or merge the expert "
            "vector before the model is quantized."
        )


def is_of_bitsandbytes(weight: Tensor) -> bool:
    return type(weight).__name__ in _BITSANDBYTES


def _state_of(weight: Tensor):
    """bitsandbytes' `QuantState` of 4-bit codes; `None` before they are quantized, and for other weights."""
    return getattr(weight, "quant_state", None) if type(weight).__name__ == "Params4bit" else None


def _inner_tensors(weight: Tensor) -> list[Tensor]:
    flatten = getattr(weight, "__tensor_flatten__", None)
    inner = [] if flatten is None else [getattr(weight, name) for name in flatten()[0]]
    return [weight, *(part for each in inner for part in _inner_tensors(each))]


def _values_of(module: nn.Module) -> Tensor:
    weight = cast(Tensor, module.weight)
    if type(weight).__name__ == "Params4bit":
        library, data, state = importlib.import_module("bitsandbytes.functional"), weight.data, _state_of(weight)
        if state is not None and getattr(state, "packing_format_for_cpu", False):
            state, scales = copy.copy(state), state.absmax.T.reshape(-1).float()
            state.original_nested = False  # the library's inverse would round the scales again, or transpose them
            data, state = library._convert_weight_packed_for_cpu_inverse(data, state)
            state.absmax = scales
        return library.dequantize_4bit(data, state)
    if type(weight).__name__ == "Int8Params":
        scales = getattr(weight, "SCB", None)
        scales = vars(module.state)["SCB"] if scales is None else scales
        return weight.data.float() * (scales.to(weight.device).float() / 127)[:, None]
    return cast(Tensor, module.qweight).dequantize()


def keep_codes_in_order(model: nn.Module) -> None:
    """Keeps bitsandbytes from packing 4-bit codes for the CPU at the first forward; the product is the same.

    Packing rounds scales, so the fingerprint of a model would change with its use. `state_dict` returns wrong weights
    for a packed row with several scales. Packing fails for sizes that are no multiple of its blocks, as in most small
    projections of Mamba.
    """
    for module in model.modules():
        if "support_avx512bf16_for_cpu" in module.__dict__:
            module.__dict__["support_avx512bf16_for_cpu"] = False


__all__ = [
    "QuantizedMatrix",
    "check_can_be_read",
    "is_of_bitsandbytes",
    "keep_codes_in_order",
    "matrix_of",
    "shape_of",
]
