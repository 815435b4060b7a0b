"""Atomic replacement of a saved model's folder: files are written to a hidden folder, then moved into place.

A save that fails leaves the folder as it was. Other files in the folder stay, except stale files that would be loaded
with the new ones.
"""

import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from .configuration_mambaformer import FILE_NAME
from .files_header_mambaformer import json_of
from .files_mambaformer import temporary_for

CONFIG, WEIGHTS_ENDING = "config.json", ".safetensors"
EXPERT_VECTORS_FOLDER = "expert_vectors"
OLDER_EXPERT_VECTORS_FOLDER = "experts"  # of version 0.1, which had the same name in the configuration
SHARD = r"-\d{5}-of-\d{5}"
WEIGHTS = re.compile(rf"((?:adapter_)?model(?:\.[^-/]+)?)({SHARD})?\.safetensors")
STAGE_ENDING = ".save"
# Folders that are being written, by the path that Transformers writes to.
STAGED: dict[str, "StagedFolder"] = {}


class StagedFolder:
    """Files that are written to `path` and then moved into `target`.

    Args:
        path: its last part is that of `target`, which is the default name of a repository.
        aside: an empty folder for replaced files.
    """

    def __init__(self, target: Path, path: Path, aside: Path):
        self.target, self.path, self.aside = target, path, aside
        self.names: set[str] | None = None  # the first parts of the paths that were moved

    @property
    def is_committed(self) -> bool:
        return self.names is not None

    def commit(self) -> None:
        """Moves the files into place, the configuration last; after an error, the target is as it was."""
        files = [file.relative_to(self.path) for file in self.path.rglob("*") if not file.is_dir()]
        files.sort(key=lambda file: (file == Path(CONFIG), file))
        stale, done, made = stale_files(self.target, set(files)), [], []
        try:
            for file in files:
                made += _made_folders(self.target, file.parent)
                done.append(file)
                self._set_aside(file)
                os.replace(self.path / file, self.target / file)
            for file in stale:
                done.append(file)
                os.replace(self.target / file, _with_folder(self.aside / file))
        except BaseException:
            for file in reversed(done):
                self._put_back(file, is_new=file not in stale)
            for folder in reversed(made):
                folder.rmdir()
            raise
        for folder in {(self.target / file).parent for file in stale} - {self.target}:
            with suppress(OSError):  # the user has files in it
                folder.rmdir()
        self.names = {file.parts[0] for file in files}

    def _set_aside(self, file: Path) -> None:
        """Keeps the old file under a second name, so that readers see the old or the new file at any time."""
        old, kept = self.target / file, self.aside / file
        if not os.path.lexists(old):
            return
        if old.is_dir() and not old.is_symlink():
            raise IsADirectoryError(f"{old} is a folder, and a file of the model has this name: move it away.")
        if not old.is_symlink():
            with suppress(OSError):  # a private file stays private
                shutil.copymode(old, self.path / file)
        try:
            os.link(old, _with_folder(kept), follow_symlinks=False)
        except (OSError, NotImplementedError):  # a file system without hard links
            os.replace(old, kept)

    def _put_back(self, file: Path, is_new: bool) -> None:
        kept = self.aside / file
        if os.path.lexists(kept):
            os.replace(kept, self.target / file)
            # `os.replace` does nothing if both names are links to the same file.
            kept.unlink(missing_ok=True)
        elif is_new and not os.path.lexists(self.path / file):
            (self.target / file).unlink(missing_ok=True)


