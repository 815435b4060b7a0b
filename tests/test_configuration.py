"""The configuration says what a model is, and refuses what it cannot be."""

import dataclasses
import json
import time

import pytest
import torch

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM
from mambaformer.configuration_mambaformer import ARGUMENT_KINDS, FIELD_KINDS, MAX_LAYERS, ROPE_KINDS, ROPE_REQUIRED

ROPE = {"rope_type": "default", "rope_theta": 500.0}


def test_the_default_is_the_mambaformer_of_the_paper():
    config = MambaFormerConfig(num_hidden_layers=4)
    assert config.layer_types == ["linear_attention", "hybrid", "hybrid", "hybrid"]
    assert config.rope_parameters is None and config.intermediate_size is None
    assert config.mixers(0) == ("recurrent",) and config.mixers(1) == ("attention", "recurrent")


def test_expert_vectors_are_read_under_their_older_name():
    config = MambaFormerConfig.from_dict({"experts": ["bold"]})
    assert config.expert_vectors == ["bold"] and "experts" not in config.to_dict()
    assert MambaFormerConfig.from_dict({"experts": None}).expert_vectors is None
    with pytest.raises(ValueError, match="`expert_vectors` must be a list of names"):
        MambaFormerConfig.from_dict({"experts": ["../x"]})


@pytest.mark.parametrize("fields", [{}, {"rope_parameters": ROPE, "expert_vectors": ["bold"]}, {"mamba_dt_rank": 7}])
def test_a_saved_configuration_comes_back_the_same(fields, tmp_path):
    config = MambaFormerConfig(**fields)
    config.save_pretrained(tmp_path)
    again = MambaFormerConfig.from_pretrained(tmp_path)
    assert again.to_diff_dict() == config.to_diff_dict()
    assert MambaFormerConfig.from_dict(config.to_dict()).rope_parameters == config.rope_parameters


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"layer_types": ["retention"] * 8}, "`layer_types` has unknown entries"),
        ({"layer_types": ["hybrid"]}, "`layer_types` has 1 entries"),
        ({"hidden_size": 0}, "`hidden_size` must be a positive integer"),
        ({"num_hidden_layers": 2.5}, "`num_hidden_layers` must be a positive integer"),
        ({"mamba_d_state": True}, "`mamba_d_state` must be a positive integer"),
        ({"mamba_expand": 0}, "`mamba_expand` must be a positive number"),
        ({"mamba_expand": 0.4, "hidden_size": 32}, "makes `mamba_expand \\* hidden_size` an integer, got 0.4"),
        ({"mamba_dt_rank": "half"}, "`mamba_dt_rank` must be a positive integer"),
        ({"num_key_value_heads": 3}, "multiple of `num_key_value_heads`"),
        ({"layer_types": ["hybrid_sliding"] * 8}, "`sliding_window` is None"),
        ({"layer_types": ["hybrid_sliding"] * 8, "sliding_window": 0}, "`sliding_window` must be a positive integer"),
        ({"num_sink_tokens": -1}, "`num_sink_tokens` must be"),
        ({"hidden_act": "gelu"}, "`hidden_act` is 'gelu'"),
        ({"time_step_min": 0.2}, "`time_step_min`"),
        ({"rope_parameters": {"rope_type": "dynamic", "rope_theta": 1.0, "factor": 2.0}}, "rope_type 'dynamic'"),
        ({"rope_parameters": {"rope_type": "linear", "rope_theta": 1.0}}, "need a `factor`"),
        ({"rope_parameters": ROPE, "head_dim": 3}, "`head_dim` must be even"),
        ({"rope_parameters": ROPE | {"partial_rotary_factor": 0.5}}, "partial_rotary_factor"),
        ({"attention_dropout": 1.5}, "`attention_dropout`"),
        ({"rms_norm_eps": 0.0}, "`rms_norm_eps`"),
        ({"pad_token_id": 32000}, "`pad_token_id`"),
        ({"expert_vectors": "bold"}, "`expert_vectors` must be a list"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        MambaFormerConfig(**fields)


# ----------------------------------------------------------------------------------- every field, every other type

NAN, INF = float("nan"), float("inf")
ANYTHING = [None, True, 0, 3, -7, 2.5, NAN, INF, -INF, 1e300, 10**400, 10**5000, "", "x", "../x", b"x"]
ANYTHING += [[], [None], [1.5], ["../x"], [[1]], (), {}, {"x": 1}, {"full_attention": 3}, {1: {}}, object, float]
FIELDS = [field.name for field in dataclasses.fields(MambaFormerConfig) if field.name != "transformers_version"]
LLAMA3 = {"rope_type": "llama3", "rope_theta": 500.0, "factor": 8, "low_freq_factor": 1, "high_freq_factor": 4}
ROPES = {
    "default": {"rope_type": "default", "rope_theta": 500},
    "linear": {"rope_type": "linear", "rope_theta": 500, "factor": 2},
    "llama3": LLAMA3 | {"original_max_position_embeddings": 4096},
    "yarn": {"rope_type": "yarn", "rope_theta": 500, "factor": 2, "original_max_position_embeddings": 4096},
}
SMALL = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 3, "num_attention_heads": 2}


