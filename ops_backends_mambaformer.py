"""The table of backends: for each operation of `ops_mambaformer`, functions that may compute it faster.

A backend takes the arguments of the operation in their order, decides by `ops_eligibility_mambaformer` whether it may
run, and returns `None` if not, or if it does not take these sizes. A GPU kernel is one more function in a row.
"""

from collections.abc import Callable
from typing import Any

from .ops_cpu_codes_mambaformer import encode_on_cpu
from .ops_cpu_decode_mambaformer import (
    apply_rope_on_cpu,
    attention_on_cpu,
    linear_on_cpu,
    rms_norm_on_cpu,
    scale_singular_values_on_cpu,
    silu_gate_on_cpu,
)
from .ops_cpu_scan_mambaformer import convolve_on_cpu, scan_on_cpu, scan_rounded_on_cpu
from .ops_cpu_state_codes_mambaformer import decode_states_on_cpu, encode_states_on_cpu, round_states_on_cpu
from .ops_gpu_mambaformer import convolve_on_gpu, scan_on_gpu
from .ops_graph_mambaformer import convolve_in_graph, scan_in_graph

BACKENDS: dict[str, tuple[Callable, ...]] = {
    "linear": (linear_on_cpu,),
    "scale_singular_values": (scale_singular_values_on_cpu,),
    "rms_norm": (rms_norm_on_cpu,),
    "apply_rope": (apply_rope_on_cpu,),
    "silu_gate": (silu_gate_on_cpu,),
    "attention": (attention_on_cpu,),
    "encode": (encode_on_cpu,),
    "causal_conv1d": (convolve_on_cpu, convolve_in_graph, convolve_on_gpu),
    "selective_scan": (scan_on_cpu, scan_in_graph, scan_on_gpu),
    "matrix_recurrence": (),
    "rounded_scan": (scan_rounded_on_cpu,),
    "round_states": (round_states_on_cpu,),
    "encode_states": (encode_states_on_cpu,),
    "decode_states": (decode_states_on_cpu,),
}


def run_kernel(operation: str, *arguments: object) -> Any:  # the operation's own result
    """The result of the first backend that takes these arguments; `None` if the reference has to run."""
    for backend in BACKENDS[operation]:
        results = backend(*arguments)
        if results is not None:
            return results
    return None


__all__ = ["BACKENDS", "run_kernel"]
