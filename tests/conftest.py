"""What every test can count on."""

import os
import signal
from collections.abc import Iterator

import pytest

# A shell that starts tests in the background has them ignore SIGINT, and their children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

# Before torch is imported, and for all processes that tests start. A file for each core runs at the
# same time: of more threads some wait for each other, spinning, many times as long as they compute.
os.environ["OMP_NUM_THREADS"] = "1"

_OUTSIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "COTERIE_PARENT")
_LONGEST = [
    *("test_quickstart", "test_certify", "test_fused_on_host", "test_peak", "test_gpu_command"),
    *("test_block_options", "test_gate", "test_dynamics_command", "test_kill_resume"),
]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Files that take the longest go first: at the end no process is left alone with one."""
    place = {name: number for number, name in enumerate(_LONGEST)}
    items.sort(key=lambda item: place.get(item.path.stem, len(place)))


@pytest.fixture(autouse=True)
def on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun or SLURM around the tests."""
    for name in _OUTSIDE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def threads() -> Iterator[None]:
    """As many as a process takes by itself, for code of ours that shares its work among them."""
    import torch

    from coterie.launch.processes import cores

    torch.set_num_threads(cores())
    yield
    torch.set_num_threads(1)
