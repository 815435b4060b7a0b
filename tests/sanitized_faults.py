"""Faults planted in a process of their own, which the sanitizers must report; see `sanitize.py`."""

import re
import subprocess
import sys

import pytest

START = """
import ctypes, torch
from mambaformer.ops_cpu_interface_mambaformer import Weight, kernel_of

f32 = torch.float32
new = lambda *shape: torch.zeros(shape)

def linear(states, data, bias, outputs):
    weight = Weight(0, data, 0, bias, 64, 64)
    kernel_of("linear", f32)(states.data_ptr(), 1, ctypes.addressof(weight), outputs.data_ptr(), 1)

"""
FAULTS = {
    "nothing": ("linear(new(1, 64), (w := new(64, 64)).data_ptr(), (b := new(64)).data_ptr(), new(1, 64))", None),
    "a weight of too few rows": (
        "linear(new(1, 64), (w := new(63, 64)).data_ptr(), 0, new(1, 64))",
        "heap-buffer-overflow",
    ),
    "a bias of one number": (
        "linear(new(1, 64), (w := new(64, 64)).data_ptr(), (b := new(1)).data_ptr(), new(1, 64))",
        "heap-buffer-overflow",
    ),
    "outputs that are too short": (
        "linear(new(1, 64), (w := new(64, 64)).data_ptr(), 0, new(1, 60))",
        "heap-buffer-overflow",
    ),
    "a weight that was freed": (
        "w = new(64, 64); at = w.data_ptr(); del w; linear(new(1, 64), at, 0, new(1, 64))",
        "heap-use-after-free",
    ),
    "a weight that moved, as share_memory does it": (
        "w = new(64, 64); at = w.data_ptr(); w.share_memory_(); linear(new(1, 64), at, 0, new(1, 64))",
        "heap-use-after-free",
    ),
    "keys that were freed": (
        "q, k = new(1, 1, 1, 64), new(1, 1, 500, 64)\n"
        "shape = (ctypes.c_int64 * 17)(1, 1, 1, 1, 500, 64, 64, 64, 64, 32000, 32000, 64, 32000, 32000, 64, 0, 0)\n"
        "at = k.data_ptr(); del k\n"
        "kernel_of('attend', f32)(q.data_ptr(), at, at, None, 1.0, new(64).data_ptr(), ctypes.addressof(shape), 1)",
        "heap-use-after-free",
    ),
    "groups of no inputs": (
        "kernel_of('unpack_int4', f32, f32)((w := new(64, 16)).data_ptr(), 64, 32, 0, (s := new(64, 2)).data_ptr(), "
        "(y := new(32, 64)).data_ptr(), 1)",
        "division by zero",
    ),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found(name):
    script, report = FAULTS[name]
    done = subprocess.run([sys.executable, "-c", START + script], capture_output=True, text=True)
    if report is None:
        assert done.returncode == 0, done.stderr
        return
    assert done.returncode == 86 and report in done.stderr, done.stderr
    assert re.search(r"csrc/\w+\.h:\d+", done.stderr), "the report names the line"
