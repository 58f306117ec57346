"""Parts of sequences: who has which positions, and how ranks join and sum them."""

from dataclasses import dataclass
from functools import cache

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.comm.axis import Axis
from coterie.comm.sequence import (
    all_context_positions,
    context_part,
    context_positions,
    gather,
    reduce_scatter,
    sequence_part,
)
from tests.distributed import run_ranks
from tests.moe.tiny import error, randn

SIZES, PIECES = st.integers(1, 6), st.integers(1, 5)


def axes(name: str, size: int) -> list[Axis]:
    return [Axis(name, rank, size) for rank in range(size)]


@settings(max_examples=50, deadline=None)
@given(SIZES, PIECES)
def test_every_position_is_on_one_context_parallel_rank(size: int, piece: int) -> None:
    length = 2 * size * piece
    parts = [context_positions(length, cp) for cp in axes("cp", size)]
    assert {len(part) for part in parts} == {length // size}
    joined = torch.cat(parts)
    assert joined.sort().values.tolist() == list(range(length))
    assert torch.equal(joined, all_context_positions(length, axes("cp", size)[0]))


@settings(max_examples=50, deadline=None)
@given(SIZES, PIECES)
def test_causal_attention_is_the_same_work_on_every_rank(size: int, piece: int) -> None:
    length = 2 * size * piece
    keys = [int((context_positions(length, cp) + 1).sum()) for cp in axes("cp", size)]
    assert keys == [length * (length + 1) // 2 // size] * size


@settings(max_examples=50, deadline=None)
@given(SIZES, SIZES, PIECES)
def test_the_parts_of_a_sequence_are_the_sequence(cp_size: int, tp_size: int, piece: int) -> None:
    length = 2 * cp_size * tp_size * piece
    x_BS = torch.arange(3 * length).view(3, length)
    for cp in axes("cp", cp_size):
        own_BS = context_part(x_BS, cp)
        assert torch.equal(own_BS[0], context_positions(length, cp))
        parts = [sequence_part(x_BS, cp, tp) for tp in axes("tp", tp_size)]
        assert {part.shape for part in parts} == {(3, length // cp_size // tp_size)}
        assert torch.equal(torch.cat(parts, 1), own_BS)


# --- between processes --------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    shape: tuple[int, ...]
    dim: int
    strided: bool = False

    def whole(self, world: int, seed: int) -> Tensor:
        """All ranks' parts, joined along ``dim``."""
        shape = list(self.shape)
        shape[self.dim] *= world
        x = randn(*shape, seed=seed)
        return x.mT.contiguous().mT if self.strided else x


CASES = {
    "first": Case((3, 4), 0),
    "middle": Case((2, 3, 5), 1),
    "last": Case((2, 3, 5), 2),
    "strided": Case((2, 3, 5), 1, strided=True),
    "no rows": Case((0, 3, 5), 1),
    "no columns": Case((2, 0), 1),
}


def on_rank(rank: int, world: int) -> dict[str, tuple[Tensor, ...]]:
    axis = Axis("tp", rank, world, dist.group.WORLD)
    results = {}
    for name, case in CASES.items():
        part = case.whole(world, seed=1).chunk(world, case.dim)[rank].requires_grad_()
        joined = gather(part, case.dim, axis)
        (d_part,) = torch.autograd.grad(joined, part, case.whole(world, seed=10 + rank))
        own = case.whole(world, seed=20 + rank).requires_grad_()
        summed = reduce_scatter(own, case.dim, axis)
        dy = case.whole(world, seed=2).chunk(world, case.dim)[rank]
        (d_own,) = torch.autograd.grad(summed, own, dy)
        results[name] = (joined.detach(), d_part, summed.detach(), d_own)
    return results


@cache
def spread(world: int) -> list[dict[str, tuple[Tensor, ...]]]:
    return run_ranks(world, on_rank, world)


def total(case: Case, world: int, seed: int) -> Tensor:
    return torch.stack([case.whole(world, seed + rank) for rank in range(world)]).sum(0)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("world", [2, 4])
def test_gather_and_reduce_scatter_and_their_gradients(world: int, name: str) -> None:
    case = CASES[name]
    d_parts = total(case, world, 10).chunk(world, case.dim)
    sums = total(case, world, 20).chunk(world, case.dim)
    for rank, results in enumerate(spread(world)):
        joined, d_part, summed, d_own = results[name]
        assert torch.equal(joined, case.whole(world, seed=1))
        assert error(d_part, d_parts[rank]) < 1e-14
        assert error(summed, sums[rank]) < 1e-14
        assert torch.equal(d_own, case.whole(world, seed=2))


def test_one_rank_sends_nothing() -> None:
    x = randn(2, 3, seed=1)
    assert gather(x, 0, Axis("tp")) is x
    assert reduce_scatter(x, 1, Axis("tp")) is x
