"""Sessions: a cache as a file, which continues in another process, bit for bit.

A file has the tokens, the states unless they are stale, the expert vector in force, and fingerprints of the
configuration and the weights that the states belong to. Reading checks all of it before a cache is built.
"""

import json
import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType
from typing import TYPE_CHECKING, Protocol

import torch
from torch import Tensor

from .cache_history_mambaformer import Encoding, NewTokens
from .cache_options_mambaformer import check_types
from .expert_bases_mambaformer import at_least_float32
from .expert_vectors_mambaformer import ExpertVector, ExpertVectorLike, ResolvedExpertVector, collapsed_key
from .files_header_mambaformer import json_of
from .files_mambaformer import has_valid_checksum, read_tensors, with_checksum, write_tensors
from .modeling_stack_mambaformer import ModelStack, places_of_model

if TYPE_CHECKING:
    from .cache_mambaformer import MambaFormerCache
    from .configuration_mambaformer import MambaFormerConfig

SESSION_FORMAT = "mambaformer.session"
SESSION_VERSION = 1
# Fields that change the computation of a model without a change in the shapes or the content of its weights.
COMPUTED_WITH = ("num_hidden_layers", "num_attention_heads", "rope_parameters", "rms_norm_eps", "hidden_act")
COMPUTED_WITH += ("mamba_gated_norm", "time_step_limit", "linear_allow_neg_eigval")
# Fields that older sessions lack: their models had the default.
ADDED_FIELDS = ("window_positions", "mamba_num_heads", "mamba_head_dim", "mamba_num_groups", "conv_L_cache")
ADDED_FIELDS += ("linear_num_key_heads", "linear_num_value_heads", "linear_key_head_dim", "linear_value_head_dim")
ADDED_FIELDS += ("linear_conv_kernel_dim", "mamba_gated_norm", "time_step_limit", "linear_allow_neg_eigval")
# The stamp of a cache that is not up to date with the weights of its model: it equals no real stamp.
OTHER_WEIGHTS = "other weights"
# The most static storage that a file may ask for by itself, in rows times columns: so many times the model's context,
# or so many times the tokens in the file, whichever is more.
MODEL_LENGTHS, SEQUENCE_LENGTHS = 8, 64
TOKENS_SEEN = "tokens.seen"  # real tokens of each row (rows,), where the mask does not count them all
HALF_DTYPES = {torch.float16, torch.bfloat16}  # autocast may turn any states into these


class SessionModel(Protocol):
    """A model that makes caches."""

    config: "MambaFormerConfig"

    def make_cache(self, storage: str = ..., max_cache_len: int | None = ...) -> "MambaFormerCache":
        """Takes the fields of `CacheOptions` as keywords."""
        ...


@dataclass(frozen=True)
class Session:
    """The header of a file: all that is not a tensor. The types of the fields are checked when it is read.

    Args:
        config: the fields of the configuration that the states depend on.
        weights: fingerprint of the model's weights when the file was written.
        options: the options of `make_cache`.
        rows, columns: batch size and length of the sequence; rows are `None` without a sequence.
        overshoot: `CacheLengths.overshoot`.
        forgotten: the first columns, whose tokens are not in the file (`remember`).
        has_embeddings: part of the sequence was fed as embeddings.
        is_mixed: several expert vectors or weights encoded the sequence.
        can_be_encoded_again: the tokens and the expert vector in force determine all states.
        is_of_these_weights: no other weights have encoded the sequence since.
        has_states: the file has the states; `encoded_key` is the key of the expert vector that encoded them.
        expert_vectors: `{"fingerprint", "name", "metadata"}` of each expert vector in the file.
        expert_vector: the one in force, as an index into these: `None` (the base), one for all rows, or a list.
    """

    config: dict
    weights: str
    options: dict
    rows: int | None
    columns: int
    overshoot: int
    has_embeddings: bool
    is_mixed: bool
    can_be_encoded_again: bool
    is_of_these_weights: bool
    has_states: bool
    encoded_key: str | list | tuple | None
    expert_vectors: list
    expert_vector: int | list | None
    forgotten: int = 0

    @property
    def stored_columns(self) -> int:
        """Columns whose tokens are in the file."""
        return self.columns - self.forgotten


