"""Pages for readers: their links lead somewhere, and the architecture names every room."""

import re
from pathlib import Path

import pytest

from patterns import ROOT

PAGES = sorted([*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md"), *ROOT.glob("checkpoints/*/README.md")])
LINK = re.compile(r"\]\(([^)\s]+)\)")
FILE = re.compile(r"[\w/.-]+\.(?:py|md|toml|cpp|h)\b")
# Folders at the root that architecture.md need not name.
BUILT = {"build", "demo", "dist", "runs", "site"}


def headings_of(page: Path) -> set[str]:
    lines = [line.lstrip("#").strip() for line in page.read_text().splitlines() if line.startswith("#")]
    return {re.sub(r"[^\w -]", "", line).lower().replace(" ", "-") for line in lines}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_and_a_heading(page):
    for link in LINK.findall(page.read_text()):
        if re.match("https?:", link):
            continue
        path, _, heading = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        assert not heading or heading in headings_of(target), link


def test_every_file_that_the_architecture_names_exists():
    named = FILE.findall((ROOT / "docs" / "architecture.md").read_text())
    folders = [ROOT, *(ROOT / name for name in ("docs", "convert", "csrc", "tests"))]
    assert [name for name in named if not any((folder / name).exists() for folder in folders)] == []


def test_the_architecture_names_every_room():
    text = (ROOT / "docs" / "architecture.md").read_text()
    files = {path.name for path in ROOT.glob("*.py")}
    folders = {f"{path.name}/" for path in ROOT.iterdir() if path.is_dir() and is_source(path)}
    assert sorted(name for name in files | folders if name not in text) == []


def is_source(folder: Path) -> bool:
    return not (folder.name.startswith((".", "_")) or folder.name.endswith(".egg-info") or folder.name in BUILT)


def test_every_page_is_in_the_navigation_of_the_site():
    navigation = (ROOT / "mkdocs.yml").read_text()
    assert [page.name for page in (ROOT / "docs").glob("*.md") if page.name not in navigation] == []


def test_every_command_of_the_makefile_is_explained():
    commands = re.findall(r"^([a-z][\w-]*):", (ROOT / "Makefile").read_text(), re.MULTILINE)
    page = (ROOT / "docs" / "commands.md").read_text()
    assert [command for command in commands if f"`make {command}`" not in page] == []
