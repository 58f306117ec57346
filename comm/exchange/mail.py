"""Messages between ranks that travel while this rank computes."""

import threading
from collections import deque
from collections.abc import Iterable
from queue import SimpleQueue
from typing import NamedTuple, Protocol

import torch
import torch.distributed as dist
from torch import Tensor

from coterie.comm.exchange.meter import Meter


class Message(NamedTuple):
    """Rows to or from another rank; ``tag`` tells apart those between the same two."""

    rows_AD: Tensor
    peer: int
    tag: int


class Arrival:
    """A message that was asked for, or is going to be."""

    def __init__(self, message: Message) -> None:
        self.message = message
        self._there = threading.Event()
        self._error: BaseException | None = None

    def ready(self) -> bool:
        """Whether :meth:`wait` would return at once."""
        return self._there.is_set()

    def wait(self) -> Tensor:
        """The rows. Raises what went wrong on the way."""
        self._there.wait()
        if self._error is not None:
            raise self._error
        return self.message.rows_AD

    def arrived(self, error: BaseException | None = None) -> None:
        """Called once, by the thread that receives."""
        self._error = error
        self._there.set()


class Mail(Protocol):
    """Sends and receives between the ranks of a group, which ``Message.peer`` counts."""

    meter: Meter
    """The group's."""
    tells: bool
    """Whether ``Arrival.ready`` says when a message has arrived."""

    def receive(self, messages: Iterable[Message]) -> list[Arrival]:
        """Ask for messages in this order, after those that were asked for before."""

    def send(self, message: Message) -> None:
        """Post a message; its rows must stay as they are until :meth:`finish`."""

    def wait(self, arrival: Arrival) -> Tensor:
        """The rows of a message, once they are there."""

    def finish(self) -> None:
        """Wait until all that was sent is gone."""


class ThreadMail:
    """Mail by a thread that receives, for backends that have tags and answer when asked (gloo).

    Who receives decides when a message travels: gloo sends a message's rows once its receiver has
    asked for them. So senders post all they have at once, and receivers ask in a fixed order,
    ``ahead`` messages before they are there. Without that order the messages of several senders
    share the receiver's link and all arrive late.
    """

    tells = True

    def __init__(self, meter: Meter, ahead: int = 2) -> None:
        self.group, self.meter = meter.group, meter
        self.ahead = ahead
        self._sent: list[tuple[Message, dist.Work]] = []
        self._orders: SimpleQueue[Arrival] = SimpleQueue()
        self._receiver: threading.Thread | None = None

    def send(self, message: Message) -> None:
        if message.rows_AD.numel():
            work = dist.isend(
                message.rows_AD, group=self.group, group_dst=message.peer, tag=message.tag
            )
            assert work is not None
            self._sent.append((message, work))

    def receive(self, messages: Iterable[Message]) -> list[Arrival]:
        arrivals = [Arrival(message) for message in messages]
        if self._receiver is None:
            self._receiver = threading.Thread(target=self._receive, name="mail", daemon=True)
            self._receiver.start()
        for arrival in arrivals:
            if arrival.message.rows_AD.numel():
                self._orders.put(arrival)
            else:
                arrival.arrived()
        return arrivals

    def wait(self, arrival: Arrival) -> Tensor:
        with self.meter.waiting(arrival.message.rows_AD):
            return arrival.wait()

    def finish(self) -> None:
        for message, work in self._sent:
            with self.meter.waiting(message.rows_AD):
                work.wait()
        self._sent.clear()

    def _receive(self) -> None:
        asked: deque[tuple[Arrival, dist.Work]] = deque()
        while True:
            while len(asked) < self.ahead and (not asked or not self._orders.empty()):
                arrival = self._orders.get()
                rows_AD, peer, tag = arrival.message
                try:
                    work = dist.irecv(rows_AD, group=self.group, group_src=peer, tag=tag)
                except BaseException as error:
                    arrival.arrived(error)
                else:
                    assert work is not None
                    asked.append((arrival, work))
            arrival, work = asked.popleft()
            rows_AD = arrival.message.rows_AD
            try:
                work.wait()
            except BaseException as error:
                arrival.arrived(error)
            else:
                arrival.arrived()
            del arrival, work, rows_AD  # not to be kept until the next message


class StreamMail:
    """Mail whose waiting is done by the device's stream (NCCL): the host only enqueues.

    A message that is sent travels in a group with the next one that was asked for, as NCCL needs
    it: all ranks must send their messages in the order in which the others ask for theirs.
    """

    tells = False

    def __init__(self, meter: Meter) -> None:
        self.group, self.meter = meter.group, meter
        self._asked: deque[Arrival] = deque()
        self._works: dict[Arrival, list[dist.Work]] = {}
        self._sent: list[Message] = []

    def receive(self, messages: Iterable[Message]) -> list[Arrival]:
        arrivals = [Arrival(message) for message in messages]
        self._asked.extend(arrivals)
        return arrivals

    def send(self, message: Message) -> None:
        arrival = self._asked.popleft()
        pair = [
            dist.P2POp(what, rows_AD, group=self.group, group_peer=peer, tag=tag)
            for what, (rows_AD, peer, tag) in (
                (dist.isend, message),
                (dist.irecv, arrival.message),
            )
            if rows_AD.numel()
        ]
        self._works[arrival] = dist.batch_isend_irecv(pair) if pair else []
        self._sent.append(message)

    def wait(self, arrival: Arrival) -> Tensor:
        with self.meter.waiting(arrival.message.rows_AD):
            for work in self._works.pop(arrival):
                work.wait()
        arrival.arrived()
        return arrival.wait()

    def finish(self) -> None:
        """What was sent is gone with what came for it."""
        assert not self._asked and not self._works, "a message was asked for, but not waited for"
        self._sent.clear()


def mail_for(device: torch.device, meter: Meter, ahead: int) -> Mail:
    """For rows on ``device``: groups of a CUDA run have gloo for the host and NCCL for the rest."""
    return StreamMail(meter) if device.type == "cuda" else ThreadMail(meter, ahead)
