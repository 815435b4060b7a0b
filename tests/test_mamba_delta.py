"""Mamba weights are saved without the source that they were trained with, and fit that source alone."""

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file

from mambaformer import convert, save_mamba_delta
from mambaformer.convert import load_mamba_delta
from mambaformer.convert.cli import main

SIZES = {"vocab_size": 40, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 3}
SIZES |= {"num_attention_heads": 4, "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": None}
WINDOWED = {"upcycle": [0, 2], "window": 4, "num_sink_tokens": 1}
WINDOWED["mamba"] = {"mamba_expand": 0.5, "mamba_d_state": 5, "time_step_min": 2e-4}


def llama(seed: int = 0, scale: float = 1.0, **fields):
    torch.manual_seed(seed)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SIZES | fields))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, scale / parameter.shape[1] ** 0.5)
    return model.eval()


def mistral():
    return transformers.MistralForCausalLM(transformers.MistralConfig(**SIZES, sliding_window=4)).eval()


def trained(source, **options):
    """A hybrid whose Mamba weights are no longer those of the conversion, in numbers that bfloat16 holds."""
    hybrid = convert(source, **options)
    with torch.no_grad():
        for name, parameter in hybrid.named_parameters():
            if "mamba" in name:
                parameter.add_(torch.randn_like(parameter) * 0.3)
                parameter.copy_(parameter.bfloat16())
    return hybrid


def logits(model):
    with torch.no_grad():
        return model(torch.arange(24).view(2, 12) % 40).logits


@pytest.fixture
def file(tmp_path):
    save_mamba_delta(trained(llama(), **WINDOWED), tmp_path / "mamba_delta.safetensors", metadata={"tokens": 3})
    return tmp_path / "mamba_delta.safetensors"


@pytest.mark.parametrize(
    ("source", "options"), [(llama, WINDOWED), (llama, {"upcycle": "all"}), (mistral, {"upcycle": [1]})]
)
def test_a_delta_applied_to_its_source_gives_the_hybrid_back(source, options, tmp_path):
    torch.manual_seed(0)
    model = source()
    hybrid = trained(model, **options)
    save_mamba_delta(hybrid, tmp_path / "mamba_delta.safetensors")
    again = convert(model, mamba_delta=tmp_path / "mamba_delta.safetensors")
    assert again.config.to_dict() == hybrid.config.to_dict()
    assert torch.equal(logits(again), logits(hybrid))
    assert not torch.equal(logits(again), logits(convert(model, **options)))


def test_a_delta_holds_the_mamba_weights_and_nothing_else(file):
    tensors = load_file(file)
    assert {name.split(".")[3] for name in tensors} == {"mamba", "mamba_layernorm"}
    assert {name.split(".")[2] for name in tensors} == {"0", "2"}
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}
    assert load_mamba_delta(file).metadata == {"tokens": 3}


def test_the_command_applies_a_delta_to_a_folder(file, tmp_path):
    source = llama()
    source.save_pretrained(tmp_path / "source")
    assert main([str(tmp_path / "source"), str(tmp_path / "out"), "--mamba-delta", str(file)]) == 0
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert torch.equal(logits(loaded), logits(convert(source, mamba_delta=file)))


REFUSED = {
    "other_weights": (lambda: llama(seed=1, scale=2.0), {}, "trained with other attention weights: `model.layers.0"),
    "other_depth": (lambda: llama(num_hidden_layers=4), {}, "do not fit the source, in .*layer_types"),
    "other_width": (lambda: llama(hidden_size=48), {}, "do not fit the source, in .*mamba"),
    "other_window": (mistral, {}, "do not fit the source, in .*layer_types"),
    "needless": (llama, {"upcycle": "all", "window": 4}, r"`mamba_delta` defines \['upcycle', 'window'\]"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_deltas_that_were_trained_with_other_weights_are_refused(name, file):
    source, options, message = REFUSED[name]
    with pytest.raises(ValueError, match=message):
        convert(source(), mamba_delta=file, **options)


def test_quantizing_the_source_makes_it_no_other_model(file):
    source = llama()
    with torch.no_grad():
        for parameter in source.parameters():
            step = parameter.abs().amax() / 8
            parameter.copy_((parameter / step).round() * step)
    assert convert(source, mamba_delta=file).config.layer_types == [
        "hybrid_sliding",
        "full_attention",
        "hybrid_sliding",
    ]


def test_a_damaged_file_is_refused(file):
    data = bytearray(file.read_bytes())
    data[-1] ^= 1
    file.write_bytes(data)
    with pytest.raises(ValueError, match="checksum mismatch"):
        convert(llama(), mamba_delta=file)
    save_file({"a": torch.ones(1)}, file)
    with pytest.raises(ValueError, match="not of format 'mambaformer-blocks'"):
        convert(llama(), mamba_delta=file)


def test_a_model_with_layers_of_mamba_alone_is_refused(tmp_path):
    own = transformers.MambaForCausalLM(transformers.MambaConfig(vocab_size=40, hidden_size=16, num_hidden_layers=1))
    for model in (convert(llama()), convert(own)):
        with pytest.raises(ValueError, match="`layer_types`"):
            save_mamba_delta(model, tmp_path / "mamba_delta.safetensors")
    assert not list(tmp_path.iterdir())
