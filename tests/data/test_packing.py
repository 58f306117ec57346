"""Every token once, in order, uncut where it fits, and the rest exactly padding."""

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from coterie.data.packing import pack, plan

LENGTHS = st.lists(st.integers(1, 40), max_size=60)
CAPACITY = st.integers(1, 25)


@given(LENGTHS, CAPACITY)
def test_every_token_is_in_exactly_one_piece(lengths: list[int], capacity: int) -> None:
    rows = plan(lengths, capacity)
    assert all(sum(stop - start for _, start, stop in row) <= capacity for row in rows)
    pieces = sorted(piece for row in rows for piece in row)
    covered = [(document, i) for document, start, stop in pieces for i in range(start, stop)]
    assert covered == [(d, i) for d, length in enumerate(lengths) for i in range(length)]


@given(LENGTHS, CAPACITY)
def test_a_document_that_fits_is_not_cut(lengths: list[int], capacity: int) -> None:
    pieces = [piece for row in plan(lengths, capacity) for piece in row]
    for document, length in enumerate(lengths):
        cuts = [piece for piece in pieces if piece.document == document]
        assert len(cuts) == -(-length // capacity)


@given(LENGTHS, CAPACITY)
def test_no_two_rows_could_be_one(lengths: list[int], capacity: int) -> None:
    filled = sorted(sum(p.stop - p.start for p in row) for row in plan(lengths, capacity))
    assert len(filled) < 2 or filled[0] + filled[1] > capacity


@given(LENGTHS, CAPACITY)
def test_padding_is_exact_and_at_the_end(lengths: list[int], capacity: int) -> None:
    documents = [np.arange(length, dtype=np.uint16) + 100 * n for n, length in enumerate(lengths)]
    pad = 65535
    packed = pack(documents, capacity, pad)
    assert packed.dtype == np.uint16
    for tokens, pieces in zip(packed, plan(lengths, capacity), strict=True):
        parts = [documents[document][start:stop] for document, start, stop in pieces]
        expected = np.concatenate(parts)
        np.testing.assert_array_equal(tokens[: len(expected)], expected)
        assert (tokens[len(expected) :] == pad).all()


def test_best_fit_takes_the_tightest_gap() -> None:
    # longest first: 7 and 6 leave gaps of 3 and 4; 3 goes where it leaves nothing
    assert [[p.document for p in row] for row in plan([6, 7, 3], 10)] == [[0], [1, 2]]


def test_nothing_packs_to_nothing() -> None:
    assert pack([], 8, 0).shape == (0, 8)