# ----------------------------------------------------------------------------------------------------------- writing


def save_session(cache: "MambaFormerCache", path: str | os.PathLike) -> None:
    """Writes `cache` to `path`; see `MambaFormerCache.save`."""
    stamp, fingerprint = _stack_of(cache).weights_fingerprint()
    provenance = cache.provenance
    is_current = provenance.in_force.weights == stamp
    # States of a stale sequence are left out, unless a change of expert vector may still be undone.
    may_be_used = is_current or cache.on_expert_change == "continue"
    encoded = provenance.encoded if cache.is_initialized and may_be_used else None
    expert_vectors, in_force = _list_expert_vectors(cache.expert_vector)
    session = Session(
        config=_fields_of(cache.config, cache.depends_on),
        weights=fingerprint,
        options=cache.options.to_dict(cache.rollback_reach),
        rows=None if cache.batch_size == -1 else cache.batch_size,
        columns=cache.get_seq_length(),
        overshoot=cache.lengths.overshoot,
        has_embeddings=cache.history.has_embeddings,
        is_mixed=provenance.is_mixed,
        can_be_encoded_again=cache.can_be_encoded_again,
        is_of_these_weights=is_current,
        has_states=encoded is not None,
        # A trained expert vector has a key of its own even if it equals the base; the one in a file is not trained.
        encoded_key=None if encoded is None else collapsed_key(encoded.expert_vector_key),
        expert_vectors=[
            {"fingerprint": e.fingerprint, "name": e.name, "metadata": e.metadata} for e in expert_vectors
        ],
        expert_vector=in_force,
        forgotten=cache.history.bounds.forgotten,
    )
    tensors = dict(_history_tensors(cache)) | ({} if encoded is None else dict(_states(cache)))
    tensors |= {f"expert_vectors.{n}.{name}": z for n, e in enumerate(expert_vectors) for name, z in e.vectors.items()}
    tensors = {name: _copy_to_cpu(tensor) for name, tensor in tensors.items()}
    header = {"format": SESSION_FORMAT, "version": str(SESSION_VERSION), "session": json.dumps(asdict(session))}
    write_tensors(Path(path), tensors, with_checksum(header, tensors))


def _stack_of(cache: "MambaFormerCache") -> ModelStack:
    if cache.model is None:
        raise ValueError(
            "This cache belongs to no model, because the model was deleted or the cache was unpickled: make one with "
            "`model.make_cache()`, feed it `token_ids`, and save that one."
        )
    return cache.model


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _fields_of(config: "MambaFormerConfig", names: Iterable[str]) -> dict[str, object]:
    """Fields of the configuration as JSON returns them."""
    return json.loads(json.dumps({name: getattr(config, name) for name in (*names, *COMPUTED_WITH)}))


def _list_expert_vectors(in_force: ResolvedExpertVector) -> tuple[list[ExpertVector], int | list[int | None] | None]:
    """Each expert vector once, and the index of the one in force, or of the one in force for each row."""
    if in_force is None:
        return [], None
    rows = in_force if isinstance(in_force, list) else [in_force]
    distinct: dict[tuple, ExpertVector] = {}
    for row in rows:
        if row is not None:
            distinct.setdefault(_content_of(row), row)
    numbers = {content: n for n, content in enumerate(distinct)}
    indices = [None if row is None else numbers[_content_of(row)] for row in rows]
    listed = [
        ExpertVector({name: z.detach() for name, z in e.vectors.items()}, e.name, e.metadata)
        for e in distinct.values()
    ]
    return listed, indices if isinstance(in_force, list) else indices[0]


def _content_of(expert_vector: ExpertVector) -> tuple:
    """A fingerprint leaves out trailing ones, and they decide how many directions a row is computed with."""
    sizes = tuple(sorted((name, z.numel()) for name, z in expert_vector.vectors.items()))
    return expert_vector.fingerprint, sizes


