"""The files of a model's expert vectors: their folder when a model is saved, and their source when it is loaded."""

import os
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import cast

from transformers.utils.hub import cached_file

from .configuration_mambaformer import MambaFormerConfig
from .expert_vectors_mambaformer import ExpertVectorLibrary, checked_name
from .files_folders_mambaformer import EXPERT_VECTORS_FOLDER, OLDER_EXPERT_VECTORS_FOLDER

# Arguments of `from_pretrained` that locate a file on the Hub.
HUB_ARGUMENTS = ("cache_dir", "force_download", "local_files_only", "token", "revision", "subfolder")


def save_expert_vectors(library: ExpertVectorLibrary, directory: str | os.PathLike) -> list[str]:
    """Writes the expert vectors of `library` under `directory`; returns the folders that were written."""
    if not len(library):
        return []
    library.save(Path(directory, EXPERT_VECTORS_FOLDER))
    return [EXPERT_VECTORS_FOLDER]


def load_named_expert_vectors(
    library: ExpertVectorLibrary, config: MambaFormerConfig, arguments: Mapping[str, object]
) -> None:
    """Adds the expert vectors that the configuration of a loaded model names, from the configuration's own source.

    Args:
        arguments: the keyword arguments of `from_pretrained`.

    Raises:
        OSError: a file is missing or cannot be fetched.
        ValueError: a file is damaged, or the source of the configuration is unknown.
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
        where.pop("revision", None)  # belongs to the repository of the weights
    for name in names:
        library.load(_fetched(source, f"{name}.safetensors", where), name)


def _source(config: MambaFormerConfig, argument: object) -> str | None:
    """The folder or repository that the configuration was loaded from; `None` if it is unknown.

    `argument` is the `config` of `from_pretrained`. Transformers stores the source of the weights as the name of
    `config`: for an adapter's folder, that is its base model.
    """
    if isinstance(argument, (str, os.PathLike)):
        source = os.fspath(argument)
    else:
        # `AutoConfig` stores the source of a configuration as its name.
        objects, names = (argument, config), ("_loaded_from", "name_or_path")
        sources = (getattr(each, name, None) for each in objects for name in names)
        source = next((origin for origin in sources if origin and origin != "None"), None)
    if source is None or not os.path.isfile(source):
        return source
    return os.path.dirname(source) or "."


def _cached_file(source: str, file: str, where: Mapping[str, object]) -> str:
    return cast(str, cached_file(source, file, **where))  # it is `None` only if errors are switched off


def _fetched(source: str, file: str, where: Mapping[str, object]) -> str:
    """The local path of an expert vector's file.

    Raises:
        OSError: it is in neither of the two folders.
    """
    try:
        return _cached_file(source, f"{EXPERT_VECTORS_FOLDER}/{file}", where)
    except OSError as error:
        with suppress(OSError):
            return _cached_file(source, f"{OLDER_EXPERT_VECTORS_FOLDER}/{file}", where)
        place = f"`{source}`" if "subfolder" not in where else f"`{where['subfolder']}` of `{source}`"
        raise OSError(
            f"The configuration in {place} names an expert vector whose file `{EXPERT_VECTORS_FOLDER}/{file}` cannot "
            f"be read there. Copy the folder `{EXPERT_VECTORS_FOLDER}` together with the rest, or set "
            f'`"expert_vectors": null` in config.json. ({error})'
        ) from error
