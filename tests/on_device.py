"""Runs the tests on another device: with `MAMBAFORMER_TEST_DEVICE=cuda` tensors are created there by default."""

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._device import _device_constructors


class OnDevice(TorchFunctionMode):
    """Factory functions of PyTorch create on `device`; numbers drawn by a CPU generator stay the same."""

    def __init__(self, device: str):
        super().__init__()
        self.device, self.factories = torch.device(device), _device_constructors()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.Tensor.numpy:
            return func(args[0].cpu(), *args[1:], **kwargs)
        if func not in self.factories or kwargs.get("device") is not None:
            return func(*args, **kwargs)
        generator = kwargs.get("generator")
        if generator is not None and generator.device.type == "cpu":
            return func(*args, **kwargs | {"device": "cpu"}).to(self.device)
        return func(*args, **kwargs | {"device": self.device})
