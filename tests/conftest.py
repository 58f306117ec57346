"""What every test can count on."""

import signal
from collections.abc import Iterator

import pytest

# A shell that starts tests in the background has them ignore SIGINT, and their children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_OUTSIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "COTERIE_PARENT")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The file that takes the longest by far goes first, for another process to take all others."""
    items.sort(key=lambda item: item.path.name != "test_quickstart.py")


@pytest.fixture(autouse=True)
def on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun or SLURM around the tests."""
    for name in _OUTSIDE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """For tiny tensors: on a busy machine more threads wait for each other many times as long as
    they compute."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
