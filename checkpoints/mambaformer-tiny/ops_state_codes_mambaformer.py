"""Recurrent states in 8 bits: rounding after each token, and codes. The reference, and the front of its kernels.

The numbers of the last dimension of a state are a group: integers from -127 to 127 times a power of two, the smallest
one that reaches the largest of them. Every rounded state is exact as codes, and rounding it again changes nothing.

A state that is rounded to nearest after each token stalls: an update below half a step is lost at every token. So the
fraction of a step decides how often a number is rounded up (stochastic rounding, arXiv 1502.02551, section 3), where
the random threshold is a hash of the token's position in its row and of the index of the number in the state. No
rounding depends on other rows, or on how the row was cut into forwards.

Codes are (..., numbers + 1) signed bytes for states (..., numbers): the exponent comes last.
"""

import torch
from torch import Tensor

from .ops_backends_mambaformer import run_kernel
from .ops_eligibility_mambaformer import is_differentiated
from .ops_reference_mambaformer import arithmetic_dtype, scan

# Both powers of two, 2**n and 2**-n, of all exponents n are normal numbers of float32.
LOWEST_EXPONENT, HIGHEST_EXPONENT = -126, 121
LARGEST_CODE = 127
# The exponent of a group that holds infinity or NaN, which is decoded as NaN.
NO_NUMBER = -128


def round_states(states: Tensor, positions: Tensor) -> Tensor:
    """States (rows, ..., numbers) after the tokens at `positions` (rows,), rounded to numbers that codes stand for.

    Float32 or float64; a rounded state is its own rounding at any position.
    """
    _refuse_gradients(states)
    rounded = run_kernel("round_states", states, positions)
    return round_reference(states, positions) if rounded is None else rounded


def encode_states(states: Tensor) -> Tensor:
    """States (..., numbers) -> codes (..., numbers + 1), int8: exact for rounded states, the nearest for others."""
    _refuse_gradients(states)
    codes = run_kernel("encode_states", states)
    return encode_reference(states) if codes is None else codes


def decode_states(codes: Tensor, dtype: torch.dtype) -> Tensor:
    """Codes (..., numbers + 1) -> states (..., numbers) in float32 or float64."""
    states = run_kernel("decode_states", codes, dtype)
    return decode_reference(codes, dtype) if states is None else states


def scan_rounded(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    gate: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    dt_softplus: bool,
    A_is_log: bool,
    positions: Tensor,
) -> tuple[Tensor, Tensor]:
    """`rounded_scan` of `ops_mambaformer`, token by token."""
    state, outputs = initial_state, []
    for token in range(u.shape[1]):
        one = slice(token, token + 1)
        own_gate = None if gate is None else gate[:, one]
        own_lengths = None if lengths is None else (lengths - token).clamp(0, 1)
        inputs = u[:, one], dt[:, one], A, B[:, one], C[:, one], D, own_gate
        y, state = scan(*inputs, state, own_lengths, dt_softplus, A_is_log, None)
        state = round_states(state, positions[:, token])
        outputs.append(y)
    if state is None:
        state = torch.zeros(len(u), *A.shape, dtype=arithmetic_dtype(u, A), device=u.device)
    return torch.cat(outputs, dim=1) if outputs else u, state


def _refuse_gradients(states: Tensor) -> None:
    if is_differentiated(states):
        raise ValueError(
            "Rounding has no gradient, so a cache with `state_bits` is fed without one: call the model under "
            "`torch.no_grad()`, or make the cache without `state_bits`."
        )


def round_reference(states: Tensor, positions: Tensor) -> Tensor:
    exponents, are_numbers = _exponents(states)
    levels = states * _power_of_two(-exponents, states.dtype)
    low = levels.floor()
    levels = low + (levels - low > _thresholds(positions, states.shape[1:]).to(states.device))
    return torch.where(are_numbers, levels * _power_of_two(exponents, states.dtype), torch.nan)


def encode_reference(states: Tensor) -> Tensor:
    exponents, are_numbers = _exponents(states)
    levels = torch.where(are_numbers, (states * _power_of_two(-exponents, states.dtype)).round(), 0)
    return torch.cat([levels, torch.where(are_numbers, exponents, NO_NUMBER)], dim=-1).to(torch.int8)


def decode_reference(codes: Tensor, dtype: torch.dtype) -> Tensor:
    levels, exponents = codes[..., :-1].to(dtype), codes[..., -1:].int()
    powers = _power_of_two(exponents.clamp(min=LOWEST_EXPONENT), dtype)
    return levels * torch.where(exponents == NO_NUMBER, torch.nan, powers)


def _exponents(states: Tensor) -> tuple[Tensor, Tensor]:
    """The exponent of each group, (..., 1), and whether all of the group are numbers that codes can stand for."""
    largest = states.abs().amax(-1, keepdim=True)
    fractions, exponents = torch.frexp(largest)
    # 127 times 2**(n - 7) reaches fraction * 2**n up to this fraction.
    exponents = exponents - 7 + (fractions > LARGEST_CODE / 128)
    are_numbers = largest <= LARGEST_CODE * 2.0**HIGHEST_EXPONENT  # false for NaN
    exponents = torch.where(are_numbers, exponents, 0).clamp(min=LOWEST_EXPONENT)
    return exponents, are_numbers


def _power_of_two(exponents: Tensor, dtype: torch.dtype) -> Tensor:
    """Exact, which a vectorized `exp2` need not be."""
    return ((exponents.int() + 127) << 23).view(torch.float32).to(dtype)


def _thresholds(positions: Tensor, shape: torch.Size) -> Tensor:
    """A number from 0 to 1 - 2**-24 for each position (rows,) and each number of a state of this shape."""
    index = torch.arange(shape.numel(), device=positions.device)
    mixed = (positions.long()[:, None] * 0x9E3779B1) ^ (index * 0x85EBCA77 + 0x165667B1)
    mixed = mixed & 0xFFFFFFFF
    # An integer hash of 32 bits without a bias (C. Wellons, hash-prospector, "lowbias32").
    mixed = ((mixed ^ (mixed >> 16)) * 0x7FEB352D) & 0xFFFFFFFF
    mixed = ((mixed ^ (mixed >> 15)) * 0x846CA68B) & 0xFFFFFFFF
    mixed = mixed ^ (mixed >> 16)
    return ((mixed >> 8).to(torch.float32) * 2.0**-24).unflatten(1, shape)


__all__ = ["decode_states", "encode_states", "round_states", "scan_rounded"]
