"""Expert vectors: one scale per singular value of a frozen weight, their files, and the library of a model.

For a weight `W = U diag(s) V^T`, a vector `z` means `W' = U diag(s * z) V^T` (SVF, Transformer-squared,
arXiv 2501.06252); `z = 1` is the base. `expert_linear_mambaformer` computes with it.
"""

import difflib
import hashlib
import json
import math
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor, nn

from .configuration_mambaformer import FILE_NAME
from .expert_bases_mambaformer import SingularBasis, at_least_float32
from .files_header_mambaformer import json_of
from .files_mambaformer import read_tensors, write_tensors
from .weights_version_mambaformer import version_of

EXPERT_FORMAT = "mambaformer.expert_vector"
FORMAT_VERSION = 1
SPECTRUM_LENGTH = 4
SPECTRUM_TOLERANCE = 0.05
MOST_MISSPELT = 5  # with more unknown modules it belongs to another model
# A gated MLP multiplies three scaled modules and the next norm squares the result: MAX_SCALE**6 = 1e24, times weights
# and activations, stays within the 3.4e38 of float32.
MAX_SCALE = 1e4

ExpertKey: TypeAlias = str | tuple[str, ...] | None


def _copy_of_vector(vector: Tensor) -> Tensor:
    return vector.detach().to("cpu", at_least_float32(vector.dtype), copy=True).contiguous()


def _as_tensor(name: Any, value: Any) -> Tensor:
    """A tensor as it is; numbers in a list or an array as a tensor."""
    try:
        if isinstance(value, (list, tuple)):
            return torch.tensor(value, dtype=torch.float64, device="cpu").float()
        if hasattr(value, "__array__") and not isinstance(value, Tensor):
            array = np.array(value, order="C")
            return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise TypeError(f"The vector of `{name}` must be numbers, in a tensor, an array or a list: {error}") from error
    if not isinstance(value, Tensor):
        raise TypeError(f"The vector of `{name}` must be a tensor, an array or a list, got {type(value).__name__}.")
    return value


def _check_vector(name: Any, vector: Tensor):
    if not isinstance(name, str) or not name:
        raise ValueError(f"An expert vector's keys are names of linear modules, got {name!r}.")
    if vector.ndim != 1 or not vector.numel() or not vector.is_floating_point():
        raise ValueError(
            f"The vector of `{name}` must be floating point, of shape (rank,) with rank >= 1, got {vector.dtype} of "
            f"shape {tuple(vector.shape)}: give one scale per singular value."
        )
    values = vector.detach().to(at_least_float32(vector.dtype))
    if not torch.isfinite(values).all():
        raise ValueError(f"The vector of `{name}` has NaN or infinite entries: it cannot scale a weight.")
    if (values.abs() > MAX_SCALE).any():
        raise ValueError(
            f"The vector of `{name}` has the scale {values.abs().max():.3g}, and {MAX_SCALE:.0e} is the largest whose "
            "products stay finite: 1 leaves a singular value as it is."
        )


def _fingerprint(vectors: Mapping[str, Tensor]) -> str:
    digest = hashlib.sha256()
    for name in sorted(vectors):
        values = vectors[name].detach().to("cpu", torch.float64) + 0.0  # + 0.0 turns -0.0 into 0.0
        changed = (values != 1).nonzero()
        if not changed.numel():
            continue
        data = values[: int(changed[-1]) + 1].numpy().astype("<f8").tobytes()
        key = name.encode()
        digest.update(b"%d %d " % (len(key), len(data)) + key + data)
    return digest.hexdigest()


BASE_FINGERPRINT = _fingerprint({})


