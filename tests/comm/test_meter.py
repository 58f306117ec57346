"""What meters say of two real ranks of which one is slow."""

import itertools
import time
from collections.abc import Iterator
from contextlib import contextmanager
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup

from coterie.comm.axis import expert_parallel
from coterie.comm.exchange.alone import seconds_alone
from coterie.comm.exchange.meter import Shipment, Taken
from coterie.comm.exchange.overlapped import OverlappedExchange
from coterie.moe.activations import ACTIVATIONS
from tests.comm.test_all_to_all import CASES, D, _inputs, _layer, _step
from tests.distributed import run_ranks

SLOW = 0.5
"""Seconds that rank 1 computes where rank 0 needs next to nothing."""
TOLD = SLOW / 2
"""What is longer was waiting for it."""
CASE = CASES["uneven"]


def everyone() -> ProcessGroup:
    group = dist.group.WORLD
    assert group is not None
    return group


def busy() -> None:
    end, x = time.perf_counter() + SLOW, torch.ones(8, 8)
    while time.perf_counter() < end:
        x @ x


@contextmanager
def slow_experts() -> Iterator[None]:
    right, calls = ACTIVATIONS["swiglu"], itertools.count()

    def slow(h_AH: Tensor) -> Tensor:
        if next(calls) == 0:
            busy()
        return right.forward(h_AH)

    with patch.dict(ACTIVATIONS, swiglu=right._replace(forward=slow)):
        yield


def taken_when_late(rank: int, kind: str) -> dict[str, tuple[float, float]]:
    """Seconds of waiting for counts and for rows, by what is slow on rank 1."""
    group = everyone()
    layer = _layer(CASE, expert_parallel(group))
    if kind == "overlapped":
        layer.exchange = OverlappedExchange(group, pieces=1)
    (meter,) = layer.exchange.meters
    x_TD, info, _ = _inputs(CASE, 2)[rank]
    assignment = layer.router(x_TD, info).assignment  # which ranks meet for, too
    found = {}

    def run(what: str, on: bool = True) -> None:
        dist.barrier()
        meter.on = on
        if what == "before" and rank == 1:
            busy()
        with torch.no_grad():
            layer.experts.over(layer.exchange, x_TD, assignment)
        found[what] = meter.take()[:2]

    run("first", on=False)
    run("nothing")
    run("before")
    if rank == 1:
        with slow_experts():
            run("experts")
    else:
        run("experts")
    run("off", on=False)
    return found


@pytest.mark.parametrize("kind", ["all_to_all", "overlapped"])
def test_who_waits_for_what(kind: str) -> None:
    first, second = run_ranks(2, taken_when_late, kind)
    for found in (first, second):
        assert found["first"] == found["off"] == (0.0, 0.0)
        assert all(0 < seconds < TOLD for seconds in found["nothing"])
    counts, rows = first["before"]
    assert counts > TOLD > rows  # rank 0 waits for rank 1's counts, then goes beside it
    assert max(second["before"]) < TOLD  # nobody keeps rank 1 waiting
    counts, rows = first["experts"]
    assert rows > TOLD > counts  # it waits for its rows to come back
    assert max(second["experts"]) < TOLD


def shipments_of(rank: int) -> list[Shipment]:
    layer = _layer(CASE, expert_parallel(everyone()))
    (meter,) = layer.exchange.meters
    meter.on = True
    _step(layer, *_inputs(CASE, 2)[rank])
    found: Taken = meter.take()
    assert meter.take() == Taken(0.0, 0.0, [])  # each is taken once
    return found.shipments


def test_rows_go_there_and_back_twice() -> None:
    first, second = run_ranks(2, shipments_of)
    there, back, *gradients = first
    assert there.sent_R == back.received_R and there.received_R == back.sent_R
    assert sum(there.sent_R) == 2 * CASE.tokens[0] and min(there.sent_R) > 0
    assert [one.sent_R for one in gradients] == [there.sent_R, back.sent_R]
    for ours, theirs in zip(first, second, strict=True):
        assert (ours.sent_R[1], ours.received_R[1]) == (theirs.received_R[0], theirs.sent_R[0])
        assert ours.like.shape == (0, D) and ours.like.dtype == torch.float64


def sent_again(rank: int) -> list[float]:
    """Seconds alone: of nothing, of few rows, of many, and of few once rank 1 is late."""
    few, many = (Shipment([rows, rows], [rows, rows], torch.empty(0, 1024)) for rows in (1, 2000))
    seconds_alone([few], everyone())  # connects
    found = [seconds_alone(some, everyone()) for some in ([], [few], [many] * 3)]
    if rank == 1:
        busy()
    return [*found, seconds_alone([few], everyone())]


def test_seconds_alone() -> None:
    for nothing, few, many, late in run_ranks(2, sent_again):
        assert nothing == 0 < few < many
        assert 0 < late < TOLD  # they start together
