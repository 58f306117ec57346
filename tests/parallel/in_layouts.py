"""A few steps of training in one process and in other layouts: the same numbers on every rank, and
each part of weights and moments with one owner."""

from collections.abc import Callable, Iterable
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from coterie.launch.config import RunConfig
from coterie.launch.placement import boxes_of_rank
from coterie.parallel.distributed import Ranks
from coterie.parallel.model import ParallelModel
from coterie.parallel.optimizer import Optimizer
from coterie.parallel.part import Part
from coterie.parallel.run_state import model_parts, optimizer_parts
from coterie.parallel.step import StepReport, StepSettings, train_step
from tests.parallel.tiny import relative_error, sampler_of

STEPS = 2
SETTINGS = {"eps": 1e-3, "warmup": 0}
"""The optimizer's: far from zero, where the second moment's root would turn rounding into steps."""
Check = Callable[[RunConfig, int, StepReport], None]
"""Of the counts of a step, by its number."""


class Trained(NamedTuple):
    """What a rank saw and has."""

    numbers: list[list[float]]
    """Of each step: loss, gradient norm, router losses."""
    counts: list[tuple[dict[int, list[int]], ...]]
    """Of each step, by layer: rows of each expert, and rows dropped."""
    parts: dict[str, Part]
    """Copies of its parts of weights and moments after the last step."""


def trained(config: RunConfig, ranks: Ranks, model: ParallelModel, check: Check) -> Trained:
    """A few steps of ``model``, whose parts are those that the rank is planned to have."""
    optimizer = Optimizer(model, config.optimizer)
    sampler, micros = sampler_of(config), config.train.accumulation
    settings = StepSettings("fp64", 1.0, config.train.seed)
    numbers, counts = [], []
    for step in range(STEPS):
        batches = [
            sampler.batch(step, micro, micros, ranks.place.dp, ranks.layout.dp)
            for micro in range(micros)
        ]
        report = train_step(model, optimizer, batches, step + 1, settings)
        check(config, step, report)
        numbers.append([report.loss, report.grad_norm, *report.router_losses.values()])
        counts.append((report.load, report.dropped))
    state = {**model_parts(model), **optimizer_parts(model, optimizer)}
    planned = boxes_of_rank(config, ranks.layout, ranks.rank)
    assert {name: part.box for name, part in state.items() if part.box.numel} == {
        name: box for name, box in planned.items() if box.numel
    }
    parts = {name: Part(p.tensor.clone(), p.box, p.owner) for name, p in state.items()}
    return Trained(numbers, counts, parts)


def check_equal(ranks: Iterable[Trained], alone: Trained, layout: str) -> None:
    """All ``ranks`` of ``layout`` have the numbers of the one process."""
    covered: dict[str, Tensor] = {n: torch.zeros(p.box.whole) for n, p in alone.parts.items()}
    for ours in ranks:
        for numbers, right in zip(ours.numbers, alone.numbers, strict=True):
            assert numbers == pytest.approx(right, rel=1e-10), layout
        assert ours.counts == alone.counts, layout
        for key, part in ours.parts.items():
            expected = alone.parts[key].tensor[part.box.slices]
            if part.box.numel:
                assert relative_error(part.tensor, expected) < 1e-9, (layout, key)
            if part.owner:
                covered[key][part.box.slices] += 1
    assert all(bool((times == 1).all()) for times in covered.values()), layout
