"""One thread, no network, no shared folders but that of the compiled kernels, the same random numbers every time."""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MAMBAFORMER_CACHE"] = tempfile.mkdtemp(prefix="mambaformer-tests-")
# Workers inherit the folder from the process that starts them, so that each kernel is compiled once a run.
kernels = os.environ.setdefault("MAMBAFORMER_TEST_KERNELS", tempfile.mkdtemp(prefix="mambaformer-kernels-"))
Path(os.environ["MAMBAFORMER_CACHE"], "kernels").symlink_to(kernels)

import pytest  # noqa: E402
import torch  # noqa: E402

torch.set_num_threads(1)
if os.environ.get("MAMBAFORMER_TEST_DEVICE"):
    from on_device import OnDevice

    OnDevice(os.environ["MAMBAFORMER_TEST_DEVICE"]).__enter__()


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)
