"""CPU kernels for a few tokens at a time, where reading weights and keys is all the work.

PyTorch's products of a few rows read weights at a third of the speed of memory, and each of its small operations
costs more than its arithmetic. Here a product reads each weight once, attention reads each key once for all heads that
share it, and norm, rotation, gate and the scaling of an expert are one call each. Weights may be stored in float32,
bfloat16, float64, or as torchao packs them (int8 by row, int4 by group).

Each function says by `None` that it does not take what it is given; the caller then does it with PyTorch.
"""

import ctypes
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, get_num_threads, nn
from torch.nn.modules.module import _global_forward_hooks

from .compiler_mambaformer import are_readable, cpu_library
from .cpu_decode_source_mambaformer import DECODE_SOURCE
from .quantized_mambaformer import PackedWeight, packed_weight

# Rows up to which a product of our own is faster than PyTorch's, by what the activations are stored in.
MOST_ROWS = {torch.float32: 16, torch.bfloat16: 8, torch.float64: 16}
STORED = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float64: "float64"}
# Bytes of a vector, in numbers: heads whose width is no multiple of it are left to PyTorch.
LANES = {torch.float32: 16, torch.bfloat16: 16, torch.float64: 8}

_POINTER, _INTEGER, _THREADS = ctypes.c_void_p, ctypes.c_int64, ctypes.c_int
_ARGUMENTS = {
    "linear": "pnnpnpp",
    "linear_int8": "pnnpnppp",
    "linear_int4": "pnnpnnppp",
    "unpack_int4": "pnnnpp",
    "rescale": "pnnpnnpnp",
    "rms_norm": "pnnpdp",
    "rotate": "pnnnnnnnppnp",
    "gate": "ppnp",
    "attend": "ppppdpp",
    "attention_inputs": "pnnnpdpnppnppp",
    "attention_outputs": "ppppdpppp",
    "gated_mlp": "pnnpdpp",
}
_KINDS = {"p": _POINTER, "n": _INTEGER, "d": ctypes.c_double}


# The C structure `Shape`: sizes, the strides of query, key and value, and those of the mask.
_Shape = _INTEGER * 17
# As many C structures `Weight`, side by side.
_Weights = {count: _INTEGER * (8 * count) for count in (1, 3)}
_PLAIN, _INT8, _INT4 = range(3)


@lru_cache
def _kernel(name: str, *stored: torch.dtype) -> Any:
    """The C function for activations (and scales) stored so; `None` where there is none."""
    library = cpu_library(DECODE_SOURCE) if all(dtype in STORED for dtype in stored) else None
    function = getattr(library, "_".join((name, *(STORED.get(dtype, "") for dtype in stored))), None)
    if function is not None:
        function.argtypes = [*(_KINDS[kind] for kind in _ARGUMENTS[name]), _THREADS]
        function.restype = None
    return function


def _takes(*tensors: Tensor | None) -> bool:
    """Whether kernels without a backward may have these: all of one dtype."""
    if torch.compiler.is_compiling() or torch.is_autocast_enabled("cpu"):
        return False
    dtype, is_recording = tensors[0].dtype, torch.is_grad_enabled()
    for tensor in tensors:
        if tensor is not None and (tensor.dtype is not dtype or (is_recording and tensor.requires_grad)):
            return False
    return are_readable(*tensors)


