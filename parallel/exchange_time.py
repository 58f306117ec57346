"""What the exchanges of a step take: how long ranks wait for each other's rows, and what part of
the rows' way the experts' work hid.

Measured by timestamps (:mod:`coterie.comm.exchange.meter`, :mod:`coterie.comm.exchange.alone`),
summed over layers, micro-batches and both passes.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch

from coterie.comm.exchange.alone import seconds_alone
from coterie.comm.exchange.meter import Taken
from coterie.comm.reduce import sum_over
from coterie.parallel.model import ParallelModel
from coterie.parallel.tally import Tally, Totals


@dataclass(frozen=True)
class ExchangeTime:
    """Seconds of one step: means over the ranks that exchange rows."""

    counts: float
    """Waiting for the others' counts: longest on ranks that have little to do."""
    exposed: float
    """Waiting for rows: communication that nothing hid."""
    step: float
    """The step itself."""
    communication: float | None = None
    """As many rows sent once more with nobody computing; None: not measured in this step."""

    @property
    def exposed_share(self) -> float:
        """The part of the step that is spent waiting for rows."""
        return self.exposed / self.step

    @property
    def hidden(self) -> float | None:
        """The part of the communication that nobody waited for; None: not measured."""
        if not self.communication:
            return None
        return min(1.0, max(0.0, 1 - self.exposed / self.communication))

    @property
    def figures(self) -> dict[str, float]:
        """As they are reported, by name; those that were not measured are left out."""
        found = {
            "exposed_ms": 1e3 * self.exposed,
            "exposed_share": self.exposed_share,
            "counts_ms": 1e3 * self.counts,
        }
        if self.communication is not None:
            found["communication_ms"] = 1e3 * self.communication
        if self.hidden is not None:
            found["hidden"] = self.hidden
        return found


class ExchangeClock:
    """The meters of this rank's layers, and what their launches note, for one step."""

    def __init__(self, model: ParallelModel) -> None:
        self._everyone, self._device = model.ranks.everyone, model.ranks.device
        self._meters, self._waits = model.meters, model.waits
        self._taken: list[Taken] = []

    @contextmanager
    def running(self) -> Iterator[None]:
        """Count what is exchanged inside, and that alone."""
        for meter in self._meters:
            meter.take()  # of a step that failed
            meter.on = True
        for waits in self._waits:
            waits.take()
            waits.on = True
        try:
            yield
        finally:
            for meter in self._meters:
                meter.on = False
            for waits in self._waits:
                waits.on = False
        self._taken = [meter.take() for meter in self._meters]

    def count(self, tally: Tally) -> None:
        """Add this rank's seconds."""
        tally.count("exchange.ranks", float(bool(self._meters)))
        for taken in self._taken:
            tally.count("exchange.counts", taken.counts)
            tally.count("exchange.exposed", taken.exposed)
        for waits in self._waits:
            tally.wait(waits.members, waits.take())

    def over_ranks(self, totals: Totals, step: float, resend: bool) -> ExchangeTime | None:
        """Of a step that took ``step`` seconds; None: no rank exchanges rows. With ``resend`` its
        rows are sent once more. All ranks call, and ``resend`` is the same on all of them."""
        numbers = totals.numbers
        ranks = numbers["exchange.ranks"]
        if not ranks:
            return None
        counts, exposed = (numbers[f"exchange.{name}"] / ranks for name in ("counts", "exposed"))
        communication = self._resent() / ranks if resend else None
        return ExchangeTime(counts, exposed, step, communication)

    def _resent(self) -> float:
        """Seconds, summed over ranks. Ranks of a group have the same layers and sent rows equally
        often, so that each finds the others at the same shipment."""
        own = sum(
            seconds_alone(taken.shipments, meter.group)
            for meter, taken in zip(self._meters, self._taken, strict=True)
        )
        seconds = torch.tensor(own, dtype=torch.float64, device=self._device)
        return float(sum_over(seconds, self._everyone))
