"""These tests need a Hopper GPU. With COTERIE_GPU_TESTS=cpu the same ones run on the host, at small
sizes, where kernels are run thread by thread: that tries the tests, not the GPU."""

import os
from collections.abc import Iterator

import pytest
import torch

from benchmarks.gpu import device as gpu

ON_HOST = os.environ.get("COTERIE_GPU_TESTS") == "cpu"


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run; the test is skipped, with the reason, where they cannot."""
    try:
        return gpu.use("cpu" if ON_HOST else "cuda")
    except gpu.Lacking as lack:
        pytest.skip(str(lack))


@pytest.fixture(autouse=True)
def poisoned() -> Iterator[None]:
    """New tensors hold NaN, or the largest integer: what is never written is seen."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    yield
    torch.use_deterministic_algorithms(False)
