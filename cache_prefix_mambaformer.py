"""The prefix cache: states of token sequences, from which a new request forks the longest prefix that it shares.

A recurrent state answers for one length of its sequence only, so a prefix of a stored sequence is of no use unless a
state was stored exactly there. Two kinds of lengths are worth storing (Marconi, arXiv 2411.19379, section 4): the end
of a turn, where the next turn of the conversation continues, and a branch point, where a second request leaves a
sequence that is known, such as the end of a shared system prompt.
"""

import functools
import hashlib
import os
import threading
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import EllipsisType
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor
from transformers.utils import logging

from .cache_buffers_mambaformer import check_count, count_leading
from .cache_history_mambaformer import Encoding, Status
from .cache_lock_mambaformer import ExclusiveLock
from .cache_mambaformer import MambaFormerCache
from .cache_options_mambaformer import CacheOptions
from .cache_prefix_tree_mambaformer import Entry, Match, PrefixTree
from .files_mambaformer import remove_abandoned
from .inputs_mambaformer import check_cache_type, check_token_ids
from .weights_version_mambaformer import weights_stamp

if TYPE_CHECKING:
    from .expert_vectors_mambaformer import ExpertVectorsLike
    from .modeling_mambaformer import MambaFormerPreTrainedModel

logger = logging.get_logger(__name__)

FILE_PREFIX = "prefix-"


