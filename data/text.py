"""Real text on every machine: Python's own documentation and standard-library sources."""

import re
import sysconfig
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from coterie.core.errors import UserError
from coterie.data.split import held_out


class Document(NamedTuple):
    """A text and the name that decides its split."""

    name: str
    text: str


def documentation() -> list[Document]:
    """The language reference as ``help()`` shows it: 79 topics, 466 kB in Python 3.11."""
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "this Python has no pydoc_data.topics (its own documentation), which the built-in "
            "corpus is made of; install the full standard library or set data.path"
        ) from error
    return [Document(f"topic {name}", topics[name]) for name in sorted(topics)]


def standard_library() -> list[Document]:
    """The sources of the standard library's top-level modules: 168 files, 4.7 MB in Python 3.11."""
    folder = Path(sysconfig.get_path("stdlib"))
    files = sorted(folder.glob("*.py"))
    if not files:
        raise UserError(
            f"{folder} holds no sources of the standard library, which the built-in corpus is "
            "made of; set data.sources: 0 or data.path"
        )
    return [Document(f"source {f.name}", _read(f)) for f in files]


def _read(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"{file}: cannot be read ({error}); set data.sources: 0 to do without"
        ) from error


def sections(documents: Iterable[Document], limit: int = 2048) -> list[Document]:
    """Documents regrouped into runs of paragraphs, repetitions removed.

    A run is at most ``limit`` bytes, or one longer paragraph. A paragraph that occurred before, in
    this document or another, is dropped: Python's topics quote each other at length, so that
    without this held-out text would also be trained on.
    """
    seen: set[str] = set()
    found: list[Document] = []
    for name, text in documents:
        runs: list[list[str]] = []
        room = 0
        for paragraph in _paragraphs(text):
            words = " ".join(paragraph.split())
            if words in seen:
                continue
            seen.add(words)
            cost = len(paragraph.encode()) + 2
            room -= cost
            if room < 0:
                runs.append([])
                room = limit - cost
            runs[-1].append(paragraph)
        found += [Document(f"{name} #{n}", "\n\n".join(run)) for n, run in enumerate(runs)]
    return found


def _paragraphs(text: str) -> list[str]:
    blocks = (block.strip("\n") for block in re.split(r"\n\s*\n", text))
    return [block for block in blocks if block.strip()]


def split_text(
    documents: Iterable[Document], fraction: float
) -> tuple[list[Document], list[Document]]:
    """(train, held-out) sections of ``documents``; no paragraph is in both."""
    parts = sections(documents)
    chosen = held_out([part.name for part in parts], fraction)
    train = [part for part, out in zip(parts, chosen, strict=True) if not out]
    return train, [part for part, out in zip(parts, chosen, strict=True) if out]


_BOUNDARIES = (b"\n\n", b"\n", b". ", b" ")


def passages(text: str, limit: int) -> Iterator[str]:
    """``text`` in passages of at most ``limit`` ≥ 4 bytes, which joined give it back.

    A cut falls after a paragraph, else a line, else a sentence, else a word, the last such place
    in the second half of the limit; else anywhere between two characters.
    """
    data = text.encode()
    start = 0
    while start < len(data):
        stop = _cut(data, start, limit)
        yield data[start:stop].decode()
        start = stop


def _cut(data: bytes, start: int, limit: int) -> int:
    stop = start + limit
    if stop >= len(data):
        return len(data)
    for boundary in _BOUNDARIES:
        found = data.rfind(boundary, start + limit // 2, stop)
        if found != -1:
            return found + len(boundary)
    while data[stop] & 0xC0 == 0x80:  # a continuation byte: not between two characters
        stop -= 1
    return stop
