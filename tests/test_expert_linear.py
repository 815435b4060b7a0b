"""A linear layer with scaled singular values, judged by `U diag(s * z) V^T` from a plain SVD in float64."""

import pytest
import torch
from torch import nn

from loops import normal
from mambaformer.expert_bases_mambaformer import (
    SingularBasis,
    compute_basis,
)
from mambaformer.expert_linear_mambaformer import apply_expert_linear, merged_weight, scale_basis
from patterns import LINEAR_SHAPES
from reference import tuned_weight
from tiny_models import random_linear


@pytest.mark.parametrize("rank", [None, 1, 4])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", LINEAR_SHAPES.values(), ids=LINEAR_SHAPES)
def test_merged_equals_on_the_fly_equals_the_definition(shape, bias, rank):
    module = random_linear(*shape, bias)
    rank = min(rank or 99, *shape)
    z = normal(rank, seed=3) * 2
    expected = tuned_weight(module.weight, z)
    basis = compute_basis(module.weight)
    merged = merged_weight(module.weight, basis, z)
    torch.testing.assert_close(merged, expected, rtol=0, atol=1e-10)
    hidden_states = normal(2, 5, shape[1], seed=4)
    found = apply_expert_linear(module, hidden_states, scale_basis(basis, z))
    torch.testing.assert_close(found, nn.functional.linear(hidden_states, expected, module.bias), rtol=0, atol=1e-10)


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", LINEAR_SHAPES.values(), ids=LINEAR_SHAPES)
def test_every_row_gets_its_own_expert(shape, bias):
    module = random_linear(*shape, bias)
    narrow = min(shape)
    rows = [normal(narrow, seed=5), None, normal(max(1, narrow - 2), seed=6), torch.ones(narrow)]
    hidden_states = normal(4, 3, shape[1], seed=7)
    found = apply_expert_linear(module, hidden_states, scale_basis(compute_basis(module.weight), rows))
    for row, z in enumerate(rows):
        expected = module.weight if z is None else tuned_weight(module.weight, z)
        expected = nn.functional.linear(hidden_states[row], expected, module.bias)
        torch.testing.assert_close(found[row], expected, rtol=0, atol=1e-10)
    base = module(hidden_states)
    assert torch.equal(found[1], base[1])
    assert torch.equal(found[3], base[3])


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_ones_and_no_expert_give_the_bits_of_the_base(shape, dtype):
    module = random_linear(*shape, bias=True).to(dtype)
    hidden_states = normal(2, 3, shape[1]).to(dtype)
    base = module(hidden_states)
    basis = compute_basis(module.weight)
    assert torch.equal(apply_expert_linear(module, hidden_states), base)
    cast = basis.to(dtype, "cpu")
    assert torch.equal(apply_expert_linear(module, hidden_states, scale_basis(cast, torch.ones(24))), base)
    assert torch.equal(merged_weight(module.weight, basis, torch.ones(24)), module.weight)
    assert scale_basis(cast, None) is None
    assert scale_basis(cast, [None, None]) is None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(40, 24), (24, 40)])
def test_half_precision_stays_in_its_dtype_and_near_the_definition(shape, dtype):
    """Looser: a few roundings of 8 (11) bits each, on outputs of scale 10."""
    module = random_linear(*shape, bias=True).to(dtype)
    hidden_states = normal(2, 3, shape[1]).to(dtype)
    z = 1 + 0.3 * normal(24, dtype=torch.float32)
    found = apply_expert_linear(module, hidden_states, scale_basis(compute_basis(module.weight).to(dtype, "cpu"), z))
    assert found.dtype == dtype
    exact = nn.functional.linear(hidden_states.double(), tuned_weight(module.weight.double(), z), module.bias.double())
    torch.testing.assert_close(found.double(), exact, rtol=0, atol=60 * torch.finfo(dtype).eps)


def test_only_the_first_columns_of_the_basis_are_used():
    module = random_linear(9, 6)
    basis = compute_basis(module.weight)
    poisoned = SingularBasis(basis.vectors.clone(), basis.values, basis.side)
    poisoned.vectors[:, 2:] = torch.nan
    z = normal(2)
    assert torch.equal(merged_weight(module.weight, poisoned, z), merged_weight(module.weight, basis, z))
    hidden_states = normal(1, 4, 6)
    found = apply_expert_linear(module, hidden_states, scale_basis(poisoned, [z]))
    assert torch.equal(found, apply_expert_linear(module, hidden_states, scale_basis(basis, [z])))


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_gradients_reach_the_scales_and_the_activations(shape):
    module = random_linear(*shape, bias=True).requires_grad_(False)
    basis = compute_basis(module.weight)
    z = normal(3, seed=8).requires_grad_()
    hidden_states = normal(2, 2, shape[1], seed=9).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z, x: apply_expert_linear(module, x, scale_basis(basis, z)), (z, hidden_states)
    )
    assert torch.autograd.gradcheck(
        lambda z, x: apply_expert_linear(module, x, scale_basis(basis, [z, None])), (z, hidden_states)
    )


@pytest.mark.parametrize("shape", [(6, 4), (4, 6)])
def test_project_compiles_as_one_graph(shape):
    module = random_linear(*shape, bias=True)
    scaled = scale_basis(compute_basis(module.weight), [normal(3), None])
    hidden_states = normal(2, 5, shape[1])
    compiled = torch.compile(apply_expert_linear, backend="eager", fullgraph=True)
    torch.testing.assert_close(
        compiled(module, hidden_states, scaled), apply_expert_linear(module, hidden_states, scaled), rtol=0, atol=1e-10
    )


def test_per_row_scales_refuse_activations_without_as_many_rows():
    """Broadcasting would have mixed the rows (B, in) x (B, 1, r) -> (B, B, r), or repeated one row, in silence."""
    module = random_linear(6, 4)
    scaled = scale_basis(compute_basis(module.weight), [normal(3), None])
    for shape in [(2, 4), (1, 3, 4), (3, 3, 4)]:
        with pytest.raises(ValueError, match="expert vectors for 2 rows"):
            apply_expert_linear(module, normal(*shape), scaled)


def test_a_wrapped_module_is_seen_only_from_outside():
    class Wrapper(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        def forward(self, hidden_states):
            return self.inner(hidden_states)

    module = random_linear(4, 6)
    scaled = scale_basis(compute_basis(module.weight), normal(4))
    hidden_states = normal(2, 3, 6)
    assert torch.equal(
        apply_expert_linear(Wrapper(module), hidden_states, scaled), apply_expert_linear(module, hidden_states, scaled)
    )
