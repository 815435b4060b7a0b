"""The CPU kernel that encodes keys and values in a few bits, with the bytes of `VectorCodec.encode`."""

import ctypes

import torch
from torch import Tensor, get_num_threads

from .ops_cpu_interface_mambaformer import Codec, kernel_of
from .ops_eligibility_mambaformer import may_run_forward

# Bits of each number, groups with a scale each, bytes of a vector, and whether groups have a shift too.
CodecFields = tuple[int, int, int, bool]


def encode_on_cpu(vectors: Tensor, fields: CodecFields) -> Tensor | None:
    """(..., size) -> (..., bytes), bit for bit as the reference encodes them."""
    kernel = kernel_of("encode", vectors.dtype) if may_run_forward(vectors) else None
    if kernel is None or not vectors.numel():
        return None
    vectors, size, codec = vectors.contiguous(), vectors.shape[-1], Codec(*fields)
    codes = torch.empty((*vectors.shape[:-1], codec.nbytes), dtype=torch.uint8)
    kernel(vectors.data_ptr(), vectors.numel() // size, size, ctypes.addressof(codec), codes.data_ptr(),
           get_num_threads())  # fmt: skip
    return codes


__all__ = ["CodecFields", "encode_on_cpu"]
