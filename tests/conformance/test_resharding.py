"""Saved on any layout, loaded on any other: the next steps are those of the unbroken run."""

import pytest
import torch

from tests.conformance.case import plain_run
from tests.conformance.resharding import LAYOUTS, MUTATIONS, longer, on_rank
from tests.distributed import run_ranks
from tests.parallel.tiny import write_data

pytestmark = pytest.mark.xdist_group("resharding")  # one fixture that takes minutes
Outcomes = dict[tuple[str, str], dict[str, float]]


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory) -> Outcomes:
    """The worst of all ranks, by (saved on, loaded on)."""
    folder = tmp_path_factory.mktemp("resharding")
    data = write_data(folder / "data")
    truth = folder / "truth.pt"
    torch.save(plain_run(longer(data, {})), truth)
    by_rank = run_ranks(4, on_rank, 4, data, folder, truth, timeout=900)
    return {
        pair: {name: max(rank[pair][name] for rank in by_rank) for name in by_rank[0][pair]}
        for pair in by_rank[0]
    }


@pytest.mark.timeout(900)
@pytest.mark.parametrize("loaded", LAYOUTS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_the_next_steps_are_those_of_the_unbroken_run(
    saved: str, loaded: str, outcomes: Outcomes
) -> None:
    errors = outcomes[saved, loaded]
    assert {name: e for name, e in errors.items() if name != "changed" and not e <= 1e-9} == {}


@pytest.mark.parametrize("loaded", LAYOUTS)
@pytest.mark.parametrize("saved", LAYOUTS)
def test_there_and_back_changes_no_byte(saved: str, loaded: str, outcomes: Outcomes) -> None:
    assert outcomes[saved, loaded]["changed"] == 0


@pytest.mark.parametrize("name", MUTATIONS)
def test_errors_planted_in_loading_are_noticed(name: str, outcomes: Outcomes) -> None:
    assert outcomes["mutation", name]["weights"] > 1e-5
