"""One rank of a layout under test: runs the case on the runtime, and compares its parts."""

from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from coterie.data import open_dataset
from coterie.launch.assemble import build_model
from coterie.launch.check import check_world
from coterie.launch.config import RunConfig
from coterie.parallel import gradients, step
from coterie.parallel.distributed import Ranks, make_groups
from coterie.parallel.evaluate import evaluate
from coterie.parallel.model import ParallelModel, local
from coterie.parallel.optimizer import Optimizer, learning_rate
from coterie.parallel.part import Part
from coterie.parallel.rules import layout_of
from coterie.parallel.step import StepSettings, train_step
from tests.conformance.case import Result, config_of, prepared, sampler_of

Mutation = Callable[[Ranks], AbstractContextManager[Any]]
TIMEOUT = timedelta(seconds=60)


@dataclass(frozen=True)
class Job:
    """One run: a layout, and perhaps an error to plant."""

    parallel: tuple[tuple[str, Any], ...]
    recompute: str = "none"
    batch: int = 16
    accumulation: int = 4
    steps: int = 3
    mutation: str = ""

    def config(self, data: Path) -> RunConfig:
        return config_of(data, dict(self.parallel), self.recompute, self.batch, self.accumulation)

    @property
    def name(self) -> str:
        axes = "-".join(f"{name}{value}" for name, value in self.parallel) or "alone"
        return f"{axes}-{self.recompute}"


def ranks_of(config: RunConfig, world: int) -> Ranks:
    """This process's place among ``world`` ranks of the default group."""
    check_world(config, world)
    layout = layout_of(config.parallel, world, config.model)
    device = torch.device("cpu")
    return make_groups(layout, device, TIMEOUT) if world > 1 else Ranks(0, device, layout)


def model_of(config: RunConfig, ranks: Ranks) -> ParallelModel:
    with prepared():
        return build_model(config, ranks)


def run(config: RunConfig, ranks: Ranks, steps: int) -> list[Result]:
    """The first steps of the case, and this rank's parts of what they made."""
    model = model_of(config, ranks)
    sampler, train = sampler_of(config), config.train
    optimizer = Optimizer(model, config.optimizer)
    seen: dict[str, dict[str, Part]] = {}
    norm_of = step.global_norm

    def watched_norm(model: ParallelModel) -> Tensor:
        seen["gradients"] = gradient_parts(model)
        return norm_of(model)

    def before_update(*_: Any) -> None:
        seen["clipped"] = gradient_parts(model)

    optimizer.adamw.register_step_pre_hook(before_update)
    results: list[Result] = []
    for number in range(steps):
        optimizer.lr = learning_rate(number, train.steps, config.optimizer)
        batches = [
            sampler.batch(number, micro, train.accumulation, ranks.place.dp, ranks.layout.dp)
            for micro in range(train.accumulation)
        ]
        settings = StepSettings("fp64", config.optimizer.clip, train.seed)
        with patch.object(step, "global_norm", watched_norm):
            report = train_step(model, optimizer, batches, number + 1, settings)
        results.append(
            {
                "numbers": {
                    "loss": report.loss,
                    "norm": report.grad_norm,
                    **report.router_losses,
                },
                "load": report.load,
                "dropped": report.dropped,
                "entropy": report.entropy,
                "tokens": report.tokens,
                **seen,
                "weights": {name: copied(model.part(name, p)) for name, p in model.named()},
            }
        )
    if steps == train.steps:
        dataset = open_dataset(str(config.data.path), "held_out")
        results[-1]["evaluation"] = evaluate(model, dataset, "fp64", config.evaluation.batch)
    return results


def gradient_parts(model: ParallelModel) -> dict[str, Part]:
    found = {name: model.part(name, p.grad) for name, p in model.named() if p.grad is not None}
    return {name: copied(part) for name, part in found.items()}


def copied(part: Part) -> Part:
    return Part(local(part.tensor).clone(), part.box, part.owner)


def errors_here(results: list[Result], truth: list[Result]) -> dict[str, float]:
    """The largest relative error over the steps, by quantity, on this rank."""
    worst: dict[str, float] = {}

    def note(quantity: str, error: float) -> None:
        worst[quantity] = max(worst.get(quantity, 0.0), error)

    for ours, expected in zip(results, truth, strict=False):
        assert ours["numbers"].keys() == expected["numbers"].keys()
        for name, value in ours["numbers"].items():
            right = expected["numbers"][name]
            note(name, abs(value - right) / abs(right))
        assert ours["entropy"].keys() == expected["entropy"].keys()
        for layer, value in ours["entropy"].items():
            note("entropy", abs(value - expected["entropy"][layer]))
        for name in ("load", "dropped", "tokens"):
            note(name, float(ours[name] != expected[name]))
        for kind in ("gradients", "clipped", "weights"):
            for name, part in ours[kind].items():
                whole = expected[kind][name]
                assert part.box.whole == tuple(whole.shape), name
                expert = ".experts." in name
                label = f"{kind} of {'experts' if expert else 'the rest'}"
                note(label, error_of(part.tensor, whole[part.box.slices], whole))
        if "evaluation" in ours:
            for name, value in expected["evaluation"].items():
                note("held out", abs(ours["evaluation"][name] - value) / value)
    return worst


def error_of(ours: Tensor, right: Tensor, whole: Tensor) -> float:
    """The largest difference over the largest value of the whole tensor."""
    assert ours.shape == right.shape
    if not ours.numel():
        return 0.0
    return float((ours - right).abs().max()) / (float(whole.abs().max()) or 1.0)


def coverage(results: list[Result]) -> dict[str, int]:
    """Elements of each parameter of which this rank is the owner."""
    return {
        name: part.box.numel if part.owner else 0 for name, part in results[0]["weights"].items()
    }


def on_rank(
    rank: int, world: int, jobs: list[Job], data: Path, truths: dict[tuple[int, int], Path]
) -> list[tuple[dict[str, float], dict[str, int]]]:
    """Run each job in this process: its errors, and what this rank owns."""
    from tests.conformance.mutations import MUTATIONS

    outcomes = []
    for job in jobs:
        expected = torch.load(truths[job.batch, job.accumulation])
        config = job.config(data)
        ranks = ranks_of(config, world)
        mutation = MUTATIONS[job.mutation].plant(ranks) if job.mutation else nullcontext()
        # many buckets, or one
        bucket = gradients.BUCKET if job.recompute == "none" else 300
        with patch.object(gradients, "BUCKET", bucket), mutation:
            results = run(config, ranks, job.steps)
        outcomes.append((errors_here(results, expected), coverage(results)))
    return outcomes
