"""The mixer protocol: a mixer comes in by one file and one row, and nothing else asks which one it is."""

import re

import pytest
import torch

from mambaformer import MambaFormerConfig, MambaFormerForCausalLM
from mambaformer import decode_program_mambaformer as program
from mambaformer.configuration_mambaformer import TENSOR_PARALLEL_PLANS
from mambaformer.mixer_registry_mambaformer import check_can_be_split
from oracle import assert_same_logits, expected
from patterns import ROOT, tiny_config
from sequences import feed_row, random_rows
from tiny_models import random_model, shared_model


def test_no_product_file_knows_the_toy_mixer():
    for path in ROOT.glob("*_mambaformer.py"):
        assert not re.search(r"\bgla\b|gated_linear_attention", path.read_text()), path


def test_an_unknown_recurrent_mixer_is_refused_with_the_known_ones():
    config = MambaFormerConfig(recurrent_mixer="mamba7")
    with pytest.raises(ValueError, match=r"`recurrent_mixer` is 'mamba7': choose one of .*'mamba'"):
        MambaFormerForCausalLM(config)


BAD_SIZES = {
    "groups that do not divide heads": ({"mamba_num_groups": 3}, r"`mamba_num_heads` \(4\) must be a multiple"),
    "limits in the wrong order": ({"time_step_limit": [0.5, 0.1]}, "`time_step_limit` must be ascending"),
    "one limit": ({"time_step_limit": [0.5]}, "`time_step_limit` must be the smallest and the largest step"),
    "an unknown norm": ({"mamba_gated_norm": "inside"}, "`mamba_gated_norm` must be one of"),
}


@pytest.mark.parametrize(("fields", "message"), BAD_SIZES.values(), ids=BAD_SIZES)
def test_sizes_of_a_mixer_that_contradict_each_other_are_refused_by_name(fields, message):
    with pytest.raises(ValueError, match=message):
        tiny_config("mamba2", **fields)


def test_sizes_of_a_mixer_that_are_left_out_follow_from_the_others():
    config = MambaFormerConfig(recurrent_mixer="mamba2", hidden_size=256, mamba_head_dim=32)
    assert config.mamba_num_heads == 16
    config = MambaFormerConfig(recurrent_mixer="gated_delta", linear_num_value_heads=32)
    assert (config.linear_num_key_heads, config.linear_num_value_heads) == (8, 32)
    assert (config.linear_key_head_dim, config.linear_value_head_dim) == (64, 64)


@pytest.mark.parametrize("norm", ["none", "before_gate", "after_gate"])
def test_mamba2_has_the_norm_of_its_configuration(norm):
    model, rows = random_model(tiny_config("mamba2", mamba_gated_norm=norm)), random_rows(4)
    assert any("mamba2.norm" in name for name in model.state_dict()) == (norm != "none")
    found = [feed_row(model, model.make_cache(), row) for row in rows]
    assert_same_logits(found, expected(model, rows))


@pytest.mark.parametrize("pattern", ["mamba2", "gated_delta"])
def test_initial_decays_and_steps_are_in_their_ranges(pattern):
    model = MambaFormerForCausalLM(tiny_config(pattern, hidden_size=64, num_attention_heads=8))
    for name, weight in model.named_parameters():
        if name.endswith("A_log"):
            assert weight.exp().min() >= 1 and weight.exp().max() <= 16 and weight.std() > 0
        if name.endswith("dt_bias"):
            steps = torch.nn.functional.softplus(weight)
            assert steps.min() >= 0.00099 and steps.max() <= 0.101 and steps.std() > 0


@torch.no_grad()
@pytest.mark.parametrize("pattern", ["mamba2", "gated_delta", "conv"])
def test_prompts_of_many_chunks_equal_single_tokens(pattern):
    model = shared_model(pattern)
    ids = torch.tensor(random_rows(5, lengths=(150,)))
    cache = model.make_cache()
    alone = torch.cat([model(each, cache=cache).logits for each in ids.split(1, dim=1)], dim=1)
    assert_same_logits(model(ids, use_cache=False).logits, alone)


def test_a_decode_program_runs_a_mixer_without_a_lowering_between_its_parts(monkeypatch):
    """Attention and MLP of the other layers go through the kernel, and give what PyTorch gives."""
    model, row = shared_model("another_mixer"), random_rows(3)[0]
    runs, run = [], program.DecodeProgram.run
    monkeypatch.setattr(program.DecodeProgram, "run", lambda *arguments: runs.append(run(*arguments)) or runs[-1])
    cache, found = model.make_cache(), []
    for token in row:
        found.append(feed_row(model, cache, [token]))
    has_kernel = program.kernel_of("run_program", torch.float64) is not None
    assert [each is not None for each in runs] == [True] * (len(row) if has_kernel else 0)
    monkeypatch.setattr(program.DecodeProgram, "may_run", lambda self: False)
    cache = model.make_cache()
    wanted = [feed_row(model, cache, [token]) for token in row]
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted), rtol=0, atol=1e-12)


@torch.no_grad()
@pytest.mark.parametrize("names", [{"self_attn"}, {"mlp"}, {"self_attn", "mlp"}], ids=sorted)
def test_mixers_of_any_kind_run_as_modules_between_parts_of_a_program(names, monkeypatch):
    head_dim = 6 if "self_attn" in names else 16  # 6 is no multiple of the width of a vector
    model = random_model(tiny_config("everything", head_dim=head_dim))
    for layer in model.model.layers if "mlp" in names else ():
        layer.mlp.act_fn = torch.nn.GELU()
    row, parts = random_rows(3)[0], []
    run = program.LayerStep.run
    monkeypatch.setattr(program.LayerStep, "run", lambda step, *rest: parts.append(step.name) or run(step, *rest))

    def decode():
        cache = model.make_cache()
        return torch.cat([feed_row(model, cache, [token]) for token in row])

    found, called = decode(), set(parts)
    monkeypatch.setattr(program.DecodePrograms, "run", lambda *_: None)
    assert torch.equal(found, decode())
    if program.kernel_of("run_program", torch.float64) is not None:
        assert called == names


def test_the_plan_of_tensor_parallelism_has_the_mixers_that_are_used():
    plan = tiny_config("everything").base_model_tp_plan
    for modules in TENSOR_PARALLEL_PLANS.values():
        for name, style in modules.items():
            assert plan[f"layers.*.{name}"] == style
    assert not [name for name in tiny_config("full").base_model_tp_plan if "mamba" in name or "mlp" in name]


def test_a_saved_configuration_alone_has_the_plan_of_tensor_parallelism(tmp_path):
    config = tiny_config("everything")
    config.save_pretrained(tmp_path)
    assert "base_model_tp_plan" not in (tmp_path / "config.json").read_text()
    assert MambaFormerConfig.from_pretrained(tmp_path).base_model_tp_plan == config.base_model_tp_plan


def test_each_row_of_the_plan_names_modules_that_the_mixer_has():
    model = MambaFormerForCausalLM(tiny_config("everything"))
    names = {re.sub(r"layers\.\d+", "layers.*", name) for name, _ in model.model.named_modules()}
    assert model.config.base_model_tp_plan.keys() <= names


def test_processes_that_do_not_divide_heads_or_channels_are_refused_by_name():
    check_can_be_split(tiny_config("everything"), 2)
    with pytest.raises(ValueError, match=r"'num_key_value_heads'.*over 4 processes"):
        check_can_be_split(tiny_config("everything"), 4)
    with pytest.raises(ValueError, match=r"'mamba_expand \* hidden_size'"):
        check_can_be_split(tiny_config("mamba", mamba_expand=1.5), 32)
