"""The options of a cache: one field for each, with its checks."""

from dataclasses import asdict, dataclass, fields, replace
from types import UnionType
from typing import cast, get_args, get_origin

from .cache_history_mambaformer import check_policy
from .cache_layers_mambaformer import STORAGES
from .cache_quantized_mambaformer import resolve_kv_bits


@dataclass(frozen=True)
class CacheOptions:
    """The options of `model.make_cache`.

    Args:
        storage: `"dense"` grows with the sequence at amortised cost; `"static"` has a fixed size and fixed addresses;
            `"quantized"` is dense, with keys and values in `kv_bits`.
        max_cache_len: columns (tokens with their pads) that static storage holds.
        on_expert_change: the treatment of a sequence that was encoded with another expert vector or other weights.
            `"recompute"` encodes it again at the next forward; `"reset"` drops it, and the caller feeds it again;
            `"continue"` keeps its states; `"error"` refuses the change.
        rollback_reach: tokens that `crop` takes back at once. Beyond it, and under static storage, `crop` is as exact,
            but the next forward encodes the remaining tokens again. See `MambaFormerCache.activate_past_recording`.
        kv_bits: bits of each number of keys and values (8, 6, 5, 4 or 3), or `{"keys": n, "values": n}`; by default 8
            for quantized storage, and the dtype of the activations for other storage. Static storage takes it too.
        park_bytes: bytes for the states of expert vectors that are not in force. With them a change back encodes only
            the columns that were fed since the change (`cache_parked_mambaformer`).

    Raises:
        ValueError: an unknown value, or static storage without `max_cache_len`.
    """

    storage: str = "dense"
    max_cache_len: int | None = None
    on_expert_change: str = "recompute"
    rollback_reach: int = 0
    kv_bits: int | dict[str, int] | None = None
    park_bytes: int = 0

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise ValueError(f"`storage` must be {' or '.join(map(repr, STORAGES))}, got {self.storage!r}.")
        if (self.storage == "static") != (self.max_cache_len is not None):
            raise ValueError(
                "`max_cache_len` (columns that the storage holds) belongs to storage='static': pass both or neither."
            )
        if self.max_cache_len is not None and not _is_count(self.max_cache_len, 1):
            raise ValueError(f"`max_cache_len` must be a positive integer, got {self.max_cache_len!r}.")
        check_policy(self.on_expert_change)
        check_reach(self.rollback_reach)
        self._check_park_bytes()
        object.__setattr__(self, "kv_bits", resolve_kv_bits(self.kv_bits, is_quantized=self.storage == "quantized"))

    def _check_park_bytes(self) -> None:
        if not _is_count(self.park_bytes, 0):
            raise ValueError(f"`park_bytes` must be an integer of at least 0, got {self.park_bytes!r}.")
        if self.park_bytes and self.on_expert_change != "recompute":
            raise ValueError(
                f"`park_bytes` saves encoding a sequence again, which on_expert_change={self.on_expert_change!r} "
                "never does: leave it out, or use on_expert_change='recompute'."
            )
        if self.park_bytes and self.max_cache_len is not None:
            raise ValueError(
                "Static storage has fixed addresses and parks no states: leave `park_bytes` out, or use "
                "storage='dense'."
            )

    @property
    def bits(self) -> dict[str, int] | None:
        """Bits of `"keys"` and of `"values"`; `None` for the dtype of the activations."""
        return cast("dict[str, int] | None", self.kv_bits)  # resolved by `__post_init__`

    def to_dict(self, rollback_reach: int) -> dict[str, object]:
        """The options as JSON, of a cache whose reach has grown to `rollback_reach`."""
        return asdict(replace(self, rollback_reach=rollback_reach))


def check_reach(reach: object) -> None:
    """Raises `ValueError` if `reach` is not a number of tokens."""
    if not _is_count(reach, 0):
        raise ValueError(f"`rollback_reach` counts tokens and must be an integer of at least 0, got {reach!r}.")


def check_types(options: dict) -> dict:
    """The options in a file, completed by defaults; only names and types are checked.

    Raises:
        ValueError: an unknown option, or a value of another type.
    """
    defaults = {field.name: field.default for field in fields(CacheOptions)}
    options = defaults | options
    if options.keys() != defaults.keys() or any(
        type(options[field.name]) not in _types_of(field.type) for field in fields(CacheOptions)
    ):
        raise ValueError(f"its options are {options}, not {list(defaults)}.")
    return options


def _types_of(annotation: object) -> tuple[type, ...]:
    """`int | dict[str, int] | None` -> `(int, dict, NoneType)`."""
    parts = get_args(annotation) if isinstance(annotation, UnionType) else (annotation,)
    return tuple(cast(type, get_origin(part) or part) for part in parts)


def _is_count(value: object, lowest: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= lowest


__all__ = ["CacheOptions", "check_reach", "check_types"]
