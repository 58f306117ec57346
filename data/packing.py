"""Packing documents of many lengths into rows of one length, by best fit, longest first.

A document that fits in a row is never cut. A longer one fills whole rows and leaves a remainder,
which is packed like a short document. What is left of a row is padding.
"""

from bisect import bisect_left, insort
from collections import defaultdict
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from coterie.data.vocabulary import Tokens


class Piece(NamedTuple):
    """Tokens ``start`` … ``stop`` of a document, lying together in one row."""

    document: int
    start: int
    stop: int


def plan(lengths: Sequence[int], capacity: int) -> list[list[Piece]]:
    """The pieces of each row: no row is over ``capacity``, every token is in exactly one piece.

    Deterministic. Rows, and the pieces inside them, follow the order of the documents. Takes
    O(N log N) plus N moves inside a list of at most ``capacity`` different gaps.
    """
    pieces = [
        Piece(document, start, min(start + capacity, length))
        for document, length in enumerate(lengths)
        for start in range(0, length, capacity)
    ]
    rows: list[list[Piece]] = []
    rows_of_gap: dict[int, list[int]] = defaultdict(list)
    gaps: list[int] = []  # the keys of rows_of_gap that have rows, ascending
    for piece in sorted(pieces, key=lambda p: p.start - p.stop):
        length = piece.stop - piece.start
        at = bisect_left(gaps, length)
        if at == len(gaps):
            gap, row = capacity, len(rows)
            rows.append([])
        else:
            gap = gaps[at]
            row = rows_of_gap[gap].pop()
            if not rows_of_gap[gap]:
                gaps.pop(at)
        rows[row].append(piece)
        if left := gap - length:
            if not rows_of_gap[left]:
                insort(gaps, left)
            rows_of_gap[left].append(row)
    return sorted(sorted(row) for row in rows)


def pack(documents: Sequence[Tokens], capacity: int, pad: int) -> Tokens:
    """Rows (N × ``capacity``) that hold every token of ``documents`` once; ``pad`` at the ends."""
    rows = plan([len(document) for document in documents], capacity)
    packed = np.full((len(rows), capacity), pad, dtype=np.uint16)
    for row, pieces in zip(packed, rows, strict=True):
        at = 0
        for document, start, stop in pieces:
            row[at : at + stop - start] = documents[document][start:stop]
            at += stop - start
    return packed