@contextmanager
def staged_folder(target: str | os.PathLike) -> Iterator[StagedFolder]:
    """A place to write the files of `target`, which is made if needed; they are moved into it at the end.

    The files are written to a hidden folder inside of `target`, on the same file system, so that moving copies
    nothing. A save over an old model needs room for both. If a process is killed, the next save removes its hidden
    folder.

    Raises:
        ValueError: `target` is a file or empty.
        OSError: files cannot be written or moved there.
    """
    if not os.fspath(target):
        raise ValueError("`save_directory` is empty: give a folder, '.' for the current one.")
    target = Path(os.path.abspath(target))
    if target.is_file():
        raise ValueError(f"`save_directory` {str(target)!r} is a file: give a folder.")
    made = _made_folders(Path(target.anchor), target.relative_to(target.anchor))
    try:
        with temporary_for(target / STAGE_ENDING) as lock:
            _remove_abandoned(target)
            with _stage(target, lock.with_suffix(STAGE_ENDING)) as folder:
                yield folder
                if not folder.is_committed:
                    folder.commit()
    except BaseException:
        for folder in reversed(made):
            with suppress(OSError):  # another process has written files there
                folder.rmdir()
        raise


@contextmanager
def _stage(target: Path, place: Path) -> Iterator[StagedFolder]:
    folder = StagedFolder(target, place / "new" / (target.name or "model"), place / "old")
    try:
        folder.path.mkdir(parents=True)
        folder.aside.mkdir()
        STAGED[str(folder.path)] = folder
        yield folder
    finally:
        STAGED.pop(str(folder.path), None)
        shutil.rmtree(place, ignore_errors=True)


def staged_at(path: str | os.PathLike) -> StagedFolder | None:
    """The `StagedFolder` that is written under `path`; `None` if there is none."""
    return STAGED.get(os.fspath(path))


def _remove_abandoned(target: Path) -> None:
    """Removes the hidden folders of dead processes, whose locks `temporary_for` has removed."""
    for place in target.glob(f".*{STAGE_ENDING}"):
        if re.fullmatch(r"\.[0-9a-f]{16}-[0-9a-f]{32}", place.stem) and not place.with_suffix(".tmp").exists():
            shutil.rmtree(place, ignore_errors=True)


def _made_folders(root: Path, below: Path) -> list[Path]:
    """Makes `root / below`; returns the folders that were made, outermost first."""
    made = []
    for part in below.parts:
        root = root / part
        if not root.is_dir():
            with suppress(FileExistsError):
                root.mkdir()
                made.append(root)
    return made


def _with_folder(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path


# ---- files of older saves


def stale_files(target: Path, files: set[Path]) -> list[Path]:
    """Files of an older save in `target` that the new `files` do not replace, and that would be loaded with them.

    They are weights in other shards (an unsharded file is loaded before an index), and the expert vectors that only
    the old configuration names.
    """
    stale = set()
    weights = {match[1] for file in files if (match := WEIGHTS.fullmatch(str(file)))}
    for name in os.listdir(target):
        match = WEIGHTS.fullmatch(name)
        if (match and match[1] in weights) or name in map(_index_of, weights):
            stale.add(Path(name))
    if Path(CONFIG) in files:
        names, folders = _named_expert_vectors(target / CONFIG), (EXPERT_VECTORS_FOLDER, OLDER_EXPERT_VECTORS_FOLDER)
        stale |= {Path(folder, name + WEIGHTS_ENDING) for folder in folders for name in names}
    return sorted(file for file in stale - files if (target / file).is_file())


def _index_of(stem: str) -> str:
    """`model` -> `model.safetensors.index.json`, and `model.fp16` -> `model.safetensors.index.fp16.json`."""
    name, _, variant = stem.partition(".")
    return f"{name}{WEIGHTS_ENDING}.index.{variant + '.' if variant else ''}json"


def _named_expert_vectors(config: Path) -> list[str]:
    try:
        fields = json_of(config.read_bytes())
        names = fields.get("expert_vectors") or fields.get("experts") or []
        return [name for name in names if isinstance(name, str) and re.fullmatch(FILE_NAME, name)]
    except (OSError, ValueError, AttributeError, TypeError):  # not a configuration that we saved
        return []


__all__ = ["StagedFolder", "staged_at", "staged_folder", "stale_files"]
