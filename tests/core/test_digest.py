"""The digest of a tensor is the sum of its parts' digests, and changes with what it holds."""

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.core import digest as module
from coterie.core.box import Box
from coterie.core.digest import digest, digest_int64, pieces

DTYPES = (
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16),
    *(torch.float8_e4m3fn, torch.float8_e5m2),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
)
SHAPES = st.lists(st.integers(0, 6), max_size=4)
MODULUS = 1 << 64


def random_bits(shape: list[int], dtype: torch.dtype, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    if dtype == torch.bool:
        return torch.randint(0, 2, shape, generator=generator).bool()
    raw = torch.randint(0, 256, (*shape, dtype.itemsize), generator=generator, dtype=torch.uint8)
    return raw.view(dtype).reshape(shape)


def whole(tensor: Tensor) -> int:
    return digest(tensor, Box.all_of(tuple(tensor.shape)))


def cut(box: Box, dice: random.Random, depth: int) -> list[Box]:
    """``box`` in boxes, by up to ``depth`` cuts in a row; empty ones included."""
    if depth == 0 or not box.shape:
        return [box]
    dim = dice.randrange(len(box.shape))
    at = dice.randint(0, box.shape[dim])
    halves = box.cut(dim, range(at)), box.cut(dim, range(at, box.shape[dim]))
    return [part for half in halves for part in cut(half, dice, dice.randint(0, depth - 1))]


def plainly(tensor: Tensor) -> int:
    """The definition, an element at a time, in Python integers."""

    def mix(x: int) -> int:
        x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % MODULUS
        x = (x ^ (x >> 27)) * 0x94D049BB133111EB % MODULUS
        return x ^ (x >> 31)

    raw = bytes(tensor.contiguous().reshape(-1).view(torch.uint8).tolist())
    width, total = tensor.element_size(), 0
    for index in range(tensor.numel()):
        bits = int.from_bytes(raw[index * width : (index + 1) * width], "little")
        total += mix((mix(index ^ module._KEY) + bits * 0x9E3779B97F4A7C15) % MODULUS)
    return total % MODULUS


@settings(deadline=None)
@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 2**32), st.sampled_from([1, 3, 7, 1 << 15]))
def test_any_cutting_adds_up_to_the_whole(
    shape: list[int], dtype: torch.dtype, seed: int, piece: int
) -> None:
    tensor = random_bits(shape, dtype, seed)
    boxes = cut(Box.all_of(tuple(shape)), random.Random(seed), 5)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(module, "_CPU_PIECE", piece)
        parts = [digest(tensor[box.slices], box) for box in boxes]
    assert sum(parts) % MODULUS == whole(tensor) == plainly(tensor)
    assert all(0 <= part < MODULUS for part in parts)
    assert all(part == 0 for part, box in zip(parts, boxes, strict=True) if not box.numel)


@settings(deadline=None)
@given(SHAPES, st.sampled_from(DTYPES), st.integers(0, 2**32))
def test_a_changed_bit_or_two_exchanged_elements_show(
    shape: list[int], dtype: torch.dtype, seed: int
) -> None:
    tensor = random_bits(shape, dtype, seed)
    before, dice = whole(tensor), random.Random(seed)
    if not tensor.numel():
        return
    flat = tensor.reshape(-1)
    raw = flat.view(torch.uint8)
    at = dice.randrange(raw.numel())
    raw[at] ^= 1 << (0 if dtype == torch.bool else dice.randrange(8))
    assert whole(tensor) != before
    a, b = dice.randrange(flat.numel()), dice.randrange(flat.numel())
    bits = flat.view(module._BITS[dtype.itemsize])
    before, differ = whole(tensor), bits[a] != bits[b]
    bits[[a, b]] = bits[[b, a]].clone()
    assert (whole(tensor) != before) == bool(differ)


def test_signs_of_zero_count_and_so_does_every_zero() -> None:
    zeros = torch.zeros(3)
    assert len({whole(zeros), whole(-zeros), whole(torch.zeros(2)), whole(torch.zeros(0))}) == 4
    assert whole(torch.zeros(())) != 0 == whole(torch.zeros(0, 5))


def test_strides_do_not_matter() -> None:
    tensor = torch.randn(5, 6, 7)
    for view in (tensor.permute(2, 0, 1), tensor[::2, :, 1:], tensor[:1].expand(4, 6, 7)):
        assert whole(view) == whole(view.contiguous())
    assert whole(torch.nn.Parameter(tensor)) == whole(tensor)


def test_values_are_pinned() -> None:
    """A change here makes the digests in every checkpoint wrong."""
    assert whole(torch.arange(6, dtype=torch.int32).reshape(2, 3)) == PINNED[0]
    assert whole(torch.tensor([1.5, -0.0, float("nan")])) == PINNED[1]


PINNED = (0xDB5A4FF4AE176052, 0x42E2F1D43885D3D3)


def test_an_int64_sum_over_ranks_is_that_of_the_whole() -> None:
    tensor = torch.randn(64, 3)
    box = Box.all_of((64, 3))
    parts = [box.cut(0, range(start, start + 8)) for start in range(0, 64, 8)]
    total = torch.stack([digest_int64(tensor[part.slices], part) for part in parts]).sum()
    assert total.dtype == torch.int64 and int(total) % MODULUS == whole(tensor)


def test_a_tensor_that_is_not_the_box_is_refused() -> None:
    with pytest.raises(ValueError, match=r"shape \[2, 3\] is not the part"):
        digest(torch.zeros(2, 3), Box.all_of((3, 2)))


def test_it_works_in_slices(monkeypatch: pytest.MonkeyPatch) -> None:
    largest = 0
    fold_in = module.fold_in

    def watch(keys: Tensor, data: Tensor) -> Tensor:
        nonlocal largest
        largest = max(largest, keys.numel(), data.numel())
        return fold_in(keys, data)

    monkeypatch.setattr(module, "fold_in", watch)
    tensor = torch.randn(3, 70_000)
    assert whole(tensor) == plainly(tensor.t().contiguous().t())
    assert 0 < largest <= module._CPU_PIECE


@given(SHAPES, st.integers(1, 50))
def test_pieces_in_a_row_are_the_box(shape: list[int], elements: int) -> None:
    box = Box.all_of(tuple(shape))
    tensor = torch.arange(box.numel).reshape(shape)
    found = list(pieces(box, elements))
    assert all(0 < piece.numel <= elements for piece in found)
    rows = [tensor[piece.slices].reshape(-1) for piece in found]
    assert torch.cat([torch.empty(0, dtype=torch.int64), *rows]).equal(tensor.reshape(-1))


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_cuda_gives_the_same(dtype: torch.dtype) -> None:
    tensor = random_bits([33, 17], dtype, 0)
    assert whole(tensor.cuda()) == whole(tensor)