def _history_tensors(cache: "MambaFormerCache") -> Iterator[tuple[str, Tensor]]:
    if cache.is_initialized:
        history, lengths = cache.history, cache.lengths
        skipped, slots = history.bounds.forgotten - history.bounds.dropped, cache.get_seq_length()
        for name, buffer in history.buffers().items():
            if buffer.tensor is not None:
                yield f"tokens.{name}", buffer.view(slots - history.bounds.dropped)[:, skipped:]
        if history.bounds.forgotten and lengths.tokens_seen is not None:
            yield TOKENS_SEEN, lengths.tokens_seen.expand(lengths.rows or 1)


def _states(cache: "MambaFormerCache") -> Iterator[tuple[str, Tensor]]:
    for prefix, store in cache.stores():
        for name, tensor in store.state(cache.get_seq_length()).items():
            yield f"layers.{prefix}.{name}", tensor


# ----------------------------------------------------------------------------------------------------------- reading


@torch.inference_mode(False)
@torch.no_grad()
def load_session(
    path: str | os.PathLike, model: SessionModel, on_weights_change: str = "error", max_cache_len: int | None = None
) -> "MambaFormerCache":
    """The cache of the file `path`, for `model`; see `MambaFormerCache.load`."""
    if on_weights_change not in ("error", "recompute"):
        raise ValueError(f"`on_weights_change` must be 'error' or 'recompute', got {on_weights_change!r}.")
    if not hasattr(model, "make_cache"):
        raise TypeError(f"A session is loaded for a MambaFormer, got {type(model).__name__}.")
    path = Path(path)
    tensors, header = read_tensors(path, SESSION_FORMAT, SESSION_VERSION, "`cache.save(path)`")
    if not has_valid_checksum(header, tensors):
        raise ValueError(f"{path} is damaged: its content is not the content that was saved (checksum mismatch).")
    try:
        session, tensors = _read_header(header, tensors)
        cache = model.make_cache(**_options_for(session, model.config, max_cache_len))
        stack = _stack_of(cache)
        _check_config(session, cache)
        expert_vectors = _check_expert_vectors(session, tensors, stack)
        stamp, fingerprint = stack.weights_fingerprint()
        if session.weights != fingerprint:
            session, tensors = _drop_states(session, tensors, on_weights_change)
        _check_tensors(session, tensors, cache)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no session that this model can continue: {error}") from error
    _put_in_force(cache, session, expert_vectors, stamp)
    if session.columns:
        _restore_sequence(cache, session, tensors)
    return cache


def _drop_states(
    session: Session, tensors: dict[str, Tensor], on_weights_change: str
) -> tuple[Session, dict[str, Tensor]]:
    """The session with its tokens alone, which are to be encoded again."""
    if on_weights_change == "error":
        raise ValueError(
            "it was saved with other weights. Load the model that it was saved with (and merge the expert vector that "
            "was merged then), or pass on_weights_change='recompute' to encode its sequence again."
        )
    if session.columns and not session.can_be_encoded_again:
        raise ValueError(
            "it was saved with other weights, and its sequence cannot be encoded again, because part of it was fed as "
            "embeddings or encoded with another expert vector than the one in force. Load the model that it was saved "
            "with."
        )
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.")}
    return replace(session, has_states=False, is_of_these_weights=True), kept


def _put_in_force(
    cache: "MambaFormerCache", session: Session, expert_vectors: list[ExpertVector], stamp: object
) -> None:
    indices = session.expert_vector if isinstance(session.expert_vector, list) else [session.expert_vector]
    rows: list[ExpertVectorLike] = [None if n is None else expert_vectors[n] for n in indices]
    expert_vector, key = cache.resolve_with_key(rows if isinstance(session.expert_vector, list) else rows[0])
    in_force = Encoding(key, stamp if session.is_of_these_weights else OTHER_WEIGHTS)
    encoded = None
    if session.has_states:
        encoded_key = tuple(session.encoded_key) if isinstance(session.encoded_key, list) else session.encoded_key
        encoded = replace(in_force, expert_vector_key=encoded_key)
    cache.provenance.restore(expert_vector, in_force, encoded, session.columns > 0 and session.is_mixed)


