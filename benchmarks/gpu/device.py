"""Where the fused kernels run: on a Hopper GPU, or on the host, which tries the programs alone.

On the host the same CUDA sources run thread by thread (tests/csrc/compile_on_host.py): thousands of
times slower, with the same numbers. Times taken there say nothing.
"""

import sys
from pathlib import Path

import torch

from coterie.csrc import fused_ops, loader

ROOT = Path(__file__).resolve().parents[2]


class Lacking(RuntimeError):
    """The kernels cannot run on this device."""


def use(device: str) -> torch.device:
    """``device`` ("cuda" or "cpu") with the kernels for it. Raises Lacking where there are none."""
    if device == "cuda":
        reason, fix = loader.fused_missing()
        if reason:
            raise Lacking(f"the fused kernels cannot run: {reason}{f' ({fix})' if fix else ''}")
        return torch.device("cuda", torch.cuda.current_device())
    sys.path.insert(0, str(ROOT / "tests" / "csrc"))
    import compile_on_host

    csrc = compile_on_host.CSRC
    sources = [csrc / "plan.cu", *sorted((csrc / "fused_kernels").glob("*.cu"))]
    fused_ops.library = compile_on_host.load(*sources)
    return torch.device("cpu")


def ready(device: torch.device) -> None:
    """Wait until everything that was launched has been done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
