"""Processes that run one job after the other, and what all of them found."""

from collections.abc import Iterable
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection, wait
from pathlib import Path
from types import TracebackType

import torch

from tests.conformance.case import Result, write_truth
from tests.conformance.worker import Job, Report, loaded, serve, truth_file
from tests.distributed import RankFailure, Ranks

TOLERANCE = 1e-9
QUANTITIES = {
    "loss",
    "balance",
    "z",
    "norm",
    "entropy",
    "load",
    "dropped",
    "tokens",
    "held out",
    *(
        f"{kind} of {whose}"
        for kind in ("gradients", "clipped", "weights")
        for whose in ("experts", "the rest")
    ),
}
_LIFE = 7200.0  # seconds that one set of processes may live
LIMIT = 120.0
"""Seconds that one job may take."""


@dataclass(frozen=True)
class Outcome:
    """A job, over all its ranks."""

    errors: dict[str, float]
    """The largest relative error of any rank, by quantity."""
    covered_wrongly: list[str]
    """Parameters of which some element has no owner, or several."""
    seconds: float
    cpu: float
    """Seconds of processor time, all ranks together."""
    memory: int
    """Resident in the largest process, bytes."""
    files: int
    """Open in the process that has most."""


class Crew:
    """A set of processes, kept while jobs ask for the same number of them; a context manager."""

    def __init__(self, data: Path, truths: Path, limit: float = LIMIT) -> None:
        """``truths``: a folder for the plain runs, which are made when they are first needed."""
        self.data = data
        self._truths = truths
        self.limit = limit
        self._ranks: Ranks | None = None
        self._pipes: list[Connection] = []

    def __enter__(self) -> "Crew":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._dismiss()

    def run(self, job: Job) -> Outcome:
        """Run ``job`` on all its ranks.

        Raises:
            RankFailure: a rank failed or took too long; names the job, with what every rank had to
                say and the stacks of those that hung. The next job gets new processes.
        """
        self.truth(job)
        if len(self._pipes) != job.world:
            self._dismiss()
            self._start(job.world)
        for pipe in self._pipes:
            pipe.send(job)
        try:
            reports = self._reports()
        except (EOFError, OSError):
            story = self._failure()
            self._dismiss()
            raise RankFailure(f"under test: {job.name}\n{story}") from None
        return joined(reports)

    def truth(self, job: Job) -> list[Result]:
        """The plain run that ``job`` is compared with."""
        file = truth_file(self._truths, job)
        if not file.exists():
            write_truth(job.config(self.data), file)
        return loaded(file)

    def _start(self, world: int) -> None:
        ours, theirs = zip(*(Pipe() for _ in range(world)), strict=True)
        args = (world, list(theirs), self.data, self._truths, self.limit)
        self._ranks, self._pipes = Ranks(world, serve, *args, timeout=_LIFE), list(ours)
        for pipe in theirs:
            pipe.close()

    def _reports(self) -> list[Report]:
        waiting: list[Connection] = list(self._pipes)
        reports = []
        while waiting:
            for pipe in wait(waiting):
                assert isinstance(pipe, Connection)
                reports.append(pipe.recv())
                waiting.remove(pipe)
        return reports

    def _failure(self) -> str:
        assert self._ranks is not None
        try:
            self._ranks.results()
        except RankFailure as failure:
            return str(failure)
        return "a rank left without a word"

    def _dismiss(self) -> None:
        for pipe in self._pipes:
            pipe.close()
        self._pipes = []
        if self._ranks is not None:
            self._ranks.__exit__()
            self._ranks = None


def joined(reports: list[Report]) -> Outcome:
    """What all ranks found, as one."""
    by_quantity: dict[str, list[float]] = {}
    for report in reports:  # one whose stages have no experts says nothing of them
        for name, error in report.errors.items():
            by_quantity.setdefault(name, []).append(error)
    return Outcome(
        errors={name: worst(errors) for name, errors in by_quantity.items()},
        covered_wrongly=covered_wrongly(reports),
        seconds=max(report.seconds for report in reports),
        cpu=sum(report.cpu for report in reports),
        memory=max(report.memory for report in reports),
        files=max(report.files for report in reports),
    )


def worst(errors: Iterable[float]) -> float:
    """The largest, nan above all."""
    return max(errors, key=lambda error: (error != error, error))


def covered_wrongly(reports: list[Report]) -> list[str]:
    """Parameters of which some element is not owned by exactly one rank."""
    shapes = reports[0].shapes
    owners = {name: torch.zeros(shape, dtype=torch.int64) for name, shape in shapes.items()}
    for report in reports:
        for name, box in report.owned.items():
            owners[name][box.slices] += 1
    return [name for name, count in owners.items() if not bool((count == 1).all())]


def too_large(errors: dict[str, float]) -> dict[str, float]:
    return {name: error for name, error in errors.items() if not error <= TOLERANCE}
