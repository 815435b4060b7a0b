"""The table of mixers: the kinds in `config.mixers` and the values of `config.recurrent_mixer`, with their classes.

A new recurrent mixer is a file `mixer_..._mambaformer.py` and a row here.
"""

from .configuration_mambaformer import MambaFormerConfig
from .mixer_attention_mambaformer import MambaFormerAttention
from .mixer_base_mambaformer import MambaFormerMixer
from .mixer_conv_mambaformer import MambaFormerShortConvMixer
from .mixer_delta_mambaformer import MambaFormerGatedDeltaMixer
from .mixer_mamba2_mambaformer import MambaFormerMamba2Mixer
from .mixer_mamba_mambaformer import MambaFormerMambaMixer
from .mixer_mlp_mambaformer import MambaFormerMLP

MIXERS: dict[str, type[MambaFormerMixer]] = {
    "attention": MambaFormerAttention,
    "short_conv": MambaFormerShortConvMixer,
    "mlp": MambaFormerMLP,
}
RECURRENT_MIXERS: dict[str, type[MambaFormerMixer]] = {
    "mamba": MambaFormerMambaMixer,
    "mamba2": MambaFormerMamba2Mixer,
    "gated_delta": MambaFormerGatedDeltaMixer,
}


def mixers_of(config: MambaFormerConfig, layer_idx: int) -> list[type[MambaFormerMixer]]:
    """The mixers of one layer, in the order in which a token passes through them.

    Raises:
        ValueError: `config.recurrent_mixer` names no mixer.
    """
    return [_class_of(config, kind) for kind in config.mixers(layer_idx)]


def _class_of(config: MambaFormerConfig, kind: str) -> type[MambaFormerMixer]:
    if kind != "recurrent":
        return MIXERS[kind]
    if config.recurrent_mixer not in RECURRENT_MIXERS:
        raise ValueError(f"`recurrent_mixer` is {config.recurrent_mixer!r}: choose one of {sorted(RECURRENT_MIXERS)}.")
    return RECURRENT_MIXERS[config.recurrent_mixer]


def _used_mixers(config: MambaFormerConfig) -> dict[str, type[MambaFormerMixer]]:
    found = [mixer for idx in range(config.num_hidden_layers) for mixer in mixers_of(config, idx)]
    return {mixer.name: mixer for mixer in found}


def check_can_be_split(config: MambaFormerConfig, num_processes: int) -> None:
    """Refuses a number of tensor-parallel processes that does not divide heads or channels.

    Raises:
        ValueError: names the fields.
    """
    sizes = [mixer.split_sizes(config) for mixer in _used_mixers(config).values()]
    uneven = [name for fields in sizes for name, size in fields.items() if size % num_processes]
    if uneven:
        raise ValueError(
            f"{uneven} cannot be split evenly over {num_processes} processes: load the model with fewer of them."
        )


__all__ = ["MIXERS", "RECURRENT_MIXERS", "check_can_be_split", "mixers_of"]
