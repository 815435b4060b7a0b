"""Sessions: a cache as a file, which goes on in another process, bit for bit.

A file holds what a request has: the tokens, the states as far as they may still be used, the expert in force with its
vectors, and fingerprints of the configuration and the weights that they are true for. Reading checks all of it before
a cache is built.
"""

import json
import re
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from types import NoneType

import torch
from torch import Tensor

from .cache_history_mambaformer import Encoding, NewTokens
from .expert_bases_mambaformer import at_least_float32
from .expert_vectors_mambaformer import ExpertVector, collapsed_key
from .files_header_mambaformer import json_of
from .files_mambaformer import is_sealed, read_tensors, sealed, write_tensors
from .modeling_stack_mambaformer import places_of_model

SESSION_FORMAT = "mambaformer.session"
SESSION_VERSION = 1
# Fields that change what a model computes and leave no trace in the shape or content of its weights.
COMPUTED_WITH = ("num_hidden_layers", "num_attention_heads", "rope_parameters", "rms_norm_eps", "hidden_act")
# What a cache that is not up to date with the model's weights has for their stamp: it equals no stamp.
OTHER_WEIGHTS = "other weights"
# Room of static storage that a file gets without being asked: slots (rows x columns) in lengths of the model's context
# and in times the tokens that the file holds, whichever is more.
MODEL_LENGTHS, SEQUENCE_LENGTHS = 8, 64
HALF_DTYPES = {torch.float16, torch.bfloat16}  # what autocast may turn any states into


