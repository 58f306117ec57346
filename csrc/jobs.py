"""Run compilers side by side, as many as cores and memory allow, and keep what each one said.

``MAX_JOBS`` in the environment sets how many run at a time (default: one for each core). Only the
standard library is imported: see build.py.
"""

import os
import re
import shlex
import subprocess
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

JOB_BYTES = 4 << 30
"""What one compiler may take: a file that instantiates CUTLASS's collectives takes 2 to 4 GB."""

_USE = re.compile(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads")
_WARNING = re.compile(r"^ptxas.*(?:warning|\(C\d{4}\)).*", re.MULTILINE)  # C7510: wgmma serialized


class Failed(Exception):
    """A compiler did not succeed: why, and all that it printed."""

    def __init__(self, reason: str, log: str = "") -> None:
        super().__init__(reason)
        self.log = log


@dataclass(frozen=True)
class Done:
    """What one successful compiler printed and used."""

    log: str
    seconds: float  # of processor time, with its own child processes
    memory: int  # bytes, of the largest of its processes


def number_at_a_time() -> int:
    """How many compilers may run at once. Raises Failed for a bad ``MAX_JOBS``."""
    given = os.environ.get("MAX_JOBS", "")
    if given and not (given.isdecimal() and int(given)):
        raise Failed(f"MAX_JOBS={given} is not a positive whole number")
    wanted = int(given) if given else len(os.sched_getaffinity(0))
    return max(1, min(wanted, available_bytes() // JOB_BYTES))


def available_bytes() -> int:
    """The memory that new processes can have without swapping."""
    text = Path("/proc/meminfo").read_text()
    kilobytes = re.search(r"^MemAvailable:\s+(\d+) kB", text, re.MULTILINE)
    return int(kilobytes[1]) * 1024 if kilobytes else JOB_BYTES


def run_all(commands: list[list[str]], log_folder: Path) -> list[Done]:
    """Run the commands side by side. Raises Failed for the first that does not succeed."""
    logs = [log_folder / f"{number}.log" for number in range(len(commands))]
    with ThreadPoolExecutor(number_at_a_time()) as pool:
        return list(pool.map(run, commands, logs))


def run(command: list[str], log: Path) -> Done:
    """Run one command, its output into the file ``log``. Raises Failed."""
    print(shlex.join(command), flush=True)
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        _, status, usage = os.wait4(process.pid, 0)  # unlike wait(), says what was used
    process.returncode = os.waitstatus_to_exitcode(status)
    text = log.read_text(errors="replace")
    if process.returncode != 0:
        error = next((x for x in text.splitlines() if "error" in x.lower()), "no message")
        raise Failed(f"{command[0]} failed: {error.strip()[:200]}", text)
    return Done(text, round(usage.ru_utime + usage.ru_stime, 1), usage.ru_maxrss * 1024)


def kernel_figures(log: str) -> dict[str, Any]:
    """What ``ptxas -v`` says of a file: its number of kernels, and what they use.

    ``registers``: the most of a thread. ``stack``: the most bytes of local memory of a thread.
    ``spills``: bytes stored and loaded for want of registers, of all kernels together.
    ``warnings``: ptxas's own, among them those of serialized wgmma.
    """
    uses = [tuple(map(int, found)) for found in _USE.findall(log)]
    return {
        "kernels": log.count("Compiling entry function"),
        "registers": max(map(int, re.findall(r"Used (\d+) registers", log)), default=0),
        "stack": max((stack for stack, _, _ in uses), default=0),
        "spills": sum(stores + loads for _, stores, loads in uses),
        "warnings": _WARNING.findall(log),
    }
