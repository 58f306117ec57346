"""One rank of eight at full size, over an emulated link: how much of communication is hidden.

    python benchmarks/gpu/link.py --json PATH [--device cpu]

Of each layer, pass and rate of the link: T_comp, the fastest way to compute the experts, with all
multiprocessors and nothing to wait for; T_comm, rows moved alone (the same launches with experts of
the least size); T_fused, the fused kernels with the best of the settings that were tried. Beside
them serial = T_comp + T_comm, and two or four chunks on streams of their own.

    eta = max(T_comp, T_comm) / T_fused        hidden = 1 - (T_fused - T_comp) / T_comm

The backward pass has the weights' gradients in it. Copies into the windows and out of them are in
none of the times.
"""

import sys
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.gpu import cases, program
from benchmarks.gpu.cases import Case
from benchmarks.gpu.experts import WAYS, Operands, Way
from benchmarks.gpu.lone_rank import LoneRank
from benchmarks.gpu.timing import Step, medians
from benchmarks.gpu.two_streams import TwoStreams
from coterie.csrc import fused
from coterie.csrc.fused_launch import HIDDEN, TILE_COLUMNS, WIDTH, Manner

COMMUNICATION = (4, 8, 16, 24, 32)
SLABS = (2, 4, 8)
NEAR = 3
"""The fastest of these, which are tried with other tiles too."""
CHUNKS = (2, 4)


class Pass(ABC):
    """A pass of the layer."""

    name: str
    products: float
    """How many times the forward pass's operations."""

    def __init__(self, of: Operands) -> None:
        self.of, self.here = of, of.rank.here
        thin_in, thin_out = of.rank.weights(HIDDEN)
        self.thin = Operands.random(of.rank, (thin_in, thin_out))
        self.left_PK = of.rank.pool(WIDTH)
        self.thin_EKD = thin_out[:, :WIDTH].contiguous()

    @abstractmethod
    def fused(self, manner: Manner) -> object:
        """With its communication."""

    @abstractmethod
    def moved(self, manner: Manner) -> object:
        """Its communication with next to no computing."""

    @staticmethod
    @abstractmethod
    def between(way: Way) -> Step:
        """What is computed between arrival and departure."""

    @staticmethod
    @abstractmethod
    def rest(way: Way) -> Step | None:
        """What is computed for nobody."""

    @staticmethod
    @abstractmethod
    def whole(way: Way) -> Step:
        """All that is computed."""


class Forward(Pass):
    name, products = "forward", 1

    def fused(self, manner: Manner) -> object:
        (made,) = fused.dispatch(self.here, [self.of.w_in_EHD], manner, keep=True)
        return fused.combine(self.here, [made.a_PF], [self.of.w_out_EFD], manner)

    def moved(self, manner: Manner) -> object:
        fused.dispatch(self.here, [self.thin.w_in_EHD], manner, keep=False)
        return fused.combine(self.here, [self.left_PK], [self.thin_EKD], manner)

    @staticmethod
    def between(way: Way) -> Step:
        return way.forward

    @staticmethod
    def rest(way: Way) -> Step | None:
        return None

    @staticmethod
    def whole(way: Way) -> Step:
        return way.forward


class Backward(Pass):
    name, products = "backward", 2

    def fused(self, manner: Manner) -> object:
        here, of = self.here, self.of
        (grad,) = fused.dispatch_backward(here, [of.w_out_EFD], [of.h_PH], manner)
        return fused.combine_backward(
            here,
            [grad.dh_PH],
            [of.w_in_EHD],
            [of.rank.x_PD],
            [grad.a_PF],
            [grad.dy_PD],
            manner,
        )

    def moved(self, manner: Manner) -> object:
        thin = self.thin
        fused.dispatch_backward(self.here, [thin.w_out_EFD], [thin.h_PH], manner)
        left, thin_EKD = [self.left_PK], [self.thin_EKD]
        return fused.combine(self.here, left, thin_EKD, manner, weighted=False)

    @staticmethod
    def between(way: Way) -> Step:
        return way.gradients

    @staticmethod
    def rest(way: Way) -> Step | None:
        return way.weight_gradients

    @staticmethod
    def whole(way: Way) -> Step:
        return way.backward


