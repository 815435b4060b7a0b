"""The configuration says what a model is, and refuses what it cannot be."""

import pytest

from mambaformer import MambaFormerConfig

ROPE = {"rope_type": "default", "rope_theta": 500.0}


def test_the_default_is_the_mambaformer_of_the_paper():
    config = MambaFormerConfig(num_hidden_layers=4)
    assert config.layer_types == ["linear_attention", "hybrid", "hybrid", "hybrid"]
    assert config.rope_parameters is None and config.intermediate_size is None
    assert config.mixers(0) == ("mamba",) and config.mixers(1) == ("attention", "mamba")


@pytest.mark.parametrize("fields", [{}, {"rope_parameters": ROPE, "experts": ["bold"]}, {"mamba_dt_rank": 7}])
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
        ({"mamba_expand": 0.4, "hidden_size": 32}, "makes `mamba_expand \\* hidden_size` whole, got 0.4"),
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
        ({"experts": "bold"}, "`experts` must be a list"),
    ],
)
def test_a_field_that_cannot_be_is_named_with_the_fix(fields, message):
    with pytest.raises(ValueError, match=message):
        MambaFormerConfig(**fields)
