"""A step's report names the rank that the fused exchange waited for the longest."""

import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import pytest
from test_monitors import facts, report

from coterie.comm.exchange.fused import passes, windows
from coterie.csrc import fused_ops
from coterie.launch.config import RunConfig
from coterie.parallel.late_ranks import LateRanks, late_ranks
from coterie.parallel.layout import Layout
from coterie.parallel.monitors import JsonLines
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.step import StepReport, StepSettings, train_step
from coterie.parallel.tally import Totals
from tests.comm.files import files, kernels
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.parallel.tiny import ALONE, model_of, sampler_of, tiny_config

LATE, SLEPT = 2, 1.5


def config_of(data: Path, kind: str) -> RunConfig:
    """Two pipeline stages, of which the second alone has experts."""
    exchange: dict[str, Any] = {"kind": kind, "route": "tokens"}
    if kind == "fused":
        exchange |= {"communication": 1, "slabs": 1}
    moe = {"experts": {"count": 2, "hidden": 128}, "router": {"k": 2}, "exchange": exchange}
    return tiny_config(
        data,
        model={
            "width": 64,
            "layers": 2,
            "dense_layers": [0],
            "moe": moe,
            "attention": {"heads": 2, "kv_heads": 2},
        },
        train={"precision": "bf16", "global_batch": 4},
        parallel={"pp": 2, "ep": 2},
    )


def _reports(rank: int, configs: list[RunConfig]) -> list[StepReport]:
    fused_ops.library = kernels()
    windows.symmetric_memory = files
    fill = passes._fill

    def late(*given: Any) -> None:
        if rank == LATE:
            time.sleep(SLEPT)
        fill(*given)

    found = []
    for config in configs:
        ranks = ranks_of(config, 4)
        model = model_of(config, ranks)
        optimizer = Optimizer(model, config.optimizer)
        for waits in model.waits:
            assert waits.members == [2, 3]
        micros, place = config.train.accumulation, ranks.place
        for step in (1, 2):
            batches = [
                sampler_of(config).batch(0, micro, micros, place.dp, ranks.layout.dp)
                for micro in range(micros)
            ]
            settings = StepSettings("bf16", None, 3)
            with patch.object(passes, "_fill", late if step == 2 else fill):
                found.append(train_step(model, optimizer, batches, step, settings))
    return found


def test_the_late_rank_is_named(data: Path) -> None:
    kernels()
    configs = [config_of(data, "fused"), config_of(data, "all_to_all")]
    launches = 2 * configs[0].train.accumulation  # that bring rows: in both passes
    for _, late, *plain in run_ranks(4, _reports, configs, timeout=240.0):
        assert late.late is not None
        assert late.late.figures["latest_rank"] == LATE
        assert late.late.rows_W[LATE] > SLEPT * launches / 2
        assert late.late.rows_W[:2] == late.late.end_W[:2] == [0, 0]  # they have no experts
        assert [step.late for step in plain] == [None, None]


@pytest.mark.parametrize(("by_nodes", "others"), [(False, 3), (True, 1)])
def test_means_over_the_others(by_nodes: bool, others: int) -> None:
    ranks = replace(ALONE, layout=Layout(ep=4, dp_replicate=4, node=2))
    waits_2W = np.array([[0.0, 3.0, 6.0, 0.0], [0.0, 9.0, 0.3, 0.0]])
    found = late_ranks(Totals({}, {}, waits_2W), ranks, by_nodes)
    assert found is not None
    assert found.rows_W == pytest.approx([0, 3 / others, 6 / others, 0])
    assert found.figures == pytest.approx(
        {"latest_rank": 1, "latest_rows_ms": 3e3 / others, "latest_end_ms": 9e3 / others}
    )
    assert late_ranks(Totals({}, {}, np.zeros((2, 0))), ranks, by_nodes) is None


def test_it_is_written(tmp_path: Path) -> None:
    monitor = JsonLines(1)
    monitor.start(facts(tmp_path))
    monitor.step(replace(report(1), late=LateRanks([0.0, 0.002], [0.001, 0.0])))
    monitor.step(report(2))
    monitor.close()
    _, line, without = map(json.loads, (tmp_path / "metrics.jsonl").read_text().splitlines())
    assert line["waited_for_ms"] == [1.0, 2.0]
    figures = {name: line[f"exchange/latest_{name}"] for name in ("rank", "rows_ms", "end_ms")}
    assert figures == {"rank": 1, "rows_ms": 2.0, "end_ms": 0.0}
    assert "waited_for_ms" not in without
