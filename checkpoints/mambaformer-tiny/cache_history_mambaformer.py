"""The sequence that a cache holds: its lengths, its tokens, and its provenance.

`Provenance` records which expert vector and which weights encoded the sequence, and decides what the next forward has
to do with it.
"""

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from enum import Enum
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cache_keys_mambaformer import Buffer, IdBuffer, Removal, Span, count_positions, usable
from .expert_vectors_mambaformer import collapsed_key

EXPERT_CHANGE_POLICIES = ("recompute", "reset", "continue", "error")


# ----------------------------------------------------------------------------------------------------------- lengths


@dataclass
class CacheLengths:
    """The lengths of the cached sequences, which all layers of a cache share.

    Args:
        columns: sequence length so far, padding included: an integer, or a tensor () under static storage.
        tokens_seen: real tokens of each row, (rows,) or (1,); `None` while no row ever had padding.
        rows: batch size; `None` before the first forward.
        overshoot: by how many tokens at most a row has been longer than it is now. Windows have overwritten so many.
    """

    columns: Any = 0
    tokens_seen: Tensor | None = None
    rows: int | None = None
    overshoot: int = 0
    # The value of `columns` when the host last read it: the tensor, its version, the value.
    last_read: tuple[Tensor, int, int] | None = field(default=None, repr=False, compare=False)

    @property
    def is_empty(self) -> bool:
        return self.rows is None

    @property
    def start(self) -> Any:
        """Real tokens before the next one, as `Span.start`."""
        if self.tokens_seen is not None:
            return self.tokens_seen
        return self.columns if isinstance(self.columns, int) else self.columns[None]

    def num_columns(self) -> int:
        """`columns` as an integer. A tensor is read from its device only if others, as compiled steps, wrote it."""
        if isinstance(self.columns, int):
            return self.columns
        if not self._is_read():
            value = int(self.columns)
            if self.columns.is_inference():  # an inference tensor counts no versions
                return value
            self.last_read = self.columns, self.columns._version, value
        return self.last_read[2]

    def advance(self, span: Span, token_ids: Tensor) -> None:
        """Counts the tokens of `span`; the columns `token_ids` (rows, tokens) of it were not fed before."""
        # First, since under static storage the start of the span is a view of `columns`.
        if span.lengths is not None or self.tokens_seen is not None:
            self.tokens_seen = span.ends(token_ids.device)
        self._add_columns(token_ids.shape[1])
        if self.overshoot:
            fed = span.num_tokens if span.lengths is None else int(span.lengths.min())
            self.overshoot = max(self.overshoot - fed, 0)
        self.rows = token_ids.shape[0]

    def _add_columns(self, num_tokens: int) -> None:
        """Adds to `columns`, in place where it is a tensor, without reading it."""
        is_read = not torch.compiler.is_compiling() and not isinstance(self.columns, int) and self._is_read()
        self.columns += num_tokens
        if is_read:
            self.last_read = self.columns, self.columns._version, self.last_read[2] + num_tokens

    def move_to(self, device) -> None:
        """Makes `columns` a tensor, so that a compiled step never depends on its value."""
        if isinstance(self.columns, int):
            value, self.columns = self.columns, torch.full((), self.columns, device=device)
            if not self.columns.is_inference():
                self.last_read = self.columns, self.columns._version, value
        self.columns = usable(self.columns)

    def _is_read(self) -> bool:
        last, columns = self.last_read, self.columns
        return last is not None and last[0] is columns and last[1] == columns._version

    def buffers(self) -> dict[str, Tensor]:
        pairs = {"columns": self.columns, "tokens_seen": self.tokens_seen}
        return {name: value for name, value in pairs.items() if isinstance(value, Tensor)}

    def set_buffers(self, tensors: dict[str, Tensor]) -> None:
        for name in self.buffers():
            setattr(self, name, tensors[name])

    def before_first_token(self) -> "CacheLengths":
        """The lengths of an empty sequence, on the same device."""
        return CacheLengths(columns=self.columns * 0)

    def crop(self, removal: Removal, device) -> None:
        if len(removal.by_row) > 1 or self.tokens_seen is not None:
            tokens_seen = removal.columns if self.tokens_seen is None else self.tokens_seen
            self.tokens_seen = tokens_seen - torch.as_tensor(removal.tokens, device=device)
        self.overshoot += removal.most
        if isinstance(self.columns, int):
            self.columns = removal.columns_left
        else:
            self.columns = usable(self.columns).fill_(removal.columns_left)

    def select_rows(self, rows: Tensor) -> None:
        if self.tokens_seen is not None:
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
    """The columns that a forward adds to the history, (rows, tokens) each; `None` where the caller gave none.

    `mask` is boolean; `embedding_marks` identify columns that were given as embeddings, whose `token_ids` are -1.
    """

    token_ids: Tensor
    mask: Tensor | None = None
    position_ids: Tensor | None = None
    embedding_marks: Tensor | None = None


