"""The switch to fused kernels for GPUs: what is passed to them, and that their results are those of the PyTorch path.

The Triton kernel of mamba-ssm runs here as it is, in Triton's interpreter. The functions that exist in CUDA only are
replaced by stand-ins with the semantics and the demands of causal-conv1d 1.6 and mamba-ssm 2.3.
"""

import os
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from transformers.dynamic_module_utils import get_imports

from mambaformer import MambaFormerForCausalLM
from mambaformer import ops_backends_mambaformer as backends
from mambaformer import ops_gpu_mambaformer as ops_gpu
from mambaformer.ops_mambaformer import causal_conv1d, selective_scan
from patterns import CACHE_VARIANTS, PATTERNS, tiny_config
from tiny_models import random_model

KERNEL_DTYPES = (torch.float32, torch.float16, torch.bfloat16)


def convolve(x, weight, bias, activation):
    """What both functions of causal-conv1d demand and compute; x (B, D, L) starts with the state."""
    assert activation == "silu"
    assert x.dtype in KERNEL_DTYPES and weight.dtype in KERNEL_DTYPES
    assert 2 <= weight.shape[1] <= 4 and weight.shape[0] == x.shape[1]
    assert bias is None or (bias.dtype == weight.dtype and bias.stride(-1) == 1)
    bias = None if bias is None else bias.float()
    y = F.conv1d(x.float(), weight.float()[:, None], bias, groups=x.shape[1])
    return F.silu(y).to(x.dtype)


def causal_conv1d_fn(x, weight, bias=None, seq_idx=None, initial_states=None, return_final_states=False,
                     final_states_out=None, activation=None):  # fmt: skip
    assert seq_idx is initial_states is final_states_out is None and not return_final_states
    assert x.stride(1) == 1 and x.stride(2) > 1, "channels-last"
    assert x.shape[1] % 8 == 0 and x.stride(0) % 8 == 0 and x.stride(2) % 8 == 0
    return convolve(F.pad(x, (weight.shape[1] - 1, 0)), weight, bias, activation)


def causal_conv1d_update(x, conv_state, weight, bias=None, activation=None, cache_seqlens=None,
                         conv_state_indices=None):  # fmt: skip
    assert not any(t.requires_grad for t in (x, weight, conv_state)) or not torch.is_grad_enabled(), "no backward"
    assert cache_seqlens is conv_state_indices is None
    assert x.dim() == 2 and conv_state.shape == (*x.shape, weight.shape[1] - 1) and conv_state.dtype == x.dtype
    window = torch.cat([conv_state, x[:, :, None]], dim=2)
    conv_state.copy_(window[:, :, 1:])
    return convolve(window, weight, bias, activation).squeeze(2)


def selective_scan_fn(u, delta, A, B, C, D=None, z=None, delta_bias=None, delta_softplus=False,
                      return_last_state=False):  # fmt: skip
    (rows, channels, length), numbers = u.shape, A.shape[1]
    assert u.dtype == delta.dtype == B.dtype == C.dtype and u.dtype in KERNEL_DTYPES
    assert A.dtype == torch.float32 and A.shape[0] == channels and numbers <= 256
    assert D is None or (D.dtype == torch.float32 and D.shape == (channels,))
    assert delta.shape == u.shape and B.shape == C.shape == (rows, numbers, length)
    assert z is delta_bias is None and not delta_softplus and return_last_state
    state, outputs = u.new_zeros(rows, channels, numbers, dtype=torch.float32), []
    for now, step, write, read in zip(*(t.float().unbind(2) for t in (u, delta, B, C)), strict=True):
        state = torch.exp(step[:, :, None] * A) * state + (step * now)[:, :, None] * write[:, None]
        outputs.append((state * read[:, None]).sum(2) + (0 if D is None else D * now))
    # The real function's backward ignores the gradient of the last state without a word.
    return torch.stack(outputs, dim=2).to(u.dtype), state.detach()


def selective_state_update(state, x, dt, A, B, C, D=None, z=None, dt_bias=None, dt_softplus=False):
    assert not any(t.requires_grad for t in (state, x, dt, A, B, C)) or not torch.is_grad_enabled(), "no backward"
    assert D is not None and dt_bias is not None, "2.3.2 fails without them"
    assert not dt_softplus and A.dtype == torch.float32 and state.dtype == torch.float32
    assert state.shape == (*x.shape, A.shape[1]) and dt.shape == x.shape and B.shape == C.shape
    dt = dt.float() + dt_bias
    state.copy_(torch.exp(dt[:, :, None] * A) * state + (dt * x.float())[:, :, None] * B.float()[:, None])
    y = (state * C.float()[:, None]).sum(2) + D * x.float()
    return (y if z is None else y * F.silu(z.float())).to(x.dtype)