def few_rows_linear(states: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor | None:
    """(..., in) -> (..., out) with a plain weight (out, in), for few rows."""
    width, dtype = states.shape[-1], states.dtype
    rows = states.numel() // width
    if rows > MOST_ROWS.get(dtype, 0) or not _takes(states, weight, bias):
        return None
    kernel = _kernel("linear", dtype)
    num_outputs, num_inputs = weight.shape
    if kernel is None or num_inputs != width or not weight.is_contiguous():
        return None
    states, outputs = states.contiguous(), states.new_empty((*states.shape[:-1], num_outputs))
    bias = None if bias is None else bias.data_ptr()
    kernel(states.data_ptr(), rows, width, weight.data_ptr(), num_outputs, bias, outputs.data_ptr(), get_num_threads())
    return outputs


def packed_linear(states: Tensor, packed: PackedWeight, bias: Tensor | None = None) -> Tensor | None:
    """(..., in) -> (..., out) with a weight as torchao packs it; int4 for any number of rows, int8 for few."""
    rows = states.numel() // states.shape[-1]
    is_few = rows <= MOST_ROWS.get(states.dtype, 0)
    fits = states.shape[-1] == packed.shape[1] and (is_few or packed.kind == "int4")
    if not fits or not _takes(states, bias) or not are_readable(packed.qdata):
        return None
    if packed.kind == "int8":
        return _few_rows_int8(states, rows, packed, bias)
    name, scales = "linear_int4" if is_few else "unpack_int4", packed.scale_and_zero
    kernel = _kernel(name, states.dtype, scales.dtype) if _has_our_blocks(packed) else None
    if kernel is None:
        return None
    (num_outputs, width), group = packed.shape, packed.group_size
    if not is_few:
        weight = states.new_empty((width, num_outputs))
        kernel(packed.qdata.data_ptr(), num_outputs, width, group, scales.data_ptr(), weight.data_ptr(),
               get_num_threads())  # fmt: skip
        return states @ weight if bias is None else states @ weight + bias
    states, outputs = states.contiguous(), states.new_empty((*states.shape[:-1], num_outputs))
    bias = None if bias is None else bias.data_ptr()
    kernel(states.data_ptr(), rows, width, packed.qdata.data_ptr(), num_outputs, group, scales.data_ptr(), bias,
           outputs.data_ptr(), get_num_threads())  # fmt: skip
    return outputs


def _has_our_blocks(packed: PackedWeight) -> bool:
    """Whether a block is four vectors of rows, as the kernels read it."""
    return packed.has_halves and packed.block_n == _rows_of_block() and packed.shape[0] % packed.block_n == 0


@lru_cache
def _rows_of_block() -> int:
    return getattr(cpu_library(DECODE_SOURCE), "rows_of_block", lambda: 0)()


def _few_rows_int8(states: Tensor, rows: int, packed: PackedWeight, bias: Tensor | None) -> Tensor | None:
    kernel = _kernel("linear_int8", states.dtype) if packed.scale.dtype == torch.float32 else None
    if kernel is None:
        return None
    num_outputs, width = packed.shape
    states, outputs = states.contiguous(), states.new_empty((*states.shape[:-1], num_outputs))
    bias = None if bias is None else bias.data_ptr()
    kernel(states.data_ptr(), rows, width, packed.qdata.data_ptr(), num_outputs, packed.scale.data_ptr(), bias,
           outputs.data_ptr(), get_num_threads())  # fmt: skip
    return outputs


def rescaled(states: Tensor, basis: Tensor, delta: Tensor) -> Tensor | None:
    """states (rows, tokens, n) + Q (delta * Q^T states) for few rows; `delta` (r,) or (rows, 1, r)."""
    if states.ndim != 3 or states.shape[0] * states.shape[1] > MOST_ROWS.get(states.dtype, 0):
        return None
    is_shared = delta.ndim == 1
    if not (is_shared or states.shape[1] == 1) or not _takes(states, basis) or not _takes(delta):
        return None
    wide, (width, rank) = torch.float64 if states.dtype == torch.float64 else torch.float32, basis.shape
    fits = width == states.shape[2] and delta.shape in ((rank,), (states.shape[0], 1, rank))
    kernel = _kernel("rescale", states.dtype) if fits else None
    if kernel is None or delta.dtype != wide or basis.stride(1) != 1:
        return None
    states, delta = states.contiguous(), delta.contiguous()
    outputs = torch.empty_like(states)
    kernel(states.data_ptr(), states.shape[0] * states.shape[1], states.shape[2], basis.data_ptr(), basis.stride(0),
           rank, delta.data_ptr(), 0 if is_shared else rank, outputs.data_ptr(), get_num_threads())  # fmt: skip
    return outputs


def rms_normed(states: Tensor, weight: Tensor, eps: float) -> Tensor | None:
    """weight * states / sqrt(mean(states^2) + eps) over the last dimension."""
    kernel = _kernel("rms_norm", states.dtype) if _takes(states, weight) else None
    if kernel is None or weight.shape != states.shape[-1:]:
        return None
    states, width = states.contiguous(), states.shape[-1]
    outputs = torch.empty_like(states)
    kernel(states.data_ptr(), states.numel() // width, width, weight.data_ptr(), eps, outputs.data_ptr(),
           get_num_threads())  # fmt: skip
    return outputs


def rotated(states: Tensor, cos: Tensor, sin: Tensor) -> Tensor | None:
    """Turns (rows, heads, tokens, head_dim) by the angles of (rows or 1, tokens, head_dim)."""
    kernel = _kernel("rotate", states.dtype) if _takes(states, cos, sin) else None
    rows, heads, tokens, width = states.shape
    fits = cos.shape == sin.shape and cos.shape in ((rows, tokens, width), (1, tokens, width)) and width % 2 == 0
    if kernel is None or not fits or states.stride(3) != 1:
        return None
    cos, sin, outputs = cos.contiguous(), sin.contiguous(), states.new_empty(states.shape)
    kernel(states.data_ptr(), rows, heads, tokens, width // 2, *states.stride()[:3], cos.data_ptr(), sin.data_ptr(),
           tokens * width if cos.shape[0] > 1 else 0, outputs.data_ptr(), get_num_threads())  # fmt: skip
    return outputs


def gated(gates: Tensor, states: Tensor) -> Tensor | None:
    """silu(gates) * states, of the same shape."""
    kernel = _kernel("gate", states.dtype) if _takes(states, gates) else None
    if kernel is None or gates.shape != states.shape:
        return None
    gates, states, outputs = gates.contiguous(), states.contiguous(), states.new_empty(states.shape)
    kernel(gates.data_ptr(), states.data_ptr(), states.numel(), outputs.data_ptr(), get_num_threads())
    return outputs


def few_queries_attention(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scaling: float
) -> Tensor | None:
    """Attention of few queries (rows, heads, queries, width) on keys and values (rows, key heads, keys, width).

    `mask` is boolean (rows or 1, 1, queries, keys), true where a query sees a key; `None` where a single query sees
    all. Returns (rows, queries, heads, width); a query that sees nothing gets zeros.
    """
    shape = _attention_shape(query, key, value, mask)
    kernel = None if shape is None else _kernel("attend", query.dtype)
    if kernel is None:
        return None
    rows, heads, queries, width = query.shape
    outputs = query.new_empty((rows, queries, heads, width))
    mask = None if mask is None else mask.data_ptr()
    kernel(query.data_ptr(), key.data_ptr(), value.data_ptr(), mask, scaling, outputs.data_ptr(),
           ctypes.addressof(shape), get_num_threads())  # fmt: skip
    return outputs


def _attention_shape(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None) -> Any:
    """The C structure `Shape`; `None` for what attention of few queries does not take."""
    rows, heads, queries, width = query.shape
    if mask is None and queries > 1:
        return None  # which of them see which keys is left to who is asked
    if queries > MOST_ROWS.get(query.dtype, 0) or width % LANES[query.dtype] or not _takes(query, key, value):
        return None
    key_rows, key_heads, num_keys, key_width = key.shape
    fits = (key_rows, key_width) == (rows, width) and value.shape == key.shape and heads % key_heads == 0
    if not fits or query.stride(3) != 1 or key.stride(3) != 1 or value.stride(3) != 1:
        return None
    if mask is not None and not _takes_mask(mask, rows, queries, num_keys):
        return None
    mask_strides = (0, 0) if mask is None else (mask.stride(0) if mask.shape[0] > 1 else 0, mask.stride(2))
    return _Shape(rows, key_heads, heads // key_heads, queries, num_keys, width, *query.stride()[:3],
                  *key.stride()[:3], *value.stride()[:3], *mask_strides)  # fmt: skip


def _takes_mask(mask: Tensor, rows: int, queries: int, keys: int) -> bool:
    fits = mask.shape in ((rows, 1, queries, keys), (1, 1, queries, keys)) and mask.dtype is torch.bool
    return fits and are_readable(mask) and mask.stride(3) == 1


# ------------------------------------------------------------------------------------------------ blocks of a layer


def is_only_a_product(module: nn.Module) -> bool:
    """Whether a product is all that happens when `module` is called: no hook and no wrapper does anything."""
    if type(module) is not nn.Linear or "weight" not in module._parameters or "forward" in module.__dict__:
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or _global_forward_hooks)


