"""The pipeline that benchmarks/overlap.py measures beside ours computes what the plain exchange
does."""

import pytest
import torch.distributed as dist

from benchmarks.overlaps.two_chunks import TwoChunkExchange
from coterie.comm.axis import expert_parallel
from tests.comm.test_all_to_all import CASES, LIMIT, _inputs, _layer, _step
from tests.distributed import run_ranks
from tests.moe.tiny import error


def _compare(rank: int, world: int) -> dict[str, dict[str, float]]:
    group = dist.group.WORLD
    assert group is not None
    errors: dict[str, dict[str, float]] = {}
    for name, case in CASES.items():
        axes = expert_parallel(group)
        plain, two_chunks = _layer(case, axes), _layer(case, axes)
        two_chunks.exchange = TwoChunkExchange(group)
        arguments = _inputs(case, world)[rank]
        right, found = _step(plain, *arguments), _step(two_chunks, *arguments)
        errors[name] = {what: error(found[what], right[what]) for what in right}
    return errors


@pytest.mark.parametrize("world", [2, 4])
def test_the_plain_exchanges_numbers(world: int) -> None:
    for errors in run_ranks(world, _compare, world):
        for name, by_what in errors.items():
            assert max(by_what.values()) < LIMIT, (name, by_what)
