"""What a run's folder says of it: lines of metrics.jsonl and load.jsonl."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from coterie.core.errors import UserError
from coterie.launch.report.lines import Record, check_load, check_metrics, read_lines
from coterie.parallel.load import LayerLoad
from coterie.parallel.monitors.jsonl import FILE, LOAD_FILE

HELD_OUT = {"held_out/loss": "held-out", "held_out/non_causal/loss": "non-causal held-out"}
"""Losses of an evaluation, and what to call them; those by modality have /text and the like behind.
"""


@dataclass(frozen=True)
class LoadRecord:
    """The load of ``steps`` steps that end with ``step``."""

    step: int
    steps: int
    layers: dict[int, LayerLoad]

    @property
    def first(self) -> int:
        """The first of the steps."""
        return self.step - self.steps + 1

    @property
    def ranks(self) -> tuple[int, ...]:
        """Of each layer, among how many ranks its rows were counted."""
        return tuple(load.rows_R.size for load in self.layers.values())

    def __add__(self, later: "LoadRecord") -> "LoadRecord":
        layers = {layer: load + later.layers[layer] for layer, load in self.layers.items()}
        return LoadRecord(later.step, self.steps + later.steps, layers)


@dataclass(frozen=True)
class Records:
    """All lines, in the order of their steps."""

    steps: list[Record]
    """Those of training steps."""
    evaluations: list[Record]
    """Held-out losses."""
    starts: list[Record]
    """Where the run began and went on; none in runs of older versions."""
    failure: Record | None
    """The step that could not be taken."""
    loads: list[LoadRecord]
    """Empty: the model is dense, or the run is of an older version."""


def read_records(run_dir: Path) -> Records:
    """What ``run_dir`` holds. A last line that is not whole yet, or that a kill cut, is left out.

    Raises:
        UserError: there is nothing yet; a file cannot be read; a line is not what a run writes.
    """
    path = run_dir / FILE
    if not path.exists():
        raise UserError(f"{path}: there is no such file, so nothing was recorded yet to report")
    lines = read_lines(path, check_metrics)
    steps = [line for line in lines if "loss" in line]
    if not steps:
        raise UserError(
            f"{path}: holds no step yet; it gets its first line after monitor.every steps"
        )
    failures = [line for line in lines if "failure" in line]
    loads = run_dir / LOAD_FILE
    return Records(
        steps,
        [line for line in lines if any(name in line for name in HELD_OUT)],
        [line for line in lines if "layout" in line],
        failures[-1] if failures else None,
        [_load(line) for line in read_lines(loads, check_load)] if loads.exists() else [],
    )


def _load(record: Record) -> LoadRecord:
    layers = {
        int(layer): LayerLoad(
            rows_ME=np.array(found["rows"], dtype=np.int64),
            dropped_E=np.array(found["dropped"], dtype=np.int64),
            tokens_M=np.array(found["tokens"], dtype=np.int64),
            unrouted_M=np.array(found["unrouted"], dtype=np.int64),
            rows_R=np.array(found["ranks"], dtype=np.int64),
            entropy=float(found["entropy"]),
        )
        for layer, found in record["layers"].items()
    }
    return LoadRecord(record["step"], record["steps"], layers)
