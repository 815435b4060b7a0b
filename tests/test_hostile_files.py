"""Files by another hand: expert vectors, sessions and Mamba weights are loaded, or refused by a `ValueError`.

A parser that raises anything else (`RecursionError`, `OverflowError`, `MemoryError`, `KeyError`) takes a server down
that handles bad requests, and one that believes a number allocates what the number says.
"""

import json
import random

import pytest
import torch

from damage import mutated
from mambaformer import ExpertVector, convert, save_mamba_delta
from mambaformer.convert import conversion, load_mamba_delta
from mambaformer.expert_vectors_mambaformer import MAX_SCALE, ExpertVectorLibrary
from mambaformer.files_header_mambaformer import MAX_DEPTH, json_of
from mambaformer.files_mambaformer import with_checksum, write_tensors
from patterns import tiny_config
from saved_caches import contents_of, made
from test_mamba_delta import WINDOWED, llama, trained
from tiny_models import random_expert, random_model

DEEP = 100_000


@pytest.fixture(scope="module")
def model():
    return random_model(tiny_config("paper", num_hidden_layers=2))


@pytest.fixture(params=["expert", "session", "mamba_delta"])
def kind(request, model, tmp_path):
    """A file of each kind, and what loads it."""
    path = tmp_path / "file"
    if request.param == "expert":
        expert = random_expert(model, 1, rank=3, name="x")
        expert.metadata["spectrum"] = {"lm_head": [3.0, 2.0]}
        expert.save(path)
        return path, ExpertVector.load
    if request.param == "session":
        made(model, "expert_per_row", "dense").save(path)
        return path, model.load_cache
    save_mamba_delta(trained(llama(), **WINDOWED), path, metadata={"tokens": 3})
    return path, load_mamba_delta


def split(path):
    """The table of tensors and the bytes behind it."""
    data = path.read_bytes()
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def joined(table, data):
    head = table if isinstance(table, bytes) else json.dumps(table).encode()
    return len(head).to_bytes(8, "little") + head + data


def with_entry(**changes):
    """The first tensor with other fields; those that are `...` are left out."""

    def change(table, data):
        name = next(name for name in table if name != "__metadata__")
        fields = {**table[name], **changes}
        return joined({**table, name: {k: v for k, v in fields.items() if v is not ...}}, data)

    return change


def with_one_more(name="more", **fields):
    def change(table, data):
        entry = {"dtype": "F32", "shape": [0], "data_offsets": [len(data), len(data)]} | fields
        return joined({**table, name: entry}, data)

    return change


def with_text(old, new):
    return lambda table, data: joined(json.dumps(table).replace(old, new, 1).encode(), data)


def with_header(key, value):
    return lambda table, data: joined({**table, "__metadata__": {**table["__metadata__"], key: value}}, data)


def every_header(value):
    """Each string of the header, but those that name the format."""

    def change(table, data):
        header = table["__metadata__"]
        return joined(
            {**table, "__metadata__": {k: header.get(k) if k in ("format", "version") else value for k in header}},
            data,
        )

    return change


