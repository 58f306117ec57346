"""Environments between ranks: rows arrive where they belong, in order, none lost."""

import pytest
import torch
import torch.distributed as dist

from coterie.comm.axis import Axis
from coterie.parallel.environments import ExpertGrid, expert_grid, gather_rows, homes, hosts, move
from tests.distributed import RankFailure, run_ranks

WORLD = 4


def _moves(rank: int) -> int:
    """Many random moves of 0 to 9 environments, some of which stay out; how many rows came here."""
    axis = Axis("world", rank, WORLD, dist.group.WORLD)
    arrived = 0
    for seed in range(25):
        gen = torch.Generator().manual_seed(seed)
        count = seed % 10
        crowd = 1 if seed % 3 == 0 else WORLD  # every third time all go to one rank
        from_E = torch.randint(WORLD, (count,), generator=gen)
        to_E = torch.randint(crowd, (count,), generator=gen)
        out_E = torch.rand(count, generator=gen) < 0.2
        from_E[out_E] = to_E[out_E] = -1
        all_E = torch.randn(count, 2, 3, generator=gen, dtype=torch.float64)
        ours = move(all_E[from_E == rank], from_E, to_E, axis)
        assert torch.equal(ours, all_E[to_E == rank]), seed
        arrived += len(ours)

        from_E[out_E] = 0
        assert torch.equal(gather_rows(all_E[from_E == rank], from_E, axis), all_E), seed
    return arrived


def test_rows_arrive_in_order_and_none_is_lost() -> None:
    assert sum(run_ranks(WORLD, _moves, timeout=120)) > 50


@pytest.mark.parametrize(
    ("environments", "world", "sizes"),
    [(10, 4, [3, 3, 3, 1]), (9, 4, [3, 3, 3]), (2, 4, [1, 1]), (5, 1, [5])],
)
def test_homes_are_equal_parts(environments: int, world: int, sizes: list[int]) -> None:
    assert homes(environments, Axis("world", 0, world)).bincount().tolist() == sizes


def test_hosts_hold_the_expert_and_its_replicas_take_turns() -> None:
    grid = ExpertGrid(Axis(size=6), Axis(size=2), Axis(size=3))
    expert_E = torch.tensor([3, 0, 3, 3, 1, 3, 0, 3, 2])
    rank_E = hosts(expert_E, 4, grid)
    assert torch.equal(rank_E % 2, expert_E // 2)  # experts 0 and 1 are on even ranks
    assert (rank_E // 2)[expert_E == 3].tolist() == [0, 1, 2, 0, 1]
    assert (rank_E // 2)[expert_E == 0].tolist() == [0, 1]


def _three_by_two(rank: int) -> None:
    expert_grid(2)


def test_a_grid_must_divide_the_world() -> None:
    with pytest.raises(RankFailure, match="3 ranks do not divide by ep 2"):
        run_ranks(3, _three_by_two)