class ExpertVector:
    """A re-tuning of a model: the vector `z` of each linear module that it changes, 1 being the base.

    Source: SVF (arXiv 2501.06252). Its identity is its content: see `fingerprint`.

    Args:
        vectors: module name (`"model.layers.0.self_attn.q_proj"`) -> `z` of shape (rank,), a tensor, array or list,
            for the singular values in descending order; those beyond `rank` keep scale 1, as do the modules that are
            left out. Stored as float32 (float64 if given as a tensor or array) copies on the CPU; tensors that
            require grad are kept as they are.
        name, metadata: labels (`metadata` as JSON can hold it), no part of the identity.

    Raises:
        TypeError, ValueError: a vector that is not finite, floating-point and of shape (rank,), rank >= 1.
    """

    def __init__(self, vectors: Mapping[str, Tensor], name: str | None = None, metadata: dict | None = None):
        if not isinstance(vectors, Mapping):
            raise TypeError(f"`vectors` must map module names to tensors, got {type(vectors).__name__}.")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"`name` must be a string, got {type(name).__name__}.")
        vectors = {key: _as_tensor(key, vector) for key, vector in vectors.items()}
        for key, vector in vectors.items():
            _check_vector(key, vector)
        self._vectors = {key: z if z.requires_grad else _copy_of_vector(z) for key, z in vectors.items()}
        self._fingerprint: tuple[list[int], str] | None = None
        self.name = name
        self.metadata = _checked_metadata(metadata)

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """Module name -> `z`, read-only."""
        return MappingProxyType(self._vectors)

    @property
    def requires_grad(self) -> bool:
        """Whether some vector is being trained, so that the content may change at any time."""
        return any(vector.requires_grad for vector in self._vectors.values())

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the effect: equal for equal effect, `BASE_FINGERPRINT` for the base.

        Names, metadata, the float type, the order of modules, trailing ones and all-one vectors do not count.
        """
        versions = [version_of(vector) for vector in self._vectors.values()]
        if self._fingerprint is None or self._fingerprint[0] != versions or self.requires_grad:
            self._fingerprint = (versions, _fingerprint(self._vectors))
        return self._fingerprint[1]

    @property
    def is_base(self) -> bool:
        """Whether every scale is 1."""
        return self.fingerprint == BASE_FINGERPRINT

    def __getitem__(self, module_name: str) -> Tensor:
        return self._vectors[module_name]

    def __contains__(self, module_name: object) -> bool:
        return module_name in self._vectors

    def __iter__(self) -> Iterator[str]:
        return iter(self._vectors)

    def __len__(self) -> int:
        return len(self._vectors)

    def __bool__(self) -> bool:
        return True  # without vectors it is the base

    def __eq__(self, other: object) -> bool:
        if not is_expert_vector(other):
            return NotImplemented
        return self.fingerprint == other.fingerprint

    def __hash__(self) -> int:
        return hash(self.fingerprint)

    def __repr__(self) -> str:
        rank = max((vector.numel() for vector in self._vectors.values()), default=0)
        return (
            f"{type(self).__name__}(name={self.name!r}, modules={len(self)}, rank<={rank}, "
            f"fingerprint={self.fingerprint[:12]!r})"
        )

    def save(self, path: str | os.PathLike):
        """Write a safetensors file, whole or not at all; a file that was there stays if writing fails."""
        header = {
            "format": EXPERT_FORMAT,
            "version": str(FORMAT_VERSION),
            "name": json.dumps(self.name),
            "metadata": json.dumps(_checked_metadata(self.metadata)),
            "fingerprint": self.fingerprint,
        }
        header["labels"] = _digest_of_labels(header)
        tensors = {key: _copy_of_vector(vector) for key, vector in self._vectors.items()}
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExpertVector":
        """Read what `save` wrote; nothing is ever unpickled.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: a pickle, a damaged or cut file, another kind of safetensors file, a newer version, or
                vectors that are not what the header's fingerprint says.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder: load it into an `ExpertVectorLibrary`, or pass one of its files.")
        vectors, header = read_tensors(path, EXPERT_FORMAT, FORMAT_VERSION, "`ExpertVector(vectors).save(path)`")
        try:
            expert_vector = cls(vectors, json_of(header["name"]), json_of(header["metadata"]))
            expected = header["fingerprint"]
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a valid expert vector: {error}") from error
        if expert_vector.fingerprint != expected:
            raise ValueError(f"{path} holds other vectors than were saved (fingerprint mismatch): it is damaged.")
        labels = _digest_of_labels(header)
        if header.get("labels", labels) != labels:
            raise ValueError(f"{path} holds another name or other metadata than were saved: it is damaged.")
        return expert_vector

    @classmethod
    def blend(cls, parts: Iterable[tuple[float, "ExpertVector"]], name: str | None = None) -> "ExpertVector":
        """Mix expert vectors: `z = 1 + sum of weight * (z_e - 1)`, modules that one leaves out being 1.

        Source: the linear mixing of Transformer-squared (arXiv 2501.06252), taken around the base; it is the
        paper's own wherever the weights add up to 1.
        """
        parts = _checked_parts(parts)
        for _, expert_vector in parts:
            if isinstance(expert_vector, str):
                raise TypeError(f"{expert_vector!r} is a name: blend by name with `model.expert_vectors.blend`.")
            if not is_expert_vector(expert_vector):
                raise TypeError(
                    f"`blend` takes pairs (weight, expert vector), got {type(expert_vector).__name__} for the latter."
                )
        parts = [(weight, expert_vector) for weight, expert_vector in parts if weight != 0]
        if [weight for weight, _ in parts] == [1]:
            return cls(parts[0][1].vectors, name)  # exact, where 1 + (z - 1) would round
        keys = dict.fromkeys(key for _, expert_vector in parts for key in expert_vector.vectors)
        return cls({key: _blend([(w, e.vectors[key]) for w, e in parts if key in e.vectors]) for key in keys}, name)


