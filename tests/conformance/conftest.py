"""One dataset and one crew of processes for all tests of conformance."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.case import write_documents
from tests.conformance.crew import Crew


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Read only: training and held-out documents."""
    return write_documents(tmp_path_factory.mktemp("conformance") / "data")


@pytest.fixture(scope="session")
def truths(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder for the plain runs."""
    return tmp_path_factory.mktemp("truths")


@pytest.fixture(scope="session")
def crew(data: Path, truths: Path) -> Iterator[Crew]:
    with Crew(data, truths) as crew:
        yield crew
