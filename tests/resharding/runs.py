"""One rank of a run that is saved on one layout and goes on on another."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from coterie.launch.config import RunConfig
from coterie.parallel.checkpoint import Checkpointer, load_tensors
from coterie.parallel.checkpoint_format import folder_name
from coterie.parallel.distributed import Ranks
from coterie.parallel.model import ParallelModel
from coterie.parallel.optimizer import Optimizer, learning_rate
from coterie.parallel.part import Part
from coterie.parallel.run_state import model_parts, optimizer_parts
from coterie.parallel.step import StepSettings, train_step
from tests.conformance.case import Result, config_of, sampler_of
from tests.conformance.worker import error_of, loaded, model_of, ranks_of

BEFORE, AFTER = 2, 3
LAYOUTS: dict[str, dict[str, Any]] = {
    "dp 4": {},
    "ep 4": {"ep": 4},
    "dp_shard 4, ep 2": {"dp_shard": 4, "ep": 2},
    "dp_shard 2, cp 2, etp 2": {"dp_shard": 2, "cp": 2, "etp": 2},
    "tp 2, pp 2": {"tp": 2, "pp": 2},
    "tp 4, ep 2, etp 2": {"tp": 4, "ep": 2, "etp": 2},
    "pp 2, uneven, dp_shard 2": {"pp": 2, "stages": (1, 3), "dp_shard": 2},
    "pp 2, zbv, ep 2": {"pp": 2, "vpp": 2, "schedule": "zbv", "ep": 2},
}


def longer(data: Path, parallel: dict[str, Any]) -> RunConfig:
    """The case, over as many steps as there are before and after."""
    config = config_of(data, parallel, batch=8, accumulation=2, layers=4)
    train = config.train.model_copy(update={"steps": BEFORE + AFTER})
    return config.model_copy(update={"train": train})


class Run:
    """Model, optimizer and data of one layout."""

    def __init__(self, data: Path, parallel: dict[str, Any], world: int) -> None:
        self.config = longer(data, parallel)
        self.ranks: Ranks = ranks_of(self.config, world)
        self.model: ParallelModel = model_of(self.config, self.ranks)
        self.optimizer = Optimizer(self.model, self.config.optimizer)
        self.sampler = sampler_of(self.config)

    def steps(self, first: int, count: int) -> list[tuple[float, float]]:
        """Loss and gradient norm of each."""
        train, place, layout = self.config.train, self.ranks.place, self.ranks.layout
        settings = StepSettings("fp64", self.config.optimizer.clip, train.seed)
        seen = []
        for number in range(first, first + count):
            self.optimizer.lr = learning_rate(number, train.steps, self.config.optimizer)
            batches = [
                self.sampler.batch(number, micro, train.accumulation, place.dp, layout.dp)
                for micro in range(train.accumulation)
            ]
            report = train_step(self.model, self.optimizer, batches, number + 1, settings)
            seen.append((report.loss, report.grad_norm))
        return seen

    def parts(self) -> dict[str, Part]:
        return {**model_parts(self.model), **optimizer_parts(self.model, self.optimizer)}

    def save(self, folder: Path) -> None:
        with Checkpointer(folder, self.config.checkpoint, self.ranks.saving) as checkpointer:
            checkpointer.save(BEFORE, self.parts(), {})

    def load(self, folder: Path) -> None:
        load_tensors(folder / folder_name(BEFORE), self.parts(), self.ranks.control)

    def poison(self) -> None:
        """Leave no value that a load might forget to replace."""
        for part in self.parts().values():
            part.tensor.fill_(torch.nan)

    def bits(self) -> dict[str, Tensor]:
        return {name: part.tensor.clone() for name, part in self.parts().items()}


def neighbours_swapped() -> AbstractContextManager[Any]:
    """Two ranks load each other's experts."""
    right = ParallelModel.part

    def wrong(self: ParallelModel, name: str, tensor: Tensor) -> Part:
        part = right(self, name, tensor)
        if not self.places[name].expert:
            return part
        here = part.box.offset[0]
        there = here ^ part.box.shape[0]
        return Part(part.tensor, replace(part.box, offset=(there, *part.box.offset[1:])))

    return patch.object(ParallelModel, "part", wrong)


def moments_lost() -> AbstractContextManager[Any]:
    """The optimizer's moments stay zero."""
    right = optimizer_parts

    def wrong(model: ParallelModel, optimizer: Optimizer) -> dict[str, Part]:
        parts = right(model, optimizer)
        return {name: Part(part.tensor.clone(), part.box) for name, part in parts.items()}

    return patch.dict(globals(), optimizer_parts=wrong)


def counts_lost() -> AbstractContextManager[Any]:
    """The optimizer counts its steps from zero again."""
    right = optimizer_parts

    def wrong(model: ParallelModel, optimizer: Optimizer) -> dict[str, Part]:
        parts = right(model, optimizer)
        return {
            name: Part(part.tensor.clone(), part.box) if name.endswith(".step") else part
            for name, part in parts.items()
        }

    return patch.dict(globals(), optimizer_parts=wrong)


MUTATIONS: dict[str, Callable[[], AbstractContextManager[Any]]] = {
    "two ranks load each other's experts": neighbours_swapped,
    "the optimizer's moments are lost": moments_lost,
    "the optimizer's step counts are lost": counts_lost,
}
"""Errors planted while a checkpoint is loaded on another layout."""


def resharded(
    rank: int, world: int, saved: str, data: Path, folder: Path, truth: Path
) -> dict[str, dict[str, float]]:
    """Of a run saved on ``saved``, by the layout it is loaded on: errors of the steps after, and
    elements that a way there and back changed."""
    expected = loaded(truth)
    original = Run(data, LAYOUTS[saved], world)
    original.steps(0, BEFORE)
    original.save(folder)
    originals = original.bits()

    found = {}
    for number, (target, parallel) in enumerate(LAYOUTS.items()):
        run = Run(data, parallel, world)
        run.load(folder)
        there = folder / f"by layout {number}"
        run.save(there)
        errors = _errors(run, expected)
        original.poison()
        original.load(there)
        back = original.bits()
        changed = [name for name, bits in back.items() if not torch.equal(bits, originals[name])]
        found[target] = {**errors, "changed": float(len(changed))}
    return found


def wrongly_loaded(
    rank: int, world: int, data: Path, folder: Path, truth: Path
) -> dict[str, dict[str, float]]:
    """By the planted error: errors of the steps after."""
    expected = loaded(truth)
    original = Run(data, LAYOUTS["tp 2, pp 2"], world)
    original.steps(0, BEFORE)
    original.save(folder)
    found = {}
    for name, plant in MUTATIONS.items():
        run = Run(data, LAYOUTS["ep 4"], world)
        with plant():
            run.load(folder)
        found[name] = _errors(run, expected)
    return found


def _errors(run: Run, expected: list[Result]) -> dict[str, float]:
    worst = {"loss": 0.0, "norm": 0.0, "weights": 0.0}
    for (loss, norm), right in zip(run.steps(BEFORE, AFTER), expected[BEFORE:], strict=True):
        numbers = right["numbers"]
        worst["loss"] = max(worst["loss"], abs(loss / numbers["loss"] - 1))
        worst["norm"] = max(worst["norm"], abs(norm / numbers["norm"] - 1))
    largest = expected[-1]["largest weights"]
    for name, parameter in run.model.named():
        part, whole = run.model.part(name, parameter), expected[-1]["weights"][name]
        error = error_of(part.tensor, whole[part.box.slices], largest[name])
        worst["weights"] = max(worst["weights"], error)
    return worst
