"""The fused exchange leaves room for all NCCL collectives that can run beside it."""

import os
from datetime import timedelta
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from test_layout import layouts

from coterie.comm import nccl
from coterie.core.errors import UserError
from coterie.parallel import distributed
from coterie.parallel.layout import Layout


@pytest.fixture(autouse=True)
def unset(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in os.environ if name.startswith("NCCL_")]:
        monkeypatch.delenv(name)


@settings(max_examples=200, deadline=None)
@given(layouts(), st.data())
def test_one_collective_of_each_group_fits(layout: Layout, data: st.DataObject) -> None:
    rank = data.draw(st.integers(0, layout.world - 1))
    groups = {
        (axis == "pp", tuple(members))
        for axis in layout.beside
        for members in layout.groups(axis).tolist()
        if rank in members
    }
    limit = nccl.ctas(len(layout.beside))
    if limit is None:
        assert not groups
        return
    assert 2 <= limit and len(groups) * limit <= nccl.SPARED
    assert limit.bit_count() == 1  # sends take a power of two, at least as many


@pytest.mark.parametrize(
    ("layout", "beside"),
    [
        (Layout(ep=4, dp_replicate=4), ()),
        (Layout(tp=2, etp=2, dp_replicate=2), ()),
        (Layout(pp=2, ep=2, dp_replicate=2), ("pp",)),
        # the experts are sharded over nobody: their gradients are summed after the step
        (Layout(ep=4, dp_shard=4, dp_replicate=2), ("shard", "replicate")),
        (Layout(cp=2, ep=2, dp_shard=4), ("shard", "expert_shard")),
        (
            Layout(pp=2, ep=2, dp_shard=4, dp_replicate=2),
            ("pp", "shard", "replicate", "expert_shard", "expert_replicate"),
        ),
    ],
)
def test_what_runs_beside_a_launch(layout: Layout, beside: tuple[str, ...]) -> None:
    assert layout.beside == beside


def test_how_many() -> None:
    assert [nccl.ctas(groups) for groups in range(6)] == [None, 16, 8, 4, 4, 2]


@pytest.mark.parametrize("name", ["NCCL_MAX_CTAS", "NCCL_MIN_P2P_NCHANNELS"])
@pytest.mark.parametrize(("value", "fits"), [("8", True), ("1", True), ("9", False), ("0", False)])
def test_the_environment_is_heeded(
    name: str, value: str, fits: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(name, value)
    assert nccl.ctas(0) is None
    if fits:
        assert nccl.ctas(2) == 8
        return
    with pytest.raises(UserError, match=f"^{name} is {value}, .*: accepted are 1 to 8, or none$"):
        nccl.ctas(2)


@pytest.mark.parametrize(("value", "fits"), [("0", True), ("1", True), ("4", False)])
def test_ctas_start_one_by_one(value: str, fits: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NCCL_CGA_CLUSTER_SIZE", value)
    assert nccl.ctas(0) is None
    if fits:
        assert nccl.ctas(1) == 16
        return
    with pytest.raises(UserError, match=r"^NCCL_CGA_CLUSTER_SIZE is 4, .*: accepted are 0 and 1"):
        nccl.ctas(1)


def test_groups_are_made_with_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Those of the axes that run beside launches, and no others."""
    layout = Layout(pp=2, tp=2, ep=2, etp=2, dp_shard=4)
    made: dict[tuple[int, ...], list[int | None]] = {}

    def new_group(members: list[int], pg_options: Any = None, **_: Any) -> object:
        made.setdefault(tuple(members), []).append(pg_options and pg_options.config.max_ctas)
        # 4, NCCL's default, would have to start together, on neighbouring multiprocessors
        assert pg_options is None or pg_options.config.cga_cluster_size == 0
        return object()

    def options() -> Any:
        return SimpleNamespace(config=SimpleNamespace(max_ctas=None, cga_cluster_size=4))

    nccl_groups = SimpleNamespace(Options=options)
    monkeypatch.setattr(dist, "ProcessGroupNCCL", nccl_groups, raising=False)
    monkeypatch.setattr(dist, "new_group", new_group)
    monkeypatch.setattr(dist, "get_rank", lambda: 0)
    monkeypatch.setattr(distributed, "_made", {(name, tuple(range(16))): None for name in (
        "control", "saving"
    )})  # fmt: skip
    ctas = nccl.ctas(len(layout.beside))
    ranks = distributed.make_groups(layout, torch.device("cpu"), timedelta(seconds=1), ctas)
    assert ranks.ctas == ctas == 4
    found = {axis: set() for axis in ("pp", "shard", "expert_shard", "expert", "tp", "data")}
    for axis, limits in found.items():
        for members in layout.groups(axis).tolist():
            limits |= set(made[tuple(members)])
    assert found == {
        "pp": {4},
        "shard": {4},
        "expert_shard": {4},
        "expert": {None},
        "tp": {None},
        "data": {None},
    }
