"""A place to run what the documentation shows."""

from pathlib import Path

import pytest

from tests.docs.commands import make_place

_OUTSIDE = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_STEP_ID", "COTERIE_PARENT")


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Built-in corpora, made once."""
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def place(tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with configs and docs in it."""
    for name in _OUTSIDE:
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COTERIE_CACHE", str(cache))
    monkeypatch.chdir(tmp_path)
    make_place(tmp_path)
    return tmp_path
