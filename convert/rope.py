"""The RoPE scaling of a GGUF file, as Transformers' `rope_parameters`.

A GGUF file names linear and YaRN scaling in its metadata. It stores the effect of Llama
3.1's scaling on each frequency as the tensor `rope_freqs.weight`, from which the parameters are recovered.
"""

import math
from collections.abc import Iterator, Mapping

import torch
from torch import Tensor

# Of 1 / factor. The files are written in float32, whose rounding moves 1 / factor by up to 3e-7.
FACTOR_TOLERANCE = 1e-6
# llama.cpp's converter writes Transformers' `attention_factor`, the whole factor, as `yarn_attn_factor`.
YARN_KEYS = {"yarn_attn_factor": "attention_factor", "yarn_beta_fast": "beta_fast", "yarn_beta_slow": "beta_slow"}


def rope_from_gguf(metadata: Mapping, head_dim: int, factors: Tensor | None) -> dict[str, object]:
    """Transformers' `rope_parameters` for the metadata of a GGUF file.

    Args:
        metadata: the file's keys, without the architecture's name, and values, which are numbers or strings.
        head_dim: width of one head.
        factors: `rope_freqs.weight` (head_dim / 2,), which divides the frequencies; `None` if the file has none.

    Raises:
        ValueError: these parameters cannot express the scaling.
    """
    theta = metadata.get("rope.freq_base", 10000.0)
    if not theta > 0:
        raise ValueError(f"`rope.freq_base` is {theta} in the GGUF file but must be positive.")
    scaling = _named_scaling(metadata)
    if factors is not None:
        recovered = recover_scaling(factors, theta, head_dim)
        if "default" not in (scaling["rope_type"], recovered["rope_type"]):
            raise ValueError(
                f"The GGUF file scales RoPE twice, by `rope_freqs.weight` and by `rope.scaling.type` "
                f"{scaling['rope_type']!r}: a MambaFormer has one scaling."
            )
        scaling = recovered if scaling["rope_type"] == "default" else scaling
    return {"rope_theta": theta} | scaling


def _named_scaling(metadata: Mapping) -> dict[str, object]:
    factor = metadata.get("rope.scaling.factor") or metadata.get("rope.scale_linear")
    # A factor without a type means linear scaling, as in files that are older than the key of the type.
    kind = metadata.get("rope.scaling.type", "none" if factor is None else "linear")
    if kind == "none":
        return {"rope_type": "default"}
    if kind not in ("linear", "yarn"):
        raise ValueError(
            f"`rope.scaling.type` is {kind!r} in the GGUF file: only 'none', 'linear', 'yarn' and Llama 3.1's "
            "`rope_freqs.weight` can be converted."
        )
    if factor is None or not factor > 0:
        raise ValueError(f"`rope.scaling.type` is {kind!r} in the GGUF file but `rope.scaling.factor` is {factor}.")
    if kind == "yarn":
        return _yarn(metadata, factor)
    if metadata.get("rope.scaling.attn_factor", 1.0) != 1.0:
        raise ValueError("`rope.scaling.attn_factor` is for 'yarn' but the GGUF file's RoPE is scaled linearly.")
    return {"rope_type": "default"} if factor == 1 else {"rope_type": "linear", "factor": factor}


def _yarn(metadata: Mapping, factor: float) -> dict[str, object]:
    if metadata.get("rope.scaling.yarn_ext_factor", 1.0) not in (1.0, -1.0):  # negative: not set
        raise ValueError(
            "`rope.scaling.yarn_ext_factor` in the GGUF file is not 1, the only value that Transformers' YaRN has."
        )
    if metadata.get("rope.scaling.yarn_log_multiplier", 0.0) != 0.0:
        raise ValueError("`rope.scaling.yarn_log_multiplier` in the GGUF file cannot be converted: it must be 0.")
    length = metadata.get("rope.scaling.original_context_length") or metadata["context_length"]
    scaling: dict = {"rope_type": "yarn", "factor": factor, "original_max_position_embeddings": length}
    values = {ours: metadata.get(f"rope.scaling.{theirs}") for theirs, ours in YARN_KEYS.items()}
    scaling |= {ours: value for ours, value in values.items() if value is not None and value > 0}
    # This factor multiplies YaRN's own (arXiv 2309.00071, equation 22).
    extra = metadata.get("rope.scaling.attn_factor", 1.0)
    if extra != 1.0:
        scaling["attention_factor"] = extra * scaling.get("attention_factor", 0.1 * math.log(max(factor, 1.0)) + 1.0)
    return scaling


