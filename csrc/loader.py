"""Load the native libraries once, and say for each op whether it runs native and, if not, why.

``COTERIE_NATIVE=0`` in the environment makes every op use its plain PyTorch twin; it is read when
the first op is called (or ``status`` asked), not later.
"""

import json
import os
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

import torch

from coterie.csrc import build, twins

_HERE = Path(__file__).resolve().parent
_TWINS: dict[str, Callable[..., Any]] = {
    "permute": twins.permute_reference,
    "unpermute": twins.unpermute_reference,
    "unpermute_backward": twins.unpermute_backward_reference,
    "invert": twins.invert_reference,
    "swiglu": twins.swiglu_reference,
    "swiglu_backward": twins.swiglu_backward_reference,
}
REBUILD = f"{shlex.quote(sys.executable)} -m coterie.csrc.build"
_STALE, _UNLOADABLE = "older than its sources", "loading failed"
_CHOSEN: dict[tuple[str, str], Callable[..., Any]] = {}
_NATIVE = {"cpu": tuple(_TWINS), "cuda": ("permute", "unpermute", "unpermute_backward")}


class OpStatus(NamedTuple):
    """How one op runs on one device type."""

    op: str
    device: str  # "cpu" or "cuda"
    native: bool  # False: its plain PyTorch twin runs
    reason: str  # why not native, or "" when it is
    fix: str  # the command that would make it native, or ""


def kernel(op: str, device: str) -> Callable[..., Any]:
    """The function that runs ``op`` on device type ``device``: the native op, or its twin."""
    chosen = _CHOSEN.get((op, device))
    return _choose(op, device) if chosen is None else chosen


@torch.compiler.assume_constant_result  # torch.compile runs the choice, and does not trace it
def _choose(op: str, device: str) -> Callable[..., Any]:
    native = op in _NATIVE.get(device, ()) and not _absence(device)[0]
    chosen = getattr(torch.ops.coterie, op).default if native else _TWINS[op]
    _CHOSEN[op, device] = chosen
    return chosen


@contextmanager
def twins_only() -> Iterator[None]:
    """Inside, every op runs its plain PyTorch twin: for comparisons, in one process and thread."""
    before = dict(_CHOSEN)
    _CHOSEN.update({(op, device): _TWINS[op] for op in _TWINS for device in build.LIBRARIES})
    try:
        yield
    finally:
        _CHOSEN.clear()
        _CHOSEN.update(before)


def status() -> list[OpStatus]:
    """One record for each op and device type, for ``coterie doctor``."""
    records = []
    for device in build.LIBRARIES:
        reason, fix = _absence(device)
        for op in _TWINS:
            if op in _NATIVE[device]:
                records.append(OpStatus(op, device, not reason, reason, fix))
            else:
                records.append(OpStatus(op, device, False, "made of PyTorch's own ops", ""))
    return records


def _absence(device: str) -> tuple[str, str]:
    """Why the ops of ``device`` are not native, and the fix; ('', '') when they are."""
    reason, fix = _load()[device]
    if reason or device != "cuda":
        return reason, fix
    if not torch.cuda.is_available():
        return "compiled, but torch sees no CUDA device", ""
    archs = json.loads((_HERE / build.REPORT).read_text())["libraries"]["cuda"]["archs"]
    return _gpu_mismatch(archs, torch.cuda.get_device_capability())


def _gpu_mismatch(archs: list[str], capability: tuple[int, int]) -> tuple[str, str]:
    """Why machine code for ``archs`` does not run on a GPU of this capability, and the fix.

    It runs on its own major version from its minor on; with a suffix (90a), on that one only.
    """
    major, minor = capability
    for arch in archs:
        number = int(arch.rstrip("abcdefghijklmnopqrstuvwxyz"))
        newer = arch.isdigit() and number // 10 == major and number % 10 <= minor
        if newer or number == 10 * major + minor:
            return "", ""
    here = f"{major}{minor}"
    return (
        f"compiled for sm_{', sm_'.join(archs)}, but this GPU is sm_{here}",
        f"COTERIE_CUDA_ARCHS={','.join([*archs, here])} {REBUILD}",
    )


@cache
def _load() -> dict[str, tuple[str, str]]:
    """Load both libraries; for each device type the reason and fix of its absence, or ('', '')."""
    missing = {device: _missing(device) for device in build.LIBRARIES}
    if not missing["cuda"][0] and missing["cpu"][0]:
        missing["cuda"] = ("the CPU library, which defines the ops, is missing", REBUILD)
    for device in build.LIBRARIES:
        if not missing[device][0]:
            try:
                torch.ops.load_library(str(_HERE / build.library_name(device)))
            except OSError as error:
                missing[device] = (f"{_UNLOADABLE}: {str(error).splitlines()[0]}", REBUILD)
    if not missing["cpu"][0]:
        from coterie.csrc import fake  # noqa: F401  (registers shapes; needs the ops defined)
    _tell_of_broken(missing)
    return missing


def _tell_of_broken(missing: dict[str, tuple[str, str]]) -> None:
    """One line on rank 0 when a library was built but is of no use, on a device that is here.

    One that was not built is no surprise: the install said so, and ``coterie doctor`` does.
    """
    if os.environ.get("RANK", "0") != "0":
        return
    broken: dict[str, list[str]] = {}
    for device, (reason, _) in missing.items():
        here = device != "cuda" or torch.cuda.is_available()
        if reason.startswith((_STALE, _UNLOADABLE)) and here:
            broken.setdefault(reason, []).append(device.upper())
    if broken:
        whys = "; ".join(f"{' and '.join(names)}: {why}" for why, names in broken.items())
        told = f"plain PyTorch runs in place of native ops ({whys}); rebuild them: {REBUILD}"
        print(f"coterie: {told}", file=sys.stderr)


def _missing(device: str) -> tuple[str, str]:
    """Why the library for ``device`` cannot be loaded, and the fix; ('', '') when it can."""
    if os.environ.get("COTERIE_NATIVE") == "0":
        return "COTERIE_NATIVE=0", "env -u COTERIE_NATIVE"
    report = _HERE / build.REPORT
    if not report.exists():
        return "not built", REBUILD
    built = json.loads(report.read_text())
    entry = built["libraries"][device]
    if not entry["built"]:
        return entry["reason"], entry["fix"]
    if built["sources"] != build.source_hash(_HERE):
        return _STALE, REBUILD
    if not (_HERE / build.library_name(device)).exists():
        return "the library file is gone", REBUILD
    return "", ""
