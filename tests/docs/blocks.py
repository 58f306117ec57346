"""The fenced code blocks of a Markdown file."""

import re
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

_FENCE = re.compile(r"^```(?P<language>\w*)\n(?P<text>.*?)^```$", re.MULTILINE | re.DOTALL)


@dataclass(frozen=True)
class Block:
    """One fenced block."""

    language: str
    """What follows the fence: ``sh``, ``python``, ``text``."""
    text: str
    line: int
    """Of its first line in the file, from 1."""


def blocks(text: str, language: str) -> list[Block]:
    """The blocks of ``language`` in ``text``, in order."""
    return [
        Block(found["language"], found["text"], text[: found.start("text")].count("\n") + 1)
        for found in _FENCE.finditer(text)
        if found["language"] == language
    ]


def prose(text: str) -> str:
    """``text`` without its fenced blocks."""
    return _FENCE.sub("", text)


def pages() -> list[Path]:
    """Every Markdown file of the project."""
    return [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]
