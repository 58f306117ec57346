"""Reading any box of a checkpoint's tensors in one process, a piece at a time."""

from collections.abc import Callable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any, Self

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from coterie.core.box import Box
from coterie.core.digest import digest, pieces
from coterie.parallel.checkpoint_file import DTYPES
from coterie.parallel.checkpoint_format import damaged, read_manifest
from coterie.parallel.checkpoint_plan import intersection

PIECE = 32 * 2**20
"""Bytes of a tensor in memory at a time, unless one element has more."""

Advance = Callable[[int], None]
"""Told the bytes that have been worked through since it was last told."""


def no_progress(count: int) -> None:
    """Nobody is told."""


class CheckpointReader:
    """The tensors of the checkpoint at ``path``, whatever layout saved it.

    Reads what it is asked for; checksums are :func:`coterie.parallel.checkpoint.verify`'s.
    """

    def __init__(self, path: Path) -> None:
        """Raises UserError as :func:`coterie.parallel.checkpoint.read_manifest` does."""
        self.path = path
        self.manifest = read_manifest(path)
        self._open = ExitStack()
        self._files: dict[str, Any] = {}
        for name, entry in self.manifest.tensors.items():
            if entry.dtype not in DTYPES:
                raise damaged(path, f"tensor {name!r} is of {entry.dtype}, which is no dtype")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *exception: object) -> None:
        self._open.close()

    def dtype(self, name: str) -> torch.dtype:
        """Of the tensor ``name``."""
        return DTYPES[self.manifest.tensors[name].dtype]

    def whole(self, name: str) -> Box:
        """All of the tensor ``name``."""
        return Box.all_of(tuple(self.manifest.tensors[name].shape))

    def nbytes(self, name: str) -> int:
        """Bytes of the tensor ``name``."""
        return self.whole(name).numel * self.dtype(name).itemsize

    def pieces(
        self, name: str, box: Box, advance: Advance = no_progress
    ) -> Iterator[tuple[Box, Tensor]]:
        """``box`` of the tensor ``name`` in pieces that follow each other in memory.

        Raises:
            UserError: the files are not what the manifest says.
        """
        for piece in pieces(box, max(1, PIECE // self.dtype(name).itemsize)):
            content = self._read(name, piece)
            yield piece, content
            advance(content.nbytes)

    def digest(self, name: str, advance: Advance = no_progress) -> int:
        """The digest of the tensor ``name`` as it is in the files."""
        parts = (digest(x, box) for box, x in self.pieces(name, self.whole(name), advance))
        return sum(parts) % (1 << 64)

    def _read(self, name: str, box: Box) -> Tensor:
        content = torch.empty(box.shape, dtype=self.dtype(name))
        entry = self.manifest.tensors[name]
        for chunk in entry.chunks:
            saved = entry.box(chunk)
            shared = intersection(saved, box)
            if shared is None:
                continue
            try:
                held = self._file(chunk.file).get_slice(name)
                if tuple(held.get_shape()) != saved.shape:
                    raise SafetensorError(f"tensor {name!r} has another shape in {chunk.file}")
                found = held[_within(saved, shared)]
            except (SafetensorError, OSError) as error:
                raise damaged(
                    self.path, f"its files are not what {self.path.name} lists ({error})"
                ) from error
            if found.dtype != content.dtype:
                raise damaged(self.path, f"tensor {name!r} has another dtype in {chunk.file}")
            content[_within(box, shared)] = found
        return content

    def _file(self, name: str) -> Any:
        if name not in self._files:
            file = safe_open(self.path / name, framework="pt")
            self._files[name] = self._open.enter_context(file)
        return self._files[name]


def _within(outer: Box, inner: Box) -> tuple[slice, ...]:
    """The index that selects ``inner`` from the contents of ``outer``."""
    starts = [i - o for i, o in zip(inner.offset, outer.offset, strict=True)]
    return tuple(slice(s, s + n) for s, n in zip(starts, inner.shape, strict=True))
