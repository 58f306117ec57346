"""One rank of benchmarks/overlap.py: finds the layer's size, then measures the contenders in turn.

Run on each host as ``python -m benchmarks.overlaps.rank FOLDER``. FOLDER/case.json says what to
measure; FOLDER/result.json is what the first rank found.
"""

import ctypes
import datetime
import faulthandler
import json
import os
import random
import signal
import statistics
import sys
import time
import warnings
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from benchmarks.overlaps.cases import PLAIN, Case, Options
from benchmarks.overlaps.contenders import Contender, alone, contenders, our_layer
from benchmarks.overlaps.figures import Turn, summarise
from benchmarks.overlaps.usage import usage
from benchmarks.peers import Shape
from coterie.comm.gloo import schedule_as_batch

WARM_UP = 2
RATIO = 0.8
"""Of compute to communication, forward. Backward compute takes twice as long, communication does
not: with both passes together it is 1.2."""
LIMIT = 1e-4
"""What results of two contenders may differ by, relative to their norm, in fp32."""
_PR_SET_PDEATHSIG = 1


def main() -> int:
    """Measure what FOLDER/case.json says."""
    faulthandler.enable()
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the benchmark
    warnings.filterwarnings("ignore")
    folder = Path(sys.argv[1])
    asked = json.loads((folder / "case.json").read_text())
    case, options = Case(**asked["case"]), Options(**asked["options"])
    torch.set_num_threads(1)
    schedule_as_batch()  # all contenders gain by it
    dist.init_process_group("gloo", timeout=datetime.timedelta(seconds=options.time_limit))
    result = measure(case, options)
    if dist.get_rank() == 0:
        (folder / "result.json").write_text(json.dumps(result))
    dist.barrier()
    sys.stdout.flush()
    os._exit(0)  # some projects' threads do not like to be asked to end


def measure(case: Case, options: Options) -> dict[str, Any]:
    """The layer that was chosen, and what became of each contender."""
    began = time.perf_counter()
    group = dist.group.WORLD
    assert group is not None
    shape = fit(case, options.seconds)
    made, chosen, left_out = contenders(shape, group, options.settings, options.peers)
    differs = check(made, *inputs(shape, 0))
    turns: dict[str, list[Turn]] = {name: [] for name in made}
    order, draw = list(made), random.Random(0)  # the same on all ranks
    for number in range(1 - WARM_UP, options.rounds):
        x_TD, dy_TD = inputs(shape, WARM_UP + number)
        draw.shuffle(order)  # nobody comes after the same one each time
        for name in order:
            turn = once(made[name], x_TD, dy_TD)
            if number >= 0:
                turns[name].append(turn)
    every: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(every, turns)
    return {
        "shape": {letter: getattr(shape, letter) for letter in "DFEKT"},
        "contenders": summarise(every),
        "differs": differs,
        "chosen": chosen.model_dump(include={"kind", "pieces", "slabs"}),
        "left_out": left_out,
        "seconds": time.perf_counter() - began,
    }


def fit(case: Case, seconds: float) -> Shape:
    """A layer whose compute and communication, each alone, take about equally long, and in a
    forward pass ``seconds`` together."""
    group = dist.group.WORLD
    assert group is not None
    shape = case.first_guess(seconds)
    for _ in range(5):
        parts = alone(our_layer(shape, group), shape, group)
        times: dict[str, list[float]] = {name: [] for name in parts}
        for number in range(4):
            x_TD, _ = inputs(shape, number)
            for name, part in parts.items():
                part.prepare(x_TD)
                dist.barrier()
                start = time.perf_counter()
                part.forward(x_TD)
                times[name].append(time.perf_counter() - start)
        slowest = torch.tensor([statistics.median(t[1:]) for t in times.values()])
        dist.all_reduce(slowest, dist.ReduceOp.MAX)
        better = case.better(shape, *slowest.tolist(), seconds, RATIO)
        if better == shape:
            break
        shape = better
    return shape


def inputs(shape: Shape, number: int) -> tuple[Tensor, Tensor]:
    """This rank's tokens of a round, and the gradient of its output."""
    gen = torch.Generator().manual_seed(number * dist.get_world_size() + dist.get_rank())
    x_TD, dy_TD = torch.randn(2, shape.T, shape.D, generator=gen)
    return x_TD, dy_TD


def once(contender: Contender, x_TD: Tensor, dy_TD: Tensor) -> Turn:
    """A forward and a backward pass on this rank."""
    x_TD = x_TD.clone().requires_grad_()
    contender.prepare(x_TD)
    dist.barrier()
    start = usage(contender.waited)
    y_TD = contender.forward(x_TD)
    forward = usage(contender.waited).since(start)
    start = usage(contender.waited)
    contender.backward(y_TD, dy_TD)
    return {"forward": forward, "both": usage(contender.waited).since(start).plus(forward)}


def check(made: dict[str, Contender], x_TD: Tensor, dy_TD: Tensor) -> dict[str, float]:
    """How far each contender's output and gradients are from the plain exchange's.

    Raises:
        RuntimeError: one of them computes something else.
    """
    found = {}
    for name, contender in made.items():
        x = x_TD.clone().requires_grad_()
        contender.prepare(x)
        y_TD = contender.forward(x)
        contender.backward(y_TD, dy_TD)
        gradients = contender.gradients()
        if gradients is not None:
            assert x.grad is not None
            found[name] = [t.detach().clone() for t in (y_TD, x.grad, *gradients)]
    plain = found.pop(PLAIN)
    differs = {}
    for name, own in found.items():
        worst = max(_distance(a, b) for a, b in zip(own, plain, strict=True))
        every = torch.tensor(worst)
        dist.all_reduce(every, dist.ReduceOp.MAX)
        differs[name] = every.item()
        if differs[name] > LIMIT:
            raise RuntimeError(f"{name} differs from the plain exchange by {differs[name]:.1e}")
    return differs


def _distance(a: Tensor, b: Tensor) -> float:
    return ((a - b).norm() / b.norm()).item()


if __name__ == "__main__":
    sys.exit(main())
