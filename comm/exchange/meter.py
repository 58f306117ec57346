"""How long an exchange keeps its rank waiting, by timestamps around every wait."""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Shipment(NamedTuple):
    """Rows that went one way between all ranks of a group."""

    sent_R: Sequence[int]
    """Rows to each rank."""
    received_R: Sequence[int]
    """Rows from each rank."""
    like: Tensor
    """Without rows, but with their width, dtype and device."""


class Taken(NamedTuple):
    """What the exchanges of one layer took since the last time."""

    counts: float
    """Seconds of waiting for the others' counts: more for ranks that come late than for these."""
    exposed: float
    """Seconds of waiting for rows: communication that nothing hid."""
    shipments: list[Shipment]


class Meter:
    """Of the exchanges between the ranks of ``group`` in one layer; counts while ``on``."""

    def __init__(self, group: ProcessGroup) -> None:
        self.group = group
        self.on = False
        self.counts = Stopwatch()
        self.rows = Stopwatch()
        self._shipments: list[Shipment] = []

    def counting(self, load_E: Tensor) -> AbstractContextManager[None]:
        """While this rank waits for the others' counts."""
        return self.counts.running(load_E.device, self.on)

    def waiting(self, rows_AD: Tensor) -> AbstractContextManager[None]:
        """While this rank waits for rows."""
        return self.rows.running(rows_AD.device, self.on)

    def ship(self, sent_R: Sequence[int], received_R: Sequence[int], rows_AD: Tensor) -> None:
        """Note that rows like ``rows_AD`` go from each rank to the others."""
        if self.on:
            empty = rows_AD.new_empty(0, rows_AD.shape[1])
            self._shipments.append(Shipment(sent_R, received_R, empty))

    def take(self) -> Taken:
        """Since the last call; waits for the device."""
        shipments, self._shipments = self._shipments, []
        return Taken(self.counts.take(), self.rows.take(), shipments)


class Stopwatch:
    """Seconds that passed inside :meth:`running`: the host's, or on CUDA the stream's."""

    def __init__(self) -> None:
        self._seconds = 0.0
        self._events: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []

    @contextmanager
    def running(self, device: torch.device, on: bool = True) -> Iterator[None]:
        """Count what runs inside, which works on tensors of ``device``."""
        if not on:
            yield
        elif device.type == "cuda":
            begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            begin.record()
            yield
            end.record()
            self._events.append((begin, end))
        else:
            began = time.perf_counter()
            yield
            self._seconds += time.perf_counter() - began

    def take(self) -> float:
        """Seconds since the last call; waits for the device."""
        for begin, end in self._events:
            end.synchronize()
            self._seconds += 1e-3 * begin.elapsed_time(end)
        seconds, self._seconds = self._seconds, 0.0
        self._events.clear()
        return seconds