def _weights(states: Tensor, *modules: nn.Module) -> Any:
    """The C structures `Weight` of linear modules that go on from `states`; `None` if one is no plain product."""
    fields: list[int] = []
    for module in modules:
        described = _described(module, states.dtype) if is_only_a_product(module) else None
        if described is None:
            return None
        fields += described
    return _Weights[len(modules)](*fields)


def _described(module: nn.Linear, dtype: torch.dtype) -> tuple[int, ...] | None:
    weight, bias = module._parameters["weight"], module._parameters["bias"]
    if bias is not None and not _may_read(bias, dtype):
        return None
    bias = 0 if bias is None else bias.data_ptr()
    if type(weight) is nn.Parameter:
        is_readable = _may_read(weight, dtype) and weight.is_contiguous()
        return (_PLAIN, weight.data_ptr(), 0, bias, *weight.shape, 0, 0) if is_readable else None
    packed = packed_weight(weight)
    if packed is None or dtype is torch.float64 or not are_readable(packed.qdata):
        return None
    if packed.kind == "int8":
        is_known = packed.scale.dtype is torch.float32
        scale = packed.scale.data_ptr()
        return (_INT8, packed.qdata.data_ptr(), scale, bias, *packed.shape, 0, 0) if is_known else None
    scales = packed.scale_and_zero
    is_known = _has_our_blocks(packed) and scales.dtype in (torch.float32, torch.bfloat16)
    is_narrow = scales.dtype is torch.bfloat16
    fields = (_INT4, packed.qdata.data_ptr(), scales.data_ptr(), bias, *packed.shape, packed.group_size, is_narrow)
    return fields if is_known else None