def _restore_sequence(cache: "MambaFormerCache", session: Session, tensors: dict[str, Tensor]) -> None:
    stack = _stack_of(cache)
    device = next(stack.get_input_embeddings().parameters()).device
    history = {name.removeprefix("tokens."): t.to(device) for name, t in tensors.items() if name.startswith("tokens.")}
    tokens_seen = history.pop("seen", None)
    cache.history.append(cache.lengths, NewTokens(**history))
    cache.history.has_embeddings = session.has_embeddings
    cache.history.bounds.forgotten = cache.history.bounds.dropped = session.forgotten
    is_fixed, lengths = cache.max_columns is not None, cache.lengths
    lengths.columns = torch.tensor(session.columns, device=device) if is_fixed else session.columns
    lengths.tokens_seen = history["mask"].sum(1) if "mask" in history and tokens_seen is None else tokens_seen
    lengths.rows, lengths.overshoot = session.rows, session.overshoot
    if not session.has_states:
        return
    for layer_idx, (layer, module) in enumerate(zip(cache.layers, stack.layers, strict=False)):
        device = next((weight.device for weight in module.parameters()), device)
        for kind, store in layer.stores.items():
            prefix = f"layers.{layer_idx}.{kind}."
            state = {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}
            if state:
                store.load_state(state, session.columns)


# ---------------------------------------------------------------------------------------------------------- checking


def _read_header(header: dict[str, str], tensors: dict[str, Tensor]) -> tuple[Session, dict[str, Tensor]]:
    """The session of a header, and the tensors under the names of this version."""
    values = json_of(header["session"])
    if isinstance(values, dict) and "experts" in values:
        values, tensors = _convert_old_names(values, tensors)
    if isinstance(values, dict):
        values.setdefault("forgotten", 0)  # before there was a bounded log of tokens
    if not isinstance(values, dict) or values.keys() != {field.name for field in fields(Session)}:
        raise ValueError("its header has other fields than a session.")
    for field in fields(Session):
        kinds = getattr(field.type, "__args__", (field.type,))
        if type(values[field.name]) not in kinds:
            raise ValueError(f"`{field.name}` of its header is {values[field.name]!r}.")
    session = Session(**values)
    _check_session(session)
    return session, tensors


