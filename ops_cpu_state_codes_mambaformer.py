"""The CPU kernels that round, encode and decode recurrent states, with the bits of `ops_state_codes_mambaformer`."""

import torch
from torch import Tensor, get_num_threads

from .ops_cpu_interface_mambaformer import kernel_of
from .ops_eligibility_mambaformer import may_run_forward

# The types of states; kernels of activations have others.
WIDE = (torch.float32, torch.float64)


def round_states_on_cpu(states: Tensor, positions: Tensor) -> Tensor | None:
    """`round_states`; `None` where the kernel cannot run."""
    if states.dtype not in WIDE or not states.numel() or not may_run_forward(states) or not positions.is_cpu:
        return None
    kernel = kernel_of("round_states", states.dtype)
    if kernel is None:
        return None
    states, positions = states.contiguous(), positions.to(torch.int64).contiguous()
    rows, numbers, rounded = states.shape[0], states.shape[-1], torch.empty_like(states)
    groups = states.numel() // (rows * numbers)
    sizes = rows, groups, numbers
    kernel(states.data_ptr(), *sizes, positions.data_ptr(), rounded.data_ptr(), get_num_threads())
    return rounded


def encode_states_on_cpu(states: Tensor) -> Tensor | None:
    """`encode_states`; `None` where the kernel cannot run."""
    if states.dtype not in WIDE or not states.numel() or not may_run_forward(states):
        return None
    kernel = kernel_of("encode_states", states.dtype)
    if kernel is None:
        return None
    states, numbers = states.contiguous(), states.shape[-1]
    codes = states.new_empty((*states.shape[:-1], numbers + 1), dtype=torch.int8)
    kernel(states.data_ptr(), states.numel() // numbers, numbers, codes.data_ptr(), get_num_threads())
    return codes


def decode_states_on_cpu(codes: Tensor, dtype: torch.dtype) -> Tensor | None:
    """`decode_states`; `None` where the kernel cannot run."""
    if dtype not in WIDE or not codes.numel() or codes.shape[-1] < 2 or not may_run_forward(codes):
        return None
    kernel = kernel_of("decode_states", dtype)
    if kernel is None:
        return None
    codes, numbers = codes.contiguous(), codes.shape[-1] - 1
    states = codes.new_empty((*codes.shape[:-1], numbers), dtype=dtype)
    kernel(codes.data_ptr(), states.numel() // numbers, numbers, states.data_ptr(), get_num_threads())
    return states


__all__ = ["decode_states_on_cpu", "encode_states_on_cpu", "round_states_on_cpu"]
