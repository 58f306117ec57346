"""One tiny dataset for all tests of the trainer."""

from pathlib import Path

import pytest

from tests.parallel.tiny import write_data


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: 40 training and 7 held-out documents."""
    return write_data(tmp_path_factory.mktemp("tiny") / "data")
