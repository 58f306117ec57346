"""The exchanges between ranks give what the plain one gives, in float64, whatever is late."""

from collections.abc import Callable
from typing import Any

import pytest
import torch.distributed as dist
from torch.distributed import ProcessGroup

from coterie.comm.axis import expert_parallel
from coterie.comm.exchange.all_to_all import AllToAllExchange
from coterie.comm.exchange.base import Exchange
from coterie.comm.exchange.local import LocalExchange
from coterie.comm.exchange.mail import StreamMail
from coterie.comm.exchange.overlapped import OverlappedExchange
from tests.comm.test_all_to_all import CASES, LIMIT, _inputs, _layer, _step
from tests.distributed import run_ranks
from tests.moe.tiny import error

MADE: dict[str, Callable[[ProcessGroup], Exchange]] = {
    "tokens": lambda group: AllToAllExchange(group, onward=LocalExchange()),
    "one piece": lambda group: OverlappedExchange(group, pieces=1),
    "pieces": lambda group: OverlappedExchange(group, pieces=3),
    "slabs": lambda group: OverlappedExchange(group, pieces=1, slabs=3, ahead=1),
    "pieces and slabs": lambda group: OverlappedExchange(group, pieces=2, slabs=2, ahead=9),
    "streams": lambda group: by_streams(OverlappedExchange(group, pieces=3, slabs=2)),
    "pieces of tokens": lambda group: OverlappedExchange(
        group, deduplicate=True, pieces=2, slabs=2
    ),
    "rounds of tokens": lambda group: OverlappedExchange(group, 1.0, deduplicate=True, pieces=2),
    "rounds": lambda group: OverlappedExchange(group, 1.0, pieces=2),
}


def by_streams(exchange: OverlappedExchange) -> OverlappedExchange:
    """Its messages go as they do with NCCL."""
    exchange.mail = StreamMail(exchange.meter)
    return exchange


def _compare(rank: int, world: int) -> dict[str, dict[str, float]]:
    group = dist.group.WORLD
    assert group is not None
    errors: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        axes = expert_parallel(group)
        arguments = _inputs(case, world)[rank]
        right = _step(_layer(case, axes), *arguments)
        for kind, make in MADE.items():
            ours = _layer(case, axes)
            ours.exchange = make(group)
            found = _step(ours, *arguments)
            errors[f"{name}, {kind}"] = {what: error(found[what], right[what]) for what in right}
    return errors


@pytest.mark.parametrize("world", [1, 2, 4])
def test_the_plain_exchanges_numbers(world: int) -> None:
    for errors in run_ranks(world, _compare, world):
        for name, by_what in errors.items():
            assert max(by_what.values()) < LIMIT, (name, by_what)
