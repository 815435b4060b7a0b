"""Packed sequences below the model and at its edges: the two operations of Mamba, refusals, attention weights."""

import pytest
import torch

from mambaformer import MambaFormerForSequenceClassification
from mambaformer import ops_backends_mambaformer as backends
from mambaformer.ops_mambaformer import causal_conv1d, selective_scan
from oracle import assert_same_logits, expected
from patterns import tiny_config
from sequences import random_rows
from tiny_models import random_model, shared_model

LENGTHS = (5, 1, 40, 2, 33, 3)  # within a chunk of the kernels, across two, and shorter than a convolution
ROWS = random_rows(3, LENGTHS)
IDS = torch.tensor([[token for row in ROWS for token in row]])
BORDERS = [0, 5, 6, 46, 48, 81, 84]
RESTARTS = torch.cat([torch.arange(length) for length in LENGTHS])[None]
NUMBERS = (RESTARTS == 0).cumsum(1) - 1


def alone(rows):
    return rows[0].split(LENGTHS)


def gradients(outputs, leaves):
    weights = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).view_as(outputs)
    return torch.autograd.grad((outputs * weights).sum(), leaves)


def leaves_of(*shapes):
    source = torch.Generator().manual_seed(0)
    return [torch.randn(shape, generator=source, dtype=torch.float64).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("with_kernels", [True, False])
@pytest.mark.parametrize("taps", [1, 2, 4])
def test_a_convolution_meets_only_inputs_of_its_own_sequence(taps, with_kernels, monkeypatch):
    if not with_kernels:
        monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(backends.BACKENDS, ()))
    leaves = x, weight, bias = leaves_of((1, 84, 6), (6, taps), (6,))
    found = causal_conv1d(x, weight, bias, positions=RESTARTS)[0]
    wanted = torch.cat([causal_conv1d(part[None], weight, bias)[0] for part in alone(x)], dim=1)
    assert_same_logits(found, wanted)
    for one, other in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
        assert_same_logits(one, other)


@pytest.mark.parametrize("with_kernels", [True, False])
def test_a_scan_starts_from_zeros_at_every_sequence(with_kernels, monkeypatch):
    if not with_kernels:
        monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(backends.BACKENDS, ()))
    sizes = [(1, 84, 6)] * 2 + [(6, 4)] + [(1, 84, 4)] * 2 + [(6,), (1, 84, 6)]
    leaves = u, dt, A, B, C, D, gate = leaves_of(*sizes)
    options = {"dt_softplus": True, "A_is_log": True}
    found = selective_scan(u, dt, A, B, C, D, gate, positions=RESTARTS, **options)[0]
    parts = zip(*(alone(tensor) for tensor in (u, dt, B, C, gate)), strict=True)
    wanted = [
        selective_scan(u[None], dt[None], A, B[None], C[None], D, gate[None], **options)[0]
        for u, dt, B, C, gate in parts
    ]
    wanted = torch.cat(wanted, dim=1)
    assert_same_logits(found, wanted)
    for one, other in zip(gradients(found, leaves), gradients(wanted, leaves), strict=True):
        assert_same_logits(one, other)


@pytest.mark.parametrize("name", ["cu_seqlens", "cu_seqlens_q", "cu_seq_lens_k"])
@pytest.mark.parametrize("pattern", ["mamba", "sliding_sinks", "everything"])
@torch.no_grad()
def test_cumulative_lengths_keep_sequences_apart_under_every_name(pattern, name):
    """`cu_seq_lens` and `seq_idx` vanished in `**kwargs`, and sequences saw each other."""
    model = shared_model(pattern)
    logits = model(IDS, **{name: torch.tensor(BORDERS, dtype=torch.int32)}).logits
    assert_same_logits(list(alone(logits)), expected(model, ROWS))


@torch.no_grad()
def test_positions_may_restart_in_some_rows_only():
    model, rows = shared_model("everything"), random_rows(4, (4, 5, 9))
    ids = torch.tensor([rows[0] + rows[1], rows[2]])
    positions = torch.tensor([[7, 8, 9, 10, 0, 1, 2, 3, 4], list(range(9))])
    found = model(ids, position_ids=positions).logits
    assert_same_logits([found[0, :4], found[0, 4:], found[1]], expected(model, rows))


@torch.no_grad()
def test_positions_that_jump_ahead_stay_in_one_sequence():
    """Training for longer contexts skips positions within a sequence."""
    model, (row,) = shared_model("mamba"), random_rows(5, (8,))
    positions = torch.tensor([[0, 1, 2, 40, 41, 90, 91, 92]])
    assert_same_logits(model(torch.tensor([row]), position_ids=positions).logits[0], expected(model, [row])[0])


@torch.no_grad()
def test_attention_weights_of_packed_rows_stay_within_sequences():
    model = random_model(tiny_config("full"))
    model.set_attn_implementation("eager")
    outputs = model(IDS, position_ids=RESTARTS, output_attentions=True)
    assert_same_logits(list(alone(outputs.logits)), expected(model, ROWS))
    number = NUMBERS[0]
    assert outputs.attentions[0].shape == (1, 4, 84, 84)
    assert not outputs.attentions[0][:, :, number[:, None] != number].any()


