"""The plan of a run: every kind of rank, its groups, memory, traffic, and the step's time."""

from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt

from coterie.comm.exchange.config import Route
from coterie.parallel.layout import AXES
from coterie.parallel.planner.exchange import route_of
from coterie.parallel.planner.machine import Machine
from coterie.parallel.planner.memory import Memory, memory
from coterie.parallel.planner.parameters import owned
from coterie.parallel.planner.pieces import Pieces
from coterie.parallel.planner.time import StepTime, route_seconds, step_time
from coterie.parallel.planner.traffic import Collective, Links, Sent, collectives, total
from coterie.parallel.planner.workload import Workload


@dataclass(frozen=True)
class Kind:
    """Ranks that hold the same amounts."""

    ranks: npt.NDArray[np.int64]
    pp: int
    stages: tuple[int, ...]
    dense: int
    """Elements of dense parameters that each of them stores."""
    expert: int
    """Of experts."""
    memory: Memory
    sent: Sent
    """Bytes that each sends in a step."""


class Plan:
    """What ``work`` costs on ``machine``, ``nodes`` of them."""

    def __init__(self, work: Workload, machine: Machine, nodes: int | None = None) -> None:
        world = work.layout.world
        self.machine = machine
        self.nodes = nodes or machine.nodes(world)
        node = work.layout.node or -(-world // self.nodes)
        self.work = replace(work, layout=replace(work.layout, node=node))
        self.links = Links(self.work.layout, self.nodes)
        self.pieces = Pieces(self.work)

    @cached_property
    def by_pipeline_rank(self) -> list[Memory]:
        """The memory of the rank that holds the most, for each pipeline rank."""
        return [memory(self.work, pp, self.pieces) for pp in range(self.work.layout.pp)]

    @property
    def peak(self) -> int:
        """The most bytes that any rank holds."""
        return max(memory.peak for memory in self.by_pipeline_rank)

    @property
    def fits(self) -> bool:
        """Whether that is less than the machine has for tensors."""
        return self.peak <= self.machine.bytes

    @cached_property
    def time(self) -> StepTime:
        """Of a step."""
        return step_time(self.work, self.machine, self.links, self.pieces)

    @cached_property
    def routes(self) -> dict[Route, float]:
        """Seconds of one layer's exchange on each route; empty where nothing is exchanged."""
        return route_seconds(self.work, self.machine, self.links)

    @property
    def route(self) -> Route:
        """The one that is taken."""
        return route_of(self.work)

    @property
    def best_route(self) -> Route | None:
        """The fastest; None where nothing is exchanged."""
        return min(self.routes, key=self.routes.__getitem__, default=None)

    def on_best_route(self) -> "Plan":
        """The plan of the same work on that route."""
        route = self.best_route
        if route is None or route == self.work.route:
            return self
        return Plan(replace(self.work, route=route), self.machine, self.nodes)

    @cached_property
    def collectives(self) -> list[list[Collective]]:
        """By pipeline rank."""
        return [collectives(self.work, pp) for pp in range(self.work.layout.pp)]

    @cached_property
    def kinds(self) -> list[Kind]:
        """The distinct kinds of rank, by pipeline rank and what they store."""
        layout = self.work.layout
        muon = self.work.optimizer == "muon"
        stored = owned(self.work)
        trained = owned(self.work, lambda parameter: not parameter.frozen).sum(1)
        matrices = owned(self.work, lambda parameter: parameter.of_muon).sum(1) * muon
        pp_of_rank = np.arange(layout.world) // layout.stage_ranks
        rows = np.column_stack([pp_of_rank, stored, 2 * trained - matrices])
        distinct, kind_of = np.unique(rows, axis=0, return_inverse=True)
        sent = [total(self.links, found) for found in self.collectives]
        kinds = []
        for number, (pp, dense, expert, moments) in enumerate(distinct.tolist()):
            parameters = (dense + expert) * self.work.whole
            kinds.append(
                Kind(
                    ranks=np.flatnonzero(kind_of.reshape(-1) == number),
                    pp=pp,
                    stages=layout.stages_of(pp),
                    dense=dense,
                    expert=expert,
                    memory=replace(
                        self.by_pipeline_rank[pp],
                        parameters=parameters,
                        optimizer=moments * self.work.whole,
                    ),
                    sent=sent[pp],
                )
            )
        return kinds

    def groups(self) -> dict[str, list[list[int]]]:
        """The ranks of every process group of more than one rank, by axis."""
        layout = self.work.layout
        found = {axis: layout.groups(axis) for axis in AXES}
        return {axis: ranks.tolist() for axis, ranks in found.items() if ranks.shape[1] > 1}
