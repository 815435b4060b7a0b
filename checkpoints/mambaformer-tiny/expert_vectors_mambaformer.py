"""Expert vectors: one scale per singular value of a frozen weight; a file of one; the library of a model.

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
from typing import TypeAlias, TypeGuard, TypeVar, overload

import numpy as np
import torch
from torch import Tensor, nn

from .configuration_mambaformer import FILE_NAME
from .expert_bases_mambaformer import at_least_float32
from .expert_deviations_mambaformer import check_deviations, draw_scales, join_tensors, split_tensors
from .expert_spectra_mambaformer import check_spectra, described
from .files_header_mambaformer import json_of
from .files_mambaformer import digest_of, read_tensors, write_tensors
from .weights_version_mambaformer import version_of

EXPERT_FORMAT = "mambaformer.expert_vector"
FORMAT_VERSION, VERSION_WITH_DEVIATIONS = 1, 2
MOST_MISSPELT = 5  # an expert vector with more unknown modules belongs to another model
# A gated MLP multiplies three scaled modules and the next norm squares the result: MAX_SCALE**6 = 1e24, times weights
# and activations, stays within the 3.4e38 of float32.
MAX_SCALE = 1e4

VectorLike: TypeAlias = Tensor | np.ndarray | Sequence[float]
ExpertKey: TypeAlias = str | tuple[str, ...] | None


def _copy_of_vector(vector: Tensor) -> Tensor:
    return vector.detach().to("cpu", at_least_float32(vector.dtype), copy=True).contiguous()


def _as_tensor(name: object, value: object) -> Tensor:
    """A tensor is returned as it is; a list or an array becomes a tensor."""
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


def _check_vector(name: object, vector: Tensor):
    if not isinstance(name, str) or not name:
        raise ValueError(f"Keys of an expert vector must be names of linear modules, got {name!r}.")
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
            f"The vector of `{name}` has the scale {values.abs().max():.3g}, and {MAX_SCALE:.0e} is the largest "
            "scale whose products stay finite: give scales near 1, which leaves a singular value as it is."
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
    """Re-tunes a model by a vector `z` for each linear module that it scales; a scale of 1 is the base.

    Source: SVF (arXiv 2501.06252). Two expert vectors are equal if their content is: see `fingerprint`.

    Args:
        vectors: module name (`"model.layers.0.self_attn.q_proj"`) -> `z` of shape (rank,), a tensor, array or list,
            for the singular values in descending order. Singular values beyond `rank` and modules that are left out
            keep scale 1. Stored as copies on the CPU, in float32 (float64 if passed as a tensor or array of float64);
            tensors that require grad are stored as they are.
        name, metadata: labels, which equality ignores; `metadata` must fit into JSON.
        deviations: module name -> standard deviations (rank,) of `z` under the posterior, as `fit_laplace` computes
            them; modules that are left out have none. Equality ignores them too.

    Raises:
        TypeError, ValueError: a vector that is not finite, floating-point and of shape (rank,), rank >= 1; deviations
            that are negative or do not belong to the vectors.
    """

    def __init__(
        self,
        vectors: Mapping[str, VectorLike],
        name: str | None = None,
        metadata: dict | None = None,
        deviations: Mapping[str, VectorLike] | None = None,
    ):
        if not isinstance(vectors, Mapping):
            raise TypeError(f"`vectors` must map module names to tensors, got {type(vectors).__name__}.")
        if name is not None and not isinstance(name, str):
            raise TypeError(f"`name` must be a string, got {type(name).__name__}.")
        tensors = {key: _as_tensor(key, vector) for key, vector in vectors.items()}
        for key, vector in tensors.items():
            _check_vector(key, vector)
        self._vectors = {key: z if z.requires_grad else _copy_of_vector(z) for key, z in tensors.items()}
        self._fingerprint: tuple[list[int | torch.SymInt], str] | None = None
        self._deviations = {key: _copy_of_vector(_as_tensor(key, each)) for key, each in (deviations or {}).items()}
        check_deviations(self._deviations, self._vectors)
        self.name = name
        self.metadata = _checked_metadata(metadata)

    @property
    def deviations(self) -> Mapping[str, Tensor]:
        """Module name -> standard deviations of `z`, read-only; empty if the vector has no posterior."""
        return MappingProxyType(self._deviations)

    def sample(self, n: int, generator: torch.Generator | None = None) -> list["ExpertVector"]:
        """`n` expert vectors drawn from the posterior of this one; pass them as the rows of a batch.

        `ExpertPosterior(model, vector.sample(8), switching=1.0)` averages the predictions of the samples.

        Raises:
            ValueError: the vector has no deviations, or `n` is below 1.
        """
        if isinstance(n, bool) or not isinstance(n, int) or n < 1:
            raise ValueError(f"`n` must be the number of samples, at least 1, got {n!r}.")
        if not self._deviations:
            raise ValueError(f"{described(self.name)} has no deviations to draw from: call `fit_laplace` first.")
        names = [self.name and f"{self.name}-sample-{i}" for i in range(n)]
        return [
            type(self)(draw_scales(self._vectors, self._deviations, generator), name, self.metadata) for name in names
        ]

    @property
    def vectors(self) -> Mapping[str, Tensor]:
        """Module name -> `z`, read-only."""
        return MappingProxyType(self._vectors)

    @property
    def requires_grad(self) -> bool:
        """Whether a vector is being trained, so that the content may change at any time."""
        return any(vector.requires_grad for vector in self._vectors.values())

    @property
    def fingerprint(self) -> str:
        """Hex SHA-256 of the scales that differ from 1; `BASE_FINGERPRINT` for the base.

        Names, metadata, dtype, the order of modules, trailing ones and vectors of ones do not change it.
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
        return True  # `len` is 0 for the base

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
        """Writes a safetensors file, atomically: if writing fails, an older file stays as it was."""
        header = {
            "format": EXPERT_FORMAT,
            "version": str(VERSION_WITH_DEVIATIONS if self._deviations else FORMAT_VERSION),
            "name": json.dumps(self.name),
            "metadata": json.dumps(_checked_metadata(self.metadata)),
            "fingerprint": self.fingerprint,
        }
        header["labels"] = _digest_of_labels(header)
        tensors = {key: _copy_of_vector(vector) for key, vector in self._vectors.items()}
        if self._deviations:  # version 1 holds the vectors alone, and older readers refuse version 2 by its number
            header["deviations"] = digest_of(self._deviations)
            tensors = join_tensors(tensors, self._deviations)
        write_tensors(Path(path), tensors, header)

    @classmethod
    def load(cls, path: str | os.PathLike) -> "ExpertVector":
        """Reads a file that `save` wrote, without unpickling.

        Raises:
            FileNotFoundError: there is no such file.
            ValueError: the file is a pickle, damaged, cut, of another kind or of a newer version, or its vectors or
                deviations do not have the fingerprint in its header.
        """
        path = Path(path)
        if path.is_dir():
            raise ValueError(f"{path} is a folder: load it into an `ExpertVectorLibrary`, or pass one of its files.")
        save_again = "`ExpertVector(vectors).save(path)`"
        vectors, header = read_tensors(path, EXPERT_FORMAT, VERSION_WITH_DEVIATIONS, save_again, FORMAT_VERSION)
        try:
            is_joined = header["version"] == str(VERSION_WITH_DEVIATIONS)
            vectors, deviations = split_tensors(vectors) if is_joined else (vectors, None)
            expert_vector = cls(vectors, json_of(header["name"]), json_of(header["metadata"]), deviations)
            expected = header["fingerprint"]
            if is_joined and header["deviations"] != digest_of(expert_vector.deviations):
                raise ValueError("its deviations are other ones than were saved")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is not a valid expert vector: {error}") from error
        if expert_vector.fingerprint != expected:
            raise ValueError(
                f"{path} holds other vectors than were saved (fingerprint mismatch): fetch or save it again."
            )
        labels = _digest_of_labels(header)
        if header.get("labels", labels) != labels:
            raise ValueError(f"{path} holds another name or other metadata than were saved: save it again.")
        return expert_vector

    @classmethod
    def blend(cls, parts: Iterable[tuple[float, "ExpertVector"]], name: str | None = None) -> "ExpertVector":
        """Mixes expert vectors: `z = 1 + sum of weight * (z_e - 1)`, with 1 for modules that one leaves out.

        Source: the linear mixing of Transformer-squared (arXiv 2501.06252), taken around the base; both are the same
        if the weights add up to 1.
        """
        terms: list[tuple[float, ExpertVector]] = []
        for weight, expert_vector in _checked_parts(parts):
            if isinstance(expert_vector, str):
                raise TypeError(f"{expert_vector!r} is a name: blend by name with `model.expert_vectors.blend`.")
            if not is_expert_vector(expert_vector):
                raise TypeError(
                    "`blend` takes pairs (weight, expert vector), got "
                    f"{type(expert_vector).__name__} for an expert vector."
                )
            if weight != 0:
                terms.append((weight, expert_vector))
        if [weight for weight, _ in terms] == [1]:
            return cls(terms[0][1].vectors, name)  # exact, where 1 + (z - 1) would round
        keys = dict.fromkeys(key for _, expert_vector in terms for key in expert_vector.vectors)
        return cls({key: _blend([(w, e.vectors[key]) for w, e in terms if key in e.vectors]) for key in keys}, name)


