"""Copies the shipped code into the model folders of `checkpoints/`, so that each works wherever it is copied to.

    python scripts/folders.py            # writes copies that are missing or out of date, removes those that are extra
    python scripts/folders.py --check    # writes nothing; exit code 1 if a copy is missing, out of date or extra

The shipped files are the ones that `save_pretrained` writes: the models, the configuration, and what they import
relatively. Needs nothing but Python.
"""

import argparse
import re
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
ENTRIES = ("configuration_mambaformer.py", "modeling_mambaformer.py")
CODE = "*_mambaformer.py"
# The same lines that Transformers' loader of remote code follows, also in docstrings and inside functions.
RELATIVE_IMPORT = re.compile(r"^\s*from\s+\.(\w+)\s+import", re.MULTILINE)


def shipped_files(root: Path = ROOT) -> dict[str, bytes]:
    """Name -> content of each file of `root` that remote code needs."""
    shipped: dict[str, bytes] = {}
    names = list(ENTRIES)
    while names:
        name = names.pop()
        if name not in shipped:
            shipped[name] = (root / name).read_bytes()
            names += [f"{module}.py" for module in RELATIVE_IMPORT.findall(shipped[name].decode())]
    return dict(sorted(shipped.items()))


def model_folders(root: Path = ROOT) -> list[Path]:
    """The folders of `checkpoints/` that load by themselves: the ones with a configuration."""
    return sorted(path.parent for path in (root / "checkpoints").glob("*/config.json"))


def faults(folder: Path, shipped: dict[str, bytes]) -> list[str]:
    """Why `folder` does not hold the shipped code, a line for each file; empty if it does."""
    present = {path.name: path for path in folder.glob(CODE)}
    found = [f"{folder / name} is missing" for name in shipped if name not in present]
    for name, path in sorted(present.items()):
        if name not in shipped:
            found.append(f"{path} is no shipped file")
        elif path.is_symlink():
            found.append(f"{path} is a link, which breaks when the folder is copied")
        elif path.read_bytes() != shipped[name]:
            found.append(f"{path} differs from {name}")
    return found


def refresh(folder: Path, shipped: dict[str, bytes]) -> None:
    """Makes the code of `folder` that of `shipped`; leaves all other files alone."""
    for path in folder.glob(CODE):
        if path.is_symlink() or path.name not in shipped:
            path.unlink()
    for name, content in shipped.items():
        path = folder / name
        if not path.exists() or path.read_bytes() != content:
            path.write_bytes(content)


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing, and fail if a copy is not up to date")
    parser.add_argument("--root", type=Path, default=ROOT, help="folder of the code, with a folder `checkpoints`")
    args = parser.parse_args(argv)
    shipped = shipped_files(args.root)
    found = [line for folder in model_folders(args.root) for line in faults(folder, shipped)]
    if args.check:
        for line in found:
            print(line)
        if found:
            print("Run `make folders` to refresh the copies.")
        return int(bool(found))
    for folder in model_folders(args.root):
        refresh(folder, shipped)
    return 0


if __name__ == "__main__":
    sys.exit(main())
