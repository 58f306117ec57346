"""One rank of a layout under test: runs the case on the runtime, and compares its parts."""

import faulthandler
import gc
import time
from contextlib import nullcontext
from dataclasses import dataclass
from datetime import timedelta
from functools import cache
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor

from coterie.core.box import Box
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
from tests.conformance.case import STEPS, Result, config_of, prepared, sampler_of

_COLLECTIVE = timedelta(seconds=600)  # longer than any job may take: its limit speaks first
_SMALL_BUCKET = 300
KINDS = ("gradients", "clipped", "weights")
"""Of tensors that are compared."""


@dataclass(frozen=True)
class Job:
    """One run: a layout, and perhaps an error to plant."""

    world: int
    parallel: tuple[tuple[str, Any], ...] = ()
    recompute: str = "none"
    batch: int = 16
    accumulation: int = 4
    layers: int = 6
    steps: int = STEPS
    mutation: str = ""

    def config(self, data: Path) -> RunConfig:
        numbers = (self.batch, self.accumulation, self.layers)
        return config_of(data, dict(self.parallel), self.recompute, *numbers)

    @property
    def evaluates(self) -> bool:
        """Held-out losses at the end; they know nothing of recompute."""
        return self.steps == STEPS and self.recompute == "none"

    @property
    def layout(self) -> str:
        """As in ``4-tp2-ep4``: processes, then the axes that are not 1."""
        axes = [_short(name, value) for name, value in self.parallel]
        return "-".join([str(self.world), *axes])

    @property
    def name(self) -> str:
        return "-".join([self.layout, self.recompute, *filter(None, [self.mutation])])


def _short(name: str, value: Any) -> str:
    if isinstance(value, tuple):
        return name + ".".join(map(str, value))
    return value if isinstance(value, str) else f"{name}{value}"


@dataclass(frozen=True)
class Report:
    """What one rank found."""

    errors: dict[str, float]
    """The largest relative error over the steps, by quantity."""
    shapes: dict[str, tuple[int, ...]]
    """All parameters of the model."""
    owned: dict[str, Box]
    """Of the parameters that this rank stands for, which part."""
    seconds: float
    cpu: float
    """Seconds of processor time, all threads."""
    memory: int
    """Resident, bytes."""
    files: int
    """Open file descriptors."""


def serve(
    rank: int, world: int, pipes: list[Connection], data: Path, truths: Path, limit: float
) -> None:
    """Run the jobs that come through this rank's pipe until it is closed. A job that takes longer
    than ``limit`` (seconds) ends the process, with the stacks of its threads in its output."""
    for other in pipes[:rank] + pipes[rank + 1 :]:
        other.close()
    gc.freeze()  # what is imported stays; collecting need not look at it
    with pipes[rank] as pipe:
        while True:
            try:
                job = pipe.recv()
            except EOFError:
                return
            faulthandler.dump_traceback_later(limit, exit=True)
            pipe.send(report_on(job, data, truths))
            faulthandler.cancel_dump_traceback_later()


def report_on(job: Job, data: Path, truths: Path) -> Report:
    """Run one job in this process."""
    from tests.conformance.mutations import plant_of  # which knows jobs

    started, used = time.perf_counter(), time.process_time()
    config = job.config(data)
    ranks = ranks_of(config, job.world)
    mutation = plant_of(job.mutation)(ranks) if job.mutation else nullcontext()
    # many buckets, or one
    bucket = gradients.BUCKET if job.recompute == "none" else _SMALL_BUCKET
    with patch.object(gradients, "BUCKET", bucket), mutation:
        results = run(job, config, ranks)
    truth = loaded(truth_file(truths, job))
    report = Report(
        errors=errors_here(results, truth),
        shapes={name: tuple(weight.shape) for name, weight in truth[0]["weights"].items()},
        owned=owned(results),
        seconds=time.perf_counter() - started,
        cpu=time.process_time() - used,
        memory=int(Path("/proc/self/statm").read_text().split()[1]) * 4096,
        files=len(list(Path("/proc/self/fd").iterdir())),
    )
    del results
    gc.collect()  # modules and hooks hold each other
    return report


def truth_file(folder: Path, job: Job) -> Path:
    """Where the truth for the job's batch, accumulation and layers is kept."""
    return folder / f"{job.batch}_{job.accumulation}_{job.layers}.pt"


@cache
def loaded(file: Path) -> list[Result]:
    results = torch.load(file)
    for result in results:
        for kind in KINDS:
            largest = {name: float(whole.abs().max()) for name, whole in result[kind].items()}
            result[f"largest {kind}"] = largest
    return results


def ranks_of(config: RunConfig, world: int) -> Ranks:
    """This process's place among ``world`` ranks of the default group."""
    check_world(config, world)
    layout = layout_of(config.parallel, world, config.model)
    device = torch.device("cpu")
    return make_groups(layout, device, _COLLECTIVE) if world > 1 else Ranks(0, device, layout)


def model_of(config: RunConfig, ranks: Ranks) -> ParallelModel:
    with prepared():
        return build_model(config, ranks)


def run(job: Job, config: RunConfig, ranks: Ranks) -> list[Result]:
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
    for number in range(job.steps):
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
    if job.evaluates:
        dataset = open_dataset(str(config.data.path), "held_out")
        results[-1]["evaluation"] = evaluate(model, dataset, "fp64", config.evaluation.batch)
    return results


def gradient_parts(model: ParallelModel) -> dict[str, Part]:
    found = {name: model.part(name, p.grad) for name, p in model.named() if p.grad is not None}
    return {name: copied(part) for name, part in found.items()}


def copied(part: Part) -> Part:
    return Part(local(part.tensor).clone(), part.box, part.owner)


def owned(results: list[Result]) -> dict[str, Box]:
    """The parts of parameters that this rank stands for."""
    return {name: part.box for name, part in results[0]["weights"].items() if part.owner}


def errors_here(results: list[Result], truth: list[Result]) -> dict[str, float]:
    """The largest relative error over the steps, by quantity, on this rank."""
    worst: dict[str, float] = {}

    def note(quantity: str, error: float) -> None:
        if not error <= worst.get(quantity, -1.0):  # nan too
            worst[quantity] = error

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
        for kind in KINDS:
            assert ours[kind].keys() == ours["weights"].keys()
            for name, part in ours[kind].items():
                whole = expected[kind][name]
                assert part.box.whole == tuple(whole.shape), name
                expert = ".experts." in name
                label = f"{kind} of {'experts' if expert else 'the rest'}"
                largest = expected[f"largest {kind}"][name]
                note(label, error_of(part.tensor, whole[part.box.slices], largest))
        if "evaluation" in ours:
            assert ours["evaluation"].keys() == expected["evaluation"].keys()
            for name, value in expected["evaluation"].items():
                note("held out", abs(ours["evaluation"][name] - value) / value)
    return worst


def error_of(ours: Tensor, right: Tensor, largest: float) -> float:
    """The largest difference over the largest value of the whole tensor."""
    assert ours.shape == right.shape
    if not ours.numel():
        return 0.0
    return float(torch.linalg.vector_norm(ours - right, torch.inf)) / (largest or 1.0)
