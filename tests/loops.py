"""Loops over tokens that judge the two functions in ops_mambaformer.py, and what those are fed."""

import torch
from torch.nn import functional as F

# 1 takes the single step, up to 8 one level of the scan in PyTorch, the others two with and without a full last chunk;
# the kernels have chunks of 32.
LENGTHS = (1, 2, 7, 8, 9, 23, 64, 101)


def naive_conv(x, weight, bias, state):
    """One token after another: (y, last inputs) of packed rows without pads."""
    taps, outputs = weight.shape[1], []
    for t in range(x.shape[1]):
        window = torch.cat([state, x[:, t : t + 1]], dim=1)
        outputs.append(F.silu((window * weight.t()).sum(1) + bias))
        state = window[:, window.shape[1] - (taps - 1) :]
    return torch.stack(outputs, 1) if outputs else x, state


def naive_scan(u, dt, A, B, C, D, gate, h):
    """One token after another: (y, final state) of packed rows without pads."""
    outputs = []
    for t in range(u.shape[1]):
        h = torch.exp(dt[:, t, :, None] * A) * h + (dt[:, t] * u[:, t])[:, :, None] * B[:, t, None, :]
        outputs.append((h * C[:, t, None, :]).sum(-1) + D * u[:, t])
    return (torch.stack(outputs, 1) if outputs else u) * F.silu(gate), h


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64).to(dtype)


def conv_arguments(rows=2, length=7, channels=3, taps=4):
    return {
        "x": normal(rows, length, channels, seed=1),
        "weight": normal(channels, taps, seed=2),
        "bias": normal(channels, seed=3),
        "initial_state": normal(rows, taps - 1, channels, seed=4),
    }


def scan_arguments(rows=2, length=7, channels=3, numbers=5):
    return {
        "u": normal(rows, length, channels, seed=1),
        "dt": F.softplus(normal(rows, length, channels, seed=2)),
        "A": -torch.exp(normal(channels, numbers, seed=3)),
        "B": normal(rows, length, numbers, seed=4),
        "C": normal(rows, length, numbers, seed=5),
        "D": normal(channels, seed=6),
        "gate": normal(rows, length, channels, seed=7),
        "initial_state": normal(rows, channels, numbers, seed=8),
    }


PER_TOKEN = ("x", "u", "dt", "B", "C", "gate")
PER_ROW = (*PER_TOKEN, "initial_state")


def tokens_of(arguments, start, stop, **changes):
    return {k: v[:, start:stop] if k in PER_TOKEN else v for k, v in arguments.items()} | changes


def row_of(arguments, row, length):
    rows = {k: v[row : row + 1] if k in PER_ROW else v for k, v in arguments.items()}
    return tokens_of(rows, 0, length)


def with_pads(arguments, lengths, value):
    """The same arguments with `value` in place of everything behind each row's end."""
    pads = torch.arange(10**4) >= lengths[:, None]
    fill = {k: v.masked_fill(pads[:, : v.shape[1], None], value) for k, v in arguments.items() if k in PER_TOKEN}
    return arguments | fill


def assert_same(got, expected, tolerance=1e-10):
    for one, other in zip(got, expected, strict=True):
        assert one.shape == other.shape
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance)