# One expert vector as users pass it; `None` is the base.
ExpertVectorLike: TypeAlias = ExpertVector | Mapping[str, VectorLike] | str | None
ExpertVectorsLike: TypeAlias = ExpertVectorLike | list[ExpertVectorLike] | tuple[ExpertVectorLike, ...]
# After names are looked up: one expert vector for all rows, or one for each row.
ResolvedExpertVector: TypeAlias = ExpertVector | list[ExpertVector | None] | None
T = TypeVar("T")


def _checked_parts(parts: Iterable[tuple[float, T]]) -> list[tuple[float, T]]:
    """The pairs of a blend, whose weights must be finite numbers."""
    pairs = list(parts)
    if not pairs:
        raise ValueError("There is nothing to blend: give a list of (weight, expert vector).")
    for part in pairs:
        if not isinstance(part, (tuple, list)) or len(part) != 2:
            raise TypeError(f"`blend` takes pairs (weight, expert vector), got {part!r}.")
        try:
            is_finite = math.isfinite(part[0])
        except (TypeError, ValueError, OverflowError) as error:
            raise TypeError(f"`blend` takes pairs (weight, expert vector), got {part[0]!r} for a weight.") from error
        if not is_finite:
            raise ValueError(f"Weights of a blend must be finite, got {part[0]}.")
    return [(weight, value) for weight, value in pairs]


