"""Load the native libraries once, and say for each op whether it runs native and, if not, why.

An op that any machine can run has a plain PyTorch twin; those of the ``fused`` library, which are
for Hopper GPUs, have none: ask ``fused_missing`` before calling one.

``COTERIE_NATIVE=0`` in the environment makes every op use its plain PyTorch twin; it is read when
the first op is called (or ``status`` asked), not later.
"""

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
    "sort_by_expert": twins.sort_by_expert_reference,
    "gate": twins.gate_reference,
    "gate_backward": twins.gate_backward_reference,
    "swiglu": twins.swiglu_reference,
    "swiglu_backward": twins.swiglu_backward_reference,
}
REBUILD = f"{shlex.quote(sys.executable)} -m coterie.csrc.build"
_STALE, _UNLOADABLE = "older than its sources", "loading failed"
_CHOSEN: dict[tuple[str, str], Callable[..., Any]] = {}
_ROWS = ("permute", "unpermute", "unpermute_backward", "invert")
_NATIVE: dict[str, tuple[str, ...]] = {  # the ops that each library holds
    "cpu": (*_ROWS, "swiglu", "swiglu_backward"),
    "cuda": (*_ROWS, "sort_by_expert", "gate", "gate_backward"),
    "fused": (),
}
_DEVICES = ("cpu", "cuda")  # the library "fused" is for device type "cuda" too
_HOPPER = (9, 0)


class OpStatus(NamedTuple):
    """How one op runs on one device type."""

    op: str
    device: str  # "cpu" or "cuda"
    native: bool  # False: its plain PyTorch twin runs
    reason: str  # why not native, or "" when it is
    fix: str  # the command that would make it native, or ""


def kernel(op: str, device: str) -> Callable[..., Any]:
    """The function that runs ``op`` on device type ``device``: the native op, or its twin.

    Raises RuntimeError for an op without a twin where its library is of no use.
    """
    chosen = _CHOSEN.get((op, device))
    return _choose(op, device) if chosen is None else chosen


def twin(op: str) -> Callable[..., Any]:
    """The plain PyTorch twin of ``op``, for what no kernel takes."""
    return _TWINS[op]


def _choose(op: str, device: str) -> Callable[..., Any]:
    library = "fused" if op in _NATIVE["fused"] and device == "cuda" else device
    reason, fix = _absence(library) if op in _NATIVE.get(library, ()) else ("not compiled", "")
    if reason and op not in _TWINS:
        told = f"op {op} cannot run on {device}, and has no plain PyTorch twin: {reason}"
        raise RuntimeError(f"{told} (to change that: {fix})" if fix else told)
    chosen = _TWINS[op] if reason else getattr(torch.ops.coterie, op).default
    if not torch.compiler.is_compiling():  # torch.compile cannot change what is outside
        _CHOSEN[op, device] = chosen
    return chosen


@contextmanager
def twins_only() -> Iterator[None]:
    """Inside, every op runs its plain PyTorch twin: for comparisons, in one process and thread."""
    before = dict(_CHOSEN)
    _CHOSEN.update({(op, device): _TWINS[op] for op in _TWINS for device in _DEVICES})
    try:
        yield
    finally:
        _CHOSEN.clear()
        _CHOSEN.update(before)


def status() -> list[OpStatus]:
    """One record for each op that has a twin and each device type, for ``coterie doctor``."""
    records = []
    for device in _DEVICES:
        reason, fix = _absence(device)
        for op in _TWINS:
            if op in _NATIVE[device]:
                records.append(OpStatus(op, device, not reason, reason, fix))
            else:
                records.append(OpStatus(op, device, False, "made of PyTorch's own ops", ""))
    return records


def fused_missing() -> tuple[str, str]:
    """Why the fused kernels cannot run here, and the fix; ('', '') when they can.

    They can where their library is loaded and the current GPU is a Hopper GPU.
    """
    return _absence("fused")


def _absence(library: str) -> tuple[str, str]:
    """Why the ops of a library are not native here, and the fix; ('', '') when they are."""
    reason, fix = _load()[library]
    if reason or library == "cpu":
        return reason, fix
    if not torch.cuda.is_available():
        return "compiled, but torch sees no CUDA device", ""
    capability = torch.cuda.get_device_capability()
    if library == "fused":
        here = "".join(map(str, capability))
        other = f"for Hopper GPUs (sm_90), but this GPU is sm_{here}"
        return ("", "") if capability == _HOPPER else (other, "")
    return _gpu_mismatch(build.read_report(_HERE)["cuda"]["archs"], capability)


# torch.compile runs it, and does not trace it. torch.compiler.assume_constant_result says so by
# this name too, but imports torch._dynamo, which takes as long as importing torch does
_absence.__dict__["_dynamo_marked_constant"] = True


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
    """Load the libraries; for each the reason and fix of its absence, or ('', '')."""
    missing = {library: _missing(library) for library in build.LIBRARIES}
    for library in build.LIBRARIES:  # "cpu" is the first
        if missing[library][0]:
            continue
        if missing["cpu"][0]:
            missing[library] = ("the CPU library, which defines the ops, is missing", REBUILD)
            continue
        try:
            torch.ops.load_library(str(_HERE / build.library_name(library)))
        except OSError as error:
            missing[library] = (f"{_UNLOADABLE}: {str(error).splitlines()[0]}", REBUILD)
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
    for library, (reason, _) in missing.items():
        here = library == "cpu" or torch.cuda.is_available()
        if reason.startswith((_STALE, _UNLOADABLE)) and here:
            broken.setdefault(reason, []).append(library.upper())
    if broken:
        whys = "; ".join(f"{' and '.join(names)}: {why}" for why, names in broken.items())
        told = f"plain PyTorch runs in place of native ops ({whys}); rebuild them: {REBUILD}"
        print(f"coterie: {told}", file=sys.stderr)


def _missing(library: str) -> tuple[str, str]:
    """Why a library cannot be loaded, and the fix; ('', '') when it can."""
    if os.environ.get("COTERIE_NATIVE") == "0":
        return "COTERIE_NATIVE=0", "env -u COTERIE_NATIVE"
    entry = build.read_report(_HERE).get(library)
    if entry is None:
        return "not built", REBUILD
    if not entry["built"]:
        return entry["reason"], entry["fix"]
    if entry.get("sources") != build.source_hash(_HERE, library):
        return _STALE, REBUILD
    if not (_HERE / build.library_name(library)).exists():
        return "the library file is gone", REBUILD
    return "", ""
