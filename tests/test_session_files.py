"""Damaged, foreign and forged files: a session is refused, or it is the one that was saved."""

import json
import pickle
import random

import pytest
import torch
from safetensors.torch import save_file

from damage import mutated
from mambaformer import ExpertVector, MambaFormerCache
from mambaformer.files_mambaformer import with_checksum, write_tensors
from oracle import assert_same_logits
from patterns import VOCAB, tiny_config
from saved_caches import content_of, contents_of, equal, go_on, made, some_ids
from tiny_models import random_expert, random_model, shared_model


@pytest.fixture
def no_pickle(monkeypatch):
    """Whoever unpickles, fails the test."""

    def explode(*_, **__):
        raise AssertionError("something was unpickled")

    for module, name in ((pickle, "load"), (pickle, "loads"), (pickle, "Unpickler"), (torch, "load")):
        monkeypatch.setattr(module, name, explode)


class Bomb:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_missing_files_and_folders_say_so(saved_session, tmp_path):
    with pytest.raises(FileNotFoundError):
        saved_session[0].load_cache(tmp_path / "nothing")
    with pytest.raises(ValueError, match="is a folder"):
        saved_session[0].load_cache(tmp_path)
    with pytest.raises(TypeError, match="got Linear"):
        MambaFormerCache.load(saved_session[2], torch.nn.Linear(1, 1))
    with pytest.raises(FileNotFoundError):
        saved_session[1].save(tmp_path / "no" / "folder")


def test_pickles_are_named_and_never_run(saved_session, tmp_path, request):
    torch.save({"q": Bomb(tmp_path / "exploded")}, tmp_path / "zip")
    torch.save({"q": Bomb(tmp_path / "exploded")}, tmp_path / "legacy", _use_new_zipfile_serialization=False)
    for protocol in range(2, 6):
        (tmp_path / f"pickle{protocol}").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), protocol))
    (tmp_path / "text").write_bytes(pickle.dumps(Bomb(tmp_path / "exploded"), 0))
    request.getfixturevalue("no_pickle")
    for kind in ("zip", "legacy", "pickle2", "pickle3", "pickle4", "pickle5"):
        with pytest.raises(ValueError, match="which can run code"):
            saved_session[0].load_cache(tmp_path / kind)
    with pytest.raises(ValueError, match="not a complete safetensors file"):
        saved_session[0].load_cache(tmp_path / "text")
    assert not (tmp_path / "exploded").exists()


def test_safetensors_files_of_another_kind_say_so(saved_session, tmp_path):
    model, _, path = saved_session
    random_expert(model, 1).save(tmp_path / "expert")
    save_file({"a": torch.ones(2)}, tmp_path / "plain")
    for name, found in (("expert", "mambaformer.expert_vector"), ("plain", "None")):
        with pytest.raises(ValueError, match=f"not of format 'mambaformer.session' .its header says '?{found}"):
            model.load_cache(tmp_path / name)
    with pytest.raises(ValueError, match=r"not of format 'mambaformer.expert_vector'.*pass a file that `ExpertVector"):
        ExpertVector.load(path)
    with pytest.raises(ValueError, match=r"pass a file that `cache.save\(path\)` wrote"):
        model.load_cache(tmp_path / "expert")
    for version, message in (("2", "upgrade"), ("0", "unknown version"), ("x", "unknown version")):
        tensors, header = contents_of(path)
        write_tensors(tmp_path / "v", tensors, with_checksum(header | {"version": version}, tensors))
        with pytest.raises(ValueError, match=message):
            model.load_cache(tmp_path / "v")


def test_a_thousand_damaged_sessions_are_refused_or_equal(saved_session, tmp_path, no_pickle):
    model, _, path = saved_session
    whole, content, chance, refused = path.read_bytes(), content_of(path), random.Random(1), 0
    for n in range(1000):
        (tmp_path / "m").write_bytes(mutated(whole, chance))
        try:
            loaded = model.load_cache(tmp_path / "m")
        except ValueError:
            refused += 1
            continue
        loaded.save(tmp_path / "again")
        assert content_of(tmp_path / "again") == content, n
    assert refused > 900


def test_a_thousand_damaged_experts_are_refused_or_equal(tmp_path, no_pickle):
    expert = random_expert(shared_model("paper"), 1, rank=3, name="x")
    expert.metadata["spectrum"] = {"lm_head": [3.0, 2.0]}
    expert.save(tmp_path / "e")
    whole, chance, refused = (tmp_path / "e").read_bytes(), random.Random(2), 0
    for n in range(1000):
        (tmp_path / "m").write_bytes(mutated(whole, chance))
        try:
            loaded = ExpertVector.load(tmp_path / "m")
        except ValueError:
            refused += 1
            continue
        assert loaded == expert, n
        assert all(torch.equal(loaded[key], expert[key]) for key in expert), n
    assert refused > 900


