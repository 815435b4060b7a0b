"""A folder that is not what its files promise is refused by name, and a conversion that is cut off leaves nothing."""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mambaformer import MambaFormerForCausalLM
from mambaformer.convert import convert
from mambaformer.convert.cli import main
from oracle import assert_same_logits
from source_models import all_logits, changed, rope, some_ids, source

UP = "model.layers.1.mlp.up_proj.weight"


def config(**fields):
    """Changes fields of a folder's config.json."""

    def change(folder):
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | fields))

    return change


def weights(change_tensors):
    """Changes the tensors of a folder."""

    def change(folder):
        tensors = load_file(folder / "model.safetensors")
        change_tensors(tensors)
        save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})

    return change


def content(name, data):
    return lambda folder: (folder / name).write_bytes(data)


def shards(change_files):
    """Splits the weights, and changes the files that come of it."""

    def change(folder):
        (folder / "model.safetensors").unlink()
        source("llama").save_pretrained(folder, max_shard_size="20KB")
        change_files(folder)

    return change


def without_weights(folder):
    (folder / "model.safetensors").unlink()


def pickled(data):
    def change(folder):
        without_weights(folder)
        (folder / "pytorch_model.bin").write_bytes(data)

    return change


ROPE_OF_OLD = {"rope_parameters": None, "rope_theta": 100.0, "rope_scaling": {"type": "dynamic", "factor": 2.0}}
HARMED_FOLDERS = {
    "a tensor too many": (weights(lambda all: all.update(x=torch.ones(2))), r"unexpected_keys.*'x'"),
    "norms of queries": (
        weights(lambda all: all.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(8)})),
        r"unexpected_keys.*q_norm",
    ),
    "another shape": (weights(lambda all: all.update({"model.norm.weight": torch.ones(8)})), "mismatched.*model.norm"),
    "no head": (weights(lambda all: all.pop("lm_head.weight")), "missing_keys.*lm_head"),
    "codes": (weights(lambda all: all.update({UP: all[UP].to(torch.int8)})), rf"{UP}': 'I8'"),
    "codes of floats": (weights(lambda all: all.update({UP: all[UP].to(torch.float8_e4m3fn)})), rf"{UP}': 'F8_E4M3'"),
    "a shard missing": (
        shards(lambda folder: (folder / "model-00002-of-00007.safetensors").unlink()),
        r"lacks \['model-00002-of-00007",
    ),
    "a shard cut": (shards(content("model-00003-of-00007.safetensors", b"12")), "model-00003-of-00007.safetensors in"),
    "an index of nothing": (shards(content("model.safetensors.index.json", b"{}")), "no `weight_map`"),
    "an index of numbers": (
        shards(content("model.safetensors.index.json", b'{"weight_map": {"a": 1}}')),
        "no `weight_map`",
    ),
    "weights cut": (content("model.safetensors", b"x" * 5000), "model.safetensors in .* cannot be read"),
    "weights empty": (content("model.safetensors", b""), "model.safetensors in .* cannot be read"),
    "a damaged pickle": (pickled(b"junk"), "the weights in .* cannot be read"),
    "an index alone": (shards(lambda folder: [x.unlink() for x in folder.glob("*-of-*")]), "lacks .*00001-of-00007"),
    "no JSON": (content("config.json", b"{"), "config.json in .* cannot be read: JSONDecodeError"),
    "a list": (content("config.json", b"[]"), "holds a list, not an object"),
    "no text": (content("config.json", b"\xff\xfe\x00"), "config.json in .* cannot be read: UnicodeDecodeError"),
    "deep": (content("config.json", b"[" * 100_000), "config.json in .* cannot be read: RecursionError"),
    "a width of letters": (config(hidden_size="x"), "'hidden_size' expected int"),
    "half a layer": (config(num_hidden_layers=3.5), "'num_hidden_layers' expected int"),
    "no heads": (config(num_attention_heads=0), "cannot be read: ZeroDivisionError"),
    "no family": (config(model_type=None), "`model_type` is None"),
    "a family by number": (config(model_type=["llama"]), r"`model_type` is \['llama'\]"),
    "another activation": (config(hidden_act="zork"), "`hidden_act` must be.*'zork'"),
    "a window": (config(sliding_window=4), "'sliding_window': 4"),
    "a softcap": (config(final_logit_softcapping=30.0), "'final_logit_softcapping': 30"),
    "a multiplier": (config(residual_multiplier=0.22), "'residual_multiplier': 0.22"),
    "norms by a flag": (config(use_qk_norm=True), "'use_qk_norm': True"),
    "experts": (config(num_local_experts=8), "'num_local_experts': 8"),
    "half turned": (config(partial_rotary_factor=0.5), "partial_rotary_factor"),
    "rope of old": (config(**ROPE_OF_OLD), "rope_type 'dynamic'"),
    "an unknown rope": (config(rope_parameters=rope(rope_type="foo", factor=2.0)), "rope_type 'foo'"),
    "rope of three axes": (config(rope_parameters=rope(mrope_section=[1, 2])), r"unknown keys \['mrope_section'\]"),
    "rope by layer": (config(rope_parameters={"full_attention": rope()}), r"unknown keys \['full_attention'\]"),
    "rope as a word": (config(rope_parameters="yarn"), "`rope_parameters` is 'yarn'"),
    "yarn without factor": (config(rope_parameters=rope(rope_type="yarn")), "Missing required keys.*'factor'"),
    "gptq": (config(quantization_config={"quant_method": "gptq", "bits": 4}), "quant_method 'gptq'"),
    "bitsandbytes": (config(quantization_config={"quant_method": "bitsandbytes", "load_in_4bit": True}), "'bitsandb"),
    "an unknown method": (config(quantization_config={"quant_method": "zzz"}), "quant_method 'zzz'"),
    "quantized by a word": (config(quantization_config="4bit"), "`quantization_config` is '4bit'"),
    "tied by mistake": (config(tie_word_embeddings=True), "embedding and its head differ"),
    "an adapter": (content("adapter_config.json", b'{"peft_type": "LORA"}'), "holds an adapter"),
    "no tokenizer": (content("tokenizer.json", b"{}"), "the tokenizer in .* cannot be read"),
}