class TokenHistory:
    """The tokens that a cache was fed, column by column and padding included: enough to encode them again."""

    def __init__(self, config, fixed_size: int | None = None):
        self.token_ids = IdBuffer(config, fixed_size)
        self.mask, self.position_ids, self.embedding_marks = (Buffer(1, fixed_size) for _ in range(3))
        self.has_embeddings = False

    def buffers(self) -> dict[str, Buffer]:
        names = ("token_ids", "mask", "position_ids", "embedding_marks")
        return {name: getattr(self, name) for name in names}

    def append(self, lengths: CacheLengths, new: NewTokens) -> None:
        """Stores `new` behind the sequence of `lengths`.

        Masks, positions and marks are stored from their first use on.
        """
        token_ids, position_ids, columns = new.token_ids, new.position_ids, lengths.columns
        if position_ids is None and self.position_ids.tensor is not None:
            position_ids = _positions_of(new, lengths.start)
        if isinstance(columns, int):
            slots, size = columns, columns + token_ids.shape[1]
        else:
            slots = (columns + torch.arange(token_ids.shape[1], device=token_ids.device))[None]
            size = self.token_ids.fixed_size
        self.token_ids.reserve(token_ids, size)
        self.token_ids.write(slots, token_ids)
        if new.mask is not None or self.mask.tensor is not None:
            mask = torch.ones_like(token_ids, dtype=torch.bool) if new.mask is None else new.mask
            self._start(self.mask, mask, size, torch.ones_like)
            self.mask.write(slots, mask)
        if position_ids is not None:
            self._start(self.position_ids, position_ids, size, self._earlier_positions)
            self.position_ids.write(slots, position_ids)
        if new.embedding_marks is not None or self.embedding_marks.tensor is not None:
            marks = torch.zeros_like(token_ids) if new.embedding_marks is None else new.embedding_marks
            self._start(self.embedding_marks, marks, size, torch.zeros_like)
            self.embedding_marks.write(slots, marks)
        self.has_embeddings |= new.embedding_marks is not None

    def _start(self, buffer: Buffer, like: Tensor, size: int, earlier: Callable[[Tensor], Tensor]) -> None:
        is_new = buffer.tensor is None
        buffer.reserve(like, size)
        if is_new:
            buffer.tensor = earlier(buffer.tensor)

    def _earlier_positions(self, like: Tensor) -> Tensor:
        mask = torch.ones_like(like) if self.mask.tensor is None else self.mask.tensor.to(like.dtype)
        return count_positions(mask)[:, : like.shape[1]]

    def read(self, lengths: CacheLengths) -> NewTokens:
        """All columns, for a forward that encodes them again.

        Raises:
            ValueError: part of them were embeddings.
        """
        self.check_replayable()
        columns = lengths.num_columns()
        every = {name: buffer for name, buffer in self.buffers().items() if buffer.tensor is not None}
        return NewTokens(**{name: buffer.view(columns) for name, buffer in every.items()})

    def read_mask(self, columns: int) -> Tensor:
        """Whether each of the first columns is a real token, (rows, columns), boolean."""
        if self.mask.tensor is not None:
            return self.mask.view(columns)
        return torch.ones_like(self.token_ids.view(columns), dtype=torch.bool)

    def check_replayable(self) -> None:
        if self.has_embeddings:
            raise ValueError(
                "The cached text would have to be encoded again, but part of it was fed as `inputs_embeds`, which are "
                "not remembered: call `cache.reset()` and feed it again, or use on_expert_change='continue'."
            )

    def crop(self, removal: Removal) -> None:
        """Turns columns that only some rows lose into padding of those rows."""
        if len(removal.by_row) > 1:
            lost = self._is_removed(removal.by_row, removal.columns)[:, : removal.columns_left]
            like = torch.ones_like(self.token_ids.tensor, dtype=torch.bool)
            self._start(self.mask, like, like.shape[1], torch.ones_like)
            self.mask.write(0, self.mask.view(lost.shape[1]) & ~lost)

    def count_removed(self, by_row: list[int], columns: int) -> Tensor:
        """Real tokens (rows,) among the last `by_row` columns of each row."""
        return (self.mask.view(columns) & self._is_removed(by_row, columns)).sum(1)

    def _is_removed(self, by_row: list[int], columns: int) -> Tensor:
        """Whether a column is removed, (rows or 1, columns)."""
        device = self.token_ids.tensor.device
        return torch.arange(columns, device=device) >= columns - torch.tensor(by_row, device=device)[:, None]

    def select_rows(self, rows: Tensor) -> None:
        for buffer in self.buffers().values():
            buffer.select_rows(rows)

    def fork(self) -> "TokenHistory":
        other = TokenHistory(self.token_ids.config)
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