def refusal_of(**fields):
    """The message of the `ValueError`, or `None` where the fields are allowed; anything else comes out."""
    try:
        MambaFormerConfig(**SMALL | fields)
    except ValueError as error:
        return str(error)
    return None


def logits_of(**fields):
    with torch.no_grad():
        return MambaFormerForCausalLM(MambaFormerConfig(**SMALL | fields)).eval()(torch.arange(9)[None]).logits


def test_the_table_of_kinds_has_every_field():
    assert FIELD_KINDS.keys() == set(FIELDS)


@pytest.mark.parametrize("name", [*FIELDS, *ARGUMENT_KINDS])
def test_a_field_of_another_type_is_refused_by_name(name):
    """A string or a list in a config.json was a `TypeError`, or no error before the first forward."""
    refused = {index: refusal_of(**{name: value}) for index, value in enumerate(ANYTHING)}
    messages = [message for message in refused.values() if message is not None]
    assert len(messages) >= 12
    mentioned = {"rope_parameters": "rope_"}.get(name, name)
    assert all(mentioned in message for message in messages), messages
    assert all(len(message) < 1500 for message in messages)


@pytest.mark.parametrize("name", ROPE_KINDS)
@pytest.mark.parametrize("rope_type", ROPES)
def test_a_rope_value_of_another_type_or_out_of_range_is_refused_by_name(rope_type, name):
    """`rope_theta` of 0 or "x" was taken and made the logits NaN, or was a `TypeError` in the first forward."""
    wrong = [[], "x", "1", NAN, INF, -1.0, {"x": 1}, [1.0], 10**400, (1,), b"1"]
    wrong += [] if name == "truncate" else [True]
    wrong += [0, None] if name in ROPE_REQUIRED[rope_type] else []
    for value in wrong:
        message = refusal_of(rope_parameters=ROPES[rope_type] | {name: value})
        assert message and name in message, value


@pytest.mark.parametrize("rope_type", ROPES)
def test_each_rope_type_says_which_value_it_lacks(rope_type):
    for name in ROPE_REQUIRED[rope_type]:
        left = {key: value for key, value in ROPES[rope_type].items() if key != name}
        message = refusal_of(rope_parameters=left)
        # Transformers fills these in.
        is_filled = name in ("rope_theta", "original_max_position_embeddings")
        assert message is None if is_filled else name in message


@pytest.mark.parametrize("rope_type", ROPES)
def test_each_rope_type_with_the_values_it_needs_gives_finite_logits(rope_type):
    assert logits_of(rope_parameters=ROPES[rope_type]).isfinite().all()


