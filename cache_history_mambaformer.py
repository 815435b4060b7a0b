"""The sequence that a cache holds: its lengths, its tokens, and its provenance.

`Provenance` knows which expert vector and which weights encoded the sequence, and decides how the next forward treats
it.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import TYPE_CHECKING, NamedTuple, TypeAlias

import torch
from torch import Tensor

from .cache_buffers_mambaformer import Buffer, IdBuffer, as_normal_tensor, count_common_columns
from .cache_keys_mambaformer import Removal
from .cache_remember_mambaformer import LogBounds
from .cache_retention_mambaformer import Span, count_positions
from .expert_vectors_mambaformer import ExpertKey, ExpertVectorsLike, ResolvedExpertVector, collapsed_key

if TYPE_CHECKING:
    from .cache_parked_mambaformer import ParkedState
    from .configuration_mambaformer import MambaFormerConfig

# Turns the `expert_vector` of a user into the expert vector and the key of its content.
Resolve: TypeAlias = Callable[[ExpertVectorsLike], tuple[ResolvedExpertVector, ExpertKey]]

EXPERT_CHANGE_POLICIES = ("recompute", "reset", "continue", "error")


def check_policy(policy: str) -> None:
    """Raises `ValueError` if `policy` is no treatment of a sequence whose expert vector or weights change."""
    if policy not in EXPERT_CHANGE_POLICIES:
        raise ValueError(f"`on_expert_change` must be one of {EXPERT_CHANGE_POLICIES}, got {policy!r}.")


# ----------------------------------------------------------------------------------------------------------- lengths


@dataclass
class CacheLengths:
    """The lengths of the cached sequences, which all layers of a cache share.

    Args:
        columns: sequence length so far, padding included: an integer, or a tensor () under static storage.
        tokens_seen: real tokens of each row, (rows,) or (1,); `None` while no row ever had padding.
        rows: batch size; `None` before the first forward.
        overshoot: how many tokens longer than now a row has been, at most. Windows have overwritten as many keys.
    """

    columns: int | Tensor = 0
    tokens_seen: Tensor | None = None
    rows: int | None = None
    overshoot: int = 0
    # The value of `columns` when the host last read it: the tensor, its version, the value.
    last_read: tuple[Tensor, int, int] | None = field(default=None, repr=False, compare=False)

    @property
    def is_empty(self) -> bool:
        return self.rows is None

    @property
    def start(self) -> int | Tensor:
        """Tokens seen before the next one, as `Span.start`."""
        if self.tokens_seen is not None:
            return self.tokens_seen
        return self.columns if isinstance(self.columns, int) else self.columns[None]

    def num_columns(self) -> int:
        """`columns` as an integer. A tensor is read from its device only after others, as compiled steps, wrote it."""
        columns = self.columns
        if isinstance(columns, int):
            return columns
        value = self._value_read()
        if value is None:
            value = int(columns)
            if not columns.is_inference():  # an inference tensor counts no versions
                self.last_read = columns, columns._version, value
        return value

    def _value_read(self) -> int | None:
        """The value of `columns` if the host has read it since it was last written."""
        if self.last_read is None:
            return None
        tensor, version, value = self.last_read
        return value if tensor is self.columns and version == tensor._version else None

    def advance(self, span: Span, token_ids: Tensor) -> None:
        """Counts the tokens of `span`, of which the columns `token_ids` (rows, tokens) are new."""
        # First, since under static storage the start of the span is a view of `columns`.
        if span.lengths is not None or self.tokens_seen is not None:
            self.tokens_seen = span.ends(token_ids.device)
        self._add_columns(token_ids.shape[1])
        if self.overshoot:
            shortest = span.num_tokens if span.lengths is None else int(span.lengths.min())
            self.overshoot = max(self.overshoot - shortest, 0)
        self.rows = token_ids.shape[0]

    def _add_columns(self, num_tokens: int) -> None:
        """Adds to `columns`, in place if it is a tensor, without reading it."""
        is_tensor = not torch.compiler.is_compiling() and isinstance(self.columns, Tensor)
        value = self._value_read() if is_tensor else None
        self.columns += num_tokens
        if value is not None and isinstance(self.columns, Tensor):
            self.last_read = self.columns, self.columns._version, value + num_tokens

    def move_to(self, device: torch.device) -> None:
        """Makes `columns` a tensor, so that a compiled step does not depend on its value."""
        columns = self.columns
        if isinstance(columns, int):
            value, columns = columns, torch.full((), columns, device=device)
            if not columns.is_inference():
                self.last_read = columns, columns._version, value
        self.columns = as_normal_tensor(columns)

    def buffers(self) -> dict[str, Tensor]:
        pairs = {"columns": self.columns, "tokens_seen": self.tokens_seen}
        return {name: value for name, value in pairs.items() if isinstance(value, Tensor)}

    def set_buffers(self, tensors: dict[str, Tensor]) -> None:
        for name in self.buffers():
            setattr(self, name, tensors[name])

    def before_first_token(self) -> "CacheLengths":
        """The lengths of an empty sequence, on the same device."""
        return CacheLengths(columns=self.columns * 0)

    def crop(self, removal: Removal, device: torch.device) -> None:
        if len(removal.by_row) > 1 or self.tokens_seen is not None:
            tokens_seen = removal.columns if self.tokens_seen is None else self.tokens_seen
            self.tokens_seen = tokens_seen - torch.as_tensor(removal.tokens, device=device)
        self.overshoot += removal.most
        if isinstance(self.columns, int):
            self.columns = removal.columns_left
        else:
            self.columns = as_normal_tensor(self.columns).fill_(removal.columns_left)

    def select_rows(self, rows: Tensor) -> None:
        if self.tokens_seen is not None and self.rows is not None:
            self.tokens_seen = self.tokens_seen.expand(self.rows).index_select(0, rows.to(self.tokens_seen.device))
        self.rows = rows.shape[0]

    def reset(self) -> None:
        self.columns, self.tokens_seen, self.rows, self.overshoot = self.columns * 0, None, None, 0

    def fork_into(self, other: "CacheLengths") -> None:
        other.columns = self.columns if isinstance(self.columns, int) else self.columns.clone()
        other.tokens_seen = None if self.tokens_seen is None else self.tokens_seen.clone()
        other.rows, other.overshoot = self.rows, self.overshoot


# ------------------------------------------------------------------------------------------------------------ tokens


class NewTokens(NamedTuple):
    """The columns that a forward adds to the history, (rows, tokens) each; `None` for arguments that were not passed.

    `mask` is boolean; `embedding_marks` identify columns that were passed as embeddings, whose `token_ids` are -1.
    """

    token_ids: Tensor
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    embedding_marks: Tensor | None = None


class TokenHistory:
    """The tokens that a cache was fed, column by column with padding; column c is in slot `c - bounds.dropped`."""

    def __init__(self, config: "MambaFormerConfig", fixed_size: int | None = None, remember: int | None = None):
        self.bounds = LogBounds(remember)
        self.token_ids = IdBuffer(config, fixed_size)
        self.mask, self.position_ids, self.embedding_marks = (Buffer(1, fixed_size) for _ in range(3))
        self.has_embeddings = False

    def buffers(self) -> dict[str, Buffer]:
        names = ("token_ids", "mask", "position_ids", "embedding_marks")
        return {name: getattr(self, name) for name in names}

    def append(self, lengths: CacheLengths, new: NewTokens) -> None:
        """Stores `new` after the sequence of `lengths`.

        Masks, positions and marks are stored from their first use on.
        """
        columns = lengths.columns
        if self.bounds.remember is not None and isinstance(columns, int):
            num_skipped, columns = self.bounds.make_room(columns, new.token_ids.shape[1], self.buffers().values())
            others = (each if each is None else each[:, num_skipped:] for each in new[1:])
            new = NewTokens(new.token_ids[:, num_skipped:], *others)
        token_ids = new.token_ids
        if isinstance(columns, int):
            slots, size = columns, columns + token_ids.shape[1]
        else:
            slots = (columns + torch.arange(token_ids.shape[1], device=token_ids.device))[None]
            size = self.token_ids.fixed_size or 0
        position_ids = new.position_ids
        if position_ids is None and self.position_ids.tensor is not None:
            position_ids = _positions_of(new, lengths.start)
        self.token_ids.reserve(token_ids, size)
        self.token_ids.write(slots, token_ids)
        if new.mask is not None or self.mask.tensor is not None:
            mask = torch.ones_like(token_ids, dtype=torch.bool) if new.mask is None else new.mask
            self._reserve(self.mask, mask, size, torch.ones_like)
            self.mask.write(slots, mask)
        if position_ids is not None:
            self._reserve(self.position_ids, position_ids, size, self._earlier_positions)
            self.position_ids.write(slots, position_ids)
        if new.embedding_marks is not None or self.embedding_marks.tensor is not None:
            marks = torch.zeros_like(token_ids) if new.embedding_marks is None else new.embedding_marks
            self._reserve(self.embedding_marks, marks, size, torch.zeros_like)
            self.embedding_marks.write(slots, marks)
        self.has_embeddings |= new.embedding_marks is not None

    def view(self, name: str, columns: int) -> Tensor:
        """The readable columns of one of the `buffers()`: of `columns` columns, those from `bounds.first` on."""
        slots = self.buffers()[name].view(columns - self.bounds.dropped)
        return slots[:, self.bounds.first(columns) - self.bounds.dropped :]

    @staticmethod
    def _reserve(buffer: Buffer, like: Tensor, size: int, earlier: Callable[[Tensor], Tensor]) -> None:
        """Allocates `size` slots; at the first use, `earlier` makes the values of all earlier columns."""
        is_first = buffer.tensor is None
        buffer.reserve(like, size)
        if is_first and buffer.tensor is not None:
            buffer.tensor = earlier(buffer.tensor)

    def _earlier_positions(self, like: Tensor) -> Tensor:
        mask = torch.ones_like(like) if self.mask.tensor is None else self.mask.tensor.to(like.dtype)
        return count_positions(mask)[:, : like.shape[1]]

    def read(self, lengths: CacheLengths, start: int = 0) -> NewTokens:
        """All columns from `start` on, for a forward that encodes them again.

        Raises:
            ValueError: some of them were embeddings.
        """
        self.check_replayable()
        columns = lengths.num_columns()
        return NewTokens(**{name: getattr(self, name).view(columns)[:, start:] for name in self.tensors()})

    def read_mask(self, columns: int) -> Tensor:
        """Whether each of the first columns is a real token, (rows, columns), boolean."""
        if self.mask.tensor is not None:
            return self.mask.view(columns)
        return torch.ones_like(self.token_ids.view(columns), dtype=torch.bool)

    def common_prefix(self, columns: int, input_ids: Tensor, attention_mask: Tensor | None) -> int:
        """`MambaFormerCache.common_prefix` for a sequence of `columns` columns."""
        if self.token_ids.tensor is None:
            return 0
        self.check_complete("compared with a prompt")
        cached = self.token_ids.view(columns)
        if input_ids.is_floating_point() or input_ids.is_complex() or input_ids.dtype == torch.bool:
            raise TypeError(f"`input_ids` must hold integers, got {input_ids.dtype}.")
        if input_ids.dim() != 2 or input_ids.shape[0] != cached.shape[0]:
            raise ValueError(
                f"`input_ids` must be ({cached.shape[0]}, columns), one row for each row of the cache, got shape "
                f"{tuple(input_ids.shape)}."
            )
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )
        return count_common_columns(input_ids, attention_mask, cached, self.read_mask(columns))

    @property
    def is_complete(self) -> bool:
        """Whether the tokens are enough to encode the sequence again."""
        return not self.has_embeddings and not self.bounds.forgotten

    def check_complete(self, action: str) -> None:
        """Refuses an action that needs columns which are forgotten."""
        if self.bounds.forgotten:
            raise ValueError(
                f"The cached sequence would have to be {action}, but the cache has forgotten its first "
                f"{self.bounds.forgotten} columns: make it with a larger `remember`, or without one."
            )

    def check_replayable(self) -> None:
        self.check_complete("encoded again")
        if self.has_embeddings:
            raise ValueError(
                "The cached sequence would have to be encoded again, but part of it was fed as `inputs_embeds`, which "
                "a cache does not keep: call `cache.reset()` and feed the sequence again, or make the cache with "
                "on_expert_change='continue'."
            )

    def crop(self, removal: Removal) -> None:
        """Turns columns that only some rows lose into padding of those rows."""
        if len(removal.by_row) > 1 and self.token_ids.tensor is not None:
            slots, left = removal.columns - self.bounds.dropped, removal.columns_left - self.bounds.dropped
            lost = self._is_removed(removal.by_row, slots)[:, :left]
            like = torch.ones_like(self.token_ids.tensor, dtype=torch.bool)
            self._reserve(self.mask, like, like.shape[1], torch.ones_like)
            self.mask.write(0, self.mask.view(lost.shape[1]) & ~lost)

    def count_removed(self, by_row: list[int], columns: int) -> Tensor:
        """Real tokens (rows,) among the last `by_row` columns of each row."""
        slots = columns - self.bounds.dropped
        return (self.mask.view(slots) & self._is_removed(by_row, slots)).sum(1)

    def _is_removed(self, by_row: list[int], columns: int) -> Tensor:
        """Whether a column is removed, (rows or 1, columns)."""
        return torch.arange(columns, device=self.device) >= columns - torch.tensor(by_row, device=self.device)[:, None]

    @property
    def device(self) -> torch.device:
        """The device of the tokens."""
        return torch.device("cpu") if self.token_ids.tensor is None else self.token_ids.tensor.device

    def select_rows(self, rows: Tensor) -> None:
        for buffer in self.buffers().values():
            buffer.select_rows(rows)

    def make_empty(self) -> "TokenHistory":
        """A history with the same options, before the first token."""
        other = TokenHistory(self.token_ids.config, self.token_ids.fixed_size, self.bounds.remember)
        other.bounds.reach = self.bounds.reach
        return other

    def fork(self) -> "TokenHistory":
        other = self.make_empty()
        other.bounds = replace(self.bounds)
        for name, buffer in self.buffers().items():
            setattr(other, name, buffer.fork())
        other.has_embeddings = self.has_embeddings
        return other

    def tensors(self) -> dict[str, Tensor]:
        return {name: buffer.tensor for name, buffer in self.buffers().items() if buffer.tensor is not None}

    def set_tensors(self, tensors: dict[str, Tensor]) -> None:
        for name in self.tensors():
            getattr(self, name).tensor = tensors[name]

    def nbytes(self) -> dict[str, int]:
        return {name: tensor.nbytes for name, tensor in self.tensors().items()}


def _positions_of(new: NewTokens, start: int | Tensor) -> Tensor:
    mask = torch.ones_like(new.token_ids) if new.mask is None else new.mask
    return count_positions(mask, start if isinstance(start, int) else start[:, None])


def make_removal(
    tokens_to_remove: int | Sequence[int] | Tensor, lengths: CacheLengths, history: TokenHistory
) -> Removal:
    """Checks the argument of `MambaFormerCache.crop` and counts the real tokens that each row loses.

    Raises:
        ValueError: a positive number, more columns than were fed, or not one number for each row.
    """
    columns = lengths.num_columns()
    requested = tokens_to_remove.tolist() if isinstance(tokens_to_remove, Tensor) else tokens_to_remove
    is_per_row = isinstance(requested, (list, tuple))
    numbers = list(requested) if isinstance(requested, (list, tuple)) else [requested]
    is_complete = not is_per_row or len(numbers) == lengths.rows
    if not is_complete or not all(isinstance(k, int) and 0 <= -k <= columns for k in numbers):
        raise ValueError(
            f"`crop` takes -k for the last k columns, with k at most {columns}, or one such number for each of the"
            f" {lengths.rows or 0} rows; got {tokens_to_remove}."
        )
    seen = columns if lengths.tokens_seen is None else lengths.tokens_seen
    by_row = [-k for k in numbers if isinstance(k, int)]
    by_row = by_row[:1] if len(set(by_row)) == 1 else by_row
    if max(by_row, default=0) > columns - history.bounds.forgotten and by_row != [columns]:
        history.check_complete("cropped in its forgotten part")
    if lengths.tokens_seen is None or not any(by_row):
        tokens = by_row[0] if len(by_row) == 1 else torch.tensor(by_row, device="cpu")
        return Removal(columns, by_row, tokens, max(by_row, default=0), lengths.overshoot, seen)
    tokens = history.count_removed(by_row, columns)
    return Removal(columns, by_row, tokens, int(tokens.max()), lengths.overshoot, seen)


# -------------------------------------------------------------------------------------------------------- provenance


@dataclass(frozen=True)
class Encoding:
    """The expert vector and the weights that tokens are encoded with.

    Args:
        expert_vector_key: identifies the content of the expert vector.
        weights: the stamp of the weights, compared only for equality.
    """

    expert_vector_key: ExpertKey = None
    weights: object = None


def select_encoding(encoding: Encoding, rows: Tensor) -> Encoding:
    """The encoding of a batch whose row i is the earlier row `rows[i]`."""
    key = encoding.expert_vector_key
    if not isinstance(key, tuple):
        return encoding
    return replace(encoding, expert_vector_key=collapsed_key([key[row] for row in rows.tolist()]))


class Status(str, Enum):
    """The state of a cached sequence, compared with the expert vector and the weights in force."""

    EMPTY = "empty"  # no token is cached
    CURRENT = "current"  # its states were encoded with them
    STALE = "stale"  # the next forward has to encode its tokens again
    DIVERGED = "diverged"  # its states were encoded with others, and the next token continues from them


class Action(Enum):
    """The treatment of the cached sequence by a forward, before its new tokens."""

    KEEP = "keep"  # the expert vector and the weights in force have encoded its states
    RECOMPUTE = "recompute"  # its tokens are encoded again
    RESET = "reset"  # its tokens are dropped
    MIX = "mix"  # its states stay, although others encoded them


@dataclass(frozen=True)
class Change:
    """The effect of a forward on the provenance of the sequence; it takes place at the commit.

    Args:
        expert_vector, encoding: the expert vector and the weights that the forward puts in force; an `encoding` of
            `None` leaves both as they are.
        resumed: parked states from which `Action.RECOMPUTE` starts, instead of from empty states.
    """

    action: Action
    expert_vector: ResolvedExpertVector = None
    encoding: Encoding | None = None
    resumed: "ParkedState | None" = None

    @property
    def replaces_states(self) -> bool:
        """Whether the forward starts from other states than those of the cache: empty or parked ones."""
        return self.action is Action.RECOMPUTE or self.action is Action.RESET

    @property
    def recomputes(self) -> bool:
        return self.action is Action.RECOMPUTE

    @property
    def drops_tokens(self) -> bool:
        return self.action is Action.RESET


# Nothing changes. A compiled step takes it without comparing keys, on which its graph would depend.
UNCHANGED = Change(Action.KEEP)


class Provenance:
    """The expert vector and the weights in force, and the ones that encoded the cached sequence.

    Attributes:
        expert_vector: the expert vector in force: `None` (the base), an `ExpertVector`, or a list with one per row.
        in_force: the encoding of the next token.
        encoded: the encoding of the states of the sequence; `None` if the states have to be computed again. It is the
            same object as `in_force` if both are equal.
        is_mixed: several expert vectors or weights encoded the sequence, so its tokens alone do not determine it.
    """

    def __init__(self, policy: str):
        check_policy(policy)
        self.policy = policy
        self.expert_vector: ResolvedExpertVector = None
        self.in_force, self.is_mixed = Encoding(), False
        self.encoded: Encoding | None = self.in_force

    @property
    def status(self) -> Status:
        """The status of a sequence that is not empty."""
        if self.encoded is self.in_force or self.encoded == self.in_force:
            return Status.CURRENT
        if self.encoded is None or self.policy != "continue":
            return Status.STALE
        return Status.DIVERGED

    @property
    def is_uniform(self) -> bool:
        """Whether the encoding in force has encoded, or will encode, the complete sequence."""
        return not self.is_mixed and self.status is not Status.DIVERGED

    def check_uniform(self) -> None:
        if not self.is_uniform:
            raise ValueError(
                "The cached sequence was encoded with several expert vectors or weights (on_expert_change='continue') "
                "and cannot be rolled back so far: make the cache with a larger `rollback_reach`, or fork it before "
                "you feed tokens that you may take back."
            )

    def decide_change(
        self,
        expert_vector: ResolvedExpertVector,
        key: ExpertKey,
        weights: object,
        lengths: CacheLengths,
        history: TokenHistory,
    ) -> Change:
        """The change to an expert vector with this key and to weights with this stamp; nothing changes yet.

        Raises:
            ValueError: the policy refuses the change, or the tokens cannot be encoded again.
        """
        encoding = Encoding(key, weights)
        if encoding == self.encoded:
            encoding = self.encoded
        if encoding is self.encoded or lengths.is_empty:
            return Change(Action.KEEP, expert_vector, encoding)
        is_change = encoding != self.in_force
        if self.policy == "continue" and (is_change or self.encoded is not None):
            self._check_states_exist()
            return Change(Action.MIX, expert_vector, encoding)
        if not is_change:
            return Change(Action.RECOMPUTE, expert_vector, encoding)
        if self.policy == "error":
            subject = "expert vector" if key != self.in_force.expert_vector_key else "weights"
            raise ValueError(
                f"The {subject} changed while {lengths.num_columns()} columns are cached and `on_expert_change` is "
                "'error': call `cache.reset()` and feed the sequence again, or make the cache with another policy."
            )
        if self.policy == "reset":
            return Change(Action.RESET, expert_vector, encoding)
        history.check_replayable()
        return Change(Action.RECOMPUTE, expert_vector, encoding)

    def _check_states_exist(self) -> None:
        if self.encoded is None:
            raise ValueError(
                "Part of the sequence was rolled back, so the old expert vector has to encode the rest before another "
                "one continues it: feed a token first, or make the cache with on_expert_change='recompute'."
            )

    def put_in_force(self, change: Change) -> bool:
        """Puts the expert vector and weights of `change` in force; returns whether the expert vector is another."""
        if change.encoding is None:
            return False
        is_other = change.encoding.expert_vector_key != self.in_force.expert_vector_key
        self.expert_vector, self.in_force = change.expert_vector, change.encoding
        return is_other

    def commit(self, change: Change) -> None:
        """Notes that the encoding in force has encoded the sequence."""
        self.encoded, self.is_mixed = self.in_force, self.is_mixed or change.action is Action.MIX

    def invalidate(self) -> Encoding | None:
        """Marks the states as invalid, as while they are being changed; returns their encoding."""
        encoded, self.encoded = self.encoded, None
        return encoded

    def select_rows(self, rows: Tensor, resolve: Resolve | None) -> bool:
        """Gives row i the expert vector of row `rows[i]`; returns whether there was one for each row."""
        is_per_row, in_force = False, self.in_force
        encoded = None if self.encoded is None else select_encoding(self.encoded, rows)
        if isinstance(self.expert_vector, list) and resolve is not None:
            is_per_row = True
            self.expert_vector, key = resolve([self.expert_vector[row] for row in rows.tolist()])
            in_force = replace(in_force, expert_vector_key=key)
        self.in_force, self.encoded = in_force, in_force if encoded == in_force else encoded
        return is_per_row

    def restore(
        self, expert_vector: ResolvedExpertVector, in_force: Encoding, encoded: Encoding | None, is_mixed: bool
    ) -> None:
        """Takes the values that a session had."""
        self.expert_vector, self.in_force, self.is_mixed = expert_vector, in_force, is_mixed
        self.encoded = in_force if encoded == in_force else encoded

    def fork(self) -> "Provenance":
        other = Provenance(self.policy)
        other.__dict__.update(self.__dict__)
        return other


__all__ = [
    "UNCHANGED",
    "Action",
    "CacheLengths",
    "Change",
    "Encoding",
    "NewTokens",
    "Provenance",
    "Status",
    "TokenHistory",
    "check_policy",
    "make_removal",
    "select_encoding",
]