def _positions_of(new: NewTokens, start: Any) -> Tensor:
    mask = torch.ones_like(new.token_ids) if new.mask is None else new.mask
    return count_positions(mask, start if isinstance(start, int) else start[:, None])


def make_removal(tokens_to_remove: Any, lengths: CacheLengths, history: TokenHistory) -> Removal:
    """Checks the argument of `MambaFormerCache.crop` and counts the real tokens that each row loses.

    Raises:
        ValueError: a positive number, more columns than were fed, or not one number for each row.
    """
    columns = lengths.num_columns()
    asked = tokens_to_remove.tolist() if isinstance(tokens_to_remove, Tensor) else tokens_to_remove
    is_for_all = not isinstance(asked, (list, tuple))
    asked = [asked] if is_for_all else asked
    is_complete = is_for_all or len(asked) == lengths.rows
    if not is_complete or not all(isinstance(k, int) and 0 <= -k <= columns for k in asked):
        raise ValueError(
            f"`crop` takes -k for the last k columns, with k at most {columns}, or one such number for each of the"
            f" {lengths.rows or 0} rows; got {tokens_to_remove}."
        )
    by_row = [-k for k in asked]
    by_row = by_row[:1] if len(set(by_row)) == 1 else by_row
    if lengths.tokens_seen is None or not any(by_row):
        tokens = by_row[0] if len(by_row) == 1 else torch.tensor(by_row, device="cpu")
        return Removal(columns, by_row, tokens, max(by_row, default=0), lengths.overshoot)
    tokens = history.count_removed(by_row, columns)
    return Removal(columns, by_row, tokens, int(tokens.max()), lengths.overshoot)


# -------------------------------------------------------------------------------------------------------- provenance


@dataclass(frozen=True)
class Encoding:
    """The expert vector, by the key of its content, and the weights, by their stamp, that tokens are encoded with."""

    expert_key: Any = None
    weights: Any = None


class Status(str, Enum):
    """The state of a cached sequence, compared with the expert vector and the weights in force."""

    EMPTY = "empty"  # no token is cached
    CURRENT = "current"  # its states were encoded with them
    STALE = "stale"  # the next forward has to encode its tokens again
    DIVERGED = "diverged"  # its states were encoded with others, and the next token continues from them


class Action(Enum):
    """The treatment of the cached sequence by a forward, before the tokens of its own."""

    KEEP = "keep"  # its states are those of the expert vector and the weights in force
    RECOMPUTE = "recompute"  # its tokens are encoded again
    RESET = "reset"  # its tokens are dropped
    MIX = "mix"  # its states stay, although others encoded them


@dataclass(frozen=True)
class Change:
    """The effect of a forward on the provenance of the sequence; it takes place at the commit.

    Args:
        expert, encoding: the expert vector and the weights that the forward puts in force; an `encoding` of `None`
            leaves both as they are.
    """

    action: Action
    expert: Any = None
    encoding: Encoding | None = None

    @property
    def starts_empty(self) -> bool:
        """Whether the forward starts from empty states."""
        return self.action is Action.RECOMPUTE or self.action is Action.RESET

    @property
    def recomputes(self) -> bool:
        return self.action is Action.RECOMPUTE

    @property
    def drops_tokens(self) -> bool:
        return self.action is Action.RESET


# Nothing changes. A compiled step takes it without comparing expert keys, on which its graph would depend.
UNCHANGED = Change(Action.KEEP)


