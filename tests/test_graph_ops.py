"""The operations of compiled graphs: one node each, the reference's results and gradients, in any copy of the code."""

import importlib.util
import sys

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

from loops import assert_same, conv_arguments, scan_arguments
from mambaformer import ops_backends_mambaformer as backends
from mambaformer import ops_graph_mambaformer as graph
from mambaformer.ops_mambaformer import causal_conv1d, selective_scan
from patterns import tiny_config
from tiny_models import random_model

LENGTHS, POSITIONS = torch.tensor([40, 23]), torch.arange(40).expand(2, -1) % 17
# The front's function, its arguments, and the operation with the order of its arguments.
OPERATIONS = {
    "causal_conv1d": (causal_conv1d, conv_arguments(2, 40, 17, 4), graph.causal_conv1d),
    "selective_scan": (selective_scan, scan_arguments(2, 40, 17, 5), graph.selective_scan),
}
every_operation = pytest.mark.parametrize("name", OPERATIONS)
every_layout = pytest.mark.parametrize(
    "others", [{}, {"lengths": LENGTHS}, {"positions": POSITIONS}], ids=["all", "ragged", "packed"]
)
PER_TOKEN = {"x", "u", "dt", "B", "C", "gate"}


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch.compiler.reset()
    yield
    torch.compiler.reset()


def arguments_of(name, dtype=torch.float64, **others):
    function, arguments, operation = OPERATIONS[name]
    arguments = {key: value.to(dtype, copy=True).requires_grad_() for key, value in arguments.items()}
    options = {"dt_softplus": True} if name == "selective_scan" else {}
    return function, operation, arguments, {**options, **others}


def first_tokens(arguments, length):
    parts = {key: value[:, :length] if key in PER_TOKEN else value for key, value in arguments.items()}
    return {key: value.detach().contiguous() for key, value in parts.items()}


def compiled(function, **options):
    counter = CompileCounterWithBackend("aot_eager")
    return torch.compile(function, backend=counter, fullgraph=True, **options), counter


def nodes_of(counter):
    """The names of our operations in all graphs."""
    called = [str(node.target) for each in counter.graphs for node in each.graph.nodes if node.op == "call_function"]
    return [target.split(".")[1].rsplit("_", 1)[0] for target in called if target.startswith("mambaformer.")]


@every_operation
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "others", [{}, {"lengths": LENGTHS}, {"positions": POSITIONS}], ids=["all", "ragged", "packed"]
)
def test_the_operations_keep_the_rules_of_torch_library(name, dtype, others):
    _, operation, arguments, _ = arguments_of(name, dtype, **others)
    rest = (others.get("lengths"), others.get("positions"), *([True] if name == "selective_scan" else []))
    torch.library.opcheck(operation, (*arguments.values(), *rest), rtol=1e-3, atol=1e-3)


@every_operation
@pytest.mark.parametrize(
    "others", [{}, {"lengths": LENGTHS}, {"positions": POSITIONS}], ids=["all", "ragged", "packed"]
)
def test_a_compiled_operation_is_one_node_and_equals_the_eager_one(name, others):
    function, _, arguments, options = arguments_of(name, **others)
    if name == "selective_scan":
        options["A_is_log"], arguments["A"] = True, arguments["A"].detach().abs().log().requires_grad_()

    def run(**arguments):
        y, state = function(**arguments, **options)
        real = y if others.get("lengths") is None else y * (torch.arange(40) < LENGTHS[:, None])[:, :, None]
        return real, state, real.sin().sum() + state.cos().sum()

    step, counter = compiled(run)
    found, wanted = step(**arguments), run(**arguments)
    assert nodes_of(counter) == [name]
    leaves = list(arguments.values())
    assert_same([*found, *torch.autograd.grad(found[2], leaves)], [*wanted, *torch.autograd.grad(wanted[2], leaves)])


