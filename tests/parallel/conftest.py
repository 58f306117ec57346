"""One tiny dataset for all tests of the trainer."""

from pathlib import Path

import pytest

from tests.parallel.tiny import write_data

_OUTSIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "COTERIE_PARENT")


@pytest.fixture(autouse=True)
def on_its_own(monkeypatch: pytest.MonkeyPatch) -> None:
    """No torchrun or SLURM around the tests."""
    for name in _OUTSIDE:
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: 40 training and 7 held-out documents."""
    return write_data(tmp_path_factory.mktemp("tiny") / "data")
