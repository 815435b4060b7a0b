"""The matrix recurrence in PyTorch, chunk by chunk: the reference that judges every kernel, and runs where none may.

Within a chunk, with G_t the sum of g up to token t and S the state in which the chunk starts,

    w_t = beta_t (v_t - e^(G_t) S^T k_t - sum_(s<t) e^(G_t - G_s) (k_t . k_s) w_s)      (w_t = v_t without beta)
    y_t = e^(G_t) S^T q_t + sum_(s<=t) e^(G_t - G_s) (q_t . k_s) w_s

so all w of a chunk solve one unit triangular system (arXiv 2406.06484, section 3.2; arXiv 2412.06464, section 3.3;
without beta arXiv 2405.21060, section 6). Only numbers <= 0 are exponentiated.
"""

import math
import operator
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from .ops_reference_mambaformer import (
    DOUBLINGS,
    EXPORTED_CHUNK,
    arithmetic_dtype,
    real_tokens,
    without_autocast,
    zero_padding,
)

LONGEST_CHUNK = 64
LONGEST_CHANNEL_CHUNK = 16  # with a decay per channel, a chunk holds chunk x chunk x K numbers for each head


def recur(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    beta: Tensor | None,
    initial_state: Tensor | None,
    lengths: Tensor | None,
    positions: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """`matrix_recurrence`."""
    (rows, length, groups, key_size), (heads, value_size), stored = q.shape, v.shape[2:], v.dtype
    dtype, real = arithmetic_dtype(q, k, v, g, beta, initial_state), real_tokens(lengths, length)
    real = None if real is None else real[..., None]
    g = g[..., None] if g.ndim == 3 else g
    beta = None if beta is None else beta[..., None]
    # Padding is the neutral input: no decay, no write, no read.
    q, k, v, g = (_by_group(zero_padding(each, real).to(dtype), groups) for each in (q, k, v, g))
    beta = None if beta is None else _by_group(zero_padding(beta, real).to(dtype), groups)
    state = v.new_zeros(rows, heads, key_size, value_size) if initial_state is None else initial_state.to(dtype)
    with without_autocast(v.device.type):
        y, state = _recur(q, k, v, g, beta, state.unflatten(1, (groups, heads // groups)), positions)
    return y.movedim(3, 1).flatten(2, 3).to(stored), state.flatten(1, 2)


def _by_group(tensor: Tensor, groups: int) -> Tensor:
    """(B, L, G or H, X) as (B, G, 1 or H / G, L, X)."""
    return tensor.unflatten(2, (groups, tensor.shape[2] // groups)).movedim(1, 3)


def _recur(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    """y (B, G, R, L, V) and the final state, from tensors (B, G, 1 or R, L, X) and a state (B, G, R, K, V)."""
    length = v.shape[3]
    is_symbolic = isinstance(length, torch.SymInt)  # asked first: a comparison would fix the length in the graph
    if not is_symbolic and length == 0:
        return v, state
    if not is_symbolic and length == 1:
        return _recur_token(q, k, v, g, beta, state, positions)
    index = _exported_chunks(length, v.device) if is_symbolic else _chunks(operator.index(length), g.shape[-1] > 1)
    q, k, v, g = (_split(each, index) for each in (q, k, v, g))
    beta = None if beta is None else _split(beta, index)
    sequence = None
    if positions is not None:
        sequence = _split((positions == 0)[:, None, None, :, None], index)[..., 0].cumsum(-1)
    chunks = _Chunks.of(q, k, v, g, beta, sequence)
    entered, final = (_enter_by_doubling if is_symbolic else _enter)(chunks, state)
    y = chunks.read(entered).flatten(3, 4)
    return y.index_select(3, torch.arange(length, device=y.device)) if is_symbolic else y[:, :, :, :length], final


def _recur_token(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, state: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor]:
    kept = g.mT.exp()  # (B, G, R, 1 or K, 1)
    if positions is not None:
        kept = torch.where((positions == 0)[:, None, None, :, None], 0, kept)
    state = kept * state
    write = v if beta is None else beta * (v - k @ state)
    state = state + k.mT * write
    return q @ state, state


# ---- chunks


def _chunks(length: int, has_channel_decay: bool) -> tuple[int, int]:
    """The number of chunks and their length, with as little padding as possible."""
    chunks = math.ceil(length / (LONGEST_CHANNEL_CHUNK if has_channel_decay else LONGEST_CHUNK))
    return chunks, math.ceil(length / chunks)


def _exported_chunks(length: int, device: torch.device) -> Tensor:
    """The tokens of each chunk, (chunks, EXPORTED_CHUNK), for a length that is known only when the graph runs."""
    # One chunk more than needed: a dimension that is 1 for some lengths would restrict the lengths of the graph.
    chunks = (length + EXPORTED_CHUNK - 1) // EXPORTED_CHUNK + 1
    starts = EXPORTED_CHUNK * torch.arange(chunks, device=device)
    return starts[:, None] + torch.arange(EXPORTED_CHUNK, device=device)


def _split(tensor: Tensor, chunks: tuple[int, int] | Tensor) -> Tensor:
    """(B, G, R, L, X) as (B, G, R, chunks, chunk, X); zeros, the neutral input, fill the last chunk."""
    length = tensor.shape[3]
    if isinstance(chunks, Tensor):
        padded = F.pad(tensor, (0, 0, 0, chunks.shape[0] * EXPORTED_CHUNK - length))
        return padded[:, :, :, chunks]
    missing = chunks[0] * chunks[1] - length
    tensor = F.pad(tensor, (0, 0, 0, missing)) if missing else tensor
    return tensor.unflatten(3, chunks)


@dataclass(frozen=True)
class _Chunks:
    """What each chunk does to the state in which it starts: all tensors are (B, G, R, chunks, ...).

    Args:
        queries: decayed since the start of the chunk, (chunk, K).
        scores: of queries and earlier keys, (chunk, chunk).
        writes: w of a chunk that starts from zeros, (chunk, V).
        corrections: w loses `corrections @ S`, (chunk, K); `None` without a delta rule.
        keys: decayed until the end of the chunk, (chunk, K).
        kept: decay over the chunk, (1 or K, 1).
    """

    queries: Tensor
    scores: Tensor
    writes: Tensor
    corrections: Tensor | None
    keys: Tensor
    kept: Tensor

    @classmethod
    def of(cls, q: Tensor, k: Tensor, v: Tensor, g: Tensor, beta: Tensor | None, sequence: Tensor | None) -> "_Chunks":
        """From tensors (B, G, R, chunks, chunk, X); `sequence` numbers the sequences that start within a chunk."""
        # Sums in float64: where the decay since the start is large, float32 has no digits left for differences.
        total = g.double().cumsum(-2)
        sees = torch.ones(g.shape[-2], g.shape[-2], dtype=torch.bool, device=g.device).tril()
        is_first = is_last = None
        if sequence is not None:
            sees = sees & (sequence[..., :, None] == sequence[..., None, :])
            is_first, is_last = (sequence == 0)[..., None], (sequence == sequence[..., -1:])[..., None]
        since_start = _masked(total.to(g.dtype).exp(), is_first)
        until_end = _masked((total[..., -1:, :] - total).to(g.dtype).exp(), is_last)
        scores, overlaps = _products(q, k, total, sees, g.dtype, beta is not None)
        writes, corrections = v, None
        if beta is not None and overlaps is not None:
            right = torch.cat([beta * v, (beta * since_start * k).expand(*v.shape[:-1], -1)], dim=-1)
            system = beta * overlaps.tril(-1)
            solved = torch.linalg.solve_triangular(system, right, upper=False, unitriangular=True)
            writes, corrections = solved.split([v.shape[-1], k.shape[-1]], dim=-1)
        return cls(since_start * q, scores, writes, corrections, until_end * k, since_start[..., -1:, :].mT)

    def read(self, entered: Tensor) -> Tensor:
        """y (B, G, R, chunks, chunk, V) from the states in which chunks start."""
        writes = self.writes if self.corrections is None else self.writes - self.corrections @ entered
        return self.queries @ entered + self.scores @ writes


def _masked(decay: Tensor, mask: Tensor | None) -> Tensor:
    return decay if mask is None else torch.where(mask, decay, 0)


def _products(
    q: Tensor, k: Tensor, total: Tensor, sees: Tensor, dtype: torch.dtype, has_beta: bool
) -> tuple[Tensor, Tensor | None]:
    """The decayed products (..., chunk, chunk) of queries and of keys with the keys that they see."""
    if total.shape[-1] == 1:
        decay = torch.where(sees, total - total.mT, -torch.inf).to(dtype).exp()
        return decay * (q @ k.mT), decay * (k @ k.mT) if has_beta else None
    difference = total[..., :, None, :] - total[..., None, :, :]  # (..., chunk, chunk, K)
    decayed = torch.where(sees[..., None], difference, -torch.inf).to(dtype).exp() * k[..., None, :, :]
    # No products of matrices: they would ask of an exported graph that one size divides the other.
    scores = (decayed * q[..., :, None, :]).sum(-1)
    return scores, (decayed * k[..., :, None, :]).sum(-1) if has_beta else None


def _enter(chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """The states in which chunks start, (B, G, R, chunks, K, V), and the state after the last one."""
    entered = []
    for chunk in range(chunks.writes.shape[3]):
        entered.append(state)
        write = chunks.writes[:, :, :, chunk]
        if chunks.corrections is not None:
            write = write - chunks.corrections[:, :, :, chunk] @ state
        state = chunks.kept[:, :, :, chunk] * state + chunks.keys[:, :, :, chunk].mT @ write
    return torch.stack(entered, dim=3), state


def _enter_by_doubling(chunks: _Chunks, state: Tensor) -> tuple[Tensor, Tensor]:
    """`_enter` with the same operations for any number of chunks (Hillis and Steele, CACM 29:12, 1986)."""
    key_size = state.shape[-2]
    moved = torch.diag_embed(chunks.kept.squeeze(-1).expand(*chunks.writes.shape[:4], key_size))
    if chunks.corrections is not None:
        moved = moved - chunks.keys.mT @ chunks.corrections
    state = torch.cat([state[:, :, :, None], chunks.keys.mT @ chunks.writes], dim=3)
    moved = F.pad(moved, (0, 0, 0, 0, 1, 0))
    index = torch.arange(state.shape[3], device=state.device)
    for distance in (2**n for n in range(DOUBLINGS)):
        has_earlier, earlier = (index >= distance)[:, None, None], (index - distance).clamp(min=0)
        state = torch.where(has_earlier, state + moved @ state.index_select(3, earlier), state)
        moved = torch.where(has_earlier, moved @ moved.index_select(3, earlier), moved)
    return state[:, :, :, :-1], state[:, :, :, -1]


__all__ = ["recur"]