class Lab:
    """Measures the passes of one case."""

    def __init__(self, case: Case, device: torch.device, rounds: int) -> None:
        self.case, self.device, self.rounds = case, device, rounds
        self.rank = LoneRank(case, device)
        self.of = Operands.random(self.rank)
        self.ways = {name: way(self.of) for name, way in WAYS.items()}
        self.streams = TwoStreams(device)
        self.flops = self.of.flops("in") + self.of.flops("out")

    def records(self) -> Iterator[dict[str, Any]]:
        """Of each pass and rate of the link."""
        for kind in (Forward, Backward):
            one = kind(self.of)
            computed = self._times({n: one.whole(way) for n, way in self.ways.items()})
            chunks = {n: self._chunk(one, n) for n in CHUNKS}
            for gigabytes in cases.GIGABYTES[:: 1 if self.device.type == "cuda" else 3]:
                yield self._record(one, computed, chunks, gigabytes)

    def _times(self, steps: dict[str, Step], rounds: int | None = None) -> dict[str, float]:
        return medians(steps, self.device, rounds or self.rounds, self.rank.refresh, warm_up=1)

    def _chunk(self, one: Pass, number: int) -> Step:
        """Computing one of so many chunks, in the way that is fastest for it."""
        rank = LoneRank(replace(self.case, tokens=self.case.tokens // number), self.device)
        of = Operands.random(rank, self.of.weights)
        steps = {name: one.between(way(of)) for name, way in WAYS.items()}
        taken = medians(steps, self.device, 3, rank.refresh, warm_up=1)
        return steps[min(taken, key=taken.__getitem__)]

    def _record(
        self,
        one: Pass,
        computed: dict[str, float],
        chunks: dict[int, Step],
        gigabytes: int,
    ) -> dict[str, Any]:
        way = min(computed, key=computed.__getitem__)
        pace = gigabytes * 1000
        tried, moved = self._sweep(one, pace)
        best, mover = (min(x, key=x.__getitem__) for x in (tried, moved))
        link = self.rank.bytes / gigabytes / 1e6 if gigabytes else moved[mover] / 2
        steps: dict[str, Step] = {
            "T_comp": one.whole(self.ways[way]),
            "T_comm": lambda: one.moved(mover),
            "T_fused": lambda: one.fused(best),
        }
        rest = one.rest(self.ways[way])
        for number, chunk in chunks.items():
            steps[f"{number} chunks"] = self._chunked(chunk, number, link, rest)
        ms = self._times(steps)
        return {
            "case": self.case.name,
            "pass": one.name,
            "GB/s": gigabytes or None,
            "rows": self.rank.rows,
            "MB each way": self.rank.bytes / 1e6,
            "ms": ms,
            "computed by": way,
            "ways to compute, ms": computed,
            "communication": best.communication,
            "slabs": best.slabs,
            "tile columns": best.tile_columns,
            **derived(ms, self.flops * one.products),
            "sweep": [[m.communication, m.slabs, m.tile_columns, ms] for m, ms in tried.items()],
        }

    def _sweep(self, one: Pass, pace: int) -> tuple[dict[Manner, float], dict[Manner, float]]:
        """Milliseconds of the fused kernels and of moving alone, by setting: all with the first
        tiles, the fastest with the others too."""
        movers = [Manner(communication=c, slabs=4, pace=pace) for c in COMMUNICATION]
        manners = [m._replace(slabs=s) for m in movers for s in SLABS]
        if self.device.type != "cuda":
            movers, manners = movers[:1], manners[:1]
        tried = self._tried(one.fused, manners)
        best = sorted(tried, key=tried.__getitem__)[:NEAR]
        others = [m._replace(tile_columns=c) for m in best for c in TILE_COLUMNS[1:]]
        # the best again: for times of the same minute
        again = self._tried(one.fused, [*best, *others])
        return {**tried, **again}, self._tried(one.moved, movers)

    def _tried(
        self, run: Callable[[Manner], object], manners: Sequence[Manner]
    ) -> dict[Manner, float]:
        steps: dict[Manner, Step] = {manner: partial(run, manner) for manner in manners}
        rounds = min(3, self.rounds)
        return medians(steps, self.device, rounds, self.rank.refresh, warm_up=1)

    def _chunked(self, chunk: Step, number: int, link: float, rest: Step | None) -> Step:
        return lambda: self.streams.run([chunk] * number, link / number, rest)


def derived(ms: dict[str, float], flops: float) -> dict[str, float]:
    """What follows from the times."""
    compute, communicate, together = ms["T_comp"], ms["T_comm"], ms["T_fused"]
    chunked = min(taken for name, taken in ms.items() if name.endswith("chunks"))
    return {
        "eta": max(compute, communicate) / together,
        "hidden": 1 - (together - compute) / communicate,
        "over serial": (compute + communicate) / together,
        "over chunks": chunked / together,
        "TFLOP/s": flops / together / 1e9,
    }


def main() -> None:
    options = program.options(__doc__)
    device = program.begin(options)
    found = program.Found(options.json)
    for case in cases.small(cases.LINK, options.device):
        lab = Lab(case, device, options.rounds)
        for record in lab.records():
            found.add(record)


if __name__ == "__main__":
    main()
