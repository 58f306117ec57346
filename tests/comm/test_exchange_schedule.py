"""The plan of an overlapped exchange, against plain loops over rows."""

import time

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from coterie.comm.exchange.plan import (
    Pools,
    most_tiles,
    places,
    pools,
    rounds_of,
    tiles,
)


@st.composite
def loads(draw: st.DrawFn) -> Tensor:
    """Rows from each rank for each expert: empty experts, one hot expert, ranks with nothing."""
    ranks, local = draw(st.integers(1, 8)), draw(st.integers(1, 4))
    few = st.integers(0, 5)
    counts = draw(st.lists(st.lists(few, min_size=ranks * local, max_size=ranks * local),
                           min_size=ranks, max_size=ranks))  # fmt: skip
    load_SE = torch.tensor(counts)
    kind = draw(
        st.sampled_from(["plain", "hot expert", "empty expert", "silent rank", "idle rank"])
    )
    expert, rank = draw(st.integers(0, ranks * local - 1)), draw(st.integers(0, ranks - 1))
    if kind == "hot expert":
        load_SE[:, expert] += 40
    if kind == "empty expert":
        load_SE[:, expert] = 0
    if kind == "silent rank":
        load_SE[rank] = 0
    if kind == "idle rank":
        load_SE.unflatten(1, (ranks, local))[:, rank] = 0
    return load_SE


def exact(pool: Pools, rank: int, tile: int) -> int:
    return int(((pool.rows_RLS[rank].sum(1) + tile - 1) // tile).sum())


@settings(deadline=None)
@given(loads(), st.sampled_from([1, 4, 128]))
def test_every_row_has_a_place_of_its_own(load_SE: Tensor, align: int) -> None:
    ranks, local = len(load_SE), load_SE.shape[1] // len(load_SE)
    pool = pools(load_SE, align)
    assert pool.rows_RLS.tolist() == [
        [load_SE[:, receiver * local + expert].tolist() for expert in range(local)]
        for receiver in range(ranks)
    ]
    for receiver in range(ranks):
        truth: dict[int, tuple[int, int, int]] = {}
        place = 0
        for expert in range(local):
            place = -(-place // align) * align
            assert int(pool.start_RL[receiver, expert]) == place
            for source in rounds_of(receiver, ranks):
                for row in range(int(load_SE[source, receiver * local + expert])):
                    truth[place] = (source, expert, row)
                    place += 1
        assert int(pool.size_R[receiver]) == -(-place // align) * align
        found = {}
        for source in range(ranks):
            load_E = load_SE[source]
            place_A = places(pool, load_E, source, int(load_E.sum()))
            at = 0
            for expert, rows in enumerate(load_E.tolist()):
                for row in range(rows):
                    if expert // local == receiver:
                        found[int(place_A[at])] = (source, expert % local, row)
                    at += 1
        assert found == truth


@settings(deadline=None)
@given(loads(), st.sampled_from([1, 3, 16]), st.sampled_from([1, 16]), st.booleans())
def test_tiles_cover_every_row_once_and_say_whose(
    load_SE: Tensor, tile: int, align: int, exactly: bool
) -> None:
    ranks = len(load_SE)
    pool = pools(load_SE, align)
    for rank in range(ranks):
        owner = owners(pool, rank)
        real, experts = exact(pool, rank, tile), len(pool.rows_RLS[rank])
        count = real if exactly else most_tiles(len(owner), experts, tile)
        found = tiles(pool, rank, tile, count)
        assert len(found.expert_Q) == count >= real
        assert not found.rows_QS[real:].any()
        assert (found.last_round_Q[real:] == ranks).all()
        seen: list[int] = []
        for expert, first, rows_S in zip(
            found.expert_Q[:real].tolist(),
            found.first_Q[:real].tolist(),
            found.rows_QS[:real].tolist(),
            strict=True,
        ):
            mine = [owner[row] for row in range(first, first + sum(rows_S))]
            assert 0 < len(mine) <= tile
            assert {e for e, _ in mine} == {expert}
            assert rows_S == [sum(s == source for _, s in mine) for source in range(ranks)]
            seen += range(first, first + sum(rows_S))
        assert sorted(seen) == sorted(owner)


@settings(deadline=None)
@given(loads(), st.sampled_from([1, 3, 16]))
def test_tiles_that_can_start_first_come_first(load_SE: Tensor, tile: int) -> None:
    ranks = len(load_SE)
    pool = pools(load_SE)
    for rank in range(ranks):
        found = tiles(pool, rank, tile, exact(pool, rank, tile))
        order = rounds_of(rank, ranks)
        for rows_S, last in zip(found.rows_QS.tolist(), found.last_round_Q.tolist(), strict=True):
            assert last == max(order.index(s) for s in range(ranks) if rows_S[s])
        keys = list(zip(found.last_round_Q.tolist(), found.first_Q.tolist(), strict=True))
        assert keys == sorted(keys)


def owners(pool: Pools, rank: int) -> dict[int, tuple[int, int]]:
    """(local expert, source) of each row of the pool that is one."""
    rows_LS, start_LS = pool.rows_RLS[rank].tolist(), pool.start_RLS[rank].tolist()
    return {
        row: (expert, source)
        for expert in range(len(rows_LS))
        for source in range(len(start_LS[expert]))
        for row in range(
            start_LS[expert][source], start_LS[expert][source] + rows_LS[expert][source]
        )
    }


@pytest.mark.parametrize("ranks", range(1, 9))
def test_rounds_meet(ranks: int) -> None:
    """In each round every rank sends to one and receives from one, and over all rounds to all."""
    for number in range(ranks):
        senders = [rounds_of(rank, ranks)[number] for rank in range(ranks)]
        assert sorted(senders) == list(range(ranks))
    assert all(sorted(rounds_of(rank, ranks)) == list(range(ranks)) for rank in range(ranks))


def test_a_plan_of_256_experts_on_64_ranks_takes_less_than_2_ms() -> None:
    """The best of some: other programs may take their time too."""
    load_SE = torch.randint(0, 600, (64, 256), generator=torch.Generator().manual_seed(0))
    received = load_SE.unflatten(1, (64, 4)).sum((0, 2)).tolist()
    sent = load_SE.sum(1).tolist()
    times = []
    for rank in range(64):
        start = time.thread_time()
        pool = pools(load_SE, 128)
        tiles(pool, rank, 128, most_tiles(received[rank], 4, 128))
        places(pool, load_SE[rank], rank, sent[rank])
        times.append(time.thread_time() - start)
    assert min(times) < 2e-3