def _convert_old_names(values: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Version 0.1.0 wrote other names of expert vectors and, before there were other mixers, of Mamba's states."""
    names = {"experts": "expert_vectors", "expert": "expert_vector"}
    values = {names.get(name, name): value for name, value in values.items()}
    if isinstance(values.get("config"), dict):
        values["config"] = {"recurrent_mixer": "mamba", **values["config"]}
    patterns = (r"^(layers\.\d+)\.mamba\.", r"\1.recurrent."), (r"^experts\.", "expert_vectors.")
    for pattern, name in patterns:
        tensors = {re.sub(pattern, name, old): tensor for old, tensor in tensors.items()}
    return values, tensors


def _check_session(session: Session) -> None:
    if session.columns < 0 or (session.rows is None) != (session.columns == 0) or (session.rows or 1) < 1:
        raise ValueError(f"it has a sequence of {session.rows} rows and {session.columns} columns.")
    if not 0 <= session.forgotten <= max(session.columns - 1, 0) or session.columns >= 2**53:
        raise ValueError(f"it has forgotten {session.forgotten} of {session.columns} columns.")
    options = check_types(session.options)
    remember = options["remember"]
    if session.forgotten if remember is None else session.stored_columns > remember + options["rollback_reach"]:
        raise ValueError(f"it has forgotten {session.forgotten} columns and remembers {options['remember']}.")
    if not 0 <= session.overshoot < 2**31:
        raise ValueError(f"its `overshoot` is {session.overshoot} tokens.")
    if session.has_states and not session.columns:
        raise ValueError("it has states but no sequence.")
    _check_key(session)


def _options_for(session: Session, config: "MambaFormerConfig", max_cache_len: int | None) -> dict:
    """The options of `make_cache`, if the caller, the model or the rest of the file justify the storage.

    Static storage is allocated completely when the session is loaded, and a number in a header costs its writer
    nothing.
    """
    options, longest = check_types(session.options), max(config.max_position_embeddings, session.stored_columns)
    if options["rollback_reach"] > longest:
        raise ValueError(
            f"its `rollback_reach` of {options['rollback_reach']} is longer than any sequence ({longest})."
        )
    if options["max_cache_len"] is None:
        if max_cache_len is not None:
            raise ValueError("its storage grows with the sequence, so it has no `max_cache_len`: leave that out.")
        return options
    if max_cache_len is not None:
        return options | {"max_cache_len": max_cache_len}
    rows = session.rows or 1
    justified = max(MODEL_LENGTHS * config.max_position_embeddings, SEQUENCE_LENGTHS * rows * session.columns)
    if rows * options["max_cache_len"] > justified:
        raise ValueError(
            f"its storage would hold {options['max_cache_len']} columns of {rows} rows, but the file has only "
            f"{session.columns} columns and the model's `max_position_embeddings` is {config.max_position_embeddings}:"
            f" pass `max_cache_len=` with the number of columns that you need."
        )
    return options


def _check_key(session: Session) -> None:
    key = session.encoded_key
    if isinstance(key, list) and (len(key) != session.rows or not all(isinstance(row, str) for row in key)):
        raise ValueError(f"its states were encoded with {len(key)} expert vectors for {session.rows} rows.")


def _check_config(session: Session, cache: "MambaFormerCache") -> None:
    defaults = {name: getattr(type(cache.config), name) for name in ADDED_FIELDS}
    own, saved = _fields_of(cache.config, cache.depends_on), defaults | session.config
    differing = [name for name in {**own, **saved} if own.get(name, ...) != saved.get(name, ...)]
    if differing:
        listed = ", ".join(f"`{name}` is {own.get(name)!r}, not {saved.get(name)!r}" for name in differing)
        raise ValueError(f"it was saved by a model with another configuration ({listed}): load that model.")


def _check_expert_vectors(session: Session, tensors: dict[str, Tensor], stack: ModelStack) -> list[ExpertVector]:
    """The expert vectors of the file, after a check of their fingerprints and of their fit to the model."""
    vectors = _vectors_of(session, tensors)
    expert_vectors = []
    for n, described in enumerate(session.expert_vectors):
        expert_vector = ExpertVector(vectors[n], described["name"], described["metadata"])
        if expert_vector.fingerprint != described["fingerprint"]:
            raise ValueError(f"the tensors of its expert vector {n} do not match their fingerprint.")
        stack.check_expert_vector(expert_vector)
        expert_vectors.append(expert_vector)
    is_per_row = isinstance(session.expert_vector, list)
    rows = session.expert_vector if isinstance(session.expert_vector, list) else [session.expert_vector]
    if not all(row is None or (type(row) is int and 0 <= row < len(expert_vectors)) for row in rows):
        raise ValueError(f"it has {len(expert_vectors)} expert vectors, and in force are {rows}.")
    if is_per_row and (not rows or session.rows not in (None, len(rows))):
        raise ValueError(f"it has expert vectors for {len(rows)} rows and a sequence of {session.rows} rows.")
    return expert_vectors


def _vectors_of(session: Session, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The tensors of each expert vector, in one pass over all tensors."""
    kinds = {"fingerprint": (str,), "name": (str, NoneType), "metadata": (dict,)}
    for described in session.expert_vectors:
        is_complete = isinstance(described, dict) and described.keys() == kinds.keys()
        if not is_complete or any(type(described[name]) not in kinds[name] for name in kinds):
            raise ValueError(f"its expert vectors are not described by {list(kinds)}.")
    vectors: list[dict[str, Tensor]] = [{} for _ in session.expert_vectors]
    for name, tensor in tensors.items():
        if _belongs_to_expert_vector(name, session):
            _, n, module = name.split(".", 2)
            vectors[int(n)][module] = tensor
    return vectors


def _check_tensors(session: Session, tensors: dict[str, Tensor], cache: "MambaFormerCache") -> None:
    if cache.max_columns is not None and session.columns > cache.max_columns:
        raise ValueError(f"it has {session.columns} columns where {cache.max_columns} fit.")
    expected = _expected_history(session) if session.columns else {}
    optional = expected.keys() - {"tokens.token_ids"}
    if session.has_states:
        expected |= dict(_expected_states(session, cache))
    present = {name: tensor for name, tensor in tensors.items() if not _belongs_to_expert_vector(name, session)}
    wrong = (present.keys() - expected.keys()) | (expected.keys() - present.keys() - optional)
    if wrong:
        raise ValueError(f"it has tensors that it should not have, or lacks some: {sorted(wrong)[:5]}.")
    for name, tensor in present.items():
        shape, dtypes = expected[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise ValueError(
                f"`{name}` is {tensor.dtype} of shape {tuple(tensor.shape)}, not {shape} in one of {dtypes}."
            )
    if session.columns:
        _check_history(session, tensors, cache.config.vocab_size)


def _belongs_to_expert_vector(name: str, session: Session) -> bool:
    kind, _, rest = name.partition(".")
    n, _, module = rest.partition(".")
    is_number = n.isascii() and n.isdecimal() and len(n) < 10 and n == str(int(n))
    return kind == "expert_vectors" and bool(module) and is_number and int(n) < len(session.expert_vectors)


def _expected_history(session: Session) -> dict[str, tuple[tuple, set]]:
    shape = (session.rows, session.stored_columns)
    dtypes = {"token_ids": {torch.int64}, "mask": {torch.bool}, "position_ids": {torch.int32, torch.int64}}
    if session.has_embeddings:
        dtypes["embedding_marks"] = {torch.int64}
    expected = {f"tokens.{name}": (shape, kinds) for name, kinds in dtypes.items()}
    return expected | ({TOKENS_SEEN: ((session.rows,), {torch.int64})} if session.forgotten else {})


def _expected_states(session: Session, cache: "MambaFormerCache") -> Iterator[tuple[str, tuple[tuple, set]]]:
    stack, rows = _stack_of(cache), session.rows or 0
    narrow = {weight.dtype for weight in stack.parameters() if weight.is_floating_point()} | HALF_DTYPES
    wide = narrow | {at_least_float32(dtype) for dtype in narrow}
    for place, layer in zip(places_of_model(stack), cache.layers, strict=True):
        for kind, store in layer.stores.items():
            for name, spec in store.spec(rows, session.columns, place.module).items():
                dtypes = {spec.dtype} if spec.dtype is not None else wide if spec.is_wide else narrow
                yield f"layers.{place.position}.{kind}.{name}", (spec.shape, dtypes)


def _check_history(session: Session, tensors: dict[str, Tensor], vocab_size: int) -> None:
    token_ids, mask = tensors["tokens.token_ids"], tensors.get("tokens.mask")
    lowest = -1 if session.has_embeddings else 0
    if bool(((token_ids < lowest) | (token_ids >= vocab_size)).any()):
        raise ValueError(f"it has token ids that are not in the vocabulary of {vocab_size}.")
    if mask is not None and bool((mask.view(torch.uint8) > 1).any()):
        raise ValueError("its mask has values that are neither true nor false.")
    if session.forgotten:
        _check_tokens_seen(session, mask, tensors.get(TOKENS_SEEN))


def _check_tokens_seen(session: Session, mask: Tensor | None, tokens_seen: Tensor | None) -> None:
    if (mask is None) != (tokens_seen is None):
        raise ValueError("its mask and its numbers of real tokens belong together, and one is missing.")
    if mask is None or tokens_seen is None:
        return
    forgotten = tokens_seen - mask.sum(1)
    if bool(((forgotten < 0) | (forgotten > session.forgotten)).any()):
        raise ValueError(f"its rows have {tokens_seen.tolist()} real tokens, which its mask contradicts.")


__all__ = ["load_session", "save_session"]