@pytest.mark.parametrize(
    ("parameters", "name"),
    [
        (ROPES["llama3"] | {"high_freq_factor": 1.0}, "high_freq_factor"),
        (ROPES["llama3"] | {"low_freq_factor": 9.0}, "high_freq_factor"),
        (ROPES["yarn"] | {"beta_fast": 1, "beta_slow": 32}, "beta_fast"),
        (ROPES["yarn"] | {"rope_theta": 1}, "rope_theta"),
        ({"rope_type": ["yarn"]}, "rope_type"),
        ({"rope_type": None}, "rope_type"),
        ({"type": "su", "factor": 2.0}, "rope_type"),
        ({"full_attention": ROPES["default"]}, "full_attention"),
    ],
)
def test_rope_values_that_contradict_each_other_are_refused(parameters, name):
    """`high_freq_factor` equal to `low_freq_factor` divides by zero, and so does the base 1 of YaRN."""
    for field in ("rope_parameters", "rope_scaling"):
        assert name in refusal_of(**{field: parameters})


def test_the_older_names_of_rope_values_are_checked_as_the_new_ones():
    assert refusal_of(rope_theta=100, rope_scaling={"type": "linear", "factor": 2}) is None
    for theta in (0, -1.0, "x", NAN, []):
        assert "rope_theta" in refusal_of(rope_theta=theta)


@pytest.mark.parametrize("layers", [10**7, MAX_LAYERS + 1, 2**40])
def test_a_number_of_layers_that_no_machine_holds_is_refused_at_once(layers):
    """10^7 layers without `layer_types` built a list of 10^7 entries, and the model after it never ended."""
    start = time.perf_counter()
    assert "`num_hidden_layers` must be" in refusal_of(num_hidden_layers=layers)
    assert time.perf_counter() - start < 0.5
    assert refusal_of(num_hidden_layers=MAX_LAYERS) is None


@pytest.mark.parametrize("name", ["mixers", "window", "to_dict", "mamba_intermediate_size", "_check"])
def test_a_key_that_would_replace_a_method_is_refused(name):
    """Sibling: a config.json with the key "mixers" replaced the method, and building the model called an integer."""
    assert f"`{name}` cannot be set" in refusal_of(**{name: 3})


@pytest.mark.parametrize("name", ["../../etc/x", "a/b", ".hidden", "", "a\\b"])
def test_names_of_experts_are_no_paths(name):
    """Sibling: they become `expert_vectors/{name}.safetensors` when a model is loaded."""
    assert "`expert_vectors` must be a list of names" in refusal_of(expert_vectors=[name])


def test_configurations_of_today_keep_loading(tmp_path):
    """JSON writes 1 for 1.0, and older files have older names, labels and arguments of Transformers."""
    config = MambaFormerConfig(**SMALL)
    config.save_pretrained(tmp_path)
    said = json.loads((tmp_path / "config.json").read_text())
    said |= {"time_step_max": 1, "mamba_expand": 2.0, "attention_dropout": 0, "initializer_range": 1}
    said |= {"rope_theta": 10000, "rope_scaling": {"type": "linear", "factor": 2}, "torch_dtype": "bfloat16"}
    said |= {"id2label": {"0": "no", "1": "yes"}, "label2id": {"no": 0, "yes": 1}, "eos_token_id": [2, 3]}
    said |= {"problem_type": "single_label_classification", "somebody's own": {"a": [1]}, "pad_token_id": -1}
    said |= {"bos_token_id": 1, "output_attentions": False, "name_or_path": "x", "auto_map": {"AutoModel": "a.b"}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    again = MambaFormerConfig.from_pretrained(tmp_path, attn_implementation="eager")
    assert (again.rope_parameters["factor"], again.dtype, again.num_labels) == (2, torch.bfloat16, 2)
    again.save_pretrained(tmp_path / "again")
    assert MambaFormerConfig.from_pretrained(tmp_path / "again").to_diff_dict() == again.to_diff_dict()