# Each is refused by every loader, whatever the checksum would have said.
DAMAGES = {
    "zero of petabytes": with_one_more(shape=[0, 2**40, 2**40]),
    "more than a word of elements": with_one_more(shape=[0, 2**62, 2**62, 2**62]),
    "a size beyond a word": with_one_more(shape=[0, 2**64]),
    "elements that wrap around": with_entry(shape=[2**32, 2**32]),
    "a negative size": with_entry(shape=[-1, -3]),
    "a fraction of a size": with_entry(shape=[1.5]),
    "truth values for sizes": with_one_more(shape=[False, True]),
    "a million dimensions": with_one_more(shape=[0] + [1] * 1_000_000),
    "no shape": with_entry(shape=...),
    "a shape in words": with_entry(shape="[3]"),
    "no offsets": with_entry(data_offsets=...),
    "three offsets": with_entry(data_offsets=[0, 4, 8]),
    "offsets beyond the file": with_entry(data_offsets=[0, 2**50]),
    "offsets beyond a word": with_entry(data_offsets=[2**70, 2**70 + 12]),
    "negative offsets": with_entry(data_offsets=[-12, 0]),
    "offsets that go back": with_entry(data_offsets=[12, 0]),
    "overlapping offsets": with_one_more(shape=[1], data_offsets=[0, 4]),
    "a gap": with_one_more(shape=[0], data_offsets=[2**20, 2**20]),
    "an unknown dtype": with_entry(dtype="F12"),
    "a dtype that PyTorch has for some": with_one_more(dtype="F4"),
    "a dtype of no kind": with_entry(dtype=["F32"]),
    "one more field": with_entry(device="cuda"),
    "an entry that is a list": lambda table, data: joined({**table, "more": [1]}, data),
    "a table that is a list": lambda table, data: joined([table], data),
    "metadata that are a list": lambda table, data: joined({**table, "__metadata__": ["format"]}, data),
    "metadata that are numbers": with_header("version", 1),
    "a version without an end": with_header("version", "9" * 5000),
    "a name twice": with_text('{"__metadata__"', '{"__metadata__": {}, "__metadata__"'),
    "a deep table": lambda table, data: joined(b"[" * DEEP, data),
    "a deep entry": lambda table, data: joined(b'{"a":' * DEEP + b"1" + b"}" * DEEP, data),
    "a table in UTF-16": lambda table, data: joined(json.dumps(table).encode("utf-16"), data),
    "a header of 2^63 bytes": lambda table, data: (2**63).to_bytes(8, "little") + data,
    "a header of 99 MB in a small file": lambda table, data: (99_000_000).to_bytes(8, "little") + data,
    "a header of NaN": lambda table, data: joined(b"NaN", data),
    "strings of deep lists": every_header("[" * DEEP),
    "strings of deep objects": every_header('{"a":' * DEEP + "1" + "}" * DEEP),
    "strings of long numbers": every_header("1" * 100_000),
    "strings of nothing": every_header(""),
}  # fmt: skip


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_header_that_cannot_be_is_refused(damage, kind):
    """A shape [0, 2^40, 2^40] was a `RuntimeError`, and deep JSON in an expert's metadata a `RecursionError`."""
    path, load = kind
    path.write_bytes(DAMAGES[damage](*split(path)))
    with pytest.raises(ValueError):
        load(path)


def test_a_few_hundred_damaged_files_of_each_kind_are_refused_or_loaded(kind, tmp_path):
    path, load = kind
    whole, chance, refused = path.read_bytes(), random.Random(3), 0
    for _ in range(300):
        (tmp_path / "m").write_bytes(mutated(whole, chance))
        try:
            load(tmp_path / "m")
        except ValueError:
            refused += 1
    assert refused > 250


# ------------------------------------------------------------------------- sealed again, by who knows the checksum


def sealed_again(path, change):
    """The file with `change(tensors, header)`, under a checksum and labels that fit."""
    tensors, header = contents_of(path)
    change(tensors, header)
    header.pop("labels", None)
    if "fingerprint" in header:
        header["fingerprint"] = _fingerprint_if_any(tensors)
    tensors = {name: tensor.contiguous().clone() for name, tensor in tensors.items()}
    write_tensors(path, tensors, with_checksum(header, tensors) if "checksum" in header else header)


def _fingerprint_if_any(tensors):
    try:
        return ExpertVector(tensors).fingerprint
    except ValueError:
        return "none"


JUNK = [None, True, 3, -1, 1e300, float("nan"), "x", "../x", [], [1], {}, {"a": 1}, 10**400, "9" * 5000, [[]]]
BAD_NAMES = ["../x", "/etc/passwd", "", "expert_vectors.0.", "expert_vectors.9999999999.a", "a\0b", "ä" * 300]


def other_values(text, chance):
    """JSON with one of its values replaced, wherever it stands."""
    value = json.loads(text)
    places = [(None, None)]
    for parent in _inner(value):
        places += [(parent, key) for key in (parent if isinstance(parent, dict) else range(len(parent)))]
    parent, key = chance.choice(places)
    new = chance.choice(JUNK)
    if parent is None:
        return json.dumps(new)
    if isinstance(parent, dict) and chance.random() < 0.2:
        del parent[key]
    else:
        parent[key] = new
    return json.dumps(value)


