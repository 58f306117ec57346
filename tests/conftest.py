"""What every test can count on."""

import signal

import pytest

# A shell that starts tests in the background has them ignore SIGINT, and their children inherit it.
signal.signal(signal.SIGINT, signal.default_int_handler)

_OUTSIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "COTERIE_PARENT")


@pytest.fixture(autouse=True)
def on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun or SLURM around the tests."""
    for name in _OUTSIDE:
        monkeypatch.delenv(name, raising=False)
