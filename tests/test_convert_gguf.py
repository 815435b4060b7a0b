"""A GGUF file becomes the MambaFormer that computes what the file describes, or it is refused by name."""

import math
import sys

import gguf
import numpy as np
import pytest
import torch
import transformers

from mambaformer.convert import conversion, convert
from mambaformer.convert.rope import recover_scaling
from oracle import assert_same_logits
from patterns import VOCAB
from source_models import ATTENTION, JAMBA, LLAMA3_ROPE, SIZES, YARN_ROPE, all_logits, new_source, some_ids

LINEAR_ROPE = {"rope_type": "linear", "rope_theta": 100.0, "factor": 2.5}
# The scaling of Llama 3.1 and of Llama 3.2, with heads of the size that these models have.
LLAMA31_ROPE = LLAMA3_ROPE | {"rope_theta": 500000.0, "factor": 8.0, "original_max_position_embeddings": 8192}
LLAMA32_ROPE = LLAMA31_ROPE | {"factor": 32.0}
LONG_HEADS = {"head_dim": 64, "max_position_embeddings": 131072}

# Every row is a source: its family, and its fields.
GGUF_SOURCES = {
    "llama": ("Llama", ATTENTION),
    "llama_tied": ("Llama", ATTENTION | {"tie_word_embeddings": True, "rms_norm_eps": 1e-3}),
    "llama_head_size": ("Llama", ATTENTION | {"head_dim": 12, "num_key_value_heads": 1}),
    "llama_biases": ("Llama", ATTENTION | {"attention_bias": True, "mlp_bias": True, "head_dim": 6}),
    "llama_theta": ("Llama", ATTENTION | {"rope_parameters": {"rope_type": "default", "rope_theta": 50.0}}),
    "qwen2": ("Qwen2", ATTENTION),
    "qwen2_tied_head_size": ("Qwen2", ATTENTION | {"tie_word_embeddings": True, "head_dim": 12}),
    "mamba": ("Mamba", SIZES | {"state_size": 4, "layer_norm_epsilon": 1e-3}),
    "mamba_untied": ("Mamba", SIZES | {"tie_word_embeddings": False, "expand": 3, "conv_kernel": 3}),
    "mamba_biases": ("Mamba", SIZES | {"use_bias": True, "use_conv_bias": False, "time_step_rank": 7}),
    "jamba": ("Jamba", JAMBA),
    "linear": ("Llama", ATTENTION | {"rope_parameters": LINEAR_ROPE}),
    "yarn": ("Llama", ATTENTION | {"rope_parameters": YARN_ROPE, "max_position_embeddings": 64}),
    "yarn_of_qwen2": (
        "Qwen2",
        ATTENTION | {"rope_parameters": YARN_ROPE | {"factor": 3.0, "beta_fast": 24.0, "beta_slow": 2.0}},
    ),
    "yarn_attention": ("Llama", ATTENTION | {"rope_parameters": YARN_ROPE | {"attention_factor": 1.7}}),
    "llama3": ("Llama", ATTENTION | {"rope_parameters": LLAMA3_ROPE, "max_position_embeddings": 64}),
    "llama3_other_band": (
        "Llama",
        ATTENTION
        | {"head_dim": 32, "rope_parameters": LLAMA3_ROPE | {"low_freq_factor": 1.5, "high_freq_factor": 7.0}},
    ),
    "llama31": ("Llama", ATTENTION | LONG_HEADS | {"rope_parameters": LLAMA31_ROPE}),
    "llama32": ("Llama", ATTENTION | LONG_HEADS | {"rope_parameters": LLAMA32_ROPE}),
}


def gguf_source(name):
    return new_source(*GGUF_SOURCES[name])