def _digest_of_labels(header: Mapping[str, str]) -> str:
    return hashlib.sha256(f"{header['name']}\n{header['metadata']}".encode()).hexdigest()


def _checked_metadata(metadata: dict | None) -> dict:
    if metadata is not None and not isinstance(metadata, dict):
        raise TypeError(f"`metadata` must be a dict, got {type(metadata).__name__}.")
    try:
        copy = json_of(json.dumps(metadata or {}, allow_nan=False))
    except (TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"`metadata` must fit into JSON: {error}.") from error
    check_spectra(copy.get("spectrum", {}))
    return copy


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
    """Refuses an expert vector that does not fit a model whose linear modules have `sizes`: name -> (out, in)."""
    subject, unknown = described(expert_vector.name), [name for name in expert_vector.vectors if name not in sizes]
    if len(unknown) > MOST_MISSPELT:
        raise ValueError(
            f"{subject} has vectors for {len(unknown)} modules that this model does not have, such as "
            f"{unknown[0]!r}: it was made for another model."
        )
    if unknown:
        close = sorted({hint for name in unknown for hint in difflib.get_close_matches(name, sizes, n=2)})
        hint = f" Did you mean {close}?" if close else f" The model has {list(sizes)[:3]} and others."
        raise ValueError(
            f"{subject} has vectors for modules that this model does not have: {unknown}.{hint} The "
            "expert vector may belong to another model."
        )
    for name, vector in expert_vector.vectors.items():
        if vector.numel() > min(sizes[name]):
            raise ValueError(
                f"{subject} has {vector.numel()} scales for `{name}`, whose weight {sizes[name]} has "
                f"only {min(sizes[name])} singular values: it was made for another model."
            )


