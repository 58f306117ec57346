"""What the figures were measured on, and two of its limits: copying, and one large product.

python -m benchmarks.gpu.machine --json PATH [--device cpu]
"""

import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import torch

from benchmarks.gpu import carried, program
from benchmarks.gpu.timing import medians


def described(device: torch.device) -> dict[str, Any]:
    """Machine, driver, versions, commit."""
    found: dict[str, Any] = {
        "commit": carried.commit(),
        "torch": torch.__version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
    }
    if device.type == "cuda":
        about = torch.cuda.get_device_properties(device)
        found |= {
            "gpu": about.name,
            "multiprocessors": about.multi_processor_count,
            "memory, GB": about.total_memory / 1e9,
            "L2, MB": about.L2_cache_size / 1e6,
            "cuda": torch.version.cuda,
            "driver": _said("nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"),
            "clocks": _said(
                "nvidia-smi", "--query-gpu=clocks.sm,clocks.mem,power.limit", "--format=csv"
            ),
            "nvcc": _said("nvcc", "--version").rpartition("\n")[2],
        }
    return found


def limits(device: torch.device, rounds: int) -> dict[str, float]:
    """GB/s of a copy, read and written bytes counted; TFLOP/s of a bfloat16 product of random
    numbers."""
    size, side = (1 << 31, 8192) if device.type == "cuda" else (1 << 16, 64)
    source = torch.randint(256, (size,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    a, b = torch.randn(2, side, side, device=device).to(torch.bfloat16)
    taken = medians({"copy": lambda: target.copy_(source), "mm": lambda: a @ b}, device, rounds)
    return {
        "copy, GB/s": 2 * size / taken["copy"] / 1e6,
        "product, TFLOP/s": 2 * side**3 / taken["mm"] / 1e9,
    }


def _said(*command: str) -> str:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"unknown ({error})"
    return done.stdout.strip() or f"unknown ({done.stderr.strip()[:80]})"


def main() -> None:
    options = program.options(__doc__)
    device = program.begin(options)
    found = program.Found(options.json)
    found.add({**described(device), **limits(device, options.rounds)})


if __name__ == "__main__":
    main()
