"""Linear modules with scaled singular values: on the fly, and merged into the weight.

For a weight `W = U diag(s) V^T` and scales `z`, `W' = U diag(s * z) V^T`. With `Q` the singular vectors on W's narrow
side, the same is

    out >= in (side "input",  Q = V):  W' x = W (x + Q ((z - 1) * Q^T x))
    out <  in (side "output", Q = U):  W' x = y + Q ((z - 1) * Q^T y),  y = W x

so W itself is never touched, may be quantized or sharded, and every row of a batch may have its own `z`. Mixers call
`apply_expert_linear`; `expert_runtime_mambaformer` prepares the scaled bases.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .expert_bases_mambaformer import SingularBasis, at_least_float32
from .ops_eligibility_mambaformer import is_plain_linear
from .ops_mambaformer import linear, scale_singular_values
from .weights_parallel_mambaformer import (
    base_linear,
    bias_beside,
    part_of,
    sum_over_shards,
    used_by_shards,
)

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh


@dataclass(frozen=True, eq=False)
class ScaledBasis:
    """An expert vector at one module: `vectors` Q (n, r), `side`, and `delta` = z - 1 (r,), or (B, 1, r) per row.

    `mesh` names the processes that tensor parallelism splits the module over; each of them has all of Q.
    """

    vectors: Tensor
    delta: Tensor
    side: str
    mesh: "DeviceMesh | None" = None


def scale_basis(
    basis: SingularBasis, z: Tensor | Sequence[Tensor | None] | None, mesh: "DeviceMesh | None" = None
) -> ScaledBasis | None:
    """Prepares `z` (r,), or a list with one (`None` = base) per row, for `apply_expert_linear`.

    The result is `None` if nothing is scaled. `delta` is float32, or float64 if the basis is; shorter vectors are
    extended with zeros, the base.
    """
    if isinstance(z, Tensor):
        return ScaledBasis(_compact(basis, z.numel()), _delta(basis, z), basis.side, mesh)
    vectors = [] if z is None else list(z)
    rank = max((vector.numel() for vector in vectors if vector is not None), default=0)
    if not rank:
        return None
    rows = [_delta(basis, vector) if vector is not None else basis.values.new_zeros(0) for vector in vectors]
    delta = torch.stack([nn.functional.pad(row, (0, rank - row.numel())) for row in rows])
    return ScaledBasis(_compact(basis, rank), delta[:, None], basis.side, mesh)  # delta: (B, r) -> (B, 1, r)


def _compact(basis: SingularBasis, rank: int) -> Tensor:
    """The first `rank` directions in contiguous memory, which every token reads."""
    return basis.cut(rank).vectors.contiguous()


def _delta(basis: SingularBasis, z: Tensor) -> Tensor:
    return z.to(basis.vectors.device, at_least_float32(basis.vectors.dtype)) - 1


def apply_expert_linear(module: nn.Module, hidden_states: Tensor, scaled: ScaledBasis | None = None) -> Tensor:
    """`module`, linear, with its singular values scaled: (..., in) -> (..., out).

    Rows whose `delta` is 0 get the base's own bits. Q is used in the dtype of the activations; the scaling runs in
    the wider of that and `delta`'s. An adapter around the linear module (W x + D x) is added unchanged, W'x + D x, as
    it is when the expert vector is merged into W.
    """
    if scaled is None:
        return apply_linear(module, hidden_states)
    base = base_linear(module)
    if scaled.side == "input":
        if base is module:
            return apply_linear(module, _scale(hidden_states, scaled))
        return module(hidden_states) + _without_bias(base(_change(hidden_states, scaled)), base)
    if base is module and getattr(module, "bias", None) is None:
        return _scale(apply_linear(module, hidden_states), scaled)
    outputs = module(hidden_states)
    return outputs + _change(_without_bias(outputs if base is module else base(hidden_states), base), scaled)


def apply_linear(module: nn.Module, hidden_states: Tensor) -> Tensor:
    """`module(hidden_states)`; a kernel may compute it if a product is all that the call would do."""
    weight = module._parameters["weight"] if is_plain_linear(module) else None
    return module(hidden_states) if weight is None else linear(hidden_states, weight, module._parameters["bias"])


def _scale(hidden_states: Tensor, scaled: ScaledBasis) -> Tensor:
    """x + Q (delta * Q^T x)."""
    if scaled.mesh is not None:
        return hidden_states + _change(hidden_states, scaled)
    _check_rows(hidden_states, scaled.delta)
    return scale_singular_values(hidden_states, scaled.vectors, scaled.delta)


def _without_bias(outputs: Tensor, module: nn.Module) -> Tensor:
    """The outputs less the bias, which is not scaled."""
    bias = bias_beside(outputs, module)
    return outputs if bias is None else outputs - bias


def _check_rows(states: Tensor, delta: Tensor) -> None:
    if delta.ndim == 3 and (states.ndim != 3 or delta.shape[0] != states.shape[0]):
        raise ValueError(
            f"There are expert vectors for {delta.shape[0]} rows, but the activations are {tuple(states.shape)}: make "
            "them (batch, length, channels) with as many rows."
        )


def _change(states: Tensor, scaled: ScaledBasis) -> Tensor:
    """Q (delta * Q^T x), where this process may have some of the channels."""
    delta = scaled.delta
    _check_rows(states, delta)
    basis = scaled.vectors.to(states.dtype)
    if scaled.mesh is None or states.shape[-1] == basis.shape[0]:
        return ((states @ basis) * delta).to(states.dtype) @ basis.mT
    # The coordinates (..., r) are sums over the channels of all processes.
    basis = part_of(basis, states.shape[-1], scaled.mesh)
    coordinates = sum_over_shards(states @ basis, scaled.mesh) * delta
    return used_by_shards(coordinates.to(states.dtype), scaled.mesh) @ basis.mT


def merged_weight(weight: Tensor, basis: SingularBasis, z: Tensor) -> Tensor:
    """`U diag(s * z) V^T` of a weight (out, in), computed in float32 at least, returned in the weight's dtype."""
    dtype = at_least_float32(weight.dtype)
    wide = weight.detach().to(dtype)
    directions = basis.cut(z.numel()).vectors.to(weight.device, dtype)
    delta = z.to(weight.device, dtype) - 1
    if basis.side == "input":
        return (wide + ((wide @ directions) * delta) @ directions.mT).to(weight.dtype)
    return (wide + directions @ (delta[:, None] * (directions.mT @ wide))).to(weight.dtype)


__all__ = [
    "ScaledBasis",
    "apply_expert_linear",
    "apply_linear",
    "merged_weight",
    "scale_basis",
]
