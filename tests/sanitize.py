"""Runs all code that reaches the CPU kernels under AddressSanitizer and UBSan (`make sanitize`).

    python tests/sanitize.py                 # planted faults, the kernels' own tests, 300 random models
    python tests/sanitize.py -k planted      # arguments are passed to pytest
    SANITIZED_MODELS=3000 python tests/sanitize.py

The kernels are compiled with both sanitizers (`MAMBAFORMER_CPU_SANITIZERS`) into a temporary folder. The library of
AddressSanitizer is loaded before Python, so PyTorch allocates through it too: an access past the end of any tensor's
memory, or to freed memory, ends the process with a report. Fresh memory is filled with NaN. Needs GCC on Linux.
"""

import os
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

TESTS = Path(__file__).resolve().parent
NUM_MODELS = int(os.environ.get("SANITIZED_MODELS", 300))
FILES = (
    "sanitized_models.py",
    "sanitized_faults.py",
    "test_kernel_arguments.py",
    "test_cpu_scan.py",
    "test_cpu_decode.py",
    "test_kernels_for_codes.py",
    "test_quantized_states.py",
)
# The preloaded library forwards C++ exceptions to the real function, which it finds only if libstdc++ is loaded too.
PRELOADED = ("libasan.so", "libstdc++.so")
FILL = "max_malloc_fill_size=1000000:malloc_fill_byte=255"  # NaN in every floating type
ASAN_OPTIONS = f"detect_leaks=0:detect_odr_violation=0:strict_init_order=0:exitcode=86:{FILL}"
UBSAN_OPTIONS = "print_stacktrace=1:halt_on_error=1:exitcode=86"

COMPILE = """
import sys
from mambaformer.ops_cpu_interface_mambaformer import kernels
sys.exit(kernels() is None)
"""


def environment(folder: Path) -> dict[str, str]:
    """The environment in which `folder` holds the sanitized kernels."""
    kernels = folder / "kernels"
    return {
        **os.environ,
        "MAMBAFORMER_CPU_SANITIZERS": "address,undefined",
        "MAMBAFORMER_TEST_KERNELS": str(kernels),
        "MAMBAFORMER_CACHE": str(folder),
        "SANITIZED_MODELS": str(NUM_MODELS),
        "OMP_NUM_THREADS": "1",
        "ASAN_OPTIONS": ASAN_OPTIONS,
        "UBSAN_OPTIONS": UBSAN_OPTIONS,
        "LD_PRELOAD": " ".join(_path_of(name) for name in PRELOADED),
    }


def _path_of(library: str) -> str:
    compiler = os.environ.get("CXX", "g++")
    path = subprocess.run([compiler, f"-print-file-name={library}"], capture_output=True, text=True, check=True).stdout
    if not os.path.isabs(path.strip()):
        sys.exit(f"{library} is missing: install the sanitizers of {compiler} (Debian: libasan8 and libubsan1).")
    return path.strip()


def compile_kernels(watched: dict[str, str]) -> None:
    """Compiles the library before the tests need it, which takes most of a minute."""
    if subprocess.run([sys.executable, "-c", COMPILE], env=watched).returncode:
        sys.exit("The kernels cannot be compiled with sanitizers.")


def run_tests(watched: dict[str, str], report: Path, arguments: list[str]) -> int:
    """Runs pytest; a process that a sanitizer ends counts as a failed test.

    Sanitizers write to file descriptor 2, so pytest may capture `sys.stderr` only.
    """
    options = ["--capture=sys", "-n", "2", "-p", "no:cacheprovider", f"--junitxml={report}"]
    files = [str(TESTS / name) for name in FILES]
    return subprocess.run([sys.executable, "-m", "pytest", *options, *files, *arguments], env=watched).returncode


def summarize(report: Path, is_complete: bool) -> bool:
    """Prints how many models ran, with which features, and the counts of tests; returns whether all is well."""
    cases = list(ElementTree.parse(report).iter("testcase"))
    features = Counter()
    for item in (item for case in cases for item in case.iter("property")):
        features[item.get("name")] += int(item.get("value"))
    num_models = features.pop("models", 0)
    print(f"{num_models} random models ran; " + ", ".join(f"{key}: {features[key]}" for key in sorted(features)))
    num_failed = sum(case.find("failure") is not None or case.find("error") is not None for case in cases)
    is_well = num_models == NUM_MODELS and all(features.values()) if is_complete else True
    if not is_well:
        print(f"Expected {NUM_MODELS} models, and each feature in one of them at least.")
        num_failed += 1
    print(f"{len(cases) - num_failed} passed, {num_failed} failed")
    return is_well


def main(arguments: list[str]) -> int:
    with tempfile.TemporaryDirectory(prefix="mambaformer-sanitized-") as folder:
        watched, report = environment(Path(folder)), Path(folder, "report.xml")
        Path(watched["MAMBAFORMER_TEST_KERNELS"]).mkdir(0o700)
        compile_kernels(watched)
        status = run_tests(watched, report, arguments)
        if not report.exists():
            print("0 passed, 1 failed")
            return status or 1
        return status if summarize(report, is_complete=not arguments) else status or 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
