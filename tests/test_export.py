"""`torch.export` of the forward without a cache: one program for any number of rows and tokens."""

import pytest
import torch
from torch.export import Dim

from oracle import assert_same_logits
from patterns import VOCAB
from tiny_models import shared_model

SHAPES = [(2, 12), (3, 7), (1, 40), (4, 2), (2, 16), (2, 17), (1, 1)]


def padded_ids(rows, length):
    mask = torch.ones(rows, length, dtype=torch.long)
    mask[0, : length // 3] = 0
    return {"input_ids": torch.randint(VOCAB, (rows, length)), "attention_mask": mask}


def exported(model, names, dims):
    inputs = {name: tensor for name, tensor in padded_ids(2, 12).items() if name in names}
    shapes = {name: {0: dims[0], 1: dims[1]} for name in names}
    with torch.no_grad():
        program = torch.export.export(
            model, (), {**inputs, "use_cache": False}, dynamic_shapes={**shapes, "use_cache": None}
        )
    return program.module()


@pytest.mark.slow
@pytest.mark.parametrize("names", [("input_ids",), ("input_ids", "attention_mask")], ids=["all real", "padded"])
@pytest.mark.parametrize("pattern", ["mamba", "full", "sliding_sinks", "hybrid", "hybrid_sliding", "everything"])
def test_an_exported_forward_takes_any_number_of_rows_and_tokens(pattern, names):
    """The scan and the windows wrote the length of the example into the graph: "tokens" had to be 12."""
    model = shared_model(pattern)
    dims = (
        (Dim("rows", min=1, max=64), Dim("tokens", min=1, max=4096)) if pattern != "hybrid" else (Dim.AUTO, Dim.AUTO)
    )
    program = exported(model, names, dims)
    for rows, length in SHAPES:
        inputs = {name: tensor for name, tensor in padded_ids(rows, length).items() if name in names}
        with torch.no_grad():
            found, wanted = program(**inputs, use_cache=False).logits, model(**inputs, use_cache=False).logits
        real = inputs.get("attention_mask", torch.ones_like(inputs["input_ids"])).bool()
        assert_same_logits(found[real], wanted[real])