def metadata_of(model):
    """The keys that llama.cpp's converter writes for `model`, `{}` standing for the architecture."""
    config = model.config
    keys = {"{}.block_count": config.num_hidden_layers, "{}.embedding_length": config.hidden_size}
    keys |= {"{}.context_length": getattr(config, "max_position_embeddings", 2**20)}
    if config.model_type in ("mamba", "jamba"):
        keys |= ssm_metadata_of(config)
    if config.model_type == "mamba":
        return keys | {"{}.attention.layer_norm_rms_epsilon": config.layer_norm_epsilon, "{}.feed_forward_length": 0}
    keys |= {
        "{}.feed_forward_length": config.intermediate_size,
        "{}.attention.head_count": config.num_attention_heads,
        "{}.attention.head_count_kv": config.num_key_value_heads,
        "{}.attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "{}.vocab_size": config.vocab_size,
    }
    if config.model_type == "jamba":
        of_layer = {"attention": config.num_key_value_heads, "mamba": 0}
        return keys | {"{}.attention.head_count_kv": [of_layer[kind] for kind in config.layers_block_type]}
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    keys |= dict.fromkeys(
        ("{}.attention.key_length", "{}.attention.value_length", "{}.rope.dimension_count"), head_dim
    )
    return keys | rope_metadata_of(config.rope_parameters)


def ssm_metadata_of(config):
    get = config.to_dict().get
    expand = get("expand") or get("mamba_expand")
    return {
        "{}.ssm.conv_kernel": get("conv_kernel") or get("mamba_d_conv"),
        "{}.ssm.inner_size": expand * config.hidden_size,
        "{}.ssm.state_size": get("state_size") or get("mamba_d_state"),
        "{}.ssm.time_step_rank": get("time_step_rank") or get("mamba_dt_rank"),
    }


def rope_metadata_of(rope):
    keys = {"{}.rope.freq_base": float(rope["rope_theta"])}
    if rope["rope_type"] in ("linear", "yarn"):
        keys |= {"{}.rope.scaling.type": rope["rope_type"], "{}.rope.scaling.factor": rope["factor"]}
    if rope["rope_type"] == "yarn":
        names = {"attention_factor": "attn_factor", "beta_fast": "beta_fast", "beta_slow": "beta_slow"}
        keys |= {"{}.rope.scaling.original_context_length": rope["original_max_position_embeddings"]}
        keys |= {f"{{}}.rope.scaling.yarn_{key}": rope[name] for name, key in names.items() if name in rope}
    return keys


def rope_factors(rope, head_dim):
    """By how much Llama 3.1 slows each frequency down, from the formula in llama.cpp's converter, in float32."""
    wavelengths = 2 * math.pi * rope["rope_theta"] ** (np.arange(0, head_dim, 2, dtype=np.float32) / head_dim)
    low, high, length = rope["low_freq_factor"], rope["high_freq_factor"], rope["original_max_position_embeddings"]
    smooth = np.clip((length / wavelengths - low) / (high - low), 0, 1)
    return (1 / ((1 - smooth) / rope["factor"] + smooth)).astype(np.float32)


def tensors_of(model):
    """The tensors that llama.cpp's converter writes for `model`, by the names that package `gguf` gives them."""
    config, state = model.config, model.state_dict()
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == config.model_type)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    if config.tie_word_embeddings:
        del state["lm_head.weight"]
    found = {}
    for name, tensor in state.items():
        stem, end = (name, "") if name.endswith(("A_log", ".D")) else name.rsplit(".", 1)
        array = as_stored(config, name, tensor.float().numpy())
        found[names.get_name(stem) + (end and "." + end)] = np.ascontiguousarray(array)
    rope = getattr(config, "rope_parameters", None) or {}
    if rope.get("rope_type") == "llama3":
        found["rope_freqs.weight"] = rope_factors(rope, model.model.layers[0].self_attn.head_dim)
    return found


