"""One decoding step as a module of its own, for `torch.export` and what comes after it."""

from collections.abc import Iterator

import torch
from torch import nn

from .cache_history_mambaformer import Status
from .cache_mambaformer import MambaFormerCache


class DecodeStep(nn.Module):
    """Feeds one token a row behind a text; all that moves on from step to step is in its buffers.

    Make one with `model.decode_step(cache)` and hand it to `torch.export.export(step, (input_ids,))`. The module goes
    on from a fork, so the cache itself stays as it is. The expert that the cache has in force becomes part of it.
    All modules of one exported program share these buffers: together they go on with one text.

    Args:
        model: a `MambaFormerForCausalLM`.
        cache: static, with the text to go on from.

    Raises:
        ValueError: the cache is not static, holds no text, or has to encode its text again first.
    """

    def __init__(self, model: nn.Module, cache: MambaFormerCache):
        super().__init__()
        if cache.max_columns is None:
            raise ValueError("A step needs tensors of fixed size: make the cache with storage='static'.")
        if cache.status != Status.CURRENT:
            raise ValueError("The cache holds no text that is encoded as it is now: feed a token first.")
        self.model, self.cache = model, cache.fork()
        for name, holder, key in self._places():
            self.register_buffer(name, holder[key], persistent=False)

    @torch.no_grad()
    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Token ids (rows, 1) -> logits (rows, 1, vocab_size)."""
        for name, holder, key in self._places():
            holder[key] = getattr(self, name)
        logits = self.model(input_ids, cache=self.cache).logits
        for name, holder, key in self._places():
            if holder[key] is not getattr(self, name):
                getattr(self, name).copy_(holder[key])
        return logits

    def _places(self) -> Iterator[tuple[str, dict, str]]:
        """Where the cache keeps its tensors: a name, and the dictionary and key that hold the tensor."""
        lengths = vars(self.cache.lengths)
        for key in ("columns", "counts"):
            if lengths[key] is not None:
                yield key, lengths, key
        for key, buffer in self.cache.history.buffers().items():
            if buffer.tensor is not None:
                yield key, vars(buffer), "tensor"
        for idx, layer in enumerate(self.cache.layers):
            if layer.attention is not None:
                yield f"keys_{idx}", vars(layer.attention.keys), "tensor"
                yield f"values_{idx}", vars(layer.attention.values), "tensor"
            if layer.recurrent is not None:
                for key in layer.recurrent.states:
                    yield f"{key}_{idx}", layer.recurrent.states, key


__all__ = ["DecodeStep"]