def is_expert_vector(value: object) -> TypeGuard[ExpertVector]:
    """Whether `value` is an expert vector, also one of another copy of this module (remote code may load two)."""
    return hasattr(value, "vectors") and hasattr(value, "fingerprint")


class ExpertVectorLibrary:
    """Expert vectors by name. Threads may share it.

    Names become file names: letters, digits, `-`, `_` and `.`, not starting with a dot.
    """

    def __init__(self):
        self._entries: dict[str, ExpertVector] = {}

    @property
    def names(self) -> list[str]:
        return list(self._entries)

    def add(
        self, name: str | ExpertVector, expert_vector: ExpertVector | Mapping[str, VectorLike] | None = None
    ) -> ExpertVector:
        """Stores an expert vector under a name, where it replaces an older one, and returns it.

        `add("bold", {"model.layers.0.mlp.down_proj": [1.5, 0.5]})` takes a dict or an `ExpertVector`;
        `add(expert_vector)` uses the expert vector's own name.
        """
        if isinstance(expert_vector, str):
            raise TypeError(f"The name comes first: `add({expert_vector!r}, ...)`.")
        value = name if expert_vector is None else expert_vector
        added = ExpertVector(value) if isinstance(value, Mapping) else value
        if not is_expert_vector(added):
            raise TypeError(f"An `ExpertVector` or a dict is needed, got {type(added).__name__}.")
        key = checked_name(added.name if expert_vector is None else name)
        self._entries[key] = added = added if added.name == key else _with_name(added, key)
        return added

    def blend(self, parts: Iterable[tuple[float, ExpertVectorLike]], name: str | None = None) -> ExpertVector:
        """`ExpertVector.blend` of values that `expert_vector=` takes for a row: also names, dicts, None (the base)."""
        expert_vectors = [(weight, self._vectors_of(value)) for weight, value in _checked_parts(parts)]
        return ExpertVector.blend(expert_vectors, name)

    def _vectors_of(self, value: ExpertVectorLike) -> ExpertVector:
        if value is None:
            return ExpertVector({})
        if isinstance(value, str):
            return self[value]
        return ExpertVector(value) if isinstance(value, Mapping) else value

    def load(self, path: str | os.PathLike, name: str | None = None) -> list[str]:
        """Adds a file, or every `*.safetensors` of a folder, all or none. Returns their names.

        `name`, for a file, defaults to the stored name; without a stored name the file's name is used.
        """
        path = Path(path)
        if path.is_dir() and name is not None:
            raise ValueError(f"{path} is a folder, whose files have names: pass `name` only with a file.")
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

        Raises:
            ValueError: two names differ in case alone, so that some file systems would mix up their files.
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
        others = f"the library has {sorted(self._entries)}" if self._entries else "the library is empty"
        return ValueError(f"There is no expert vector named {name!r}; {others}. Add it with `load` or `add`.")


def checked_name(name: object) -> str:
    """Returns `name` if it can name an expert vector and its file.

    Raises:
        ValueError: it cannot.
    """
    if name is None:
        raise ValueError("The expert vector has no name: give one, as in `add(name, expert_vector)`.")
    if not isinstance(name, str) or not re.fullmatch(FILE_NAME, name):
        raise ValueError(
            f"{name!r} cannot name an expert vector, as it becomes a file name: use letters, digits, '-', '_' and '.' "
            "(not at the start). `load(file, name=...)` loads a file under another name."
        )
    return name


