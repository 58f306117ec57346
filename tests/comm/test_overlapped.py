"""The overlapped exchange gives what the plain one gives, in float64, whatever is late."""

import pytest
import torch.distributed as dist

from coterie.comm.axis import expert_parallel
from coterie.comm.exchange.mail import StreamMail
from coterie.comm.exchange.overlapped import OverlappedExchange
from tests.comm.test_all_to_all import CASES, LIMIT, _inputs, _layer, _step
from tests.distributed import run_ranks
from tests.moe.tiny import error


def _compare(rank: int, world: int, pieces: int, by_stream: bool) -> dict[str, dict[str, float]]:
    group = dist.group.WORLD
    assert group is not None
    errors: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        axes = expert_parallel(group)
        plain, ours = _layer(case, axes), _layer(case, axes)
        exchange = OverlappedExchange(group, pieces=pieces)
        if by_stream:
            exchange.mail = StreamMail(exchange.meter)
        ours.exchange = exchange
        arguments = _inputs(case, world)[rank]
        right, found = _step(plain, *arguments), _step(ours, *arguments)
        errors[name] = {what: error(found[what], right[what]) for what in right}
    return errors


@pytest.mark.parametrize(("world", "pieces"), [(1, 2), (2, 1), (2, 3), (4, 1), (4, 2)])
@pytest.mark.parametrize("by_stream", [False, True])
def test_the_plain_exchanges_numbers(world: int, pieces: int, by_stream: bool) -> None:
    for errors in run_ranks(world, _compare, world, pieces, by_stream):
        for name, by_what in errors.items():
            assert max(by_what.values()) < LIMIT, (name, by_what)
