"""A rank that comes late to launches of the fused exchange, or is done late, is the one that the
others' launches note. Real processes; the kernels run on the host, and windows are files."""

import time
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.axis import expert_parallel
from coterie.comm.exchange.fused import passes
from coterie.comm.exchange.fused.exchange import FusedExchange
from coterie.comm.exchange.fused.windows import Domain
from coterie.csrc import fused, fused_ops
from coterie.csrc.fused_launch import Manner
from coterie.moe.assignment import from_choices
from coterie.moe.experts import Experts, ExpertsConfig
from tests.comm.files import files, kernels
from tests.distributed import run_ranks

WORLD, LATE = 3, 1
SLEPT = 2.0
"""Seconds, each time."""
D, F, TOKENS = 64, 128, 24  # several warps wait for a rank's rows


@pytest.fixture(scope="module", autouse=True)
def compiled() -> None:
    """Once, before processes start; skips where it cannot be done."""
    kernels()


class Noted(NamedTuple):
    """Seconds that one rank waited for each, (2, R)."""

    late_to_come: Tensor
    late_to_end: Tensor
    on_time: Tensor
    not_counted: bool


def _noted(rank: int) -> Noted:
    fused_ops.library = kernels()
    group = dist.group.WORLD
    assert group is not None
    manner = Manner(communication=1, slabs=1, blocks=2, patience=600.0)
    domain = Domain(group, D, files)
    exchange = FusedExchange(group, None, manner, lambda *_: domain)
    axes = expert_parallel(group)
    experts = Experts(D, ExpertsConfig(count=WORLD, hidden=F), axes.ep).bfloat16()
    for weight in experts.parameters():
        torch.nn.init.normal_(weight, std=0.1)
    (waits,) = exchange.waits
    assert waits.members == [0, 1, 2]

    def both_passes() -> None:
        x_TD = torch.randn(TOKENS, D).bfloat16().requires_grad_()
        choice_TK = torch.arange(WORLD).expand(TOKENS, WORLD)
        rows = from_choices(choice_TK, torch.ones(TOKENS, WORLD).bfloat16(), WORLD)
        experts.over(exchange, x_TD, rows).sum().backward()

    def late(function: Any) -> Any:
        def called(*given: Any, **named: Any) -> Any:
            if rank == LATE:
                time.sleep(SLEPT)
            return function(*given, **named)

        return called

    def seconds() -> Tensor:
        waits.on = True
        both_passes()
        waits.on = False
        found = waits.take()
        assert found is not None
        return found

    both_passes()  # windows are made
    not_counted = waits.take() is None
    on_time = seconds()
    with patch.object(passes, "_fill", late(passes._fill)):
        late_to_come = seconds()
    with (
        patch.object(fused, "combine", late(fused.combine)),
        patch.object(fused, "combine_backward", late(fused.combine_backward)),
    ):
        late_to_end = seconds()
    return Noted(late_to_come, late_to_end, on_time, not_counted)


def test_who_was_late() -> None:
    found = run_ranks(WORLD, _noted, timeout=240.0)
    slept = 2 * SLEPT  # in both passes
    for rank, noted in enumerate(found):
        assert noted.not_counted
        assert (noted.on_time >= 0).all() and noted.on_time.max() < slept / 2
        for kind, waited in enumerate((noted.late_to_come, noted.late_to_end)):
            if rank == LATE:  # the others are there when it comes
                assert waited.max() < slept / 2
                continue
            assert slept / 2 < waited[kind, LATE] < 2 * slept
            others = waited.clone()
            others[kind, LATE] = 0
            assert others.max() < slept / 2
