"""Writes the two generated files of the CPU kernels.

`csrc/structures.h` declares in C++ the constants and structures of the table in `ops_cpu_structures_mambaformer.py`.
`ops_cpu_source_mambaformer.py` is the Python module that ships the C++ of `csrc/`.

    python scripts/sources.py            # writes the files that are out of date
    python scripts/sources.py --check    # writes nothing; exit code 1 if a file is out of date
    python scripts/sources.py --warnings # writes nothing; exit code 1 if the C++ compiler warns, 0 without one

`csrc/kernels.cpp` is the only file that is compiled. The module holds it with each of its own headers in the place of
the first `#include`. `#line` keeps the names and line numbers of `csrc/` in the reports of compilers and sanitizers.
Needs nothing but Python; `--warnings` needs the package.
"""

import argparse
import os
import re
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER, ENTRY, MODULE = "csrc", "kernels.cpp", "ops_cpu_source_mambaformer.py"
TABLE, HEADER = "ops_cpu_structures_mambaformer.py", "structures.h"
WARNINGS = ("-std=c++17", "-Wall", "-Wextra", "-Werror")
OWN_INCLUDE = re.compile(r'#include "([^"]+)"')
HEADER_TEMPLATE = """\
// Generated from {table} by scripts/sources.py: edit that file and run `make sources`.
#pragma once

#include <stdint.h>

typedef int64_t Long;

{declarations}"""
TEMPLATE = '''\
# Generated from {folder}/ by scripts/sources.py: edit the files in {folder}/ and run `make sources`.
"""The C++ of all CPU kernels. A model's folder on the Hub holds Python files only, so the source is a string."""

SOURCE = r"""
{source}"""

__all__ = ["SOURCE"]
'''


def header_of(root: Path) -> str:
    """The text of the generated header."""
    return HEADER_TEMPLATE.format(table=TABLE, declarations=runpy.run_path(str(root / TABLE))["header"]())


def joined(folder: Path, header: str) -> str:
    """`kernels.cpp` with its own headers, each included once. Every file of `folder` must be among them."""
    included: set[str] = set()
    source = "".join(_lines_of(folder, ENTRY, included, header))
    left_out = {path.name for path in folder.iterdir()} - included
    if left_out:
        raise ValueError(
            f"{ENTRY} does not include {', '.join(sorted(left_out))}: add an #include, or remove the file."
        )
    return source


def _lines_of(folder: Path, name: str, included: set[str], header: str) -> list[str]:
    included.add(name)
    lines = [f'#line 1 "{FOLDER}/{name}"\n']
    text = header if name == HEADER else (folder / name).read_text(encoding="utf-8")
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        own = OWN_INCLUDE.match(line)
        if own and own[1] not in included:
            lines += [*_lines_of(folder, own[1], included, header), f'#line {number + 1} "{FOLDER}/{name}"\n']
        else:
            lines.append("\n" if own or line.startswith("#pragma once") else line)
    return lines


def generated_files(root: Path) -> dict[Path, str]:
    """The text of each generated file, by its path."""
    header = header_of(root)
    source = joined(root / FOLDER, header)
    if '"""' in source:
        raise ValueError(f'{FOLDER}/ contains """, which ends the string of {MODULE}.')
    return {root / FOLDER / HEADER: header, root / MODULE: TEMPLATE.format(folder=FOLDER, source=source)}


def out_of_date(root: Path) -> dict[Path, str]:
    """The generated files that are missing or differ, with the text that they should have."""
    files = generated_files(root).items()
    return {path: text for path, text in files if not path.exists() or path.read_text(encoding="utf-8") != text}


def has_warnings(root: Path) -> bool:
    """Whether the compiler warns for any width of vectors that this kind of processor has; its words are printed."""
    from mambaformer.ops_cpu_build_mambaformer import CAPABILITIES, COMPILERS

    compiler = next(filter(None, map(shutil.which, filter(None, (os.environ.get("CXX"), *COMPILERS)))), None)
    if compiler is None:
        return False
    widths = [(16, ()), *(CAPABILITIES.values() if os.uname().machine == "x86_64" else ())]
    command = [compiler, *WARNINGS, "-Wno-unknown-pragmas" if "clang" in compiler else "-fopenmp"]
    command += ["-S", "-o", os.devnull, str(root / FOLDER / ENTRY)]
    runs = [subprocess.run([*command, f"-DVECTOR_BYTES={width}", *flags]) for width, flags in widths]
    return any(run.returncode for run in runs)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if the module is out of date")
    parser.add_argument("--warnings", action="store_true", help="write nothing, and fail if the compiler warns")
    parser.add_argument("--root", type=Path, default=ROOT, help=f"folder of the code, with a folder `{FOLDER}`")
    args = parser.parse_args(argv)
    if args.warnings and has_warnings(args.root):
        return 1
    if args.warnings and not args.check:
        return 0
    stale = out_of_date(args.root)
    for path, text in stale.items():
        if args.check:
            print(f"{path} is out of date. Run `make sources`.")
        else:
            path.write_text(text, encoding="utf-8")
    return int(args.check and bool(stale))


if __name__ == "__main__":
    sys.exit(main())