class Provenance:
    """The expert vector and the weights in force, and those that encoded the cached sequence.

    Attributes:
        expert: the expert vector in force: `None` (the base), an `ExpertVector`, or a list with one for each row.
        in_force: what the next token is encoded with.
        encoded: what the states of the sequence were encoded with; `None` if the states have to be computed again.
            It is the same object as `in_force` if both are equal.
        is_mixed: several expert vectors or weights encoded the sequence, so its tokens alone do not determine it.
    """

    def __init__(self, policy: str):
        if policy not in EXPERT_CHANGE_POLICIES:
            raise ValueError(f"`on_expert_change` must be one of {EXPERT_CHANGE_POLICIES}, got {policy!r}.")
        self.policy = policy
        self.expert, self.in_force, self.is_mixed = None, Encoding(), False
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
        """Whether what is in force encoded the whole sequence, or is to encode it again."""
        return not self.is_mixed and self.status is not Status.DIVERGED

    def check_uniform(self) -> None:
        if not self.is_uniform:
            raise ValueError(
                "The cached text was encoded under several experts or weights (on_expert_change='continue') and cannot"
                " be rolled back so far: make the cache with a larger `rollback_reach`, or fork it before feeding what"
                " may have to be taken back."
            )

    def decide_change(
        self, expert: Any, key: Any, weights: Any, lengths: CacheLengths, history: TokenHistory
    ) -> Change:
        """The change to an expert vector, identified by `key`, and to weights with this stamp; changes nothing.

        Raises:
            ValueError: the policy refuses the change, or the tokens cannot be encoded again.
        """
        encoding = Encoding(key, weights)
        if encoding == self.encoded:
            encoding = self.encoded
        if encoding is self.encoded or lengths.is_empty:
            return Change(Action.KEEP, expert, encoding)
        is_change = encoding != self.in_force
        if self.policy == "continue" and (is_change or self.encoded is not None):
            self._check_states_exist()
            return Change(Action.MIX, expert, encoding)
        if not is_change:
            return Change(Action.RECOMPUTE, expert, encoding)
        if self.policy == "error":
            subject = "expert vector" if key != self.in_force.expert_key else "weights"
            raise ValueError(
                f"The {subject} changed while {lengths.num_columns()} columns are cached and `on_expert_change` is "
                "'error': call `cache.reset()` and feed the text again, or make the cache with another policy."
            )
        if self.policy == "reset":
            return Change(Action.RESET, expert, encoding)
        history.check_replayable()
        return Change(Action.RECOMPUTE, expert, encoding)

    def _check_states_exist(self) -> None:
        if self.encoded is None:
            raise ValueError(
                "Part of the text was rolled back, and what is left has to be encoded by the old expert before another"
                " one goes on from it: feed a token first, or use on_expert_change='recompute'."
            )

    def put_in_force(self, change: Change) -> bool:
        """Puts the expert vector and weights of `change` in force; returns whether the expert vector is another."""
        is_other = change.encoding.expert_key != self.in_force.expert_key
        self.expert, self.in_force = change.expert, change.encoding
        return is_other

    def commit(self, change: Change) -> None:
        """Records that the sequence is encoded with what is in force."""
        self.encoded, self.is_mixed = self.in_force, self.is_mixed or change.action is Action.MIX

    def invalidate(self) -> Encoding | None:
        """Marks the states as not usable, while they are being changed; returns what had encoded them."""
        encoded, self.encoded = self.encoded, None
        return encoded

    def select_rows(self, rows: Tensor, resolve: Callable) -> bool:
        """Gives row i the expert vector of row `rows[i]`; returns whether the expert vectors in force are others."""
        is_list, expert, in_force, encoded = isinstance(self.expert, list), self.expert, self.in_force, self.encoded
        if encoded is not None and isinstance(encoded.expert_key, tuple):
            key = collapsed_key([encoded.expert_key[row] for row in rows.tolist()])
            encoded = replace(encoded, expert_key=key)
        if is_list:
            expert, key = resolve([expert[row] for row in rows.tolist()])
            in_force = replace(in_force, expert_key=key)
        self.expert, self.in_force = expert, in_force
        self.encoded = in_force if encoded == in_force else encoded
        return is_list

    def restore(self, expert: Any, in_force: Encoding, encoded: Encoding | None, is_mixed: bool) -> None:
        """Takes the values that a session had."""
        self.expert, self.in_force, self.is_mixed = expert, in_force, is_mixed
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
    "make_removal",
]
