"""Making datasets: the built-in corpus of captioned digits, and directories of text and images."""

import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from coterie.core.errors import UserError
from coterie.data.config import DataConfig
from coterie.data.digits import split_digits
from coterie.data.documents import blend, draw, image_pieces, interleave, text_pieces
from coterie.data.images import read_image
from coterie.data.manifest import FILE, Manifest, read_manifest
from coterie.data.split import held_out
from coterie.data.text import documentation, split_text, standard_library
from coterie.data.vocabulary import Tokens, Vocabulary
from coterie.data.writer import SHARD_TOKENS, DatasetWriter, write_dataset

Progress = Callable[[int, int, str], None]
"""Called as ``progress(done, total, what)`` while a dataset is built."""

TEXT_SUFFIXES = frozenset({".txt", ".md", ".rst", ".py", ".tex", ".html", ".csv", ".json"})
IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg"})

_DIGITS_REVISION = 1  # raise when the built-in corpus is made differently


@dataclass(frozen=True)
class Built:
    """What a build made, or found already made."""

    path: Path
    manifest: Manifest
    seconds: float
    """How long it took."""

    reused: bool = False
    """It was there already."""

    ignored: int = 0
    """Files of a kind that is neither text nor image."""

    skipped: tuple[str, ...] = ()
    """The sentence on each bad file that was passed over."""


def prepare(config: DataConfig, cache: str | Path, progress: Progress | None = None) -> Path:
    """The dataset directory of ``config``: its ``path``, or the built-in corpus under ``cache``.

    The corpus is built the first time and found again afterwards. Raises UserError when the
    dataset at ``path`` is packed to another sequence length than ``config.sequence``.
    """
    if config.path is None:
        target = Path(cache) / f"{config.corpus}-{recipe_key(config)}"
        return build_digits(target, config, progress).path
    path = Path(config.path)
    if (packed := read_manifest(path).sequence) != config.sequence:
        raise UserError(
            f"{path}: is packed to sequences of {packed} tokens and data.sequence is "
            f"{config.sequence}; set data.sequence: {packed}, or build it again"
        )
    return path


def digits_recipe(config: DataConfig) -> dict[str, Any]:
    """All that decides the built-in corpus; Python's version is the version of its texts."""
    sizes = config.model_dump(mode="json", exclude={"path", "corpus"})
    return {
        "builder": "digits",
        "revision": _DIGITS_REVISION,
        "python": platform.python_version(),
        **sizes,
    }


def recipe_key(config: DataConfig) -> str:
    """Twelve hexadecimal digits that differ when the recipe does."""
    recipe = json.dumps(digits_recipe(config), sort_keys=True)
    return hashlib.sha256(recipe.encode()).hexdigest()[:12]


def build_digits(
    target: str | Path,
    config: DataConfig,
    progress: Progress | None = None,
    *,
    replace: bool = False,
) -> Built:
    """Build the built-in corpus at ``target``, or find it there, made by the same recipe.

    With ``replace`` it is always built, in the place of any dataset that is there. Raises UserError
    when something else is at ``target``, or it cannot be written.
    """
    start = time.perf_counter()
    target, recipe = Path(target), digits_recipe(config)
    found = None if replace else _found(target, recipe)
    if found is None:
        try:
            with write_dataset(
                target, Vocabulary(), config.sequence, recipe, replace=replace
            ) as writer:
                _write_digits(writer, config, progress)
        except UserError:  # another process may have built the same meanwhile
            if _found(target, recipe) is None:
                raise
    manifest = found or read_manifest(target)
    return Built(target, manifest, time.perf_counter() - start, reused=found is not None)


def _found(target: Path, recipe: dict[str, Any]) -> Manifest | None:
    if not (target / FILE).exists():
        return None
    manifest = read_manifest(target)
    return manifest if manifest.recipe == recipe else None


def _write_digits(writer: DatasetWriter, config: DataConfig, progress: Progress | None) -> None:
    held_count = max(round(config.documents * config.held_out), 1) if config.held_out else 0
    counts = {"train": config.documents - held_count, "held_out": held_count}
    fraction = config.held_out
    digits = split_digits(fraction)
    prose = split_text(documentation(), fraction)
    code = split_text(standard_library(), fraction) if config.sources else ([], [])
    done = 0
    for side, (split, count) in enumerate(counts.items()):
        if not count:
            continue
        vocabulary, key = writer.vocabulary, (config.seed, split)
        images = image_pieces(digits[side], vocabulary)
        texts, codes = (
            text_pieces(part[side], config.passage_bytes, vocabulary) for part in (prose, code)
        )
        for document in interleave(
            draw(images, count * config.images_per_document, "images", *key),
            blend(texts, codes, config.sources, count * config.passages_per_document, *key),
            count,
            vocabulary,
            *key,
        ):
            writer.add(split, document)
            done += 1
            if progress:
                progress(done, config.documents, "documents")