def with_tensor(name, change):
    def forge(tensors, session):
        tensors[name] = change(tensors[name])

    return forge


def with_field(name, value):
    def forge(tensors, session):
        session[name] = value

    return forge


def with_option(name, value):
    def forge(tensors, session):
        session["options"][name] = value

    return forge


def with_options(**options):
    def forge(tensors, session):
        session["options"] |= options

    return forge


def without_metadata(tensors, session):
    del session["expert_vectors"][0]["metadata"]


def with_spectrum(spectrum):
    def forge(tensors, session):
        session["expert_vectors"][0]["metadata"]["spectrum"] = spectrum

    return forge


def nested(depth):
    value = []
    for _ in range(depth):
        value = [value]
    return value


def without_tensor(name):
    def forge(tensors, session):
        del tensors[name]

    return forge


def set_at(index, value):
    def change(tensor):
        tensor = tensor.clone()
        tensor[index] = value
        return tensor

    return change


def as_many_columns(tensors, session):
    session["columns"] = 7


def one_more_tensor(tensors, session):
    tensors["layers.0.recurrent.more"] = torch.ones(1)


def a_mask_of_other_bytes(tensors, session):
    mask = tensors["tokens.mask"].clone()
    mask.view(torch.uint8)[0, 0] = 2
    tensors["tokens.mask"] = mask


def another_vector(tensors, session):
    name = next(name for name in tensors if name.startswith("expert_vectors.0."))
    tensors[name] = tensors[name] + 1


def an_expert_for_another_model(tensors, session):
    vectors = {"model.layers.9.self_attn.q_proj": torch.full((3,), 2.0)}
    for name in [name for name in tensors if name.startswith("expert_vectors.0.")]:
        del tensors[name]
    tensors["expert_vectors.0.model.layers.9.self_attn.q_proj"] = vectors["model.layers.9.self_attn.q_proj"]
    session["expert_vectors"][0]["fingerprint"] = ExpertVector(vectors).fingerprint