@pytest.mark.parametrize(
    "borders",
    [
        {"position_ids": RESTARTS, "seq_idx": torch.arange(84)[None] // 42},
        {"position_ids": RESTARTS, "cu_seqlens": torch.tensor([0, 84])},
        {"seq_idx": torch.arange(84)[None] // 42, "cu_seqlens": torch.tensor([0, 41, 84])},
        {"attention_mask": 1 + torch.arange(84)[None] // 42, "cu_seqlens": torch.tensor([0, 41, 84])},
        {"attention_mask": torch.ones(1, 1, 84, 84)},
        {"position_ids": RESTARTS, "use_cache": True},
    ],
    ids=["positions_seq_idx", "positions_lengths", "seq_idx_lengths", "mask_lengths", "mask_4d", "cache"],
)
def test_borders_that_contradict_each_other_or_a_cache_are_refused_by_name(borders):
    message = r"mark different borders|`seq_idx` or `cu_seq_lens_q`|continues one sequence a row"
    with pytest.raises(ValueError, match=message):
        shared_model("everything")(IDS, **borders)


FORMS = {
    "position_ids": {"position_ids": RESTARTS},
    "seq_idx": {"seq_idx": NUMBERS},
    "cu_seq_lens": {
        "cu_seq_lens_q": torch.tensor(BORDERS),
        "cu_seq_lens_k": torch.tensor(BORDERS),
        "max_length_q": 40,
    },
    "mask": {"attention_mask": 1 + NUMBERS},
}


@pytest.mark.parametrize("use_cache", [True, False])
@pytest.mark.parametrize("form", FORMS)
def test_generate_refuses_packed_prompts_before_it_runs(form, use_cache):
    """Without a cache a mask 1, 1, 2, 2 went on with 1: new tokens saw nothing of any sequence."""
    with pytest.raises(ValueError, match="`generate` continues one a row"):
        shared_model("everything").generate(IDS, use_cache=use_cache, max_new_tokens=2, **FORMS[form])


def test_generate_takes_borders_of_one_sequence_a_row():
    """`seq_idx` was handed on to the second step, which has one token, and refused there."""
    model, ids = shared_model("everything"), torch.tensor(random_rows(6, (7, 7)))
    options = {"max_new_tokens": 3, "do_sample": False}
    wanted = model.generate(ids, **options)
    for borders in ({"seq_idx": torch.zeros_like(ids)}, {"cu_seqlens": torch.tensor([0, 7, 14]), "max_seqlen": 7}):
        for use_cache in (True, False):
            assert torch.equal(model.generate(ids, use_cache=use_cache, **borders, **options), wanted)


def test_function_transforms_see_the_gradients_of_packed_rows():
    """`torch.func.grad` refused an autograd function without `setup_context`, in packed rows alone."""
    model, named = shared_model("everything"), dict(shared_model("everything").named_parameters())

    def loss(weights):
        arguments = {"position_ids": RESTARTS, "use_cache": False}
        return torch.func.functional_call(model, weights, (IDS,), arguments).logits.square().mean()

    found = torch.func.grad(loss)({name: weight.detach() for name, weight in named.items()})
    wanted = torch.autograd.grad(loss(named), list(named.values()))
    for gradient, other in zip(found.values(), wanted, strict=True):
        assert_same_logits(gradient / other.abs().max(), other / other.abs().max())


@pytest.fixture
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_compiled_forward_with_a_cache_fails_on_packed_rows_alone():
    """A graph cannot look at borders: with `use_cache=True` sequences saw each other, off by the logit scale."""
    model = random_model(tiny_config("everything", layer_types=["hybrid_sliding"]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    counted = torch.arange(84)[None]
    (wanted,) = expected(model, [IDS[0].tolist()])
    assert_same_logits(compiled(IDS, position_ids=counted, use_cache=True).logits[0], wanted)
    assert_same_logits(list(alone(compiled(IDS, position_ids=RESTARTS).logits)), expected(model, ROWS))
    with pytest.raises(RuntimeError, match="continues one sequence a row"):
        compiled(IDS, position_ids=RESTARTS, use_cache=True)


@pytest.mark.long
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("others", ["cu_seq_lens", "mask"])
def test_a_compiled_forward_fails_on_borders_that_contradict_each_other(others):
    """The graph took the borders of both, and a `cu_seq_lens` beyond the tokens as if it fitted."""
    model = random_model(tiny_config("everything", layer_types=["linear_attention"]))
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    found = compiled(IDS, position_ids=RESTARTS, **FORMS[others]).logits
    assert_same_logits(list(alone(found)), expected(model, ROWS))
    moved = RESTARTS.roll(1, 1)
    with pytest.raises(RuntimeError, match="mark different borders"):
        compiled(IDS, position_ids=moved, **FORMS[others])
    if others == "cu_seq_lens":
        short = {name: FORMS[others][name] - 1 for name in ("cu_seq_lens_q", "cu_seq_lens_k")}
        with pytest.raises(RuntimeError, match="must increase from 0 to 84"):
            compiled(IDS, position_ids=RESTARTS, max_length_q=40, **short)


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@torch.no_grad()
def test_a_compiled_classifier_fails_on_packed_rows_alone():
    """It answered for the last sequence alone. Left pads are no border."""
    torch.manual_seed(0)
    model = (
        MambaFormerForSequenceClassification(tiny_config("everything", layer_types=["linear_attention"]))
        .eval()
        .double()
    )
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    mask = (torch.arange(84)[None] > 3).long()
    counted = (mask.cumsum(1) - 1).clamp(min=0)
    assert_same_logits(compiled(IDS, mask, counted).logits, model(IDS, mask, counted).logits)
    with pytest.raises(RuntimeError, match="a classifier reads one a row"):
        compiled(IDS, mask, RESTARTS)


def test_a_classifier_refuses_packed_rows():
    """It reads one token a row, and answered for the last sequence alone."""
    torch.manual_seed(0)
    model = MambaFormerForSequenceClassification(tiny_config("everything", pad_token_id=0)).eval()
    with pytest.raises(ValueError, match="a classifier reads one a row"):
        model(IDS, attention_mask=torch.ones_like(IDS), position_ids=RESTARTS)
