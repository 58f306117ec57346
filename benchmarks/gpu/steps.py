"""Steps of a run: each a process of its own with a limit, and none of them stops the others."""

import os
import signal
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

SPARE = 5.0
"""Seconds that are kept for writing the report."""
_TAIL = 4000


@dataclass(frozen=True)
class Step:
    """What to run, and for how many seconds at most."""

    name: str
    command: Sequence[str]
    limit: float
    figures: Path | None = None
    """Where it puts its figures, as soon as it has them."""


@dataclass
class Outcome:
    """What came of a step."""

    name: str
    status: str
    """"done", "failed", "out of time", "cut off" or "not run"."""
    seconds: float = 0.0
    told: str = ""
    """The end of what it printed; of a step that was not run, why."""


class Cut(SystemExit):
    """The run was told to end."""


class Clock:
    """The time that is left."""

    def __init__(self, seconds: float) -> None:
        self.end = time.monotonic() + seconds

    @property
    def left(self) -> float:
        return self.end - time.monotonic() - SPARE


def run(
    step: Step, clock: Clock, root: Path, environment: Mapping[str, str], least: float
) -> Outcome:
    """Run a step for its limit, or for the time that is left; not at all for less than ``least``
    seconds."""
    limit = min(step.limit, clock.left)
    if limit < min(least, step.limit):
        return Outcome(step.name, "not run", told=f"{max(clock.left, 0):.0f} seconds were left")
    begin = time.monotonic()
    with tempfile.TemporaryFile() as out:
        process = subprocess.Popen(
            step.command,
            cwd=root,
            env=dict(environment),
            stdout=out,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        try:
            process.wait(limit)
            status = "done" if process.returncode == 0 else "failed"
        except subprocess.TimeoutExpired:
            status = "out of time"
        finally:
            _end(process)
        out.seek(0)
        told = out.read().decode(errors="replace")[-_TAIL:]
    if status == "failed":
        told += f"\n(exit status {process.returncode})"
    return Outcome(step.name, status, round(time.monotonic() - begin, 1), told)


def _end(process: subprocess.Popen[bytes]) -> None:
    """The process and all that it has started in its session."""
    if process.poll() is None:
        os.killpg(process.pid, signal.SIGTERM)
        with suppress(subprocess.TimeoutExpired):
            process.wait(2)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()