FORGERIES = {
    "id beyond the vocabulary": (with_tensor("tokens.token_ids", set_at((1, 2), VOCAB)), "vocabulary"),
    "negative id": (with_tensor("tokens.token_ids", set_at((1, 2), -1)), "vocabulary"),
    "ids as floats": (with_tensor("tokens.token_ids", torch.Tensor.double), "tokens.token_ids"),
    "ids missing": (without_tensor("tokens.token_ids"), "lacks"),
    "mask of another shape": (with_tensor("tokens.mask", lambda mask: mask[:, :5]), "tokens.mask"),
    "mask as bytes": (with_tensor("tokens.mask", lambda mask: mask.to(torch.uint8)), "tokens.mask"),
    "mask of other bytes": (a_mask_of_other_bytes, "neither true nor false"),
    "more columns": (as_many_columns, "of shape"),
    "keys of fewer slots": (with_tensor("layers.1.attention.keys", lambda k: k[:, :, :5]), "layers.1.attention.keys"),
    "keys of more heads": (
        with_tensor("layers.1.attention.keys", lambda k: torch.cat([k, k], 1)),
        "layers.1.attention.keys",
    ),
    "keys of fewer rows": (with_tensor("layers.1.attention.values", lambda v: v[:2]), "layers.1.attention.values"),
    "keys as integers": (with_tensor("layers.1.attention.keys", lambda k: k.long()), "layers.1.attention.keys"),
    "keys in float32": (with_tensor("layers.1.attention.keys", lambda k: k.float()), "layers.1.attention.keys"),
    "state of another shape": (with_tensor("layers.0.recurrent.ssm", lambda s: s.mT), "layers.0.recurrent.ssm"),
    "window too long": (
        with_tensor("layers.0.recurrent.conv", lambda c: torch.cat([c, c], 1)),
        "layers.0.recurrent.conv",
    ),
    "state missing": (without_tensor("layers.0.recurrent.conv"), "lacks"),
    "one more state": (one_more_tensor, "should not have"),
    "states said to be missing": (with_field("has_states", False), "should not have"),
    "no text": (with_field("columns", 0), "a sequence of 3 rows and 0 columns"),
    "negative columns": (with_field("columns", -6), "a sequence of"),
    "no rows": (with_field("rows", None), "a sequence of"),
    "other rows": (with_field("rows", 2), "for 2 rows"),
    "columns as text": (with_field("columns", "6"), "`columns`"),
    "a number for a truth value": (with_field("is_mixed", 0), "`is_mixed`"),
    "a truth value for a number": (with_field("rows", True), "`rows`"),
    "unknown field": (with_field("more", 1), "other fields"),
    "unknown option": (with_option("more", 1), "its options are"),
    "an option of another type": (with_option("rollback_reach", "3"), "its options are"),
    "a truth value for a reach": (with_option("rollback_reach", True), "its options are"),
    "an endless reach": (with_option("rollback_reach", 10**6), "longer than any sequence"),
    "a reach that is no size at all": (with_option("rollback_reach", 10**400), "longer than any sequence"),
    "windows that have been anywhere": (with_field("overshoot", 2**40), "`overshoot`"),
    "fewer rows than none": (with_field("rows", -3), "a sequence of"),
    "experts of names alone": (with_field("expert_vectors", ["a", "b"]), "not described by"),
    "an expert without metadata": (without_metadata, "not described by"),
    "a spectrum of words": (with_spectrum("rainbow"), "spectrum"),
    "a spectrum of lists": (with_spectrum({"lm_head": [[1.0]]}), "spectrum"),
    "metadata without an end": (with_spectrum(nested(200)), "nested more than"),
    "unknown storage": (with_option("storage", "tape"), "`storage`"),
    "unknown policy": (with_option("on_expert_change", "shrug"), "`on_expert_change`"),
    "static without size": (with_option("storage", "static"), "max_cache_len"),
    "an endless storage": (
        with_options(storage="static", max_cache_len=2**40),
        "would hold",
    ),
    "options as a list": (with_field("options", []), "`options`"),
    "an index beyond the experts": (with_field("expert_vector", [0, 9, None]), "in force are"),
    "a negative index": (with_field("expert_vector", [0, -1, None]), "in force are"),
    "experts for too few rows": (with_field("expert_vector", [0, 0]), "expert vectors for 2 rows"),
    "experts of no kind": (with_field("expert_vectors", [1, 2]), "not described by"),
    "a vector changed": (another_vector, "fingerprint"),
    "an expert for another model": (an_expert_for_another_model, "does not have"),
    "a key of another length": (with_field("encoded_key", ["a"]), "encoded with 1 expert vectors"),
    "a key of numbers": (with_field("encoded_key", [1, 2, 3]), "encoded with"),
    "other layers": (with_field("config", {}), "another configuration"),
}


def forged(path, forge):
    tensors, header = contents_of(path)
    session = json.loads(header["session"])
    forge(tensors, session)
    header["session"] = json.dumps(session)
    target = path.with_name("forged")
    write_tensors(target, {k: t.contiguous() for k, t in tensors.items()}, with_checksum(header, tensors))
    return target


@pytest.mark.parametrize("name", FORGERIES)
def test_a_whole_file_with_wrong_content_is_refused(name, saved_session):
    forge, message = FORGERIES[name]
    with pytest.raises(ValueError, match=f"is no session that this model can continue: .*{message}"):
        saved_session[0].load_cache(forged(saved_session[2], forge))


def rename_tensors(tensors, old, new):
    for name in [name for name in tensors if old in name]:
        tensors[name.replace(old, new)] = tensors.pop(name)


def with_former_names(tensors, session):
    """The names of expert vectors in version 0.1.0."""
    session["experts"], session["expert"] = session.pop("expert_vectors"), session.pop("expert_vector")
    rename_tensors(tensors, "expert_vectors.", "experts.")


def as_before_mixers(tensors, session):
    """The names of version 0.1.0 when Mamba was the only recurrent mixer."""
    with_former_names(tensors, session)
    del session["config"]["recurrent_mixer"]
    rename_tensors(tensors, ".recurrent.", ".mamba.")


@pytest.mark.parametrize(("forge", "name"), [(with_former_names, "experts.0."), (as_before_mixers, ".mamba.ssm")])
def test_a_session_with_former_names_continues_bit_for_bit(forge, name, saved_session):
    model, cache, path = saved_session
    old = forged(path, forge)
    assert any(name in tensor for tensor in contents_of(old)[0])
    loaded = model.load_cache(old)
    ids = some_ids(model, 3).expand(cache.batch_size, -1)
    assert torch.equal(model(ids, cache=loaded).logits, model(ids, cache=cache).logits)