@dataclass(frozen=True)
class Session:
    """What a file says beside its tensors.

    Args:
        config: the fields that the states depend on.
        weights: fingerprint of the model's weights when the file was written.
        options: those of `make_cache`.
        rows, columns: batch size and length of the sequence; rows are `None` without one.
        overshoot: by how many tokens windows have been further than they are now.
        has_embeddings: part of the sequence was given as embeddings.
        is_mixed: several experts or weights encoded it.
        can_be_encoded_again: the tokens and the expert in force tell all.
        is_of_these_weights: the cache has met no others since.
        has_states: they are in the file; `encoded_key` then names the expert that encoded them.
        experts: `{"fingerprint", "name", "metadata"}` of each that is in the file.
        expert: the one in force, as an index into these: `None` (the base), one for all rows, or a list.
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
    encoded_key: str | list | None
    experts: list
    expert: int | list | None


# ----------------------------------------------------------------------------------------------------------- writing


def save_session(cache, path) -> None:
    """Writes `cache` to `path`; see `MambaFormerCache.save`."""
    if cache.model is None:
        raise ValueError(
            "This cache belongs to no model (any more), as a pickled one does: make one with `model.make_cache()` and "
            "feed it `token_ids`, then it can be saved."
        )
    stamp, fingerprint = cache.model.weights_fingerprint()
    provenance = cache.provenance
    is_current = provenance.in_force.weights == stamp
    # States of a stale sequence are left out, unless a change of expert vector may still be undone.
    may_be_used = is_current or cache.on_expert_change == "continue"
    has_states = cache.is_initialized and provenance.encoded is not None and may_be_used
    experts, expert = _experts_of(cache.expert_vector)
    session = Session(
        config=_fields_of(cache.config, cache.depends_on),
        weights=fingerprint,
        options=_options_of(cache),
        rows=None if cache.batch_size == -1 else cache.batch_size,
        columns=cache.get_seq_length(),
        overshoot=cache.lengths.overshoot,
        has_embeddings=cache.history.has_embeddings,
        is_mixed=provenance.is_mixed,
        can_be_encoded_again=cache.can_be_encoded_again,
        is_of_these_weights=is_current,
        has_states=has_states,
        # An expert that is trained has a key of its own even as the base; once it is read it is like any other.
        encoded_key=collapsed_key(provenance.encoded.expert_key) if has_states else None,
        experts=[{"fingerprint": e.fingerprint, "name": e.name, "metadata": e.metadata} for e in experts],
        expert=expert,
    )
    tensors = dict(_log_tensors(cache)) | (dict(_states(cache)) if has_states else {})
    tensors |= {f"experts.{n}.{name}": z for n, e in enumerate(experts) for name, z in e.vectors.items()}
    tensors = {name: _copied(tensor) for name, tensor in tensors.items()}
    header = {"format": SESSION_FORMAT, "version": str(SESSION_VERSION), "session": json.dumps(asdict(session))}
    write_tensors(Path(path), tensors, sealed(header, tensors))


def _copied(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _fields_of(config, names) -> dict:
    """As JSON will give them back."""
    return json.loads(json.dumps({name: getattr(config, name) for name in (*names, *COMPUTED_WITH)}))


def _options_of(cache) -> dict:
    names = {"storage": "storage", "max_cache_len": "max_columns"}
    names |= {name: name for name in ("on_expert_change", "rollback_reach")}
    return {option: getattr(cache, name) for option, name in names.items()}


def _experts_of(in_force) -> tuple[list[ExpertVector], int | list | None]:
    """Each expert once, and which of them every row has."""
    if in_force is None:
        return [], None
    rows, found = in_force if isinstance(in_force, list) else [in_force], {}
    for row in rows:
        if row is not None:
            found.setdefault(_content_of(row), row)
    numbers = {content: n for n, content in enumerate(found)}
    which = [None if row is None else numbers[_content_of(row)] for row in rows]
    experts = [ExpertVector({k: z.detach() for k, z in e.vectors.items()}, e.name, e.metadata) for e in found.values()]
    return experts, which if isinstance(in_force, list) else which[0]


def _content_of(expert) -> tuple:
    """Trailing ones do not count in a fingerprint, and yet decide how many directions a row is computed with."""
    return expert.fingerprint, tuple(sorted((name, z.numel()) for name, z in expert.vectors.items()))


def _log_tensors(cache) -> Iterator[tuple[str, Tensor]]:
    for name, buffer in cache.history.buffers().items():
        if buffer.tensor is not None and cache.is_initialized:
            yield f"tokens.{name}", buffer.view(cache.get_seq_length())


def _states(cache) -> Iterator[tuple[str, Tensor]]:
    for prefix, store in cache.stores():
        for name, tensor in store.state(cache.get_seq_length()).items():
            yield f"layers.{prefix}.{name}", tensor


# ----------------------------------------------------------------------------------------------------------- reading


def _with_names_of_today(session: Session, tensors: dict[str, Tensor]) -> tuple[Session, dict[str, Tensor]]:
    """A session that was saved when Mamba was the only recurrent mixer, under the names of today."""
    if "recurrent_mixer" in session.config:
        return session, tensors
    tensors = {re.sub(r"^(layers\.\d+)\.mamba\.", r"\1.recurrent.", name): each for name, each in tensors.items()}
    return replace(session, config={**session.config, "recurrent_mixer": "mamba"}), tensors


@torch.inference_mode(False)
@torch.no_grad()
def load_session(path, model, on_weights_change: str = "error", max_cache_len: int | None = None):
    """The cache that `path` holds, for `model`; see `MambaFormerCache.load`."""
    if on_weights_change not in ("error", "recompute"):
        raise ValueError(f"`on_weights_change` must be 'error' or 'recompute', got {on_weights_change!r}.")
    if not hasattr(model, "make_cache"):
        raise TypeError(f"A session is loaded for a MambaFormer, got {type(model).__name__}.")
    path = Path(path)
    tensors, header = read_tensors(path, SESSION_FORMAT, SESSION_VERSION, "`cache.save(path)`")
    if not is_sealed(header, tensors):
        raise ValueError(f"{path} holds something else than was saved (checksum mismatch): it is damaged.")
    try:
        session, tensors = _with_names_of_today(_session_of(header), tensors)
        cache = model.make_cache(**_options_for(session, model.config, max_cache_len))
        _check_config(session, cache)
        experts = _check_experts(session, tensors, cache.model)
        stamp, fingerprint = cache.model.weights_fingerprint()
        if session.weights != fingerprint:
            session, tensors = _without_states(session, tensors, on_weights_change)
        _check_tensors(session, tensors, cache)
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is no session that this model can go on from: {error}") from error
    _put_expert_in_force(cache, session, experts, stamp)
    if session.columns:
        _restore_sequence(cache, session, tensors)
    return cache


def _without_states(session: Session, tensors: dict[str, Tensor], on_weights_change: str) -> tuple[Session, dict]:
    """The session with its tokens alone, to be encoded again, if that is wanted and possible."""
    if on_weights_change == "error":
        raise ValueError(
            "it was saved with other weights. Load the model that it was saved with (with what was merged into it), or"
            " pass on_weights_change='recompute' to encode its text again."
        )
    if session.columns and not session.can_be_encoded_again:
        raise ValueError(
            "it was saved with other weights, and its text cannot be encoded again, as part of it was given as "
            "embeddings or encoded by another expert than the one in force. Load the model that it was saved with."
        )
    kept = {name: tensor for name, tensor in tensors.items() if not name.startswith("layers.")}
    return replace(session, has_states=False, is_of_these_weights=True), kept


def _put_expert_in_force(cache, session: Session, experts: list[ExpertVector], stamp) -> None:
    numbers = session.expert if isinstance(session.expert, list) else [session.expert]
    rows = [None if n is None else experts[n] for n in numbers]
    expert, key = cache.resolve(rows if isinstance(session.expert, list) else rows[0])
    in_force = Encoding(key, stamp if session.is_of_these_weights else OTHER_WEIGHTS)
    encoded = None
    if session.has_states:
        encoded_key = tuple(session.encoded_key) if isinstance(session.encoded_key, list) else session.encoded_key
        encoded = replace(in_force, expert_key=encoded_key)
    cache.provenance.restore(expert, in_force, encoded, session.columns > 0 and session.is_mixed)


def _restore_sequence(cache, session: Session, tensors: dict[str, Tensor]) -> None:
    device = cache.model.get_input_embeddings().weight.device
    log = {name.removeprefix("tokens."): t.to(device) for name, t in tensors.items() if name.startswith("tokens.")}
    cache.history.append(cache.lengths, NewTokens(**log))
    cache.history.has_embeddings = session.has_embeddings
    is_fixed, lengths = cache.max_columns is not None, cache.lengths
    lengths.columns = torch.tensor(session.columns, device=device) if is_fixed else session.columns
    lengths.tokens_seen = log["mask"].sum(1) if "mask" in log else None
    lengths.rows, lengths.overshoot = session.rows, session.overshoot
    if not session.has_states:
        return
    for layer_idx, (layer, module) in enumerate(zip(cache.layers, cache.model.layers, strict=False)):
        device = next((weight.device for weight in module.parameters()), device)
        for kind, store in layer.stores.items():
            prefix = f"layers.{layer_idx}.{kind}."
            state = {n.removeprefix(prefix): t.to(device) for n, t in tensors.items() if n.startswith(prefix)}
            if state:
                store.load_state(state, session.columns)


# ---------------------------------------------------------------------------------------------------------- checking


def _session_of(header: dict[str, str]) -> Session:
    said = json_of(header["session"])
    if not isinstance(said, dict) or said.keys() != {field.name for field in fields(Session)}:
        raise ValueError("its header has other fields than a session.")
    for field in fields(Session):
        kinds = getattr(field.type, "__args__", (field.type,))
        if type(said[field.name]) not in kinds:
            raise ValueError(f"`{field.name}` of its header is {said[field.name]!r}.")
    session = Session(**said)
    if session.columns < 0 or (session.rows is None) != (session.columns == 0) or (session.rows or 1) < 1:
        raise ValueError(f"it has a text of {session.rows} rows and {session.columns} columns.")
    if not 0 <= session.overshoot < 2**31:
        raise ValueError(f"its windows have been {session.overshoot} tokens further.")
    if session.has_states and not session.columns:
        raise ValueError("it has states but no text.")
    _check_options(session.options)
    _check_key(session)
    return session


def _check_options(options: dict) -> None:
    """Only names and types; `make_cache` checks the rest."""
    kinds = {
        "storage": (str,),
        "max_cache_len": (int, NoneType),
        "on_expert_change": (str,),
        "rollback_reach": (int,),
    }
    if options.keys() != kinds.keys() or any(type(options[name]) not in kinds[name] for name in kinds):
        raise ValueError(f"its options are {options}, not {list(kinds)}.")


def _options_for(session: Session, config, max_cache_len: int | None) -> dict:
    """The options of `make_cache`, if the caller, the model or the rest of the file justify the room that they take.

    Static storage is allocated in full when the session is loaded, and a number in a header costs its writer nothing.
    """
    options, seen = session.options, max(config.max_position_embeddings, session.columns)
    if options["rollback_reach"] > seen:
        raise ValueError(f"its `rollback_reach` of {options['rollback_reach']} is longer than any text ({seen}).")
    if options["max_cache_len"] is None:
        if max_cache_len is not None:
            raise ValueError("its storage grows with the text, so it has no `max_cache_len`: leave that out.")
        return options
    if max_cache_len is not None:
        return options | {"max_cache_len": max_cache_len}
    rows = session.rows or 1
    justified = max(MODEL_LENGTHS * config.max_position_embeddings, SEQUENCE_LENGTHS * rows * session.columns)
    if rows * options["max_cache_len"] > justified:
        raise ValueError(
            f"its storage would have room for {options['max_cache_len']} columns of {rows} rows, where the file has "
            f"{session.columns} columns and the model's `max_position_embeddings` is {config.max_position_embeddings}:"
            f" pass `max_cache_len=` with the number of columns that you want."
        )
    return options


def _check_key(session: Session) -> None:
    key = session.encoded_key
    if isinstance(key, list) and (len(key) != session.rows or not all(isinstance(row, str) for row in key)):
        raise ValueError(f"its states were encoded by {len(key)} experts for {session.rows} rows.")


def _check_config(session: Session, cache) -> None:
    known = _fields_of(cache.config, cache.depends_on)
    found = session.config
    differing = [name for name in {**known, **found} if known.get(name, ...) != found.get(name, ...)]
    if differing:
        said = ", ".join(f"`{name}` is {known.get(name)!r}, not {found.get(name)!r}" for name in differing)
        raise ValueError(f"it was saved by a model of another configuration ({said}): load that one.")


def _check_experts(session: Session, tensors: dict[str, Tensor], stack) -> list[ExpertVector]:
    """The experts of the file, each what its fingerprint says and made for a model like this."""
    vectors = _vectors_of(session, tensors)
    experts = []
    for n, said in enumerate(session.experts):
        expert = ExpertVector(vectors[n], said["name"], said["metadata"])
        if expert.fingerprint != said["fingerprint"]:
            raise ValueError(f"the vectors of its expert {n} are not what their fingerprint says.")
        stack.check_expert_vector(expert)
        experts.append(expert)
    rows = session.expert if isinstance(session.expert, list) else [session.expert]
    if not all(row is None or (type(row) is int and 0 <= row < len(experts)) for row in rows):
        raise ValueError(f"it has {len(experts)} experts, and in force are {rows}.")
    if isinstance(session.expert, list) and (not rows or session.rows not in (None, len(rows))):
        raise ValueError(f"it has experts for {len(rows)} rows and a text of {session.rows}.")
    return experts


def _vectors_of(session: Session, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
    """The vectors of each expert, in one pass over the tensors."""
    kinds = {"fingerprint": (str,), "name": (str, NoneType), "metadata": (dict,)}
    for said in session.experts:
        is_known = isinstance(said, dict) and said.keys() == kinds.keys()
        if not is_known or any(type(said[name]) not in kinds[name] for name in kinds):
            raise ValueError(f"its experts are not described by {list(kinds)}.")
    vectors: list[dict[str, Tensor]] = [{} for _ in session.experts]
    for name, tensor in tensors.items():
        if _is_of_experts(name, session):
            _, n, module = name.split(".", 2)
            vectors[int(n)][module] = tensor
    return vectors


def _check_tensors(session: Session, tensors: dict[str, Tensor], cache) -> None:
    if cache.max_columns is not None and session.columns > cache.max_columns:
        raise ValueError(f"it has {session.columns} columns where {cache.max_columns} fit.")
    known = _expected_log(session) if session.columns else {}
    optional = known.keys() - {"tokens.token_ids"}
    if session.has_states:
        known |= dict(_expected_states(session, cache))
    found = {name: tensor for name, tensor in tensors.items() if not _is_of_experts(name, session)}
    wrong = (found.keys() - known.keys()) | (known.keys() - found.keys() - optional)
    if wrong:
        raise ValueError(f"it has tensors that it should not have, or lacks some: {sorted(wrong)[:5]}.")
    for name, tensor in found.items():
        shape, dtypes = known[name]
        if tuple(tensor.shape) != shape or tensor.dtype not in dtypes:
            raise ValueError(
                f"`{name}` is {tensor.dtype} of shape {tuple(tensor.shape)}, not {shape} in one of {dtypes}."
            )
    if session.columns:
        _check_log(session, tensors, cache.config.vocab_size)


def _is_of_experts(name: str, session: Session) -> bool:
    kind, _, rest = name.partition(".")
    n, _, module = rest.partition(".")
    is_number = n.isascii() and n.isdecimal() and len(n) < 10 and n == str(int(n))
    return kind == "experts" and bool(module) and is_number and int(n) < len(session.experts)


def _expected_log(session: Session) -> dict[str, tuple[tuple, set]]:
    shape = (session.rows, session.columns)
    dtypes = {"token_ids": {torch.int64}, "mask": {torch.bool}, "position_ids": {torch.int32, torch.int64}}
    if session.has_embeddings:
        dtypes["embedding_marks"] = {torch.int64}
    return {f"tokens.{name}": (shape, kinds) for name, kinds in dtypes.items()}


def _expected_states(session: Session, cache) -> Iterator[tuple[str, tuple[tuple, set]]]:
    narrow = {weight.dtype for weight in cache.model.parameters() if weight.is_floating_point()} | HALF_DTYPES
    wide = narrow | {at_least_float32(dtype) for dtype in narrow}
    for place, layer in zip(places_of_model(cache.model), cache.layers, strict=True):
        for kind, store in layer.stores.items():
            for name, spec in store.spec(session.rows, session.columns, place.module).items():
                dtypes = wide if spec.is_wide else narrow
                yield f"layers.{place.position}.{kind}.{name}", (spec.shape, dtypes)


def _check_log(session: Session, tensors: dict[str, Tensor], vocab_size: int) -> None:
    token_ids, mask = tensors["tokens.token_ids"], tensors.get("tokens.mask")
    lowest = -1 if session.has_embeddings else 0
    if bool(((token_ids < lowest) | (token_ids >= vocab_size)).any()):
        raise ValueError(f"it has token ids that are not in the vocabulary of {vocab_size}.")
    if mask is not None and bool((mask.view(torch.uint8) > 1).any()):
        raise ValueError("its mask has values that are neither true nor false.")


__all__ = ["load_session", "save_session"]