@pytest.mark.parametrize("name", HARMED_FOLDERS)
def test_a_folder_that_is_not_what_it_promises_is_refused_by_name(name, tmp_path):
    """Bad files raised errors of eleven kinds, and codes in int8 or a softcap were converted without a word."""
    harm, message = HARMED_FOLDERS[name]
    source("llama").save_pretrained(tmp_path / "source")
    harm(tmp_path / "source")
    with pytest.raises(ValueError, match=message):
        convert(tmp_path / "source", output_dir=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_folder_without_weights_says_so(tmp_path):
    source("llama").save_pretrained(tmp_path / "source")
    without_weights(tmp_path / "source")
    with pytest.raises(OSError, match=r"no file named model\.safetensors"):
        convert(tmp_path / "source")


def test_a_sharded_folder_and_a_tied_one_without_a_head_are_converted(tmp_path):
    source("llama").save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    found = all_logits(convert(tmp_path / "sharded"), some_ids())
    assert_same_logits(found, all_logits(source("llama"), some_ids()), 1e-5)
    tied = source("llama_tied_with_biases")
    tied.save_pretrained(tmp_path / "tied")
    assert "lm_head.weight" not in load_file(tmp_path / "tied" / "model.safetensors")
    assert_same_logits(all_logits(convert(tmp_path / "tied"), some_ids()), all_logits(tied, some_ids()), 1e-5)


@pytest.mark.parametrize(
    ("name", "fields", "message"),
    [
        ("mistral", {"attention_bias": True}, "'attention_bias': True"),
        ("qwen2", {"attn_logit_softcapping": 50.0}, "'attn_logit_softcapping': 50"),
        ("mamba", {"logits_scaling": 8.0}, "'logits_scaling': 8"),
        ("jamba", {"sliding_window": 16}, "'sliding_window': 16"),
        ("llama", {"clip_qkv": 8.0, "alibi": True}, "'clip_qkv': 8.0, 'alibi': True"),
    ],
)
def test_a_configuration_that_says_more_than_its_class_computes_is_refused(name, fields, message):
    with pytest.raises(ValueError, match=message):
        convert(changed(name, **fields))


# ------------------------------------------------------------------------------------------------ a conversion cut off


def stop(*args, **kwargs):
    raise KeyboardInterrupt


@pytest.mark.slow
@pytest.mark.parametrize("files_before_the_end", [0, 1, 20])
@pytest.mark.parametrize("was_there", [False, True])
def test_an_interrupted_conversion_leaves_the_folder_as_it_was(files_before_the_end, was_there, tmp_path, monkeypatch):
    """`save_pretrained` wrote into the output folder: cut off, it held a new config.json and the old weights."""
    out = tmp_path / "out"
    if was_there:
        convert(source("mamba"), output_dir=out)
        (out / "notes.txt").write_text("mine")
    before, moved, replace = files_in(tmp_path), [], os.replace

    def replace_until(old, new):
        if Path(new).parent == out:
            if len(moved) == files_before_the_end:
                moved.append("the end")
                raise KeyboardInterrupt
            moved.append(new)
        replace(old, new)

    with monkeypatch.context() as patch:
        patch.setattr(os, "replace", replace_until)
        with pytest.raises(KeyboardInterrupt):
            convert(source("llama"), output_dir=out)
    assert files_in(tmp_path) == before
    assert out.exists() == was_there
    convert(source("llama"), output_dir=out)
    found = all_logits(MambaFormerForCausalLM.from_pretrained(out), some_ids())
    assert_same_logits(found, all_logits(source("llama"), some_ids()), 1e-5)


def files_in(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_save_that_fails_leaves_the_old_folder_as_it_was(tmp_path, monkeypatch):
    convert(source("mamba"), output_dir=tmp_path / "out")
    before = files_in(tmp_path)
    save = MambaFormerForCausalLM.save_pretrained

    def fail(model, folder, **options):
        save(model, folder, **options)
        raise OSError("No space left on device")

    monkeypatch.setattr(MambaFormerForCausalLM, "save_pretrained", fail)
    with pytest.raises(OSError, match="No space left"):
        convert(source("llama"), output_dir=tmp_path / "out")
    assert files_in(tmp_path) == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_old_weights_of_other_names_are_not_loaded_instead_of_the_new(tmp_path):
    """Of a folder with model.safetensors and shards, Transformers loads the first, whichever is newer."""
    source("mamba").save_pretrained(tmp_path / "out", max_shard_size="10KB")
    convert(source("llama"), output_dir=tmp_path / "out")
    assert not list((tmp_path / "out").glob("*-of-*"))
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert_same_logits(all_logits(loaded, some_ids()), all_logits(source("llama"), some_ids()), 1e-5)


def test_a_converted_folder_may_be_read_by_those_who_may_read_others(tmp_path):
    convert(source("llama"), output_dir=tmp_path / "deep" / "out")
    (tmp_path / "plain").mkdir()
    assert (tmp_path / "deep" / "out").stat().st_mode == (tmp_path / "plain").stat().st_mode


# ------------------------------------------------------------------------------------------------ the command line

MISTAKES = """
import contextlib, io, json, os, sys
from mambaformer.convert.cli import main
if os.geteuid() == 0:
    os.setuid(65534)  # nothing is forbidden to root
found = {}
for name, arguments in json.loads(sys.argv[1]).items():
    said = io.StringIO()
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(said):
        try:
            code = main(arguments)
        except SystemExit as stop:
            code = stop.code
    found[name] = [code, said.getvalue()]
print(json.dumps(found))
"""


@pytest.fixture(scope="module")
def mistakes():
    """The command's exit code and words for each mistake, in a process of a user who is not root."""
    with tempfile.TemporaryDirectory() as name:
        place = Path(name)
        place.chmod(0o777)  # the folders of pytest are closed to other users
        make_bad_places(place)
        arguments = {name: [str(place / given), str(place / to)] for name, (given, to, _) in MISTAKES_MADE.items()}
        command = [sys.executable, "-c", MISTAKES, json.dumps(arguments)]
        environment = os.environ | {"HOME": str(place)}
        done = subprocess.run(command, capture_output=True, text=True, cwd=place, env=environment)
        for closed in ("hidden", "closed"):
            (place / closed).chmod(0o755)
        assert done.returncode == 0, done.stderr
        return json.loads(done.stdout.splitlines()[-1])


def make_bad_places(place):
    harmed(place / "good")
    config(hidden_size="x")(harmed(place / "sizes"))
    weights(lambda all: all.pop(UP))(harmed(place / "missing"))
    files = {"empty.gguf": b"", "other.gguf": b"PK\x03\x04", "cut.gguf": b"GGUF\x03\x00\x00\x00\x09"}
    for name, data in (files | {"secret.gguf": b"GGUF", "hidden/config.json": b"{}"}).items():
        (place / name).parent.mkdir(exist_ok=True)
        (place / name).write_bytes(data)
    harmed(place / "locked")
    for path in place.glob("*/*"):
        path.chmod(0o000 if path.parent.name == "locked" and path.suffix == ".safetensors" else 0o644)
    (place / "empty").mkdir()
    (place / "closed").mkdir(mode=0o555)
    (place / "hidden").chmod(0)
    (place / "secret.gguf").chmod(0)


def harmed(folder):
    source("llama").save_pretrained(folder)
    return folder


# mistake: source, output, and what the message says
MISTAKES_MADE = {
    "no directory": ("nowhere", "out", "neither a *.gguf file nor a directory"),
    "an empty directory": ("empty", "out", "neither a *.gguf file nor a directory"),
    "an empty file": ("empty.gguf", "out", "is not a GGUF file"),
    "no GGUF file": ("other.gguf", "out", "is not a GGUF file"),
    "a cut file": ("cut.gguf", "out", "is damaged or cut short"),
    "a file without permission": ("secret.gguf", "out", "Permission denied"),
    "a folder without permission": ("hidden", "out", "Permission denied"),
    "weights without permission": ("locked", "out", "Permission denied"),
    "an output that is a file": ("good", "other.gguf", "is a file"),
    "an output below a file": ("good", "other.gguf/out", "is a file or below one"),
    "an output without permission": ("good", "closed/out", "no permission for"),
    "an output that is the source": ("good", "good", "would overwrite the source"),
    "sizes of letters": ("sizes", "out", "'hidden_size' expected int"),
    "a tensor missing": ("missing", "out", "missing_keys"),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", MISTAKES_MADE)
def test_a_mistake_is_one_line_that_says_error_and_exit_code_2(name, mistakes):
    code, said = mistakes[name]
    line = said.strip().splitlines()[-1]
    assert code == 2, said
    assert line.startswith("mambaformer-convert: error: ")
    assert MISTAKES_MADE[name][2] in line
    assert "Traceback" not in said


def test_an_interrupted_command_says_so_in_one_line(tmp_path, monkeypatch, capsys):
    source("llama").save_pretrained(tmp_path / "source")
    monkeypatch.setattr(MambaFormerForCausalLM, "save_pretrained", stop)
    with pytest.raises(SystemExit) as stopped:
        main([str(tmp_path / "source"), str(tmp_path / "out")])
    assert stopped.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1].startswith("mambaformer-convert: error: interrupted")
    assert [path.name for path in tmp_path.iterdir()] == ["source"]