def test_a_session_of_too_much_text_for_its_storage_is_refused(saved_session):
    model, _, path = saved_session
    target = forged(
        path,
        with_field(
            "options", {"storage": "static", "max_cache_len": 5, "on_expert_change": "error", "rollback_reach": 0}
        ),
    )
    with pytest.raises(ValueError, match="6 columns where 5 fit"):
        model.load_cache(target)


@pytest.fixture
def largest_allocation(monkeypatch):
    """Elements of the largest tensor that a test has asked storage for."""
    found, zeros = [0], torch.Tensor.new_zeros

    def new_zeros(self, shape, *arguments, **options):
        found[0] = max(found[0], torch.Size(shape).numel())
        if found[0] > 10**7:
            raise MemoryError(f"{shape} was asked for")
        return zeros(self, shape, *arguments, **options)

    monkeypatch.setattr(torch.Tensor, "new_zeros", new_zeros)
    return found


@pytest.mark.parametrize("scenario", ["plain", "empty", "with_changed_weights"])
def test_a_small_file_cannot_ask_for_gigabytes(scenario, tmp_path, largest_allocation):
    """A session of 23 KB whose `max_cache_len` said 10^7 allocated 4.9 GB before anybody had asked for the room.

    The text, the model's context or the caller justify storage; a number in a header does not.
    """
    model = random_model(tiny_config("paper"))
    cache = made(model, scenario, "static")
    cache.save(tmp_path / "s")
    target = forged(tmp_path / "s", with_options(max_cache_len=10**7))
    for options in ({}, {"on_weights_change": "recompute"}):
        with pytest.raises(ValueError, match=r"hold 10000000 columns of . rows.*pass `max_cache_len=`"):
            model.load_cache(target, **options)
    assert largest_allocation[0] < 10**6
    loaded = model.load_cache(target, max_cache_len=50)
    assert loaded.max_columns == 50
    found, wanted = (model(some_ids(model, 2), past_key_values=one).logits for one in (loaded, cache))
    assert_same_logits(found, wanted)


def test_many_rows_of_one_column_ask_for_no_more_than_one_row(tmp_path):
    """Sibling: each row multiplies the room, and costs a file without states only the bytes of its ids."""
    model = random_model(tiny_config("paper", max_position_embeddings=100))
    cache = model.make_cache("static", max_cache_len=300)
    with torch.no_grad():
        model(some_ids(model, 1, rows=2, columns=1), past_key_values=cache)
    cache.save(tmp_path / "s")
    assert model.load_cache(tmp_path / "s").max_columns == 300
    with pytest.raises(ValueError, match="hold 401 columns of 2 rows"):
        model.load_cache(forged(tmp_path / "s", with_options(max_cache_len=401)))


def test_the_caller_says_how_much_room_a_loaded_session_has(tmp_path):
    model = shared_model("everything")
    cache = made(model, "padded", "static")
    cache.save(tmp_path / "s")
    for room in (12, 30, 200):
        loaded = model.load_cache(tmp_path / "s", max_cache_len=room)
        assert loaded.max_columns == room and loaded.layers[1].attention.keys.tensor.shape[2] <= room
        if room > 20:
            for found, wanted in zip(go_on(model, loaded), go_on(model, cache.fork()), strict=True):
                assert_same_logits(found, wanted)
    for room in (11, 0, -1, "12", True):
        with pytest.raises(ValueError, match=r"12 columns where 11 fit|`max_cache_len` must be"):
            model.load_cache(tmp_path / "s", max_cache_len=room)
    made(model, "plain", "dense").save(tmp_path / "s")
    with pytest.raises(ValueError, match="grows with the sequence"):
        model.load_cache(tmp_path / "s", max_cache_len=50)


def test_a_forged_header_that_no_parser_survives_is_refused(saved_session):
    model, _, path = saved_session
    tensors, header = contents_of(path)
    for session in ("[" * 100_000, "{", "[]", '"x"', "1" * 10_000, '{"config": NaN}'):
        write_tensors(path, tensors, with_checksum(header | {"session": session}, tensors))
        with pytest.raises(ValueError, match="no session"):
            model.load_cache(path)


def test_what_is_sealed_again_unchanged_is_loaded(saved_session):
    """The forgeries above are refused for what they change, not for being written by hand."""
    model, cache, path = saved_session
    target = forged(path, lambda tensors, session: None)
    assert equal(go_on(model, model.load_cache(target)), go_on(model, cache))
