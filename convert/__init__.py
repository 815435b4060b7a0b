"""Converts checkpoints of other models into MambaFormers that compute the same logits.

`conversion` has `convert`, `cli` the command `mambaformer-convert`. A source is a model or a folder (`sources`), or
GGUF files (`gguf`, `rope`). A row of `families.FAMILIES` describes a family: the origin of each configuration field,
the type of each layer, and the source's names of our tensors. `mamba_delta` stores the trained Mamba
weights of a hybrid without the weights of its source.

Model folders get no copy of this package. The attribute `mambaformer.convert` is the function `convert`; modules of
this package are imported by name, as in `from mambaformer.convert.families import FAMILIES`.
"""

from .conversion import convert
from .mamba_delta import MambaDelta, load_mamba_delta, save_mamba_delta
from .sources import find_smollm2

__all__ = ["MambaDelta", "convert", "find_smollm2", "load_mamba_delta", "save_mamba_delta"]
