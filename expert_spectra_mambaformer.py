"""The spectra that an expert vector was trained on: `metadata["spectrum"]`, compared with the weights in use."""

from collections.abc import Mapping
from typing import TYPE_CHECKING

from torch import Tensor

from .expert_bases_mambaformer import SingularBasis

if TYPE_CHECKING:
    from .expert_vectors_mambaformer import ExpertVector

SPECTRUM_LENGTH = 4
SPECTRUM_TOLERANCE = 0.05


def spectrum_of(bases: Mapping[str, SingularBasis]) -> dict[str, list[float]]:
    """The first singular values of each module, for `metadata["spectrum"]`."""
    return {name: basis.values[:SPECTRUM_LENGTH].tolist() for name, basis in bases.items()}


def check_spectrum(expert_vector: "ExpertVector", name: str, values: Tensor):
    """Refuses an expert vector whose spectrum shows that it was trained on other weights than module `name` has.

    `values` are the module's singular values; `metadata["spectrum"]` has its singular values at training. A deviation
    of more than 5% in one of the first values is refused. Without a spectrum, nothing is checked.
    """
    spectra = expert_vector.metadata.get("spectrum", {})
    check_spectra(spectra)  # `metadata` is mutable
    expected = spectra.get(name)
    if not expected:
        return
    first = values[:SPECTRUM_LENGTH].tolist()
    # Much smaller values than the first one are noise.
    floor = 1e-3 * abs(expected[0])
    if any(not abs(a - b) <= max(SPECTRUM_TOLERANCE * abs(b), floor) for a, b in zip(first, expected, strict=False)):
        raise ValueError(
            f"{described(expert_vector.name)} was trained on other weights: the singular values of `{name}` start "
            f"with {first}, and with {expected} in the weights of its training. Use it with the model of its training."
        )


def check_spectra(spectra: object):
    """Refuses a `metadata["spectrum"]` of another type."""
    lists = list(spectra.values()) if isinstance(spectra, dict) else [None]
    if not all(isinstance(values, list) and all(map(_is_size, values)) for values in lists):
        raise ValueError(
            "`metadata['spectrum']` must map names of modules to lists of their first singular values (finite numbers "
            "of at least 0), as `model.spectrum(names)` returns them: leave it out, or use another key."
        )


def _is_size(value: object) -> bool:
    return isinstance(value, (int, float)) and type(value) is not bool and 0 <= value < 1e300


def described(name: str | None) -> str:
    """How messages call an expert vector of this name."""
    return "The expert vector" if name is None else f"The expert vector {name!r}"


__all__ = ["check_spectra", "check_spectrum", "described", "spectrum_of"]
