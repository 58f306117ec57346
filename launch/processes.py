"""N local processes for one run: started, watched, interrupted and ended together."""

import json
import os
import select
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from coterie.launch.child import PARENT, REPORTS

GRACE = 3.0
"""Seconds between SIGTERM and SIGKILL for the ranks that are left when one has failed,
and between a signal and SIGKILL for ranks that have not begun to train."""
LEAVE = 30.0
"""Seconds that an interrupted rank has to leave once another one has: they save one checkpoint
together, so they leave at about the same time."""

_SIGNALS = (signal.SIGCHLD, signal.SIGINT, signal.SIGTERM)
_MESSAGE = 1 << 18


@dataclass(frozen=True)
class Failure:
    """The first rank that failed, and how."""

    rank: int
    code: int
    """As ``subprocess`` gives it: negative for a signal. 2: a mistake of the user."""
    text: str = ""
    """A sentence, or a traceback; '' when the rank said nothing."""

    def how(self) -> str:
        """``rank 1 was ended by SIGKILL``, …"""
        if self.code < 0:
            name = signal.Signals(-self.code).name
            why = " (out of memory? see dmesg)" if name == "SIGKILL" else ""
            return f"rank {self.rank} was ended by {name}{why}"
        return f"rank {self.rank} ended with exit code {self.code}"


@dataclass(frozen=True)
class Ended:
    """How a group of ranks ended."""

    failure: Failure | None
    interrupted: bool
    """A signal asked for it."""


def command_of_this_process() -> list[str]:
    """What was typed, for the ranks to run again."""
    return [sys.executable, *sys.orig_argv[1:]]


def run_ranks(command: list[str], world: int, grace: float = GRACE, leave: float = LEAVE) -> Ended:
    """Run ``command`` as ``world`` ranks on this machine and wait until all have ended.

    Each finds its place in torchrun's variables; the store they meet in lives in this process, on a
    port that the system chose. When one fails, the others are ended. SIGINT and SIGTERM are passed
    on once; a second one kills. Ranks that train save a checkpoint and leave, all within ``leave``
    seconds of the first; before that there is nothing to save, and whoever is left after ``grace``
    seconds is killed. Call from the main thread.
    """
    from torch.distributed import TCPStore  # slow to import

    store = TCPStore("127.0.0.1", 0, None, is_master=True, wait_for_workers=False)
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
    with ours, theirs, _wake_on_signals() as wake:
        ours.setblocking(False)
        group = _Group(ours, grace, leave)
        try:
            for rank in range(world):
                environment = _environment(rank, world, store.port, theirs)
                group.start(command, environment, theirs)
            group.watch(wake)
        finally:
            group.kill()
            if sys.stderr.isatty():  # the progress bar of a rank that was killed hid the cursor
                print("\x1b[?25h", end="", file=sys.stderr, flush=True)
        return Ended(group.failure, group.interrupted)


