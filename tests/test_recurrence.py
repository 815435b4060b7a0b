"""`matrix_recurrence` against the recurrence written out, one token at a time, in float64.

Chunks of three tokens, so that a few tokens are several chunks with a short one at the end.
"""

import itertools

import pytest
import torch

from mambaformer import ops_recurrence_mambaformer as recurrence
from mambaformer.ops_mambaformer import matrix_recurrence

ROWS, LENGTH, GROUPS, HEADS, KEYS, VALUES = 3, 7, 2, 4, 4, 5


@pytest.fixture(autouse=True)
def chunks_of_three_tokens(monkeypatch):
    monkeypatch.setattr(recurrence, "LONGEST_CHUNK", 3)
    monkeypatch.setattr(recurrence, "LONGEST_CHANNEL_CHUNK", 3)


def inputs(per_channel=False, with_beta=False, length=LENGTH, seed=0):
    source = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(shape, generator=source, dtype=torch.float64, requires_grad=True)

    of_token = (ROWS, length, HEADS)
    q, k, v = draw(ROWS, length, GROUPS, KEYS), draw(ROWS, length, GROUPS, KEYS), draw(*of_token, VALUES)
    g = -torch.nn.functional.softplus(draw(*of_token, KEYS) if per_channel else draw(*of_token))
    beta = torch.sigmoid(draw(*of_token)) if with_beta else None
    return q, k, v, g, beta


