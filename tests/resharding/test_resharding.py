"""Saved on any layout, loaded on any other: the next steps are those of the unbroken run."""

from pathlib import Path

import pytest

from tests.conformance.case import write_truth
from tests.conformance.crew import TOLERANCE
from tests.distributed import run_ranks
from tests.resharding.runs import LAYOUTS, MUTATIONS, longer, resharded, wrongly_loaded

WORLD = 4
Errors = dict[str, dict[str, float]]


@pytest.fixture(scope="session")
def truth(data: Path, truths: Path) -> Path:
    """The unbroken run of one plain process."""
    file = truths / "longer.pt"
    write_truth(longer(data, {}), file)
    return file


@pytest.mark.parametrize("saved", LAYOUTS)
def test_saved_on_one_layout_loaded_on_all(
    saved: str, data: Path, truth: Path, tmp_path: Path
) -> None:
    """The next steps are right, and a way there and back changes no byte."""
    by_rank = run_ranks(WORLD, resharded, WORLD, saved, data, tmp_path, truth, timeout=250)
    for loaded in LAYOUTS:
        errors = worst_of(by_rank, loaded)
        assert errors.pop("changed") == 0, loaded
        assert {name: e for name, e in errors.items() if not e <= TOLERANCE} == {}, loaded


def test_errors_planted_in_loading_are_noticed(data: Path, truth: Path, tmp_path: Path) -> None:
    by_rank = run_ranks(WORLD, wrongly_loaded, WORLD, data, tmp_path, truth)
    for name in MUTATIONS:
        assert worst_of(by_rank, name)["weights"] > 1e-5, name


def worst_of(by_rank: list[Errors], what: str) -> dict[str, float]:
    """The largest of each error over the ranks."""
    return {name: max(rank[what][name] for rank in by_rank) for name in by_rank[0][what]}
