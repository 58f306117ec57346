"""One dataset and one crew of processes for all tests of conformance, or for each worker's."""

import os
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.conformance.case import write_documents
from tests.conformance.crew import Crew


@pytest.fixture(scope="session", autouse=True)
def own_core() -> None:
    """Of several workers (``pytest -n 2``) each keeps to one core with all its ranks: those of two
    crews that share all cores wait for each other's messages twice as long."""
    worker = os.environ.get("PYTEST_XDIST_WORKER")
    if worker is not None and sys.platform == "linux":
        cores = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, {cores[int(worker.removeprefix("gw")) % len(cores)]})


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