STAND_INS = {
    "convolve": causal_conv1d_fn,
    "convolve_token": causal_conv1d_update,
    "scan": selective_scan_fn,
    "scan_token": selective_state_update,
}


@pytest.fixture(autouse=True)
def without_cpu_kernels(monkeypatch):
    monkeypatch.setitem(backends.BACKENDS, "causal_conv1d", (ops_gpu.convolve_on_gpu,))
    monkeypatch.setitem(backends.BACKENDS, "selective_scan", (ops_gpu.scan_on_gpu,))


@pytest.fixture
def with_kernels(monkeypatch):
    """A function that runs another one with the stand-ins in force; it returns the result and the kernels called."""

    def run(function, *arguments, **named):
        calls = []
        spies = {k: lambda *a, k=k, f=f, **n: (calls.append(k), f(*a, **n))[1] for k, f in STAND_INS.items()}
        with monkeypatch.context() as patch:
            patch.setattr(ops_gpu, "may_run_on_gpu", lambda tensor: True)
            patch.setattr(ops_gpu, "_load_kernels", lambda: ops_gpu.Kernels(**spies))
            return function(*arguments, **named), calls

    return run


def normal(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)))


def conv_arguments(length, channels=16, taps=4, dtype=torch.float32):
    # The convolution's input is half of a projection, as in the model: a view with the strides of the whole.
    x = normal(3, length, 2 * channels).to(dtype)[:, :, :channels]
    state = normal(3, taps - 1, channels).to(dtype)
    return {"x": x, "weight": normal(channels, taps), "bias": normal(channels), "initial_state": state}


def scan_arguments(length, channels=16, numbers=5, dtype=torch.float32):
    halves = normal(3, length, 2 * channels).to(dtype)
    arguments = {"u": halves[:, :, :channels], "dt": F.softplus(normal(3, length, channels)).to(dtype)}
    arguments |= {"A": -torch.exp(normal(channels, numbers)), "D": normal(channels), "gate": halves[:, :, channels:]}
    arguments |= {"B": normal(3, length, numbers).to(dtype), "C": normal(3, length, numbers).flip(0).to(dtype)}
    return arguments | {"initial_state": normal(3, channels, numbers)}


def assert_same(got, expected, tolerance=1e-5):
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == other.dtype
        torch.testing.assert_close(one, other, rtol=tolerance, atol=tolerance * float(other.abs().max()))


DTYPES = pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
CASES = [
    (causal_conv1d, conv_arguments, {1: "convolve_token", 2: "convolve", 13: "convolve"}),
    (selective_scan, scan_arguments, {1: "scan_token", 2: "scan", 13: "scan"}),
]
FUNCTIONS = pytest.mark.parametrize(("function", "make_arguments", "kernels"), CASES, ids=["conv", "scan"])


@FUNCTIONS
@DTYPES
@pytest.mark.parametrize("length", [1, 2, 13])
@pytest.mark.parametrize("left_out", [(), ("initial_state",), ("bias", "D", "gate")])
def test_kernels_compute_what_pytorch_does(with_kernels, function, make_arguments, kernels, dtype, tolerance, length,
                                           left_out):  # fmt: skip
    arguments = {k: v for k, v in make_arguments(length, dtype=dtype).items() if k not in left_out}
    before = {k: v.clone() for k, v in arguments.items()}
    got, calls = with_kernels(function, **arguments)
    assert calls == [kernels[length]]
    assert_same(got, function(**arguments), tolerance)
    assert all(torch.equal(v, before[k]) for k, v in arguments.items()), "an argument was written to"


@FUNCTIONS
@pytest.mark.parametrize("lengths", [(0, 1, 1), (2, 0, 1), (13, 0, 6)])
def test_kernels_end_every_row_at_its_own_length(with_kernels, function, make_arguments, kernels, lengths):
    lengths = torch.tensor(lengths)
    arguments = make_arguments(int(lengths.max()))
    pads = (torch.arange(arguments[next(iter(arguments))].shape[1]) >= lengths[:, None])[:, :, None]
    tokens = {"x", "u", "dt", "B", "C", "gate"} & set(arguments)
    arguments |= {k: arguments[k].masked_fill(pads, float("nan")) for k in tokens}
    got, calls = with_kernels(function, **arguments, lengths=lengths)
    assert len(calls) == 1
    assert torch.isfinite(got[0]).all()
    assert_same(got, function(**arguments, lengths=lengths))