def as_stored(config, name, array):
    if name.endswith("A_log"):
        return -np.exp(array)
    if name.endswith("conv1d.weight"):
        return array.squeeze(1)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads} if "self_attn" in name else {}
    for projection, count in heads.items():
        if projection in name and config.model_type == "llama":  # llama.cpp rotates neighbours, Transformers halves
            return array.reshape(count, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array


def write_gguf(path, model, keys=(), without=(), more=(), per_file=0):
    """Writes `model` as llama.cpp's converter does, apart from the differences that are given.

    Args:
        keys: metadata that is other or more; None leaves a key out.
        without: names of tensors to leave out.
        more: tensors to add, as arrays of float32.
        per_file: how many tensors go into each file of a split model; 0 writes one file.
    """
    arch = model.config.model_type
    writer = gguf.GGUFWriter(path, arch, split_max_tensors=per_file)
    for key, value in (metadata_of(model) | dict(keys)).items():
        write_key(writer, key.format(arch), value)
    for name, array in (tensors_of(model) | dict(more)).items():
        if name not in without:
            writer.add_tensor(name, array)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def write_key(writer, key, value):
    if key == "general.architecture":
        writer.kv_data[0].pop(key, None)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32}
    kinds |= {str: writer.add_string, list: writer.add_array}
    if value is not None:
        kinds[type(value)](key, value)


def assert_converts(path, model, **options):
    """The file at `path` gives `model`'s logits, in float64 and by its own configuration alone."""
    converted = convert(path, dtype="float64", **options)
    assert_same_logits(all_logits(converted, some_ids()), all_logits(model.double(), some_ids()), 1e-6)
    return converted


@pytest.mark.parametrize("name", GGUF_SOURCES)
def test_a_gguf_file_gives_the_sources_logits(name, tmp_path):
    """RoPE scaling in a GGUF file was lost: linear, yarn and Llama 3.1's moved the logits by 1.1 to 1.25."""
    model = gguf_source(name)
    converted = assert_converts(write_gguf(tmp_path / "model.gguf", model), model)
    assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == model.config.tie_word_embeddings


@pytest.mark.parametrize("name", ["llama", "qwen2_tied_head_size"])
@pytest.mark.parametrize("number", [1, 3, 5])
def test_any_file_of_a_split_model_gives_the_whole_model(name, number, tmp_path):
    """The first file of a split GGUF was converted alone, and the tensors of the others were random."""
    model = gguf_source(name)
    write_gguf(tmp_path / "model.gguf", model, per_file=math.ceil(len(tensors_of(model)) / 5))
    files = sorted(tmp_path.glob("*.gguf"))
    assert len(files) == 5
    assert_converts(files[number - 1], model)
    assert_converts(tmp_path, model, gguf_file=files[number - 1].name)


def test_a_split_model_brings_its_tokenizer_from_the_first_file(tmp_path):
    tokens = [*"abcdefghijklmnopqrstuvwxyz", "ab", "cd", "Ġ", *(f"<{number}>" for number in range(VOCAB - 29))]
    keys = {"tokenizer.ggml.model": "gpt2", "tokenizer.ggml.tokens": tokens, "tokenizer.ggml.merges": ["a b", "c d"]}
    keys |= {"tokenizer.ggml.bos_token_id": 29, "tokenizer.ggml.eos_token_id": 30}
    write_gguf(tmp_path / "model.gguf", gguf_source("qwen2"), keys, per_file=20)
    last = sorted(tmp_path.glob("*.gguf"))[-1]
    converted = convert(last, output_dir=tmp_path / "out")
    assert (converted.config.bos_token_id, converted.generation_config.eos_token_id) == (29, 30)
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("abz") == [26, 25]


def refused(path, message, monkeypatch, **options):
    """The source is refused before a model has memory, and nothing is written."""
    before = sorted(path.parent.iterdir())
    with monkeypatch.context() as patch:
        patch.setattr(conversion, "_build", None)
        with pytest.raises(ValueError, match=message):
            convert(path, output_dir=path.parent / "out", **options)
    assert sorted(path.parent.iterdir()) == before


def lose(files):
    files[1].unlink()


def lose_all_but_the_first(files):
    for file in files[1:]:
        file.unlink()


def swap(files):
    second = files[1].read_bytes()
    files[1].write_bytes(files[2].read_bytes())
    files[2].write_bytes(second)


def repeat(files):
    files[2].write_bytes(files[1].read_bytes())


def rename(files):
    files[0].rename(files[0].with_name("a.gguf"))


def recount(files):
    for file in files:
        file.rename(file.with_name(file.name.replace("of-00003", "of-00004")))