# One expert vector as users pass it; `None` is the base.
ExpertVectorLike: TypeAlias = ExpertVector | Mapping[str, Tensor] | str | None
ExpertVectorsLike: TypeAlias = ExpertVectorLike | list[ExpertVectorLike] | tuple[ExpertVectorLike, ...]
# After names are looked up: one expert vector for all rows, or one for each row.
ResolvedExpertVector: TypeAlias = ExpertVector | list[ExpertVector | None] | None


def _checked_parts(parts: Iterable[tuple[float, Any]]) -> list[tuple[float, Any]]:
    """The pairs of a blend, with weights that are finite numbers."""
    parts = list(parts)
    if not parts:
        raise ValueError("There is nothing to blend: give a list of (weight, expert vector).")
    for part in parts:
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise TypeError(f"`blend` takes pairs (weight, expert vector), got {part!r}.")
        try:
            is_finite = math.isfinite(part[0])
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"`blend` takes pairs (weight, expert vector), got {part[0]!r} for a weight.") from error
        if not is_finite:
            raise ValueError(f"Weights of a blend must be finite, got {part[0]}.")
    return [tuple(part) for part in parts]


def _digest_of_labels(header: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{header['name']}\n{header['metadata']}".encode()).hexdigest()


def _checked_metadata(metadata: dict | None) -> dict:
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"`metadata` must be a dict, got {type(metadata).__name__}.")
    try:
        copy = json_of(json.dumps(metadata or {}, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`metadata` must be what JSON can hold: {error}.") from error
    _check_spectra(copy.get("spectrum", {}))
    return copy


def _check_spectra(spectra: Any):
    is_map = isinstance(spectra, dict)
    if not is_map or not all(isinstance(values, list) and all(map(_is_size, values)) for values in spectra.values()):
        raise ValueError(
            "`metadata['spectrum']` must map names of modules to lists of their first singular values (finite numbers "
            "of at least 0), as `model.spectrum(names)` returns them: leave it out, or use another key."
        )


def _is_size(value: Any) -> bool:
    return type(value) in (int, float) and 0 <= value < 1e300


def _blend(parts: Sequence[tuple[float, Tensor]]) -> Tensor:
    rank = max(vector.numel() for _, vector in parts)
    device = parts[0][1].device
    delta = torch.zeros(rank, dtype=torch.float64, device=device)
    for weight, vector in parts:
        change = weight * (vector.to(device, torch.float64) - 1)
        delta = delta + nn.functional.pad(change, (0, rank - vector.numel()))
    is_double = any(vector.dtype == torch.float64 for _, vector in parts)
    return (1 + delta).to(torch.float64 if is_double else torch.float32)


def check_expert_vector(expert_vector: ExpertVector, sizes: Mapping[str, tuple[int, int]]):
    """Refuse an expert vector that does not fit a model whose linear modules have `sizes`: name -> (out, in)."""
    unknown = [name for name in expert_vector.vectors if name not in sizes]
    if len(unknown) > MOST_MISSPELT:
        raise ValueError(
            f"{_named(expert_vector)} has vectors for {len(unknown)} modules that this model does not have, such as "
            f"{unknown[0]!r}: it was made for another model."
        )
    if unknown:
        close = sorted({hint for name in unknown for hint in difflib.get_close_matches(name, sizes, n=2)})
        hint = f" Did you mean {close}?" if close else f" Some that exist: {list(sizes)[:3]}."
        raise ValueError(
            f"{_named(expert_vector)} has vectors for modules that this model does not have: {unknown}.{hint} It may "
            "belong to another model."
        )
    for name, vector in expert_vector.vectors.items():
        if vector.numel() > min(sizes[name]):
            raise ValueError(
                f"{_named(expert_vector)} has {vector.numel()} scales for `{name}`, whose weight {sizes[name]} has "
                f"only {min(sizes[name])} singular values: it was made for another model."
            )


def _named(expert_vector: ExpertVector) -> str:
    return "The expert vector" if expert_vector.name is None else f"The expert vector {expert_vector.name!r}"


def spectrum_of(bases: Mapping[str, SingularBasis]) -> dict[str, list[float]]:
    """The first singular values of each module: what training stores in `metadata["spectrum"]`."""
    return {name: basis.values[:SPECTRUM_LENGTH].tolist() for name, basis in bases.items()}


def check_spectrum(expert_vector: ExpertVector, name: str, values: Tensor):
    """Refuse an expert vector that was trained on other weights than module `name` has, as its spectrum tells.

    `values` are the module's singular values, and `metadata["spectrum"]` has the ones at training. A relative
    deviation of more than 5% in the first values counts as other weights. Without a spectrum, nothing is checked.
    """
    spectra = expert_vector.metadata.get("spectrum", {})
    _check_spectra(spectra)  # metadata may have been written since they were checked
    expected = spectra.get(name)
    if not expected:
        return
    found = values[:SPECTRUM_LENGTH].tolist()
    # Values that are noise beside the first one say nothing about the weights.
    floor = 1e-3 * abs(expected[0])
    if any(not abs(a - b) <= max(SPECTRUM_TOLERANCE * abs(b), floor) for a, b in zip(found, expected, strict=False)):
        raise ValueError(
            f"{_named(expert_vector)} was trained on other weights: the singular values of `{name}` start with "
            f"{found}, those it was trained on with {expected}. Use it with the model that it was trained on."
        )


def is_expert_vector(value: Any) -> bool:
    """Whether `value` is an expert vector, be it of another copy of this module (remote code may load two)."""
    return hasattr(value, "vectors") and hasattr(value, "fingerprint")


class ExpertVectorLibrary:
    """Expert vectors by name. Safe to share between threads.

    Names are file names too: letters, digits, `-`, `_` and `.`, not starting with a dot.
    """

    def __init__(self):
        self._entries: dict[str, ExpertVector] = {}

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def add(self, name: str | ExpertVector, expert_vector: ExpertVector | Mapping[str, Any] | None = None):
        """Keeps an expert vector under a name, replacing the one that had it, and returns it.

        `add("bold", {"model.layers.0.mlp.down_proj": [1.5, 0.5]})` with the vectors of some modules, as a dict or an
        `ExpertVector`; `add(expert_vector)` under the expert vector's own name.
        """
        if isinstance(expert_vector, str):
            raise TypeError(f"The name comes first: `add({expert_vector!r}, ...)`.")
        if expert_vector is None:
            name, expert_vector = getattr(name, "name", None), name
        if isinstance(expert_vector, Mapping):
            expert_vector = ExpertVector(expert_vector)
        if not is_expert_vector(expert_vector):
            raise TypeError(f"An `ExpertVector` or a dict is needed, got {type(expert_vector).__name__}.")
        name = checked_name(name)
        expert_vector = expert_vector if expert_vector.name == name else _with_name(expert_vector, name)
        self._entries[name] = expert_vector
        return expert_vector

    def blend(self, parts: Iterable[tuple[float, Any]], name: str | None = None) -> ExpertVector:
        """`ExpertVector.blend` of whatever `expert_vector=` takes for a row: names too, dicts, None for the base."""
        expert_vectors = [(weight, self._vectors_of(value)) for weight, value in _checked_parts(parts)]
        return ExpertVector.blend(expert_vectors, name)

    def _vectors_of(self, value: Any) -> ExpertVector:
        if value is None:
            return ExpertVector({})
        if isinstance(value, str):
            return self[value]
        return ExpertVector(value) if isinstance(value, Mapping) else value

    def load(self, path: str | os.PathLike, name: str | None = None) -> list[str]:
        """Add a file, or every `*.safetensors` of a folder, all or none. Returns their names.

        `name` (for a file) defaults to the stored one, and that to the file's.
        """
        path = Path(path)
        if path.is_dir() and name is not None:
            raise ValueError(f"{path} is a folder and its files have names: pass `name` only with one file.")
        files = sorted(path.glob("*.safetensors")) if path.is_dir() else [path]
        if not files:
            raise ValueError(f"{path} holds no *.safetensors file: pass a folder of saved expert vectors.")
        expert_vectors: dict[str, ExpertVector] = {}
        for file in files:
            expert_vector = ExpertVector.load(file)
            key = checked_name(name or expert_vector.name or file.stem)
            if key in expert_vectors:
                raise ValueError(f"{path} holds two expert vectors named {key!r}: load them one by one with `name=`.")
            expert_vectors[key] = expert_vector
        for key, expert_vector in expert_vectors.items():
            self.add(key, expert_vector)
        return list(expert_vectors)

    def save(self, folder: str | os.PathLike):
        """Writes every expert vector as `{name}.safetensors`.

        Errors: ValueError for names that some file systems take for one.
        """
        folder, names = Path(folder), self.names
        twins = [name for name in names if [other.lower() for other in names].count(name.lower()) > 1]
        if twins:
            raise ValueError(f"{twins} differ in case alone, which Windows and macOS do not see: rename all but one.")
        folder.mkdir(parents=True, exist_ok=True)
        for name in names:
            self[name].save(folder / f"{name}.safetensors")

    def __getitem__(self, name: str) -> ExpertVector:
        expert_vector = self._entries.get(name)
        if expert_vector is None:
            raise self._unknown(name)
        return expert_vector

    def __delitem__(self, name: str):
        if self._entries.pop(name, None) is None:
            raise self._unknown(name)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self.names)

    def __len__(self) -> int:
        return len(self._entries)

    def __bool__(self) -> bool:
        return True

    def __repr__(self) -> str:
        return f"{type(self).__name__}({self.names})"

    def _unknown(self, name: str) -> ValueError:
        known = f"known are {sorted(self._entries)}" if self._entries else "there are none yet"
        return ValueError(f"There is no expert vector named {name!r}; {known}. Add it with `load` or `add`.")


def checked_name(name: str | None) -> str:
    """`name`, if it can name an expert vector and its file. Errors: ValueError."""
    if name is None:
        raise ValueError("The expert vector has no name: give one, as in `add(name, expert_vector)`.")
    if not isinstance(name, str) or not re.fullmatch(FILE_NAME, name):
        raise ValueError(
            f"{name!r} cannot name an expert vector, as it becomes a file name: use letters, digits, '-', '_' and '.' "
            "(not at the start). `load(file, name=...)` gives a file another one."
        )
    return name


def _with_name(expert_vector: ExpertVector, name: str) -> ExpertVector:
    return ExpertVector(expert_vector.vectors, name, expert_vector.metadata)


def resolve_expert_vector(
    expert_vector: Any, library: ExpertVectorLibrary | None = None
) -> ExpertVector | list | None:
    """Resolves what a user passes as `expert_vector`: an expert vector, None for the base, or a list of one per row.

    Takes None, a name in `library`, an `ExpertVector`, a dict of tensors, or a list of these. One that scales nothing
    is the base, unless it is being trained. Errors: TypeError, ValueError.
    """
    if isinstance(expert_vector, (list, tuple)):
        if not expert_vector:
            raise ValueError("`expert_vector` is an empty list: give one expert vector (None for the base) per row.")
        return [_resolve_one(row, library) for row in expert_vector]
    return _resolve_one(expert_vector, library)


def _resolve_one(value: Any, library: ExpertVectorLibrary | None) -> ExpertVector | None:
    if value is None:
        return None
    if isinstance(value, str):
        if library is None:
            raise ValueError(f"The expert vector {value!r} is given by name, but there is no library to find it in.")
        value = library[value]
    elif isinstance(value, Mapping):
        value = ExpertVector(value)
    elif not is_expert_vector(value):
        raise TypeError(
            "`expert_vector` takes None, a name, an ExpertVector, a dict of tensors, or a list with one of these per "
            f"row, got {type(value).__name__}."
        )
    is_trained = any(vector.requires_grad for vector in value.vectors.values())
    return value if is_trained or value.fingerprint != BASE_FINGERPRINT else None


def expert_key(resolved: ExpertVector | list | None, rows: int | None = None) -> str | tuple[str, ...]:
    """Hashable identity of a resolved expert vector: a fingerprint, or a tuple of them if the rows differ.

    Errors: ValueError if `resolved` is a list that has not one entry for each of `rows`.
    """
    if not isinstance(resolved, list):
        return BASE_FINGERPRINT if resolved is None else resolved.fingerprint
    if rows is not None and len(resolved) != rows:
        raise ValueError(
            f"`expert_vector` lists {len(resolved)} expert vectors for a batch of {rows} rows: give one per row."
        )
    keys = tuple(expert_key(row) for row in resolved)
    return keys[0] if len(set(keys)) == 1 else keys


def collapsed_key(keys: str | Sequence[str] | None) -> str | tuple[str, ...] | None:
    """The key of rows with these keys: `None` (base) or one key if all are the same, else a tuple."""
    rows = [keys] if keys is None or isinstance(keys, str) else list(keys)
    if len(set(rows)) > 1:
        return tuple(rows)
    return None if rows[0] == BASE_FINGERPRINT else rows[0]


__all__ = [
    "BASE_FINGERPRINT",
    "ExpertVector",
    "ExpertVectorLibrary",
    "check_expert_vector",
    "check_spectrum",
    "checked_name",
    "collapsed_key",
    "expert_key",
    "is_expert_vector",
    "resolve_expert_vector",
    "spectrum_of",
]
