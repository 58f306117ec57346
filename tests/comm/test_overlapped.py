"""The overlapped exchange gives what the plain one gives, in float64, whatever is late."""

from typing import Any

import pytest
import torch
import torch.distributed as dist

from coterie.comm.axis import expert_parallel
from coterie.comm.exchange.overlapped import OverlappedExchange
from tests.comm.test_all_to_all import CASES, E, LIMIT, _inputs, _layer, _step
from tests.distributed import run_ranks
from tests.moe.tiny import error


def _compare(rank: int, world: int, pieces: int) -> dict[str, dict[str, float]]:
    group = dist.group.WORLD
    assert group is not None
    errors: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        axes = expert_parallel(group)
        plain, ours = _layer(case, axes), _layer(case, axes)
        ours.exchange = OverlappedExchange(group, pieces=pieces)
        arguments = _inputs(case, world)[rank]
        right, found = _step(plain, *arguments), _step(ours, *arguments)
        errors[name] = {what: error(found[what], right[what]) for what in right}
    return errors


@pytest.mark.parametrize(("world", "pieces"), [(1, 2), (2, 1), (2, 3), (4, 1), (4, 2)])
def test_the_plain_exchanges_numbers(world: int, pieces: int) -> None:
    for errors in run_ranks(world, _compare, world, pieces):
        for name, by_what in errors.items():
            assert max(by_what.values()) < LIMIT, (name, by_what)
