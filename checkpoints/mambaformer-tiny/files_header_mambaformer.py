"""Parses the parts of untrusted files: JSON, and the table of tensors of a safetensors file.

Any fault of a file raises `ValueError` before a tensor is made. The parsers themselves would raise `RecursionError`,
`OverflowError` or `RuntimeError`, or allocate petabytes.
"""

import json
import math
from typing import Any, TypeGuard

# Bytes of one element, by the name of the dtype in the file.
ELEMENT_BYTES = {"BOOL": 1, "U8": 1, "I8": 1, "F8_E4M3": 1, "F8_E5M2": 1, "I16": 2, "F16": 2, "BF16": 2}
ELEMENT_BYTES |= {"I32": 4, "F32": 4, "I64": 8, "F64": 8}
MAX_DIMS = 8  # the tensors of our files have at most four
# A tensor without elements may claim any other dimension; PyTorch's strides hold products below 2**63.
MAX_EXTENT = 2**48
MAX_DEPTH = 64  # of nested lists and objects; Python's own recursion ends near 1,000


# `Any`, as `json.loads` has it: each caller checks the value that it reads.
def json_of(text: str | bytes) -> Any:
    """The value of a JSON text.

    Raises:
        ValueError: the text is not JSON, has a key twice, or is nested more than `MAX_DEPTH` deep.
    """
    try:
        value = json.loads(text, object_pairs_hook=_without_repeats)
    except RecursionError as error:
        raise ValueError(f"it is nested more than {MAX_DEPTH} deep") from error
    _check_depth(value)
    return value


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    value = dict(pairs)
    if len(value) != len(pairs):
        raise ValueError("it has the same key twice")
    return value


def _check_depth(value: object) -> None:
    level, depth = [value], 0
    while level:
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        parents = (list(each.values()) if isinstance(each, dict) else each for each in level)
        level = [each for values in parents if isinstance(values, list) for each in values]
        level = [each for each in level if isinstance(each, (dict, list))]
        depth += 1


def strings_of(table: object) -> dict[str, str]:
    """The `__metadata__` of a safetensors header.

    Raises:
        ValueError: the header is not an object, or its metadata are not strings.
    """
    if not isinstance(table, dict):
        raise ValueError("its header is not a JSON object")
    metadata = table.get("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise ValueError("the metadata in its header are not strings")
    return metadata


def check_table(table: dict[str, object], num_bytes: int) -> None:
    """Checks that the tensors of a safetensors header have valid sizes and fill `num_bytes` without a gap.

    Raises:
        ValueError: they do not; the message names the tensor.
    """
    spans = [_span_of(name, entry) for name, entry in table.items() if name != "__metadata__"]
    end = 0
    for start, stop in sorted(spans):
        if start != end:
            raise ValueError(f"the tensor at byte {start} should start at {end}")
        end = stop
    if end != num_bytes:
        raise ValueError(f"its tensors take {end} bytes, and it has {num_bytes}")


def _span_of(name: str, entry: object) -> tuple[int, int]:
    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise ValueError(f"the tensor {name[:200]!r} has no dtype, shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    if not isinstance(dtype, str) or dtype not in ELEMENT_BYTES:
        raise ValueError(f"the tensor {name[:200]!r} has an unknown dtype")
    if not _are_counts(shape) or len(shape) > MAX_DIMS or math.prod(max(size, 1) for size in shape) > MAX_EXTENT:
        raise ValueError(f"the tensor {name[:200]!r} has an invalid shape")
    if not _are_counts(offsets) or len(offsets) != 2:
        raise ValueError(f"the tensor {name[:200]!r} has invalid offsets")
    if offsets[1] - offsets[0] != math.prod(shape) * ELEMENT_BYTES[dtype]:
        raise ValueError(f"the tensor {name[:200]!r} has another number of bytes than its shape")
    return offsets[0], offsets[1]


def _are_counts(values: object) -> TypeGuard[list[int]]:
    return isinstance(values, list) and all(type(value) is int and 0 <= value < 2**63 for value in values)


__all__ = ["check_table", "json_of", "strings_of"]