def build_directory(
    source: str | Path,
    target: str | Path,
    *,
    sequence: int,
    vocabulary: Vocabulary | None = None,
    fraction: float = 0.1,
    replace: bool = False,
    skip_bad: bool = False,
    progress: Progress | None = None,
    shard_tokens: int = SHARD_TOKENS,
) -> Built:
    """Build a dataset at ``target`` from the text files and images under ``source``.

    Each file is a document, and ``fraction`` of them (chosen by their names) are held out. A text
    is its bytes; an image is ``caption BOI codes EOI``, its caption the file's name without suffix
    and with spaces for ``-`` and ``_``. Hidden files are passed over, links to directories not
    followed, files of other kinds only counted.

    Raises UserError naming the file when one is empty, unreadable, or not what its suffix says
    (``skip_bad`` passes it over instead), when there is nothing to build from, or when ``target``
    exists or cannot be written.
    """
    start = time.perf_counter()
    source, target, vocabulary = Path(source), Path(target), vocabulary or Vocabulary()
    files, ignored = _list(source)
    names = [file.relative_to(source).as_posix() for file in files]
    recipe = {"builder": "directory", "source": str(source), "held_out": fraction}
    skipped: list[str] = []
    with write_dataset(
        target, vocabulary, sequence, recipe, replace=replace, shard_tokens=shard_tokens
    ) as writer:
        for number, (file, out) in enumerate(zip(files, held_out(names, fraction), strict=True)):
            try:
                writer.add("held_out" if out else "train", _document(file, vocabulary))
            except UserError as error:
                if not skip_bad:
                    raise
                skipped.append(str(error))
            if progress:
                progress(number + 1, len(files), names[number])
    seconds = time.perf_counter() - start
    return Built(target, read_manifest(target), seconds, ignored=ignored, skipped=tuple(skipped))


def _list(source: Path) -> tuple[list[Path], int]:
    """The files to build from, sorted, and how many others there are."""
    if not source.is_dir():
        what = "is a file, not a directory" if source.exists() else "there is no such directory"
        raise UserError(f"{source}: {what}; give a directory of text files and images")
    try:
        everything = sorted(_visible(source), key=lambda file: file.as_posix())
    except OSError as error:
        raise UserError(f"{error.filename}: cannot be read: {error.strerror}") from error
    files = [f for f in everything if f.suffix.lower() in TEXT_SUFFIXES | IMAGE_SUFFIXES]
    if not files:
        kinds = " ".join(sorted(TEXT_SUFFIXES | IMAGE_SUFFIXES))
        raise UserError(f"{source}: holds no text file or image (accepted: {kinds})")
    return files, len(everything) - len(files)


def _visible(folder: Path) -> Iterator[Path]:
    for entry in folder.iterdir():
        if entry.name.startswith("."):
            continue
        if entry.is_dir() and not entry.is_symlink():
            yield from _visible(entry)
        elif entry.is_file() or not entry.exists():  # a broken link is reported when it is read
            yield entry


def _document(file: Path, vocabulary: Vocabulary) -> Tokens:
    if file.suffix.lower() in IMAGE_SUFFIXES:
        image_HW = read_image(file, vocabulary.side, vocabulary.levels)
        caption = " ".join(file.stem.replace("-", " ").replace("_", " ").split())
        return vocabulary.join([vocabulary.captioned(image_HW, caption)])
    return vocabulary.join([vocabulary.encode_text(_read_text(file))])


def _read_text(file: Path) -> str:
    try:
        text = file.read_bytes().decode()
    except UnicodeDecodeError as error:
        raise UserError(
            f"{file}: is not UTF-8 text (byte {error.start} is {error.object[error.start]:#04x}); "
            "convert it, or skip bad files"
        ) from error
    except OSError as error:
        raise UserError(f"{file}: cannot be read: {error.strerror}") from error
    if not text:
        raise UserError(f"{file}: is empty; remove it, or skip bad files")
    return text
