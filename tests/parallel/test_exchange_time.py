"""How long the exchanges of a step take, in several layouts: which rows are sent again, when, and
what the report says."""

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple, cast
from unittest.mock import patch

import pytest
import torch
from torch.distributed import ProcessGroup

from coterie.comm.exchange.alone import seconds_alone
from coterie.comm.exchange.meter import Meter, Shipment
from coterie.comm.objects import gather_objects
from coterie.launch.config import RunConfig
from coterie.moe import MoELayer
from coterie.parallel import exchange_time
from coterie.parallel.distributed import Ranks
from coterie.parallel.exchange_time import ExchangeClock, ExchangeTime
from coterie.parallel.model import ParallelModel
from coterie.parallel.monitors import Monitor
from coterie.parallel.step import StepReport
from coterie.parallel.tally import Tally
from tests.conformance.worker import ranks_of
from tests.distributed import run_ranks
from tests.parallel.tiny import ALONE, checkpointer_of, model_of, tiny_config, trainer_of

STEPS, EVERY = 3, 2
IN_FULL = [2, 3]
"""The steps whose rows are sent again: every other, and the last."""
LAYERS, MICROS = 2, 2
LAYOUTS: dict[str, dict[str, Any]] = {
    "zero bubble": {"parallel": {"pp": 2, "schedule": "zero_bubble", "ep": 2}},
    "sharded, sliced experts": {"parallel": {"tp": 2, "etp": 2, "dp_shard": 2}},
    "overlapped": {
        "parallel": {"ep": 4},
        "model": {"exchange": {"kind": "overlapped", "pieces": 2, "slabs": 2}},
    },
    "a stage of dense layers": {"parallel": {"pp": 2, "ep": 2, "stages": [1, 2]}},
}


def config_of(data: Path, model: dict[str, Any] | None = None, **sections: Any) -> RunConfig:
    """Evaluated after each step."""
    train = {"steps": STEPS, "accumulation": MICROS, "precision": "fp64"}
    tree = tiny_config(
        data,
        train={**train, **sections.pop("train", {})},
        evaluation={"batch": 4, "every": 1, "sequences": 4},
        **{"monitor": {"exchange_every": EVERY}, **sections},
    ).model_dump(mode="json")
    tree["model"]["attention"]["kv_heads"] = 2
    tree["model"]["moe"] |= {"max_rows_factor": None, **(model or {})}
    return RunConfig.model_validate(tree)


class Sent(NamedTuple):
    """What was sent again after a step."""

    rows: int
    shipments: int
    seconds: float


class Watch(Monitor):
    """Keeps what the reports say."""

    def __init__(self, model: Callable[[], ParallelModel]) -> None:
        self.reports: list[StepReport] = []
        self.model = model
        self.resending = 0.0
        """Seconds since the last step."""
        self._mark = time.perf_counter()

    def step(self, report: StepReport) -> None:
        # the step's own time is without what comes after it
        assert report.seconds + self.resending <= time.perf_counter() - self._mark
        self.resending = 0.0
        self.reports.append(report)
        assert not any(meter.on for meter in self.model().meters)

    def evaluation(self, step: int, metrics: dict[str, float]) -> None:
        self._mark = time.perf_counter()


class Seen(NamedTuple):
    """By step: the report, and what this rank sent again."""

    reports: list[StepReport]
    sent: list[list[Sent]]


def trained(config: RunConfig, ranks: Ranks, folder: Path) -> Seen:
    """A whole run."""
    watch = Watch(lambda: trainer.model)
    sent: list[list[Sent]] = []
    right_resent = exchange_time.ExchangeClock._resent

    def note(shipments: list[Shipment], group: ProcessGroup) -> float:
        seconds = seconds_alone(shipments, group)
        rows = sum(sum(one.sent_R) for one in shipments)
        sent[-1].append(Sent(rows, len(shipments), seconds))
        return seconds

    def resent(self: Any) -> float:
        sent.append([])
        began = time.perf_counter()
        time.sleep(0.02)  # more than the rest of the loop takes
        seconds = right_resent(self)
        watch.resending = time.perf_counter() - began
        return seconds

    with (
        patch.object(exchange_time, "seconds_alone", note),
        patch.object(exchange_time.ExchangeClock, "_resent", resent),
        checkpointer_of(config, folder, ranks) as checkpointer,
    ):
        trainer = trainer_of(config, ranks, checkpointer, [watch])
        assert trainer.run(folder).finished
    return Seen(watch.reports, sent)


def check(seen: Seen, ranks: Ranks, layers: range, config: RunConfig) -> None:
    """``layers``: how many of them a rank that exchanges may have."""
    everyone = gather_objects(seen.sent, ranks.control)
    times = [report.exchange for report in seen.reports]
    assert [report.step for report in seen.reports] == [1, 2, 3]
    in_full = []
    for report, found in zip(seen.reports, times, strict=True):
        assert found is not None and found.step == report.seconds
        assert found.exposed > 0 and found.counts > 0
        assert found.exposed + found.counts < report.seconds  # the mean over ranks of equal steps
        figures = found.figures
        if found.communication is None:
            assert found.hidden is None and len(figures) == 3
            continue
        assert found.communication > 0
        assert found.hidden is not None and 0 <= found.hidden <= 1
        assert figures["hidden"] == found.hidden and len(figures) == 5
        in_full.append((report, found.communication))
    assert [report.step for report, _ in in_full] == IN_FULL

    for number, (report, communication) in enumerate(in_full):
        sent = [of_rank[number] for of_rank in everyone]
        exchanging = [of_rank for of_rank in sent if of_rank]
        assert all(len(of_rank) in layers for of_rank in exchanging)
        mean = sum(one.seconds for of_rank in exchanging for one in of_rank) / len(exchanging)
        assert communication == pytest.approx(mean, rel=1e-9)
        rows = sum(one.rows for of_rank in sent for one in of_rank)
        # there and back, and so the gradients; each row to all ranks that split its expert
        assert rows == 4 * config.parallel.etp * sum(
            sum(of_layer) for of_layer in report.load.values()
        )
        assert {one.shipments for of_rank in sent for one in of_rank} == {4 * MICROS}