def take_another(files):
    write_gguf(files[0].parent / "other.gguf", gguf_source("llama"), per_file=10, without=["blk.0.ffn_up.weight"])
    others = sorted(files[0].parent.glob("other-*"))
    assert len(others) == 3
    files[1].write_bytes(others[1].read_bytes())


@pytest.mark.parametrize(
    ("harm", "message"),
    [
        (lose, r"one of 3 files of a split model: fetch the others, \['model-00002-of-00003.gguf'\]"),
        (lose_all_but_the_first, "'model-00002-of-00003.gguf', 'model-00003-of-00003.gguf'"),
        (swap, "is not file 2 of 3"),
        (repeat, "is not file 3 of 3"),
        (rename, "is not named ...-00001-of-00003.gguf"),
        (recount, "is not named ...-00001-of-00003.gguf"),
        (take_another, "hold the same tensor"),
    ],
)
def test_files_that_are_no_whole_split_model_are_refused(harm, message, tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", gguf_source("llama"), per_file=10)
    harm(sorted(tmp_path.glob("model-*")))
    first = sorted(path for path in tmp_path.iterdir() if "other" not in path.name)[0]
    refused(first, message, monkeypatch)


def test_a_split_model_with_fewer_tensors_than_it_promises_is_refused(tmp_path, monkeypatch):
    write_gguf(tmp_path / "model.gguf", gguf_source("llama"), per_file=10)
    last = sorted(tmp_path.glob("*.gguf"))[-1]
    content = last.read_bytes()
    place = content.index(b"split.tensors.count") + len(b"split.tensors.count") + 4
    last.write_bytes(content[:place] + (99).to_bytes(4, "little") + content[place + 4 :])
    refused(last, "hold 30 tensors and announce 99", monkeypatch)


KEY, ROPE = "{}.attention.", "{}.rope.scaling."
ONES = np.ones(4, np.float32)
# Every row is a file: its source, what is changed in it, and what the message names.
REFUSED_FILES = {
    "a tensor missing": ("llama", {"without": ["blk.1.ffn_up.weight"]}, r"missing.*blk\.1\.ffn_up\.weight"),
    "no biases": ("qwen2", {"without": [f"blk.{i}.attn_{p}.bias" for i in range(3) for p in "qkv"]}, r"attn_k\.bias"),
    "one bias": ("qwen2", {"without": ["blk.2.attn_v.bias"]}, r"missing in the source': \['blk\.2\.attn_v\.bias'\]"),
    "half of the biases": ("llama_biases", {"without": ["blk.0.attn_output.bias"]}, r"blk\.0\.attn_output\.bias"),
    "no embedding": ("llama", {"without": ["token_embd.weight"]}, "`token_embd.weight`"),
    "no norm": ("mamba", {"without": ["output_norm.weight"]}, r"missing.*output_norm\.weight"),
    "no state": ("mamba", {"without": ["blk.0.ssm_a"]}, r"missing.*blk\.0\.ssm_a"),
    "a block too many": ("llama", {"keys": {"{}.block_count": 4}}, r"missing.*blk\.3\."),
    "a block too few": ("llama", {"keys": {"{}.block_count": 2}}, r"not used.*blk\.2\."),
    "millions of blocks": ("llama", {"keys": {"{}.block_count": 10**7}}, "30 tensors for 10000000 blocks"),
    "norms of queries": ("llama", {"more": {"blk.0.attn_q_norm.weight": np.ones(8, np.float32)}}, "not used.*q_norm"),
    "other widths": ("llama", {"keys": {"{}.embedding_length": 48}}, r"of another shape.*attn_q\.weight \[32, 32\]"),
    "other heads": ("llama", {"keys": {KEY + "head_count_kv": 4}}, r"of another shape.*attn_k\.weight"),
    "uneven heads": ("llama", {"keys": {KEY + "head_count_kv": 3}}, "must be a multiple of `num_key_value_heads`"),
    "no heads": ("llama", {"keys": {KEY + "head_count": 0}}, "`llama.attention.head_count`.*is 0"),
    "heads as a word": ("llama", {"keys": {KEY + "head_count": "four"}}, "`llama.attention.head_count`.*'four'"),
    "heads by layer": ("llama", {"keys": {KEY + "head_count": [4, 4, 2]}}, "head_count.*differs by layer"),
    "widths by layer": ("llama", {"keys": {"{}.feed_forward_length": [48, 48, 40]}}, "differs by layer"),
    "values of another size": ("llama", {"keys": {KEY + "value_length": 4}}, "'attention.value_length': 4"),
    "part of a head turned": ("llama", {"keys": {"{}.rope.dimension_count": 4}}, "'rope.dimension_count': 4"),
    "a window": ("llama", {"keys": {KEY + "sliding_window": 8}}, "'llama.attention.sliding_window': 8"),
    "a softcap": ("qwen2", {"keys": {"{}.final_logit_softcapping": 30.0}}, "qwen2.final_logit_softcapping': 30"),
    "a softcap of scores": ("llama", {"keys": {"{}.attn_logit_softcapping": 50.0}}, "attn_logit_softcapping"),
    "experts": ("llama", {"keys": {"{}.expert_count": 8, "{}.expert_used_count": 2}}, "'llama.expert_count': 8"),
    "a scale of logits": ("llama", {"keys": {"{}.logit_scale": 0.25}}, "'llama.logit_scale': 0.25"),
    "no mask": ("llama", {"keys": {KEY + "causal": False}}, "'llama.attention.causal': False"),
    "a key of the future": ("llama", {"keys": {"{}.attention.new_kind": "spiral"}}, "'llama.attention.new_kind'"),
    "norms of dt": ("mamba", {"keys": {"{}.ssm.dt_b_c_rms": True}}, "'mamba.ssm.dt_b_c_rms': True"),
    "uneven channels": ("mamba", {"keys": {"{}.ssm.inner_size": 70}}, "`ssm.inner_size`.*is 70"),
    "no layers of attention": ("jamba", {"keys": {KEY + "head_count_kv": [0, 0, 0]}}, "head_count_kv.*0, 0, 0"),
    "another family": (
        "llama",
        {"keys": {"general.architecture": "gemma3"}},
        "'gemma3': convert a model with one of jamba",
    ),
    "families": (
        "llama",
        {"keys": {"general.architecture": ["llama", "qwen2"]}},
        "'qwen2'.*: convert a model with one of",
    ),
    "a split of words": ("llama", {"keys": {"split.count": "two"}}, "`split.count`.*'two' but must be a number"),
    "a split of lists": ("llama", {"keys": {"split.count": [1, 2]}}, "`split.count`.*1, 2. but must be a number"),
    "no family": ("llama", {"keys": {"general.architecture": None}}, "`general.architecture` None"),
    "an adapter": ("llama", {"keys": {"general.type": "adapter"}}, "holds a 'adapter'"),
    "no length": ("llama", {"keys": {"{}.context_length": None}}, "no `llama.context_length`"),
    "no epsilon": ("qwen2", {"keys": {KEY + "layer_norm_rms_epsilon": None}}, "no `qwen2.attention.layer_norm_rms_"),
    "no width": ("mamba", {"keys": {"{}.embedding_length": None}}, "no `mamba.embedding_length`"),
    "other words": ("llama", {"keys": {"{}.vocab_size": 99}}, "`llama.vocab_size`.*99 but the embedding has 61"),
    "longrope": ("llama", {"keys": {ROPE + "type": "longrope", ROPE + "factor": 4.0}}, "'longrope'"),
    "yarn without factor": ("llama", {"keys": {ROPE + "type": "yarn"}}, "'yarn'.*`rope.scaling.factor` is None"),
    "factor below zero": ("llama", {"keys": {ROPE + "factor": -2.0}}, "`rope.scaling.factor` is -2"),
    "factor of no number": ("llama", {"keys": {ROPE + "factor": math.nan}}, "`llama.rope.scaling.factor`.*nan"),
    "half a yarn": ("yarn", {"keys": {ROPE + "yarn_ext_factor": 0.5}}, "`rope.scaling.yarn_ext_factor`"),
    "yarn of DeepSeek": ("yarn", {"keys": {ROPE + "yarn_log_multiplier": 0.1}}, "`rope.scaling.yarn_log_multiplier`"),
    "theta below zero": ("llama", {"keys": {"{}.rope.freq_base": -1.0}}, "`rope.freq_base` is -1"),
    "theta as a word": ("llama", {"keys": {"{}.rope.freq_base": "big"}}, "`llama.rope.freq_base`.*'big'"),
    "theta as a switch": ("llama", {"keys": {"{}.rope.freq_base": True}}, "`llama.rope.freq_base`.*True"),
    "one frequency": ("llama3", {"keys": {"{}.rope.freq_base": 1.0}}, "`rope.freq_base` is 1.0.*above 1"),
    "factors twice": ("linear", {"more": {"rope_freqs.weight": np.arange(1, 5, dtype=np.float32)}}, "rope_freqs"),
    "factors that jump": ("llama", {"more": {"rope_freqs.weight": 1 + 7 * (ONES.cumsum() % 2)}}, "rope_freqs"),
    "factors of no number": ("llama", {"more": {"rope_freqs.weight": ONES * np.nan}}, "rope_freqs"),
    "too few factors": ("llama", {"more": {"rope_freqs.weight": ONES[:3]}}, r"rope_freqs.weight.*\(3,\)"),
    "factors for lengths": ("llama", {"more": {"rope_factors_long.weight": ONES}}, "not used.*rope_factors_long"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_a_file_that_says_more_than_can_be_computed_is_refused_by_name(name, tmp_path, monkeypatch):
    """Tensors that a GGUF file lacked became random numbers, and keys that nobody read were passed over."""
    source, changes, message = REFUSED_FILES[name]
    refused(write_gguf(tmp_path / "model.gguf", gguf_source(source), **changes), message, monkeypatch)


NEUTRAL_KEYS = {
    "{}.expert_count": 0,
    "{}.attention.sliding_window": 0,
    "{}.final_logit_softcapping": 0.0,
    "{}.logit_scale": 1.0,
    "{}.attention.causal": True,
    "{}.tensor_data_layout": "Meta AI original pth",
    "{}.rope.scaling.type": "none",
    "{}.rope.scaling.finetuned": True,
    "{}.attention.head_count": [4, 4, 4],
    "{}.attention.key_length": None,
    "{}.attention.value_length": None,
    "{}.rope.dimension_count": None,
    "{}.vocab_size": None,
}


def test_decay_rates_that_grow_are_refused(tmp_path):
    """Their logarithm is NaN, and so were all logits of the result."""
    model = gguf_source("mamba")
    with torch.no_grad():
        model.backbone.layers[1].mixer.A_log[3, 1] = -math.inf
    with pytest.raises(ValueError, match=r"`blk\.1\.ssm_a`.*not negative"):
        convert(write_gguf(tmp_path / "model.gguf", model))


def test_keys_that_change_nothing_are_no_reason_to_refuse_a_file(tmp_path):
    model = gguf_source("llama_head_size")
    factors = {"rope_freqs.weight": np.ones(6, np.float32)}
    assert_converts(write_gguf(tmp_path / "model.gguf", model, NEUTRAL_KEYS, more=factors), model)


def test_factors_and_keys_of_linear_scaling_without_a_type_are_linear_scaling(tmp_path):
    model = gguf_source("linear")
    without = {"{}.rope.scaling.type": None, "{}.rope.scaling.factor": None}
    old = write_gguf(tmp_path / "old.gguf", model, without | {"{}.rope.scale_linear": 2.5})
    untyped = write_gguf(tmp_path / "untyped.gguf", model, {"{}.rope.scaling.type": None})
    factors = {"rope_freqs.weight": np.full(4, 2.5, np.float32)}
    tensor = write_gguf(tmp_path / "tensor.gguf", model, without, more=factors)
    for path in (old, untyped, tensor):
        assert assert_converts(path, model).config.rope_parameters == LINEAR_ROPE


def test_the_attention_factor_of_a_file_multiplies_that_of_yarn(tmp_path):
    rope = YARN_ROPE | {"attention_factor": 1.5 * (0.1 * math.log(4.0) + 1)}
    model = new_source("Llama", ATTENTION | {"rope_parameters": rope})
    keys = {ROPE + "attn_factor": 1.5, ROPE + "yarn_attn_factor": None, ROPE + "yarn_beta_fast": -1.0}
    assert_converts(write_gguf(tmp_path / "model.gguf", model, keys), model)


@pytest.mark.parametrize("rope", [LLAMA31_ROPE, LLAMA32_ROPE], ids=["3.1", "3.2"])
@pytest.mark.parametrize("head_dim", [64, 128])
def test_llama_3s_scaling_is_recovered_as_it_was_configured(rope, head_dim):
    factors = torch.from_numpy(rope_factors(rope, head_dim))
    assert recover_scaling(factors, rope["rope_theta"], head_dim) | {"rope_theta": rope["rope_theta"]} == rope


@pytest.mark.parametrize("seed", range(200))
def test_any_scaling_of_llama_3s_kind_is_recovered_from_its_factors(seed):
    """The bands may hold no frequency, one or many; another set of parameters will do if its factors are the same."""
    draw = np.random.default_rng(seed)
    low = draw.uniform(0.5, 4)
    rope = {"rope_theta": 10 ** draw.uniform(1, 6), "factor": draw.uniform(1.5, 40), "low_freq_factor": low}
    rope |= {"high_freq_factor": low * draw.uniform(1.05, 8)}
    rope |= {"original_max_position_embeddings": int(2 ** draw.uniform(3, 17))}
    head_dim = int(2 * draw.integers(1, 65))
    factors = rope_factors(rope, head_dim)
    found = recover_scaling(torch.from_numpy(factors), rope["rope_theta"], head_dim)
    if found["rope_type"] == "llama3":
        again = rope_factors(found | {"rope_theta": rope["rope_theta"]}, head_dim)
    else:
        again = np.full_like(factors, found.get("factor", 1.0))
    np.testing.assert_allclose(1 / again, 1 / factors, atol=2e-6)


def test_a_damaged_file_is_refused_wherever_it_was_cut(tmp_path):
    """A cut file was a traceback of any of six kinds."""
    whole = write_gguf(tmp_path / "model.gguf", gguf_source("llama_tied")).read_bytes()
    cut = tmp_path / "cut.gguf"
    for length in [*range(0, 1600, 37), *range(1600, len(whole) - 1, 4001), len(whole) - 100]:
        cut.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=r"cut\.gguf"):
            convert(cut)


@pytest.mark.slow
def test_bytes_that_were_changed_are_refused_or_do_no_harm(tmp_path):
    whole = write_gguf(tmp_path / "model.gguf", gguf_source("llama_tied")).read_bytes()
    end, draw, outcomes = whole.index(b"output_norm.weight"), np.random.default_rng(0), set()
    for _ in range(150):
        content = bytearray(whole)
        content[draw.integers(4, end)] = draw.integers(256)
        (tmp_path / "changed.gguf").write_bytes(content)
        try:
            convert(tmp_path / "changed.gguf")
            outcomes.add("converted")
        except ValueError:
            outcomes.add("refused")
    assert outcomes == {"converted", "refused"}


@pytest.mark.parametrize(
    "content", [b"", b"GGUF", b"GGML" + bytes(99), b"PK\x03\x04" + bytes(99), b"GGUF" + bytes(99)]
)
def test_a_file_that_is_no_gguf_file_is_refused(content, tmp_path):
    (tmp_path / "model.gguf").write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.gguf.*[Ff]etch it again"):
        convert(tmp_path / "model.gguf")


def test_files_without_the_package_that_reads_them_say_what_to_install(tmp_path, monkeypatch):
    path = write_gguf(tmp_path / "model.gguf", gguf_source("llama"))
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(ImportError, match=r"pip install mambaformer\[demo\]"):
        convert(path)
