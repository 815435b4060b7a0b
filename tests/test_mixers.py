"""The mixer protocol: a mixer comes in by one file and one row, and nothing else asks which one it is."""

import re

import pytest
import torch

from cases import ROOT, feed_row, random_rows, shared_model, tiny_config
from mambaformer import MambaFormerConfig, MambaFormerForCausalLM
from mambaformer import decode_program_mambaformer as program
from mambaformer.mixer_registry_mambaformer import MIXERS, RECURRENT_MIXERS, check_can_be_split, tensor_parallel_plan


def test_no_product_file_knows_the_toy_mixer():
    for path in ROOT.glob("*_mambaformer.py"):
        assert not re.search(r"\bgla\b|gated_linear_attention", path.read_text()), path


def test_an_unknown_recurrent_mixer_is_refused_with_the_known_ones():
    config = MambaFormerConfig(recurrent_mixer="mamba7")
    with pytest.raises(ValueError, match=r"`recurrent_mixer` is 'mamba7': choose one of .*'mamba'"):
        MambaFormerForCausalLM(config)


def test_a_decode_program_runs_a_mixer_without_a_lowering_between_its_parts(monkeypatch):
    """Attention and MLP of the other layers go through the kernel, and give what PyTorch gives."""
    model, row = shared_model("another_mixer"), random_rows(3)[0]
    runs, run = [], program._Layers.run
    monkeypatch.setattr(program._Layers, "run", lambda *arguments: runs.append(run(*arguments)) or runs[-1])
    cache, found = model.make_cache(), []
    for token in row:
        found.append(feed_row(model, cache, [token]))
    has_kernel = program.kernel_of("run_blocks", torch.float64) is not None
    assert [each is not None for each in runs] == [True] * (len(row) if has_kernel else 0)
    monkeypatch.setattr(program._Layers, "may_run", lambda self: False)
    cache = model.make_cache()
    wanted = [feed_row(model, cache, [token]) for token in row]
    torch.testing.assert_close(torch.cat(found), torch.cat(wanted), rtol=0, atol=1e-12)


def test_the_plan_of_tensor_parallelism_has_the_mixers_that_are_used():
    plan = tensor_parallel_plan(tiny_config("everything"))
    for mixer in (*MIXERS.values(), RECURRENT_MIXERS["mamba"]):
        for name, style in mixer.tensor_parallel_plan.items():
            assert plan[f"layers.*.{name}"] == style
    assert not [name for name in tensor_parallel_plan(tiny_config("full")) if "mamba" in name or "mlp" in name]


def test_processes_that_do_not_divide_heads_or_channels_are_refused_by_name():
    check_can_be_split(tiny_config("everything"), 2)
    with pytest.raises(ValueError, match=r"'num_key_value_heads'.*over 4 processes"):
        check_can_be_split(tiny_config("everything"), 4)
    with pytest.raises(ValueError, match=r"'mamba_expand \* hidden_size'"):
        check_can_be_split(tiny_config("mamba", mamba_expand=1.5), 32)
