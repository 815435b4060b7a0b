"""The laws of the two functions in ops_mambaformer.py, by CPU kernels and by PyTorch, judged by loops over tokens."""

import math

import pytest
import torch
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode

from loops import (
    LENGTHS,
    PER_TOKEN,
    assert_same,
    conv_arguments,
    naive_conv,
    naive_scan,
    normal,
    row_of,
    scan_arguments,
    tokens_of,
    with_pads,
)
from mambaformer import ops_backends_mambaformer as backends
from mambaformer.ops_cpu_interface_mambaformer import kernels
from mambaformer.ops_mambaformer import causal_conv1d, selective_scan


@pytest.fixture(autouse=True, params=["kernels", "pytorch"])
def path(request, monkeypatch):
    if request.param == "pytorch":
        monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(backends.BACKENDS, ()))
    elif kernels() is None:
        pytest.fail("The CPU kernels were not tested: there is no C++ compiler, or they are switched off.")
    return request.param


@pytest.fixture(autouse=True)
def poisoned_memory():
    """Deterministic mode fills what torch.empty returns with NaN."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


FUNCTIONS = pytest.mark.parametrize(
    ("function", "make_arguments"), [(causal_conv1d, conv_arguments), (selective_scan, scan_arguments)]
)


@pytest.mark.parametrize("taps", [1, 2, 3, 4])
@pytest.mark.parametrize("length", LENGTHS)
def test_convolution_equals_the_loop_over_tokens(length, taps):
    arguments = conv_arguments(length=length, taps=taps)
    assert_same(causal_conv1d(**arguments), naive_conv(*arguments.values()))


@pytest.mark.parametrize(("rows", "channels", "numbers"), [(1, 1, 1), (2, 3, 5), (3, 8, 2)])
@pytest.mark.parametrize("length", LENGTHS)
def test_scan_equals_the_loop_over_tokens(length, rows, channels, numbers):
    arguments = scan_arguments(rows, length, channels, numbers)
    assert_same(selective_scan(**arguments), naive_scan(*arguments.values()))


@pytest.mark.parametrize("length", [1, 5, 30])
def test_left_out_arguments_are_no_bias_no_skip_no_gate_and_states_of_zeros(length):
    conv, scan = conv_arguments(length=length), scan_arguments(length=length)
    zero_conv = conv | {k: torch.zeros_like(conv[k]) for k in ("bias", "initial_state")}
    assert_same(causal_conv1d(conv["x"], conv["weight"]), naive_conv(*zero_conv.values()))
    # silu(x) / x = 1 far from zero, so a large gate divided by itself is no gate.
    open_gate = torch.full_like(scan["gate"], 100.0)
    zero_scan = scan | {k: torch.zeros_like(scan[k]) for k in ("D", "initial_state")} | {"gate": open_gate}
    y, state = naive_scan(*zero_scan.values())
    assert_same(selective_scan(*(scan[k] for k in ("u", "dt", "A", "B", "C"))), (y / 100, state))


@FUNCTIONS
def test_no_tokens_leave_the_state_as_it_is(function, make_arguments):
    arguments = make_arguments(length=0)
    y, state = function(**arguments)
    assert y.shape == (2, 0, 3)
    assert torch.equal(state, arguments["initial_state"])


@FUNCTIONS
@pytest.mark.parametrize("length", [2, 11, 40])
def test_every_split_continues_to_the_same_outputs_and_state(function, make_arguments, length):
    arguments = make_arguments(length=length)
    y, state = function(**arguments)
    for cut in range(length + 1):
        y_1, state_1 = function(**tokens_of(arguments, 0, cut))
        y_2, state_2 = function(**tokens_of(arguments, cut, length, initial_state=state_1))
        assert_same((torch.cat([y_1, y_2], 1), state_2), (y, state))


@FUNCTIONS
def test_token_by_token_equals_all_at_once(function, make_arguments):
    arguments = make_arguments(length=20)
    expected, outputs, state = function(**arguments), [], arguments["initial_state"]
    for t in range(20):
        y, state = function(**tokens_of(arguments, t, t + 1, initial_state=state))
        outputs.append(y)
    assert_same((torch.cat(outputs, 1), state), expected)


@FUNCTIONS
@pytest.mark.parametrize("value", [7.0, math.nan, math.inf])
@pytest.mark.parametrize("lengths", [(0, 1), (1, 0), (3, 0, 4, 1), (9, 30, 0, 17, 2), (5, 5)])
def test_every_row_ends_at_its_own_length_whatever_stands_behind_it(function, make_arguments, lengths, value):
    arguments, lengths = make_arguments(rows=len(lengths), length=max(lengths)), torch.tensor(lengths)
    y, state = function(**with_pads(arguments, lengths, value), lengths=lengths)
    assert torch.isfinite(y).all()
    for row, length in enumerate(lengths.tolist()):
        alone = function(**row_of(arguments, row, length))
        assert_same((y[row : row + 1, :length], state[row : row + 1]), alone)


@FUNCTIONS
def test_ragged_rows_continue_from_their_own_ends(function, make_arguments):
    arguments, first, second = make_arguments(rows=3, length=30), torch.tensor([4, 0, 19]), torch.tensor([0, 12, 11])
    _, state = function(**with_pads(arguments, first, math.nan), lengths=first)
    taken = {k: torch.stack([row.roll(-n, 0) for row, n in zip(v, first.tolist(), strict=True)])
             for k, v in arguments.items() if k in PER_TOKEN}  # fmt: skip
    rest = tokens_of(with_pads(arguments | taken, second, math.nan), 0, 12, initial_state=state)
    _, state = function(**rest, lengths=second)
    for row, length in enumerate((first + second).tolist()):
        assert_same((state[row : row + 1],), function(**row_of(arguments, row, length))[1:])


@FUNCTIONS
def test_nan_in_pads_reaches_no_gradient(function, make_arguments):
    lengths = torch.tensor([0, 4, 12])

    def gradients(value):
        arguments = with_pads(make_arguments(rows=3, length=12), lengths, value)
        arguments = {k: v.requires_grad_() for k, v in arguments.items()}
        y, state = function(**arguments, lengths=lengths)
        real = torch.arange(12) < lengths[:, None]
        return torch.autograd.grad(y[real].sin().sum() + state.cos().sum(), list(arguments.values()))

    assert_same(gradients(math.nan), gradients(1.0))


def test_scan_output_is_zero_at_pads():
    lengths = torch.tensor([0, 4])
    y, _ = selective_scan(**with_pads(scan_arguments(length=12), lengths, math.nan), lengths=lengths)
    assert not y[torch.arange(12) >= lengths[:, None]].any()


@pytest.mark.parametrize("length", [1, 40])
def test_a_rate_given_as_its_logarithm_is_the_rate(length):
    arguments = {k: v.requires_grad_() for k, v in scan_arguments(length=length).items()}
    arguments["A"] = normal(3, 5).requires_grad_()
    found = selective_scan(**arguments, A_is_log=True)
    expected = selective_scan(**arguments | {"A": -torch.exp(arguments["A"])})
    assert_same(found, expected)
    seeds = [torch.ones_like(output) for output in found]
    assert_same(*(torch.autograd.grad(each, list(arguments.values()), seeds) for each in (found, expected)))
    with torch.no_grad():
        assert_same(selective_scan(**arguments, A_is_log=True), expected)


STEPS = torch.tensor([-1e4, -90.0, -20.0, -1.0, 0.0, 1.0, 19.9, 20.1, 1e3], dtype=torch.float64)


@pytest.mark.parametrize("length", [1, 5, 40])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
def test_steps_before_softplus_are_those_after_it_and_pads_take_none(length, dtype, tolerance):
    arguments = scan_arguments(rows=3, length=length, channels=9)
    arguments |= {"dt": STEPS + arguments["dt"] * 1e-3, "A": arguments["A"] / 30}
    lengths, found = torch.tensor([0, length // 2, length]), []
    for dt_softplus in (False, True):
        leaves = {k: v.to(dtype).requires_grad_() for k, v in with_pads(arguments, lengths, math.nan).items()}
        given = leaves if dt_softplus else leaves | {"dt": F.softplus(leaves["dt"])}
        y, state = selective_scan(**given, lengths=lengths, dt_softplus=dt_softplus)
        names = [name for name in leaves if dt_softplus or name != "dt"]  # NaN would come back from softplus itself
        gradients = torch.autograd.grad(y.sum() + state.sum(), [leaves[name] for name in names])
        found.append({"y": y, "state": state} | dict(zip(names, gradients, strict=True)))
    assert torch.isfinite(found[1]["dt"]).all()
    for name, expected in found[0].items():
        scale = expected.abs().max().item()
        torch.testing.assert_close(found[1][name], expected, rtol=tolerance, atol=tolerance * scale)


@FUNCTIONS
@pytest.mark.parametrize("length", [1, 4, 11])
def test_gradients_of_all_arguments_equal_finite_differences(function, make_arguments, length):
    arguments = make_arguments(rows=2, length=length, channels=2)
    names, leaves = list(arguments), [tensor.requires_grad_() for tensor in arguments.values()]
    for lengths in (None, torch.tensor([length, length // 2])):
        for options in ({}, {"dt_softplus": True})[: 1 + (function is selective_scan)]:
            options = options | {"lengths": lengths}
            assert torch.autograd.gradcheck(
                lambda *tensors, options=options: function(**dict(zip(names, tensors, strict=True)), **options),
                leaves,
            )


@FUNCTIONS
def test_results_under_no_grad_equal_those_that_record_gradients(function, make_arguments):
    arguments = make_arguments(length=40)
    with torch.no_grad():
        expected = function(**arguments)
    assert_same(function(**{k: v.requires_grad_() for k, v in arguments.items()}), expected)


@FUNCTIONS
def test_arguments_are_not_written_to(function, make_arguments):
    for length in (1, 5, 30):
        arguments = make_arguments(length=length)
        before = {k: v.clone() for k, v in arguments.items()}
        _, state = function(**arguments)
        state.fill_(math.nan)
        assert all(torch.equal(arguments[k], before[k]) for k in before)


@FUNCTIONS
@pytest.mark.parametrize("length", [1, 6, 50])
def test_a_state_keeps_no_other_memory_alive(function, make_arguments, length):
    _, state = function(**make_arguments(length=length))
    assert state.untyped_storage().nbytes() == state.numel() * state.itemsize


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("length", [1, 6, 50])
def test_half_precision_inputs_are_computed_in_float32_and_never_overflow(dtype, length):
    """dt * u is 6e6 here and the state reaches 1e9; float16 ends at 65504."""
    arguments = scan_arguments(length=length)
    arguments |= {"u": arguments["u"].sign() * 6e4, "dt": arguments["dt"] * 50, "A": arguments["A"] / 1e3}
    arguments |= {"B": arguments["B"] * 100, "C": arguments["C"] / 1e7, "D": arguments["D"] / 100}
    arguments = {k: v.to(torch.float32 if k == "initial_state" else dtype) for k, v in arguments.items()}
    y, state = selective_scan(**arguments)
    expected_y, expected_state = naive_scan(*(v.double() for v in arguments.values()))
    assert (y.dtype, state.dtype) == (dtype, torch.float32)
    assert expected_state.abs().max() > 1e6
    torch.testing.assert_close(state.double(), expected_state, rtol=1e-5, atol=1e-5 * expected_state.abs().max())
    # One rounding to the dtype of u is all that may be lost.
    torch.testing.assert_close(y, expected_y.to(dtype), rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_convolution_is_rounded_once(dtype):
    arguments = {k: v.to(dtype) for k, v in conv_arguments(length=30).items()}
    y, state = causal_conv1d(**arguments)
    expected, _ = naive_conv(*(v.double() for v in arguments.values()))
    assert (y.dtype, state.dtype) == (dtype, dtype)
    torch.testing.assert_close(y, expected.to(dtype), rtol=torch.finfo(dtype).eps, atol=1e-6)
    assert torch.equal(state, arguments["x"][:, -3:])


def test_one_float64_argument_makes_the_state_float64():
    arguments = {k: v.float() for k, v in scan_arguments().items()}
    y, state = selective_scan(**arguments | {"A": arguments["A"].double()})
    assert (y.dtype, state.dtype) == (torch.float32, torch.float64)


@pytest.mark.parametrize("length", [1, 6, 50])
def test_autocast_does_not_reach_the_scan(length):
    arguments = {k: v.float() for k, v in scan_arguments(length=length).items()}
    expected = selective_scan(**arguments)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert_same(selective_scan(**arguments), expected, tolerance=0)


def exact_at(arguments, t):
    """Output and state after token t, without a recurrence: every earlier token times its own decay, in float64."""
    u, dt, A, B, C, D, gate, initial_state = (v.double() for v in tokens_of(arguments, 0, t + 1).values())
    ages = F.pad(
        dt.flip(1).cumsum(1).flip(1), (0, 0, 0, 1)
    )  # the decay of token s starts after s, that of h_0 at once
    kept = torch.exp(ages[:, 1:, :, None] * A)
    state = (kept * (dt * u)[..., None] * B[:, :, None, :]).sum(1) + torch.exp(ages[:, 0, :, None] * A) * initial_state
    return ((state * C[:, t, None, :]).sum(-1) + D * u[:, t]) * F.silu(gate[:, t]), state


@pytest.mark.parametrize("rate", [1e-7, 1e-3, 1.0, 300.0])
def test_twenty_thousand_tokens_in_float32_stay_exact_under_any_decay(rate):
    length = 20_000
    arguments = scan_arguments(rows=1, length=length, channels=2, numbers=3)
    # Writes of one sign add up when nothing decays, which is the hardest sum.
    arguments |= {"A": arguments["A"] * rate, "u": arguments["u"].abs(), "B": arguments["B"].abs()}
    arguments = {k: v.float() for k, v in arguments.items()}
    y, state = selective_scan(**arguments)
    assert torch.isfinite(y).all()
    exact_y = {t: exact_at(arguments, t)[0] for t in (0, 1, 141, 142, 9_999, length - 2, length - 1)}
    scale = max(value.abs().max() for value in exact_y.values())
    for t, value in exact_y.items():
        torch.testing.assert_close(y[:, t].double(), value, rtol=1e-5, atol=1e-5 * scale)
    exact_state = exact_at(arguments, length - 1)[1]
    torch.testing.assert_close(state.double(), exact_state, rtol=1e-5, atol=1e-5 * exact_state.abs().max())


class Census(TorchDispatchMode):
    """Counts the operations that compute something and remembers the largest tensor made."""

    def __init__(self):
        super().__init__()
        self.operations, self.largest = 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        if isinstance(result, torch.Tensor) and not func.is_view:
            self.operations += 1
            self.largest = max(self.largest, result.numel())
        return result


def census(function, arguments):
    with torch.no_grad(), Census() as counted:
        function(**arguments)
    return counted


def test_long_scans_never_hold_a_state_per_token():
    length, channels, numbers = 1024, 4, 64
    counted = census(selective_scan, scan_arguments(1, length, channels, numbers))
    assert counted.operations < 20 * math.isqrt(length)
    assert counted.largest <= max(math.isqrt(length) * channels * numbers, length * numbers)


def test_one_token_takes_a_handful_of_operations():
    assert census(selective_scan, scan_arguments(length=1)).operations <= 10
    assert census(causal_conv1d, conv_arguments(length=1)).operations <= 8


@pytest.mark.slow
@FUNCTIONS
def test_compiled_equals_eager(function, make_arguments):
    torch.compiler.reset()
    compiled = torch.compile(function, fullgraph=True, backend="aot_eager")
    for length in (1, 9, 12):
        arguments = make_arguments(length=length)
        assert_same(compiled(**arguments), function(**arguments))
        lengths = torch.tensor([length, length // 2])
        (got, *got_state), (y, *state) = (each(**arguments, lengths=lengths) for each in (compiled, function))
        real = torch.arange(length) < lengths[:, None]
        assert_same((got[real], *got_state), (y[real], *state))


@pytest.mark.parametrize(
    ("function", "make_arguments", "name"),
    [(causal_conv1d, conv_arguments, name) for name in ("weight", "bias", "initial_state", "lengths")]
    + [
        (selective_scan, scan_arguments, name)
        for name in ("dt", "A", "B", "C", "D", "gate", "initial_state", "lengths")
    ],
)
def test_a_shape_that_does_not_fit_is_named(function, make_arguments, name):
    with pytest.raises(ValueError, match=rf"^{name} has shape \(9, 9, 9\)"):
        function(**make_arguments() | {name: normal(9, 9, 9)})
