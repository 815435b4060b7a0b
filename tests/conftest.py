"""One thread, no network, no shared folders but that of the compiled kernels, the same random numbers every time.

Fresh memory holds NaN (integers their largest value), so that nothing is right by the chance of a zeroed page.
"""

import os
import tempfile
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # of the processes that tests start
os.environ["MAMBAFORMER_CACHE"] = tempfile.mkdtemp(prefix="mambaformer-tests-")
# Workers inherit the folder from the process that starts them, so that each kernel is compiled once a run.
kernels = os.environ.setdefault("MAMBAFORMER_TEST_KERNELS", tempfile.mkdtemp(prefix="mambaformer-kernels-"))
Path(kernels).mkdir(mode=0o700, exist_ok=True)
Path(os.environ["MAMBAFORMER_CACHE"], "kernels").symlink_to(kernels)

import pytest  # noqa: E402
import torch  # noqa: E402

from lanes import LANES, chosen  # noqa: E402

torch.set_num_threads(1)
torch.utils.deterministic.fill_uninitialized_memory = True  # acts in deterministic mode only
torch.use_deterministic_algorithms(True, warn_only=True)
if os.environ.get("MAMBAFORMER_TEST_DEVICE"):
    from on_device import OnDevice

    OnDevice(os.environ["MAMBAFORMER_TEST_DEVICE"]).__enter__()


def pytest_addoption(parser):
    parser.addoption("--lane", choices=LANES, default="all", help="which cases run: see tests/lanes.py")


def pytest_collection_modifyitems(config, items):
    every = list(items)
    items[:] = chosen(every, config.getoption("lane"))
    config.hook.pytest_deselected(items=[item for item in every if item not in set(items)])


@pytest.fixture(autouse=True)
def same_random_numbers_every_time():
    torch.manual_seed(0)


@pytest.fixture
def saved_session(tmp_path):
    """A model, a small session of it, and its file."""
    from patterns import tiny_config
    from saved_caches import made
    from tiny_models import random_model

    model = random_model(tiny_config("paper", num_hidden_layers=2))
    cache = made(model, "expert_per_row", "dense")
    cache.save(tmp_path / "s")
    return model, cache, tmp_path / "s"


@pytest.fixture
def counted_svd(monkeypatch):
    """The shapes of the matrices that were decomposed."""
    seen, svd = [], torch.linalg.svd
    monkeypatch.setattr(torch.linalg, "svd", lambda matrix, *a, **k: seen.append(matrix.shape) or svd(matrix, *a, **k))
    return seen
