"""The options of a cache: one field for each, with its checks."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from types import UnionType
from typing import cast, get_args, get_origin

from .cache_buffers_mambaformer import check_count
from .cache_history_mambaformer import check_policy
from .cache_layers_mambaformer import STORAGES
from .cache_policies_mambaformer import Budget, PruningPolicy, policy_fields, resolve_policy
from .cache_quantized_mambaformer import resolve_kv_bits
from .cache_states_quantized_mambaformer import check_state_bits
from .modeling_stack_mambaformer import LayerSpec


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
        policy: which keys of layers without a window stay, a `PruningPolicy` or its name; by default all keys stay.
            The schedule of evictions depends on lengths that static storage does not read, so it takes no policy.
        state_bits: 8 stores recurrent states in 8 bits, rounded after each token
            (`cache_states_quantized_mambaformer`); `None` in float32 at least.
        remember: columns of tokens that the cache keeps; all by default. With it, windows and recurrent states take
            constant memory however long the sequence is; layers of full attention keep all keys all the same. Once
            columns are forgotten, anything that needs all tokens is refused: encoding the sequence again after a
            change of expert vector or weights, `crop` beyond the reach, `common_prefix`.

    Raises:
        ValueError: an unknown value, static storage without `max_cache_len`, or static storage with a policy.
    """

    storage: str = "dense"
    max_cache_len: int | None = None
    on_expert_change: str = "recompute"
    rollback_reach: int = 0
    kv_bits: int | dict[str, int] | None = None
    park_bytes: int = 0
    policy: PruningPolicy | dict[str, object] | str | None = None
    state_bits: int | None = None
    remember: int | None = None

    def __post_init__(self) -> None:
        if self.storage not in STORAGES:
            raise ValueError(f"`storage` must be {' or '.join(map(repr, STORAGES))}, got {self.storage!r}.")
        if (self.storage == "static") != (self.max_cache_len is not None):
            raise ValueError(
                "`max_cache_len` (columns that the storage holds) belongs to storage='static': pass both or neither."
            )
        if self.max_cache_len is not None:
            check_count("max_cache_len", self.max_cache_len, 1)
        check_policy(self.on_expert_change)
        check_reach(self.rollback_reach)
        self._check_park_bytes()
        if self.policy is not None and self.storage == "static":
            raise ValueError(
                "A `policy` evicts keys at fixed numbers of tokens, which the host does not count under static "
                "storage: leave `policy` out, or use storage='dense' or 'quantized'."
            )
        object.__setattr__(self, "policy", resolve_policy(self.policy))
        check_state_bits(self.state_bits)
        self._check_remember()
        object.__setattr__(self, "kv_bits", resolve_kv_bits(self.kv_bits, is_quantized=self.storage == "quantized"))

    def _check_park_bytes(self) -> None:
        check_count("park_bytes", self.park_bytes, 0)
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

    def check_layers(self, specs: Sequence[LayerSpec]) -> None:
        """Raises `ValueError` if an option has no meaning for a cache of these layers."""
        if self.state_bits is not None and specs and not any(spec.is_recurrent for spec in specs):
            raise ValueError(
                "`state_bits` is about recurrent states, and no layer of this model has any: leave it out. `kv_bits` "
                "is about keys and values."
            )

    def _check_remember(self) -> None:
        if self.remember is None:
            return
        check_count("remember", self.remember, 1)
        if self.max_cache_len is not None:
            raise ValueError(
                "Static storage holds `max_cache_len` columns of everything: leave `remember` out, or use "
                "storage='dense' for a sequence without end."
            )

    @property
    def bits(self) -> dict[str, int] | None:
        """Bits of `"keys"` and of `"values"`; `None` for the dtype of the activations."""
        return cast("dict[str, int] | None", self.kv_bits)  # resolved by `__post_init__`

    def to_dict(self, rollback_reach: int) -> dict[str, object]:
        """The options as JSON, of a cache whose reach has grown to `rollback_reach`."""
        options: dict[str, object] = asdict(self)
        options["rollback_reach"] = rollback_reach
        options["policy"] = None if self.pruning is None else policy_fields(self.pruning)
        return options

    @property
    def pruning(self) -> PruningPolicy | None:
        """The policy; `None` if all keys stay."""
        return cast("PruningPolicy | None", self.policy)  # resolved by `__post_init__`

    def budgets(self, specs: Sequence[LayerSpec]) -> list[Budget | None]:
        """The policy's budget of each layer; `None` where all keys stay.

        Raises:
            ValueError: no layer has keys that a policy could evict, or budgets for another number of layers.
        """
        if self.pruning is None or not specs:
            return [None] * len(specs)
        if not any(spec.attends and spec.window is None for spec in specs):
            raise ValueError(
                "A `policy` evicts keys of layers that keep all of them, and this model has no such layer: leave "
                "`policy` out. Windows and recurrent states are of constant size."
            )
        return self.pruning.budgets(len(specs))


def check_reach(reach: object) -> None:
    """Raises `ValueError` if `reach` is not a number of tokens."""
    check_count("rollback_reach", reach, 0)


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


__all__ = ["CacheOptions", "check_reach", "check_types"]
