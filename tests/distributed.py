"""Real processes for tests: ``run_ranks(2, function, …)`` runs ``function(rank, …)`` on gloo ranks.

The processes come from a fork server that has torch and coterie imported already, so a group starts
in a fraction of a second. A rank that fails, dies or hangs ends the test with that rank's output
and, for those still running, the Python stack of every thread.
"""

import ctypes
import datetime
import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

_GRACE = 2.0  # seconds that the other ranks have to report after one has failed
_DYING = 5.0  # seconds that a process has to write its stacks and end
_PR_SET_PDEATHSIG = 1
# What is slow to import; DTensor imports torch._dynamo when it is first used.
_PRELOAD = [
    "torch.distributed.checkpoint",
    "torch.distributed.tensor",
    "torch._dynamo",
    "pytest",
    "coterie.launch.assemble",
]


class RankFailure(AssertionError):
    """A rank raised, died or did not finish; the message holds what every rank had to say."""


class Ranks:
    """``world`` processes running ``function(rank, *args)`` in one gloo group; a context manager.

    ``function`` must be importable (defined at the top level of a test module); it, ``args`` and
    what it returns are pickled. Leaving the block kills whatever still runs.
    """

    def __init__(
        self, world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0
    ) -> None:
        self.world = world
        self.timeout = timeout
        self._deadline = time.monotonic() + timeout
        self._folder = tempfile.TemporaryDirectory(prefix="ranks_")
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(_PRELOAD)
        self._connections: list[Connection] = []
        self.processes: list[Any] = []
        for rank in range(world):
            ours, theirs = context.Pipe()
            process = context.Process(
                target=_run_rank,
                args=(theirs, rank, world, self._folder.name, timeout, function, args),
                daemon=True,
            )
            process.start()
            theirs.close()
            self._connections.append(ours)
            self.processes.append(process)

    def __enter__(self) -> "Ranks":
        return self

    def __exit__(self, *exception: object) -> None:
        self.kill()
        for connection in self._connections:
            connection.close()
        self._folder.cleanup()

    def kill(self, *ranks: int) -> None:
        """SIGKILL these ranks (all when none is named) and wait until they are gone."""
        chosen = [self.processes[rank] for rank in ranks] if ranks else self.processes
        for process in chosen:
            process.kill()
        for process in chosen:
            process.join()

    def output(self, rank: int) -> str:
        """What the rank has written to stdout and stderr so far."""
        file = Path(self._folder.name) / f"output_{rank}"
        return file.read_text(errors="replace") if file.exists() else ""

    def results(self) -> list[Any]:
        """What every rank returned, by rank.

        Raises:
            RankFailure: a rank raised, died, or the time is over.
        """
        results: dict[int, Any] = {}
        failures: dict[int, str] = {}
        deadline = self._deadline
        while len(results) + len(failures) < self.world:
            open_ranks = [r for r in range(self.world) if r not in results and r not in failures]
            ready = wait(
                [self._connections[r] for r in open_ranks], max(0.0, deadline - time.monotonic())
            )
            if not ready:
                for rank in open_ranks:
                    failures[rank] = self._stack_of_hung(rank, since_failure=bool(failures))
                break
            for rank in open_ranks:
                if self._connections[rank] not in ready:
                    continue
                try:
                    succeeded, value = pickle.loads(self._connections[rank].recv_bytes())
                except EOFError:
                    self.processes[rank].join()
                    succeeded, value = False, f"died with exit code {self._exit_code(rank)}"
                if succeeded:
                    results[rank] = value
                else:
                    failures[rank] = value
                    deadline = min(deadline, time.monotonic() + _GRACE)
        if failures:
            raise RankFailure(self._story(failures))
        for connection in self._connections:  # every rank stayed until all were done; now they go
            connection.send(None)
        for process in self.processes:
            process.join(_DYING)
        return [results[rank] for rank in range(self.world)]

    def _exit_code(self, rank: int) -> int | None:
        return self.processes[rank].exitcode

    def _stack_of_hung(self, rank: int, *, since_failure: bool) -> str:
        """End the rank by SIGABRT, at which faulthandler writes the stacks of all its threads."""
        process = self.processes[rank]
        for number in (signal.SIGABRT, signal.SIGCONT):
            if process.pid is not None and process.is_alive():
                os.kill(process.pid, number)
        process.join(_DYING)
        process.kill()
        reason = (
            f"did not finish within {_GRACE:.0f} s of another rank's failure"
            if since_failure
            else f"did not finish within {self.timeout:.0f} s"
        )
        stacks = Path(self._folder.name) / f"stacks_{rank}"
        text = stacks.read_text(errors="replace") if stacks.exists() else "(had not started)"
        return f"{reason}; its stacks:\n{text}"

    def _story(self, failures: dict[int, str]) -> str:
        parts = [f"{len(failures)} of {self.world} ranks failed"]
        for rank, what in failures.items():
            parts.append(f"rank {rank}: {what}")
            if output := self.output(rank).strip():
                parts.append(f"rank {rank} wrote:\n{output[-4000:]}")
        return "\n".join(parts)


def run_ranks(
    world: int, function: Callable[..., Any], *args: Any, timeout: float = 60.0
) -> list[Any]:
    """Run ``function(rank, *args)`` on ``world`` gloo processes; returns what each returned.

    The default process group is ready when ``function`` starts, and its collectives time out with
    the test. ``timeout`` (seconds) covers starting, running and reporting.

    Raises:
        RankFailure: with every failing rank's traceback, output and, if it hung, stacks.
    """
    with Ranks(world, function, *args, timeout=timeout) as ranks:
        return ranks.results()


def _run_rank(
    connection: Connection,
    rank: int,
    world: int,
    folder: str,
    timeout: float,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)  # never outlive the tests
    output = os.open(f"{folder}/output_{rank}", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    with Path(f"{folder}/stacks_{rank}").open("w") as stacks:
        faulthandler.enable(stacks, all_threads=True)

        import torch
        import torch.distributed as dist

        from coterie.comm.gloo import schedule_as_batch

        torch.set_num_threads(1)
        schedule_as_batch()
        report: tuple[bool, Any]
        try:
            dist.init_process_group(
                "gloo",
                store=dist.FileStore(f"{folder}/store", world),
                rank=rank,
                world_size=world,
                timeout=datetime.timedelta(seconds=timeout),
            )
            report = (True, function(rank, *args))
        except BaseException:
            report = (False, f"raised\n{traceback.format_exc()}")
        sys.stdout.flush()
        sys.stderr.flush()
        try:
            # plain bytes: multiprocessing would hand over a file descriptor for each tensor
            connection.send_bytes(pickle.dumps(report))
        except Exception:  # a result that cannot be pickled
            text = f"returned what cannot be sent\n{traceback.format_exc()}"
            connection.send_bytes(pickle.dumps((False, text)))
        # Stay until all ranks have reported: a rank that left early would break the others'
        # collectives, and hide the first failure behind "connection closed by peer".
        connection.poll(timeout)
        faulthandler.disable()