def _may_read(parameter: nn.Parameter, dtype: torch.dtype) -> bool:
    """Whether a parameter is plain and stored as the activations are, and no graph is to lead to it."""
    is_plain = type(parameter) is nn.Parameter and parameter.is_cpu and parameter.dtype is dtype
    return is_plain and not (parameter.requires_grad and torch.is_grad_enabled())


def _takes_block(states: Tensor, norm_weight: Tensor) -> bool:
    width = states.shape[-1]
    is_few = states.ndim == 3 and states.numel() // width <= MOST_ROWS.get(states.dtype, 0)
    return is_few and _takes(states, norm_weight) and norm_weight.shape == (width,) and states.is_contiguous()


def attention_inputs(
    states: Tensor,
    norm_weight: Tensor,
    eps: float,
    projections: tuple[nn.Module, nn.Module, nn.Module],
    head_dim: int,
    angles: tuple[Tensor, Tensor] | None,
) -> tuple[Tensor, Tensor, Tensor] | None:
    """Norm, the three projections and the rotation of few tokens: (rows, tokens, hidden) -> query, key and value,
    each (rows, heads, tokens, head_dim)."""
    if not _takes_block(states, norm_weight):
        return None
    weights, kernel = _weights(states, *projections), _kernel("attention_inputs", states.dtype)
    if weights is None or kernel is None or any(weights[8 * i + 5] != states.shape[2] for i in range(3)):
        return None
    rows, tokens, width = states.shape
    cos = sin = None
    row_stride = 0
    if angles is not None:
        if not _takes_angles(states, angles, head_dim):
            return None
        cos, sin = angles[0].data_ptr(), angles[1].data_ptr()
        row_stride = tokens * head_dim if angles[0].shape[0] > 1 else 0
    num_heads = [weights[8 * i + 4] // head_dim for i in range(3)]
    # Turned, heads come before tokens; otherwise all is as the products leave it.
    shapes = [(rows, tokens, heads, head_dim) for heads in num_heads]
    if angles is not None:
        shapes[:2] = [(rows, heads, tokens, head_dim) for heads in num_heads[:2]]
    found = [states.new_empty(shape) for shape in shapes]
    kernel(states.data_ptr(), rows, tokens, width, norm_weight.data_ptr(), eps, ctypes.addressof(weights),
           head_dim // 2, cos, sin, row_stride, *(tensor.data_ptr() for tensor in found),
           get_num_threads())  # fmt: skip
    unturned = range(2 if angles is not None else 0, 3)
    for i in unturned:
        found[i] = found[i].transpose(1, 2)
    return found[0], found[1], found[2]


def _takes_angles(states: Tensor, angles: tuple[Tensor, Tensor], head_dim: int) -> bool:
    (cos, sin), (rows, tokens, _) = angles, states.shape
    fits = cos.shape == sin.shape and cos.shape in ((rows, tokens, head_dim), (1, tokens, head_dim))
    return fits and cos.is_contiguous() and sin.is_contiguous() and _takes(states, cos, sin)


def attention_outputs(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    mask: Tensor | None,
    scaling: float,
    projection: nn.Module,
    residual: Tensor,
) -> Tensor | None:
    """Attention of few queries, as `few_queries_attention` has it, its projection, and `residual` added to it."""
    shape = _attention_shape(query, key, value, mask)
    weights = None if shape is None else _weights(query, projection)
    kernel = None if weights is None else _kernel("attention_outputs", query.dtype)
    if kernel is None or (weights[4], weights[5]) != (residual.shape[2], query.shape[1] * query.shape[3]):
        return None
    outputs = torch.empty_like(residual)
    mask = None if mask is None else mask.data_ptr()
    kernel(query.data_ptr(), key.data_ptr(), value.data_ptr(), mask, scaling, ctypes.addressof(shape),
           ctypes.addressof(weights), residual.data_ptr(), outputs.data_ptr(), get_num_threads())  # fmt: skip
    return outputs


def gated_mlp(
    states: Tensor, norm_weight: Tensor, eps: float, projections: tuple[nn.Module, nn.Module, nn.Module]
) -> Tensor | None:
    """states + down(silu(gate(norm(states))) * up(norm(states))) of few tokens (rows, tokens, hidden)."""
    if not _takes_block(states, norm_weight):
        return None
    weights, kernel = _weights(states, *projections), _kernel("gated_mlp", states.dtype)
    if weights is None or kernel is None:
        return None
    rows, width, inner = states.numel() // states.shape[2], states.shape[2], weights[4]
    sizes = tuple(weights[i] for i in (4, 5, 12, 13, 20, 21))
    if sizes != (inner, width, inner, width, width, inner):
        return None
    outputs = torch.empty_like(states)
    kernel(states.data_ptr(), rows, width, norm_weight.data_ptr(), eps, ctypes.addressof(weights), outputs.data_ptr(),
           get_num_threads())  # fmt: skip
    return outputs


__all__ = [
    "attention_inputs",
    "attention_outputs",
    "few_queries_attention",
    "few_rows_linear",
    "gated",
    "gated_mlp",
    "is_only_a_product",
    "packed_linear",
    "rescaled",
    "rms_normed",
    "rotated",
]