def recover_scaling(factors: Tensor, theta: float, head_dim: int) -> dict[str, object]:
    """The scaling that divides the frequencies of RoPE by `factors` (head_dim / 2,).

    Llama 3.1 divides a frequency by 1 where it is high, by `factor` where it is low, and between these bands by
    1 / (smooth + (1 - smooth) / factor), with `smooth` a linear function of the frequency. The line through the points
    between the bands determines the parameters.

    Raises:
        ValueError: no parameters give these factors.
    """
    if factors.shape != (head_dim // 2,):
        raise ValueError(
            f"`rope_freqs.weight` in the GGUF file has {tuple(factors.shape)} elements for heads of {head_dim}, which "
            f"need {head_dim // 2}."
        )
    if not theta > 1:
        raise ValueError(
            f"`rope.freq_base` is {theta} in the GGUF file, and its `rope_freqs.weight` needs one above 1."
        )
    factors = factors.double()
    largest = factors.max().item()
    if bool((factors == 1).all()):
        return {"rope_type": "default"}
    if bool((factors == largest).all()) and largest > 0:
        return {"rope_type": "linear", "factor": largest}
    rates = theta ** (-torch.arange(0, head_dim, 2, dtype=torch.float64) / head_dim) / (2 * math.pi)
    if bool(((factors >= 1) & (factors <= largest)).all()) and math.isfinite(largest):
        smooth = (1 / factors - 1 / largest) / (1 - 1 / largest)
        for slope, offset in _lines(rates, smooth):
            for scaling in _scalings(slope, offset, largest):
                if _gives(scaling, rates, factors):
                    return scaling
    raise ValueError(
        "`rope_freqs.weight` in the GGUF file is not the scaling of Llama 3.1: its factors must have three bands "
        "of frequencies."
    )


def _lines(rates: Tensor, smooth: Tensor) -> Iterator[tuple[float, float]]:
    """Candidates (slope, offset) for smooth = slope * rate - offset, where rates are 1 / wavelength in tokens."""
    between = (smooth > 1e-6) & (smooth < 1 - 1e-6)
    above, below = rates[smooth >= 1 - 1e-6], rates[smooth <= 1e-6]
    lowest_above = above.min().item() if len(above) else math.inf
    highest_below = below.max().item()
    count = int(between.sum())
    if count >= 2:
        first, last = rates[between].max().item(), rates[between].min().item()
        slope = ((smooth[between].max() - smooth[between].min()) / (first - last)).item()
        yield slope, slope * last - smooth[between].min().item()
    elif count == 1:
        rate, value = rates[between].item(), smooth[between].item()
        slope = (value + 1 / 3) / rate  # with Llama 3.1's bands, whose borders are 1 : 4
        yield slope, 1 / 3
        slope = max((1 - value) / (lowest_above - rate), value / (rate - highest_below))
        yield slope, slope * rate - value
    else:
        slope = 1 / (3 * highest_below)
        yield slope, 1 / 3
        slope = 1 / (lowest_above - highest_below)
        yield slope, slope * highest_below


def _scalings(slope: float, offset: float, factor: float) -> Iterator[dict]:
    """Parameters of Llama 3.1's scaling for a line: round ones first, then ones that fit the line exactly.

    Only ratios matter: the original length and the borders of both bands may be multiplied by the same number.
    """
    if not (slope > 0 and offset > 0):
        return
    high = round(1 + 1 / offset, 2)
    length = max(1, round(slope * (high - 1)))
    yield _llama3(factor, 1.0, high, length)
    length = max(1, round(slope / offset))
    yield _llama3(factor, offset * length / slope, (offset + 1) * length / slope, length)


def _llama3(factor: float, low: float, high: float, length: int) -> dict:
    return {
        "rope_type": "llama3",
        "factor": factor,
        "low_freq_factor": low,
        "high_freq_factor": high,
        "original_max_position_embeddings": length,
    }


def _gives(scaling: Mapping, rates: Tensor, factors: Tensor) -> bool:
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    if not high > low:
        return False
    smooth = ((scaling["original_max_position_embeddings"] * rates - low) / (high - low)).clamp(0, 1)
    inverse = smooth + (1 - smooth) / scaling["factor"]
    return bool(((inverse - 1 / factors).abs() <= FACTOR_TOLERANCE).all())


__all__ = ["recover_scaling", "rope_from_gguf"]