def _with_name(expert_vector: ExpertVector, name: str) -> ExpertVector:
    deviations = getattr(expert_vector, "deviations", None)  # a vector of an older copy of this module has none
    return ExpertVector(expert_vector.vectors, name, expert_vector.metadata, deviations)


def resolve_expert_vector(
    expert_vector: ExpertVectorsLike, library: ExpertVectorLibrary | None = None
) -> ResolvedExpertVector:
    """Resolves a user's `expert_vector`: an expert vector, `None` for the base, or a list with one of these per row.

    Takes None, a name in `library`, an `ExpertVector`, a dict of tensors, or a list of these. An expert vector of ones
    becomes `None`, unless it is being trained.

    Raises:
        TypeError, ValueError: a value of another type, an empty list, or a name that the library does not have.
    """
    if isinstance(expert_vector, (list, tuple)):
        if not expert_vector:
            raise ValueError("`expert_vector` is an empty list: give one expert vector (None for the base) per row.")
        return [_resolve_one(row, library) for row in expert_vector]
    return _resolve_one(expert_vector, library)


def _resolve_one(value: ExpertVectorLike, library: ExpertVectorLibrary | None) -> ExpertVector | None:
    if value is None:
        return None
    if isinstance(value, str) and library is None:
        raise ValueError(f"The expert vector {value!r} is passed by name, but there is no library to look it up in.")
    if isinstance(value, str) and library is not None:
        value = library[value]
    elif isinstance(value, Mapping):
        value = ExpertVector(value)
    if not is_expert_vector(value):
        raise TypeError(
            "`expert_vector` takes None, a name, an ExpertVector, a dict of tensors, or a list with one of these per "
            f"row, got {type(value).__name__}."
        )
    is_trained = any(vector.requires_grad for vector in value.vectors.values())
    return value if is_trained or value.fingerprint != BASE_FINGERPRINT else None


@overload
def expert_key(resolved: ExpertVector | None, rows: int | None = None) -> str: ...


@overload
def expert_key(resolved: ResolvedExpertVector, rows: int | None = None) -> str | tuple[str, ...]: ...


def expert_key(resolved: ResolvedExpertVector, rows: int | None = None) -> str | tuple[str, ...]:
    """Hashable identity of a resolved expert vector: a fingerprint, or a tuple with one per row if the rows differ.

    Raises:
        ValueError: `resolved` is a list of another length than `rows`.
    """
    if not isinstance(resolved, list):
        return BASE_FINGERPRINT if resolved is None else resolved.fingerprint
    if rows is not None and len(resolved) != rows:
        raise ValueError(
            f"`expert_vector` lists {len(resolved)} expert vectors for a batch of {rows} rows: give one per row."
        )
    keys = tuple(expert_key(row) for row in resolved)
    return keys[0] if len(set(keys)) == 1 else keys


def collapsed_key(keys: str | Sequence[str] | None) -> ExpertKey:
    """The key of rows with these keys: `None` (base) or one key if all are equal, else a tuple."""
    if keys is None:
        return None
    rows = [keys] if isinstance(keys, str) else list(keys)
    if len(set(rows)) > 1:
        return tuple(rows)
    return None if rows[0] == BASE_FINGERPRINT else rows[0]


__all__ = [
    "BASE_FINGERPRINT",
    "ExpertKey",
    "ExpertVector",
    "ExpertVectorLibrary",
    "ExpertVectorLike",
    "ExpertVectorsLike",
    "ResolvedExpertVector",
    "VectorLike",
    "check_expert_vector",
    "checked_name",
    "collapsed_key",
    "expert_key",
    "is_expert_vector",
    "resolve_expert_vector",
]