class _Group:
    """The processes, and what became of them."""

    def __init__(self, reports: socket.socket, grace: float, leave: float = LEAVE) -> None:
        self.failure: Failure | None = None
        self.interrupted = False
        self._abandoned = False  # interrupted, nothing left to save: no way to end is a failure
        self._training: set[int] = set()
        self._processes: list[subprocess.Popen[bytes]] = []
        self._said: dict[int, Failure] = {}
        self._reports = reports
        self._grace = grace
        self._leave = leave
        self._deadline: float | None = None

    def start(
        self, command: list[str], environment: dict[str, str], reports: socket.socket
    ) -> None:
        """One rank, in a process group of its own: the terminal's Ctrl-C reaches only the parent.

        SIGINT stays blocked, hence is kept, until :func:`coterie.launch.child.attach`.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            process = subprocess.Popen(
                command,
                env=environment,
                stdin=subprocess.DEVNULL,
                pass_fds=[reports.fileno()],
                process_group=0,
            )
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)
        self._processes.append(process)

    def watch(self, wake: socket.socket) -> None:
        """Until all have ended."""
        while self._look():
            left = None if self._deadline is None else self._deadline - time.monotonic()
            if left is not None and left <= 0:
                self._blame_the_late()
                self.kill()
                return
            for number in _received(wake, self._reports, left):
                if number != signal.SIGCHLD:
                    self._interrupt(number)

    def kill(self) -> None:
        """SIGKILL whatever runs, and reap it."""
        self._send(signal.SIGKILL)
        for process in self._processes:
            process.wait()

    def _look(self) -> bool:
        """Notice deaths and reports; True while a rank is running."""
        codes = {rank: process.poll() for rank, process in enumerate(self._processes)}
        self._read_reports()
        if self.failure is None and not self._abandoned:
            self.failure = self._first_failure(codes)
            if self.failure is not None:
                self._send(signal.SIGTERM)
                self._deadline = time.monotonic() + self._grace
        running = [rank for rank, code in codes.items() if code is None]
        if self.interrupted and self._deadline is None and len(running) < len(codes):
            self._deadline = time.monotonic() + self._leave
        return bool(running)

    def _blame_the_late(self) -> None:
        """One that trained and did not leave with the others may not have saved its checkpoint."""
        if self.failure is None and not self._abandoned:
            codes = [process.returncode for process in self._processes]
            rank = codes.index(None)
            text = f"rank {rank} had not left {self._leave:g} s after another one and was killed"
            self.failure = Failure(rank, -signal.SIGKILL, text)

    def _first_failure(self, codes: dict[int, int | None]) -> Failure | None:
        """The cause rather than a consequence: a signal, then a report, then an exit code."""
        ended = [(rank, code) for rank, code in codes.items() if code]
        if self.interrupted:  # to be ended by the signal, or with 130 for it, is to obey
            ended = [(rank, code) for rank, code in ended if code not in (130, -2, -15)]
        for rank, code in ended:
            if code < 0:
                return Failure(rank, code)
        if self._said:
            return next(iter(self._said.values()))
        return Failure(*ended[0]) if ended else None

    def _read_reports(self) -> None:
        while True:
            try:
                message = json.loads(self._reports.recv(_MESSAGE))
            except BlockingIOError:
                return
            if "training" in message:
                self._training.add(message["rank"])
            else:
                self._said.setdefault(message["rank"], Failure(**message))

    def _interrupt(self, number: int) -> None:
        again = self.interrupted
        self.interrupted = True
        if again or self.failure is not None:
            self._abandoned = True
            self._send(signal.SIGKILL)
            return
        self._read_reports()
        self._send(number)
        told = "saving a checkpoint and leaving; a second one ends it at once"
        if len(self._training) < len(self._processes):
            told = "leaving, training had not begun"
            self._abandoned = True
            self._deadline = time.monotonic() + self._grace
        print(f"\ncoterie: {signal.Signals(number).name}: {told}", file=sys.stderr)

    def _send(self, number: int) -> None:
        """To each rank that was not reaped, and to what it started."""
        for process in self._processes:
            if process.returncode is None:
                os.killpg(process.pid, number)


def cores() -> int:
    """The processor cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):  # not on macOS
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _environment(rank: int, world: int, port: int, reports: socket.socket) -> dict[str, str]:
    threads = max(1, cores() // world)
    local = {"OMP_NUM_THREADS": str(threads)}
    if Path("/sys/class/net/lo").exists():
        local["GLOO_SOCKET_IFNAME"] = "lo"  # whatever the host's name resolves to, or does not
    return {
        **local,
        **os.environ,
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world),
        "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
        PARENT: str(os.getpid()),
        REPORTS: str(reports.fileno()),
    }


@contextmanager
def _wake_on_signals() -> Iterator[socket.socket]:
    """A socket that gets a byte, the signal's number, for each signal of interest."""
    wake, written = socket.socketpair()
    wake.setblocking(False)
    written.setblocking(False)
    handlers = {number: signal.signal(number, lambda *_: None) for number in _SIGNALS}
    descriptor = signal.set_wakeup_fd(written.fileno())
    try:
        yield wake
    finally:
        signal.set_wakeup_fd(descriptor)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        wake.close()
        written.close()


def _received(wake: socket.socket, reports: socket.socket, timeout: float | None) -> bytes:
    """The signals that arrived, after waiting for one, for a report, or for ``timeout``."""
    select.select([wake, reports], [], [], timeout)
    try:
        return wake.recv(4096)
    except BlockingIOError:
        return b""
