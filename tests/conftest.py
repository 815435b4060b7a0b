"""One thread, no network, no shared folders, the same random numbers every time."""

import os
import tempfile

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MAMBAFORMER_CACHE"] = tempfile.mkdtemp(prefix="mambaformer-tests-")

import pytest
import torch

torch.set_num_threads(1)


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)
