"""What the plan says of the fused exchange's memory is what it keeps and allocates, to the byte.

Its kernels run on the host, and windows are files.
"""

from dataclasses import replace
from datetime import timedelta
from functools import cache
from typing import Any, NamedTuple
from unittest.mock import patch

import pytest
import torch
from torch import Tensor

from coterie.comm.exchange.fused import windows
from coterie.csrc import fused_ops, fused_plan
from coterie.csrc.fused_launch import TILE_COLUMNS, Windows
from coterie.csrc.fused_plan import Plan
from coterie.launch.plan_command import read_machine
from coterie.models import DecoderConfig
from coterie.parallel.distributed import make_groups
from coterie.parallel.layout import Layout
from coterie.parallel.planner import fused
from coterie.parallel.planner.feed_forward_activations import moe_half
from coterie.parallel.planner.machine import Link
from coterie.parallel.planner.memory import memory
from coterie.parallel.planner.time import route_seconds
from coterie.parallel.planner.traffic import Links, exchanges
from coterie.parallel.planner.workload import Workload
from tests.comm.files import files, kernels
from tests.distributed import run_ranks
from tests.parallel.planner.saved import ROWS, SEQUENCE, WIDTH, model_config, saved_by_part
from tests.parallel.planner.test_activations import work_of

CASES: dict[str, tuple[dict[str, int], int]] = {
    # every token goes to every rank, so that numbers are no means
    "ep": ({"ep": 2, "dp_replicate": 2}, 8),
    "etp": ({"etp": 2, "dp_replicate": 2}, 3),
}


def config_of(k: int, kind: str = "fused", **settings: Any) -> DecoderConfig:
    exchange: dict[str, Any] = {"kind": kind, "route": "tokens"}
    if kind == "fused":
        exchange |= {"communication": 1, "slabs": 1}
    moe = {"experts": {"count": 8, "hidden": 256}, "router": {"k": k}, "exchange": exchange}
    return model_config(moe=moe | settings)


class Kept(NamedTuple):
    saved: int
    """Bytes that autograd keeps of a mixture's half of a block."""
    plan: int
    """Of the plan of a pool, which the exchange keeps."""
    window: int
    """Of the rank's window."""


def _kept(rank: int, world: int) -> dict[str, Kept]:
    fused_ops.library = kernels()
    plan_of, plans = fused_plan.plan, []
    made: list[int] = []

    def noted(*given: Any) -> Plan:
        plan = plan_of(*given)
        tensors = [own for own in plan if isinstance(own, Tensor)]
        plans.append({own.untyped_storage().data_ptr(): own for own in tensors})
        return plan

    def memory_of(group: Any, size: int, device: torch.device) -> Any:
        made.append(size)
        return files(group, size, device)

    found = {}
    with (
        patch.object(fused_plan, "plan", noted),
        patch.object(windows, "symmetric_memory", memory_of),
    ):
        for name, (sizes, k) in CASES.items():
            ranks = make_groups(Layout(**sizes), torch.device("cpu"), timedelta(seconds=60))
            windows.domain_of.cache_clear()
            saved = saved_by_part(config_of(k), "bf16", ranks.axes)["moe"]
            storages = plans[-1].values()
            found[name] = Kept(saved, sum(s.untyped_storage().nbytes() for s in storages), made[-1])
    return found


@cache
def kept_on_two_ranks() -> list[dict[str, Kept]]:
    kernels()
    return run_ranks(2, _kept, 2, timeout=240.0)


@pytest.mark.parametrize("name", CASES)
def test_kept_is_what_autograd_and_the_exchange_keep(name: str) -> None:
    sizes, k = CASES[name]
    work = work_of(config_of(k), "bf16", **sizes)
    expected = moe_half(work, 8).kept
    for rank in kept_on_two_ranks():
        assert rank[name].saved + rank[name].plan == expected


@pytest.mark.parametrize("name", CASES)
def test_windows_are_as_large(name: str) -> None:
    sizes, k = CASES[name]
    work = work_of(config_of(k), "bf16", **sizes)
    tokens = 2 * ROWS * SEQUENCE
    assert fused.windows(work, 0) == Windows.bytes_for(tokens + tokens // 4, WIDTH)
    for rank in kept_on_two_ranks():
        assert rank[name].window == fused.windows(work, 0)


def planned(kind: str, **settings: Any) -> Workload:
    work = work_of(config_of(2, kind, **settings), "bf16", ep=4, dp_replicate=4)
    return replace(work, route="tokens")


def test_windows_are_in_the_peak() -> None:
    assert fused.windows(planned("all_to_all"), 0) == 0
    work = planned("fused")
    assert fused.windows(work, 0) > 0
    with_them = memory(work, 0)
    with patch("coterie.parallel.planner.memory.windows", lambda work, pp: 0):
        assert with_them.peak - memory(work, 0).peak == fused.windows(work, 0)


def test_a_stage_without_experts_has_none() -> None:
    work = work_of(config_of(2), "bf16", pp=2, ep=2, dp_replicate=2)
    piped = replace(work, blocks=(1, 1))
    assert fused.windows(piped, 0) == 0 < fused.windows(piped, 1)


def test_each_tile_of_columns_has_sums_of_its_own() -> None:
    """For the gradient of a row's weight, in float32."""
    backward = {}
    for columns in TILE_COLUMNS:
        work = planned("fused", exchange={"kind": "fused", "tile_columns": columns})
        backward[columns] = fused.fused(work, 8).backward
    pool = fused_plan.pool_rows(work.held, 2)
    assert backward[128] - backward[256] == pool * (256 // 128 - 256 // 256) * 4


def test_rows_cross_in_bfloat16() -> None:
    volumes = {
        kind: {c.what: c.volume for c in exchanges(planned(kind), [1]) if c.when == "forward"}
        for kind in ("fused", "all_to_all")
    }
    assert 2 * volumes["fused"]["dispatch"] == volumes["all_to_all"]["dispatch"]
    assert volumes["fused"]["combine"] == volumes["all_to_all"]["combine"]


def test_its_route_is_its_own() -> None:
    machine = read_machine("cpu").model_copy(update={"node": Link(bandwidth=1.0, latency=0)})
    for kind, routes in (("fused", {"tokens"}), ("all_to_all", {"rows", "tokens"})):
        work = planned(kind)
        assert set(route_seconds(work, machine, Links(work.layout, 1))) == routes
