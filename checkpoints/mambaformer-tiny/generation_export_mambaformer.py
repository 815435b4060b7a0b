"""One decode step as a module, for `torch.export` and deployment without Python."""

import torch
from torch import nn

from .cache_history_mambaformer import Status
from .cache_mambaformer import MambaFormerCache


class DecodeStep(nn.Module):
    """Feeds one token per row after a cached sequence; all state that changes is in the module's buffers.

    Make one with `model.decode_step(cache)` and pass it to `torch.export.export(step, (input_ids,))`. The module
    continues from a fork, so the cache itself stays as it is. The expert vector in force becomes part of the module.
    All modules of one exported program share the buffers: together they continue one sequence.

    Args:
        model: a `MambaFormerForCausalLM`.
        cache: a static cache of the sequence to continue.

    Raises:
        ValueError: the cache is not static, is empty, or has to encode its sequence again first.
    """

    def __init__(self, model: nn.Module, cache: MambaFormerCache):
        super().__init__()
        if cache.max_columns is None:
            raise ValueError("A decode step needs tensors of fixed size: make the cache with storage='static'.")
        if cache.status != Status.CURRENT:
            raise ValueError("The cache has no sequence with current states: feed it to the model once, then export.")
        self.model, self.cache = model, cache.fork()
        # Names of buffers may not have dots.
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
