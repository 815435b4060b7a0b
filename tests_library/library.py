"""The common model tests of Transformers, as they stand in the source distribution of the installed version.

A source distribution holds `tests/test_*.py` but not the folders below `tests`. What the common tests only mix in from
there is replaced by empty classes; with `LIBRARY_TESTS=<checkout>/tests` the real ones are used.
"""

import importlib
import os
import subprocess
import sys
import tarfile
import tempfile
import types
from pathlib import Path

import transformers

CACHE = Path(__file__).parents[1] / ".library"
PACKAGE = "transformers_tests"
# Mixed into `ModelTesterMixin` or beside it, and absent from the source distribution.
ABSENT_MIXINS = {"exporters.test_export": "ExportTesterMixin", "generation.test_utils": "GenerationTesterMixin"}
# Absent too: the fields of a configuration that `ConfigTester` sets and reads back.
COMMON_CONFIG_FIELDS = {
    "return_dict": False,
    "output_hidden_states": True,
    "output_attentions": True,
    "dtype": "float16",
    "is_encoder_decoder": False,
    "chunk_size_feed_forward": 5,
    "architectures": ["AModel"],
    "id2label": {0: "no", 1: "yes", 2: "perhaps"},
    "label2id": {"no": 0, "yes": 1, "perhaps": 2},
    "problem_type": "regression",
}


def fetch() -> Path:
    """The folder of the library's tests: a checkout's, or downloaded once into a folder that git ignores."""
    if os.environ.get("LIBRARY_TESTS"):
        return Path(os.environ["LIBRARY_TESTS"])
    name = f"transformers-{transformers.__version__}"
    folder = CACHE / name / "tests"
    if not folder.exists():
        requirement = f"transformers=={transformers.__version__}"
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--no-binary", ":all:", "--dest"]
        with tempfile.TemporaryDirectory() as downloaded:
            subprocess.run([*pip, downloaded, requirement], check=True)
            unpack(Path(downloaded) / f"{name}.tar.gz", folder)
    return folder


def unpack(archive: Path, folder: Path) -> None:
    """Unpacks the `tests` of a source distribution; `folder` appears only when it is complete."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(archive) as files, tempfile.TemporaryDirectory(dir=folder.parent) as unfinished:
        prefix = archive.name.removesuffix(".tar.gz") + "/tests/"
        files.extractall(unfinished, [file for file in files if file.name.startswith(prefix)], filter="data")
        (Path(unfinished) / prefix / "__init__.py").touch()
        (Path(unfinished) / prefix).rename(folder)


def load(name: str) -> types.ModuleType:
    """The module `tests/<name>.py` of the library."""
    if PACKAGE not in sys.modules:
        package = types.ModuleType(PACKAGE)
        package.__path__ = [str(fetch())]
        sys.modules[PACKAGE] = package
        for module, mixin in ABSENT_MIXINS.items():
            _stand_in(module, mixin, type(mixin, (), {}))
        _stand_in("utils.test_configuration_utils", "config_common_kwargs", COMMON_CONFIG_FIELDS)
    return importlib.import_module(f"{PACKAGE}.{name}")


def is_complete() -> bool:
    """Whether the library's tests are those of a checkout, generation and export among them."""
    return bool(os.environ.get("LIBRARY_TESTS"))


def _stand_in(module: str, name: str, value) -> None:
    if is_complete():
        return
    parent = f"{PACKAGE}.{module.split('.')[0]}"
    sys.modules.setdefault(parent, types.ModuleType(parent))
    stand_in = types.ModuleType(f"{PACKAGE}.{module}")
    setattr(stand_in, name, value)
    sys.modules[stand_in.__name__] = stand_in
