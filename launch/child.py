"""A rank that :mod:`coterie.launch.processes` started: its ties to the parent.

It dies with the parent, tells the parent that training has begun, and tells it why it fails, so
that an error that all ranks meet is shown once. The terminal's Ctrl-C goes to the parent, which
passes it on once.
"""

import ctypes
import json
import os
import signal
import socket
import sys
import traceback

from coterie.core.errors import RunError, UserError

PARENT, REPORTS = "COTERIE_PARENT", "COTERIE_REPORTS"
"""Environment: the parent's process id, and the descriptor of the socket for reports."""

_PR_SET_PDEATHSIG = 1
_LONGEST = 60_000  # bytes; below what a datagram can hold


def attach() -> None:
    """Tie this process to its parent; without effect in a process that is no such rank."""
    parent = os.environ.get(PARENT)
    if parent is None:
        return
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != int(parent):  # it died before the line above
        os.kill(os.getpid(), signal.SIGKILL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])  # blocked until Python was ready


def explain(error: BaseException) -> tuple[int, str]:
    """The exit code for ``error`` (2: the user's mistake, else 1) and what to print of it.

    A sentence where the error is one, or where a kernel has left one; a traceback for what nobody
    expected.
    """
    if isinstance(error, UserError):
        return 2, " ".join(str(error).split())
    if isinstance(error, RunError):
        return 1, " ".join(str(error).split())
    return 1, _complaint() or "".join(traceback.format_exception(error))


def _complaint() -> str | None:
    """Of a fused kernel that waited in vain, which ends as any CUDA error does; None: of none."""
    fused = sys.modules.get("coterie.csrc.fused_launch")  # not imported: that would import torch
    complaint: str | None = None if fused is None else fused.complaint()
    return complaint


def report(error: BaseException) -> bool:
    """Tell the parent of ``error``; False when there is none to tell."""
    code, text = explain(error)
    return _tell(code=code, text=text[-_LONGEST // 4 :])


def report_training() -> bool:
    """Tell the parent that from now on SIGINT and SIGTERM end this rank with a checkpoint; False
    when there is none to tell."""
    return _tell(training=True)


def _tell(**message: object) -> bool:
    descriptor = os.environ.get(REPORTS)
    if descriptor is None:
        return False
    text = json.dumps({"rank": int(os.environ["RANK"]), **message}, ensure_ascii=False)
    with socket.socket(fileno=os.dup(int(descriptor))) as reports:
        try:
            reports.send(text.encode())
        except OSError:  # the parent is gone, and so are we soon
            return False
    return True
