"""CPU kernels for a few tokens at a time, where reading weights and keys is all the work.

PyTorch's products of a few rows read weights at a third of the speed of memory, and each of its small operations
costs more than its arithmetic. Here a product reads each weight once, attention reads each key once for all heads that
share it, and norm, RoPE, gate and the scaling of singular values are one call each. Weights may be stored in float32,
bfloat16, float64, or as torchao packs them (int8 by row, int4 by group).

Each backend of `ops_mambaformer` here returns `None` if it does not take its arguments.
"""

import ctypes

import torch
from torch import Tensor, get_num_threads, nn

from .ops_cpu_interface_mambaformer import (
    INT4,
    INT8,
    PLAIN,
    Shape,
    Weight,
    as_integers,
    kernel_of,
    rows_of_block,
)
from .ops_eligibility_mambaformer import (
    PLAIN_TENSORS,
    are_readable,
    has_parameters,
    hold_memory,
    may_run_forward,
)
from .weights_quantized_mambaformer import PackedWeight, packed_weight

# Rows up to which our product is faster than PyTorch's, by the dtype of the activations.
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 8, torch.float64: 16}
# Numbers in a vector: heads whose width is no multiple of it are left to PyTorch.
LANES = {torch.float32: 16, torch.bfloat16: 16, torch.float64: 8}

_Shape = as_integers(Shape)


