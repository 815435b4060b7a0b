"""What the CPU kernels do by themselves, beyond the laws of test_ops.py: shapes, strides, dtypes, threads, memory."""

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
    scan_arguments,
    with_pads,
)
from mambaformer import ops_backends_mambaformer as backends
from mambaformer import ops_cpu_scan_mambaformer as cpu_scan
from mambaformer.ops_mambaformer import causal_conv1d, selective_scan

CHANNELS, NUMBERS = (1, 3, 17, 40), (1, 4, 5, 16, 64)


@pytest.fixture(autouse=True)
def calls(monkeypatch):
    """The functions of the library that a test calls, by name."""
    names, run = [], cpu_scan._run
    monkeypatch.setattr(cpu_scan, "_run", lambda name, *fields: (names.append(name), run(name, *fields))[1])
    return names


def strided(arguments):
    """The same numbers in parts of wider tensors, with NaN around them, as a projection's output is cut up."""
    wide = {k: F.pad(v, (3, 5), value=float("nan")) for k, v in arguments.items() if k in PER_TOKEN}
    return arguments | {k: v[:, :, 3:-5] for k, v in wide.items()}


def softplus_of(arguments):
    return arguments | {"dt": F.softplus(arguments["dt"])}


def of_dtype(arguments, dtype):
    return {k: v.to(dtype) for k, v in arguments.items()}


def gradients(function, arguments, shares=None):
    """Outputs, and the gradients of a sum that weighs y and the final state."""
    leaves = {k: v.detach().clone().requires_grad_() for k, v in arguments.items()}
    outputs = function(leaves)
    seeds = [torch.randn(v.shape, generator=torch.Generator().manual_seed(9)).to(v.dtype) for v in outputs]
    return [*outputs, *torch.autograd.grad(outputs, list(leaves.values()), seeds)]


@pytest.mark.parametrize("numbers", NUMBERS)
@pytest.mark.parametrize("channels", CHANNELS)
def test_scan_and_its_gradients_equal_the_loop_for_any_shape_and_stride(calls, channels, numbers):
    for length in LENGTHS:
        arguments = scan_arguments(2, length, channels, numbers)
        expected = gradients(lambda leaves: naive_scan(*softplus_of(leaves).values()), arguments)
        found = gradients(lambda leaves: selective_scan(**strided(leaves), dt_softplus=True), arguments)
        assert_same(found, expected)
        assert_same(selective_scan(**strided(arguments), dt_softplus=True), expected[:2])
    assert calls == ["scan", "scan_back", "scan"] * len(LENGTHS)


@pytest.mark.parametrize("taps", [1, 2, 3, 4, 7, 16])
@pytest.mark.parametrize("channels", CHANNELS)
def test_convolution_and_its_gradients_equal_the_loop_for_any_shape_and_stride(calls, channels, taps):
    for length in LENGTHS:
        arguments = conv_arguments(2, length, channels, taps)
        expected = gradients(lambda leaves: naive_conv(*leaves.values()), arguments)
        assert_same(gradients(lambda leaves: causal_conv1d(**strided(leaves)), arguments), expected)
        assert_same(causal_conv1d(**strided(arguments)), expected[:2])
    assert calls == ["convolve", "convolve_back", "convolve"] * len(LENGTHS)


FUNCTIONS = pytest.mark.parametrize(
    ("function", "naive", "arguments"),
    [
        (causal_conv1d, naive_conv, conv_arguments(3, 45, 40)),
        (selective_scan, naive_scan, softplus_of(scan_arguments(3, 45, 40, 16))),
    ],
    ids=["conv", "scan"],
)


def near(found, expected, tolerance):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one.double(), other, rtol=tolerance, atol=tolerance * other.abs().max().item())


@FUNCTIONS
@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.bfloat16, 2**-7), (torch.float16, 2**-10)]
)
def test_any_dtype_is_within_roundings_of_the_loop_and_gradients_keep_it(calls, function, naive, arguments, dtype,
                                                                         tolerance):  # fmt: skip
    arguments = of_dtype(arguments, dtype)
    expected = gradients(lambda leaves: naive(*leaves.values()), of_dtype(arguments, torch.float64))
    found = gradients(lambda leaves: function(**leaves), arguments)
    assert len(calls) == 2
    near(found, expected, tolerance)
    assert [one.dtype for one in found[2:]] == [dtype] * len(arguments)


@FUNCTIONS
@pytest.mark.parametrize("narrow", [torch.bfloat16, torch.float16])
def test_dtypes_that_differ_meet_in_the_wider_one(calls, function, naive, arguments, narrow):
    for name in arguments:
        mixed = of_dtype(arguments, torch.float32) | {name: arguments[name].to(narrow)}
        expected = naive(*of_dtype(mixed, torch.float64).values())
        y, state = function(**mixed)
        assert y.dtype == mixed[next(iter(mixed))].dtype
        near((y, state), expected, 2e-6 if y.dtype == torch.float32 else 2**-7)
    assert len(calls) == len(arguments)