def written_out(q, k, v, g, beta, state, row, length):
    """Outputs (length, heads, values) and the state of one row."""
    outputs, group = [], [h // (HEADS // GROUPS) for h in range(HEADS)]
    for t in range(length):
        of_head = []
        for h in range(HEADS):
            decay = g[row, t, h].exp()
            S = (decay[:, None] if decay.ndim else decay) * state[h]
            w = v[row, t, h]
            if beta is not None:
                w = beta[row, t, h] * (w - S.T @ k[row, t, group[h]])
            of_head.append(S + torch.outer(k[row, t, group[h]], w))
        state = torch.stack(of_head)
        outputs.append(torch.stack([state[h].T @ q[row, t, group[h]] for h in range(HEADS)]))
    return torch.stack(outputs) if outputs else v[row, :0], state


kinds = pytest.mark.parametrize(
    ("per_channel", "with_beta"),
    [(False, False), (False, True), (True, False), (True, True)],
    ids=["decay", "decay and delta", "channels", "channels and delta"],
)


@kinds
def test_outputs_states_and_gradients_equal_the_written_out_recurrence(per_channel, with_beta):
    """Behind a row's length stands NaN, which reaches neither values nor gradients."""
    tensors = inputs(per_channel, with_beta)
    lengths, start = torch.tensor([7, 0, 4]), torch.randn(ROWS, HEADS, KEYS, VALUES, dtype=torch.float64)
    real = torch.arange(LENGTH) < lengths[:, None]
    spoiled = [
        None if each is None else each.masked_fill(~real[(...,) + (None,) * (each.ndim - 2)], torch.nan)
        for each in tensors
    ]
    y, state = matrix_recurrence(*spoiled, initial_state=start, lengths=lengths)
    assert y.shape == (ROWS, LENGTH, HEADS, VALUES) and not y[~real].any()
    wanted = [written_out(*tensors, start[row], row, int(lengths[row])) for row in range(ROWS)]
    for row, (outputs, final) in enumerate(wanted):
        torch.testing.assert_close(y[row, : lengths[row]], outputs, rtol=0, atol=1e-12)
        torch.testing.assert_close(state[row], final, rtol=0, atol=1e-12)
    leaves = list(tensors[:3])  # the others are not leaves
    weigh = torch.randn(HEADS, VALUES, dtype=torch.float64)
    found = torch.autograd.grad((y * weigh).sum() + state.sum(), leaves)
    total = sum((outputs * weigh).sum() + final.sum() for outputs, final in wanted)
    for one, other in zip(found, torch.autograd.grad(total, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


@kinds
def test_any_cutting_equals_one_call(per_channel, with_beta):
    tensors = inputs(per_channel, with_beta)
    wanted, final = matrix_recurrence(*tensors)
    state, outputs = None, []
    for start, end in itertools.pairwise([0, 3, 3, 4, LENGTH]):  # one part has no tokens
        part = (None if each is None else each[:, start:end] for each in tensors)
        y, state = matrix_recurrence(*part, initial_state=state)
        outputs.append(y)
    torch.testing.assert_close(torch.cat(outputs, dim=1), wanted, rtol=0, atol=1e-12)
    torch.testing.assert_close(state, final, rtol=0, atol=1e-12)


@kinds
def test_packed_sequences_equal_each_by_itself(per_channel, with_beta):
    tensors = inputs(per_channel, with_beta)
    positions = torch.tensor([0, 1, 2, 0, 1, 0, 1]).expand(ROWS, -1)
    packed, _ = matrix_recurrence(*tensors, positions=positions)
    parts = itertools.pairwise([0, 3, 5, LENGTH])
    alone = [matrix_recurrence(*(None if t is None else t[:, a:b] for t in tensors))[0] for a, b in parts]
    torch.testing.assert_close(packed, torch.cat(alone, dim=1), rtol=0, atol=1e-12)


@kinds
def test_decays_that_forget_everything_lose_no_digits_of_what_follows(per_channel, with_beta):
    """In float32, sums of log decays since the start of a chunk would leave no digits for their differences."""
    tensors = [None if each is None else each.detach() for each in inputs(per_channel, with_beta)]
    tensors[3][:, :5] *= 1e5
    wanted, final = matrix_recurrence(*tensors)
    y, state = matrix_recurrence(*(None if each is None else each.float() for each in tensors))
    assert max((y - wanted).abs().max(), (state - final).abs().max()) < 1e-5


@kinds
def test_an_exported_recurrence_takes_any_length(per_channel, with_beta):
    class Recurrence(torch.nn.Module):
        def forward(self, *tensors):
            return matrix_recurrence(*tensors)

    tensors = [each.detach() for each in inputs(per_channel, with_beta, length=40) if each is not None]
    length = torch.export.Dim("length", min=2, max=4096)
    exported = torch.export.export(Recurrence(), tuple(tensors), dynamic_shapes=(({1: length},) * len(tensors),))
    for number in (2, 16, 17, 40, 70):
        tensors = [each.detach() for each in inputs(per_channel, with_beta, length=number) if each is not None]
        for one, other in zip(exported.module()(*tensors), matrix_recurrence(*tensors), strict=True):
            torch.testing.assert_close(one, other, rtol=0, atol=1e-11)


def test_half_precision_computes_in_float32_and_keeps_its_dtype():
    tensors = [None if each is None else each.to(torch.bfloat16) for each in inputs()]
    y, state = matrix_recurrence(*tensors)
    wide = [None if each is None else each.float() for each in tensors]
    assert (y.dtype, state.dtype) == (torch.bfloat16, torch.float32)
    assert torch.equal(y, matrix_recurrence(*wide)[0].to(torch.bfloat16))


def test_heads_that_do_not_fill_their_groups_are_refused():
    q, k, v, g, _ = inputs()
    with pytest.raises(ValueError, match="3 heads, which must be a multiple of the 2 groups"):
        matrix_recurrence(q, k, v[:, :, :3], g[:, :, :3])


@pytest.mark.parametrize("name", ["k", "v", "g", "beta", "initial_state", "lengths", "positions"])
def test_a_wrong_shape_is_refused_by_name(name):
    q, k, v, g, beta = inputs(with_beta=True)
    arguments = {"k": k, "v": v, "g": g, "beta": beta, "initial_state": torch.zeros(ROWS, HEADS, KEYS, VALUES)}
    arguments |= {"lengths": torch.ones(ROWS, dtype=torch.long), "positions": torch.zeros(ROWS, LENGTH)}
    arguments[name] = arguments[name][1:]
    with pytest.raises(ValueError, match=f"^{name} has shape"):
        matrix_recurrence(q, **arguments)