@FUNCTIONS
def test_kernels_continue_exactly_over_several_tokens(with_kernels, function, make_arguments, kernels):
    arguments, parts = make_arguments(13), []
    expected, state = function(**arguments), arguments["initial_state"]
    tokens = {"x", "u", "dt", "B", "C", "gate"} & set(arguments)
    for start, stop in ((0, 5), (5, 6), (6, 13)):
        part = arguments | {k: arguments[k][:, start:stop] for k in tokens} | {"initial_state": state}
        (y, state), _ = with_kernels(function, **part)
        parts.append(y)
    assert_same((torch.cat(parts, dim=1), state), expected)


@FUNCTIONS
@pytest.mark.parametrize("ragged", [False, True])
@pytest.mark.parametrize("length", [1, 2, 13])
def test_gradients_through_kernels_are_those_of_pytorch(
    with_kernels, function, make_arguments, kernels, length, ragged
):
    arguments = {k: v.requires_grad_() for k, v in make_arguments(length).items()}
    lengths = torch.tensor([length, 0, length // 2]) if ragged else None

    def gradients():
        y, state = function(**arguments, lengths=lengths)
        real = y if lengths is None else y[torch.arange(length) < lengths[:, None]]
        return torch.autograd.grad(real.sin().sum() + state.cos().sum(), list(arguments.values()))

    got, calls = with_kernels(gradients)
    assert calls == [kernels[13]], "the single-token kernels have no backward"
    assert_same(got, gradients())


@pytest.mark.parametrize("length", [1, 6])
def test_kernels_are_given_the_dtypes_they_ask_for_whatever_comes_in(with_kernels, length):
    scan, conv = scan_arguments(length), conv_arguments(length)
    scan |= {k: scan[k].bfloat16() for k in ("u", "B", "D", "gate")}
    conv |= {k: conv[k].bfloat16() for k in ("x", "bias")}
    for function, arguments in ((selective_scan, scan), (causal_conv1d, conv)):
        got, calls = with_kernels(function, **arguments)
        assert len(calls) == 1
        assert_same(got, function(**arguments), tolerance=2e-2)


@pytest.mark.parametrize("length", [1, 6])
def test_what_the_kernels_cannot_do_stays_in_pytorch(with_kernels, length):
    for arguments in (
        conv_arguments(length, channels=12),
        conv_arguments(length, taps=1),
        conv_arguments(length, taps=5),
        {k: v.double() for k, v in conv_arguments(length).items()},
    ):
        _, calls = with_kernels(causal_conv1d, **arguments)
        assert calls == []
    _, calls = with_kernels(selective_scan, **{k: v.double() for k, v in scan_arguments(length).items()})
    assert calls == []
    _, calls = with_kernels(selective_scan, **scan_arguments(6, numbers=257))
    assert calls == []
    for function, arguments in ((causal_conv1d, conv_arguments(0)), (selective_scan, scan_arguments(0))):
        (y, state), _ = with_kernels(function, **arguments)
        assert y.shape[1] == 0 and torch.equal(state, arguments["initial_state"])


def test_cpu_tensors_never_ask_for_kernels(monkeypatch):
    monkeypatch.setattr(ops_gpu, "_load_kernels", lambda: pytest.fail("kernels were looked for"))
    for length in (1, 6):
        causal_conv1d(**conv_arguments(length))
        selective_scan(**scan_arguments(length))


def test_remote_code_that_needs_the_ops_is_not_made_to_install_the_kernels():
    assert not {"causal_conv1d", "mamba_ssm"} & set(get_imports(ops_gpu.__file__))


IN_TRITON = '''
import contextlib, sys, types
sys.modules["selective_scan_cuda"] = types.ModuleType("selective_scan_cuda")  # the CUDA half, which is not built here
import torch
torch.cuda.device = lambda index: contextlib.nullcontext()
from mambaformer import ops_backends_mambaformer as backends
from mambaformer import ops_gpu_mambaformer as ops_gpu
from mambaformer import ops_mambaformer as ops
from torch.nn import functional as F

kernels = ops_gpu._load_kernels()
assert kernels.scan_token is not None, "mamba-ssm was found, but not its selective_state_update"
assert kernels.scan_token.__module__ == "mamba_ssm.ops.triton.selective_state_update"
calls = 0

def counted(*arguments, **named):
    global calls
    calls += 1
    return kernels.scan_token(*arguments, **named)

backends.BACKENDS["selective_scan"] = (ops_gpu.scan_on_gpu,)
ops_gpu._load_kernels = lambda: ops_gpu.Kernels(scan_token=counted)
torch.manual_seed(0)

def compare(rows, length, channels, numbers, dtype, tolerance, left_out=()):
    """Feeds tokens one by one through the kernel and all at once through PyTorch."""
    def normal(*shape):
        return torch.randn(*shape).to(dtype)
    tokens = {"u": normal(rows, length, channels), "dt": F.softplus(normal(rows, length, channels)),
              "B": normal(rows, length, numbers), "C": normal(rows, length, numbers),
              "gate": normal(rows, length, channels)}
    weights = {"A": -torch.exp(torch.randn(channels, numbers)), "D": torch.randn(channels)}
    state = torch.randn(rows, channels, numbers)
    tokens, weights = ({k: v for k, v in d.items() if k not in left_out} for d in (tokens, weights))
    state = None if "initial_state" in left_out else state
    ops_gpu.may_run_on_gpu = lambda tensor: False
    expected_y, expected_state = ops.selective_scan(**tokens, **weights, initial_state=state)
    ops_gpu.may_run_on_gpu = lambda tensor: True
    before = calls
    for t in range(length):
        kept = None if state is None else state.clone()
        token = {k: v[:, t : t + 1] for k, v in tokens.items()}
        y, new_state = ops.selective_scan(**token, **weights, initial_state=state)
        assert state is None or torch.equal(state, kept), "the state that was passed in was written to"
        assert y.dtype == dtype and new_state.dtype == torch.float32
        torch.testing.assert_close(y, expected_y[:, t : t + 1], rtol=tolerance, atol=tolerance)
        state = new_state
    assert calls == before + length, "the kernel was not used"
    torch.testing.assert_close(state, expected_state, rtol=2e-5, atol=2e-5)

compare(2, 6, 40, 16, torch.float32, 2e-5)
compare(1, 3, 33, 5, torch.float32, 2e-5)
compare(2, 2, 8, 16, torch.float32, 2e-5, left_out=("initial_state",))
compare(2, 2, 8, 16, torch.float32, 2e-5, left_out=("D", "gate"))
compare(2, 3, 8, 16, torch.bfloat16, 2e-2)
print("agrees after", calls, "calls")
'''


@pytest.mark.slow
def test_decoding_runs_the_real_triton_kernel_of_mamba_ssm():
    """In a process of its own: Triton chooses its interpreter when it is imported."""
    environment = os.environ | {"TRITON_INTERPRET": "1", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    if find_spec("mamba_ssm") is None:
        pytest.fail(
            "mamba-ssm is not installed, so the kernel path was not tested. Install it without its CUDA half: "
            "`pip install triton einops wheel ninja`, then `MAMBA_FORCE_BUILD=TRUE MAMBA_SKIP_CUDA_BUILD=TRUE "
            "pip install --no-build-isolation --no-deps mamba-ssm`."
        )
    done = subprocess.run(
        [sys.executable, "-c", IN_TRITON], env=environment, cwd=Path(__file__).parent, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert "agrees after 16 calls" in done.stdout


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
@pytest.mark.parametrize("pattern", PATTERNS)
def test_decoding_never_makes_the_host_wait_for_a_device(pattern, variant):
    """The meta device takes all paths that other devices than the CPU take, and whoever asks it for a value fails."""
    with torch.device("meta"):
        model = MambaFormerForCausalLM(tiny_config(pattern)).eval()
        ids = torch.ones(2, 6, dtype=torch.long)
    cache = model.make_cache(**CACHE_VARIANTS[variant])
    with torch.no_grad():
        model(ids, past_key_values=cache)
        for steps in range(3):
            logits = model(ids[:, :1], past_key_values=cache).logits
            assert cache.get_seq_length() == 7 + steps
    assert logits.device.type == "meta" and logits.shape == (2, 1, model.config.vocab_size)


@pytest.mark.parametrize("variant", CACHE_VARIANTS)
def test_generate_never_looks_for_pads_in_what_it_has_generated(variant, monkeypatch):
    model, masks = random_model(tiny_config("everything")), []
    stack_forward = model.model.forward
    monkeypatch.setattr(
        model.model,
        "forward",
        lambda *args, attention_mask=None, **kwargs: (
            masks.append(attention_mask), stack_forward(*args, attention_mask=attention_mask, **kwargs))[1],
    )  # fmt: skip
    ids, mask = torch.randint(0, 61, (2, 5)), torch.tensor([[0, 0, 1, 1, 1], [1, 1, 1, 1, 1]])
    model.generate(
        ids,
        attention_mask=mask,
        max_new_tokens=6,
        do_sample=False,
        past_key_values=model.make_cache(**CACHE_VARIANTS[variant]),
    )
    assert masks[0].tolist() == mask.tolist() and masks[1:] == [None] * 5