@FUNCTIONS
def test_the_number_of_threads_changes_no_output_and_gradients_by_roundings(monkeypatch, function, naive, arguments):
    monkeypatch.setattr(cpu_scan, "PARALLEL_WORK", 0)
    lengths, found = torch.tensor([45, 0, 31]), []
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            found.append(gradients(lambda leaves: function(**leaves, lengths=lengths), arguments))
    finally:
        torch.set_num_threads(1)
    for results in found[1:]:
        assert all(torch.equal(one, other) for one, other in zip(results[:2], found[0][:2], strict=True))
        assert_same(results[2:], found[0][2:], tolerance=1e-12)


@FUNCTIONS
def test_a_row_of_a_ragged_batch_is_bit_equal_to_that_row_alone(function, naive, arguments):
    lengths = torch.tensor([45, 0, 31])
    arguments = of_dtype(arguments, torch.float32)
    y, state = function(**with_pads(arguments, lengths, float("nan")), lengths=lengths.int())
    for row, length in enumerate(lengths.tolist()):
        if length:
            alone = {k: v[row : row + 1] if v.shape[0] == 3 else v for k, v in arguments.items()}
            alone = {k: v[:, :length] if k in PER_TOKEN else v for k, v in alone.items()}
            y_alone, state_alone = function(**alone)
            assert torch.equal(y[row, :length], y_alone[0]) and torch.equal(state[row], state_alone[0])


@FUNCTIONS
def test_lengths_beyond_the_tensor_read_nothing_outside_of_it(function, naive, arguments):
    found = function(**arguments, lengths=torch.tensor([-5, 45, 10**6]))
    assert_same(found, function(**arguments, lengths=torch.tensor([0, 45, 45])))


def test_training_keeps_no_state_per_token():
    arguments, kept = {k: v.requires_grad_() for k, v in scan_arguments(2, 256, 24, 16).items()}, []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: (kept.append(tensor), tensor)[1], lambda kept: kept):
        selective_scan(**arguments)
    given = {tensor.data_ptr() for tensor in arguments.values()}
    assert {tensor.numel() for tensor in kept if tensor.data_ptr() not in given} == {2 * (256 // 32) * 24 * 16}


@FUNCTIONS
def test_each_output_and_each_argument_alone_gets_its_own_gradient(function, naive, arguments):
    for name in arguments:
        leaf = arguments[name].clone().requires_grad_()
        found, expected = function(**arguments | {name: leaf}), naive(*(arguments | {name: leaf}).values())
        for one, other in zip(found, expected, strict=True):
            (gradient,) = torch.autograd.grad(one.sum(), leaf, retain_graph=True)
            wanted = torch.zeros_like(leaf)
            if other.requires_grad:
                (wanted,) = torch.autograd.grad(other.sum(), leaf, retain_graph=True, materialize_grads=True)
            assert_same([gradient], [wanted])


class Watcher(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {}))


class Subclass(torch.Tensor):
    pass


def in_forward_mode(function, arguments):
    with torch.autograd.forward_ad.dual_level():
        return function(**arguments)


def under_a_watcher(function, arguments):
    with Watcher():
        return function(**arguments)


WATCHED = {
    "dispatch mode": under_a_watcher,
    "forward mode": in_forward_mode,
    "subclass": lambda function, arguments: function(**{k: v.as_subclass(Subclass) for k, v in arguments.items()}),
    "functorch": lambda function, arguments: torch.func.vmap(lambda _: function(**arguments))(torch.zeros(1)),
    "meta device": lambda function, arguments: function(**{k: v.to("meta") for k, v in arguments.items()}),
    "no tokens": lambda function, arguments: function(
        **{k: v[:, :0] if k in PER_TOKEN else v for k, v in arguments.items()}
    ),
}


@FUNCTIONS
@pytest.mark.parametrize("watch", WATCHED)
def test_who_has_to_see_every_operation_sees_pytorch(calls, function, naive, arguments, watch):
    WATCHED[watch](function, arguments)
    assert calls == []


def test_more_taps_than_the_kernel_has_room_for_stay_in_pytorch(calls):
    arguments = conv_arguments(2, 30, 3, taps=17)
    assert_same(causal_conv1d(**arguments), naive_conv(*arguments.values()))
    assert calls == []


@FUNCTIONS
def test_a_second_derivative_is_refused_and_pytorch_has_it(monkeypatch, function, naive, arguments):
    leaves = {k: v.clone().requires_grad_() for k, v in arguments.items()}

    def second_derivative():
        leaf = leaves["weight" if function is causal_conv1d else "dt"]
        (gradient,) = torch.autograd.grad(function(**leaves)[0].sum(), leaf, create_graph=True)
        return torch.autograd.grad(gradient.square().sum(), leaf)

    with pytest.raises(RuntimeError, match="MAMBAFORMER_CPU_KERNELS=0"):
        second_derivative()
    monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(backends.BACKENDS, ()))
    second_derivative()


def test_the_switch_is_asked_for_every_call(monkeypatch, calls):
    monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(backends.BACKENDS, ()))
    selective_scan(**scan_arguments())
    causal_conv1d(**conv_arguments())
    assert calls == []
