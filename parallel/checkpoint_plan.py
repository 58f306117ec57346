"""Which rank writes what: a pure function of the boxes that the ranks hold."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod

import torch

from coterie.core.box import Box


@dataclass(frozen=True)
class Chunk:
    """A box of the tensor ``name``."""

    name: str
    dtype: torch.dtype
    box: Box

    @staticmethod
    def of(name: str, dtype: torch.dtype, box: Box) -> "Chunk":
        """Of a tensor that is empty as a whole there is one chunk only, whatever the box."""
        return Chunk(name, dtype, box if prod(box.whole) else Box.all_of(box.whole))

    @property
    def nbytes(self) -> int:
        """Bytes in it."""
        return self.box.numel * self.dtype.itemsize


def assign(held: Sequence[Iterable[Chunk]]) -> list[list[Chunk]]:
    """Of the chunks that each rank holds, those that it writes: each distinct one is written once.

    Of the ranks that hold a chunk, the one with least to write so far does, the lowest among
    equals. Only what the ranks hold counts, not the order in which they tell it. Empty boxes are
    not written; a tensor that is empty as a whole is, by one rank.

    Raises:
        ValueError: the boxes of a tensor overlap without being the same, or do not cover it, or
            ranks differ in its shape or dtype.
    """
    holders: dict[Chunk, list[int]] = {}
    for rank, chunks in enumerate(held):
        for chunk in chunks:
            holders.setdefault(chunk, []).append(rank)
    _check(holders)
    mine: list[list[Chunk]] = [[] for _ in held]
    load = [0] * len(held)
    to_write = [chunk for chunk in holders if chunk.box.numel or not prod(chunk.box.whole)]
    for chunk in sorted(to_write, key=lambda chunk: (chunk.name, chunk.box.offset)):
        rank = min(holders[chunk], key=lambda rank: (load[rank], rank))
        mine[rank].append(chunk)
        load[rank] += chunk.nbytes
    return mine


def intersection(a: Box, b: Box) -> Box | None:
    """What two boxes of one tensor share; None: nothing."""
    start = tuple(map(max, a.offset, b.offset))
    ends = ((o + n, p + m) for o, n, p, m in zip(a.offset, a.shape, b.offset, b.shape, strict=True))
    shape = tuple(min(end) - low for low, end in zip(start, ends, strict=True))
    return Box(a.whole, start, shape) if all(size > 0 for size in shape) else None


def find_overlap(boxes: Sequence[Box]) -> tuple[int, int] | None:
    """The places in ``boxes`` of two that share an element, if any do."""
    if not boxes:
        return None
    # sweep along the dimension with most cuts: few boxes are then under way at a time
    dims = range(len(boxes[0].whole))
    sweep = max(dims, key=lambda dim: len({box.offset[dim] for box in boxes}), default=None)
    if sweep is None:
        return (0, 1) if len(boxes) > 1 else None
    open_: list[int] = []
    for now in sorted(range(len(boxes)), key=lambda place: boxes[place].offset[sweep]):
        start = boxes[now].offset[sweep]
        open_ = [p for p in open_ if boxes[p].offset[sweep] + boxes[p].shape[sweep] > start]
        for other in open_:
            if intersection(boxes[other], boxes[now]) is not None:
                return other, now
        open_.append(now)
    return None


def covers(whole: Sequence[int], boxes: Sequence[Box]) -> bool:
    """Whether boxes that lie inside ``whole`` cover each of its elements exactly once."""
    return sum(box.numel for box in boxes) == prod(whole) and find_overlap(boxes) is None


def _check(holders: dict[Chunk, list[int]]) -> None:
    by_name: dict[str, list[Chunk]] = {}
    for chunk in holders:
        by_name.setdefault(chunk.name, []).append(chunk)
    for name, chunks in by_name.items():
        first = chunks[0]
        for chunk in chunks:
            if (chunk.dtype, chunk.box.whole) != (first.dtype, first.box.whole):
                ranks = f"ranks {holders[first][0]} and {holders[chunk][0]}"
                raise ValueError(f"{ranks} differ in the shape or dtype of tensor {name!r}")
        boxes = [chunk.box for chunk in chunks if chunk.box.numel]
        owners = [holders[chunk][0] for chunk in chunks if chunk.box.numel]
        if pair := find_overlap(boxes):
            a, b = sorted(pair, key=lambda place: owners[place])
            raise ValueError(
                f"ranks {owners[a]} and {owners[b]} hold overlapping parts of tensor {name!r} "
                f"that are not the same: {_words(boxes[a])} and {_words(boxes[b])}"
            )
        if not covers(first.box.whole, boxes):
            raise ValueError(
                f"no rank holds some of tensor {name!r} of shape {list(first.box.whole)}"
            )


def _words(box: Box) -> str:
    return f"shape {list(box.shape)} at {list(box.offset)}"