class PrefixCache:
    """Stores the states of sequences and answers new requests from the longest prefix that they share.

    `model.generate(input_ids, prefix_cache=...)` uses it; `fetch` and `insert` are for loops of one's own. Entries
    are keyed by content: the tokens, the expert vector and the weights that encoded them. Which entries stay is
    decided by Greedy-Dual-Size-Frequency (Cherkasova 1998): the computation that an entry saves, times its uses, per
    byte, aged by the priority of the last entry that was evicted. All methods may be called from several threads.

    Args:
        model: the model whose caches are stored.
        max_bytes: bytes of all stored states.
        min_tokens: shorter prefixes are not stored.
        cache_options: of the caches that requests get, as keywords of `model.make_cache`: `storage="quantized"`,
            `policy=...`, `state_bits=8`, ... Only states in the same form are stored.

    Raises:
        TypeError: `model` is no MambaFormer.
        ValueError: `max_bytes` or `min_tokens` is not a positive integer, static storage, or options that `make_cache`
            refuses.
    """

    def __init__(
        self, model: "MambaFormerPreTrainedModel", max_bytes: int, min_tokens: int = 16, **cache_options: object
    ):
        check_count("max_bytes", max_bytes, 1)
        check_count("min_tokens", min_tokens, 1)
        if not hasattr(model, "make_cache"):
            raise TypeError(f"A prefix cache is made for a MambaFormer model, got {type(model).__name__}.")
        self.model, self.max_bytes, self.min_tokens = model, max_bytes, min_tokens
        self._make_cache = functools.partial(
            cast("Callable[..., MambaFormerCache]", model.make_cache), **cache_options
        )
        self.options = self._make_cache().options
        if self.options.max_cache_len is not None:
            raise ValueError(
                "Static storage has fixed addresses and shares no memory with a stored prefix: leave "
                "storage='static' out, or use storage='dense' or 'quantized'."
            )
        # An entry has all of its tokens and one expert vector.
        self._options_of_entries = replace(self.options, remember=None, park_bytes=0)
        self._operations_per_token = 2 * sum(weight.numel() for weight in model.base_model.layers.parameters())
        self._trees: dict[Encoding, PrefixTree] = {}
        self._entries: dict[Entry, tuple[Encoding, Tensor]] = {}
        self._lock = threading.RLock()
        self._age = 0.0
        self._counts: Counter[str] = Counter()

    # ---- requests

    def fetch(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        expert_vector: "ExpertVectorsLike | EllipsisType" = ...,
    ) -> MambaFormerCache:
        """A cache that holds the longest stored prefix of `input_ids` (rows, tokens); empty if there is none.

        At least one token is left to be fed. Rows of a batch share one prefix, the tokens that all of them begin
        with. If the prefix of the request that was seen before is longer than what is stored, the tokens up to there
        are encoded now and stored, since the next request may leave the known sequence at the same place.

        Args:
            attention_mask: (rows, tokens); a batch with padding starts from an empty cache.
            expert_vector: the expert vector of the request, in the forms of `forward`.

        Raises:
            TypeError: `input_ids` is no tensor of integers.
            ValueError: `input_ids` is not (rows, tokens), holds an unknown token, or the expert vector does not fit.
        """
        check_token_ids(input_ids, self.model.config.vocab_size)
        if attention_mask is not None and attention_mask.shape != input_ids.shape:
            raise ValueError(
                f"`attention_mask` must have the shape of `input_ids`, {tuple(input_ids.shape)}, got "
                f"{tuple(attention_mask.shape)}."
            )
        cache = self._empty_cache(expert_vector)
        ids = self._lookup_ids(input_ids, attention_mask, cache)
        num_tokens = input_ids.shape[0] * input_ids.shape[1]
        if ids is None:
            self._count({"requests: all": 1, "tokens: read": num_tokens})
            return cache
        found, length_seen = self._longest(cache.provenance.in_force, ids)
        start = 0 if found is None else found.get_seq_length()
        if length_seen - start >= self.min_tokens:
            found = cache if found is None else found
            self._encode(found, ids[start:length_seen])
            self.insert(found)
        reused = start * input_ids.shape[0]
        hits = {"requests: hits": 1} if start else {}
        self._count({"requests: all": 1, "tokens: reused": reused, "tokens: read": num_tokens - reused} | hits)
        found = cache if found is None else found
        if input_ids.shape[0] > 1 and found.get_seq_length():
            found.batch_repeat_interleave(input_ids.shape[0])
        return found

    def encode(self, input_ids: Tensor, cache: MambaFormerCache) -> None:
        """Feeds `cache` all tokens of one row but the last, and stores them: for several answers to one prompt."""
        start = cache.get_seq_length()
        if input_ids.shape[0] == 1 and input_ids.shape[1] - 1 > start:
            self._encode(cache, _as_ids(input_ids[0, start:-1]))
            self.insert(cache)

    def insert(self, cache: MambaFormerCache) -> int:
        """Stores the states of a cache, each row by itself; returns how many rows were stored.

        Rows that cannot answer a request are left out, and `report()` counts the reasons: embeddings, positions that
        were chosen by hand, padding, a sequence that several expert vectors or weights encoded, states of autocast,
        tokens that were forgotten (`remember`), static storage, another form of keys, values or states than
        `cache_options` say, more bytes than `max_bytes`. Keys under a pruning policy depend on the tokens so far
        alone, so an entry answers at its own length, and shorter ones back to its last eviction.
        """
        if cache is None:
            raise TypeError("`insert` takes a cache of `model.make_cache()` that has been fed, got None.")
        check_cache_type(cache)
        reason = self._obstacle(cache)
        if reason is not None:
            self._count({f"not stored: {reason}": 1})
            return 0
        num_stored = 0
        for row, ids in enumerate(cache.history.read(cache.lengths).token_ids):
            num_stored += self._insert_row(cache, row, _as_ids(ids))
        return num_stored

    def clear(self) -> None:
        """Removes all entries."""
        with self._lock:
            self._trees, self._entries, self._age = {}, {}, 0.0

    # ---- what it holds

    @property
    def nbytes(self) -> int:
        """Bytes of all stored states."""
        with self._lock:
            return sum(entry.nbytes for entry in self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def report(self) -> dict[str, dict[str, int]]:
        """Counts since it was made, and what is held now.

        Parts are `requests`, `tokens` (reused and read), `missed` and `not stored` by reason, `evicted`, and `held`.
        """
        with self._lock:
            report: dict[str, dict[str, int]] = {"requests": {"all": 0, "hits": 0}, "tokens": {"reused": 0, "read": 0}}
            for name, count in self._counts.items():
                part, _, what = name.partition(": ")
                report.setdefault(part, {})[what] = count
            held = {"entries": len(self._entries), "bytes": self.nbytes, "max_bytes": self.max_bytes}
            return report | {"held": held}

    # ---- on disk

    def save(self, folder: str | os.PathLike) -> int:
        """Writes each entry as a session file into `folder`; returns how many there are.

        Files are named by their content and written atomically, so a process that is killed leaves complete files of
        entries, old and new, and a temporary file that the next `save` removes. Files of entries that are gone are
        removed at the end.

        Raises:
            OSError: the folder cannot be written.
        """
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        stamp, fingerprint = self.model.weights_fingerprint()
        with self._lock:
            entries = [(entry, *key) for entry, key in self._entries.items() if key[0].weights == stamp]
        names_written = set()
        for entry, encoding, ids in entries:
            key = f"{fingerprint} {encoding.expert_vector_key} {_form_of(self.options)} "
            content = key.encode() + ids.numpy().tobytes()
            path = folder / f"{FILE_PREFIX}{hashlib.sha256(content).hexdigest()[:32]}.safetensors"
            if not path.exists():
                entry.cache.save(path)
            names_written.add(path.name)
        for path in folder.glob(f"{FILE_PREFIX}*.safetensors"):
            if path.name not in names_written:
                path.unlink(missing_ok=True)
        remove_abandoned(folder)
        return len(names_written)

    def load(self, folder: str | os.PathLike) -> int:
        """Stores the session files of `folder`, largest first; returns how many entries were stored.

        Files of other weights and damaged files are left out with a warning; `report()` counts files of other
        `cache_options`.
        """
        num_stored = 0
        paths = Path(folder).glob(f"{FILE_PREFIX}*.safetensors")
        for path in sorted(paths, key=lambda path: (-path.stat().st_size, path.name)):
            try:
                num_stored += self.insert(self.model.load_cache(str(path)))
            except (ValueError, OSError) as error:
                logger.warning(f"{path} is left out of the prefix cache: {error}")
        return num_stored

    # ---- inside

    def _count(self, counts: dict[str, int]) -> None:
        """Adds to counters, which are named "part of the report: name"."""
        with self._lock:
            self._counts.update(counts)

    def _empty_cache(self, expert_vector: "ExpertVectorsLike | EllipsisType") -> MambaFormerCache:
        """An empty cache with the expert vector and the weights of a request in force."""
        cache = self._make_cache()
        if expert_vector is not ...:
            cache.set_expert_vector(expert_vector)
        weights = weights_stamp(self.model.base_model)
        cache.provenance.in_force = Encoding(cache.provenance.in_force.expert_vector_key, weights)
        return cache

    def _lookup_ids(self, input_ids: Tensor, attention_mask: Tensor | None, cache: MambaFormerCache) -> Tensor | None:
        """The tokens that all rows begin with, but the last; `None`, and the reason is counted, if there are none."""
        if isinstance(cache.expert_vector, list):
            self._count({"missed: one expert vector per row": 1})
        elif torch.is_autocast_enabled(self.model.device.type):
            self._count({"missed: autocast": 1})
        elif attention_mask is not None and not bool(attention_mask.bool().all()):
            self._count({"missed: padding": 1})
        else:
            ids = _as_ids(input_ids[:, :-1])  # one token is left to be fed
            return ids[0, : count_leading((ids == ids[:1]).all(0))]
        return None

    def _longest(self, encoding: Encoding, ids: Tensor) -> tuple[MambaFormerCache | None, int]:
        """A fork that holds the longest stored prefix of `ids`, and the tokens of the longest prefix ever seen."""
        with self._lock:
            tree = self._trees.get(encoding)
            match = Match() if tree is None else tree.match(ids)
            cache, entry = self._cropped_fork(match), match.entry
            if cache is None and entry is not None:
                self._use(entry)
                cache = entry.cache.duplicate(self.options)
            if cache is None:
                self._count({f"missed: {self._reason(encoding, ids, match.length)}": 1})
            return cache, match.length

    def _cropped_fork(self, match: Match) -> MambaFormerCache | None:
        """A fork of a longer sequence without its last tokens, where that costs no encoding and gains tokens."""
        is_stored = match.entry is not None and match.entry.num_tokens == match.length
        if is_stored or not match.longer or not match.length:
            return None
        entry = min(match.longer, key=lambda each: each.num_tokens)
        cache = entry.cache.duplicate(self.options)
        cache.crop(match.length - entry.num_tokens)
        if cache.status != Status.CURRENT:
            return None
        self._use(entry)
        return cache

    def _reason(self, encoding: Encoding, ids: Tensor, length: int) -> str:
        """Why no entry answers a request."""
        if length:
            return "the sequence branches where no state is stored"
        for other, tree in self._trees.items():
            if other != encoding and tree.match(ids).entry is not None:
                return (
                    "other weights" if other.expert_vector_key == encoding.expert_vector_key else "other expert vector"
                )
        return "no such prefix"

    def _encode(self, cache: MambaFormerCache, ids: Tensor) -> None:
        with torch.no_grad():
            self.model(ids[None].long().to(self.model.device), cache=cache, logits_to_keep=1)

    def _obstacle(self, cache: MambaFormerCache) -> str | None:
        """Why a cache cannot answer requests; `None` if it can."""
        mask, form = cache.history.mask.tensor, _form_of(cache.options)
        obstacles = {f"other `{name}`": value != form[name] for name, value in _form_of(self.options).items()} | {
            "static storage": cache.max_columns is not None,
            "nothing is cached": cache.lengths.is_empty,
            "tokens that were forgotten": cache.history.bounds.forgotten > 0,
            "embeddings": cache.history.has_embeddings,
            "positions chosen by hand": cache.history.position_ids.tensor is not None,
            "padding": mask is not None and not bool(mask[:, : cache.get_seq_length()].all()),
            "several expert vectors or weights": cache.status != Status.CURRENT or not cache.provenance.is_uniform,
            "one expert vector per row": isinstance(cache.expert_vector, list),
            "states of autocast": not self._has_dtypes_of_model(cache),
        }
        return next((reason for reason, holds in obstacles.items() if holds), None)

    def _has_dtypes_of_model(self, cache: MambaFormerCache) -> bool:
        """Whether no state is narrower than the model's own activations, as autocast makes them."""
        dtypes = {dtype for _, store in cache.stores() for dtype in store.dtypes()}
        return dtypes <= {self.model.dtype, torch.float32, torch.float64}

    def _insert_row(self, cache: MambaFormerCache, row: int, ids: Tensor) -> bool:
        encoding = cache.provenance.in_force
        if len(ids) < self.min_tokens or self._is_stored(encoding, ids):
            return False  # a fork would make the cache copy its keys at its next token
        with ExclusiveLock(cache.lock, "stored", changes=False):
            stored = cache.duplicate(self._options_of_entries)
        if cache.batch_size > 1:
            stored.batch_select_indices(torch.tensor([row], device="cpu"))
        entry = Entry(stored, len(ids), stored.nbytes)
        if entry.nbytes > self.max_bytes:
            self._count({"not stored: larger than `max_bytes`": 1})
            return False
        with self._lock:
            node = self._trees.setdefault(encoding, PrefixTree()).node_at(ids)
            if node.entry is not None:  # another thread was first
                return False
            node.entry = entry
            self._entries[entry] = (encoding, ids)
            self._set_priority(entry)
            self._evict()
            return entry in self._entries

    def _is_stored(self, encoding: Encoding, ids: Tensor) -> bool:
        with self._lock:
            tree = self._trees.get(encoding)
            entry = None if tree is None else tree.match(ids).entry
            return entry is not None and entry.num_tokens == len(ids)

    def _use(self, entry: Entry) -> None:
        entry.num_hits += 1
        self._set_priority(entry)

    def _set_priority(self, entry: Entry) -> None:
        encoding, ids = self._entries[entry]
        shorter = self._trees[encoding].match(ids[:-1]).entry
        saved = self._computation(entry.num_tokens) - self._computation(0 if shorter is None else shorter.num_tokens)
        entry.priority = self._age + (1 + entry.num_hits) * saved / max(entry.nbytes, 1)

    def _computation(self, num_tokens: int) -> float:
        """Floating point operations of encoding a sequence: products with the weights, and attention."""
        config = self.model.config
        pairs = 0.0
        attending = [idx for idx in range(config.num_hidden_layers) if "attention" in config.mixers(idx)]
        for window in map(config.window, attending):
            seen = num_tokens if window is None else min(num_tokens, window)
            pairs += seen * (num_tokens - seen / 2)
        return num_tokens * self._operations_per_token + 4 * pairs * config.num_attention_heads * (
            config.head_dim or 0
        )

    def _evict(self) -> None:
        while self._entries and self.nbytes > self.max_bytes:
            entry = min(self._entries, key=lambda each: each.priority)
            encoding, ids = self._entries.pop(entry)
            self._age = max(self._age, entry.priority)
            tree = self._trees[encoding]
            tree.remove(entry, ids)
            if not tree.root.children:
                del self._trees[encoding]
            self._count({"evicted: entries": 1, "evicted: bytes": entry.nbytes})


def _form_of(options: CacheOptions) -> dict[str, object]:
    """The options that decide which numbers the states after some tokens are, as JSON."""
    values = options.to_dict(options.rollback_reach)
    return {name: values[name] for name in ("kv_bits", "state_bits", "policy")}


def _as_ids(ids: Tensor) -> Tensor:
    return ids.detach().to("cpu", torch.int32)


__all__ = ["PrefixCache"]