def _inner(value):
    if isinstance(value, (dict, list)):
        yield value
        for each in value.values() if isinstance(value, dict) else value:
            yield from _inner(each)


def other_tensor(tensors, chance):
    name = chance.choice(list(tensors))
    tensor = tensors[name]
    new = chance.choice(
        [
            lambda: tensor.flatten()[:-1],
            lambda: tensor[None],
            lambda: tensor.to(chance.choice([torch.int8, torch.bool, torch.float16, torch.int64])),
            lambda: torch.full_like(tensor, chance.choice([torch.nan, torch.inf, 1e38]), dtype=torch.float32),
            lambda: torch.zeros(0),
            lambda: torch.zeros(()),
            lambda: torch.full((3, 2**10), -1, dtype=torch.int64),
            None,
        ]
    )
    if new is None:
        del tensors[name]
        return
    if chance.random() < 0.3:
        tensors[chance.choice(BAD_NAMES)] = new()
    else:
        tensors[name] = new()


def forge_once(tensors, header, chance):
    parts = [key for key in header if key not in ("format", "version", "fingerprint", "checksum", "labels")]
    if chance.random() < 0.4:
        other_tensor(tensors, chance)
    else:
        key = chance.choice(parts)
        header[key] = other_values(header[key], chance)


def forge_many(path, load, times, seed):
    """How many of so many forgeries were refused; anything but a `ValueError` comes out."""
    whole, chance, refused = path.read_bytes(), random.Random(seed), 0
    for n in range(times):
        path.write_bytes(whole)
        sealed_again(path, lambda tensors, header: forge_once(tensors, header, chance))
        try:
            load(path)
        except ValueError:
            refused += 1
        except BaseException as error:
            raise AssertionError(f"forgery {n} of seed {seed}") from error
    return refused


@pytest.mark.slow
def test_a_few_hundred_forgeries_of_each_kind_are_refused_or_loaded(kind):
    """The checksum tells damage, not malice: who writes a file can seal it."""
    assert forge_many(*kind, times=300, seed=1) > 100


# ------------------------------------------------------------------------------------------------ experts

BAD_SPECTRA = ["rainbow", [1.0], 3, None, {"q": 1.0}, {"q": "1.0"}, {"q": [None]}, {"q": ["a"]}, {"q": [True]}]
BAD_SPECTRA += [{"q": [[1.0]]}, {"q": {"0": 1.0}}, {"q": [-1.0]}, {"q": [10**400]}]


@pytest.mark.parametrize("spectrum", BAD_SPECTRA, ids=repr)
def test_a_spectrum_of_another_type_is_refused(spectrum, tmp_path):
    """It was an `AttributeError` or a `TypeError` in the first forward that used the expert."""
    with pytest.raises(ValueError, match="`metadata\\['spectrum'\\]` must map"):
        ExpertVector({"q": torch.full((2,), 1.5)}, metadata={"spectrum": spectrum})
    ExpertVector({"q": torch.full((2,), 1.5)}, "x").save(tmp_path / "e")
    sealed_again(tmp_path / "e", lambda _, header: header.update(metadata=json.dumps({"spectrum": spectrum})))
    with pytest.raises(ValueError, match="spectrum"):
        ExpertVector.load(tmp_path / "e")


def test_a_spectrum_that_was_written_later_is_refused_by_a_forward(model):
    expert = random_expert(model, 1)
    expert.metadata["spectrum"] = "rainbow"
    cache = model.make_cache()
    with pytest.raises(ValueError, match="`metadata\\['spectrum'\\]` must map"):
        model(torch.tensor([[1, 2]]), past_key_values=cache, expert_vector=expert)
    assert cache.get_seq_length() == 0


