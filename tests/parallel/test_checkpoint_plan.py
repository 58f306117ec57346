"""Each element is written once, by one rank, and whoever leaves gaps or overlaps is told."""

import random
from math import prod

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from coterie.core.box import Box
from coterie.parallel.checkpoint_plan import Chunk, assign, covers, find_overlap, intersection

SHAPES = st.lists(st.integers(0, 5), max_size=3).map(tuple)


def cut(box: Box, dice: random.Random, parts: int) -> list[Box]:
    boxes = [box]
    while len(boxes) < parts and box.shape:
        one = boxes.pop(dice.randrange(len(boxes)))
        dim = dice.randrange(len(box.shape))
        at = dice.randint(0, one.shape[dim])
        boxes += [one.cut(dim, range(at)), one.cut(dim, range(at, one.shape[dim]))]
    return boxes


def times_covered(whole: tuple[int, ...], boxes: list[Box]) -> torch.Tensor:
    count = torch.zeros(whole, dtype=torch.int64)
    for box in boxes:
        count[box.slices] += 1
    return count


def chunk(name: str, box: Box) -> Chunk:
    return Chunk.of(name, torch.float32, box)


@given(SHAPES, st.integers(0, 2**32))
def test_overlaps_and_gaps_are_found(whole: tuple[int, ...], seed: int) -> None:
    dice = random.Random(seed)
    boxes = cut(Box.all_of(whole), dice, dice.randint(1, 6))
    assert covers(whole, boxes) and find_overlap(boxes) is None
    others = cut(Box.all_of(whole), dice, dice.randint(1, 6))
    mixed = [dice.choice(boxes + others) for _ in range(dice.randint(0, 6))]
    count = times_covered(whole, mixed)
    assert covers(whole, mixed) == bool((count == 1).all())
    pair = find_overlap(mixed)
    assert (pair is not None) == bool((count > 1).any())
    if pair is not None:
        assert pair[0] != pair[1] and intersection(mixed[pair[0]], mixed[pair[1]]) is not None


@given(SHAPES, st.integers(0, 2**32))
def test_an_intersection_is_what_both_hold(whole: tuple[int, ...], seed: int) -> None:
    dice = random.Random(seed)
    a, b = (dice.choice(cut(Box.all_of(whole), dice, 4)) for _ in range(2))
    shared = intersection(a, b)
    both = (times_covered(whole, [a]) + times_covered(whole, [b])) == 2
    assert (0 if shared is None else shared.numel) == int(both.sum())
    if shared is not None:
        assert both[shared.slices].all()


@given(st.integers(1, 4), st.integers(0, 2**32))
def test_every_chunk_is_written_once_by_a_rank_that_holds_it(world: int, seed: int) -> None:
    dice = random.Random(seed)
    held: list[list[Chunk]] = [[] for _ in range(world)]
    wholes = {f"t{n}": tuple(dice.randint(0, 4) for _ in range(dice.randint(0, 3))) for n in "abc"}
    for name, whole in wholes.items():
        boxes = cut(Box.all_of(whole), dice, dice.randint(1, world))
        for rank in range(world):
            held[rank].append(chunk(name, boxes[rank % len(boxes)]))
    mine = assign(held)
    for name, whole in wholes.items():
        written = [c.box for chunks in mine for c in chunks if c.name == name]
        assert (times_covered(whole, written) == 1).all()
        assert len(written) == 1 if prod(whole) == 0 else all(box.numel for box in written)
    assert all(set(chunks) <= set(held[rank]) for rank, chunks in enumerate(mine))
    for chunks in held:
        dice.shuffle(chunks)
    assert assign(held) == mine


def test_replicas_are_spread_by_size_and_ties_go_to_the_lowest() -> None:
    sizes = {"a": 4, "b": 1, "c": 1, "d": 1}
    held = [[chunk(name, Box.all_of((size,))) for name, size in sizes.items()]] * 2
    assert [[c.name for c in chunks] for chunks in assign(held)] == [["a"], ["b", "c", "d"]]


@pytest.mark.parametrize(
    ("a", "b", "sentence"),
    [
        (Box((4,), (0,), (3,)), Box((4,), (2,), (2,)), "ranks 0 and 1 hold overlapping parts"),
        (Box((4,), (0,), (4,)), Box((4,), (0,), (2,)), r"shape \[4\] at \[0\] and shape \[2\]"),
        (Box((4,), (0,), (1,)), Box((4,), (2,), (2,)), "no rank holds some of tensor 't'"),
        (Box((4,), (0,), (0,)), Box((4,), (4,), (0,)), "no rank holds some of tensor 't'"),
        (Box((4,), (0,), (4,)), Box((5,), (0,), (5,)), "ranks 0 and 1 differ in the shape"),
    ],
)
def test_parts_that_do_not_fit(a: Box, b: Box, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        assign([[chunk("t", a)], [chunk("t", b)]])


def test_ranks_that_differ_in_the_dtype() -> None:
    box = Box.all_of((2,))
    with pytest.raises(ValueError, match="differ in the shape or dtype of tensor 't'"):
        assign([[Chunk("t", torch.float32, box)], [Chunk("t", torch.float64, box)]])
