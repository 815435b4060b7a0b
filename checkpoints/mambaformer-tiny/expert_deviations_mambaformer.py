"""Standard deviations of the scales of an expert vector: checks, the tensors of a file, and draws.

The posterior of a trained expert vector is a normal distribution with a diagonal covariance: scale i of a module has
the mean `z_i` and the standard deviation `sigma_i`. `expert_laplace_mambaformer` computes sigma.
"""

from collections.abc import Mapping

import torch
from torch import Tensor

VECTORS, DEVIATIONS = "vectors/", "deviations/"  # how names start in the file of a vector with deviations


def check_deviations(deviations: Mapping[str, Tensor], vectors: Mapping[str, Tensor]) -> None:
    """Refuses standard deviations that do not belong to `vectors`.

    Raises:
        ValueError: an unknown module, another shape, or a number that is negative, NaN or infinite.
    """
    for name, deviation in deviations.items():
        if name not in vectors:
            raise ValueError(f"`deviations` names {name!r}, and the expert vector does not scale that module.")
        if deviation.shape != vectors[name].shape:
            raise ValueError(
                f"The deviations of `{name}` have shape {tuple(deviation.shape)}, and its scales "
                f"{tuple(vectors[name].shape)}: give one standard deviation for each scale."
            )
        if not bool((deviation.isfinite() & (deviation >= 0)).all()):
            raise ValueError(f"The deviations of `{name}` must be finite numbers of at least 0.")


def join_tensors(vectors: Mapping[str, Tensor], deviations: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file that holds both."""
    named = {VECTORS + name: z for name, z in vectors.items()}
    return named | {DEVIATIONS + name: sigma for name, sigma in deviations.items()}


def split_tensors(tensors: Mapping[str, Tensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The vectors and the deviations of `join_tensors`.

    Raises:
        ValueError: a tensor is neither.
    """
    vectors = {name.removeprefix(VECTORS): z for name, z in tensors.items() if name.startswith(VECTORS)}
    deviations = {name.removeprefix(DEVIATIONS): z for name, z in tensors.items() if name.startswith(DEVIATIONS)}
    if len(vectors) + len(deviations) != len(tensors):
        raise ValueError("a tensor is neither a vector nor its deviations")
    return vectors, deviations


def draw_scales(
    vectors: Mapping[str, Tensor], deviations: Mapping[str, Tensor], generator: torch.Generator | None
) -> dict[str, Tensor]:
    """One draw from the posterior: `z + sigma * noise` of each module, on the CPU."""
    scales = {}
    for name in sorted(vectors):  # a file does not keep the order
        mean = vectors[name].detach().to("cpu")
        # Drawn in float64 for all modules, so that a seed gives the same noise for every dtype.
        noise = torch.randn(mean.shape, generator=generator, dtype=torch.float64, device="cpu")
        sigma = deviations.get(name)
        scales[name] = mean if sigma is None else (mean.double() + sigma.double() * noise).to(mean.dtype)
    return scales


__all__ = ["check_deviations", "draw_scales", "join_tensors", "split_tensors"]
