"""What a run computes in, chosen before it starts."""

import contextlib
import time

import torch

from coterie.parallel.config import Precision


def resolve(precision: Precision, device: torch.device) -> Precision:
    """What ``auto`` means on ``device``: bf16 on CUDA, fp32 on a CPU. Others stay as they are."""
    if precision != "auto":
        return precision
    return "bf16" if device.type == "cuda" else "fp32"


def parameter_dtype(precision: Precision) -> torch.dtype:
    """Weights are float32, also under autocast; float64 for ``fp64``."""
    return torch.float64 if precision == "fp64" else torch.float32


def autocast(
    precision: Precision, device: torch.device
) -> torch.autocast | contextlib.nullcontext[None]:
    """The context for forward passes."""
    if precision == "bf16":
        return torch.autocast(device.type, torch.bfloat16)
    return contextlib.nullcontext()


def bf16_slowdown(size: int = 256) -> float:
    """How many times longer a bf16 matrix product takes than an fp32 one on this CPU, measured.

    A CPU without AVX512-BF16 or AMX emulates bf16: some 300 times slower.
    """
    return _product_seconds(size, torch.bfloat16) / _product_seconds(size, torch.float32)


def _product_seconds(size: int, dtype: torch.dtype) -> float:
    a = torch.ones(size, size, dtype=dtype)
    best = float("inf")
    for _ in range(3):
        start = time.perf_counter()
        a @ a
        best = min(best, time.perf_counter() - start)
    return best
