"""The files of a model's expert vectors: where they are saved, and where a loaded model looks for them."""

import os
from contextlib import suppress
from pathlib import Path
from typing import Any

from transformers.utils.hub import cached_file

from .configuration_mambaformer import MambaFormerConfig
from .expert_vectors_mambaformer import ExpertVectorLibrary, checked_name
from .files_folders_mambaformer import EXPERT_VECTORS_FOLDER, OLDER_EXPERT_VECTORS_FOLDER

# Arguments of `from_pretrained` that say where on the Hub a file is.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def save_expert_vectors(library: ExpertVectorLibrary, directory: str | os.PathLike) -> list[str]:
    """Writes the expert vectors of `library` under `directory`; returns the folders that were written."""
    if not len(library):
        return []
    library.save(Path(directory, EXPERT_VECTORS_FOLDER))
    return [EXPERT_VECTORS_FOLDER]


def load_named_expert_vectors(
    library: ExpertVectorLibrary, config: MambaFormerConfig, path: Any, arguments: dict[str, Any]
) -> None:
    """Adds the expert vectors that the configuration of a loaded model names, from where that configuration came from.

    Args:
        path, arguments: what `from_pretrained` was called with.

    Raises:
        OSError: a file is missing or cannot be fetched.
        ValueError: a damaged file, or nobody knows where the configuration came from.
    """
    names = [checked_name(name) for name in config.expert_vectors or []]
    if not names:
        return
    source = _source(config, arguments.get("config"))
    if source is None:
        raise ValueError(
            f"The configuration names the expert vectors {names}, but was not loaded from a folder that could hold "
            "their files: set `config.expert_vectors = None`, and add them to `model.expert_vectors` afterwards."
        )
    where = {key: arguments[key] for key in HUB_ARGUMENTS if arguments.get(key) is not None}
    if source != config.name_or_path:
        where.pop("revision", None)  # it is one of the weights' repository
    for name in names:
        library.load(_fetched(source, f"{name}.safetensors", where), name)


def _source(config: MambaFormerConfig, given: Any) -> str | None:
    """Where the configuration of a loaded model came from; None if that is unknown.

    Transformers stores where the weights came from as the name of `config`: for an adapter's folder, that is its base.
    """
    if isinstance(given, (str, os.PathLike)):
        source = os.fspath(given)
    else:
        # `AutoConfig` tells where it found a configuration by its name.
        told = [getattr(each, name, None) for each in (given, config) for name in ("_loaded_from", "name_or_path")]
        source = next((origin for origin in told if origin and origin != "None"), None)
    is_file = source is not None and os.path.isfile(source)
    return (os.path.dirname(source) or ".") if is_file else source


def _fetched(source: str, file: str, where: dict[str, Any]) -> str:
    try:
        return cached_file(source, f"{EXPERT_VECTORS_FOLDER}/{file}", **where)
    except OSError as error:
        with suppress(OSError):
            return cached_file(source, f"{OLDER_EXPERT_VECTORS_FOLDER}/{file}", **where)
        place = f"`{source}`" if "subfolder" not in where else f"`{where['subfolder']}` of `{source}`"
        raise OSError(
            f"The configuration in {place} names an expert vector whose file `{EXPERT_VECTORS_FOLDER}/{file}` cannot "
            f"be read there. Copy the folder `{EXPERT_VECTORS_FOLDER}` together with the rest, or set "
            f'`"expert_vectors": null` in config.json. ({error})'
        ) from error
