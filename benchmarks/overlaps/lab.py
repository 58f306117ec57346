"""A case's ranks, each a process on a host of its own."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from benchmarks.hosts import Host, hosts, shape
from benchmarks.overlaps.cases import CORES, Case, Options

ROOT = Path(__file__).resolve().parents[2]
TOOLS = ("ip", "tc", "nsenter", "unshare", "taskset")
PORT = 29511
_GRACE = 3.0  # seconds that the other ranks have after one has failed
_DYING = 5.0  # seconds that a process has to write its stacks and end


def missing() -> str | None:
    """What hosts need and this process lacks."""
    if os.geteuid() != 0:
        return "that needs root"
    if lacking := [tool for tool in TOOLS if not shutil.which(tool)]:
        return f"no {', '.join(lacking)} (iproute2, util-linux)"
    if subprocess.run(["unshare", "--net", "true"], capture_output=True).returncode:
        return "no network namespaces (CAP_SYS_ADMIN)"
    return None


class CaseFailed(Exception):
    """A rank failed, died or hung; the message holds what every rank had to say."""


def measure(case: Case, options: Options) -> dict[str, Any]:
    """What the first rank of ``case`` found.

    Raises:
        CaseFailed: with every rank's output and, if it hung, stacks.
    """
    with hosts(case.hosts) as made, tempfile.TemporaryDirectory() as name:
        shape(made, case.megabits)
        asked = {"case": asdict(case), "options": asdict(options)}
        (Path(name) / "case.json").write_text(json.dumps(asked))
        return run("benchmarks.overlaps.rank", made, Path(name), options.time_limit)


def run(module: str, made: Sequence[Host], folder: Path, time_limit: float) -> dict[str, Any]:
    """``python -m module FOLDER`` on every host, a rank each; what the first one has written to
    FOLDER/result.json.

    Raises:
        CaseFailed: with every rank's output and, if it hung, stacks.
    """
    environment = {
        "WORLD_SIZE": str(len(made)),
        "LOCAL_RANK": "0",
        "MASTER_ADDR": made[0].address,
        "MASTER_PORT": str(PORT),
        "GLOO_SOCKET_IFNAME": "eth0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(ROOT),
    }
    command = [sys.executable, "-m", module, str(folder)]
    ranks: list[subprocess.Popen[str]] = []
    try:
        for host in made:
            with (folder / f"output_{host.number}").open("w") as output:
                own = environment | {"RANK": str(host.number)}
                ranks.append(host.start(command, host.number % CORES, own, output))
        hung = wait(ranks, time_limit)
    finally:
        for rank in ranks:
            rank.kill()
            rank.wait()
    if any(rank.returncode for rank in ranks):
        raise CaseFailed(story(ranks, hung, folder))
    found: dict[str, Any] = json.loads((folder / "result.json").read_text())
    return found


def wait(ranks: list[subprocess.Popen[str]], time_limit: float) -> list[int]:
    """Until all have ended, or a while after one has failed. Those that hang (their numbers are
    returned) end by SIGABRT, at which they write the stacks of all their threads."""
    deadline = time.monotonic() + time_limit
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.returncode for rank in ranks):
            deadline = min(deadline, time.monotonic() + _GRACE)
        time.sleep(0.1)
    hung = [number for number, rank in enumerate(ranks) if rank.poll() is None]
    for number in hung:
        ranks[number].send_signal(signal.SIGABRT)
    for number in hung:
        with contextlib.suppress(subprocess.TimeoutExpired):
            ranks[number].wait(_DYING)
    return hung


def story(ranks: list[subprocess.Popen[str]], hung: list[int], folder: Path) -> str:
    """What every rank had to say."""
    parts = []
    for number, rank in enumerate(ranks):
        how = "hung" if number in hung else f"ended with exit code {rank.returncode}"
        output = (folder / f"output_{number}").read_text(errors="replace")
        parts.append(f"rank {number} {how}:\n{output[-6000:].strip()}")
    return "\n".join(parts)