@pytest.mark.parametrize("scale", [1e38, -1e38, 1e5, 3e38])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_scales_whose_products_overflow_are_refused(scale, dtype, tmp_path):
    """Scales of 1e38 are finite and made every logit NaN."""
    with pytest.raises(ValueError, match="the largest scale whose products stay finite"):
        ExpertVector({"q": torch.tensor([1.0, scale], dtype=dtype)})
    write_tensors(
        tmp_path / "e",
        {"q": torch.tensor([1.0, scale], dtype=dtype)},
        {"format": "mambaformer.expert_vector", "version": "1", "name": "null", "metadata": "{}", "fingerprint": "x"},
    )
    with pytest.raises(ValueError, match="the largest scale whose products stay finite"):
        ExpertVector.load(tmp_path / "e")


def test_the_largest_scales_give_finite_logits():
    single = random_model(tiny_config("everything")).float()
    names = [name for name in single.linear_modules() if name != "lm_head"]
    expert = ExpertVector({name: torch.full((2,), MAX_SCALE) for name in names})
    with torch.no_grad():
        assert single(torch.arange(12)[None], expert_vector=expert, use_cache=False).logits.isfinite().all()


def test_a_folder_with_one_bad_expert_adds_none(tmp_path):
    library = ExpertVectorLibrary()
    ExpertVector({"q": torch.full((2,), 1.5)}, "a").save(tmp_path / "a.safetensors")
    ExpertVector({"q": torch.full((2,), 1.5)}, "../../b").save(tmp_path / "b.safetensors")
    with pytest.raises(ValueError, match="cannot name an expert"):
        library.load(tmp_path)
    assert not library.names


# ------------------------------------------------------------------------------------------------ Mamba weights

BAD_BLOCKS = {
    "a state size that allocates": lambda fields: fields.update(mamba_d_state=10**12),
    "a kernel that allocates": lambda fields: fields.update(mamba_d_conv=10**12),
    "a rank that allocates": lambda fields: fields.update(mamba_dt_rank=10**12),
    "channels that allocate": lambda fields: fields.update(mamba_expand=10**12),
    "more layers": lambda fields: fields["layer_types"].append("hybrid"),
    "layers of another kind": lambda fields: fields.update(layer_types=[1, 2, 3]),
    "layers as a word": lambda fields: fields.update(layer_types="hybrid"),
    "a field too many": lambda fields: fields.update(vocab_size=10**9),
    "steps that go down": lambda fields: fields.update(time_step_min=1.0),
}


@pytest.mark.parametrize("name", BAD_BLOCKS)
def test_deltas_of_misstated_sizes_are_refused_before_a_model_is_built(name, tmp_path, monkeypatch):
    """`mamba_d_state` of a file decided how much was allocated, before its tensors were compared with it."""
    save_mamba_delta(trained(llama(), **WINDOWED), tmp_path / "b")

    def change(tensors, header):
        fields = json.loads(header["fields"])
        BAD_BLOCKS[name](fields)
        header["fields"] = json.dumps(fields)

    sealed_again(tmp_path / "b", change)
    monkeypatch.setattr(conversion, "_build", None)
    with pytest.raises(ValueError, match="is not a valid file of Mamba weights"):
        convert(llama(), mamba_delta=tmp_path / "b")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_deltas_that_are_not_finite_are_refused(value, tmp_path):
    save_mamba_delta(trained(llama(), **WINDOWED), tmp_path / "b")
    sealed_again(tmp_path / "b", lambda tensors, _: next(iter(tensors.values())).view(-1)[:1].fill_(value))
    with pytest.raises(ValueError, match="not a finite floating-point tensor"):
        load_mamba_delta(tmp_path / "b")


# ------------------------------------------------------------------------------------------------ the parser itself


def test_json_is_read_to_a_depth_that_every_caller_can_walk():
    assert json_of("[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1))
    for depth in (MAX_DEPTH + 2, 900, DEEP):
        for text in ("[" * depth + "]" * depth, '{"a":' * depth + "1" + "}" * depth):
            with pytest.raises(ValueError, match="nested more than"):
                json_of(text)
    with pytest.raises(ValueError, match="same key twice"):
        json_of('{"a": 1, "a": 2}')
