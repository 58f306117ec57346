"""Writing a dataset: documents go in one by one, packed shards come out, memory stays bounded."""

import hashlib
import io
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from coterie.core.errors import UserError
from coterie.data.atomic import new_directory
from coterie.data.manifest import FILE, Manifest, Shard, Split
from coterie.data.packing import pack
from coterie.data.shards import DTYPE
from coterie.data.vocabulary import Tokens, Vocabulary

SHARD_TOKENS = 1 << 24
"""Tokens gathered before a shard (32 MiB) is packed and written."""


class DatasetWriter:
    """Gathers documents by split; made by :func:`write_dataset`."""

    def __init__(
        self, directory: Path, vocabulary: Vocabulary, sequence: int, shard_tokens: int
    ) -> None:
        self.vocabulary = vocabulary
        self.sequence = sequence
        self._directory = directory
        self._shard_tokens = shard_tokens
        self._splits: dict[str, _SplitWriter] = {}

    def add(self, split: str, document: Tokens) -> None:
        """Add a document, EOD included, to ``train`` or ``held_out``.

        Raises UserError for an id outside the vocabulary, ValueError unless EOD is its last token.
        """
        if (largest := int(document.max(initial=0))) >= self.vocabulary.size:
            raise UserError(
                f"a document of split '{split}' holds the token id {largest}, and the vocabulary "
                f"ends at {self.vocabulary.size - 1}"
            )
        if not len(document) or document[-1] != self.vocabulary.eod:
            raise ValueError("a document ends in EOD")
        if split not in self._splits:
            self._splits[split] = _SplitWriter(self, split)
        self._splits[split].add(document)

    def close(self, recipe: dict[str, Any]) -> Manifest:
        """Write what is left and ``dataset.json``; raises UserError if ``train`` is empty."""
        splits = {name: self._splits[name].close() for name in sorted(self._splits, reverse=True)}
        if "train" not in splits:
            raise UserError("there is nothing to train on: no document is left for split 'train'")
        manifest = Manifest(
            vocabulary=self.vocabulary,
            sequence=self.sequence,
            splits=splits,
            recipe=recipe,
            fingerprint="",
        ).sealed()
        write(self._directory / FILE, manifest.model_dump_json(indent=2).encode() + b"\n")
        return manifest


class _SplitWriter:
    def __init__(self, owner: DatasetWriter, name: str) -> None:
        self._owner = owner
        self._name = name
        self._waiting: list[Tokens] = []
        self._waiting_tokens = 0
        self._shards: list[Shard] = []
        self._documents = self._tokens = self._image_tokens = 0

    def add(self, document: Tokens) -> None:
        self._waiting.append(document)
        self._waiting_tokens += len(document)
        self._documents += 1
        self._tokens += len(document)
        self._image_tokens += int(self._owner.vocabulary.is_image(document).sum())
        if self._waiting_tokens >= self._owner._shard_tokens:
            self._flush()

    def close(self) -> Split:
        self._flush()
        return Split(
            shards=tuple(self._shards),
            documents=self._documents,
            tokens=self._tokens,
            image_tokens=self._image_tokens,
        )

    def _flush(self) -> None:
        if not self._waiting:
            return
        rows = pack(self._waiting, self._owner.sequence + 1, self._owner.vocabulary.pad)
        self._waiting, self._waiting_tokens = [], 0
        name = f"{self._name}-{len(self._shards):05d}.npy"
        image = io.BytesIO()
        np.save(image, rows.astype(DTYPE), allow_pickle=False)
        data = image.getbuffer()
        write(self._owner._directory / name, data)
        digest = hashlib.sha256(data).hexdigest()
        self._shards.append(Shard(file=name, rows=len(rows), bytes=len(data), sha256=digest))


def write(file: Path, data: bytes | memoryview) -> None:
    """Write and flush to the disk, so that a full one is noticed here (OSError)."""
    with file.open("wb") as stream:
        stream.write(data)
        stream.flush()
        os.fsync(stream.fileno())


@contextmanager
def write_dataset(
    target: Path,
    vocabulary: Vocabulary,
    sequence: int,
    recipe: dict[str, Any],
    *,
    replace: bool = False,
    shard_tokens: int = SHARD_TOKENS,
) -> Iterator[DatasetWriter]:
    """A writer whose dataset appears at ``target`` when the block ends well, and else not at all.

    Raises UserError if ``target`` exists (unless it is a dataset and ``replace``), cannot be
    written, or the disk fills up.
    """
    if replace and target.exists() and not (target / FILE).exists() and _has_entries(target):
        raise UserError(f"{target}: is no dataset, so it will not be overwritten")
    with new_directory(target, replace=replace) as directory:
        writer = DatasetWriter(directory, vocabulary, sequence, shard_tokens)
        yield writer
        writer.close(recipe)


def _has_entries(target: Path) -> bool:
    return not target.is_dir() or any(target.iterdir())