def linear_on_cpu(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """`linear` of few rows; with int4 weights, of any number of rows."""
    if type(weight) in PLAIN_TENSORS:
        return plain_linear_on_cpu(states, weight, bias)
    packed = packed_weight(weight)
    return None if packed is None else packed_linear_on_cpu(states, packed, bias)


def plain_linear_on_cpu(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """(..., in) -> (..., out) with a plain weight (out, in), for few rows."""
    if not may_run_forward(states, weight, bias):
        return None
    weight, bias = hold_memory(weight), hold_memory(bias)
    if weight.ndim != 2 or not weight.is_contiguous():
        return None
    if bias is not None and not _is_bias(bias, weight.shape[0]):
        return None
    if not weight.data_ptr():
        return None  # its memory is freed, and PyTorch raises
    address_of_bias = 0 if bias is None else bias.data_ptr()
    return _product(states, Weight(PLAIN, weight.data_ptr(), 0, address_of_bias, *weight.shape))


def _is_bias(bias: Tensor, outputs: int) -> bool:
    return bias.shape == (outputs,) and bias.is_contiguous()


def packed_linear_on_cpu(states: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor | None:
    """(..., in) -> (..., out) with a weight as torchao packs it; int4 for any number of rows, int8 for few."""
    described = _describe_packed(packed, states.dtype) if may_run_forward(states, bias) else None
    if described is None or states.shape[-1] != described.inputs:
        return None
    bias = hold_memory(bias)
    if bias is not None and not _is_bias(bias, described.outputs):
        return None
    scales = packed.scale_and_zero
    if scales is not None and states.numel() // described.inputs > MOST_ROWS[states.dtype]:
        weight = states.new_empty(packed.shape[::-1])
        unpack = kernel_of("unpack_int4", states.dtype, scales.dtype)
        unpack(described.data, *packed.shape, packed.group_size, described.scale, weight.data_ptr(), get_num_threads())
        return states @ weight if bias is None else states @ weight + bias
    described.bias = 0 if bias is None else bias.data_ptr()
    return _product(states, described)


def _product(states: Tensor, weight: Weight) -> Tensor | None:
    width, dtype = states.shape[-1], states.dtype
    rows, kernel = states.numel() // max(width, 1), kernel_of("linear", dtype)
    if kernel is None or weight.inputs != width or rows > MOST_ROWS[dtype] or not (weight.data and rows):
        return None
    states, outputs = states.contiguous(), states.new_empty((*states.shape[:-1], weight.outputs))
    kernel(states.data_ptr(), rows, ctypes.addressof(weight), outputs.data_ptr(), get_num_threads())
    return outputs


def _describe_packed(packed: PackedWeight, dtype: torch.dtype) -> Weight | None:
    scale = packed.scale if packed.kind == "int8" else packed.scale_and_zero
    if scale is None or dtype not in MOST_ROWS or dtype is torch.float64:
        return None
    if not (are_readable(packed.qdata, scale) and packed.fits()):
        return None
    if packed.kind == "int8":
        is_known = scale.dtype is torch.float32
        described = Weight(INT8, packed.qdata.data_ptr(), scale.data_ptr(), 0, *packed.shape)
    else:
        is_known = _has_our_blocks(packed) and scale.dtype in (torch.float32, torch.bfloat16)
        described = Weight(INT4, packed.qdata.data_ptr(), scale.data_ptr(), 0, *packed.shape, packed.group_size,
                           scale.dtype is torch.bfloat16)  # fmt: skip
    return described if is_known else None


def _has_our_blocks(packed: PackedWeight) -> bool:
    """Whether a block is four vectors of rows, as the kernels read it."""
    return packed.has_halves and packed.block_n == rows_of_block() and packed.shape[0] % packed.block_n == 0


def scale_singular_values_on_cpu(states: Tensor, basis: Tensor, delta: Tensor) -> Tensor | None:
    """`scale_singular_values` of few rows."""
    if not may_run_forward(states, basis):
        return None
    rows, width, kernel = states.numel() // states.shape[-1], states.shape[-1], kernel_of("rescale", states.dtype)
    if kernel is None or width != basis.shape[0] or rows > MOST_ROWS[states.dtype]:
        return None
    weight = Weight(inputs=width)
    if not describe_expert(weight, basis, delta, states.shape):
        return None
    states = states.contiguous()
    outputs = torch.empty_like(states)
    kernel(states.data_ptr(), rows, ctypes.addressof(weight), outputs.data_ptr(), get_num_threads())
    return outputs


def describe_expert(weight: Weight, basis: Tensor, delta: Tensor, shape: tuple[int, ...]) -> bool:
    """Adds Q (n, r) and delta (r,) or (rows, 1, r) to `weight`, for states of this shape; false if they do not fit."""
    (rows, tokens, _), (_, rank) = shape if len(shape) == 3 else (0, 0, 0), basis.shape
    is_shared = delta.shape == (rank,)
    fits = rank > 0 and (is_shared or (delta.shape == (rows, 1, rank) and tokens == 1))
    wide = torch.float64 if basis.dtype == torch.float64 else torch.float32
    if not (fits and may_run_forward(basis) and may_run_forward(delta) and delta.dtype is wide):
        return False
    weight.basis, weight.basis_stride, weight.rank = basis.data_ptr(), basis.stride(0), rank
    weight.delta, weight.delta_stride = delta.data_ptr(), 0 if is_shared else rank
    return basis.stride(1) == 1 and delta.is_contiguous()


def rms_norm_on_cpu(states: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """`rms_norm`."""
    kernel = kernel_of("rms_norm", states.dtype) if may_run_forward(states, weight) and states.numel() else None
    if kernel is None:
        return None
    weight = hold_memory(weight)
    if weight.shape != states.shape[-1:] or not weight.is_contiguous():
        return None
    states, width = states.contiguous(), states.shape[-1]
    outputs = torch.empty_like(states)
    kernel(states.data_ptr(), states.numel() // width, width, weight.data_ptr(), eps, outputs.data_ptr(),
           get_num_threads())  # fmt: skip
    return outputs


def apply_rope_on_cpu(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """`apply_rope`."""
    kernel = kernel_of("rotate", states.dtype) if may_run_forward(states, cos, sin) else None
    if kernel is None:
        return None
    rows, heads, tokens, width = states.shape
    fits = cos.shape == sin.shape and cos.shape in ((rows, tokens, width), (1, tokens, width)) and width % 2 == 0
    if not fits or states.stride(3) != 1:
        return None
    cos, sin, outputs = cos.contiguous(), sin.contiguous(), states.new_empty(states.shape)
    kernel(states.data_ptr(), rows, heads, tokens, width // 2, *states.stride()[:3], cos.data_ptr(), sin.data_ptr(),
           tokens * width if cos.shape[0] > 1 else 0, outputs.data_ptr(), get_num_threads())  # fmt: skip
    return outputs


def silu_gate_on_cpu(gates: Tensor, states: Tensor) -> Tensor | None:
    """`silu_gate`."""
    kernel = kernel_of("gate", states.dtype) if may_run_forward(states, gates) else None
    if kernel is None or gates.shape != states.shape:
        return None
    gates, states, outputs = gates.contiguous(), states.contiguous(), states.new_empty(states.shape)
    kernel(gates.data_ptr(), states.data_ptr(), states.numel(), outputs.data_ptr(), get_num_threads())
    return outputs


def attention_on_cpu(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float) -> Tensor | None:
    """`attention` of few queries (rows, heads, queries, width) on keys and values (rows, key heads, keys, width).

    `mask` is boolean (rows or 1, 1, queries, keys), true where a query sees a key; `None` where a single query sees
    all. Returns (rows, queries, heads, width); a query that sees nothing gets zeros.
    """
    shape = _attention_shape(query, key, value, mask)
    kernel = None if shape is None else kernel_of("attend", query.dtype)  # a compiler warns of a call of `kernel_of`
    if shape is None or kernel is None:
        return None
    rows, heads, queries, width = query.shape
    outputs = query.new_empty((rows, queries, heads, width))
    address_of_mask = None if mask is None else mask.data_ptr()
    kernel(query.data_ptr(), key.data_ptr(), value.data_ptr(), address_of_mask, scaling, outputs.data_ptr(),
           ctypes.addressof(shape), get_num_threads())  # fmt: skip
    return outputs


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> ctypes.Array | None:
    """The C structure `Shape`; `None` for shapes and layouts that the kernel does not take."""
    if not may_run_forward(query, key, value):  # asked first: a comparison of sizes would fix them in a graph
        return None
    rows, heads, queries, width = query.shape
    if mask is None and queries > 1:
        return None  # the mask of several queries is then the choice of the attention implementation
    if queries > MOST_ROWS.get(query.dtype, 0) or width % LANES[query.dtype]:
        return None
    key_rows, key_heads, num_keys, key_width = key.shape
    fits = (key_rows, key_width) == (rows, width) and value.shape == key.shape
    if (
        not fits
        or not key_heads
        or heads % key_heads
        or query.stride(3) != 1
        or key.stride(3) != 1
        or value.stride(3) != 1
    ):
        return None
    if mask is not None and not takes_mask(mask, rows, queries, num_keys):
        return None
    return _Shape(rows, key_heads, heads // key_heads, queries, num_keys, width, *query.stride()[:3],
                  *key.stride()[:3], *value.stride()[:3], *strides_of_mask(mask))  # fmt: skip


def strides_of_mask(mask: Tensor | None) -> tuple[int, int]:
    """From row to row, and from query to query."""
    return (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))


def takes_mask(mask: Tensor, rows: int, queries: int, keys: int) -> bool:
    fits = mask.shape in ((rows, 1, queries, keys), (1, 1, queries, keys)) and mask.dtype is torch.bool
    return fits and are_readable(mask) and mask.stride(3) == 1


# ---- descriptions of weights for kernels


def describe_linear(module: nn.Module, dtype: torch.dtype) -> Weight | None:
    """The weight and the bias of a linear module for kernels without a backward; `None` if they cannot compute it.

    The caller asks at every step whether the module is hooked or patched.
    """
    if type(module) is not nn.Linear or not has_parameters(module):
        return None
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if weight is None:
        return None
    if type(weight) is nn.Parameter:
        is_known = is_stored(weight, dtype, weight.shape) and weight.ndim == 2
        described = Weight(PLAIN, weight.data_ptr(), 0, 0, *weight.shape) if is_known else None
    else:
        packed = packed_weight(weight)
        described = None if packed is None else _describe_packed(packed, dtype)
    if described is None or bias is None:
        return described
    described.bias = bias.data_ptr()
    return described if is_stored(bias, dtype, (described.outputs,)) else None


def is_stored(parameter: nn.Parameter, dtype: torch.dtype, shape: tuple[int, ...]) -> bool:
    """Whether kernels can read a parameter in place, and it has this shape."""
    is_plain = type(parameter) is nn.Parameter and parameter.is_cpu and parameter.dtype is dtype
    is_like = is_plain and parameter.shape == shape and parameter.is_contiguous() and not parameter.is_neg()
    return is_like and has_memory(parameter)


def has_memory(tensor: Tensor) -> bool:
    """Whether a tensor lies inside of its storage, which others may have shrunk or freed."""
    end = (tensor.storage_offset() + tensor.numel()) * tensor.element_size()
    return tensor.untyped_storage().nbytes() >= end and tensor.data_ptr() != 0


__all__ = [
    "apply_rope_on_cpu",
    "attention_on_cpu",
    "linear_on_cpu",
    "rms_norm_on_cpu",
    "scale_singular_values_on_cpu",
    "silu_gate_on_cpu",
]
