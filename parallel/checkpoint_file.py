"""One rank's file of a checkpoint: safetensors, streamed, with its checksum and digests."""

import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from coterie.core.box import Box
from coterie.core.digest import digest
from coterie.parallel.checkpoint_format import ChunkEntry, FileEntry, TensorEntry
from coterie.parallel.checkpoint_plan import Chunk

SAFETENSORS = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}
DTYPES = {str(dtype).removeprefix("torch."): dtype for dtype in SAFETENSORS}

Content = Iterable[tuple[Box, Tensor]]
"""A chunk in pieces that follow each other in memory (:func:`coterie.core.digest.pieces`): the box
of each in the whole tensor, and its elements, contiguous and on the CPU."""


@dataclass(frozen=True)
class WrittenChunk:
    """A chunk in a file, and its digest."""

    chunk: Chunk
    digest: int


@dataclass(frozen=True)
class WrittenFile:
    """A file that a rank has written."""

    name: str
    entry: FileEntry
    chunks: list[WrittenChunk]


def rank_file(rank: int) -> str:
    """``rank_00000.safetensors``"""
    return f"rank_{rank:05d}.safetensors"


def write_safetensors(path: Path, contents: Mapping[Chunk, Content]) -> WrittenFile:
    """Stream chunks into a safetensors file with DCP's sharding information, and fsync it.

    The bytes depend on the chunks and their contents alone.

    Raises:
        OSError: the disk is full, …
    """
    # Widest elements first: every tensor is then aligned to its element size.
    ordered = sorted(contents, key=lambda chunk: (-chunk.dtype.itemsize, chunk.name))
    sha256 = hashlib.sha256()
    size = 0
    written: list[WrittenChunk] = []
    with path.open("wb", buffering=0) as file:

        def write(part: memoryview) -> None:
            nonlocal size
            sha256.update(part)
            size += len(part)
            while part:  # an unbuffered write may be short
                part = part[file.write(part) :]

        write(memoryview(_header(ordered)))
        for chunk in ordered:
            total = 0
            for box, tensor in contents[chunk]:
                write(raw(tensor))
                total += digest(tensor, box)
            written.append(WrittenChunk(chunk, total % (1 << 64)))
        os.fsync(file.fileno())
    return WrittenFile(path.name, FileEntry(size=size, sha256=sha256.hexdigest()), written)


def tensor_entries(files: Iterable[WrittenFile]) -> dict[str, TensorEntry]:
    """The manifest's account of the tensors in ``files``, sorted by name."""
    found: dict[str, list[tuple[str, WrittenChunk]]] = {}
    for file in files:
        for written in file.chunks:
            found.setdefault(written.chunk.name, []).append((file.name, written))
    return {name: _entry(found[name]) for name in sorted(found)}


def raw(tensor: Tensor) -> memoryview:
    """The bytes of a contiguous tensor on the CPU."""
    return tensor.reshape(-1).view(torch.uint8).numpy().data


def _entry(places: list[tuple[str, WrittenChunk]]) -> TensorEntry:
    chunk = places[0][1].chunk
    return TensorEntry(
        dtype=str(chunk.dtype).removeprefix("torch."),
        shape=list(chunk.box.whole),
        digest=f"{sum(written.digest for _, written in places) % (1 << 64):016x}",
        chunks=[
            ChunkEntry(
                file=file,
                offset=list(written.chunk.box.offset),
                shape=list(written.chunk.box.shape),
            )
            for file, written in sorted(places, key=lambda place: place[1].chunk.box.offset)
        ],
    )


def _header(ordered: list[Chunk]) -> bytes:
    offsets = {c.name: {"saved_offsets": c.box.offset} for c in ordered}
    header: dict[str, Any] = {
        "__metadata__": {
            "format": "pt",
            "DCP_VERSION": "1.0",
            "DCP_SHARDING_INFO": json.dumps(offsets),
        }
    }
    end = 0
    for chunk in ordered:
        start, end = end, end + chunk.nbytes
        header[chunk.name] = {
            "dtype": SAFETENSORS[chunk.dtype],
            "shape": list(chunk.box.shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text
