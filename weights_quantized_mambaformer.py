"""Weights that torchao has quantized: everything that the project assumes about their tensors.

A quantized weight is a tensor that wraps others, the codes and their scales. torchao is imported only when there is
such a tensor; its classes are recognized by name, so torchao need not be installed.

    Int8Tensor        W = qdata * scale                                 (one scale a row)
    Int4OpaqueTensor  W = (code - 8) * scale + zero                     (a pair for each group of inputs), CPU
    Int4Tensor        the same codes in an order that depends on no processor; the form of files
"""

import copy
import functools
import importlib
import json
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar, TypeGuard, cast

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel
from transformers.quantizers.base import HfQuantizer
from transformers.utils.quantization_config import TorchAoConfig

LARGEST_BLOCK = 256  # upper bound of the rows that a processor packs together: 16, 32 or 64 so far


class TorchaoTensor(Tensor):
    """The attributes of torchao's tensors that are read here. For annotations only: no tensor has this class."""

    tensor_data_names: ClassVar[list[str]]
    qdata: Tensor
    scale: Tensor
    scale_and_zero: Tensor
    zero_point: Tensor | None
    block_size: list[int]
    act_pre_scale: Tensor | None
    act_quant_kwargs: object
    act_mapping_type: object


# ---- values


@functools.cache
def _is_torchao(kind: type) -> bool:
    return any(base.__name__ == "TorchAOBaseTensor" for base in kind.__mro__)


def is_quantized(weight: object) -> TypeGuard[TorchaoTensor]:
    """Whether torchao has quantized `weight`."""
    return _is_torchao(type(weight))


@functools.cache
def _names_of_inner_tensors(kind: type[TorchaoTensor]) -> tuple[str, ...]:
    return (*kind.tensor_data_names, *getattr(kind, "optional_tensor_data_names", ()))


def inner_tensors(weight: Tensor) -> list[Tensor]:
    """The tensors that a quantized weight wraps; it has no memory of its own."""
    attributes = weight.__dict__
    inner = [attributes.get(name) for name in _names_of_inner_tensors(type(weight))]
    return [tensor for tensor in inner if tensor is not None]


def quantized_activations(model: nn.Module) -> dict[str, str]:
    """The settings by which activations are quantized before a product; {} if none are. They are not in the codes."""
    settings = {name: getattr(weight, "act_quant_kwargs", None) for name, weight in model.named_parameters()}
    settings = {name: repr(each) for name, each in settings.items() if each is not None}
    return {"activations": json.dumps(settings)} if settings else {}


def dequantized(weight: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The matrix (out, in) that a linear module multiplies with; the weight itself if it is not quantized.

    `dtype` defaults to float32 (float64 for float64), which rounds nothing that torchao's kernels do not round.
    """
    if not is_quantized(weight):
        return weight if dtype is None else weight.to(dtype)
    dtype = dtype or torch.promote_types(weight.dtype, torch.float32)
    values = _VALUES.get(type(weight).__name__, _values)(cast(TorchaoTensor, weight.detach()), dtype)
    scales = getattr(weight, "act_pre_scale", None)  # of the inputs, which are the columns of the matrix
    return values if scales is None else values * scales.to(dtype)


def _values(weight: TorchaoTensor, dtype: torch.dtype) -> Tensor:
    return weight.dequantize().to(dtype)


def _values_of_int8(weight: TorchaoTensor, dtype: torch.dtype) -> Tensor:
    if weight.block_size[-1] < weight.shape[-1]:  # scales of groups: torchao expands them
        return _values(weight, dtype)
    return weight.qdata.to(dtype) * weight.scale.to(dtype)


def _values_of_int4(weight: TorchaoTensor, dtype: torch.dtype) -> Tensor:
    if weight.act_mapping_type is not None:
        raise ValueError(
            "int4 weights whose activations are quantized too are stored in another order, so their matrix cannot be "
            "read back: quantize the weights only (`PrototypeInt4WeightOnlyConfig`)."
        )
    scale, zero = weight.scale_and_zero.to(dtype).unbind(-1)
    return _scaled_codes(_codes(weight.qdata) - 8, scale, zero)


def _values_of_plain_int4(weight: TorchaoTensor, dtype: torch.dtype) -> Tensor:
    return _scaled_codes(_plain_codes(weight.qdata) - 8, weight.scale.to(dtype), _zero_point(weight).to(dtype))


def _zero_point(weight: TorchaoTensor) -> Tensor:
    return torch.zeros_like(weight.scale) if weight.zero_point is None else weight.zero_point


def _scaled_codes(codes: Tensor, scale: Tensor, zero: Tensor) -> Tensor:
    """`codes` (out, in); `scale`, `zero` (groups, out)."""
    grouped = codes.view(codes.shape[0], scale.shape[0], -1).to(scale.dtype)  # (out, groups, group_size)
    return (grouped * scale.mT[..., None] + zero.mT[..., None]).flatten(1)


_VALUES: dict[str, Callable[[TorchaoTensor, torch.dtype], Tensor]] = {
    "Int8Tensor": _values_of_int8,
    "Int4OpaqueTensor": _values_of_int4,
    "Int4Tensor": _values_of_plain_int4,
}


# ---- the order of int4 codes


def _pack(codes: Tensor) -> Tensor:
    """Codes 0 ... 15 (out, in) in the order that this processor's kernel reads, two a byte: (out, in / 2)."""
    return torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32).contiguous(), 1)


