"""The command `mambaformer-convert SOURCE OUTPUT`: `convert` with its options as arguments."""

import argparse
import re
import sys
from collections import Counter

from safetensors import SafetensorError

from ..configuration_mambaformer import WINDOW_POSITIONS
from ..modeling_mambaformer import MambaFormerForCausalLM
from .conversion import convert

MAMBA_FIELDS = ("mamba_d_state", "mamba_d_conv", "mamba_expand", "mamba_dt_rank")


def main(argv: list[str] | None = None) -> int:
    """Runs `mambaformer-convert`; returns 0. An invalid argument or source exits with code 2 and one line."""
    parser = _parser()
    args = parser.parse_args(argv)
    mamba = {name: getattr(args, name) for name in MAMBA_FIELDS if getattr(args, name) is not None}
    try:
        model = convert(
            args.source,
            upcycle=args.upcycle,
            window=args.window,
            num_sink_tokens=args.num_sink_tokens,
            window_positions=args.window_positions,
            output_dir=args.output,
            dtype=args.dtype,
            mamba=mamba,
            mamba_delta=args.mamba_delta,
            gguf_file=args.gguf_file,
            seed=args.seed,
        )
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError, SafetensorError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        parser.exit(2, f"{parser.prog}: error: {reason}\n")
    except KeyboardInterrupt:
        parser.exit(130, f"{parser.prog}: error: interrupted, {args.output} was not written\n")
    print(_summary(model, args.output))
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser("mambaformer-convert", description="Turn a checkpoint into a MambaFormer.")
    parser.add_argument("source", help="a directory with config.json and weights, or a *.gguf file")
    parser.add_argument("output", help="directory to write to")
    parser.add_argument("--gguf-file", help="name of the GGUF file inside the directory SOURCE")
    parser.add_argument(
        "--upcycle", type=_upcycle, metavar="all|0,2,5", help="attention layers that get a Mamba mixer"
    )
    parser.add_argument("--window", type=int, metavar="TOKENS", help="attention window of these layers")
    parser.add_argument(
        "--num-sink-tokens", type=int, default=0, metavar="TOKENS", help="first tokens that every query sees"
    )
    parser.add_argument(
        "--window-positions",
        choices=WINDOW_POSITIONS,
        default="absolute",
        help="relative: for sequences of any length",
    )
    parser.add_argument("--mamba-delta", metavar="FILE", help="trained Mamba weights, instead of new mixers")
    parser.add_argument("--dtype", help="dtype of the result, e.g. bfloat16; default: the source's")
    parser.add_argument("--seed", type=int, default=0, help="seed of the new mixers' initial weights")
    for name, meaning in (("state", "N"), ("conv", "K")):
        parser.add_argument(f"--mamba-d-{name}", type=int, metavar=meaning, help=f"{meaning} of the new mixers")
    parser.add_argument("--mamba-expand", type=_number, metavar="E", help="E of the new mixers")
    parser.add_argument("--mamba-dt-rank", type=int, metavar="R", help="R of the new mixers")
    return parser


def _upcycle(text: str) -> str | list[int]:
    if text == "all":
        return text
    if not re.fullmatch(r"\d+(,\d+)*", text):
        raise argparse.ArgumentTypeError(f"{text!r} is neither 'all' nor layer indices such as 0,2,5")
    return [int(part) for part in text.split(",")]


def _number(text: str) -> int | float:
    return int(text) if text.isdecimal() else float(text)


def _summary(model: MambaFormerForCausalLM, output: str) -> str:
    kinds = ", ".join(f"{count} {kind}" for kind, count in sorted(Counter(model.config.layer_types).items()))
    return (
        f"{model.config.num_hidden_layers} layers ({kinds}), {model.num_parameters():,} parameters in {model.dtype}\n"
        f"saved to {output}: AutoModelForCausalLM.from_pretrained({output!r}, trust_remote_code=True)"
    )


if __name__ == "__main__":
    sys.exit(main())
