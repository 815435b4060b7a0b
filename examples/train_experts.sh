#!/bin/sh
# Trains the two experts that the repo ships, from texts that Debian and Python bring. Resumes what was cut off.
#   sh examples/train_experts.sh [python]
set -eu
python=${1:-python}
mkdir -p runs/text experts
bible -f gen1:1-rev22:21 | sed 's/^[^ ]* //' > runs/text/king_james.txt
"$python" - > runs/text/python.txt <<'PYTHON'
import pathlib
import sysconfig

root = pathlib.Path(sysconfig.get_paths()["stdlib"])
packages = ["asyncio", "email", "http", "json", "logging", "unittest", "urllib", "xml", "concurrent"]
files = sorted(root.glob("*.py")) + sorted(path for name in packages for path in (root / name).rglob("*.py"))
print("\n".join(path.read_text(errors="ignore") for path in files))
PYTHON
for job in king_james:240 python:120; do
    name=${job%:*}
    "$python" examples/train_expert.py --text "runs/text/$name.txt" --name "$name" --output "experts/$name.safetensors" \
        --steps "${job#*:}" --eval-every 40 --held-out-blocks 16
done