def _nibbles(data: Tensor) -> Tensor:
    """The two halves of each byte, low first: (..., n) -> (..., 2 n)."""
    data = data.view(torch.uint8)
    return torch.stack([data & 15, data >> 4], dim=-1).flatten(-2)


@functools.cache
def packed_rows() -> int:
    """The number of rows that this processor packs together; such a block stores input after input."""
    marked = torch.zeros(LARGEST_BLOCK, 2, dtype=torch.int32, device="cpu")
    marked[:, 1] = 15
    return 2 * int(_pack(marked).flatten().nonzero()[0])


@functools.cache
def _places(num_rows: int) -> Tensor:
    """The place of each row of a block of `num_rows` among the nibbles of one input.

    The order depends on the processor and on whether a block is full, so it is read from the kernel's own output.
    """
    rows = torch.arange(num_rows, device="cpu")
    low, high = _nibbles(_pack(torch.stack([rows % 16, rows // 16], dim=1)).view(2, -1)).long()
    return torch.argsort(low + 16 * high)


def _codes(packed: Tensor) -> Tensor:
    """The inverse of `_pack`, as int8: (out, in / 2) -> (out, in)."""
    num_rows, width = packed.shape[0], 2 * packed.shape[1]
    full = num_rows - num_rows % packed_rows()
    blocks = [(packed[:full], packed_rows()), (packed[full:], num_rows - full)]
    return torch.cat([_codes_of_blocks(part, rows, width) for part, rows in blocks if part.numel()])


def _codes_of_blocks(packed: Tensor, num_rows: int, width: int) -> Tensor:
    by_input = _nibbles(packed.reshape(-1, width, num_rows // 2))  # (blocks, in, rows)
    return by_input[..., _places(num_rows)].mT.reshape(-1, width).to(torch.int8)


def _plain_codes(data: Tensor) -> Tensor:
    """Codes 0 ... 15 (out, in) of bytes (out, in / 2) that hold two codes -8 ... 7 each, in order."""
    return _nibbles(data).bitwise_xor(8).to(torch.int8)


def _plain_data(codes: Tensor) -> Tensor:
    low, high = codes.to(torch.uint8).bitwise_xor(8).unflatten(-1, (-1, 2)).unbind(-1)
    return (low | (high << 4)).view(torch.int8)


# ---- for our kernels


@dataclass(frozen=True, eq=False)
class PackedWeight:
    """The tensors of a quantized weight (out, in), without a copy, in the form that native kernels read.

    Args:
        kind: "int8" or "int4".
        qdata: int8 (out, in); or uint8 (out, in / 2), a sequence of blocks of `block_n` rows, of which the last may
            have fewer; a block of n rows has n / 2 bytes for each input.
        scale: of "int8", float (out,).
        scale_and_zero: of "int4", float (in / group_size, out, 2).
        has_halves: whether byte d of a full block has rows d (low) and d + block_n / 2 (high). Otherwise, and in a
            last block that is not full, it has rows 2 d and 2 d + 1.
    """

    kind: str
    qdata: Tensor
    scale: Tensor | None = None
    scale_and_zero: Tensor | None = None
    group_size: int = 0
    block_n: int = 0
    has_halves: bool = False

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        rows, width = self.qdata.shape
        return rows, 2 * width if self.kind == "int4" else width

    def fits(self) -> bool:
        """Whether all fields have the types and sizes above, so that no kernel reads out of bounds."""
        if self.qdata.ndim != 2 or not self.qdata.is_contiguous():
            return False
        rows, width = self.shape
        if self.kind == "int8":
            return self.qdata.dtype is torch.int8 and _is_contiguous_of(self.scale, (rows,))
        groups, remainder = divmod(width, self.group_size) if self.group_size > 0 else (0, 1)
        fits = remainder == 0 and _is_contiguous_of(self.scale_and_zero, (groups, rows, 2))
        return fits and self.qdata.dtype is torch.uint8


def _is_contiguous_of(tensor: Tensor | None, shape: tuple[int, ...]) -> bool:
    return tensor is not None and tensor.shape == shape and tensor.is_contiguous()


class _PackedWeights:
    """`PackedWeight` by weight, kept as long as the weight lives and wraps the same tensors."""

    def __init__(self):
        self.by_weight: dict[int, tuple[weakref.ref, Tensor | None, Tensor | None, PackedWeight | None]] = {}

    def __call__(self, weight: Tensor) -> PackedWeight | None:
        if not is_quantized(weight):
            return None
        entry, attributes = self.by_weight.get(id(weight)), weight.__dict__
        qdata, scale = attributes.get("qdata"), attributes.get("scale", attributes.get("scale_and_zero"))
        if entry is not None and entry[1] is qdata and entry[2] is scale and entry[0]() is weight:
            return entry[3]
        reference = weakref.ref(weight, functools.partial(self._forget, id(weight)))
        packed = _packed(weight)
        self.by_weight[id(weight)] = reference, qdata, scale, packed
        return packed

    def _forget(self, key: int, reference: weakref.ref) -> None:
        entry = self.by_weight.get(key)
        if entry is not None and entry[0] is reference:
            del self.by_weight[key]


packed_weight = _PackedWeights()


def _packed(weight: TorchaoTensor) -> PackedWeight | None:
    """`None` for weights that our kernels do not read."""
    read = {"Int8Tensor": _packed_int8, "Int4OpaqueTensor": _packed_int4}.get(type(weight).__name__)
    if read is None or weight.act_pre_scale is not None or weight.qdata.device.type != "cpu":
        return None
    return read(weight) if weight.qdata.ndim == 2 and weight.qdata.is_contiguous() else None


def _that_fits(packed: PackedWeight) -> PackedWeight | None:
    return packed if packed.fits() else None


def _packed_int8(weight: TorchaoTensor) -> PackedWeight | None:
    is_shifted = weight.zero_point is not None and bool(weight.zero_point.any())
    if weight.act_quant_kwargs is not None or is_shifted or weight.scale.numel() != weight.shape[0]:
        return None
    return _that_fits(PackedWeight("int8", weight.qdata, scale=weight.scale.reshape(-1)))


def _packed_int4(weight: TorchaoTensor) -> PackedWeight | None:
    block_n, num_rows = packed_rows(), weight.qdata.shape[0]
    has_halves = _has_halves(block_n)
    is_readable = has_halves or _has_pairs(block_n)
    is_readable = is_readable and (num_rows % block_n == 0 or _has_pairs(num_rows % block_n))
    if weight.act_mapping_type is not None or not is_readable or not weight.scale_and_zero.is_contiguous():
        return None
    if problem_of(weight) is not None:
        return None
    return _that_fits(
        PackedWeight(
            "int4",
            weight.qdata,
            scale_and_zero=weight.scale_and_zero,
            group_size=weight.block_size[1],
            block_n=block_n,
            has_halves=has_halves,
        )
    )


def _has_halves(num_rows: int) -> bool:
    return torch.equal(_places(num_rows), torch.arange(num_rows, device="cpu").view(-1, 2).T.flatten())


def _has_pairs(num_rows: int) -> bool:
    return torch.equal(_places(num_rows), torch.arange(num_rows, device="cpu"))


# ---- checks of files

# The tensors of each class of weights, with the dtypes that they may have.
_FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
_BYTES = (torch.int8, torch.uint8)
_TYPES = {
    "Int8Tensor": {"qdata": (torch.int8,), "scale": _FLOATS},
    "Int4Tensor": {"qdata": _BYTES, "scale": _FLOATS, "zero_point": _FLOATS},
    "Int4OpaqueTensor": {"qdata": (torch.uint8,), "scale_and_zero": _FLOATS},
}


def problem_of(weight: TorchaoTensor) -> str | None:
    """Names a field of a quantized weight (out, in) that contradicts its shape; `None` if all sizes fit.

    The sizes come from files, and kernels compute addresses from them.
    """
    types = _TYPES.get(type(weight).__name__)
    if types is None or weight.ndim != 2 or getattr(weight, "act_mapping_type", None) is not None:
        return None
    for name, allowed in types.items():
        if getattr(weight, name).dtype not in allowed:
            return f"`{name}` is {getattr(weight, name).dtype}, not {' or '.join(map(str, allowed))}"
    rows, width = weight.shape
    is_int8 = "scale_and_zero" not in types and "zero_point" not in types
    block = weight.block_size
    is_pair = isinstance(block, (list, tuple)) and len(block) == 2 and all(type(size) is int for size in block)
    if not is_pair or min(block) < 1 or rows % block[0] or width % block[1] or not (is_int8 or block[0] == 1):
        return f"`block_size` is {block}, which does not divide the weight's shape {(rows, width)}"
    return _problem_of_shapes(weight, is_int8, rows // block[0], width // block[1])


def _problem_of_shapes(weight: TorchaoTensor, is_int8: bool, row_groups: int, groups: int) -> str | None:
    rows, width = weight.shape
    expected = {"qdata": (rows, width if is_int8 else width // 2)}
    if not is_int8:
        is_packed = hasattr(weight, "scale_and_zero")
        scales = {"scale_and_zero": (groups, rows, 2)}
        expected |= scales if is_packed else {"scale": (groups, rows), "zero_point": (groups, rows)}
    for name, shape in expected.items():
        if getattr(weight, name).shape != shape:
            return f"`{name}` has shape {tuple(getattr(weight, name).shape)}, not {shape}"
    counts = {"act_pre_scale": (1, width)} | ({"scale": (row_groups * groups,)} if is_int8 else {})
    counts |= {"zero_point": (row_groups * groups,)} if is_int8 else {}
    for name, allowed in counts.items():
        tensor = getattr(weight, name, None)
        if tensor is not None and tensor.numel() not in allowed:
            return f"`{name}` has {tensor.numel()} numbers, not {' or '.join(map(str, allowed))}"
    return None


def check_quantized(model: nn.Module) -> None:
    """Raises `ValueError`, which names weight and field, for a quantized weight whose sizes contradict each other."""
    for name, weight in model.named_parameters():
        problem = problem_of(weight) if is_quantized(weight) else None
        if problem is not None:
            raise ValueError(
                f"The quantized weight `{name}` cannot be used: {problem}. Its file is damaged or was changed: fetch "
                "or save it again."
            )


# ---- files


def portable(weight: Tensor) -> Tensor:
    """`weight` in a form that does not depend on the processor, for files and for digests of content."""
    if not is_quantized(weight) or type(weight).__name__ != "Int4OpaqueTensor" or weight.act_mapping_type is not None:
        return weight
    scale, zero = (part.contiguous() for part in weight.scale_and_zero.unbind(-1))
    kind = importlib.import_module("torchao.quantization").Int4Tensor
    return kind(_plain_data(_codes(weight.qdata)), scale, zero, weight.block_size, weight.shape, weight.act_pre_scale)


def _for_this_processor(weight: TorchaoTensor) -> Tensor:
    """The inverse of `portable`."""
    kind = importlib.import_module("torchao.prototype.quantization.int4").Int4OpaqueTensor
    scale_and_zero = torch.stack([weight.scale, _zero_point(weight)], dim=-1)
    packed = _pack(_plain_codes(weight.qdata))
    return kind(packed, scale_and_zero, weight.block_size, weight.shape, weight.act_pre_scale)


def pack_for_this_processor(model: nn.Module) -> None:
    """Packs int4 weights that are on the CPU after loading for the kernel of this processor.

    Raises:
        ValueError: as `check_quantized`, before any weight has changed.
    """
    check_quantized(model)
    for module in model.modules():
        for name, weight in module._parameters.items():
            if is_quantized(weight) and type(weight).__name__ == "Int4Tensor" and weight.device.type == "cpu":
                module._parameters[name] = nn.Parameter(_for_this_processor(weight), requires_grad=False)


class _PortableQuantizer(HfQuantizer):
    """Transformers' quantizer during a save: torchao's files, with all weights in a form for any processor."""

    is_trainable = property(lambda self: False)

    def get_state_dict_and_metadata(self, model: nn.Module, *_) -> tuple[dict, dict]:
        flatten = importlib.import_module(
            "torchao.prototype.safetensors.safetensors_support"
        ).flatten_tensor_state_dict
        return flatten({name: portable(weight) for name, weight in model.state_dict().items()})

    def is_serializable(self, *_) -> bool:
        return True


@contextmanager
def saved_as_quantized(model: PreTrainedModel) -> Iterator[None]:
    """Context of a save that writes quantized weights in torchao's format, for any processor."""
    weight = next(filter(is_quantized, model.parameters()), None)
    if weight is None:
        yield
        return
    config, quantizer = model.config, getattr(model, "hf_quantizer", None)
    settings = getattr(config, "quantization_config", None)
    config.quantization_config = _portable_settings(settings, weight)
    attributes = vars(model)  # `nn.Module` annotates attributes as tensors and modules
    attributes["hf_quantizer"] = _PortableQuantizer(config.quantization_config)
    try:
        yield
    finally:
        attributes["hf_quantizer"] = quantizer
        if settings is None:
            del vars(config)["quantization_config"]
        else:
            config.quantization_config = settings


def _portable_settings(settings: TorchAoConfig | None, weight: TorchaoTensor) -> TorchAoConfig:
    if settings is None:
        return TorchAoConfig(_quant_type_of(weight))
    settings = copy.copy(settings)
    settings.quant_type = _portable_quant_type(settings.quant_type)
    return settings


def _portable_quant_type(quant_type):
    """A configuration that torchao's reader accepts: it refuses prototypes, and needs only the kind of the weights."""
    quantization, kind = importlib.import_module("torchao.quantization"), type(quant_type).__name__
    if kind == "PrototypeInt4WeightOnlyConfig":
        return quantization.Int4WeightOnlyConfig(group_size=quant_type.group_size)
    if kind == "FqnToConfig":
        by_name = quant_type.fqn_to_config.items()
        return quantization.FqnToConfig({name: _portable_quant_type(each) for name, each in by_name})
    return quant_type


def _quant_type_of(weight: TorchaoTensor):
    """torchao's configuration for a weight that was quantized after loading."""
    quantization = importlib.import_module("torchao.quantization")
    if "Int4" in type(weight).__name__:
        return quantization.Int4WeightOnlyConfig(group_size=weight.block_size[1])
    if type(weight).__name__ == "Int8Tensor" and weight.act_quant_kwargs is None:
        return quantization.Int8WeightOnlyConfig()
    raise ValueError(
        f"Weights of type {type(weight).__name__} were quantized after loading, and a file cannot name the method: "
        "load the model with `quantization_config=TorchAoConfig(...)` instead, then save it."
    )


__all__ = [
    "PackedWeight",
    "check_quantized",
    "dequantized",
    "inner_tensors",
    "is_quantized",
    "pack_for_this_processor",
    "packed_rows",
    "packed_weight",
    "portable",
    "quantized_activations",
    "saved_as_quantized",
]
