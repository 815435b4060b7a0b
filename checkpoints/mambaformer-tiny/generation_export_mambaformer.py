"""One decoding step as a module of its own, for `torch.export` and what comes after it."""

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
        # The name of a buffer has no dots.
        self.buffer_names = {name: name.replace(".", "_") for name in self.cache.buffers()}
        for name, tensor in self.cache.buffers().items():
            self.register_buffer(self.buffer_names[name], tensor, persistent=False)

    @torch.no_grad()
    def forward(self, input_ids: torch.LongTensor) -> torch.Tensor:
        """Token ids (rows, 1) -> logits (rows, 1, vocab_size)."""
        own = {name: getattr(self, buffer_name) for name, buffer_name in self.buffer_names.items()}
        self.cache.set_buffers(own)
        logits = self.model(input_ids, cache=self.cache).logits
        for name, tensor in self.cache.buffers().items():
            if tensor is not own[name]:
                own[name].copy_(tensor)
        return logits


__all__ = ["DecodeStep"]