@every_operation
def test_one_graph_serves_every_length(name):
    function, _, arguments, options = arguments_of(name)
    step, counter = compiled(function, dynamic=True)
    for length in (40, 31, 7, 2):
        part = first_tokens(arguments, length)
        assert_same(step(**part, **options), function(**part, **options))
    assert len(counter.graphs) == 1


@every_operation
def test_a_single_token_is_left_to_the_compiler(name):
    function, _, arguments, options = arguments_of(name)
    part = first_tokens(arguments, 1)
    step, counter = compiled(function)
    assert_same(step(**part, **options), function(**part, **options))
    assert nodes_of(counter) == []


@every_operation
@pytest.mark.filterwarnings("ignore:There is a performance drop")
def test_vmap_and_gradients_of_functorch_equal_the_reference(name, monkeypatch):
    """A compiled transform leaves the operations to the reference, as an eager one does."""
    function, operation, arguments, options = arguments_of(name)
    leaves = {key: value.detach() for key, value in arguments.items()}
    rest = (None, None, *([True] if name == "selective_scan" else []))
    stacked = [torch.stack([value, value.flip(0)]) for value in leaves.values()]

    def total(*tensors):
        y, state = function(**dict(zip(leaves, tensors, strict=True)), **options)
        return y.sin().sum() + state.cos().sum()

    found = torch.vmap(lambda *tensors: operation(*tensors, *rest))(*stacked)
    each = torch.func.vmap(torch.func.grad(total, argnums=tuple(range(len(leaves)))))
    in_graph = torch.compile(each, backend="aot_eager")(*stacked)
    monkeypatch.setattr(backends, "BACKENDS", dict.fromkeys(backends.BACKENDS, ()))
    wanted = [function(**dict(zip(leaves, row, strict=True)), **options) for row in zip(*stacked, strict=True)]
    assert_same(found, [torch.stack(results) for results in zip(*wanted, strict=True)])
    assert_same(in_graph, each(*stacked))


@torch.no_grad()
def test_a_compiled_model_calls_the_kernels_of_its_mamba_layers():
    model, ids = random_model(tiny_config("mamba")), torch.randint(0, 61, (2, 30))
    step, counter = compiled(model)
    torch.testing.assert_close(step(ids, use_cache=False).logits, model(ids, use_cache=False).logits)
    layers = model.config.num_hidden_layers
    assert sorted(nodes_of(counter)) == ["causal_conv1d"] * layers + ["selective_scan"] * layers


def test_a_second_copy_of_the_code_registers_operations_of_its_own():
    """A model folder's code is loaded beside the package, and perhaps twice."""
    first, arguments = graph.causal_conv1d, (*conv_arguments(2, 9, 8, 4).values(), None, None)
    wanted = first(*arguments)
    for name in ("mambaformer.second_copy_mambaformer", "mambaformer.second_copy_mambaformer"):
        spec = importlib.util.spec_from_file_location(name, graph.__file__)
        sys.modules[name] = copy = importlib.util.module_from_spec(spec)
        try:
            spec.loader.exec_module(copy)
            assert copy.COPY != graph.COPY
            assert_same(copy.causal_conv1d(*arguments), wanted)
        finally:
            del sys.modules[name]
    assert_same(first(*arguments), wanted)


def test_an_exported_program_has_only_operations_of_pytorch():
    """It must run where this package is not installed."""
    model = random_model(tiny_config("mamba"))
    with torch.no_grad():
        program = torch.export.export(model, (torch.ones(1, 12, dtype=torch.long),), {"use_cache": False})
    assert "mambaformer" not in str([node.target for node in program.graph.nodes])


@every_operation
def test_a_graph_that_is_differentiated_twice_is_refused(name):
    _, operation, arguments, _ = arguments_of(name)
    y, _ = operation(*arguments.values(), None, None, *([True] if name == "selective_scan" else []))
    leaves = list(arguments.values())
    first = torch.autograd.grad(F.softplus(y).sum(), leaves[:1], create_graph=True)
    with pytest.raises(RuntimeError):
        torch.autograd.grad(first[0].sum(), leaves[:1])