def in_layouts(rank: int, configs: dict[str, RunConfig], folder: Path) -> None:
    for name, config in configs.items():
        ranks = ranks_of(config, 4)
        seen = trained(config, ranks, folder / name)
        check(seen, ranks, range(1, LAYERS + 1), config)
        numbers = [
            (t.counts, t.exposed, t.communication) for r in seen.reports if (t := r.exchange)
        ]
        assert all(other == numbers for other in gather_objects(numbers, ranks.control))


def test_layouts(data: Path, tmp_path: Path) -> None:
    configs = {name: config_of(data, **sections) for name, sections in LAYOUTS.items()}
    run_ranks(4, in_layouts, configs, tmp_path, timeout=120)


class Repeated(NamedTuple):
    """Of a run on two ranks."""

    times: list[ExchangeTime | None]
    """Of each step."""
    shipments: set[int]
    """Of each layer, in each step whose rows were sent again."""
    ways: list[float]
    """In each of these steps: rows sent again, over rows that the experts had."""


def on_two_ranks(rank: int, configs: dict[str, RunConfig], folder: Path) -> dict[str, Repeated]:
    found = {}
    for name, config in configs.items():
        ranks = ranks_of(config, 2)
        seen = trained(config, ranks, folder / name)
        everyone = [one for of_rank in gather_objects(seen.sent, ranks.control) for one in of_rank]
        loads = [r.load for r in seen.reports if r.exchange and r.exchange.communication]
        ways = [
            sum(one.rows for of_step in (first, second) for one in of_step)
            / sum(sum(of_layer) for of_layer in load.values())
            for first, second, load in zip(
                everyone[: len(loads)], everyone[len(loads) :], loads, strict=True
            )
        ]
        shipments = {one.shipments for of_step in everyone for one in of_step}
        found[name] = Repeated([report.exchange for report in seen.reports], shipments, ways)
    return found


def test_all_that_a_step_sent_is_sent_again(data: Path, tmp_path: Path) -> None:
    skewed = {"max_rows_factor": 1.0, "router": {"kind": "top_k", "k": 2, "capacity_factor": None}}
    configs = {
        "recompute": config_of(data, parallel={"ep": 2}, train={"recompute": "full"}),
        "rounds": config_of(data, skewed, parallel={"ep": 2}),
        "never": config_of(data, parallel={"ep": 2}, monitor={"exchange_every": 0}),
        "no expert parallelism": config_of(data),
    }
    for found in run_ranks(2, on_two_ranks, configs, tmp_path):
        again = found["recompute"]
        assert len(again.ways) == len(IN_FULL)
        assert all(4 < ways <= 6 for ways in again.ways) and min(again.shipments) > 4 * MICROS
        rounds = found["rounds"]
        assert all(4 < ways < 6 for ways in rounds.ways) and min(rounds.shipments) > 4 * MICROS
        for one in found["never"].times:
            assert one is not None and one.exposed > 0 and one.communication is None
        assert found["no expert parallelism"].times == [None] * STEPS
        for name in ("never", "no expert parallelism"):
            assert not found[name].shipments


def test_one_process_waits_for_nobody(data: Path, tmp_path: Path) -> None:
    seen = trained(config_of(data), ALONE, tmp_path)
    assert [report.exchange for report in seen.reports] == [None] * STEPS and not seen.sent


def test_a_step_that_failed_is_forgotten(data: Path) -> None:
    model = model_of(config_of(data), ALONE)
    meter, rows_AD = Meter(cast(ProcessGroup, None)), torch.zeros(3, 2)
    layer: Any = next(module for module in model.modules() if isinstance(module, MoELayer))
    layer.exchange.meters = (meter,)
    clock = ExchangeClock(model)

    def exchange(seconds: float) -> None:
        meter.ship([3], [3], rows_AD)
        with meter.waiting(rows_AD):
            time.sleep(seconds)

    with pytest.raises(ZeroDivisionError), clock.running():
        exchange(0.2)
        raise ZeroDivisionError
    exchange(0.2)  # nor is what comes between steps counted
    with clock.running():
        exchange(0.001)
    tally = Tally(model.config, ALONE)
    clock.count(tally)
    with patch.object(exchange_time, "seconds_alone", lambda shipments, _: len(shipments)):
        found = clock.over_ranks(tally.over_ranks(), 1.0, resend=True)
    assert found is not None and found.communication == 1.0
    assert 0.001 <= found.exposed < 0.2 and found.counts == 0


# --- what follows from the seconds --------------------------------------------------------------


def test_figures() -> None:
    found = ExchangeTime(counts=0.001, exposed=0.002, step=0.016, communication=0.008)
    assert found.figures == {
        "exposed_ms": 2.0,
        "exposed_share": 0.125,
        "counts_ms": 1.0,
        "communication_ms": 8.0,
        "hidden": 0.75,
    }
    # a wait that is longer than the way: for a rank that came late
    assert replace(found, communication=0.001).hidden == 0.0
    assert replace(found, exposed=0.0).hidden == 1.0
    for nothing in (None, 0.0):
        assert replace(found, communication=nothing).hidden is None
